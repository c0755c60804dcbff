"""The input normalization of EfficientNet, which Keras divides twice with ImageNet weights."""

import keras
import numpy as np

from trainer.models.classifier import Classifier

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # mean and standard deviation of the channels


def set_normalization(classifier: Classifier, mean: list[float], deviation: list[float]) -> None:
    norm = classifier.backbone.get_layer("normalization")
    norm.adapt_mean.assign(mean)
    norm.adapt_variance.assign(np.square(deviation))


def normalize(classifier: Classifier, images: np.ndarray) -> np.ndarray:
    """The input of the first convolution, of images float32 [n, S, S, 3]."""
    backbone = classifier.backbone
    return keras.Model(backbone.input, backbone.get_layer("stem_conv_pad").input)(images).numpy()

"""Datasets of labeled images: sources, splits, order, decoding, augmentation and batches."""

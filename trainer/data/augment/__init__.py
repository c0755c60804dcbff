"""Augmentation of training images, with random values that are functions of seed, epoch and example."""

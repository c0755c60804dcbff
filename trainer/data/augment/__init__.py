"""Augmentation of training images; random values are functions of the seed, the epoch and the example."""

"""Augmentation of training images as a function of (seed, epoch, index)."""

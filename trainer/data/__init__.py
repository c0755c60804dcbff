"""Datasets: sources, splits, order, decoding, augmentation, batches."""

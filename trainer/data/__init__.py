"""Read datasets of labelled images: sources, splits, order, decoding, augmentation and batches."""

"""Random changes to training images, each a function of (seed, epoch, index)."""

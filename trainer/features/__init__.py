"""Cached features: the output of frozen layers, computed once and then read instead of the images."""

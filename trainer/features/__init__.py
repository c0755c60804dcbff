"""Cached features of frozen layers: the choice, the cut, the feature pass and the store."""

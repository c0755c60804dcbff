"""Cached features of frozen layers: when, where the network is cut, the pass, the store."""

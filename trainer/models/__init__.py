"""Backbones, heads, weights and what of them trains."""

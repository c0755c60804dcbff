"""Backbones, classifier head, pretrained weights and freezing."""

"""Evaluation: scores, confidence intervals, significance tests, label errors, duplicates and drift."""

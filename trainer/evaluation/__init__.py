"""Score classifiers: metrics, confidence intervals, significance tests, label errors, duplicates and drift."""

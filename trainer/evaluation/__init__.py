"""From labels and probabilities to scores, intervals and tests: what a run has learned, and how sure that is."""

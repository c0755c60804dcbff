"""From labels and probabilities to numbers, figures and a page: what a run has learned, and how sure that is."""

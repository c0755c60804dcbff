"""The report of a run: page, figures and tables."""

"""The validated configuration of a run."""

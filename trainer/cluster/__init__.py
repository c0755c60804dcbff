"""The workers and devices of a run, and the signals that stop it."""

"""The compiled step, optimizers and schedules, losses, early stopping and the state of a run."""

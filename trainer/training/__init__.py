"""Training step, optimizers, schedules, losses, early stopping and run state."""

"""Training: step, losses, optimizers, learning-rate schedules, early stopping and the run state."""

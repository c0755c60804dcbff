"""The compiled step, optimizers and schedules, run state and checkpoints, telemetry."""

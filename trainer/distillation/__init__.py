"""Knowledge distillation: the teacher of a run."""

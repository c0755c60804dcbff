"""Knowledge distillation: the teacher of a run, its files, and its soft labels."""

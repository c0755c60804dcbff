"""The contents of a run's output_dir, except report and export: how they are written, published and read."""

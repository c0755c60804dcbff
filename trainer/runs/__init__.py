"""Write, publish and read the files in a run's output_dir, except report and export."""

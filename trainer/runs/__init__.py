"""Everything in the output_dir of a run."""

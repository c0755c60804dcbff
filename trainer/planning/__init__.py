"""The dry run, which prints the plan of a run: its sections, estimates and checks."""

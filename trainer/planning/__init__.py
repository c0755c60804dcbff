"""The dry run: the plan of a run, its sections and its checks."""

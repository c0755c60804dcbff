"""The command line: arguments, configuration, sweeps, and what all commands have in common."""

"""What can be seen of a process from outside: its log lines, its life signs on a port, why it ended."""

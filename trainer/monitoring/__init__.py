"""What is seen of a process from outside: log lines, health, metrics, the termination message."""

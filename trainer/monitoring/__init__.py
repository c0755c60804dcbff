"""Monitoring of a process: log lines, health, metrics, the termination message."""

"""Monitoring of a process: log, health, metrics, termination message."""

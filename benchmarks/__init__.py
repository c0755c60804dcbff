"""Measurements that can be repeated: each module prints its table and names what it compares."""

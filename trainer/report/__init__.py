"""Write reports of scored splits, compare runs, and draw figures."""

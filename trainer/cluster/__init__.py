"""The machines and devices of a run, and being told to leave them."""

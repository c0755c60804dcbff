"""The parts that every `python -m trainer...` uses."""

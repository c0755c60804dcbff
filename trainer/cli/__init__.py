"""What every `python -m trainer...` shares."""

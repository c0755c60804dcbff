"""Export of the trained model to serving formats, with a parity check of each."""

"""Export of a trained model to serving formats, and a parity check of every file with the trainer."""

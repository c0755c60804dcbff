"""The trained model in the formats that others load, and proof that it answers as it did in training."""

"""HTTP server of an export: requests, batches of images, metrics, and drift from the reference."""

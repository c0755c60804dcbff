"""HTTP server of an export: requests, batches, metrics, and drift from the reference."""

"""An export answers over HTTP: requests, batches, metrics, and how far what comes has moved from the reference."""

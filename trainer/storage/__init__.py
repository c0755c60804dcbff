"""Files on disk and in buckets: atomic writes, leases, staging and a shard cache."""

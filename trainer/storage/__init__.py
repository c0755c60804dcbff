"""Files on disk and in buckets: atomic writes, leases, staging and a cache of shards."""

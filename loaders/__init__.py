"""From shards to batches: the epoch plan, storage, clip sampling, decoding."""

"""The shard format: writing, indexing, reading by offset, verifying, here and behind a URL."""

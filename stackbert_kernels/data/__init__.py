"""Text to unpadded batches: documentation (text that every Python has), prepare (text -> token shards), batches (shards -> samples)."""

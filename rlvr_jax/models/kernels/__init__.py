"""Attention and embedding: whatever of a model has a custom gradient or runs inside shard_map."""

"""Tar bytes to samples: where shards are, what is in them, and how to make them. No torch, no model."""

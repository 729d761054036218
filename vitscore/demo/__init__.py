"""The demo: held-out handwritten digits as shards, and two tiny checkpoints trained on the other digits."""

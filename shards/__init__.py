"""Locate, read and make WebDataset shards: from tar bytes to samples. Imports no torch and no model."""

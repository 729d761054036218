"""Throughput, stage by stage: one file a question."""

"""Metrics of finished parts: counts, figures, intervals and paired comparisons. No torch, no terminal."""

from vitscore.metrics.figures import compute_metrics

__all__ = ["compute_metrics"]

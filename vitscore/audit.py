"""What half precision changes: some images' predictions in fp32 too, compared.

Beside forward.py. The first images of the first rank are computed a second time with an fp32 trunk, on the very same
pixels; what differs is counted. Nothing of it reaches the parts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vitscore.kernels import RowScores

AUDITED_IMAGES = 64
Array = np.ndarray[Any, Any]


@dataclass
class Difference:
    """Half precision against fp32, of one model."""

    images: int = 0
    top1_differs: int = 0
    largest_prob_difference: float = 0.0
    """Of the winner's probability."""


class Audit:
    """Hands out the images to audit in the order of their batches, and counts what differs.

    Args:
        names: the models.
        num_images: how many to audit; 0 for none.
    """

    def __init__(self, names: Sequence[str], num_images: int) -> None:
        self._left = num_images
        self._lock = threading.Lock()
        self.differences = {name: Difference() for name in names}

    def draw(self, is_good_B: Array) -> Array:
        """The rows of a batch to audit: its first good ones, as long as there are images left."""
        rows = np.flatnonzero(is_good_B)[: self._left]
        self._left -= len(rows)
        return rows

    def add(self, name: str, half: RowScores, full: RowScores, rows: Array) -> None:
        """Count the rows of one batch; batches may come in any order and side by side."""
        differs = int((half.pred[rows] != full.pred[rows]).sum())
        largest = float(np.abs(half.prob[rows] - full.prob[rows]).max())
        with self._lock:
            found = self.differences[name]
            found.images += len(rows)
            found.top1_differs += differs
            found.largest_prob_difference = max(found.largest_prob_difference, largest)

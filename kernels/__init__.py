"""numba kernels on arrays: logits to predictions, and predictions to counts. No I/O and no models.

`score_rows` ranks logits, `add_counts` and `ConfusionCounts` count predictions, and `add_reliability` bins confidences;
`DeviceRows` and `DeviceConfusionCounts` rank and count on a GPU. Every kernel has a NumPy twin in
`vitscore.kernels.reference`. Names are loaded on first use. The kernels of the CPU encoder are in `cpu_bf16`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscore.kernels.counts import ConfusionCounts, SparseConfusion, add_counts
    from vitscore.kernels.cuda import DeviceRows
    from vitscore.kernels.cuda_counts import DeviceConfusionCounts
    from vitscore.kernels.reliability import add_reliability
    from vitscore.kernels.rows import RowScores, score_rows

__all__ = [
    "ConfusionCounts",
    "DeviceConfusionCounts",
    "DeviceRows",
    "RowScores",
    "SparseConfusion",
    "add_counts",
    "add_reliability",
    "score_rows",
]

_HOME = {
    "ConfusionCounts": "counts",
    "DeviceConfusionCounts": "cuda_counts",
    "DeviceRows": "cuda",
    "SparseConfusion": "counts",
    "add_counts": "counts",
    "add_reliability": "reliability",
    "RowScores": "rows",
    "score_rows": "rows",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"vitscore.kernels.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vitscore.kernels' has no attribute {name!r}")

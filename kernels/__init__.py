"""numba kernels on arrays: logits to predictions, predictions to counts. No I/O, no model.

`score_rows` ranks logits, `add_counts` and `ConfusionCounts` count predictions, `add_reliability` bins confidence,
`patches_bfloat16`, `layer_norm_bfloat16`, `softmax_bfloat16` and `attend_bfloat16` stand between a trunk's matrix
products on a CPU.
`DeviceConfusionCounts` and `DeviceRows` are their twins on a GPU. Each has a plain NumPy twin in
`vitscore.kernels.reference`. Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscore.kernels.attention import attend_bfloat16
    from vitscore.kernels.counts import ConfusionCounts, SparseConfusion, add_counts
    from vitscore.kernels.cuda import DeviceConfusionCounts, DeviceRows
    from vitscore.kernels.layernorm import layer_norm_bfloat16
    from vitscore.kernels.patches import patches_bfloat16
    from vitscore.kernels.reliability import add_reliability
    from vitscore.kernels.rows import RowScores, score_rows
    from vitscore.kernels.softmax import softmax_bfloat16

__all__ = [
    "ConfusionCounts",
    "DeviceConfusionCounts",
    "DeviceRows",
    "RowScores",
    "SparseConfusion",
    "add_counts",
    "add_reliability",
    "attend_bfloat16",
    "layer_norm_bfloat16",
    "patches_bfloat16",
    "score_rows",
    "softmax_bfloat16",
]

_HOME = {
    "ConfusionCounts": "counts",
    "DeviceConfusionCounts": "cuda",
    "DeviceRows": "cuda",
    "SparseConfusion": "counts",
    "add_counts": "counts",
    "add_reliability": "reliability",
    "attend_bfloat16": "attention",
    "layer_norm_bfloat16": "layernorm",
    "patches_bfloat16": "patches",
    "RowScores": "rows",
    "score_rows": "rows",
    "softmax_bfloat16": "softmax",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"vitscore.kernels.{_HOME[name]}"), name)
    raise AttributeError(f"module 'vitscore.kernels' has no attribute {name!r}")

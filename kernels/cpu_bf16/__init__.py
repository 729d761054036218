"""numba kernels of the bf16 encoder for CPUs (`vitscore.models.cpu_bf16`), run between its matrix products.

Every kernel has a NumPy twin in `reference`. Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitscore.kernels.cpu_bf16.attention import attend_bfloat16
    from vitscore.kernels.cpu_bf16.layernorm import layer_norm_bfloat16
    from vitscore.kernels.cpu_bf16.patches import patches_bfloat16
    from vitscore.kernels.cpu_bf16.softmax import softmax_bfloat16

__all__ = ["attend_bfloat16", "layer_norm_bfloat16", "patches_bfloat16", "softmax_bfloat16"]

_HOME = {
    "attend_bfloat16": "attention",
    "layer_norm_bfloat16": "layernorm",
    "patches_bfloat16": "patches",
    "softmax_bfloat16": "softmax",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

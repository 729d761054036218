"""numba's CUDA target, usable with NumPy 2.5 too.

numba-cuda (0.30.4 is the newest) registers `np.row_stack` when it first compiles, which NumPy 2.5 no longer has: every
kernel would end in an AttributeError. The name is lent while numba's own module is imported.
"""

from __future__ import annotations

import os

import numpy as np
from numba import cuda

__all__ = ["IS_SIMULATED", "cuda"]

IS_SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

if not IS_SIMULATED and not hasattr(np, "row_stack"):
    np.row_stack = np.vstack  # type: ignore[attr-defined, unused-ignore]
    try:
        import numba.cuda.cudaimpl  # noqa: F401
    finally:
        del np.row_stack  # type: ignore[attr-defined, unused-ignore]

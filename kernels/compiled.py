"""Compile kernels with numba on their first call, and cache the machine code on disk.

All kernels of this package use `compiled`. Nothing is compiled at import, so `import vitscore.kernels` takes no longer
than `import numba`. The code is cached beside the source or in the user's cache folder; if neither is writable, kernels
are compiled again in every process.

Fast math is never enabled: sums are computed in the order of the source, on every machine and for every batch. In
`lanes`, a product and a sum may be rounded once if the CPU has an instruction for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def compiled(function: AnyFunction) -> AnyFunction:
    """Compile a function that releases the interpreter lock, and cache its machine code if a folder is writable."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        kernel: AnyFunction = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # numba found no writable folder (a read-only installation and a read-only home).
        kernel = numba.njit(**options)(function)
    return kernel

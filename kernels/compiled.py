"""How kernels are compiled: by numba, on first call, kept on disk for the next process.

Every kernel of this package goes through `compiled`. Nothing is compiled at import, so that `import vitscore.kernels`
costs what `import numba` costs. The code is kept beside the source or in the user's cache folder; where neither can
be written, the kernel is compiled again in each process and nothing else changes.

It never enables fast math: a sum is added up in the order that the source says, on every machine and for every batch.
In `lanes` a product and a sum may be rounded once, where the machine has an instruction for both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def compiled(function: AnyFunction) -> AnyFunction:
    """Compile a function without the interpreter lock, keeping the machine code on disk where a folder allows it."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        kernel: AnyFunction = numba.njit(cache=True, **options)(function)
    except RuntimeError:
        # numba found no folder to write to (a read-only install and a read-only home).
        kernel = numba.njit(**options)(function)
    return kernel

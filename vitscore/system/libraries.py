"""Settings of the process itself: what libraries read once, before or while they are imported.

Before everything else of a run. Only for processes of our own: the command line's, the benches'.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from importlib.abc import MetaPathFinder
from typing import Any

M_ARENA_MAX = -8
"""glibc's number for the setting."""


def prepare_math_library() -> None:
    """Have MKL give a row the same bits whatever the number of threads; it reads this once, when torch loads it.

    Measured in fp32: without it 2 of 326 models and batch shapes differ between one and two threads, with it none, at
    no cost that could be seen.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def prepare_allocator() -> None:
    """Have glibc keep two heaps for all threads, instead of up to eight a core that each hold on to what was freed.

    Measured: a ViT-Tiny run peaks at 1,311 MB instead of 1,434.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def prepare_arrow() -> None:
    """Have pyarrow not look for pandas, which takes it a fifth of a second where there is one.

    For a process of our own: in one that also makes Arrow arrays of pandas' objects, they would be sequences like any.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow

        pyarrow.array([0])  # it looks once
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(name=fullname)


def look_for_garbage_less() -> None:
    """Have the garbage collector look after 100,000 new objects, not 700.

    Imports leave a million objects that stay: looking among them took a quarter of the time to import, and while a run
    scores a tenth of a ViT-Tiny's forward on two cores.
    """
    gc.set_threshold(100_000, 50, 1000)

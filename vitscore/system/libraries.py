"""Process-wide settings of libraries, which they read once, before or during import.

They are applied before everything else in a run, and only in processes that vitscore owns: those of the command line
and the benches.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from importlib.abc import MetaPathFinder
from typing import Any

M_ARENA_MAX = -8
"""glibc's number of the parameter."""


def prepare_math_library() -> None:
    """Make MKL return the same bits for a row with any number of threads; MKL reads the setting when torch loads it.

    Measured in fp32: without it, 2 of 326 combinations of model and batch shape differ between one and two threads.
    With it none do, at no measurable cost.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")


def prepare_allocator() -> None:
    """Limit glibc to two heaps for all threads; by default it has up to eight per core, which all retain freed memory.

    Measured: a ViT-Tiny run peaks at 1,311 MB instead of 1,434.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def prepare_arrow() -> None:
    """Keep pyarrow from importing pandas, which takes a fifth of a second if it is installed.

    Only for processes that vitscore owns: pyarrow would then treat pandas objects as ordinary sequences.
    """
    if "pandas" in sys.modules:
        return
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        import pyarrow

        pyarrow.array([0])  # pyarrow looks for pandas once, here
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(name=fullname)


@contextlib.contextmanager
def without_sklearn() -> Iterator[None]:
    """Have scikit-learn look as if it were not installed, unless it is imported already.

    transformers 5.17 imports it for text generation, and pandas with it: half of the time that importing transformers
    takes. Later releases do not.
    """
    if "sklearn" in sys.modules:
        yield
        return
    sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop("sklearn", None)


def look_for_garbage_less() -> None:
    """Run the garbage collector after 100,000 new objects instead of 700.

    Imports create a million permanent objects. Scanning them took a quarter of the import time, and during a run a
    tenth of a ViT-Tiny's forward on two cores.
    """
    gc.set_threshold(100_000, 50, 1000)

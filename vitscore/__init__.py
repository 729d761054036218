"""Score image classifiers over millions of images.

`score(...)` scores models like `vitscore run`; `load_run(DIR)` opens a finished run. Both are imported on first use, so
that importing the package (and `vitscore --help`) does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vitscore.system.machine import VERSION

__version__ = VERSION
__all__ = ["Run", "__version__", "load_run", "score"]

if TYPE_CHECKING:
    from vitscore.api import Run, load_run, score


def __getattr__(name: str) -> Any:
    if name in ("score", "load_run", "Run"):
        from vitscore import api

        return getattr(api, name)
    raise AttributeError(f"module 'vitscore' has no attribute {name!r}")

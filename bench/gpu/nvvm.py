"""Find NVVM, the compiler library that numba needs for the CUDA kernels, and tell numba where it is.

numba-cuda asks cuda.pathfinder for the library, which looks into pip's packages, asks the system's loader, then looks
into `nvvm/lib64` below CUDA_PATH or CUDA_HOME; libdevice it looks for in a package, below CUDA_HOME and below
/usr/local/cuda. A toolkit may lie elsewhere, `nvcc` on the path may be a script that calls another, and a toolkit made
of pip's packages has the library in `lib`: for all of these there are variables to be set.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

LIBDEVICE = "nvvm/libdevice/libdevice.10.bc"
IN_TOOLKIT, IN_PACKAGE = "nvvm/lib64", "lib"
"""Where the library is, below a toolkit and below pip's package of CUDA 13."""
NAMES = ("libnvvm.so.4", "libnvvm.so")


@dataclass(frozen=True)
class Nvvm:
    """A place that holds NVVM."""

    root: Path
    """The folder that holds `nvvm/libdevice`."""
    library: Path | None
    """None where the system's loader finds it by name."""
    source: str
    """How it was found: `package`, a variable, a folder, or `nvcc`."""
    is_known: bool
    """Whether numba finds it without help."""

    def variables(self, work: Path) -> dict[str, str]:
        """Variables that numba needs in its environment.

        Args:
            work: where links are made, if the library is where no variable leads.
        """
        if self.is_known:
            return {}
        root = self.root
        if self.library is not None and self.library.parent != root / IN_TOOLKIT:
            root = work / "toolkit"
            link(root / IN_TOOLKIT / NAMES[1], self.library)
            link(root / IN_TOOLKIT / NAMES[0], self.library)
            link(root / LIBDEVICE, self.root / LIBDEVICE)
        return {"CUDA_HOME": str(root), "CUDA_PATH": str(root)}


def find(
    environment: Mapping[str, str] | None = None,
    *,
    packages: Iterable[str] | None = None,
    usual: Path = Path("/usr/local/cuda"),
    asks_loader: bool = True,
) -> Nvvm | None:
    """NVVM's place on this machine; None where there is none.

    Args:
        environment: default: this process'.
        packages: folders that hold Python packages; default: those of this interpreter.
        usual: where a toolkit is installed by default.
        asks_loader: whether the system's loader is asked for the library.
    """
    given = os.environ if environment is None else environment
    is_loadable = asks_loader and can_load()
    for root, source in _candidates(given, sys.path if packages is None else packages, usual):
        if not (root / LIBDEVICE).is_file():
            continue
        library = library_in(root)
        if source == "package" and library is not None:
            return Nvvm(root, library, source, is_known=True)
        if is_loadable:
            has_other = any(given.get(name, str(root)) != str(root) for name in ("CUDA_HOME", "CUDA_PATH"))
            return Nvvm(root, None, source, is_known=root == usual and not has_other)
        if library is not None:
            return Nvvm(root, library, source, is_known=False)
    return None


def library_in(root: Path) -> Path | None:
    paths = (root / folder / name for folder in (IN_TOOLKIT, IN_PACKAGE) for name in NAMES)
    return next((path for path in paths if path.exists()), None)


def can_load() -> bool:
    """Whether the system's loader finds the library by its name."""
    for name in NAMES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def _candidates(given: Mapping[str, str], packages: Iterable[str], usual: Path) -> Iterator[tuple[Path, str]]:
    for folder in packages:
        yield from ((path, "package") for path in sorted(Path(folder or ".").glob("nvidia/*")) if path.is_dir())
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if given.get(name):
            yield Path(given[name]), name
    yield usual, str(usual)
    if nvcc := shutil.which("nvcc", path=given.get("PATH", "")):
        yield from ((root, "nvcc") for root in roots_of(Path(nvcc)))
    yield from ((path, str(path)) for path in sorted(usual.parent.glob("cuda-*"), reverse=True))


def roots_of(nvcc: Path) -> Iterator[Path]:
    """The toolkits that an nvcc may belong to: its own, and where it is a script those of the nvcc that it calls."""
    yield nvcc.resolve().parent.parent
    with nvcc.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"#!"):
        for match in re.finditer(r"(/[^\s\"']+)/bin/nvcc", start.decode(errors="replace")):
            yield Path(match[1]).resolve()


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)

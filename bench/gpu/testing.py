"""The tests marked `gpu`, shared out over the parts; every outcome is a figure the moment it is known.

Files whose packages are not here are not collected: a machine with a GPU may lack what other tests need.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitscore.bench.gpu import figures
from vitscore.bench.gpu.day import NO_GPU, ROOT, Day, has_gpu

TESTS = ROOT / "tests"
TWINS = "test_kernels_cuda.py"


def step_of(test: str) -> str:
    """Which step runs a test.

    Args:
        test: `FILE::NAME[PARAMETERS]`.
    """
    file, _, name = test.partition("::")
    if "compiled" in name:
        return "compiled tests"
    if file == TWINS:
        return "twins"
    return "forward tests" if "cuda" in file and "dali" not in name else "tests"


def gpu_tests(folder: Path = TESTS) -> dict[Path, list[str]]:
    """By file: the functions marked `gpu`; read as text, since importing needs packages."""
    functions = {}
    for path in sorted(folder.glob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        names = [
            node.name
            for node in (ast.parse(text).body if "mark.gpu" in text else ())
            if isinstance(node, ast.FunctionDef)
            and any("mark.gpu" in ast.unparse(mark) for mark in node.decorator_list)
        ]
        if names:
            functions[path] = names
    return functions


def files_of(step: str, folder: Path = TESTS) -> list[Path]:
    """Files that may hold a test of the step; parameters, which may send a test elsewhere, are not known yet."""
    named = {path: {step_of(f"{path.name}::{name}") for name in names} for path, names in gpu_tests(folder).items()}
    return [path for path, steps in named.items() if step in steps or (step == "tests" and "forward tests" in steps)]


def missing_packages(path: Path) -> list[str]:
    """Packages that a file imports at its top and that are not installed; the tests' helper folders are no packages."""
    names = [name for name in _imported(path) if not (path.parent / name).is_dir()]
    return [name for name in names if importlib.util.find_spec(name) is None]


def _imported(path: Path) -> Iterator[str]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


class Chosen:
    """A plugin of pytest: keeps the step's tests, and writes their outcomes one by one."""

    def __init__(self, day: Day) -> None:
        self._day = day

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        named = {item: f"{item.path.name}::{item.name}" for item in items if item.get_closest_marker("gpu")}
        kept = [item for item, name in named.items() if step_of(name) == self._day.step]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A test's call, or what kept it from being called."""
        if report.when != "call" and report.outcome == "passed":
            return
        name = f"{Path(report.location[0]).name}::{report.nodeid.partition('::')[2]}"
        note = str(report.longrepr).strip().splitlines()[-1][:200] if report.outcome == "failed" else ""
        if report.outcome == "skipped":
            note = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        self._day.figure(figures.TEST + name, report.outcome, note=note, seconds=round(report.duration, 2))


def run(day: Day) -> None:
    """Run the step's tests.

    Raises:
        SystemExit: a test failed, or pytest could not collect.
    """
    # The tests are a checkout's, and so is what they need.
    pytest: Any = importlib.import_module("pytest")
    files = []
    for path in files_of(day.step):
        if missing := missing_packages(path):
            day.could_not(f"file {path.name}", f"no package {', '.join(missing)}")
        else:
            files.append(str(path))
    words = ["-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "--basetemp", str(day.work / "pytest")]
    code = pytest.main([*words, "-m", "gpu", "-rsfE", "--tb=short", *files], plugins=[Chosen(day)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise SystemExit(int(code))


def twins(day: Day) -> None:
    """The CUDA kernels beside their NumPy twins: compiled for Hopper, then on the device; simulated without one.

    Raises:
        SystemExit: they differ, or cannot be compiled.
    """
    failed = 0
    ways: dict[str, tuple[list[str], dict[str, str]]] = {"compiled for sm_90": (["compiled"], {})}
    if not has_gpu():
        ways["simulated"] = ([], {"NUMBA_ENABLE_CUDASIM": "1"})
        day.could_not("twins on the device", NO_GPU)
    for name, (words, variables) in ways.items():
        command = [sys.executable, str(TESTS / "support" / "cudatwins.py"), *words]
        done = subprocess.run(
            command, env={**os.environ, **variables}, check=False, stderr=subprocess.PIPE, text=True, timeout=240
        )
        sys.stdout.write(done.stderr)
        failed += done.returncode != 0
        note = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no word"])[-1][:200]
        outcome = "passed" if done.returncode == 0 else "failed"
        day.figure(f"{figures.TEST}twins, {name}", outcome, note=note)
    sys.stdout.flush()
    run(day)
    if failed:
        raise SystemExit(1)

"""How long until something happens?

Question: seconds of `vitscore --help`; from the shell to the first batch of the demo, and to its end; and of the
          imports that are most of it, each alone and all together.
Expected: help under 0.3 s, since it imports no torch; first batch under 8 s, of which 5 are imports (torch 2, what
          torchvision and transformers add 2, DALI 0.7, numba 0.4); the whole demo 6 s more.
Command:  vitscore bench startup
Method:   processes of their own, one at a time, files in the page cache; one run before that is not counted. The first
          batch is when run.json says that it was settled (`first_batch_s`, from the process' start). An import is its
          process less an empty one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from vitscore.bench.harness.timing import Figure, figure, rounds_in_turn, run_process, show

ROUNDS = 5
HELP_TARGET_S, FIRST_BATCH_TARGET_S = 0.3, 8.0
NOTHING, TOGETHER = "nothing", "all that a run imports"
IMPORTS = {
    NOTHING: "",
    "torch": "import torch",
    "torchvision": "import torchvision.transforms.v2",
    "transformers, ViT": "from transformers import ViTForImageClassification",
    "transformers, CLIP": "from transformers import CLIPModel",
    "DALI": "import nvidia.dali.fn",
    "numba": "import numba",
    "pyarrow": "import pyarrow.parquet",
    TOGETHER: "import vitscore.engine.loop, vitscore.models.image_model, vitscore.decode.dali; "
    "from transformers import ViTForImageClassification, CLIPModel",
}
QUICK_IMPORTS = (NOTHING, "pyarrow")


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Seconds of help, of the demo and its first batch, and of each import."""
    rounds = 1 if quick else ROUNDS
    if not quick:
        help_s()
        demo_s()
    helped = figure([help_s() for _ in range(rounds)], "s")
    demos = [demo_s() for _ in range(rounds)]
    codes = {name: code for name, code in IMPORTS.items() if not quick or name in QUICK_IMPORTS}
    return {
        "help_s": helped,
        "first_batch_s": figure([first for first, _ in demos], "s"),
        "demo_s": figure([whole for _, whole in demos], "s"),
        "import_s": measure_imports(codes, rounds),
    }


def measure_imports(codes: dict[str, str], rounds: int) -> dict[str, Figure]:
    """Seconds of each, less what an empty process takes in the same round."""
    ways = {name: partial(code_s, code) for name, code in codes.items()}
    found = rounds_in_turn(ways, rounds)
    empty = found.pop(NOTHING)
    return {
        name: figure([taken - base for taken, base in zip(each, empty, strict=True)], "s")
        for name, each in found.items()
    }


def help_s() -> float:
    return run_process([sys.executable, "-m", "vitscore", "--help"]).wall_s


def demo_s() -> tuple[float, float]:
    """Seconds from the shell to the demo's first batch, and to its end."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "run"
        whole_s = run_process([sys.executable, "-m", "vitscore", "demo", "-o", str(output)]).wall_s
        session = json.loads((output / "run.json").read_bytes())["sessions"][-1]
    return session["first_batch_s"], whole_s


def code_s(code: str) -> float:
    return run_process([sys.executable, "-c", code]).wall_s


def table(result: dict[str, Any]) -> list[str]:
    rows = [
        (f"vitscore --help (target {HELP_TARGET_S} s)", result["help_s"]),
        (f"demo, first batch (target {FIRST_BATCH_TARGET_S:.0f} s)", result["first_batch_s"]),
        ("demo, whole", result["demo_s"]),
        *((f"import: {name}", taken) for name, taken in result["import_s"].items()),
    ]
    lines = [f"{'seconds':<44}{'median (range)':>30}"]
    return [*lines, *(f"{name:<44}{show(taken, 2):>30}" for name, taken in rows)]

"""`python -m vitscore.bench [NAME ...]`: run benches, print their tables, write one JSON each.

A bench is a module beside this one with `measure()` and `table(result)`; its docstring states question, expectation,
command and method. JSON goes to `build/bench/` below the current folder, or to the folder that $OUT names.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from pathlib import Path

NAMES = ("whole", "memory", "corrupt", "offline", "coverage", "counting", "robustness")
LONG = ("million",)
"""Only run by name."""


def main(names: list[str]) -> int:
    """Run the named benches; without names all but the long ones."""
    unknown = sorted(set(names) - {*NAMES, *LONG})
    if unknown:
        sys.stderr.write(f"unknown bench: {', '.join(unknown)} - expected {', '.join((*NAMES, *LONG))}.\n")
        return 2
    out = Path(os.environ.get("OUT", "build/bench"))
    out.mkdir(parents=True, exist_ok=True)
    from vitscore.machine import hardware, versions

    for name in names or NAMES:
        module = importlib.import_module(f"vitscore.bench.{name}")
        sys.stdout.write(f"{(module.__doc__ or name).splitlines()[0]}\n")
        result = module.measure()
        sys.stdout.write("".join(f"  {line}\n" for line in module.table(result)))
        document = {"bench": name, "result": result, "hardware": hardware(), "versions": versions()}
        (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    sys.stdout.write(f"JSON in {out} ({platform.machine()})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

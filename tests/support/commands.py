"""Run commands in subprocesses."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Done:
    """The exit code and output of a command."""

    code: int
    out: str
    err: str


def start(*command: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 240) -> Done:
    """Run a command of the environment in a subprocess."""
    words = [str(word) for word in command]
    if words[0] in ("vitscore", "accelerate", "torchrun"):
        words[0] = str(Path(sys.executable).parent / words[0])
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )
    return Done(done.returncode, done.stdout, done.stderr)

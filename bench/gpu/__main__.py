"""`make gpu`: run one part of the day, or all three; see this package's docstring.

From the environment: PART (1, 2 or 3; default all), OUT (default build/gpu), LIMIT (seconds for a part, where it has
less than its own), REHEARSE=1 (tiny sizes, and no GPU needed), WORK (default: a folder among the temporary files).

Exit 0 where every step ended well, 1 where one did not, 2 for a wrong word, 4 without a GPU, 130 when interrupted.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from vitscore.bench.gpu import parts
from vitscore.bench.gpu.day import NO_GPU, Day, gpu_name
from vitscore.bench.gpu.runner import KEPT, LOG, TABLE, run_part

SLOWER = 10
"""How many times as long a rehearsal's limits are, which may have two cores instead of sixteen."""


def main(words: list[str]) -> int:
    if words[:1] == ["step"]:
        parts.function_of(words[1])(Day.from_environment())
        return 0
    asked = os.environ.get("PART", "")
    if asked not in ("", *map(str, parts.PARTS)):
        return refuse(f"no such part: PART={asked} - expected 1, 2 or 3, or none for all", 2)
    is_rehearsal = os.environ.get("REHEARSE", "") not in ("", "0")
    if not is_rehearsal and not gpu_name():
        return refuse(
            f"no GPU to measure: {NO_GPU}. Run it on a machine with an NVIDIA GPU and its driver; "
            "REHEARSE=1 runs every step at tiny sizes without one",
            4,
        )
    out = Path(os.environ.get("OUT") or "build/gpu").absolute()
    out.mkdir(parents=True, exist_ok=True)
    work = work_folder(is_rehearsal=is_rehearsal)
    for name in (LOG, TABLE):
        (out / name).unlink(missing_ok=True)
    limit = os.environ.get("LIMIT")
    said: list[str] = []
    for number in [int(asked)] if asked else list(parts.PARTS):
        ended = run_part(
            parts.PARTS[number].scaled(SLOWER if is_rehearsal else 1),
            number,
            out=out,
            work=work,
            is_rehearsal=is_rehearsal,
            total_s=float(limit) if limit else None,
            say=say,
        )
        said += [one.said for one in ended]
        if "interrupted" in said:
            return 130
    say(f"in {out}: {', '.join(name for name in KEPT if (out / name).exists())}")
    return 0 if set(said) == {"ok"} else 1


def work_folder(*, is_rehearsal: bool) -> Path:
    """Make the folder that parts share; private, since its name can be guessed."""
    name = f"vitscore-gpu-{os.getuid()}{'-rehearsal' if is_rehearsal else ''}"
    work = Path(os.environ.get("WORK") or Path(tempfile.gettempdir()) / name).absolute()
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    return work


def refuse(why: str, code: int) -> int:
    sys.stderr.write(f"{why}.\n")
    return code


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

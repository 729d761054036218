"""Plan how samples are cut into shards, and claim the output folder.

Sits between the source and the writers. The plan is stored beside the shards, so that an interrupted `shards make` can
be resumed, and one with a different plan is refused with the differences named. Writes no shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vitscore.errors import OtherRunError, UsageError
from vitscore.shards.making.sources import Sample, Source
from vitscore.shards.making.write import sample_bytes, write_file
from vitscore.system.durable import TEMPORARY_SUFFIX

PLAN_FILE = "make-plan.json"
CLASSES_FILE = "classes.txt"
DEFAULT_SHARD_BYTES = 256_000_000
TAR_END_BYTES = 10_240
"""Upper bound of a tar's end: two zero blocks, and tarfile's padding to its record size."""

_SHARD_NAME = re.compile(r"shard-\d{6,}\.tar")


@dataclass(frozen=True)
class MakePlan:
    """The plan of a set of shards; a folder whose plan differs holds another data set."""

    schema: int
    source: str
    images: int
    shards: int
    per_shard: int | None
    shard_bytes: int | None
    shuffle: int | None
    classes: str
    content: str
    """Hash of the keys, labels, sizes and modification times of the images, in order."""


def cut_samples(samples: list[Sample], *, per_shard: int | None, shard_bytes: int | None) -> list[list[Sample]]:
    """Return the samples of every shard."""
    if per_shard is not None:
        if per_shard < 1:
            raise UsageError("too few samples per shard", where="--per-shard", expected="1 or more", got=str(per_shard))
        return [samples[start : start + per_shard] for start in range(0, len(samples), per_shard)]
    limit = max(1, (shard_bytes or DEFAULT_SHARD_BYTES) - TAR_END_BYTES)
    cuts: list[list[Sample]] = []
    size = limit
    for sample in samples:
        num_bytes = sample_bytes(sample)
        if size + num_bytes > limit or not cuts:
            cuts.append([])
            size = 0
        cuts[-1].append(sample)
        size += num_bytes
    return cuts


def make_plan(
    source: Source,
    samples: Sequence[Sample],
    num_shards: int,
    *,
    per_shard: int | None,
    shard_bytes: int | None,
    shuffle: int | None,
) -> MakePlan:
    """Return the plan of a set of shards, with hashes of the classes and samples."""
    content = hashlib.sha256()
    for sample in samples:
        content.update(f"{sample.key}\0{sample.extension}\0{sample.label}\0{sample.image.fingerprint}\n".encode())
    classes = hashlib.sha256(json.dumps(source.classes).encode())
    return MakePlan(
        schema=1,
        source=source.kind,
        images=len(samples),
        shards=num_shards,
        per_shard=per_shard,
        shard_bytes=shard_bytes,
        shuffle=shuffle,
        classes=classes.hexdigest(),
        content=content.hexdigest(),
    )


def claim_folder(folder: Path, plan: MakePlan, *, overwrite: bool) -> None:
    """Store the plan in its folder, unless it is there already.

    With `overwrite`, the shards of a different plan are removed first; shards that were not made here never are.

    Raises:
        OtherRunError: the folder holds shards of a different plan, or shards that were not made here.
        SetupError: the plan cannot be written.
    """
    for leftover in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        leftover.unlink()
    present = sorted(path for path in folder.glob("*.tar"))
    plan_file = folder / PLAN_FILE
    if plan_file.exists():
        differences = _differences(plan_file, plan)
        if not differences:
            return
        if not overwrite:
            raise OtherRunError(
                "the folder holds other shards",
                where=str(folder),
                got="; ".join(differences),
                next_step="Choose another folder, or pass --overwrite.",
            )
        for path in present:
            if _SHARD_NAME.fullmatch(path.name):
                path.unlink()
        (folder / CLASSES_FILE).unlink(missing_ok=True)
        # Removed last: until then the old plan still describes the shards in the folder.
        plan_file.unlink()
        present = [path for path in present if path.exists()]
    if present:
        raise OtherRunError(
            "the folder holds shards that were not made here",
            where=str(folder),
            got=present[0].name,
            next_step="Choose another folder.",
        )
    write_file(plan_file, json.dumps(asdict(plan), indent=2).encode() + b"\n")


def _differences(plan_file: Path, plan: MakePlan) -> list[str]:
    """Describe how the plan in the folder differs from `plan`."""
    try:
        stored = json.loads(plan_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        return ["an unreadable plan"]
    differences = []
    for name, value in asdict(plan).items():
        if stored.get(name) == value:
            continue
        if name == "classes":
            differences.append("other class names")
        elif name == "content":
            differences.append("other images or labels")
        else:
            differences.append(f"{name.replace('_', ' ')} {stored.get(name)} instead of {value}")
    return differences


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock the output folder against a second `shards make`; the lock ends with the process.

    Raises:
        UsageError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError("the folder is in use", where=str(folder), got="another `shards make`") from None
        except OSError:
            # The file system has no locks: two processes would only write the same bytes twice.
            pass
        yield
    finally:
        os.close(fd)

"""The run's folder: its record, the frozen list of shards, and the parts.

    DIR/run.json  DIR/shards.parquet  DIR/parts/  DIR/metrics.json  DIR/confusion_NAME.npz

Opening a folder decides between a fresh start, going on, and a refusal; it never removes what vitscore did not write.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitscore import identity
from vitscore.durable import TEMPORARY_SUFFIX, sync_folder, write_bytes_durably, write_json_durably
from vitscore.errors import OtherRunError, SetupError, UsageError
from vitscore.machine import hardware, versions

if TYPE_CHECKING:
    from vitscore.prepare import Plan

OWN_FILES = ("run.json", "shards.parquet", "metrics.json", "report.html")


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and its record."""

    path: Path

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    def read_record(self) -> dict[str, Any] | None:
        """run.json, or None where there is none.

        Raises:
            UsageError: it is there and cannot be read.
        """
        try:
            record: dict[str, Any] = json.loads(self.record_path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UsageError(
                "run.json is not readable", where=str(self.record_path), got=str(error), next_step="Use --overwrite."
            ) from error
        return record

    def kept_choices(self) -> dict[str, Any]:
        """The automatic choices of an earlier start, by name."""
        record = self.read_record() or {}
        return {name: choice["value"] for name, choice in record.get("choices", {}).items()}


def require_record(path: Path) -> dict[str, Any]:
    """The record of the run in `path`.

    Raises:
        UsageError: there is no run.
    """
    record = RunFolder(path).read_record()
    if record is None:
        raise UsageError("no run here", where=str(path), expected="a folder with run.json", next_step="Check the path.")
    return record


def check_folder(folder: RunFolder, plan: Plan) -> bool:
    """Whether `folder` holds this very run already; False for a fresh start.

    Raises:
        OtherRunError: it holds another run; each difference is named.
        UsageError: it holds something that is not a run.
    """
    record = folder.read_record()
    if record is None:
        if folder.path.exists() and not folder.path.is_dir():
            raise UsageError("output is not a folder", where=str(folder.path))
        foreign = [p.name for p in folder.path.iterdir() if not is_own(p)] if folder.path.is_dir() else []
        if foreign:
            raise UsageError(
                "output folder is not empty",
                where=str(folder.path),
                expected="a new or empty folder, or a run",
                got=", ".join(sorted(foreign)[:3]),
                next_step="Name another with -o.",
            )
        return False
    there, here = record.get("identity", {}), json.loads(json.dumps(plan.identity))
    found = identity.differences(there, here)
    if not found:
        return True
    hint = "Name another folder with -o, or start anew with --overwrite."
    if set(there.get("models", {})) < set(here["models"]):
        hint = "Score the added model into a folder of its own and `vitscore compare` the two."
    raise OtherRunError("output folder holds another run", where=str(folder.path), got="; ".join(found), next_step=hint)


def is_own(path: Path) -> bool:
    """Whether vitscore writes a file or folder of this name into a run's folder."""
    name = path.name
    return (
        name in OWN_FILES
        or name == "parts"
        or (name.startswith("confusion_") and name.endswith(".npz"))
        or (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))
    )


def clear(folder: RunFolder) -> None:
    """Remove a run: results first and run.json last, so that an interrupted removal still reads as the old run.

    Raises:
        UsageError: the folder also holds files that vitscore did not write.
    """
    if not folder.path.exists():
        return
    if not folder.path.is_dir():
        raise UsageError("output is not a folder", where=str(folder.path))
    foreign = [path.name for path in folder.path.iterdir() if not is_own(path)]
    if foreign:
        raise UsageError(
            "will not overwrite",
            where=str(folder.path),
            expected="only a run's own files",
            got=", ".join(sorted(foreign)[:3]),
            next_step="Name another folder with -o.",
        )
    for path in sorted(folder.path.iterdir(), key=lambda path: path.name == "run.json"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    sync_folder(folder.path)


def start(folder: RunFolder, plan: Plan, *, launcher: str, world_size: int) -> None:
    """Create the folder, freeze the list of shards, and write the record; run.json comes last.

    Raises:
        SetupError: the folder cannot be written.
    """
    try:
        folder.parts.mkdir(parents=True, exist_ok=True)
        write_bytes_durably(folder.path / "shards.parquet", shards_table(plan))
        write_json_durably(folder.record_path, make_record(plan, launcher=launcher, world_size=world_size))
    except OSError as error:
        raise SetupError(
            "cannot write the output folder",
            where=str(folder.path),
            got=error.strerror or str(error),
            next_step="Name another with -o, or free some space.",
        ) from error


def shards_table(plan: Plan) -> bytes:
    """shards.parquet: ordinal, name, bytes."""
    table = pa.table(
        {
            "ordinal": pa.array([shard.ordinal for shard in plan.shards], pa.int32()),
            "name": pa.array([shard.name for shard in plan.shards], pa.string()),
            "bytes": pa.array([shard.num_bytes for shard in plan.shards], pa.int64()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def make_record(plan: Plan, *, launcher: str, world_size: int) -> dict[str, Any]:
    """run.json, as it is before the first part."""
    options = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(plan.options).items()}
    return {
        "schema": 1,
        "identity_hash": plan.identity_hash,
        "identity": plan.identity,
        "options": options,
        "choices": {name: asdict(choice) for name, choice in plan.settings.items()},
        "classes": list(plan.classes),
        "classes_source": plan.classes_source,
        "templates": list(plan.templates),
        "models": {
            model.name: {
                "checkpoint": model.checkpoint.source,
                "kind": model.checkpoint.kind,
                "fingerprint": model.fingerprint,
                "matching": model.head.summary if model.head else "zero-shot: one text embedding a class",
                "columns": [list(ids) for ids in model.head.columns] if model.head else None,
            }
            for model in plan.models
        },
        "corpus": {"shards": len(plan.shards), "bytes": known_bytes(plan), "limit": plan.options.limit},
        "versions": versions(),
        "hardware": hardware(),
        "launch": {"launcher": launcher, "ranks": world_size},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sessions": [],
    }


def known_bytes(plan: Plan) -> int | None:
    """Bytes of all shards, None where one is not known."""
    sizes = [shard.num_bytes for shard in plan.shards]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def add_session(folder: RunFolder, session: dict[str, Any]) -> None:
    """Append what one start of the run did (rate, images, memory) to run.json."""
    record = folder.read_record()
    assert record is not None
    record["sessions"].append(session)
    write_json_durably(folder.record_path, record)

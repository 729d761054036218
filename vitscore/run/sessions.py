"""Opening, resuming, clearing and recording a run's folder.

Opening decides between a fresh start, a resume and a refusal. Files that vitscore did not write are never removed. A
session is the entry in run.json for one start of the run.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.errors import OtherRunError, UsageError
from vitscore.plan import identity
from vitscore.plan.plan import known_bytes
from vitscore.rundir.folder import RunFolder, require_record
from vitscore.rundir.parts import PART_NAME
from vitscore.shards.redaction import public_spec
from vitscore.system import launcher
from vitscore.system.durable import (
    TEMPORARY_SUFFIX,
    host_name,
    make_folder_durably,
    start_time,
    sweep,
    sync_folder,
    uninterrupted,
    write_bytes_durably,
    write_json_durably,
    writing,
)
from vitscore.system.machine import hardware, versions

if TYPE_CHECKING:
    from vitscore.plan.choices import Measured
    from vitscore.plan.options import RunOptions
    from vitscore.plan.plan import Plan

OWN_FILES = ("run.json", "shards.parquet", "metrics.json", "report.html", "robustness.json", "robustness.html")


def check_folder(folder: RunFolder, plan: Plan) -> bool:
    """Return whether `folder` already holds this run; False for a fresh start.

    Raises:
        OtherRunError: it holds another run; the error names every difference.
        UsageError: it holds files that are not a run's.
    """
    record = folder.read_record()
    if record is None:
        check_foreign(folder)
        return False
    there, here = record["identity"], json.loads(json.dumps(plan.identity))
    differences = identity.differences(there, here)
    if not differences:
        return True
    hint = "Choose another folder with -o, or start anew with --overwrite."
    is_addition = set(there.get("models", {})) < set(here["models"])
    if is_addition and {key for key in here if there.get(key) != here[key]} <= {"models", "model_order", "templates"}:
        hint = "Score the added model into a separate folder, and compare the two runs."
    got = "; ".join(differences)
    raise OtherRunError("output folder holds another run", where=str(folder.path), got=got, next_step=hint)


def check_foreign(folder: RunFolder) -> None:
    """Raise if the folder contains anything that a run did not write.

    Without a run.json, only the files that a killed start may leave behind are accepted as a run's own.

    Raises:
        UsageError: there are other files; the error names the first three.
    """
    if folder.path.exists() and not folder.path.is_dir():
        raise UsageError("output is not a folder", where=str(folder.path), next_step="Choose another with -o.")
    if not folder.path.is_dir():
        return
    has_record = folder.record_path.exists()
    own = is_own if has_record else is_of_a_start
    foreign = [path.name for path in folder.path.iterdir() if not own(path)]
    if folder.parts.is_dir():
        inside = folder.parts.iterdir()
        foreign += [f"parts/{path.name}" for path in inside if not is_own_part(path, has_record=has_record)]
    if foreign:
        raise UsageError(
            "output folder is not empty",
            where=str(folder.path),
            expected="a new or empty folder, or only a run's own files",
            got=", ".join(sorted(foreign)[:3]),
            next_step="Choose another with -o.",
        )


def is_own(path: Path) -> bool:
    """Return whether vitscore writes a file or folder with this name into a run's folder."""
    name = path.name
    return name in OWN_FILES or (name.startswith("confusion_") and name.endswith(".npz")) or is_of_a_start(path)


def is_of_a_start(path: Path) -> bool:
    """Return whether this may exist before run.json: the folder of parts, the list of shards, a temporary file."""
    return path.name in ("parts", "shards.parquet") or is_temporary(path)


def is_own_part(path: Path, *, has_record: bool) -> bool:
    return is_temporary(path) or (has_record and path.is_file() and PART_NAME.fullmatch(path.name) is not None)


def is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX)


def clear(folder: RunFolder) -> None:
    """Remove a run: results first and run.json last, so that after an interruption the folder still holds the old run.

    Raises:
        UsageError: the folder also contains files that vitscore did not write.
        SetupError: a file cannot be removed.
    """
    check_foreign(folder)
    if not folder.path.is_dir():
        return
    with writing(folder.path):
        if folder.parts.is_dir():
            for path in folder.parts.iterdir():
                uninterrupted(path.unlink)
            uninterrupted(folder.parts.rmdir)
        for path in folder.path.iterdir():
            if path != folder.record_path:
                uninterrupted(path.unlink)
        # Flush before removing the record: a power loss must not leave parts without a record.
        sync_folder(folder.path)
        uninterrupted(folder.record_path.unlink, missing_ok=True)
        sync_folder(folder.path)


def resume(folder: RunFolder, plan: Plan) -> Plan:
    """Restore missing files of an interrupted run, and take the shards' names and sizes from shards.parquet.

    The command may spell the same shards differently now; parts and ledger keep the names of the first start. The sizes
    decide the order in which shards are taken, which must be the same on every rank. Both folders are flushed before
    their files are trusted: an earlier process may have been killed between renaming a part and flushing its folder.
    """
    with writing(folder.path):
        make_folder_durably(folder.path)
        make_folder_durably(folder.parts)
        for path in (folder.path, folder.parts):
            sweep(path)
            sync_folder(path)
        try:
            frozen = pq.read_table(folder.path / "shards.parquet")
        except (FileNotFoundError, pa.ArrowInvalid):
            write_bytes_durably(folder.path / "shards.parquet", shards_table(plan))
            return plan
    rows = {row["ordinal"]: row for row in frozen.to_pylist()}
    shards = tuple(
        replace(shard, name=rows[shard.ordinal]["name"], num_bytes=rows[shard.ordinal]["bytes"])
        if shard.ordinal in rows
        else shard
        for shard in plan.shards
    )
    return replace(plan, shards=shards)


def start(folder: RunFolder, plan: Plan, *, session: Mapping[str, Any], costs: Mapping[str, Mapping[str, Any]]) -> None:
    """Create the folder, write the list of shards, and write run.json last.

    Raises:
        SetupError: the folder cannot be written.
    """
    with writing(folder.path):
        make_folder_durably(folder.path)
        make_folder_durably(folder.parts)
        record = make_record(plan, session=session, costs=costs)
        write_bytes_durably(folder.path / "shards.parquet", shards_table(plan))
        write_json_durably(folder.record_path, record)


def shards_table(plan: Plan) -> bytes:
    """Return the content of shards.parquet: ordinal, name, bytes."""
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


def make_record(plan: Plan, *, session: Mapping[str, Any], costs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of run.json before the first part is written; URLs are stripped of secrets."""
    options = {**plan.options.to_record(), "shards": [public_spec(spec) for spec in plan.options.shards]}
    return {
        "schema": 1,
        "identity_hash": plan.identity_hash,
        "identity": plan.identity,
        "options": options,
        "choices": plan.choices.to_record(),
        "classes": list(plan.classes),
        "classes_source": plan.classes_source,
        "groups": plan.groups.to_record() if plan.groups else None,
        "templates": list(plan.templates),
        "models": {
            model.name: {
                "checkpoint": model.checkpoint.source,
                "kind": model.checkpoint.kind,
                "fingerprint": model.fingerprint,
                **costs.get(model.name, {}),
                "matching": model.head.summary if model.head else "zero-shot: one text embedding a class",
                "columns": [list(ids) for ids in model.head.columns] if model.head else None,
            }
            for model in plan.models
        },
        "corpus": {"shards": len(plan.shards), "bytes": known_bytes(plan), "limit": plan.options.limit},
        "versions": versions(),
        "hardware": hardware(),
        "sessions": [dict(session)],
    }


def make_session(*, world_size: int) -> dict[str, Any]:
    """Return run.json's entry for a start of the run: its process, host, launcher, time and number of ranks."""
    return {
        "id": secrets.token_hex(8),
        "started": now(),
        "launcher": launcher.name(),
        "launch": launcher.identity(),
        "ranks": world_size,
        "host": host_name(),
        "process": os.getpid(),
        "process_start": start_time(os.getpid()),
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def begin_session(folder: RunFolder, session: Mapping[str, Any]) -> None:
    """Append a start to run.json before it scores anything."""
    with writing(folder.path):
        record = require_record(folder.path)
        record["sessions"].append(dict(session))
        write_json_durably(folder.record_path, record)


def end_session(folder: RunFolder, session_id: str, figures: Mapping[str, Any]) -> None:
    """Add the end time and figures (rate, images, memory) to a start's entry; the entry of a killed start has none."""
    record = require_record(folder.path)
    for session in record["sessions"]:
        if session.get("id") == session_id:
            session.update(ended=now(), **figures)
    write_json_durably(folder.record_path, record)


def is_restart_of(folder: RunFolder, session: Mapping[str, Any]) -> bool:
    """Return whether the folder's last start came from the same launcher but from another process."""
    record = folder.read_record()
    if record is None or not record["sessions"]:
        return False
    last = record["sessions"][-1]
    is_other = any(last.get(name) != session[name] for name in ("process", "process_start"))
    return last.get("launch") == session["launch"] and is_other


def kept_choices(folder: RunFolder, *, asked: RunOptions | None = None) -> dict[str, Any]:
    """Return the automatic choices of an earlier start, by name.

    Args:
        folder: the run's folder.
        asked: the options of this start. If they ask for a value other than the one chosen earlier, this is another
            run: nothing is kept, and the comparison of identities names the difference.
    """
    record = folder.read_record() or {"choices": {}}
    kept = {name: choice["value"] for name, choice in record["choices"].items()}
    wanted = {name: getattr(asked, name, None) for name in kept} if asked else {}
    is_other = any(value not in (None, "auto", kept[name]) for name, value in wanted.items() if name != "top_k")
    return {} if is_other else kept


def note_measured(folder: RunFolder, measured: Mapping[str, Measured], launches: Mapping[str, Measured]) -> None:
    """Add the choices measured on rank 0's GPU to the current start's entry, if there are any."""
    choices: dict[str, Any] = {name: asdict(choice) for name, choice in measured.items()}
    if launches:
        choices["graph"] = {model: asdict(choice) for model, choice in launches.items()}
    if choices:
        with writing(folder.path):
            record = require_record(folder.path)
            record["sessions"][-1]["measured"] = choices
            write_json_durably(folder.record_path, record)

"""The run's folder: its record, the frozen list of shards, and the parts.

    DIR/run.json  DIR/shards.parquet  DIR/parts/  DIR/metrics.json  DIR/confusion_NAME.npz

`run.sessions` opens and writes the folder; this module only finds and reads its files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscore.errors import UsageError

RECORD_KEYS = {"schema", "identity", "identity_hash", "options", "choices", "classes", "models", "corpus", "sessions"}


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run's files, and its record."""

    path: Path

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def record_path(self) -> Path:
        return self.path / "run.json"

    def read_record(self) -> dict[str, Any] | None:
        """Return the content of run.json, or None if there is no such file.

        Raises:
            UsageError: the file is not a run's record.
        """
        try:
            record = json.loads(self.record_path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            record, got = None, str(error)
        else:
            got = "another kind of file"
        if not isinstance(record, dict) or not RECORD_KEYS <= record.keys():
            raise UsageError(
                "run.json is not a run's record",
                where=str(self.record_path),
                got=got,
                next_step="Choose another folder with -o, or remove that file.",
            )
        return record


def require_record(path: Path) -> dict[str, Any]:
    """Return the record of the run in `path`.

    Raises:
        UsageError: `path` holds no run.
    """
    record = RunFolder(path).read_record()
    if record is None:
        raise UsageError("no run here", where=str(path), expected="a folder with run.json", next_step="Check the path.")
    return record

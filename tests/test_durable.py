"""Files are written whole or not at all."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vitscore.system.durable import (
    durable_path,
    sweep,
    temporary_name,
    write_bytes_durably,
    write_json_durably,
)


def test_content_replaces_what_was_there_and_leaves_nothing_beside(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    write_bytes_durably(target, b"new")
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failure_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(OSError, match="full"), durable_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "disk full")
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_killed_writer_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    code = (
        "import os, signal, sys; from pathlib import Path; from vitscore.system.durable import durable_path\n"
        "with durable_path(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"old"


def test_leftovers_of_dead_processes_are_swept_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living, foreign = temporary_name(tmp_path / "a"), tmp_path / f".a.elsewhere.{dead.pid}.tmp"
    torn = living.with_name(living.name.replace(str(os.getpid()), str(dead.pid)))
    for path in (living, foreign, torn, tmp_path / "a"):
        path.write_bytes(b"half")
    assert sweep(tmp_path) == 1
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, foreign.name, "a"])


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "a.json"
    write_json_durably(target, {"ä": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json_durably(target, {"x": float("nan")})
    assert json.loads(target.read_text()) == {"ä": 1}

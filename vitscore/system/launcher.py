"""The process that started this one: accelerate, torchrun, or nobody who matters.

A rank that outlives its launcher holds a GPU and writes into a run that somebody may have started again, so a rank
ends with its launcher: Linux sends it SIGTERM, and where that is not heeded the process ends by force a little later.
Called at the very start of the program, before anything that takes time is imported. A program started from a shell
stays when the shell goes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vitscore.system.durable import host_name, start_time

if TYPE_CHECKING:
    pass

PR_SET_PDEATHSIG = 1
VARIABLES = {
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "FORK_LAUNCHED",
}
PREFIXES = ("TORCHELASTIC_", "ACCELERATE_")
"""What launchers tell a rank by its environment."""
LOOK_EVERY_S = 0.5
GRACE_S = 10.0
"""How long a rank may take to end by itself once its launcher is gone."""
_launcher_pid: int | None = None


def name() -> str:
    """`none`, `accelerate` or `torchrun`."""
    if any(variable.startswith("ACCELERATE_") for variable in os.environ):
        return "accelerate"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "none"


def identity() -> str:
    """The launcher's process, the same for its restarts of a rank; without a launcher, this process."""
    pid = os.getppid() if name() != "none" else os.getpid()
    return f"{host_name()}/{pid}/{start_time(pid) or 0}"


def is_alive() -> bool:
    """Whether the launcher is; True where there is none."""
    return _launcher_pid is None or os.getppid() == _launcher_pid


def end_with_launcher() -> None:
    """Have this process get SIGTERM when its launcher dies, and end it by force where it does not heed that."""
    global _launcher_pid
    if _launcher_pid is not None or name() == "none":
        return
    # Read when torch loads. The loss of the ranks' store is told in one line; torch would add a native trace.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    parent = os.getppid()
    if not _is_launcher(parent):
        if parent == 1:
            os._exit(128 + signal.SIGTERM)  # the launcher died while this process started
        return  # variables of a launcher in a shell's environment
    _launcher_pid = parent
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    threading.Thread(target=_watch, name="launcher", daemon=True).start()


def leave() -> None:
    """Take what a launcher told this process out of its environment, so that the processes it starts know of none.

    torchrun gives each of several ranks one thread (`OMP_NUM_THREADS=1`), unless the user said otherwise; a process of
    its own gets the machine's again.
    """
    if name() != "none" and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]
    for variable in [*os.environ]:
        if variable in VARIABLES or variable.startswith(PREFIXES):
            del os.environ[variable]


def _is_launcher(pid: int) -> bool:
    """Whether a process looks like a launcher; in a container it may well be number 1."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True
    return any(word in command for word in (b"torch", b"accelerate", b"python"))


def _watch() -> None:
    while is_alive():
        time.sleep(LOOK_EVERY_S)
    with contextlib.suppress(OSError):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os._exit(128 + signal.SIGTERM)


def is_main_rank() -> bool:
    return os.environ.get("RANK", "0") in ("", "0")

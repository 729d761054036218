"""Detect the launcher of this process (accelerate, torchrun or none) and end the process when the launcher dies.

A rank that outlives its launcher occupies a GPU and writes into a run that a user may have restarted. Linux therefore
sends it SIGTERM; if that has no effect, the process exits by force a little later. This is set up at the very start of
the program, before any slow import. A program started from a shell survives the shell.
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

from vitscore.system.durable import host_name, start_time

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
"""Environment variables, with VARIABLES, by which launchers pass information to a rank."""
LOOK_EVERY_S = 0.5
GRACE_S = 10.0
"""Time that a rank has to end in order once its launcher has died."""
_launcher_pid: int | None = None


def name() -> str:
    """Return the launcher's name: `none`, `accelerate` or `torchrun`."""
    if any(variable.startswith("ACCELERATE_") for variable in os.environ):
        return "accelerate"
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "none"


def identity() -> str:
    """Return an identifier of the launcher's process, which stays the same when it restarts ranks; else of this one."""
    pid = os.getppid() if name() != "none" else os.getpid()
    return f"{host_name()}/{pid}/{start_time(pid) or 0}"


def is_alive() -> bool:
    """Return whether the launcher is alive; True if there is none."""
    return _launcher_pid is None or os.getppid() == _launcher_pid


def end_with_launcher() -> None:
    """Arrange for SIGTERM when the launcher dies, and for a forced exit if the process then does not end."""
    global _launcher_pid
    if _launcher_pid is not None or name() == "none":
        return
    # torch reads this when it loads. The loss of the ranks' store is reported in one line, without torch's stack trace.
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
    """Remove the launcher's variables from the environment, so that child processes run without a launcher.

    torchrun sets `OMP_NUM_THREADS=1` if there are several ranks and the user has not set it; it is removed too, so that
    child processes use all the machine's threads.
    """
    if name() != "none" and os.environ.get("OMP_NUM_THREADS") == "1":
        del os.environ["OMP_NUM_THREADS"]
    for variable in [*os.environ]:
        if variable in VARIABLES or variable.startswith(PREFIXES):
            del os.environ[variable]


def _is_launcher(pid: int) -> bool:
    """Return whether a process looks like a launcher; in a container it may have the id 1."""
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

"""Entry point of the program, for `vitscore`, `python -m vitscore`, `accelerate launch vitscore` and torchrun."""

import atexit
import gc
import os
import sys
from typing import NoReturn

from vitscore.system.import_path import clean_path


def leave(code: int) -> NoReturn:
    """End the process with an exit code; if torch is loaded, right after the exit functions.

    Tearing down an interpreter with torch, DALI and CUDA libraries takes 0.5 to 0.9 s, only to free memory that the
    system frees anyway.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    gc.freeze()  # some exit functions run the garbage collector over all objects
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)  # Python reports the error of the stream
    os._exit(code)


def main() -> None:
    """Run the command line and exit with its code."""
    clean_path()
    from vitscore.system.libraries import look_for_garbage_less

    look_for_garbage_less()
    from vitscore.system.launcher import end_with_launcher

    end_with_launcher()
    from vitscore.cli.main import main as run_cli

    leave(run_cli())


if __name__ == "__main__":
    main()

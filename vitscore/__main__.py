"""The program's entry, by every door: `vitscore`, `python -m vitscore`, `accelerate launch vitscore`, torchrun.

Started as a folder or with `-m` from the checkout, Python puts the folder or the checkout itself on `sys.path`; then
`import kernels` or `import metrics` anywhere would find this project's own modules (transformers looks for a public
package called `kernels`). Both are taken off before anything else is imported.
"""

import atexit
import gc
import os
import sys
from typing import NoReturn


def clean_path() -> None:
    """Take the package's folder and the checkout's root off `sys.path`."""
    package = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(package)
    is_checkout = os.path.isdir(os.path.join(root, "kernels")) and os.path.isdir(os.path.join(root, "shards"))
    own = {package, root} if is_checkout else {package}
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) not in own]


def look_for_garbage_less() -> None:
    """Have the garbage collector look after 100,000 new objects, not 700.

    Imports leave a million objects that stay: looking among them took a quarter of the time to import, and while a run
    scores a tenth of a ViT-Tiny's forward on two cores.
    """
    gc.set_threshold(100_000, 50, 1000)


def leave(code: int) -> NoReturn:
    """End the process with a code; where torch is loaded at once, after what was asked for at exit.

    Tearing down the interpreter with torch, DALI and CUDA's libraries in it takes 0.5 to 0.9 s, and frees what the
    system frees anyway.
    """
    if "torch" not in sys.modules:
        sys.exit(code)
    gc.freeze()  # some of them look for garbage among everything
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        sys.exit(code)  # Python says what is wrong with the stream
    os._exit(code)


def main() -> None:
    """Run the command line and exit with its code."""
    look_for_garbage_less()
    clean_path()
    from vitscore.launcher import end_with_launcher

    end_with_launcher()
    from vitscore.cli import main as run_cli

    leave(run_cli())


if __name__ == "__main__":
    main()

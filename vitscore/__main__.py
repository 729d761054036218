"""The program's entry, by every door: `vitscore`, `python -m vitscore`, `accelerate launch vitscore`, torchrun.

Started as a folder or with `-m` from the checkout, Python puts the folder or the checkout itself on `sys.path`; then
`import kernels` or `import metrics` anywhere would find this project's own modules (transformers looks for a public
package called `kernels`). Both are taken off before anything else is imported.
"""

import os
import sys


def clean_path() -> None:
    """Take the package's folder and the checkout's root off `sys.path`."""
    package = os.path.dirname(os.path.abspath(__file__))
    root = os.path.dirname(package)
    is_checkout = os.path.isdir(os.path.join(root, "kernels")) and os.path.isdir(os.path.join(root, "shards"))
    own = {package, root} if is_checkout else {package}
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) not in own]


def main() -> None:
    """Run the command line and exit with its code."""
    clean_path()
    from vitscore.launcher import end_with_launcher

    end_with_launcher()
    from vitscore.cli import main as run_cli

    sys.exit(run_cli())


if __name__ == "__main__":
    main()

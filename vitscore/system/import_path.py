"""The import path of a process started from a checkout.

Standard library only: this runs before anything else is imported.
"""

import os
import sys


def clean_path() -> None:
    """Take the package's folder and the checkout's root off `sys.path`.

    Started as a folder or with `-m` from the checkout, Python puts the folder or the checkout itself there; then
    `import kernels` or `import metrics` anywhere would find this project's own modules (transformers looks for a public
    package called `kernels`).
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    root = os.path.dirname(package)
    is_checkout = os.path.isdir(os.path.join(root, "kernels")) and os.path.isdir(os.path.join(root, "shards"))
    own = {package, root} if is_checkout else {package}
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) not in own]

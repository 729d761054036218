"""Clean the import path of a process started from a checkout.

Uses the standard library only, because it runs before anything else is imported.
"""

import os
import sys


def clean_path() -> None:
    """Remove the package's folder and the checkout's root from `sys.path`.

    Python adds one of them when it is started on the folder or with `-m` from the checkout. `import kernels` or
    `import metrics` anywhere would then find this project's modules (transformers looks for a public package called
    `kernels`).
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    root = os.path.dirname(package)
    is_checkout = os.path.isdir(os.path.join(root, "kernels")) and os.path.isdir(os.path.join(root, "shards"))
    own = {package, root} if is_checkout else {package}
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) not in own]

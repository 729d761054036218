"""`python -m vitscore.bench ...`: another door to `vitscore bench ...`."""

import sys

from vitscore.system.import_path import clean_path


def main() -> None:
    """Run the command line's `bench` and exit with its code."""
    clean_path()
    from vitscore.system.launcher import end_with_launcher

    end_with_launcher()
    from vitscore.cli.main import main as run_cli

    sys.exit(run_cli(["bench", *sys.argv[1:]]))


if __name__ == "__main__":
    main()

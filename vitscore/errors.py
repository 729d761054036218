"""Errors that a user can cause, with their exit codes.

    VitscoreError
    ├── UsageError       2   wrong flag, wrong argument, no classes anywhere
    │   └── OtherRunError    the output folder holds another run
    ├── DataError        3   the data are at fault
    │   ├── ShardError       a shard is missing, truncated, or not a tar
    │   ├── LabelError       a label is not one of the classes
    │   ├── ClassError       class names cannot be matched
    │   └── LedgerError      samples do not add up
    ├── SetupError       4   a driver, a package or a checkpoint is missing
    └── TooManyBadError  5   more bad samples than --max-bad allows

The library raises them; only the command line turns them into text and exit codes. A bad sample is not an error but a
row with a reason.
"""

from __future__ import annotations


class VitscoreError(Exception):
    """An error whose text is one line: `what failed: where - expected X, got Y. Next step.`

    Args:
        what: the failure, in a few words ("label out of range").
        where: the place: a file, a shard and member, an option.
        expected: the value that would have been right.
        got: the value that was there.
        next_step: one sentence that says what to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", expected: str = "", got: str = "", next_step: str = "") -> None:
        line = f"{what}: {where}" if where else what
        values = [f"{word} {value}" for word, value in (("expected", expected), ("got", got)) if value]
        if values:
            line += f" - {', '.join(values)}"
        line = line.rstrip(".") + "."
        if next_step:
            line += f" {next_step}"
        super().__init__(" ".join(line.split()))


class UsageError(VitscoreError):
    exit_code = 2


class OtherRunError(UsageError):
    pass


class DataError(VitscoreError):
    exit_code = 3


class ShardError(DataError):
    pass


class LabelError(DataError):
    pass


class ClassError(DataError):
    pass


class LedgerError(DataError):
    pass


class SetupError(VitscoreError):
    exit_code = 4


class TooManyBadError(VitscoreError):
    exit_code = 5

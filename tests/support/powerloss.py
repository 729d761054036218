"""Model the possible contents of a disk after a power loss, from the log of a program's calls (see faultinject.c).

POSIX guarantees little: a file's content is on the disk once the file was flushed, a folder's entries once the folder
was. Later changes may survive or not, independently, so an entry can survive without its content. Four disks are
modelled for every moment: one with flushed data only, one with all entries but only flushed content (as with delayed
allocation), one with all content but only flushed entries, and one with a random choice, from a seed. The entries of a
folder survive in the order in which they were made, as in a journal.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

DISKS = ("flushed", "entries", "content", "chance")


@dataclass
class Inode:
    """A file: its written content, and the content that is certainly on the disk."""

    content: bytearray = field(default_factory=bytearray)
    flushed: bytes = b""


Entries = dict[str, "Inode | Folder"]


@dataclass
class Folder:
    """A folder: the entries that are certainly on the disk, and the entries after every later change."""

    flushed: Entries = field(default_factory=dict)
    later: list[Entries] = field(default_factory=list)

    @property
    def entries(self) -> Entries:
        return self.later[-1] if self.later else self.flushed

    def change(self, **entries: Inode | Folder | None) -> None:
        """Make one atomic change: set entries, or remove those that are None."""
        new = {**self.entries, **entries}
        self.later.append({name: entry for name, entry in new.items() if entry is not None})

    def flush(self) -> None:
        self.flushed, self.later = self.entries, []


class Disk:
    """A disk that follows the calls of a log.

    Args:
        root: the folder that exists and is flushed at the start.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.top = Folder()

    def folder(self, path: str) -> Folder:
        entry: Inode | Folder = self.top
        for name in Path(path).relative_to(self.root).parts:
            assert isinstance(entry, Folder)
            entry = entry.entries[name]
        assert isinstance(entry, Folder)
        return entry

    def find(self, path: str) -> Inode | Folder:
        if Path(path) == self.root:
            return self.top
        return self.folder(str(Path(path).parent)).entries[Path(path).name]

    def follow(self, line: str) -> None:
        """Apply one call of the log; failed calls change nothing."""
        _, call, path, second, result, _, offset, data = line.rstrip("\n").split("\t")
        if int(result) < 0:
            return
        parent, name = (self.folder(str(Path(path).parent)), Path(path).name) if Path(path) != self.root else (None, "")
        if call == "open":
            assert parent is not None
            if name not in parent.entries:
                parent.change(**{name: Inode()})
            file = parent.entries[name]
            if "truncate" in second and isinstance(file, Inode):
                file.content.clear()
        elif call == "write":
            file = self.find(path)
            assert isinstance(file, Inode)
            written, at = bytes.fromhex(data), int(offset)
            file.content.extend(bytes(max(0, at - len(file.content))))
            file.content[at : at + len(written)] = written
        elif call == "fsync":
            entry = self.find(path)
            if isinstance(entry, Folder):
                entry.flush()
            else:
                entry.flushed = bytes(entry.content)
        elif call == "rename":
            assert parent is not None and Path(path).parent == Path(second).parent, "one folder, one step"
            parent.change(**{name: None, Path(second).name: parent.entries[name]})
        elif call in ("unlink", "rmdir"):
            assert parent is not None
            parent.change(**{name: None})
        elif call == "mkdir":
            assert parent is not None
            parent.change(**{name: Folder()})
        else:
            assert call == "close", f"call unknown to this model: {call}"

    def after_loss(self, kind: str, seed: int) -> dict[str, bytes | None]:
        """Return the content of the disk after the power loss, by path; None for a folder."""
        chance = random.Random(seed)
        return dict(_surviving(self.top, "", kind, chance))


def _surviving(folder: Folder, prefix: str, kind: str, chance: random.Random) -> Iterator[tuple[str, bytes | None]]:
    states = [folder.flushed, *folder.later]
    number = {"flushed": 0, "content": 0, "entries": -1, "chance": chance.randrange(len(states))}[kind]
    for name, entry in states[number].items():
        if isinstance(entry, Folder):
            yield prefix + name, None
            yield from _surviving(entry, f"{prefix}{name}/", kind, chance)
            continue
        is_kept = kind == "content" or (kind == "chance" and chance.random() < 0.5)
        content = bytes(entry.content) if is_kept else entry.flushed
        if kind == "chance" and not is_kept and len(entry.content) > len(entry.flushed):
            # A page may have been written while earlier ones were not.
            content = entry.flushed + bytes(chance.randrange(len(entry.content) - len(entry.flushed) + 1))
        yield prefix + name, content

"""Where the shards are: what the user names becomes a list of shards, class names and templates.

First in the flow. Takes a built-in name, a path, a glob, a brace pattern, a folder, a text file of shard names, or a
data set in CLIP_benchmark's layout. It opens no shard: a shard that is named and missing is in the list, and its
opening says so. A glob or folder with nothing in it is a usage error.

Side files lie beside the shards (`classes.txt` or `classnames.txt`, `templates.txt`), or at the root of a
CLIP_benchmark data set.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitscore.errors import DataError, UsageError
from vitscore.shards.sidefiles import CLASSES_FILES, TEMPLATES_FILES, find_side_file, read_classes, read_templates
from vitscore.shards.unmade import explain_unusable_folder

BUILT_IN = "demo"
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
LIST_SUFFIXES = (".txt", ".list", ".lst")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Shard:
    """One shard: its place in the list, its name as listed, the path to open, and its size where it was seen."""

    ordinal: int
    name: str
    path: str
    num_bytes: int | None


@dataclass(frozen=True)
class Corpus:
    """The shards of a run, and the class names and templates that came with them.

    Where several side files differ, the names are None and the source says which files differ.
    """

    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    classes_source: str | None
    templates: tuple[str, ...] | None
    templates_source: str | None


@dataclass(frozen=True)
class _Listing:
    """What one spec names: (name, path) pairs, and the folders whose side files count."""

    shards: list[tuple[str, str]]
    side_folders: list[Path]


def locate(specs: Sequence[str], *, split: str = "test") -> Corpus:
    """Resolve everything that `SHARDS` can be, in the order given.

    Args:
        specs: built-in names, paths, globs, brace patterns, folders, list files.
        split: the part of a data set in CLIP_benchmark's layout.

    Raises:
        UsageError: nothing matches, a shard is listed twice, or a folder holds images instead of shards.
    """
    if not specs:
        raise UsageError("no shards given", expected="demo, a path, a glob, a folder, or a list of shards")
    listings = [_list_spec(spec, split=split) for spec in specs]
    pairs = [pair for listing in listings for pair in listing.shards]
    _refuse_repeats(pairs)
    shards = tuple(Shard(ordinal, _readable(name), path, _size(path)) for ordinal, (name, path) in enumerate(pairs))
    folders = list(dict.fromkeys(folder for listing in listings for folder in listing.side_folders))
    classes, classes_source = _read_side_files(folders, CLASSES_FILES, read_classes)
    templates, templates_source = _read_side_files(folders, TEMPLATES_FILES, read_templates)
    return Corpus(shards, classes, classes_source, templates, templates_source)


def _readable(name: str) -> str:
    """A name that can be written as UTF-8; bytes that are none stand as backslash escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def corpus_names(shards: Sequence[Shard]) -> list[str]:
    """The shards' names below the folder they share: the same wherever the corpus lies."""
    paths = [os.path.abspath(shard.path) for shard in shards]
    if not paths:
        return []
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [_readable(os.path.relpath(path, root).replace(os.sep, "/")) for path in paths]


def natural_key(name: str) -> tuple[tuple[tuple[int, int | str], ...], str]:
    """A sort key that puts 2 before 10; names that differ only in leading zeros keep a fixed order."""
    parts = _DIGITS.split(name)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts if part), name


def is_shard_name(name: str) -> bool:
    return name.lower().endswith(SHARD_SUFFIXES)


def _list_spec(spec: str, *, split: str) -> _Listing:
    if spec.startswith(BUILT_IN) and "/" not in spec:
        return _list_built_in(spec)
    if _URL.match(spec) and not os.path.exists(spec):
        raise UsageError(
            "not a local shard", where=_without_secrets(spec), expected="a path", got="a URL",
            next_step="This version reads local shards only: copy them here first.",
        )  # fmt: skip
    path = Path(spec)
    if path.is_dir():
        return _list_folder(spec, split=split)
    if spec.lower().endswith(LIST_SUFFIXES) or _is_text(path):
        return _list_file(spec)
    return _list_pattern(spec)


def _is_text(path: Path) -> bool:
    """Whether a file without a shard's suffix begins like text; a tar's header ends in zeros."""
    if is_shard_name(path.name) or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(512)
    return bool(head) and b"\0" not in head


def _list_built_in(spec: str) -> _Listing:
    if spec != BUILT_IN:
        raise UsageError(
            "unknown built-in data set", where=spec, expected=BUILT_IN,
            next_step=f"For a file or folder of that name write ./{spec}.",
        )  # fmt: skip
    # shards/ is mapped below the package, so its own path does not lead to the package's data.
    from importlib.resources import files

    folder = Path(str(files("vitscore.demo"))) / "shards"
    names = _tars_in(folder)
    if not names:
        raise DataError("the built-in shards are missing", where=str(folder), next_step="Install vitscore again.")
    return _Listing([(f"{BUILT_IN}/{name}", str(folder / name)) for name in names], [folder])


def _list_folder(spec: str, *, split: str) -> _Listing:
    folder = Path(spec)
    if (folder / split / "nshards.txt").is_file():
        return _list_benchmark(spec, split=split)
    names = _tars_in(folder)
    if names:
        return _Listing([(os.path.join(spec, name), str(folder / name)) for name in names], _side_folders(folder))
    splits = sorted((file.parent.name for file in folder.glob("*/nshards.txt")), key=natural_key)
    if splits:
        raise UsageError(
            "no such split", where=spec, expected=" or ".join(splits), got=split, next_step="Choose one with --split."
        )
    raise explain_unusable_folder(spec)


def _list_benchmark(spec: str, *, split: str) -> _Listing:
    """CLIP_benchmark's layout: the number of shards stands in a file, and the shards are `0.tar` on."""
    count_file = Path(spec) / split / "nshards.txt"
    text = count_file.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise DataError("number of shards unreadable", where=str(count_file), expected="a number", got=repr(text[:40]))
    names = [os.path.join(spec, split, f"{number}.tar") for number in range(int(text))]
    return _Listing([(name, name) for name in names], [Path(spec), Path(spec) / split])


def _list_file(spec: str) -> _Listing:
    """A text file of shard names, relative to the file; `#` begins a comment line."""
    try:
        lines = Path(spec).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UsageError("no such list of shards", where=spec) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("list of shards unreadable", where=spec, expected="text", got=str(error)) from error
    listings = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        if _URL.match(line):
            return _list_spec(line, split="")
        listed = _list_pattern(os.path.join(os.path.dirname(spec), line))
        prefix = os.path.join(os.path.dirname(spec), "")
        names = [name.removeprefix(prefix) if not os.path.isabs(line) else name for name, _ in listed.shards]
        pairs = list(zip(names, (path for _, path in listed.shards), strict=True))
        listings.append(_Listing(pairs, listed.side_folders))
    if not listings:
        raise UsageError("no shards in the list", where=spec, expected="one shard name a line", got="none")
    folders = [folder for listing in listings for folder in listing.side_folders]
    return _Listing([pair for listing in listings for pair in listing.shards], [Path(spec).parent, *folders])


def _list_pattern(spec: str) -> _Listing:
    """A path, a glob, or a brace pattern of either. A name that exists is taken as it is, whatever signs it has."""
    names = [spec] if os.path.exists(spec) else _expand_braces(spec)
    found: list[str] = []
    for name in names:
        if os.path.exists(name) or not glob.has_magic(name):
            found.append(_checked_path(name))
        else:
            found.extend(_expand_glob(name))
    folders = [folder for name in found for folder in _side_folders(Path(name).parent)]
    return _Listing([(name, name) for name in found], list(dict.fromkeys(folders)))


def _checked_path(name: str) -> str:
    """A shard may be missing and still be one; what has not even a shard's name is a mistake in the command."""
    if os.path.isdir(name):
        raise UsageError("a folder among shards", where=name, next_step="Name it by itself.")
    if not os.path.exists(name) and not is_shard_name(name):
        raise UsageError(
            "no such shard, folder or list", where=name, expected="demo, a path, a glob, a folder, or a list of shards"
        )
    return name


def _expand_braces(spec: str) -> list[str]:
    if "{" not in spec and "}" not in spec:
        return [spec]
    # A dependency of webdataset's; imported here as only patterns need it.
    from braceexpand import braceexpand

    try:
        return list(braceexpand(spec))
    except ValueError:
        raise UsageError("unbalanced braces", where=spec, expected="a pattern such as s-{000..127}.tar") from None


def _expand_glob(pattern: str) -> list[str]:
    matches = [name for name in glob.glob(pattern, recursive=True) if is_shard_name(name) and not os.path.isdir(name)]
    if not matches:
        raise UsageError("no shard matches", where=pattern, expected="at least one .tar file", got="none")
    return sorted(matches, key=natural_key)


def _tars_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    names = [entry.name for entry in os.scandir(folder) if entry.name.endswith(".tar") and not entry.is_dir()]
    return sorted((name for name in names if not name.startswith(".")), key=natural_key)


def _side_folders(folder: Path) -> list[Path]:
    """Where side files of shards in `folder` lie; a split of CLIP_benchmark's layout has them one folder up."""
    return [folder, folder.parent] if (folder / "nshards.txt").is_file() else [folder]


def _read_side_files(
    folders: Sequence[Path], names: tuple[str, ...], read: Callable[[Path], tuple[str, ...]]
) -> tuple[tuple[str, ...] | None, str | None]:
    files = [file for folder in folders if (file := find_side_file(folder, names)) is not None]
    if not files:
        return None, None
    contents = {file: read(file) for file in files}
    first = files[0]
    other = next((file for file in files if contents[file] != contents[first]), None)
    if other is not None:
        return None, f"{first} and {other} differ"
    return contents[first], str(first)


def _refuse_repeats(pairs: Sequence[tuple[str, str]]) -> None:
    seen: dict[str, str] = {}
    for name, path in pairs:
        place = os.path.abspath(path)
        if place in seen:
            raise UsageError("the same shard twice", where=name, next_step="List every shard once.")
        seen[place] = name


def _size(path: str) -> int | None:
    try:
        return os.path.getsize(path)
    except OSError:
        return None


def _without_secrets(url: str) -> str:
    """A URL without its credentials and query."""
    return re.sub(r"//[^/@]*@", "//", url).split("?", 1)[0]

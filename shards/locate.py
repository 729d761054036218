"""Resolve the SHARDS arguments of a command to a list of shards, class names and templates.

First step of the flow. Accepts a built-in name, a path, a glob, a brace pattern, a folder, a text file of shard names,
a data set in CLIP_benchmark's layout, URLs and commands (see `remote.urls`). Opens no shard: a shard that is named but
missing stays in the list, and opening it reports the fault. A glob or folder without shards is a usage error.

Side files are read from the shards' folder (`classes.txt` or `classnames.txt`, `templates.txt`) or from the root of a
CLIP_benchmark data set.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vitscore.errors import DataError, UsageError
from vitscore.shards.naming import LIST_SUFFIXES, expand_braces, is_shard_name, natural_key
from vitscore.shards.redaction import is_remote, public_name
from vitscore.shards.shard import Corpus, Shard, location_of, readable_name
from vitscore.shards.sidefiles import (
    CLASSES_FILES,
    TEMPLATES_FILES,
    SideFile,
    find_side_file,
    parse_classes,
    parse_templates,
)
from vitscore.shards.unusable import explain_unusable_folder

if TYPE_CHECKING:
    from vitscore.shards.remote.web import FileInfo

BUILT_IN = "demo"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


@dataclass(frozen=True)
class _Listing:
    """The shards that one argument names, as (name, path) pairs."""

    shards: list[tuple[str, str]]
    side_folders: list[Path | str]
    """Folders that are searched for side files."""
    infos: dict[str, FileInfo] = field(default_factory=dict)
    """Sizes and ETags that stores have reported, by URL."""


def locate(
    specs: Sequence[str], *, split: str = "test", allow_pipe: bool = False, has_remote_sizes: bool = True
) -> Corpus:
    """Resolve the SHARDS arguments, in the given order.

    Args:
        specs: built-in names, paths, globs, brace patterns, folders, list files, URLs, commands.
        split: the split of a data set in CLIP_benchmark's layout.
        allow_pipe: whether shards may be the output of commands.
        has_remote_sizes: whether to ask servers for the sizes of remote shards; False saves the requests if the sizes
            are already known.

    Raises:
        UsageError: nothing matches, a shard is listed twice, or a folder holds images instead of shards.
        SetupError: a store does not respond.
    """
    if not specs:
        raise UsageError("no shards given", expected="demo, a path, a glob, a folder, or a list of shards")
    listings = [_list_spec(spec, split=split, allow_pipe=allow_pipe) for spec in specs]
    pairs = [pair for listing in listings for pair in listing.shards]
    _refuse_repeats(pairs)
    shards = tuple(Shard(ordinal, readable_name(name), path, _size(path)) for ordinal, (name, path) in enumerate(pairs))
    if has_remote_sizes and any(is_remote(path) for _, path in pairs):
        shards = _with_sizes(shards, {path: info for listing in listings for path, info in listing.infos.items()})
    folders = list(dict.fromkeys(folder for listing in listings for folder in listing.side_folders))
    classes, classes_source = _read_side_files(folders, CLASSES_FILES, parse_classes)
    templates, templates_source = _read_side_files(folders, TEMPLATES_FILES, parse_templates)
    return Corpus(shards, classes, classes_source, templates, templates_source)


def _with_sizes(shards: Sequence[Shard], infos: dict[str, FileInfo]) -> tuple[Shard, ...]:
    """Return the shards with sizes and ETags as their stores report them."""
    from vitscore.shards.redaction import PIPE
    from vitscore.shards.remote.stores import describe

    urls = [shard.path for shard in shards if is_remote(shard.path) and not shard.path.startswith(PIPE)]
    unknown = [url for url in urls if url not in infos]
    infos = infos | dict(zip(unknown, describe(unknown), strict=True))
    return tuple(
        replace(shard, num_bytes=infos[shard.path].num_bytes, etag=infos[shard.path].etag)
        if shard.path in infos
        else shard
        for shard in shards
    )


def _list_spec(spec: str, *, split: str, allow_pipe: bool) -> _Listing:
    if spec.startswith(BUILT_IN) and "/" not in spec:
        return _list_built_in(spec)
    if is_remote(spec):
        # Imported here: only remote shards need the store clients.
        from vitscore.shards.remote.urls import list_remote

        remote = list_remote(spec, split=split, allow_pipe=allow_pipe)
        return _Listing([(public_name(url), url) for url in remote.urls], list(remote.side_folders), remote.infos)
    if _URL.match(spec) and not os.path.exists(spec):
        from vitscore.shards.remote.urls import refuse_scheme

        raise refuse_scheme(spec)
    path = Path(spec)
    if path.is_dir():
        return _list_folder(spec, split=split)
    if spec.lower().endswith(LIST_SUFFIXES) or _is_text(path):
        return _list_file(spec, split=split, allow_pipe=allow_pipe)
    return _list_pattern(spec)


def _is_text(path: Path) -> bool:
    """Whether a file without a shard suffix starts like text; a tar header ends with zeros."""
    if is_shard_name(path.name) or not path.is_file():
        return False
    with open(path, "rb") as file:
        head = file.read(512)
    return bool(head) and b"\0" not in head


def _list_built_in(spec: str) -> _Listing:
    if spec != BUILT_IN:
        raise UsageError(
            "unknown built-in data set",
            where=spec,
            expected=BUILT_IN,
            next_step=f"For a file or folder with this name, write ./{spec}.",
        )
    # The folder shards/ is mapped below the package, so a path relative to this file would miss the package data.
    from importlib.resources import files

    folder = Path(str(files("vitscore.demo"))) / "shards"
    names = _tars_in(folder)
    if not names:
        raise DataError("built-in shards are missing", where=str(folder), next_step="Reinstall vitscore.")
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
            "no such split", where=spec, expected=" or ".join(splits), got=split, next_step="Pass one with --split."
        )
    raise explain_unusable_folder(spec)


def _list_benchmark(spec: str, *, split: str) -> _Listing:
    """List a data set in CLIP_benchmark's layout: `nshards.txt` holds the number of shards `0.tar`, `1.tar`, ..."""
    count_file = Path(spec) / split / "nshards.txt"
    text = count_file.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal():
        raise DataError("invalid number of shards", where=str(count_file), expected="a number", got=repr(text[:40]))
    names = [os.path.join(spec, split, f"{number}.tar") for number in range(int(text))]
    return _Listing([(name, name) for name in names], [Path(spec), Path(spec) / split])


def _list_file(spec: str, *, split: str, allow_pipe: bool) -> _Listing:
    """Read a text file of shard names, relative to the file's folder; lines that start with `#` are comments."""
    try:
        lines = Path(spec).read_text(encoding="utf-8-sig").split("\n")
    except FileNotFoundError:
        raise UsageError("no such list of shards", where=spec) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read the list of shards", where=spec, expected="text", got=str(error)) from error
    listings = []
    for line in (line.strip() for line in lines):
        if not line or line.startswith("#"):
            continue
        if _URL.match(line):
            listings.append(_list_spec(line, split=split, allow_pipe=allow_pipe))
            continue
        listed = _list_pattern(os.path.join(os.path.dirname(spec), line))
        prefix = os.path.join(os.path.dirname(spec), "")
        names = [name.removeprefix(prefix) if not os.path.isabs(line) else name for name, _ in listed.shards]
        pairs = list(zip(names, (path for _, path in listed.shards), strict=True))
        listings.append(_Listing(pairs, listed.side_folders))
    if not listings:
        raise UsageError("no shards in the list", where=spec, expected="one shard name per line", got="none")
    folders = [folder for listing in listings for folder in listing.side_folders]
    infos = {path: info for listing in listings for path, info in listing.infos.items()}
    return _Listing([pair for listing in listings for pair in listing.shards], [Path(spec).parent, *folders], infos)


def _list_pattern(spec: str) -> _Listing:
    """Expand a path, a glob, or a brace pattern of either; the name of an existing file is taken literally."""
    names = [spec] if os.path.exists(spec) else expand_braces(spec)
    paths: list[str] = []
    for name in names:
        if os.path.exists(name) or not glob.has_magic(name):
            paths.append(_checked_path(name))
        else:
            paths.extend(_expand_glob(name))
    folders = [folder for path in paths for folder in _side_folders(Path(path).parent)]
    return _Listing([(path, path) for path in paths], list(dict.fromkeys(folders)))


def _checked_path(name: str) -> str:
    """Return a shard's path; refuse folders, and missing files whose names are not those of shards."""
    if os.path.isdir(name):
        raise UsageError("folder among shards", where=name, next_step="Pass the folder as a separate argument.")
    if not os.path.exists(name) and not is_shard_name(name):
        raise UsageError(
            "no such shard, folder or list", where=name, expected="demo, a path, a glob, a folder, or a list of shards"
        )
    return name


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


def _side_folders(folder: Path) -> list[Path | str]:
    """Return the folders to search for side files; a split in CLIP_benchmark's layout has them one folder up."""
    return [folder, folder.parent] if (folder / "nshards.txt").is_file() else [folder]


def _read_side_files(
    folders: Sequence[Path | str], names: tuple[str, ...], parse: Callable[[SideFile], tuple[str, ...]]
) -> tuple[tuple[str, ...] | None, str | None]:
    files = [file for folder in folders if (file := find_side_file(folder, names)) is not None]
    if not files:
        return None, None
    contents = [parse(file) for file in files]
    other = next((file for file, content in zip(files, contents, strict=True) if content != contents[0]), None)
    if other is not None:
        return None, f"{files[0].name} and {other.name} differ"
    return contents[0], files[0].name


def _refuse_repeats(pairs: Sequence[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for name, path in pairs:
        location = location_of(path)
        if location in seen:
            raise UsageError("shard listed twice", where=name, next_step="List every shard once.")
        seen.add(location)


def _size(path: str) -> int | None:
    if is_remote(path):
        return None
    try:
        return os.path.getsize(path)
    except OSError:
        return None

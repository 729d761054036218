"""Resolve URLs and commands among the SHARDS arguments to lists of shards.

The remote part of the search for shards. A URL names a shard, a folder, a pattern, a list, or the root of a data set in
CLIP_benchmark's layout. Object stores can list folders and patterns; http servers cannot, so there only shards, lists,
and CLIP_benchmark's layout work. Opens no shards.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from vitscore.errors import DataError, UsageError
from vitscore.shards.naming import LIST_SUFFIXES, expand_braces, is_shard_name, natural_key
from vitscore.shards.redaction import PIPE, is_remote, public_name
from vitscore.shards.remote.stores import expand_glob, is_web, list_folder, read_small
from vitscore.shards.remote.web import FileInfo


@dataclass
class RemoteListing:
    """Remote shards, their known sizes and ETags, and the folders that are searched for side files; all by full URL."""

    urls: list[str] = field(default_factory=list)
    infos: dict[str, FileInfo] = field(default_factory=dict)
    side_folders: list[str] = field(default_factory=list)

    def add(self, other: RemoteListing) -> None:
        self.urls += other.urls
        self.infos |= other.infos
        self.side_folders += other.side_folders


def list_remote(spec: str, *, split: str, allow_pipe: bool) -> RemoteListing:
    """Resolve a URL, a brace pattern of URLs, or a command.

    Raises:
        UsageError: nothing matches, or a command is not allowed.
        SetupError: a store does not respond.
        DataError: the layout of a data set cannot be read.
    """
    listing = RemoteListing()
    for name in expand_braces(spec):
        if name.startswith(PIPE):
            require_pipe(name, is_allowed=allow_pipe)
            listing.urls.append(name)
        else:
            listing.add(_list_url(name, split=split, allow_pipe=allow_pipe))
    return listing


def require_pipe(command: str, *, is_allowed: bool) -> None:
    """Raise UsageError unless commands may be run."""
    if not is_allowed:
        raise UsageError(
            "command among shards",
            where=public_name(command),
            expected="--allow-pipe",
            next_step="A shell on this machine would run the command.",
        )


def _list_url(url: str, *, split: str, allow_pipe: bool) -> RemoteListing:
    path = public_name(url)
    if path.lower().endswith(LIST_SUFFIXES):
        return _list_list(url, split=split)
    has_magic = re.search(r"[*\[]", path.partition("://")[2].partition("/")[2]) is not None
    if is_shard_name(path) and not has_magic:
        return RemoteListing([url], side_folders=[folder_of(url)])
    if is_web(url):
        return _list_web(url, split=split, has_magic="*" in path)
    if has_magic:
        return _shards_among(expand_glob(url), url, is_shard=is_shard_name)
    folder = path_of(url).rstrip("/")
    benchmark = _list_benchmark(folder, split=split)
    if benchmark is not None:
        return benchmark
    files, side_folders = list_folder(folder), _side_folders(folder)
    return _shards_among(files, url, is_shard=lambda name: name.endswith(".tar"), side_folders=side_folders)


def _shards_among(
    files: dict[str, FileInfo], url: str, *, is_shard: Callable[[str], bool], side_folders: list[str] | None = None
) -> RemoteListing:
    """Return the shards among an object store's files, in natural order, by the URLs that open them.

    Without `side_folders`, every shard's own folder is searched for side files.
    """
    paths = sorted(filter(is_shard, files), key=natural_key)
    if not paths:
        raise UsageError("no shard matches", where=public_name(url), expected="at least one .tar file", got="none")
    start = path_of(url)
    # The scheme and credentials in front of the bare path.
    prefix = start[: len(start) - len(public_name(start).partition("://")[2])]
    by_url = {prefix + path: files[path] for path in paths}
    return RemoteListing(list(by_url), by_url, side_folders or [folder_of(shard_url) for shard_url in by_url])


def _list_web(url: str, *, split: str, has_magic: bool) -> RemoteListing:
    if has_magic:
        raise UsageError(
            "cannot list a pattern over http",
            where=public_name(url),
            expected="braces, such as s-{000..127}.tar",
            next_step="Use braces, or pass a text file of shard names.",
        )
    folder = path_of(url).rstrip("/")
    benchmark = _list_benchmark(folder, split=split)
    if benchmark is not None:
        return benchmark
    if path_of(url).endswith("/"):
        raise UsageError(
            "cannot list a folder over http",
            where=public_name(url),
            expected="shards, such as s-{000..127}.tar",
            next_step="Name the shards, or pass a text file of shard names.",
        )
    return RemoteListing([url], side_folders=[folder_of(url)])


def _list_benchmark(folder: str, *, split: str) -> RemoteListing | None:
    """List a data set in CLIP_benchmark's layout: `nshards.txt` holds the number of shards `0.tar`, `1.tar`, ..."""
    count_file = f"{folder}/{split}/nshards.txt"
    data = read_small(count_file)
    if data is None:
        return None
    text = data.decode(errors="replace").strip()
    if not text.isdecimal():
        where = public_name(count_file)
        raise DataError("invalid number of shards", where=where, expected="a number", got=repr(text[:40]))
    urls = [f"{folder}/{split}/{number}.tar" for number in range(int(text))]
    return RemoteListing(urls, side_folders=[folder, f"{folder}/{split}"])


def _list_list(url: str, *, split: str) -> RemoteListing:
    """Read a text file of shard names at a URL, relative to its folder; commands and local files are not allowed."""
    data = read_small(url)
    if data is None:
        raise UsageError("no such list of shards", where=public_name(url))
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UsageError(
            "cannot read the list of shards", where=public_name(url), expected="text", got=str(error)
        ) from error
    listing = RemoteListing()
    for line in lines:
        if not line or line.startswith("#"):
            continue
        if line.startswith(PIPE):
            raise UsageError("command in a remote list", where=public_name(url), expected="names of shards")
        listing.add(list_remote(line if is_remote(line) else f"{folder_of(url)}/{line}", split=split, allow_pipe=False))
    if not listing.urls:
        expected = "one shard name per line"
        raise UsageError("no shards in the list", where=public_name(url), expected=expected, got="none")
    listing.side_folders.insert(0, folder_of(url))
    return listing


def path_of(url: str) -> str:
    """Return a URL without query and fragment but with its credentials."""
    return re.split(r"[?#]" if is_web(url) else r"\?", url, maxsplit=1)[0]


def folder_of(url: str) -> str:
    """Return the URL of a file's folder, with its credentials."""
    return path_of(url).rpartition("/")[0]


def _side_folders(folder: str) -> list[str]:
    """Return the folders to search for side files; a split in CLIP_benchmark's layout has them one folder up."""
    above = folder_of(folder)
    has_above = not above.endswith("/") and read_small(f"{folder}/nshards.txt") is not None
    return [folder, above] if has_above else [folder]


def refuse_scheme(spec: str) -> UsageError:
    """Return the error for a URL with an unsupported scheme."""
    scheme = spec.partition(":")[0]
    where = public_name(spec) if "://" in spec else f"{scheme}:"
    return UsageError("unknown kind of URL", where=where, expected="http, https, s3, gs or hf", got=scheme)

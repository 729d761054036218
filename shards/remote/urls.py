"""What a URL, or a command, names among SHARDS: shards, a folder, a pattern, a list, or a data set's root.

Part of the search for shards, for what is not on this machine's file systems. Object stores list folders and patterns;
the web cannot, so there a shard is named outright, by a list, or by CLIP_benchmark's layout. It opens no shard.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from vitscore.errors import DataError, UsageError
from vitscore.shards.naming import LIST_SUFFIXES, expand_braces, is_shard_name, natural_key
from vitscore.shards.redaction import PIPE, is_remote, public_name
from vitscore.shards.remote.stores import expand_glob, is_web, list_folder, read_small
from vitscore.shards.remote.web import Found


@dataclass
class Named:
    """Remote shards, what is known of them already, and the folders whose side files count; all by full URL."""

    urls: list[str] = field(default_factory=list)
    found: dict[str, Found] = field(default_factory=dict)
    side_folders: list[str] = field(default_factory=list)

    def add(self, other: Named) -> None:
        self.urls += other.urls
        self.found |= other.found
        self.side_folders += other.side_folders


def list_remote(spec: str, *, split: str, allow_pipe: bool) -> Named:
    """Resolve a URL, a brace pattern of URLs, or a command.

    Raises:
        UsageError: nothing matches, or a command is not allowed.
        SetupError: a store does not answer.
        DataError: a data set's layout cannot be read.
    """
    named = Named()
    for name in expand_braces(spec):
        if name.startswith(PIPE):
            require_pipe(name, is_allowed=allow_pipe)
            named.urls.append(name)
        else:
            named.add(_list_url(name, split=split, allow_pipe=allow_pipe))
    return named


def require_pipe(command: str, *, is_allowed: bool) -> None:
    """Raise UsageError unless commands may be run."""
    if not is_allowed:
        raise UsageError(
            "a command among shards",
            where=public_name(command),
            expected="--allow-pipe with it",
            next_step="It would be run by a shell on this machine.",
        )


def _list_url(url: str, *, split: str, allow_pipe: bool) -> Named:
    path = public_name(url)
    if path.lower().endswith(LIST_SUFFIXES):
        return _list_list(url, split=split)
    has_magic = re.search(r"[*\[]", path.partition("://")[2].partition("/")[2]) is not None
    if is_shard_name(path) and not has_magic:
        return Named([url], side_folders=[folder_of(url)])
    if is_web(url):
        return _list_web(url, split=split, has_magic="*" in path)
    if has_magic:
        return _named(url, expand_glob(url), what="pattern")
    folder = path_of(url).rstrip("/")
    benchmark = _list_benchmark(folder, split=split)
    return benchmark or _named(url, list_folder(folder), what="folder", side_folders=_side_folders(folder))


def _named(url: str, found: dict[str, Found], *, what: str, side_folders: list[str] | None = None) -> Named:
    """The shards of an object store's answer, in natural order, each by the URL that opens it."""
    suffix_of = is_shard_name if what == "pattern" else (lambda name: name.endswith(".tar"))
    paths = sorted((path for path in found if suffix_of(path)), key=natural_key)
    if not paths:
        raise UsageError("no shard matches", where=public_name(url), expected="at least one .tar file", got="none")
    start = path_of(url)
    # Scheme and credentials, as they stand before the bare path.
    prefix = start[: len(start) - len(public_name(start).partition("://")[2])]
    by_url = {prefix + path: found[path] for path in paths}
    return Named(list(by_url), by_url, side_folders or [folder_of(each) for each in by_url])


def _list_web(url: str, *, split: str, has_magic: bool) -> Named:
    if has_magic:
        raise UsageError(
            "a pattern that the web cannot list",
            where=public_name(url),
            expected="braces, such as s-{000..127}.tar",
            next_step="Or name a text file of shard names.",
        )
    folder = path_of(url).rstrip("/")
    benchmark = _list_benchmark(folder, split=split)
    if benchmark is not None:
        return benchmark
    if path_of(url).endswith("/"):
        raise UsageError(
            "a folder that the web cannot list",
            where=public_name(url),
            expected="shards, such as s-{000..127}.tar",
            next_step="Or name a text file of shard names.",
        )
    return Named([url], side_folders=[folder_of(url)])


def _list_benchmark(folder: str, *, split: str) -> Named | None:
    """CLIP_benchmark's layout: the number of shards stands in a file, and the shards are `0.tar` on."""
    count_file = f"{folder}/{split}/nshards.txt"
    data = read_small(count_file)
    if data is None:
        return None
    text = data.decode(errors="replace").strip()
    if not text.isdecimal():
        where = public_name(count_file)
        raise DataError("number of shards unreadable", where=where, expected="a number", got=repr(text[:40]))
    urls = [f"{folder}/{split}/{number}.tar" for number in range(int(text))]
    return Named(urls, side_folders=[folder, f"{folder}/{split}"])


def _list_list(url: str, *, split: str) -> Named:
    """A text file of shard names at a URL, relative to it; it may name no command and no file of this machine."""
    data = read_small(url)
    if data is None:
        raise UsageError("no such list of shards", where=public_name(url))
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError as error:
        raise UsageError(
            "list of shards unreadable", where=public_name(url), expected="text", got=str(error)
        ) from error
    named = Named()
    for line in lines:
        if not line or line.startswith("#"):
            continue
        if line.startswith(PIPE):
            raise UsageError("a command in a list at a URL", where=public_name(url), expected="names of shards")
        named.add(list_remote(line if is_remote(line) else f"{folder_of(url)}/{line}", split=split, allow_pipe=False))
    if not named.urls:
        raise UsageError("no shards in the list", where=public_name(url), expected="one shard name a line", got="none")
    named.side_folders.insert(0, folder_of(url))
    return named


def path_of(url: str) -> str:
    """A URL without query and fragment, with its credentials."""
    return re.split(r"[?#]" if is_web(url) else r"\?", url, maxsplit=1)[0]


def folder_of(url: str) -> str:
    """The folder that a URL's file lies in, with its credentials."""
    return path_of(url).rpartition("/")[0]


def _side_folders(folder: str) -> list[str]:
    """Where side files of a folder's shards lie; a split of CLIP_benchmark's layout has them one folder up."""
    above = folder_of(folder)
    has_above = not above.endswith("/") and read_small(f"{folder}/nshards.txt") is not None
    return [folder, above] if has_above else [folder]


def refuse_scheme(spec: str) -> UsageError:
    """The error for a URL of another kind."""
    scheme = spec.partition(":")[0]
    where = public_name(spec) if "://" in spec else f"{scheme}:"
    return UsageError("unknown kind of URL", where=where, expected="http, https, s3, gs or hf", got=scheme)

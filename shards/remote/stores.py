"""Stores of shards behind URLs, through fsspec: what they hold, small files, and ranges of large ones.

Between the search for shards and the fetch. http and https go through `web`; s3, gs and hf through the file systems'
own calls. It writes no file and decides nothing about shards.
"""

from __future__ import annotations

import base64
import concurrent.futures
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from vitscore.errors import SetupError
from vitscore.shards.redaction import credentials, public_name
from vitscore.shards.remote import web
from vitscore.shards.remote.retries import Failure, retry
from vitscore.shards.remote.web import (
    CONNECT_TIMEOUT_S,
    MD5,
    READ_TIMEOUT_S,
    SMALL_BYTES,
    Found,
    run_async,
    translated,
)

NUM_REQUESTS = 32
"""HEAD requests at one time."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}

T = TypeVar("T")


def scheme_of(url: str) -> str:
    return url.partition("://")[0]


def is_web(url: str) -> bool:
    return scheme_of(url) in ("http", "https")


def bare_path(url: str) -> str:
    """What an object store's file system calls a URL: without scheme, credentials and query."""
    return public_name(url).partition("://")[2]


def store_of(url: str) -> Any:
    """The object store's file system for a URL, one for each store and pair of credentials.

    Raises:
        SetupError: its package is not installed.
    """
    return _store(scheme_of(url), *credentials(url))


@functools.lru_cache(maxsize=32)
def _store(scheme: str, user: str, password: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        # The tries are made here; the clients' own would multiply them.
        options["config_kwargs"] = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
        if user:
            options |= {"key": user, "secret": password}
    try:
        store = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
    except ImportError:
        package = PACKAGES[scheme]
        raise SetupError(
            "package missing",
            where=package,
            expected=f"it for {scheme}:// shards",
            got="none",
            next_step=f"Run `pip install {package}`.",
        ) from None
    if scheme == "s3":
        store.retries = 1
    return store


def asking(url: str, call: Callable[[], T]) -> T:
    """Ask a store something that the run needs before it starts.

    Raises:
        SetupError: it refuses, or there is no answer after all tries.
    """
    try:
        return retry(call)
    except Failure as failure:
        raise _no_answer(url, failure) from None


def _no_answer(url: str, failure: Failure) -> SetupError:
    if not failure.is_final:
        next_step = "Try again later."
        return SetupError("store does not answer", where=public_name(url), got=str(failure), next_step=next_step)
    next_step = "Check the credentials; FSSPEC_S3_ANON=true asks a public bucket without any."
    return SetupError("store refuses", where=public_name(url), got=str(failure), next_step=next_step)


def describe(urls: Sequence[str]) -> list[Found]:
    """Sizes and ETags: HEAD requests on the web, one listing of each parent in stores that can list.

    Nothing is known of a file that is not there, or that the store does not tell of; its fetch will say why.

    Raises:
        SetupError: a store does not answer, after all tries, or refuses every one.
    """
    listed = {parent: _listing(parent) for parent in dict.fromkeys(map(_parent, urls)) if not is_web(parent)}
    found: dict[str, Found] = {}
    for url in urls:
        files = listed.get(_parent(url))
        if files is not None:
            found[url] = files.get(bare_path(url), Found())
    alone = [url for url in urls if url not in found]
    if alone:
        found |= zip(alone, _heads(alone), strict=True)
    return [found[url] for url in urls]


def _parent(url: str) -> str:
    return url.rpartition("/")[0]


def _heads(urls: Sequence[str]) -> list[Found]:
    """Ask for each file by itself, many at one time."""

    def ask(url: str) -> Found:
        return run_async(url, web.head(url), loop=web.web_filesystem().loop) if is_web(url) else object_info(url)

    def head(url: str) -> Found | Failure:
        try:
            return retry(lambda: ask(url))
        except Failure as failure:
            if failure.is_gone:
                return Found()
            if failure.is_final:
                return failure
            raise _no_answer(url, failure) from None

    pool = concurrent.futures.ThreadPoolExecutor(min(NUM_REQUESTS, len(urls)), thread_name_prefix="head")
    try:
        answers = list(pool.map(head, urls))
    finally:
        pool.shutdown(cancel_futures=True)
    refusals = [answer for answer in answers if isinstance(answer, Failure)]
    if len(refusals) == len(answers):
        raise _no_answer(urls[0], refusals[0])
    return [Found() if isinstance(answer, Failure) else answer for answer in answers]


def _list(url: str) -> dict[str, Found]:
    store = store_of(url)
    with translated(url):
        store.invalidate_cache()
        try:
            entries = store.ls(bare_path(url), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    return {entry["name"]: found_of(entry) for entry in entries if entry.get("type") != "directory"}


def list_folder(url: str) -> dict[str, Found]:
    """The files right below a URL of an object store, by bare path; empty where there is no such folder.

    Raises:
        SetupError: the store does not answer, or refuses.
    """
    return asking(url, lambda: _list(url))


def _listing(url: str) -> dict[str, Found] | None:
    """The same, None where listing is refused: that says nothing of the files."""
    try:
        return retry(lambda: _list(url))
    except Failure as failure:
        if failure.is_final:
            return None
        raise _no_answer(url, failure) from None


def expand_glob(url: str) -> dict[str, Found]:
    """The files that match a pattern in an object store, by bare path.

    Raises:
        SetupError: the store does not answer, or refuses.
    """

    def call() -> dict[str, dict[str, Any]]:
        store = store_of(url)
        with translated(url):
            store.invalidate_cache()
            return dict(store.glob(bare_path(url), detail=True))

    entries = asking(url, call)
    return {path: found_of(entry) for path, entry in entries.items() if entry.get("type") != "directory"}


def found_of(entry: dict[str, Any]) -> Found:
    """What an object store says of one object."""
    size = entry.get("size")
    etag = entry.get("ETag") or entry.get("etag") or entry.get("blob_id")
    lfs = entry.get("lfs") or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if sha256:
        return Found(size, sha256, ("sha256", sha256))
    if entry.get("md5Hash"):
        return Found(size, etag, ("md5", base64.b64decode(entry["md5Hash"]).hex()))
    plain = str(etag or "").strip('"')
    if "ETag" in entry and MD5.fullmatch(plain):
        # Under SSE-KMS an ETag looks like an MD5 and is none.
        return Found(size, etag, ("md5", plain), is_checksum_sure=False)
    return Found(size, etag)


def object_info(url: str, *, stop: threading.Event | None = None) -> Found:
    """What an object store says of one object now.

    Raises:
        Failure: it is not there, or the store does not say.
    """
    store, path = store_of(url), bare_path(url)
    store.invalidate_cache()
    if store.async_impl:
        entry = run_async(url, store._info(path), loop=store.loop, stop=stop)
    else:
        with translated(url):
            entry = store.info(path)
    if entry.get("type") == "directory":
        raise Failure("404 Not Found", is_final=True, is_gone=True)
    return found_of(entry)


def object_range(url: str, start: int, end: int, *, stop: threading.Event | None = None) -> bytes:
    """Bytes `start` to `end` of an object; fewer where it ends.

    Raises:
        Failure: the store does not give them.
    """
    store, path = store_of(url), bare_path(url)
    data: bytes
    if store.async_impl:
        data = run_async(url, store._cat_file(path, start=start, end=end), loop=store.loop, stop=stop)
    else:
        with translated(url):
            data = store.cat_file(path, start=start, end=end)
    return data


def read_small(url: str) -> bytes | None:
    """A side file or a list; None where it is not there or not for us.

    Raises:
        SetupError: the store does not answer.
    """

    def call() -> bytes | None:
        if is_web(url):
            return run_async(url, web.get_small(url), loop=web.web_filesystem().loop)
        try:
            num_bytes = object_info(url).num_bytes or 0
            return object_range(url, 0, min(num_bytes, SMALL_BYTES)) if num_bytes else b""
        except Failure as failure:
            if failure.is_final:
                return None
            raise

    return asking(url, call)

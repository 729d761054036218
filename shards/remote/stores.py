"""Access stores of shards through fsspec: list files, and read small files or ranges of large ones.

Used by the search for shards and by the fetch. http and https go through `web`; s3, gs and hf through the calls of
their fsspec file systems. Writes no files.
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
    FileInfo,
    run_async,
    translated,
)

NUM_REQUESTS = 32
"""Number of concurrent HEAD requests."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}

T = TypeVar("T")


def scheme_of(url: str) -> str:
    return url.partition("://")[0]


def is_web(url: str) -> bool:
    return scheme_of(url) in ("http", "https")


def bare_path(url: str) -> str:
    """Return a URL as an object store's file system expects it: without scheme, credentials and query."""
    return public_name(url).partition("://")[2]


def store_of(url: str) -> Any:
    """Return the object store's file system for a URL; there is one per scheme and pair of credentials.

    Raises:
        SetupError: the store's package is not installed.
    """
    return _store(scheme_of(url), *credentials(url))


@functools.lru_cache(maxsize=32)
def _store(scheme: str, user: str, password: str) -> Any:
    import fsspec

    options: dict[str, Any] = {}
    if scheme == "s3":
        # `retry` makes the attempts; the client's own retries would multiply them.
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
            expected=f"{package} for {scheme}:// shards",
            got="none",
            next_step=f"Run `pip install {package}`.",
        ) from None
    if scheme == "s3":
        store.retries = 1
    return store


def ask_store(url: str, call: Callable[[], T]) -> T:
    """Make a request whose answer the run needs before it starts.

    Raises:
        SetupError: the store refuses access, or does not respond after all tries.
    """
    try:
        return retry(call)
    except Failure as failure:
        raise _no_answer(url, failure) from None


def _no_answer(url: str, failure: Failure) -> SetupError:
    if not failure.is_final:
        next_step = "Try again later."
        return SetupError("store does not respond", where=public_name(url), got=str(failure), next_step=next_step)
    next_step = "Check the credentials; for a public bucket without any, set FSSPEC_S3_ANON=true."
    return SetupError("store refuses access", where=public_name(url), got=str(failure), next_step=next_step)


def describe(urls: Sequence[str]) -> list[FileInfo]:
    """Return the sizes and ETags of files, by HEAD requests on the web, else by listing every parent folder once.

    The information is empty for a missing file and for one that the store does not describe; fetching it reports why.

    Raises:
        SetupError: a store does not respond after all tries, or refuses all of the requests for single files.
    """
    listed = {parent: _listing(parent) for parent in dict.fromkeys(map(_parent, urls)) if not is_web(parent)}
    infos: dict[str, FileInfo] = {}
    for url in urls:
        files = listed.get(_parent(url))
        if files is not None:
            infos[url] = files.get(bare_path(url), FileInfo())
    unlisted = [url for url in urls if url not in infos]
    if unlisted:
        infos |= zip(unlisted, _heads(unlisted), strict=True)
    return [infos[url] for url in urls]


def _parent(url: str) -> str:
    return url.rpartition("/")[0]


def _heads(urls: Sequence[str]) -> list[FileInfo]:
    """Request the information on every file separately, with many requests at a time."""

    def ask(url: str) -> FileInfo:
        return run_async(url, web.head(url), loop=web.web_filesystem().loop) if is_web(url) else object_info(url)

    def head(url: str) -> FileInfo | Failure:
        try:
            return retry(lambda: ask(url))
        except Failure as failure:
            if failure.is_gone:
                return FileInfo()
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
    return [FileInfo() if isinstance(answer, Failure) else answer for answer in answers]


def _list(url: str) -> dict[str, FileInfo]:
    store = store_of(url)
    with translated(url):
        store.invalidate_cache()
        try:
            entries = store.ls(bare_path(url), detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
    return {entry["name"]: info_of(entry) for entry in entries if entry.get("type") != "directory"}


def list_folder(url: str) -> dict[str, FileInfo]:
    """List the files directly in a folder of an object store, by bare path; a missing folder has none.

    Raises:
        SetupError: the store does not respond, or refuses access.
    """
    return ask_store(url, lambda: _list(url))


def _listing(url: str) -> dict[str, FileInfo] | None:
    """List a folder, or return None if the store refuses listings; its files may be readable all the same."""
    try:
        return retry(lambda: _list(url))
    except Failure as failure:
        if failure.is_final:
            return None
        raise _no_answer(url, failure) from None


def expand_glob(url: str) -> dict[str, FileInfo]:
    """Return the files that match a pattern in an object store, by bare path.

    Raises:
        SetupError: the store does not respond, or refuses access.
    """

    def call() -> dict[str, dict[str, Any]]:
        store = store_of(url)
        with translated(url):
            store.invalidate_cache()
            return dict(store.glob(bare_path(url), detail=True))

    entries = ask_store(url, call)
    return {path: info_of(entry) for path, entry in entries.items() if entry.get("type") != "directory"}


def info_of(entry: dict[str, Any]) -> FileInfo:
    """Return the information in an object store's entry of one object."""
    size = entry.get("size")
    etag = entry.get("ETag") or entry.get("etag") or entry.get("blob_id")
    lfs = entry.get("lfs") or {}
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    if sha256:
        return FileInfo(size, sha256, ("sha256", sha256))
    if entry.get("md5Hash"):
        return FileInfo(size, etag, ("md5", base64.b64decode(entry["md5Hash"]).hex()))
    plain = str(etag or "").strip('"')
    if "ETag" in entry and MD5.fullmatch(plain):
        # Under SSE-KMS, an ETag looks like an MD5 but is not.
        return FileInfo(size, etag, ("md5", plain), is_checksum_sure=False)
    return FileInfo(size, etag)


def object_info(url: str, *, stop: threading.Event | None = None) -> FileInfo:
    """Request the current information on one object of an object store.

    Raises:
        Failure: the object does not exist, or the request failed.
        Abandoned: `stop` was set.
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
    return info_of(entry)


def object_range(url: str, start: int, end: int, *, stop: threading.Event | None = None) -> bytes:
    """Read bytes `start` to `end` of an object; fewer if the object ends before.

    Raises:
        Failure: the request failed.
        Abandoned: `stop` was set.
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
    """Read a side file or a list of shards; return None if it does not exist or access is denied.

    Raises:
        SetupError: the store does not respond.
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

    return ask_store(url, call)

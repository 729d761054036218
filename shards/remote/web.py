"""Send requests to http and https servers through the aiohttp session of fsspec's file system.

Used by `stores` and `fetch`. fsspec's calls do not expose the status, validators and range of an answer, which a fetch
needs. Every error becomes a `Failure` whose text contains no secrets. Redirects are followed; content is not
decompressed.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import concurrent.futures
import contextlib
import functools
import re
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from vitscore.errors import SetupError
from vitscore.shards.redaction import scrub
from vitscore.shards.remote.retries import FINAL, GONE, Abandoned, Failure, failed_status

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
SMALL_BYTES = 64 << 20
"""Maximum size of a side file or a list of shards; larger ones are cut."""
UNCODED = {"Accept-Encoding": "identity"}
MD5 = re.compile(r"[0-9a-f]{32}")
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
HOPELESS = ("NoCredentialsError", "PartialCredentialsError", "InvalidURL", "InvalidUrlClientError")
"""Exceptions of client libraries that another attempt would only repeat."""

T = TypeVar("T")


@dataclass(frozen=True)
class FileInfo:
    """A store's information on one file; None if the store does not report a value."""

    num_bytes: int | None = None
    etag: str | None = None
    checksum: tuple[str, str] | None = None
    """(algorithm of hashlib, hexadecimal digest)"""
    is_checksum_sure: bool = True
    """False if the digest is an ETag that merely looks like one."""


@functools.lru_cache(maxsize=1)
def web_filesystem() -> Any:
    import fsspec

    options = {"client_kwargs": {"auto_decompress": False, "trust_env": True}}
    return fsspec.filesystem("http", skip_instance_cache=True, **options)


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Convert the exceptions of client libraries to a Failure, without chaining them: they contain whole URLs.

    Raises:
        Failure: the client raised any exception.
    """
    try:
        yield
    except (Failure, Abandoned, SetupError):
        raise
    except FileNotFoundError:
        failure = failed_status(404)
    except PermissionError:
        failure = failed_status(403)
    except TimeoutError:
        failure = Failure("timed out")
    except Exception as error:
        failure = _failure_of(error, url)
    else:
        return
    raise failure from None


def _failure_of(error: Exception, url: str) -> Failure:
    """Return a client exception as a Failure: by its HTTP status, if it has one, else by its text."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 600:
        return failed_status(status)
    name = type(error).__name__
    return Failure(scrub(" ".join(f"{name}: {error}".split()), url), is_final=name in HOPELESS)


def run_async(url: str, coroutine: Coroutine[Any, Any, T], *, loop: Any, stop: threading.Event | None = None) -> T:
    """Run a coroutine on fsspec's event loop; `stop` cancels it.

    Raises:
        Failure: the coroutine raised any exception.
        Abandoned: `stop` was set.
    """
    with translated(url):
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        while True:
            done, _ = concurrent.futures.wait([future], timeout=0.1 if stop is not None else None)
            if done:
                return future.result()
            if stop is not None and stop.is_set():
                future.cancel()
                raise Abandoned


async def request(method: str, url: str, headers: dict[str, str]) -> Any:
    """Start an aiohttp request; for use with `async with await`."""
    import aiohttp
    from yarl import URL

    session = await web_filesystem().set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    # A signature covers the URL's exact characters.
    exact = URL(url, encoded="%" in url)
    return session.request(method, exact, headers={**UNCODED, **headers}, timeout=timeout, allow_redirects=True)


async def head(url: str) -> FileInfo:
    """Request a file's size and validators; they are empty if the file is missing or the server does not report them.

    Raises:
        Failure: access is denied, or the server failed temporarily.
    """
    async with await request("HEAD", url, {}) as response:
        # A length of 0 is not trusted: some servers answer HEAD as if every file were empty.
        if response.status == 200 and (info := info_in(response)).num_bytes:
            return info
        if response.status in GONE:
            return FileInfo()
        if response.status == 429 or (response.status >= 500 and response.status != 501):
            raise failed_status(response.status)
    # Some servers support only GET, and the signature of a URL covers the method.
    async with await request("GET", url, {"Range": "bytes=0-0"}) as response:
        if response.status == 200:
            return info_in(response)
        if response.status in FINAL or response.status == 429 or response.status >= 500:
            raise failed_status(response.status)
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        total = int(match[2]) if match and match[2] != "*" else None
        return FileInfo(total, response.headers.get("ETag")) if response.status == 206 else FileInfo()


async def get_small(url: str) -> bytes | None:
    """Download a small file; return None if it does not exist or access is denied.

    Raises:
        Failure: the server failed temporarily.
    """
    async with await request("GET", url, {}) as response:
        if response.status == 429 or response.status >= 500:
            raise failed_status(response.status)
        # Some servers answer every path with an HTML page.
        if response.status != 200 or response.content_type == "text/html":
            return None
        data: bytes = await response.content.read(SMALL_BYTES)
        while len(data) < SMALL_BYTES and (more := await response.content.read(SMALL_BYTES - len(data))):
            data += more
        return data


def info_in(response: Any) -> FileInfo:
    """Return the information in the headers of a complete response (not of a range)."""
    headers = response.headers
    length = headers.get("Content-Length", "")
    num_bytes = int(length) if length.isdecimal() else None
    etag = headers.get("ETag")
    hashes = [text.partition("md5=")[2] for text in headers.getall("x-goog-hash", []) if "md5=" in text]
    digest = _md5_of(headers.get("Content-MD5") or "".join(hashes[:1]))
    if digest:
        return FileInfo(num_bytes, etag, ("md5", digest))
    plain = (etag or "").strip('"')
    if MD5.fullmatch(plain) and any(name.lower().startswith("x-amz-") for name in headers):
        return FileInfo(num_bytes, etag, ("md5", plain), is_checksum_sure=False)
    return FileInfo(num_bytes, etag)


def _md5_of(text: str) -> str:
    """Convert a base64 MD5 to hexadecimal; return an empty string if it is not an MD5."""
    with contextlib.suppress(binascii.Error, ValueError):
        digest = base64.b64decode(text.split(",")[0], validate=True)
        return digest.hex() if len(digest) == 16 else ""
    return ""

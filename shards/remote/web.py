"""Requests to http and https servers, in the aiohttp session of fsspec's file system.

Below stores and fetch. fsspec's own calls hide what a fetch must see: the status, the validators, the range that was
sent. Every failure is a `Failure` with a scrubbed text. Redirects are followed; nothing is decompressed on the way.
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
"""A side file or a list may be this large."""
UNCODED = {"Accept-Encoding": "identity"}
MD5 = re.compile(r"[0-9a-f]{32}")
CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
HOPELESS = ("NoCredentialsError", "PartialCredentialsError", "InvalidURL", "InvalidUrlClientError")
"""Exceptions of clients that the next try would only repeat."""

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What a store says of one file; None where it does not."""

    num_bytes: int | None = None
    etag: str | None = None
    checksum: tuple[str, str] | None = None
    """(algorithm of hashlib, hexadecimal digest)"""
    is_checksum_sure: bool = True
    """False where the digest is an ETag that looks like one."""


@functools.lru_cache(maxsize=1)
def web_filesystem() -> Any:
    import fsspec

    options = {"client_kwargs": {"auto_decompress": False, "trust_env": True}}
    return fsspec.filesystem("http", skip_instance_cache=True, **options)


@contextlib.contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn the many exceptions of clients into a Failure; theirs hold whole URLs, so they are not chained to it.

    Raises:
        Failure: whatever went wrong.
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
    """A client's exception: by its HTTP status, which each client keeps elsewhere, else by its text."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int) and 400 <= status < 600:
        return failed_status(status)
    name = type(error).__name__
    return Failure(scrub(" ".join(f"{name}: {error}".split()), url), is_final=name in HOPELESS)


def run_async(url: str, coroutine: Coroutine[Any, Any, T], *, loop: Any, stop: threading.Event | None = None) -> T:
    """Run a coroutine on fsspec's loop; `stop` cancels it.

    Raises:
        Failure: whatever went wrong.
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
    """A request of aiohttp's, for `async with await`."""
    import aiohttp
    from yarl import URL

    session = await web_filesystem().set_session()
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S)
    # A signature covers the very characters of its URL.
    exact = URL(url, encoded="%" in url)
    return session.request(method, exact, headers={**UNCODED, **headers}, timeout=timeout, allow_redirects=True)


async def head(url: str) -> Found:
    """Size and validators; nothing of a file that is not there, or whose server does not tell.

    Raises:
        Failure: refused, or another try may tell.
    """
    async with await request("HEAD", url, {}) as response:
        # No length, or none worth the name: some servers answer HEAD like an empty file.
        if response.status == 200 and (found := found_in(response)).num_bytes:
            return found
        if response.status in GONE:
            return Found()
        if response.status == 429 or (response.status >= 500 and response.status != 501):
            raise failed_status(response.status)
    # Some servers know only GET, and a signature is for one method.
    async with await request("GET", url, {"Range": "bytes=0-0"}) as response:
        if response.status == 200:
            return found_in(response)
        if response.status in FINAL or response.status == 429 or response.status >= 500:
            raise failed_status(response.status)
        match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        total = int(match[2]) if match and match[2] != "*" else None
        return Found(total, response.headers.get("ETag")) if response.status == 206 else Found()


async def get_small(url: str) -> bytes | None:
    """A small file; None where it is not there or not for us.

    Raises:
        Failure: another try may bring it.
    """
    async with await request("GET", url, {}) as response:
        if response.status == 429 or response.status >= 500:
            raise failed_status(response.status)
        # Some servers answer every path with a page.
        if response.status != 200 or response.content_type == "text/html":
            return None
        data: bytes = await response.content.read(SMALL_BYTES)
        while len(data) < SMALL_BYTES and (more := await response.content.read(SMALL_BYTES - len(data))):
            data += more
        return data


def found_in(response: Any) -> Found:
    """What the headers of a whole answer (not of a range) say."""
    headers = response.headers
    length = headers.get("Content-Length", "")
    num_bytes = int(length) if length.isdecimal() else None
    etag = headers.get("ETag")
    told = [text.partition("md5=")[2] for text in headers.getall("x-goog-hash", []) if "md5=" in text]
    digest = _md5_of(headers.get("Content-MD5") or "".join(told[:1]))
    if digest:
        return Found(num_bytes, etag, ("md5", digest))
    plain = (etag or "").strip('"')
    if MD5.fullmatch(plain) and any(name.lower().startswith("x-amz-") for name in headers):
        return Found(num_bytes, etag, ("md5", plain), is_checksum_sure=False)
    return Found(num_bytes, etag)


def _md5_of(text: str) -> str:
    """A base64 MD5 in hexadecimal; empty where it is none."""
    with contextlib.suppress(binascii.Error, ValueError):
        digest = base64.b64decode(text.split(",")[0], validate=True)
        return digest.hex() if len(digest) == 16 else ""
    return ""

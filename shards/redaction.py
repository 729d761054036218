"""What may be told of a URL: its name without credentials and query, and texts without either.

Everything that leaves the process (names, reasons, error lines, run.json) passes through here; the URL that is opened
does not. Clients put whole URLs, and sometimes keys, into their exceptions.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from urllib.parse import unquote, urlsplit

SCHEMES = ("http", "https", "s3", "gs", "hf")
PIPE = "pipe:"
HIDDEN = "***"
SHORTEST_SECRET = 6
"""Shorter values are words of any text."""
SHARD_WORD = re.compile(r"\.(tar|tgz)(\.\w+)?$", re.IGNORECASE)

_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()\\]+")
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)


def is_remote(path: str) -> bool:
    """Whether a shard's path is a URL or a command rather than a file."""
    return path.startswith(PIPE) or path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def public_name(path: str) -> str:
    """A shard's name: a URL without credentials, query and fragment; a command's last word that names a shard."""
    if path.startswith(PIPE):
        return _pipe_name(path.removeprefix(PIPE))
    if "://" not in path:
        return path
    scheme, rest = path.split("://", 1)
    if scheme in ("http", "https"):
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    else:
        rest = rest.split("?", 1)[0]
    host, slash, tail = rest.partition("/")
    # A secret key may hold a slash, so the credentials of s3://key:secret@bucket can reach past the first one.
    if "@" in host:
        host = host.rpartition("@")[2]
    elif ":" in host and "@" in tail and scheme not in ("http", "https", "hf"):
        host, slash, tail = rest.rpartition("@")[2].partition("/")
    return f"{scheme}://{host}{slash}{tail}"


def credentials(path: str) -> tuple[str, str]:
    """User and password (key and secret) in a URL; empty where there are none."""
    name = public_name(path)
    scheme, _, rest = path.partition("://")
    host = name.partition("://")[2].partition("/")[0]
    found = re.match(rf"(.*?)@{re.escape(host)}(?:/|\?|#|$)", rest)
    if not found or scheme == "hf":
        return "", ""
    user, _, password = found[1].partition(":")
    return unquote(user), unquote(password)


def public_spec(spec: str) -> str:
    """What run.json may keep of something the user named: any form of SHARDS."""
    return public_name(spec) if spec.startswith(PIPE) or "://" in spec else spec


def scrub(text: str, *paths: str) -> str:
    """A text without URLs' credentials and queries, without the secrets of `paths`, and the environment's keys."""
    text = _URL_IN_TEXT.sub(lambda found: public_name(found[0]), text)
    for secret in sorted(_secrets(paths), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(paths: tuple[str, ...]) -> set[str]:
    found = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    for path in paths:
        if path.startswith(PIPE):
            found.add(path.removeprefix(PIPE))
        elif "://" in path:
            user, password = credentials(path)
            query = urlsplit(path).query
            values = {pair.partition("=")[2] for pair in query.split("&")}
            found |= {user, password, query} | values | {unquote(value) for value in values}
    return {secret for secret in found if len(secret) >= SHORTEST_SECRET}


def _pipe_name(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    for word in reversed(words):
        name = public_name(word) if not word.startswith(PIPE) else ""
        name = re.split(r"[?;|&<>]", name, maxsplit=1)[0]
        if SHARD_WORD.search(name) and not re.search(r"[=@]", name):
            return PIPE + name
    program = re.sub(r"[^\w.-]", "_", os.path.basename(words[0])) if words and "=" not in words[0] else "command"
    return f"{PIPE}{program}-{hashlib.sha256(command.encode()).hexdigest()[:12]}"

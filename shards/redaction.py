"""Strip credentials and queries from URLs before display.

Everything that leaves the process (names, reasons, error lines, run.json) passes through here; only the URL that is
opened stays complete. Client libraries put whole URLs, and sometimes keys, into their exceptions.
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
"""Shorter values are not replaced, as they may be ordinary words."""
SHARD_WORD = re.compile(r"\.(tar|tgz)(\.\w+)?$", re.IGNORECASE)

_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>()\\]+")
_SECRET_VARIABLE = re.compile(r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|ACCESS_KEY|API_KEY", re.IGNORECASE)


def is_remote(path: str) -> bool:
    """Whether a shard's path is a URL or a command rather than a file."""
    return path.startswith(PIPE) or path.startswith(tuple(f"{scheme}://" for scheme in SCHEMES))


def public_name(path: str) -> str:
    """Return a shard's name without secrets: a URL without credentials, query and fragment, or a name for a command.

    A command is named by its last word that is a shard's name, else by its program and a hash of the command.
    """
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
    """Return the user and password (key and secret) in a URL; empty strings if it has none."""
    name = public_name(path)
    scheme, _, rest = path.partition("://")
    host = name.partition("://")[2].partition("/")[0]
    match = re.match(rf"(.*?)@{re.escape(host)}(?:/|\?|#|$)", rest)
    if not match or scheme == "hf":
        return "", ""
    user, _, password = match[1].partition(":")
    return unquote(user), unquote(password)


def public_spec(spec: str) -> str:
    """Return any form of SHARDS as run.json may record it."""
    return public_name(spec) if spec.startswith(PIPE) or "://" in spec else spec


def scrub(text: str, *paths: str) -> str:
    """Remove secrets from a text: those in URLs within it, those in `paths`, and those in environment variables."""
    text = _URL_IN_TEXT.sub(lambda match: public_name(match[0]), text)
    for secret in sorted(_secrets(paths), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def _secrets(paths: tuple[str, ...]) -> set[str]:
    secrets = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    for path in paths:
        if path.startswith(PIPE):
            secrets.add(path.removeprefix(PIPE))
        elif "://" in path:
            user, password = credentials(path)
            query = urlsplit(path).query
            values = {pair.partition("=")[2] for pair in query.split("&")}
            secrets |= {user, password, query} | values | {unquote(value) for value in values}
    return {secret for secret in secrets if len(secret) >= SHORTEST_SECRET}


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

"""Fetching one remote shard: every kind of server failure and its result, compared with the file itself."""

import gzip
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import badserver
from vitscore.errors import SetupError, UsageError
from vitscore.shards.files import ShardFile
from vitscore.shards.labels import LabelRule
from vitscore.shards.locate import locate
from vitscore.shards.redaction import credentials, public_name, scrub
from vitscore.shards.remote import retries as failures
from vitscore.shards.remote import web
from vitscore.shards.remote.cache import Cache, fetch_ahead
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard

CONTENT = hashlib.shake_256(b"shard").digest(300_000)
Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten pauses and time-outs."""
    monkeypatch.setattr(failures, "BACKOFF_S", 0.002)
    monkeypatch.setattr(failures, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 0.3)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "s.tar").write_bytes(CONTENT)
    with badserver.serving(tmp_path / "web") as server:
        yield server


def bring(server: Any, folder: Path, *, num_bytes: int | None = None, etag: str | None = None) -> ShardFile:
    shard = Shard(0, "s.tar", f"{server.url}/s.tar", num_bytes, etag)
    return Cache(folder).bring(shard)


def content(file: ShardFile) -> bytes:
    assert file.fault is None, file.fault
    data = os.pread(file.fd, 10**7, 0)
    file.close()
    return data


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache folder that must have no entries after the test."""
    yield tmp_path / "cache"
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([], [""]),
        ([{"status": 503}, {"status": 500}, {"status": 429}], ["", "", "", ""]),
        ([{"cut": 1000}, {"cut": 5000}], ["", "bytes=1000-", "bytes=6000-"]),
        ([{"stall": 70_000}], ["", "bytes=70000-"]),
        ([{"stall": 0}, {"status": 503}], ["", "", ""]),
        ([{"cut": 1000}, {"status": 503}], ["", "bytes=1000-", "bytes=1000-"]),
        # The file was replaced by another one of the same name: the first bytes are discarded.
        ([{"cut": 1000, "body": b"x" * len(CONTENT)}], ["", "bytes=1000-"]),
        # The server sends a range, but its ETag is another file's.
        ([{"cut": 1000}, {"etag": '"other"'}], ["", "bytes=1000-"]),
        # Without a validator, nothing proves that a range would belong to the same file.
        ([{"cut": 1000, "etag": ""}], ["", ""]),
        ([{"length": len(CONTENT) + 500}], ["", ""]),
        ([{"length": len(CONTENT) - 500}], ["", ""]),
        ([{"body": CONTENT[:-1]}], ["", ""]),
    ],
)
def test_a_shard_arrives_whole_after_any_failure(
    server: Any, cache: Path, faults: list[dict[str, Any]], ranges: list[str]
) -> None:
    for fault in faults:
        server.fail("/s.tar", **{"times": 1, **fault})
    assert content(bring(server, cache, num_bytes=len(CONTENT))) == CONTENT
    assert server.gets("/s.tar") == ranges


@pytest.mark.parametrize("settings", [{"no_range": True}, {"etag": ""}, {"etag": 'W/"weak"'}])
def test_a_server_without_ranges_or_validators_sends_all_again(server: Any, cache: Path, settings: Any) -> None:
    server.always = settings
    server.fail("/s.tar", cut=1000, times=2)
    assert content(bring(server, cache)) == CONTENT
    assert len(server.gets("/s.tar")) == 3


def test_an_announced_length_is_checked(server: Any, cache: Path) -> None:
    server.fail("/s.tar", length=len(CONTENT) + 500, times=1)
    assert content(bring(server, cache)) == CONTENT
    assert server.gets("/s.tar") == ["", f"bytes={len(CONTENT)}-", ""]


def test_without_a_length_a_cut_is_still_found(server: Any, cache: Path) -> None:
    server.always = {"chunked": True}
    server.fail("/s.tar", cut=1000, times=1)
    assert content(bring(server, cache)) == CONTENT


@pytest.mark.parametrize(
    ("fault", "said", "num_tries"),
    [
        ({"status": 404}, "missing", 1),
        ({"status": 410}, "missing", 1),
        ({"status": 401}, "unreachable: 401 Unauthorized", 1),
        ({"status": 403}, "unreachable: 403 Forbidden", 1),
        ({"status": 503}, "unreachable: 503 Service Unavailable, after 8 tries", 8),
        ({"stall": 0}, "unreachable: ", 8),
        ({"cut": 0}, "unreachable: ", 8),
        ({"body": b"short"}, "unreachable: 5 bytes instead of the 300000 listed, after 8 tries", 8),
        ({"cut": 10, "no_range": True}, "unreachable: ", 8),
    ],
)
def test_a_shard_that_cannot_be_fetched_has_a_fault_with_details(
    server: Any, cache: Path, fault: Any, said: str, num_tries: int
) -> None:
    server.fail("/s.tar", times=100, **fault)
    file = bring(server, cache, num_bytes=len(CONTENT))
    assert (file.fd, file.num_bytes) == (-1, None)
    assert file.fault is not None and file.fault.startswith(said)
    assert len(server.gets("/s.tar")) == num_tries
    assert server.host not in file.fault.replace("127.0.0.1", "")


def test_a_host_that_is_not_there_is_unreachable(cache: Path) -> None:
    file = Cache(cache).bring(Shard(0, "s.tar", "http://me:hunter22@127.0.0.1:9/s.tar?token=abcdefgh", None))
    assert file.fault is not None and file.fault.startswith("unreachable: ")
    assert "hunter22" not in file.fault and "abcdefgh" not in file.fault


def test_a_change_after_the_listing_is_noted(server: Any, cache: Path) -> None:
    file = bring(server, cache, etag='"older"')
    assert file.notes == ("changed after it was listed",)
    file.close()


def test_a_compressed_shard_is_unpacked_once_it_is_here(server: Any, cache: Path) -> None:
    packed = gzip.compress(CONTENT)
    server.always = {"body": packed}
    server.fail("/s.tar", cut=1000, times=1)
    file = bring(server, cache)
    assert (file.num_bytes, file.is_unpacked) == (len(packed), True)
    assert content(file) == CONTENT
    server.always = {"body": packed[:-5000]}
    file = bring(server, cache)
    assert file.fault is not None and file.fault.startswith("truncated: gzip data end after ")
    assert os.pread(file.fd, 200_000, 0) == CONTENT[:200_000]
    file.close()
    assert open_files(cache) == 0


def test_a_full_cache_is_missing_set_up(server: Any, start: Call, tmp_path: Path) -> None:
    """A limit on file sizes replaces the full disk: the same call fails in the same way."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from vitscore.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    folder = tmp_path / "cache"
    done = start(sys.executable, "-c", code, "shards", "ls", f"{server.url}/s.tar", "--cache-dir", folder)
    assert done.code == 4
    assert done.err.startswith(f"cannot write: {folder} - got File too large. Free some space;")
    assert list(folder.iterdir()) == []


def test_a_fetch_ends_at_once_when_the_cache_stops(server: Any, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 30.0)
    server.fail("/s.tar", stall=10, times=9)
    held = Cache(cache)
    items = [(0, Shard(0, "s.tar", f"{server.url}/s.tar", None))]
    fetched = fetch_ahead(items, held)
    threading.Timer(0.3, held.stop).start()
    started = time.monotonic()
    with pytest.raises(failures.Abandoned):
        next(fetched)
    assert time.monotonic() - started < 2


def open_files(folder: Path) -> int:
    """Count the unnamed files of a folder that this process has open."""
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.lexists(link) and os.readlink(link).startswith(f"{folder}/") for link in links)


@pytest.mark.parametrize("size", [1, 3])
def test_the_cache_holds_no_more_than_its_size(server: Any, cache: Path, size: int) -> None:
    shards = [Shard(number, f"{number}.tar", f"{server.url}/{number}.tar", None) for number in range(10)]
    for shard in shards:
        (server.root / shard.name).write_bytes(CONTENT)
    most = 0
    for number, shard, file in fetch_ahead(enumerate(shards), Cache(cache, size=size)):
        assert file is not None and shard.ordinal == number
        for _ in range(20):
            most = max(most, open_files(cache))
            time.sleep(0.002)
        assert content(file) == CONTENT
    assert most == size
    assert server.most_open <= size
    assert open_files(cache) == 0


def test_local_shards_are_never_drawn_ahead(tmp_path: Path) -> None:
    drawn = []

    def items() -> Iterator[tuple[int, Shard]]:
        for number in range(4):
            drawn.append(number)
            yield number, Shard(number, "s.tar", str(tmp_path / "s.tar"), None)

    for number, _, file in fetch_ahead(items(), Cache(tmp_path)):
        assert (file, drawn[-1]) == (None, number)


def test_an_abandoned_iteration_leaves_nothing_open(server: Any, cache: Path) -> None:
    items = [(number, Shard(number, f"{number}", f"{server.url}/s.tar", None)) for number in range(5)]
    fetched = fetch_ahead(items, Cache(cache))
    _, _, file = next(fetched)
    assert file is not None
    file.close()
    fetched.close()
    assert open_files(cache) == 0


# Commands.


def test_a_command_gives_a_shard_and_its_failure_is_tried_again(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "s.tar").write_bytes(CONTENT)
    once = f"test -e {tmp_path}/seen || {{ touch {tmp_path}/seen; exit 3; }}; cat {tmp_path}/s.tar"
    assert content(Cache(cache).bring(Shard(0, "s", f"pipe:{once}", None))) == CONTENT
    for command, said in (
        ("echo secret-text >&2; exit 7", "unreachable: the command exited with 7, after 8 tries"),
        ("no-such-program-here", "unreachable: the command exited with 127"),
        ("echo x; sleep 60 | cat", "unreachable: no output from the command for 0.3 s, after 8 tries"),
    ):
        assert Cache(cache).bring(Shard(0, "s", f"pipe:{command}", None)).fault == said


def test_a_command_needs_allow_pipe(tmp_path: Path) -> None:
    spec = "pipe:curl -H 'Authorization: Bearer abc' https://h/s-{0..1}.tar?sig=x"
    with pytest.raises(UsageError, match=r"command among shards: pipe:https://h/s-0.tar - expected --allow-pipe"):
        locate([spec])
    (tmp_path / "list.txt").write_text(spec)
    with pytest.raises(UsageError, match="--allow-pipe"):
        locate([str(tmp_path / "list.txt")])
    for specs in ([spec], [str(tmp_path / "list.txt")]):
        corpus = locate(specs, allow_pipe=True)
        assert [shard.name for shard in corpus.shards] == ["pipe:https://h/s-0.tar", "pipe:https://h/s-1.tar"]
        assert "Bearer" not in repr(corpus)


# Locating shards.


def test_sizes_and_side_files_of_a_web_server_are_read(server: Any, tmp_path: Path) -> None:
    (server.root / "classes.txt").write_text("cat\ndog\n")
    (server.root / "templates.txt").write_text("a {c}\n")
    (server.root / "list.txt").write_text("# mine\ns.tar\n")
    for spec in ("s-.tar", "gone.tar"):
        (server.root / spec).write_bytes(b"")
    (server.root / "gone.tar").unlink()
    corpus = locate([f"{server.url}/{{s,gone}}.tar?signed=1"])
    etag = f'"{hashlib.sha1(CONTENT).hexdigest()}"'
    assert [(s.name, s.num_bytes, s.etag) for s in corpus.shards] == [
        (f"{server.url}/s.tar", len(CONTENT), etag),
        (f"{server.url}/gone.tar", None, None),
    ]
    (server.root / "empty.tar").write_bytes(b"")
    empty = locate([f"{server.url}/empty.tar"]).shards[0]
    with OpenShard(empty, labels=LabelRule(None)) as opened:
        assert (opened.fault, opened.num_samples) == ("empty file", 0)
    assert (corpus.classes, corpus.classes_source) == (("cat", "dog"), f"{server.url}/classes.txt")
    assert (corpus.templates, corpus.templates_source) == (("a {c}",), f"{server.url}/templates.txt")
    assert [shard.name for shard in locate([f"{server.url}/list.txt"]).shards] == [f"{server.url}/s.tar"]
    (tmp_path / "local.txt").write_text(f"{server.url}/s.tar\nweb/s-.tar\n")
    assert [shard.num_bytes for shard in locate([str(tmp_path / "local.txt")]).shards] == [len(CONTENT), 0]
    server.always = {"no_head": True}
    assert [(s.num_bytes, s.etag) for s in locate([f"{server.url}/s.tar"]).shards] == [(len(CONTENT), etag)]
    server.fail("/s.tar", length=0, methods=("HEAD",), times=1)
    assert [shard.num_bytes for shard in locate([f"{server.url}/s.tar"]).shards] == [len(CONTENT)]
    server.always = {"no_head": True, "no_range": True}
    assert [shard.num_bytes for shard in locate([f"{server.url}/s.tar"]).shards] == [len(CONTENT)]
    server.always = {"no_head": True, "chunked": True, "no_range": True}
    assert [shard.num_bytes for shard in locate([f"{server.url}/s.tar"]).shards] == [None]


def test_a_data_set_in_clip_benchmarks_layout_may_be_on_the_web(server: Any) -> None:
    (server.root / "wds" / "test").mkdir(parents=True)
    (server.root / "wds" / "test" / "nshards.txt").write_text("2\n")
    (server.root / "wds" / "classnames.txt").write_text("cat\n")
    corpus = locate([f"{server.url}/wds"])
    assert [shard.name for shard in corpus.shards] == [f"{server.url}/wds/test/{number}.tar" for number in (0, 1)]
    assert corpus.classes == ("cat",)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("URL/*.tar?sig=secret", "cannot list a pattern over http: URL/\\*.tar - "),
        ("URL/folder/", "cannot list a folder over http: URL/folder/ - "),
        ("URL/none.txt", "no such list of shards: URL/none.txt"),
        ("URL/evil.txt", "command in a remote list: URL/evil.txt"),
        ("URL/s-{1..2.tar?sig=secret", "unbalanced braces: URL/s-{1..2.tar - "),
        ("URL/s.tar?{a,b}", "shard listed twice: URL/s.tar"),
    ],
)
def test_wrong_urls_are_usage_errors(server: Any, spec: str, said: str) -> None:
    (server.root / "evil.txt").write_text("pipe:cat /etc/passwd\n")
    with pytest.raises(UsageError, match=said.replace("URL", server.url).replace("{1", r"\{1")) as error:
        locate([spec.replace("URL", server.url)], allow_pipe=True)
    assert "secret" not in str(error.value)


def test_a_server_that_does_not_respond_before_the_start_is_a_setup_error(server: Any) -> None:
    server.fail("/s.tar", status=503, methods=("HEAD",), times=3)
    assert locate([f"{server.url}/s.tar"]).shards[0].num_bytes == len(CONTENT)
    server.fail("/s.tar", status=503, methods=("HEAD",), times=100)
    message = r"store does not respond: .*s.tar - got 503 Service Unavailable, after 8 tries"
    with pytest.raises(SetupError, match=message):
        locate([f"{server.url}/s.tar?sig=secret"])


def test_a_server_that_refuses_every_shard_is_a_setup_error(server: Any) -> None:
    (server.root / "t.tar").write_bytes(b"t")
    server.fail("/s.tar", status=403, methods=("HEAD", "GET"), times=100)
    assert [shard.num_bytes for shard in locate([f"{server.url}/{{s,t}}.tar"]).shards] == [None, 1]
    with pytest.raises(SetupError, match=r"store refuses access: .*s.tar - got 403 Forbidden. Check the credentials"):
        locate([f"{server.url}/s.tar?sig=secret"])


# Names without secrets.


@pytest.mark.parametrize(
    ("url", "name", "login"),
    [
        ("https://me:pass@h:8/a/s.tar?X-Sig=1#f", "https://h:8/a/s.tar", ("me", "pass")),
        ("s3://AKIA:sec/re+t@bucket/a/s.tar", "s3://bucket/a/s.tar", ("AKIA", "sec/re+t")),
        ("s3://AKIA:sec%2Fret@bucket/a@b/s.tar", "s3://bucket/a@b/s.tar", ("AKIA", "sec/ret")),
        ("s3://bucket/a:b@c/s.tar", "s3://bucket/a:b@c/s.tar", ("", "")),
        ("hf://datasets/me/set@main/s.tar", "hf://datasets/me/set@main/s.tar", ("", "")),
        ("pipe:aws s3 cp s3://K:S@b/s.tar -", "pipe:s3://b/s.tar", ("", "")),
        ("pipe:curl -u me:pass https://h/s.tar?t=1 | gunzip", "pipe:https://h/s.tar", ("", "")),
    ],
)
def test_names_have_no_secrets(url: str, name: str, login: tuple[str, str]) -> None:
    assert public_name(url) == name
    if not url.startswith("pipe:"):
        assert credentials(url) == login


def test_a_command_without_a_shards_name_is_named_by_its_hash() -> None:
    name = public_name("pipe:TOKEN=abc fetch --key=secret shard 7")
    assert name.startswith("pipe:command-") and len(name) == 25
    assert name != public_name("pipe:TOKEN=abc fetch --key=secret shard 8")


def test_texts_are_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "env-secret-value")
    text = "GET https://u:pw@h/s.tar?sig=abcdef said env-secret-value, abcdef and my%20word, my word"
    scrubbed = scrub(text, "https://u:pw@h/s.tar?sig=abcdef&w=my%20word")
    assert scrubbed == "GET https://h/s.tar said ***, *** and ***, ***"

"""Runs over remote shards equal runs over the same local files, even if servers fail, and reveal no secret."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from support import badserver
from vitscore.rundir.status import read_status
from vitscore.shards.locate import locate
from vitscore.shards.remote import fetch, stores, web
from vitscore.shards.remote import retries as failures
from vitscore.shards.remote.cache import Cache
from vitscore.shards.shard import Shard

ROOT = Path(__file__).parent.parent
NUM_SHARDS = 6
KEY, SECRET = "AKIA1234567890TESTKEY", "se+cret/of-the-bucket1234"
Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "BACKOFF_S", 0.002)
    monkeypatch.setattr(failures, "LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(web, "READ_TIMEOUT_S", 0.5)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Path:
    """A folder with local shards in `shards` and a run over them in `out`."""
    from support.tars import write_tar
    from vitscore import score

    root = tmp_path_factory.mktemp("local")
    for number in range(NUM_SHARDS):
        write_tar(root / "shards" / f"s-{number}.tar", digits[number * 20 :][: 10 + 3 * number])
    (root / "shards" / "classes.txt").write_text("zero one two three four five six seven eight nine".replace(" ", "\n"))
    score(str(root / "shards"), "demo-vit", root / "out")
    return root


@pytest.fixture
def server(local: Path, tmp_path: Path) -> Iterator[Any]:
    shutil.copytree(local / "shards", tmp_path / "web")
    with badserver.serving(tmp_path / "web") as server:
        yield server


@pytest.fixture(scope="module")
def bucket(local: Path) -> Iterator[str]:
    """An S3 server on loopback with the shards in `s3://digits/val/`."""
    import boto3
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id=KEY, aws_secret_access_key=SECRET
    )
    client.create_bucket(Bucket="digits")
    for path in sorted((local / "shards").iterdir()):
        client.upload_file(str(path), "digits", f"val/{path.name}")
    before = dict(os.environ)
    os.environ.update(AWS_ENDPOINT_URL=url, AWS_DEFAULT_REGION="us-east-1")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        os.environ.pop(name, None)
    yield url
    os.environ.clear()
    os.environ.update(before)
    moto.stop()


def same_run(out: Path, local: Path) -> None:
    """Assert that a run's metrics and parts equal those of the run over local files, except for the shards' names."""
    assert (out / "metrics.json").read_bytes() == (local / "out" / "metrics.json").read_bytes()
    same_parts(out, local, range(NUM_SHARDS))


def same_parts(out: Path, local: Path, ordinals: Any) -> None:
    for number in ordinals:
        (one,), (other,) = ([*(run / "parts").glob(f"{number:07}-*")] for run in (out, local / "out"))
        assert one.name == other.name
        assert pq.read_table(one).drop_columns("shard").equals(pq.read_table(other).drop_columns("shard"))


def test_a_failing_web_server_changes_nothing(server: Any, local: Path, tmp_path: Path, vitscore: Call) -> None:
    server.fail("/s-0.tar", stall=3000, times=1)
    server.fail("/s-1.tar", cut=1000, times=2)
    server.fail("/s-1.tar", status=503, times=2)
    server.fail("/s-2.tar", cut=2000, body=b"x" * (server.root / "s-2.tar").stat().st_size, times=1)
    server.fail("/s-3.tar", cut=2000, times=1)
    server.fail("/s-3.tar", no_range=True, times=1)
    server.fail("/s-4.tar", length=700, times=1)
    server.fail("/s-4.tar", status=500, methods=("HEAD",), times=2)
    server.fail("/s-5.tar", cut=0, times=3)
    cache, out = tmp_path / "cache", tmp_path / "out"
    url = f"{server.url}/s-{{0..{NUM_SHARDS - 1}}}.tar"
    done = vitscore("run", url, "-m", "demo-vit", "-o", out, "--cache-dir", cache)
    assert done.code == 0, done.err
    same_run(out, local)
    assert [fault for faults in server.faults.values() for fault in faults if fault["times"]] == []
    assert list(cache.iterdir()) == []
    names = pq.read_table(out / "shards.parquet")
    assert names["name"].to_pylist() == [f"{server.url}/s-{number}.tar" for number in range(NUM_SHARDS)]
    assert None not in names["bytes"].to_pylist()
    done = vitscore("metrics", out, "--check", "--cache-dir", cache)
    assert (done.code, done.out.split(":")[0]) == (0, f"{NUM_SHARDS} shards, 105 samples")


def test_ranks_share_remote_shards(server: Any, local: Path, tmp_path: Path, start: Call) -> None:
    server.always = {"delay": 0.05}
    out, url = tmp_path / "out", f"{server.url}/s-{{0..{NUM_SHARDS - 1}}}.tar"
    words = ("-m", "vitscore", "run", url, "-m", "demo-vit", "-o", out, "--cache-dir", tmp_path / "cache")
    done = start("torchrun", "--nproc-per-node", "2", *words)
    assert done.code == 0, done.err
    same_run(out, local)
    tars = [path for method, path, *_ in server.requests if method == "GET" and path.endswith(".tar")]
    assert sorted(tars) == sorted(set(tars)), "a shard was fetched twice"
    assert sum(method == "HEAD" for method, *_ in server.requests) == NUM_SHARDS


def test_gone_and_unreachable_shards_are_bad_and_the_latter_are_tried_again(
    server: Any, local: Path, tmp_path: Path, vitscore: Call
) -> None:
    server.fail("/s-1.tar", status=503, times=1000)
    server.fail("/s-2.tar", status=404, times=1000)
    out, url = tmp_path / "out", f"{server.url}/s-{{0..{NUM_SHARDS - 1}}}.tar"
    command = ("run", url, "-m", "demo-vit", "-o", out, "--cache-dir", tmp_path / "cache")
    done = vitscore(*command)
    assert done.code == 3
    fault = "unreachable: 503 Service Unavailable, after 8 tries"
    assert f"bad shard: {server.url}/s-1.tar and 1 more - got {fault}" in done.err
    ledger = json.loads((out / "metrics.json").read_bytes())["ledger"]
    assert ledger["shards"] == {
        "expected": NUM_SHARDS,
        "done": NUM_SHARDS,
        "bad": {
            f"{server.url}/s-1.tar": fault,
            f"{server.url}/s-2.tar": "missing",
        },
    }
    same_parts(out, local, [0, 3, 4, 5])
    done = vitscore("metrics", out, "--check")
    assert (done.code, "shard cannot be reached" in done.err) == (4, True)
    server.faults = {"/s-2.tar": server.faults["/s-2.tar"]}
    done = vitscore("metrics", out, "--check")
    assert (done.code, "shard was not reached" in done.err) == (3, True)
    server.requests.clear()
    done = vitscore(*command)
    assert done.code == 3 and f"bad shard: {server.url}/s-2.tar - got missing" in done.err
    same_parts(out, local, [0, 1, 3, 4, 5])
    tars = {path for method, path, *_ in server.requests if method == "GET" and path.endswith(".tar")}
    assert tars == {"/s-1.tar"}
    assert vitscore("metrics", out, "--check").code == 0
    assert read_status(out).bad_shards == {f"{server.url}/s-2.tar": "missing"}


def test_a_run_from_s3_is_the_run_from_files(bucket: str, local: Path, tmp_path: Path, vitscore: Call) -> None:
    """By folder, by pattern and by braces, with credentials in the URL that must not appear anywhere."""
    for number, spec in enumerate(("digits/val", "digits/val/s-*.tar", "digits/val/s-{0..5}.tar")):
        out = tmp_path / f"out-{number}"
        url = f"s3://{KEY}:{SECRET}@{spec}"
        done = vitscore("run", url, "-m", "demo-vit", "-o", out, "--cache-dir", tmp_path / "cache")
        assert done.code == 0, done.err
        same_run(out, local)
        assert list((tmp_path / "cache").iterdir()) == []
        assert json.loads((out / "run.json").read_bytes())["options"]["shards"] == [f"s3://{spec}"]
        assert_no_secret(out, done, KEY, SECRET)
    assert vitscore("metrics", out, "--check", "--shards", url).code == 0
    done = vitscore("metrics", out, "--check")
    refused = "store refuses access: s3://digits/val/s-0.tar - got NoCredentialsError: Unable to locate credentials"
    assert (done.code, done.err.startswith(f"{refused}. Check the credentials")) == (4, True), done.err


def test_an_object_is_fetched_in_ranges_and_checked(
    bucket: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "CHUNK_BYTES", 4000)
    shards = locate([f"s3://{KEY}:{SECRET}@digits/val/"]).shards
    path = local / "shards" / "s-3.tar"
    assert shards[3].num_bytes == path.stat().st_size
    file = Cache(tmp_path).bring(shards[3])
    assert os.pread(file.fd, 10**7, 0) == path.read_bytes()
    file.close()
    missing = Shard(0, "x", f"s3://{KEY}:{SECRET}@digits/val/none.tar", None)
    assert Cache(tmp_path).bring(missing).fault == "missing"


def test_an_etag_that_is_not_an_md5_is_ignored_after_two_equal_downloads(
    bucket: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ETags under SSE-KMS only look like MD5s; moto's are MD5s, so its answers are patched."""
    shards = locate([f"s3://{KEY}:{SECRET}@digits/val/s-{{0,1}}.tar"]).shards
    requests = []

    def lying(url: str, **options: Any) -> web.FileInfo:
        requests.append(url)
        info = stores.object_info(url, **options)
        return web.FileInfo(info.num_bytes, "0" * 32, ("md5", "0" * 32), is_checksum_sure=False)

    monkeypatch.setattr(fetch, "object_info", lying)
    cache = Cache(tmp_path)
    for shard in shards:
        cache.bring(shard).close()
    assert [url.rpartition("/")[2] for url in requests] == ["s-0.tar", "s-0.tar", "s-1.tar"]

    def wrong(url: str, **options: Any) -> web.FileInfo:
        return web.FileInfo(stores.object_info(url, **options).num_bytes, "x", ("sha256", "0" * 64))

    monkeypatch.setattr(fetch, "object_info", wrong)
    assert Cache(tmp_path).bring(shards[0]).fault == "unreachable: sha256 differs from the store's, after 8 tries"


def test_gs_without_its_package_is_a_setup_error(vitscore: Call) -> None:
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        done = vitscore("shards", "ls", "gs://bucket/s-{0..3}.tar")
        assert (done.code, "Run `pip install gcsfs`" in done.err) == (4, True)


def assert_no_secret(out: Path, done: Any, *secrets: str) -> None:
    """Assert that a run's files and output contain none of the secrets."""
    texts = [done.out, done.err]
    for path in out.rglob("*"):
        if path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            texts += [repr(table.to_pydict()), repr(table.schema.metadata), path.name]
    for secret in secrets:
        for text in texts:
            assert secret not in text


@pytest.mark.parametrize("debug", [(), ("--debug",)])
def test_secrets_appear_nowhere(
    server: Any, tmp_path: Path, start: Call, vitscore: Call, debug: tuple[str, ...]
) -> None:
    """A login and a signed query, in a successful run and in refused and failing commands."""
    import base64

    token, login = "X-Amz-Signature=5ecre7516na7ure&X-Amz-Credential=AKIASIGNED", "somebody:hunter2secret"
    secrets = ("5ecre7516na7ure", "AKIASIGNED", "hunter2secret", "somebody")
    server.always = {"auth": "Basic " + base64.b64encode(login.encode()).decode(), "query": token}
    server.fail("/s-1.tar", cut=100, times=1)
    server.fail("/s-2.tar", status=403, times=100)
    server.fail("/s-3.tar", cut=100, times=100, no_range=True)
    base = f"http://{login}@{server.host}"
    options = ("-m", "demo-vit", "--cache-dir", tmp_path / "cache", *debug)
    done = vitscore("run", f"{base}/s-{{0..3}}.tar?{token}", "-o", tmp_path / "a", *options, "--on-bad-shard", "skip")
    assert done.code == 0, done.err
    assert_no_secret(tmp_path / "a", done, *secrets)
    record = json.loads((tmp_path / "a" / "run.json").read_bytes())
    assert record["options"]["shards"] == [f"{server.url}/s-{{0..3}}.tar"]
    assert record["classes_source"] == f"{server.url}/classes.txt"
    gone = f"http://{login}@127.0.0.1:9/s.tar?{token}"
    wrong = (
        ("run", f"{base}/s-{{0..0}}.tar?{token}", f"{base}/s-0.tar?other={token}", "-o", tmp_path / "b", *options),
        ("run", f"{base}/s-{{0..}}.tar?{token}", "-o", tmp_path / "b", *options),
        ("run", gone, "-o", tmp_path / "b", *options),
        ("run", f"s3://{login}@/?{token}", "-o", tmp_path / "b", *options),
        ("run", f"pipe:curl -u {login} '{base}/s-0.tar?{token}'", "-o", tmp_path / "b", *options),
        ("metrics", tmp_path / "a", "--check", "--shards", f"{base}/s-0.tar?{token}"),
        ("shards", "ls", f"{base}/s-{{0..3}}.tar?{token}"),
        ("shards", "verify", gone),
    )
    for command in wrong:
        try:
            refused = vitscore(*command)
        except Exception:
            # --debug lets an exception pass; check the text that Python would print.
            import traceback

            refused = SimpleNamespace(out=traceback.format_exc().replace(str(command), ""), err="", code=2)
        assert refused.code != 0
        out = "\n".join(line for line in refused.out.splitlines() if "vitscore(*command)" not in line)
        assert_no_secret(tmp_path / "a", SimpleNamespace(out=out, err=refused.err), *secrets)


def test_a_command_is_run_only_with_allow_pipe(local: Path, tmp_path: Path, vitscore: Call) -> None:
    spec = f"pipe:TOKEN=hunter2secret cat {local}/shards/s-{{0..{NUM_SHARDS - 1}}}.tar"
    command = ("run", spec, "-m", "demo-vit", "-o", tmp_path / "out", "--classes", local / "shards" / "classes.txt")
    done = vitscore(*command)
    assert (done.code, "--allow-pipe" in done.err) == (2, True)
    assert not (tmp_path / "out").exists()
    done = vitscore(*command, "--allow-pipe")
    assert done.code == 0, done.err
    same_run(tmp_path / "out", local)
    assert_no_secret(tmp_path / "out", done, "hunter2secret")
    assert vitscore("metrics", tmp_path / "out", "--check").code == 2
    assert vitscore("metrics", tmp_path / "out", "--check", "--shards", spec, "--allow-pipe").code == 0


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_leaves_no_file(server: Any, tmp_path: Path, signal_number: int) -> None:
    server.fail("/s-1.tar", stall=3000, times=9)
    cache = tmp_path / "cache"
    words = ("shards", "ls", f"{server.url}/s-{{0..5}}.tar", "--cache-dir", str(cache))
    process = subprocess.Popen([sys.executable, "-m", "vitscore", *words], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not server.gets("/s-1.tar"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    held = [os.readlink(link) for link in Path(f"/proc/{process.pid}/fd").iterdir() if os.path.islink(link)]
    assert sum(name.startswith(f"{cache}/") for name in held) == 1
    process.send_signal(signal_number)
    process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM)
    assert list(cache.iterdir()) == []


def test_a_signal_ends_a_run_that_waits_for_a_server(server: Any, tmp_path: Path) -> None:
    server.fail("/s-5.tar", stall=3000, times=9)
    words = ("run", f"{server.url}/s-{{0..5}}.tar", "-m", "demo-vit", "-o", str(tmp_path / "out"))
    command = [sys.executable, "-m", "vitscore", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not server.gets("/s-5.tar"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    time.sleep(1)
    process.terminate()
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, time.monotonic() - started < 9) == (143, True)
    assert err.decode() == "stopped: the same command goes on from the parts that are done.\n"


def test_a_limit_reads_only_the_first_shards(server: Any, tmp_path: Path, vitscore: Call) -> None:
    url = f"{server.url}/s-{{0..5}}.tar"
    out = tmp_path / "out"
    assert vitscore("run", url, "-m", "demo-vit", "-o", out, "--limit", 15).code == 0
    assert json.loads((out / "metrics.json").read_bytes())["ledger"]["expected"] == 15
    assert {path for method, path, *_ in server.requests if method == "GET" and path.endswith(".tar")} == {
        "/s-0.tar",
        "/s-1.tar",
    }
    server.fail("/s-0.tar", status=503, times=99)
    done = vitscore("run", url, "-m", "demo-vit", "-o", tmp_path / "other", "--limit", 15)
    assert (done.code, "shard cannot be reached" in done.err) == (4, True)
    done = vitscore("run", url, "-m", "demo-vit", "-o", tmp_path / "other", "--dry-run")
    assert (done.code, f"{server.url}/s-0.tar" in done.out) == (0, True)


def test_a_changed_corpus_is_refused_on_resume(server: Any, tmp_path: Path, vitscore: Call) -> None:
    command = ("run", f"{server.url}/s-{{0..1}}.tar?a=1", "-m", "demo-vit", "-o", tmp_path / "out")
    assert vitscore(*command).code == 0
    again = (command[0], f"{server.url}/s-{{0..1}}.tar?a=2", *command[2:])
    assert vitscore(*again, "--cache-size", 1).code == 0
    data = bytearray((server.root / "s-0.tar").read_bytes())
    data[600] ^= 1
    (server.root / "s-0.tar").write_bytes(data)
    done = vitscore(*command)
    assert (done.code, "corpus.fingerprint" in done.err) == (2, True)

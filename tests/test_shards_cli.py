"""`vitscore shards` on the command line: output, exit codes, and errors in one line."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from support.tars import write_members
from vitscore.cli.shards import app
from vitscore.errors import UsageError, VitscoreError
from vitscore.text.shards import parse_size, printable


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def exit_code(result: Result) -> int:
    return result.exception.exit_code if isinstance(result.exception, VitscoreError) else result.exit_code


def photo(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=kind)
    return stream.getvalue()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    first = [("a.jpg", photo(1, "JPEG")), ("a.cls", b"0"), ("b.png", photo(2)), ("b.cls", b"1"), ("x.txt", b"note")]
    write_members(tmp_path / "d/s-1.tar", first)
    write_members(tmp_path / "d/s-2.tar", [("c.png", photo(3)), ("c.cls", b"cat"), ("d.webp", photo(4, "WEBP"))])
    (tmp_path / "d/classes.txt").write_text("cat\ndog\n")
    return tmp_path / "d"


def test_ls_and_verify_accept_what_make_writes(tmp_path: Path) -> None:
    for n in range(6):
        path = tmp_path / "photos" / ("cat" if n % 2 else "dog") / f"{n}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(n))
    made = call("make", tmp_path / "photos", "-o", tmp_path / "out", "--per-shard", 4, "-j", 1)
    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("6 samples, 2 classes, 2 shards, ")
    again = call("make", tmp_path / "photos", "-o", tmp_path / "out", "--per-shard", 4, "--json")
    assert json.loads(again.stdout)["num_already_there"] == 2
    listed = json.loads(call("ls", tmp_path / "out", "--json").stdout)
    assert listed["total"] | {"bytes": 0} == {
        "shards": 2,
        "samples": 6,
        "bytes": 0,
        "formats": {"png": 6},
        "classes": 2,
        "class_names": 2,
        "unlabelled": 0,
        "bad": 0,
        "fault": None,
    }
    verified = call("verify", tmp_path / "out", "--decoder", "torchvision")
    assert verified.stdout == "6 samples in 2 shards: every one decodes\n"


def test_make_shows_no_progress_without_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "p/c").mkdir(parents=True)
    (tmp_path / "p/c/1.png").write_bytes(photo(1))
    command = [sys.executable, "-m", "vitscore", "shards", "make", str(tmp_path / "p"), "-o", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_ls_shows_samples_formats_and_classes(corpus: Path) -> None:
    result = call("ls", corpus)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[1] == ["shard", "samples", "bytes", "formats", "classes", "bad"]
    assert lines[2][:2] + lines[2][4:] == ["s-1.tar", "3", "jpg:1", "png:1", "2", "1"]
    assert lines[4][:3] + lines[4][5:] == ["all", "2", "5", "jpg:1", "png:2", "webp:1", "2", "1"]


def test_ls_reports_bad_shards_and_exits_3(corpus: Path) -> None:
    (corpus / "s-3.tar").write_bytes(b"")
    result = call("ls", corpus)
    assert exit_code(result) == 3
    assert "empty file" in result.stdout
    assert str(result.exception).startswith("bad shard: ")


def test_index_lists_members_as_tarfile_finds_them(corpus: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in call("index", corpus).stdout.splitlines()]
    with tarfile.open(corpus / "s-1.tar") as first, tarfile.open(corpus / "s-2.tar") as second:
        oracle = [(info.name, info.offset_data, info.size) for tar in (first, second) for info in tar]
    assert [(row["member"], row["offset"], row["size"]) for row in rows] == oracle
    assert (rows[0]["key"], rows[0]["extension"]) == ("a", "jpg")
    assert call("index", corpus, "-o", tmp_path / "i.parquet").exit_code == 0
    assert pq.read_table(tmp_path / "i.parquet").to_pylist() == rows
    assert call("index", corpus, "-o", tmp_path / "i.jsonl").exit_code == 0
    assert [json.loads(line) for line in (tmp_path / "i.jsonl").read_text().splitlines()] == rows
    assert exit_code(call("index", corpus, "-o", tmp_path / "i.xyz")) == 2


def test_verify_reports_every_fault_and_exits_3(corpus: Path) -> None:
    members = [("a.png", photo(1)), ("b.png", b"no image"), ("c.png", photo(2)[:900]), ("d.png", photo(3))]
    path = write_members(corpus / "s-3.tar", [*members, ("d.cls", b"7"), ("e.png", photo(4))])
    with tarfile.open(path) as tar:
        cut = tar.getmember("e.png").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    result = call("verify", corpus, "--decoder", "torchvision", "--json")
    assert exit_code(result) == 3
    document = json.loads(result.stdout)
    bad = [(Path(fault["shard"]).name, fault["key"]) for fault in document["faults"]]
    assert bad == [("s-1.tar", "x"), *(("s-3.tar", key) for key in "bcde"), ("s-3.tar", None)]
    assert (document["num_samples"], document["num_bad_samples"], document["num_bad_shards"]) == (10, 5, 1)
    plain = call("verify", corpus, "--decoder", "torchvision")
    assert len(plain.stdout.splitlines()) == 6
    assert "got 5 bad samples of 10, 1 bad shards of 3" in str(plain.exception)


def test_verify_accepts_any_label_if_no_classes_are_known(corpus: Path) -> None:
    (corpus / "classes.txt").unlink()
    document = json.loads(call("verify", corpus, "--decoder", "torchvision", "--json").stdout)
    assert [fault["key"] for fault in document["faults"]] == ["x"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["make", "nowhere", "-o", "out"], 2),
        (["make", "{corpus}", "-o", "out"], 2),
        (["make", "{corpus}", "-o", "out", "--shard-size", "big"], 2),
        (["ls", "nowhere"], 2),
        (["verify", "{corpus}", "--decoder", "magic"], 2),
        (["verify", "{corpus}", "--label-key", "json:"], 2),
    ],
)
def test_wrong_use_is_one_line(corpus: Path, arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "vitscore", "shards", *(a.format(corpus=corpus) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=corpus.parent)
    assert (done.returncode, done.stdout) == (code, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "size"), [("256MB", 256_000_000), ("1.5GiB", 3 << 29), ("10", 10), ("2 kb", 2000), ("7T", 7 * 10**12)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "-1", "0", "1 XB", "1IB"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="unknown size"):
        parse_size(text)


def test_names_cannot_move_the_cursor() -> None:
    assert printable("caf\u00e9\x1b[2J\n") == "caf\u00e9\\x1b[2J\\x0a"

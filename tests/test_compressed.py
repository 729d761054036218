"""Compressed tars give the same rows as the tars in them, and are treated like truncated tars if they are damaged."""

import bz2
import gzip
import json
import lzma
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from support.tars import write_tar
from vitscore.shards.labels import LabelRule
from vitscore.shards.locate import locate
from vitscore.shards.remote.cache import Cache, fetch_ahead
from vitscore.shards.remote.unpack import PIECE_BYTES, ZSTD_STEP_BYTES
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard

Call = Callable[..., Any]
RULE = LabelRule(None)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACK: dict[str, Callable[[bytes], bytes]] = {
    ".tar.gz": gzip.compress,
    ".tgz": gzip.compress,
    ".tar.bz2": bz2.compress,
    ".tar.xz": lzma.compress,
    ".tar.zst": zstd,
}
KINDS = [".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"]


@pytest.fixture
def tar(tmp_path: Path, digits: Any) -> bytes:
    return bytes(write_tar(tmp_path / "plain.tar", digits[:60]).read_bytes())


def rows(path: Path, cache: Path) -> tuple[list[tuple[str, bytes | None, int, str | None]], str | None, int | None]:
    """Return the rows, the fault and the size of a shard, as the reader gets them."""
    rows_read = []
    items = [(0, Shard(0, path.name, str(path), None))]
    for _, shard, file in fetch_ahead(items, Cache(cache)):
        with OpenShard(shard, labels=RULE, file=file, cache=Cache(cache)) as opened:
            block = opened.read(0, opened.num_samples)
            for row, image in enumerate(block.images):
                data = None if image is None else image.tobytes()
                rows_read.append((block.keys[row], data, int(block.labels[row]), block.reasons[row]))
            fault, num_bytes = opened.fault, opened.num_bytes
    assert not cache.exists() or list(cache.iterdir()) == []
    return rows_read, fault, num_bytes


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("is_named_so", [True, False])
def test_a_compressed_tar_is_the_tar_in_it(tar: bytes, tmp_path: Path, suffix: str, is_named_so: bool) -> None:
    """Compression is recognised by the first bytes, not by the name."""
    packed = PACK[suffix](tar)
    path = tmp_path / f"s{suffix if is_named_so else '.tar'}"
    path.write_bytes(packed)
    expected, _, _ = rows(tmp_path / "plain.tar", tmp_path / "cache")
    assert rows(path, tmp_path / "cache") == (expected, None, len(packed))


@pytest.mark.parametrize("suffix", KINDS)
def test_several_streams_in_one_file_are_one_tar(tar: bytes, tmp_path: Path, suffix: str) -> None:
    """Parallel compressors write several streams."""
    (tmp_path / f"s{suffix}").write_bytes(
        b"".join(PACK[suffix](tar[at : at + 9999]) for at in range(0, len(tar), 9999))
    )
    expected, _, _ = rows(tmp_path / "plain.tar", tmp_path / "cache")
    assert rows(tmp_path / f"s{suffix}", tmp_path / "cache")[:2] == (expected, None)


@pytest.mark.parametrize("suffix", KINDS)
def test_data_before_a_cut_are_kept(tar: bytes, tmp_path: Path, suffix: str) -> None:
    # A whole stream and a truncated one: at least the first is unpacked, for any block size of the format.
    half = len(tar) // 2 // 512 * 512 + 100
    path = tmp_path / f"s{suffix}"
    path.write_bytes(PACK[suffix](tar[:half]) + PACK[suffix](tar[half:])[:40])
    kept, fault, _ = rows(path, tmp_path / "cache")
    match = re.fullmatch(r"truncated: (\w+) data end after (\d+) unpacked bytes", fault or "")
    assert match is not None, fault
    num_bytes = int(match[2])
    assert num_bytes >= (half - ZSTD_STEP_BYTES if suffix == ".tar.zst" else half)
    (tmp_path / "cut.tar").write_bytes(tar[:num_bytes])
    expected, _, _ = rows(tmp_path / "cut.tar", tmp_path / "cache")
    assert kept == expected != []


@pytest.mark.parametrize("suffix", KINDS)
def test_data_before_damage_are_kept(tar: bytes, tmp_path: Path, suffix: str) -> None:
    packed = bytearray(PACK[suffix](tar))
    packed[len(packed) // 3 : len(packed) // 3 + 20] = bytes(20)
    packed[-12:] = bytes(12)
    path = tmp_path / f"s{suffix}"
    path.write_bytes(PACK[suffix](tar[:20480]) + packed)
    _, fault, _ = rows(path, tmp_path / "cache")
    assert fault is not None and fault.startswith(("damaged: ", "truncated: ")), fault
    assert len(rows(path, tmp_path / "cache")[0]) >= 8


@pytest.mark.parametrize("suffix", KINDS)
@pytest.mark.parametrize("num_bytes", [6, 20])
def test_a_stump_is_a_fault_without_rows(tar: bytes, tmp_path: Path, suffix: str, num_bytes: int) -> None:
    path = tmp_path / f"s{suffix}"
    path.write_bytes(PACK[suffix](tar)[:num_bytes])
    kept, fault, _ = rows(path, tmp_path / "cache")
    assert kept == [] and fault is not None and fault.startswith("truncated: ")


def test_compressed_files_that_are_not_tars_are_faults(tar: bytes, tmp_path: Path) -> None:
    for content, fault in (
        (b"plain text, long enough for a block\n" * 30, "not a tar: no tar header at its start"),
        (gzip.compress(tar), "not a tar: gzip data; unpack it first"),
        (b"", "empty file"),
    ):
        (tmp_path / "s.tar.gz").write_bytes(gzip.compress(content))
        assert rows(tmp_path / "s.tar.gz", tmp_path / "cache")[:2] == ([], fault)
    with zipfile.ZipFile(tmp_path / "s.tar", "w") as archive:
        archive.writestr("a.png", bytes(2000))
    assert rows(tmp_path / "s.tar", tmp_path / "cache")[:2] == ([], "not a tar: zip data; unpack it first")


def test_a_bomb_costs_disk_not_memory(tmp_path: Path) -> None:
    """A megabyte unpacks to 300 MB in small pieces."""
    import tracemalloc

    (tmp_path / "s.tar.bz2").write_bytes(bz2.compress(bytes(1 << 26), 9) * 4)
    tracemalloc.start()
    try:
        Cache(tmp_path / "cache").bring(Shard(0, "s", str(tmp_path / "s.tar.bz2"), None)).close()
        assert tracemalloc.get_traced_memory()[1] < 20 * PIECE_BYTES
    finally:
        tracemalloc.stop()


def test_a_missing_compressed_shard_is_missing(tmp_path: Path) -> None:
    assert rows(tmp_path / "s.tar.gz", tmp_path / "cache") == ([], "missing", None)


def test_a_run_over_compressed_shards_is_the_run_over_the_tars(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    plain = make_shards(*(digits[number * 30 :][:30] for number in range(5)))
    packed = make_shards([], name="packed")
    (packed / "s-0.tar").unlink()
    for number, suffix in enumerate([*KINDS, ".tar"]):
        data = (plain / f"s-{number}.tar").read_bytes()
        (packed / f"s-{number}{suffix}").write_bytes(PACK[suffix](data) if suffix in PACK else gzip.compress(data))
    calm, out = tmp_path / "calm", tmp_path / "out"
    assert vitscore("run", "-m", "demo-vit", plain, "-o", calm).code == 0
    options = ("-o", out, "--cache-dir", tmp_path / "cache")
    done = vitscore("run", "-m", "demo-vit", packed / "s-*", *options)
    assert done.code == 0, done.err
    assert list((tmp_path / "cache").iterdir()) == []
    assert (calm / "metrics.json").read_bytes() == (out / "metrics.json").read_bytes()
    for number in range(5):
        one, other = (pq.read_table(next((run / "parts").glob(f"{number:07}-*"))) for run in (calm, out))
        assert one.drop_columns("shard").equals(other.drop_columns("shard"))
    assert vitscore("metrics", out, "--check").code == 0


def test_ls_index_and_verify_read_compressed_shards(make_shards: Call, vitscore: Call, digits: Any) -> None:
    folder = make_shards(digits[:30])
    data = (folder / "s-0.tar").read_bytes()
    (folder / "s.tgz").write_bytes(gzip.compress(data))
    plain, packed = (json.loads(vitscore("shards", "ls", folder / name, "--json").out) for name in ("s-0.tar", "s.tgz"))
    for name in ("samples", "formats", "classes", "fault"):
        assert plain["shards"][0][name] == packed["shards"][0][name]
    assert packed["shards"][0]["bytes"] == (folder / "s.tgz").stat().st_size
    lines = [
        vitscore("shards", "index", folder / name).out.replace("s.tgz", "s-0.tar") for name in ("s-0.tar", "s.tgz")
    ]
    assert lines[0] == lines[1]
    assert vitscore("shards", "verify", folder / "s.tgz").code == 0
    (folder / "s.tgz").write_bytes(gzip.compress(data)[:-3000])
    done = vitscore("shards", "verify", folder / "s.tgz")
    assert done.code == 3 and "s.tgz: truncated: gzip data end after " in done.out


def test_compressed_names_are_shards_in_patterns(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.tgz", "c.tar.zst", "d.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert [Path(s.path).name for s in locate([str(tmp_path / "*")]).shards] == ["a.tar.gz", "b.tgz", "c.tar.zst"]

"""Samples compared with webdataset's own reader, and every kind of bad sample."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from support.tars import write_members
from vitscore.shards import grouping
from vitscore.shards.grouping import group_members, split_name
from vitscore.shards.labels import LabelRule
from vitscore.shards.samples import OpenShard, SampleBlock
from vitscore.shards.shard import Shard

Members = list[tuple[str, bytes]]
RULE = LabelRule(["cat", "dog", "bird"])


def make_shard(path: Path, members: Members) -> Shard:
    return Shard(0, path.name, str(write_members(path, members)), None)


def read_all(shard: Shard, **options: object) -> tuple[OpenShard, SampleBlock]:
    with OpenShard(shard, **{"labels": RULE, **options}) as opened:  # type: ignore[arg-type]
        return opened, opened.read(0, opened.num_samples)


def images(block: SampleBlock) -> list[bytes | None]:
    return [None if image is None else image.tobytes() for image in block.images]


def webdataset_samples(path: Path) -> list[dict[str, object]]:
    with open(path, "rb") as stream:
        files = (dict(sample, __url__="") for sample in tar_file_iterator(stream))
        return list(group_by_keys(files))


@settings(max_examples=200, deadline=None)
@given(st.text("abA._/-é", min_size=1, max_size=12))
def test_names_split_as_webdataset_splits_them(name: str) -> None:
    key, extension = base_plus_ext(name)
    is_skipped = key is None or re.match(tar_file_iterator.__defaults__[0], name)
    assert split_name(name) == (None if is_skipped else (key, extension.lower()))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("aB._/", min_size=1, max_size=6), max_size=12))
def test_names_split_the_same_in_a_group_and_alone(names: list[str]) -> None:
    alone = sorted(split for name in names if (split := split_name(name)))
    groups = group_members(names, image_extensions=("a",), label_extension="b")
    keys = (key.partition("#")[0] for key in groups.keys)
    together = sorted((key, extension) for key, own in zip(keys, groups.extensions, strict=True) for extension in own)
    assert together == alone


IMAGES = ("jpg", "png", "seg.png")


@settings(max_examples=300, deadline=None)
@given(
    keys=st.lists(
        st.sampled_from(["a", "b", "00/a", "x/y/", "__a__", "a.b/c", "", "a\n", "__m", "d/__e__", "/", "b_"]),
        min_size=1,
        max_size=5,
    ),
    suffixes=st.lists(
        st.sampled_from([".jpg", ".PNG", ".png", ".cls", ".seg.png", "", ".", ".a__", ".json"]), min_size=1, max_size=3
    ),
    cut=st.integers(0, 2),
)
def test_regular_names_are_grouped_as_any_names_are(keys: list[str], suffixes: list[str], cut: int) -> None:
    names = [key + suffix for key in keys for suffix in suffixes]
    names = names[: len(names) - cut]
    assert group_members(names, image_extensions=IMAGES, label_extension="cls") == grouping._group_any(
        names, IMAGES, "cls"
    )


def test_regular_samples_take_the_fast_path() -> None:
    names = [f"00/{number}.{extension}" for number in range(3) for extension in ("cls", "PNG", "jpg")]
    groups = grouping._group_regular(names, IMAGES, "cls")
    assert groups is not None
    assert groups.keys == ["00/0", "00/1", "00/2"]
    assert (groups.image_members, groups.label_members) == ([2, 5, 8], [0, 3, 6])
    assert groups.num_many_images == 3
    assert grouping._group_regular([*names, "00/3.cls"], IMAGES, "cls") is None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    keys=st.lists(st.text("abc_/.", min_size=1, max_size=6).map(lambda t: "k" + t.strip("/")), unique=True, max_size=8),
    extensions=st.lists(st.sampled_from(["jpg", "JPG2", "cls", "seg.png", "json"]), unique=True, min_size=1),
)
def test_rows_are_webdatasets_samples(tmp_path: Path, keys: list[str], extensions: list[str]) -> None:
    names = [f"{key}.{extension}" for key in keys for extension in extensions]
    path = tmp_path / "t.tar"
    shard = make_shard(path, [(name, name.encode()) for name in [*names, "__meta__/x.jpg", "__a__", "plain"]])
    try:
        oracle = webdataset_samples(path)
    except ValueError:
        return  # a duplicate, which webdataset refuses
    if len({sample["__key__"] for sample in oracle}) < len(oracle):
        return  # members that are not adjacent, of which webdataset makes two samples
    opened, block = read_all(shard)
    assert opened.keys == [sample["__key__"] for sample in oracle]
    for row, sample in enumerate(oracle):
        assert opened.extensions(row) == [name for name in sample if name not in ("__key__", "__url__")]
        if "jpg" in sample and block.reasons[row] is None:
            assert images(block)[row] == sample["jpg"]


def test_images_labels_and_keys_come_in_shard_order(tmp_path: Path) -> None:
    shard = make_shard(
        tmp_path / "t.tar",
        [("00/b.cls", b"1"), ("00/b.jpg", b"B"), ("a.PNG", b"A"), ("a.cls", b"bird\n"), ("c.webp", b"C")],
    )
    opened, block = read_all(shard)
    assert block.keys == ["00/b", "a", "c"]
    assert images(block) == [b"B", b"A", b"C"]
    assert block.labels.tolist() == [1, 2, -1]
    assert block.labels.dtype == np.int32
    assert block.reasons == [None] * 3
    assert (opened.fault, opened.notes) == (None, [])


def test_members_that_are_not_adjacent_are_one_sample_and_noted(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "t.tar", [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.cls", b"2"), ("b.cls", b"0")])
    opened, block = read_all(shard)
    assert (block.keys, block.labels.tolist(), images(block)) == (["a", "b"], [2, 0], [b"A", b"B"])
    assert opened.notes == ["2 samples had members that were not adjacent"]


def test_a_duplicate_key_becomes_a_separate_bad_row(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.cls", b"0"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.cls", b"1"), ("a.jpg", b"4")]
    _, block = read_all(make_shard(tmp_path / "t.tar", members))
    assert block.keys == ["a", "b", "a#2", "a#3"]
    assert images(block) == [b"1", b"2", None, None]
    assert [(reason or "").split(":")[0] for reason in block.reasons] == ["", "", "duplicate key", "duplicate key"]
    assert block.labels.tolist() == [0, -1, 1, -1]


def test_a_duplicate_does_not_take_an_existing_name(tmp_path: Path) -> None:
    members = [("a.jpg", b"1"), ("a.jpg", b"2"), ("a#2.jpg", b"3")]
    _, block = read_all(make_shard(tmp_path / "t.tar", members))
    assert block.keys == ["a", "a#3", "a#2"]
    assert images(block) == [b"1", None, b"3"]


def test_bad_samples_are_rows_with_reasons_and_labels(tmp_path: Path) -> None:
    members = [("a.cls", b"1"), ("b.jpg", b""), ("b.cls", b"2"), ("c.jpg", b"C"), ("c.cls", b"9"), ("d.jpg", b"D")]
    _, block = read_all(make_shard(tmp_path / "t.tar", members))
    assert block.reasons == ["no image: got cls", "empty image", "label out of range: expected 0..2, got 9", None]
    assert block.labels.tolist() == [1, 2, -1, -1]
    assert images(block) == [None, None, None, b"D"]


def test_image_key_selects_one_extension(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "t.tar", [("a.jpg", b"J"), ("a.seg.png", b"S"), ("b.jpg", b"B")])
    _, block = read_all(shard, image_key=".Seg.PNG")
    assert images(block) == [b"S", None]
    assert block.reasons == [None, "no image: expected .seg.png, got jpg"]


def test_of_several_images_the_first_by_extension_is_used(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "t.tar", [("a.png", b"P"), ("a.jpg", b"J"), ("b.jpg", b"J"), ("b.png", b"P")])
    opened, block = read_all(shard)
    assert images(block) == [b"J", b"J"]
    assert opened.image_extension(0) == "jpg"
    assert opened.notes == ["2 samples had several images; the first by extension was used"]


def test_a_cut_shard_keeps_its_readable_samples(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    shard = make_shard(path, [("a.jpg", b"a" * 700), ("b.cls", b"1"), ("b.jpg", b"b" * 700)])
    path.write_bytes(path.read_bytes()[: 1536 + 1024 + 512 + 300])
    opened, block = read_all(shard)
    assert (opened.fault or "").startswith("truncated: ")
    assert block.reasons == [None, "truncated: its last 400 bytes are missing"]
    assert block.labels.tolist() == [-1, 1]


def test_a_cut_label_is_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    shard = make_shard(path, [("a.jpg", b"a"), ("a.cls", b"dog" * 100)])
    path.write_bytes(path.read_bytes()[: 1024 + 512 + 20])
    _, block = read_all(shard)
    assert block.reasons == ["label unreadable: truncated: its last 280 bytes are missing"]


def test_a_shard_that_shrinks_while_it_is_open_loses_only_what_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    shard = make_shard(path, [("a.jpg", b"a" * 700), ("b.jpg", b"b" * 700)])
    with OpenShard(shard, labels=RULE) as opened:
        os.truncate(path, 1536 + 512 + 100)
        block = opened.read(0, 2)
    assert images(block) == [b"a" * 700, None]
    assert block.reasons == [None, "truncated: its last 600 bytes are missing"]


@pytest.mark.parametrize("name", ["nowhere.tar", "file/nowhere.tar", "folder"])
def test_a_shard_that_cannot_be_opened_has_a_fault_and_no_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    opened, block = read_all(Shard(0, name, str(tmp_path / name), None))
    assert opened.fault == ("not a tar: not a file" if name == "folder" else "missing")
    assert (opened.num_samples, len(block), opened.num_bytes) == (0, 0, None)


def test_blocks_of_any_size_hold_the_same_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    members = []
    for n in range(50):
        members += [(f"{n}.jpg", rng.bytes(int(rng.integers(1, 90_000)))), (f"{n}.cls", b"%d" % (n % 3))]
    shard = make_shard(tmp_path / "t.tar", members)
    _, whole = read_all(shard)
    assert images(whole) == [data for name, data in members if name.endswith("jpg")]
    for size in (1, 7, 64):
        with OpenShard(shard, labels=RULE) as opened:
            blocks = [opened.read(start, start + size) for start in range(0, 50, size)]
        assert [image for block in blocks for image in images(block)] == images(whole)
        assert np.concatenate([block.labels for block in blocks]).tolist() == whole.labels.tolist()


def test_labels_read_without_images_are_those_of_the_rows(tmp_path: Path) -> None:
    shard = make_shard(tmp_path / "t.tar", [("a.jpg", b"A"), ("a.cls", b"1"), ("b.cls", b"2"), ("c.jpg", b"C")])
    with OpenShard(shard, labels=RULE) as opened:
        labels, reasons = opened.read_labels(0, 3)
        block = opened.read(0, 3)
    assert labels.tolist() == block.labels.tolist() == [1, 2, -1]
    assert reasons == block.reasons

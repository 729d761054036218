"""How fast do samples come out of a tar?

Question: samples a second with key, image bytes and label, in shard order, from PNGs of 140 bytes and from JPEGs of
          105 KB, against webdataset's reader and Python's tarfile; members a second of an index alone.
Expected: small images at least 10x webdataset, which makes a tarfile object, a stream and a dict of each member; large
          ones 3x: there the copy out of the page cache counts, once here, twice or more there. Index: 20x tarfile.
Command:  vitscore bench reading
Method:   the page cache is warm; one process, one thread, the ways by turns, each through all shards, opening included.
          Ours reads blocks of 128 rows, as a run does. Before that, untimed: all ways give the same samples, by
          checksum. No bytes are inspected while the clock runs, but all are in the process' memory.
"""

from __future__ import annotations

import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds

from vitscore.bench.harness.checkpoints import CLASSES
from vitscore.bench.harness.corpus import digits, photos, write
from vitscore.bench.harness.timing import Figure, figure, rate, ratio, rounds_in_turn, show
from vitscore.shards.labels import LabelRule
from vitscore.shards.samples import OpenShard
from vitscore.shards.shard import Shard
from vitscore.shards.tar.index import index_tar

ROUNDS = 5
BLOCK_ROWS = 128
NUM_SMALL, NUM_LARGE = 10_000, 1_000

Sample = tuple[str, Any, int]
"""Key, image as a buffer, label."""
Read = Callable[[Sequence[Path]], Iterable[Any]]


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Samples/s and members/s by way, and how many times webdataset's rate ours is."""
    shrink = 20 if quick else 1
    rounds = 2 if quick else ROUNDS
    at_least_s = 0.05 if quick else 1.0
    with tempfile.TemporaryDirectory() as name:
        small = write(Path(name) / "small", digits(NUM_SMALL // shrink), per_shard=2_500 // shrink, classes=[*CLASSES])
        large = write(Path(name) / "large", photos(NUM_LARGE // shrink), per_shard=250 // shrink, classes=[*CLASSES])
        checked = {"small": check(small), "large": check(large)}
        measured = partial(by_turns, rounds=rounds, at_least_s=at_least_s)
        rates = measured(READERS, small, checked["small"]["samples"])
        large_rates = measured(READERS, large, checked["large"]["samples"])
        return {
            "contents": checked,
            "samples_per_s": rates,
            "large_samples_per_s": large_rates,
            "ratio_to_webdataset": ratio(rates["vitscore"], rates["webdataset"]),
            "large_ratio_to_webdataset": ratio(large_rates["vitscore"], large_rates["webdataset"]),
            "index_members_per_s": measured(INDEXERS, small, 2 * checked["small"]["samples"], unit="members/s"),
            "large_index_members_per_s": measured(INDEXERS, large, 2 * checked["large"]["samples"], unit="members/s"),
        }


def by_turns(
    ways: dict[str, Read], paths: Sequence[Path], count: int, *, rounds: int, at_least_s: float, unit: str = "samples/s"
) -> dict[str, Figure]:
    """A figure a way: how many of `count` a second it goes through."""
    timed = {
        way: partial(rate, count, partial(exhaust, read, paths), at_least_s=at_least_s) for way, read in ways.items()
    }
    return {way: figure(found, unit) for way, found in rounds_in_turn(timed, rounds).items()}


def exhaust(read: Read, paths: Sequence[Path]) -> None:
    for _ in read(paths):
        pass


def read_by_vitscore(paths: Sequence[Path]) -> Iterator[Sample]:
    rule = LabelRule(CLASSES)
    for ordinal, path in enumerate(paths):
        with OpenShard(Shard(ordinal, path.name, str(path), path.stat().st_size), labels=rule) as shard:
            for start in range(0, shard.num_samples, BLOCK_ROWS):
                block = shard.read(start, start + BLOCK_ROWS)
                yield from zip(block.keys, block.images, block.labels.tolist(), strict=True)


def read_by_webdataset(paths: Sequence[Path]) -> Iterator[Sample]:
    for sample in wds.WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False):
        yield sample["__key__"], sample["jpg"] if "jpg" in sample else sample["png"], int(sample["cls"])


def read_by_tarfile(paths: Sequence[Path]) -> Iterator[Sample]:
    """The least code that does it: no checks; a sample's two members side by side, by their extensions' order."""
    for path in paths:
        with tarfile.open(path) as tar:
            members = iter(tar)
            for label, image in zip(members, members, strict=True):
                # The label first: read once from the front to the back.
                number = int(content(tar, label))
                yield image.name.partition(".")[0], content(tar, image), number


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def index_by_vitscore(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with path.open("rb") as file:
            yield from index_tar(file.fileno()).names


def index_by_tarfile(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        with tarfile.open(path) as tar:
            yield from (member.name for member in tar.getmembers())


READERS: dict[str, Read] = {
    "vitscore": read_by_vitscore,
    "webdataset": read_by_webdataset,
    "tarfile": read_by_tarfile,
}
INDEXERS: dict[str, Read] = {"vitscore": index_by_vitscore, "tarfile": index_by_tarfile}


def check(paths: Sequence[Path]) -> dict[str, Any]:
    """Return the contents of the shards, equal for every reader.

    Raises:
        AssertionError: two ways do not give the same samples, or the same members.
    """
    found = {way: summarise(read(paths)) for way, read in READERS.items()}
    assert len({tuple(each.values()) for each in found.values()}) == 1, f"the readers differ: {found}"
    names = [list(index(paths)) for index in INDEXERS.values()]
    assert names[0] == names[1], "the indexes differ"
    return found["vitscore"]


def summarise(samples: Iterable[Sample]) -> dict[str, Any]:
    """Count, bytes of images, and a checksum over every key, image and label in order."""
    count = image_bytes = checksum = 0
    for key, image, label in samples:
        count += 1
        image_bytes += len(image)
        checksum = zlib.crc32(f"{key} {label}".encode(), zlib.crc32(image, checksum))
    return {"samples": count, "image_bytes": image_bytes, "crc32": f"{checksum:08x}"}


def table(result: dict[str, Any]) -> list[str]:
    sizes = {name: each["image_bytes"] / each["samples"] for name, each in result["contents"].items()}
    lines = []
    for title, name in (
        (f"samples/s, images of {sizes['small']:,.0f} bytes", "samples_per_s"),
        (f"samples/s, images of {sizes['large']:,.0f} bytes", "large_samples_per_s"),
        ("index, members/s, small images", "index_members_per_s"),
        ("index, members/s, large images", "large_index_members_per_s"),
    ):
        lines.append(title)
        lines += [f"  {way:<14}{show(rates, 0):>40}" for way, rates in result[name].items()]
    lines.append(f"against webdataset, small images: {show(result['ratio_to_webdataset'])} times")
    lines.append(f"against webdataset, large images: {show(result['large_ratio_to_webdataset'])} times")
    return lines

"""Write one shard atomically: samples in, a complete tar under its final name out.

Innermost stage of making shards; runs in a worker process. The bytes depend only on the samples: times, owners and
modes are fixed, so the same source gives the same shards on every machine. The layout is webdataset's writer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitscore.errors import DataError, SetupError
from vitscore.shards.making.sources import Sample
from vitscore.system.durable import durable_path, write_bytes_durably

BLOCK_BYTES = 512


def write_shard(path: str, samples: Sequence[Sample]) -> int:
    """Write one shard and return its number of samples.

    Raises:
        DataError: an image can no longer be read.
        SetupError: the shard cannot be written.
    """
    try:
        with durable_path(Path(path)) as temporary:
            _write_tar(temporary, samples)
    except OSError as error:
        raise SetupError("cannot write", where=path, got=error.strerror or str(error)) from error
    return len(samples)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    try:
        write_bytes_durably(path, data)
    except OSError as error:
        raise SetupError("cannot write", where=str(path), got=error.strerror or str(error)) from error


def sample_bytes(sample: Sample) -> int:
    """Return the bytes that a sample takes in a tar: a header and whole blocks for every member."""
    label_bytes = 2 * BLOCK_BYTES if sample.label is not None else 0
    return label_bytes + BLOCK_BYTES + -(-sample.image.num_bytes // BLOCK_BYTES) * BLOCK_BYTES


def _write_tar(path: Path, samples: Sequence[Sample]) -> None:
    # Imported here because webdataset loads torch, which nothing else in `vitscore.shards` needs.
    from webdataset.writer import TarWriter

    with open(path, "wb") as stream:
        # The GNU format equals ustar, except for names that are too long for ustar.
        with TarWriter(stream, user="", group="", mode=0o444, mtime=0, format="GNU_FORMAT", compress=False) as writer:
            for sample in samples:
                members: dict[str, str | bytes] = {"__key__": sample.key, sample.extension: _read_image(sample)}
                if sample.label is not None:
                    members["cls"] = str(sample.label).encode()
                writer.write(members)


def _read_image(sample: Sample) -> bytes:
    try:
        return sample.image.read()
    except OSError as error:
        raise DataError("cannot read the image", where=sample.key, got=error.strerror or str(error)) from error

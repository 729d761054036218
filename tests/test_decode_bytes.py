"""DALI reads a batch's bytes where they are: they must be right, and there, as long as it does, and no longer."""

import functools
import gc
import weakref

import numpy as np
import pytest
import torch

from support import pictures
from vitscore.decode.counts import DecodedAgain
from vitscore.decode.pixels import is_dali_available
from vitscore.preprocess import Geometry

pytestmark = pytest.mark.skipif(not is_dali_available(), reason="DALI is not installed here")

GEOMETRIES = [Geometry("exact", (48, 48), "bilinear"), Geometry("shortest_edge", (64, 64), "bicubic", (56, 56))]
BATCH = 6
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
WAYS = {
    "cpu": {},
    "as on a gpu": {"resize_in_dali": True, "halves": True},
    "gpu": {"device_id": 0},
}
ways = pytest.mark.parametrize("way", ["cpu", "as on a gpu", pytest.param("gpu", marks=[pytest.mark.gpu, needs_gpu])])


def contents_of(turn):
    """A batch of JPEGs, no two batches' alike; every third has two that DALI cannot decode."""
    good = [pictures.encode(pictures.photo(200 + 7 * row, 150 + turn, row % 2), "JPEG") for row in range(BATCH)]
    if turn % 3 == 1:
        good[1] = good[4] = pictures.hidden_bad()["jpeg without its tables"]
    return good


def submitted(decoder, contents):
    """Submit views of one buffer, as the reader gives them; returns the buffer, which nothing here refers to."""
    buffer = np.frombuffer(b"".join(contents), np.uint8).copy()
    ends = np.cumsum([len(content) for content in contents]).tolist()
    decoder.submit([buffer[end - len(content) : end] for content, end in zip(contents, ends, strict=True)])
    return buffer


def make(way):
    from vitscore.decode.dali import DaliDecoder

    return DaliDecoder(GEOMETRIES, batch_size=BATCH, num_threads=2, **WAYS[way])


@functools.cache
def expected(way):
    """By turn: each batch decoded with nothing else under way, and its bytes kept."""
    decoder = make(way)
    kept, found = [], []
    for turn in range(9):
        kept.append(submitted(decoder, contents_of(turn)))
        found.append(decoder.collect())
    decoder.close()
    return found


def same(found, own):
    return found.faults == own.faults and all(torch.equal(a, b) for a, b in zip(found.pixels, own.pixels, strict=True))


def test_bytes_are_not_copied():
    """The bytes that are in place when DALI begins are what it decodes, not those that it was fed."""
    from vitscore.decode.dali_pipeline import DaliPipeline

    first, second = (pictures.encode(pictures.photo(90, 60, which), "JPEG") for which in (0, 1))
    size = max(len(first), len(second))
    first, second = (pictures.as_array(content + b"\0" * (size - len(content))).copy() for content in (first, second))
    pipeline = DaliPipeline((), batch_size=1, num_threads=1, device_id=None, depth=1, hw_decoder_load=0.65)
    pipeline.feed([second], [(60, 90)], serial=1)
    _, (wanted,) = pipeline.outputs(1)
    pipeline._feed_inputs([first], [(60, 90)], serial=2)
    first[:] = second
    pipeline._pipe.schedule_run()
    _, (found,) = pipeline.outputs(2)
    assert torch.equal(found, wanted)


@ways
def test_bytes_may_be_overwritten_as_soon_as_their_batch_is_collected(way):
    own = expected(way)
    decoder = make(way)
    buffers, found = [], []
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    for turn in range(len(own)):
        buffers.append(submitted(decoder, contents_of(turn)))
        if turn >= decoder.depth - 1:
            found.append(decoder.collect())
            collected = buffers[len(found) - 1]
            collected[:] = noise[: len(collected)]
    while len(found) < len(own):
        found.append(decoder.collect())
    decoder.close()
    assert decoder.again == DecodedAgain(batches=3, images=3 * BATCH, undecodable=6, rebuilds=0)
    assert all(same(one, other) for one, other in zip(found, own, strict=True))


@ways
def test_bytes_live_until_their_batch_is_collected_and_soon_no_longer(way):
    """Nothing but the decoder refers to them; memory that is let go is filled with other bytes at once."""
    own = expected(way)
    decoder = make(way)
    buffers, found, rubbish = [], [], []
    for turn in range(len(own)):
        buffers.append(weakref.ref(submitted(decoder, contents_of(turn))))
        gc.collect()
        rubbish.append([np.full(1 << 16, turn, np.uint8) for _ in range(8)])
        assert all(each() is not None for each in buffers[len(found) :])
        if turn >= decoder.depth - 1:
            found.append(decoder.collect())
    while len(found) < len(own):
        found.append(decoder.collect())
    assert all(same(one, other) for one, other in zip(found, own, strict=True))
    # DALI keeps the buffers of a batch until it uses their place again.
    assert not any(each() is not None for each in buffers[: -2 * decoder.depth])
    decoder.close()
    gc.collect()
    assert not any(each() is not None for each in buffers)


@ways
def test_a_rebuilt_pipeline_is_given_the_same_bytes_again(way):
    own = expected(way)
    decoder = make(way)
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)
    buffers = [submitted(decoder, contents_of(turn)) for turn in range(3)]
    found = [decoder.collect()]
    buffers[0][:] = noise[: len(buffers[0])]
    decoder._rebuild()
    buffers.append(submitted(decoder, contents_of(3)))
    found += [decoder.collect() for _ in range(3)]
    decoder.close()
    assert all(same(one, other) for one, other in zip(found, own[:4], strict=True))

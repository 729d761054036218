"""DALI reads the bytes of a batch in place: they must be unchanged and alive until it is decoded, and not longer."""

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
WAYS = [
    pytest.param({}, id="cpu"),
    pytest.param({"resize_in_dali": True, "halves": True}, id="as on a gpu"),
]


def contents_of(turn):
    """Return a batch of JPEGs; all batches differ, and every third has two images that DALI cannot decode."""
    good = [pictures.encode(pictures.photo(200 + 7 * row, 150 + turn, row % 2), "JPEG") for row in range(BATCH)]
    if turn % 3 == 1:
        good[1] = good[4] = pictures.hidden_bad()["jpeg without its tables"]
    return good


def submitted(decoder, contents):
    """Submit views of one buffer, as the reader does; return the buffer, to which the test keeps no other reference."""
    buffer = np.frombuffer(b"".join(contents), np.uint8).copy()
    ends = np.cumsum([len(content) for content in contents]).tolist()
    decoder.submit([buffer[end - len(content) : end] for content, end in zip(contents, ends, strict=True)])
    return buffer


def make(**options):
    from vitscore.decode.dali import DaliDecoder

    return DaliDecoder(GEOMETRIES, batch_size=BATCH, num_threads=2, **options)


@pytest.fixture(scope="module")
def expected():
    """Batches by options and turn, decoded with no other batch under way, while their bytes are kept."""
    turns = []
    for options in ({}, {"resize_in_dali": True, "halves": True}):
        decoder = make(**options)
        batches = []
        for turn in range(9):
            kept = submitted(decoder, contents_of(turn))
            batches.append(decoder.collect())
            del kept
        decoder.close()
        turns.append(batches)
    return turns


def same(one, own):
    return one.faults == own.faults and all(torch.equal(a, b) for a, b in zip(one.pixels, own.pixels, strict=True))


def test_bytes_are_not_copied():
    """DALI decodes the bytes that are in the buffer when it starts, not those that were there when it was fed."""
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
    _, (images,) = pipeline.outputs(2)
    assert torch.equal(images, wanted)


@pytest.mark.parametrize("options", WAYS)
def test_bytes_may_be_overwritten_as_soon_as_their_batch_is_collected(options, expected):
    own = expected[bool(options)]
    decoder = make(**options)
    buffers, results = [], []
    noise = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)
    for turn in range(len(own)):
        buffers.append(submitted(decoder, contents_of(turn)))
        if turn >= decoder.depth - 1:
            results.append(decoder.collect())
            collected = buffers[len(results) - 1]
            collected[:] = noise[: len(collected)]
    while len(results) < len(own):
        results.append(decoder.collect())
    decoder.close()
    assert decoder.again == DecodedAgain(batches=3, images=3 * BATCH, undecodable=6, rebuilds=0)
    assert all(same(one, other) for one, other in zip(results, own, strict=True))


@pytest.mark.parametrize("options", WAYS)
def test_bytes_live_until_their_batch_is_collected_and_soon_no_longer(options, expected):
    """Only the decoder refers to the buffers, and released memory is immediately filled with other bytes."""
    own = expected[bool(options)]
    decoder = make(**options)
    buffers, results, rubbish = [], [], []
    for turn in range(len(own)):
        buffers.append(weakref.ref(submitted(decoder, contents_of(turn))))
        gc.collect()
        rubbish.append([np.full(1 << 16, turn, np.uint8) for _ in range(8)])
        assert all(buffer() is not None for buffer in buffers[len(results) :])
        if turn >= decoder.depth - 1:
            results.append(decoder.collect())
    while len(results) < len(own):
        results.append(decoder.collect())
    assert all(same(one, other) for one, other in zip(results, own, strict=True))
    # DALI keeps the buffers of a batch until it reuses their slot.
    assert not any(buffer() is not None for buffer in buffers[: -2 * decoder.depth])
    decoder.close()
    gc.collect()
    assert not any(buffer() is not None for buffer in buffers)


@pytest.mark.parametrize("options", WAYS)
def test_a_rebuilt_pipeline_is_given_the_same_bytes_again(options, expected):
    own = expected[bool(options)]
    decoder = make(**options)
    noise = np.random.default_rng(1).integers(0, 256, 1 << 20, np.uint8)
    buffers = [submitted(decoder, contents_of(turn)) for turn in range(3)]
    results = [decoder.collect()]
    buffers[0][:] = noise[: len(buffers[0])]
    decoder._rebuild()
    buffers.append(submitted(decoder, contents_of(3)))
    results += [decoder.collect() for _ in range(3)]
    decoder.close()
    assert all(same(one, other) for one, other in zip(results, own[:4], strict=True))

"""Pixels, faults and order of both decoders, against transformers' processors after its `load_image`."""

import functools
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, EfficientNetImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from support import pictures
from vitscore.decode.make import make_decoder
from vitscore.decode.pixels import is_dali_available
from vitscore.decode.torchvision import render, render_alike
from vitscore.errors import SetupError
from vitscore.preprocess import Geometry, processor_geometry, spec_from_processor

pytestmark = pytest.mark.filterwarnings("ignore:Palette images with Transparency")

RAW = {"do_rescale": False, "do_normalize": False}
VIT, CLIP = ViTImageProcessor(**RAW), CLIPImageProcessor(**RAW)
# The crop is larger than many images, so they are padded with zeros.
PADDED = CLIPImageProcessor(size={"shortest_edge": 150}, crop_size=181, **RAW)
PROCESSORS = (VIT, CLIP, PADDED)
GEOMETRIES = tuple(spec_from_processor(processor).geometry for processor in PROCESSORS)
ASPECTS = [(400, 500), (500, 400), (50, 400), (400, 50), (20, 30), (30, 21), (1, 1), (3, 2), (1, 9), (8, 8), (640, 427)]

needs_dali = pytest.mark.skipif(not is_dali_available(), reason="DALI is not installed here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
DECODERS = [pytest.param("dali", marks=needs_dali), pytest.param("dali graph", marks=needs_dali), "torchvision"]


def decoder(kind, geometries=GEOMETRIES, *, batch_size=64, num_threads=2, **options):
    if kind != "dali graph":
        return make_decoder(kind, geometries, batch_size=batch_size, num_threads=num_threads, **options)
    # The graph for GPUs, run on the CPU.
    from vitscore.decode.dali import DaliDecoder

    return DaliDecoder(geometries, batch_size=batch_size, num_threads=num_threads, resize_in_dali=True, **options)


def decode(kind, contents, geometries=GEOMETRIES, **options):
    made = decoder(kind, geometries, **options)
    try:
        made.submit([pictures.as_array(content) for content in contents])
        return made.collect()
    finally:
        made.close()


@functools.cache
def expected(content, processor):
    with Image.open(io.BytesIO(content)) as opened:
        pixels = processor(images=load_image(opened), return_tensors="pt")["pixel_values"][0]
    return pixels.permute(1, 2, 0).float()


def levels(decoded, contents, processors=PROCESSORS):
    """Return each image's mean difference from the processors, in levels of 255: the largest over the geometries."""
    assert not decoded.faults
    return [
        max(
            float((pixels[row] - expected(content, processor)).abs().mean())
            for pixels, processor in zip(decoded.pixels, processors, strict=True)
        )
        for row, content in enumerate(contents)
    ]


@pytest.mark.parametrize("kind", DECODERS)
def test_every_kind_of_image_looks_as_transformers_sees_it(kind):
    contents = {**pictures.ordinary(), **pictures.odd()}
    differences = dict(zip(contents, levels(decode(kind, contents.values()), contents.values()), strict=True))
    limit = 0.3 if kind == "dali graph" else 0.0
    assert {name: mean for name, mean in differences.items() if mean > limit} == {}


@pytest.mark.parametrize("kind", DECODERS)
def test_every_aspect_looks_as_transformers_sees_it(kind):
    contents = [pictures.encode(pictures.photo(width, height, 1), "PNG") for height, width in ASPECTS]
    differences = dict(zip(ASPECTS, levels(decode(kind, contents), contents), strict=True))
    limit = 0.3 if kind == "dali graph" else 0.0
    assert {size: mean for size, mean in differences.items() if mean > limit} == {}


@needs_dali
@pytest.mark.parametrize("resample", range(4))
def test_every_filter_of_the_graph(resample):
    processors = [kind(resample=resample, **RAW) for kind in (ViTImageProcessor, CLIPImageProcessor)]
    geometries = [spec_from_processor(processor).geometry for processor in processors]
    contents = [pictures.encode(pictures.photo(width, height), "PNG") for height, width in ASPECTS]
    contents.append(pictures.ordinary()["png two colours"])
    assert max(levels(decode("dali graph", contents, geometries), contents, processors)) < 0.3


@pytest.mark.parametrize("kind", DECODERS)
def test_a_crop_without_a_resize(kind):
    processor = CLIPImageProcessor(do_resize=False, crop_size={"height": 100, "width": 60}, **RAW)
    contents = [pictures.encode(pictures.photo(*size), "PNG") for size in ((200, 150), (41, 30), (300, 33), (1, 1))]
    decoded = decode(kind, contents, [spec_from_processor(processor).geometry])
    assert max(levels(decoded, contents, [processor])) == 0


@pytest.mark.parametrize("kind", DECODERS)
def test_sixteen_bits_are_scaled(kind):
    values = pictures.grey16()
    contents = [pictures.encode(Image.fromarray(values), format) for format in ("PNG", "TIFF")]
    whole = Geometry("exact", values.shape, "bilinear")
    decoded = decode(kind, contents, [whole])
    for row in range(2):
        assert np.abs(decoded.pixels[0][row, :, :, 0].numpy() - values / 257).max() <= 0.51


@pytest.mark.parametrize("kind", DECODERS)
def test_pixels_are_bytes_in_one_piece(kind):
    decoded = decode(kind, [pictures.ordinary()["jpeg"]] * 3)
    shapes = [(3, 224, 224, 3), (3, 224, 224, 3), (3, 181, 181, 3)]
    assert [tuple(pixels.shape) for pixels in decoded.pixels] == shapes
    assert all(pixels.dtype == torch.uint8 and pixels.is_contiguous() for pixels in decoded.pixels)


@pytest.mark.parametrize("kind", DECODERS)
def test_an_inexpressible_processor_gives_its_own_values(kind):
    processor = EfficientNetImageProcessor(size={"height": 60, "width": 50})
    contents = [pictures.ordinary()["jpeg"], pictures.odd()["gif"], pictures.ordinary()["png"], b"no image"]
    decoded = decode(kind, contents, [GEOMETRIES[0], processor_geometry(processor)])
    assert decoded.pixels[1].shape == (4, 3, 60, 50) and decoded.pixels[1].dtype == torch.float32
    for row, content in enumerate(contents[:3]):
        own = expected(content, processor).permute(2, 0, 1)
        torch.testing.assert_close(decoded.pixels[1][row], own)
    assert list(decoded.faults) == [3] and not decoded.pixels[1][3].any()


@pytest.mark.parametrize("kind", DECODERS)
def test_pixels_do_not_depend_on_batch_or_threads(kind):
    contents = [pictures.as_array(content) for content in {**pictures.ordinary(), **pictures.odd()}.values()]
    runs = []
    for batch_size, num_threads, order in ((64, 2, 1), (1, 1, 1), (7, 2, -1), (32, 1, -1)):
        made = decoder(kind, batch_size=batch_size, num_threads=num_threads)
        batches = []
        ordered = contents[::order]
        for start in range(0, len(ordered), batch_size):
            made.submit(ordered[start : start + batch_size])
            batches.append(made.collect().pixels)
        made.close()
        runs.append(
            [
                torch.cat(pixels)[::1] if order == 1 else torch.cat(pixels).flip(0)
                for pixels in zip(*batches, strict=True)
            ]
        )
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("size", "crop"), [((32, 32), None), ((40, 40), (32, 32)), ((20, 20), (32, 32))])
def test_images_of_one_size_get_the_same_bits_together(interpolation, size, crop):
    geometry = Geometry("shortest_edge" if crop else "exact", size, interpolation, crop)
    random = np.random.default_rng(0)
    for edges in ((8, 8), (28, 20), (3, 50), (64, 64)):
        images = [torch.from_numpy(random.integers(0, 256, (*edges, 3), np.uint8)) for _ in range(7)]
        alone = [render(image, geometry).numpy() for image in images]
        assert np.array_equal(render_alike(images, geometry), np.stack(alone))


@needs_dali
def test_rows_go_together_only_with_rows_of_their_size_and_few_pixels():
    from vitscore.decode.resize import groups_of_one_size

    sizes = [(8, 8)] * 9 + [(500, 400), (8, 9), (500, 400)]
    groups = list(groups_of_one_size([torch.zeros(*size, 3) for size in sizes], at_least=2))
    assert groups == [[0, 1, 2, 3, 4], [5, 6, 7, 8], [9], [11], [10]]


@pytest.mark.parametrize("kind", DECODERS)
def test_every_bad_image_is_a_blank_row_with_its_reason(kind):
    bad = pictures.visibly_bad()
    decoded = decode(kind, [content for content, _ in bad.values()])
    assert sorted(decoded.faults) == list(range(len(bad)))
    for row, (name, (_, reason)) in enumerate(bad.items()):
        assert decoded.faults[row].startswith(reason), name
        assert not re.search(r"\n|\b0x|[<>]", decoded.faults[row]) and len(decoded.faults[row]) < 120
    assert not any(pixels.any() for pixels in decoded.pixels)


@pytest.mark.parametrize("kind", DECODERS)
def test_bad_images_leave_their_neighbours_as_they_are(kind):
    good = list(pictures.ordinary().values())
    hidden = list(pictures.hidden_bad().values())
    mixed, rows = [], []
    for index, content in enumerate(good):
        rows.append(len(mixed))
        mixed.append(content)
        if index % 5 == 0:
            mixed.append(hidden[index // 5 % len(hidden)])
    clean, damaged = decode(kind, good), decode(kind, mixed)
    assert set(damaged.faults) == set(range(len(mixed))) - set(rows)
    assert all(reason.startswith("undecodable image: ") for reason in damaged.faults.values())
    for a, b in zip(clean.pixels, damaged.pixels, strict=True):
        assert torch.equal(a, b[rows])
        assert not b[list(damaged.faults)].any()


def test_a_bad_image_costs_its_batch_one_further_decode_and_other_batches_none():
    bad = list(pictures.hidden_bad().values())
    good = [content for content in pictures.ordinary().values() if content.startswith(b"\xff\xd8")]
    made = decoder("dali", batch_size=16)
    try:
        for batch in (good[:6], [*good[:6], bad[0], bad[1]], good[:6]):
            made.submit([pictures.as_array(content) for content in batch])
            made.collect()
        assert made.again.images == 8
    finally:
        made.close()


@needs_dali
def test_after_a_failure_a_bad_image_takes_few_others_with_it():
    photo = pictures.encode(pictures.photo(500, 400), "JPEG")
    bad = pictures.hidden_bad()["jpeg without its tables"]
    made = decoder("dali", GEOMETRIES[:1], batch_size=48)
    alone = decode("dali", [photo], GEOMETRIES[:1]).pixels[0][0]
    try:
        for row, again in ((0, 48), (20, 48 + 16), (47, 48 + 16 + 16)):
            made.submit([pictures.as_array(bad if index == row else photo) for index in range(48)])
            decoded = made.collect()
            assert made.again.images == again
            assert list(decoded.faults) == [row]
            assert all(torch.equal(pixels, alone) for index, pixels in enumerate(decoded.pixels[0]) if index != row)
    finally:
        made.close()


@pytest.mark.parametrize("kind", DECODERS)
def test_batches_stay_in_order_after_a_bad_one(kind):
    contents = list(pictures.ordinary().values())[:8]
    bad = pictures.hidden_bad()["jpeg without its tables"]
    made = decoder(kind, GEOMETRIES[:1], batch_size=3)
    alone = decode(kind, contents, GEOMETRIES[:1]).pixels[0]
    plan = [[0, 1], [2, None, 3], [None], [4], [None, 5], [6, 7], [1], [None, None, 2], [3]]
    waiting, collected = [], []
    for batch in plan:
        made.submit([pictures.as_array(bad if index is None else contents[index]) for index in batch])
        waiting.append(batch)
        if len(waiting) == made.depth:
            collected.append((waiting.pop(0), made.collect()))
    collected += [(batch, made.collect()) for batch in waiting]
    made.close()
    assert [batch for batch, _ in collected] == plan
    for batch, decoded in collected:
        assert sorted(decoded.faults) == [row for row, index in enumerate(batch) if index is None]
        for row, index in enumerate(batch):
            assert torch.equal(decoded.pixels[0][row], alone[index] if index is not None else torch.zeros(224, 224, 3))


@pytest.mark.parametrize("kind", DECODERS)
def test_collected_pixels_stay_when_the_decoder_goes_on(kind):
    contents = list(pictures.ordinary().values())[:6]
    made = decoder(kind)
    kept, copies = [], []
    for content in contents:
        made.submit([pictures.as_array(content)] * 4)
        kept.append(made.collect().pixels)
        copies.append([pixels.clone() for pixels in kept[-1]])
    made.close()
    assert all(torch.equal(a, b) for one, two in zip(kept, copies, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("kind", DECODERS)
def test_the_limit_of_pixels_is_the_callers(kind):
    contents = [pictures.ordinary()["jpeg"], pictures.odd()["gif"], pictures.encode(pictures.photo(20, 30), "PNG")]
    decoded = decode(kind, contents, max_pixels=40_000)
    assert decoded.faults == dict.fromkeys((0, 1), "image too large: 250x200, limit 40000 pixels")


@pytest.mark.parametrize("kind", DECODERS)
def test_a_wrong_batch_is_refused(kind):
    made = decoder(kind, batch_size=2)
    for size in (0, 3):
        with pytest.raises(ValueError, match="1 to 2"):
            made.submit([pictures.as_array(pictures.ordinary()["jpeg"])] * size)
    made.close()


def test_without_dali_the_error_says_what_to_install(monkeypatch):
    for name in [
        name for name in sys.modules if name.startswith(("nvidia.dali", "vitscore.decode.dali", "vitscore.dali"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(SetupError, match="pip install nvidia-dali-cuda130") as caught:
        make_decoder("dali", GEOMETRIES, batch_size=1, num_threads=1)
    assert caught.value.exit_code == 4


NOISY = """
import sys, os
sys.path.insert(0, sys.argv[1])
from support import pictures
from vitscore.decode.make import make_decoder
from vitscore.preprocess import Geometry
assert not any(name.startswith("nvidia.dali") for name in sys.modules)  # imported when it is needed
decoder = make_decoder("dali", [Geometry("exact", (32, 32), "bilinear")], batch_size=40, num_threads=2)
print("python says this", file=sys.stderr)
os.write(2, b"a C library says that\\n")
bad = [*pictures.hidden_bad().values(), *(content for content, _ in pictures.visibly_bad().values())]
decoder.submit([pictures.as_array(content) for content in bad])
print(len(decoder.collect().faults))
decoder.close()
print("and this", file=sys.stderr)
"""


@needs_dali
def test_only_the_noise_about_bad_images_is_kept_off_stderr():
    maker = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", NOISY, maker], capture_output=True, text=True, check=True, timeout=120)
    assert int(done.stdout) == len(pictures.hidden_bad()) + len(pictures.visibly_bad())
    assert sorted(done.stderr.splitlines()) == ["a C library says that", "and this", "python says this"]


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_the_error_says_so():
    with pytest.raises(SetupError, match="DALI cannot use the GPU: cuda:0"):
        make_decoder("dali", GEOMETRIES, batch_size=1, num_threads=1, device_id=0)


@pytest.mark.gpu
@needs_dali
@needs_gpu
def test_gpu_pixels_are_close_to_the_cpus():
    contents = list({**pictures.ordinary(), **pictures.odd()}.values())
    bad = [*pictures.hidden_bad().values(), *(content for content, _ in pictures.visibly_bad().values())]
    cpu = decode("dali", contents + bad[:20], batch_size=128)
    gpu = decode("dali", contents + bad[:20], batch_size=128, device_id=0)
    assert set(gpu.faults) == set(cpu.faults)
    for a, b in zip(cpu.pixels, gpu.pixels, strict=True):
        assert b.is_cuda
        # nvJPEG's inverse transform rounds differently; no image may be further off than that explains.
        assert (a - b.cpu().float()).abs().mean(dim=(1, 2, 3)).max() < 1.0


@pytest.mark.gpu
@needs_dali
@needs_gpu
def test_gpu_batches_are_ordered_with_torchs_stream():
    contents = [pictures.as_array(pictures.ordinary()[name]) for name in ("jpeg", "jpeg progressive", "jpeg grey")]
    made = decoder("dali", GEOMETRIES[:1], batch_size=64, device_id=0)
    sums = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for turn in range(12):
            made.submit([contents[turn % 3]] * 64)
            sums.append(made.collect().pixels[0].sum(dtype=torch.int64))
        torch.cuda.current_stream().synchronize()
    made.close()
    assert len({int(value) for value in sums}) == 3 and all(sums[turn] == sums[turn % 3] for turn in range(12))


@pytest.mark.gpu
@needs_dali
@needs_gpu
def test_gpu_pixels_stay_as_long_as_they_are_held_mended_ones_too():
    contents = [pictures.as_array(content) for content in pictures.ordinary().values()]
    bad = pictures.as_array(pictures.hidden_bad()["jpeg without its tables"])
    made = decoder("dali", batch_size=16, device_id=0)
    kept, copies = [], []
    for turn in range(12):
        images = [contents[(turn + row) % len(contents)] for row in range(16)]
        images[turn % 16] = bad if turn % 3 == 0 else images[turn % 16]
        made.submit(images)
        kept.append(made.collect())
        copies.append([pixels.cpu() for pixels in kept[-1].pixels])
    made.close()
    for decoded, copied in zip(kept, copies, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(decoded.pixels, copied, strict=True))
    assert [bool(decoded.faults) for decoded in kept] == [turn % 3 == 0 for turn in range(12)]

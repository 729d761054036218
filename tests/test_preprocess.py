"""Specs, compared with the processors that they are made from."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from transformers import (
    BeitImageProcessor,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    DeiTImageProcessor,
    DPTImageProcessor,
    EfficientNetImageProcessor,
    LevitImageProcessor,
    MobileNetV2ImageProcessor,
    MobileViTImageProcessor,
    SiglipImageProcessor,
    ViTImageProcessor,
)
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_transforms import get_resize_output_image_size
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from vitscore.decode import torchvision as decode_torchvision
from vitscore.decode.torchvision import render, render_alike
from vitscore.preprocess import (
    Geometry,
    Inexpressible,
    processor_geometry,
    run_processor,
    spec_from_processor,
)

PROCESSORS = {
    "vit": ViTImageProcessor(),
    "vit, bicubic 384": ViTImageProcessor(size=384, resample=3),
    "vit, not square": ViTImageProcessor(size={"height": 64, "width": 96}),
    "clip": CLIPImageProcessor(),
    "clip, 336": CLIPImageProcessor(size={"shortest_edge": 336}, crop_size=336),
    "clip, crop not square": CLIPImageProcessor(crop_size={"height": 160, "width": 200}),
    "clip, crop larger than the image": CLIPImageProcessor(size={"shortest_edge": 101}, crop_size=128),
    "deit": DeiTImageProcessor(),
    "siglip": SiglipImageProcessor(),
    "beit": BeitImageProcessor(),
    "mobilenet": MobileNetV2ImageProcessor(),
    "dinov2": BitImageProcessor(size={"shortest_edge": 256}, crop_size=224),
    "convnext, 224": ConvNextImageProcessor(size={"shortest_edge": 224}),
    "convnext, 384": ConvNextImageProcessor(),
    "levit": LevitImageProcessor(),
    "lanczos": CLIPImageProcessor(resample=1),
    "nearest": CLIPImageProcessor(resample=0),
    "not rescaled": ViTImageProcessor(do_rescale=False),
    "not normalised": ViTImageProcessor(do_normalize=False),
    "other factor": ViTImageProcessor(rescale_factor=1 / 127.5),
    "not resized": CLIPImageProcessor(do_resize=False, crop_size=60),
    "exact, then a larger crop": DeiTImageProcessor(size={"height": 90, "width": 40}, crop_size=81),
}
process_image, resize = TorchvisionBackend.process_image, TorchvisionBackend.resize
SIZES = [(50, 40), (40, 51), (61, 61), (7, 90), (120, 33), (1, 1), (3, 2)]


def noise(height, width):
    return Image.fromarray(np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8))


def by_spec(spec, image):
    pixels = render(torch.from_numpy(np.array(image)), spec.geometry).permute(2, 0, 1).float()
    return (pixels * spec.scale - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(spec.std)[:, None, None]


@pytest.mark.parametrize("name", PROCESSORS)
def test_spec_does_what_the_processor_does(name):
    spec = spec_from_processor(PROCESSORS[name])
    for height, width in SIZES:
        image = noise(height, width)
        expected = run_processor(PROCESSORS[name], image)
        assert expected.shape == (3, spec.geometry.height, spec.geometry.width)
        torch.testing.assert_close(by_spec(spec, image), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("processor", [CLIPImageProcessorPil(), ViTImageProcessorPil()])
def test_pillow_backed_processors_are_within_a_level(processor):
    spec = spec_from_processor(processor)
    level = spec.scale / min(spec.std)
    for height, width in SIZES[:5]:
        image = noise(height, width)
        difference = by_spec(spec, image) - run_processor(processor, image)
        assert difference.abs().mean() < 0.3 * level


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 600))
def test_long_side_is_cut_off_like_transformers(height, width, edge):
    geometry = Geometry("shortest_edge", (edge, edge), "bicubic", (edge, edge))
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    expected = get_resize_output_image_size(image, edge, default_to_square=False, input_data_format="channels_first")
    assert geometry.resized_size(height, width) == expected
    top, left = geometry.crop_offset(*expected)
    assert (top, left) == (int((expected[0] - edge) / 2), int((expected[1] - edge) / 2))


def test_models_with_one_geometry_share_it():
    a, b = spec_from_processor(CLIPImageProcessor()), spec_from_processor(CLIPImageProcessor(image_mean=[0.5] * 3))
    assert a != b and a.geometry == b.geometry and len({a.geometry, b.geometry}) == 1


def test_processor_of_images_and_text_is_unwrapped():
    class Both:
        image_processor = CLIPImageProcessor()

    assert spec_from_processor(Both()) == spec_from_processor(CLIPImageProcessor())


@pytest.mark.parametrize(
    ("processor", "reason"),
    [
        (EfficientNetImageProcessor(), "EfficientNetImageProcessor has its own"),
        (MobileViTImageProcessor(), "MobileViTImageProcessor has its own"),
        (DPTImageProcessor(), "DPTImageProcessor has its own"),
        (ViTImageProcessor(resample=4), "resampling filter"),
        (ViTImageProcessor(size={"shortest_edge": 224}), "different sizes"),
        (ViTImageProcessor(do_resize=False), "different sizes"),
        (ViTImageProcessor(size={"shortest_edge": 224, "longest_edge": 300}), "neither height and width"),
        (ViTImageProcessor(do_pad=True), "pads"),
        (ViTImageProcessor(image_mean=[0.5] * 4, image_std=[0.5] * 4), "4 channels"),
        (ConvNextImageProcessor(size={"shortest_edge": 224}, do_center_crop=True, crop_size=224), "crops twice"),
        (CLIPImageProcessorPil(crop_size=300), "larger than its image"),
        (object(), "object is not built on"),
    ],
)
def test_what_a_spec_cannot_say_is_refused_with_the_reason(processor, reason):
    with pytest.raises(Inexpressible, match=reason):
        spec_from_processor(processor)


def test_a_subclass_with_a_step_of_its_own_is_refused():
    class Mine(ViTImageProcessor):
        def resize(self, image, *args, **kwargs):
            return super().resize(image.flip(-1), *args, **kwargs)

    with pytest.raises(Inexpressible, match="Mine has its own resize"):
        spec_from_processor(Mine())


def test_an_inexpressible_processor_runs_as_it_is():
    geometry = processor_geometry(EfficientNetImageProcessor())
    assert (geometry.height, geometry.width) == (346, 346)
    image = noise(50, 40)
    expected = EfficientNetImageProcessor()(images=image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(render(torch.from_numpy(np.array(image)), geometry), expected)


def test_a_processor_that_keeps_sizes_makes_no_batch():
    with pytest.raises(Inexpressible, match="cannot be batched"):
        processor_geometry(ViTImageProcessor(do_resize=False))


def as_release_5_17(backend, image, do_convert_rgb=None, **options):
    """transformers 5.17 only converts the mode, which is RGB already."""
    image.info.pop("transparency", None)
    return process_image(backend, image, do_convert_rgb=do_convert_rgb, **options)


def as_release_5_23(backend, image, do_convert_rgb=None, **options):
    """transformers 5.23 puts transparent images on white."""
    if do_convert_rgb and (key := image.info.pop("transparency", None)):
        pixels = np.array(image)
        image = Image.fromarray(np.where((pixels == np.array(key)).all(2, keepdims=True), np.uint8(255), pixels))
    return process_image(backend, image, do_convert_rgb=do_convert_rgb, **options)


@pytest.mark.parametrize(
    ("release", "converts", "whitens"),
    [(as_release_5_17, True, False), (as_release_5_23, True, True), (as_release_5_23, False, False)],
)
def test_the_processor_that_is_there_says_whether_a_colour_key_becomes_white(release, converts, whitens, monkeypatch):
    monkeypatch.setattr(TorchvisionBackend, "process_image", release)
    assert spec_from_processor(ViTImageProcessor(do_convert_rgb=converts)).geometry.whitens is whitens
    assert processor_geometry(EfficientNetImageProcessor(do_convert_rgb=converts)).whitens is whitens


def test_a_processor_that_resizes_by_bicubic_for_lanczos_is_followed(monkeypatch):
    """Processors behave so with a torchvision that has no lanczos for tensors; those on Pillow always have lanczos."""

    def bicubic(backend, image, size, resample=None, **options):
        return resize(backend, image, size, 3 if resample == 1 else resample, **options)

    monkeypatch.setattr(TorchvisionBackend, "resize", bicubic)
    for size in ({"height": 48, "width": 64}, {"height": 64, "width": 96}):
        assert spec_from_processor(ViTImageProcessor(resample=1, size=size)).geometry.interpolation == "bicubic"
    assert spec_from_processor(CLIPImageProcessor(resample=1)).geometry.interpolation == "bicubic"
    assert spec_from_processor(CLIPImageProcessorPil(resample=1)).geometry.interpolation == "lanczos"
    unused = spec_from_processor(CLIPImageProcessor(resample=1, do_resize=False, crop_size=60))
    assert unused.geometry.interpolation == "lanczos"


def test_pillow_resizes_by_lanczos_where_torchvision_cannot(monkeypatch):
    def no_lanczos(pixels, size, interpolation, antialias):
        if interpolation == InterpolationMode.LANCZOS:
            raise NotImplementedError
        return resize_tensors(pixels, size, interpolation=interpolation, antialias=antialias)

    resize_tensors = decode_torchvision.tvF.resize
    monkeypatch.setattr(decode_torchvision.tvF, "resize", no_lanczos)
    monkeypatch.setattr(decode_torchvision, "_resizes_tensors", decode_torchvision._resizes_tensors.__wrapped__)
    processor = CLIPImageProcessorPil(resample=1, do_rescale=False, do_normalize=False)
    geometry = spec_from_processor(processor).geometry
    for height, width in SIZES:
        images = [noise(height, width), noise(height, width).transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        tensors = [torch.from_numpy(np.array(image)) for image in images]
        expected = torch.stack([run_processor(processor, image) for image in images]).permute(0, 2, 3, 1)
        assert torch.equal(torch.stack([render(tensor, geometry) for tensor in tensors]).float(), expected)
        assert torch.equal(torch.from_numpy(render_alike(tensors, geometry)).float(), expected)


def test_a_very_long_image_is_resized_where_the_crop_looks():
    image = noise(4, 2000).resize((4000, 4), Image.Resampling.BICUBIC)
    geometry = spec_from_processor(CLIPImageProcessor()).geometry
    assert np.prod(geometry.resized_size(4, 4000)) > 1 << 24
    expected = run_processor(CLIPImageProcessor(do_rescale=False, do_normalize=False), image).permute(1, 2, 0)
    assert (render(torch.from_numpy(np.array(image)), geometry) - expected).abs().mean() < 0.3

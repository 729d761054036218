"""Compare the hand-written bf16 encoder with transformers' modules, in fp32 and in bfloat16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from support import smallmodels as small
from vitscore.classes.matching import BY_POSITION, match_head
from vitscore.models.checkpoint import find
from vitscore.models.cpu_bf16 import attention, trunk
from vitscore.models.cpu_bf16.trunk import Trunk, Unsuitable
from vitscore.models.heads import ClassifierNet, EncoderClassifierNet, PixelNormalizer, VisionTower
from vitscore.models.image_model import ImageModel, Placement
from vitscore.models.load import HeadSpec, load_model

EDGE = small.EDGE
NAMES = ("cat", "dog", "owl", "crane")
FACTOR, OFFSET = torch.tensor([0.0171, 0.0175, 0.0174]), torch.tensor([-2.1179, -2.0357, -1.8044])
VISION = {**small.VISION, "hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 192}

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies bfloat16 matrices only with AVX-512"
)


def vision_model(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**{**VISION, **config}))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**{**VISION, "initializer_factor": 3.0, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # initially zero; weights of normalisations are initially one
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.normal_(1, 0.3)
    return model.eval()


def make_trunk(model: Any) -> Trunk:
    return Trunk(model, factor_C=FACTOR, offset_C=OFFSET, image_size=(EDGE, EDGE))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.float() * FACTOR + OFFSET).permute(0, 3, 1, 2)


def features(model: Any, values: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        if isinstance(model, CLIPVisionModel):
            return model(pixel_values=values).pooler_output.float()
        return model.vit(values).last_hidden_state[:, 0].float()


def relative_error(exact: torch.Tensor, features: torch.Tensor) -> float:
    """Return the root mean square error, relative to the exact features'."""
    return float((features - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


def random_pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, EDGE, EDGE, 3), dtype=torch.uint8, generator=generator)


@needs_bf16
@pytest.mark.parametrize("num_images", [1, 3, 33])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("vit", {}),
        ("vit", {"qkv_bias": False}),
        ("vit", {"hidden_act": "gelu_pytorch_tanh", "num_hidden_layers": 1}),
        ("vit", {"hidden_act": "relu"}),
        ("clip", {}),
        ("clip", {"hidden_act": "gelu"}),
        ("clip", {"hidden_act": "silu"}),
    ],
)
def test_features_are_as_near_to_fp32_as_transformers_bf16(kind: str, config: dict[str, Any], num_images: int) -> None:
    model, pixels = vision_model(kind, **config), random_pixels(66)
    exact = features(model, normalised(pixels))
    theirs = features(copy.deepcopy(model).bfloat16(), normalised(pixels).bfloat16())
    encoder = make_trunk(model)
    ours = torch.cat([encoder(batch) for batch in pixels.split(num_images)])
    assert ours.dtype == torch.float32 and ours.shape == exact.shape
    error, usual = relative_error(exact, ours), relative_error(exact, theirs)
    assert 0 < error < 1.25 * usual < 0.1


@needs_bf16
def test_different_activations_give_different_features() -> None:
    """Show that the cases above distinguish the activations."""
    pixels, by_name = random_pixels(4), {}
    for name in trunk._ACTIVATIONS:
        by_name[name] = make_trunk(vision_model("vit", hidden_act=name))(pixels)
    different = [by_name[name] for name in ("gelu", "relu", "silu", "quick_gelu")]
    for index, one in enumerate(different):
        assert all(not torch.allclose(one, other, atol=0.05) for other in different[:index])
    assert torch.equal(by_name["gelu_new"], by_name["gelu_pytorch_tanh"])


@needs_bf16
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_normalised_pixels_give_the_same_bits(kind: str) -> None:
    encoder, pixels = make_trunk(vision_model(kind)), random_pixels(5)
    assert torch.equal(encoder(normalised(pixels)), encoder(pixels))


@needs_bf16
@pytest.mark.parametrize("num_images", [2, 16, 70])
def test_an_image_depends_neither_on_the_others_nor_on_threads(num_images: int) -> None:
    encoder, pixels = make_trunk(vision_model("vit")), random_pixels(num_images)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = encoder(pixels)
        others = random_pixels(num_images, seed=1)
        others[1] = pixels[1]
        assert torch.equal(encoder(others)[1], expected[1])
        torch.set_num_threads(2)
        assert torch.equal(encoder(pixels), expected)
    finally:
        torch.set_num_threads(usual)


@needs_bf16
@pytest.mark.parametrize("num_images", [8, 9, 25])
def test_several_steps_give_the_same_features(num_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, pixels = make_trunk(vision_model("vit")), random_pixels(num_images)
    whole = encoder(pixels)
    monkeypatch.setattr(trunk, "_MOST_TOKENS", 4 * 17)
    assert torch.equal(encoder(pixels), whole)


@needs_bf16
def test_a_nan_affects_only_its_image() -> None:
    encoder, values = make_trunk(vision_model("clip")), normalised(random_pixels(3)).contiguous()
    clean = encoder(values)
    values[1, 0, 9, 9] = torch.nan
    damaged = encoder(values)
    assert damaged[1].isnan().all()
    assert torch.equal(damaged[[0, 2]], clean[[0, 2]])


def test_other_models_are_unsuitable() -> None:
    same = {**small.VISION, "num_labels": 3}
    for model in (DeiTForImageClassification(DeiTConfig(**same)), BeitForImageClassification(BeitConfig(**same))):
        with pytest.raises(Unsuitable, match=type(model).__name__):
            make_trunk(model)


@pytest.mark.parametrize("case", ["size", "attribute", "activation", "bias", "channels"])
def test_a_model_of_another_layout_is_unsuitable(case: str) -> None:
    model = vision_model("vit", **({"num_channels": 1} if case == "channels" else {}))
    if case == "attribute":
        del model.vit.layers[-1].attention.o_proj
    if case == "activation":
        model.vit.config.hidden_act = "mish"
    if case == "bias":
        model.vit.layers[0].attention.k_proj.bias = None
    size = EDGE * 2 if case == "size" else EDGE
    with pytest.raises(Unsuitable):
        Trunk(model, factor_C=FACTOR, offset_C=OFFSET, image_size=(size, size))


def load(folder: Path, **options: Any) -> ImageModel:
    checkpoint = find(str(folder))
    is_classifier = checkpoint.kind == "classifier"
    head = HeadSpec(NAMES, match_head(NAMES, NAMES, label_map=BY_POSITION) if is_classifier else None, ["{c}"])
    placement = Placement(**{"precision": "bf16", **options})
    return load_model(checkpoint, name="m", head=head, placement=placement, save_embeddings=True)


@pytest.fixture(params=["vit", "clip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    saved: Path = small.save_vit(tmp_path, NAMES) if request.param == "vit" else small.save_clip(tmp_path)
    return saved


@needs_bf16
def test_a_run_uses_it_on_a_cpu_that_gains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, pixels = {}, random_pixels(66)
    for is_faster in (True, False):
        monkeypatch.setattr(attention, "is_faster_here", lambda is_faster=is_faster: is_faster)
        model = load(folder)
        parts = getattr(model.net, "encoder", None), getattr(model.net, "tower", None)
        assert any(isinstance(part, Trunk) for part in parts) is is_faster
        outputs[is_faster] = model(pixels)
    exact = load(folder, precision="fp32")(pixels)
    for name in ("logits", "embedding"):
        wanted = getattr(exact, name)
        error, usual = (relative_error(wanted, getattr(outputs[is_faster], name)) for is_faster in (True, False))
        assert 0 < error < 1.25 * usual < 0.1
    assert (outputs[True].logits - outputs[False].logits).abs().max() > 0


@needs_bf16
@pytest.mark.parametrize("options", [{"is_compiled": True}, {"precision": "fp32"}])
def test_a_run_uses_transformers_modules_otherwise(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    net = load(folder, **options).net
    assert isinstance(net, ClassifierNet) or isinstance(net.tower, VisionTower)


@needs_bf16
def test_its_gflop_are_those_that_torch_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    ours, counted = load(folder), load(folder, precision="fp32")
    assert ours.net.gflop_per_image is not None and counted.net.gflop_per_image is None
    assert ours.cost() == counted.cost()


@needs_bf16
def test_replicas_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    model = load(small.save_vit(tmp_path, NAMES))
    assert isinstance(model.net, EncoderClassifierNet)
    replica = model.replica()
    assert replica.net is not model.net and replica.net.encoder is model.net.encoder
    assert torch.equal(replica(random_pixels(3)).logits, model(random_pixels(3)).logits)


def test_a_normalizer_without_a_spec_has_one_factor_per_channel() -> None:
    """`image_model.py` passes the first three values of a factor that is stored for a row of pixels."""
    normalizer = PixelNormalizer(None, torch.bfloat16)
    assert normalizer.factor.shape == normalizer.offset.shape == (3,)

"""The trunk of few steps against transformers' own, in fp32 and in bfloat16."""

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
from vitscore.models.heads import ClassifierNet, PixelNormalizer, TrunkClassifierNet, VisionTower
from vitscore.models.image_model import ImageModel
from vitscore.models.load import load_model

EDGE = small.EDGE
NAMES = ("cat", "dog", "owl", "crane")
FACTOR, OFFSET = torch.tensor([0.0171, 0.0175, 0.0174]), torch.tensor([-2.1179, -2.0357, -1.8044])
VISION = {**small.VISION, "hidden_size": 96, "num_hidden_layers": 4, "intermediate_size": 192}

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies bfloat16 matrices with AVX-512 alone"
)


def vision_model(kind: str, **config: Any) -> Any:
    torch.manual_seed(0)
    if kind == "vit":
        model = ViTForImageClassification(ViTConfig(**{**VISION, **config}))
    else:
        model = CLIPVisionModel(CLIPVisionConfig(**{**VISION, "initializer_factor": 3.0, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:  # they begin at zero, and normalisations at one
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


def far_from(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Root mean square error, in parts of the answers'."""
    return float((found - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


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
def test_features_are_no_further_from_fp32_than_transformers_own(
    kind: str, config: dict[str, Any], num_images: int
) -> None:
    model, pixels = vision_model(kind, **config), random_pixels(66)
    exact = features(model, normalised(pixels))
    theirs = features(copy.deepcopy(model).bfloat16(), normalised(pixels).bfloat16())
    made = make_trunk(model)
    found = torch.cat([made(batch) for batch in pixels.split(num_images)])
    assert found.dtype == torch.float32 and found.shape == exact.shape
    error, usual = far_from(exact, found), far_from(exact, theirs)
    assert 0 < error < 1.25 * usual < 0.1


@needs_bf16
def test_an_activation_of_another_name_changes_the_answer() -> None:
    """So that the cases above tell the activations from each other."""
    pixels, found = random_pixels(4), {}
    for name in trunk._ACTIVATIONS:
        found[name] = make_trunk(vision_model("vit", hidden_act=name))(pixels)
    apart = [found["gelu"], found["relu"], found["silu"], found["quick_gelu"]]
    for index, one in enumerate(apart):
        assert all(not torch.allclose(one, other, atol=0.05) for other in apart[:index])
    assert torch.equal(found["gelu_new"], found["gelu_pytorch_tanh"])


@needs_bf16
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_pixels_that_are_normalised_already_give_the_same_bits(kind: str) -> None:
    made, pixels = make_trunk(vision_model(kind)), random_pixels(5)
    assert torch.equal(made(normalised(pixels)), made(pixels))


@needs_bf16
@pytest.mark.parametrize("num_images", [2, 16, 70])
def test_an_image_does_not_depend_on_the_others_nor_on_threads(num_images: int) -> None:
    made, pixels = make_trunk(vision_model("vit")), random_pixels(num_images)
    usual = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = made(pixels)
        others = random_pixels(num_images, seed=1)
        others[1] = pixels[1]
        assert torch.equal(made(others)[1], alone[1])
        torch.set_num_threads(2)
        assert torch.equal(made(pixels), alone)
    finally:
        torch.set_num_threads(usual)


@needs_bf16
@pytest.mark.parametrize("num_images", [8, 9, 25])
def test_steps_give_the_same_answers(num_images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made, pixels = make_trunk(vision_model("vit")), random_pixels(num_images)
    whole = made(pixels)
    monkeypatch.setattr(trunk, "_MOST_TOKENS", 4 * 17)
    assert torch.equal(made(pixels), whole)


@needs_bf16
def test_a_nan_stays_with_its_image() -> None:
    made, values = make_trunk(vision_model("clip")), normalised(random_pixels(3)).contiguous()
    clean = made(values)
    values[1, 0, 9, 9] = torch.nan
    found = made(values)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_other_models_are_not_for_it() -> None:
    same = {**small.VISION, "num_labels": 3}
    for model in (DeiTForImageClassification(DeiTConfig(**same)), BeitForImageClassification(BeitConfig(**same))):
        with pytest.raises(Unsuitable, match=type(model).__name__):
            make_trunk(model)


@pytest.mark.parametrize("case", ["size", "attribute", "activation", "bias", "channels"])
def test_a_model_laid_out_otherwise_is_not_for_it(case: str) -> None:
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
    settings = {"precision": "bf16", "compile": False, "batch_size": 4, "templates": ["{c}"], "save_embeddings": True}
    head_map = match_head(NAMES, NAMES, label_map=BY_POSITION) if is_classifier else None
    return load_model(checkpoint, name="m", classes=NAMES, head_map=head_map, device="cpu", **{**settings, **options})


@pytest.fixture(params=["vit", "clip"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    saved: Path = small.save_vit(tmp_path, NAMES) if request.param == "vit" else small.save_clip(tmp_path)
    return saved


@needs_bf16
def test_a_run_takes_it_where_the_cpu_gains(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, pixels = {}, random_pixels(66)
    for is_faster in (True, False):
        monkeypatch.setattr(attention, "is_faster_here", lambda is_faster=is_faster: is_faster)
        model = load(folder)
        parts = getattr(model.net, "trunk", None), getattr(model.net, "tower", None)
        assert any(isinstance(part, Trunk) for part in parts) is is_faster
        found[is_faster] = model(pixels)
    exact = load(folder, precision="fp32")(pixels)
    for name in ("logits", "embedding"):
        wanted = getattr(exact, name)
        error, usual = (far_from(wanted, getattr(found[is_faster], name)) for is_faster in (True, False))
        assert 0 < error < 1.25 * usual < 0.1
    assert (found[True].logits - found[False].logits).abs().max() > 0


@needs_bf16
@pytest.mark.parametrize("options", [{"compile": True, "batch_size": None}, {"precision": "fp32"}])
def test_a_run_takes_transformers_modules_otherwise(
    folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    net = load(folder, **options).net
    assert isinstance(net, ClassifierNet) or isinstance(net.tower, VisionTower)


@needs_bf16
def test_its_work_is_what_torch_counts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    ours, counted = load(folder), load(folder, precision="fp32")
    assert ours.net.gflop_per_image is not None and counted.net.gflop_per_image is None
    assert ours.cost() == counted.cost()


@needs_bf16
def test_replicas_share_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    model = load(small.save_vit(tmp_path, NAMES))
    assert isinstance(model.net, TrunkClassifierNet)
    replica = model.replica()
    assert replica.net is not model.net and replica.net.trunk is model.net.trunk
    assert torch.equal(replica(random_pixels(3)).logits, model(random_pixels(3)).logits)


def test_the_first_step_is_the_normalisers() -> None:
    """`models.py` hands on the first channels of a factor that is kept for a row of pixels."""
    normalizer = PixelNormalizer(None, torch.bfloat16)
    assert normalizer.factor.shape == normalizer.offset.shape == (3,)

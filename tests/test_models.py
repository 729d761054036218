"""Compare loaded models with transformers' pipelines; check fp32 heads and rows that do not depend on each other."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    CLIPModel,
    EfficientNetImageProcessor,
    ViTImageProcessor,
    pipeline,
)
from transformers.image_processing_backends import TorchvisionBackend
from transformers.utils import logging

from support import smallmodels as small
from vitscore.classes import matching as classes
from vitscore.errors import SetupError
from vitscore.models import checkpoint as checkpoints
from vitscore.models.heads import ClassMatching, head_layers, linear_rows
from vitscore.models.image_model import ImageModel, Placement
from vitscore.models.load import HeadSpec, load_model
from vitscore.preprocess import ProcessorGeometry

NAMES = ("tench, Tinca tinca", "goldfish", "great white", "tiger shark", "hammerhead", "ray", "stingray")
SHOWN = tuple(name.split(",")[0] for name in NAMES)
ANIMALS = ("cat", "dog", "crane", "owl", "crane")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = small.save_vit(tmp_path_factory.mktemp("vit") / "vit", NAMES)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = small.save_clip(tmp_path_factory.mktemp("clip") / "clip")
    return folder


def load(folder: Path, names: tuple[str, ...] = SHOWN, *, label_map: Any = None, **options: Any) -> ImageModel:
    checkpoint = checkpoints.find(str(folder))
    shown = classes.unique_names(names)
    head_map = None
    if checkpoint.kind == "classifier":
        head_map = classes.match_head(
            checkpoint.id2label, shown, label_map=label_map, num_outputs=checkpoint.num_labels, model="m"
        )
    placement = Placement(precision=options.pop("precision", "fp32"), is_compiled=options.pop("is_compiled", False))
    return load_model(checkpoint, name="m", head=HeadSpec(shown, head_map), placement=placement, **options)


def random_pixels(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((num_images, 3, 4, 4), generator=generator)
    fine = torch.nn.functional.interpolate(coarse, size=small.EDGE, mode="bicubic").clamp(0, 1)
    return (fine * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def as_images(pixels: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(image) for image in pixels.numpy()]


def by_label(answers: list[list[dict[str, Any]]], names: tuple[str, ...]) -> torch.Tensor:
    scores_by_label = [{answer["label"]: answer["score"] for answer in image} for image in answers]
    return torch.tensor([[scores[name] for name in names] for scores in scores_by_label])


def same_decisions(logits: torch.Tensor, probabilities: torch.Tensor) -> bool:
    """Return whether top-1 is equal for all rows whose two best probabilities differ by more than 1e-3."""
    best = probabilities.topk(2).values
    clear = best[:, 0] - best[:, 1] > 1e-3
    assert clear.sum() > len(clear) // 2
    return torch.equal(logits.argmax(1)[clear], probabilities.argmax(1)[clear])


def test_a_classifier_gives_the_pipelines_probabilities(vit: Path) -> None:
    pixels = random_pixels(16)
    answers = pipeline("image-classification", model=str(vit), device="cpu")(as_images(pixels), top_k=len(NAMES))
    expected = by_label(answers, NAMES)
    logits = load(vit)(pixels).logits
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-5, rtol=0)
    assert same_decisions(logits, expected)


def test_a_zero_shot_model_gives_the_pipelines_probabilities(clip: Path) -> None:
    pixels = random_pixels(16)
    names = ("cat", "big dog", "crane", "owl")
    oracle = pipeline("zero-shot-image-classification", model=str(clip), device="cpu")
    expected = by_label(oracle(as_images(pixels), candidate_labels=list(names)), names)
    logits = load(clip, names)(pixels).logits
    torch.testing.assert_close(logits.softmax(1), expected, atol=1e-4, rtol=0)
    assert same_decisions(logits, expected)


@torch.inference_mode()
def test_zero_shot_logits_are_scale_times_cosine(clip: Path) -> None:
    pixels = random_pixels(8)
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = small.make_tokenizer()(
        [f"This is a photo of {name}." for name in ANIMALS], padding=True, return_tensors="pt"
    )
    values = (pixels.permute(0, 3, 1, 2) / 255 - _column(0.48145466, 0.4578275, 0.40821073)) / _column(
        0.26862954, 0.26130258, 0.27577711
    )
    expected = model(pixel_values=values, **tokens)
    output = load(clip, ANIMALS, save_embeddings=True)(pixels)
    torch.testing.assert_close(output.logits, expected.logits_per_image, atol=1e-4, rtol=0)
    torch.testing.assert_close(output.embedding, expected.image_embeds, atol=1e-5, rtol=0)


def _column(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)


def test_repeated_class_names_are_captioned_without_their_id(clip: Path) -> None:
    logits = load(clip, ANIMALS)(random_pixels(4)).logits
    torch.testing.assert_close(logits[:, 2], logits[:, 4], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_the_embedding_is_the_heads_input(vit: Path) -> None:
    pixels = random_pixels(4)
    model = AutoModelForImageClassification.from_pretrained(vit).eval()
    expected = model.vit(pixel_values=(pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).last_hidden_state[:, 0]
    loaded = load(vit, save_embeddings=True)
    embedding = loaded(pixels).embedding
    assert embedding is not None and embedding.shape == (4, loaded.embedding_dim)
    torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=0)
    assert load(vit)(pixels).embedding is None


def test_logits_come_in_the_data_sets_order(vit: Path) -> None:
    pixels = random_pixels(4)
    whole = load(vit)(pixels).logits
    narrowed = load(vit, ("ray", "Tinca tinca"))(pixels).logits
    assert torch.equal(narrowed, whole[:, [5, 0]])
    assert narrowed.is_contiguous()


def test_several_head_classes_are_joined_by_logsumexp(vit: Path) -> None:
    pixels = random_pixels(4)
    whole = load(vit)(pixels).logits.double().numpy()
    label_map = {"great white": "shark", "tiger shark": "shark", "hammerhead": "shark"}
    logits = load(vit, ("goldfish", "shark"), label_map=label_map)(pixels).logits
    shark = np.logaddexp.reduce(whole[:, 2:5], axis=1)
    np.testing.assert_allclose(logits.numpy(), np.stack([whole[:, 1], shark], axis=1), atol=1e-5)


def test_joining_survives_infinite_logits() -> None:
    matching = ClassMatching([[0, 1], [2]], 3)
    assert matching(torch.tensor([[-torch.inf, 1.0, 2.0]])).tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_half_precision_model_keeps_its_head_in_fp32(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    names = SHOWN if kind == "vit" else ANIMALS
    pixels = random_pixels(16)
    exact, half = load(folder, names), load(folder, names, precision="bf16")
    logits = half(pixels).logits
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())  # more digits than bf16 has
    torch.testing.assert_close(logits, exact(pixels).logits, atol=0.5, rtol=0.1)
    assert torch.equal(half.rerun_fp32(pixels).logits, exact(pixels).logits)
    assert torch.equal(exact.rerun_fp32(pixels).logits, exact(pixels).logits)


def test_rows_that_overflow_in_fp16_are_finite_again_in_fp32(tmp_path: Path) -> None:
    folder = small.save_vit(tmp_path / "vit", NAMES)
    weights = load_file(folder / "model.safetensors")
    weights["vit.embeddings.patch_embeddings.projection.bias"] += 1e5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder, precision="fp16")
    pixels = random_pixels(2)
    assert not torch.isfinite(model(pixels).logits).any()
    assert torch.isfinite(model.rerun_fp32(pixels).logits).all()


@pytest.mark.parametrize("num_images", [1, 2, 7, 16])
@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_row_does_not_depend_on_place_neighbours_or_threads(
    kind: str, num_images: int, request: pytest.FixtureRequest
) -> None:
    model = load(request.getfixturevalue(kind), SHOWN if kind == "vit" else ANIMALS)
    pixels = random_pixels(num_images)
    expected = model(pixels).logits
    order = torch.randperm(num_images, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            assert torch.equal(model(pixels).logits, expected)
            assert torch.equal(model(pixels[order]).logits, expected[order])
            padded = pixels.clone()
            padded[num_images // 2 + 1 :] = 0
            assert torch.equal(model(padded).logits[: num_images // 2 + 1], expected[: num_images // 2 + 1])
    finally:
        torch.set_num_threads(threads)


def test_padding_rows_are_not_returned() -> None:
    features, weight, bias = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    expected = torch.nn.functional.linear(features, weight, bias)
    torch.testing.assert_close(linear_rows(features, weight, bias), expected, atol=1e-5, rtol=0)


def test_a_head_that_was_never_trained_is_refused(tmp_path: Path) -> None:
    folder = small.save_vit(tmp_path / "vit", NAMES)
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if not key.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SetupError, match=r"classifier\.bias, classifier\.weight"):
        load(folder)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    folder = small.save_vit(tmp_path / "vit", NAMES)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "ray", "1": "goldfish"}
    config["label2id"] = {"ray": 0, "goldfish": 1}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SetupError, match=r"classifier\.weight"):
        load(folder, ("ray", "goldfish"))


@pytest.mark.parametrize(
    ("name", "part"), [("model.safetensors", "weights"), ("preprocessor_config.json", "image processor")]
)
def test_damaged_files_are_named_in_one_line(tmp_path: Path, name: str, part: str) -> None:
    folder = small.save_vit(tmp_path / "vit", NAMES)
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    with pytest.raises(SetupError, match=part) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = small.save_vit(tmp_path / "vit", NAMES)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForImageClassification": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(SetupError):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_loading_prints_nothing(vit: Path, clip: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(vit)
    load(clip, ANIMALS)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_an_encoder_layer_as_wide_as_the_head_is_not_a_head(tmp_path: Path) -> None:
    names = tuple(f"class {index}" for index in range(small.VISION["hidden_size"]))
    model = AutoModelForImageClassification.from_pretrained(small.save_vit(tmp_path / "vit", names))
    assert head_layers(model) == ["classifier"]


def test_a_model_knows_its_sizes(vit: Path, clip: Path) -> None:
    classifier, zero_shot = load(vit), load(clip, ANIMALS)
    assert classifier.num_params == AutoModelForImageClassification.from_pretrained(vit).num_parameters()
    assert (classifier.num_classes, classifier.embedding_dim, classifier.kind) == (7, 48, "classifier")
    assert zero_shot.num_params == CLIPModel.from_pretrained(clip).num_parameters()
    assert (zero_shot.num_classes, zero_shot.embedding_dim, zero_shot.kind) == (5, 24, "zero-shot")
    assert (classifier.geometry.height, classifier.geometry.width) == (32, 32)


def test_a_processor_without_a_spec_is_run_as_it_is(tmp_path: Path) -> None:
    size = {"height": small.EDGE, "width": small.EDGE}
    folder = small.save_vit(tmp_path / "vit", NAMES, processor=EfficientNetImageProcessor(size=size))
    model = load(folder)
    assert isinstance(model.spec, ProcessorGeometry)
    assert "EfficientNetImageProcessor" in model.notes[0]
    images = as_images(random_pixels(4))
    values = model.spec.processor(images=images, return_tensors="pt")["pixel_values"]
    answers = pipeline("image-classification", model=str(folder), device="cpu")(images, top_k=len(NAMES))
    torch.testing.assert_close(model(values).logits.softmax(1), by_label(answers, NAMES), atol=1e-5, rtol=0)


def test_lanczos_that_a_processor_replaces_is_noted_and_transformers_warns_of_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def by_bicubic(backend: Any, image: Any, size: Any, resample: Any = None, **others: Any) -> Any:
        logging.get_logger("transformers").warning("by bicubic")
        return resize(backend, image, size, 3, **others)

    resize = TorchvisionBackend.resize
    processor = ViTImageProcessor(size={"height": small.EDGE, "width": small.EDGE}, resample=1)
    folder = small.save_vit(tmp_path / "vit", NAMES, processor=processor)
    monkeypatch.setattr(TorchvisionBackend, "resize", by_bicubic)
    capfd.readouterr()
    assert "bicubic instead of lanczos" in load(folder).notes[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_model_is_one_graph_for_the_compiler(kind: str, request: pytest.FixtureRequest) -> None:
    model = load(
        request.getfixturevalue(kind),
        SHOWN if kind == "vit" else ANIMALS,
        precision="bf16",
        is_compiled=True,
    )
    pixels = random_pixels(4)
    # The graph is captured but run as it is: generating code for a CPU takes a minute.
    captured = torch.compile(model.net, backend="eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for output, expected in zip(captured(pixels), model.net(pixels), strict=True):
            torch.testing.assert_close(output, expected)


def test_text_weights_are_kept_between_loads(tmp_path: Path) -> None:
    folder, cache = small.save_clip(tmp_path / "clip"), tmp_path / "cache"
    first = load(folder, ANIMALS, cache_dir=cache, fingerprint="f")
    (folder / "tokenizer.json").unlink()
    second = load(folder, ANIMALS, cache_dir=cache, fingerprint="f")
    pixels = random_pixels(4)
    assert torch.equal(first(pixels).logits, second(pixels).logits)


@pytest.mark.parametrize("kind", ["vit", "clip"])
def test_a_replica_answers_the_same_from_another_thread(kind: str, request: pytest.FixtureRequest) -> None:
    model = load(request.getfixturevalue(kind), SHOWN if kind == "vit" else ANIMALS, save_embeddings=True)
    replica = model.replica()
    batches = [random_pixels(4, seed) for seed in range(20)]
    expected = [model(batch) for batch in batches]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(lambda one: [one(batch) for batch in batches], one) for one in (model, replica)]
    for run in runs:
        for output, wanted in zip(run.result(), expected, strict=True):
            assert torch.equal(output.logits, wanted.logits)
            assert output.embedding is not None and wanted.embedding is not None
            assert torch.equal(output.embedding, wanted.embedding)
    shared = {parameter.data_ptr() for parameter in model.net.parameters()}
    assert {parameter.data_ptr() for parameter in replica.net.parameters()} == shared


def test_gflop_are_those_of_the_layers(vit: Path, clip: Path) -> None:
    """Count matrix products by hand: patches; per layer four projections, two products of the MLP, attention; head."""

    def by_hand(config: Any, outputs: int) -> int:
        patches = (config.image_size // config.patch_size) ** 2
        tokens, width, inner = patches + 1, config.hidden_size, config.intermediate_size
        layer = 4 * tokens * width**2 + 2 * tokens * width * inner + 2 * tokens**2 * width
        patch = patches * width * 3 * config.patch_size**2
        return 2 * (patch + config.num_hidden_layers * layer + outputs)

    classifier, zero_shot = load(vit), load(clip)
    config = AutoModelForImageClassification.from_pretrained(vit).config
    assert classifier.cost()["gflop_per_image"] == pytest.approx(
        by_hand(config, config.hidden_size * len(config.id2label)) / 1e9, abs=1e-6
    )
    config = CLIPModel.from_pretrained(clip).config
    outputs = config.projection_dim * (config.vision_config.hidden_size + zero_shot.num_classes)
    wanted = by_hand(config.vision_config, outputs) / 1e9
    assert zero_shot.cost()["gflop_per_image"] == pytest.approx(wanted, abs=1e-6)
    assert zero_shot.cost()["parameters"] == zero_shot.num_params

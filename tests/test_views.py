"""Compare the mean of logits over an image and its mirror image with transformers."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers import AutoImageProcessor, AutoModelForImageClassification, EfficientNetImageProcessor

from support import smallmodels as small
from vitscore import load_run
from vitscore.models.image_model import ModelOutput
from vitscore.models.test_time_views import over_views

Call = Callable[..., Any]
NAMES = ("cat", "dog", "owl", "crane")


def tiles(count: int) -> list[Image.Image]:
    """Return different crops of a photograph."""
    whole = Image.fromarray(load_sample_images().images[0])
    return [whole.crop((20 * number, 5 * number, 20 * number + 100, 5 * number + 80)) for number in range(count)]


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_logits_are_transformers_mean_over_flipped_pixels(make_shards: Call, vitscore: Call, tmp_path: Path) -> None:
    images = tiles(10)
    checkpoint = small.save_vit(tmp_path / "vit", NAMES)
    shards = make_shards(
        [(f"{n}", {"png": encode(image), "cls": b"1"}) for n, image in enumerate(images)], classes=NAMES
    )
    command = ("run", shards, "-m", checkpoint, "--save", "logits,embeddings", "--precision", "fp32", "-b", 4)
    plain, out = tmp_path / "plain", tmp_path / "flipped"
    assert vitscore(*command, "-o", plain).code == 0
    done = vitscore(*command, "-o", out, "--tta", "hflip")
    assert done.code == 0
    assert "2 forwards per image" in done.out
    processor, model = (
        AutoImageProcessor.from_pretrained(checkpoint),
        AutoModelForImageClassification.from_pretrained(checkpoint),
    )
    pixels = processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = (model.eval()(pixels).logits + model(pixels.flip(3)).logits) / 2
    rows, before = load_run(out).predictions(), load_run(plain).predictions()
    logits = np.array(rows["vit.logits"].to_pylist())
    assert np.abs(logits - expected.numpy()).max() < 2e-3
    assert np.abs(logits - np.array(before["vit.logits"].to_pylist())).max() > 0.01
    assert rows["vit.embedding"] == before["vit.embedding"]


def test_a_processor_without_a_spec_takes_views_and_refuses_operators(
    make_shards: Call, vitscore: Call, tmp_path: Path
) -> None:
    size = {"height": small.EDGE, "width": small.EDGE}
    checkpoint = small.save_vit(tmp_path / "vit", NAMES, processor=EfficientNetImageProcessor(size=size))
    shards = make_shards([("a", {"png": encode(tiles(1)[0]), "cls": b"1"})], classes=NAMES)
    command = ("run", shards, "-m", checkpoint, "-o", tmp_path / "out")
    done = vitscore(*command, "--augment", "contrast:severity=1")
    assert done.code == 2 and "vit - expected a processor that resizes" in done.err
    assert not (tmp_path / "out").exists()
    assert vitscore(*command, "--tta", "hflip").code == 0


def test_views_are_part_of_the_runs_identity(vitscore: Call, tmp_path: Path) -> None:
    command = ("run", "demo", "-m", "demo-vit", "--limit", 10, "-o", tmp_path / "out")
    assert vitscore(*command, "--tta", "hflip").code == 0
    done = vitscore(*command)
    assert done.code == 2 and "tta: hflip there, none here" in done.err
    done = vitscore(*command, "--tta", "tencrop")
    assert done.code == 2 and "expected none or hflip" in done.err


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (2, 3, 4, 6)])
def test_bytes_and_finished_floats_are_flipped_alike(shape: tuple[int, ...]) -> None:
    pixels = torch.arange(int(np.prod(shape))).reshape(shape)
    pixels = pixels.to(torch.uint8) if shape[3] == 3 else pixels.float()
    seen: list[torch.Tensor] = []

    def model(view: torch.Tensor) -> ModelOutput:
        seen.append(view)
        return ModelOutput(torch.full((2, 5), float(len(seen))), None)

    assert (over_views(model, pixels, "hflip").logits == 1.5).all()
    axis = 2 if shape[3] == 3 else 3
    assert (seen[1] == pixels.flip(axis)).all() and (seen[0] == pixels).all()

"""Check that a last layer computed for the class token gives the same outputs as the whole layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BeitConfig, BeitForImageClassification, DeiTConfig, DeiTForImageClassification

from support import smallmodels as small
from vitscore.models.checkpoint import find
from vitscore.models.class_token_layer import FirstTokenLayer, shorten
from vitscore.models.loading import load_weights


def vision_model(kind: str, folder: Path) -> Any:
    if kind == "vit":
        return load_weights(find(str(small.save_vit(folder, ("cat", "dog", "cow")))))
    if kind == "clip":
        return load_weights(find(str(small.save_clip(folder)))).vision_model
    torch.manual_seed(0)
    return DeiTForImageClassification(DeiTConfig(**small.VISION, num_labels=3)).eval()


def outputs(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = model(pixel_values=pixels)
    answer: torch.Tensor = output.logits if "logits" in output else output.pooler_output
    return answer


@pytest.mark.parametrize("num_images", [1, 3, 16, 70])
@pytest.mark.parametrize("kind", ["vit", "deit", "clip"])
def test_the_outputs_stay_the_same(kind: str, num_images: int, tmp_path: Path) -> None:
    model = vision_model(kind, tmp_path)
    pixels = torch.rand(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    whole = outputs(model, pixels)
    shorten(model)
    shortened = [module for module in model.modules() if isinstance(module, FirstTokenLayer)]
    assert len(shortened) == 1
    torch.testing.assert_close(outputs(model, pixels), whole, atol=1e-5, rtol=1e-5)
    shortened[0].is_whole = True
    assert torch.equal(outputs(model, pixels), whole)


def test_most_tokens_are_not_computed(tmp_path: Path) -> None:
    model = vision_model("vit", tmp_path)
    shorten(model)
    (layer,) = (module for module in model.modules() if isinstance(module, FirstTokenLayer))
    assert layer(torch.rand(16, 17, 48)).shape == (16, 4, 48)


def test_other_models_stay_as_they_are() -> None:
    model = BeitForImageClassification(BeitConfig(**small.VISION, num_labels=3))
    shorten(model)
    assert not any(isinstance(module, FirstTokenLayer) for module in model.modules())


def test_a_layer_of_another_layout_stays_as_it_is(tmp_path: Path) -> None:
    model = vision_model("vit", tmp_path)
    del model.vit.layers[-1].attention.head_dim
    shorten(model)
    assert not any(isinstance(module, FirstTokenLayer) for module in model.modules())

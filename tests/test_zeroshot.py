"""Compare text weights with OpenAI's recipe: normalise every caption, average over the templates, normalise again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from support import smallmodels as small
from vitscore.errors import SetupError, UsageError
from vitscore.models import zeroshot

CLASSES = ("cat", "big dog", "crane, bird", "owl")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPModel, Any]:
    folder = small.save_clip(tmp_path_factory.mktemp("clip") / "clip")
    return CLIPModel.from_pretrained(folder).eval(), small.make_tokenizer()


@torch.inference_mode()
def openai_weights(
    model: CLIPModel, tokenizer: Any, classes: tuple[str, ...], templates: tuple[str, ...]
) -> torch.Tensor:
    """Return the reference weights, computed class by class in the order of OpenAI's zero-shot notebook."""
    weights = []
    for name in classes:
        texts = [template.replace("{}", name) for template in templates]
        embeddings = model.get_text_features(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
        embeddings /= embeddings.norm(dim=-1, keepdim=True)
        mean = embeddings.mean(dim=0)
        weights.append(mean / mean.norm())
    return torch.stack(weights)


@pytest.mark.parametrize(
    "templates", [zeroshot.DEFAULT_TEMPLATES, ("a photo of a {}.", "a bad photo of the big {}.", "a drawing of {}.")]
)
def test_weights_are_those_of_openais_recipe(clip: tuple[CLIPModel, Any], templates: tuple[str, ...]) -> None:
    weights = zeroshot.text_weights(*clip, CLASSES, templates, "cpu")
    torch.testing.assert_close(weights, openai_weights(*clip, CLASSES, templates), atol=1e-6, rtol=0)
    assert weights.dtype == torch.float32


def test_the_eighty_templates_of_openai_are_read_and_averaged(clip: tuple[CLIPModel, Any], tmp_path: Path) -> None:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    file = tmp_path / "templates.txt"
    file.write_text("\n".join(template("{c}") for template in OPENAI_IMAGENET_TEMPLATES) + "\n")
    templates = zeroshot.read_templates(file)
    assert len(templates) == 80
    expected = openai_weights(*clip, CLASSES, tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES))
    torch.testing.assert_close(zeroshot.text_weights(*clip, CLASSES, templates, "cpu"), expected, atol=1e-6, rtol=0)


def test_a_class_does_not_depend_on_the_others(clip: tuple[CLIPModel, Any]) -> None:
    templates = ("a photo of a {}.", "a drawing of the big {}")
    many = tuple(f"{size} {name}" for size in ("big", "small", "bad") for name in CLASSES) * 12
    whole = zeroshot.text_weights(*clip, many, templates, "cpu")
    alone = zeroshot.text_weights(*clip, many[5:6], templates, "cpu")
    torch.testing.assert_close(whole[5:6], alone, atol=1e-6, rtol=0)


def test_long_text_is_cut_and_keeps_its_end_token(clip: tuple[CLIPModel, Any]) -> None:
    tokenizer = clip[1]
    assert tokenizer.model_max_length > 1e29
    ids = zeroshot.tokenize(tokenizer, "cat " * 100, length=16)
    assert len(ids) == 16
    assert ids[-1] == tokenizer.eos_token_id
    weights = zeroshot.text_weights(*clip, ("cat " * 100, "dog"), ("{}",), "cpu")
    assert torch.isfinite(weights).all()


def test_a_tokenizer_without_end_token_is_refused(clip: tuple[CLIPModel, Any]) -> None:
    tokenizer = small.make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = small.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(SetupError, match="end token"):
        zeroshot.text_weights(clip[0], tokenizer, CLASSES, ("{}",), "cpu")


def test_a_tokenizer_with_another_end_token_is_refused(clip: tuple[CLIPModel, Any]) -> None:
    tokenizer = small.make_tokenizer()
    tokenizer.eos_token = "<s>"
    with pytest.raises(SetupError, match="do not match"):
        zeroshot.text_weights(clip[0], tokenizer, CLASSES, ("{}",), "cpu")


def test_braces_in_class_names_are_kept() -> None:
    assert zeroshot.caption("a {c} here", "{c} {0}") == "a {c} {0} here"
    assert zeroshot.caption("a {} and {}", "b") == "a b and b"


@pytest.mark.parametrize("text", ["a photo\n", "a {}\nno place\n", "", "\n\n"])
def test_a_template_without_a_placeholder_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "templates.txt").write_text(text)
    with pytest.raises(UsageError, match="template"):
        zeroshot.read_templates(tmp_path / "templates.txt")


def test_cached_weights_are_the_same_bits(tmp_path: Path) -> None:
    weights = torch.nn.functional.normalize(torch.randn(4, 24), dim=-1)
    key = zeroshot.cache_key("f", CLASSES, ("{}",), "cpu")
    assert zeroshot.load_cached(tmp_path, key, num_classes=4) is None
    zeroshot.store(tmp_path / "new", key, weights)
    cached = zeroshot.load_cached(tmp_path / "new", key, num_classes=4)
    assert cached is not None and torch.equal(cached, weights)
    assert len(list((tmp_path / "new").iterdir())) == 1


@pytest.mark.parametrize("num_bytes", [0, 7, 200])
def test_a_damaged_cache_file_is_ignored(tmp_path: Path, num_bytes: int) -> None:
    zeroshot.store(tmp_path, "key", torch.ones(4, 24))
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert zeroshot.load_cached(tmp_path, "key", num_classes=4) is None


def test_a_cache_that_cannot_be_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    zeroshot.store(tmp_path / "file", "key", torch.ones(4, 24))


def test_the_key_changes_with_everything_that_matters() -> None:
    keys = {
        zeroshot.cache_key("f", ("a", "b"), ("{}",), "cpu"),
        zeroshot.cache_key("g", ("a", "b"), ("{}",), "cpu"),
        zeroshot.cache_key("f", ("b", "a"), ("{}",), "cpu"),
        zeroshot.cache_key("f", ("a", "b"), ("a {}",), "cpu"),
        zeroshot.cache_key("f", ("a", "b"), ("{}",), "cuda:0"),
    }
    assert len(keys) == 5
    assert zeroshot.cache_key("f", ("a",), ("{}",), "cuda:0") == zeroshot.cache_key("f", ("a",), ("{}",), "cuda:1")

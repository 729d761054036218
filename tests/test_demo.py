"""The embedded demo: its shards are correct, and its checkpoints are accurate in transformers' pipelines.

Nothing is trained here. The shards are read with the standard library's tarfile, to be independent of vitscore's
reader.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, AutoTokenizer, CLIPModel, pipeline

import vitscore.demo
from vitscore.demo.captions import make_tokenizer
from vitscore.demo.digits import CLASSES, TEMPLATES, load_split, write_shards

FOLDER = Path(vitscore.demo.__file__).parent
MODELS = ("demo-vit", "demo-clip")
Sample = tuple[str, Image.Image, int]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: for models this small a second thread costs more than it gains, especially on shared cores."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    samples: list[Sample] = []
    for path in sorted((FOLDER / "shards").glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        for name in sorted(name for name in files if name.endswith(".png")):
            key = name.removesuffix(".png")
            samples.append((key, Image.open(io.BytesIO(files[name])), int(files[f"{key}.cls"])))
    return samples


def test_shards_hold_500_distinct_samples(samples: list[Sample]) -> None:
    assert len(list((FOLDER / "shards").glob("demo-*.tar"))) == 4
    assert len({key for key, _, _ in samples}) == 500
    assert len({image.tobytes() for _, image, _ in samples}) == 500


def test_classes_are_balanced(samples: list[Sample]) -> None:
    counts = Counter(label for _, _, label in samples)
    assert set(counts) == set(range(len(CLASSES)))
    assert max(counts.values()) - min(counts.values()) <= 1


def test_shards_are_the_split_of_the_seed(samples: list[Sample]) -> None:
    _, held_out = load_split()
    assert [key for key, _, _ in samples] == [f"digit-{index:04d}" for index in held_out.indices]
    assert [label for _, _, label in samples] == held_out.labels_B.tolist()
    assert np.array_equal(np.stack([np.asarray(image) for _, image, _ in samples]), held_out.images_BHW)


def test_no_sample_was_trained_on(samples: list[Sample]) -> None:
    training, _ = load_split()
    assert len(training) == 1297
    trained = {image_HW.tobytes() for image_HW in training.images_BHW}
    assert not [key for key, image, _ in samples if image.tobytes() in trained]
    assert not {f"digit-{index:04d}" for index in training.indices} & {key for key, _, _ in samples}


def test_side_files_name_classes_and_templates() -> None:
    assert (FOLDER / "shards" / "classes.txt").read_text().splitlines() == list(CLASSES)
    assert (FOLDER / "shards" / "templates.txt").read_text().splitlines() == list(TEMPLATES)


def test_writing_shards_again_gives_the_same_bytes(tmp_path: Path) -> None:
    _, held_out = load_split()
    first, second = (write_shards(held_out, tmp_path / name) for name in ("first", "second"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    with tarfile.open(first[0]) as tar:
        assert {(member.mtime, member.uid, member.uname, member.mode) for member in tar} == {(0, 0, "", 0o644)}


def test_vit_is_good_by_transformers_pipeline(samples: list[Sample]) -> None:
    scorer: Any = pipeline("image-classification", model=str(FOLDER / "demo-vit"), device="cpu")
    answers = scorer([image for _, image, _ in samples], top_k=1, batch_size=50)
    assert share_right(answers, samples) >= 0.97


def test_clip_is_good_by_transformers_pipeline(samples: list[Sample]) -> None:
    scorer: Any = pipeline("zero-shot-image-classification", model=str(FOLDER / "demo-clip"), device="cpu")
    answers = scorer([image for _, image, _ in samples], candidate_labels=list(CLASSES))
    assert share_right(answers, samples) >= 0.97


def test_clip_is_good_by_each_template(samples: list[Sample]) -> None:
    folder = FOLDER / "demo-clip"
    model = CLIPModel.from_pretrained(folder).eval()
    images = [image.convert("RGB") for _, image, _ in samples]
    labels = torch.tensor([label for _, _, label in samples])
    processor = AutoProcessor.from_pretrained(folder)
    for template in TEMPLATES:
        texts = [template.format(c=name) for name in CLASSES]
        with torch.inference_mode():
            inputs = processor(text=texts, images=images, return_tensors="pt", padding=True)
            logits_BK = model(**inputs).logits_per_image
        assert (logits_BK.argmax(dim=1) == labels).float().mean() >= 0.97, template


def share_right(answers: list[list[dict[str, Any]]], samples: list[Sample]) -> float:
    right: list[bool] = [
        answer[0]["label"] == CLASSES[label] for answer, (_, _, label) in zip(answers, samples, strict=True)
    ]
    return sum(right) / len(right)


def test_tokenizer_knows_every_byte_and_cuts_at_the_end_mark() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "demo-clip")
    assert tokenizer.decode(tokenizer("Zürich, 數 7").input_ids, skip_special_tokens=True) == "zürich , 數 7"
    ids = tokenizer("a " * 100, truncation=True).input_ids
    assert len(ids) == 32
    assert ids[-1] == tokenizer.eos_token_id


def test_tokenizer_is_the_one_of_the_captions() -> None:
    shipped = AutoTokenizer.from_pretrained(FOLDER / "demo-clip")
    assert shipped.get_vocab() == make_tokenizer().get_vocab()
    assert shipped("digit seven").input_ids == make_tokenizer()("digit seven").input_ids
    assert json.loads((FOLDER / "demo-clip" / "tokenizer.json").read_text())["padding"] is None


def test_folder_is_small() -> None:
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(sizes) < 5_000_000


@pytest.mark.parametrize("name", MODELS)
def test_checkpoint_is_fp32_and_holds_no_leftovers(name: str) -> None:
    files = {path.name for path in (FOLDER / name).iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"} if name == "demo-clip" else set()
    assert files == {"config.json", "model.safetensors", "preprocessor_config.json"} | tokenizer
    with safe_open(FOLDER / name / "model.safetensors", framework="np") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F32"}


@pytest.mark.parametrize("name", MODELS)
def test_configs_name_no_machine(name: str) -> None:
    for path in (FOLDER / name).glob("*config.json"):
        config = json.loads(path.read_text())
        assert not {"_name_or_path", "name_or_path"} & set(config)
        assert not [value for value in config.values() if isinstance(value, str) and "/" in value]

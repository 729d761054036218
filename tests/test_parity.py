"""Predictions equal those of transformers' pipelines on the same checkpoint and the same images."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from support import pictures
from vitscore import load_run, score
from vitscore.models.checkpoint import find
from vitscore.shards.locate import locate

MARGIN = 1e-3


def upright(content: bytes) -> Image.Image:
    """Open an image as transformers' `load_image` does."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")


def pipeline_probabilities(model: str, images: list[Image.Image], classes: list[str], template: str) -> np.ndarray:
    """Return (B, K) probabilities of transformers' image-classification or zero-shot-image-classification pipeline."""
    from transformers import pipeline

    checkpoint = find(model)
    if checkpoint.kind == "classifier":
        classify = pipeline("image-classification", model=str(checkpoint.path), device="cpu")
        answers = classify(images, batch_size=50, top_k=len(classes))
    else:
        classify = pipeline("zero-shot-image-classification", model=str(checkpoint.path), device="cpu")
        answers = [classify(image, candidate_labels=classes, hypothesis_template=template) for image in images]
    by_name = [{answer["label"]: answer["score"] for answer in scores} for scores in answers]
    return np.array([[scores[name] for name in classes] for scores in by_name])


def stored_probabilities(rows: Any, name: str) -> np.ndarray:
    logits = torch.tensor(rows[f"{name}.logits"].to_pylist(), dtype=torch.float64)
    probabilities: np.ndarray = logits.softmax(-1).numpy()
    return probabilities


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Use one thread: the models are so small that more threads only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_lossless_images_get_the_pipelines_probabilities(decoder: str, tmp_path: Path, digits: Any) -> None:
    if decoder == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is published for Linux alone")
    (tmp_path / "t.txt").write_text("a photo of the number {}.\n")
    run = score(
        "demo",
        ["demo-vit", "demo-clip"],
        tmp_path / "out",
        decoder=decoder,
        save="logits",
        precision="fp32",
        templates=tmp_path / "t.txt",
    )
    rows = run.predictions()
    assert rows["key"].to_pylist() == [key for key, _ in digits]
    images = [upright(members["png"]) for _, members in digits]
    for name in run.models:
        every = 1 if name == "demo-vit" else 5  # the zero-shot pipeline runs its text tower for every image
        expected = pipeline_probabilities(name, images[::every], run.classes, "a photo of the number {}.")
        stored = stored_probabilities(rows, name)[::every]
        assert np.abs(stored - expected).max() < 1e-3
        logits = np.sort(np.array(rows[f"{name}.logits"].to_pylist())[::every])
        is_clear = logits[:, -1] - logits[:, -2] > MARGIN
        assert is_clear.mean() > 0.99
        preds = rows[f"{name}.pred"].to_numpy()[::every]
        assert (preds == expected.argmax(1))[is_clear].all()


def test_every_format_gets_the_pipelines_prediction(make_shards: Callable[..., Path], tmp_path: Path) -> None:
    contents: dict[str, bytes] = pictures.ordinary()
    samples = [(f"{number:02d}", {"jpg": content}) for number, content in enumerate(contents.values())]
    run = score(make_shards(samples), ["demo-vit", "demo-clip"], tmp_path / "out", save="logits", max_bad=0)
    rows = run.predictions()
    images = [upright(content) for content in contents.values()]
    for name in run.models:
        expected = pipeline_probabilities(name, images, run.classes, "This is a photo of {}.")
        stored = stored_probabilities(rows, name)
        gap = np.abs(stored - expected).max(1)
        assert dict(zip(contents, gap.round(3).tolist(), strict=True)) == pytest.approx(
            dict.fromkeys(contents, 0), abs=0.02
        )


def write_cifar_10(folder: Path, num_images: int = 60) -> np.ndarray:
    """Read CIFAR-10's binary format (a label byte, then red, green and blue planes of 32 x 32); return the labels."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    labels = random.integers(0, 10, num_images).astype(np.uint8)
    for batch in ("data_batch_1.bin", "test_batch.bin"):
        planes = random.integers(0, 256, (num_images, 3072), np.uint8)
        (folder / batch).write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())
    return labels


def test_cifar_10_in_its_binary_form_becomes_a_scored_run(tmp_path: Path, vitscore: Callable[..., Any]) -> None:
    labels = write_cifar_10(tmp_path / "cifar-10-batches-bin")
    made = vitscore("shards", "make", tmp_path / "cifar-10-batches-bin", "-o", tmp_path / "shards", "--per-shard", 25)
    assert made.code == 0, made.err
    assert [shard.name.rsplit("/")[-1] for shard in locate([str(tmp_path / "shards")]).shards] == [
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
    ]
    done = vitscore("run", tmp_path / "shards", "-m", "demo-clip", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    run = load_run(tmp_path / "out")
    assert run.classes[:3] == ["airplane", "automobile", "bird"]
    assert run.predictions()["label"].to_pylist() == labels.tolist()
    assert run.metrics.ledger.scored == 60


def test_a_tampered_python_batch_of_cifar_is_refused(tmp_path: Path, vitscore: Callable[..., Any]) -> None:
    """The file is a pickle, which can run any code, so it is opened only if it has the published checksum."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    harm = tmp_path / "harm"
    code = b"cos\nsystem\n(S'touch " + str(harm).encode() + b"'\ntR."
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        (folder / name).write_bytes(code)
    (folder / "batches.meta").write_bytes(code)
    done = vitscore("shards", "make", folder, "-o", tmp_path / "shards")
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert not harm.exists()
    assert not list(tmp_path.glob("shards/*.tar"))

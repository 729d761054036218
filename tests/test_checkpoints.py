"""Find, read and fingerprint checkpoints without loading weights; refuse bad ones in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from vitscore.errors import SetupError, UsageError
from vitscore.models import checkpoint as checkpoints


def make_checkpoint(folder: Path, config: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True)
    config = config or {"architectures": ["ViTForImageClassification"], "id2label": {"0": "cat", "1": "dog"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 16}}))
    save_file({"weight": np.zeros(3, np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo-vit", ("demo-vit", "demo-vit")),
        ("google/vit-base-patch16-224", ("vit-base-patch16-224", "google/vit-base-patch16-224")),
        ("best=./runs/a=b", ("best", "./runs/a=b")),
        ("./runs/vit.v2/", ("vit.v2", "./runs/vit.v2/")),
    ],
)
def test_a_model_is_named_by_its_last_path_part(text: str, expected: tuple[str, str]) -> None:
    assert checkpoints.parse_model(text) == expected


@pytest.mark.parametrize("text", ["", "a=", "./two words", "/"])
def test_a_model_without_a_usable_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        checkpoints.parse_model(text)


def test_two_models_with_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match=r"-m NAME=two/vit"):
        checkpoints.parse_models(["one/vit", "two/vit"])
    assert list(checkpoints.parse_models(["one/vit", "other=two/vit"])) == ["vit", "other"]


def test_a_local_classifier_is_read(tmp_path: Path) -> None:
    checkpoint = checkpoints.find(str(make_checkpoint(tmp_path / "pets")))
    assert (checkpoint.name, checkpoint.kind) == ("pets", "classifier")
    assert (checkpoint.id2label, checkpoint.num_labels) == (("cat", "dog"), 2)
    assert checkpoints.input_pixels(checkpoint) == 32 * 16


def test_class_names_are_in_the_order_of_ids(tmp_path: Path) -> None:
    names = {str(index): f"class {index}" for index in (10, 9, 2, 1, 0, 3, 4, 5, 6, 7, 8)}
    path = make_checkpoint(tmp_path / "m", {"architectures": ["ViTForImageClassification"], "id2label": names})
    assert checkpoints.find(str(path)).id2label == tuple(f"class {index}" for index in range(11))


@pytest.mark.parametrize(
    "names", [{"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}, {"0": "cat", "1": "dog", "3": "owl"}]
)
def test_generic_or_incomplete_class_names_are_ignored(tmp_path: Path, names: dict[str, str]) -> None:
    path = make_checkpoint(tmp_path / "m", {"architectures": ["SwinForImageClassification"], "id2label": names})
    checkpoint = checkpoints.find(str(path))
    assert checkpoint.id2label is None
    assert checkpoint.num_labels == 3


def test_clip_is_zero_shot(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "clip", {"architectures": ["CLIPModel"], "model_type": "clip"})
    checkpoint = checkpoints.find(str(path))
    assert (checkpoint.kind, checkpoint.id2label, checkpoint.num_labels) == ("zero-shot", None, None)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "ViTModel", "CLIPVisionModelWithProjection"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    path = make_checkpoint(tmp_path / "m", {"architectures": [architecture]})
    with pytest.raises(SetupError, match=architecture):
        checkpoints.find(str(path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "m")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(SetupError, match=r"only pytorch_model\.bin.*save_pretrained"):
        checkpoints.find(str(path))


def test_a_name_that_begins_with_demo_is_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path / "demo-mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match=r"\./demo-mine"):
        checkpoints.find("demo-mine")
    assert checkpoints.find("./demo-mine").kind == "classifier"


@pytest.mark.parametrize("name", checkpoints.BUILT_IN)
def test_the_built_in_checkpoints_are_there(name: str) -> None:
    checkpoint = checkpoints.find(name)
    assert checkpoint.name == name
    assert checkpoint.kind == ("classifier" if name == "demo-vit" else "zero-shot")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_a_missing_folder_is_refused(source: str) -> None:
    with pytest.raises(SetupError, match="checkpoint not found"):
        checkpoints.find(source)


def test_an_unknown_hub_id_is_one_line_offline(tmp_path: Path) -> None:
    code = "from vitscore.models import checkpoint\nfrom vitscore.errors import SetupError\n"
    code += "try:\n    checkpoint.find('a/b')\n"
    code += "except SetupError as error:\n    print(error)\nimport sys\nassert 'torch' not in sys.modules"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("checkpoint not found: a/b")
    assert done.stdout.count("\n") == 1


def test_a_hub_snapshot_in_the_cache_is_used(tmp_path: Path) -> None:
    snapshots = tmp_path / "hub/models--org--vit"
    make_checkpoint(snapshots / "snapshots" / ("c" * 40))
    (snapshots / "refs").mkdir()
    (snapshots / "refs/main").write_text("c" * 40)
    code = "from vitscore.models import checkpoint\nhit = checkpoint.find('org/vit')\nprint(hit.name, hit.revision)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vit", "c" * 40]


def test_the_fingerprint_depends_only_on_content(tmp_path: Path) -> None:
    one, two = (checkpoints.find(str(make_checkpoint(tmp_path / name))) for name in ("one", "two"))
    (one.path / "README.md").write_text("changes nothing")
    assert checkpoints.fingerprint(one) == checkpoints.fingerprint(two)
    save_file({"weight": np.ones(3, np.float32)}, two.path / "model.safetensors")
    assert checkpoints.fingerprint(one) != checkpoints.fingerprint(two)

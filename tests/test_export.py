"""Runs exported to other tools' formats, read back with those tools or with the libraries that they use."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitscore.bench.harness.madeup import MadeShard, from_logits, write_run

Call = Callable[..., Any]
CLASSES = ["cat", "dog", "owl", "cow", "elk", "bee"]


def write(folder: Path, *, keeps_logits: bool = True, num_classes: int = 6, has_labels: bool = True) -> tuple:
    """Write a run of two models over two shards; sample 3 is bad, the last has no label, the first a wrong one."""
    rng = np.random.default_rng(0)
    labels = (np.arange(300) % num_classes).astype(np.int32) if has_labels else np.full(300, -1, np.int32)
    logits = rng.normal(size=(300, num_classes)).astype(np.float32)
    logits[np.arange(300), labels] += 5
    if has_labels:
        labels[-1], labels[0] = -1, (labels[0] + 1) % num_classes
    shards = []
    for number, rows in enumerate((slice(0, 200), slice(200, 300))):
        made = {
            name: from_logits(scale * logits[rows], labels[rows], k=3, keeps_logits=keeps_logits)
            for name, scale in (("vit", 1.0), ("clip", 0.3))
        }
        keys = [f"k{i}" for i in range(rows.start, rows.stop)]
        bad = {3: "undecodable image"} if number == 0 else {}
        shards.append(MadeShard(f"s-{number}.tar", keys, labels[rows], made, bad))
    write_run(folder, shards, CLASSES[:num_classes], options={"save": ["logits"] if keeps_logits else []})
    kept = (labels >= 0) & (np.arange(300) != 3)
    return logits, labels, kept


def test_clip_benchmarks_json_has_its_keys_and_figures(vitscore: Call, tmp_path: Path) -> None:
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    logits, labels, kept = write(tmp_path / "run")
    done = vitscore("export", tmp_path / "run", "-f", "clip-benchmark", "-m", "clip", "-o", tmp_path / "a.json")
    assert done.code == 0, done.err
    document = json.loads((tmp_path / "a.json").read_bytes())
    assert list(document) == ["dataset", "model", "pretrained", "task", "metrics", "language"]
    assert document["dataset"] == "run" and document["task"] == "zeroshot_classification"
    preds = logits.argmax(1)
    assert document["metrics"] == {
        "acc1": pytest.approx(accuracy_score(labels[kept], preds[kept])),
        "acc5": None,  # this run kept the top 3
        "mean_per_class_recall": pytest.approx(balanced_accuracy_score(labels[kept], preds[kept])),
    }


def test_timms_csv_has_its_columns_best_model_first(vitscore: Call, tmp_path: Path) -> None:
    write(tmp_path / "run")
    assert vitscore("export", tmp_path / "run", "-f", "timm", "-o", tmp_path / "results.csv").code == 0
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation".split(",")
    assert list(rows[0]) == wanted
    assert sorted(row["model"] for row in rows) == ["clip", "vit"]
    assert rows[0]["img_size"] == rows[0]["interpolation"] == ""  # made-up models have no input size
    assert float(rows[0]["top1"]) >= float(rows[1]["top1"])
    assert float(rows[0]["top1"]) + float(rows[0]["top1_err"]) == pytest.approx(100)


def test_timms_csv_of_a_real_run_knows_size_and_filter(vitscore: Call, tmp_path: Path) -> None:
    assert vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "run", "--limit", "20").code == 0
    assert vitscore("export", tmp_path / "run", "-f", "timm", "-o", tmp_path / "results.csv").code == 0
    with open(tmp_path / "results.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["img_size"], row["interpolation"], row["param_count"]) == ("32", "bilinear", "0.32")


def test_cleanlab_finds_the_wrong_label_in_the_matrix(vitscore: Call, tmp_path: Path) -> None:
    from cleanlab.filter import find_label_issues

    logits, labels, kept = write(tmp_path / "run")
    out = tmp_path / "vit.npz"
    done = vitscore("export", tmp_path / "run", "-f", "cleanlab", "-m", "vit", "-o", out)
    assert done.code == 0 and "exact" in done.out, done.err
    with np.load(out) as matrix:
        prob = np.exp(logits[kept].astype(np.float64))
        prob /= prob.sum(1, keepdims=True)
        assert matrix["pred_probs"] == pytest.approx(prob, abs=1e-6)
        assert (matrix["labels"] == labels[kept]).all()
        assert matrix["keys"].tolist() == [f"k{i}" for i in np.flatnonzero(kept)]
        assert matrix["classes"].tolist() == CLASSES
        ranked = find_label_issues(matrix["labels"], matrix["pred_probs"], return_indices_ranked_by="self_confidence")
        assert matrix["keys"][ranked[0]] == "k0"


def test_without_logits_the_matrix_is_an_approximation_that_has_to_be_asked_for(vitscore: Call, tmp_path: Path) -> None:
    logits, _, kept = write(tmp_path / "run", keeps_logits=False)
    command = ("export", tmp_path / "run", "-f", "cleanlab", "-m", "vit", "-o", tmp_path / "vit.npz")
    refused = vitscore(*command)
    assert refused.code == 2 and "--save logits" in refused.err and not (tmp_path / "vit.npz").exists()
    assert "approximate" in vitscore(*command, "--approximate").out
    prob = np.exp(logits[kept].astype(np.float64))
    prob /= prob.sum(1, keepdims=True)
    with np.load(tmp_path / "vit.npz") as matrix:
        assert matrix["pred_probs"].sum(1) == pytest.approx(np.ones(kept.sum()), abs=1e-5)
        best = prob.argsort(1)[:, ::-1][:, :3]
        assert np.take_along_axis(matrix["pred_probs"], best, 1) == pytest.approx(
            np.take_along_axis(prob, best, 1), abs=1e-5
        )


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["-f", "word"], 2, "unknown format"),
        (["-f", "cleanlab"], 2, "no model named: --model - expected vit or clip, got none"),
        (["-f", "clip-benchmark", "-m", "none"], 2, "no such model"),
        (["-f", "timm", "-o", "nowhere/at/all.csv"], 4, "cannot write"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line(
    arguments: list[str], code: int, said: str, vitscore: Call, tmp_path: Path
) -> None:
    write(tmp_path / "run")
    done = vitscore("export", tmp_path / "run", "-o", tmp_path / "x", *arguments)
    assert done.code == code, done.err
    assert said in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("form", ["timm", "clip-benchmark", "cleanlab"])
def test_without_labels_there_is_nothing_to_export(form: str, vitscore: Call, tmp_path: Path) -> None:
    write(tmp_path / "run", has_labels=False)
    done = vitscore("export", tmp_path / "run", "-f", form, "-m", "vit", "-o", tmp_path / "x")
    assert done.code == 3 and "to export" in done.err and not (tmp_path / "x").exists()

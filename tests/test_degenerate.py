"""Edge cases through the command line: a defined result or one clear error line, never NaN or a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitscore.bench.harness.madeup import MadeShard, from_logits, write_run

Call = Callable[..., Any]
NUM = 40


def write(folder: Path, kind: str) -> Path:
    """Write a run of two models, `vit` and `clip`, with 40 samples of one kind."""
    num_classes = 1 if kind == "a head of one class" else 6
    rng = np.random.default_rng(3)
    labels = rng.integers(0, num_classes, NUM).astype(np.int32)
    logits = rng.normal(size=(NUM, num_classes)).astype(np.float32)
    logits[np.arange(NUM), labels] += 2
    bad, options = {}, {}
    if kind == "no labels":
        labels[:] = -1
    elif kind == "one class in the truth":
        labels[:] = 2
    elif kind == "no correct answer":
        labels = ((logits.argmax(1) + 1) % num_classes).astype(np.int32)
    elif kind.startswith("all bad"):
        bad = dict.fromkeys(range(NUM), "undecodable image")
        options = {"on_bad_sample": "wrong" if kind.endswith("wrong") else "skip"}
    elif kind == "ties":
        logits[:] = 0.5
    elif kind == "every answer right":
        labels = logits.argmax(1).astype(np.int32)
    rows = slice(0, {"one sample": 1, "no samples": 0}.get(kind, NUM))
    made = {"vit": from_logits(logits[rows], labels[rows]), "clip": from_logits(logits[rows] * 0.5, labels[rows])}
    keys = [f"{row:03}" for row in range(rows.stop)]
    shard = MadeShard("s.tar", keys, labels[rows], made, bad)
    return write_run(folder, [shard], [f"c{i}" for i in range(num_classes)], options=options)


KINDS = [
    "no labels",
    "one class in the truth",
    "a head of one class",
    "no correct answer",
    "every answer right",
    "all bad",
    "all bad, as wrong",
    "ties",
    "one sample",
    "no samples",
]


def read(text: str) -> Any:
    """Parse JSON, and fail on NaN."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_has_a_defined_result(kind: str, vitscore: Call, tmp_path: Path) -> None:
    run = write(tmp_path / "run", kind)
    (tmp_path / "groups.json").write_text('{"low": ["c0"]}')
    for command in (
        ["metrics", run],
        ["metrics", run, "--per-class"],
        ["metrics", run, "--top-k", "1"],
        ["metrics", run, "--groups", tmp_path / "groups.json"],
        ["metrics", run, "--only-classes", "c0"],
        ["compare", run],
    ):
        done = vitscore(*command)
        assert done.code == 0, (command, done.err)
        assert done.err == "" and "nan" not in done.out.lower()
        read(vitscore(*command, "--json").out)
    read((run / "metrics.json").read_text())


def figures(kind: str, vitscore: Call, folder: Path, *arguments: object) -> dict[str, Any]:
    document = read(vitscore("metrics", write(folder / "run", kind), "--json", *arguments).out)
    model: dict[str, Any] = document["models"]["vit"]
    return model


def test_without_labels_there_are_no_figures_and_it_says_so(vitscore: Call, tmp_path: Path) -> None:
    run = write(tmp_path / "run", "no labels")
    assert "No sample has a label" in vitscore("metrics", run).out
    document = read(vitscore("metrics", run, "--json").out)
    assert document["models"]["vit"]["report"] is None and document["ledger"]["unlabelled"] == NUM
    assert document["comparisons"][0]["samples"] == 0


def test_no_correct_answer_is_zero_with_an_interval_above_it(vitscore: Call, tmp_path: Path) -> None:
    model = figures("no correct answer", vitscore, tmp_path)
    assert model["accuracy"] == 0 and model["report"]["macro avg"]["f1-score"] == 0
    low, high = model["confidence_intervals"]["accuracy"]
    assert low == 0 < high < 0.15


def test_one_class_in_the_truth_says_how_many_it_lacks(vitscore: Call, tmp_path: Path) -> None:
    done = vitscore("metrics", write(tmp_path / "run", "one class in the truth"))
    assert "vit: 1 of 6 classes are in the truth; macro P R F1 over these: 100.0 " in done.out


def test_all_bad_counts_nothing_or_counts_all_as_wrong(vitscore: Call, tmp_path: Path) -> None:
    skipped, wrong = (figures(kind, vitscore, tmp_path / kind) for kind in ("all bad", "all bad, as wrong"))
    assert skipped["samples"] == 0 and skipped["accuracy"] is None
    assert wrong["samples"] == NUM and wrong["accuracy"] == 0 and wrong["nll"] is None


def test_ties_go_to_the_lowest_ids(vitscore: Call, tmp_path: Path) -> None:
    model = figures("ties", vitscore, tmp_path)
    labels = np.random.default_rng(3).integers(0, 6, NUM)
    assert model["topk_accuracy"] == {"1": (labels == 0).mean(), "5": (labels < 5).mean()}
    assert model["mcc"] == 0 and model["nll"] == pytest.approx(np.log(6), rel=1e-6)


# Real runs


def test_a_run_without_labels_predicts_and_says_that_nothing_is_measured(
    vitscore: Call, make_shards: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards([(key, {"png": members["png"]}) for key, members in digits[:20]])
    done = vitscore("run", shards, "-m", "demo-vit", "-m", "demo-clip", "-o", tmp_path / "out")
    assert done.code == 0 and "No sample has a label" in done.out
    compared = vitscore("compare", tmp_path / "out")
    assert compared.code == 0 and "cannot be compared" in compared.out


def test_a_run_of_one_class_is_measured(vitscore: Call, make_shards: Call, digits: Any, tmp_path: Path) -> None:
    shards = make_shards([sample for sample in digits if sample[1]["cls"] == b"3"][:20])
    done = vitscore("run", shards, "-m", "demo-vit", "-o", tmp_path / "out")
    assert done.code == 0 and "demo-vit: 1 of 10 classes are in the truth" in done.out


def test_a_run_without_a_readable_image_is_too_many_bad_samples(
    vitscore: Call, make_shards: Call, tmp_path: Path
) -> None:
    shards = make_shards([(f"{i}", {"png": b"x", "cls": b"1"}) for i in range(12)])
    command = ("run", shards, "-m", "demo-vit", "-m", "demo-clip", "-o", tmp_path / "out")
    assert vitscore(*command).code == 5
    done = vitscore(*command, "--max-bad", "100%")
    assert done.code == 0 and "12 bad" in done.out
    assert vitscore("compare", tmp_path / "out").code == 0

"""Comparing runs: the join against pandas, figures against scikit-learn, unusual pairs of runs through the command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscore.bench.harness.madeup import MadeShard, from_logits, write_run
from vitscore.results.compare import compare_runs
from vitscore.results.join import join

Call = Callable[..., Any]
CLASSES = ["cat", "dog", "owl", "cow"]


def make(
    folder: Path,
    models: dict[str, float],
    *,
    shards: dict[str, list[str]] | None = None,
    classes: list[str] = CLASSES,
    labels: dict[str, str] | None = None,
    bad: dict[str, str] | None = None,
    options: dict[str, Any] | None = None,
) -> Path:
    """Write a run whose predictions depend only on a sample's key, not on its shard or the order of the classes.

    Args:
        models: by name, how much the logit of the true class is raised.
        labels: class name by key; by default every key has one.
    """
    made = []
    for name, keys in (shards or {"s-0.tar": [f"{i:03}" for i in range(120)], "s-1.tar": ["x", "y"]}).items():
        truth = [CLASSES[sum(key.encode()) % 4] for key in keys]
        said = truth if labels is None else [labels.get(key) for key in keys]
        logits = {
            model: np.array(
                [
                    [hash_number(f"{model}{key}{c}") * 2 + knows * (c == true) for c in classes]
                    for key, true in zip(keys, truth, strict=True)
                ],
                np.float32,
            ).reshape(len(keys), len(classes))
            for model, knows in models.items()
        }
        label_ids = np.array([classes.index(c) if c else -1 for c in said], np.int32)
        rows = {key: row for row, key in enumerate(keys)}
        faults = {rows[key]: reason for key, reason in (bad or {}).items() if key in rows}
        made.append(MadeShard(name, keys, label_ids, {m: from_logits(x, label_ids) for m, x in logits.items()}, faults))
    return write_run(folder, made, classes, options=options)


def hash_number(text: str) -> float:
    """Return a number in [0, 1) derived from the text's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def by_key(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(path).to_pandas() for path in sorted((folder / "parts").glob("*.parquet"))])


# The join


@pytest.mark.parametrize(
    "ours, theirs, rows, by_key",
    [
        ([("a/s.tar", "1"), ("a/s.tar", "2")], [("b/s.tar", "2"), ("b/s.tar", "1")], [(0, 1), (1, 0)], 0),
        ([("s.tar", "1"), ("t.tar", "1")], [("t.tar", "1"), ("u.tar", "1")], [(1, 0)], 0),
        ([("s.tar", "1"), ("t.tar", "2")], [("all.tar", "2"), ("all.tar", "1")], [(0, 1), (1, 0)], 2),
        ([("x/s.tar", "1"), ("y/s.tar", "1")], [("y/s.tar", "1"), ("x/s.tar", "1")], [(0, 1), (1, 0)], 0),
        ([("x/s.tar", "1"), ("y/s.tar", "1")], [("z/s.tar", "1")], [], 0),
        ([("s.tar", "1")], [("t.tar", "2")], [], 0),
        ([], [("t.tar", "2")], [], 0),
    ],
)
def test_samples_are_joined_by_shard_and_key_else_by_unique_key(
    ours: list, theirs: list, rows: list, by_key: int
) -> None:
    names = [tuple(pa.array([row[i] for row in side], pa.string()) for i in (0, 1)) for side in (ours, theirs)]
    joined = join(names)
    assert list(zip(*(row.tolist() for row in joined.rows), strict=True)) == rows
    assert joined.num_by_key == by_key


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sets(st.tuples(st.sampled_from("stu"), st.integers(0, 9))), min_size=2, max_size=3))
def test_equal_names_are_joined_as_pandas_joins_them(runs: list[set[tuple[str, int]]]) -> None:
    frames = [pd.DataFrame([(f"{s}.tar", f"{s}{k}") for s, k in sorted(run)], columns=["shard", "key"]) for run in runs]
    wanted = frames[0].reset_index(names="row0")
    for i, frame in enumerate(frames[1:], start=1):
        wanted = wanted.merge(frame.reset_index(names=f"row{i}"), on=["shard", "key"])
    joined = join(
        [(pa.array(f["shard"].tolist(), pa.string()), pa.array(f["key"].tolist(), pa.string())) for f in frames]
    )
    for i, rows in enumerate(joined.rows):
        assert rows.tolist() == wanted[f"row{i}"].tolist()


# Figures


def test_one_run_is_compared_as_its_metrics_are(vitscore: Call, tmp_path: Path) -> None:
    run = make(tmp_path / "run", {"vit": 1.5, "clip": 1.0}, bad={"007": "undecodable image"})
    document = compare_runs([str(run)])
    metrics = json.loads(vitscore("metrics", run, "--json").out)
    entry = document["comparisons"][0]
    assert {name: entry[name] for name in metrics["comparisons"][0]} == metrics["comparisons"][0]
    assert document["models"]["vit"]["report"] == metrics["models"]["vit"]["report"]


def test_models_of_two_runs_are_scored_on_the_common_samples(tmp_path: Path) -> None:
    keys = [f"{i:03}" for i in range(200)]
    first = make(tmp_path / "a", {"vit": 1.5}, shards={"one.tar": keys[:150]}, bad={"010": "undecodable image"})
    second = make(tmp_path / "b", {"clip": 1.0}, shards={"x/one.tar": keys[:100][::-1], "two.tar": keys[100:]})
    document = compare_runs([str(first), f"{second}:clip"])
    ours, theirs = by_key(first).set_index("key"), by_key(second).set_index("key")
    common = ours[ours.status == "ok"].merge(theirs, left_index=True, right_index=True, suffixes=("", "_b"))
    assert document["samples"] == len(common) == 149
    assert document["joined"] == {"common": 150, "by_key_alone": 50, "without_answer": 1, "unlabelled": 0}
    assert [run["not_common"] for run in document["runs"]] == [0, 50]
    entry = document["comparisons"][0]
    a_is_right, b_is_right = common["vit.pred"] == common.label, common["clip.pred"] == common.label
    assert entry["only_a"] == (a_is_right & ~b_is_right).sum()
    assert entry["agreement"] == pytest.approx((common["vit.pred"] == common["clip.pred"]).mean())
    for model in ("vit", "clip"):
        wanted = sk.classification_report(
            common.label,
            common[f"{model}.pred"],
            labels=range(4),
            target_names=CLASSES,
            output_dict=True,
            zero_division=0,
        )
        assert document["models"][model]["report"]["macro avg"] == pytest.approx(wanted["macro avg"], abs=1e-12)


def test_disagreements_are_the_most_confident_ones(tmp_path: Path) -> None:
    run = make(tmp_path / "run", {"vit": 0.5, "clip": 0.5})
    rows = by_key(run)
    rows = rows[rows["vit.pred"] != rows["clip.pred"]]
    wanted = rows.assign(least=rows[["vit.prob", "clip.prob"]].min(axis=1)).sort_values("least", ascending=False)
    shown = compare_runs([str(run)], top=7)["comparisons"][0]["disagreements"]
    assert [row["key"] for row in shown] == wanted.key.tolist()[:7]
    assert shown[0]["probs"] == pytest.approx(wanted[["vit.prob", "clip.prob"]].iloc[0].tolist(), abs=1e-6)


def test_three_models_of_two_runs_make_three_corrected_pairs(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {"vit": 3.0, "clip": 1.0})
    second = make(tmp_path / "b", {"vit": 0.2})
    document = compare_runs([str(first), str(second)])
    assert list(document["models"]) == ["a:vit", "clip", "b:vit"]
    assert [(entry["a"], entry["b"]) for entry in document["comparisons"]] == [
        ("a:vit", "clip"),
        ("a:vit", "b:vit"),
        ("clip", "b:vit"),
    ]
    assert document["conclusion"] == "a:vit is ahead of all 2 others, on 122 images"


def test_classes_in_another_order_are_matched_by_name(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {"vit": 1.5})
    second = make(tmp_path / "b", {"clip": 1.0}, classes=["owl", "cow", "dog", "cat"])
    straight = make(tmp_path / "c", {"clip": 1.0})
    assert (
        compare_runs([str(first), str(second)])["comparisons"]
        == compare_runs([str(first), str(straight)])["comparisons"]
    )


def test_bad_samples_that_count_as_wrong_do_so_in_every_comparison(vitscore: Call, tmp_path: Path) -> None:
    options = {"on_bad_sample": "wrong"}
    run = make(tmp_path / "run", {"vit": 1.5, "clip": 1.0}, bad={"007": "undecodable image"}, options=options)
    entry = compare_runs([str(run)])["comparisons"][0]
    metrics = json.loads(vitscore("metrics", run, "--json").out)["comparisons"][0]
    assert entry["samples"] == 122 and {name: entry[name] for name in metrics} == metrics


def test_labels_of_the_other_run_fill_gaps_and_a_file_wins(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {"vit": 9.0}, labels={"001": "cat"}, shards={"s.tar": ["001", "002", "003"]})
    second = make(tmp_path / "b", {"clip": 9.0}, labels={"002": "owl"}, shards={"s.tar": ["001", "002", "003"]})
    document = compare_runs([str(first), str(second)])
    assert document["samples"] == 2 and document["joined"]["unlabelled"] == 1
    file = tmp_path / "labels.csv"
    file.write_text("key,label\n003,dog\n001,dog\n")
    assert compare_runs([str(first), str(second)], labels=file)["samples"] == 3


# Through the command


def test_the_command_prints_a_table_and_ends_with_the_conclusion(vitscore: Call, tmp_path: Path) -> None:
    run = make(tmp_path / "run", {"vit": 3.0, "a-model-with-a-rather-long-name": 0.5})
    done = vitscore("compare", run)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "vit is ahead of a-model-with-a-rather-long-name by" in " ".join(lines[-2:])
    assert json.loads(vitscore("compare", run, "--json").out)["conclusion"] in " ".join(lines[-2:])


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["A"], 2, "nothing to compare with"),
        (["A", "A"], 2, "a model is named twice"),
        (["A", "B:none"], 2, "no such model: "),
        (["A", "nowhere"], 2, "no run here"),
        (["A", "OTHER-KEYS"], 3, "no common sample"),
        (["A", "OTHER-CLASSES"], 3, "runs have different classes"),
        (["A", "OTHER-TRUTH"], 3, "runs disagree about the truth"),
        (["A", "EMPTY"], 3, "no common sample"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(
    arguments: list[str], code: int, said: str, vitscore: Call, tmp_path: Path
) -> None:
    make(tmp_path / "A", {"vit": 1.0})
    make(tmp_path / "B", {"clip": 1.0})
    make(tmp_path / "OTHER-KEYS", {"clip": 1.0}, shards={"t.tar": ["q", "r"]})
    make(tmp_path / "OTHER-CLASSES", {"clip": 1.0}, classes=["cat", "dog", "owl", "cow", "elk"])
    make(tmp_path / "OTHER-TRUTH", {"clip": 1.0}, labels={"x": "cat", "y": "cat", "001": "cow", "002": "cow"})
    make(tmp_path / "EMPTY", {"clip": 1.0}, shards={"s-0.tar": []})
    done = vitscore("compare", *(tmp_path / word for word in arguments))
    assert done.code == code, done.err
    assert said in done.err and done.err.count("\n") == 1 and done.out == ""


def test_a_run_that_is_not_finished_is_said_to_be_so(vitscore: Call, tmp_path: Path) -> None:
    run = make(tmp_path / "run", {"vit": 3.0, "clip": 0.5})
    next(iter((run / "parts").glob("0000001-*"))).unlink()
    done = vitscore("compare", run)
    assert done.code == 0 and "is not finished: 1 of 2 shards" in done.out


@pytest.mark.parametrize("kind", ["unlabelled", "all bad", "never right", "one sample"])
def test_models_that_cannot_be_distinguished_are_reported_so(kind: str, vitscore: Call, tmp_path: Path) -> None:
    keys = ["001"] if kind == "one sample" else [f"{i:03}" for i in range(30)]
    run = make(
        tmp_path / "run",
        {"vit": -9.0 if kind == "never right" else 1.0, "clip": -9.0},
        shards={"s.tar": keys},
        labels={} if kind == "unlabelled" else None,
        bad=dict.fromkeys(keys, "undecodable image") if kind == "all bad" else None,
    )
    done = vitscore("compare", run)
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    nothing = "vit and clip cannot be compared: no image has a label and both predictions"
    assert (nothing if kind in ("unlabelled", "all bad") else "can be shown on th") in text
    json.loads(vitscore("compare", run, "--json").out)

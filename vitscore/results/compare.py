"""`vitscore compare DIR[:NAME] ...`: compare models of one or several runs on their common samples.

    parts of every run ─► rows ─► join ─► pairs and models ─► one document

Only samples with a label and an answer from every model count; the document says how many were left out, and why.
Classes are matched by name, so runs may list them in different orders. Needs no model and no torch; writes nothing.
Axes: N rows of a run, J joined samples, K classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vitscore.classes.names import fold
from vitscore.errors import ClassError, LabelError, UsageError
from vitscore.kernels.arrays import Array
from vitscore.metrics.counts import ModelCounts
from vitscore.metrics.figures import model_metrics, report_names
from vitscore.metrics.paired_f1 import class_differences
from vitscore.metrics.pairs import Pair, compare_pairs, conclusion, holm, mcnemar_p, overall
from vitscore.metrics.recount import corrected, read_corrections
from vitscore.results.join import join
from vitscore.rundir.folder import require_record
from vitscore.rundir.parts import finished_parts
from vitscore.rundir.rows import ModelRows, read_rows

DISAGREEMENTS = 10


@dataclass
class RunRows:
    """Names, labels and predictions of all rows of one run."""

    source: str
    record: dict[str, Any]
    models: list[str]
    num_shards: int
    """Number of finished parts; fewer than its shards if the run is not finished."""
    shards: pa.Array
    keys: pa.Array
    labels_N: Array
    is_bad_N: Array
    preds: dict[str, Array]
    """By model; -1 without an answer, K for a bad sample that counts as a wrong answer."""
    probs: dict[str, Array]

    @property
    def classes(self) -> list[str]:
        return list(self.record["classes"])


def compare_runs(sources: Sequence[str], *, labels: Path | None = None, top: int = DISAGREEMENTS) -> dict[str, Any]:
    """Compare models and return the document that `vitscore compare --json` prints.

    Args:
        sources: `DIR` (all models of a run) or `DIR:NAME`.
        labels: CSV or Parquet file (key, label) that overrides the runs' labels.
        top: how many disagreements to list for every pair.

    Raises:
        UsageError: fewer than two models, or no such run or model.
        ClassError: the runs have different classes.
        LabelError: the runs have no common sample, or disagree about a label.
    """
    runs = read_runs(sources)
    classes = match_classes(runs)
    joined = join([(run.shards, run.keys) for run in runs])
    num_joined = len(joined.rows[0])
    if not num_joined and len(runs) > 1:
        raise LabelError(
            "no common sample",
            where=" and ".join(run.source for run in runs),
            got=f"{_example(runs[0])} in one, {_example(runs[1])} in another",
            next_step="Samples are matched by shard name and key, or by key alone if keys are unique.",
        )
    labels_J = common_labels(runs, joined.rows, labels, classes)
    names = display_names(runs)
    preds = {names[i, model]: run.preds[model][joined.rows[i]] for i, run in enumerate(runs) for model in run.models}
    probs = {names[i, model]: run.probs[model][joined.rows[i]] for i, run in enumerate(runs) for model in run.models}
    is_answered_J = np.all([pred_J >= 0 for pred_J in preds.values()], axis=0)
    is_common_J = is_answered_J & (labels_J >= 0)
    samples = np.flatnonzero(is_common_J)
    labels_J = labels_J[samples]
    preds = {name: pred_J[samples] for name, pred_J in preds.items()}
    probs = {name: prob_J[samples] for name, prob_J in probs.items()}
    rows = joined.rows[0][samples]
    shown = report_names(classes)
    pairs = {
        pair: count_pair(labels_J, preds[pair[0]], preds[pair[1]], len(classes)) for pair in combinations(preds, 2)
    }
    entries = compare_pairs(pairs)
    for entry in entries:
        a, b = entry["a"], entry["b"]
        disagreements = most_confident(preds[a], preds[b], probs[a], probs[b], top=top)
        entry["conclusion"] = conclusion(entry)
        entry["per_class"] = per_class(pairs[a, b], shown)
        entry["disagreements"] = [
            {
                "key": runs[0].keys[int(rows[place])].as_py(),
                "shard": runs[0].shards[int(rows[place])].as_py(),
                "label": int(labels_J[place]),
                "preds": [int(preds[a][place]), int(preds[b][place])],
                "probs": [round(float(probs[a][place]), 6), round(float(probs[b][place]), 6)],
            }
            for place in disagreements
        ]
    return {
        "schema": 1,
        "classes": shown,
        "samples": len(samples),
        "joined": {
            "common": num_joined,
            "by_key_alone": joined.num_by_key,
            "without_answer": int((~is_answered_J).sum()),
            "unlabelled": int(is_answered_J.sum()) - len(samples),
        },
        "runs": [
            {
                "run": run.source,
                "models": run.models,
                "samples": len(run.keys),
                "not_common": len(run.keys) - num_joined,
                "shards": {"expected": run.record["corpus"]["shards"], "done": run.num_shards},
            }
            for run in runs
        ],
        "models": {
            names[i, model]: model_entry(run, model, labels_J, preds[names[i, model]], shown)
            for i, run in enumerate(runs)
            for model in run.models
        },
        "comparisons": entries,
        "conclusion": overall(entries),
    }


def read_runs(sources: Sequence[str]) -> list[RunRows]:
    """Read the runs named by `sources`, one entry per folder, with the chosen models."""
    wanted: dict[Path, tuple[str, dict[str, Any], list[str]]] = {}
    for source in sources:
        folder, model = split_source(source)
        record = require_record(folder)
        models = list(record["models"]) if model is None else [model]
        if model is not None and model not in record["models"]:
            raise UsageError("no such model", where=source, expected=" or ".join(record["models"]), got=model)
        _, _, chosen = wanted.setdefault(folder.resolve(), (str(folder), record, []))
        if any(name in chosen for name in models):
            raise UsageError("a model is named twice", where=source)
        chosen.extend(models)
    if sum(len(models) for _, _, models in wanted.values()) < 2:
        raise UsageError(
            "nothing to compare with",
            where=" ".join(sources),
            expected="two models or more",
            next_step="Name another run, or DIR:NAME for one model of it.",
        )
    return [read_run(folder, shown, record, models) for folder, (shown, record, models) in wanted.items()]


def split_source(source: str) -> tuple[Path, str | None]:
    """Split `DIR:NAME`; an existing path with a colon in its name is a folder."""
    match = re.fullmatch(r"(.+):([A-Za-z0-9._-]+)", source, re.DOTALL)
    if match and not Path(source).exists():
        return Path(match[1]), match[2]
    return Path(source), None


def read_run(folder: Path, shown: str, record: dict[str, Any], models: list[str]) -> RunRows:
    parts = finished_parts(folder / "parts", record["identity_hash"])
    outside = len(record["classes"]) if record["options"].get("on_bad_sample") == "wrong" else -1
    blocks = [rows for path, _ in parts.values() for rows in read_rows(path, models, figures=("pred", "prob"))]

    def joined(arrays: Sequence[Array], dtype: Any) -> Array:
        return np.concatenate([np.zeros(0, dtype), *arrays])

    return RunRows(
        source=shown,
        record=record,
        models=models,
        num_shards=len(parts),
        shards=pa.concat_arrays([pa.array([], pa.string()), *(rows.shards for rows in blocks)]),
        keys=pa.concat_arrays([pa.array([], pa.string()), *(rows.keys for rows in blocks)]),
        labels_N=joined([rows.labels_B for rows in blocks], np.int32),
        is_bad_N=joined([rows.is_bad_B for rows in blocks], bool),
        preds={
            name: joined([np.where(rows.is_bad_B, outside, rows.models[name].pred) for rows in blocks], np.int32)
            for name in models
        },
        probs={name: joined([_probs(rows.models[name]) for rows in blocks], np.float32) for name in models},
    )


def _probs(rows: ModelRows) -> Array:
    assert rows.prob is not None
    return rows.prob


def _example(run: RunRows) -> str:
    return f"{run.shards[0].as_py()}[{run.keys[0].as_py()}]" if len(run.keys) else "nothing"


def match_classes(runs: Sequence[RunRows]) -> list[str]:
    """Return the first run's classes; renumber labels and predictions of the others accordingly, in place.

    Raises:
        ClassError: the runs have different classes.
    """
    classes = runs[0].classes
    ours = {fold(name): index for index, name in enumerate(classes)}
    for run in runs[1:]:
        theirs = [fold(name) for name in run.classes]
        if theirs == [fold(name) for name in classes]:
            continue
        if len(ours) < len(classes) or sorted(theirs) != sorted(ours):
            missing, more = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
            got = f"{len(theirs)}, {len(more)} of them new ({_few(more)}), {len(missing)} missing ({_few(missing)})"
            raise ClassError(
                "runs have different classes",
                where=f"{runs[0].source} and {run.source}",
                expected=f"the same {len(classes)} classes",
                got=got,
                next_step="Score one of them again with the other's --classes.",
            )
        order = np.array([*(ours[name] for name in theirs), len(classes), -1], np.int32)
        run.labels_N = order[run.labels_N]
        run.preds = {name: order[pred_N] for name, pred_N in run.preds.items()}
    return classes


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"


def common_labels(runs: Sequence[RunRows], rows: Sequence[Array], labels: Path | None, classes: Sequence[str]) -> Array:
    """Return the label of every joined sample; -1 if no run has one.

    Raises:
        LabelError: two runs have different labels for a sample that the `labels` file does not settle.
    """
    labels_J = runs[0].labels_N[rows[0]].copy()
    given_J = np.zeros(len(labels_J), bool)
    keys = runs[0].keys.take(pa.array(rows[0]))
    if labels is not None:
        labels_J, given_J = corrected(keys, labels_J, read_corrections(labels, classes))
    for run, row_J in zip(runs[1:], rows[1:], strict=True):
        their_J = run.labels_N[row_J]
        differs_J = (labels_J >= 0) & (their_J >= 0) & (labels_J != their_J) & ~given_J
        if differs_J.any():
            place = int(np.argmax(differs_J))
            raise LabelError(
                "runs disagree about the truth",
                where=keys[place].as_py(),
                got=f"{classes[labels_J[place]]} in {runs[0].source}, {classes[their_J[place]]} in {run.source}; "
                f"{int(differs_J.sum()):,} of {len(labels_J):,} common samples differ",
                next_step="Give the right labels with --labels FILE.",
            )
        labels_J = np.where(labels_J >= 0, labels_J, their_J)
    return labels_J


def display_names(runs: Sequence[RunRows]) -> dict[tuple[int, str], str]:
    """Return a unique name for every model, prefixed with its run's folder if several runs use the name."""
    used = Counter(model for run in runs for model in run.models)
    named = {(i, model): model for i, run in enumerate(runs) for model in run.models}
    names = {
        place: model if used[model] == 1 else f"{Path(runs[place[0]].source).resolve().name}:{model}"
        for place, model in named.items()
    }
    if len(set(names.values())) < len(names):
        names = {place: f"{runs[place[0]].source}:{model}" for place, model in named.items()}
    return names


def count_pair(labels_J: Array, a_J: Array, b_J: Array, num_classes: int) -> Pair:
    """Count two models; a sample that neither answered is wrong for both and not an agreement."""
    pair = Pair(num_classes)
    is_outside_J = (a_J == num_classes) & (b_J == num_classes)
    pair.count_wrong(labels_J[is_outside_J])
    pair.update(labels_J[~is_outside_J], a_J[~is_outside_J], b_J[~is_outside_J])
    return pair


def model_entry(run: RunRows, model: str, labels_J: Array, pred_J: Array, classes: Sequence[str]) -> dict[str, Any]:
    """Return a model's figures on the common samples, and its recorded cost."""
    counts = ModelCounts(len(classes), top_k=(1,))
    counts.update(labels_J, np.where(pred_J == len(classes), -1, pred_J))
    entry = model_metrics(counts, classes)
    kept = (
        "samples",
        "num_classes_in_truth",
        "accuracy",
        "topk_accuracy",
        "balanced_accuracy",
        "mcc",
        "cohen_kappa",
        "report",
        "macro_in_truth",
        "micro",
        "confidence_intervals",
    )
    recorded = run.record["models"][model]
    rates = [session["images_per_s"] for session in run.record["sessions"] if session.get("images_per_s")]
    return {
        **{name: entry[name] for name in kept},
        "cost": {
            "parameters": recorded.get("parameters"),
            "gflop_per_image": recorded.get("gflop_per_image"),
            "images_per_s": rates[-1] if rates else None,
            "models_in_run": len(run.record["models"]),
        },
    }


def per_class(pair: Pair, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return an entry for every class in the truth, the largest difference of F1 first; p-values are Holm's."""
    figures = class_differences(pair.cells.compute(), len(classes))
    ids = np.flatnonzero(figures["support"])
    only_a, only_b = figures["only_a"][ids].tolist(), figures["only_b"][ids].tolist()
    adjusted = holm([mcnemar_p(a, b) for a, b in zip(only_a, only_b, strict=True)])
    difference = (figures["f1_a"] - figures["f1_b"])[ids]
    order = np.argsort(-np.abs(difference), kind="stable")
    return [
        {
            "class": classes[ids[place]],
            "support": int(figures["support"][ids[place]]),
            "f1": [float(figures["f1_a"][ids[place]]), float(figures["f1_b"][ids[place]])],
            "f1_difference": float(difference[place]),
            "only_a": only_a[place],
            "only_b": only_b[place],
            "mcnemar_p_holm": adjusted[place],
        }
        for place in order.tolist()
    ]


def most_confident(a_J: Array, b_J: Array, prob_a_J: Array, prob_b_J: Array, *, top: int) -> list[int]:
    """Return the `top` samples with different answers by the smaller of both probabilities, largest first, stably."""
    differ = np.flatnonzero((a_J != b_J) & ~np.isnan(prob_a_J) & ~np.isnan(prob_b_J))
    confidence = np.minimum(prob_a_J[differ], prob_b_J[differ])
    chosen: list[int] = differ[np.argsort(-confidence, kind="stable")[:top]].tolist()
    return chosen

"""Figures computed from counts equal scikit-learn's, for balanced, skewed, absent and degenerate classes."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import EvalPrediction

from vitscore.errors import LabelError, UsageError
from vitscore.kernels import score_rows
from vitscore.metrics import compute_metrics, intervals
from vitscore.metrics.counts import ModelCounts
from vitscore.metrics.figures import class_figures, model_metrics, report_names
from vitscore.metrics.intervals import wilson
from vitscore.text.notes import figure_notes

IDS = np.ndarray


def names(num_classes: int) -> list[str]:
    return [f"class {i}" for i in range(num_classes)]


def draw(num: int, num_classes: int, *, kind: str = "balanced", seed: int = 0) -> tuple[IDS, IDS]:
    """Return labels and predictions, about 70% of them right."""
    rng = np.random.default_rng(seed)
    if kind == "skewed":
        labels = np.minimum(rng.geometric(0.4, num) - 1, num_classes - 1)
    elif kind == "absent":
        labels = rng.integers(0, max(num_classes // 3, 1), num)
    else:
        labels = np.arange(num) % num_classes
    return labels, np.where(rng.random(num) < 0.7, labels, rng.integers(0, num_classes, num))


def metrics_of(labels: IDS, preds: IDS, num_classes: int) -> dict:
    counts = ModelCounts(num_classes)
    counts.update(labels, preds)
    return model_metrics(counts, names(num_classes))


def scored_counts(logits: np.ndarray, labels: IDS, *, k: int = 5) -> ModelCounts:
    scores = score_rows(logits, labels, k)
    counts = ModelCounts(logits.shape[1])
    counts.update(
        labels,
        scores.pred,
        topk_BT=scores.topk,
        prob_B=scores.prob,
        label_logprob_B=scores.label_logprob,
        sum_sq_prob_B=scores.sum_sq_prob,
    )
    return counts


def assert_like_scikit_learn(labels: IDS, preds: IDS, num_classes: int) -> None:
    metrics = metrics_of(labels, preds, num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = sk.classification_report(
            labels, preds, labels=range(num_classes), target_names=names(num_classes), output_dict=True, zero_division=0
        )
        expected = {
            "accuracy": sk.accuracy_score(labels, preds),
            "balanced_accuracy": sk.balanced_accuracy_score(labels, preds),
            "mcc": sk.matthews_corrcoef(labels, preds),
            "cohen_kappa": sk.cohen_kappa_score(labels, preds),
        }
    for name, value in expected.items():
        assert metrics[name] == (None if np.isnan(value) else pytest.approx(value, abs=1e-12)), name
    report.pop("micro avg", None)
    report["accuracy"] = expected["accuracy"]
    assert set(metrics["report"]) == set(report)
    for name, row in report.items():
        assert metrics["report"][name] == pytest.approx(row, abs=1e-12), name


@pytest.mark.parametrize("kind", ["balanced", "skewed", "absent"])
@pytest.mark.parametrize("num_classes", [2, 10, 100])
@pytest.mark.parametrize("num", [1, 40, 2000])
def test_figures_are_scikit_learns(kind: str, num_classes: int, num: int) -> None:
    assert_like_scikit_learn(*draw(num, num_classes, kind=kind), num_classes)


pairs = st.integers(1, 6).flatmap(
    lambda k: st.tuples(st.just(k), st.lists(st.tuples(*[st.integers(0, k - 1)] * 2), min_size=1, max_size=30))
)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_figures_are_scikit_learns_on_anything(case: tuple[int, list[tuple[int, int]]]) -> None:
    num_classes, rows = case
    labels, preds = np.array(rows).T
    assert_like_scikit_learn(labels, preds, num_classes)


@pytest.mark.parametrize("num, num_classes", [(500, 2), (500, 12), (40, 12)])
def test_figures_are_torchmetrics(num: int, num_classes: int) -> None:
    torch = pytest.importorskip("torch")
    from torchmetrics import classification as tm

    rng = np.random.default_rng(num)
    labels, logits = rng.integers(0, num_classes, num), rng.normal(size=(num, num_classes)).astype(np.float32)
    logits[np.arange(num), labels] += 1.5
    metrics = model_metrics(scored_counts(logits, labels), names(num_classes))
    prob, target = torch.softmax(torch.tensor(logits), 1), torch.tensor(labels)
    wanted = {
        "accuracy": tm.MulticlassAccuracy(num_classes, average="micro"),
        "mcc": tm.MulticlassMatthewsCorrCoef(num_classes),
        "cohen_kappa": tm.MulticlassCohenKappa(num_classes),
        "balanced_accuracy": tm.MulticlassAccuracy(num_classes, average="macro"),
        "ece": tm.MulticlassCalibrationError(num_classes, n_bins=15, norm="l1"),
    }
    for name, metric in wanted.items():
        assert metrics[name] == pytest.approx(float(metric(prob, target)), abs=2e-6), name
    if num_classes > 5:
        top5 = tm.MulticlassAccuracy(num_classes, average="micro", top_k=5)
        assert metrics["topk_accuracy"]["5"] == pytest.approx(float(top5(prob, target)), abs=2e-6)
    for average, row in (("macro", metrics["macro_in_truth"]), ("micro", metrics["micro"])):
        for figure, metric in (("precision", tm.MulticlassPrecision), ("recall", tm.MulticlassRecall)):
            value = float(metric(num_classes, average=average)(prob, target))
            assert row[figure] == pytest.approx(value, abs=2e-6), (average, figure)


@pytest.mark.parametrize("num_wrong", [0, 50])
def test_micro_averages_are_scikit_learns(num_wrong: int) -> None:
    """An answer outside the classes is in no column, so it lowers recall but not precision."""
    labels, preds = draw(300, 5)
    counts = ModelCounts(5)
    counts.update(labels[num_wrong:], preds[num_wrong:])
    counts.count_wrong(labels[:num_wrong])
    preds[:num_wrong] = -1
    micro = model_metrics(counts, names(5))["micro"]
    wanted = sk.precision_recall_fscore_support(labels, preds, labels=range(5), average="micro", zero_division=0)
    assert list(micro.values()) == pytest.approx(wanted[:3], abs=1e-12)


def test_a_wrong_answer_outside_the_classes_is_in_support_and_in_no_column() -> None:
    labels, preds = draw(300, 5)
    counts = ModelCounts(5)
    counts.update(labels[:250], preds[:250])
    counts.count_wrong(labels[250:])
    metrics = model_metrics(counts, names(5))
    preds[250:] = -1
    report = sk.classification_report(
        labels, preds, labels=range(5), target_names=names(5), output_dict=True, zero_division=0
    )
    for name in (*names(5), "macro avg", "weighted avg"):
        assert metrics["report"][name] == pytest.approx(report[name], abs=1e-12)
    assert metrics["samples"] == 300
    assert metrics["accuracy"] == metrics["report"]["accuracy"] == pytest.approx((labels == preds).mean())
    assert metrics["topk_accuracy"]["1"] == metrics["accuracy"]
    assert metrics["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, preds), abs=1e-12)
    assert metrics["cohen_kappa"] == pytest.approx(sk.cohen_kappa_score(labels, preds), abs=1e-12)
    assert counts.confusion.compute().sum() == 250


def test_a_row_without_answer_counts_as_wrong() -> None:
    metrics = metrics_of(np.array([0, 1, 1]), np.array([0, 1, -1]), 2)
    assert metrics["samples"] == 3 and metrics["accuracy"] == pytest.approx(2 / 3)


def test_probability_figures_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 400)
    logits = rng.normal(size=(400, 7)).astype(np.float32)
    logits[np.arange(400), labels] += 1.5
    prob = np.exp(logits.astype(np.float64))
    prob /= prob.sum(1, keepdims=True)
    metrics = model_metrics(scored_counts(logits, labels), names(7))
    assert metrics["nll"] == pytest.approx(sk.log_loss(labels, prob, labels=range(7)), rel=1e-5)
    assert metrics["brier"] == pytest.approx(((prob - np.eye(7)[labels]) ** 2).sum(1).mean(), rel=1e-5)
    for k in (1, 5):
        wanted = sk.top_k_accuracy_score(labels, prob, k=k, labels=range(7))
        assert metrics["topk_accuracy"][str(k)] == pytest.approx(wanted, abs=1e-12)
    top, right = prob.max(1), prob.argmax(1) == labels
    bins = np.minimum((top * 15).astype(int), 14)
    gaps = [abs(right[bins == m].mean() - top[bins == m].mean()) * (bins == m).mean() for m in np.unique(bins)]
    assert metrics["ece"] == pytest.approx(sum(gaps), abs=1e-6)
    assert sum(metrics["reliability"]["samples"]) == 400


def test_rows_may_be_cut_anywhere() -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(500, 20)).astype(np.float32), rng.integers(-1, 20, 500)
    scores = score_rows(logits, labels, 5)
    counts = ModelCounts(20)
    for rows in np.array_split(np.arange(500), 37):
        counts.update(
            labels[rows],
            scores.pred[rows],
            topk_BT=scores.topk[rows],
            prob_B=scores.prob[rows],
            label_logprob_B=scores.label_logprob[rows],
            sum_sq_prob_B=scores.sum_sq_prob[rows],
        )
    whole = scored_counts(logits, labels)
    assert model_metrics(counts, names(20)) == model_metrics(whole, names(20))
    assert counts.num_unlabelled == whole.num_unlabelled == (labels == -1).sum()


def test_merged_counts_are_the_whole() -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(200, 8)).astype(np.float32), rng.integers(0, 8, 200)
    merged = scored_counts(logits[:90], labels[:90])
    merged.merge(scored_counts(logits[90:], labels[90:]))
    got, wanted = (model_metrics(c, names(8)) for c in (merged, scored_counts(logits, labels)))
    assert got["report"] == wanted["report"] and got["topk_accuracy"] == wanted["topk_accuracy"]
    assert got["nll"] == pytest.approx(wanted["nll"], rel=1e-12)


def test_without_labels_nothing_is_claimed() -> None:
    metrics = metrics_of(np.full(5, -1), np.zeros(5, int), 3)
    assert metrics["samples"] == 0 and metrics["report"] is None
    undefined = ("accuracy", "balanced_accuracy", "mcc", "cohen_kappa", "nll", "brier", "ece")
    assert all(metrics[name] is None for name in undefined)
    assert metrics["topk_accuracy"] == {"1": None}
    assert metrics["confidence_intervals"]["macro_f1"] is None
    json.dumps(metrics, allow_nan=False)


@pytest.mark.parametrize("preds", [[0, 0, 0], [1, 1, 1], [-1, -1, -1]])
def test_one_class_in_the_truth_is_defined(preds: list[int]) -> None:
    metrics = metrics_of(np.zeros(3, int), np.array(preds), 2)
    json.dumps(metrics, allow_nan=False)
    assert metrics["num_classes_in_truth"] == 1 and metrics["mcc"] == 0


def test_a_head_of_one_class_is_defined() -> None:
    metrics = metrics_of(np.zeros(3, int), np.zeros(3, int), 1)
    json.dumps(metrics, allow_nan=False)
    assert metrics["accuracy"] == 1 and metrics["cohen_kappa"] is None


def test_top_k_lists_only_what_the_classes_and_the_rows_hold() -> None:
    logits, labels = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32), np.arange(9) % 8
    assert list(model_metrics(scored_counts(logits, labels, k=5), names(8))["topk_accuracy"]) == ["1", "5"]
    assert list(model_metrics(scored_counts(logits, labels, k=3), names(8))["topk_accuracy"]) == ["1"]
    assert list(model_metrics(scored_counts(logits[:, :3], labels % 3), names(3))["topk_accuracy"]) == ["1"]


def test_the_macro_average_over_the_truths_classes_stands_beside_the_whole() -> None:
    labels, preds = draw(100, 12, kind="absent")
    metrics = metrics_of(labels, preds, 12)
    present = np.unique(labels)
    wanted = sk.f1_score(labels, preds, labels=present, average="macro", zero_division=0)
    assert metrics["macro_in_truth"]["f1-score"] == pytest.approx(wanted, abs=1e-12)
    assert metrics["num_classes_in_truth"] == len(present)


def test_classes_absent_from_the_truth_are_reported() -> None:
    metrics = metrics_of(*draw(100, 12, kind="absent"), 12)
    document = {"classes": names(12), "models": {"vit": metrics}}
    (line,) = figure_notes(document)
    macro = metrics["macro_in_truth"]
    shown = f"{100 * macro['precision']:.1f} {100 * macro['recall']:.1f} {100 * macro['f1-score']:.1f}"
    assert line == f"vit: 4 of 12 classes are in the truth; macro P R F1 over these: {shown}"
    document["models"]["vit"] = metrics_of(*draw(100, 12), 12)
    assert figure_notes(document) == []


def test_repeated_and_reserved_names_get_their_id() -> None:
    assert report_names(["crane", "cat", "crane"]) == ["crane [0]", "cat", "crane [2]"]
    assert report_names(["accuracy", "cat"]) == ["accuracy [0]", "cat"]
    awkward = report_names(["crane", "crane", "crane [0]"])
    assert len(set(awkward)) == 3 and report_names(awkward) == awkward


@pytest.mark.parametrize(
    "update", [lambda c: c.update([0, 3], [0, 0]), lambda c: c.count_wrong([0, 3]), lambda c: c.update([0, 1], [0, 3])]
)
def test_a_bad_id_is_refused_before_anything_is_counted(update: object) -> None:
    counts = ModelCounts(3)
    with pytest.raises(LabelError, match="out of range"):
        update(counts)
    assert counts.num_samples == 0


def test_names_must_fit() -> None:
    with pytest.raises(UsageError, match="expected 3 names, got 2 names"):
        model_metrics(ModelCounts(3), ["a", "b"])


def test_more_than_4096_classes_are_reported() -> None:
    labels, preds = draw(3000, 5000, kind="absent")
    metrics = metrics_of(labels, preds, 5000)
    wanted = sk.f1_score(labels, preds, labels=range(5000), average="macro", zero_division=0)
    assert metrics["report"]["macro avg"]["f1-score"] == pytest.approx(wanted, abs=1e-12)


def test_compute_metrics_serves_the_trainer() -> None:
    labels, preds = draw(200, 6, kind="absent")
    logits = np.eye(6)[preds] + np.random.default_rng(0).random((200, 6)) / 2
    figures = compute_metrics(EvalPrediction(predictions=(logits, np.zeros(3)), label_ids=labels))
    assert list(figures) == ["accuracy", "precision", "recall", "f1"]
    wanted = sk.precision_recall_fscore_support(labels, preds, labels=range(6), average="macro", zero_division=0)
    assert list(figures.values())[1:] == pytest.approx(wanted[:3], abs=1e-12)
    assert figures["accuracy"] == pytest.approx((labels == preds).mean())


@pytest.mark.filterwarnings("ignore")
def test_compute_metrics_in_a_real_trainer(tmp_path: Path) -> None:
    import torch
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        num_channels=1,
        num_labels=3,
    )
    images, labels = torch.rand(20, 1, 8, 8), torch.arange(20) % 3
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    arguments = TrainingArguments(str(tmp_path), per_device_eval_batch_size=7, report_to=[], use_cpu=True)
    model = ViTForImageClassification(config)
    trainer = Trainer(model, arguments, eval_dataset=rows, compute_metrics=compute_metrics)
    figures = trainer.evaluate()
    preds = model.eval()(pixel_values=images).logits.argmax(1).numpy()
    wanted = sk.precision_recall_fscore_support(
        labels.numpy(), preds, labels=range(3), average="macro", zero_division=0
    )
    assert figures["eval_accuracy"] == pytest.approx((preds == labels.numpy()).mean())
    assert [figures[f"eval_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(wanted[:3], abs=1e-12)


def test_metrics_need_no_torch() -> None:
    code = "import sys, vitscore.metrics, vitscore.metrics.fold, vitscore.kernels.rows as r; r.score_rows\n"
    code += "assert not {'torch', 'transformers', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Intervals


@pytest.mark.parametrize(
    "num_right, num", [(0, 10), (10, 10), (7, 10), (1, 3), (499, 500), (0, 1), (123456, 1_000_000)]
)
def test_wilson_is_scipys(num_right: int, num: int) -> None:
    from scipy.stats import binomtest

    wanted = binomtest(num_right, num).proportion_ci(method="wilson")
    assert wilson(num_right, num) == pytest.approx([wanted.low, wanted.high], abs=1e-12)


def test_intervals_hold_the_figure_and_repeat_themselves() -> None:
    labels, preds = draw(400, 10, kind="skewed")
    metrics = metrics_of(labels, preds, 10)
    bounds = metrics["confidence_intervals"]
    assert bounds["level"] == 0.95 and bounds == metrics_of(labels, preds, 10)["confidence_intervals"]
    assert bounds["macro_f1"][0] < metrics["report"]["macro avg"]["f1-score"] < bounds["macro_f1"][1]
    assert bounds["weighted_f1"][0] < metrics["report"]["weighted avg"]["f1-score"] < bounds["weighted_f1"][1]
    for name in ("balanced_accuracy", "mcc", "cohen_kappa", "accuracy"):
        assert bounds[name][0] < metrics[name] < bounds[name][1]


def test_no_mistake_on_few_images_is_not_perfection() -> None:
    labels = np.arange(50) % 5
    bounds = metrics_of(labels, labels, 5)["confidence_intervals"]
    for name in ("accuracy", "macro_f1", "weighted_f1", "balanced_accuracy", "mcc", "cohen_kappa"):
        assert 0.7 < bounds[name][0] < 0.97 and bounds[name][1] == pytest.approx(1), name


@pytest.mark.parametrize("num, accuracy", [(60, 0.85), (400, 0.9)])
def test_intervals_hold_the_truth_95_times_in_100(num: int, accuracy: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "MOST_REPLICATES", 100)
    rng = np.random.default_rng(3)
    joint = np.full((4, 4), (1 - accuracy) / 3)
    np.fill_diagonal(joint, accuracy)
    joint *= np.array([0.4, 0.3, 0.2, 0.1])[:, None]
    bounds = {"macro_f1": (0.0, 1.0), "weighted_f1": (0.0, 1.0), "balanced_accuracy": (0.0, 1.0), "mcc": (-1.0, 1.0)}
    truth = class_figures(1e9 * np.diag(joint), 1e9 * joint.sum(1), 1e9 * joint.sum(0))
    held = dict.fromkeys(bounds, 0)
    for _ in range(400):
        drawn = rng.multinomial(num, joint.ravel()).reshape(4, 4)
        rows, cols = np.nonzero(drawn)
        drawn_intervals = intervals.bootstrap((rows, cols, drawn[rows, cols]), 4, class_figures, bounds=bounds)
        for name, interval in drawn_intervals.items():
            held[name] += interval[0] <= truth[name] <= interval[1]
    # 400 draws estimate a coverage to within about two points.
    assert all(0.92 <= times / 400 <= 0.985 for times in held.values()), held

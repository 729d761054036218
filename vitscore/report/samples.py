"""Choose the samples worth a look, in one pass over the parts.

A row is kept if it is in one of the most confused pairs, if the models confidently contradict its label, or if two
models confidently disagree. The number of rows kept is bounded, so memory does not grow with the run; ties go to the
earlier row, so the same parts give the same choice. Opens no shard and decodes no image. Axes: B rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vitscore.kernels.reliability import NUM_BINS
from vitscore.rundir.parts import Footer
from vitscore.rundir.rows import Rows, read_rows
from vitscore.shards.reasons import reason_kind

SAMPLES_A_PAIR = 6
MOST_MISTAKES = 500
MOST_DISAGREEMENTS = 8
BAD_A_REASON = 20

Array: TypeAlias = npt.NDArray[Any]
Cell: TypeAlias = tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """One model's answer for a sample; `pred` is -1 if it gave none."""

    pred: int
    prob: float | None
    label_prob: float | None


@dataclass(frozen=True)
class Sample:
    """One row of a part."""

    ordinal: int
    row: int
    shard: str
    key: str
    label: int
    answers: Mapping[str, Answer]

    @property
    def place(self) -> tuple[int, int]:
        return self.ordinal, self.row


@dataclass(frozen=True)
class Mistake:
    """A sample whose label the models contradict, with their answer and their mean confidence in it."""

    sample: Sample
    answer: int
    confidence: float


@dataclass
class Confidence:
    """Answers of one model by confidence, in equal bins over [0, 1]."""

    right: Array = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    wrong: Array = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    unlabelled: Array = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))

    @property
    def total(self) -> int:
        return int(self.right.sum() + self.wrong.sum() + self.unlabelled.sum())


@dataclass(frozen=True)
class Chosen:
    """The samples kept by one pass over the parts."""

    confused: dict[str, dict[Cell, list[Sample]]]
    """By model and cell of its confusion matrix, the most confident first."""
    mistakes: list[Mistake]
    disagreements: dict[tuple[str, str], tuple[list[Sample], list[Sample]]]
    """By pair of models: samples where only the first is right, and where only the second is."""
    confidence: dict[str, Confidence]
    bad: list[tuple[str, str, str]]
    """Key, shard and reason."""


class _Block:
    """A block of a part's rows; `start` is its first row's number in the shard."""

    def __init__(self, footer: Footer, start: int, rows: Rows) -> None:
        self.footer = footer
        self.start = start
        self.rows = rows
        self.label_B = rows.labels_B
        self.pred_B = {name: model.pred for name, model in rows.models.items()}
        self.prob_B = {name: np.nan_to_num(_read(model.prob)) for name, model in rows.models.items()}

    def sample(self, row: int) -> Sample:
        answers = {}
        for name, model in self.rows.models.items():
            pred, logprob = int(model.pred[row]), float(_read(model.label_logprob)[row])
            label_prob = None if np.isnan(logprob) else float(np.exp(logprob))
            answers[name] = Answer(pred, float(self.prob_B[name][row]) if pred >= 0 else None, label_prob)
        key, label = self.rows.keys[row].as_py(), int(self.label_B[row])
        return Sample(self.footer.ordinal, self.start + row, self.footer.shard, key, label, answers)


def _read(figure_B: Array | None) -> Array:
    assert figure_B is not None
    return figure_B


class _Best:
    """The samples with the highest scores, the earlier first among equals."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: list[tuple[float, tuple[int, int], Sample]] = []

    def offer(self, block: _Block, index: Array, score: Array) -> None:
        for position in np.lexsort((index, -score))[: self.most].tolist():
            value = float(score[position])
            if len(self.kept) == self.most and value <= -self.kept[-1][0]:
                break
            sample = block.sample(int(index[position]))
            self.kept = sorted([*self.kept, (-value, sample.place, sample)], key=lambda entry: entry[:2])[: self.most]

    @property
    def samples(self) -> list[Sample]:
        return [sample for _, _, sample in self.kept]


class _Choosing:
    """The samples kept so far."""

    def __init__(self, confused: Mapping[str, Sequence[Cell]], pairs: Sequence[tuple[str, str]]) -> None:
        self.models = list(confused)
        self.confused = {name: {cell: _Best(SAMPLES_A_PAIR) for cell in cells} for name, cells in confused.items()}
        self.pairs = {pair: (_Best(MOST_DISAGREEMENTS), _Best(MOST_DISAGREEMENTS)) for pair in pairs}
        self.mistakes = _Best(MOST_MISTAKES)
        self.confidence = {name: Confidence() for name in confused}
        self.bad: list[tuple[str, str, str]] = []
        self.reasons: Counter[str] = Counter()

    def add_rows(self, block: _Block) -> None:
        for name in self.models:
            self._add_confused(name, block)
            self._add_confidence(name, block)
        self._add_mistakes(block)
        for a, b in self.pairs:
            self._add_disagreements(a, b, block)
        self._add_bad(block)

    def _add_confused(self, name: str, block: _Block) -> None:
        pred_B, label_B = block.pred_B[name], block.label_B
        wrong = np.flatnonzero((label_B >= 0) & (pred_B >= 0) & (pred_B != label_B))
        labels, preds = label_B[wrong], pred_B[wrong]
        for (label, pred), best in self.confused[name].items():
            index = wrong[(labels == label) & (preds == pred)]
            best.offer(block, index, block.prob_B[name][index])

    def _add_confidence(self, name: str, block: _Block) -> None:
        pred_B, label_B, counts = block.pred_B[name], block.label_B, self.confidence[name]
        bin_B = np.clip((block.prob_B[name].astype(np.float64) * NUM_BINS).astype(int), 0, NUM_BINS - 1)
        is_right, has_label = pred_B == label_B, label_B >= 0
        groups = ((counts.right, is_right), (counts.wrong, has_label & ~is_right), (counts.unlabelled, ~has_label))
        for counts_M, is_in_B in groups:
            counts_M += np.bincount(bin_B[(pred_B >= 0) & is_in_B], minlength=NUM_BINS)

    def _add_mistakes(self, block: _Block) -> None:
        answer_B, score_B = contradictions(block.label_B, block.pred_B, block.prob_B)
        index = np.flatnonzero(answer_B >= 0)
        self.mistakes.offer(block, index, score_B[index])

    def _add_disagreements(self, a: str, b: str, block: _Block) -> None:
        label_B, a_B, b_B = block.label_B, block.pred_B[a], block.pred_B[b]
        score_B = np.minimum(block.prob_B[a], block.prob_B[b])
        is_open_B = (label_B >= 0) & (a_B >= 0) & (b_B >= 0) & (a_B != b_B)
        for best, right_B in zip(self.pairs[a, b], (a_B, b_B), strict=True):
            index = np.flatnonzero(is_open_B & (right_B == label_B))
            best.offer(block, index, score_B[index])

    def _add_bad(self, block: _Block) -> None:
        for row in np.flatnonzero(block.rows.is_bad_B).tolist():
            reason = block.rows.reasons[row].as_py() or "unknown"
            self.reasons[reason_kind(reason)] += 1
            if self.reasons[reason_kind(reason)] <= BAD_A_REASON:
                self.bad.append((block.rows.keys[row].as_py(), block.footer.shard, reason))

    def result(self) -> Chosen:
        mistakes = []
        for score, _, sample in self.mistakes.kept:
            preds = {name: np.array([answer.pred]) for name, answer in sample.answers.items()}
            probs = {name: np.array([answer.prob or 0.0]) for name, answer in sample.answers.items()}
            answer_B, _ = contradictions(np.array([sample.label]), preds, probs)
            mistakes.append(Mistake(sample, int(answer_B[0]), -score))
        return Chosen(
            {name: {cell: best.samples for cell, best in cells.items()} for name, cells in self.confused.items()},
            mistakes,
            {pair: (first.samples, second.samples) for pair, (first, second) in self.pairs.items()},
            self.confidence,
            self.bad,
        )


def contradictions(label_B: Array, pred_B: Mapping[str, Array], prob_B: Mapping[str, Array]) -> tuple[Array, Array]:
    """The strongest answer against each label, and the models' mean confidence in it.

    A model that gives another answer counts as zero, so all models' answer outranks one model's of equal confidence.

    Returns:
        The answer's class, -1 if no model contradicts the label; and its score in [0, 1].
    """
    answer_B, score_B = np.full(len(label_B), -1), np.zeros(len(label_B))
    for candidate_B in pred_B.values():
        votes_B = [np.where(pred_B[name] == candidate_B, prob_B[name], 0.0) for name in pred_B]
        mean_B = np.sum(votes_B, axis=0) / len(votes_B)
        is_better_B = (label_B >= 0) & (candidate_B >= 0) & (candidate_B != label_B) & (mean_B > score_B)
        answer_B[is_better_B], score_B[is_better_B] = candidate_B[is_better_B], mean_B[is_better_B]
    return answer_B, score_B


def choose_samples(
    parts: Mapping[int, tuple[Path, Footer]],
    *,
    confused: Mapping[str, Sequence[Cell]],
    pairs: Sequence[tuple[str, str]],
) -> Chosen:
    """Read the parts (path and footer by ordinal) once and keep the samples worth a look.

    Args:
        confused: for each model, cells of its confusion matrix (truth, prediction).
        pairs: models to find disagreements between.
    """
    choosing = _Choosing(confused, pairs)
    for path, footer in parts.values():
        start = 0
        for rows in read_rows(path, choosing.models, figures=("pred", "prob", "label_logprob")):
            choosing.add_rows(_Block(footer, start, rows))
            start += len(rows)
    return choosing.result()

"""Counts of one rank while it scores: for the progress line, the rates in run.json, and the limits that end a run.

No result is computed from these counts; results come from the parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vitscore.decode.counts import DecodedAgain
from vitscore.errors import LabelError
from vitscore.plan.options import BadLimit, judge_bad
from vitscore.ranks.ranks import Ranks
from vitscore.shards.reasons import LABEL_REASONS, reason_kind

FIRST_LABELS = 1000


@dataclass
class Tally:
    """Counts of one rank so far; one attribute per count."""

    images: int = 0
    """Samples scored."""
    bad: int = 0
    bytes: float = 0.0
    """Bytes scored, with a shard's bytes spread evenly over its samples."""
    shards: int = 0
    labelled: int = 0
    correct: dict[str, int] = field(default_factory=dict)
    labels_tried: int = 0
    labels_wrong: int = 0
    nonfinite: int = 0
    """Rows computed again in fp32 because a logit was not finite."""
    began: float = 0.0
    """When the loop began, in seconds since the epoch, so that ranks on other machines can be compared."""
    seconds: float = 0.0
    first_batch_s: float | None = None
    """From the process' start to the end of the first batch; None without a batch or if not reported by the system."""
    waiting_s: dict[str, float] = field(default_factory=dict)
    """Seconds that the loop waited, by stage (see `stage_times`)."""
    decoded_again: DecodedAgain = field(default_factory=DecodedAgain)
    audit: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model: how preprocessing and precision change predictions (see `audit`)."""

    def accuracy(self, name: str) -> float | None:
        return self.correct.get(name, 0) / self.labelled if self.labelled else None


class Judge:
    """Ends a run early if too many samples are bad; counts all ranks and earlier starts together.

    Args:
        limit: the bad samples that the run accepts.
        num_classes: K, for the message about wrong labels.
        ranks: the ranks of the run.
    """

    def __init__(self, limit: BadLimit, *, num_classes: int, ranks: Ranks) -> None:
        self._limit = limit
        self._num_classes = num_classes
        self._ranks = ranks
        self._reported = {"seen": 0, "bad": 0, "labels tried": 0, "labels wrong": 0}
        self._last_wrong = ("", "")

    def note_bad(self, tally: Tally, *, where: str, reason: str) -> None:
        """Count a bad sample; `where` is its shard and key."""
        tally.bad += 1
        if reason_kind(reason) in LABEL_REASONS:
            tally.labels_tried += 1
            tally.labels_wrong += 1
            self._last_wrong = where, reason

    def judge(self, tally: Tally) -> None:
        """Report this rank's counts to the others and judge their sums.

        Raises:
            TooManyBadError: there are more bad samples than the limit.
            LabelError: none of the first labels is a class.
            VitscoreError: another rank reported an error.
        """
        self._ranks.raise_reported_error()
        here = {
            "seen": tally.images + tally.bad,
            "bad": tally.bad,
            "labels tried": tally.labels_tried,
            "labels wrong": tally.labels_wrong,
        }
        sums = {name: self._ranks.count(name, here[name] - self._reported[name]) for name in here}
        self._reported = here
        judge_bad(self._limit, bad=sums["bad"], seen=sums["seen"], at_end=False)
        if sums["labels wrong"] == sums["labels tried"] >= FIRST_LABELS:
            where, reason = self._last_wrong
            raise LabelError(
                f"none of the first {sums['labels tried']} labels is a class",
                where=where,
                expected=f"one of {self._num_classes} classes",
                got=reason,
                next_step="Check --classes and --label-key.",
            )

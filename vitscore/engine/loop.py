"""The loop: batches in, decoded once, through every model, rows out, parts written.

    shards ─► reader and decoder (intake) ─► models and row kernel (forward) ─► ShardRows ─► part

The loop computes; it keeps no result. Counts made here are for the progress line only: the truth is in the parts, and
metrics are folded from them when all ranks are done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitscore.augment.seeds import sample_words
from vitscore.augment.stage import Stage
from vitscore.decode.make import Decoded
from vitscore.engine.audit import AUDITED_IMAGES, Audit
from vitscore.engine.forward import Awaited, Ranked, make_forward
from vitscore.engine.prefetch import Intake
from vitscore.engine.reader import Batch
from vitscore.engine.stage_times import Waits
from vitscore.errors import DataError, LabelError
from vitscore.plan.options import BadLimit, judge_bad
from vitscore.plan.plan import Plan
from vitscore.ranks.ranks import Ranks
from vitscore.rundir.parts import ShardRows
from vitscore.shards.reasons import LABEL_REASONS, NONFINITE_LOGITS, reason_kind, with_details
from vitscore.system.durable import writing
from vitscore.system.machine import process_age_s

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel

FIRST_LABELS = 1000
Array = np.ndarray[Any, Any]


@dataclass
class Tally:
    """What this rank has seen so far; for the progress line and the rates in run.json."""

    images: int = 0
    """Samples scored."""
    bad: int = 0
    bytes: float = 0.0
    """Bytes of shards done, a shard's bytes spread evenly over its samples."""
    shards: int = 0
    labelled: int = 0
    correct: dict[str, int] = field(default_factory=dict)
    labels_tried: int = 0
    labels_wrong: int = 0
    nonfinite: int = 0
    """Rows done again in fp32 because a logit was not finite."""
    began: float = 0.0
    """When the loop began, by the clock that other machines have too."""
    seconds: float = 0.0
    first_batch_s: float | None = None
    """From the process' start to the end of the first batch; None where there was none, or the system does not tell."""
    waiting_s: dict[str, float] = field(default_factory=dict)
    """What the loop waited for (see waits)."""
    audit: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By model: what preprocessing and precision change (see audit)."""

    def accuracy(self, name: str) -> float | None:
        return self.correct.get(name, 0) / self.labelled if self.labelled else None


@dataclass
class Computing:
    """A batch on its way through the models, under one condition."""

    batch: Batch
    labels: Array
    faults: Mapping[int, str]
    outputs: Awaited | None
    """None where the batch has no image."""
    suffix: str = ""
    """What the condition adds to the models' names."""
    is_last: bool = True
    """Whether no other condition of this batch follows."""
    audited: Sequence[int] = ()
    """Rows whose answers the audit wants: those to the images as they were decoded."""


class Engine:
    """Scores what an intake gives this rank.

    Args:
        plan: the run's plan.
        models: loaded, on this rank's device.
        intake: of the models' geometries; closed at the end.
        ranks: this rank's place.
        parts_folder: where the parts go.
        num_threads: threads that decode, and on a CPU batches that are computed side by side.
        on_progress: called after every batch.
    """

    def __init__(
        self,
        plan: Plan,
        models: Sequence[ImageModel],
        intake: Intake,
        *,
        ranks: Ranks,
        parts_folder: Path,
        num_threads: int,
        on_progress: Callable[[Tally], None],
    ) -> None:
        self._plan = plan
        self._models = models
        self._intake = intake
        self._num_threads = num_threads
        self._waits = Waits()
        self._audit = Audit(AUDITED_IMAGES if ranks.is_main else 0)
        self._ranks = ranks
        self._folder = parts_folder
        self._on_progress = on_progress
        is_cuda = plan["device"] == "cuda"
        self._forward = make_forward(
            models,
            device_id=ranks.local_rank if is_cuda else None,
            batch_size=plan["batch_size"],
            top_k=plan["top_k"],
            save=plan.options.save,
            num_workers=0 if plan["compile"] else num_threads,
            has_fp32_rerun=plan["precision"] != "fp32",
            tta=plan.options.tta,
        )
        assert self._forward.geometries == intake.geometries
        self._stage = Stage(
            plan.conditions(),
            plan["decoder"],
            self._forward.geometries,
            batch_size=plan["batch_size"],
            num_threads=plan.options.decode_threads or num_threads,
            device_id=ranks.local_rank if is_cuda else None,
        )
        self._limit = BadLimit.parse(plan.options.max_bad)
        self._computing: deque[Computing] = deque()
        self._gathered: dict[str, Ranked] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._writes: deque[Future[Path]] = deque()
        self._open: dict[int, ShardRows] = {}
        self._told = {"seen": 0, "bad": 0, "labels tried": 0, "labels wrong": 0}
        self._last_wrong = ("", "")
        self.tally = Tally(correct={model.name: 0 for model in models})

    def run(self) -> Tally:
        """Score until the intake is empty and every part is on disk.

        Raises:
            VitscoreError: too many bad samples, wrong labels, no space; parts that are done stay.
        """
        self.tally.began, started = time.time(), time.monotonic()
        try:
            while (taken := self._intake.take(self._waits)) is not None:
                self._compute(*taken)
            while self._computing:
                self._settle(self._computing.popleft())
            while self._writes:
                self._finish_write()
        finally:
            self._intake.close()
            self._forward.close()
            self._stage.close()
            self._writer.shutdown(wait=True)
            for work in self._open.values():
                work.discard()
        self.tally.seconds = time.monotonic() - started
        self.tally.waiting_s = {stage: round(seconds, 3) for stage, seconds in self._waits.seconds.items()}
        self.tally.audit = self._audit.findings(
            self._models,
            self._forward.source,
            batch_size=self._plan["batch_size"],
            precision=self._plan["precision"],
            num_threads=self._num_threads,
        )
        return self.tally

    def _compute(self, batch: Batch, decoded: Decoded | None) -> None:
        """Hand a decoded batch to the models; settles older ones when enough are under way."""
        if decoded is not None:
            labels = batch.labels
            last = self._stage.conditions[-1]
            audited = self._audit.keep(batch.images, decoded)
            for condition, pixels in self._stage.apply(decoded, self._words_of(batch)):
                with self._waits.on("forward"):
                    outputs = self._forward.submit(pixels, labels)
                computing = Computing(batch, labels, decoded.faults, outputs, condition.name, is_last=condition is last)
                if not condition.recipe and self._plan.options.tta == "none":
                    computing.audited = audited
                self._append(computing)
        else:
            self._append(Computing(batch, np.zeros(0, np.int32), {}, None))

    def _append(self, computing: Computing) -> None:
        self._computing.append(computing)
        while len(self._computing) > self._forward.depth:
            self._settle(self._computing.popleft())

    def _words_of(self, batch: Batch) -> Array:
        """The samples' random words; none are made where no operator is random."""
        if not self._stage.is_random:
            return np.zeros((len(batch.images), 2), np.uint32)
        samples = (
            (segment.work.footer.shard, segment.work.keys[row]) for segment in batch.segments for row in segment.rows
        )
        return sample_words(self._plan.options.augment_seed, samples)

    def _settle(self, computing: Computing) -> None:
        """Wait for a batch's predictions; once all are there, put them into the rows of their shards, and commit."""
        if computing.outputs is not None:
            with self._waits.on("forward"):
                found = computing.outputs.result()
            if computing.audited:
                self._audit.hear(computing.audited, found)
            self._gathered.update({name + computing.suffix: ranked for name, ranked in found.items()})
        if not computing.is_last:
            return
        outputs, self._gathered = self._gathered, {}
        with self._waits.on("count"):
            self._keep(computing, outputs)

    def _keep(self, computing: Computing, outputs: Mapping[str, Ranked]) -> None:
        """The loop's own work on a batch: rows, parts, counts."""
        batch = computing.batch
        touched = {id(work): work for work in batch.opened}
        self._open.update(touched)
        for work, row, reason in batch.bad:
            touched[id(work)] = work
            self._set_bad(work, row, reason)
            self.tally.bytes += work.bytes_per_row
        if computing.outputs is not None:
            self._scatter(batch, computing.faults, computing.labels, outputs)
            self.tally.first_batch_s = self.tally.first_batch_s or process_age_s()
            touched.update({id(segment.work): segment.work for segment in batch.segments})
        for key, work in touched.items():
            if work.num_open == 0:
                del self._open[key]
                self._commit(work)
            else:
                with writing(self._folder):
                    work.flush_full_groups()
        self._judge()
        self._on_progress(self.tally)

    def _scatter(self, batch: Batch, faults: Mapping[int, str], labels: Array, outputs: Mapping[str, Ranked]) -> None:
        """Rows of the batch to the rows of their shards; faults become bad rows."""
        faulty = dict(faults)
        for name, ranked in outputs.items():
            for index in np.flatnonzero(~ranked.is_finite).tolist():
                faulty.setdefault(index, with_details(NONFINITE_LOGITS, name))
        is_good = np.ones(len(labels), bool)
        is_good[list(faulty)] = False
        self._count(is_good, labels, outputs)
        self.tally.nonfinite += sum(ranked.num_redone for ranked in outputs.values())
        start = 0
        for segment in batch.segments:
            stop = start + len(segment.rows)
            for index in range(start, stop):
                if index in faulty:
                    self._set_bad(segment.work, int(segment.rows[index - start]), faulty[index])
            good = np.flatnonzero(is_good[start:stop])
            if len(good):
                chosen = {name: ranked.predictions.take(start + good) for name, ranked in outputs.items()}
                segment.work.set_predictions(segment.rows[good], chosen)
            self.tally.bytes += len(segment.rows) * segment.work.bytes_per_row
            start = stop

    def _count(self, is_good: Array, labels: Array, outputs: Mapping[str, Ranked]) -> None:
        """Running counts for the progress line."""
        counted = is_good & (labels >= 0)
        self.tally.images += int(is_good.sum())
        self.tally.labelled += int(counted.sum())
        self.tally.labels_tried += int((labels >= 0).sum())
        for name in self.tally.correct:
            self.tally.correct[name] += int((outputs[name].predictions.pred[counted] == labels[counted]).sum())

    def _set_bad(self, work: ShardRows, row: int, reason: str) -> None:
        if self._plan.options.on_bad_sample == "fail":
            raise DataError(
                "bad sample",
                where=f"{work.footer.shard}[{work.keys[row]}]",
                got=reason,
                next_step="Mend it, or score anew with --on-bad-sample skip --overwrite.",
            )
        work.set_bad(row, reason)
        self.tally.bad += 1
        if reason_kind(reason) in LABEL_REASONS:
            self.tally.labels_tried += 1
            self.tally.labels_wrong += 1
            self._last_wrong = f"{work.footer.shard}[{work.keys[row]}]", reason

    def _judge(self) -> None:
        """End the run early where it cannot become a good one; all ranks and earlier starts are counted together."""
        self._ranks.raise_reported_error()
        here = {
            "seen": self.tally.images + self.tally.bad,
            "bad": self.tally.bad,
            "labels tried": self.tally.labels_tried,
            "labels wrong": self.tally.labels_wrong,
        }
        sums = {name: self._ranks.count(name, here[name] - self._told[name]) for name in here}
        self._told = here
        judge_bad(self._limit, bad=sums["bad"], seen=sums["seen"], at_end=False)
        if sums["labels wrong"] == sums["labels tried"] >= FIRST_LABELS:
            where, reason = self._last_wrong
            raise LabelError(
                f"none of the first {sums['labels tried']} labels is a class",
                where=where,
                expected=f"one of {len(self._plan.classes)} classes",
                got=reason,
                next_step="Check --classes and --label-key.",
            )

    def _commit(self, work: ShardRows) -> None:
        self._ranks.require_group()
        self._writes.append(self._writer.submit(work.commit))
        while len(self._writes) > 4 or (self._writes and self._writes[0].done()):
            self._finish_write()

    def _finish_write(self) -> None:
        with writing(self._folder), self._waits.on("write"):
            self._writes.popleft().result()
        self.tally.shards += 1

"""The loop: batches in, decoded once, through every model, rows out, parts written.

    shards ─► reader and decoder (prefetch) ─► models and row kernel (forward) ─► rows ─► part

The loop keeps no results. Metrics are folded from the parts after all ranks are done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vitscore.augment.seeds import sample_words
from vitscore.augment.stage import Stage
from vitscore.decode.pixels import Decoded
from vitscore.engine.audit import AUDITED_IMAGES, Audit
from vitscore.engine.forward import make_forward
from vitscore.engine.prefetch import Intake
from vitscore.engine.ranked import Awaited, Ranked
from vitscore.engine.reader import Batch, ShardSamples
from vitscore.engine.stage_times import StageTimes
from vitscore.engine.tally import Judge, Tally
from vitscore.errors import DataError
from vitscore.plan.choices import Execution, Measured
from vitscore.plan.options import BadLimit
from vitscore.plan.plan import Plan
from vitscore.ranks.ranks import Ranks
from vitscore.rundir.open_parts import OpenParts
from vitscore.rundir.parts import Footer
from vitscore.shards.reasons import NONFINITE_LOGITS, with_details
from vitscore.system.machine import process_age_s

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel

Array = np.ndarray[Any, Any]


@dataclass
class Computing:
    """A batch in flight through the models, under one condition."""

    batch: Batch
    faults: Mapping[int, str]
    outputs: Awaited | None
    """None for a batch without images."""
    suffix: str = ""
    """The suffix that the condition adds to the models' names."""
    is_last: bool = True
    """Whether no other condition of this batch follows."""
    audited: Sequence[int] = ()
    """Rows whose predictions the audit compares; only for unmodified images."""


class RowRecorder:
    """Writes predictions, faults and labels of batches into the parts of their shards, and counts them.

    Args:
        plan: the run's plan.
        parts: the parts that are being written.
        ranks: the ranks of the run.
        tally: counts, updated in place.
        on_progress: called after every batch.
    """

    def __init__(
        self, plan: Plan, parts: OpenParts, *, ranks: Ranks, tally: Tally, on_progress: Callable[[Tally], None]
    ) -> None:
        self._parts = parts
        self._identity = plan.identity_hash
        self._fails_on_bad = plan.options.on_bad_sample == "fail"
        self._judge = Judge(BadLimit.parse(plan.options.max_bad), num_classes=len(plan.classes), ranks=ranks)
        self._on_progress = on_progress
        self.tally = tally

    def record(self, batch: Batch, faults: Mapping[int, str], outputs: Mapping[str, Ranked] | None) -> None:
        """Record a batch, and commit the parts that it completes.

        Args:
            batch: the batch as the reader made it.
            faults: reasons by row of the batch, for images that could not be decoded.
            outputs: predictions by model; None for a batch without images.

        Raises:
            VitscoreError: too many bad samples, wrong labels, no space.
        """
        for samples in batch.opened:
            self._parts.open(self._footer(samples), samples.keys)
        for block in batch.label_blocks:
            rows = np.arange(block.start, block.start + len(block.labels))
            self._parts[block.samples.shard.ordinal].set_labels(rows, block.labels)
        for samples, row, reason in batch.bad:
            self._set_bad(samples, row, reason)
            self.tally.bytes += self._parts[samples.shard.ordinal].bytes_per_row
        if outputs is not None:
            self._scatter(batch, faults, outputs)
            self.tally.first_batch_s = self.tally.first_batch_s or process_age_s()
        touched = [*batch.opened, *(samples for samples, _, _ in batch.bad)]
        touched += [segment.samples for segment in batch.segments]
        self._parts.advance(samples.shard.ordinal for samples in touched)
        self.tally.shards = self._parts.num_written
        self._judge.judge(self.tally)
        self._on_progress(self.tally)

    def _footer(self, samples: ShardSamples) -> Footer:
        return Footer(
            identity=self._identity,
            ordinal=samples.shard.ordinal,
            shard=samples.shard.name,
            num_bytes=samples.num_bytes,
            expected=len(samples.keys),
            bad=0,
            fault=samples.fault,
            notes=samples.notes,
        )

    def _scatter(self, batch: Batch, faults: Mapping[int, str], outputs: Mapping[str, Ranked]) -> None:
        """Copy the batch's rows into the rows of their shards; rows with faults become bad."""
        labels = batch.labels
        faulty = dict(faults)
        for name, ranked in outputs.items():
            for index in np.flatnonzero(~ranked.is_finite).tolist():
                faulty.setdefault(index, with_details(NONFINITE_LOGITS, name))
        is_good = np.ones(len(labels), bool)
        is_good[list(faulty)] = False
        self._count(is_good, labels, outputs)
        start = 0
        for segment in batch.segments:
            rows = self._parts[segment.samples.shard.ordinal]
            stop = start + len(segment.rows)
            for index in range(start, stop):
                if index in faulty:
                    self._set_bad(segment.samples, int(segment.rows[index - start]), faulty[index])
            good = np.flatnonzero(is_good[start:stop])
            if len(good):
                chosen = {name: ranked.predictions.take(start + good) for name, ranked in outputs.items()}
                rows.set_predictions(segment.rows[good], chosen)
            self.tally.bytes += len(segment.rows) * rows.bytes_per_row
            start = stop

    def _count(self, is_good: Array, labels: Array, outputs: Mapping[str, Ranked]) -> None:
        counted = is_good & (labels >= 0)
        self.tally.images += int(is_good.sum())
        self.tally.labelled += int(counted.sum())
        self.tally.labels_tried += int((labels >= 0).sum())
        for name in self.tally.correct:
            self.tally.correct[name] += int((outputs[name].predictions.pred[counted] == labels[counted]).sum())
        self.tally.nonfinite += sum(ranked.num_redone for ranked in outputs.values())

    def _set_bad(self, samples: ShardSamples, row: int, reason: str) -> None:
        where = f"{samples.shard.name}[{samples.keys[row]}]"
        if self._fails_on_bad:
            next_step = "Mend it, or score anew with --on-bad-sample skip --overwrite."
            raise DataError("bad sample", where=where, got=reason, next_step=next_step)
        self._parts[samples.shard.ordinal].set_bad(row, reason)
        self._judge.note_bad(self.tally, where=where, reason=reason)


class Engine:
    """Scores the batches of this rank's intake.

    Args:
        plan: the run's plan.
        models: loaded models, on this rank's device.
        intake: decoded batches in the models' geometries; closed at the end.
        ranks: the ranks of the run.
        parts_folder: the folder to write parts to.
        execution: the device and threads of this rank.
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
        execution: Execution,
        on_progress: Callable[[Tally], None],
    ) -> None:
        self._plan = plan
        self._models = models
        self._intake = intake
        self._execution = execution
        self._times = StageTimes()
        self._audit = Audit(AUDITED_IMAGES if ranks.is_main else 0)
        self._forward = make_forward(
            models,
            device_id=execution.device_id,
            batch_size=plan.choices.batch_size,
            top_k=plan.choices.top_k,
            save=plan.options.save,
            num_workers=execution.num_workers,
            has_fp32_rerun=plan.choices.precision != "fp32",
            tta=plan.options.tta,
        )
        assert self._forward.geometries == intake.geometries
        self._stage = Stage(
            plan.conditions(),
            plan.choices.decoder,
            self._forward.geometries,
            batch_size=plan.choices.batch_size,
            num_threads=execution.decode_threads,
            device_id=execution.device_id,
        )
        self._computing: deque[Computing] = deque()
        self._gathered: dict[str, Ranked] = {}
        self._parts = OpenParts(
            parts_folder,
            plan.columns({model.name: model.embedding_dim for model in models}),
            before_commit=ranks.require_group,
            waiting=partial(self._times.on, "write"),
        )
        tally = Tally(correct={model.name: 0 for model in models})
        self._recorder = RowRecorder(plan, self._parts, ranks=ranks, tally=tally, on_progress=on_progress)

    @property
    def launches(self) -> Mapping[str, Measured]:
        """By model, how its forward is launched; empty on a CPU."""
        return self._forward.measured

    def run(self) -> Tally:
        """Score until the intake is exhausted and every part is on disk.

        Raises:
            VitscoreError: too many bad samples, wrong labels, no space; finished parts stay.
        """
        tally = self._recorder.tally
        tally.began, started = time.time(), time.monotonic()
        try:
            while (taken := self._intake.take(self._times)) is not None:
                self._compute(*taken)
            while self._computing:
                self._settle(self._computing.popleft())
            self._parts.finish()
        finally:
            self._intake.close()
            self._forward.close()
            self._stage.close()
            self._parts.close()
        tally.shards = self._parts.num_written
        tally.seconds = time.monotonic() - started
        tally.waiting_s = {stage: round(seconds, 3) for stage, seconds in self._times.seconds.items()}
        tally.decoded_again = self._intake.decoded_again
        tally.audit = self._audit.findings(
            self._models,
            self._forward.source,
            batch_size=self._plan.choices.batch_size,
            precision=self._plan.choices.precision,
            num_threads=self._execution.threads,
        )
        return tally

    def _compute(self, batch: Batch, decoded: Decoded | None) -> None:
        """Submit a decoded batch to the models; settle the oldest once enough are in flight."""
        if decoded is None:
            self._append(Computing(batch, {}, None))
            return
        labels = batch.labels
        last = self._stage.conditions[-1]
        audited = self._audit.keep(batch.images, decoded)
        for condition, pixels in self._stage.apply(decoded, self._words_of(batch)):
            with self._times.on("forward"):
                outputs = self._forward.submit(pixels, labels)
            computing = Computing(batch, decoded.faults, outputs, condition.name, is_last=condition is last)
            if not condition.recipe and self._plan.options.tta == "none":
                computing.audited = audited
            self._append(computing)

    def _append(self, computing: Computing) -> None:
        self._computing.append(computing)
        while len(self._computing) > self._forward.depth:
            self._settle(self._computing.popleft())

    def _words_of(self, batch: Batch) -> Array:
        """Return the samples' random words; zeros if no operator is random."""
        if not self._stage.is_random:
            return np.zeros((len(batch.images), 2), np.uint32)
        samples = (
            (segment.samples.shard.name, segment.samples.keys[row])
            for segment in batch.segments
            for row in segment.rows
        )
        return sample_words(self._plan.options.augment_seed, samples)

    def _settle(self, computing: Computing) -> None:
        """Wait for a batch's predictions; after its last condition, record the batch."""
        if computing.outputs is not None:
            with self._times.on("forward"):
                outputs = computing.outputs.result()
            if computing.audited:
                self._audit.add_answers(computing.audited, outputs)
            self._gathered.update({name + computing.suffix: ranked for name, ranked in outputs.items()})
        if not computing.is_last:
            return
        gathered, self._gathered = self._gathered, {}
        with self._times.on("count"):
            has_images = computing.outputs is not None
            self._recorder.record(computing.batch, computing.faults, gathered if has_images else None)

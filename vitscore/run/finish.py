"""The end of a run on rank 0: fold the parts, write the metrics and the report, judge the ledger.

Results are read from disk. From the loop only the figures for run.json are used.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscore.decode.counts import DecodedAgain
from vitscore.errors import DataError, LabelError, LedgerError, SetupError, TooManyBadError
from vitscore.plan.options import BadLimit, RunOptions
from vitscore.plan.plan import Plan
from vitscore.ranks.ranks import POLL_S, SHARED_S, Ranks
from vitscore.run import sessions
from vitscore.run.bottleneck import Bottleneck, find_bottleneck
from vitscore.rundir.folder import RunFolder, require_record
from vitscore.rundir.parts import finished_parts
from vitscore.shards.reasons import LABEL_REASONS, UNREACHABLE, reason_kind
from vitscore.system.durable import writing
from vitscore.system.machine import peak_rss_bytes

if TYPE_CHECKING:
    from vitscore.engine.tally import Tally
    from vitscore.kernels.counts import Confusion
    from vitscore.metrics.fold import Folded


@dataclass(frozen=True)
class Outcome:
    """Result of a finished run. `problem` is the error that decides its exit code; the files are written even so."""

    plan: Plan
    folder: Path
    document: dict[str, Any]
    problem: Exception | None
    images_per_s: float | None
    notes: tuple[str, ...] = ()
    """Notes for the user on shards, repeated decoding and the report."""
    confusions: Mapping[str, Confusion] = field(default_factory=dict)
    bottleneck: Bottleneck | None = None


def finish_run(ranks: Ranks, plan: Plan, folder: RunFolder, tally: Tally | None, session_id: str) -> Outcome:
    """Fold the parts, write the metrics and judge the ledger, on rank 0 after all ranks are done.

    Raises:
        LedgerError: a shard has no part, or its counts do not add up.
        SetupError: the metrics cannot be written.
    """
    from vitscore.metrics.fold import refold, write_metrics

    deadline = time.monotonic() + (SHARED_S if ranks.local_world_size < ranks.world_size else 0)
    while True:
        parts = finished_parts(folder.parts, plan.identity_hash)
        absent = [shard.name for shard in plan.shards if shard.ordinal not in parts]
        if not absent or time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise LedgerError("shard has no part", where=absent[0] + more, next_step="Run the same command again.")
    folded = refold(folder.path, parts=parts)
    rate = bound = None
    again = DecodedAgain()
    with writing(folder.path):
        write_metrics(folder.path, folded)
        if tally is not None:
            by_rank = [ranks.count(f"scored by {rank}", 0) for rank in range(ranks.world_size)]
            # From the first rank's start to the last rank's end, since ranks may start late or finish early.
            loops = ranks.loops()
            images, seconds = sum(by_rank), max(ended for _, ended in loops)
            rate = images / seconds if seconds else None
            cpus = plan.execution(local_world_size=ranks.local_world_size).threads
            bound = find_bottleneck(
                tally.waiting_s, seconds, plan=plan, ranks=ranks.world_size, cpus=cpus, images_per_s=rate
            )
            again = DecodedAgain(**{name: ranks.count(f"decoded again: {name}", 0) for name in asdict(DecodedAgain())})
            sessions.end_session(
                folder,
                session_id,
                {
                    "images": images,
                    "images_by_rank": by_rank,
                    "loop_s_by_rank": [[round(began, 3), round(ended, 3)] for began, ended in loops],
                    "seconds": round(seconds, 3),
                    "first_batch_s": round(tally.first_batch_s, 2) if tally.first_batch_s is not None else None,
                    "images_per_s": round(rate, 2) if rate else None,
                    "waiting_s": tally.waiting_s,
                    "bottleneck": asdict(bound) if bound else None,
                    "rows_again_in_fp32": ranks.count("again in fp32", 0),
                    "decoded_again": asdict(again),
                    "peak_rss_bytes": peak_rss_bytes(),
                    "audit": tally.audit,
                },
            )
    notes = tuple(f"{footer.shard}: {note}" for _, footer in parts.values() for note in footer.notes)
    if said := again.sentence():
        notes += (said,)
    notes += report_run(folder, folded)
    problem = find_problem(plan.options, folded.document)
    return Outcome(plan, folder.path, folded.document, problem, rate, notes, folded.confusions, bound)


def report_run(folder: RunFolder, folded: Folded) -> tuple[str, ...]:
    """Write report.html. If rendering fails, return a note instead: the run's results are complete without the report.

    Raises:
        SetupError: the file cannot be written.
    """
    from vitscore.report import write_report

    try:
        write_report(folder.path, folded, require_record(folder.path))
    except SetupError:
        raise
    except Exception as error:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return (f"report.html was not made ({cause}); `vitscore report {folder.path} --debug` shows the traceback",)
    return ()


def find_problem(options: RunOptions, document: dict[str, Any]) -> Exception | None:
    """Return the error that the ledger calls for (wrong labels, bad shards, too many bad samples), or None."""
    from vitscore.plan.options import judge_bad

    ledger = document["ledger"]
    wrong_labels = sum(count for reason, count in ledger["reasons"].items() if reason in LABEL_REASONS)
    if wrong_labels and ledger["scored"] == ledger["unlabelled"]:
        return LabelError(
            "no label is a class",
            where=f"{wrong_labels} labels",
            expected=f"one of {len(document['classes'])} classes",
            got=", ".join(sorted(LABEL_REASONS & set(ledger["reasons"]))),
            next_step="Check --classes, --labels and --label-key; the reasons are in the parts.",
        )
    bad_shards: dict[str, str] = ledger["shards"]["bad"]
    if bad_shards and options.on_bad_shard == "fail":
        name, reason = next(iter(bad_shards.items()))
        more = f" and {len(bad_shards) - 1} more" if len(bad_shards) > 1 else ""
        next_step = (
            "Its readable samples are scored. Repair it and use --overwrite, or add --on-bad-shard skip --overwrite."
        )
        if reason_kind(reason) == UNREACHABLE:
            next_step = "All other shards are scored. Run the same command again to retry the unreachable ones."
        return DataError("bad shard", where=name + more, got=reason, next_step=next_step)
    try:
        judge_bad(BadLimit.parse(options.max_bad), bad=ledger["bad"], seen=ledger["expected"], at_end=True)
    except TooManyBadError as error:
        return error
    return None

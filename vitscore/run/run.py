"""A run from beginning to end: join the ranks, plan, score, wait for the other ranks, fold the parts.

    rank 0:   plan ─► load models ─► open folder ─► publish the plan ─► score ─► wait for all ─► fold ─► metrics.json
    others:                          take the plan ─► load models ────► score ─► report "done"

On a CPU, the first batches are read and decoded while the models load (see `prefetch.Prefetch`).

Nothing here prints; a caller can follow the run through an `Observer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vitscore.errors import SetupError, VitscoreError
from vitscore.plan.options import RunOptions
from vitscore.plan.plan import Plan, make_plan, require_labels_file
from vitscore.ranks import ranks as ranks_module
from vitscore.ranks.ranks import Ranks
from vitscore.run import sessions
from vitscore.run.finish import Outcome, finish_run
from vitscore.run.join import join_run, open_run
from vitscore.run.load import execution_of, make_intake
from vitscore.run.progress import Observer, Reporter
from vitscore.rundir.folder import RunFolder
from vitscore.system.libraries import prepare_allocator, prepare_math_library

if TYPE_CHECKING:
    from vitscore.engine.prefetch import Intake, Prefetch
    from vitscore.engine.tally import Tally
    from vitscore.models.image_model import ImageModel


def plan_only(options: RunOptions) -> Plan:
    """Plan a run and check its output folder, without writing or scoring anything (`--dry-run`)."""
    require_labels_file(options)
    folder = RunFolder(options.output)
    plan = make_plan(options, kept={} if options.overwrite else sessions.kept_choices(folder, asked=options))
    if not options.overwrite:
        sessions.check_folder(folder, plan)
    return plan


def run(options: RunOptions, observer: Observer) -> Outcome | None:
    """Run on this rank; return the outcome on rank 0 and None on the others.

    Raises:
        VitscoreError: the run failed. Finished parts stay, and the same call resumes from them.
    """
    require_labels_file(options)
    prepare_math_library()
    prepare_allocator()
    ranks = ranks_module.join(choose_backend(options.device))
    try:
        return run_as(ranks, options, observer)
    except Exception as error:
        if ranks_module.is_lost_connection(error):
            # The error cannot be reported to the other ranks: the store itself is lost.
            raise lost_ranks(error) from error
        ranks.report_error(error)
        raise
    except BaseException as stop:
        ranks.report_error(stop, is_patient=False)
        raise
    finally:
        ranks.close()


def lost_ranks(error: Exception) -> SetupError:
    return SetupError(
        "ranks lost each other",
        where=type(error).__name__,
        next_step="Run the same command again to resume.",
    )


def choose_backend(device: str) -> str:
    """Return the device that decides the process group's backend, which a rank needs before rank 0 has planned."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_as(ranks: Ranks, options: RunOptions, observer: Observer) -> Outcome | None:
    from vitscore.engine.prefetch import Prefetch

    with contextlib.closing(Prefetch()) as prefetch:
        return run_with(prefetch, ranks, options, observer)


def run_with(prefetch: Prefetch, ranks: Ranks, options: RunOptions, observer: Observer) -> Outcome | None:
    folder = RunFolder(options.output)
    if not ranks.is_main:
        plan, models, done = join_run(ranks, options, folder, prefetch)
        take_part(ranks, plan, models, done, folder, observer, prefetch)
        ranks.wait_for_metrics()
        return None
    session = sessions.make_session(world_size=ranks.world_size)
    if options.overwrite and sessions.is_restart_of(folder, session):
        options = dataclasses.replace(options, overwrite=False)
    try:
        plan, models, done = open_run(ranks, options, folder, session, prefetch)
        observer.planned(plan, num_done=len(done))
        observer.loaded([note for model in models for note in model.notes])
        tally = take_part(ranks, plan, models, done, folder, observer, prefetch)
        for left in ranks.wait_for_all():
            observer.waiting(left)
        observer.finished()
        outcome = finish_run(ranks, plan, folder, tally, session["id"])
    except BaseException as error:
        with contextlib.suppress(Exception):
            why = str(error) if isinstance(error, VitscoreError) else type(error).__name__
            sessions.end_session(folder, session["id"], {"stopped_by": why})
        raise
    ranks.announce_metrics()
    return outcome


def take_part(
    ranks: Ranks,
    plan: Plan,
    models: list[ImageModel],
    done: set[int],
    folder: RunFolder,
    observer: Observer,
    prefetch: Prefetch,
) -> Tally | None:
    """Score this rank's share of the shards; return None if none was left."""
    tally = None
    if models:
        from vitscore.engine.warm_up import on_device

        with on_device(plan, ranks.local_rank):
            geometries = [model.geometry for model in models]
            intake = prefetch.take() or make_intake(plan, geometries, ranks=ranks, done=done)
            tally = score(ranks, plan, models, folder, intake, num_done=len(done), observer=observer)
        ranks.count(f"scored by {ranks.rank}", tally.images)
        ranks.count("again in fp32", tally.nonfinite)
        for name, amount in dataclasses.asdict(tally.decoded_again).items():
            ranks.count(f"decoded again: {name}", amount)
        ranks.publish(f"loop/{ranks.rank}", [tally.began, tally.began + tally.seconds])
    ranks.finish()
    return tally


def score(
    ranks: Ranks,
    plan: Plan,
    models: Sequence[ImageModel],
    folder: RunFolder,
    intake: Intake,
    *,
    num_done: int,
    observer: Observer,
) -> Tally:
    """Run the engine on this rank's batches."""
    import torch

    from vitscore.engine.loop import Engine

    execution = execution_of(plan, ranks)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(execution.torch_threads)
    try:
        engine = Engine(
            plan,
            models,
            intake,
            ranks=ranks,
            parts_folder=folder.parts,
            execution=execution,
            on_progress=Reporter(ranks, plan, num_done, observer),
        )
        if ranks.is_main:
            sessions.note_measured(folder, plan.measured, engine.launches)
        return engine.run()
    finally:
        intake.close()
        torch.set_num_threads(threads_before)

"""A run from beginning to end: join the ranks, plan, score, wait for the slowest, fold the parts.

    rank 0:   plan ─► load models ─► open folder ─► tell the others ─► score ─► wait for all ─► fold ─► metrics.json
    the rest:                        read the record ─► load models ─► score ─► say "done"

While a CPU's models are loaded, the first batches are read and decoded (see `intake.Ahead`).

Nothing here prints; whoever calls may watch through `Observer`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from vitscore.errors import SetupError, VitscoreError
from vitscore.models import checkpoint as checkpoints
from vitscore.plan.options import RunOptions
from vitscore.plan.plan import Plan, make_plan, require_labels_file
from vitscore.ranks import ranks as ranks_module
from vitscore.ranks.ranks import POLL_S, SHARED_S, Ranks
from vitscore.ranks.shard_queue import HandOut
from vitscore.run import sessions
from vitscore.run.finish import Outcome, conclude
from vitscore.run.progress import Observer, Reporter
from vitscore.rundir.folder import RunFolder
from vitscore.rundir.parts import finished_parts
from vitscore.shards.reasons import UNREACHABLE, reason_kind
from vitscore.system.libraries import prepare_allocator, prepare_math_library
from vitscore.system.machine import num_usable_cpus

if TYPE_CHECKING:
    from vitscore.decode.make import AnyGeometry
    from vitscore.engine.prefetch import Ahead, Intake
    from vitscore.engine.tally import Tally
    from vitscore.models.image_model import ImageModel


def plan_only(options: RunOptions) -> Plan:
    """`--dry-run`: everything that can be refused is refused, nothing is written, nothing scored."""
    require_labels_file(options)
    folder = RunFolder(options.output)
    plan = make_plan(options, kept={} if options.overwrite else sessions.kept_choices(folder, asked=options))
    if not options.overwrite:
        sessions.check_folder(folder, plan)
    return plan


def run(options: RunOptions, observer: Observer) -> Outcome | None:
    """Score, on this rank; returns the outcome on rank 0 and None elsewhere.

    Raises:
        VitscoreError: what went wrong; parts that are done stay, and the same call goes on from them.
    """
    require_labels_file(options)
    prepare_math_library()
    prepare_allocator()
    ranks = ranks_module.join(choose_backend(options.device))
    try:
        return run_as(ranks, options, observer)
    except Exception as error:
        if ranks_module.is_lost_connection(error):
            # Nobody is left to be told: the store is what was lost.
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
        next_step="The same command goes on from the parts that are done.",
    )


def choose_backend(device: str) -> str:
    """The device that decides the process group's backend; a rank knows it before rank 0 has resolved anything."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def run_as(ranks: Ranks, options: RunOptions, observer: Observer) -> Outcome | None:
    from vitscore.engine.prefetch import Ahead

    with contextlib.closing(Ahead()) as ahead:
        return run_with(ahead, ranks, options, observer)


def run_with(ahead: Ahead, ranks: Ranks, options: RunOptions, observer: Observer) -> Outcome | None:
    folder = RunFolder(options.output)
    if not ranks.is_main:
        plan, models, done = join_run(ranks, options, folder, ahead)
        take_part(ranks, plan, models, done, folder, observer, ahead)
        ranks.wait_for_conclusion()
        return None
    session = sessions.make_session(world_size=ranks.world_size)
    if options.overwrite and sessions.is_restart_of(folder, session):
        options = dataclasses.replace(options, overwrite=False)
    try:
        plan, models, done = open_run(ranks, options, folder, session, ahead)
        observer.planned(plan, num_done=len(done))
        observer.loaded([note for model in models for note in model.notes])
        tally = take_part(ranks, plan, models, done, folder, observer, ahead)
        for left in ranks.wait_for_all():
            observer.waiting(left)
        observer.finished()
        outcome = conclude(ranks, plan, folder, tally, session["id"])
    except BaseException as error:
        with contextlib.suppress(Exception):
            why = str(error) if isinstance(error, VitscoreError) else type(error).__name__
            sessions.end_session(folder, session["id"], {"stopped_by": why})
        raise
    ranks.conclude()
    return outcome


def take_part(
    ranks: Ranks,
    plan: Plan,
    models: list[ImageModel],
    done: set[int],
    folder: RunFolder,
    observer: Observer,
    ahead: Ahead,
) -> Tally | None:
    """Score this rank's share; None where nothing was left to score."""
    tally = None
    if models:
        from vitscore.engine.warm_up import on_device

        with on_device(plan, ranks.local_rank):
            intake = ahead.take() or make_intake(
                plan,
                [model.geometry for model in models],
                ranks=ranks,
                done=done,
            )
            tally = score(ranks, plan, models, folder, intake, num_done=len(done), observer=observer)
        ranks.count(f"scored by {ranks.rank}", tally.images)
        ranks.count("again in fp32", tally.nonfinite)
        ranks.publish(f"loop/{ranks.rank}", [tally.began, tally.began + tally.seconds])
    ranks.finish()
    return tally


def load_where_needed(ahead: Ahead, plan: Plan, *, ranks: Ranks, done: set[int]) -> list[ImageModel]:
    """The models, with the first batches begun meanwhile; none where no shard is left."""
    if len(done) >= len(plan.shards):
        return []
    decode_ahead(ahead, plan, ranks=ranks, done=done)
    return load_models(plan, ranks)


def decode_ahead(ahead: Ahead, plan: Plan, *, ranks: Ranks, done: set[int]) -> None:
    """Begin to read and decode, where nothing that it takes hangs on the models' weights or on a GPU's memory."""
    if plan["device"] != "cpu":
        return
    from vitscore.models.loading import geometry_of
    from vitscore.preprocess import Geometry

    geometries = [geometry_of(planned.checkpoint) for planned in plan.models]
    if all(isinstance(geometry, Geometry) for geometry in geometries):
        ahead.start(partial(make_intake, plan, geometries, ranks=ranks, done=done))


def make_intake(
    plan: Plan,
    geometries: Sequence[AnyGeometry],
    *,
    ranks: Ranks,
    done: set[int],
) -> Intake:
    """The batches of this rank's share.

    Args:
        plan: the run's plan.
        geometries: the models', in their order.
        ranks: this rank's place.
        done: ordinals that are not handed out.
    """
    from vitscore.engine.prefetch import Intake

    return Intake(
        plan,
        list(dict.fromkeys(geometries)),
        positions=HandOut(ranks, plan.shards, done),
        num_threads=num_threads(ranks),
        device_id=ranks.local_rank if plan["device"] == "cuda" else None,
    )


def open_run(
    ranks: Ranks, options: RunOptions, folder: RunFolder, session: dict[str, Any], ahead: Ahead
) -> tuple[Plan, list[ImageModel], set[int]]:
    """On rank 0: plan, load, open the folder, tell the other ranks; returns plan, models and the ordinals done.

    All that can be refused is refused, and the models are loaded, before anything of an older run is removed. Text
    weights are then in the cache, where the other ranks find them.
    """
    kept = {} if options.overwrite else sessions.kept_choices(folder, asked=options)
    plan = make_plan(options, kept=kept)
    is_resumed = not options.overwrite and sessions.check_folder(folder, plan)
    if not is_resumed:
        sessions.check_foreign(folder)
    done: set[int] = set()
    if is_resumed:
        plan = sessions.resume(folder, plan)
        parts = finished_parts(folder.parts, plan.identity_hash)
        # A shard that could not be reached may be there now.
        done = {ordinal for ordinal, (_, footer) in parts.items() if reason_kind(footer.fault or "") != UNREACHABLE}
        ranks.count("bad", sum(footer.bad for _, footer in parts.values()))
        ranks.count("seen", sum(footer.expected for _, footer in parts.values()))
        ranks.count("labels tried", sum(footer.expected - footer.bad for _, footer in parts.values()))
    models = load_where_needed(ahead, plan, ranks=ranks, done=done)
    plan = warmed_up(plan, models, ranks, may_lower=not is_resumed and options.batch_size is None)
    if not is_resumed:
        sessions.clear(folder)
        costs = {model.name: model.cost() for model in models}
        sessions.start(folder, plan, session=session, costs=costs)
    elif models:
        sessions.begin_session(folder, session)
    told = session["id"] if models or not is_resumed else None
    ranks.publish("plan", {"identity": plan.identity_hash, "session": told, "done": sorted(done)})
    return plan, models, done


def join_run(
    ranks: Ranks, options: RunOptions, folder: RunFolder, ahead: Ahead
) -> tuple[Plan, list[ImageModel], set[int]]:
    """On the other ranks: the plan that rank 0 has written into the shared folder."""
    import_ahead(options)
    told = ranks.wait_for("plan")
    record = shared_record(ranks, folder, told)
    plan = make_plan(options, kept=sessions.kept_choices(folder), with_fingerprints=False)
    planned = tuple(
        dataclasses.replace(model, fingerprint=record["models"][model.name]["fingerprint"]) for model in plan.models
    )
    plan = dataclasses.replace(plan, identity=record["identity"], models=planned)
    plan, done = sessions.resume(folder, plan), set(told["done"])
    models = load_where_needed(ahead, plan, ranks=ranks, done=done)
    return warmed_up(plan, models, ranks, may_lower=False), models, done


def shared_record(ranks: Ranks, folder: RunFolder, told: Mapping[str, Any]) -> dict[str, Any]:
    """The run.json that rank 0 wrote at this very start; a network's file system may show it a little later.

    Raises:
        SetupError: it does not appear: this rank sees another folder.
    """
    deadline = time.monotonic() + SHARED_S
    while True:
        record = folder.read_record()
        if record is not None and record["identity_hash"] == told["identity"]:
            if told["session"] in (None, *(session.get("id") for session in record["sessions"])):
                return record
        if time.monotonic() > deadline:
            raise SetupError(
                "output folder is not shared",
                where=f"{folder.path} on rank {ranks.rank}",
                expected="the run.json that rank 0 wrote",
                got="another" if record else "none",
                next_step="Put -o on a file system that all nodes share.",
            )
        ranks.raise_reported_error()
        time.sleep(POLL_S)


def import_ahead(options: RunOptions) -> None:
    """Import what this rank will need while rank 0 plans and loads; whatever is wrong, rank 0 says it."""
    import transformers

    import vitscore.engine.loop
    import vitscore.models.image_model  # noqa: F401

    with contextlib.suppress(Exception):
        for source in checkpoints.parse_models(options.model).values():
            getattr(transformers, checkpoints.find(source).architecture)


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

    threads = num_threads(ranks)
    threads_before = torch.get_num_threads()
    # Eager forwards on a CPU run side by side, one a thread, with one thread inside torch each (see forward.py).
    torch.set_num_threads(threads if plan["compile"] else 1)
    try:
        engine = Engine(
            plan,
            models,
            intake,
            ranks=ranks,
            parts_folder=folder.parts,
            num_threads=threads,
            on_progress=Reporter(ranks, plan, num_done, observer),
        )
        if ranks.is_main:
            sessions.note_measured(folder, plan.measured, engine.launches)
        return engine.run()
    finally:
        intake.close()
        torch.set_num_threads(threads_before)


def num_threads(ranks: Ranks) -> int:
    """This rank's share of the usable CPUs."""
    return max(1, num_usable_cpus() // ranks.local_world_size)


def warmed_up(plan: Plan, models: Sequence[ImageModel], ranks: Ranks, *, may_lower: bool) -> Plan:
    """On a GPU: the models ready for their batch, and the plan with the batch that fits (see `warmup`)."""
    if plan["device"] != "cuda" or not models:
        return plan
    from vitscore.engine.cuda_device import CudaDevice
    from vitscore.engine.warm_up import on_device, warm_up

    with on_device(plan, ranks.local_rank):
        return warm_up(plan, models, device=CudaDevice(ranks.local_rank), may_lower=may_lower)


def load_models(plan: Plan, ranks: Ranks) -> list[ImageModel]:
    """Every model of the plan, on this rank's device and in the plan's precision."""
    import torch

    from vitscore.augment.stage import require_bytes
    from vitscore.engine.cuda_device import keep_compiled_code, require_exact_fp32
    from vitscore.models.load import load_model
    from vitscore.models.zeroshot import default_cache

    device = "cpu"
    if plan["compile"]:
        keep_compiled_code(default_cache())
        # The number that `score` sets: what is compiled under another is compiled once more.
        torch.set_num_threads(num_threads(ranks))
    if plan["device"] == "cuda":
        device = f"cuda:{ranks.local_rank}"
        torch.cuda.set_device(ranks.local_rank)
        require_exact_fp32()
    models = [
        load_model(
            planned.checkpoint,
            name=planned.name,
            classes=plan.classes,
            head_map=planned.head,
            templates=plan.templates,
            device=device,
            precision=plan["precision"],
            compile=plan["compile"],
            batch_size=None,
            save_embeddings="embeddings" in plan.options.save,
            cache_dir=default_cache(),
            fingerprint=planned.fingerprint,
        )
        for planned in plan.models
    ]
    if plan.options.augment or plan.options.cells:
        require_bytes({model.name: model.geometry for model in models})
    if plan["compile"] and device == "cpu":
        # When all are loaded: transformers keeps lists of its classes, and what was compiled before one grew is
        # compiled again. On a GPU `warmed_up` does it, which may still change the batch.
        for model in models:
            model.warm_up(plan["batch_size"])
    return models

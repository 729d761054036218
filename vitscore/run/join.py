"""The start of a run: rank 0 plans and opens the folder, the other ranks take its plan."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vitscore.errors import SetupError
from vitscore.models import checkpoint as checkpoints
from vitscore.plan.options import RunOptions
from vitscore.plan.plan import Plan, make_plan
from vitscore.ranks.ranks import POLL_S, SHARED_S, Ranks
from vitscore.run import sessions
from vitscore.run.load import load_where_needed, warmed_up
from vitscore.rundir.folder import RunFolder
from vitscore.rundir.parts import finished_parts
from vitscore.shards.reasons import UNREACHABLE, reason_kind

if TYPE_CHECKING:
    from vitscore.engine.prefetch import Prefetch
    from vitscore.models.image_model import ImageModel


def open_run(
    ranks: Ranks, options: RunOptions, folder: RunFolder, session: dict[str, Any], prefetch: Prefetch
) -> tuple[Plan, list[ImageModel], set[int]]:
    """Start the run on rank 0: plan, load, open the folder, publish the plan. Return plan, models and ordinals done.

    Every check is made, and the models are loaded, before any file of an older run is removed. By then the text weights
    are in the cache, where the other ranks find them.
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
        # A shard that could not be reached is tried again.
        done = {ordinal for ordinal, (_, footer) in parts.items() if reason_kind(footer.fault or "") != UNREACHABLE}
        ranks.count("bad", sum(footer.bad for _, footer in parts.values()))
        ranks.count("seen", sum(footer.expected for _, footer in parts.values()))
        ranks.count("labels tried", sum(footer.expected - footer.bad for _, footer in parts.values()))
    models = load_where_needed(prefetch, plan, ranks=ranks, done=done)
    plan = warmed_up(plan, models, ranks, may_lower=not is_resumed and options.batch_size is None)
    if not is_resumed:
        sessions.clear(folder)
        costs = {model.name: model.cost() for model in models}
        sessions.start(folder, plan, session=session, costs=costs)
    elif models:
        sessions.begin_session(folder, session)
    begun = session["id"] if models or not is_resumed else None
    ranks.publish_long("plan record", plan.to_record())
    ranks.publish("plan", {"identity": plan.identity_hash, "session": begun, "done": sorted(done)})
    return plan, models, done


def join_run(
    ranks: Ranks, options: RunOptions, folder: RunFolder, prefetch: Prefetch
) -> tuple[Plan, list[ImageModel], set[int]]:
    """Join the run on another rank: take rank 0's plan from the store, and load its models, without planning again."""
    import_ahead(options)
    opened = ranks.wait_for("plan")
    require_shared(ranks, folder, opened)
    plan, done = Plan.from_record(ranks.wait_for_long("plan record")), set(opened["done"])
    models = load_where_needed(prefetch, plan, ranks=ranks, done=done)
    return warmed_up(plan, models, ranks, may_lower=False), models, done


def require_shared(ranks: Ranks, folder: RunFolder, opened: Mapping[str, Any]) -> None:
    """Wait until this rank sees the run.json that rank 0 wrote at this start.

    Raises:
        SetupError: the file does not appear, so the ranks' output folders differ.
    """
    deadline = time.monotonic() + SHARED_S
    while True:
        record = folder.read_record()
        if record is not None and record["identity_hash"] == opened["identity"]:
            if opened["session"] in (None, *(session.get("id") for session in record["sessions"])):
                return
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
    """Import modules that this rank will need while rank 0 plans; errors are ignored, since rank 0 reports them."""
    import transformers

    import vitscore.engine.loop
    import vitscore.models.image_model  # noqa: F401

    with contextlib.suppress(Exception):
        for source in checkpoints.parse_models(options.model).values():
            getattr(transformers, checkpoints.find(source).architecture)

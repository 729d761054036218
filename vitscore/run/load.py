"""Loading and warm-up of the models, and early decoding of the first batches while the weights load."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from vitscore.plan.choices import Execution
from vitscore.plan.plan import Plan
from vitscore.ranks.ranks import Ranks
from vitscore.ranks.shard_queue import ShardQueue

if TYPE_CHECKING:
    from vitscore.decode.pixels import AnyGeometry
    from vitscore.engine.prefetch import Intake, Prefetch
    from vitscore.models.image_model import ImageModel


def load_where_needed(prefetch: Prefetch, plan: Plan, *, ranks: Ranks, done: set[int]) -> list[ImageModel]:
    """Load the models while the first batches are decoded; return none if no shard is left."""
    if len(done) >= len(plan.shards):
        return []
    decode_ahead(prefetch, plan, ranks=ranks, done=done)
    return load_models(plan, ranks)


def decode_ahead(prefetch: Prefetch, plan: Plan, *, ranks: Ranks, done: set[int]) -> None:
    """Start decoding early if it needs neither the models' weights nor GPU memory."""
    if plan.choices.device != "cpu":
        return
    from vitscore.models.loading import geometry_of
    from vitscore.preprocess import Geometry

    geometries = [geometry_of(planned.checkpoint) for planned in plan.models]
    if all(isinstance(geometry, Geometry) for geometry in geometries):
        prefetch.start(partial(make_intake, plan, geometries, ranks=ranks, done=done))


def make_intake(
    plan: Plan,
    geometries: Sequence[AnyGeometry],
    *,
    ranks: Ranks,
    done: set[int],
) -> Intake:
    """Make the source of this rank's decoded batches.

    Args:
        plan: the run's plan.
        geometries: the models' geometries, in the models' order.
        ranks: the ranks of the run.
        done: ordinals of finished shards, which are skipped.
    """
    from vitscore.engine.prefetch import Intake

    return Intake(
        plan,
        list(dict.fromkeys(geometries)),
        positions=ShardQueue(ranks, plan.shards, done),
        execution=execution_of(plan, ranks),
    )


def execution_of(plan: Plan, ranks: Ranks) -> Execution:
    """Return the device and threads of this rank."""
    return plan.execution(local_rank=ranks.local_rank, local_world_size=ranks.local_world_size)


def warmed_up(plan: Plan, models: Sequence[ImageModel], ranks: Ranks, *, may_lower: bool) -> Plan:
    """Warm up the models on a GPU; return the plan with the batch size that fits (see `engine.warm_up`)."""
    if plan.choices.device != "cuda" or not models:
        return plan
    from vitscore.engine.cuda_device import CudaDevice
    from vitscore.engine.warm_up import on_device, warm_up

    with on_device(plan, ranks.local_rank):
        return warm_up(plan, models, device=CudaDevice(ranks.local_rank), may_lower=may_lower)


def load_models(plan: Plan, ranks: Ranks) -> list[ImageModel]:
    """Load every model of the plan on this rank's device, in the plan's precision."""
    import torch

    from vitscore.augment.stage import require_bytes
    from vitscore.engine.cuda_device import keep_compiled_code, require_exact_fp32
    from vitscore.models.image_model import Placement
    from vitscore.models.load import HeadSpec, load_model
    from vitscore.models.zeroshot import default_cache

    execution = execution_of(plan, ranks)
    if plan.choices.compile:
        keep_compiled_code(default_cache())
        # The same number as in `run.score`: torch compiles again if the number of threads changes.
        torch.set_num_threads(execution.torch_threads)
    if execution.device_id is not None:
        torch.cuda.set_device(execution.device_id)
        require_exact_fp32()
    models = [
        load_model(
            planned.checkpoint,
            name=planned.name,
            head=HeadSpec(plan.classes, planned.head, plan.templates),
            placement=Placement(execution.device, plan.choices.precision, plan.choices.compile),
            save_embeddings="embeddings" in plan.options.save,
            cache_dir=default_cache(),
            fingerprint=planned.fingerprint,
        )
        for planned in plan.models
    ]
    if plan.options.augment or plan.options.cells:
        require_bytes({model.name: model.geometry for model in models})
    if plan.choices.compile and execution.device_id is None:
        # After all models are loaded: transformers keeps global lists of classes, and a model compiled before a list
        # grows is compiled again. On a GPU `warmed_up` compiles, after the batch size is final.
        for model in models:
            model.warm_up(plan.choices.batch_size)
    return models

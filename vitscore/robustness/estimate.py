"""Estimate the time of a grid from one batch, and render example pictures of its conditions.

Uses the decoder, the operators and the models of a run, without its engine. Nothing is written.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vitscore.augment.seeds import sample_words
from vitscore.augment.stage import Stage
from vitscore.decode.make import make_decoder
from vitscore.engine.forward import make_forward
from vitscore.engine.warm_up import on_device
from vitscore.plan.disk_estimate import estimate_rows
from vitscore.plan.plan import Plan
from vitscore.ranks.ranks import LocalStore, Ranks
from vitscore.shards.remote.cache import Cache
from vitscore.shards.samples import OpenShard

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel
    from vitscore.preprocess import Geometry


@dataclass(frozen=True)
class Estimate:
    """The measured time of one batch, and the estimate for all images."""

    images: int | None
    """Images in all shards; None if no shard has a count."""
    batch: int
    """Images in the measured batch."""
    decode_s: float
    """Decoding the batch."""
    operators_s: float
    """Applying all cells of all operators to the batch."""
    forward_s: float
    """The forwards of all models for one condition of the batch."""
    conditions: int

    @property
    def batch_s(self) -> float:
        return self.decode_s + self.operators_s + self.conditions * self.forward_s

    @property
    def total_s(self) -> float | None:
        return None if self.images is None else self.images / self.batch * self.batch_s


def estimate(plan: Plan, models: Sequence[ImageModel]) -> Estimate | None:
    """Measure the first batch on the run's device, after a warm-up; None if there are no images."""
    with on_device(plan, 0):
        return measure(plan, models)


def measure(plan: Plan, models: Sequence[ImageModel]) -> Estimate | None:
    """Measure decoding, operators and forwards of the first batch.

    Every operator is applied at all severities, but the models only see the unchanged images, because the time of a
    forward does not depend on the images' content. A run overlaps the three on spare cores; the estimate adds them.
    """
    import torch

    images, keys, shard = first_images(plan, plan.choices.batch_size)
    if not images:
        return None
    execution = plan.execution()
    is_cuda = execution.device_id is not None
    forward = make_forward(
        models,
        device_id=execution.device_id,
        batch_size=plan.choices.batch_size,
        top_k=plan.choices.top_k,
        save=(),
        num_workers=execution.num_workers,
        has_fp32_rerun=False,
        tta=plan.options.tta,
    )
    threads_before = torch.get_num_threads()
    torch.set_num_threads(execution.torch_threads)
    decoder = make_decoder(
        plan.choices.decoder,
        forward.geometries,
        batch_size=plan.choices.batch_size,
        num_threads=execution.decode_threads,
        device_id=execution.device_id,
        max_pixels=plan.options.max_pixels,
    )
    stage = Stage(
        plan.conditions(),
        plan.choices.decoder,
        forward.geometries,
        batch_size=plan.choices.batch_size,
        num_threads=execution.decode_threads,
        device_id=execution.device_id,
    )
    words = sample_words(plan.options.augment_seed, ((shard, key) for key in keys))
    labels = np.full(len(images), -1, np.int32)
    try:
        for _ in range(2):  # the first warms up
            times = [time.perf_counter()]
            decoder.submit(images)
            decoded = decoder.collect()
            times.append(_now(is_cuda))
            for _ in stage.apply(decoded, words):
                pass
            times.append(_now(is_cuda))
            for done in [forward.submit(decoded, labels) for _ in range(forward.depth)]:
                done.result()
            times.append(_now(is_cuda))
    finally:
        forward.close()
        decoder.close()
        stage.close()
        torch.set_num_threads(threads_before)
    decode_s, operators_s, forward_s = np.diff(times).tolist()
    return Estimate(
        images=estimate_rows(plan),
        batch=len(images),
        decode_s=decode_s,
        operators_s=operators_s,
        forward_s=forward_s / forward.depth,
        conditions=len(stage.conditions),
    )


def _now(is_cuda: bool) -> float:
    if is_cuda:
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def first_images(plan: Plan, count: int) -> tuple[list[np.ndarray], list[str], str]:
    """Return encoded images of the first shard that has any, their keys, and the shard's name."""
    rule = plan.label_rule()
    cache = Cache(plan.options.cache_dir)
    for position, shard in enumerate(plan.shards):
        with OpenShard(shard, image_key=plan.options.image_key, labels=rule, cache=cache) as opened:
            block = opened.read(0, plan.num_rows(position, min(count, opened.num_samples)))
            samples = [(image, key) for image, key in zip(block.images, block.keys, strict=True) if image is not None]
            if samples:
                return [image for image, _ in samples], [key for _, key in samples], shard.name
    return [], [], ""


def example_pictures(plan: Plan, geometry: Geometry, *, count: int = 8) -> Iterator[tuple[str, bytes]]:
    """Yield the first image that can be decoded under every condition: the condition's name, and a PNG.

    The images are made on the CPU with the run's decoder and random numbers, so they have exactly the pixels that the
    models saw (within one level if the run was on a GPU).
    """
    from PIL import Image

    images, keys, shard = first_images(plan, count)
    for image, key in zip(images, keys, strict=True):
        decoder = make_decoder(plan.choices.decoder, [geometry], batch_size=1, num_threads=1)
        try:
            decoder.submit([image])
            decoded = decoder.collect()
        finally:
            decoder.close()
        if decoded.faults:
            continue
        stage = Stage(plan.conditions(), plan.choices.decoder, [geometry], batch_size=1, num_threads=1)
        words = sample_words(plan.options.augment_seed, [(shard, key)])
        for condition, changed in stage.apply(decoded, words):
            file = io.BytesIO()
            Image.fromarray(changed.pixels[0][0].numpy()).save(file, "PNG")
            yield condition.name, file.getvalue()
        stage.close()
        return


def load_alone(plan: Plan) -> list[ImageModel]:
    """Load the plan's models in a process that scores nothing."""
    from vitscore.run.load import load_models
    from vitscore.system.libraries import prepare_math_library

    prepare_math_library()
    return load_models(plan, Ranks(0, 1, 0, 1, LocalStore()))

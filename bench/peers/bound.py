"""Measure the bound of a run: decoding alone and forwards alone, as a run does them, in a separate process.

`python -m vitscore.bench.peers.bound SHARDS CHECKPOINT... [--images N]` plans exactly as `vitscore run` does, then
decodes images that lie in memory with every thread, then computes the forwards of one decoded batch with every
worker, each model by itself; prints one JSON line. On a CPU both share the cores, so nothing can be faster than an
image's decode and its forwards one after the other on all of them; on a GPU the slower of the two is the bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscore.bench.harness.timing import run_process, stage_rate

if TYPE_CHECKING:
    import torch

    from vitscore.decode.pixels import Decoded
    from vitscore.models.image_model import ImageModel
    from vitscore.plan.plan import Plan

NUM_IMAGES = 512
AT_LEAST_S = 3.0


@dataclass(frozen=True)
class Bound:
    """Images a second of each stage alone."""

    decode: float
    forward: Mapping[str, float]
    """By model."""
    device: str

    @property
    def all_forwards(self) -> float:
        return 1 / sum(1 / rate for rate in self.forward.values())

    @property
    def images_per_s(self) -> float:
        """The rate that no run can exceed."""
        if self.device == "cuda":
            return min(self.decode, self.all_forwards)
        return 1 / (1 / self.decode + 1 / self.all_forwards)


def measure_bound(
    shards: Path, models: Sequence[Path | str], *, num_images: int = NUM_IMAGES, at_least_s: float = AT_LEAST_S
) -> Bound:
    """Measure in a separate process."""
    limits = ["--images", str(num_images), "--at-least-s", str(at_least_s)]
    command = [sys.executable, "-m", "vitscore.bench.peers.bound", str(shards), *map(str, models), *limits]
    return Bound(**json.loads(run_process(command).stdout.splitlines()[-1]))


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vitscore.bench.peers.bound")
    parser.add_argument("shards")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--at-least-s", type=float, default=AT_LEAST_S)
    asked = parser.parse_args(words)
    found = measure_here(asked.shards, asked.models, num_images=asked.images, at_least_s=asked.at_least_s)
    sys.stdout.write(json.dumps(found))
    return 0


def measure_here(shards: str, models: Sequence[str], *, num_images: int, at_least_s: float) -> dict[str, Any]:
    from vitscore.system.libraries import prepare_allocator, prepare_math_library

    prepare_math_library()
    prepare_allocator()
    import torch

    from vitscore.plan.options import RunOptions
    from vitscore.plan.plan import make_plan
    from vitscore.ranks.ranks import LocalStore, Ranks
    from vitscore.run.load import load_models

    options = RunOptions(shards=(shards,), model=tuple(models), output=Path("unused"))
    plan = make_plan(options, kept={})
    loaded = load_models(plan, Ranks(0, 1, 0, 1, LocalStore()))
    torch.set_num_threads(plan.execution().torch_threads)
    images = list(read_images(plan, num_images))
    decode, decoded = decode_rate(plan, loaded, images, at_least_s=at_least_s)
    forward = {
        model.name: forward_rate(plan, model, pixels, at_least_s=at_least_s)
        for model, pixels in zip(loaded, pixels_by_model(loaded, decoded), strict=True)
    }
    return {"decode": decode, "forward": forward, "device": plan.choices.device}


def read_images(plan: Plan, count: int) -> Iterator[Any]:
    """The corpus' first images, as bytes in memory."""
    from vitscore.shards.samples import OpenShard

    for shard in plan.shards:
        with OpenShard(shard, image_key=None, labels=plan.label_rule()) as opened:
            block = opened.read(0, min(opened.num_samples, count))
            good = [image.copy() for image in block.images if image is not None]
        yield from good
        count -= len(good)
        if count <= 0:
            return


def decode_rate(
    plan: Plan, models: Sequence[ImageModel], images: Sequence[Any], *, at_least_s: float
) -> tuple[float, Decoded]:
    """Images/s through the run's decoder with as many batches under way as in a run; and one decoded batch."""
    from vitscore.decode.make import make_decoder
    from vitscore.engine.ranked import share_geometries

    size, execution = plan.choices.batch_size, plan.execution()
    geometries, _ = share_geometries(models)
    decoder = make_decoder(
        plan.choices.decoder,
        geometries,
        batch_size=size,
        num_threads=execution.threads,
        device_id=execution.device_id,
    )
    batches = [images[start : start + size] for start in range(0, len(images), size)]
    with contextlib.closing(decoder):
        decoder.submit(batches[0])
        first = decoder.collect()

        def submit(batch: Sequence[Any]) -> Callable[[], object]:
            decoder.submit(batch)
            return decoder.collect

        rate = stage_rate(submit, batches, depth=decoder.depth, at_least_s=at_least_s)
    return rate, first


def pixels_by_model(models: Sequence[ImageModel], decoded: Decoded) -> list[torch.Tensor]:
    from vitscore.engine.ranked import share_geometries

    _, source = share_geometries(models)
    return [decoded.pixels[source[model.name]] for model in models]


def forward_rate(plan: Plan, model: ImageModel, pixels: torch.Tensor, *, at_least_s: float) -> float:
    """Images/s of one model's forward and ranking on decoded pixels, batches side by side as in a run."""
    import numpy as np

    from vitscore.decode.pixels import Decoded
    from vitscore.engine.forward import make_forward

    execution = plan.execution()
    forward = make_forward(
        [model],
        batch_size=plan.choices.batch_size,
        top_k=plan.choices.top_k,
        save=(),
        device_id=execution.device_id,
        num_workers=execution.num_workers,
        has_fp32_rerun=plan.choices.precision != "fp32",
    )
    num_rows = len(pixels)
    decoded, labels = Decoded((pixels,)), np.zeros(num_rows, np.int32)
    with contextlib.closing(forward):

        def submit(_: Sequence[Any]) -> Callable[[], object]:
            return forward.submit(decoded, labels).result

        return stage_rate(submit, [range(num_rows)], depth=forward.depth + 1, at_least_s=at_least_s)


if __name__ == "__main__":
    from vitscore.system.import_path import clean_path
    from vitscore.system.libraries import look_for_garbage_less

    look_for_garbage_less()
    clean_path()
    sys.exit(main(sys.argv[1:]))

"""How fast do JPEGs become pixels?

Question: images a second from shards of JPEGs of 105 KB (475 x 475 pixels) to batches of 224 x 224 bytes, on one thread
          and on all: our two decoders, webdataset and Pillow and torchvision in a DataLoader, and DALI alone, with its
          own reader and resize. On a GPU: our decoder by the share of JPEGs that the GPU's own decoder takes, and by
          batch size.
Expected: ours 1.5 times the DataLoader, whose workers copy pixels between processes and resize with Pillow, and 1.3
          times DALI alone, whose resize takes longer than its decoding. All scale with the cores. On a GPU the load
          matters most, with its best between 0.65 and 0.9; batches beyond 128 little.
Command:  vitscore bench decoding
Method:   every way is an endless stream of batches of 16, reading included; the clock runs from the time its queues are
          full for 50 batches a thread. `n threads` is n of the way's own workers on n cores. The ways by turns in
          one process. Before that: the first batch of each is the same images, ours on either decoder the same bits.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitscore.bench.harness.checkpoints import CLASSES
from vitscore.bench.harness.corpus import photos, write
from vitscore.bench.harness.timing import Figure, clock, figure, ratio, rounds_in_turn, show
from vitscore.bench.peers.decoding import WAYS, Stream, Way, decode_by_dali, read_images, submit_and_collect
from vitscore.system.machine import num_usable_cpus

ROUNDS = 5
BATCH = 16
BATCHES_A_THREAD = 50
LARGEST_DIFFERENCE = 3.0
"""Of 255 levels, between two ways' first batches: another filter's rounding, not another image."""


class Extent(NamedTuple):
    """How much of a GPU's decoding is measured."""

    loads: tuple[float, ...]
    batches: tuple[int, ...]
    rounds: int
    images: int


WHOLE = Extent(loads=(0.65, 0.75, 0.85, 0.95, 1.0), batches=(64, 128, 256, 512), rounds=3, images=16_384)

Sweep = dict[str, dict[str, Figure]]
"""By load, then by batch size."""


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Images/s by way and threads; the sweep where there is a GPU."""
    cpus = num_usable_cpus()
    threads = [cpus] if quick or cpus == 1 else [1, cpus]
    timed, rounds = (2, 1) if quick else (BATCHES_A_THREAD, ROUNDS)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a run: the decoders' own threads work side by side
    try:
        with tempfile.TemporaryDirectory() as name:
            # A shard a worker at least, and a batch a shard.
            per_shard, num_shards = (BATCH, cpus) if quick else (BATCH * 4, max(8, cpus))
            paths = write(Path(name), photos(per_shard * num_shards), per_shard=per_shard, classes=[*CLASSES])
            ways = {
                name_of(way, count): partial(rate_on, stream, paths, num_threads=count, timed=timed * count)
                for count in threads
                for way, stream in WAYS.items()
            }
            differences = compare_first_batches(paths, num_threads=cpus)
            found = {way: figure(rates, "images/s") for way, rates in rounds_in_turn(ways, rounds).items()}
            return {
                "batch_size": BATCH,
                "mean_levels_from_vitscore": differences,
                "images_per_s": found,
                "ratio_to_loader": ratio_to("webdataset, Pillow, DataLoader", found, cpus),
                "ratio_to_dali": ratio_to("DALI alone", found, cpus),
                **(measure_gpu(paths, num_threads=cpus, extent=WHOLE) if torch.cuda.is_available() else {}),
            }
    finally:
        torch.set_num_threads(torch_threads)


def name_of(way: str, count: int) -> str:
    return f"{way}, {count} thread{'s' if count > 1 else ''}"


def ratio_to(way: str, found: dict[str, Figure], count: int) -> Figure:
    return ratio(found[name_of("vitscore", count)], found[name_of(way, count)])


def rate_on(stream: Way, paths: Sequence[Path], *, num_threads: int, timed: int) -> float:
    """Images/s with that many workers on as many cores; threads and processes inherit the cores that we give up."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:num_threads])
    try:
        opened = stream(paths, batch_size=BATCH, num_threads=num_threads)
        return steady_rate(opened, timed, warm_up=8 + 2 * num_threads)  # the DataLoader is two batches a worker ahead
    finally:
        os.sched_setaffinity(0, before)


def steady_rate(stream: Stream, timed: int, *, warm_up: int = 8) -> float:
    """Images/s of a stream, from the time when all its queues are full."""
    with closing(stream):  # type: ignore[type-var]
        for _ in itertools.islice(stream, warm_up):
            pass
        started = clock()
        count = sum(len(pixels) for pixels in itertools.islice(stream, timed))
        return count / (clock() - started)


def compare_first_batches(paths: Sequence[Path], *, num_threads: int) -> dict[str, float]:
    """How far each way's first batch is from ours, in mean levels of 255.

    Raises:
        AssertionError: some way gives other images, or our two decoders differ in a bit.
    """
    batches = {}
    for way, stream in WAYS.items():
        with closing(stream(paths, batch_size=BATCH, num_threads=num_threads)) as opened:  # type: ignore[type-var]
            batches[way] = next(opened).float()
    found = {way: float((batch - batches["vitscore"]).abs().mean()) for way, batch in batches.items()}
    assert found["vitscore, torchvision"] == 0, f"our decoders differ: {found}"
    assert max(found.values()) < LARGEST_DIFFERENCE, f"other images: {found}"
    return found


def measure_gpu(paths: Sequence[Path], *, num_threads: int, extent: Extent) -> dict[str, Any]:
    """On a GPU: our decoder's sweep, images from memory, and DALI alone, from its own reader."""
    encoded = [image for block in read_images(paths) for image in block]

    def mixed(load: float, batch_size: int) -> float:
        images = itertools.cycle(encoded)
        options = {"device_id": 0, "hw_decoder_load": load}
        stream = submit_and_collect(images, "dali", batch_size=batch_size, num_threads=num_threads, **options)
        return steady_rate(stream, extent.images // batch_size)

    def alone(batch_size: int) -> float:
        stream = decode_by_dali(paths, batch_size=batch_size, num_threads=num_threads, device_id=0)
        return steady_rate(stream, extent.images // batch_size)

    peers = {f"batch {size}": partial(alone, size) for size in extent.batches}
    return {
        "mixed_images_per_s": sweep(extent.loads, extent.batches, mixed, rounds=extent.rounds),
        "dali_mixed_images_per_s": {
            name: figure(rates, "images/s") for name, rates in rounds_in_turn(peers, extent.rounds).items()
        },
    }


def sweep(
    loads: Sequence[float], batch_sizes: Sequence[int], measure_one: Callable[[float, int], float], *, rounds: int
) -> Sweep:
    """Every load with every batch size, all of them once a round."""
    cells = {(load, size): partial(measure_one, load, size) for load in loads for size in batch_sizes}
    rates = rounds_in_turn({f"{load} {size}": cell for (load, size), cell in cells.items()}, rounds)
    return {
        f"load {load}": {f"batch {size}": figure(rates[f"{load} {size}"], "images/s") for size in batch_sizes}
        for load in loads
    }


def sweep_table(found: Sweep) -> list[str]:
    """Loads down, batch sizes across, medians; the best cell named below."""
    batches = list(next(iter(found.values())))
    lines = [f"{'mixed, images/s':<18}" + "".join(f"{batch:>12}" for batch in batches)]
    for load, cells in found.items():
        lines.append(f"{load:<18}" + "".join(f"{cells[batch]['median']:>12,.0f}" for batch in batches))
    medians = {(load, batch): cells[batch]["median"] for load, cells in found.items() for batch in batches}
    load, batch = max(medians, key=lambda cell: medians[cell])
    return [*lines, f"best: {load}, {batch}: {show(found[load][batch], 0)} images/s"]


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'images/s, batch ' + str(result['batch_size']):<44}{'median (range)':>30}"]
    lines += [f"{way:<44}{show(rates, 0):>30}" for way, rates in result["images_per_s"].items()]
    lines.append(f"on all threads against the DataLoader: {show(result['ratio_to_loader'], 2)} times")
    lines.append(f"on all threads against DALI alone: {show(result['ratio_to_dali'], 2)} times")
    lines.append("mean difference from ours, of 255 levels:")
    lines += [f"  {way:<42}{levels:>30.2f}" for way, levels in result["mean_levels_from_vitscore"].items()]
    if "mixed_images_per_s" in result:
        lines += sweep_table(result["mixed_images_per_s"])
        lines += [
            f"{'DALI alone, mixed, ' + name:<44}{show(rates, 0):>30}"
            for name, rates in result["dali_mixed_images_per_s"].items()
        ]
    return lines

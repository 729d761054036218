"""The peers that a whole run is measured against, each in a separate process, at settings found by sweeps.

`python -m vitscore.bench.peers.processes NAME SHARDS CHECKPOINT` runs one and prints one JSON line; the options are the
fields of `Settings`, and `--predictions FILE`. Nothing of vitscore's is imported or set up there but `loops`, so that
it is neither helped nor hindered. The sweep that found the settings of `settings.py`:
`python -m vitscore.bench.peers.processes sweep SHARDS CHECKPOINT --peer NAME`. Peers:

    pipeline    transformers' pipeline over shards read by webdataset
    loop        what a good engineer writes in an afternoon: webdataset, DataLoader, bf16 or fp16, torch's counts
    timm        timm's ViT-Tiny/16 with its own transforms, random weights
    open_clip   open_clip's ViT-B-32 with its own transforms and tokenizer, zero-shot, random weights
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitscore.bench.peers.settings import NAMES, Settings


@dataclass(frozen=True)
class PeerRun:
    """Output of a peer's process, and its duration seen from outside."""

    wall_s: float
    images: int
    loop_s: float
    """From the first image asked for to the last prediction."""
    confusion: list[list[int]]
    predictions: Mapping[str, tuple[int, float]]
    """By key: the best class, and by how much its probability leads; empty where not asked for."""

    @property
    def correct(self) -> int:
        return sum(row[number] for number, row in enumerate(self.confusion))


def run_peer(
    name: str, shards: Path, checkpoint: Path | str, settings: Settings, *, predictions: Path | None = None
) -> PeerRun:
    """Run a peer in a separate process; keep its predictions in a file, if one is named."""
    from vitscore.bench.harness.timing import run_process

    done = run_process(command(name, shards, checkpoint, settings, predictions=predictions))
    found = json.loads(done.stdout.splitlines()[-1])
    rows = json.loads(predictions.read_text()) if predictions else {}
    by_key = {key: (int(pred), float(lead)) for key, (pred, lead) in rows.items()}
    return PeerRun(done.wall_s, found["images"], found["loop_s"], found["confusion"], by_key)


def command(
    name: str, shards: Path, checkpoint: Path | str, settings: Settings, *, predictions: Path | None = None
) -> list[str]:
    words = [sys.executable, "-m", "vitscore.bench.peers.processes", name, str(shards), str(checkpoint)]
    for key, value in dataclasses.asdict(settings).items():
        flag = "--" + key.replace("_", "-")
        words += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    return [*words, "--predictions", str(predictions)] if predictions else words


def candidates(name: str) -> Iterator[Settings]:
    """Yield the settings that the sweep tries on the CPU of a machine with two cores."""
    is_pipeline = name == "pipeline"
    for precision in ("fp32", "half") if is_pipeline else ("autocast", "half"):
        for batch_size in (8, 16, 32, 64):
            for workers in (0, 1) if is_pipeline else (0, 1, 2):
                for threads in (0, 1):
                    yield Settings(batch_size, precision, workers, threads)


def variants(best: Settings) -> Iterator[Settings]:
    """Yield variants of the best settings; only peers on transformers use them."""
    yield dataclasses.replace(best, attention="eager")
    yield dataclasses.replace(best, transform="processor")


def sweep(name: str, shards: Path, checkpoint: Path | str) -> list[tuple[float, Settings]]:
    """Loop images/s of every candidate, fastest first."""
    found = [(loop_rate(name, shards, checkpoint, each), each) for each in candidates(name)]
    best = max(found, key=lambda pair: pair[0])[1]
    found += [(loop_rate(name, shards, checkpoint, each), each) for each in variants(best)]
    return sorted(found, key=lambda pair: -pair[0])


def loop_rate(name: str, shards: Path, checkpoint: Path | str, settings: Settings) -> float:
    run = run_peer(name, shards, checkpoint, settings)
    return run.images / run.loop_s


def main(words: Sequence[str]) -> int:
    asked, settings = parse(words)
    if asked.name == "sweep":
        for rate, each in sweep(asked.peer, asked.shards, asked.checkpoint):
            sys.stdout.write(f"{rate:>8,.1f} images/s  {each}\n")
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.stdout.write(json.dumps(run_here(asked.name, asked.shards, asked.checkpoint, settings, asked.predictions)))
    return 0


def parse(words: Sequence[str]) -> tuple[argparse.Namespace, Settings]:
    """The door's words: what is to run, and how."""
    parser = argparse.ArgumentParser(prog="python -m vitscore.bench.peers.processes")
    parser.add_argument("name", choices=(*NAMES, "sweep"))
    parser.add_argument("shards", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--peer", choices=NAMES, default="loop", help="which one to sweep")
    parser.add_argument("--predictions", type=Path)
    default = Settings()
    for name in ("batch_size", "workers", "threads"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(default, name))
    parser.add_argument("--precision", choices=("fp32", "autocast", "half"), default=default.precision)
    parser.add_argument("--transform", choices=("torchvision", "processor"), default=default.transform)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default=default.attention)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args(words)
    return asked, Settings(**{field.name: getattr(asked, field.name) for field in dataclasses.fields(Settings)})


def run_here(name: str, shards: Path, checkpoint: str, settings: Settings, predictions: Path | None) -> dict[str, Any]:
    """Run a peer in this process."""
    from vitscore.bench.peers import loops as peer_loops

    seen = peer_loops.PEERS[name](shards, checkpoint, settings)
    if predictions is not None:
        predictions.write_text(json.dumps(seen.predictions))
    return {"images": seen.images, "loop_s": seen.loop_s, "confusion": seen.confusion}


if __name__ == "__main__":
    # From a checkout's root Python finds its `kernels` folder, which transformers would take for the public package.
    from vitscore.system.import_path import clean_path

    clean_path()
    sys.exit(main(sys.argv[1:]))

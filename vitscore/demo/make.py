"""Make the demo's shards and checkpoints from a seed: `python -m vitscore.demo.make` (`make demo-models`).

The program splits scikit-learn's digits, writes the held-out digits as shards, trains `demo-vit` and `demo-clip` on the
others (a minute or two each), and scores the saved models with transformers' pipelines; it exits with status 1 if a
model is below 97%. It uses no part of vitscore except `compute_metrics`, so its figures are independent of a run's.

It runs on one thread, so that sums have one order and a machine makes the same bytes every time, regardless of its
number of cores. Another processor or another torch gives other, equally good weights; the split and the pixels do not
change.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitscore.demo.digits import CLASSES, SEED, Digits, load_split, write_shards

PARTS = ("shards", "demo-vit", "demo-clip")
MIN_ACCURACY = 0.97


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    training, held_out = load_split()
    say(f"digits: {len(training)} to train on, {len(held_out)} held out")
    accuracies = []
    for part in options.only or PARTS:
        folder = options.output / part
        if part == "shards":
            paths = write_shards(held_out, folder)
            say(f"shards: {len(paths)} with {sum(path.stat().st_size for path in paths):,} bytes in {folder}")
        else:
            accuracies.append(make_model(part, training, held_out, folder, seed=options.seed))
    return int(any(accuracy < MIN_ACCURACY for accuracy in accuracies))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vitscore.demo.make", description="Make the demo's shards and models."
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="make only this part; may be repeated")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to (default: here)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the trainings; the split does not depend on it")
    return parser.parse_args(arguments)


def make_model(name: str, training: Digits, held_out: Digits, folder: Path, *, seed: int) -> float:
    """Train one model, save it into `folder`, and return its accuracy on the held-out digits."""
    # Imported late, so that making the shards needs no torch.
    import torch
    from transformers.utils import logging

    from vitscore.demo.train_clip import train_clip
    from vitscore.demo.train_vit import train_vit

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    start = time.perf_counter()
    if name == "demo-vit":
        metrics = train_vit(training, held_out, folder, seed=seed)
        say(f"{name}: compute_metrics gives " + ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))
    else:
        train_clip(training, folder, seed=seed)
    # transformers makes weights readable by their owner only; a package's files must be readable by everyone.
    (folder / "model.safetensors").chmod(0o644)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    say(f"{name}: {num_bytes:,} bytes, trained in {time.perf_counter() - start:.0f} s")
    accuracy = pipeline_accuracy(folder, held_out, is_zero_shot=name == "demo-clip")
    say(f"{name}: transformers' pipeline has {accuracy:.1%} of the held-out digits right")
    return accuracy


def pipeline_accuracy(folder: Path, digits: Digits, *, is_zero_shot: bool) -> float:
    """Return the share of digits that transformers' pipeline, with its default template, classifies correctly."""
    from transformers import pipeline

    if is_zero_shot:
        scorer: Any = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
        answers = scorer(digits.pictures(), candidate_labels=list(CLASSES))
    else:
        scorer = pipeline("image-classification", model=str(folder), device="cpu")
        answers = scorer(digits.pictures(), top_k=1, batch_size=50)
    right: list[bool] = [
        answer[0]["label"] == CLASSES[label] for answer, label in zip(answers, digits.labels_B, strict=True)
    ]
    return sum(right) / len(right)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

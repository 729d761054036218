"""How long do metrics over a million predictions of two models take, and how much memory?

Question: `vitscore metrics DIR` over 1,000,000 rows of two models and 1,000 classes: seconds from start to exit, peak
          resident memory; the same with corrected labels, a subset of keys and groups of classes.
Expected: under 10 s and under 1 GB each.
Command:  vitscore bench offline
Method:   100 real parts of 10,000 rows, written by the run's own writer; 80% and 75% right, mistakes spread over all
          classes, which is the worst for what is counted of pairs. Each command in a separate process, imports and
          all, three times by turns; peak and CPU time of the child by wait4 (where others keep the cores busy, CPU time
          is what counts).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from vitscore.bench.harness.madeup import MadeShard, write_run
from vitscore.bench.harness.timing import Figure, Finished, figure, run_process, show
from vitscore.rundir.parts import Predictions

ROWS, QUICK_ROWS, PER_SHARD, CLASSES = 1_000_000, 20_000, 10_000, 1_000
ROUNDS = 3
MODELS = {"vit": 0.80, "clip": 0.75}


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Seconds and peak bytes of each command, and the size of the parts."""
    rows, rounds = (QUICK_ROWS, 1) if quick else (ROWS, ROUNDS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = write_run(folder / "run", made_shards(rows), [f"class {i}" for i in range(CLASSES)])
        write_inputs(folder, rows)
        commands = {
            "metrics": ["metrics", run],
            "metrics --labels": ["metrics", run, "--labels", folder / "labels.csv"],
            "metrics --keys": ["metrics", run, "--keys", folder / "keys.txt"],
            "metrics --groups": ["metrics", run, "--groups", folder / "groups.json"],
            "compare": ["compare", run],
        }
        runs: dict[str, list[Finished]] = {title: [] for title in commands}
        for _ in range(rounds):
            for title, command in commands.items():
                runs[title].append(run_process([sys.executable, "-m", "vitscore", *map(str, command)]))
        parts_bytes = sum(part.stat().st_size for part in (run / "parts").iterdir())
    timed = {title: figures_of(found) for title, found in runs.items()}
    return {
        "rows": rows,
        "classes": CLASSES,
        "models": len(MODELS),
        "parts_bytes": parts_bytes,
        "commands": timed,
    }


def made_shards(rows: int) -> Iterator[MadeShard]:
    random = np.random.default_rng(7)
    for number in range(rows // PER_SHARD):
        labels_N = random.integers(0, CLASSES, PER_SHARD).astype(np.int32)
        predictions = {name: make_up(labels_N, rate, random) for name, rate in MODELS.items()}
        keys = [f"{number:06d}/{row:08d}" for row in range(PER_SHARD)]
        yield MadeShard(f"s-{number:06d}.tar", keys, labels_N, predictions)


def make_up(labels_N: Any, rate: float, random: np.random.Generator) -> Predictions:
    """Predictions that are right at `rate`, with probabilities that fit."""
    num = len(labels_N)
    first_N = np.where(random.random(num) < rate, labels_N, random.integers(0, CLASSES, num)).astype(np.int32)
    topk_NT = (first_N[:, None] + np.arange(5, dtype=np.int32) * 7) % CLASSES
    prob_N = random.uniform(0.3, 0.99, num).astype(np.float32)
    topk_prob_NT = np.column_stack([prob_N, *[(1 - prob_N) * share for share in (0.4, 0.2, 0.1, 0.05)]])
    label_prob_N = np.where(first_N == labels_N, prob_N, (1 - prob_N) * 0.01)
    return Predictions(
        pred=first_N,
        prob=prob_N,
        topk=topk_NT,
        topk_prob=topk_prob_NT.astype(np.float32),
        label_logprob=np.log(label_prob_N).astype(np.float32),
        sum_sq_prob=(topk_prob_NT**2).sum(axis=1).astype(np.float32),
    )


def write_inputs(folder: Path, rows: int) -> None:
    """Corrections of every hundredth label, half of the keys, and ten groups of a hundred classes."""
    keys = [f"{row // PER_SHARD:06d}/{row % PER_SHARD:08d}" for row in range(rows)]
    corrected = [f"{key},{row % CLASSES}\n" for row, key in enumerate(keys) if row % 100 == 0]
    (folder / "labels.csv").write_text("key,label\n" + "".join(corrected))
    (folder / "keys.txt").write_text("\n".join(keys[::2]))
    groups = {f"group {number}": list(range(number * 100, number * 100 + 100)) for number in range(CLASSES // 100)}
    (folder / "groups.json").write_text(json.dumps(groups))


def figures_of(runs: list[Finished]) -> dict[str, Figure]:
    """One command's wall-clock and CPU seconds, and its peak RSS."""
    return {
        "seconds": figure([run.wall_s for run in runs], "s"),
        "cpu_seconds": figure([run.cpu_s for run in runs], "s"),
        "peak_rss_bytes": figure([run.peak_rss_bytes for run in runs], "bytes"),
    }


def table(result: dict[str, Any]) -> list[str]:
    lines = [f"{'over ' + format(result['rows'], ',') + ' rows':<22}{'seconds':>20}{'of CPU':>9}{'peak RSS':>12}"]
    for title, timed in result["commands"].items():
        peak = f"{timed['peak_rss_bytes']['median'] / 1e6:,.0f} MB"
        lines.append(f"{title:<22}{show(timed['seconds']):>20}{timed['cpu_seconds']['median']:>9.1f}{peak:>12}")
    return [*lines, f"parts: {result['parts_bytes'] / 1e6:,.0f} MB"]

"""Runs of made-up predictions: real parts through the real writer, without models or images.

For benches and tests of what comes after the parts (metrics, comparison, export). `write_run` writes all that those
look at: run.json, shards.parquet and one part a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.kernels import score_rows
from vitscore.plan.identity import digest
from vitscore.rundir.parts import Footer, ModelColumns, Predictions, ShardRows, part_schema

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class MadeShard:
    """One shard's rows: N samples, and what each model says of them."""

    name: str
    keys: Sequence[str]
    labels_N: Array
    predictions: Mapping[str, Predictions]
    bad: Mapping[int, str] = field(default_factory=dict)
    """Reasons, by row."""


def write_run(
    folder: Path, shards: Iterable[MadeShard], classes: Sequence[str], *, options: Mapping[str, Any] | None = None
) -> Path:
    """Write a finished run of these shards; returns `folder`."""
    (folder / "parts").mkdir(parents=True)
    identity = digest([str(folder), list(classes)])
    names, models = [], {}
    for ordinal, shard in enumerate(shards):
        models = {name: columns_of(name, made) for name, made in shard.predictions.items()}
        write_part(folder / "parts", shard, list(models.values()), ordinal=ordinal, identity=identity)
        names.append(shard.name)
    frozen = {
        "ordinal": pa.array(range(len(names)), pa.int32()),
        "name": pa.array(names, pa.string()),
        "bytes": pa.nulls(len(names), pa.int64()),
    }
    pq.write_table(pa.table(frozen), folder / "shards.parquet")
    record = {
        "schema": 1,
        "identity_hash": identity,
        "identity": {},
        "options": {"on_bad_sample": "skip", "save": [], "shards": names, **(options or {})},
        "choices": {"top_k": {"value": 5, "reason": "made up"}},
        "classes": list(classes),
        "models": {name: {"checkpoint": f"made-up/{name}", "kind": "classifier", "parameters": 1} for name in models},
        "corpus": {"shards": len(names), "bytes": None, "limit": None},
        "sessions": [],
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def write_part(folder: Path, shard: MadeShard, models: Sequence[ModelColumns], *, ordinal: int, identity: str) -> None:
    num_rows = len(shard.keys)
    footer = Footer(identity=identity, ordinal=ordinal, shard=shard.name, num_bytes=None, expected=num_rows, bad=0)
    rows = ShardRows(folder, part_schema(models), models, footer, shard.keys)
    rows.set_labels(np.arange(num_rows), shard.labels_N)
    for row, reason in shard.bad.items():
        rows.set_bad(row, reason)
    good = np.array([row for row in range(num_rows) if row not in shard.bad], np.int64)
    rows.set_predictions(good, {name: made.take(good) for name, made in shard.predictions.items()})
    rows.commit()


def columns_of(name: str, made: Predictions) -> ModelColumns:
    num_logits = 0 if made.logits is None else made.logits.shape[1]
    return ModelColumns(name, made.topk.shape[1], num_logits)


def from_logits(logits_NK: Array, labels_N: Array, *, k: int = 5, keeps_logits: bool = False) -> Predictions:
    """Return the predictions that a model with these logits leaves in the parts."""
    scores = score_rows(logits_NK, labels_N, k)
    return Predictions.of(scores, logits=np.ascontiguousarray(logits_NK, np.float32) if keeps_logits else None)

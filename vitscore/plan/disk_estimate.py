"""Estimate of the disk space that a run needs, from its first readable shard."""

from __future__ import annotations

from typing import Any

from vitscore.augment import operators
from vitscore.plan.plan import Plan, known_bytes
from vitscore.shards.redaction import is_remote
from vitscore.shards.remote.cache import Cache
from vitscore.shards.samples import OpenShard

KEY_BYTES = 24
"""Compressed size of a key and its Parquet overhead; measured on the demo's and CIFAR's keys."""
PART_BYTES, COLUMN_BYTES = 1_500, 350
"""Size of a part without rows, and of each column of a model; measured with one, two and three models."""


def estimate_disk(plan: Plan) -> int | None:
    """Estimate the bytes of all parts; None if the number of samples cannot be estimated."""
    rows = estimate_rows(plan)
    if rows is None:
        return None
    columns = 6 + len(plan.options.save) + 2 * len(plan.options.cells)
    fixed = PART_BYTES + len(plan.models) * columns * COLUMN_BYTES
    return rows * row_bytes(plan) + len(plan.shards) * fixed


def estimate_rows(plan: Plan) -> int | None:
    """Estimate the samples of all shards from the samples per byte of the first readable shard; None if there is none.

    A remote shard is not fetched for this: if one comes first, the result is None.
    """
    sizes = [shard.num_bytes for shard in plan.shards]
    rule = plan.label_rule()
    cache = Cache(plan.options.cache_dir)
    for shard in plan.shards:
        if is_remote(shard.path):
            return None
        with OpenShard(shard, image_key=plan.options.image_key, labels=rule, cache=cache) as opened:
            if opened.num_samples and opened.num_bytes and None not in sizes:
                rows = round(opened.num_samples / opened.num_bytes * sum(size or 0 for size in sizes))
                return rows if plan.options.limit is None else min(rows, plan.options.limit)
    return None


def row_bytes(plan: Plan) -> int:
    """Return the uncompressed bytes of one sample's row: key, label and every model's columns."""
    long = len(plan.classes) * ("logits" in plan.options.save) + 768 * ("embeddings" in plan.options.save)
    top_k: int = plan.choices.top_k
    return KEY_BYTES + 8 + len(plan.models) * (16 + 8 * top_k + 4 * long + 8 * len(plan.options.cells))


def plan_document(plan: Plan) -> dict[str, Any]:
    """Return the document that `--dry-run --json` prints."""
    return {
        "shards": {"count": len(plan.shards), "bytes": known_bytes(plan), "names": [s.name for s in plan.shards]},
        "limit": plan.options.limit,
        "classes": list(plan.classes),
        "classes_source": plan.classes_source,
        "templates": list(plan.templates),
        "models": {
            model.name: {
                "checkpoint": model.checkpoint.source,
                "kind": model.checkpoint.kind,
                "matching": model.head.summary if model.head else "zero-shot",
            }
            for model in plan.models
        },
        "choices": plan.choices.to_record(),
        "augment": [str(operators.parse(text)) for text in plan.options.augment],
        "tta": plan.options.tta,
        "disk_bytes": estimate_disk(plan),
        "output": str(plan.options.output),
    }

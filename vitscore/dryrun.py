"""What a run will need on disk, from its first readable shard."""

from __future__ import annotations

from vitscore.prepare import Plan
from vitscore.shards.samples import OpenShard

KEY_BYTES = 24
"""A key and what Parquet keeps beside it, compressed; measured on the demo's and on CIFAR's keys."""


def estimate_disk(plan: Plan) -> int | None:
    """Bytes of all parts, None where no shard tells: samples a byte in the first shard, times the row's columns."""
    sizes = [shard.num_bytes for shard in plan.shards]
    rule = plan.label_rule()
    for shard in plan.shards:
        with OpenShard(shard, image_key=plan.options.image_key, labels=rule) as opened:
            if opened.num_samples and opened.num_bytes and None not in sizes:
                rows = opened.num_samples / opened.num_bytes * sum(size or 0 for size in sizes)
                if plan.options.limit is not None:
                    rows = min(rows, plan.options.limit)
                return round(rows * row_bytes(plan))
    return None


def row_bytes(plan: Plan) -> int:
    """Uncompressed bytes of one sample's row: key, label, and every model's columns."""
    long = len(plan.classes) * ("logits" in plan.options.save) + 768 * ("embeddings" in plan.options.save)
    top_k: int = plan["top_k"]
    return KEY_BYTES + 8 + len(plan.models) * (16 + 8 * top_k + 4 * long)

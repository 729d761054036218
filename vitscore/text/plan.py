"""Show the plan of a run, as `--dry-run` does: shards, classes, models, choices, disk space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from vitscore.augment import operators
from vitscore.plan.options import VIEWS
from vitscore.text.console import size_text

if TYPE_CHECKING:
    from vitscore.plan.plan import Plan


def show_plan(plan: Plan, disk_bytes: int | None, console: Console) -> None:
    """Print shards, classes, how models match them, every automatic choice with its reason, and disk space."""
    sizes = [shard.num_bytes for shard in plan.shards]
    known = sum(size or 0 for size in sizes)
    unknown = " and shards of unknown size" if None in sizes else ""
    console.print(f"shards   {len(plan.shards):,}, {size_text(known)}{unknown}")
    for shard in [*plan.shards[:3], *plan.shards[max(3, len(plan.shards) - 1) :]]:
        size = "size unknown" if shard.num_bytes is None else size_text(shard.num_bytes)
        console.print(Text(f"         {shard.ordinal:>7}  {shard.name}  {size}"), soft_wrap=True)
    if plan.last_rows is not None:
        console.print(f"limit    {plan.options.limit:,} samples: {plan.last_rows:,} of the last shard listed")
    more = " ..." if len(plan.classes) > 5 else ""
    names = ", ".join(plan.classes[:5]) + more
    console.print(f"classes  {len(plan.classes):,}, from {plan.classes_source}: {names}", soft_wrap=True)
    for model in plan.models:
        matching = model.head.summary if model.head else f"zero-shot, {len(plan.templates)} templates"
        console.print(Text(f"model    {model.name} ({model.checkpoint.kind}): {matching}"), soft_wrap=True)
    for name, choice in plan.choices.all().items():
        console.print(Text(f"choice   {name} = {choice.value}: {choice.reason}"), soft_wrap=True)
    for text in plan.options.augment:
        console.print(Text(f"augment  {operators.parse(text)}, on the resized image"), soft_wrap=True)
    if plan.options.tta != "none":
        console.print(f"tta      {plan.options.tta}{views_text(plan)}")
    about = "unknown" if disk_bytes is None else f"about {size_text(disk_bytes)}"
    console.print(f"disk     {about} for the parts in {plan.options.output}", soft_wrap=True)
    console.print("dry run: nothing was written, nothing was scored")


def views_text(plan: Plan) -> str:
    """Return the cost of `--tta` as text that continues a line; empty for a single forward."""
    forwards = VIEWS[plan.options.tta]
    return f", {forwards} forwards per image" if forwards > 1 else ""

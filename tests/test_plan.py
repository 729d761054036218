"""The plan as joining ranks receive it, and the device and threads of every rank."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitscore.plan.choices import Choice, Choices, Execution
from vitscore.plan.options import RunOptions
from vitscore.plan.plan import Plan, make_plan
from vitscore.ranks.ranks import LocalStore, Ranks
from vitscore.system.machine import num_usable_cpus

Call = Callable[..., Any]


def test_a_plan_is_the_same_after_its_record(make_shards: Call, digits: Any, tmp_path: Path) -> None:
    shards = make_shards(digits[:12], digits[12:20])
    names = (shards / "classes.txt").read_text().split()
    (tmp_path / "groups.json").write_text(json.dumps({"low": names[:5], "high": names[5:]}))
    (tmp_path / "labels.csv").write_text("key,label\nx,3\n")
    options = RunOptions(
        shards=(str(shards),),
        model=("demo-vit", "clip=demo-clip"),
        output=tmp_path / "out",
        labels=tmp_path / "labels.csv",
        groups=tmp_path / "groups.json",
        save=("logits",),
        limit=15,
        decode_threads=3,
    )
    plan = make_plan(options, kept={})
    again = Plan.from_record(json.loads(json.dumps(plan.to_record())))
    assert again.groups is not None and plan.groups is not None
    assert again.groups.to_record() == plan.groups.to_record()
    for name in (*vars(plan),):
        if name not in ("groups", "identity"):
            assert getattr(again, name) == getattr(plan, name), name
    assert again.identity_hash == plan.identity_hash
    assert again.last_rows == 3


def test_long_values_go_through_the_store_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitscore.ranks.ranks.PIECE_CHARS", 7)
    ranks = Ranks(0, 1, 0, 1, LocalStore())
    value = {"names": [f"s-{number}\udcff" for number in range(50)], "bytes": None}
    ranks.publish_long("plan record", value)
    assert ranks.wait_for_long("plan record") == value
    assert len(ranks.store.values) > 10 and max(map(len, ranks.store.values.values())) <= 7  # type: ignore[attr-defined]


def choices(**changes: Any) -> Choices:
    values = {"device": "cpu", "precision": "fp32", "compile": False, "decoder": "dali", "batch_size": 16, "top_k": 5}
    return Choices.of({name: Choice(value, "a reason") for name, value in {**values, **changes}.items()})


def test_a_rank_takes_its_share_of_the_machine() -> None:
    cpus = num_usable_cpus()
    assert Execution.of(choices()) == Execution(None, cpus, cpus, cpus)
    shared = Execution.of(choices(device="cuda"), local_rank=1, local_world_size=2 * cpus)
    assert (shared.device_id, shared.device, shared.threads) == (1, "cuda:1", 1)
    assert Execution.of(choices(), decode_threads=7).decode_threads == 7
    compiled = Execution.of(choices(compile=True))
    assert (compiled.num_workers, compiled.torch_threads) == (0, cpus)
    assert Execution.of(choices()).torch_threads == 1


def test_another_batch_size_keeps_the_other_choices_and_its_reason() -> None:
    before = choices()
    after = before.with_batch_size(Choice(8, "16 ran out of GPU memory"))
    assert (after.batch_size, after.reasons["batch_size"]) == (8, "16 ran out of GPU memory")
    assert Choices.from_record(after.to_record()) == after
    assert {**after.to_record(), "batch_size": None} == {**before.to_record(), "batch_size": None}

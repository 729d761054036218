"""Shards to decoded batches, on the caller's thread and in a background thread while the models load."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import badserver
from support import smallmodels as small
from vitscore.engine.prefetch import Intake, Prefetch
from vitscore.engine.stage_times import StageTimes
from vitscore.errors import SetupError
from vitscore.models.loading import geometry_of
from vitscore.plan.options import RunOptions
from vitscore.plan.plan import Plan, make_plan
from vitscore.ranks.ranks import LocalStore, Ranks
from vitscore.ranks.shard_queue import ShardQueue

Call = Callable[..., Any]


def make_plan_of(shards: object, output: Path, **options: Any) -> Plan:
    asked = RunOptions(shards=(str(shards),), model=("demo-vit",), output=output, batch_size=16, **options)
    return make_plan(asked, kept={})


def make_intake(plan: Plan) -> Intake:
    return Intake(
        plan,
        [geometry_of(plan.models[0].checkpoint)],
        positions=ShardQueue(Ranks(0, 1, 0, 1, LocalStore()), plan.shards, set()),
        execution=plan.execution(),
    )


def taken(intake: Intake) -> list[tuple[list[bytes], torch.Tensor | None]]:
    batches = []
    with contextlib.closing(intake):
        while (item := intake.take(StageTimes())) is not None:
            batch, decoded = item
            pixels = None if decoded is None else decoded.pixels[0].clone()
            batches.append(([image.tobytes() for image in batch.images], pixels))
    return batches


@pytest.fixture
def prefetch() -> Iterator[Prefetch]:
    with contextlib.closing(Prefetch()) as prefetch:
        yield prefetch


def others() -> set[str]:
    """Return the threads that a closed intake must end."""
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("reader", "prefetch", "decode"))}


def test_gives_every_image_in_order_and_its_pixels(make_shards: Call, digits: Any, tmp_path: Path) -> None:
    shards = make_shards(digits[:40], digits[40:50])
    batches = taken(make_intake(make_plan_of(shards, tmp_path / "out")))
    images = [image for encoded, _ in batches for image in encoded]
    assert images == [members["png"] for _, members in digits[:50]]
    assert [len(encoded) for encoded, _ in batches] == [16, 16, 16, 2]
    assert [tuple(pixels.shape) for _, pixels in batches if pixels is not None] == [
        (n, 32, 32, 3) for n in (16, 16, 16, 2)
    ]


def test_prefetching_gives_the_same_batches(prefetch: Prefetch, make_shards: Call, digits: Any, tmp_path: Path) -> None:
    plan = make_plan_of(make_shards(digits[:90]), tmp_path / "out")
    expected = taken(make_intake(plan))
    prefetch.start(partial(make_intake, plan))
    intake = prefetch.take()
    assert intake is not None
    batches = taken(intake)
    assert [encoded for encoded, _ in batches] == [encoded for encoded, _ in expected]
    for (_, ours), (_, theirs) in zip(batches, expected, strict=True):
        assert ours is not None and theirs is not None
        assert torch.equal(ours, theirs)


def test_prefetching_fills_the_decoder_and_no_more(
    prefetch: Prefetch, make_shards: Call, digits: Any, tmp_path: Path
) -> None:
    prefetch.start(partial(make_intake, make_plan_of(make_shards(digits[:200]), tmp_path / "out")))
    intake = prefetch.take()
    assert intake is not None
    assert len(intake._under_way) == intake._decoder.depth
    intake.close()


def test_take_gives_none_if_nothing_was_started(prefetch: Prefetch) -> None:
    assert prefetch.take() is None


def test_an_intake_that_is_not_taken_leaves_no_thread(make_shards: Call, digits: Any, tmp_path: Path) -> None:
    plan = make_plan_of(make_shards(digits[:200]), tmp_path / "out")
    before = others()
    prefetch = Prefetch()
    prefetch.start(partial(make_intake, plan))
    prefetch.close()
    assert others() <= before


def test_an_error_while_prefetching_is_raised_by_take(prefetch: Prefetch) -> None:
    def fail() -> Intake:
        raise SetupError("DALI cannot be imported")

    prefetch.start(fail)
    with pytest.raises(SetupError, match="DALI cannot be imported"):
        prefetch.take()


def test_a_server_that_does_not_answer_does_not_delay_closing(make_shards: Call, digits: Any, tmp_path: Path) -> None:
    """Loading the models may fail while the first shard is still being fetched."""
    make_shards(digits[:20])
    with badserver.serving(tmp_path / "shards") as server:
        plan = make_plan_of(f"{server.url}/s-0.tar", tmp_path / "out", classes=tmp_path / "shards" / "classes.txt")
        server.fail("/s-0.tar", stall=100)
        prefetch = Prefetch()
        prefetch.start(partial(make_intake, plan))
        time.sleep(1)
        began = time.monotonic()
        prefetch.close()
        assert time.monotonic() - began < 20


def test_a_checkpoint_that_cannot_be_loaded_ends_the_run_in_one_line(
    make_shards: Call, digits: Any, vitscore: Call, tmp_path: Path
) -> None:
    folder = small.save_vit(tmp_path / "model", tuple("abcdefghij"))
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    shards = make_shards(digits[:20])
    before = others()
    done = vitscore("run", shards, "-m", folder, "-o", tmp_path / "out", "--label-map", "by-position")
    assert done.code == 4
    assert done.err.startswith("weights do not fill the model") and done.err.count("\n") == 1
    assert others() <= before
    assert not (tmp_path / "out" / "run.json").exists()


def test_decoding_begins_early_under_save_embeddings_too(
    make_shards: Call, digits: Any, vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    started: list[Callable[[], Intake]] = []
    start = Prefetch.start
    monkeypatch.setattr(Prefetch, "start", lambda self, make: (started.append(make), start(self, make))[1])
    out = tmp_path / "out"
    assert vitscore("run", make_shards(digits[:20]), "-m", "demo-vit", "-o", out, "--save", "embeddings").code == 0
    (part,) = (out / "parts").iterdir()
    assert np.stack(pq.read_table(part)["demo-vit.embedding"].to_pylist()).shape == (20, 96)
    assert len(started) == 1


def test_pandas_and_sklearn_are_not_imported_and_can_be_later(
    make_shards: Call, digits: Any, start: Call, tmp_path: Path
) -> None:
    pytest.importorskip("pandas")
    code = (
        "import sys; from vitscore.cli.main import main\n"
        "assert main(sys.argv[1:]) == 0\n"
        "assert not {'pandas', 'sklearn'} & set(sys.modules)\n"
        "import sklearn.metrics\n"
        "import pyarrow.parquet as pq; print(len(pq.read_table(sys.argv[-1] + '/shards.parquet').to_pandas()))"
    )
    shards = make_shards(digits[:20])
    done = start(sys.executable, "-c", code, "run", shards, "-m", "demo-vit", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "1"

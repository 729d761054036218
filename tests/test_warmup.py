"""Fitting the batch size to a GPU's memory: the arithmetic against a search, and halving on models that run out."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitscore.engine.cuda_device import keep_compiled_code
from vitscore.engine.cuda_memory import (
    DECODER_BYTES,
    DECODER_BYTES_PER_IMAGE,
    USABLE,
    Footprint,
    fitting,
    is_out_of_memory,
    out_of_memory,
)
from vitscore.engine.warm_up import footprint, settled, with_batch_size
from vitscore.errors import SetupError
from vitscore.plan.choices import Choice, choose_batch_size, choose_compile
from vitscore.ranks.ranks import LocalStore, Ranks
from vitscore.run.load import warmed_up
from vitscore.shards.preview import Preview

GIB = 1 << 30
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


class Sized:
    """A model that runs out of memory above `most` rows."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.most = most
        self.tried: list[int] = []
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    def warm_up(self, batch_size: int) -> None:
        self.tried.append(batch_size)
        if batch_size > self.most:
            raise self.error


@given(
    lines=st.lists(st.tuples(st.integers(0, 4 * GIB), st.integers(0, GIB)), max_size=3),
    free=st.integers(0, 160 * GIB),
    planned=st.sampled_from([1, 7, 256, 512]),
)
def test_the_batch_is_the_largest_halving_that_fits(lines: list[tuple[int, int]], free: int, planned: int) -> None:
    fitted = fitting(Choice(planned, "planned"), [Footprint(*line) for line in lines], free_bytes=free).value
    sizes = [planned]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    largest = [max((fixed + per_row * size for fixed, per_row in lines), default=0) for size in sizes]
    needs = [DECODER_BYTES + DECODER_BYTES_PER_IMAGE * size + most for size, most in zip(sizes, largest, strict=True)]
    fits = [size for size, need in zip(sizes, needs, strict=True) if need <= USABLE * free]
    assert fitted == (fits[0] if fits else 1)


def test_a_batch_that_fits_keeps_its_reason_and_a_lowered_one_says_why() -> None:
    planned, line = Choice(256, "fills a GPU"), [Footprint(0, 8 << 20)]
    assert fitting(planned, line, free_bytes=80 * GIB) is planned
    assert fitting(planned, line, free_bytes=8 * GIB) == Choice(128, "256 would not fit 8.0 GiB of free GPU memory")


@pytest.mark.parametrize(
    ("few", "many", "line"),
    [
        ((8, 900), (32, 2100), (500, 50)),
        ((8, 900), (32, 900), (900, 0)),
        ((8, 900), (32, 100), (100, 0)),
        ((8, 80), (32, 3200), (0, 130)),
    ],
)
def test_a_forwards_memory_is_a_line_through_two_measurements(
    few: tuple[int, int], many: tuple[int, int], line: tuple[int, int]
) -> None:
    footprint_of = Footprint.through(few, many)
    assert (footprint_of.fixed, footprint_of.per_row) == line
    assert footprint_of.num_bytes(100) == line[0] + 100 * line[1]


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_out_of_memory_errors_are_recognised(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) is is_one


def settle(models: Any, size: int, *, may_lower: bool) -> tuple[Choice, int]:
    freed: list[None] = []
    batch_size = settled(
        Choice(size, "fills a GPU"), models, may_lower=may_lower, free_memory=lambda: freed.append(None)
    )
    return batch_size, len(freed)


def test_an_automatic_batch_is_halved_until_every_model_has_memory() -> None:
    models = [Sized(200), Sized(70), Sized(10**6, RuntimeError("never"))]
    batch_size, num_freed = settle(models, 256, may_lower=True)
    assert batch_size == Choice(64, "128 ran out of GPU memory")
    assert num_freed == 2
    assert models[2].tried == [64]
    assert settle([Sized(256)], 256, may_lower=True) == (Choice(256, "fills a GPU"), 0)


@pytest.mark.parametrize(("most", "size", "may_lower"), [(100, 256, False), (0, 256, True), (0, 1, True)])
def test_a_batch_that_may_not_be_halved_is_refused(most: int, size: int, may_lower: bool) -> None:
    with pytest.raises(SetupError, match="out of GPU memory: a batch of") as caught:
        settle([Sized(most)], size, may_lower=may_lower)
    assert caught.value.exit_code == 4
    assert f"-b {max(1, (1 if may_lower else size) // 2)}" in str(caught.value)


def test_another_error_of_a_warm_up_is_raised() -> None:
    with pytest.raises(RuntimeError, match="illegal"):
        settle([Sized(0, RuntimeError("an illegal memory access"))], 8, may_lower=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_on_a_cpu_and_without_models_the_plan_stays_as_it_is(device: str) -> None:
    plan: Any = SimpleNamespace(choices=SimpleNamespace(device=device, batch_size=16))
    models: Any = [Sized(0)] if device == "cpu" else []
    assert warmed_up(plan, models, Ranks(0, 1, 0, 1, LocalStore()), may_lower=True) is plan
    assert all(model.tried == [] for model in models)


def test_a_lowered_batch_is_the_runs_own_and_is_kept_when_it_goes_on(
    tmp_path: Path, vitscore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warmed_up(plan: Any, models: Any, ranks: Any, *, may_lower: bool) -> Any:
        warmed.append((plan.choices.batch_size, may_lower))
        return with_batch_size(plan, Choice(48, "96 ran out of GPU memory")) if may_lower else plan

    warmed: list[tuple[int, bool]] = []
    monkeypatch.setattr("vitscore.run.join.warmed_up", warmed_up)
    # As on a GPU, where no batch is decoded before its size is settled.
    monkeypatch.setattr("vitscore.run.load.decode_ahead", lambda *args, **kwargs: None)
    command = ("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out")
    assert vitscore(*command).code == 0
    record = json.loads((tmp_path / "out" / "run.json").read_bytes())
    assert record["choices"]["batch_size"] == {"value": 48, "reason": "96 ran out of GPU memory"}
    assert record["identity"]["batch_size"] == 48
    parts = sorted((tmp_path / "out" / "parts").iterdir())
    whole = parts[0].read_bytes()
    parts[0].unlink()
    assert vitscore(*command).code == 0
    assert parts[0].read_bytes() == whole
    assert warmed[1:] == [(48, False)]
    assert vitscore(*command, "-b", 64).code == 2
    assert vitscore(*command, "-b", 64, "--overwrite").code == 0
    assert warmed[2:] == [(64, False)]


@pytest.mark.parametrize(
    ("device", "edge", "size"),
    [("cuda", 224, 256), ("cuda", 336, 256), ("cuda", 158, 512), ("cuda", 32, 512), ("cpu", 224, 16), ("cpu", 32, 128)],
)
def test_the_planned_batch_by_device_and_pixels(device: str, edge: int, size: int) -> None:
    assert choose_batch_size(device, edge * edge).value == size


@pytest.mark.parametrize(
    ("largest_bytes", "num_members", "edge", "size"),
    [
        (200, 40_000, 32, 512),
        (200, 40_000, 48, 256),
        (200, 40_000, 224, 16),
        (200, 600, 32, 128),  # too few for batches that large to keep two cores busy
        (105_000, 40_000, 32, 128),  # photographs, which take room once they are decoded
    ],
)
def test_many_small_images_go_in_larger_batches(largest_bytes: int, num_members: int, edge: int, size: int) -> None:
    assert choose_batch_size("cpu", edge * edge, lambda: Preview(largest_bytes, num_members)).value == size


def test_a_gpu_run_is_compiled_where_it_can_be_and_is_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "gcc"
    compiler.touch(mode=0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert choose_compile("cuda").value
    assert choose_compile("cuda", lambda: Preview(105_000, 2_000_000)).value
    few = choose_compile("cuda", lambda: Preview(105_000, 4_000))
    assert few == Choice(False, "few images: tuning would take longer than it saves")
    compiler.unlink()
    assert choose_compile("cuda") == Choice(False, "no C compiler is installed, which Triton needs")


def test_the_folder_of_compiled_code_is_the_users_where_they_named_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "theirs"))
    keep_compiled_code(tmp_path / "cache")
    assert cache_dir() == str(tmp_path / "theirs")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled_code(tmp_path / "cache")
    assert cache_dir() == str(tmp_path / "cache" / "compiled")


def test_a_run_compiles_each_model_once(tmp_path: Path, vitscore: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full batches, a padded last batch and mirrored batches, with a number of threads other than the run's."""
    compiled: list[None] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        compiled.append(None)
        return graph.forward

    monkeypatch.setattr(
        "vitscore.models.image_model._compiled", lambda net, device: torch.compile(net, backend=backend, dynamic=False)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        command = ("run", "demo", "-m", "demo-vit", "-m", "demo-clip", "--compile", "-b", 96, "--precision", "fp32")
        done = vitscore(*command, "--tta", "hflip", "-o", tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    assert done.code == 0, done.err
    assert len(compiled) == 2


def test_the_error_names_the_batch_and_the_next_step() -> None:
    assert str(out_of_memory(256, next_step="Name -b 128.")) == "out of GPU memory: a batch of 256. Name -b 128."


@pytest.mark.gpu
@needs_gpu
def test_a_forwards_memory_is_estimated_from_two_small_ones() -> None:
    """A module with one large result for every row."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 1 << 18)).cuda()
    model: Any = SimpleNamespace(net=net, black_images=lambda rows: torch.zeros((rows, 12)))
    line = footprint(model)
    assert line is not None and line.per_row == pytest.approx(4 << 18, rel=0.1)


@pytest.mark.gpu
@needs_gpu
def test_a_run_in_little_memory_takes_a_smaller_batch_and_says_so(
    tmp_path: Path, vitscore: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscore.engine.warm_up.free_bytes", functools.partial(int, 3.2 * GIB))
    out = tmp_path / "out"
    done = vitscore("run", "demo", "-m", "demo-vit", "-o", out, "--device", "cuda", "--no-compile")
    assert done.code == 0, done.err
    record = json.loads((out / "run.json").read_bytes())
    assert record["choices"]["batch_size"]["value"] == record["identity"]["batch_size"] < 512
    assert "would not fit" in record["choices"]["batch_size"]["reason"]
    assert vitscore("run", "demo", "-m", "demo-vit", "-o", out, "--device", "cuda", "--no-compile").code == 0

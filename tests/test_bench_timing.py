"""Rates of work that a device does later: the clock is read when it has caught up, at both ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vitscore.bench.harness import corpus, timing
from vitscore.bench.harness.checkpoints import CLASSES
from vitscore.bench.peers import bound
from vitscore.bench.stages import decoding
from vitscore.shards.labels import LabelRule
from vitscore.shards.locate import locate
from vitscore.shards.samples import OpenShard

DEVICE_S, HOST_S = 1e-3, 1e-5
"""What a batch takes the device, and the call that hands it over."""
MOST = 50
"""Batches that the device lets wait; then the host waits."""
SIZE = 4
RATE = SIZE / DEVICE_S


class LateDevice:
    """A GPU under a clock that moves only with work: calls return at once, as long as few batches wait."""

    def __init__(self) -> None:
        self.now = self.done = 100.0

    def give(self, *_: Any) -> Callable[[], None]:
        """Queue a batch; returns what collects it, which does not wait for it."""
        self.now += HOST_S
        self.done = max(self.now, self.done) + DEVICE_S
        self.now = max(self.now, self.done - MOST * DEVICE_S)
        return lambda: None

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    device = LateDevice()
    clock = SimpleNamespace(perf_counter=lambda: device.now)
    for module in (timing, decoding):
        monkeypatch.setattr(module, "time", clock, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    return device


def test_a_stages_rate_is_the_devices_not_that_of_queueing(late: LateDevice) -> None:
    found = timing.stage_rate(late.give, [range(SIZE)] * 2, depth=3, at_least_s=0.02)
    assert found == pytest.approx(RATE, rel=0.02)


def test_the_rate_of_a_function_is_the_devices(late: LateDevice) -> None:
    assert timing.rate(SIZE, late.give, at_least_s=0.02) == pytest.approx(RATE, rel=0.02)


def test_the_rate_of_a_stream_of_batches_is_the_devices(late: LateDevice) -> None:
    def stream() -> Iterator[torch.Tensor]:
        while True:
            late.give()
            yield torch.zeros(SIZE)

    assert decoding.steady_rate(stream(), 30) == pytest.approx(RATE, rel=0.02)


def test_the_bounds_decoding_rate_is_the_devices(late: LateDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose pixels are not there yet when they are collected, as DALI's on a GPU."""
    decoder = SimpleNamespace(submit=late.give, collect=lambda: "pixels", close=lambda: None, depth=3)
    monkeypatch.setattr("vitscore.decode.make.make_decoder", lambda *_, **__: decoder)
    plan: Any = SimpleNamespace(
        choices=SimpleNamespace(batch_size=SIZE, decoder="dali"),
        execution=lambda: SimpleNamespace(threads=2, device_id=0),
    )
    models: Any = [SimpleNamespace(name="m", geometry="g")]
    found, first = bound.decode_rate(plan, models, list(range(4 * SIZE)), at_least_s=0.02)
    assert first == "pixels" and found == pytest.approx(RATE, rel=0.02)


def test_nothing_is_waited_for_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise AssertionError("there is no device")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    assert timing.rate(1, partial(sum, ()), at_least_s=0.001) > 0


def test_photographs_are_the_same_bytes_from_any_number_of_processes() -> None:
    assert list(corpus.photos(9, workers=2)) == list(corpus.photos(9))


def test_repeated_shards_are_other_shards_without_a_second_copy(tmp_path: Path) -> None:
    corpus.write(tmp_path / "few", corpus.digits(6), per_shard=3, classes=[*CLASSES])
    paths = corpus.repeat(tmp_path / "few", tmp_path / "many", 3)
    assert [path.name for path in paths] == [f"s-{number:05d}.tar" for number in range(6)]
    assert paths[4].samefile(tmp_path / "few" / "s-00000.tar")
    counts = []
    for shard in locate([str(tmp_path / "many")]).shards:
        with OpenShard(shard, labels=LabelRule(None)) as opened:
            counts.append(opened.num_samples)
    assert counts == [3] * 6

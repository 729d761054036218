"""The advice on a run's slowest stage, by a table of cases, and the clocks, by arithmetic."""

import time
from itertools import product
from typing import Any

import pytest

from vitscore.engine.stage_times import STAGES, StageTimes
from vitscore.run.bottleneck import Bottleneck, Situation, advise
from vitscore.text.tables import bottleneck_line

GPU: dict[str, Any] = {"device": "cuda", "precision": "fp16", "is_compiled": True, "batch_size": 256}


@pytest.mark.parametrize(
    ("stage", "share", "given", "said"),
    [
        ("read", 0.8, {}, "faster or a local disk"),
        ("read", 0.8, {"is_remote": True, "cache_size": 3}, "--cache-size 6"),
        ("write", 0.8, {}, "put -o on a faster disk"),
        ("write", 0.8, {"saves": True}, "--save"),
        ("count", 0.8, {}, "more ranks"),
        # Decoding takes all the time and the rest of the loop a quarter: four times the threads would keep up.
        ("decode", 0.75, {**GPU, "threads": 4, "cpus": 16}, "-j 16 would give about 400 images/s"),
        ("decode", 0.75, {**GPU, "threads": 4, "cpus": 8}, "-j 8 would give about 200 images/s"),
        ("decode", 0.5, {**GPU, "threads": 8, "cpus": 8}, "16 CPUs, not 8, would give about 200 images/s"),
        ("decode", 1.0, {**GPU, "threads": 1, "cpus": 1}, "20 CPUs, not 1, would give about 2,000 images/s"),
        ("decode", 0.9, {**GPU, "decoder": "torchvision"}, "pip install nvidia-dali-cuda130"),
        ("decode", 0.9, {"threads": 2, "cpus": 2}, "the forward shares its 2 cores: only more cores help"),
        ("decode", 0.9, {"threads": 1, "cpus": 2}, "-j 2"),
        ("forward", 0.9, {**GPU, "precision": "fp32"}, "--precision fp16"),
        ("forward", 0.9, {**GPU, "is_compiled": False}, "--compile"),
        ("forward", 0.9, {**GPU, "batch_size": 32}, "-b 256"),
        ("forward", 0.9, {**GPU, "ranks": 8}, "16 GPUs, not 8, would give about 200 images/s"),
        ("forward", 0.9, {"has_bf16": True}, "--precision bf16"),
        ("forward", 0.9, {"batch_size": 64, "is_batch_asked": True}, "leave out -b"),
        ("forward", 0.9, {"batch_size": 64}, "its 1 core lack"),
        ("forward", 0.9, {"cpus": 2, "ranks": 2}, "its 4 cores lack bf16; more cores or a GPU help"),
        ("forward", 0.9, {"cpus": 2, "precision": "bf16", "has_bf16": True}, "its 2 cores are busy"),
    ],
)
def test_the_advice(stage: str, share: float, given: dict[str, Any], said: str) -> None:
    assert said in advise(Situation(stage=stage, share=share, images_per_s=100, **given))


def test_the_line_fits_80_columns_for_all_numbers() -> None:
    for stage, share, device, rate in product(STAGES, (0.2, 0.5, 1.0), ("cpu", "cuda"), (0.0, 9_999_999.0)):
        for precision, decoder, is_compiled, batch in product(
            ("fp32", "fp16", "bf16"), ("dali", "torchvision"), (True, False), (1, 512)
        ):
            for flag in (True, False):
                now = Situation(
                    stage=stage,
                    share=share,
                    images_per_s=rate,
                    device=device,
                    precision=precision,
                    decoder=decoder,
                    is_compiled=is_compiled,
                    batch_size=batch,
                    has_bf16=flag,
                    is_batch_asked=flag,
                    is_remote=flag,
                    saves=flag,
                    threads=128 if flag else 4,
                    cpus=128,
                    ranks=64,
                    cache_size=100,
                )
                assert len(bottleneck_line(Bottleneck(stage, share, advise(now)))) <= 80


def test_a_nested_stage_is_not_counted_for_the_outer_one() -> None:
    times = StageTimes()
    with times.on("count"):
        time.sleep(0.02)
        with times.on("write"):
            time.sleep(0.1)
    with times.on("count"):
        pass
    assert times.seconds["write"] >= 0.1
    assert 0.02 <= times.seconds["count"] < 0.09
    assert times.seconds["read"] == 0

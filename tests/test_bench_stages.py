"""The benches of single stages: each runs in its quick form, and what it claims to be equal is equal."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vitscore.bench import memory
from vitscore.bench.harness import catalogue, checkpoints, corpus, timing
from vitscore.bench.stages import decoding, forward, reading
from vitscore.models.checkpoint import find

# webdataset leaves closing its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

STAGES = ("reading", "decoding", "forward", "startup", "memory")


@cache
def measured(name: str) -> dict[str, Any]:
    """One quick run for all tests of a bench."""
    result: dict[str, Any] = catalogue.load(name).measure(quick=True)
    return result


def is_figure(value: Any, unit: str) -> bool:
    return value["unit"] == unit and 0 < value["low"] <= value["median"] <= value["high"]


@pytest.mark.parametrize("name", STAGES)
def test_a_table_fits_its_page_and_the_result_is_json(name: str) -> None:
    result = measured(name)
    lines = catalogue.load(name).table(result)
    assert lines and max(map(len, lines)) <= 78  # printed with two spaces before it
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("name", STAGES)
def test_a_bench_says_what_it_asks_expects_and_does(name: str) -> None:
    text = catalogue.path_of(name).read_text()
    assert text.splitlines()[0].endswith("?")
    assert all(f"\n{word}:" in text for word in ("Question", "Expected", "Command", "Method"))
    assert f"vitscore bench {name}" in text


def test_reading_compares_ways_that_give_the_same_samples() -> None:
    result = measured("reading")
    assert set(result["samples_per_s"]) == {"vitscore", "webdataset", "tarfile"}
    assert all(is_figure(rate, "samples/s") for rate in result["samples_per_s"].values())
    assert all(is_figure(rate, "samples/s") for rate in result["large_samples_per_s"].values())
    assert all(is_figure(rate, "members/s") for rate in result["index_members_per_s"].values())
    assert result["contents"]["small"]["samples"] == reading.NUM_SMALL // 20
    assert result["ratio_to_webdataset"]["median"] > 3  # expected: over 10; this machine may be busy


def test_readers_that_differ_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = corpus.write(tmp_path, corpus.digits(20), per_shard=10, classes=[*checkpoints.CLASSES])
    found = reading.check(paths)
    assert found["samples"] == 20
    monkeypatch.setitem(reading.READERS, "one short", lambda paths: list(reading.read_by_vitscore(paths))[1:])
    with pytest.raises(AssertionError, match="the readers differ"):
        reading.check(paths)


def test_decoding_compares_ways_that_show_the_same_images() -> None:
    result = measured("decoding")
    assert all(is_figure(rate, "images/s") for rate in result["images_per_s"].values())
    assert {way.rpartition(", ")[0] for way in result["images_per_s"]} == set(decoding.WAYS)
    levels = result["mean_levels_from_vitscore"]
    assert levels["vitscore, torchvision"] == 0
    assert all(difference < 1 for difference in levels.values())


def test_a_sweep_has_every_cell_and_names_the_best() -> None:
    found = decoding.sweep((0.65, 0.9), (64, 128), lambda load, size: size * (2 - load), rounds=2)
    assert found["load 0.9"]["batch 64"]["rounds"] == pytest.approx([70.4, 70.4])
    lines = decoding.sweep_table(found)
    assert [line.split()[-2:] for line in lines[1:3]] == [["86", "173"], ["70", "141"]]
    assert lines[-1].startswith("best: load 0.65, batch 128: 173")


def test_the_forward_is_measured_by_model_precision_and_batch() -> None:
    result = measured("forward")
    (case,) = forward.QUICK
    assert is_figure(result["images_per_s"][case.name], "images/s")
    assert case.name == "vit-tiny fp32 eager batch 4"
    assert 2 < result["gflop_per_image"]["vit-tiny"] < 3  # 1.26 G multiply-adds, as published


def test_a_machine_is_asked_only_what_it_can_do() -> None:
    def precisions(**machine: bool) -> set[str]:
        return {case.precision for case in forward.choose_cases(quick=False, **machine)}

    assert precisions(has_gpu=False, has_bf16=False) == {"fp32"}
    assert precisions(has_gpu=False, has_bf16=True) == {"fp32", "bf16"}
    assert precisions(has_gpu=True, has_bf16=False) == {"fp32", "bf16", "fp16"}
    assert {case.kind for case in (*forward.CPU, *forward.GPU)} <= set(checkpoints.KINDS)


def test_start_up_is_told_from_the_process_start() -> None:
    result = measured("startup")
    assert is_figure(result["help_s"], "s") and is_figure(result["import_s"]["pyarrow"], "s")
    assert result["help_s"]["median"] < result["first_batch_s"]["median"] < result["demo_s"]["median"]


def test_memory_has_growth_and_the_peak_of_a_real_model() -> None:
    result = measured("memory")
    assert set(result["images"]) == {str(size) for size in memory.QUICK_SIZES}
    assert 0.8 < result["ratio"] < 1.2
    peaks = result["vit_tiny_peak_rss_bytes"]
    assert result["import_peak_rss_bytes"]["nothing"] < 50e6 < 400e6 < peaks["as it is"]


def test_the_peak_of_a_process_is_its_own() -> None:
    """Not that of the process that started it, from which the system begins to count."""
    held = bytearray(300 << 20)
    found = timing.run_process(["true"])
    assert found.peak_rss_bytes < len(held) / 4


@pytest.mark.parametrize("kind", ["vit-tiny", "clip-base-32"])
def test_checkpoints_are_found_as_what_they_are(tmp_path: Path, kind: str) -> None:
    checkpoints.make_checkpoint(tmp_path / kind, kind=kind)
    assert find(str(tmp_path / kind)).kind == ("classifier" if kind == "vit-tiny" else "zero-shot")

"""Plans from made-up rates, their arithmetic done by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import benchjson as made

Call = Callable[..., Any]


@pytest.fixture
def plan(vitscore: Call, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Plan from the made-up benches."""

    def call(*options: object, gpus: tuple[str, ...] = (), **changed: Any) -> dict[str, Any]:
        folder = made.write(tmp_path / "made", {**made.results(), **changed}, gpus=gpus)
        done = vitscore("bench", "plan", "--from", folder, "--json", *options)
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    return call


def test_on_gpus_the_slowest_stage_limits(plan: Call) -> None:
    found = plan("--images", "1e9", "--gpus", 64, "--price", "2.5", gpus=("H100",))
    # min(90,000, 4,000, 6,000) = 4,000; the run reached 3,600 of 4,000; 1e9 / (64 x 3,600) = 4,340.28 s
    assert found["bound_per_s"] == 4_000 and found["reached"] == 0.9 and found["limit"] == "decoding"
    assert found["scoring_s"] == pytest.approx(4_340.2778)
    # 20 s of start, 1,000 x 1.3 s of fold
    assert found["hours"] == pytest.approx((20 + 4_340.2778 + 1_300) / 3600)
    assert found["gpu_hours"] == pytest.approx(100.627, abs=1e-3)
    assert found["cost"] == pytest.approx(251.568, abs=1e-3)


def test_on_cpus_decoding_and_forward_share_the_cores(plan: Call) -> None:
    found = plan("--images", "1e6")
    # 1 / (1 / 4,000 + 1 / 6,000) = 2,400; x 0.9 = 2,160
    assert found["bound_per_s"] == pytest.approx(2_400)
    assert found["scoring_s"] == pytest.approx(1e6 / 2_160)
    assert found["limit"] == "decoding" and found["cost"] is None


def test_the_forward_is_the_best_of_the_model_that_is_asked_for(plan: Call) -> None:
    assert plan("--images", "1e6")["forward_per_s"] == pytest.approx(6_000)
    assert plan("--images", "1e6", "-m", "clip-large-14")["forward_per_s"] == pytest.approx(2_000)
    assert plan("--images", "1e6", "-m", "vit-base fp16 eager batch 256")["forward_per_s"] == pytest.approx(4_050)
    both = plan("--images", "1e6", "-m", "clip-large-14", "-m", "vit-base", gpus=("H100",))
    assert both["forward_per_s"] == pytest.approx(1_500)  # 1 / (1 / 2,000 + 1 / 6,000)
    assert both["limit"] == "forward" and both["bound_per_s"] == pytest.approx(1_500)


def test_shards_and_parts(plan: Call) -> None:
    found = plan("--images", "1000001", "--per-shard", 1_000)
    assert found["shards"] == 1_001
    assert found["parts_bytes"] == pytest.approx(1_000_001 * 45)  # 90 MB, a million rows, two models
    assert found["image_bytes"] == 110_000
    assert plan("--images", "1e6", "-m", "vit-base", "-m", "clip-large-14")["parts_bytes"] == pytest.approx(90e6)


def test_reading_can_be_the_limit(plan: Call) -> None:
    slow = {"large_samples_per_s": {"vitscore": made.images(100, 100)}, "samples_per_s": {"vitscore": 5_000.0}}
    assert plan("--images", "1e6", reading=slow)["limit"] == "reading"
    assert plan("--images", "1e6", reading=slow, gpus=("H100",))["bound_per_s"] == 100


def test_on_a_gpu_decoding_is_the_best_of_the_sweep(plan: Call) -> None:
    sweep = {"load 0.65": {"batch 64": made.images(7_000, 7_100)}, "load 0.95": {"batch 64": made.images(9_000, 9_200)}}
    decoding = {**made.results()["decoding"], "mixed_images_per_s": sweep}
    assert plan("--images", "1e6", gpus=("H100",), decoding=decoding)["decoding_per_s"] == 9_100


@pytest.mark.parametrize("absent", ["reading", "decoding", "forward", "whole", "startup", "offline"])
def test_a_rate_that_was_not_measured_names_the_bench_to_run(absent: str, vitscore: Call, tmp_path: Path) -> None:
    results = made.results()
    del results[absent]
    done = vitscore("bench", "plan", "--images", "1e9", "--from", made.write(tmp_path, results))
    assert done.code == 2 and done.out == ""
    assert done.err.count("\n") == 1 and f"`vitscore bench {absent}`" in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--images", "0"), "--images"),
        (("--images", "nan"), "--images"),
        (("--images", "1e9", "--gpus", "0"), "--gpus"),
        (("--images", "1e9", "-m", "resnet"), "one of vit-base, clip-large-14"),
        (("--images", "1e9", "--from", "none"), "no such file"),
    ],
)
def test_a_plan_that_cannot_be_is_one_line(options: tuple[str, ...], said: str, vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, made.results())
    done = vitscore("bench", "plan", "--from", folder, *options)
    assert done.code == 2 and done.out == ""
    assert done.err.count("\n") == 1 and said in done.err


def test_a_shape_without_the_rate_is_named(vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, {**made.results(), "whole": {"vitscore": {"images_per_s": 5.0}}})
    done = vitscore("bench", "plan", "--images", "1e9", "--from", folder)
    assert done.code == 2 and "vitscore / loop_images_per_s" in done.err and "`vitscore bench whole`" in done.err


def test_every_assumption_is_a_line_with_its_source(vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, made.results(), gpus=["H100"], is_quick=True)
    done = vitscore("bench", "plan", "--images", "1e9", "--gpus", 64, "--from", folder)
    said = " ".join(done.out.partition("assumed:")[2].split())
    for rate in ("4,000.0 (3,900.0-4,100.0)", "6,000.0", "90,000.0", "3,600.0", "20.0"):
        assert rate in said
    for name in ("reading", "decoding", "forward", "whole", "startup", "offline"):
        assert f"{folder / name}.json, 2026-11-20, 1 x H100, 16 cores of Some CPU" in said
    for words in ("scaling is linear", "the slowest of them limits", "rank 0 folds alone", "measured with --quick"):
        assert words in said
    assert max(len(line) for line in done.out.splitlines() if str(tmp_path) not in line) <= 80


def test_later_sources_win_and_mixed_machines_are_said(vitscore: Call, tmp_path: Path) -> None:
    here = made.write(tmp_path / "here", made.results())
    store = {"reading": {"samples_per_s": {"vitscore": made.images(1_000, 1_000)}}}
    there = made.write(tmp_path / "there", store, gpus=["H100"])
    words = ("bench", "plan", "--images", "1e9", "--from", here, "--from", there / "reading.json")
    assert json.loads(vitscore(*words, "--json").out)["reading_per_s"] == 1_000
    assert "the rates are of different machines" in vitscore(*words).out


def test_without_a_source_it_plans_from_the_last_bench(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    made.write(tmp_path / "build" / "bench", made.results())
    assert "build/bench/whole.json" in vitscore("bench", "plan", "--images", "1e9").out
    monkeypatch.setenv("OUT", str(made.write(tmp_path / "out", made.results(), gpus=["H100"])))
    assert f"{tmp_path}/out/whole.json" in vitscore("bench", "plan", "--images", "1e9").out.replace("\n  ", "")


def test_without_any_bench_it_plans_from_those_that_come_with_the_package(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr("vitscore.bench.report.stages.SHIPPED", tmp_path / "results")
    words = ("bench", "plan", "--images", "1e9", "--json")
    none = vitscore(*words)
    assert none.code == 2 and "Run `vitscore bench` first" in none.err
    made.write(tmp_path / "results" / "epyc", made.results())
    assert json.loads(vitscore(*words).out)["is_gpu"] is False
    made.write(tmp_path / "results" / "h100", made.results(), gpus=["H100"])
    which = vitscore(*words)
    assert which.code == 2 and "epyc, h100" in which.err
    assert json.loads(vitscore(*words, "--from", "h100").out)["is_gpu"] is True

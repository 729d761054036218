"""The whole-run benches in a short form, for real; and the peers, which must find what a run finds."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vitscore.bench import several, small, whole, zeroshot
from vitscore.bench.harness.corpus import write
from vitscore.bench.harness.runs import predictions_of, run_own
from vitscore.bench.harness.timing import figure
from vitscore.bench.memory import NAMES
from vitscore.bench.peers.processes import command, parse, run_peer
from vitscore.bench.peers.settings import NAMES as PEERS
from vitscore.bench.peers.settings import Settings, best_settings
from vitscore.models import checkpoint as checkpoints

WAYS = ("vitscore", "pipeline batch 64", "hand-written loop", "timm")


@cache
def found(bench: Any) -> dict[str, Any]:
    """A bench's quick result, measured once."""
    result: dict[str, Any] = bench.measure(quick=True)
    return result


def figures_in(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, dict):
        return []
    if "median" in value:
        return [value]
    return [each for part in value.values() for each in figures_in(part)]


@pytest.mark.parametrize("bench", [whole, several])
def test_a_bench_gives_figures_json_and_a_table_that_fits(bench: Any) -> None:
    result = found(bench)
    assert json.loads(json.dumps(result)) == result
    assert all(each["low"] <= each["median"] <= each["high"] and each["low"] > 0 for each in figures_in(result))
    assert figures_in(result)
    lines = bench.table(result)
    assert max(map(len, lines)) <= 80
    assert any("target" in line for line in lines)


def test_whole_has_every_way_with_and_without_its_start() -> None:
    result = found(whole)
    assert result["images"] == 48
    for way in WAYS:
        with_start, loop = result[way]["images_per_s"], result[way]["loop_images_per_s"]
        assert loop["median"] > with_start["median"]
        assert "batch" in result[way]["settings"]
    assert set(result["ratios"]) == set(result["loop_ratios"]) == set(WAYS[1:])
    slower = min(result["decode_images_per_s"]["median"], result["forward_images_per_s"]["median"])
    assert 0 < result["bound_images_per_s"]["median"] <= slower
    assert result["agreement"]["images"] == 48


def test_several_compares_one_run_with_both() -> None:
    case = found(several)[several.DECODING]
    assert set(case["loop_s"]) == set(case["wall_s"]) == {"together", "demo-vit", "demo-clip"}
    apart = sum(case["loop_s"][name]["median"] for name in ("demo-vit", "demo-clip"))
    assert case["one_run_of_two"]["median"] == pytest.approx(case["loop_s"]["together"]["median"] / apart)


def test_of_a_peers_settings_the_faster_one_stands_for_it() -> None:
    slow, fast = ({"images_per_s": figure([rate], "images/s")} for rate in (3, 5))
    rates = {f"{whole.LOOP} 1": slow, f"{whole.LOOP} 2": fast}
    whole.keep_better(rates, whole.LOOP)
    assert rates == {whole.LOOP: {**fast, "other_settings": [slow]}}


def wide(count: float) -> dict[str, Any]:
    """A figure with three rounds of as many digits as a fast machine gives."""
    return figure([count, count * 1.01, count * 0.99], "images/s")


def widened(value: Any) -> Any:
    """The same result after three rounds on a fast machine."""
    if not isinstance(value, dict):
        return value
    if value.get("unit") in ("images/s", "s"):
        return wide(12_345.6 if value["unit"] == "images/s" else 123.4)
    if "median" in value:
        return wide(12.34)
    return {key: widened(part) for key, part in value.items()}


@pytest.mark.parametrize("bench", [whole, several])
def test_tables_of_three_rounds_on_a_fast_machine_fit_too(bench: Any) -> None:
    assert max(map(len, bench.table(widened(found(bench))))) <= 80


def test_other_tables_fit() -> None:
    rate = {"images_per_s": wide(12_345), "loop_images_per_s": wide(12_345), "settings": str(Settings())}
    stages = ("decode_images_per_s", "forward_images_per_s", "bound_images_per_s", "share_of_bound")
    one: dict[str, Any] = dict.fromkeys(("vitscore", *small.PEERS), rate)
    one |= {"loop_ratios": {way: wide(12.3) for way in small.PEERS}, **{stage: wide(12_345) for stage in stages}}
    zero = {"vitscore": rate, "open_clip": rate, "ratio": wide(1.2), "loop_ratio": wide(1.2)}
    assert max(map(len, [*small.table({"demo-clip": one}), *zeroshot.table(zero)])) <= 80


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> tuple[Path, Path]:
    """The demo's held-out digits without its templates, and a run of both demo models over them in fp32."""
    root = tmp_path_factory.mktemp("peers")
    samples = ((members["png"], "png", int(members["cls"])) for _, members in digits)
    write(root / "shards", samples, per_shard=250, classes=NAMES)
    run_own(root / "shards", ["demo-vit", "demo-clip"], root / "out", "--precision", "fp32")
    return root / "shards", root / "out"


@pytest.mark.parametrize(
    ("peer", "model", "settings"),
    [
        ("pipeline", "demo-vit", Settings(64, threads=1)),
        ("loop", "demo-vit", Settings(64, workers=1, threads=1)),
        ("loop", "demo-clip", Settings(64, workers=2, threads=1, transform="processor")),
    ],
)
def test_a_peer_classifies_the_same_images_to_the_same_classes(
    peer: str, model: str, settings: Settings, scored: tuple[Path, Path], tmp_path: Path
) -> None:
    shards, out = scored
    ran = run_peer(peer, shards, checkpoints.find(model).path, settings, predictions=tmp_path / "predictions.json")
    assert {key: pred for key, (pred, _) in ran.predictions.items()} == predictions_of(out, model)
    assert ran.confusion == np.load(out / f"confusion_{model}.npz")["counts"].tolist()
    metrics = json.loads((out / "metrics.json").read_bytes())["models"][model]
    assert ran.correct / ran.images == pytest.approx(metrics["accuracy"])
    assert 0 < ran.loop_s < ran.wall_s


def test_settings_become_the_peers_options() -> None:
    settings = Settings(8, "autocast", workers=2, threads=1, attention="eager", compile=True)
    words = command("loop", Path("shards"), "checkpoint", settings)[3:]
    assert words[:3] == ["loop", "shards", "checkpoint"]
    assert parse(words)[1] == settings
    assert all(best_settings(name) for name in PEERS)

"""The grid: its cells equal runs with --augment, its figures equal NumPy's, and its folder is that of a run."""

import io
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from statsmodels.stats.multitest import multipletests

from vitscore.augment.operators import OPERATORS
from vitscore.cli.robustness import as_list
from vitscore.errors import UsageError
from vitscore.robustness.grid import ErrorDifference, GridCounts, Spread, make_cells, make_document, rate_interval
from vitscore.robustness.html import render
from vitscore.robustness.words import table

Call = Callable[..., Any]
MODELS = ("-m", "vit=demo-vit", "-m", "clip=demo-clip")
SOME = ("--operators", "contrast,occlusion,shot_noise", "--severities", "2,5")
SOME_CELLS = [f"{name}:{level}" for name in ("contrast", "occlusion", "shot_noise") for level in (2, 5)]


def part_rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((folder / "parts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def preds(folder: Path, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(row[column] for column in ("key", *columns)) for row in part_rows(folder)]


@pytest.fixture(scope="module")
def grid_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some cells on the demo's first 120 digits, shared by all tests."""
    from vitscore.cli.main import main

    folder = tmp_path_factory.mktemp("grid") / "run"
    assert main(["robustness", "demo", *MODELS, *SOME, "--limit", "120", "-b", "16", "-o", str(folder)]) == 0
    return folder


def test_a_cell_is_what_a_run_of_its_own_predicts(grid_run: Path, vitscore: Call, tmp_path: Path) -> None:
    own = ("run", "demo", *MODELS, "--limit", 120, "-b", 16)
    assert vitscore(*own, "-o", tmp_path / "plain").code == 0
    assert preds(grid_run, "vit.pred", "vit.prob", "clip.prob") == preds(
        tmp_path / "plain", "vit.pred", "vit.prob", "clip.prob"
    )
    for cell in ("occlusion:5", "shot_noise:2"):
        out = tmp_path / cell.replace(":", "-")
        assert vitscore(*own, "-o", out, "--augment", cell.replace(":", ":severity=")).code == 0
        in_grid = preds(grid_run, f"vit@{cell}.pred", f"vit@{cell}.prob", f"clip@{cell}.prob")
        assert in_grid == preds(out, "vit.pred", "vit.prob", "clip.prob")


def test_the_figures_are_numpys(grid_run: Path) -> None:
    document = json.loads((grid_run / "robustness.json").read_bytes())
    rows = part_rows(grid_run)
    labels = np.array([row["label"] for row in rows])
    wrong = {
        (model, cell): np.array([row[f"{model}@{cell}.pred"] for row in rows]) != labels
        for model, cell in itertools.product(("vit", "clip"), SOME_CELLS)
    }
    assert document["samples"] == 120
    for model, figures in document["models"].items():
        clean = np.mean([row[f"{model}.pred"] == row["label"] for row in rows])
        assert figures["clean"]["accuracy"] == pytest.approx(clean)
        for cell in SOME_CELLS:
            name, level = cell.split(":")
            in_cell = figures["operators"][name]["severities"][level]
            assert in_cell["accuracy"] == pytest.approx(1 - wrong[model, cell].mean())
            assert in_cell["accuracy_ci"][0] <= in_cell["accuracy"] <= in_cell["accuracy_ci"][1]
        error = np.mean([wrong[model, cell].mean() for cell in SOME_CELLS])
        assert figures["mean_corruption_error"] == pytest.approx(error)
        assert figures["accuracy_lost"] == pytest.approx(clean - (1 - error))
        ratios = [
            sum(wrong[model, f"{name}:{level}"].mean() for level in (2, 5))
            / sum(wrong["vit", f"{name}:{level}"].mean() for level in (2, 5))
            for name in ("contrast", "occlusion", "shot_noise")
        ]
        assert figures["to_baseline"]["mean_corruption_error"] == pytest.approx(np.mean(ratios))
    (comparison,) = document["comparisons"]
    for name, figures in comparison["operators"].items():
        a, b = (sum(wrong[model, f"{name}:{level}"].astype(int) for level in (2, 5)) for model in ("vit", "clip"))
        assert figures["error_difference"] == pytest.approx((a - b).mean() / 2)
        half = 1.96 * (a - b).std(ddof=1) / np.sqrt(120) / 2
        low, high = figures["error_difference_ci"]
        assert (high - low) / 2 == pytest.approx(half, rel=1e-3) or (a == b).all()
        assert figures["severities"]["5"]["only_a"] == (~wrong["vit", f"{name}:5"] & wrong["clip", f"{name}:5"]).sum()
    raw = [figures["sign_p"] for figures in comparison["operators"].values()]
    adjusted = [figures["adjusted_p"] for figures in comparison["operators"].values()]
    assert adjusted == pytest.approx(multipletests(raw, method="holm")[1])


def test_the_interval_of_an_error_rate_holds_the_truth_where_cells_share_their_images() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(400):
        hardness = rng.beta(0.6, 1.8, 150)  # an image that is hard in one cell is hard in the others
        spread = Spread()
        spread.update((rng.random((5, 150)) < hardness).sum(axis=0))
        low, high = rate_interval(spread, 5) or (0.0, 0.0)
        hits += low <= 0.6 / 2.4 <= high
    assert hits / 400 > 0.92


def test_without_a_difference_on_any_image_none_is_claimed() -> None:
    difference = ErrorDifference()
    difference.update(np.array([1, 0, 2]), np.array([1, 0, 2]))
    figures = difference.figures(5)
    assert figures["error_difference"] == 0 and figures["sign_p"] == 1
    low, high = figures["error_difference_ci"]
    assert low < 0 < high


def test_a_grid_without_labels_says_so() -> None:
    counts = GridCounts(["a", "b"], {"contrast": [1]}, is_bad_wrong=False)
    document = make_document(counts, baseline=None, seed=0)
    assert document["models"]["a"]["mean_corruption_error"] is None
    assert "no sample has a label" in document["conclusions"][0]
    assert "<h1>" in render(document, {})
    assert table(document)


def test_the_baseline_may_change_without_scoring_again(grid_run: Path, vitscore: Call) -> None:
    command = ("robustness", "demo", *MODELS, *SOME, "--limit", 120, "-b", 16, "-o", grid_run)
    before = (grid_run / "robustness.json").read_bytes()
    done = vitscore(*command, "--baseline", "clip", "--json")
    assert done.code == 0
    document = json.loads(done.out)
    assert document["baseline"] == "clip"
    assert document["models"]["clip"]["to_baseline"]["mean_corruption_error"] == pytest.approx(1)
    assert vitscore(*command).code == 0
    assert (grid_run / "robustness.json").read_bytes() == before
    assert len(json.loads((grid_run / "run.json").read_bytes())["sessions"]) == 1


def test_the_folder_is_a_run_like_any_other(grid_run: Path, vitscore: Call) -> None:
    assert vitscore("metrics", grid_run, "--check").code == 0
    assert "done" in vitscore("status", grid_run).out
    document = json.loads((grid_run / "metrics.json").read_bytes())
    assert list(document["models"]) == ["vit", "clip"] and document["ledger"]["scored"] == 120
    record = json.loads((grid_run / "run.json").read_bytes())
    assert record["identity"]["cells"]["shot_noise:5"] == "shot_noise:photons=3"


def test_another_grid_in_the_same_folder_is_refused(grid_run: Path, vitscore: Call) -> None:
    command = ("robustness", "demo", *MODELS, "--limit", 120, "-b", 16, "-o", grid_run)
    done = vitscore(*command, "--operators", "contrast")
    assert done.code == 2 and "cells.shot_noise:5: shot_noise:photons=3 there, none here" in done.err
    done = vitscore(*command, *SOME, "--augment-seed", 1)
    assert done.code == 2 and "augment_seed" in done.err


def test_the_batch_size_changes_no_prediction(grid_run: Path, vitscore: Call, tmp_path: Path) -> None:
    columns = [f"{model}@{cell}.pred" for model in ("vit", "clip") for cell in SOME_CELLS]
    for size in (7, 64):
        out = tmp_path / str(size)
        assert vitscore("robustness", "demo", *MODELS, *SOME, "--limit", 120, "-b", size, "-o", out).code == 0
        assert preds(out, *columns) == preds(grid_run, *columns)


def test_a_killed_run_that_two_ranks_finish_has_the_bytes_of_an_undisturbed_one(
    make_shards: Call, digits: Any, vitscore: Call, tmp_path: Path
) -> None:
    shards = make_shards(*(digits[10 * number :][:10] for number in range(40)))
    command = ["robustness", str(shards), *MODELS, *SOME, "-b", "10", "-o"]
    alone, out = tmp_path / "alone", tmp_path / "out"
    assert vitscore(*command, alone).code == 0
    process = subprocess.Popen([sys.executable, "-m", "vitscore", *command, str(out)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(out.glob("parts/*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < len(list(out.glob("parts/*.parquet"))) < 40
    torchrun = (Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "-m", "vitscore")
    done = subprocess.run([*torchrun, *command, out], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    session = json.loads((out / "run.json").read_bytes())["sessions"][-1]
    assert min(session["images_by_rank"]) > 0
    assert part_rows(out) == part_rows(alone)
    for name in ("robustness.json", "metrics.json"):
        assert (out / name).read_bytes() == (alone / name).read_bytes()


@pytest.mark.parametrize("decoder", ["dali", "torchvision"])
def test_tiny_and_broken_images_survive_every_operator(
    decoder: str, make_shards: Call, digits: Any, vitscore: Call
) -> None:
    def png(size: tuple[int, int]) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", size, (200, 30, 90)).save(file, "PNG")
        return file.getvalue()

    tiny = [("a", {"png": png((1, 1)), "cls": b"1"}), ("b", {"png": png((3, 2)), "cls": b"2"})]
    shards = make_shards([*tiny, ("broken", {"png": b"x", "cls": b"1"}), ("none", {"png": png((5, 5))}), *digits[:4]])
    config = shards / "more.toml"
    config.write_text('max-bad = "50%"\non-bad-sample = "wrong"\n')
    command = ("robustness", shards, "-m", "demo-vit", "--decoder", decoder, "--config", config)
    done = vitscore(*command, "-o", shards / decoder)
    assert done.code == 0, done.err
    assert all(len(line) <= 80 for line in done.out.splitlines() if "written to" not in line)
    rows = {row["key"]: row for row in part_rows(shards / decoder)}
    for cell in make_cells([], []):
        column = f"demo-vit@{cell.replace('severity=', '')}.pred"
        assert rows["broken"][column] is None
        assert all(row[column] is not None for key, row in rows.items() if key != "broken")
    document = json.loads((shards / decoder / "robustness.json").read_bytes())
    assert document["samples"] == 7  # the broken image is wrong in every cell; the image without a label is not counted
    page = (shards / decoder / "robustness.html").read_text()
    assert page.count("data:image/png") == 71
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)


def test_dry_run_shows_cells_and_time_and_writes_nothing(vitscore: Call, tmp_path: Path) -> None:
    done = vitscore("robustness", "demo", *MODELS, *SOME, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    assert "cells    contrast: 2, 5" in done.out and "cells    6, and the unchanged images; 2 model(s)" in done.out
    assert re.search(r"time +\d+:\d\d on one rank, for about 500 images", done.out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--operators", "fog"), "unknown operator: --operators - expected one of brightness"),
        (("--severities", "0"), "expected of 1,2,3,4,5, got 0"),
        (("--severities", "high"), "expected of 1,2,3,4,5, got high"),
        (("--baseline", "resnet"), "expected vit or clip, got resnet"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(
    arguments: tuple[str, ...], said: str, vitscore: Call, tmp_path: Path
) -> None:
    done = vitscore("robustness", "demo", *MODELS, *arguments, "-o", tmp_path / "out")
    assert done.code == 2 and done.err.count("\n") == 1
    assert said in done.err
    assert not (tmp_path / "out").exists()


def test_the_page_escapes_names(grid_run: Path) -> None:
    text = (grid_run / "robustness.json").read_text().replace('"vit"', '"<script>alert(1)</script>"')
    page = render(json.loads(text), {})
    assert "<script" not in page and "&lt;script&gt;" in page


def test_operators_are_listed_with_ranges_and_severities(vitscore: Call) -> None:
    done = vitscore("robustness", "--list")
    assert done.code == 0
    assert all(name in done.out for name in OPERATORS)
    assert "sigma 0..1 (share of full scale): 0.08 0.12 0.18 0.26 0.38" in done.out
    assert all(len(line) <= 80 for line in done.out.splitlines())


@pytest.mark.parametrize("given", [["blur", "zoom"], ("blur", "zoom")])
def test_repeated_options_come_as_a_list_or_as_typer_020s_tuple(given: Any) -> None:
    assert as_list(given) == ["blur", "zoom"]
    assert (as_list("blur"), as_list(None)) == (["blur"], [])


def test_a_subset_keeps_the_lists_order_and_names_each_once() -> None:
    assert make_cells(["zoom", "contrast", "zoom"], [5, 1, 5]) == (
        "contrast:severity=1",
        "contrast:severity=5",
        "zoom:severity=1",
        "zoom:severity=5",
    )
    assert len(make_cells([], [])) == 70
    with pytest.raises(UsageError, match="unknown operator"):
        make_cells(["frost"], [])

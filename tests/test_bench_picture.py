"""The picture of a folder of benches: it is whole, it asks for nothing, and it shows the figures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from support import benchjson as made
from vitscore.bench.report.drawing import LABELS, Axis

Call = Callable[..., Any]
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_holds_every_stage_the_run_its_bound_and_the_peers(vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, made.results(), gpus=["H100 <80 GB>"])
    done = vitscore("bench", "picture", folder)
    assert done.code == 0, done.err
    root = ElementTree.parse(folder / "bench.svg").getroot()
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    for value in ("90,000", "8,100", "4,000", "3,100", "6,000", "2,000", "3,600", "2,100", "700"):
        assert value in texts
    for label in (
        "Reading",
        "vitscore, 16 threads",
        "clip-large-14 fp16 compiled batch 256",
        "transformers' pipeline batch 64",
    ):
        assert label in texts
    assert "1 x H100 <80 GB>, 16 cores of Some CPU; 2026-11-20" in texts
    assert "vit-base fp16 eager batch 256" not in texts
    kinds = [element.get("class") for element in root.iter(f"{SVG}rect")]
    assert kinds.count("bound") == 1 and kinds.count("peer") == 4 and kinds.count("ours") == 6


def test_bars_are_as_long_as_their_values_say(vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, {"whole": made.results()["whole"]})
    vitscore("bench", "picture", folder)
    root = ElementTree.parse(folder / "bench.svg").getroot()
    widths = [float(rect.get("width", "")) for rect in root.iter(f"{SVG}rect") if rect.get("class") != "paper"]
    assert widths == pytest.approx([value * widths[0] / 4_000 for value in (4_000, 3_600, 2_100, 700, 850)], abs=0.1)


def test_a_wide_range_of_rates_has_a_logarithmic_axis() -> None:
    axis = Axis([30, 90_000])
    assert axis.is_log and axis.ticks == [10, 100, 1_000, 10_000]
    assert axis.x(10) == LABELS
    assert axis.x(1_000) - axis.x(100) == pytest.approx(axis.x(10_000) - axis.x(1_000))
    assert not Axis([500, 9_000]).is_log and Axis([500, 9_000]).x(0) == LABELS


def test_the_page_is_one_file_with_the_conclusion_first(vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, made.results())
    vitscore("bench", "picture", folder)
    page = (folder / "bench.html").read_text()
    assert (
        "<h1>A whole run scores 3,600 images/s, 0.90 of what its stages allow; start included it is 3.0 times" in page
    )
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["']?(?:https?:|//)""", page.replace("http://www.w3.org", ""))
    assert "prefers-color-scheme: dark" in page and "<svg" in page and "2.14.0" in page


def test_a_folder_without_rates_has_no_picture(vitscore: Call, tmp_path: Path) -> None:
    folder = made.write(tmp_path, {"coverage": {"draws": 10}})
    done = vitscore("bench", "picture", folder)
    assert done.code == 0 and "no rates" in done.out
    assert not (folder / "bench.svg").exists()


def test_a_folder_without_benches_is_refused(vitscore: Call, tmp_path: Path) -> None:
    done = vitscore("bench", "picture", tmp_path)
    assert done.code == 2 and "no bench here" in done.err

"""Two benches side by side: which figures changed, and whether that is beyond the spread of the rounds."""

import json
import statistics
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import benchjson as made
from vitscore.bench.harness.timing import figure
from vitscore.bench.report.compare import Change

Call = Callable[..., Any]
ROUNDS = st.lists(st.floats(1, 1e9), min_size=1, max_size=5)


@given(ROUNDS, ROUNDS)
def test_a_change_is_beyond_the_spread_where_every_round_is_on_one_side_of_every_other(
    a: list[float], b: list[float]
) -> None:
    change = Change(("x",), "images/s", figure(a, "images/s"), figure(b, "images/s"))
    signs = {(one > other) - (one < other) for one, other in product(a, b)}
    expected = None if min(len(a), len(b)) < 2 else signs in ({1}, {-1})
    assert change.is_beyond == expected
    before, after = statistics.median(a), statistics.median(b)
    assert change.percent == pytest.approx(100 * (after / before - 1), rel=1e-9, abs=1e-6)


def test_every_figure_of_both_sides_is_compared(vitscore: Call, tmp_path: Path) -> None:
    one = {"rates": {"ours": made.images(90, 100, 110), "theirs": made.images(50, 60)}, "rows": 10, "old": 1.5}
    other = {"rates": {"ours": made.images(200, 210, 220), "theirs": made.images(55, 66)}, "rows": 12, "new": 2.5}
    a, b = made.write(tmp_path / "a", {"whole": one}), made.write(tmp_path / "b", {"whole": other})
    done = vitscore("bench", "compare", a / "whole.json", b / "whole.json", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)["benches"]["whole"]
    changes = {tuple(change["name"]): (change["percent"], change["is_beyond_spread"]) for change in found["changes"]}
    assert changes == {
        ("rates", "ours"): (pytest.approx(110), True),
        ("rates", "theirs"): (pytest.approx(10), False),
        ("rows",): (pytest.approx(20), None),
    }
    assert found["only_a"] == [["old"]] and found["only_b"] == [["new"]]


def test_the_table_says_it_in_80_columns(vitscore: Call, tmp_path: Path) -> None:
    long = "a model with a very long name, fp16, compiled, batch 256"
    one = {"images_per_s": {"ours": made.images(90, 100, 110), long: made.images(1e6, 2e6)}, "rows": 10}
    other = {"images_per_s": {"ours": made.images(200, 210), long: made.images(1.5e6, 2.5e7)}, "rows": 10}
    a, b = made.write(tmp_path / "a", {"whole": one}), made.write(tmp_path / "b", {"whole": other})
    lines = vitscore("bench", "compare", a, b).out.splitlines()
    assert "images_per_s [images/s]" in lines
    assert [line.split() for line in lines if "ours" in line] == [["ours", "100.0", "205.0", "+105.0%", "yes"]]
    assert any(line.startswith("  a model") and line.endswith("no") for line in lines)
    assert not any("rows" in line for line in lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 96


def test_other_hardware_versions_and_counts_are_said_in_words(vitscore: Call, tmp_path: Path) -> None:
    result = {"whole": {"rate": made.images(1, 2)}}
    a = made.write(tmp_path / "a", result, versions={"torch": "2.14.0", "timm": "1.0"})
    b = made.write(tmp_path / "b", result, gpus=["H100"], versions={"torch": "2.15.0", "timm": "1.0"}, is_quick=True)
    out = " ".join(vitscore("bench", "compare", a, b).out.split())
    assert "hardware differ: gpus none against H100" in out
    assert "versions differ: torch 2.14.0 against 2.15.0" in out
    assert "timm" not in out
    assert "B was measured with --quick" in out


def test_folders_are_compared_bench_by_bench(vitscore: Call, tmp_path: Path) -> None:
    results = made.results()
    a = made.write(tmp_path / "a", {name: results[name] for name in ("reading", "decoding", "whole")})
    b = made.write(tmp_path / "b", {name: results[name] for name in ("decoding", "whole", "startup")})
    (b / "other.json").write_text('{"mine": 1}')
    done = vitscore("bench", "compare", a, b, "--json")
    assert list(json.loads(done.out)["benches"]) == ["decoding", "whole"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"bench": "whole"}', "no 'started'"),
        ("[1, 2]", "a list"),
        ("{", "JSONDecodeError"),
        (None, "no such file"),
        ('{"bench": "other", "started": "", "hardware": {}, "versions": {}, "result": {}}', "not the same bench"),
    ],
)
def test_what_is_no_bench_is_one_line_and_exit_2(
    content: str | None, said: str, vitscore: Call, tmp_path: Path
) -> None:
    a = made.write(tmp_path, {"whole": {"rate": made.images(1, 2)}}) / "whole.json"
    b = tmp_path / "b.json"
    if content is not None:
        b.write_text(content)
    done = vitscore("bench", "compare", a, b)
    assert done.code == 2
    assert done.err.count("\n") == 1 and said in done.err and done.out == ""


def test_an_empty_folder_is_refused(vitscore: Call, tmp_path: Path) -> None:
    done = vitscore("bench", "compare", tmp_path, tmp_path)
    assert done.code == 2 and "no bench here" in done.err

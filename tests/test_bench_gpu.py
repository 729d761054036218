"""`make gpu`: its steps keep their limits and leave their figures, with and without a GPU."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vitscore.bench.gpu import figures, parts, runner
from vitscore.bench.gpu.day import REAL, TINY, VARIABLE, Day
from vitscore.bench.gpu.runner import KEPT, Part, Step, run_part

Call = Callable[..., Any]
ROOT = Path(__file__).parent.parent
FIGURE = "from vitscore.bench.gpu.day import Day; day = Day.from_environment(); day.figure('speed', 7.0, 'images/s')\n"


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.fixture
def rehearse(tmp_path: Path) -> Call:
    """Run steps as a part; returns how each ended, and all that was printed."""
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()

    def run(*steps: Step, limit_s: float = 60) -> tuple[dict[str, str], str]:
        said: list[str] = []
        ended = run_part(
            Part(limit_s, steps), 1, out=tmp_path / "out", work=tmp_path / "work", is_rehearsal=True, say=said.append
        )
        return {one.name: one.said for one in ended}, "\n".join(said)

    return run


def test_a_step_that_fails_or_takes_too_long_does_not_stop_the_next(rehearse: Call, tmp_path: Path) -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(30)'])"
    started = time.monotonic()
    ended, _ = rehearse(
        Step("hangs", 4, command=python(child)),
        Step("fails", 30, command=python("raise SystemExit(3)")),
        Step("works", 30, command=python("open('made', 'w').close()")),
    )
    assert list(ended.items()) == [("hangs", "over its time"), ("fails", "exit 3"), ("works", "ok")]
    assert time.monotonic() - started < 20
    assert (tmp_path / "work" / "made").exists()


def test_a_figure_is_there_before_its_step_ends_even_if_that_is_killed(rehearse: Call, tmp_path: Path) -> None:
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    ended, _ = rehearse(Step("killed", 5, command=python(FIGURE + stubborn)), limit_s=8)
    assert ended == {"killed": "over its time"}
    (line,) = figures.read(tmp_path / "out")
    assert (line["part"], line["step"], line["name"], line["value"]) == (1, "killed", "speed", 7.0)
    assert set(line) == {"part", "step", "name", "value", "unit", "expected", "note", "settings", "gpu", "at"}


def test_a_step_may_take_what_earlier_ones_left_but_not_more_than_twice_its_limit(rehearse: Call) -> None:
    limits = {"quick": 10, "short": 10, "long": 60, "last": 30}
    _, said = rehearse(*(Step(name, limit_s, command=python("")) for name, limit_s in limits.items()), limit_s=100)
    given = [int(seconds) for seconds in re.findall(r" s of +(\d+)  ok", said)]
    assert given == pytest.approx([10, 20, 80, 60], abs=3)


def test_no_step_begins_when_the_parts_time_is_up(rehearse: Call, tmp_path: Path) -> None:
    ended, _ = rehearse(Step("late", 30, command=python("open('made', 'w').close()")), limit_s=1)
    assert ended == {"late": "no time left"} and not (tmp_path / "work" / "made").exists()


def test_a_step_whose_need_failed_is_not_run(rehearse: Call) -> None:
    ended, said = rehearse(
        Step("first", 30, command=python("raise SystemExit(1)")),
        Step("second", 30, needs=("first",), command=python("")),
    )
    assert ended["second"] == "not run: it needs first" in said


def test_the_folder_keeps_a_few_flat_files_and_nothing_else(rehearse: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    litter = (
        f"import os; os.makedirs('{out}/.hypothesis/examples'); open('{out}/more.json', 'w').close()\n"
        f"open('{out}/trace.json.gz', 'wb').write(os.urandom(17 << 20)); print('a' * (3 << 20))\n"
        "assert os.environ['HYPOTHESIS_STORAGE_DIRECTORY'].startswith(os.getcwd())\n"
        "import tempfile; assert tempfile.gettempdir().startswith(os.getcwd())\n"
    )
    ended, said = rehearse(Step("litters", 30, command=python(FIGURE + litter)))
    assert ended == {"litters": "ok"}
    assert {path.name for path in out.iterdir()} == {"figures.jsonl", "log.txt", "table.txt"}
    assert ".hypothesis, more.json, trace.json.gz" in said
    assert len(KEPT) <= 8 and sum(path.stat().st_size for path in out.iterdir()) < 2 << 20
    assert "[... cut ...]" in (out / "log.txt").read_text()


def test_what_a_failed_step_said_last_is_printed_and_the_rest_is_in_the_log(rehearse: Call, tmp_path: Path) -> None:
    chatter = "for number in range(40): print('line', number)\nraise RuntimeError('this is why')"
    _, said = rehearse(
        Step("talks", 30, command=python(chatter)),
        Step("fails", 30, command=python("raise SystemExit(1)")),
        Step("quiet", 30, command=python("print('psst')")),
    )
    assert "this is why" in said and "line 39" in said and "line 10\n" not in said and "psst" not in said
    assert said.count("this is why") == 1
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "line 0\n" in log and log.index("part 1: talks") < log.index("part 1: quiet") < log.index("psst")


def test_an_interrupted_part_ends_its_step_and_prints_its_table(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom vitscore.bench.gpu.runner import Part, Step, run_part\n"
        f"code = {FIGURE!r} + 'import time; time.sleep(60)'\n"
        "steps = (Step('long', 60, command=(sys.executable, '-c', code)), Step('next', 60))\n"
        "out, work = Path.cwd() / 'out', Path.cwd() / 'work'\n"
        "print(run_part(Part(90, steps), 1, out=out, work=work, is_rehearsal=True, say=print))"
    )
    (tmp_path / "out").mkdir()
    process = subprocess.Popen([sys.executable, "-u", "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    while not figures.read(tmp_path / "out"):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=20)
    assert "said='interrupted'" in said and "name='next'" not in said
    assert (tmp_path / "out" / "table.txt").read_text().startswith("part 1")


def test_a_part_replaces_its_own_figures_alone(tmp_path: Path) -> None:
    for part in (1, 2):
        day(tmp_path, part).figure("speed", float(part))
    with (tmp_path / figures.FILE).open("a") as file:
        file.write('{"part": 2, "cut')
    figures.forget(tmp_path, 2)
    assert [line["part"] for line in figures.read(tmp_path)] == [1]


def day(out: Path, part: int = 1, step: str = "step") -> Day:
    return Day(part, step, out, out, is_rehearsal=True, ends=time.time() + 60)


def test_a_day_reaches_its_step_through_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = day(tmp_path)
    monkeypatch.setenv(VARIABLE, given.to_environment()[VARIABLE])
    assert Day.from_environment() == given and 50 < given.left_s < 60
    assert given.sizes is TINY and set(TINY.models) == set(REAL.models)


# The parts.


def test_the_limits_fit_into_their_parts_and_the_parts_into_a_quarter_of_an_hour() -> None:
    assert [parts.PARTS[number].limit_s for number in (1, 2, 3)] == [240, 360, 300]
    for part in parts.PARTS.values():
        assert sum(step.limit_s for step in part.steps) <= part.limit_s
        assert all(step.limit_s > 3 * runner.GRACE_S for step in part.steps)


def test_every_step_exists_and_comes_after_what_it_needs() -> None:
    for part in parts.PARTS.values():
        names = [step.name for step in part.steps]
        assert len(set(names)) == len(names)
        for step in part.steps:
            assert callable(parts.function_of(step.name))
            assert set(step.needs) <= set(names[: names.index(step.name)])
    first = [step.name for step in parts.PARTS[1].steps]
    assert first[:2] == ["probe", "twins"] and not any("compiled" in name for name in first)
    assert not any("dali" in step.needs for step in parts.PARTS[1].steps)


def test_every_row_of_a_table_belongs_to_a_step_of_its_part() -> None:
    for number, rows in figures.ROWS.items():
        assert {row.step for row in rows} <= {step.name for step in parts.PARTS[number].steps}
        assert 9 <= len(rows) <= 13


# The table.


def line(name: str, value: Any, *, gpu: str = "NVIDIA H200", unit: str = "images/s", part: int = 2) -> dict[str, Any]:
    expected = figures.EXPECTED.get(name)
    return {
        "part": part,
        "step": next(row.step for row in figures.ROWS[part] if row.name == name),
        "name": name,
        "value": value,
        "unit": unit,
        "expected": expected.on(gpu) if isinstance(expected, figures.Range) else expected,
        "note": "",
    }


def test_the_table_shows_what_was_expected_beside_what_was_found() -> None:
    lines = [line("B/16 run", 9120.4), line("best decoding", 8000.0), line("fp32 predictions that differ", 2, unit="")]
    told = figures.table(2, lines, {"whole": "ok", "peers": "over its time"}, is_rehearsal=False)
    assert all(len(text) <= figures.WIDTH for text in told) and len(told) <= 14
    rows = {text[:28].strip(): text[28:].split() for text in told}
    assert rows["B/16 run"] == ["8,500-10,000", "9,120", "images/s", "ok"]
    assert rows["best decoding"] == ["12,000-16,000", "8,000", "images/s", "LOW"]
    assert rows["fp32 predictions that differ"] == ["at", "most", "0", "2", "HIGH"]
    assert rows["times the loop"] == ["1.500", "or", "more", "-", "step", "peers:", "over", "its", "time"]
    rehearsed = figures.table(2, lines, {"whole": "ok"}, is_rehearsal=True)
    assert not any(word in " ".join(rehearsed).split() for word in ("ok", "LOW", "HIGH"))


def test_tests_are_counted_from_their_own_figures_also_if_their_step_was_ended() -> None:
    outcomes = ["passed", "passed", "failed"]
    lines = [
        {"part": 2, "step": "tests", "name": f"test a::{number}", "value": value, "unit": "", "note": ""}
        for number, value in enumerate(outcomes)
    ]
    (row,) = [
        text
        for text in figures.table(2, lines, {"tests": "over its time"}, is_rehearsal=False)
        if text.startswith("tests:")
    ]
    assert "2 passed, 1 failed" in row and row.endswith("BAD  over its time")


def test_an_h100_is_expected_to_be_a_fifth_slower_where_memory_decides() -> None:
    assert figures.EXPECTED["B/16 run"].on("NVIDIA H100 80GB HBM3") == [6800, 8000]  # type: ignore[union-attr]
    assert figures.EXPECTED["B/16 forward"].on("NVIDIA H100 80GB HBM3") == [10_500, 13_000]  # type: ignore[union-attr]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so_and_exits_4(tmp_path: Path) -> None:
    """As `make gpu` starts it: a tree of links on the path, nothing installed."""
    (tmp_path / "vitscore").mkdir()
    for path in (*(ROOT / "vitscore").iterdir(), *(ROOT / name for name in ("kernels", "shards", "bench"))):
        (tmp_path / "vitscore" / path.name).symlink_to(path)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1", "OUT": str(tmp_path / "out")}
    command = [sys.executable, "-m", "vitscore.bench.gpu"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1 and "no CUDA device" in done.stderr and "REHEARSE=1" in done.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run(command, env={**env, "PART": "4"}, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and done.stderr == "no such part: PART=4 - expected 1, 2 or 3, or none for all.\n"


def test_the_makefile_takes_an_interpreter_that_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^gpu: \$\(if \$\(GPU_PYTHON\),,\$\(READY\)\) links", makefile, re.M)
    done = subprocess.run(
        ["make", "--dry-run", "gpu", "GPU_PYTHON=/opt/python3"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "/opt/python3 -m vitscore.bench.gpu" in done.stdout and "pip install" not in done.stdout

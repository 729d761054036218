"""`vitscore bench`: which benches there are, what one leaves behind, and how it starts under a launcher."""

import ast
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitscore.bench.harness import catalogue, record, running
from vitscore.errors import SetupError
from vitscore.system import launcher

Call = Callable[..., Any]
ROOT = Path(__file__).parent.parent
PRESENT = [name for name in catalogue.NAMES if catalogue.path_of(name).is_file()]


def test_the_list_has_every_bench_with_its_question(vitscore: Call) -> None:
    done = vitscore("bench", "--list")
    assert done.code == 0
    lines = dict(line.split(maxsplit=1) for line in done.out.splitlines() if " " in line.strip())
    assert [line.split()[0] for line in done.out.splitlines()] == list(catalogue.NAMES)
    assert lines["counting"] == "How fast are predictions counted and logits ranked, against what people use?"
    assert lines["million"].endswith("(only by name)")


def test_every_module_that_measures_is_in_the_list() -> None:
    found = set()
    for path in (ROOT / "bench").rglob("*.py"):
        functions = {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        if {"measure", "table"} <= functions:
            found.add(path.stem)
    assert found <= {*catalogue.NAMES}


@pytest.mark.parametrize("name", PRESENT)
def test_a_bench_has_measure_with_quick_and_a_table(name: str) -> None:
    functions = {
        node.name: node
        for node in ast.parse(catalogue.path_of(name).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert [argument.arg for argument in functions["measure"].args.kwonlyargs] == ["quick"]
    assert [argument.arg for argument in functions["table"].args.args] == ["result"]


def test_without_names_the_standard_ones_run() -> None:
    assert catalogue.require_known([]) == list(catalogue.STANDARD)
    assert catalogue.require_known(["million", "whole", "million"]) == ["million", "whole"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("nope",), "unknown bench: nope - expected one of reading"), (("-o", "FILE", "counting"), "not a folder")],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], said: str, vitscore: Call, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = vitscore("bench", *(word.replace("FILE", str(tmp_path / "file")) for word in arguments))
    assert done.code == 2 and done.out == ""
    assert done.err.count("\n") == 1 and said in done.err


def test_a_bench_leaves_its_table_and_a_whole_json(vitscore: Call, tmp_path: Path) -> None:
    done = vitscore("bench", "offline", "--quick", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert catalogue.question("offline") in done.out and "metrics --labels" in done.out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["offline.json"]
    document = json.loads((tmp_path / "out" / "offline.json").read_bytes())
    assert list(document) == [
        *("schema", "bench", "started", "seconds", "quick", "hardware", "versions", "commit", "result"),
    ]
    assert document["bench"] == "offline" and document["quick"] is True and document["seconds"] > 0
    assert document["hardware"]["cpus"] >= 1 and document["versions"]["scikit-learn"]
    assert len(document["result"]["commands"]["metrics"]["seconds"]["rounds"]) == 1
    read = record.read(tmp_path / "out" / "offline.json")
    assert read.is_quick and read.result["rows"] == 20_000


def test_numbers_that_json_cannot_hold_are_null() -> None:
    assert record.without_nan({"a": [1.0, float("nan")], 2: (float("inf"),)}) == {"a": [1.0, None], "2": [None]}


def test_the_commit_is_the_checkouts() -> None:
    found = record.commit()
    if not (ROOT / ".git").exists():
        assert found is None
    else:
        assert found is not None and len(found.removesuffix("-dirty")) == 40


NO_SKLEARN = (
    "import sys\n"
    "class Without:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] == 'sklearn': raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
    "sys.meta_path.insert(0, Without())\n"
    "from vitscore.cli.main import main\nsys.exit(main(sys.argv[1:]))"
)


def test_a_missing_peer_is_one_line_with_its_cure(start: Call, tmp_path: Path) -> None:
    done = start(sys.executable, "-c", NO_SKLEARN, "bench", "counting", "-o", tmp_path)
    assert done.code == 4
    assert done.err.count("\n") == 1 and "pip install 'vitscore[bench]'" in done.err and "sklearn" in done.err
    listed = start(sys.executable, "-c", NO_SKLEARN, "bench", "--list")
    assert listed.code == 0 and "counting" in listed.out


class Bench:
    """A bench that takes no time."""

    def __init__(self, found: float | ModuleNotFoundError) -> None:
        self.found = found

    def measure(self, *, quick: bool = False) -> dict[str, Any]:
        if isinstance(self.found, ModuleNotFoundError):
            raise self.found
        return {"found": self.found, "is_quick": quick}

    def table(self, result: dict[str, Any]) -> list[str]:
        return [f"found {result['found']}"]


def test_a_bench_that_lacks_a_package_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benches = {"whole": Bench(ModuleNotFoundError("timm", name="timm.models")), "memory": Bench(2.0)}
    monkeypatch.setattr(catalogue, "load", benches.__getitem__)
    told: list[str] = []
    with pytest.raises(SetupError, match=r"whole - expected timm.*vitscore\[bench\]"):
        running.run(["whole", "memory"], tmp_path, quick=False, tell=told.append)
    assert "  found 2.0" in told
    assert record.read(tmp_path / "memory.json").result == {"found": 2.0, "is_quick": False}


def test_the_projects_own_missing_module_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "NAMES", ("absent",))
    with pytest.raises(ModuleNotFoundError):
        catalogue.load("absent")
    assert catalogue.question("absent") == ""


def test_what_a_launcher_told_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "r",
        "ACCELERATE_MIXED_PRECISION": "no",
        "OMP_NUM_THREADS": "1",
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OUT", "kept")
    launcher.leave()
    assert not set(told) & set(os.environ) and os.environ["OUT"] == "kept"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launcher.leave()
    assert os.environ["OMP_NUM_THREADS"] == "1", "no launcher said so: the user did"


LAUNCHERS = {
    "torchrun": ("torchrun", "--nproc-per-node", "2", "-m", "vitscore"),
    "accelerate": (
        *("accelerate", "launch", "--quiet", "--num_processes", "1", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "vitscore"),
    ),
}


@pytest.mark.parametrize("name", LAUNCHERS)
def test_under_a_launcher_rank_0_alone_measures(name: str, start: Call, tmp_path: Path) -> None:
    done = start(*LAUNCHERS[name], "bench", "coverage", "--quick", "-o", tmp_path)
    assert done.code == 0, done.err
    assert done.out.count(catalogue.question("coverage")) == 1
    assert record.read(tmp_path / "coverage.json").is_quick

"""The README shows what the commands print."""

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import benchjson as made

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def shown_demo() -> list[str]:
    match = re.search(r"<!-- demo -->\n```text\n(.*?)```", README, re.S)
    assert match
    return match[1].splitlines()


def test_the_demo_prints_what_the_readme_shows(tmp_path: Path, vitscore: Callable[..., Any]) -> None:
    done = vitscore("run", "demo", "-m", "demo-vit", "-m", "demo-clip", "-o", tmp_path / "demo-run")
    assert done.code == 0
    printed = [line.rstrip() for line in done.out.splitlines()]
    shown = shown_demo()
    assert len(shown) > 5
    for line in shown:
        if not any(words in line for words in ("images/s", "-bound (", "written to")):
            assert line in printed


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demo-run` in it, as the examples expect."""
    from vitscore import score

    folder = tmp_path_factory.mktemp("readme")
    score("demo", ["demo-vit", "demo-clip"], folder / "demo-run")
    return folder


EXAMPLES = re.findall(r"<!-- parts -->\n```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("code", EXAMPLES, ids=lambda code: code.split()[1])
def test_the_parts_can_be_read_as_the_readme_shows(
    code: str, demo_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo_folder)
    *body, last = ast.parse(code).body
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {}
    exec(compile(ast.Module(body, []), "README.md", "exec"), names)
    # DuckDB's relation is asked for its rows; `.show()` prints them and returns nothing.
    source = ast.unparse(last).removesuffix(".show()")
    found = eval(source, names)
    assert len(found.fetchall() if hasattr(found, "fetchall") else found) > 1


def test_there_is_an_example_for_each_of_three_tools() -> None:
    assert [code.split()[1] for code in EXAMPLES] == ["duckdb", "pandas", "polars"]


def test_the_readme_lists_every_operator_with_its_severities() -> None:
    from vitscore.augment.operators import OPERATORS

    for operator in OPERATORS.values():
        (row,) = (line for line in README.splitlines() if line.startswith(f"| `{operator.name}`: "))
        assert operator.does in row
        assert row.endswith("| " + ", ".join(f"{level[0]:g}" for level in operator.levels) + " |")


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    commands = re.findall(r"^\$ make (\S+)", README, re.M)
    assert commands == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    others = ["lowest", "lint", "types", "bench", "clean"]
    assert all(re.search(rf"^{name}:.*## ", makefile, re.M) for name in [*commands, *others])


OTHERS = {
    *("--max-restarts", "--nproc-per-node"),  # torchrun's
    *("--main_process_ip", "--main_process_port", "--machine_rank", "--max_restarts", "--multi_gpu"),  # accelerate's
    *("--num_machines", "--num_processes"),
    *("--gpus-per-node", "--nodes", "--ntasks-per-node", "--requeue", "--signal"),  # Slurm's
}


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"--[a-z][a-z_-]+", README)) - OTHERS))
def test_every_flag_the_readme_names_exists(flag: str, vitscore: Callable[..., Any]) -> None:
    commands = re.findall(r"^  (\w+)  ", vitscore("--help").out.partition("Commands:")[2], re.M)
    assert {"run", "metrics", "status"} <= set(commands)
    words = [(command,) for command in commands] + [("shards", "make"), ("bench", "compare"), ("bench", "plan")]
    assert any(re.search(rf"{flag}\b", vitscore(*some, "--help").out) for some in words)


def shown(mark: str) -> list[str]:
    match = re.search(rf"<!-- {mark} -->\n```text\n(.*?)```", README, re.S)
    assert match
    return match[1].splitlines()


def test_the_readme_lists_every_bench_as_the_command_does(vitscore: Callable[..., Any]) -> None:
    from vitscore.bench.harness.catalogue import question

    listed = vitscore("bench", "--list").out.splitlines()
    assert [line.split()[0] for line in shown("bench list")] == [line.split()[0] for line in listed]
    for line, told in zip(shown("bench list"), listed, strict=True):
        assert line == told or not question(told.split()[0])


def test_the_plan_that_the_readme_shows_is_what_the_command_prints(
    tmp_path: Path, vitscore: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made.write(Path("made-up"), made.results(), gpus=["Some GPU"])
    words = ("--images", "1e9", "--gpus", 64, "--price", "2.50", "--from", "made-up", "-m", "vit-base")
    assert shown("plan") == vitscore("bench", "plan", *words).out.splitlines()

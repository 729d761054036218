"""Who may import whom: the map of the project, held by tests."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KNOWS_TERMINALS = {
    "cli.py", "cli_bench.py", "cli_options.py", "cli_results.py", "cli_robustness.py", "cli_shards.py", "show.py",
}  # fmt: skip


def imported_by(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(folder: str) -> set[tuple[str, str]]:
    return {(path.name, name) for path in (ROOT / folder).glob("*.py") for name in imported_by(path)}


@pytest.mark.parametrize("folder", ["shards", "kernels"])
def test_shards_and_kernels_know_only_themselves_errors_and_durable_files(folder: str) -> None:
    allowed = (f"vitscore.{folder}", "vitscore.errors", "vitscore.system.durable")
    found = {(file, name) for file, name in own_imports(folder) if name.startswith("vitscore")}
    assert {(file, name) for file, name in found if not name.startswith(allowed)} == set()
    assert {name for _, name in own_imports(folder)} & {"torch", "transformers"} == set()


def test_decoding_and_models_do_not_know_each_other() -> None:
    decoding = {"decode", "decode_dali", "decode_torchvision", "imageheader"}
    modelling = {"models", "zeroshot", "checkpoints", "classes"}
    pairs = {(file.removesuffix(".py"), name.split(".")[1]) for file, name in own_imports("vitscore") if "." in name}
    assert {(file, name) for file, name in pairs if file in decoding and name in modelling} == set()
    assert {(file, name) for file, name in pairs if file in modelling and name in decoding} == set()


def test_only_the_command_line_knows_about_terminals() -> None:
    terminal = {"typer", "rich"}
    knowing = {file for file, name in own_imports("vitscore") if name.split(".")[0] in terminal}
    assert knowing <= KNOWS_TERMINALS


@pytest.mark.parametrize(
    "code",
    [
        "import vitscore.metrics.figures, vitscore.metrics.pairs, vitscore.metrics.fold, vitscore.rundir.status",
        "import vitscore.text.tables, vitscore.rundir.folder, vitscore.api, vitscore.rundir.parts",
        "import vitscore.report.page, vitscore.text.confusion",
        "import vitscore.kernels, vitscore.shards.samples, vitscore.shards.locate",
        "import vitscore.cli.main; assert vitscore.cli.main(['run', '--help']) == 0",
        "import vitscore.cli.main; assert vitscore.cli.main(['shards', '--help']) == 0",
        "import vitscore.cli.main; assert vitscore.cli.main(['robustness', '--list']) == 0",
        "import vitscore.robustness.grid, vitscore.robustness.html",
        "import vitscore.cli.main; assert vitscore.cli.main(['bench', '--list']) == 0",
        "import vitscore.bench.compare, vitscore.bench.plan, vitscore.bench.picture, vitscore.run.bottleneck",
    ],
)
def test_no_torch_is_imported(code: str) -> None:
    check = f"{code}\nimport sys\nheavy = {{'torch', 'transformers', 'nvidia.dali'}} & {{*sys.modules}}\n"
    check += "assert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_public_package_is_shadowed() -> None:
    """transformers asks for a package called `kernels`: it must not find this checkout's folder."""
    check = "import runpy, sys; sys.argv = ['vitscore', '--version']\n" + (
        "try:\n    runpy.run_module('vitscore', run_name='__main__', alter_sys=True)\nexcept SystemExit as end:\n"
        "    assert not end.code\n"
        "import importlib.util\nassert importlib.util.find_spec('kernels') is None\n"
        "import vitscore.kernels, vitscore.shards\n"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr

"""Who may import whom: one table of rooms, held against every import of the project."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.imports import circles, imported_by, modules, own_imports, room_of

ROOT = Path(__file__).parent.parent

# A room and the rooms that it may import, from the door down to the ground; `errors` is open to all.
ROOMS: dict[str, str] = {
    "__main__": "cli system",
    "vitscore": "api system",
    "cli": "augment bench classes decode metrics models plan report results robustness run rundir shards system text",
    "bench": "classes decode demo engine kernels metrics models plan preprocess ranks robustness run rundir shards "
    "system text vitscore",
    "api": "metrics plan ranks report run rundir text",
    "robustness": "augment decode engine metrics models plan preprocess ranks report run rundir shards system text",
    "text": "augment kernels metrics plan run shards",
    "run": "augment decode engine kernels metrics models plan preprocess ranks report rundir shards system",
    "engine": "augment decode kernels models plan preprocess ranks rundir shards system",
    "results": "classes kernels metrics plan rundir shards system",
    "plan": "augment classes decode models rundir shards system",
    "augment": "decode preprocess",
    "report": "kernels metrics rundir shards system",
    "demo": "metrics",
    "decode": "preprocess shards",
    "ranks": "shards system",
    "metrics": "classes kernels rundir shards system",
    "models": "classes kernels preprocess system",
    "rundir": "decode kernels shards system",
    "classes": "",
    "preprocess": "",
    "kernels": "system",
    "shards": "system",
    "system": "",
    "errors": "",
}
GROUND = {"vitscore.errors", "vitscore.system.durable"}
"""All of vitscore that `shards` and `kernels` may import."""
AT_THE_ROOT = {"__init__.py", "__main__.py", "api.py", "errors.py", "preprocess.py"}
MOST_MODULES = 15


def wrong_imports(root: Path) -> Iterator[str]:
    """Every import that the table does not allow, and every circle."""
    found = modules(root)
    edges = own_imports(found)
    for name, others in edges.items():
        room = room_of(name, found[name])
        for other in sorted(others):
            target = room_of(other, found[other])
            if target not in {room, "errors", *ROOMS[room].split()}:
                yield f"{name} imports {other}"
            if room in ("shards", "kernels") and target != room and other not in GROUND:
                yield f"{name} imports {other}, beside errors and durable"
    for circle in circles(edges):
        yield f"circle: {', '.join(circle)}"


def test_no_room_imports_another_than_the_table_says_and_there_is_no_circle() -> None:
    assert list(wrong_imports(ROOT)) == []


def test_the_table_has_every_room_and_no_circle() -> None:
    found = modules(ROOT)
    assert {room_of(name, path) for name, path in found.items()} == set(ROOMS)
    assert circles({room: set(others.split()) for room, others in ROOMS.items()}) == []


@pytest.mark.parametrize(
    ("place", "line", "said"),
    [
        ("shards/tar/index.py", "import vitscore.engine.loop", "shards.tar.index imports vitscore.engine.loop"),
        ("kernels/cpu_bf16/lanes.py", "from vitscore.shards import tar", "vitscore.kernels.cpu_bf16.lanes imports"),
        ("vitscore/models/cpu_bf16/trunk.py", "def f():\n    import vitscore.decode.dali", "cpu_bf16.trunk imports"),
        ("vitscore/system/durable.py", "if False:\n    from vitscore.system import machine", "circle: vitscore.system"),
    ],
)
def test_a_planted_import_in_a_subfolder_is_found(tmp_path: Path, place: str, line: str, said: str) -> None:
    for folder in ("vitscore", "kernels", "shards", "bench"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("demo", "*.png", "__pycache__"))
    with open(tmp_path / place, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    assert any(said in problem for problem in wrong_imports(tmp_path))


def test_shards_and_kernels_need_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers"}
    names = {(name, other.split(".")[0]) for name, path in modules(ROOT).items() for other in imported_by(path)}
    lean = ("vitscore.shards", "vitscore.kernels")
    assert {name for name, top in names if top in heavy and name.startswith(lean)} == set()


def test_only_the_command_line_and_its_text_know_about_terminals() -> None:
    found = modules(ROOT)
    terminal = {
        room_of(name, path)
        for name, path in found.items()
        if {other.split(".")[0] for other in imported_by(path)} & {"typer", "rich"}
    }
    assert terminal == {"cli", "text"}


def test_folders_are_small_and_the_root_holds_five_modules() -> None:
    assert {path.name for path in (ROOT / "vitscore").glob("*.py")} == AT_THE_ROOT
    folders: dict[Path, int] = {}
    for path in modules(ROOT).values():
        folders[path.parent] = folders.get(path.parent, 0) + (path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import vitscore.metrics.figures, vitscore.metrics.pairs, vitscore.metrics.fold, vitscore.rundir.status",
        "import vitscore.text.tables, vitscore.rundir.folder, vitscore.api, vitscore.rundir.parts",
        "import vitscore.report.page, vitscore.text.confusion",
        "import vitscore.kernels, vitscore.shards.samples, vitscore.shards.locate",
        "import vitscore.cli.main; assert vitscore.cli.main.main(['run', '--help']) == 0",
        "import vitscore.cli.main; assert vitscore.cli.main.main(['shards', '--help']) == 0",
        "import vitscore.cli.main; assert vitscore.cli.main.main(['robustness', '--list']) == 0",
        "import vitscore.robustness.grid, vitscore.robustness.html",
        "import vitscore.cli.main; assert vitscore.cli.main.main(['bench', '--list']) == 0",
        "import vitscore.bench.report.compare, vitscore.bench.report.plan, vitscore.bench.report.picture",
        "import vitscore.run.bottleneck",
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

"""What is installed: one package, its data, nothing at the top level but itself; without DALI; lower bounds."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from support.imports import modules

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            target = folder / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    done = subprocess.run([*words, str(folder / "source")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_the_whole_package_below_one_name(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name.split("/")[0] for name in names} == {"vitscore", "vitscore-0.1.0.dist-info"}
    expected = {f"vitscore/{path.relative_to(ROOT / 'vitscore')}" for path in (ROOT / "vitscore").rglob("*.py")}
    for folder in ("kernels", "shards", "bench"):
        expected |= {f"vitscore/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob("*.py")}
    assert expected == {name for name in names if name.endswith(".py")}
    assert {f"vitscore/demo/shards/demo-{number:03d}.tar" for number in range(4)} <= names
    for model in ("demo-vit", "demo-clip"):
        assert f"vitscore/demo/{model}/model.safetensors" in names
    for path in (ROOT / "vitscore" / "report").rglob("*"):
        if path.suffix in (".py", ".html", ".css", ".js"):
            assert path.relative_to(ROOT).as_posix() in names
    assert "vitscore/py.typed" in names
    for path in (ROOT / "bench" / "results").rglob("*.json"):
        assert f"vitscore/{path.relative_to(ROOT).as_posix()}" in names


def test_every_folder_with_modules_is_a_package_that_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules(ROOT).items()}
    assert sorted(listed) == sorted(found)


def test_dali_is_asked_for_on_linux_alone(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read("vitscore-0.1.0.dist-info/METADATA").decode()
    lines = [line for line in metadata.splitlines() if "nvidia-dali" in line]
    assert len(lines) == 1
    assert 'platform_system == "Linux"' in lines[0]


def test_what_the_benches_import_is_a_dependency_or_in_their_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["bench"]]
    named = {re.split(r"[\[>;=]", line)[0].strip().lower().replace("_", "-") for line in wanted}
    assert all(">=" in line for line in wanted)
    assert "vitscore[bench]" in project["optional-dependencies"]["test"]
    distributions = packages_distributions()
    for path in (ROOT / "bench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for top in {name.split(".")[0] for name in names} - {*sys.stdlib_module_names, "vitscore"}:
                found = {name.lower().replace("_", "-") for name in distributions.get(top, [top])}
                assert found & named, f"{path.name} imports {top}"


def test_constraints_hold_versions_and_no_address() -> None:
    lines = (ROOT / "constraints.txt").read_text().split()
    assert all(line.count("==") == 1 and "/" not in line for line in lines)
    assert len(lines) > 50


def pins(name: str) -> dict[str, Version]:
    """A constraints file: what it names, and at which version."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert len({canonicalize_name(package) for package, _ in pairs}) == len(pairs)
    return {canonicalize_name(package): Version(version) for package, version in pairs}


def test_the_lowest_constraints_are_the_lower_bounds_and_the_tested_tools() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lowest, tested = pins("tests/constraints-lowest.txt"), pins("constraints.txt")
    bounds = {}
    for requirement in map(Requirement, [*project["dependencies"], *extras["s3"]]):
        (specifier,) = requirement.specifier
        assert specifier.operator == ">="
        bounds[canonicalize_name(requirement.name)] = Version(specifier.version)
    assert {name: lowest.get(name) for name in bounds} == bounds
    listed = (ROOT / "tests/constraints-lowest.txt").read_text().split("\n\n")[0].splitlines()[1:]
    assert {canonicalize_name(line.split("==")[0]) for line in listed} == set(bounds)
    tools = {canonicalize_name(Requirement(line).name) for extra in ("test", "bench", "dev") for line in extras[extra]}
    tools &= tested.keys() - bounds.keys()
    assert len(tools) > 10
    assert {name: lowest.get(name) for name in tools} == {name: tested[name] for name in tools}


def test_without_dali_the_torchvision_decoder_serves(tmp_path: Path, start: Callable[..., Any]) -> None:
    code = (
        "import sys\n"
        "class NoDali:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('nvidia.dali'): raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoDali())\n"
        "from vitscore.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = (sys.executable, "-c", code, "run", "demo", "-m", "demo-vit", "-o", tmp_path / "out", "--limit", 50)
    done = start(*command)
    assert done.code == 0, done.err
    done = start(*command, "--overwrite", "--decoder", "dali")
    assert done.code == 4
    assert "pip install nvidia-dali" in done.err

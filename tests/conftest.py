"""What tests share: real tars of real digits, and the command line called in this process or in its own."""

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DEMO_SHARDS = ROOT / "vitscore" / "demo" / "shards"
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Sample = tuple[str, Mapping[str, bytes]]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_tar(path: Path, samples: Sequence[Sample]) -> Path:
    """A tar of samples: (key, {extension: content})."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read_tar(path: Path) -> list[Sample]:
    """The samples of a tar whose members are adjacent."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = member.name.split(".", 1)
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return list(samples.items())


@pytest.fixture(scope="session")
def digits() -> list[Sample]:
    """The demo's 500 held-out digits: (key, {png, cls})."""
    return [sample for path in sorted(DEMO_SHARDS.glob("*.tar")) for sample in read_tar(path)]


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of shards with a classes.txt; returns the folder."""

    def make(*shards: Sequence[Sample], name: str = "shards", classes: Sequence[str] = DIGIT_NAMES) -> Path:
        folder = tmp_path / name
        for number, samples in enumerate(shards):
            write_tar(folder / f"s-{number}.tar", samples)
        (folder / "classes.txt").write_text("".join(f"{text}\n" for text in classes))
        return folder

    return make


@pytest.fixture
def vitscore(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Call the command line in this process, without its start-up cost."""

    def call(*arguments: object) -> Done:
        from vitscore.cli import main

        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return call


def start(*command: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 240) -> Done:
    """Run a command of the environment in a process of its own."""
    words = [str(word) for word in command]
    if words[0] in ("vitscore", "accelerate", "torchrun"):
        words[0] = str(Path(sys.executable).parent / words[0])
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session", name="start")
def start_fixture() -> Callable[..., Done]:
    return start

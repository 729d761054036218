"""What tests share: real tars of real digits, and the command line called in this process or in its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from support.commands import Done, start
from support.tars import DEMO_SHARDS, DIGIT_NAMES, Sample, read_tar, write_tar


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
        from vitscore.cli.main import main

        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session", name="start")
def start_fixture() -> Callable[..., Done]:
    return start

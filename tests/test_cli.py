"""Options, help and errors of the command line: one clear line and the right exit code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
RUN_FLAGS = """
--model --output --config --classes --templates --label-map --labels --groups --label-key --image-key --split
--batch-size --device --precision --compile --no-compile --decoder --decode-threads --max-pixels --top-k --on-bad-sample
--on-bad-shard --max-bad --save --tta --augment --augment-seed --limit --overwrite --dry-run --per-class --json
--progress --no-progress --debug --allow-pipe --cache-dir --cache-size -m -o -b -j
""".split()


def test_the_flags_of_run_are_these() -> None:
    """Scripts depend on the options; adding or removing one changes the contract."""
    import typer

    from vitscore.cli.main import app

    command = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts) if flag[0] == "-"}
    assert flags == set(RUN_FLAGS)


def test_the_commands_are_these(vitscore: Call) -> None:
    done = vitscore("--help")
    assert done.code == 0
    for name in ("run", "status", "metrics", "report", "robustness", "shards", "demo", "bench"):
        assert f" {name} " in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "--colour", "red"), 2, "--colour"),
        (("run", "demo", "-o", "OUT"), 2, "model"),
        (("run", "-m", "demo-vit", "-o", "OUT"), 2, "shards"),
        (("run", "demo", "-m", "demo-vit"), 2, "output"),
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "-b", "many"), 2, "--batch-size"),
        (("run", "demo", "-m", "demo-vit", "-m", "demo-vit", "-o", "OUT"), 2, "NAME="),
        (("run", "demo", "-m", "no-such-folder/model", "-o", "OUT"), 4, "no-such-folder/model"),
        (("run", "OUT/none-*.tar", "-m", "demo-vit", "-o", "OUT"), 2, "none-*.tar"),
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "--classes", "OUT/none.txt"), 2, "none.txt"),
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "--precision", "fp16", "--device", "cpu"), 2, "fp16"),
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "--config", "OUT/none.toml"), 2, "none.toml"),
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "--augment", "fog"), 2, "one of brightness, contrast"),
        (("run", "demo", "-m", "demo-vit", "-o", "OUT", "--augment", "zoom:factor=9"), 2, "1..8"),
        (("metrics", "OUT"), 2, "no run here"),
        (("status", "OUT"), 2, "no run here"),
        (("dance",), 2, "dance"),
        (("bench", "--colour"), 2, "--colour"),
        (("bench", "plan"), 2, "--images"),
    ],
)
def test_bad_input_is_one_line_and_the_right_code(
    arguments: tuple[str, ...], code: int, said: str, vitscore: Call, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = vitscore(*(word.replace("OUT", str(out)) for word in arguments))
    assert done.code == code, done.err
    assert done.err.count("\n") == 1, done.err
    assert said in done.err
    assert done.out == ""
    assert not out.exists()


def test_cuda_without_a_device_is_missing_set_up(vitscore: Call, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out", "--device", "cuda")
    assert done.code == 4
    assert "no CUDA device" in done.err


def test_an_output_path_that_is_a_file_is_refused(vitscore: Call, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    done = vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out")
    assert done.code == 2
    assert (tmp_path / "out").read_text() == "mine"


def test_flags_win_over_the_config_file(vitscore: Call, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        f'shards = ["demo"]\nmodel = "demo-vit"\noutput = "{tmp_path / "a"}"\ntop-k = 3\nbatch-size = 32\n'
    )
    done = vitscore("run", "--config", config, "-b", "16", "--dry-run")
    assert done.code == 0, done.err
    assert "batch_size = 16: asked for" in done.out
    assert "top_k = 3" in done.out


def test_piped_output_fits_80_columns_and_progress_is_silent(start: Call, tmp_path: Path) -> None:
    done = start("vitscore", "run", "demo", "-m", "demo-vit", "-m", "demo-clip", "-o", tmp_path / "o", "--limit", "50")
    assert done.code == 0
    assert done.err == ""
    table = [line for line in done.out.splitlines() if not line.startswith("written to")]
    assert max(map(len, table)) <= 80
    assert "\x1b" not in done.out


def test_status_shows_what_is_done(vitscore: Call, tmp_path: Path) -> None:
    assert vitscore("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out").code == 0
    (tmp_path / "out" / "parts" / "0000001-demo-001.parquet").unlink()
    done = vitscore("status", tmp_path / "out")
    assert "3 of 4 done, 1 left" in done.out

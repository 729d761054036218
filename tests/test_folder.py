"""The run's folder: resumed, refused or started anew, and never a loss."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from vitscore import load_run
from vitscore.errors import UsageError
from vitscore.models.checkpoint import find

Call = Callable[..., Any]
MODELS = ("-m", "demo-vit", "-m", "demo-clip")


def part_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "parts").iterdir())}


def test_a_resume_scores_only_what_is_missing_and_ends_the_same(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:30], digits[30:70], digits[70:75])
    out = shards / "out"
    assert vitscore("run", shards, *MODELS, "-o", out).code == 0
    tables, metrics = part_tables(out), (out / "metrics.json").read_bytes()
    kept = (out / "parts" / "0000000-s-0.parquet").stat().st_mtime_ns
    (out / "parts" / "0000001-s-1.parquet").unlink()
    (out / "metrics.json").unlink()
    (out / "notes.txt").write_text("mine")
    assert vitscore("run", shards, *MODELS, "-o", out).code == 0
    assert part_tables(out) == tables
    assert (out / "metrics.json").read_bytes() == metrics
    assert (out / "parts" / "0000000-s-0.parquet").stat().st_mtime_ns == kept


def test_another_run_in_the_folder_is_refused_and_each_difference_named(
    make_shards: Call, vitscore: Call, digits: Any
) -> None:
    shards = make_shards(digits[:20])
    out = shards / "out"
    assert vitscore("run", shards, "-m", "demo-vit", "-o", out, "-b", 8).code == 0
    before = part_tables(out)
    done = vitscore("run", shards, "-m", "demo-vit", "-o", out, "-b", 4, "--top-k", 3)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "batch_size: 8 there, 4 here" in done.err
    assert "top_k: 5 there, 3 here" in done.err
    assert part_tables(out) == before
    done = vitscore("run", shards, *MODELS, "-o", out)
    assert done.code == 2
    assert "a separate folder" in done.err
    assert vitscore("run", shards, "-m", "demo-vit", "-o", out, "-b", 4, "--overwrite").code == 0
    assert json.loads((out / "run.json").read_bytes())["choices"]["batch_size"]["value"] == 4


def test_changed_shards_are_another_run(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:20])
    assert vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out").code == 0
    make_shards(digits[:40])
    done = vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out")
    assert done.code == 2
    assert "corpus.fingerprint" in done.err


def test_a_folder_with_other_files_is_never_touched(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:5])
    out = shards / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for extra in ((), ("--overwrite",)):
        assert vitscore("run", shards, "-m", "demo-vit", "-o", out, *extra).code == 2
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_no_space_left_is_one_line_and_leaves_nothing_half_written(tmp_path: Path, start: Call) -> None:
    """A limit on file sizes simulates a full disk: the same system call fails with a similar error."""
    code = (
        "import resource, signal, sys; from vitscore.cli.main import main\n"
        "import vitscore.engine.loop, vitscore.models.image_model\n"
        "import vitscore.run.sessions as sessions; began = sessions.start\n"
        "def start(*a, **k):\n    began(*a, **k); resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "sessions.start = start\nsys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    done = start(sys.executable, "-c", code, "run", "demo", "-m", "demo-vit", "-o", out)
    assert done.code == 4, done.err
    assert done.err.count("\n") == 1
    assert "cannot write" in done.err and "File too large. Free some space" in done.err
    assert list((out / "parts").iterdir()) == []
    assert start("vitscore", "run", "demo", "-m", "demo-vit", "-o", out).code == 0


def test_overwrite_removes_nothing_before_the_new_run_can_start(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    shards = make_shards(digits[:20])
    command = ("run", shards, "-m", "demo-vit", "-o", shards / "out")
    assert vitscore(*command).code == 0
    before = part_tables(shards / "out"), (shards / "out" / "metrics.json").read_bytes()
    (tmp_path / "labels.csv").write_text("name,id\nx,1\n")
    cut = tmp_path / "cut-vit"
    shutil.copytree(find("demo-vit").path, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    assert vitscore(*command, "--overwrite", "--labels", tmp_path / "labels.csv").code == 3
    assert vitscore("run", shards, "-m", cut, "-o", shards / "out", "--overwrite").code == 4
    assert (part_tables(shards / "out"), (shards / "out" / "metrics.json").read_bytes()) == before


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_folder(vitscore: Call, tmp_path: Path) -> None:
    for name, lost in (("demo-vit", "preprocessor_config.json"), ("demo-clip", "tokenizer.json")):
        copy = tmp_path / name
        shutil.copytree(find(name).path, copy)
        (copy / lost).unlink()
        for extra in ((), ("--dry-run",)):
            done = vitscore("run", "demo", "-m", copy, "-o", tmp_path / "out", *extra)
            assert done.code == 4
            assert lost in done.err and done.err.count("\n") == 1
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_record", [True, False])
def test_overwrite_never_removes_what_is_not_a_runs(
    has_record: bool, make_shards: Call, vitscore: Call, digits: Any
) -> None:
    shards = make_shards(digits[:5])
    out = shards / "out"
    if has_record:
        assert vitscore("run", shards, "-m", "demo-vit", "-o", out).code == 0
    (out / "parts").mkdir(parents=True, exist_ok=True)
    (out / "parts" / "mine.csv").write_text("precious")
    done = vitscore("run", shards, "-m", "demo-vit", "-o", out, "--overwrite")
    assert done.code == 2
    assert "parts/mine.csv" in done.err
    assert (out / "parts" / "mine.csv").read_text() == "precious"


def test_a_resume_may_spell_the_shards_otherwise(
    make_shards: Call, vitscore: Call, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_shards(digits[:10], digits[10:20])
    monkeypatch.chdir(shards.parent)
    assert vitscore("run", "shards", "-m", "demo-vit", "-o", "out").code == 0
    before = part_tables(Path("out"))
    Path("out/parts/0000001-s-1.parquet").unlink()
    assert vitscore("run", shards, "-m", "demo-vit", "-o", "out").code == 0
    assert part_tables(Path("out")) == before


@pytest.mark.parametrize("lost", ["parts", "shards.parquet"])
def test_a_folder_that_lost_something_is_made_good(lost: str, make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:10], digits[10:20])
    out = shards / "out"
    command = ("run", shards, "-m", "demo-vit", "-o", out)
    assert vitscore(*command).code == 0
    before = part_tables(out), (out / "metrics.json").read_bytes()
    if lost == "parts":
        shutil.rmtree(out / "parts")
    else:
        (out / lost).unlink()
    assert vitscore("status", out).code == 0
    assert vitscore(*command).code == 0
    assert (part_tables(out), (out / "metrics.json").read_bytes()) == before


def test_limits_do_not_depend_on_restarts(make_shards: Call, vitscore: Call, digits: Any) -> None:
    """The remaining shard has only bad samples; over the whole corpus they are few."""
    wrong = [(f"w{row}", {**digits[row][1], "cls": b"77"}) for row in range(3)]
    shards = make_shards(digits[:60], wrong)
    command = ("run", shards, "-m", "demo-vit", "-o", shards / "out")
    assert vitscore(*command).code == 0
    (shards / "out" / "parts" / "0000001-s-1.parquet").unlink()
    assert vitscore(*command).code == 0


def test_a_missing_part_is_never_an_end(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:10], digits[10:20])
    assert vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out").code == 0
    (shards / "out" / "parts" / "0000001-s-1.parquet").unlink()
    assert vitscore("metrics", shards / "out").code == 0
    with pytest.raises(UsageError, match="not finished"):
        load_run(shards / "out")

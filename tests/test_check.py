"""`vitscore metrics DIR --check`: an intact run passes, and every difference is reported in one line."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscore.rundir.parts import FOOTER_KEY, Footer, read_footer

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, digits: Any) -> Path:
    """Make a corpus with some faults and score it, once: `shards` and `out` in one folder."""

    from support.tars import write_tar
    from vitscore import score

    root = tmp_path_factory.mktemp("scored")
    broken = [*digits[20:38], ("bad", {"png": b"x", "cls": b"1"}), ("label", {**digits[38][1], "cls": b"10"})]
    for number, samples in enumerate((digits[:20], broken, [], digits[40:60])):
        write_tar(root / "shards" / f"s-{number}.tar", samples)
    data = (root / "shards" / "s-3.tar").read_bytes()
    (root / "shards" / "s-3.tar").write_bytes(data[: len(data) // 2 + 300])
    (root / "shards" / "classes.txt").write_text("zero one two three four five six seven eight nine".replace(" ", "\n"))
    score(str(root / "shards"), "demo-vit", root / "out", on_bad_shard="skip", max_bad="50%")
    return root


@pytest.fixture
def run(scored: Path, tmp_path: Path) -> Path:
    """Return a copy of that run to tamper with; its shards remain in place."""
    shutil.copytree(scored / "out", tmp_path / "out")
    return tmp_path / "out"


def rewrite(part: Path, change: Callable[[pa.Table], pa.Table], **footer: Any) -> None:
    """Change a part's rows and footer, keeping the footer valid."""
    written = read_footer(part)
    assert written is not None
    values = {**asdict(written), **footer}
    table = change(pq.read_table(part))
    pq.write_table(table.replace_schema_metadata({FOOTER_KEY: Footer(**values).dump()}), part)


def with_values(table: pa.Table, name: str, values: dict[int, Any]) -> pa.Table:
    column = table[name].to_pylist()
    for row, value in values.items():
        column[row] = value
    field = table.schema.field(name)
    return table.set_column(table.schema.get_field_index(name), field, pa.array(column, field.type))


def part(run: Path, ordinal: int) -> Path:
    (path,) = (run / "parts").glob(f"{ordinal:07d}-*.parquet")
    return path


def refused(done: Any, *words: str) -> None:
    assert (done.code, done.out) == (3, ""), done
    assert done.err.count("\n") == 1
    for word in words:
        assert word in done.err, done.err


def test_an_intact_run_passes_and_nothing_is_written(run: Path, vitscore: Call) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    done = vitscore("metrics", run, "--check")
    assert done.code == 0, done.err
    samples = json.loads((run / "metrics.json").read_bytes())["ledger"]["expected"]
    assert done.out.startswith(f"4 shards, {samples} samples: every sample is in the parts exactly once\n")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_totals_can_be_printed_as_json(run: Path, vitscore: Call) -> None:
    ledger = json.loads((run / "metrics.json").read_bytes())["ledger"]
    document = json.loads(vitscore("metrics", run, "--check", "--json").out)
    figures = {name: ledger[name] for name in ("scored", "bad")}
    assert document == {"shards": 4, "samples": ledger["expected"], **figures, "has_labels": True}


def test_a_changed_prediction_is_found(run: Path, vitscore: Call) -> None:
    path = part(run, 0)
    pred = pq.read_table(path)["demo-vit.pred"].to_pylist()[3]
    rewrite(path, lambda table: with_values(table, "demo-vit.pred", {3: (pred + 1) % 10}))
    refused(vitscore("metrics", run, "--check"), "metrics.json", "file does not match the parts", "models.demo-vit")


def test_a_changed_label_is_found_though_the_metrics_follow_it(run: Path, vitscore: Call) -> None:
    label = pq.read_table(part(run, 0))["label"].to_pylist()[4]
    rewrite(part(run, 0), lambda table: with_values(table, "label", {4: (label + 1) % 10}))
    assert vitscore("metrics", run).code == 0
    refused(vitscore("metrics", run, "--check"), "label differs", "s-0.tar[", f"expected {label}, got")


def test_a_removed_row_is_found(run: Path, vitscore: Call) -> None:
    rewrite(part(run, 0), lambda table: table.slice(1))
    refused(vitscore("metrics", run, "--check"), "samples do not add up", "s-0.tar", "expected 20")


def test_a_removed_row_is_found_though_footer_and_metrics_follow_it(run: Path, vitscore: Call) -> None:
    rewrite(part(run, 0), lambda table: table.slice(1), expected=19)
    assert vitscore("metrics", run).code == 0
    refused(vitscore("metrics", run, "--check"), "number of samples differs", "s-0.tar", "20, as in the shard, got 19")


def test_swapped_rows_are_found(run: Path, vitscore: Call) -> None:
    rewrite(part(run, 0), lambda table: table.take([1, 0, *range(2, 20)]))
    refused(vitscore("metrics", run, "--check"), "keys differ", "s-0.tar, sample 0")


def test_a_reason_that_the_shard_does_not_give_is_found(run: Path, vitscore: Call) -> None:
    rewrite(part(run, 1), lambda table: with_values(table, "reason", {19: "label is not a class: 'x'"}))
    assert vitscore("metrics", run).code == 0
    refused(vitscore("metrics", run, "--check"), "reason differs", "s-1.tar[label]", "label out of range")


def test_a_missing_part_is_found(run: Path, vitscore: Call) -> None:
    part(run, 2).unlink()
    assert vitscore("metrics", run).code == 0
    refused(vitscore("metrics", run, "--check"), "shard has no part", "s-2.tar")


def test_a_part_of_another_run_is_found(run: Path, vitscore: Call) -> None:
    rewrite(part(run, 1), lambda table: table, identity="0" * 64)
    refused(vitscore("metrics", run, "--check"), "part of another run", "s-1.tar", "got 000000000000")


def test_a_torn_part_is_found(run: Path, vitscore: Call) -> None:
    part(run, 1).write_bytes(part(run, 1).read_bytes()[:-20])
    refused(vitscore("metrics", run, "--check"), "not a part", "0000001-s-1.parquet")


def test_edited_metrics_are_found(run: Path, vitscore: Call) -> None:
    document = json.loads((run / "metrics.json").read_bytes())
    accuracy = document["models"]["demo-vit"]["accuracy"]
    document["models"]["demo-vit"]["accuracy"] = 1.5
    (run / "metrics.json").write_text(json.dumps(document, indent=2) + "\n")
    refused(vitscore("metrics", run, "--check"), "metrics.json", f"models.demo-vit.accuracy 1.5 instead of {accuracy}")


@pytest.mark.parametrize("name", ["metrics.json", "confusion_demo-vit.npz"])
def test_a_missing_file_of_figures_is_found(run: Path, vitscore: Call, name: str) -> None:
    (run / name).unlink()
    refused(vitscore("metrics", run, "--check"), name, "cannot be read")


@pytest.fixture
def moved(scored: Path, tmp_path: Path) -> Path:
    """Copy the shards to another folder."""
    shutil.copytree(scored / "shards", tmp_path / "moved")
    return tmp_path / "moved"


def test_shards_that_have_moved_are_named(run: Path, moved: Path, vitscore: Call) -> None:
    assert vitscore("metrics", run, "--check", "--shards", moved).code == 0
    listed = ["--shards", moved / "s-3.tar", "--shards", moved / "s-{0..2}.tar"]
    assert vitscore("metrics", run, "--check", *listed).code == 0


def test_a_changed_shard_is_found(run: Path, moved: Path, vitscore: Call) -> None:
    data = bytearray((moved / "s-0.tar").read_bytes())
    at = data.index(b".cls") // 512 * 512 + 512
    data[at] = ord("0") + (data[at] - ord("0") + 1) % 10
    (moved / "s-0.tar").write_bytes(data)
    refused(vitscore("metrics", run, "--check", "--shards", moved), "label differs", "s-0.tar[")
    (moved / "s-0.tar").write_bytes(bytes(data) + bytes(512))
    refused(vitscore("metrics", run, "--check", "--shards", moved), "shard has changed: ", "s-0.tar", "bytes")


def test_a_mended_shard_is_found(run: Path, moved: Path, vitscore: Call) -> None:
    (moved / "s-3.tar").write_bytes((moved / "s-0.tar").read_bytes())
    refused(vitscore("metrics", run, "--check", "--shards", moved), "s-3.tar", "expected truncated: ", "got no fault")


def test_a_missing_shard_is_found(run: Path, moved: Path, vitscore: Call) -> None:
    (moved / "s-1.tar").unlink()
    done = vitscore("metrics", run, "--check", "--shards", moved)
    refused(done, "shard cannot be found", "s-1.tar", "got none", "--shards")
    done = vitscore("metrics", run, "--check", "--shards", moved / "s-{0..3}.tar")
    refused(done, "shard has changed", "s-1.tar", "got missing", "--shards")


def test_shards_without_check_are_wrong_usage(run: Path, moved: Path, vitscore: Call) -> None:
    done = vitscore("metrics", run, "--shards", moved)
    assert (done.code, done.err.count("\n")) == (2, 1)


def test_a_limit_is_kept(scored: Path, tmp_path: Path, vitscore: Call) -> None:
    out = tmp_path / "out"
    assert vitscore("run", scored / "shards", "-m", "demo-vit", "-o", out, "--limit", 27).code == 0
    done = vitscore("metrics", out, "--check")
    assert (done.code, done.out.split(":")[0]) == (0, "2 shards, 27 samples")


def test_a_file_of_labels_is_read_again(scored: Path, tmp_path: Path, vitscore: Call, digits: Any) -> None:
    labels, out = tmp_path / "labels.csv", tmp_path / "out"
    labels.write_text("key,label\n" + "".join(f"{key},3\n" for key, _ in digits[:20]))
    names = scored / "shards" / "s-0.tar"
    assert vitscore("run", names, "-m", "demo-vit", "-o", out, "--labels", labels).code == 0
    assert vitscore("metrics", out, "--check").code == 0
    labels.write_text(labels.read_text().replace(",3", ",4"))
    refused(vitscore("metrics", out, "--check"), "labels have changed", "labels.csv")
    labels.unlink()
    done = vitscore("metrics", out, "--check")
    assert (done.code, "labels were not checked" in done.out) == (0, True)

"""A part holds every row of its shard exactly once, or does not exist."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from vitscore.rundir import parts
from vitscore.rundir.parts import (
    Footer,
    ModelColumns,
    Predictions,
    ShardRows,
    finished_parts,
    part_name,
    part_schema,
)

Array = np.ndarray[Any, Any]


def make_footer(num_rows: int, *, ordinal: int = 3, identity: str = "abc") -> Footer:
    return Footer(identity=identity, ordinal=ordinal, shard="dir/s-003.tar", num_bytes=1000, expected=num_rows, bad=0)


def make_predictions(seed: int, num_rows: int, *, k: int = 2, num_logits: int = 0) -> Predictions:
    random = np.random.default_rng(seed)
    return Predictions(
        pred=random.integers(0, 5, num_rows).astype(np.int32),
        prob=random.random(num_rows, np.float32),
        topk=random.integers(0, 5, (num_rows, k)).astype(np.int32),
        topk_prob=random.random((num_rows, k), np.float32),
        label_logprob=-random.random(num_rows, np.float32),
        sum_sq_prob=random.random(num_rows, np.float32),
        logits=random.random((num_rows, num_logits), np.float32) if num_logits else None,
    )


def open_rows(folder: Path, num_rows: int, columns: list[ModelColumns]) -> ShardRows:
    keys = [f"k{row}" for row in range(num_rows)]
    return ShardRows(folder, part_schema(columns), columns, make_footer(num_rows), keys)


def test_rows_come_back_in_shard_order_for_any_order_of_batches(tmp_path: Path) -> None:
    work = open_rows(tmp_path, 6, [ModelColumns("m", top_k=2)])
    given = make_predictions(0, 6)
    work.set_labels(np.arange(6), np.array([0, 1, 2, 3, 4, -1]))
    order = np.array([4, 5, 0, 1, 3])
    work.set_predictions(order, {"m": given.take(order)})
    work.set_bad(2, "no image: got cls")
    table = pq.read_table(work.commit()).to_pydict()
    assert table["key"] == [f"k{row}" for row in range(6)]
    assert table["label"] == [0, 1, 2, 3, 4, -1]
    assert table["status"] == ["ok", "ok", "bad", "ok", "ok", "ok"]
    assert table["reason"] == [None, None, "no image: got cls", None, None, None]
    expected: list[int | None] = [int(value) for value in given.pred]
    expected[2] = None
    assert table["m.pred"] == expected
    assert table["m.topk"] == [None if row == 2 else given.topk[row].tolist() for row in range(6)]
    assert table["m.label_logprob"][2] is None


def test_footer_says_what_the_part_is(tmp_path: Path) -> None:
    work = open_rows(tmp_path, 2, [ModelColumns("m", top_k=1)])
    work.set_bad(0, "no image")
    work.set_bad(1, "no image")
    work.commit()
    parts = finished_parts(tmp_path, "abc")
    assert list(parts) == [3]
    assert parts[3][0].name == "0000003-s-003.parquet"
    assert parts[3][1] == Footer(
        identity="abc", ordinal=3, shard="dir/s-003.tar", num_bytes=1000, expected=2, bad=2, fault=None, notes=()
    )


def test_an_empty_shard_is_an_empty_part(tmp_path: Path) -> None:
    path = open_rows(tmp_path, 0, [ModelColumns("m", top_k=1)]).commit()
    assert pq.read_table(path).num_rows == 0
    assert list(finished_parts(tmp_path, "abc")) == [3]


def test_long_outputs_go_out_in_row_groups_and_hold_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUP_BYTES", 4 * 10 * 7)
    work = open_rows(tmp_path, 25, [ModelColumns("m", top_k=2, num_logits=10)])
    given = make_predictions(1, 25, num_logits=10)
    for start in range(0, 25, 4):
        rows = np.arange(start, min(start + 4, 25))
        if 9 in rows:
            work.set_bad(9, "no image")
            rows = rows[rows != 9]
        work.set_predictions(rows, {"m": given.take(rows)})
        work.flush_full_groups()
        held = sum(len(piece[0]) for piece in work._long["m"])
        assert held <= 7 + 4, "rows that are written must not be held"
    file = pq.ParquetFile(work.commit())
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [7, 7, 7, 4]
    logits = file.read()["m.logits"].to_pylist()
    assert given.logits is not None
    for row in range(25):
        assert logits[row] is None if row == 9 else np.array_equal(np.float32(logits[row]), given.logits[row])


def test_a_row_cannot_be_scored_twice(tmp_path: Path) -> None:
    work = open_rows(tmp_path, 2, [ModelColumns("m", top_k=2)])
    work.set_bad(0, "no image")
    with pytest.raises(AssertionError, match="twice"):
        work.set_predictions(np.array([0]), {"m": make_predictions(0, 1)})


def test_torn_foreign_and_other_runs_parts_are_not_read(tmp_path: Path) -> None:
    path = open_rows(tmp_path, 0, [ModelColumns("m", top_k=1)]).commit()
    data = path.read_bytes()
    (tmp_path / "0000004-s.parquet").write_bytes(data[: len(data) // 2])
    (tmp_path / "notes.parquet").write_bytes(data)
    (tmp_path / "0000005-s.parquet").write_bytes(b"")
    assert list(finished_parts(tmp_path, "abc")) == [3]
    assert finished_parts(tmp_path, "another") == {}


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    work = open_rows(tmp_path, 1, [ModelColumns("m", top_k=2)])
    work.set_bad(0, "no image")
    work.path.mkdir()
    with pytest.raises(OSError):
        work.commit()
    work.path.rmdir()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("s3://bucket/a/b c.tar.gz", "0000000-b_c.parquet"),
        ("../../etc/x.tar", "0000000-x.parquet"),
        ("...", "0000000-shard.parquet"),
    ],
)
def test_part_names_take_no_path_from_a_shard(name: str, expected: str) -> None:
    assert part_name(0, name) == expected

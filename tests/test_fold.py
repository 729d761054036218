"""Folding parts into metrics.json: the ledger adds up or an error names the shard; equal parts give equal bytes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import classification_report, confusion_matrix

from vitscore.errors import LedgerError, UsageError
from vitscore.kernels import score_rows
from vitscore.metrics.fold import fold, refold, write_metrics
from vitscore.rundir.parts import FOOTER_KEY, Footer, ModelColumns, finished_parts, part_name, part_schema

IDENTITY = "f" * 64


@dataclass
class FakeRun:
    """A run's folder whose parts are made from random logits; keeps every row for the oracles."""

    folder: Path
    num_classes: int = 6
    models: tuple[str, ...] = ("vit", "clip.v2")
    on_bad_sample: str = "skip"
    rows: list[dict] = field(default_factory=list)

    def write(self, sizes: list[int], **footer: object) -> FakeRun:
        names = [f"s-{i}.tar" for i in range(len(sizes))]
        (self.folder / "parts").mkdir(parents=True)
        table = {"ordinal": pa.array(range(len(sizes)), pa.int32()), "name": names, "num_bytes": [None] * len(sizes)}
        pq.write_table(pa.table(table), self.folder / "shards.parquet")
        record = {
            "identity_hash": IDENTITY,
            "classes": [f"c{i}" for i in range(self.num_classes)],
            "models": {name: {} for name in self.models},
            "options": {"on_bad_sample": self.on_bad_sample},
        }
        (self.folder / "run.json").write_text(json.dumps(record))
        for ordinal, size in enumerate(sizes):
            self.write_part(ordinal, names[ordinal], size, **footer)
        return self

    def write_part(self, ordinal: int, shard: str, size: int, *, group: int = 1000, **footer: object) -> Path:
        rng = np.random.default_rng(ordinal)
        labels = rng.integers(-1, self.num_classes, size).astype(np.int32)
        is_bad = rng.random(size) < 0.1
        keys = [f"{ordinal}/{i:04d}" for i in range(size)]
        reasons = [f"image cannot be decoded: byte {i}" if bad else None for i, bad in enumerate(is_bad)]
        columns: dict[str, object] = {
            "key": keys,
            "shard": [shard] * size,
            "label": labels,
            "status": np.where(is_bad, "bad", "ok").tolist(),
            "reason": reasons,
        }
        preds = {}
        for name in self.models:
            logits = rng.normal(size=(size, self.num_classes)).astype(np.float32)
            scores = score_rows(logits, labels, 5)
            preds[name] = scores.pred
            for figure in ("pred", "prob", "label_logprob", "sum_sq_prob"):
                values = getattr(scores, figure)
                columns[f"{name}.{figure}"] = pa.array(values, mask=is_bad | np.isnan(values.astype(float)))
            for figure in ("topk", "topk_prob"):
                values = getattr(scores, figure).tolist()
                columns[f"{name}.{figure}"] = [None if bad else v for v, bad in zip(values, is_bad, strict=True)]
        for i in range(size):
            row = {"label": labels[i], "is_bad": is_bad[i], **{name: preds[name][i] for name in self.models}}
            self.rows.append(row)
        schema = part_schema([ModelColumns(name, 5) for name in self.models])
        values = {"num_bytes": None, "expected": size, "bad": int(is_bad.sum()), "identity": IDENTITY, **footer}
        written = Footer(ordinal=ordinal, shard=shard, **values)
        path = self.folder / "parts" / part_name(ordinal, shard)
        table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names})
        pq.write_table(table.replace_schema_metadata({FOOTER_KEY: written.dump()}), path, row_group_size=group)
        return path

    def column(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.rows])


@pytest.fixture
def run(tmp_path: Path) -> FakeRun:
    return FakeRun(tmp_path / "run").write([300, 0, 120])


def list_parts(folder: Path) -> list[tuple[int, Path]]:
    return [(ordinal, path) for ordinal, (path, _) in finished_parts(folder / "parts", IDENTITY).items()]


def test_the_ledger_adds_up(run: FakeRun) -> None:
    ledger = refold(run.folder).document["ledger"]
    is_bad = run.column("is_bad")
    assert ledger == {
        "expected": 420,
        "scored": int((~is_bad).sum()),
        "bad": int(is_bad.sum()),
        "unlabelled": int((run.column("label")[~is_bad] == -1).sum()),
        "duplicates": 0,
        "reasons": {"image cannot be decoded": int(is_bad.sum())},
        "shards": {"expected": 3, "done": 3, "bad": {}},
    }


def test_the_report_is_scikit_learns_on_the_parts(run: FakeRun) -> None:
    folded = refold(run.folder)
    assert list(folded.document["models"]) == ["vit", "clip.v2"]
    counted = ~run.column("is_bad") & (run.column("label") >= 0)
    labels = run.column("label")[counted]
    for name in run.models:
        preds = run.column(name)[counted]
        report = classification_report(
            labels, preds, labels=range(6), target_names=folded.document["classes"], output_dict=True, zero_division=0
        )
        model = folded.document["models"][name]
        for row, figures in report.items():
            assert model["report"][row] == pytest.approx(figures, abs=1e-12)
        assert model["samples"] == len(labels) and list(model["topk_accuracy"]) == ["1", "5"]
        assert (folded.confusions[name] == confusion_matrix(labels, preds, labels=range(6))).all()


def test_every_pair_is_compared_on_common_samples(run: FakeRun) -> None:
    (entry,) = refold(run.folder).document["comparisons"]
    counted = ~run.column("is_bad") & (run.column("label") >= 0)
    vit, clip = (run.column(name)[counted] for name in run.models)
    right = run.column("label")[counted]
    assert (entry["a"], entry["b"], entry["samples"]) == ("vit", "clip.v2", counted.sum())
    assert entry["only_a"] == ((vit == right) & (clip != right)).sum()
    assert entry["agreement"] == pytest.approx((vit == clip).mean())


def test_three_models_make_three_pairs(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, models=("c", "a", "b")).write([50])
    pairs = [(entry["a"], entry["b"]) for entry in refold(run.folder).document["comparisons"]]
    assert pairs == [("c", "a"), ("c", "b"), ("a", "b")]


def test_a_bad_sample_can_count_as_a_wrong_answer(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, on_bad_sample="wrong").write([300])
    folded = refold(run.folder)
    labels = run.column("label")
    right = (run.column("vit") == labels) & ~run.column("is_bad")
    model = folded.document["models"]["vit"]
    assert model["samples"] == (labels >= 0).sum()
    assert model["accuracy"] == pytest.approx(right.sum() / (labels >= 0).sum())
    assert [model["report"][f"c{i}"]["support"] for i in range(6)] == [(labels == i).sum() for i in range(6)]
    assert folded.confusions["vit"].sum() == ((labels >= 0) & ~run.column("is_bad")).sum()


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    written = []
    for name, group in (("a", 1000), ("b", 7)):
        run = FakeRun(tmp_path / name).write([150, 90], group=group)
        for _ in range(2):
            write_metrics(run.folder, refold(run.folder))
            files = ("metrics.json", "confusion_vit.npz", "confusion_clip.v2.npz")
            written.append([(run.folder / file).read_bytes() for file in files])
    assert all(files == written[0] for files in written)


def test_what_is_written_can_be_read(run: FakeRun) -> None:
    folded = refold(run.folder)
    write_metrics(run.folder, folded)
    document = json.loads((run.folder / "metrics.json").read_bytes())
    assert document == folded.document
    assert list(document) == ["schema", "classes", "ledger", "models", "comparisons"]
    with np.load(run.folder / "confusion_vit.npz") as archive:
        assert archive.files == ["counts"] and archive["counts"].dtype == np.int64
        assert (archive["counts"] == folded.confusions["vit"]).all()


def test_beyond_4096_classes_the_matrix_is_sparse(tmp_path: Path) -> None:
    run = FakeRun(tmp_path, num_classes=4200, models=("vit",)).write([80])
    write_metrics(run.folder, refold(run.folder))
    with np.load(run.folder / "confusion_vit.npz") as archive:
        assert archive.files == ["rows", "cols", "counts", "shape"] and archive["shape"].tolist() == [4200, 4200]
        assert archive["counts"].sum() == (~run.column("is_bad") & (run.column("label") >= 0)).sum()


def test_missing_samples_name_the_shard(tmp_path: Path) -> None:
    run = FakeRun(tmp_path).write([20], expected=21)
    with pytest.raises(LedgerError, match=r"samples do not add up: s-0.tar - expected 21, got \d+ scored and \d+ bad"):
        refold(run.folder)


def test_a_sample_that_is_there_twice_is_an_error(run: FakeRun) -> None:
    path, _ = finished_parts(run.folder / "parts", IDENTITY)[0]
    table = pq.read_table(path)
    keys = table["key"].to_pylist()
    keys[5] = keys[9]
    pq.write_table(table.set_column(0, "key", [keys]), path)
    with pytest.raises(LedgerError, match=r"sample counted more than once: s-0.tar\[0/0009\]"):
        refold(run.folder)


def test_a_shard_that_is_there_twice_is_an_error(run: FakeRun) -> None:
    parts = run.folder / "parts"
    (parts / "0000000-copy.parquet").write_bytes((parts / "0000000-s-0.parquet").read_bytes())
    with pytest.raises(LedgerError, match=r"duplicate part for shard: s-0.tar"):
        refold(run.folder)


def test_a_part_of_a_shard_that_is_not_listed_is_an_error(run: FakeRun) -> None:
    run.write_part(7, "s-7.tar", 3)
    with pytest.raises(LedgerError, match="part does not belong to this run"):
        refold(run.folder)


def test_foreign_and_unfinished_files_are_not_looked_at(run: FakeRun) -> None:
    before = refold(run.folder).document
    run.write_part(1, "elsewhere.tar", 9, identity="0" * 64)
    parts = run.folder / "parts"
    (parts / "0000009-torn.parquet").write_bytes(b"PAR1")
    (parts / ".0000001-s-1.parquet.host.1.tmp").write_bytes(b"")
    (parts / "notes.parquet").write_bytes((parts / "0000000-s-0.parquet").read_bytes())
    assert refold(run.folder).document == before


def test_a_bad_shard_is_in_the_ledger(tmp_path: Path) -> None:
    run = FakeRun(tmp_path).write([10], fault="truncated: 512 bytes short")
    assert refold(run.folder).document["ledger"]["shards"]["bad"] == {"s-0.tar": "truncated: 512 bytes short"}


def test_an_unfinished_run_says_how_far_it_is(run: FakeRun) -> None:
    (run.folder / "parts" / "0000000-s-0.parquet").unlink()
    ledger = refold(run.folder).document["ledger"]
    assert ledger["shards"] == {"expected": 3, "done": 2, "bad": {}} and ledger["expected"] == 120


def test_a_run_without_parts_is_empty(tmp_path: Path) -> None:
    document = refold(FakeRun(tmp_path).write([]).folder).document
    assert document["models"]["vit"]["report"] is None and document["ledger"]["expected"] == 0
    json.dumps(document, allow_nan=False)


def test_a_folder_without_run_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run here: .* - expected run.json"):
        refold(tmp_path)


def test_parts_can_be_folded_from_anywhere(run: FakeRun) -> None:
    record = json.loads((run.folder / "run.json").read_bytes())
    shards = pq.read_table(run.folder / "shards.parquet")
    assert fold(iter(list_parts(run.folder)), shards, record).document == refold(run.folder).document

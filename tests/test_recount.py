"""`vitscore metrics DIR` with other labels, maps, classes, keys, k or groups, against scikit-learn and equal runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk

from vitscore.bench.harness.madeup import MadeShard, from_logits, write_run
from vitscore.classes.groups import read_groups
from vitscore.errors import ClassError

Call = Callable[..., Any]
CLASSES = ["cat", "dog", "owl", "cow", "elk", "bee"]
K = len(CLASSES)
SIZES = (150, 0, 90)


def made_logits(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits and labels of all samples; a tenth of them has no label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, K, sum(SIZES)).astype(np.int32)
    logits = rng.normal(size=(len(labels), K)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 1.2
    labels[rng.random(len(labels)) < 0.1] = -1
    return logits, labels


def key_of(row: int) -> str:
    return f"{row:04d}"


def write(folder: Path, logits: np.ndarray, labels: np.ndarray, *, keeps_logits: bool = False, k: int = 3) -> Path:
    """Write a run of two models, `vit` and one with the negated logits; sample 5 is bad."""
    shards, start = [], 0
    for number, size in enumerate(SIZES):
        rows = slice(start, start + size)
        made = {
            name: from_logits(sign * logits[rows], labels[rows], k=k, keeps_logits=keeps_logits)
            for name, sign in (("vit", 1), ("anti", -1))
        }
        bad = {5: "undecodable image"} if number == 0 else {}
        keys = [key_of(row) for row in range(start, start + size)]
        shards.append(MadeShard(f"s-{number}.tar", keys, labels[rows], made, bad))
        start += size
    options = {"save": ["logits"] if keeps_logits else []}
    write_run(folder, shards, CLASSES, options=options)
    record = json.loads((folder / "run.json").read_bytes())
    record["choices"]["top_k"]["value"] = k
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@pytest.fixture(params=[False, True], ids=["top-k", "logits"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "run", *made_logits(), keeps_logits=request.param)


@pytest.fixture
def recount(vitscore: Call) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the command and returns its document."""

    def call(run: Path, *arguments: object) -> dict[str, Any]:
        done = vitscore("metrics", run, "--json", *arguments)
        assert done.code == 0, done.err
        document: dict[str, Any] = json.loads(done.out)
        return document

    return call


def rows_of(run: Path) -> pd.DataFrame:
    rows = pd.concat([pq.read_table(path).to_pandas() for path in sorted((run / "parts").glob("*.parquet"))])
    return rows[rows.status == "ok"].set_index("key")


def report_of(labels: Any, preds: Any, only: list[int] | None = None) -> dict[str, Any]:
    only = list(range(K)) if only is None else only
    report = sk.classification_report(
        labels, preds, labels=only, target_names=[CLASSES[i] for i in only], output_dict=True, zero_division=0
    )
    report.pop("micro avg", None)
    report["accuracy"] = sk.accuracy_score(labels, preds)
    return report


def assert_report(report: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(report) == set(wanted)
    for name, value in wanted.items():
        assert report[name] == pytest.approx(value, abs=1e-12), name


def assert_same(got: Any, wanted: Any, where: str = "") -> None:
    """Assert that two documents have equal figures, up to rounding."""
    if isinstance(wanted, dict):
        assert set(got) == set(wanted), where
        for name, value in wanted.items():
            assert_same(got[name], value, f"{where}.{name}")
    elif isinstance(wanted, list):
        for index, value in enumerate(wanted):
            assert_same(got[index], value, f"{where}.{index}")
    else:
        assert got == (pytest.approx(wanted, abs=1e-5) if isinstance(wanted, float) else wanted), where


# Labels


def test_corrected_labels_give_the_metrics_of_a_run_with_these_labels(run: Path, recount: Any, tmp_path: Path) -> None:
    logits, labels = made_logits()
    corrected = labels.copy()
    corrected[10:60] = np.random.default_rng(1).integers(0, K, 50)
    file = tmp_path / "labels.csv"
    lines = [f"{key_of(row)},{CLASSES[corrected[row]] if row % 2 else corrected[row]}\n" for row in range(10, 60)]
    file.write_text("key,label\n" + "".join(lines) + "no-such-key,cat\n")
    document = recount(run, "--labels", file)
    wanted = recount(write(tmp_path / "so", logits, corrected))
    assert document["recount"]["labels"] == {
        "given": 51,
        "found": 50,
        "changed": int((labels != corrected).sum()),
        "of_bad_samples": 0,
    }
    assert_same(document["comparisons"], wanted["comparisons"])
    has_logits = document["recount"]["from_logits"]
    for name in ("vit", "anti"):
        model = wanted["models"][name]
        # Without logits the probability of a label outside the top 3 is unknown, so the figures are None.
        assert_same(document["models"][name], model if has_logits else {**model, "nll": None, "brier": None})


def test_a_correction_within_the_top_k_keeps_every_figure(run: Path, recount: Any, tmp_path: Path) -> None:
    logits, labels = made_logits()
    second = np.argsort(-logits, axis=1)[:, 1].astype(np.int32)
    corrected = np.where(np.arange(len(labels)) < 40, second, labels)
    file = tmp_path / "labels.parquet"
    pd.DataFrame({"key": [key_of(row) for row in range(40)], "label": second[:40]}).to_parquet(file)
    document, wanted = recount(run, "--labels", file), recount(write(tmp_path / "so", logits, corrected))
    assert_same(document["models"]["vit"], wanted["models"]["vit"])


def test_a_corrected_bad_sample_stays_bad_and_is_reported(run: Path, vitscore: Call, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("key,label\n0005,cat\n")
    done = vitscore("metrics", run, "--labels", tmp_path / "labels.csv")
    assert "labels: 1 given, 1 found," in done.out and "1 of bad samples, which have no prediction" in done.out


# Maps


def test_a_map_that_renames_classes_gives_the_metrics_of_a_head_in_that_order(
    run: Path, recount: Any, tmp_path: Path
) -> None:
    """The head's columns belong to other classes: its class c is really class order[c]."""
    logits, labels = made_logits()
    order = np.array([1, 2, 0, 3, 5, 4])
    file = tmp_path / "map.json"
    file.write_text(json.dumps({CLASSES[c]: CLASSES[order[c]] for c in range(K)}))
    moved = np.empty_like(logits)
    moved[:, order] = logits
    document = recount(run, "--label-map", f"vit={file}")
    wanted = recount(write(tmp_path / "so", moved, labels))["models"]["vit"]
    if not document["recount"]["from_logits"]:
        wanted |= {"nll": None, "brier": None}
    assert_same(document["models"]["vit"], wanted)
    assert_same(document["models"]["anti"], recount(run)["models"]["anti"])


def test_classes_joined_by_a_map_are_joined_by_logsumexp_where_the_logits_are_kept(
    run: Path, recount: Any, tmp_path: Path
) -> None:
    file = tmp_path / "map.json"
    file.write_text('{"dog": "cat", "bee": 3}')
    document = recount(run, "--label-map", file)
    rows = rows_of(run)
    rows = rows[rows.label >= 0]
    if document["recount"]["from_logits"]:
        prob = np.exp(np.stack(rows["vit.logits"]).astype(np.float64))
        prob /= prob.sum(1, keepdims=True)
        prob[:, 0] += prob[:, 1]
        prob[:, 3] += prob[:, 5]
        prob[:, [1, 5]] = 0
        preds = prob.argmax(1)
        assert document["models"]["vit"]["nll"] is None  # some labels are classes that no head class maps to
        confidence = document["models"]["vit"]["reliability"]["confidence"]
        samples = document["models"]["vit"]["reliability"]["samples"]
        total = sum(c * n for c, n in zip(confidence, samples, strict=True) if n)
        assert total == pytest.approx(prob.max(1).sum(), rel=1e-5)
    else:
        preds = np.array([0, 0, 2, 3, 4, 3])[rows["vit.pred"].astype(int)]
        assert document["models"]["vit"]["ece"] is None
    assert_report(document["models"]["vit"]["report"], report_of(rows.label, preds))


# k, classes, keys


def test_another_k_is_scikit_learns(run: Path, recount: Any) -> None:
    logits, labels = made_logits()
    kept = (labels >= 0) & (np.arange(len(labels)) != 5)
    accuracies = recount(run, "--top-k", "2,3")["models"]["vit"]["topk_accuracy"]
    assert list(accuracies) == ["1", "2", "3"]
    for k, value in accuracies.items():
        wanted = sk.top_k_accuracy_score(labels[kept], logits[kept], k=int(k), labels=range(K))
        assert value == pytest.approx(wanted, abs=1e-12)


def test_a_k_beyond_what_is_kept_needs_logits(run: Path, vitscore: Call) -> None:
    done = vitscore("metrics", run, "--top-k", "5", "--json")
    if "logits" in json.loads((run / "run.json").read_bytes())["options"]["save"]:
        assert list(json.loads(done.out)["models"]["vit"]["topk_accuracy"]) == ["1", "5"]
    else:
        assert done.code == 2 and "k exceeds the top k of the parts: --top-k - expected at most 3, got 5" in done.err


@pytest.mark.parametrize("given", ["owl,bee,1", "FILE"])
def test_some_classes_are_scikit_learns_labels(given: str, run: Path, recount: Any, tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("bee\nowl\ndog\n")
    document = recount(run, "--only-classes", tmp_path / "some.txt" if given == "FILE" else given)
    only = [1, 2, 5]
    rows = rows_of(run)
    rows = rows[rows.label.isin(only)]
    assert document["classes"] == ["dog", "owl", "bee"]
    model = document["models"]["vit"]
    assert_report(model["report"], report_of(rows.label, rows["vit.pred"].astype(int), only))
    assert model["mcc"] == pytest.approx(sk.matthews_corrcoef(rows.label, rows["vit.pred"].astype(int)), abs=1e-12)
    assert model["cohen_kappa"] == pytest.approx(sk.cohen_kappa_score(rows.label, rows["vit.pred"].astype(int)))
    hits = [label in top for label, top in zip(rows.label, rows["vit.topk"], strict=True)]
    assert recount(run, "--only-classes", "owl,bee,dog", "--top-k", "3")["models"]["vit"]["topk_accuracy"]["3"] == (
        pytest.approx(np.mean(hits), abs=1e-12)
    )
    low, high = model["confidence_intervals"]["macro_f1"]
    assert low < model["report"]["macro avg"]["f1-score"] < high


@pytest.mark.parametrize("suffix", ["txt", "csv", "parquet"])
def test_some_keys_are_those_rows(suffix: str, run: Path, recount: Any, tmp_path: Path) -> None:
    keys = [key_of(row) for row in range(0, 200, 3)]
    file = tmp_path / f"keys.{suffix}"
    if suffix == "parquet":
        pd.DataFrame({"key": keys}).to_parquet(file)
    else:
        file.write_text("\n".join(["key"] * (suffix == "csv") + keys) + "\n")
    document = recount(run, "--keys", file)
    rows = rows_of(run).reindex(keys).dropna(subset=["status"])
    rows = rows[rows.label >= 0]
    assert_report(document["models"]["vit"]["report"], report_of(rows.label.astype(int), rows["vit.pred"].astype(int)))
    assert document["ledger"] == recount(run)["ledger"]


# Groups


@pytest.mark.parametrize(
    "content",
    [
        {"beast": ["cat", "dog", 3, "elk"], "flies": ["owl", "bee"]},
        {"cat": "beast", "dog": "beast", "cow": "beast", "elk": "beast", "owl": "flies", "bee": "flies"},
    ],
)
def test_groups_are_scikit_learns_on_grouped_ids(content: Any, run: Path, recount: Any, tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps(content))
    model = recount(run, "--groups", file)["models"]["vit"]
    rows = rows_of(run)
    rows = rows[rows.label >= 0]
    group = np.array([0, 0, 1, 0, 0, 1])
    labels, preds = group[rows.label], group[rows["vit.pred"].astype(int)]
    wanted = sk.classification_report(
        labels, preds, labels=[0, 1], target_names=["beast", "flies"], output_dict=True, zero_division=0
    )
    assert_report(model["groups"]["report"], wanted)
    assert model["groups"]["mcc"] == pytest.approx(sk.matthews_corrcoef(labels, preds), abs=1e-12)
    assert model["groups"]["confidence_intervals"]["accuracy"][0] < wanted["accuracy"]
    assert_report(model["report"], report_of(rows.label, rows["vit.pred"].astype(int)))


def test_a_class_without_a_group_stands_for_itself(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text('{"beast": ["cat", "dog"]}')
    groups = read_groups(tmp_path / "g.json", CLASSES)
    assert groups.names == ("beast", "owl", "cow", "elk", "bee") and groups.of_class.tolist() == [0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "content, said",
    [
        ('{"a": ["cat", "yak"]}', "unknown data set class"),
        ('{"a": ["cat"], "b": ["cat"]}', "class in two groups"),
        ('{"owl": ["cat"]}', "class without a group"),
        ("[1]", "bad groups"),
        ("{", "bad groups"),
        ('{"a": [1.5]}', "bad groups"),
    ],
)
def test_bad_groups_are_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(content)
    with pytest.raises(ClassError, match=said):
        read_groups(tmp_path / "g.json", CLASSES)


def test_a_run_with_groups_keeps_them_in_its_metrics(vitscore: Call, tmp_path: Path) -> None:
    (tmp_path / "groups.json").write_text('{"small": ["zero", "one", "two", "three", "four"]}')
    command = ("run", "demo", "-m", "demo-vit", "-o", tmp_path / "out", "--limit", "60")
    done = vitscore(*command, "--groups", tmp_path / "groups.json")
    assert done.code == 0, done.err
    assert "demo-vit: 6 groups: accuracy" in done.out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_bytes())
    groups = metrics["models"]["demo-vit"]["groups"]
    assert groups["classes"] == ["small", "five", "six", "seven", "eight", "nine"]
    assert groups["accuracy"] >= metrics["models"]["demo-vit"]["accuracy"]
    assert vitscore("metrics", tmp_path / "out", "--check").code == 0
    refused = vitscore(*command)
    assert refused.code == 2 and "groups: " in refused.err and "there, none here" in refused.err


# The command


def test_nothing_is_written_by_a_recount(run: Path, vitscore: Call) -> None:
    assert vitscore("metrics", run).code == 0
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert "nothing was written" in vitscore("metrics", run, "--only-classes", "cat").out
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--labels", "FILE:key,label\n0001,yak\n"], 3, "wrong label"),
        (["--labels", "FILE:key,label\n0001,9\n"], 3, "wrong label"),
        (["--labels", "FILE:key,label\nzzz,cat\n"], 3, "no sample has one of these keys"),
        (["--labels", "nowhere.csv"], 2, "no such labels file"),
        (["--keys", "FILE:zzz\n"], 3, "no sample left"),
        (["--keys", "FILE:"], 2, "no keys"),
        (["--keys", "nowhere"], 2, "cannot read keys"),
        (["--label-map", "by-position"], 2, "the parts hold classes, not positions"),
        (["--label-map", "none=FILE:{}"], 2, "no such model"),
        (["--label-map", 'FILE:{"yak": "cat"}'], 3, "unknown data set class"),
        (["--top-k", "0"], 2, "--top-k"),
        (["--top-k", "two"], 2, "--top-k"),
        (["--top-k", "7"], 2, "at most 6"),
        (["--only-classes", "yak"], 3, "unknown data set class"),
        (["--groups", "nowhere.json"], 2, "cannot read groups"),
        (["--check", "--top-k", "2"], 2, "--check recounts nothing"),
    ],
)
def test_what_cannot_be_recounted_is_one_clear_line(
    arguments: list[str], code: int, said: str, vitscore: Call, tmp_path: Path
) -> None:
    run = write(tmp_path / "run", *made_logits())
    words = []
    for number, word in enumerate(arguments):
        head, is_file, content = word.partition("FILE:")
        if is_file:
            (tmp_path / str(number)).write_text(content)
        words.append(f"{head}{tmp_path / str(number)}" if is_file else word)
    done = vitscore("metrics", run, *words)
    assert done.code == code, done.err
    assert said in done.err and done.err.count("\n") == 1 and done.out == ""


def test_no_torch_is_imported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("key,label\n0001,cat\n")
    for arguments in (
        ["metrics", str(run)],
        ["metrics", str(run), "--labels", str(tmp_path / "labels.csv"), "--top-k", "2"],
        ["compare", str(run)],
    ):
        code = f"import sys\nfrom vitscore.cli.main import main\nassert main({arguments!r}) == 0\n"
        code += "assert not {'torch', 'transformers', 'nvidia.dali', 'sklearn'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)

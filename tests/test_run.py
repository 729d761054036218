"""The main job: shards in, predictions and metrics out, every sample once."""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import classification_report
from transformers import pipeline
from transformers.image_utils import load_image

from vitscore import load_run
from vitscore.models.checkpoint import find
from vitscore.rundir.parts import PART_NAME

Call = Callable[..., Any]
MODELS = ("-m", "demo-vit", "-m", "demo-clip")


def part_tables(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.name: pq.read_table(path).to_pylist() for path in sorted((folder / "parts").iterdir())}


def read_metrics(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_bytes())
    return document


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, scored once for all tests."""
    from vitscore import score

    folder = tmp_path_factory.mktemp("demo") / "run"
    score("demo", ["demo-vit", "demo-clip"], folder)
    return folder


def test_both_demo_models_reach_97_percent_on_all_held_out_digits(demo_run: Path) -> None:
    document = read_metrics(demo_run)
    assert document["ledger"]["expected"] == document["ledger"]["scored"] == 500
    assert document["ledger"]["shards"] == {"expected": 4, "done": 4, "bad": {}}
    assert {name: model["accuracy"] >= 0.97 for name, model in document["models"].items()} == {
        "demo-vit": True,
        "demo-clip": True,
    }


def test_the_report_is_scikit_learns(demo_run: Path) -> None:
    run = load_run(demo_run)
    rows = run.predictions()
    for name in run.models:
        expected = classification_report(
            rows["label"].to_numpy(),
            rows[f"{name}.pred"].to_numpy(),
            labels=range(10),
            target_names=run.classes,
            output_dict=True,
            zero_division=0,
        )
        report = read_metrics(demo_run)["models"][name]["report"]
        assert report["accuracy"] == pytest.approx(expected.pop("accuracy"), abs=1e-12)
        assert report.keys() - {"accuracy"} == expected.keys()
        for label, row in expected.items():
            assert report[label] == pytest.approx(row, abs=1e-12)


def test_metrics_fold_again_from_the_parts_to_the_same_bytes(demo_run: Path, vitscore: Call) -> None:
    before = {path.name: path.read_bytes() for path in demo_run.iterdir() if path.suffix in (".json", ".npz")}
    assert vitscore("metrics", demo_run).code == 0
    assert {name: (demo_run / name).read_bytes() for name in before} == before


def test_nothing_but_the_contract_is_in_the_folder(demo_run: Path) -> None:
    assert {path.name for path in demo_run.iterdir()} == {
        "run.json",
        "shards.parquet",
        "parts",
        "metrics.json",
        "confusion_demo-vit.npz",
        "confusion_demo-clip.npz",
        "report.html",
    }
    assert all(PART_NAME.fullmatch(path.name) for path in (demo_run / "parts").iterdir())


def test_a_corrupt_image_is_bad_and_changes_no_neighbour(make_shards: Call, vitscore: Call, digits: Any) -> None:
    clean = digits[:60]
    broken = list(clean)
    broken[7] = (clean[7][0], {"png": clean[7][1]["png"][:40], "cls": b"1"})
    broken[30] = (clean[30][0], {"jpg": b"not an image", "cls": b"1"})
    broken[31] = (clean[31][0], {"cls": b"1"})
    broken[32] = (clean[32][0], {**clean[32][1], "cls": b"10"})
    for name, samples in (("clean", clean), ("broken", broken)):
        shards = make_shards(samples, name=name)
        assert vitscore("run", shards, *MODELS, "-o", shards / "out").code == 0
    good, damaged = (part_tables(shards.parent / name / "out")["0000000-s-0.parquet"] for name in ("clean", "broken"))
    reasons = {row["key"]: row["reason"].split(": ")[0] for row in damaged if row["status"] == "bad"}
    assert set(reasons) == {broken[row][0] for row in (7, 30, 31, 32)}
    assert reasons[broken[31][0]] == "no image"
    assert reasons[broken[32][0]] == "label out of range"
    assert all(row["demo-vit.pred"] is None for row in damaged if row["status"] == "bad")
    for row in [*good, *damaged]:
        del row["shard"]
    assert [row for row in damaged if row["status"] == "ok"] == [row for row in good if row["key"] not in reasons]
    ledger = read_metrics(shards / "out")["ledger"]
    assert (ledger["expected"], ledger["scored"], ledger["bad"]) == (60, 56, 4)
    assert sum(ledger["reasons"].values()) == 4


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_predictions_do_not_depend_on_the_batch_size(
    batch_size: int, tmp_path: Path, vitscore: Call, demo_run: Path
) -> None:
    out = tmp_path / "out"
    assert vitscore("run", "demo", *MODELS, "-o", out, "-b", batch_size, "--save", "logits").code == 0
    rows, expected = load_run(out).predictions(), load_run(demo_run).predictions()
    for name in ("demo-vit", "demo-clip"):
        logits = np.sort(np.array(rows[f"{name}.logits"].to_pylist()))
        is_clear = logits[:, -1] - logits[:, -2] > 1e-3
        assert is_clear.mean() > 0.99
        column = f"{name}.pred"
        assert (rows[column].to_numpy()[is_clear] == expected[column].to_numpy()[is_clear]).all()


def test_saved_logits_and_embeddings_stand_beside_the_predictions(tmp_path: Path, vitscore: Call) -> None:
    out = tmp_path / "out"
    assert vitscore("run", "demo", *MODELS, "-o", out, "--limit", 40, "--save", "logits,embeddings").code == 0
    rows = load_run(out).predictions()
    assert rows.num_rows == 40
    for name in ("demo-vit", "demo-clip"):
        logits = np.array(rows[f"{name}.logits"].to_pylist(), np.float64)
        assert (logits.argmax(1) == rows[f"{name}.pred"].to_numpy()).all()
        probabilities = np.exp(logits - logits.max(1, keepdims=True))
        probabilities /= probabilities.sum(1, keepdims=True)
        assert probabilities.max(1) == pytest.approx(rows[f"{name}.prob"].to_numpy(), abs=1e-5)
        assert len({len(row) for row in rows[f"{name}.embedding"].to_pylist()}) == 1


def test_a_limit_counts_samples_over_shard_borders(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:10], digits[10:20], digits[20:30])
    assert vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out", "--limit", 14).code == 0
    assert [row["key"] for rows in part_tables(shards / "out").values() for row in rows] == [
        key for key, _ in digits[:14]
    ]
    assert read_metrics(shards / "out")["ledger"]["shards"]["expected"] == 2


def test_a_bad_shard_is_named_and_the_others_are_scored(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards(digits[:20], digits[20:40], digits[40:60])
    data = (shards / "s-1.tar").read_bytes()
    (shards / "s-1.tar").write_bytes(data[: len(data) // 2 - 300])
    (shards / "s-2.tar").write_bytes(b"")
    names = shards / "s-{0..3}.tar"
    done = vitscore("run", names, "-m", "demo-vit", "-o", shards / "out")
    assert done.code == 3
    assert done.err.count("\n") == 1
    bad = read_metrics(shards / "out")["ledger"]["shards"]["bad"]
    assert {Path(name).name: reason.split(": ")[0] for name, reason in bad.items()} == {
        "s-1.tar": "truncated",
        "s-2.tar": "empty file",
        "s-3.tar": "missing",
    }
    assert 20 < read_metrics(shards / "out")["ledger"]["scored"] < 40
    out = shards / "out-skip"
    assert vitscore("run", names, "-m", "demo-vit", "-o", out, "--on-bad-shard", "skip", "--max-bad", "50%").code == 0


def test_too_many_bad_samples_end_with_5_and_a_higher_limit_goes_on(
    make_shards: Call, vitscore: Call, digits: Any
) -> None:
    samples = [
        (key, {**members, "png": b"x"} if row % 4 == 0 else members) for row, (key, members) in enumerate(digits)
    ]
    shards = make_shards(samples[:40])
    command = ("run", shards, "-m", "demo-vit", "-o", shards / "out")
    done = vitscore(*command)
    assert done.code == 5
    assert "10 of 40" in done.err
    assert vitscore(*command, "--max-bad", "3").code == 5
    assert vitscore(*command, "--max-bad", "30%").code == 0


def test_bad_samples_can_count_as_wrong_answers(make_shards: Call, vitscore: Call, digits: Any) -> None:
    samples = [(key, {**members, "png": b"x"} if row == 3 else members) for row, (key, members) in enumerate(digits)]
    shards = make_shards(samples[:40])
    for mode in ("skip", "wrong"):
        assert vitscore("run", shards, "-m", "demo-vit", "-o", shards / mode, "--on-bad-sample", mode).code == 0
    skip, wrong = (read_metrics(shards / mode)["models"]["demo-vit"] for mode in ("skip", "wrong"))
    assert (skip["samples"], wrong["samples"]) == (39, 40)
    assert wrong["accuracy"] == pytest.approx(skip["accuracy"] * 39 / 40)


def test_a_bad_sample_can_end_the_run(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards([*digits[:5], ("broken", {"png": b"x", "cls": b"1"})])
    done = vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out", "--on-bad-sample", "fail")
    assert done.code == 3
    assert "s-0.tar[broken]" in done.err
    assert not list((shards / "out" / "parts").iterdir())


def test_members_that_are_not_adjacent_are_one_sample_and_noted(make_shards: Call, vitscore: Call, digits: Any) -> None:
    images = [(key, {"png": members["png"]}) for key, members in digits[:10]]
    labels = [(key, {"cls": members["cls"]}) for key, members in digits[:10]]
    shards = make_shards([*images, *labels])
    done = vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out")
    assert done.code == 0
    assert "s-0.tar: 10 samples had members that were not adjacent" in done.out
    rows = part_tables(shards / "out")["0000000-s-0.parquet"]
    assert [(row["key"], row["label"]) for row in rows] == [(key, int(members["cls"])) for key, members in digits[:10]]


def test_logits_that_are_not_finite_are_bad_rows_not_predictions(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = tmp_path / "broken-vit"
    shutil.copytree(find("demo-vit").path, checkpoint)
    weights = load_file(checkpoint / "model.safetensors")
    weights["classifier.bias"][3] = float("nan")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    shards = make_shards(digits[:20])
    done = vitscore("run", shards, "-m", checkpoint, "-o", shards / "out")
    assert done.code == 5
    assert read_metrics(shards / "out")["ledger"]["reasons"] == {"logits not finite": 20}
    assert read_metrics(shards / "out")["models"]["broken-vit"]["accuracy"] is None


def test_what_half_precision_changes_is_counted_against_a_run_in_fp32(
    make_shards: Call, vitscore: Call, digits: Any, tmp_path: Path
) -> None:
    """A random model with many classes, whose best answers are close together."""
    names = [f"c{number}" for number in range(2000)]
    from support import smallmodels as models

    checkpoint = models.save_vit(tmp_path / "vit", tuple(names), num_hidden_layers=12)
    samples = [(key, {"png": members["png"]}) for key, members in digits[:100]]
    shards = make_shards([*samples[:3], ("bad", {"png": b"x"}), *samples[3:]], classes=names)
    for precision in ("bf16", "fp32"):
        words = ("run", shards, "-m", checkpoint, "-b", "16", "--precision", precision)
        assert vitscore(*words, "-o", tmp_path / precision).code == 0
    half, full = (
        [row for table in part_tables(tmp_path / name).values() for row in table if row["status"] == "ok"][:64]
        for name in ("bf16", "fp32")
    )
    audits = {
        name: json.loads((tmp_path / name / "run.json").read_bytes())["sessions"][-1]["audit"]["vit"]
        for name in ("bf16", "fp32")
    }
    assert [audit["images"] for audit in audits.values()] == [64, 64]
    assert audits["fp32"]["against_fp32"] is None
    differs = sum(a["vit.pred"] != b["vit.pred"] for a, b in zip(half, full, strict=True))
    assert audits["bf16"]["against_fp32"]["top1_differs"] == differs > 0
    largest = max(abs(a["vit.prob"] - b["vit.prob"]) for a, b in zip(half, full, strict=True))
    assert audits["bf16"]["against_fp32"]["largest_prob_difference"] == pytest.approx(largest)
    assert "Effect of preprocessing and precision" in (tmp_path / "bf16" / "report.html").read_text()


@pytest.mark.parametrize("stage", ["read", "decode", "forward", "count", "write"])
def test_the_run_says_what_it_waited_for(
    stage: str, tmp_path: Path, vitscore: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow down every stage in turn: the store, the decoder, the forward, the loop itself, the disk."""
    import time

    from vitscore.decode.dali import DaliDecoder
    from vitscore.engine.forward_cpu import Forward
    from vitscore.engine.loop import RowRecorder
    from vitscore.rundir.parts import ShardRows
    from vitscore.shards.samples import OpenShard

    held, name = {
        "read": (OpenShard, "read"),
        "decode": (DaliDecoder, "collect"),
        "forward": (Forward, "_compute"),
        "count": (RowRecorder, "_count"),
        "write": (ShardRows, "commit"),
    }[stage]
    real = getattr(held, name)
    monkeypatch.setattr(held, name, lambda *a, **k: (time.sleep(0.5), real(*a, **k))[1])
    done = vitscore(
        *("run", "demo", "-m", "demo-vit", "-b", "64", "--decoder", "dali", "--tta", "hflip", "-o", tmp_path / "out")
    )
    assert done.code == 0, done.err
    session = json.loads((tmp_path / "out" / "run.json").read_bytes())["sessions"][-1]
    waiting = session["waiting_s"]
    assert list(waiting) == ["read", "decode", "forward", "count", "write"]
    assert max(waiting, key=waiting.get) == stage == session["bottleneck"]["stage"]
    assert waiting[stage] <= session["seconds"] + 0.01 and sum(waiting.values()) <= session["seconds"] + 0.05
    share = session["bottleneck"]["share"]
    assert share > 0.4 and share == pytest.approx(waiting[stage] / session["seconds"], abs=0.002)
    rate, bound = done.out.splitlines()[-3:-1]
    assert rate.endswith("images/s through 1 model(s), 2 forwards per image")
    assert bound == f"{stage}-bound ({100 * share:.0f}%): {session['bottleneck']['advice']}"
    assert max(len(rate), len(bound)) <= 80


def test_how_far_pixels_and_answers_are_from_transformers_own_is_in_the_record(
    make_shards: Call, vitscore: Call, tmp_path: Path
) -> None:
    """Large photographs, whose resize is not the processor's to the bit; the oracle is transformers' pipeline."""
    from support import pictures
    from support import smallmodels as models

    names = [f"c{number}" for number in range(50)]
    checkpoint = models.save_vit(tmp_path / "vit", tuple(names))
    content = list(pictures.ordinary().values())[:20]
    shards = make_shards([(f"k{number}", {"jpg": data}) for number, data in enumerate(content)], classes=names)
    assert vitscore("run", shards, "-m", checkpoint, "--precision", "fp32", "-o", tmp_path / "out").code == 0
    audit = json.loads((tmp_path / "out" / "run.json").read_bytes())["sessions"][-1]["audit"]["vit"]
    classify = pipeline("image-classification", model=str(checkpoint), device="cpu")
    answers = classify([load_image(Image.open(io.BytesIO(data))) for data in content], top_k=1)
    (rows,) = part_tables(tmp_path / "out").values()
    differs = sum(names[row["vit.pred"]] != answer[0]["label"] for row, answer in zip(rows, answers, strict=True))
    assert audit["images"] == 20
    assert audit["against_processor"]["top1_differs"] == differs
    largest = max(
        abs(row["vit.prob"] - answer[0]["score"])
        for row, answer in zip(rows, answers, strict=True)
        if names[row["vit.pred"]] == answer[0]["label"]
    )
    assert audit["against_processor"]["largest_prob_difference"] >= largest - 1e-5
    assert 0 <= audit["against_processor"]["mean_levels"] < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_gpu_predicts_as_the_cpu_does(precision: str, tmp_path: Path, vitscore: Call) -> None:
    rows = []
    for device, asked in (("cuda", precision), ("cpu", "fp32")):
        out = tmp_path / device
        done = vitscore("run", "demo", *MODELS, "-o", out, "--device", device, "--precision", asked, "--no-compile")
        assert done.code == 0, done.err
        rows.append(load_run(out).predictions())
    ours, expected = rows
    for name in ("demo-vit", "demo-clip"):
        is_clear = expected[f"{name}.prob"].to_numpy() > 0.9
        column = f"{name}.pred"
        assert (ours[column].to_numpy()[is_clear] == expected[column].to_numpy()[is_clear]).all()


def test_labels_that_are_all_wrong_end_the_run(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards([(key, {**members, "cls": b"77"}) for key, members in digits[:30]])
    done = vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out")
    assert done.code == 3
    assert "no label is a class: 30 labels" in done.err


def test_without_labels_there_are_predictions_and_no_metrics(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards([(key, {"png": members["png"]}) for key, members in digits[:30]])
    done = vitscore("run", shards, *MODELS, "-o", shards / "out")
    assert done.code == 0
    assert "No sample has a label" in done.out
    document = read_metrics(shards / "out")
    assert document["ledger"]["unlabelled"] == document["ledger"]["scored"] == 30
    assert document["models"]["demo-vit"]["report"] is None


def test_class_names_as_labels_and_a_labels_file(make_shards: Call, vitscore: Call, digits: Any) -> None:
    names = make_shards([]).joinpath("classes.txt").read_text().split()
    named = [(key, {**members, "cls": names[int(members["cls"])].encode()}) for key, members in digits[:30]]
    shards = make_shards(named, name="named")
    assert vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out").code == 0
    (shards / "labels.csv").write_text("key,label\n" + "".join(f"{key},0\n" for key, _ in digits[:30]))
    out = shards / "zeros"
    assert vitscore("run", shards, "-m", "demo-vit", "-o", out, "--labels", shards / "labels.csv").code == 0
    truth = [row["label"] for row in part_tables(shards / "out")["0000000-s-0.parquet"]]
    assert truth == [int(members["cls"]) for _, members in digits[:30]]
    assert {row["label"] for row in part_tables(out)["0000000-s-0.parquet"]} == {0}


def test_a_dry_run_shows_the_plan_and_writes_nothing(tmp_path: Path, vitscore: Call) -> None:
    done = vitscore("run", "demo", *MODELS, "-o", tmp_path / "out", "--dry-run")
    assert done.code == 0
    for word in ("demo-vit", "by position", "zero-shot", "precision = ", "batch_size = ", "decoder = ", "disk"):
        assert word in done.out
    assert not (tmp_path / "out").exists()


def test_bad_samples_that_fill_no_batch_are_judged_at_once(make_shards: Call, vitscore: Call, digits: Any) -> None:
    shards = make_shards([(key, {"cls": members["cls"]}) for key, members in digits], digits[:1])
    done = vitscore("run", shards, "-m", "demo-vit", "-o", shards / "out", "-b", 32, "--max-bad", 5)
    assert done.code == 5
    bad = int(re.search(r"too many bad samples: (\d+) of", done.err)[1])  # type: ignore[index]
    assert bad < 200

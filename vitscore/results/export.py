"""`vitscore export DIR`: write a run in the formats of other tools.

    figures of metrics.json ─► CLIP_benchmark's JSON, timm's results CSV
    parts ─► a probability matrix with labels and keys, for cleanlab

The matrix is written block by block, so memory does not grow with the run. It is exact if the logits were saved;
otherwise it is refused unless an approximation is asked for. Needs no model and no torch. Axes: N labelled rows,
B rows of a block, K classes, T the k of top-k.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vitscore.errors import DataError, UsageError
from vitscore.kernels.arrays import Array
from vitscore.metrics.fold import refold
from vitscore.metrics.notation import percent
from vitscore.rundir.folder import require_record
from vitscore.rundir.parts import finished_parts
from vitscore.rundir.rows import ModelRows, Rows, read_rows
from vitscore.system.durable import durable_path, json_bytes, write_bytes_durably, writing

FORMATS = ("clip-benchmark", "timm", "cleanlab")
_DATE = (1980, 1, 1, 0, 0, 0)


def export(
    folder: Path, form: str, output: Path, *, model: str | None = None, dataset: str = "", approximate: bool = False
) -> list[str]:
    """Write a run in another tool's format; return lines that report what was written.

    Args:
        folder: the run's folder.
        form: one of FORMATS.
        output: the file to write.
        model: the model to export; required for `clip-benchmark` and `cleanlab` if the run has several.
        dataset: the data set's name in CLIP_benchmark's JSON.
        approximate: let `cleanlab` spread the probability outside the top k evenly over the other classes.

    Raises:
        UsageError: no such run, format or model, or the parts lack the logits.
        DataError: no sample has a label and a prediction.
    """
    if form not in FORMATS:
        raise UsageError("unknown format", where=form, expected=" or ".join(FORMATS))
    record = require_record(folder)
    if form == "timm":
        chosen = list(record["models"]) if model is None else [one_model(record, model)]
        return write_timm(output, metrics_of(folder), record, chosen)
    name = one_model(record, model)
    if form == "clip-benchmark":
        return write_clip_benchmark(output, metrics_of(folder), record, name, dataset=dataset or folder.resolve().name)
    return write_matrix(output, folder, record, name, approximate=approximate)


def one_model(record: Mapping[str, Any], name: str | None) -> str:
    """Return `name`, or the run's only model.

    Raises:
        UsageError: the run has no model of that name, or has several and none is named.
    """
    models = list(record["models"])
    if name is None and len(models) == 1:
        return str(models[0])
    if name is None or name not in models:
        what = "no model named" if name is None else "no such model"
        raise UsageError(what, where="--model", expected=" or ".join(models), got=name or "none")
    return name


def metrics_of(folder: Path) -> dict[str, Any]:
    """Return the figures of every model, computed from the parts.

    Raises:
        DataError: no sample has a label and a prediction.
    """
    document = refold(folder).document
    if all(model["report"] is None for model in document["models"].values()):
        raise DataError("no figures to export", where=str(folder), got="no sample with a label and a prediction")
    models: dict[str, Any] = document["models"]
    return models


def write_clip_benchmark(
    output: Path, metrics: Mapping[str, Any], record: Mapping[str, Any], name: str, *, dataset: str
) -> list[str]:
    """Write the figures of one model in the format of `clip_benchmark eval`; acc5 is null without top-5 accuracy."""
    figures = metrics[name]
    document = {
        "dataset": dataset,
        "model": name,
        "pretrained": record["models"][name]["checkpoint"],
        "task": "zeroshot_classification",
        "metrics": {
            "acc1": figures["accuracy"],
            "acc5": figures["topk_accuracy"].get("5"),
            "mean_per_class_recall": figures["balanced_accuracy"],
        },
        "language": "en",
    }
    with writing(output.parent):
        write_bytes_durably(output, json_bytes(document))
    return [f"{name} written to {output}, in CLIP_benchmark's format"]


TIMM_COLUMNS = (
    "model",
    "top1",
    "top1_err",
    "top5",
    "top5_err",
    "param_count",
    "img_size",
    "crop_pct",
    "interpolation",
)


def write_timm(output: Path, metrics: Mapping[str, Any], record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Write a row per model with the columns of timm's results files, best model first; unknown values are empty."""
    rows = []
    for name in sorted(names, key=lambda name: -(metrics[name]["accuracy"] or 0)):
        figures, recorded = metrics[name], record["models"][name]
        accuracies = figures["accuracy"], figures["topk_accuracy"].get("5")
        top1, top5 = (percent(value, 3, missing="") for value in accuracies)
        parameters = recorded.get("parameters")
        rows.append(
            {
                "model": name,
                "top1": top1,
                "top1_err": _error(top1),
                "top5": top5,
                "top5_err": _error(top5),
                "param_count": f"{parameters / 1e6:.2f}" if parameters else "",
                "img_size": (recorded.get("image_size") or [""])[0],
                "crop_pct": "",
                "interpolation": recorded.get("interpolation") or "",
            }
        )
    text = io.StringIO()
    writer = csv.DictWriter(text, TIMM_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with writing(output.parent):
        write_bytes_durably(output, text.getvalue().encode())
    return [f"{len(rows)} model(s) written to {output}, in the format of timm's results"]


def _error(accuracy: str) -> str:
    return f"{100 - float(accuracy):.3f}" if accuracy else ""


def write_matrix(output: Path, folder: Path, record: Mapping[str, Any], name: str, *, approximate: bool) -> list[str]:
    """Write `pred_probs` float32 (N, K), `labels` int64 (N), `keys` (N) and `classes` (K) to an .npz for np.load.

    Rows are the samples with a label and a prediction, in the order of the parts.
    """
    has_logits = "logits" in record["options"].get("save", ())
    if not has_logits and not approximate:
        raise UsageError(
            "the parts lack the logits",
            where=str(folder),
            expected="a run with --save logits",
            next_step="Or use --approximate: the rest of the top k is spread evenly over the other classes.",
        )
    num_classes = len(record["classes"])
    parts = [path for path, _ in finished_parts(folder / "parts", record["identity_hash"]).values()]
    labels, keys = [], []
    for rows in _labelled(parts, name, ("pred",)):
        labels.append(rows.labels_B)
        keys.extend(rows.keys.to_pylist())
    if not keys:
        raise DataError("nothing to export", where=str(folder), got="no sample with a label and a prediction")
    figures = ("pred", "logits") if has_logits else ("pred", "topk", "topk_prob")
    probabilities = softmax if has_logits else spread_rest

    def blocks() -> Iterator[Array]:
        for rows in _labelled(parts, name, figures):
            yield probabilities(rows.models[name], num_classes)

    whole = {
        "labels": np.concatenate(labels).astype(np.int64),
        "keys": np.array(keys, np.str_),
        "classes": np.array(record["classes"], np.str_),
    }
    with writing(output.parent), durable_path(output) as temporary:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            _store(archive, "pred_probs", (len(keys), num_classes), np.dtype(np.float32), blocks())
            for title, array in whole.items():
                _store(archive, title, array.shape, array.dtype, [array])
    how = "exact, from the logits" if has_logits else "approximate: probability outside the top k is spread evenly"
    return [f"{len(keys):,} x {num_classes:,} probabilities of {name} written to {output} ({how})"]


def _store(
    archive: zipfile.ZipFile, title: str, shape: tuple[int, ...], dtype: np.dtype[Any], blocks: Iterable[Array]
) -> None:
    """Write an array to the archive as `title.npy`, block by block."""
    with archive.open(zipfile.ZipInfo(f"{title}.npy", date_time=_DATE), "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file, header)
        for block in blocks:
            file.write(np.ascontiguousarray(block, dtype).tobytes())


def _labelled(parts: Sequence[Path], name: str, figures: Sequence[str]) -> Iterator[Rows]:
    for path in parts:
        for rows in read_rows(path, [name], figures=figures):
            yield rows.take(~rows.is_bad_B & (rows.labels_B >= 0) & (rows.models[name].pred >= 0))


def softmax(rows: ModelRows, num_classes: int) -> Array:
    """Return probabilities computed from the logits, float32 (B, K)."""
    if rows.logits is None:
        return np.zeros((0, num_classes), np.float32)
    exp_BK = np.exp(rows.logits.astype(np.float64) - rows.logits.max(axis=1, keepdims=True, initial=-np.inf))
    return np.asarray(exp_BK / exp_BK.sum(axis=1, keepdims=True), np.float32)


def spread_rest(rows: ModelRows, num_classes: int) -> Array:
    """Return the top k's probabilities, with the rest spread evenly over the other classes, float32 (B, K)."""
    if rows.topk is None or rows.topk_prob is None:
        return np.zeros((0, num_classes), np.float32)
    num_rows, width = rows.topk.shape
    rest_B = np.maximum(1 - rows.topk_prob.sum(axis=1), 0) / max(num_classes - width, 1)
    matrix_BK = np.repeat(rest_B[:, None], num_classes, axis=1).astype(np.float32)
    matrix_BK[np.arange(num_rows)[:, None], rows.topk] = rows.topk_prob
    return matrix_BK

"""Python interface: `score(...)` scores models like `vitscore run`, `load_run(DIR)` opens a finished run.

from vitscore import score
run = score("demo", model=["demo-vit", "demo-clip"], output="demo-run")
run["demo-vit"].accuracy, run["demo-vit"].report["macro avg"]["f1-score"]
run.predictions().to_pandas()
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vitscore.errors import UsageError
from vitscore.metrics.notation import percent
from vitscore.plan.options import make_options
from vitscore.rundir.folder import require_record
from vitscore.rundir.parts import finished_parts


class Figures(Mapping[str, Any]):
    """A JSON object whose keys are also attributes: `figures.accuracy` is `figures["accuracy"]`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        return Figures(value) if isinstance(value, Mapping) else value

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):
            raise AttributeError(key)
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"no figure {key!r}; available: {', '.join(self._values)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._values]

    def __repr__(self) -> str:
        return json.dumps(self._values, indent=2, ensure_ascii=False)


class Run:
    """A finished run: its metrics, predictions and record."""

    def __init__(self, folder: Path, document: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        self.folder = folder
        self.metrics = Figures(document)
        self.record = Figures(record)

    def __getitem__(self, model: str) -> Figures:
        """Return one model's figures."""
        if model not in self.models:
            raise UsageError("no such model", where=model, expected=" or ".join(self.models))
        figures: Figures = self.metrics["models"][model]
        return figures

    @property
    def models(self) -> list[str]:
        return list(self.metrics["models"])

    @property
    def classes(self) -> list[str]:
        return list(self.metrics["classes"])

    def predictions(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return a table with a row for every sample, shard by shard; with pandas, `.to_pandas()` converts it."""
        parts = finished_parts(self.folder / "parts", self.record["identity_hash"])
        tables = [pq.read_table(parts[ordinal][0], columns=columns) for ordinal in sorted(parts)]
        return pa.concat_tables([table.replace_schema_metadata(None) for table in tables])

    def confusion(self, model: str) -> np.ndarray[Any, Any]:
        """Return a model's confusion matrix, int64 (K, K); rows are the truth, columns the prediction."""
        if model not in self.models:
            raise UsageError("no such model", where=model, expected=" or ".join(self.models))
        with np.load(self.folder / f"confusion_{model}.npz") as file:
            if "counts" in file and "rows" not in file:
                dense: np.ndarray[Any, Any] = file["counts"]
                return dense
            counts = np.zeros(tuple(file["shape"]), np.int64)
            counts[file["rows"], file["cols"]] = file["counts"]
            return counts

    def __repr__(self) -> str:
        scores = ", ".join(f"{name} {percent(self[name]['accuracy'], 2, unit='%')}" for name in self.models)
        return f"Run({str(self.folder)!r}: {scores} on {self.metrics['ledger']['scored']:,} samples)"

    def _repr_html_(self) -> str:
        """Return a small HTML table of the models, for notebooks."""
        from vitscore.report.templating import fill

        rows = []
        for name in self.models:
            report = self[name]["report"] or {"macro avg": {}, "weighted avg": {}}
            f1_scores = [percent(report[kind].get("f1-score"), 2, unit="%") for kind in ("macro avg", "weighted avg")]
            rows.append((name, percent(self[name]["accuracy"], 2, unit="%"), *f1_scores, f"{self[name]['samples']:,}"))
        return fill("notebook.html", rows=rows)


def score(
    shards: str | Path | Sequence[str | Path],
    model: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    progress: bool | None = None,
    **options: Any,
) -> Run:
    """Score models over shards like `vitscore run`; resume an earlier call with the same arguments.

    Args:
        shards: one or more of the forms that the command accepts.
        model: one or more of `[NAME=]CHECKPOINT`.
        output: the run's folder.
        progress: whether to show a progress line; None shows it on a terminal only.
        **options: the other long options of `vitscore run`, with underscores (`batch_size=64`).

    Returns:
        The finished run. With several ranks, every rank returns when all are done.

    Raises:
        VitscoreError: the error that the command would print, with its `exit_code`.
    """
    from vitscore.ranks.ranks import rank_from_environment
    from vitscore.run import run as runs
    from vitscore.text.watcher import Watcher

    values = {"shards": shards, "model": model, "output": output, **options}
    made = make_options(values)
    is_main = rank_from_environment() == 0
    watcher = Watcher(is_shown=progress if is_main else False, tells_notes=is_main)
    try:
        outcome = runs.run(made, watcher)
    finally:
        watcher.finished()
    if outcome is not None and outcome.problem is not None:
        raise outcome.problem
    return load_run(made.output)


def load_run(folder: str | Path) -> Run:
    """Open a finished run.

    Raises:
        UsageError: the folder holds no run, or an unfinished one.
    """
    path = Path(folder)
    record = require_record(path)
    try:
        document = json.loads((path / "metrics.json").read_bytes())
    except FileNotFoundError:
        document = None
    shards = document["ledger"]["shards"] if document else {"done": 0, "expected": record["corpus"]["shards"]}
    if document is None or shards["done"] < shards["expected"]:
        raise UsageError(
            "run is not finished",
            where=str(path),
            expected=f"{shards['expected']} shards",
            got=f"{shards['done']}",
            next_step="Start the same command again to resume it.",
        )
    return Run(path, document, record)

"""The Python interface: the same job and the same option names as the command."""

from pathlib import Path

import numpy as np
import pytest

from vitscore import load_run, score
from vitscore.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "run"
    score("demo", model=["demo-vit", "clip=demo-clip"], output=path, limit=60, batch_size=16)
    return path


def test_figures_are_attributes(folder: Path) -> None:
    run = load_run(folder)
    assert run.models == ["demo-vit", "clip"]
    assert run["demo-vit"].accuracy == run.metrics.models["demo-vit"]["accuracy"]
    assert run["clip"].report["macro avg"]["f1-score"] > 0.9
    assert run.record.choices.batch_size.value == 16
    with pytest.raises(AttributeError, match="no figure 'acuracy'"):
        _ = run["clip"].acuracy


def test_predictions_are_a_table_and_agree_with_the_confusion_matrix(folder: Path) -> None:
    run = load_run(folder)
    rows = run.predictions(columns=["label", "clip.pred"])
    expected = np.zeros((10, 10), np.int64)
    np.add.at(expected, (rows["label"].to_numpy(), rows["clip.pred"].to_numpy()), 1)
    assert (run.confusion("clip") == expected).all()


def test_a_second_call_changes_nothing(folder: Path) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "parts").iterdir())
    again = score("demo", ["demo-vit", "clip=demo-clip"], folder, limit=60, batch_size=16)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (folder / "parts").iterdir()) == before
    assert again.metrics.ledger.scored == 60


def test_a_notebook_shows_a_table(folder: Path) -> None:
    text = load_run(folder)._repr_html_()
    assert text.count("<tr>") == 3
    assert "demo-vit" in text


def test_mistakes_are_the_commands_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown option: batchsize"):
        score("demo", "demo-vit", tmp_path / "out", batchsize=3)
    with pytest.raises(UsageError, match="no run here"):
        load_run(tmp_path)

"""Confusion matrices in a terminal: small, correct, and never wider than the terminal."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscore.kernels.counts import SparseConfusion
from vitscore.text.confusion import confusion_pictures

DIGITS = "zero one two three four five six seven eight nine".split()


def test_shades_are_shares_of_the_row() -> None:
    counts = np.array([[90, 10, 0], [1, 99, 0], [0, 0, 0]])
    lines = confusion_pictures({"vit": counts}, ["cat", "dog", "emu"], width=80)
    assert lines[:5] == ["", "vit", "cat ██▓▓ ·", "dog ░░██ ·", "emu  · · ·"]
    assert lines[-1] == "vit: most frequent errors (label → answer): cat → dog (10), dog → cat (1)"
    narrow = confusion_pictures({"vit": counts}, ["cat", "dog", "emu"], width=46)
    assert narrow[-2:] == ["vit: most frequent errors (label → answer):", "  cat → dog (10), dog → cat (1)"]


def test_models_stand_beside_each_other_where_they_fit() -> None:
    both = {"vit": np.eye(10, dtype=int), "clip": np.eye(10, dtype=int)}
    assert confusion_pictures(both, DIGITS, width=80)[1].split() == ["vit", "clip"]
    narrow = confusion_pictures(both, DIGITS, width=40)
    assert narrow[1].split() == ["vit"] and "clip" in [line.strip() for line in narrow]


def test_many_classes_share_cells() -> None:
    counts = SparseConfusion(np.array([0, 999]), np.array([999, 999]), np.array([3, 5]), (1000, 1000))
    lines = confusion_pictures({"vit": counts}, [f"c{i}" for i in range(1000)], width=80)
    assert len(lines) < 20 and "1,000 classes share 14 rows" in " ".join(lines)
    assert lines[2].startswith("c0 ") or lines[2].strip().startswith("c0")
    assert lines[2].endswith("██") and lines[15].endswith("██")


def test_terminals_without_block_characters_get_plain_ones() -> None:
    counts = np.eye(3, dtype=int) * [[9], [9], [1]]
    counts[1, 0] = 1
    lines = confusion_pictures({"vit": counts}, ["a", "b", "c"], width=80, is_unicode=False)
    assert "".join(lines).isascii() and "a ## . ." in lines
    assert lines[-1] == "vit: most frequent errors (label -> answer): b -> a (1)"


def test_nothing_counted_shows_nothing() -> None:
    assert confusion_pictures({"vit": np.zeros((3, 3), int)}, ["a", "b", "c"], width=80) == []
    assert confusion_pictures({}, ["a"], width=80) == []


@pytest.mark.parametrize("num_classes", [1, 2, 10, 20, 21, 1000])
@given(width=st.integers(20, 200), num_models=st.integers(1, 4), seed=st.integers(0, 99))
def test_it_never_is_wider_than_the_terminal(num_classes: int, width: int, num_models: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(0, num_classes, (2, 50))
    counts = SparseConfusion(rows, cols, np.ones(50, int), (num_classes, num_classes))
    models = {f"model-{number}-with-a-long-name": counts for number in range(num_models)}
    lines = confusion_pictures(models, [f"class {i}" for i in range(num_classes)], width=width)
    assert max(map(len, lines), default=0) <= width

"""Confusion matrices as small pictures of characters, for terminals: models beside each other as far as they fit.

Values in, lines out. A cell is two columns wide and as dark as its share of the row's images; many classes share a
cell, in the data set's order. What is confused most follows in words, so nothing is told by shade alone.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from vitscore.kernels.counts import Confusion, SparseConfusion

MOST_CELLS = 20
SHARED_CELLS = 14
"""Where classes share cells: two pictures of this size stand beside each other in 80 columns."""
LABEL_ROOM = 8
GAP = 4
WORST = 3
FROM = (0.0, 0.005, 0.02, 0.1, 0.5)
"""From which share of its row a cell has each shade."""
SHADES = (" ·", "░░", "▒▒", "▓▓", "██")
ASCII_SHADES = (" .", "--", "++", "%%", "##")


def confusion_pictures(
    confusions: Mapping[str, Confusion], classes: Sequence[str], *, width: int, is_unicode: bool = True
) -> list[str]:
    """A picture of every model's confusion matrix that has any count, and the legend once.

    Args:
        confusions: by model; rows truth, columns prediction.
        classes: names of the rows.
        width: columns of the terminal.
        is_unicode: whether it can show block characters.
    """
    shades = SHADES if is_unicode else ASCII_SHADES
    room = min(LABEL_ROOM, max(map(len, classes), default=0))
    num_cells = min((width - room - 1) // 2, len(classes) if len(classes) <= MOST_CELLS else SHARED_CELLS)
    shown = {name: cells_of(confusion) for name, confusion in confusions.items()}
    shown = {name: cells for name, cells in shown.items() if len(cells.counts)}
    if num_cells < min(len(classes), 4) or not shown:
        return []
    pictures = [picture(name, cells, classes, num_cells, room, shades) for name, cells in shown.items()]
    across = max(1, (width + GAP) // (len(pictures[0][0]) + GAP))
    lines = [""]
    for start in range(0, len(pictures), across):
        rows = zip_longest(*pictures[start : start + across], fillvalue="")
        lines += [(" " * GAP).join(row).rstrip() for row in rows]
    lines += textwrap.wrap(legend(len(classes), num_cells, shades), width)
    for name, cells in shown.items():
        lines += textwrap.wrap(worst(name, cells, classes), width, subsequent_indent="  ")
    return lines


def cells_of(confusion: Confusion) -> SparseConfusion:
    if isinstance(confusion, SparseConfusion):
        return confusion
    rows, cols = np.nonzero(confusion)
    return SparseConfusion(rows, cols, confusion[rows, cols], confusion.shape)


def picture(
    name: str, confusion: SparseConfusion, classes: Sequence[str], num_cells: int, room: int, shades: Sequence[str]
) -> list[str]:
    """The name, then a line a row; all equally long."""
    num_classes = len(classes)
    place = np.arange(num_classes) * num_cells // num_classes
    counts: Any = np.zeros((num_cells, num_cells))
    np.add.at(counts, (place[confusion.rows], place[confusion.cols]), confusion.counts)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    dark = np.searchsorted(FROM, shares, side="right") - 1
    first = [int(np.argmax(place == cell)) for cell in range(num_cells)]
    length = room + 1 + 2 * num_cells
    lines = [f"{cut(name, length):<{length}}"]
    for cell, row in enumerate(dark):
        lines.append(f"{cut(classes[first[cell]], room):>{room}} " + "".join(shades[level] for level in row))
    return lines


def legend(num_classes: int, num_cells: int, shades: Sequence[str]) -> str:
    steps = zip(shades[1:], FROM[1:], strict=True)
    marks = ", ".join(f"{shade[0]} {100 * start:g}%" for shade, start in steps)
    grouped = f"; {num_classes:,} classes share {num_cells} rows" if num_classes > num_cells else ""
    return f"rows are labels, columns answers in the same order; share of a row from {marks}{grouped}"


def worst(name: str, confusion: SparseConfusion, classes: Sequence[str]) -> str:
    """`vit takes most often: one for eight (3), ...`."""
    is_off = confusion.rows != confusion.cols
    rows, cols, counts = confusion.rows[is_off], confusion.cols[is_off], confusion.counts[is_off]
    order = np.lexsort((cols, rows, -counts))[:WORST]
    said = [f"{classes[rows[i]]} for {classes[cols[i]]} ({counts[i]:,})" for i in order]
    return f"{name} takes most often {', '.join(said)}" if said else f"{name} takes no class for another"


def cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 1, 0)] + "…"

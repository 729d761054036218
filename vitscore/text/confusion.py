"""Draw confusion matrices as small pictures of characters, side by side as far as the terminal is wide.

Values in, lines out. A cell is two columns wide, and its shade is its share of the row's images. Many classes share a
cell, in the data set's order. The most frequent errors follow as text, so shades are not the only source.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from vitscore.kernels.counts import Confusion, SparseConfusion
from vitscore.text.console import cut

MOST_CELLS = 20
"""Rows of a picture in which every class has its own cell, at most."""
SHARED_CELLS = 14
"""Rows of a picture with shared cells; two pictures of this size fit into 80 columns."""
LABEL_ROOM = 8
GAP = 4
WORST = 3
FROM = (0.0, 0.005, 0.02, 0.1, 0.5)
"""Smallest share of the row for every shade."""
SHADES = (" ·", "░░", "▒▒", "▓▓", "██")
ASCII_SHADES = (" .", "--", "++", "%%", "##")
NO_BREAK = "\N{NO-BREAK SPACE}"


def confusion_pictures(
    confusions: Mapping[str, Confusion], classes: Sequence[str], *, width: int, is_unicode: bool = True
) -> list[str]:
    """Return pictures of the confusion matrices, one legend, and the most frequent errors; empty ones are left out.

    Args:
        confusions: by model; rows truth, columns prediction.
        classes: names of the rows.
        width: columns of the terminal.
        is_unicode: whether the terminal can show block characters.
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
        text = worst(name, cells, classes, arrow="→" if is_unicode else "->")
        lines += textwrap.wrap(text, width, subsequent_indent="  ")
    return [line.replace(NO_BREAK, " ") for line in lines]


def cells_of(confusion: Confusion) -> SparseConfusion:
    if isinstance(confusion, SparseConfusion):
        return confusion
    rows, cols = np.nonzero(confusion)
    return SparseConfusion(rows, cols, confusion[rows, cols], confusion.shape)


def picture(
    name: str, confusion: SparseConfusion, classes: Sequence[str], num_cells: int, room: int, shades: Sequence[str]
) -> list[str]:
    """Return the name and then the rows of a picture, all lines equally long."""
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
    marks = ", ".join(f"{shade[0]}{NO_BREAK}{100 * start:g}%" for shade, start in steps)
    grouped = f"; {num_classes:,} classes share {num_cells} rows" if num_classes > num_cells else ""
    return f"rows are labels, columns answers, in the same order; share of the row from {marks}{grouped}"


def worst(name: str, confusion: SparseConfusion, classes: Sequence[str], *, arrow: str) -> str:
    """Return `vit: most frequent errors (label → answer): one → eight (3), ...`, without breaks inside an error."""
    is_off = confusion.rows != confusion.cols
    rows, cols, counts = confusion.rows[is_off], confusion.cols[is_off], confusion.counts[is_off]
    order = np.lexsort((cols, rows, -counts))[:WORST]
    errors = [NO_BREAK.join((classes[rows[i]], arrow, classes[cols[i]], f"({counts[i]:,})")) for i in order]
    if not errors:
        return f"{name}: no class is confused with another"
    return f"{name}: most frequent errors (label {arrow} answer): {', '.join(errors)}"

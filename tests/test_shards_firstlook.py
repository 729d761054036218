"""The preview of a corpus, compared with the contents of its tars."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.tars import write_members
from vitscore.shards.locate import locate
from vitscore.shards.preview import look
from vitscore.shards.shard import Shard


def write_images(path: Path, sizes: list[int], mode: str = "w") -> None:
    write_members(path, [(f"{number:05}.png", bytes(size)) for number, size in enumerate(sizes)], mode=mode)


def shards_in(folder: Path) -> tuple[Shard, ...]:
    return locate([str(folder)]).shards


def test_size_and_number_of_members_are_estimated(tmp_path: Path) -> None:
    for shard in range(4):
        write_images(tmp_path / f"{shard}.tar", [100, 900, 300] * 500)
    preview = look(shards_in(tmp_path))
    assert preview is not None
    assert preview.largest_bytes == 900
    assert preview.num_members == pytest.approx(4 * 1_500, rel=0.02)


def test_only_the_first_members_of_the_first_shard_are_read(tmp_path: Path) -> None:
    write_images(tmp_path / "0.tar", [10] * 64 + [5_000])
    (tmp_path / "1.tar").write_bytes(b"no tar")
    preview = look(shards_in(tmp_path))
    assert preview is not None and preview.largest_bytes == 10


@pytest.mark.parametrize("case", ["missing", "empty", "no tar", "cut", "compressed", "remote", "pipe"])
def test_there_is_no_preview_of_an_unreadable_first_shard(case: str, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    if case == "empty":
        write_images(path, [])
    if case == "no tar":
        path.write_bytes(b"x" * 5_000)
    if case == "cut":
        write_images(path, [10] * 3)
        path.write_bytes(path.read_bytes()[:300])
    if case == "compressed":
        write_images(path, [10] * 3, "w:gz")
    place = {"remote": "https://example.org/0.tar", "pipe": "pipe:cat 0.tar"}.get(case, str(path))
    assert look([Shard(0, "0.tar", place, 5_000)]) is None

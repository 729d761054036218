"""Group tar members into samples and choose the image of each sample.

Sits between the tar's index and the rows, and uses names only. Grouping follows webdataset: the key is the path up to
the first dot of the base name, including folders; the extension is the rest, in lower case. Names like `__meta__` and
names without a dot belong to no sample. Two cases differ from webdataset: members with the same key form one sample
even if they are not adjacent, and a second member with the same key and extension becomes a separate row, `key#2`,
instead of ending the shard.

If a sample has several images, the one whose extension comes first in `IMAGE_EXTENSIONS` is used, regardless of their
order in the tar.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import takewhile

from vitscore.shards.reasons import DUPLICATE_KEY, with_details

IMAGE_EXTENSIONS = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "tif",
    "tiff",
    "jp2",
    "j2k",
    "gif",
    "avif",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
)

NO_MEMBER = -1
_META_NAME = re.compile(r"__[^/]*__($|/)")
_DOTFILE = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


@dataclass
class Grouping:
    """The rows of a shard, by column; members are given by their position in the tar's index."""

    keys: list[str] = field(default_factory=list)
    image_members: list[int] = field(default_factory=list)
    label_members: list[int] = field(default_factory=list)
    extensions: list[list[str]] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)
    num_scattered: int = 0
    num_many_images: int = 0


def split_name(name: str) -> tuple[str, str] | None:
    """Return a member's key and lower-case extension, or None if it belongs to no sample."""
    slash = name.rfind("/")
    dot = name.find(".", slash + 1)
    if dot < 0 or (name.startswith("__") and _META_NAME.match(name)):
        return None
    if dot > slash + 1:
        return name[:dot], name[dot + 1 :].lower()
    # A dotfile in a folder: webdataset's expression makes the folder its key.
    match = _DOTFILE.match(name)
    return (match[1], match[2].lower()) if match else None


def _is_odd(key: str) -> bool:
    """Whether a name that starts with `key` and a dot may be a dotfile or a meta name."""
    return not key or key[-1] == "/" or key[:2] == "__"


def group_members(names: Iterable[str], *, image_extensions: tuple[str, ...], label_extension: str) -> Grouping:
    """Group a tar's members into samples, ordered by their first members."""
    names = names if isinstance(names, list) else list(names)
    return _group_regular(names, image_extensions, label_extension) or _group_any(
        names, image_extensions, label_extension
    )


def _group_regular(names: list[str], image_extensions: tuple[str, ...], label_extension: str) -> Grouping | None:
    """Group the members of a regular tar, or return None if the tar is not regular.

    In a regular tar all samples have the same extensions in the same order, as writers produce them. Handling all
    names with a few calls takes a quarter of the time of a loop over the names.
    """
    if not names:
        return None
    first = names[0].partition(".")[0]
    suffixes = [name[len(first) :] for name in takewhile(lambda name: name.partition(".")[0] == first, names)]
    extensions = [suffix[1:].lower() for suffix in suffixes]
    num_rows, rest = divmod(len(names), len(suffixes))
    are_plain = all(suffix and "/" not in suffix and "__" not in suffix for suffix in suffixes)
    if rest or len(set(extensions)) < len(extensions) or not are_plain:
        return None
    keys = [name.removesuffix(suffixes[0]) for name in names[:: len(suffixes)]]
    # A key contains no dot, which would end it earlier, and none of the marks of dotfiles and meta names.
    text = "\n".join(["", *keys, ""])
    if "." in text or "__" in text or "/\n" in text or "\n\n" in text or text.count("\n") != num_rows + 1:
        return None
    of_rows = (names[column :: len(suffixes)] for column in range(len(suffixes)))
    if any([key + suffix for key in keys] != own for suffix, own in zip(suffixes, of_rows, strict=True)):
        return None
    if len(set(keys)) < num_rows:
        return None
    images = [extensions.index(extension) for extension in image_extensions if extension in extensions]
    label = [extensions.index(label_extension)] if label_extension in extensions else []

    def members(columns: list[int]) -> list[int]:
        return list(range(columns[0], len(names), len(suffixes))) if columns else [NO_MEMBER] * num_rows

    return Grouping(
        keys,
        members(images),
        members(label),
        [extensions] * num_rows,
        num_many_images=num_rows if len(images) > 1 else 0,
    )


def _group_any(names: list[str], image_extensions: tuple[str, ...], label_extension: str) -> Grouping:
    groups = Grouping()
    rank_of = {extension: rank for rank, extension in enumerate(image_extensions)}
    row_of: dict[str, int] = {}
    later_rows: dict[str, list[int]] = {}
    scattered: set[int] = set()
    many_images: set[int] = set()
    image_ranks: list[int] = []
    row, row_key = -1, None
    keys, extensions, images, labels = groups.keys, groups.extensions, groups.image_members, groups.label_members
    # Extension and image rank by the text after a name's first dot; valid if the key is the text before it.
    kinds: dict[str, tuple[str, int | None]] = {}
    for member, name in enumerate(names):
        key, _, suffix = name.partition(".")
        kind = kinds.get(suffix)
        if kind is None or (key != row_key and _is_odd(key)):
            key_and_extension = split_name(name)
            if key_and_extension is None:
                continue
            kind = key_and_extension[1], rank_of.get(key_and_extension[1])
            if key_and_extension[0] == key and suffix and not suffix.endswith("__"):
                kinds[suffix] = kind
            key = key_and_extension[0]
        extension, rank = kind
        if key != row_key:
            row_key = key
            row = row_of.get(key, -1)
            if row >= 0:
                scattered.add(row)
        target = row
        if target >= 0 and extension in extensions[target]:
            chain = later_rows.setdefault(key, [])
            target = next((later for later in chain if extension not in extensions[later]), -1)
        if target < 0:
            target = len(keys)
            if row < 0:
                row = row_of[key] = target
            else:
                later_rows[key].append(target)
            keys.append(key)
            extensions.append([])
            images.append(NO_MEMBER)
            labels.append(NO_MEMBER)
            image_ranks.append(len(rank_of))
        extensions[target].append(extension)
        if rank is not None:
            if images[target] != NO_MEMBER:
                many_images.add(target)
            if rank < image_ranks[target]:
                images[target], image_ranks[target] = member, rank
        if extension == label_extension:
            labels[target] = member
    _name_duplicates(groups, row_of, later_rows)
    # A duplicate always makes the members of its key non-adjacent; its reason already reports it.
    groups.num_scattered = sum(keys[row] not in later_rows for row in scattered)
    groups.num_many_images = len(many_images)
    return groups


def _name_duplicates(groups: Grouping, row_of: dict[str, int], later_rows: dict[str, list[int]]) -> None:
    """Name the further samples of a key `key#2`, `key#3` and so on, skipping names that exist in the tar."""
    for key, rows in later_rows.items():
        number = 1
        for row in rows:
            number += 1
            while f"{key}#{number}" in row_of:
                number += 1
            groups.keys[row] = f"{key}#{number}"
            groups.reasons[row] = with_details(DUPLICATE_KEY, f"{key!r} is in the shard already")

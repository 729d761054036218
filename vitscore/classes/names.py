"""Class names: reading them, showing them, and comparing them.

Below `classes.py` and `label_maps.py`, which match a model's head to the data set. Names are compared folded: case,
accents, `_ - /` and runs of white space do not count, and each part between commas is a synonym ("tench, Tinca tinca").
Nothing here knows of models.
"""

from __future__ import annotations

import difflib
import json
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path

from vitscore.errors import ClassError, UsageError

# Keys of scikit-learn's report that a class name would overwrite.
_REPORT_KEYS = ("accuracy", "macro avg", "weighted avg", "micro avg", "samples avg")
_MAX_NAMED = 5


def fold(name: str) -> str:
    """A name as it is compared: no case, no accents, one space for `_ - /` and white space."""
    bare = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    for separator in "_-/":
        bare = bare.replace(separator, " ")
    return " ".join(bare.casefold().split())


def synonyms(name: str) -> frozenset[str]:
    """The folded name and its comma-separated parts."""
    return frozenset(filter(None, (fold(name), *map(fold, name.split(",")))))


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Class names from a text file (one a line) or a JSON file (a list, or an object from id to name).

    Raises:
        UsageError: the file cannot be read.
        ClassError: it does not hold class names.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read classes", where=str(path), got=type(error).__name__) from error
    names = _parse_json_classes(text, path) if path.suffix.lower() == ".json" else text.rstrip().splitlines()
    names = [name.strip() for name in names]
    if not names or not all(names):
        got = f"an empty name for class {names.index('')}" if names else "none"
        raise ClassError("bad class names", where=str(path), expected="one name a class", got=got)
    return tuple(names)


def _parse_json_classes(text: str, path: Path) -> list[str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ClassError("bad class names", where=str(path), expected="JSON", got=str(error)) from error
    if isinstance(content, dict) and set(content) == {str(index) for index in range(len(content))}:
        content = [content[str(index)] for index in range(len(content))]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ClassError(
            "bad class names", where=str(path), expected="a list of names, or an object from 0..K-1 to names"
        )
    return content


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Display names: `name [id]` for one that is repeated or is a key of scikit-learn's report."""
    shown = list(names)
    while True:
        counts = Counter(shown)
        unclear = [index for index, name in enumerate(shown) if counts[name] > 1 or name in _REPORT_KEYS]
        if not unclear:
            return tuple(shown)
        for index in unclear:
            shown[index] = f"{shown[index]} [{index}]"


def plain_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Display names without their ` [id]`: what a head or a caption calls the class."""
    return tuple(name.removesuffix(f" [{index}]") for index, name in enumerate(classes))


def match_names(head_names: Sequence[str], classes: Sequence[str]) -> tuple[dict[int, int], int]:
    """Head id by class id, for every class that one head class alone fits; and how many needed a synonym.

    Whole names that are equal win; what they leave is matched by synonyms that are unique on both sides. Two lists of
    one length that share a name at every position are one list, and repeated names ("crane" twice) do no harm.
    """
    whole = _unique_pairs([{fold(name)} for name in classes], [{fold(name)} for name in head_names])
    of_classes, of_heads = [synonyms(name) for name in classes], [synonyms(name) for name in head_names]
    if len(classes) == len(head_names) and all(
        ours & theirs for ours, theirs in zip(of_classes, of_heads, strict=True)
    ):
        return {index: index for index in range(len(classes))}, sum(
            whole.get(index) != index for index in range(len(classes))
        )
    taken = set(whole.values())
    left = _unique_pairs(
        [frozenset() if index in whole else names for index, names in enumerate(of_classes)],
        [frozenset() if index in taken else names for index, names in enumerate(of_heads)],
    )
    return whole | left, len(left)


def _unique_pairs(ours: Sequence[Collection[str]], theirs: Sequence[Collection[str]]) -> dict[int, int]:
    """Pairs that share a name and share one with nobody else."""
    by_name: defaultdict[str, set[int]] = defaultdict(set)
    for their_id, names in enumerate(theirs):
        for name in names:
            by_name[name].add(their_id)
    candidates = [set().union(*(by_name.get(name, set()) for name in names)) for names in ours]
    wanted = Counter(their_id for found in candidates for their_id in found)
    pairs = {our_id: min(found) for our_id, found in enumerate(candidates) if len(found) == 1}
    return {our_id: their_id for our_id, their_id in pairs.items() if wanted[their_id] == 1}


def name_with_nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """Up to five names, each with the known name that is nearest to it."""
    nearest = {fold(part): name for name in known for part in (*name.split(","), name)}
    told = []
    for name in names[:_MAX_NAMED]:
        close = [found for part in name.split(",") for found in difflib.get_close_matches(fold(part), nearest, 1, 0.5)]
        told.append(f"{name!r} (nearest: {nearest[close[0]]!r})" if close else repr(name))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(told) + more

"""Read, display and compare class names.

`matching` and `label_maps` build on this to match a model's head to the data set. Comparison folds names: it ignores
case, accents, `_ - /` and runs of white space, and treats comma-separated parts as synonyms ("tench, Tinca tinca").
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
    """Return a name in the form used for comparison: no case, no accents, one space for `_ - /` and white space."""
    bare = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    for separator in "_-/":
        bare = bare.replace(separator, " ")
    return " ".join(bare.casefold().split())


def synonyms(name: str) -> frozenset[str]:
    """Return the folded name and its folded comma-separated parts."""
    return frozenset(filter(None, (fold(name), *map(fold, name.split(",")))))


def read_classes(path: str | Path) -> tuple[str, ...]:
    """Read class names from a text file (one per line) or a JSON file (a list, or an object from id to name).

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
        raise ClassError("bad class names", where=str(path), expected="one name per class", got=got)
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
    """Return display names: `name [id]` for a name that is repeated or is a key of scikit-learn's report."""
    shown = list(names)
    while True:
        counts = Counter(shown)
        unclear = [index for index, name in enumerate(shown) if counts[name] > 1 or name in _REPORT_KEYS]
        if not unclear:
            return tuple(shown)
        for index in unclear:
            shown[index] = f"{shown[index]} [{index}]"


def plain_names(classes: Sequence[str]) -> tuple[str, ...]:
    """Return display names without their ` [id]`, as a head or a caption names the classes."""
    return tuple(name.removesuffix(f" [{index}]") for index, name in enumerate(classes))


def match_names(head_names: Sequence[str], classes: Sequence[str]) -> tuple[dict[int, int], int]:
    """Return head ids by class id for unambiguous matches, and the number of classes that matched by a synonym.

    Equal whole names match first, then synonyms that are unique on both sides. Two lists of equal length that share a
    name at every position match by position, so repeated names ("crane" twice) do no harm.
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
    """Return the pairs that share a name with each other and with no other entry."""
    by_name: defaultdict[str, set[int]] = defaultdict(set)
    for their_id, names in enumerate(theirs):
        for name in names:
            by_name[name].add(their_id)
    candidates = [set().union(*(by_name.get(name, set()) for name in names)) for names in ours]
    wanted = Counter(their_id for their_ids in candidates for their_id in their_ids)
    pairs = {our_id: min(their_ids) for our_id, their_ids in enumerate(candidates) if len(their_ids) == 1}
    return {our_id: their_id for our_id, their_id in pairs.items() if wanted[their_id] == 1}


def name_with_nearest(names: Sequence[str], known: Sequence[str]) -> str:
    """List up to five names with the nearest known name of every one."""
    known_by_fold = {fold(part): name for name in known for part in (*name.split(","), name)}
    shown = []
    for name in names[:_MAX_NAMED]:
        folds = [fold(part) for part in name.split(",")]
        close = [match for text in folds for match in difflib.get_close_matches(text, known_by_fold, 1, 0.5)]
        shown.append(f"{name!r} (nearest: {known_by_fold[close[0]]!r})" if close else repr(name))
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(shown) + more

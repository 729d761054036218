"""Determine the data set's classes and match the outputs of a model's head to them.

This happens before the first image. Class names come from `--classes`, a side file or the models themselves. Every
classifier's head is then matched to them by position, by name or by a map, or refused with the nearest names. The
result is a `HeadMap`, which `models.image_model` applies to the logits. No model and no torch here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vitscore.classes.label_maps import BY_POSITION, LabelMap, match_by_map, parse_label_maps
from vitscore.classes.names import (
    fold,
    match_names,
    name_with_nearest,
    plain_names,
    read_classes,
    unique_names,
)
from vitscore.errors import ClassError, UsageError

__all__ = [
    "BY_POSITION",
    "HeadMap",
    "LabelMap",
    "match_head",
    "parse_label_maps",
    "plain_names",
    "read_classes",
    "resolve_classes",
    "unique_names",
]


@dataclass(frozen=True)
class HeadMap:
    """Outputs of a head for every class.

    Args:
        how: "by position", "by name" or "by map".
        columns: for every class of the data set, one or more ids of the head (several are joined by logsumexp).
        summary: description of the match in a few words.
    """

    how: str
    columns: tuple[tuple[int, ...], ...]
    summary: str


def resolve_classes(
    explicit: tuple[Sequence[str], str] | None,
    side_file: tuple[Sequence[str], str] | None,
    head_names: Mapping[str, Sequence[str] | None],
) -> tuple[tuple[str, ...], str]:
    """Return the display names of the data set's classes, and their source.

    Args:
        explicit: names and source of `--classes`.
        side_file: names and source of the file beside the shards.
        head_names: names of every classifier's head; None if it has none.

    Raises:
        UsageError: there are no names, or only those of models that disagree.
    """
    if given := explicit or side_file:
        return unique_names(given[0]), given[1]
    named = {model: tuple(names) for model, names in head_names.items() if names}
    if not named:
        raise UsageError("no class names", next_step="Give a file of names, one per line, with --classes FILE.")
    first, *others = named
    for other in others:
        if [fold(name) for name in named[other]] != [fold(name) for name in named[first]]:
            raise UsageError(
                "the models' classes differ",
                where=f"{first} and {other}",
                got=_first_difference(named[first], named[other]),
                next_step="Give the data set's classes with --classes FILE.",
            )
    return unique_names(named[first]), f"id2label of {first}"


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str:
    for index, (our, their) in enumerate(zip(ours, theirs, strict=False)):
        if fold(our) != fold(their):
            return f"class {index}: {our!r} and {their!r}"
    return f"{len(ours)} and {len(theirs)} classes"


def match_head(
    head_names: Sequence[str] | None,
    classes: Sequence[str],
    *,
    label_map: LabelMap | None = None,
    num_outputs: int | None = None,
    model: str = "",
) -> HeadMap:
    """Match the head's outputs to the classes.

    Args:
        head_names: names of the head's outputs; None if it has none.
        classes: display names of the data set's classes.
        label_map: this model's `--label-map`.
        num_outputs: width of the head, required if it has no names.
        model: the model's name, for errors.

    Raises:
        ClassError: a class matches no output, or matches several by name.
    """
    width = len(head_names) if head_names is not None else num_outputs
    plain = plain_names(classes)
    if label_map == BY_POSITION:
        if width != len(classes):
            raise ClassError(
                "cannot match by position",
                where=f"model {model}",
                expected=f"a head of {len(classes)} outputs, one per class",
                got=str(width),
                next_step=f"Give a map: --label-map {model}=FILE (JSON from head class to data set class).",
            )
        return _by_position(len(classes))
    if isinstance(label_map, Mapping):
        columns, summary = match_by_map(
            head_names, classes, label_map=label_map, num_outputs=width or 0, where=f"--label-map of model {model}"
        )
        return HeadMap("by map", columns, summary)
    if head_names is None:
        raise ClassError(
            "cannot match the classes",
            where=f"model {model}",
            expected="class names in the checkpoint's id2label",
            got=f"{width} outputs without names",
            next_step=ways_out(model, is_in_order=False, is_same_size=width == len(classes)),
        )
    if [fold(name) for name in head_names] == [fold(name) for name in plain]:
        return _by_position(len(classes))
    matched, num_synonyms = match_names(head_names, plain)
    if len(matched) < len(classes):
        raise _unmatched(head_names, plain, matched, model=model)
    summary = f"by name: {len(matched)} of {len(classes)}" + (f", {num_synonyms} by synonym" if num_synonyms else "")
    return HeadMap("by name", tuple((matched[index],) for index in range(len(classes))), summary)


def _by_position(num_classes: int) -> HeadMap:
    columns = tuple((index,) for index in range(num_classes))
    return HeadMap("by position", columns, f"by position, {num_classes} of {num_classes}")


def _unmatched(
    head_names: Sequence[str], classes: Sequence[str], matched: Mapping[int, int], *, model: str
) -> ClassError:
    missing = [classes[index] for index in range(len(classes)) if index not in matched]
    is_in_order = bool(matched) and len(classes) == len(head_names) and all(our == its for our, its in matched.items())
    order = ", all of them at the same position" if is_in_order else ""
    return ClassError(
        "cannot match the classes",
        where=f"model {model}",
        expected=f"one head class for each of {len(classes)} classes",
        got=f"{len(matched)} matched{order}; unmatched: {name_with_nearest(missing, head_names)}",
        next_step=ways_out(model, is_in_order=is_in_order, is_same_size=len(classes) == len(head_names)),
    )


def ways_out(model: str, *, is_in_order: bool, is_same_size: bool) -> str:
    """Return advice on a refused match: the likelier option first, `by-position` only if the sizes agree."""
    position = f"--label-map {model}=by-position" + (" (the order is the same)" if is_in_order else "")
    mapping = f"--label-map {model}=FILE (JSON from head class to data set class)"
    if not is_same_size:
        return f"Use {mapping}."
    first, second = (position, mapping) if is_in_order else (mapping, position)
    return f"Use {first} or {second}."

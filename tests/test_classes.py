"""Heads are matched to the data set's classes by position, name or map, or refused with the options that help."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitscore.classes.matching import (
    BY_POSITION,
    match_head,
    parse_label_maps,
    plain_names,
    read_classes,
    resolve_classes,
    unique_names,
)
from vitscore.classes.names import fold
from vitscore.errors import ClassError, UsageError

IMAGENETTE = (
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
)
IMAGENETTE_IDS = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


@dataclass(frozen=True)
class Model:
    kind: str


@pytest.fixture(scope="module")
def imagenet_head() -> tuple[str, ...]:
    """Return class names in the form of transformers' ImageNet checkpoints ("tench, Tinca tinca"), from timm's list."""
    spec = find_spec("timm")
    assert spec is not None and spec.origin is not None
    info = Path(spec.origin).parent / "data/_info"
    names = dict(line.split("\t") for line in (info / "imagenet_synset_to_lemma.txt").read_text().splitlines())
    return tuple(names[synset] for synset in (info / "imagenet_synsets.txt").read_text().split())


@pytest.fixture(scope="module")
def clip_names() -> tuple[str, ...]:
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

    return tuple(IMAGENET_CLASSNAMES)


def test_equal_lists_match_by_position() -> None:
    head_map = match_head(("Cat", "wild_dog", "crane", "crane"), unique_names(("cat", "wild dog", "crane", "crane")))
    assert (head_map.how, head_map.columns) == ("by position", ((0,), (1,), (2,), (3,)))
    assert head_map.summary == "by position, 4 of 4"


def test_names_are_folded_and_split_at_commas() -> None:
    head = ("tench, Tinca tinca", "Café-bar", "pick/up  truck")
    head_map = match_head(head, ("PICK-UP TRUCK", "cafe bar", "Tinca_tinca"))
    assert head_map.columns == ((2,), (1,), (0,))
    assert head_map.summary == "by name: 3 of 3, 1 by synonym"


def test_a_larger_head_is_narrowed(imagenet_head: tuple[str, ...]) -> None:
    head_map = match_head(imagenet_head, IMAGENETTE)
    assert head_map.columns == tuple((head_id,) for head_id in IMAGENETTE_IDS)
    assert head_map.how == "by name"


def test_an_imagenet_head_and_clips_class_names_are_refused_with_the_hint_by_position(
    imagenet_head: tuple[str, ...], clip_names: tuple[str, ...]
) -> None:
    with pytest.raises(ClassError) as caught:
        match_head(imagenet_head, unique_names(clip_names), model="vit")
    message = str(caught.value)
    assert "all of them at the same position" in message
    assert "--label-map vit=by-position" in message
    assert "nearest:" in message
    by_position = match_head(imagenet_head, unique_names(clip_names), label_map=BY_POSITION)
    assert by_position.columns[999] == (999,)


def test_the_same_imagenet_names_in_two_spellings_match(imagenet_head: tuple[str, ...]) -> None:
    first_synonyms = tuple(name.split(",")[0] for name in imagenet_head)
    head_map = match_head(imagenet_head, unique_names(first_synonyms))
    assert head_map.columns == tuple((index,) for index in range(1000))


def test_a_whole_name_wins_over_a_synonym() -> None:
    head_map = match_head(("maillot", "maillot, tank suit"), ("tank suit", "maillot"))
    assert head_map.columns == ((1,), (0,))


@pytest.mark.parametrize(
    ("head", "classes"),
    [
        (("crane, bird", "crane, machine", "owl"), ("crane", "owl")),
        (("bird, crane", "owl"), ("crane", "bird")),
        (("crane", "owl", "crane"), ("owl", "crane")),
    ],
    ids=["two head classes fit one", "one head class fits two", "repeated in the head"],
)
def test_ambiguous_names_are_refused(head: tuple[str, ...], classes: tuple[str, ...]) -> None:
    with pytest.raises(ClassError, match="crane"):
        match_head(head, classes, model="m")


def test_a_refusal_counts_names_and_shows_both_ways_out() -> None:
    with pytest.raises(ClassError) as caught:
        match_head(("tabby cat", "dog", *"abcdef"), ("tabby kat", "dog", *"uvwxyz"), model="m")
    message = str(caught.value)
    assert "1 matched, all of them at the same position" in message
    assert "'tabby kat' (nearest: 'tabby cat')" in message
    assert "and 2 more" in message
    assert "--label-map m=by-position" in message and "--label-map m=FILE" in message
    assert caught.value.exit_code == 3


def test_a_head_without_names_needs_a_map() -> None:
    with pytest.raises(ClassError, match="2 outputs without names"):
        match_head(None, ("cat", "dog"), num_outputs=2, model="m")
    assert match_head(None, ("cat", "dog"), num_outputs=2, label_map=BY_POSITION).columns == ((0,), (1,))
    assert match_head(None, ("cat", "dog"), num_outputs=2, label_map={"1": "cat", "0": 1}).columns == ((1,), (0,))


def test_by_position_needs_as_many_outputs_as_classes() -> None:
    with pytest.raises(ClassError, match=r"expected a head of 2 outputs, one per class, got 1001"):
        match_head(None, ("cat", "dog"), num_outputs=1001, label_map=BY_POSITION)


def test_a_map_joins_several_head_classes_and_leaves_the_rest_to_names() -> None:
    head = ("beagle", "husky", "tabby, tabby cat", "owl")
    head_map = match_head(head, ("dog", "owl"), label_map={"beagle": "dog", "1": 0})
    assert head_map.columns == ((0, 1), (3,))
    assert head_map.summary == "by map: 2 head classes to 1 of 2, 1 by name"


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        ({"beegle": "dog", "husky": "owl"}, "unknown head class.*'beegle'.*nearest: 'beagle'"),
        ({"beagle": "dug", "husky": "owl"}, "unknown data set class.*'dug'.*nearest: 'dog'"),
        ({"beagle": "dog", "husky": "dog"}, "none for 'owl'"),
        ({"beagle": "dog", "0": "owl"}, "two targets"),
        ({"beagle": 7}, r"an id in 0\.\.1"),
    ],
)
def test_bad_maps_are_refused(label_map: dict[str, str | int], message: str) -> None:
    with pytest.raises(ClassError, match=message):
        match_head(("beagle", "husky"), ("dog", "owl"), label_map=label_map, model="m")


def test_a_class_named_by_digits_is_meant_by_its_name() -> None:
    head_map = match_head(("a", "b"), ("1", "0"), label_map={"a": "0", "b": "1"})
    assert head_map.columns == ((1,), (0,))


def test_label_maps_go_to_the_models_they_name(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"beagle": "dog", "3": 1}))
    models = {"vit": Model("classifier"), "swin": Model("classifier"), "clip": Model("zero-shot")}
    maps = parse_label_maps([f"swin={tmp_path / 'map.json'}", BY_POSITION], models)
    assert maps == {"vit": "by-position", "swin": {"beagle": "dog", "3": 1}}


@pytest.mark.parametrize(
    "texts",
    [["clip=by-position"], ["other=by-position"], ["vit=by-position"] * 2, ["by-position"] * 2, ["vit=nowhere.json"]],
)
def test_label_maps_for_no_classifier_are_wrong_usage(texts: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_label_maps(texts, {"vit": Model("classifier"), "clip": Model("zero-shot")})


def test_a_map_without_a_classifier_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="Zero-shot"):
        parse_label_maps(["by-position"], {"clip": Model("zero-shot")})


@pytest.mark.parametrize("content", ["[1, 2]", '{"a": 1.5}', '{"a": true}', '{"a": 1, "a": 2}', "{"])
def test_a_broken_map_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(ClassError):
        parse_label_maps([str(tmp_path / "map.json")], {"vit": Model("classifier")})


def test_classes_come_from_the_option_then_the_side_file_then_the_models() -> None:
    heads = {"vit": ("Cat", "dog"), "swin": ("cat", "dog"), "plain": None}
    assert resolve_classes((("a", "b"), "f.txt"), (("c",), "side"), heads) == (("a", "b"), "f.txt")
    assert resolve_classes(None, (("c",), "side"), heads) == (("c",), "side")
    assert resolve_classes(None, None, heads) == (("Cat", "dog"), "id2label of vit")


@pytest.mark.parametrize(
    "heads", [{}, {"vit": None}, {"a": ("cat",), "b": ("dog",)}, {"a": ("cat",), "b": ("cat", "dog")}]
)
def test_no_classes_anywhere_is_wrong_usage(heads: dict[str, tuple[str, ...] | None]) -> None:
    with pytest.raises(UsageError, match="--classes FILE"):
        resolve_classes(None, None, heads)


def test_unclear_names_show_their_id() -> None:
    shown = unique_names(("crane", "owl", "crane", "accuracy", "crane [0]"))
    assert shown == ("crane [0] [0]", "owl", "crane [2]", "accuracy [3]", "crane [0] [4]")


@given(st.lists(st.sampled_from(["a", "b", "a [0]", "a [1]", "b [2]", "accuracy", "micro avg"]), min_size=1))
def test_display_names_are_unique(names: list[str]) -> None:
    shown = unique_names(names)
    assert len(set(shown)) == len(names)
    assert not {"accuracy", "micro avg"} & set(shown)


def test_a_caption_gets_the_plain_name() -> None:
    assert plain_names(unique_names(("crane", "owl", "crane"))) == ("crane", "owl", "crane")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "\ufeffcat\r\nwild dog \n\n"),
        ("classes.json", '["cat", "wild dog"]'),
        ("classes.json", '{"1": "wild dog", "0": "cat"}'),
    ],
)
def test_class_files_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_classes(tmp_path / name) == ("cat", "wild dog")


@pytest.mark.parametrize(
    ("name", "text"),
    [("c.txt", ""), ("c.txt", "cat\n\ndog\n"), ("c.json", '{"1": "a", "2": "b"}'), ("c.json", "[1]"), ("c.json", "{")],
)
def test_class_files_with_holes_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ClassError):
        read_classes(tmp_path / name)


def test_a_missing_class_file_is_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read_classes(tmp_path / "none.txt")


@given(st.text())
def test_folding_twice_changes_nothing(name: str) -> None:
    assert fold(fold(name)) == fold(name)

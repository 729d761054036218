"""Options are checked in one place, for the command line, TOML and Python."""

from pathlib import Path

import pytest

from vitscore.errors import UsageError
from vitscore.plan.options import BadLimit, make_options, read_config

GIVEN = {"shards": ["a.tar"], "model": ["m"], "output": "out"}


def test_lists_and_paths_are_coerced() -> None:
    options = make_options({"shards": "a.tar", "model": Path("m"), "output": "out", "batch_size": 8})
    assert options.shards == ("a.tar",)
    assert options.model == ("m",)
    assert options.output == Path("out")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("batch_size", 0, "--batch-size"),
        ("cache_size", 0, "--cache-size"),
        ("batch_size", "8", "wrong type"),
        ("device", "tpu", "--device"),
        ("precision", "int8", "expected auto or fp32"),
        ("label_key", "json:", "--label-key"),
        ("save", ["weights"], "--save"),
        ("max_bad", "many", "--max-bad"),
        ("max_bad", "101%", "--max-bad"),
        ("colour", "red", "unknown option"),
        ("overwrite", "yes", "wrong type"),
        ("shards", [], "no shards"),
    ],
)
def test_a_wrong_value_is_named(key: str, value: object, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        make_options({**GIVEN, key: value})


def test_config_keys_may_have_dashes(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('batch-size = 4\nlabel_key = "json:y"\nmodel = ["a", "b"]\n')
    assert read_config(path) == {"batch_size": 4, "label_key": "json:y", "model": ["a", "b"]}


@pytest.mark.parametrize("text", ["batch-size = ", None])
def test_a_broken_or_missing_config_is_wrong_usage(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "c.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=r"c\.toml"):
        read_config(path)


def test_a_count_is_judged_at_once_and_a_share_from_a_thousand_on() -> None:
    count, share = BadLimit.parse("3"), BadLimit.parse("10%")
    assert not count.is_exceeded(bad=3, seen=3, at_end=False)
    assert count.is_exceeded(bad=4, seen=4, at_end=False)
    assert not share.is_exceeded(bad=999, seen=999, at_end=False)
    assert share.is_exceeded(bad=101, seen=1000, at_end=False)
    assert not share.is_exceeded(bad=100, seen=1000, at_end=True)
    assert share.is_exceeded(bad=1, seen=9, at_end=True)

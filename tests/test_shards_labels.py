"""Label rules: ids, names, JSON fields, overrides, and invalid labels."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vitscore.errors import LabelError, UsageError
from vitscore.shards.labels import LabelRule, load_labels

CLASSES = ["cat", "dog", "crane", "crane"]


@pytest.mark.parametrize(
    ("raw", "label", "reason"),
    [
        (None, -1, None),
        (b"1", 1, None),
        (b" 01\n", 1, None),
        (b"dog\r\n", 1, None),
        (b"\xef\xbb\xbfdog", 1, None),
        (b"3", 3, None),
        (b"4", -1, "label out of range: expected 0..3, got 4"),
        (b"-1", -1, "label out of range: expected 0..3, got -1"),
        (b"9" * 5000, -1, "label out of range: " + "9" * 200),
        (b"Dog", -1, "label is not a class: 'Dog'"),
        (b"1.5", -1, "label is not a class: '1.5'"),
        (b"", -1, "label unreadable: empty"),
        (b"\xff\xfe", -1, "label unreadable: not UTF-8 text"),
        (b"crane", -1, "label is ambiguous: 'crane' names classes 2, 3; give the id"),
    ],
)
def test_text_is_an_id_or_a_class_name(raw: bytes | None, label: int, reason: str | None) -> None:
    rule = LabelRule(CLASSES)
    assert rule.label("k", raw) == (label, reason)
    assert rule.label("k", raw) == (label, reason)


@pytest.mark.parametrize(
    ("raw", "label", "reason"),
    [
        (b'{"label": 1}', 1, None),
        (b'{"label": "1"}', 1, None),
        (b'{"label": 1.0}', 1, None),
        (b'{"label": "cat"}', 0, None),
        (b'{"label": null}', -1, None),
        (b'{"other": 1}', -1, None),
        (b'{"label": true}', -1, "label unreadable: True is neither a number nor a class name"),
        (b'{"label": [1]}', -1, "label unreadable: [1] is neither a number nor a class name"),
        (b"[1]", -1, "label unreadable: the JSON is no object"),
    ],
)
def test_json_fields_follow_the_same_rule(raw: bytes, label: int, reason: str | None) -> None:
    assert LabelRule(CLASSES, label_key="json:label").label("k", raw) == (label, reason)


def test_json_fields_may_be_nested_or_broken() -> None:
    rule = LabelRule(CLASSES, label_key="json:a.b")
    assert rule.label("k", b'{"a": {"b": 1}}') == (1, None)
    assert rule.label("k", b'{"a.b": 0, "a": {"b": 1}}') == (0, None)
    assert (rule.label("k", b"{")[1] or "").startswith("label unreadable: not JSON")


@pytest.mark.parametrize("label_key", ["json:", ":x", "", "cls:x"])
def test_unknown_label_keys_are_refused(label_key: str) -> None:
    with pytest.raises(UsageError, match="unknown label key"):
        LabelRule(CLASSES, label_key=label_key)


def test_overrides_win_over_the_tar() -> None:
    rule = LabelRule(CLASSES, overrides={"a": "dog", "b": 9})
    assert rule.label("a", b"0") == (1, None)
    assert rule.label("a", None) == (1, None)
    assert rule.label("b", b"0")[0] == -1
    assert rule.label("c", b"0") == (0, None)


def test_without_classes_any_label_is_taken() -> None:
    rule = LabelRule(None)
    assert rule.label("k", b"123456") == (123456, None)
    first, second = rule.label("k", b"cat")[0], rule.label("k", b"dog")[0]
    assert first != second
    assert rule.label("k", b"cat") == (first, None)


def test_labels_files_are_csv_or_parquet(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text('key,label,more\na,1,x\n"b, c",dog,y\nd,,z\n')
    assert load_labels(tmp_path / "l.csv") == {"a": "1", "b, c": "dog"}
    pq.write_table(pa.table({"label": [1.0, None, 2.0], "key": ["a", "b", "c"]}), tmp_path / "l.parquet")
    rule = LabelRule(CLASSES, overrides=load_labels(tmp_path / "l.parquet"))
    assert [rule.label(key, b"0")[0] for key in "abc"] == [1, 0, 2]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("l.csv", b"key,class\na,1\n", "columns missing"),
        ("l.csv", b"", "columns missing"),
        ("l.csv", b"key,label\na,1\na,2\n", "two labels for one key"),
        ("l.csv", b"key,label\n\xff,1\n", "labels cannot be read"),
        ("l.parquet", b"PAR1", "labels cannot be read"),
    ],
)
def test_bad_labels_files_raise_label_errors(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabelError, match=error):
        load_labels(tmp_path / name)


def test_a_missing_labels_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such labels file"):
        load_labels(tmp_path / "nowhere.csv")

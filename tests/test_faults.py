"""One corpus with every fault: all are in the ledger with their reasons, and good samples are not affected."""

import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from support import pictures
from support.tars import DIGIT_NAMES
from vitscore.decode.pixels import is_dali_available
from vitscore.shards.reasons import reason_kind

Call = Callable[..., Any]
DECODERS = ["torchvision"] + (["dali"] if is_dali_available() else [])
OPTIONS = ("-m", "demo-vit", "-m", "demo-clip", "--precision", "fp32", "-b", "16")
CLS = b"7"


def bad_samples() -> dict[str, tuple[dict[str, bytes], str]]:
    """Return, by key, the members of a bad sample and the kind of reason expected for it."""
    png = pictures.encode(pictures.photo(60, 40), "PNG")
    samples = {
        "label-missing-is-none": ({"png": png}, ""),
        "label-out-of-range": ({"png": png, "cls": b"10"}, "label out of range"),
        "label-negative": ({"png": png, "cls": b"-3"}, "label out of range"),
        "label-no-number": ({"png": png, "cls": b"a cat"}, "label is not a class"),
        "label-no-text": ({"png": png, "cls": b"\xff\xfe\x00"}, "label unreadable"),
        "no-image": ({"cls": CLS, "txt": b"words"}, "no image"),
        "wrong-extension-is-read": ({"jpg": png, "cls": CLS}, ""),
        "text-named-png": ({"png": b"<html>gone</html>", "cls": CLS}, "undecodable image"),
    }
    for name, (content, reason) in pictures.visibly_bad().items():
        samples[f"image-{name.replace(' ', '-').replace('.', '')}"] = (
            {"png": content, "cls": CLS},
            reason_kind(reason),
        )
    for name, content in pictures.hidden_bad().items():
        samples[f"hidden-{name.replace(' ', '-')}"] = ({"jpg": content, "cls": CLS}, "undecodable image")
    return samples


def shard_bytes(samples: list[tuple[str, dict[str, bytes]]]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_corpus(folder: Path, digits: Any, *, with_faults: bool) -> list[str]:
    """Write four shards of digits with all bad samples among them, and bad shards; return the paths."""
    folder.mkdir()
    good = [(key, dict(members)) for key, members in digits[:200]]
    bad = [(key, members) for key, (members, _) in bad_samples().items()] if with_faults else []
    shards = [good[start : start + 50] for start in range(0, 200, 50)]
    for number, sample in enumerate(bad):
        shards[number % 4].insert((7 * number) % 50, sample)
    if with_faults:
        shards[1].insert(20, (shards[1][3][0], {"png": b"second", "cls": CLS}))
    for number, samples in enumerate(shards):
        (folder / f"s-{number}.tar").write_bytes(shard_bytes(samples))
    # The last sample of the cut shard is lost in its image; without faults the shard holds the others alone.
    others = [(key, dict(members)) for key, members in digits[200:240]]
    whole = shard_bytes(others)
    (folder / "s-4.tar").write_bytes(
        whole[: whole.rindex(b"\x89PNG") + 30] if with_faults else shard_bytes(others[:-1])
    )
    paths = [folder / f"s-{number}.tar" for number in range(5)]
    if with_faults:
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("a.png", b"x")
        for name, content in {"empty": b"", "zip": archive.getvalue(), "text": b"no tar, but words\n" * 99}.items():
            (folder / f"s-5-{name}.tar").write_bytes(content)
            paths.append(folder / f"s-5-{name}.tar")
        paths.append(folder / "s-6-missing.tar")
    (folder / "list.txt").write_text("".join(f"{path.name}\n" for path in paths))
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in DIGIT_NAMES))
    return [str(path) for path in paths]


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "parts").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_fault_has_its_reason_and_whole_samples_are_as_without_it(
    tmp_path: Path, vitscore: Call, digits: Any, decoder: str
) -> None:
    clean, faulty = (make_corpus(tmp_path / name, digits, with_faults=name == "faulty") for name in ("clean", "faulty"))
    words = (*OPTIONS, "--decoder", decoder, "--max-bad", "100%", "-o")
    assert vitscore("run", *clean, *words, tmp_path / "a").code == 0
    done = vitscore("run", *faulty, *words, tmp_path / "b", "--on-bad-shard", "skip")
    assert done.code == 0, done.err
    want = {(Path(row["shard"]).name, row["key"]): row for row in rows(tmp_path / "a")}
    seen: dict[str, dict[str, Any]] = {}
    for row in rows(tmp_path / "b"):
        place = Path(row["shard"]).name, row["key"]
        if place in want:
            row["shard"] = want[place]["shard"]
            assert row == want.pop(place)
        else:
            seen[row["key"]] = row
    assert not want, "whole samples are missing"
    reasons = {key: reason for key, (_, reason) in bad_samples().items()}
    duplicate, cut = seen.keys() - reasons.keys()
    duplicate, cut = (duplicate, cut) if cut == digits[239][0] else (cut, duplicate)
    reasons |= {duplicate: "duplicate key", cut: "truncated"}
    assert {key: reason_kind(row["reason"] or "") for key, row in seen.items()} == reasons
    ledger = json.loads((tmp_path / "b" / "metrics.json").read_bytes())["ledger"]
    counted = Counter(reason for reason in reasons.values() if reason)
    assert ledger["reasons"] == dict(sorted(counted.items()))
    assert ledger["bad"] == sum(counted.values())
    assert ledger["expected"] == ledger["scored"] + ledger["bad"] == 239 + len(reasons)
    bad_shards = {Path(name).name: reason_kind(reason) for name, reason in ledger["shards"]["bad"].items()}
    assert bad_shards == {
        "s-4.tar": "truncated",
        "s-5-empty.tar": "empty file",
        "s-5-zip.tar": "not a tar",
        "s-5-text.tar": "not a tar",
        "s-6-missing.tar": "missing",
    }
    assert vitscore("metrics", tmp_path / "b", "--check").code == 0


def test_what_faults_cost_is_the_users_choice(tmp_path: Path, vitscore: Call, digits: Any) -> None:
    faulty = make_corpus(tmp_path / "faulty", digits, with_faults=True)
    for number, (flags, code, message) in enumerate(
        [
            (("--on-bad-shard", "skip", "--max-bad", "100%"), 0, ""),
            (("--on-bad-shard", "skip", "--max-bad", "100%", "--on-bad-sample", "wrong"), 0, ""),
            (("--max-bad", "100%"), 3, "bad shard: "),
            (("--on-bad-shard", "skip"), 5, "too many bad samples: "),
            (("--on-bad-shard", "skip", "--max-bad", "100%", "--on-bad-sample", "fail"), 3, "bad sample: "),
        ]
    ):
        done = vitscore("run", *faulty, *OPTIONS, *flags, "-o", tmp_path / f"out-{number}")
        assert done.code == code, (flags, done.err)
        assert done.err.startswith(message) and done.err.count("\n") == bool(message), (flags, done.err)
    outs = (tmp_path / f"out-{number}" / "metrics.json" for number in (0, 1))
    skip, wrong = (json.loads(out.read_bytes())["models"]["demo-vit"] for out in outs)
    assert wrong["samples"] > skip["samples"]
    assert wrong["accuracy"] * wrong["samples"] == pytest.approx(skip["accuracy"] * skip["samples"])

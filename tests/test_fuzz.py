"""Thousands of damaged images and tars: no crash, no hang, every sample in the ledger, and none changed by another."""

import json
import os
import random
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import pictures
from support.mutate import mutate
from support.tars import DIGIT_NAMES, write_tar
from vitscore.decode.make import make_decoder
from vitscore.decode.pixels import is_dali_available
from vitscore.preprocess import spec_from_processor
from vitscore.shards.reasons import SAMPLE_REASONS, SHARD_REASONS, reason_kind

HERE = Path(__file__).parent
ROOT = HERE.parent
DECODERS = ["torchvision"] + (["dali"] if is_dali_available() else [])
LIMITS = ("--max-bad", "100%", "--on-bad-shard", "skip", "--precision", "fp32", "-b", "32")
LONGEST_S = 400

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
    pytest.mark.filterwarnings("ignore:Palette images with Transparency"),
]


def bases() -> list[bytes]:
    return [*pictures.ordinary().values(), *pictures.odd().values()]


@pytest.fixture(scope="module", params=DECODERS)
def decode(request: pytest.FixtureRequest) -> Any:
    from transformers import CLIPImageProcessor

    geometry = spec_from_processor(CLIPImageProcessor(do_rescale=False, do_normalize=False)).geometry
    made = make_decoder(request.param, (geometry,), batch_size=8, num_threads=1)

    def call(contents: list[bytes]) -> Any:
        made.submit([pictures.as_array(content) for content in contents])
        return made.collect()

    yield call
    made.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), num_bad=st.integers(1, 4))
def test_damaged_images_are_decoded_or_named_and_their_neighbours_are_as_without_them(
    decode: Callable[..., Any], seed: int, num_bad: int
) -> None:
    chance = random.Random(seed)
    good = chance.sample(bases(), 3)
    bad = [mutate(chance.choice(bases()), chance)[0] for _ in range(num_bad)]
    order = list(range(3 + num_bad))
    chance.shuffle(order)
    mixed = [(good + bad)[index] for index in order]
    alone, together = decode(good), decode(mixed)
    assert not alone.faults
    for index, row in enumerate(order.index(number) for number in range(3)):
        assert row not in together.faults
        assert torch.equal(alone.pixels[0][index], together.pixels[0][row])
    for row, reason in together.faults.items():
        assert order[row] >= 3
        assert reason_kind(reason) in SAMPLE_REASONS
        assert not together.pixels[0][row].any()


def write_damaged_tars(folder: Path, digits: Any, *, num_tars: int, seed: int) -> dict[str, set[str]]:
    """Tars of eight digits, damaged; returns the keys of each whose bytes, and all before them, are as they were."""
    chance = random.Random(seed)
    untouched: dict[str, set[str]] = {}
    for number in range(num_tars):
        start = chance.randrange(len(digits) - 8)
        path = write_tar(folder / f"s-{number:05d}.tar", digits[start : start + 8])
        with tarfile.open(path) as tar:
            ends = [(member.name.split(".")[0], member.offset_data + member.size) for member in tar]
        content, first = mutate(path.read_bytes(), chance)
        path.write_bytes(content)
        touched = {key for key, end in ends if end > first}
        untouched[path.name] = {key for key, _ in ends} - touched
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in DIGIT_NAMES))
    return untouched


def write_damaged_images(folder: Path, *, num_images: int, seed: int) -> None:
    """Shards of 250 samples; every tenth image is whole."""
    chance = random.Random(seed)
    whole = list(pictures.ordinary().values())
    samples = []
    for number in range(num_images):
        content = chance.choice(whole) if number % 10 == 0 else mutate(chance.choice(bases()), chance)[0]
        samples.append((f"k{number:06d}", {"jpg": content, "cls": b"%d" % (number % 10)}))
    for start in range(0, num_images, 250):
        write_tar(folder / f"s-{start:06d}.tar", samples[start : start + 250])
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in DIGIT_NAMES))


def score(shards: Path, *, decoder: str) -> Path:
    """Run in a process of its own; its folder."""
    out = shards.parent / f"out-{shards.name}-{decoder}"
    command = [sys.executable, "-m", "vitscore", "run", str(shards), "-m", "demo-vit", "-o", str(out), *LIMITS]
    done = subprocess.run(
        [*command, "--decoder", decoder],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=LONGEST_S,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    assert "Traceback" not in done.stderr
    check = subprocess.run(
        [sys.executable, "-m", "vitscore", "metrics", str(out), "--check", "--shards", str(shards)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert check.returncode == 0, check.stderr
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    columns = ["shard", "key", "status", "reason", "demo-vit.pred"]
    found = [
        row for path in (out / "parts").glob("*.parquet") for row in pq.read_table(path, columns=columns).to_pylist()
    ]
    for row in found:
        assert (row["status"] == "bad") == (row["reason"] is not None) == (row["demo-vit.pred"] is None)
        assert row["reason"] is None or reason_kind(row["reason"]) in SAMPLE_REASONS
    return found


def check_images(tmp_path: Path, *, num_images: int, seed: int, decoder: str) -> None:
    shards = tmp_path / f"images-{seed}"
    write_damaged_images(shards, num_images=num_images, seed=seed)
    out = score(shards, decoder=decoder)
    found = rows(out)
    assert sorted(row["key"] for row in found) == [f"k{number:06d}" for number in range(num_images)]
    status = {row["key"]: row["status"] for row in found}
    assert {status[f"k{number:06d}"] for number in range(0, num_images, 10)} == {"ok"}
    ledger = json.loads((out / "metrics.json").read_bytes())["ledger"]
    assert ledger["expected"] == ledger["scored"] + ledger["bad"] == num_images
    assert num_images * 0.2 < ledger["bad"] < num_images * 0.9, "the damage is not what it should be"


def check_tars(tmp_path: Path, digits: Any, *, num_tars: int, seed: int, decoder: str) -> None:
    shards = tmp_path / f"tars-{seed}"
    untouched = write_damaged_tars(shards, digits, num_tars=num_tars, seed=seed)
    out = score(shards, decoder=decoder)
    found: dict[str, dict[str, str]] = {name: {} for name in untouched}
    for row in rows(out):
        found[Path(row["shard"]).name][row["key"]] = row["status"]
    for name, keys in untouched.items():
        assert {key for key in keys if found[name].get(key) != "ok"} == set(), name
    ledger = json.loads((out / "metrics.json").read_bytes())["ledger"]
    assert ledger["expected"] == ledger["scored"] + ledger["bad"] == sum(len(keys) for keys in found.values())
    assert {reason_kind(reason) for reason in ledger["shards"]["bad"].values()} <= SHARD_REASONS
    assert len(ledger["shards"]["bad"]) > num_tars * 0.2, "the damage is not what it should be"


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_run_over_damaged_images_has_them_all_in_its_ledger(tmp_path: Path, decoder: str) -> None:
    check_images(tmp_path, num_images=500, seed=0, decoder=decoder)


def test_a_run_over_damaged_tars_scores_what_the_damage_did_not_reach(tmp_path: Path, digits: Any) -> None:
    check_tars(tmp_path, digits, num_tars=100, seed=0, decoder=DECODERS[-1])


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_damaged_images(tmp_path: Path, seed: int) -> None:
    check_images(tmp_path, num_images=1000, seed=seed, decoder=DECODERS[seed % len(DECODERS)])


@pytest.mark.fuzz
@pytest.mark.parametrize("seed", range(1, 5))
def test_two_thousand_damaged_tars(tmp_path: Path, digits: Any, seed: int) -> None:
    check_tars(tmp_path, digits, num_tars=500, seed=seed, decoder=DECODERS[seed % len(DECODERS)])

"""The hand-written CPU encoder behind its door: it can be turned off, and deleted, and nothing else imports it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from support import smallmodels as small
from support.imports import modules, own_imports
from vitscore import load_run
from vitscore.bench.harness.checkpoints import make_checkpoint
from vitscore.bench.stages import forward
from vitscore.models import cpu_bf16
from vitscore.models.checkpoint import find
from vitscore.models.cpu_bf16 import attention
from vitscore.models.cpu_bf16.trunk import Trunk
from vitscore.models.heads import ClassifierNet, EncoderClassifierNet
from vitscore.models.loading import load_weights

ROOT = Path(__file__).parent.parent
FOLDERS = ("vitscore/models/cpu_bf16", "kernels/cpu_bf16")
DOORS = ("vitscore.models.cpu_bf16", "vitscore.kernels.cpu_bf16")
NAMES = ("cat", "dog")

needs_bf16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies bfloat16 matrices only with AVX-512"
)


def score_demo(checkout: Path, out: Path, **env: str) -> list[list[int]]:
    """Score 60 digits with a checkout's code, in bf16, and return both models' predictions in the order of the keys.

    -S leaves the environment's .pth files out: one of them finds the installed vitscore, whose modules would take the
    place of deleted ones.
    """
    paths = (checkout / "build/types", sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    command = ("run", "demo", "-m", "demo-vit", "-m", "demo-clip", "--limit", "60", "--precision", "bf16", "-o", out)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vitscore", *command],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    rows = load_run(out).predictions().sort_by("key")
    return [rows[f"{name}.pred"].to_pylist() for name in ("demo-vit", "demo-clip")]


def copy_checkout(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("vitscore", "kernels", "shards", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    shutil.copy(ROOT / "Makefile", folder)
    subprocess.run(["make", "-s", "links"], cwd=folder, check=True)
    return folder


@needs_bf16
def test_without_both_folders_the_demo_runs_and_answers_as_with_the_switch_off(tmp_path: Path) -> None:
    checkout = copy_checkout(tmp_path / "checkout")
    switched_off = score_demo(checkout, tmp_path / "off", VITSCORE_CPU_BF16="0")
    for name in FOLDERS:
        shutil.rmtree(checkout / name)
    assert score_demo(checkout, tmp_path / "deleted") == switched_off
    assert all(len(set(answers)) == 10 for answers in switched_off)


@needs_bf16
@pytest.mark.parametrize("switch", ["0", "1", None])
def test_the_switch_decides_about_the_encoder_and_the_attention(
    switch: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    if switch is None:
        monkeypatch.delenv(cpu_bf16.SWITCH, raising=False)
    else:
        monkeypatch.setenv(cpu_bf16.SWITCH, switch)
    checkpoint = find(str(small.save_vit(tmp_path, NAMES)))
    for is_compiled in (False, True):
        model = load_weights(checkpoint)
        encoder = cpu_bf16.take_over(
            model,
            factor_C=torch.ones(3),
            offset_C=torch.zeros(3),
            image_size=(small.EDGE, small.EDGE),
            is_compiled=is_compiled,
        )
        is_on = switch != "0"
        assert isinstance(encoder, Trunk) is (is_on and not is_compiled)
        assert (model.config._attn_implementation == attention.NAME) is (is_on and is_compiled)


@needs_bf16
def test_the_forward_bench_measures_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_faster_here", lambda: True)
    monkeypatch.delenv(cpu_bf16.SWITCH, raising=False)
    monkeypatch.setattr(forward, "set_threads", lambda *, is_compiled: None)
    make_checkpoint(tmp_path / "vit", kind="vit-tiny")
    ways = {case.name: case for case in forward.CPU if (case.precision, case.batch_size) == ("bf16", 16)}
    for how, net in (("eager", EncoderClassifierNet), ("plain", ClassifierNet)):
        model, _ = forward.load(tmp_path / "vit", ways[f"vit-tiny bf16 {how} batch 16"], is_compiled=False)
        assert isinstance(model.net, net)


def test_only_the_doors_are_imported_from_outside_and_from_one_place() -> None:
    edges = own_imports(modules(ROOT))
    outside = {name: others for name, others in edges.items() if not name.startswith(DOORS)}
    used = {(name, other) for name, others in outside.items() for other in others if other.startswith(DOORS)}
    assert used == {("vitscore.models.image_model", DOORS[0])}
    models_side = [others for name, others in edges.items() if name.startswith(DOORS[0])]
    assert {other for others in models_side for other in others if other.startswith(DOORS[1])} == {DOORS[1]}

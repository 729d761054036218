"""Messages of a run about batches that were decoded again, and about a decoder that fails in the middle of a run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support import pictures
from vitscore.decode.pixels import is_dali_available

Call = Callable[..., Any]

pytestmark = pytest.mark.skipif(not is_dali_available(), reason="DALI is not installed here")
SENTENCE = "2 batches were decoded again because of 3 images that DALI could not decode"


def with_bad(samples: list[Any], *rows: int) -> list[Any]:
    """Return the samples, with some images whose damage shows only in decoding."""
    bad = pictures.hidden_bad()["png whose stream is noise"]
    return [(key, {**members, "png": bad} if row in rows else members) for row, (key, members) in enumerate(samples)]


def last_session(folder: Path) -> dict[str, Any]:
    session: dict[str, Any] = json.loads((folder / "run.json").read_bytes())["sessions"][-1]
    return session


def test_batches_decoded_again_are_counted_recorded_and_said(
    make_shards: Call, digits: Any, vitscore: Call, tmp_path: Path
) -> None:
    shards, out = make_shards(with_bad(digits[:40], 3, 5, 30)), tmp_path / "out"
    done = vitscore("run", shards, "-m", "demo-vit", "-b", 16, "-o", out)
    assert done.code == 0, done.err
    assert f"note: {SENTENCE}\n" in done.out
    counts = last_session(out)["decoded_again"]
    assert counts == {"batches": 2, "images": 32, "undecodable": 3, "rebuilds": 0}
    assert f"decoder  {SENTENCE}\n" in vitscore("status", out).out
    assert json.loads(vitscore("status", out, "--json").out)["decoded_again"] == counts


def test_a_clean_run_says_nothing_of_it(make_shards: Call, digits: Any, vitscore: Call, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = vitscore("run", make_shards(digits[:20]), "-m", "demo-vit", "-o", out)
    assert done.code == 0 and "again" not in done.out
    assert set(last_session(out)["decoded_again"].values()) == {0}
    assert "decoder " not in vitscore("status", out).out


def test_the_counts_of_all_ranks_are_added(make_shards: Call, digits: Any, tmp_path: Path) -> None:
    shards = make_shards(*(with_bad(digits[16 * number : 16 * number + 16], number, 9) for number in range(6)))
    command = ("run", shards, "-m", "demo-vit", "-b", 16, "--max-bad", "100%", "-o", tmp_path / "out")
    launcher = (Path(sys.executable).parent / "torchrun", "--nproc-per-node", "2", "-m", "vitscore")
    done = subprocess.run(map(str, (*launcher, *command)), capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    session = last_session(tmp_path / "out")
    # Every shard is one batch or in two batches; each bad image fails once, on any rank.
    counts = session["decoded_again"]
    assert session["ranks"] == 2 and counts["undecodable"] == 12 and 6 <= counts["batches"] <= 12


def test_a_cuda_error_in_the_middle_of_a_run_is_one_line_and_the_parts_stay(
    make_shards: Call, digits: Any, vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitscore.decode.dali_pipeline import DaliPipeline
    from vitscore.decode.failures import failure_of

    shards, out = make_shards(digits[:64], digits[64:124]), tmp_path / "out"
    command = ("run", shards, "-m", "demo-vit", "-b", 16)
    real, num_asked = DaliPipeline.outputs, [0]

    def outputs(pipeline: DaliPipeline, serial: int) -> Any:
        outputs = real(pipeline, serial)
        num_asked[0] += serial > 0
        if num_asked[0] < 8:
            return outputs
        raise failure_of(RuntimeError("CUDA runtime API error cudaErrorLaunchFailure (719)"), device=None)

    monkeypatch.setattr(DaliPipeline, "outputs", outputs)
    done = vitscore(*command, "-o", out)
    assert done.code == 4 and done.err.count("\n") == 1
    assert done.err.startswith("decoder failed: cpu - got CUDA runtime API error cudaErrorLaunchFailure (719).")
    assert len(list((out / "parts").iterdir())) == 1
    assert last_session(out)["stopped_by"].startswith("decoder failed")
    monkeypatch.undo()
    assert vitscore(*command, "-o", out).code == 0
    assert vitscore(*command, "-o", tmp_path / "other").code == 0
    assert (out / "metrics.json").read_bytes() == (tmp_path / "other" / "metrics.json").read_bytes()

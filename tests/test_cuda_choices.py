"""The choices that a run measures on a GPU, and the stream it uses, on a simulated GPU (see pretendcuda.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import pretendcuda as pretend
from support import streams
from vitscore.engine.cuda_choices import ROUNDS, attending, choose_attention, choose_launch
from vitscore.engine.cuda_device import STREAM_VARIABLE, CudaDevice, Times, run_stream
from vitscore.errors import UsageError

Call = Callable[..., Any]
RUN = ("run", "demo", "-m", "demo-vit", "-b", 32, "--limit", 80, "--decoder", "torchvision")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture(autouse=True)
def _switches_are_left_as_they_were() -> Iterator[None]:
    def switches() -> tuple[object, ...]:
        return torch.backends.cuda.cudnn_sdp_enabled(), torch.compiler.config.cache_key_tag

    before = switches()
    yield
    assert switches() == before


def clock_of(*times: tuple[float, float]) -> Any:
    """A clock that returns these times one after the other, in milliseconds."""
    left = iter(times)
    return lambda *_: Times(*(milliseconds / 1000 for milliseconds in next(left)))


@pytest.mark.parametrize(
    ("host_ms", "device_ms", "is_graph"), [(5, 6.8, True), (0.26, 1, True), (0.24, 1, False), (5, 23, False)]
)
def test_a_graph_is_for_forwards_that_keep_python_busy(host_ms: float, device_ms: float, is_graph: bool) -> None:
    """The first forward, in which libraries choose kernels, does not count, nor does an outlier."""
    times = [(900, 901), (90, 91), *[(host_ms, device_ms)] * (ROUNDS - 2), (80, 800)]
    launch = choose_launch(streams.Late(clock=clock_of(*times)), lambda pixels: None, torch.zeros(1))
    assert launch.value is is_graph
    assert launch.figures == {"host_ms": host_ms, "device_ms": device_ms}
    assert launch.reason == f"Python takes {host_ms:.1f} ms to launch what the GPU does in {device_ms:.1f} ms"


def test_a_forward_without_memory_is_left_as_it_is_and_other_errors_are_raised() -> None:
    def raises(error: Exception) -> Any:
        def clock(*_: object) -> Times:
            raise error

        return streams.Late(clock=clock)

    launch = choose_launch(raises(torch.OutOfMemoryError("CUDA out of memory.")), lambda pixels: None, torch.zeros(1))
    assert (launch.value, launch.reason) == (False, "there was no memory to measure it")
    with pytest.raises(RuntimeError, match="illegal"):
        choose_launch(raises(RuntimeError("an illegal memory access")), lambda pixels: None, torch.zeros(1))


class Model:
    """A model whose images are the batch size."""

    def __init__(self, name: str) -> None:
        self.net = name

    def black_images(self, batch_size: int) -> int:
        return batch_size


def by_attention(default_ms: float, flash_ms: float, asked: list[Any] | None = None) -> Any:
    """A clock whose time depends on whether cuDNN's attention is enabled."""

    def clock(forward: Any, pixels: Any) -> Times:
        has_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
        if asked is not None:
            asked.append((forward, pixels, has_cudnn))
        return Times(1e-4, (default_ms if has_cudnn else flash_ms) / 1000)

    return clock


@pytest.mark.parametrize(
    ("default_ms", "flash_ms", "chosen"), [(10, 9, "flash"), (10, 9.8, "default"), (10, 20, "default")]
)
def test_another_attention_than_torchs_own_has_to_be_clearly_faster(
    default_ms: float, flash_ms: float, chosen: str
) -> None:
    asked: list[Any] = []
    models: Any = [Model("vit"), Model("clip")]
    choice = choose_attention(streams.Late(clock=by_attention(default_ms, flash_ms, asked)), models, 96)
    assert choice.value == chosen
    assert choice.figures == {"default_ms": 2 * default_ms, "flash_ms": 2 * flash_ms}
    # Alternately, so that a drifting clock rate favours neither.
    round_of_both = [("vit", 96, True), ("clip", 96, True), ("vit", 96, False), ("clip", 96, False)]
    assert asked == round_of_both * (1 + ROUNDS)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("No kernel\nfound")])
def test_an_attention_that_fails_is_not_taken(error: Exception) -> None:
    def clock(*_: object) -> Times:
        if not torch.backends.cuda.cudnn_sdp_enabled():
            raise error
        return Times(1.0, 1.0)

    models: Any = [Model("vit")]
    choice = choose_attention(streams.Late(clock=clock), models, 96)
    assert choice.value == "default"
    assert choice.reason == f"flash could not be measured: {str(error).splitlines()[0]}"


def test_compiled_code_of_another_attention_is_kept_apart() -> None:
    """torch's disk cache does not distinguish the two."""
    with torch.compiler.config.patch(cache_key_tag="theirs"):  # type: ignore[attr-defined]
        with attending("default"):
            assert torch.compiler.config.cache_key_tag == "theirs"
        with pytest.raises(KeyError), attending("flash"):
            assert torch.compiler.config.cache_key_tag == "theirs flash"
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            raise KeyError
        assert torch.compiler.config.cache_key_tag == "theirs"


def last_start(folder: Path) -> dict[str, Any]:
    session: dict[str, Any] = json.loads((folder / "run.json").read_bytes())["sessions"][-1]
    return session


def test_a_run_puts_all_its_work_on_its_own_stream(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitscore.decode import torchvision as decode_torchvision
    from vitscore.engine import audit
    from vitscore.models import image_model as models
    from vitscore.models import load

    gpu = pretend.PretendCuda(monkeypatch, streams.Late(has_graphs=True))
    for module in (load, models):
        gpu.note(monkeypatch, module, "load_weights")
    gpu.note(monkeypatch, models.ImageModel, "warm_up")
    gpu.note(monkeypatch, decode_torchvision.TorchvisionDecoder, "__init__")
    gpu.note(monkeypatch, decode_torchvision.TorchvisionDecoder, "collect")
    gpu.note(monkeypatch, audit, "_classify")
    done = vitscore(*RUN, "-o", tmp_path / "own", "--tta", "hflip")
    assert done.code == 0, done.err
    assert gpu.current is gpu.default
    loaded, *rest = gpu.done
    assert loaded == ("default", "load_weights")
    # One stream for both, so that the loop finds the memory which the warm-up used; the weights are loaded before.
    assert [event for event in rest if "waits" in event[1]] == [
        ("own 1", "waits for default"),
        ("default", "waits for own 1"),
    ] * 2
    assert (rest[0], rest[-1]) == (("own 1", "waits for default"), ("default", "waits for own 1"))
    work = {name for stream, name in rest if stream == "own 1"}
    assert {event for event in rest if event[0] != "own 1"} == {("default", "waits for own 1")}
    assert work >= {"warm_up", "__init__", "collect", "graphed", "ranking", "copy", "mark", "free_memory", "_classify"}
    # The audit of a half-precision run loads the model once more, in the middle of it.
    assert "load_weights" in work
    assert "stream" not in last_start(tmp_path / "own")["measured"]


def test_the_default_stream_is_for_measuring_and_is_written_down(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = pretend.PretendCuda(monkeypatch, streams.Late())
    monkeypatch.setenv(STREAM_VARIABLE, "default")
    assert vitscore(*RUN, "-o", tmp_path / "default").code == 0
    assert {stream for stream, _ in gpu.done} == {"default"}
    measured = last_start(tmp_path / "default")["measured"]
    assert measured["stream"] == {"value": "default", "reason": STREAM_VARIABLE, "figures": {}}
    # Launching takes long on this device, which cannot capture graphs.
    assert measured["graph"]["demo-vit"]["value"] is False
    assert measured["graph"]["demo-vit"]["reason"].endswith("in 1.0 ms, but it cannot be captured")
    monkeypatch.setenv(STREAM_VARIABLE, "fast")
    done = vitscore(*RUN, "-o", tmp_path / "fast")
    assert (done.code, done.err) == (2, "unknown stream: VITSCORE_CUDA_STREAM - expected own or default, got fast.\n")
    assert not (tmp_path / "fast").exists()


def test_a_stream_that_fails_leaves_torch_on_the_default_one(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = pretend.PretendCuda(monkeypatch, streams.Late())
    with pytest.raises(UsageError), run_stream(0):
        raise UsageError("some error")
    assert gpu.current is gpu.default
    assert gpu.done[-1] == ("default", "waits for own 1")


def test_a_start_writes_down_what_it_measured_and_the_next_measures_again(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = streams.Late(has_graphs=True, clock=by_attention(10, 8))
    gpu = pretend.PretendCuda(monkeypatch, late)
    out = tmp_path / "out"
    assert vitscore(*RUN, "-o", out).code == 0
    first = json.loads((out / "run.json").read_bytes())
    measured = last_start(out)["measured"]
    assert measured["attention"] == {
        "value": "flash",
        "reason": "a batch takes 10.0 ms by torch's own choice, 8.0 ms by flash",
        "figures": {"default_ms": 10.0, "flash_ms": 8.0},
    }
    # The forward that is measured for its launches has the attention that was chosen.
    assert measured["graph"]["demo-vit"]["figures"] == {"host_ms": 0.1, "device_ms": 8.0}
    assert measured["graph"]["demo-vit"]["value"] is False
    assert "graphed" not in {name for _, name in gpu.done}
    next((out / "parts").iterdir()).unlink()
    late.times = lambda *_: Times(0.001, 0.001)
    done = vitscore(*RUN, "-o", out)
    assert done.code == 0, done.err
    record = json.loads((out / "run.json").read_bytes())
    assert record["identity_hash"] == first["identity_hash"]
    assert record["sessions"][0]["measured"] == measured
    again = record["sessions"][1]["measured"]
    assert again["attention"]["value"] == "default"
    assert again["graph"]["demo-vit"]["value"] is True
    assert [name for _, name in gpu.done].count("graphed") == 1


@pytest.mark.parametrize(
    ("capability", "precision", "has_choice"),
    [((9, 0), "bf16", True), ((9, 0), "fp32", False), ((8, 0), "fp16", False)],
)
def test_attention_is_measured_on_hopper_in_half_precision_alone(
    capability: tuple[int, int],
    precision: str,
    has_choice: bool,
    vitscore: Call,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend.PretendCuda(monkeypatch, streams.Late(clock=by_attention(10, 8)), capability=capability)
    assert vitscore(*RUN, "--precision", precision, "-o", tmp_path / "out").code == 0
    attention = last_start(tmp_path / "out")["measured"]["attention"]
    assert (attention["value"] == "flash") is has_choice
    assert bool(attention["figures"]) is has_choice


def test_models_are_compiled_under_the_attention_that_was_chosen_and_run_under_it(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler that compiles at the first call, as torch's does."""
    asked: list[Any] = []
    compiled: list[int] = []
    has_cudnn: list[bool] = []
    pretend.PretendCuda(monkeypatch, streams.Late(clock=by_attention(10, 8, asked)))

    def compile(net: Any, device: str) -> Any:
        def forward(pixels: torch.Tensor) -> Any:
            if not has_cudnn:
                compiled.append(len(asked))
            has_cudnn.append(torch.backends.cuda.cudnn_sdp_enabled())
            return net(pixels)

        return forward

    monkeypatch.setattr("vitscore.models.image_model._compiled", compile)
    done = vitscore(*RUN, "--compile", "--precision", "bf16", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert compiled == [2 * (1 + ROUNDS)]  # when both kinds of attention had been measured
    assert len(has_cudnn) > 3 and not any(has_cudnn)


def test_a_forward_is_timed_alone_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            done.append(f"event on {stream}")

        def synchronize(self) -> None:
            done.append("wait")

        def elapsed_time(self, other: Event) -> float:
            return 12.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "ours")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("idle"))
    device = CudaDevice(0)
    device._device = torch.device("cpu")
    times = device.times(lambda pixels: done.append(f"{len(pixels)} rows"), torch.zeros(3))
    assert done == ["idle", "event on ours", "3 rows", "event on ours", "wait"]
    assert times.device_s == 0.012 and 0 < times.host_s < 0.01


@pytest.mark.gpu
@needs_gpu
def test_python_returns_from_long_work_at_once_and_from_many_launches_late() -> None:
    torch.cuda.set_device(0)
    device = CudaDevice(0)
    square = torch.rand((8192, 8192), device="cuda", dtype=torch.float16)

    def long(pixels: torch.Tensor) -> None:
        for _ in range(10):
            square @ square

    def many(pixels: torch.Tensor) -> None:
        for _ in range(500):
            pixels.add_(1)

    for forward, is_graph in ((long, False), (many, True)):
        launch = choose_launch(device, forward, torch.zeros(8))  # type: ignore[arg-type]
        assert launch.value is is_graph, launch


@pytest.mark.gpu
@needs_gpu
def test_a_run_on_its_own_stream_predicts_what_one_on_the_default_stream_does(
    vitscore: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow.parquet as pq

    options = ("--no-compile", "--device", "cuda", "--decoder", "torchvision", "--precision", "fp32")
    for kind in ("own", "default"):
        monkeypatch.setenv(STREAM_VARIABLE, kind)
        done = vitscore("run", "demo", "-m", "demo-vit", "-m", "demo-clip", "-b", 64, *options, "-o", tmp_path / kind)
        assert done.code == 0, done.err
    for path in sorted((tmp_path / "own" / "parts").iterdir()):
        one, other = pq.read_table(path), pq.read_table(tmp_path / "default" / "parts" / path.name)
        for name in ("demo-vit", "demo-clip"):
            assert one[f"{name}.pred"] == other[f"{name}.pred"]
            np.testing.assert_allclose(one[f"{name}.prob"], other[f"{name}.prob"], atol=1e-5)

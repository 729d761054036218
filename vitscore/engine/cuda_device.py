"""The GPU as a forward sees it: memory, copies without a wait of the host, marks, the row kernel, graphs, times.

Below `forward_cuda`, which knows its device through `Device` alone. Everything here is put on torch's current stream
and returns at once; only a mark's `synchronize`, `times` and `free_memory` wait. The order of the stream is the only
ordering there is: DALI hands its pixels over on the same stream, the row kernel is launched on it, and buffers are
written again on it.

A run's stream (`run_stream`) is one that does not block: work on CUDA's default stream and on any blocking stream, such
as a library may keep, waits for each other, and decoding would wait for forwards. VITSCORE_CUDA_STREAM=default keeps a
run on the default stream all the same, to measure what its own gains.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from vitscore.engine.score_buffer import ScoreBuffer
from vitscore.errors import SetupError, UsageError

if TYPE_CHECKING:
    from vitscore.models.image_model import ModelOutput

Run = Callable[[torch.Tensor], "ModelOutput"]
"""Pixels of up to the batch's rows in, outputs of all its rows out; they last until the next call."""

WARM_UPS = 3
"""Forwards on a side stream before a capture, as torch's documentation asks: libraries make their workspaces there."""
STREAM_VARIABLE = "VITSCORE_CUDA_STREAM"


class Times(NamedTuple):
    """Seconds of one forward on an idle device: until Python has launched it, and until the device has done it."""

    host_s: float
    device_s: float


class Mark(Protocol):
    """A place in the stream."""

    def synchronize(self) -> None:
        """Wait until everything put on the stream before it is done."""


class Ranking(Protocol):
    """The row kernel for one model, and where it writes."""

    scores: ScoreBuffer

    def rank(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        """Score the rows: float32 (B, K), contiguous, and int32 (B); both on the device."""


class Device(Protocol):
    """A device whose work is put on a stream, in order."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that copies can reach without the host waiting."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of the device."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between pinned and device memory of one shape."""

    def mark(self) -> Mark:
        """A mark behind everything so far."""

    def ranking(self, max_rows: int, num_classes: int, top_k: int) -> Ranking:
        """A row kernel with a buffer of its own."""

    def graphed(self, forward: Run, pixels: torch.Tensor) -> Run | None:
        """The forward as one launch for batches like `pixels`; None where it cannot be captured."""

    def times(self, forward: Callable[[torch.Tensor], object], pixels: torch.Tensor) -> Times:
        """Do a forward once, alone on the device, and wait for it."""

    def free_memory(self) -> None:
        """Wait for everything, and give back what nothing holds."""


class CudaDevice:
    """A `Device` on torch's current stream of a GPU.

    Args:
        index: which GPU; it must be torch's current device, since numba launches where torch's context is.
    """

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        # A blocking event lets the waiting thread sleep: its core belongs to the decoder meanwhile.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call, unused-ignore]
        event.record(torch.cuda.current_stream(self._device))
        mark: Mark = event
        return mark

    def ranking(self, max_rows: int, num_classes: int, top_k: int) -> Ranking:
        return CudaRanking(self, max_rows, num_classes, top_k, device=self._device)

    def graphed(self, forward: Run, pixels: torch.Tensor) -> Run | None:
        stream = torch.cuda.current_stream(self._device)
        try:
            return Graphed(forward, pixels.to(self._device))
        except RuntimeError:
            torch.cuda.set_stream(stream)  # a capture that fails leaves torch on the stream that it captured
            # A model that waits for the device inside its forward cannot be captured, and a graph's own memory may be
            # too much. Whatever else is wrong, the forward as it is will say.
            return None

    def times(self, forward: Callable[[torch.Tensor], object], pixels: torch.Tensor) -> Times:
        pixels, stream = pixels.to(self._device), torch.cuda.current_stream(self._device)
        begin, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call, unused-ignore]
            for _ in range(2)
        )
        torch.cuda.synchronize(self._device)
        with torch.inference_mode():
            begin.record(stream)
            started = time.perf_counter()
            forward(pixels)
            host_s = time.perf_counter() - started
            end.record(stream)
        end.synchronize()
        return Times(host_s, begin.elapsed_time(end) / 1000)

    def free_memory(self) -> None:
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()


class CudaRanking:
    """numba's row kernel on torch's memory and torch's stream."""

    def __init__(self, own: Device, max_rows: int, num_classes: int, top_k: int, *, device: torch.device) -> None:
        width = min(top_k, num_classes)
        whole = own.empty((ScoreBuffer.num_bytes(max_rows, width),), torch.uint8)
        self.scores = ScoreBuffer(whole, max_rows=max_rows, width=width)
        self._device = device
        try:
            from vitscore.kernels.cuda import DeviceRows, DeviceRowScores

            self._rows = DeviceRows(max_rows, num_classes, k=width, scores=DeviceRowScores(*self.scores.arrays))
            # Compiled and loaded now, not in the middle of the first batch.
            self.rank(own.empty((1, num_classes), torch.float32).zero_(), own.empty((1,), torch.int32).zero_())
        except ImportError as failure:  # NVVM's absence too, which numba tells when it compiles
            install = 'Run `pip install "numba-cuda[cu13]"`.'
            raise SetupError("numba cannot use the GPU", got=str(failure), next_step=install) from failure

    def rank(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        # The logits may be dropped at once: torch gives their memory only to work behind this kernel on this stream.
        self._rows.score(logits_BK, labels_B, stream=torch.cuda.current_stream(self._device).cuda_stream)


class Graphed:
    """A forward captured once and replayed for every batch: one launch instead of hundreds.

    `torch.compile`'s own graphs ("reduce-overhead") hand out buffers that they own and take back at a time of their
    choosing. Here input and outputs stand still: a batch is copied in, and what reads the outputs (the row kernel, the
    copies to the host) is put on the stream before the next replay writes them.

    Args:
        forward: everything from pixels to outputs, test-time views included, for their outputs would share a buffer.
        pixels: a batch on the device, whose shape all others have but for fewer rows.
    """

    def __init__(self, forward: Run, pixels: torch.Tensor) -> None:
        self._pixels = pixels.clone()
        current = torch.cuda.current_stream(pixels.device)
        side = torch.cuda.Stream(pixels.device)  # type: ignore[no-untyped-call, unused-ignore]
        side.wait_stream(current)
        with torch.inference_mode(), torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                forward(self._pixels)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (a decoder's) may allocate meanwhile, which the default mode would take for an error of ours.
        with torch.inference_mode(), torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._output = forward(self._pixels)

    def __call__(self, pixels: torch.Tensor) -> ModelOutput:
        num_rows = len(pixels)
        self._pixels[:num_rows].copy_(pixels, non_blocking=True)
        if num_rows < len(self._pixels):
            self._pixels[num_rows:].zero_()
        self._graph.replay()
        return self._output


def stream_kind() -> str:
    """`own`, or `default` where the environment asks for it.

    Raises:
        UsageError: it asks for something else.
    """
    kind = os.environ.get(STREAM_VARIABLE) or "own"
    if kind not in ("own", "default"):
        raise UsageError("unknown stream", where=STREAM_VARIABLE, expected="own or default", got=kind)
    return kind


@contextlib.contextmanager
def run_stream(index: int) -> Iterator[None]:
    """Put this thread's work on a GPU on the run's stream.

    It comes behind what the default stream was given before, such as weights, and before what that is given afterwards.
    """
    if stream_kind() == "default":
        yield
        return
    default, own = torch.cuda.default_stream(index), _own_stream(index)
    own.wait_stream(default)
    try:
        with torch.cuda.stream(own):
            yield
    finally:
        # Whatever is wrong with the device has been raised by then, where it was met.
        with contextlib.suppress(RuntimeError):
            default.wait_stream(own)


@functools.lru_cache
def _own_stream(index: int) -> torch.cuda.Stream:
    """The same one each time: memory that was used on a stream is kept for that stream."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call, unused-ignore]


def require_exact_fp32() -> None:
    """Keep TF32's ten bits of mantissa away from whatever is called fp32: heads, projections, cosine, and reruns.

    torch has it off for products and on for cuDNN's convolutions, of which a ViT in fp32 has one: its patches. By the
    older of torch's two switches, which both its own readers understand; the newer one makes them raise.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def keep_compiled_code(cache: Path) -> None:
    """Have torch.compile keep its code and its tuning where text weights are kept, not in the system's /tmp.

    It reads the variable when it first compiles. Who has set it has a reason. Triton's folder follows.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))

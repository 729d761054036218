"""The GPU operations that a forward needs: memory, asynchronous copies, marks, the row kernel and graphs.

`forward_cuda` uses the device only through the protocol `Device`. Every operation is queued on torch's current stream
and returns at once; only a mark's `synchronize`, `times` and `free_memory` wait. The order of the stream is the only
synchronisation: DALI delivers its pixels on the same stream, the row kernel is launched on it, and buffers are reused
in its order.

A run uses a non-blocking stream (`run_stream`). CUDA's default stream synchronises with every blocking stream, which a
library may have, so decoding would wait for forwards. VITSCORE_CUDA_STREAM=default keeps a run on the default stream,
to measure the difference.
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
"""Takes pixels of up to a batch's rows and returns outputs for all rows, valid until the next call."""

WARM_UPS = 3
"""Forwards on a side stream before a capture, as torch requires: libraries allocate their workspaces in them."""
STREAM_VARIABLE = "VITSCORE_CUDA_STREAM"


class Times(NamedTuple):
    """Seconds of one forward on an idle device: to launch it from Python, and to complete it on the device."""

    host_s: float
    device_s: float


class Mark(Protocol):
    """A position in the stream."""

    def synchronize(self) -> None:
        """Wait until all work queued on the stream before the mark is done."""


class Ranking(Protocol):
    """The row kernel for one model, and its output buffer."""

    scores: ScoreBuffer

    def rank(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        """Score the rows of logits, float32 (B, K), contiguous, and labels, int32 (B); both on the device."""


class Device(Protocol):
    """A device that does its work in the order of one stream."""

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate host memory for asynchronous copies."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate device memory."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy between pinned and device memory of equal shape, asynchronously."""

    def mark(self) -> Mark:
        """Return a mark after all work queued so far."""

    def ranking(self, max_rows: int, num_classes: int, top_k: int) -> Ranking:
        """Return a row kernel with its own output buffer."""

    def graphed(self, forward: Run, pixels: torch.Tensor) -> Run | None:
        """Capture the forward as a graph for batches shaped like `pixels`; None if it cannot be captured."""

    def times(self, forward: Callable[[torch.Tensor], object], pixels: torch.Tensor) -> Times:
        """Time one forward on an idle device."""

    def free_memory(self) -> None:
        """Wait for all queued work, and return unused memory to the device."""


class CudaDevice:
    """A `Device` on torch's current stream of a GPU.

    Args:
        index: the GPU's index; it must be torch's current device, since numba launches in torch's context.
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
        # A blocking event lets the waiting thread sleep, which frees its core for the decoder.
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
            torch.cuda.set_stream(stream)  # a failed capture leaves torch on the capturing stream
            # A model that synchronises inside its forward cannot be captured, and the graph's memory may not fit. Any
            # other error recurs in the forward without a graph, and is raised there.
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
    """The numba row kernel on torch's memory and stream."""

    def __init__(self, own: Device, max_rows: int, num_classes: int, top_k: int, *, device: torch.device) -> None:
        width = min(top_k, num_classes)
        whole = own.empty((ScoreBuffer.num_bytes(max_rows, width),), torch.uint8)
        self.scores = ScoreBuffer(whole, max_rows=max_rows, width=width)
        self._device = device
        try:
            from vitscore.kernels.cuda import DeviceRows, DeviceRowScores

            self._rows = DeviceRows(max_rows, num_classes, k=width, scores=DeviceRowScores(*self.scores.arrays))
            # Compile and load now, not during the first batch.
            self.rank(own.empty((1, num_classes), torch.float32).zero_(), own.empty((1,), torch.int32).zero_())
        except ImportError as failure:  # includes a missing NVVM, which numba reports when it compiles
            install = 'Run `pip install "numba-cuda[cu13]"`.'
            raise SetupError("numba cannot use the GPU", got=str(failure), next_step=install) from failure

    def rank(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        # The caller may drop the logits at once: torch reuses their memory only for later work on this stream.
        self._rows.score(logits_BK, labels_B, stream=torch.cuda.current_stream(self._device).cuda_stream)


class Graphed:
    """A forward captured once and replayed for every batch: one launch instead of hundreds.

    `torch.compile`'s own graphs ("reduce-overhead") may reuse their output buffers at any time. Here input and outputs
    have fixed addresses: a batch is copied in, and the readers of the outputs (the row kernel, the copies to the host)
    are queued on the stream before the next replay overwrites them.

    Args:
        forward: everything from pixels to outputs, including test-time views, whose outputs would otherwise share a
            buffer.
        pixels: a full batch on the device; later batches may have fewer rows.
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
        # Other threads (the decoder's) may allocate during the capture, which the default mode treats as an error.
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
    """Return `own`, or `default` if VITSCORE_CUDA_STREAM says so.

    Raises:
        UsageError: the variable has another value.
    """
    kind = os.environ.get(STREAM_VARIABLE) or "own"
    if kind not in ("own", "default"):
        raise UsageError("unknown stream", where=STREAM_VARIABLE, expected="own or default", got=kind)
    return kind


@contextlib.contextmanager
def run_stream(index: int) -> Iterator[None]:
    """Queue this thread's GPU work on the run's stream.

    It is ordered after earlier work on the default stream (loading weights), and before later work there.
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
        # A device error has already been raised where it occurred.
        with contextlib.suppress(RuntimeError):
            default.wait_stream(own)


@functools.lru_cache
def _own_stream(index: int) -> torch.cuda.Stream:
    """Return one stream for every call: torch's allocator caches memory by stream."""
    return torch.cuda.Stream(index)  # type: ignore[no-untyped-call, unused-ignore]


def require_exact_fp32() -> None:
    """Turn off TF32, whose mantissa has ten bits, for all fp32 work: heads, projections, cosines and reruns.

    By default torch uses TF32 for cuDNN's convolutions, but not for matrix products; a ViT has one convolution, the
    patch embedding. The older of torch's two switches is set, since parts of torch raise an error if they read it
    after the newer one was set.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def keep_compiled_code(cache: Path) -> None:
    """Put torch.compile's cache of code and tuning beside the text weights, instead of the system's /tmp.

    torch reads the variable when it first compiles, and puts Triton's cache below it. A value set by the user is kept.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "compiled"))

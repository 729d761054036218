"""The GPU's forward on a device that is late, and on a GPU if there is one; the CPU's forward is the oracle."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support import smallmodels as small
from support import streams
from vitscore.classes import matching as classes
from vitscore.decode.pixels import Decoded, is_dali_available
from vitscore.engine.forward_cpu import Forward
from vitscore.engine.forward_cuda import CudaForward
from vitscore.engine.ranked import Ranked
from vitscore.errors import SetupError
from vitscore.models import checkpoint as checkpoints
from vitscore.models.image_model import ImageModel, Placement
from vitscore.models.load import HeadSpec, load_model
from vitscore.rundir.parts import Predictions

Call = Callable[..., Any]
NAMES = tuple(f"class {number}" for number in range(23))
BATCH = 6
OPTIONS: dict[str, Any] = {"batch_size": BATCH, "top_k": 5, "save": ("logits", "embeddings"), "has_fp32_rerun": True}

needs_dali = pytest.mark.skipif(not is_dali_available(), reason="DALI is not installed here")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def load(folder: Path, *, device: str = "cpu", precision: Any = "fp32", **options: Any) -> ImageModel:
    checkpoint = checkpoints.find(str(folder))
    head = None
    if checkpoint.kind == "classifier":
        head = classes.match_head(checkpoint.id2label, NAMES, label_map=None, num_outputs=len(NAMES), model="m")
    options = {"save_embeddings": True, "placement": Placement(device, precision), **options}
    return load_model(checkpoint, name=folder.name, head=HeadSpec(NAMES, head), **options)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models are slower with more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [small.save_vit(root / "vit", NAMES), small.save_clip(root / "clip")]


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT whose trunk overflows in fp16 for images with contrast, and never in fp32."""
    from safetensors.torch import load_file, save_file

    folder: Path = small.save_vit(tmp_path_factory.mktemp("models") / "big", NAMES)
    weights = load_file(folder / "model.safetensors")
    weights["vit.embeddings.patch_embeddings.projection.weight"] *= 30000.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def batches(sizes: Sequence[int], device: str = "cpu") -> Iterator[tuple[Decoded, np.ndarray]]:
    """Batches of random pixels with one faulty row per batch, and labels, some of them missing."""
    generator = torch.Generator().manual_seed(1)
    for number, size in enumerate(sizes):
        pixels = torch.randint(0, 256, (size, small.EDGE, small.EDGE, 3), dtype=torch.uint8, generator=generator)
        labels = torch.randint(-1, len(NAMES), (size,), generator=generator).numpy().astype(np.int32)
        pixels[::2] = pixels[::2] // 16 + 120  # every other image has little contrast
        pixels[number % size] = 0
        # The models' geometries differ in how they are made, not in their shape.
        yield Decoded((pixels.to(device), pixels.flip(2).contiguous().to(device)), {number % size: "no image"}), labels


def run(forward: Any, work: Iterator[tuple[Decoded, np.ndarray]]) -> list[dict[str, Ranked]]:
    """Submit batches as the engine does, with as many in flight as the forward allows."""
    under_way: deque[Any] = deque()
    results = []
    for decoded, labels in work:
        under_way.append(forward.submit(decoded, labels))
        while len(under_way) > forward.depth:
            results.append(under_way.popleft().result())
    results += [pending.result() for pending in under_way]
    forward.close()
    return results


def expected(models: Sequence[ImageModel], sizes: Sequence[int], **options: Any) -> list[dict[str, Ranked]]:
    return run(Forward(models, num_workers=0, **{**OPTIONS, **options}), batches(sizes))


def assert_same(results: list[dict[str, Ranked]], wanted: list[dict[str, Ranked]]) -> None:
    assert len(results) == len(wanted)
    for ours, theirs in zip(results, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, ranked in ours.items():
            assert ranked.num_redone == theirs[name].num_redone
            np.testing.assert_array_equal(ranked.is_finite, theirs[name].is_finite)
            for field in fields(Predictions):
                one, other = (getattr(side.predictions, field.name) for side in (ranked, theirs[name]))
                assert (one is None) == (other is None), field.name
                if one is not None:
                    np.testing.assert_array_equal(one, other, err_msg=field.name)
                    assert one.dtype == other.dtype


# More batches than slots; the last is short, and so is one in the middle.
SIZES = (6, 6, 3, 6, 6, 6, 6, 1, 6, 6, 2)


@pytest.mark.parametrize("has_graphs", [False, True])
@pytest.mark.parametrize("tta", ["none", "hflip"])
@pytest.mark.parametrize("save", [(), ("logits", "embeddings")])
def test_a_late_device_gives_the_cpus_bits(
    has_graphs: bool, tta: str, save: tuple[str, ...], folders: list[Path]
) -> None:
    models = [load(folder) for folder in folders]
    late = streams.Late(has_graphs=has_graphs)
    results = run(CudaForward(models, device=late, **{**OPTIONS, "tta": tta, "save": save}), batches(SIZES))
    assert_same(results, expected(models, SIZES, tta=tta, save=save))
    assert not late.queue


def test_results_that_are_taken_late_are_kept(folders: list[Path]) -> None:
    models = [load(folder) for folder in folders]
    forward = CudaForward(models, device=streams.Late(), **OPTIONS)
    under_way = [forward.submit(*work) for work in batches(SIZES)]
    results = [pending.result() for pending in reversed(under_way)][::-1]
    assert_same(results, expected(models, SIZES))
    assert results == [pending.result() for pending in under_way]


def test_a_batch_waits_for_nothing_until_its_result_is_asked_for(folders: list[Path]) -> None:
    late = streams.Late()
    forward = CudaForward([load(folders[0])], device=late, **OPTIONS)
    lengths = []
    for work in batches((6,) * (forward.depth + 1)):
        forward.submit(*work)
        lengths.append(len(late.queue))
    assert lengths == [lengths[0] * (count + 1) for count in range(forward.depth + 1)]


def test_pixels_are_held_until_the_device_has_read_them_and_no_longer(folders: list[Path]) -> None:
    forward = CudaForward([load(folders[0])], device=streams.Late(), **OPTIONS)
    decoded, labels = next(batches((6,)))
    kept = weakref.ref(decoded)
    pending = forward.submit(decoded, labels)
    del decoded
    assert kept() is not None
    pending.result()
    assert kept() is None


def test_rows_that_overflowed_are_done_again_in_fp32_when_they_are_collected(
    overflowing: Path, folders: list[Path]
) -> None:
    models = [load(overflowing, precision="fp16"), load(folders[0], precision="fp16")]
    results = run(CudaForward(models, device=streams.Late(), **OPTIONS), batches(SIZES))
    assert_same(results, expected(models, SIZES))
    assert len(SIZES) < sum(batch["big"].num_redone for batch in results) < sum(SIZES) - len(SIZES)
    assert not any(batch["vit"].num_redone for batch in results)
    left = run(CudaForward(models, device=streams.Late(), **{**OPTIONS, "has_fp32_rerun": False}), batches(SIZES))
    assert not all(batch["big"].is_finite.all() for batch in left)


class Scarce:
    """A model that runs out of memory in some of its forwards."""

    def __init__(self, model: ImageModel, refused: Sequence[int], error: Exception) -> None:
        self._model = model
        self._refused = refused
        self._error = error
        self._num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, pixels: torch.Tensor) -> Any:
        self._num_calls += 1
        if self._num_calls in self._refused:
            raise self._error
        return self._model(pixels)


def test_a_batch_without_memory_is_computed_at_the_same_shape_when_others_are_done(folders: list[Path]) -> None:
    plain = [load(folder) for folder in folders]
    late = streams.Late()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    models: list[Any] = [plain[0], Scarce(plain[1], (1, 5, 9), error)]
    results = run(CudaForward(models, device=late, **OPTIONS), batches(SIZES))
    assert_same(results, expected(plain, SIZES))
    assert late.num_freed == 3 + 1  # and once at the end


def test_memory_that_lacks_twice_ends_the_run_with_what_to_do(folders: list[Path]) -> None:
    error = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    models: Any = [Scarce(load(folders[0]), (2, 3), error)]
    forward = CudaForward(models, device=streams.Late(), **OPTIONS)
    with pytest.raises(SetupError, match=r"out of GPU memory: a batch of 6\. Free GPU memory.*-b") as caught:
        run(forward, batches(SIZES))
    assert caught.value.exit_code == 4
    forward.close()


def test_other_errors_are_not_taken_for_a_lack_of_memory(folders: list[Path]) -> None:
    models: Any = [Scarce(load(folders[0]), (1,), RuntimeError("shapes cannot be multiplied"))]
    forward = CudaForward(models, device=streams.Late(), **OPTIONS)
    with pytest.raises(RuntimeError, match="multiplied"):
        run(forward, batches((6,)))


@pytest.mark.parametrize("has_graphs", [False, True])
@pytest.mark.parametrize("extra", [(), ("--augment", "gaussian_noise:severity=1", "--tta", "hflip")])
def test_a_whole_run_on_a_late_device_leaves_the_same_parts(
    has_graphs: bool,
    extra: tuple[str, ...],
    make_shards: Call,
    vitscore: Call,
    digits: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import pyarrow.parquet as pq

    broken = [
        (key, {"png": b"x", "cls": b"1"} if row % 40 == 7 else members) for row, (key, members) in enumerate(digits)
    ]
    shards = make_shards(broken[:150], broken[150:210], broken[210:300])
    command = ("run", shards, "-m", "demo-vit", "-m", "demo-clip", "-b", 32, "--save", "logits", *extra)
    assert vitscore(*command, "-o", tmp_path / "cpu").code == 0

    def make_forward(models: Any, *, device_id: int | None, num_workers: int, **options: Any) -> CudaForward:
        return CudaForward(models, device=streams.Late(has_graphs=has_graphs), **options)

    monkeypatch.setattr("vitscore.engine.loop.make_forward", make_forward)
    done = vitscore(*command, "-o", tmp_path / "late")
    assert done.code == 0, done.err
    for path in sorted((tmp_path / "cpu" / "parts").iterdir()):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "late" / "parts" / path.name)), path.name


@pytest.fixture
def gpu() -> Iterator[Any]:
    from vitscore.engine.cuda_device import CudaDevice, require_exact_fp32, run_stream

    torch.cuda.set_device(0)
    require_exact_fp32()
    with run_stream(0):
        yield CudaDevice(0)


def assert_close(results: list[dict[str, Ranked]], wanted: list[dict[str, Ranked]]) -> None:
    """Check the rule across devices: the same top-1 above a margin of 1e-3, and figures to the kernel's accuracy."""
    for ours, theirs in zip(results, wanted, strict=True):
        for name, ranked in ours.items():
            one, other = ranked.predictions, theirs[name].predictions
            assert one.logits is not None and other.logits is not None
            np.testing.assert_allclose(one.logits, other.logits, atol=2e-4, rtol=2e-4)
            best = np.sort(other.logits)
            is_clear = best[:, -1] - best[:, -2] > 1e-3
            assert is_clear.mean() > 0.5
            np.testing.assert_array_equal(one.pred[is_clear], other.pred[is_clear])
            for column in ("prob", "label_logprob", "sum_sq_prob"):
                np.testing.assert_allclose(getattr(one, column), getattr(other, column), atol=2e-3, rtol=2e-3)
            if one.embedding is not None:
                np.testing.assert_allclose(one.embedding, other.embedding, atol=2e-3, rtol=2e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("is_graphed", [False, True])
@pytest.mark.parametrize("tta", ["none", "hflip"])
def test_a_gpu_gives_the_cpus_predictions_in_fp32(
    is_graphed: bool, tta: str, folders: list[Path], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscore.engine.cuda_choices.HOST_SHARE", 0.0 if is_graphed else 1e9)
    forward = CudaForward([load(folder, device="cuda:0") for folder in folders], device=gpu, **{**OPTIONS, "tta": tta})
    results = run(forward, batches(SIZES, "cuda"))
    assert_close(results, expected([load(folder) for folder in folders], SIZES, tta=tta))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_gives_the_bits_of_the_forward_that_it_was_captured_from(
    precision: str, folders: list[Path], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [load(folder, device="cuda:0", precision=precision) for folder in folders]
    results = []
    for is_graphed in (True, False):
        monkeypatch.setattr("vitscore.engine.cuda_choices.HOST_SHARE", 0.0 if is_graphed else 1e9)
        results.append(run(CudaForward(models, device=gpu, **OPTIONS), batches(SIZES, "cuda")))
    assert_same(*results)


@pytest.mark.gpu
@needs_gpu
def test_a_forward_is_captured_where_it_is_launch_bound(folders: list[Path], gpu: Any) -> None:
    from vitscore.engine.cuda_device import Graphed

    (lane,) = CudaForward([load(folders[0], device="cuda:0")], device=gpu, **OPTIONS)._lanes
    assert isinstance(lane._run, Graphed)


@pytest.mark.gpu
@needs_gpu
def test_rows_that_overflowed_on_a_gpu_are_done_again_in_fp32(overflowing: Path, gpu: Any) -> None:
    half = load(overflowing, device="cuda:0", precision="fp16")
    results = run(CudaForward([half], device=gpu, **OPTIONS), batches(SIZES, "cuda"))
    wanted = expected([load(overflowing)], SIZES)
    assert 0 < sum(batch["big"].num_redone for batch in results) < sum(SIZES)
    for number, (ours, theirs) in enumerate(zip(results, wanted, strict=True)):
        ranked = ours["big"]
        is_good = np.arange(SIZES[number]) != number % SIZES[number]  # the faulty row is left as it is
        assert ranked.is_finite[is_good].all()
        one, other = ranked.predictions.logits, theirs["big"].predictions.logits
        assert one is not None and other is not None
        np.testing.assert_allclose(one[is_good], other[is_good], atol=0.2, rtol=0.2)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("is_graphed", [False, True])
def test_nothing_waits_for_the_gpu_when_a_batch_is_submitted(
    is_graphed: bool, folders: list[Path], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vitscore.engine.cuda_choices.HOST_SHARE", 0.0 if is_graphed else 1e9)
    models = [load(folder, device="cuda:0", precision="fp16") for folder in folders]
    forward = CudaForward(models, device=gpu, **{**OPTIONS, "tta": "hflip"})
    work = list(batches((6,) * (forward.depth + 1) + (2,), "cuda"))
    forward.submit(*work[0]).result()
    torch.cuda.set_sync_debug_mode("error")
    try:
        under_way = [forward.submit(*batch) for batch in work[1:]]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([pending.result() for pending in under_way]) == forward.depth + 1
    forward.close()


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_whose_memory_is_taken_ends_the_run_in_one_line(
    folders: list[Path], gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [load(folders[0], device="cuda:0")]
    size = 4096
    forward = CudaForward(models, device=gpu, **{**OPTIONS, "batch_size": size})
    pixels = torch.zeros((size, small.EDGE, small.EDGE, 3), dtype=torch.uint8, device="cuda")
    decoded, labels = Decoded((pixels,)), np.full(size, -1, np.int32)
    monkeypatch.setattr(forward._lanes[0], "_run", models[0])  # a captured graph would need no new memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(SetupError, match="out of GPU memory: a batch of 4096"):
            forward.submit(decoded, labels)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        monkeypatch.undo()
    assert forward.submit(decoded, labels).result()["vit"].is_finite.all()
    forward.close()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("decoder", [pytest.param("dali", marks=needs_dali), "torchvision"])
def test_a_compiled_run_on_a_gpu_compiles_once_and_predicts_as_the_cpu_does(
    decoder: str, vitscore: Call, tmp_path: Path
) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    from vitscore import load_run

    models = ("-m", "demo-vit", "-m", "demo-clip", "--decoder", decoder)
    torch._dynamo.reset()
    counters.clear()
    done = vitscore("run", "demo", *models, "--device", "cuda", "--compile", "-b", 96, "-o", tmp_path / "gpu")
    assert done.code == 0, done.err
    assert "AUTOTUNE" not in done.err
    assert counters["stats"]["unique_graphs"] == 2
    assert vitscore("run", "demo", *models, "--device", "cpu", "-o", tmp_path / "cpu").code == 0
    results, wanted = (load_run(tmp_path / name).predictions() for name in ("gpu", "cpu"))
    for name in ("demo-vit", "demo-clip"):
        is_clear = wanted[f"{name}.prob"].to_numpy() > 0.9
        column = f"{name}.pred"
        assert (results[column].to_numpy()[is_clear] == wanted[column].to_numpy()[is_clear]).all()

"""Audit of a run's preprocessing and precision on its first images.

After the loop, rank 0 scores the first images again: with pixels from the checkpoint's own processor, as transformers
would make them, and with an fp32 trunk. The differences in pixels and predictions go into run.json; the parts are not
affected.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from vitscore.decode.pixels import Decoded
from vitscore.engine.cuda_memory import is_out_of_memory
from vitscore.engine.forward_cpu import Forward
from vitscore.engine.ranked import Ranked

if TYPE_CHECKING:
    from vitscore.models.image_model import ImageModel

AUDITED_IMAGES = 64
Array = np.ndarray[Any, Any]


class Answers(NamedTuple):
    """A model's top-1 answers for N images."""

    pred: Array
    prob: Array
    is_finite: Array

    @classmethod
    def of(cls, ranked: Ranked) -> Answers:
        return cls(ranked.predictions.pred, ranked.predictions.prob, ranked.is_finite)


class Classify(Protocol):
    """Function that computes a model's answers for pixels."""

    def __call__(self, model: ImageModel, pixels: torch.Tensor) -> Answers: ...


class Audit:
    """Keeps the first images of a run, encoded and decoded, and the run's answers for them.

    Args:
        num_images: how many images to keep; 0 for none.
    """

    def __init__(self, num_images: int) -> None:
        self._left = num_images
        self._encoded: list[Array] = []
        self._pixels: list[tuple[torch.Tensor, ...]] = []
        self._answers: dict[str, list[Answers]] = {}

    def keep(self, encoded: Sequence[Array], decoded: Decoded) -> Sequence[int]:
        """Keep good images of a batch until there are enough; return their rows."""
        if not self._left:
            return ()
        rows = [row for row in range(len(encoded)) if row not in decoded.faults][: self._left]
        self._left -= len(rows)
        # Copied: the images of a batch are views that keep whole blocks of a shard in memory.
        self._encoded += [encoded[row].copy() for row in rows]
        self._pixels += [tuple(pixels[row].cpu().clone() for pixels in decoded.pixels) for row in rows]
        return rows

    def add_answers(self, rows: Sequence[int], outputs: Mapping[str, Ranked]) -> None:
        """Add the run's answers for the rows of a batch that `keep` returned."""
        for name, ranked in outputs.items():
            self._answers.setdefault(name, []).append(Answers(*(column[rows] for column in Answers.of(ranked))))

    def findings(
        self,
        models: Sequence[ImageModel],
        source: Mapping[str, int],
        *,
        batch_size: int,
        precision: str,
        num_threads: int,
    ) -> dict[str, dict[str, Any]]:
        """Return `images`, `against_processor` and `against_fp32` by model; None for a comparison that was not made.

        Args:
            models: the run's models, idle by now.
            source: for each model, the index of its geometry among the decoder's.
            batch_size: rows of every forward.
            precision: the run's precision.
            num_threads: how many batches, or images in a processor, are computed in parallel.
        """
        findings: dict[str, dict[str, Any]] = {}
        if not self._pixels:
            return findings
        classify = partial(_classify, batch_size=batch_size, num_threads=num_threads)
        with warnings.catch_warnings(), ThreadPoolExecutor(num_threads, thread_name_prefix="audit") as pool:
            warnings.simplefilter("ignore")
            for model in models:
                pixels = torch.stack([kept[source[model.name]] for kept in self._pixels])
                recorded = self._answers.get(model.name)
                # With --augment or --tta the run has no answers for the unmodified images.
                ours = _joined(recorded) if recorded else classify(model, pixels)
                findings[model.name] = {
                    "images": len(pixels),
                    "against_processor": self._against_processor(model, pixels, ours, classify, pool),
                    "against_fp32": _against_fp32(model, pixels, ours, classify) if precision != "fp32" else None,
                }
        return findings

    def _against_processor(
        self, model: ImageModel, pixels: torch.Tensor, ours: Answers, classify: Classify, pool: ThreadPoolExecutor
    ) -> dict[str, Any] | None:
        """Compare with the processor; None if the run uses the processor's pixels or the processor fails."""
        if model.has_own_pixels:
            return None
        try:
            compared = list(pool.map(partial(_compared, model.processor), self._encoded, pixels))
        # Pillow or the processor may refuse an image that the decoder accepted; an audit must not end a run.
        except Exception:
            return None
        levels = sum(level for _, level in compared) / len(compared)
        # Equal pixels give equal answers.
        differ = [row for row, (theirs, _) in enumerate(compared) if theirs is not None]
        theirs = [pixels_HWC for pixels_HWC, _ in compared if pixels_HWC is not None]
        ours = Answers(*(column[differ] for column in ours))
        return {"mean_levels": levels, **_difference(ours, classify(model, torch.stack(theirs)) if theirs else ours)}


def _against_fp32(model: ImageModel, pixels: torch.Tensor, ours: Answers, classify: Classify) -> dict[str, Any] | None:
    """Compare with an fp32 trunk; None if the GPU has no memory for it, since an audit must not end a run."""
    try:
        return _difference(ours, classify(model.fp32_twin(), pixels))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _classify(model: ImageModel, pixels: torch.Tensor, *, batch_size: int, num_threads: int) -> Answers:
    """Return a model's answers for (N, ...) pixels, in the run's batch shape; on a CPU several batches in parallel."""
    batches = pixels.split(batch_size)  # type: ignore[no-untyped-call]
    forward = Forward(
        [model],
        batch_size=batch_size,
        top_k=1,
        save=(),
        num_workers=min(num_threads, len(batches)) if model.is_on_cpu else 0,
        has_fp32_rerun=False,
    )
    with contextlib.closing(forward):
        under_way = [forward.submit(Decoded((batch,)), np.full(len(batch), -1, np.int32)) for batch in batches]
        return _joined([Answers.of(future.result()[model.name]) for future in under_way])


def _joined(answers: Sequence[Answers]) -> Answers:
    return Answers(*map(np.concatenate, zip(*answers, strict=True)))


def _compared(processor: Any, encoded: Array, ours_HWC: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Return the processor's pixels of an image (None if equal to ours) and the mean difference in levels of 255."""
    from PIL import Image
    from transformers.image_utils import load_image

    with Image.open(io.BytesIO(bytes(encoded))) as opened:
        processed = processor(images=load_image(opened), do_rescale=False, do_normalize=False, return_tensors="pt")
    theirs_HWC = processed["pixel_values"][0].permute(1, 2, 0).float()
    rounded_HWC = theirs_HWC.clamp(0, 255).round().to(torch.uint8)
    level = float((theirs_HWC - ours_HWC).abs().mean())
    return None if torch.equal(rounded_HWC, ours_HWC) else rounded_HWC, level


def _difference(ours: Answers, other: Answers) -> dict[str, Any]:
    prob_differences = np.abs(ours.prob - other.prob)[ours.is_finite & other.is_finite]
    return {
        "top1_differs": int((ours.pred != other.pred).sum()),
        "largest_prob_difference": float(prob_differences.max(initial=0.0)),
    }

"""What a run's preprocessing and precision change: its first images once more, in the plain way.

After the loop, on the first rank: the first images go through the checkpoint's own processor, as transformers would
have them, and through an fp32 trunk; how far pixels and predictions are apart goes into run.json. Nothing of it reaches
the parts.
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


class Said(NamedTuple):
    """What a model answers to N images."""

    pred: Array
    prob: Array
    is_finite: Array

    @classmethod
    def of(cls, ranked: Ranked) -> Said:
        return cls(ranked.predictions.pred, ranked.predictions.prob, ranked.is_finite)


class Answer(Protocol):
    """What a model says to pixels."""

    def __call__(self, model: ImageModel, pixels: torch.Tensor) -> Said: ...


class Audit:
    """Keeps the first images of a run, encoded and decoded, and what the run answered.

    Args:
        num_images: how many; 0 for none.
    """

    def __init__(self, num_images: int) -> None:
        self._left = num_images
        self._encoded: list[Array] = []
        self._pixels: list[tuple[torch.Tensor, ...]] = []
        self._said: dict[str, list[Said]] = {}

    def keep(self, encoded: Sequence[Array], decoded: Decoded) -> Sequence[int]:
        """Take the good images of a batch, as long as there is room; returns their rows."""
        if not self._left:
            return ()
        rows = [row for row in range(len(encoded)) if row not in decoded.faults][: self._left]
        self._left -= len(rows)
        # Copies: what a batch holds are views of whole blocks of a shard.
        self._encoded += [encoded[row].copy() for row in rows]
        self._pixels += [tuple(pixels[row].cpu().clone() for pixels in decoded.pixels) for row in rows]
        return rows

    def hear(self, rows: Sequence[int], outputs: Mapping[str, Ranked]) -> None:
        """Take what the run answered to the images that `keep` took of a batch, just as they were decoded."""
        for name, ranked in outputs.items():
            self._said.setdefault(name, []).append(Said(*(column[rows] for column in Said.of(ranked))))

    def findings(
        self,
        models: Sequence[ImageModel],
        source: Mapping[str, int],
        *,
        batch_size: int,
        precision: str,
        num_threads: int,
    ) -> dict[str, dict[str, Any]]:
        """By model: `images`, `against_processor` and `against_fp32`; None for what there is nothing to say of.

        Args:
            models: idle.
            source: for each model which of the decoder's geometries is its own.
            batch_size: rows of every forward.
            precision: the run's.
            num_threads: batches, and images of a processor, side by side.
        """
        found: dict[str, dict[str, Any]] = {}
        if not self._pixels:
            return found
        answer = partial(_answers, batch_size=batch_size, num_threads=num_threads)
        with warnings.catch_warnings(), ThreadPoolExecutor(num_threads, thread_name_prefix="audit") as pool:
            warnings.simplefilter("ignore")
            for model in models:
                pixels = torch.stack([kept[source[model.name]] for kept in self._pixels])
                said = self._said.get(model.name)
                # A run that changes its images first, or averages over views, has not answered to these.
                ours = _joined(said) if said else answer(model, pixels)
                found[model.name] = {
                    "images": len(pixels),
                    "against_processor": self._against_processor(model, pixels, ours, answer, pool),
                    "against_fp32": _against_fp32(model, pixels, ours, answer) if precision != "fp32" else None,
                }
        return found

    def _against_processor(
        self, model: ImageModel, pixels: torch.Tensor, ours: Said, answer: Answer, pool: ThreadPoolExecutor
    ) -> dict[str, Any] | None:
        """None where the run's pixels are the processor's own anyway, or it can't make any of these images."""
        if model.has_own_pixels:
            return None
        try:
            compared = list(pool.map(partial(_compared, model.processor), self._encoded, pixels))
        # Pillow or the processor may refuse what the decoder took; an audit must not end a run.
        except Exception:
            return None
        levels = sum(level for _, level in compared) / len(compared)
        # Where the pixels are the same, so are the answers.
        differ = [row for row, (theirs, _) in enumerate(compared) if theirs is not None]
        theirs = [each for each, _ in compared if each is not None]
        ours = Said(*(column[differ] for column in ours))
        return {"mean_levels": levels, **_difference(ours, answer(model, torch.stack(theirs)) if theirs else ours)}


def _against_fp32(model: ImageModel, pixels: torch.Tensor, ours: Said, answer: Answer) -> dict[str, Any] | None:
    """None where a GPU has no memory for it; an audit must not end a run."""
    try:
        return _difference(ours, answer(model.fp32_twin(), pixels))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def _answers(model: ImageModel, pixels: torch.Tensor, *, batch_size: int, num_threads: int) -> Said:
    """A model's first answers to (N, ...) pixels, by batches of the run's one shape; on a CPU several side by side."""
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
        return _joined([Said.of(each.result()[model.name]) for each in under_way])


def _joined(said: Sequence[Said]) -> Said:
    return Said(*map(np.concatenate, zip(*said, strict=True)))


def _compared(processor: Any, encoded: Array, ours_HWC: torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """An image's pixels by its processor, None where they are ours to the bit; the mean difference in levels of 255."""
    from PIL import Image
    from transformers.image_utils import load_image

    with Image.open(io.BytesIO(bytes(encoded))) as opened:
        found = processor(images=load_image(opened), do_rescale=False, do_normalize=False, return_tensors="pt")
    theirs_HWC = found["pixel_values"][0].permute(1, 2, 0).float()
    rounded_HWC = theirs_HWC.clamp(0, 255).round().to(torch.uint8)
    level = float((theirs_HWC - ours_HWC).abs().mean())
    return None if torch.equal(rounded_HWC, ours_HWC) else rounded_HWC, level


def _difference(ours: Said, other: Said) -> dict[str, Any]:
    prob_differences = np.abs(ours.prob - other.prob)[ours.is_finite & other.is_finite]
    return {
        "top1_differs": int((ours.pred != other.pred).sum()),
        "largest_prob_difference": float(prob_differences.max(initial=0.0)),
    }

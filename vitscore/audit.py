"""What a run's preprocessing and precision change: its first images once more, in the plain way.

After the loop, on the first rank: the first images go through the checkpoint's own processor, as transformers would
have them, and through an fp32 trunk; how far pixels and predictions are apart goes into run.json. Nothing of it reaches
the parts.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vitscore import kernels
from vitscore.decode import Decoded

if TYPE_CHECKING:
    from vitscore.models import ImageModel, ModelOutput

AUDITED_IMAGES = 64
Array = np.ndarray[Any, Any]


class Audit:
    """Keeps the first images of a run, encoded and decoded.

    Args:
        num_images: how many; 0 for none.
    """

    def __init__(self, num_images: int) -> None:
        self._left = num_images
        self._encoded: list[Array] = []
        self._pixels: list[tuple[torch.Tensor, ...]] = []

    def keep(self, encoded: Sequence[Array], decoded: Decoded) -> None:
        """Take the good images of a batch, as long as there is room."""
        if not self._left:
            return
        rows = [row for row in range(len(encoded)) if row not in decoded.faults][: self._left]
        self._left -= len(rows)
        # Copies: what a batch holds are views of whole blocks of a shard.
        self._encoded += [encoded[row].copy() for row in rows]
        self._pixels += [tuple(pixels[row].cpu().clone() for pixels in decoded.pixels) for row in rows]

    def findings(
        self, models: Sequence[ImageModel], source: Mapping[str, int], *, batch_size: int, precision: str
    ) -> dict[str, dict[str, Any]]:
        """By model: `images`, `against_processor` and `against_fp32`; None for what there is nothing to say of.

        Args:
            models: idle.
            source: for each model which of the decoder's geometries is its own.
            batch_size: rows of every forward.
            precision: the run's.
        """
        found = {}
        for model in models if self._pixels else ():
            pixels = torch.stack([kept[source[model.name]] for kept in self._pixels])
            scores = _scores(model, pixels, batch_size)
            fp32 = _scores(model.rerun_fp32, pixels, batch_size) if precision != "fp32" else None
            found[model.name] = {
                "images": len(pixels),
                "against_processor": self._against_processor(model, pixels, scores, batch_size),
                "against_fp32": _difference(scores, fp32),
            }
        return found

    def _against_processor(
        self, model: ImageModel, pixels: torch.Tensor, scores: kernels.RowScores, batch_size: int
    ) -> dict[str, Any] | None:
        """None where the run's pixels are the processor's own anyway, or it can't make any of these images."""
        if model.has_own_pixels:
            return None
        try:
            theirs = torch.stack([_raw_pixels(model.processor, bytes(content)) for content in self._encoded])
        # Pillow or the processor may refuse what the decoder took; an audit must not end a run.
        except Exception:
            return None
        levels = float((theirs - pixels.float()).abs().mean())
        rounded = theirs.clamp(0, 255).round().to(torch.uint8)
        return {"mean_levels": levels, **(_difference(scores, _scores(model, rounded, batch_size)) or {})}


def _raw_pixels(processor: Any, encoded: bytes) -> torch.Tensor:
    """An image after the processor's resize and crop: float32 (H, W, 3) in levels of 0 to 255."""
    from PIL import Image
    from transformers.image_utils import load_image

    with warnings.catch_warnings(), Image.open(io.BytesIO(encoded)) as opened:
        warnings.simplefilter("ignore")
        found = processor(images=load_image(opened), do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels: torch.Tensor = found["pixel_values"][0].permute(1, 2, 0).float()
    return pixels


def _scores(forward: Callable[[torch.Tensor], ModelOutput], pixels: torch.Tensor, batch_size: int) -> kernels.RowScores:
    """The first answers, by batches of the run's one shape."""
    logits = []
    for start in range(0, len(pixels), batch_size):
        batch = pixels[start : start + batch_size]
        missing = batch.new_zeros((batch_size - len(batch), *batch.shape[1:]))
        logits.append(forward(torch.cat([batch, missing])).logits[: len(batch)].cpu().numpy())
    return kernels.score_rows(np.concatenate(logits), np.full(len(pixels), -1, np.int32), 1)


def _difference(ours: kernels.RowScores, other: kernels.RowScores | None) -> dict[str, Any] | None:
    if other is None:
        return None
    prob_differences = np.abs(ours.prob - other.prob)[ours.is_finite & other.is_finite]
    return {
        "top1_differs": int((ours.pred != other.pred).sum()),
        "largest_prob_difference": float(prob_differences.max(initial=0.0)),
    }

"""Load a checkpoint into an `ImageModel`, text weights included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitscore.classes.matching import HeadMap, plain_names
from vitscore.models.checkpoint import Checkpoint
from vitscore.models.image_model import ClassHead, ImageModel, Placement
from vitscore.models.loading import load_weights
from vitscore.models.zeroshot import DEFAULT_TEMPLATES, zero_shot_weights


@dataclass(frozen=True)
class HeadSpec:
    """The classes that a model has to answer in, and how it gets to them."""

    classes: Sequence[str]
    """The data set's classes, by display name."""
    head_map: HeadMap | None = None
    """A classifier's columns for the classes; None for a zero-shot model."""
    templates: Sequence[str] = DEFAULT_TEMPLATES
    """Captions for a zero-shot model."""


def load_model(
    checkpoint: Checkpoint,
    *,
    name: str,
    head: HeadSpec,
    placement: Placement,
    save_embeddings: bool = False,
    cache_dir: Path | None = None,
    fingerprint: str | None = None,
) -> ImageModel:
    """Load a checkpoint as a model that answers in the data set's classes; the caller warms it up.

    Args:
        checkpoint: the result of `checkpoint.find`.
        name: the model's name in the run.
        head: the classes.
        placement: device, precision and compilation.
        save_embeddings: return embeddings with the logits.
        cache_dir: folder of the text weights that are kept between runs; None keeps none.
        fingerprint: the checkpoint's, if it is known already; text weights are kept under it.

    Raises:
        SetupError: the weights do not fill the model, or its files cannot be loaded.
    """
    loaded = load_weights(checkpoint).to(placement.device)
    weights_KD = None
    if checkpoint.kind == "zero-shot":
        weights_KD = zero_shot_weights(
            checkpoint,
            loaded,
            classes=plain_names(head.classes),
            templates=head.templates,
            device=placement.device,
            cache_dir=cache_dir,
            fingerprint=fingerprint,
        )
    columns = head.head_map.columns if head.head_map else ()
    return ImageModel(
        checkpoint,
        name=name,
        head=ClassHead(len(head.classes), columns, weights_KD),
        placement=placement,
        save_embeddings=save_embeddings,
        loaded=loaded,
    )

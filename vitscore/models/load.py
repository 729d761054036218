"""Load a checkpoint into an `ImageModel`, text weights included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitscore.classes.matching import HeadMap, plain_names
from vitscore.models.checkpoint import Checkpoint
from vitscore.models.image_model import ImageModel, Precision
from vitscore.models.loading import load_weights
from vitscore.models.zeroshot import zero_shot_weights


def load_model(
    checkpoint: Checkpoint,
    *,
    name: str,
    classes: Sequence[str],
    head_map: HeadMap | None,
    templates: Sequence[str],
    device: str,
    precision: Precision,
    compile: bool,
    batch_size: int | None,
    save_embeddings: bool = False,
    cache_dir: Path | None = None,
    fingerprint: str | None = None,
) -> ImageModel:
    """Load a checkpoint and make it answer in the data set's classes.

    Args:
        checkpoint: what `checkpoints.find` found.
        name: the model's name in the run.
        classes: the data set's classes, by display name.
        head_map: a classifier's columns for the classes; None for a zero-shot model.
        templates: captions for a zero-shot model.
        device: "cpu", "cuda" or "cuda:N".
        precision: of the trunk; heads are fp32.
        compile: compile the model for batches of `batch_size`.
        batch_size: rows of every batch to come; None where they are not known yet, and the caller warms up.
        save_embeddings: give embeddings out with the logits.
        cache_dir: where text weights are kept between runs; None keeps none.
        fingerprint: the checkpoint's, where it is known already; text weights are kept under it.

    Raises:
        SetupError: the weights do not fill the model, or its files cannot be loaded.
    """
    loaded = load_weights(checkpoint).to(device)
    weights_KD = None
    if checkpoint.kind == "zero-shot":
        weights_KD = zero_shot_weights(
            checkpoint,
            loaded,
            classes=plain_names(classes),
            templates=templates,
            device=device,
            cache_dir=cache_dir,
            fingerprint=fingerprint,
        )
    model = ImageModel(
        checkpoint,
        name=name,
        classes=classes,
        head_map=head_map,
        device=device,
        precision=precision,
        compile=compile,
        save_embeddings=save_embeddings,
        text_weights_KD=weights_KD,
        loaded=loaded,
    )
    if compile and batch_size is not None:
        model.warm_up(batch_size)
    return model

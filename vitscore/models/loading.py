"""Load weights and image processor of a checkpoint with transformers.

`image_model.py` makes a function of them. Decoding reads the processor's geometry from here and may start before the
weights are loaded. Errors of transformers become one line, and missing weights are never filled with random numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from vitscore.errors import SetupError
from vitscore.models.checkpoint import Checkpoint
from vitscore.preprocess import (
    Geometry,
    Inexpressible,
    ProcessorGeometry,
    Spec,
    interpolation_of,
    processor_geometry,
    spec_from_processor,
)

_MAX_KEYS = 5


def load_weights(checkpoint: Checkpoint) -> Any:
    """Return the transformers model in fp32, with every parameter from the checkpoint.

    Raises:
        SetupError: a parameter is missing or has another shape (transformers would fill it with random numbers), or the
            folder cannot be loaded.
    """
    from transformers import AutoModelForImageClassification, CLIPModel

    auto = AutoModelForImageClassification if checkpoint.kind == "classifier" else CLIPModel
    with reading(checkpoint, "weights"):
        # Attention is sdpa if the architecture has it: transformers' default.
        model, info = auto.from_pretrained(
            checkpoint.path,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    absent = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if absent:
        shown = ", ".join(absent[:_MAX_KEYS]) + (
            f" and {len(absent) - _MAX_KEYS} more" if len(absent) > _MAX_KEYS else ""
        )
        raise SetupError(
            "weights do not fill the model",
            where=checkpoint.source,
            expected=f"every parameter of {type(model).__name__}",
            got=f"missing or of another shape: {shown}",
            next_step="Take a fine-tuned checkpoint: one with a trained head.",
        )
    return model.eval()


def load_processor(checkpoint: Checkpoint) -> Any:
    """Return the checkpoint's image processor, as transformers loads it.

    Raises:
        SetupError: there is none, or it cannot be loaded.
    """
    from transformers import AutoImageProcessor

    with reading(checkpoint, "image processor"):
        return AutoImageProcessor.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)


def spec_of(checkpoint: Checkpoint, processor: Any) -> tuple[Spec | ProcessorGeometry, tuple[str, ...]]:
    """Return a checkpoint's preprocessing as a spec, or if none expresses it the processor's geometry; and notes.

    Raises:
        SetupError: its images make no batch, or the processor fails on a plain image.
    """
    with reading(checkpoint, "image processor"):
        try:
            spec = spec_from_processor(processor)
            return spec, _notes_of(spec, processor)
        except Inexpressible as reason:
            note = f"its images go through {type(processor).__name__} itself, which is slower: {reason}"
        try:
            return processor_geometry(processor), (note,)
        except Inexpressible as reason:
            raise SetupError("image processor cannot be used", where=checkpoint.source, got=str(reason)) from reason


def _notes_of(spec: Spec, processor: Any) -> tuple[str, ...]:
    if interpolation_of(processor) == spec.geometry.interpolation:
        return ()
    return ("its images are resized by bicubic instead of lanczos, as its processor does with this torchvision",)


def geometry_of(checkpoint: Checkpoint) -> Geometry | ProcessorGeometry:
    """Return the geometry of a checkpoint's pixels without reading its weights.

    Raises:
        SetupError: it has no processor, or its images make no batch.
    """
    spec, _ = spec_of(checkpoint, load_processor(checkpoint))
    return spec.geometry if isinstance(spec, Spec) else spec


@contextlib.contextmanager
def reading(checkpoint: Checkpoint, what: str) -> Iterator[None]:
    """Silence transformers while it reads a checkpoint, and turn its errors into one line."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, SafetensorError) as error:
        first_line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise SetupError(
            f"cannot load the {what}",
            where=checkpoint.source,
            got=f"{type(error).__name__}: {first_line[:160]}",
            next_step="Check that the folder is complete, as save_pretrained writes it.",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()

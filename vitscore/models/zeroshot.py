"""The head of a zero-shot model: one text weight for each class, computed from captions.

`--templates` and the class names give the captions, and the text tower gives their embeddings. A class's weight is
their average, computed as in OpenAI's zero-shot code: normalise every caption's embedding, average over the templates,
normalise again. Weights are in fp32 and cached by content, because a thousand classes times eighty templates take
longer than many runs. `image_model.py` has the image side.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitscore.errors import SetupError, UsageError
from vitscore.models import checkpoint as checkpoints
from vitscore.models.checkpoint import Checkpoint
from vitscore.models.loading import reading

if TYPE_CHECKING:
    import torch

# Axes: K classes, T templates, N captions of a batch, L tokens, D the projection's width.

DEFAULT_TEMPLATES = ("This is a photo of {}.",)
_PLACEHOLDERS = ("{c}", "{}")
_BATCH_ROWS = 64
_CACHE_VERSION = 1


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Read templates from a text file, one per line.

    Raises:
        UsageError: the file cannot be read, is empty, or has a line without a placeholder for the class.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("cannot read templates", where=str(path), got=type(error).__name__) from error
    return check_templates([line.strip() for line in lines if line.strip()], where=str(path))


def check_templates(templates: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Return the templates after checking that all of them have `{c}` or `{}`.

    Raises:
        UsageError: there are none, or one has no placeholder for the class.
    """
    if not templates:
        raise UsageError("no templates", where=where, expected="one per line, with {} for the class")
    for number, template in enumerate(templates, start=1):
        if not any(placeholder in template for placeholder in _PLACEHOLDERS):
            raise UsageError(
                "template without a class",
                where=f"{where}, template {number}",
                expected="{c} or {}",
                got=repr(template),
            )
    return tuple(templates)


def caption(template: str, name: str) -> str:
    """Return the template with the class's name in place of its first kind of placeholder; braces in it are kept."""
    placeholder = next(placeholder for placeholder in _PLACEHOLDERS if placeholder in template)
    return template.replace(placeholder, name)


def text_weights(
    model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[str], device: str
) -> torch.Tensor:
    """Return a unit vector for each class.

    Args:
        model: a CLIP model in fp32, on `device`.
        tokenizer: its tokenizer.
        classes: class names as they should appear in captions.
        templates: captions with `{c}` or `{}`.
        device: the device that computes.

    Returns:
        float32 (K, D), on `device`.

    Raises:
        SetupError: tokenizer and model do not match, or an embedding is not finite.
    """
    import torch

    text_config = model.config.text_config
    length = int(text_config.max_position_embeddings)
    # OpenAI's first checkpoints have a wrong 2 here; transformers then takes the highest id for the end token.
    if text_config.eos_token_id not in (2, tokenizer.eos_token_id):
        raise SetupError(
            "tokenizer and model do not match",
            where="end token",
            expected=f"id {text_config.eos_token_id}, the model's",
            got=str(tokenizer.eos_token_id),
            next_step="Save the checkpoint's own tokenizer beside it.",
        )
    weights = []
    # In steps of a few classes: eighty templates times many classes would fill the memory.
    step = max(1, 4096 // len(templates))
    for start in range(0, len(classes), step):
        names = classes[start : start + step]
        captions = [caption(template, name) for name in names for template in templates]
        embedding_ND = _embed(model, tokenizer, captions, length=length, device=device)
        unit_ND = embedding_ND / embedding_ND.norm(dim=-1, keepdim=True)
        mean_KD = unit_ND.view(len(names), len(templates), -1).mean(dim=1)
        weights.append(mean_KD / mean_KD.norm(dim=-1, keepdim=True))
    weights_KD = torch.cat(weights)
    if not bool(torch.isfinite(weights_KD).all()):
        raise SetupError("text embeddings are not finite", where="zero-shot model", next_step="Check the checkpoint.")
    return weights_KD


def _embed(model: Any, tokenizer: Any, captions: Sequence[str], *, length: int, device: str) -> torch.Tensor:
    """Return text embeddings in the captions' order; captions of similar length share a batch.

    All batches are full, which gives the same bits for any number of threads: a caption is repeated to fill the last.
    """
    import torch

    tokens = [tokenize(tokenizer, text, length=length) for text in captions]
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    embeddings: list[torch.Tensor] = [torch.empty(0)] * len(tokens)
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH_ROWS):
            rows = order[start : start + _BATCH_ROWS]
            filled = rows + rows[-1:] * (_BATCH_ROWS - len(rows))
            batch = tokenizer.pad({"input_ids": [tokens[row] for row in filled]}, padding=True, return_tensors="pt")
            batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
            embedding_ND = model.get_text_features(**batch).pooler_output.float()
            for row, embedding in zip(rows, embedding_ND, strict=False):
                embeddings[row] = embedding
    return torch.stack(embeddings)


def tokenize(tokenizer: Any, text: str, *, length: int) -> list[int]:
    """Return token ids, truncated to the model's length but with the end token, at which CLIP reads its embedding.

    Raises:
        SetupError: the tokenizer adds no end token.
    """
    # The tokenizer's `model_max_length` may be 1e30, so the length comes from the model.
    ids = [int(token) for token in tokenizer(text, truncation=True, max_length=length)["input_ids"]]
    if tokenizer.eos_token_id not in ids:
        raise SetupError(
            "tokenizer without end token",
            where=type(tokenizer).__name__,
            expected=f"{tokenizer.eos_token} after every text",
            next_step="Save the tokenizer that belongs to the CLIP model beside it.",
        )
    return ids


def default_cache() -> Path:
    """Return the folder that keeps text weights between runs, in XDG_CACHE_HOME or else in ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vitscore"


def cache_key(fingerprint: str, classes: Sequence[str], templates: Sequence[str], device: str) -> str:
    """Hash all that decides the weights to the last bit: the model's content, texts, device and torch's version."""
    import torch

    content = [_CACHE_VERSION, fingerprint, list(classes), list(templates), device.split(":")[0], torch.__version__]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def load_cached(folder: Path, key: str, *, num_classes: int) -> torch.Tensor | None:
    """Read weights that were stored before; return None if there are none or the file is damaged."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights_KD = load_file(folder / f"text-{key}.safetensors")["weights"]
    except (OSError, KeyError, SafetensorError):
        return None
    is_good = weights_KD.dtype == torch.float32 and weights_KD.ndim == 2 and len(weights_KD) == num_classes
    return weights_KD if is_good and bool(torch.isfinite(weights_KD).all()) else None


def store(folder: Path, key: str, weights_KD: torch.Tensor) -> None:
    """Write the weights atomically; ignore a cache that cannot be written."""
    from safetensors.torch import save

    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")
    except OSError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save({"weights": weights_KD.cpu().contiguous()}))
        os.replace(temporary, folder / f"text-{key}.safetensors")
    except OSError:
        Path(temporary).unlink(missing_ok=True)


def zero_shot_weights(
    checkpoint: Checkpoint,
    loaded: Any,
    *,
    classes: Sequence[str],
    templates: Sequence[str],
    device: str,
    cache_dir: Path | None,
    fingerprint: str | None,
) -> torch.Tensor:
    """Return text weights (K, D) from the cache, or compute them with the text tower and cache them."""
    from transformers import AutoTokenizer

    key = ""
    if cache_dir is not None:
        key = cache_key(fingerprint or checkpoints.fingerprint(checkpoint), classes, templates, device)
        cached = load_cached(cache_dir, key, num_classes=len(classes))
        if cached is not None:
            return cached.to(device)
    with reading(checkpoint, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    weights_KD = text_weights(loaded, tokenizer, classes, templates, device)
    if cache_dir is not None:
        store(cache_dir, key, weights_KD)
    return weights_KD

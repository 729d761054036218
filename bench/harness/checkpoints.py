"""Checkpoints for the benches: the sizes that people use, with random weights, in the standard files.

What a forward costs does not depend on what the weights are, and nothing has to be fetched. Predictions mean nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CLASSES = tuple(f"class {number}" for number in range(10))

# What differs from the defaults of transformers' configurations, which are ViT-B/16 and CLIP B/32, 224 pixels each.
VITS: dict[str, dict[str, int]] = {
    "vit-tiny": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "vit-base": {},
    "vit-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
CLIPS: dict[str, dict[str, Any]] = {
    "clip-tiny": {
        "projection_dim": 256,
        "vision_config": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "patch_size": 16},
        "text_config": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    },
    "clip-base-32": {},
    "clip-large-14": {
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "patch_size": 14,
        },
        "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    },
}
KINDS = (*VITS, *CLIPS)


def make_checkpoint(folder: Path, *, kind: str = "vit-tiny") -> None:
    """Write a checkpoint of this kind, the same one every time.

    Args:
        folder: made where it does not exist.
        kind: one of `KINDS`; a classifier answers in `CLASSES`.
    """
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    if kind in VITS:
        _make_vit(folder, VITS[kind])
    else:
        _make_clip(folder, CLIPS[kind])


def _make_vit(folder: Path, size: dict[str, int]) -> None:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    label2id = {name: number for number, name in enumerate(CLASSES)}
    config = ViTConfig(**size, id2label=dict(enumerate(CLASSES)), label2id=label2id)
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)


def _make_clip(folder: Path, size: dict[str, Any]) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from vitscore.demo.captions import make_tokenizer

    tokenizer = make_tokenizer()
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**size.get("text_config", {}), **marks}
    CLIPModel(CLIPConfig(**{**size, "text_config": text})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)

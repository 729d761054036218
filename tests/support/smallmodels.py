"""Small checkpoints with random weights, saved by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

EDGE = 32
WORDS = "a photo of this is the bad drawing cat dog owl crane bird big small . , [ ] 0 1 2".split()
VISION = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": EDGE,
    "patch_size": 8,
    "initializer_range": 0.3,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def save_vit(folder: Path, names: tuple[str, ...], *, seed: int = 0, processor: Any = None, **config: Any) -> Path:
    """Save a classifier of 32 x 32 images."""
    torch.manual_seed(seed)
    by_id = dict(enumerate(names))
    settings = {**VISION, "id2label": by_id, "label2id": {name: index for index, name in by_id.items()}, **config}
    ViTForImageClassification(ViTConfig(**settings)).save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": EDGE, "width": EDGE})).save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word, `<s>` before and `</s>` after every text, and no length limit."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", *WORDS, "<s>", "</s>"])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    marks = [(mark, vocabulary[mark]) for mark in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_clip(folder: Path, *, seed: int = 0, max_tokens: int = 16) -> Path:
    """Save a CLIP for images of 32 x 32 pixels and texts of `max_tokens` tokens."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    text = {
        **TEXT,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_tokens,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**VISION, "initializer_factor": 3.0}
    config = CLIPConfig(vision_config=vision, text_config={**text, "initializer_factor": 3.0}, projection_dim=24)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": EDGE, "width": EDGE}
    CLIPImageProcessor(size={"shortest_edge": EDGE}, crop_size=size).save_pretrained(folder)
    return folder

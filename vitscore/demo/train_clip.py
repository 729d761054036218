"""Train `demo-clip`: a small CLIPModel with image and text towers, from scratch on images and captions.

One of the two trainings of `vitscore.demo.make`. Each image of a batch is paired with a random caption of its class.
With ten classes many captions of a batch fit an image, so its target is spread evenly over all of them: with one-hot
targets the loss would push the image away from captions as correct as its own. The checkpoint has the files of any CLIP
checkpoint (config.json, model.safetensors, preprocessor_config.json, the tokenizer's files) and no others.

Axes: B images, and as many captions. Rows of logits are images, columns captions.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, set_seed

from vitscore.demo.augment import WarpedDigits
from vitscore.demo.captions import MAX_TOKENS, captions_of, make_tokenizer
from vitscore.demo.digits import CLASSES, SIZE, Digits

NUM_EPOCHS = 70
BATCH_SIZE = 96
LEARNING_RATE = 2e-3
WARMUP = 0.05  # share of the steps
MAX_LOGIT_SCALE = math.log(30)  # CLIP allows 100; with ten classes that only makes wrong answers more confident


def train_clip(training: Digits, folder: Path, *, seed: int) -> None:
    """Train from the seed and save into `folder`."""
    set_seed(seed)
    tokenizer = make_tokenizer()
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    model = CLIPModel(clip_config(tokenizer))
    loader = DataLoader(
        WarpedDigits(training, processor, seed=seed),
        batch_size=BATCH_SIZE,
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
    )
    fit(model, loader, tokenizer, random.Random(seed))
    # A tokenizer that has padded a batch saves that padding as its default, so a new one is saved.
    for part in (model, processor, make_tokenizer()):
        part.save_pretrained(folder)


def clip_config(tokenizer: Any) -> Any:
    tower: dict[str, Any] = {"num_attention_heads": 4, "projection_dim": 64}
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPConfig(
        projection_dim=64,
        text_config=tower
        | marks
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
        },
        vision_config=tower
        | {
            "image_size": SIZE,
            "patch_size": 8,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
        },
    )


def fit(model: Any, loader: DataLoader[dict[str, Any]], tokenizer: Any, chance: random.Random) -> None:
    """Train with AdamW, a warm-up and a cosine schedule down to zero."""
    captions = [captions_of(label) for label in range(len(CLASSES))]
    num_steps = NUM_EPOCHS * len(loader)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at((step + 1) / num_steps))
    model.train()
    for _ in range(NUM_EPOCHS):
        for batch in loader:
            texts = [chance.choice(captions[label]) for label in batch["labels"].tolist()]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            logits_BB = model(pixel_values=batch["pixel_values"], **tokens).logits_per_image
            loss = contrastive_loss(logits_BB, batch["labels"])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    model.eval()


def rate_at(progress: float) -> float:
    """Return the factor of the learning rate, 0 to 1, at a point of the training, 0 to 1."""
    return min(progress / WARMUP, (1 + math.cos(math.pi * progress)) / 2)


def contrastive_loss(logits_BB: Tensor, labels_B: Tensor) -> Tensor:
    """Return the cross entropy in both directions, with each target spread over all pairs of the same class."""
    same_BB = (labels_B[:, None] == labels_B[None, :]).float()
    target_BB = same_BB / same_BB.sum(dim=1, keepdim=True)
    by_image = functional.cross_entropy(logits_BB, target_BB)
    by_text = functional.cross_entropy(logits_BB.T, target_BB)
    return (by_image + by_text) / 2

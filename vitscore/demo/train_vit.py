"""Train `demo-vit`: a small ViTForImageClassification, trained with transformers' Trainer.

One of the two trainings of `vitscore.demo.make`. It is an example for users' own models: a `Trainer` with vitscore's
`compute_metrics` reports the same figures in training as a run does. The number of epochs is fixed; the held-out digits
are evaluated once, at the end, and select nothing. The checkpoint has the files of any transformers checkpoint
(config.json, model.safetensors, preprocessor_config.json) and no others.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    set_seed,
)

from vitscore.demo.augment import WarpedDigits
from vitscore.demo.digits import CLASSES, SIZE, Digits
from vitscore.metrics import compute_metrics

NUM_EPOCHS = 60


def train_vit(training: Digits, held_out: Digits, folder: Path, *, seed: int) -> dict[str, float]:
    """Train from the seed, save into `folder`, and return the metrics on the held-out digits."""
    set_seed(seed)
    processor = ViTImageProcessor(size={"height": SIZE, "width": SIZE}, do_convert_rgb=True)
    model = ViTForImageClassification(vit_config())
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=training_arguments(scratch, seed=seed),
            train_dataset=WarpedDigits(training, processor, seed=seed),
            eval_dataset=as_scored(held_out, processor),
            compute_metrics=compute_metrics,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return {name: float(metrics[f"eval_{name}"]) for name in ("accuracy", "precision", "recall", "f1")}


def vit_config() -> Any:
    return ViTConfig(
        image_size=SIZE,
        patch_size=8,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: label for label, name in enumerate(CLASSES)},
    )


def training_arguments(scratch: str, *, seed: int) -> Any:
    return TrainingArguments(
        output_dir=scratch,
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=100,
        learning_rate=2e-3,
        weight_decay=0.05,
        warmup_steps=200,
        lr_scheduler_type="cosine",
        label_smoothing_factor=0.05,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def as_scored(digits: Digits, processor: Any) -> list[dict[str, Any]]:
    """Return the digits as the saved checkpoint receives them: through its processor, without warps."""
    pictures = [picture.convert("RGB") for picture in digits.pictures()]
    pixels_BCHW: torch.Tensor = processor(pictures, return_tensors="pt")["pixel_values"]
    return [
        {"pixel_values": pixels_CHW, "labels": label}
        for pixels_CHW, label in zip(pixels_BCHW, digits.labels_B.tolist(), strict=True)
    ]

"""The peers themselves, as people write them: see `processes`, which starts each in a separate process.

Nothing here is vitscore's. Everything that would be done once in a real evaluation is done: probabilities, the five
best classes, accuracy and a confusion matrix on the way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import webdataset as wds

if TYPE_CHECKING:
    from vitscore.bench.peers.settings import Settings

# Axes: B images of a batch, K classes, D width of an embedding.

IMAGE_KEYS = "jpg;png"
TEMPLATE = "This is a photo of {}."
ToTensor = Callable[[Any], torch.Tensor]
ToLogits = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Seen:
    """A peer's result."""

    images: int = 0
    loop_s: float = 0.0
    predictions: dict[str, tuple[int, float]] = field(default_factory=dict)
    """By key: the best class, and by how much its probability leads."""
    confusion: list[list[int]] = field(default_factory=list)


def run_pipeline(shards: Path, checkpoint: str, settings: Settings) -> Seen:
    """transformers' pipeline, of the kind that the checkpoint is for; its answers are names, with probabilities."""
    from transformers import AutoConfig, pipeline

    set_threads(settings)
    classes = read_classes(shards)
    how = {"attn_implementation": settings.attention}
    given: dict[str, Any] = {"model": checkpoint, "device": find_device(), "model_kwargs": how}
    if settings.precision == "half":
        given["dtype"] = half_of(find_device())
    if AutoConfig.from_pretrained(checkpoint).model_type == "clip":
        classify = pipeline("zero-shot-image-classification", **given)
        asked: dict[str, Any] = {"candidate_labels": classes, "hypothesis_template": TEMPLATE}
    else:
        classify = pipeline("image-classification", **given)
        asked = {"top_k": 5}
    ids = {name: number for number, name in enumerate(classes)}
    known: list[tuple[str, int]] = []

    def images() -> Iterator[Any]:
        """Pictures alone, as the pipeline wants them; what belongs to them is remembered on the way."""
        for sample in read(shards).decode("pil"):
            known.append((sample["__key__"], int(sample["cls"])))
            yield sample["jpg"] if "jpg" in sample else sample["png"]

    started = time.perf_counter()
    asked |= {"batch_size": settings.batch_size, "num_workers": settings.workers}
    found = [(ids[best[0]["label"]], best[0]["score"] - best[1]["score"]) for best in classify(images(), **asked)]
    if settings.workers:  # the generator ran, and remembered, in another process
        known = [(sample["__key__"], int(sample["cls"])) for sample in read(shards)]
    seen = Seen(confusion=[[0] * len(classes) for _ in classes])
    for (key, label), answer in zip(known, found, strict=True):
        seen.predictions[key] = answer
        seen.confusion[label][answer[0]] += 1
    seen.images = len(found)
    seen.loop_s = time.perf_counter() - started
    return seen


def run_loop(shards: Path, checkpoint: str, settings: Settings) -> Seen:
    """A careful hand-written loop over a checkpoint of transformers."""
    from transformers import AutoConfig, AutoImageProcessor

    set_threads(settings)
    classes, device = read_classes(shards), find_device()
    processor = AutoImageProcessor.from_pretrained(checkpoint)
    transform = transform_like(processor) if settings.transform == "torchvision" else Processed(processor)
    is_clip = AutoConfig.from_pretrained(checkpoint).model_type == "clip"
    to_logits = load_clip(checkpoint, classes, settings) if is_clip else load_classifier(checkpoint, settings)
    return score(shards, transform, to_logits, settings, BincountConfusion(len(classes), device))


def run_timm(shards: Path, checkpoint: str, settings: Settings) -> Seen:
    """timm's ViT-Tiny/16 of random weights, as its own evaluation script goes: its transforms, its input size."""
    import timm

    set_threads(settings)
    device, num_classes = find_device(), len(read_classes(shards))
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=num_classes)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model), is_training=False)
    net = prepare(model, settings)
    return score(shards, transform, net, settings, TorchmetricsConfusion(num_classes, device))


def run_open_clip(shards: Path, checkpoint: str, settings: Settings) -> Seen:
    """open_clip's ViT-B-32 of random weights, zero-shot: its transforms, its tokenizer, its text classifier."""
    import open_clip

    set_threads(settings)
    device, classes = find_device(), read_classes(shards)
    torch.manual_seed(0)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32", pretrained=None)
    model.eval().to(device)
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    with torch.inference_mode():
        weights_DK = open_clip.build_zero_shot_classifier(
            model, tokenizer, classes, (TEMPLATE.format,), num_classes_per_batch=None, device=device
        )
    scale = model.logit_scale.exp().item()
    visual = prepare(model.visual, settings)

    def to_logits(images: torch.Tensor) -> torch.Tensor:
        features_BD = torch.nn.functional.normalize(visual(images).float(), dim=-1)
        logits_BK: torch.Tensor = scale * features_BD @ weights_DK
        return logits_BK

    return score(shards, transform, to_logits, settings, TorchmetricsConfusion(len(classes), device))


PEERS: dict[str, Callable[[Path, str, Settings], Seen]] = {
    "pipeline": run_pipeline,
    "loop": run_loop,
    "timm": run_timm,
    "open_clip": run_open_clip,
}


def load_classifier(checkpoint: str, settings: Settings) -> ToLogits:
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(checkpoint, attn_implementation=settings.attention)
    net = prepare(model, settings)
    return lambda images: net(pixel_values=images).logits


def load_clip(checkpoint: str, classes: Sequence[str], settings: Settings) -> ToLogits:
    """The text is encoded once."""
    from transformers import AutoTokenizer, CLIPModel

    model = CLIPModel.from_pretrained(checkpoint, attn_implementation=settings.attention).eval().to(find_device())
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    texts = tokenizer([TEMPLATE.format(name) for name in classes], padding=True, return_tensors="pt").to(find_device())
    with torch.inference_mode():
        text_KD = torch.nn.functional.normalize(model.get_text_features(**texts).pooler_output, dim=-1)
        weights_DK = (model.logit_scale.exp() * text_KD).T.contiguous()
    vision, projection = prepare(model.vision_model, settings), model.visual_projection

    def to_logits(images: torch.Tensor) -> torch.Tensor:
        pooled = vision(pixel_values=images).pooler_output.to(projection.weight.dtype)
        logits_BK: torch.Tensor = torch.nn.functional.normalize(projection(pooled), dim=-1).float() @ weights_DK
        return logits_BK

    return to_logits


def prepare(model: Any, settings: Settings) -> Any:
    """A model on its device, in its precision, compiled where asked for."""
    device = find_device()
    model = model.eval().to(device)
    if settings.precision == "half":
        model = model.to(half_of(device))
    return torch.compile(model) if settings.compile else model


def score(
    shards: Path,
    transform: ToTensor,
    to_logits: ToLogits,
    settings: Settings,
    confusion: BincountConfusion | TorchmetricsConfusion,
) -> Seen:
    """The loop: batches from the workers, logits, probabilities, the five best, counts."""
    device = find_device()
    dtype = half_of(device) if settings.precision == "half" else torch.float32
    is_cuda = device == "cuda"
    seen = Seen()
    keys: list[str] = []
    best: list[torch.Tensor] = []
    leads: list[torch.Tensor] = []
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    with torch.inference_mode(), casting(settings, device):
        for images, labels, batch_keys in load(shards, transform, settings, pin=is_cuda):
            images = images.to(device, dtype=dtype, non_blocking=True)
            logits_BK = to_logits(images).float()
            values, top = logits_BK.softmax(-1).topk(min(5, logits_BK.shape[-1]))
            confusion.update(logits_BK, torch.as_tensor(labels).to(device, non_blocking=True))
            keys += batch_keys
            best.append(top[:, 0])
            leads.append(values[:, 0] - values[:, 1])
    preds, gaps = torch.cat(best).tolist(), torch.cat(leads).tolist()
    seen.confusion = confusion.compute()
    seen.loop_s = time.perf_counter() - started
    seen.images = len(keys)
    seen.predictions = dict(zip(keys, zip(preds, gaps, strict=True), strict=True))
    return seen


def load(shards: Path, transform: ToTensor, settings: Settings, *, pin: bool) -> Any:
    """Batches of (images, labels, keys), made whole in the workers."""
    samples = (
        read(shards)
        .decode("pil")
        .to_tuple(IMAGE_KEYS, "cls", "__key__")
        .map_tuple(transform, int, str)
        .batched(settings.batch_size)
    )
    return torch.utils.data.DataLoader(samples, batch_size=None, num_workers=settings.workers, pin_memory=pin)


def casting(settings: Settings, device: str) -> contextlib.AbstractContextManager[Any]:
    if settings.precision == "autocast":
        return torch.autocast(device, dtype=half_of(device))
    return contextlib.nullcontext()


class Processed:
    """A checkpoint's processor, image by image."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Any) -> torch.Tensor:
        pixels: torch.Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def transform_like(processor: Any) -> ToTensor:
    """torchvision's transforms with a processor's sizes, filter, mean and deviation."""
    from torchvision.transforms import v2

    by_number = {0: "nearest-exact", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
    size, resample = processor.size, processor.resample
    name = by_number[int(resample)] if isinstance(resample, int) else resample.value
    edges = size.shortest_edge or (size.height, size.width)
    steps: list[Any] = [v2.Resize(edges, interpolation=v2.InterpolationMode(name), antialias=True)]
    if processor.do_center_crop:
        steps.append(v2.CenterCrop((processor.crop_size.height, processor.crop_size.width)))
    steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    transform: ToTensor = v2.Compose([*steps, v2.Normalize(processor.image_mean, processor.image_std)])
    return transform


class BincountConfusion:
    """A confusion matrix by torch.bincount, on the device."""

    def __init__(self, num_classes: int, device: str) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(num_classes * num_classes, dtype=torch.int64, device=device)

    def update(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        pairs = labels_B * self._num_classes + logits_BK.argmax(-1)
        self._counts += torch.bincount(pairs, minlength=len(self._counts))

    def compute(self) -> list[list[int]]:
        rows: list[list[int]] = self._counts.view(self._num_classes, -1).tolist()
        return rows


class TorchmetricsConfusion:
    """Accuracy and a confusion matrix by torchmetrics."""

    def __init__(self, num_classes: int, device: str) -> None:
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        metrics = {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "confusion": MulticlassConfusionMatrix(num_classes),
        }
        self._metrics = MetricCollection(metrics, compute_groups=False).to(device)

    def update(self, logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        self._metrics.update(logits_BK, labels_B)

    def compute(self) -> list[list[int]]:
        rows: list[list[int]] = self._metrics.compute()["confusion"].tolist()
        return rows


def find_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def half_of(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.bfloat16


def set_threads(settings: Settings) -> None:
    if settings.threads:
        torch.set_num_threads(settings.threads)


def read_classes(shards: Path) -> list[str]:
    return (shards / "classes.txt").read_text().splitlines()


def read(shards: Path) -> Any:
    """Every shard of a folder, in order."""
    tars = [str(path) for path in sorted(shards.glob("*.tar"))]
    return wds.WebDataset(tars, shardshuffle=False, empty_check=False)

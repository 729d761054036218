"""Find a checkpoint and read its kind and class names, without loading weights.

The first step of a run: `[NAME=]CHECKPOINT` becomes a local folder, a kind (classifier or zero-shot), class names and a
fingerprint of the content. This module does not import torch, so planning stays quick; `loading.py` loads the weights.
Weights must be in safetensors files, and code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vitscore.errors import SetupError, UsageError

Kind = Literal["classifier", "zero-shot"]

BUILT_IN = ("demo-vit", "demo-clip")

# The files that decide a checkpoint's predictions: these are fetched and fingerprinted.
CONTENT_PATTERNS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*.safetensors",
    "*.safetensors.index.json",
)

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_GENERIC_NAME = re.compile(r"LABEL_\d+")
_CHUNK_BYTES = 1 << 22
_DEFAULT_NUM_LABELS = 2  # transformers does not write the labels of a head of two to config.json
_DEFAULT_EDGE = 224


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on this machine.

    Args:
        name: the checkpoint's last path part.
        source: the text of the user.
        path: the local folder.
        kind: "classifier" or "zero-shot".
        architecture: the class named in config.json.
        num_labels: outputs of a classifier's head; None for zero-shot.
        id2label: the head's class names by output; None if it has only LABEL_0, LABEL_1 ...
        revision: the commit, if it came from the Hub.
    """

    name: str
    source: str
    path: Path
    kind: Kind
    architecture: str
    num_labels: int | None = None
    id2label: tuple[str, ...] | None = None
    revision: str | None = None


def parse_model(text: str) -> tuple[str, str]:
    """Return name and checkpoint of `[NAME=]CHECKPOINT`; the name defaults to the checkpoint's last path part.

    Raises:
        UsageError: the checkpoint is missing, or the name is not usable.
    """
    match = re.fullmatch(rf"({_NAME.pattern})=(.*)", text, re.DOTALL)
    name, checkpoint = (match[1], match[2]) if match else ("", text)
    if not checkpoint.strip():
        raise UsageError("no checkpoint", where=f"-m {text!r}", expected="[NAME=]CHECKPOINT")
    if not name:
        name = Path(checkpoint).expanduser().resolve().name if _is_path(checkpoint) else checkpoint.split("/")[-1]
        if not _NAME.fullmatch(name):
            raise UsageError(
                "no usable model name",
                where=f"-m {text}",
                expected="letters, digits, dots, dashes and underscores",
                got=repr(name),
                next_step=f"Name it: -m NAME={checkpoint}",
            )
    return name, checkpoint


def parse_models(texts: Sequence[str]) -> dict[str, str]:
    """Return checkpoints by model name, in the order given.

    Raises:
        UsageError: two models have the same name.
    """
    models: dict[str, str] = {}
    for text in texts:
        name, checkpoint = parse_model(text)
        if name in models:
            raise UsageError(
                "two models with the same name",
                where=f"-m {text}",
                expected="different names",
                got=f"{name} twice",
                next_step=f"Rename one: -m NAME={checkpoint}",
            )
        models[name] = checkpoint
    return models


def find(source: str) -> Checkpoint:
    """Resolve a built-in name, a local folder or a Hub id, and read its config.json.

    Raises:
        SetupError: there is no such checkpoint, or it cannot be scored.
    """
    path, revision = _locate(source)
    config = _read_json(path / "config.json")
    _require_safetensors(path, source)
    kind, architecture = _kind_of(config, source)
    num_labels = _num_labels(config) if kind == "classifier" else None
    return Checkpoint(
        name=path.name if revision is None else source.split("/")[-1],
        source=source,
        path=path,
        kind=kind,
        architecture=architecture,
        num_labels=num_labels,
        id2label=_label_names(config, num_labels) if num_labels is not None else None,
        revision=revision,
    )


def require_loadable(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint with a missing file or truncated weights, before anything depends on it.

    transformers replaces some missing files silently: CLIP's tokenizer then loads with an empty vocabulary.

    Raises:
        SetupError: a file is missing or truncated; the message names it.
    """
    needed: dict[str, list[tuple[str, ...]]] = {
        "image processor": [("preprocessor_config.json",), ("processor_config.json",)]
    }
    if checkpoint.kind == "zero-shot":
        needed["tokenizer"] = [("tokenizer.json",), ("vocab.json", "merges.txt")]
    for what, choices in needed.items():
        if not any(all((checkpoint.path / name).is_file() for name in names) for names in choices):
            raise SetupError(
                f"no {what}",
                where=checkpoint.source,
                expected=" or ".join(" and ".join(names) for names in choices),
                got="none",
                next_step=f"Save the {what} beside the model with its save_pretrained.",
            )
    from safetensors import SafetensorError, safe_open

    for path in sorted(checkpoint.path.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise SetupError(
                "weights cannot be read",
                where=f"{checkpoint.source}/{path.name}",
                got=str(error),
                next_step="Save or download the checkpoint again.",
            ) from error


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return the sha256 of names and bytes of all files that decide a prediction, without paths and times."""
    total = hashlib.sha256()
    for path in _content_files(checkpoint.path):
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                content.update(chunk)
        total.update(f"{path.name}\0{content.hexdigest()}\n".encode())
    return total.hexdigest()


def input_pixels(checkpoint: Checkpoint) -> int:
    """Return height x width of the model's input from its processor or its config; a guess if neither has it."""
    processor: Mapping[str, Any] = {}
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (checkpoint.path / name).is_file():
            processor = _read_json(checkpoint.path / name)
    processor = processor.get("image_processor", processor)
    config = _read_json(checkpoint.path / "config.json")
    for size in (
        processor.get("crop_size") if processor.get("do_center_crop") else None,
        processor.get("size"),
        config.get("image_size"),
        config.get("vision_config", {}).get("image_size"),
    ):
        if pixels := _area(size):
            return pixels
    return _DEFAULT_EDGE * _DEFAULT_EDGE


def _is_path(text: str) -> bool:
    return text.startswith((".", "/", "~")) or (not text.startswith("demo") and Path(text).exists())


def _locate(source: str) -> tuple[Path, str | None]:
    """Return the local folder, and the commit if it came from the Hub."""
    if source.startswith("demo"):
        return _built_in(source), None
    path = Path(source).expanduser()
    if path.is_dir():
        return _require_config(path.resolve(), source), None
    if path.is_file():
        raise SetupError(
            "not a checkpoint folder", where=source, got="a file", next_step=f"Name its folder: {path.parent}"
        )
    if _is_path(source) or not re.fullmatch(rf"{_NAME.pattern}(/{_NAME.pattern})?", source):
        raise SetupError("checkpoint not found", where=source, expected="a folder", next_step="Check the path.")
    path = _download(source)
    return _require_config(path, source), path.name


def _built_in(source: str) -> Path:
    if source not in BUILT_IN:
        raise SetupError(
            "no such built-in checkpoint",
            where=source,
            expected=" or ".join(BUILT_IN),
            next_step=f"A folder of that name is ./{source}.",
        )
    path = Path(__file__).resolve().parent.parent / "demo" / source
    if not (path / "config.json").is_file():
        raise SetupError("built-in checkpoint is missing", where=source, next_step="Run `make demo-models`.")
    return path


def _download(source: str) -> Path:
    """Fetch a snapshot of a Hub repository's content files, but for those in the cache, and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(source, allow_patterns=list(CONTENT_PATTERNS)))
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise SetupError(
            "checkpoint not found",
            where=source,
            expected="a built-in name, a local folder or a Hub id",
            got=f"{type(error).__name__} from the Hub and no such folder",
            next_step="Check the name, the network, or `hf auth login` for a gated one.",
        ) from error


def _require_config(path: Path, source: str) -> Path:
    if not (path / "config.json").is_file():
        raise SetupError(
            "not a checkpoint",
            where=source,
            expected="config.json and model.safetensors",
            got="no config.json",
            next_step="Save one with transformers' save_pretrained.",
        )
    return path


def _require_safetensors(path: Path, source: str) -> None:
    if any(path.glob("*.safetensors")):
        return
    pickled = sorted(file.name for file in path.glob("*.bin"))
    raise SetupError(
        "no safetensors weights",
        where=source,
        expected="model.safetensors",
        got=f"only {pickled[0]}, a pickle" if pickled else "none",
        next_step="If you trust it, load it with transformers and save it with save_pretrained, as safetensors.",
    )


def _content_files(path: Path) -> list[Path]:
    files = {file for pattern in CONTENT_PATTERNS for file in path.glob(pattern) if file.is_file()}
    return sorted(files, key=lambda file: file.name)


def _kind_of(config: Mapping[str, Any], source: str) -> tuple[Kind, str]:
    """Return classifier or zero-shot, and the architecture named in config.json that decides it."""
    architectures = [str(name) for name in config.get("architectures") or []]
    for architecture in architectures:
        if "ForImageClassification" in architecture:
            return "classifier", architecture
        if architecture == "CLIPModel":
            return "zero-shot", architecture
    if not architectures and config.get("model_type") == "clip":
        return "zero-shot", "CLIPModel"
    raise SetupError(
        "not an image classifier",
        where=source,
        expected="...ForImageClassification or CLIPModel",
        got=", ".join(architectures) or f"model_type {config.get('model_type')!r}",
        next_step="Fine-tune it with AutoModelForImageClassification, or take another checkpoint.",
    )


def _num_labels(config: Mapping[str, Any]) -> int:
    names = config.get("id2label")
    if isinstance(names, Mapping) and names:
        return len(names)
    return int(config.get("num_labels") or _DEFAULT_NUM_LABELS)


def _label_names(config: Mapping[str, Any], num_labels: int) -> tuple[str, ...] | None:
    """Return `id2label` in the order of the outputs; None if it is missing, incomplete or generic."""
    by_id = {str(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    names = tuple(by_id.get(str(index), "") for index in range(num_labels))
    if not all(names) or all(_GENERIC_NAME.fullmatch(name) for name in names):
        return None
    return names


def _area(size: object) -> int | None:
    if isinstance(size, int):
        return size * size
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        sides: Iterable[Any] = (edge, edge) if edge else (size.get("height"), size.get("width"))
    elif isinstance(size, Sequence) and not isinstance(size, str):
        sides = size
    else:
        return None
    pair = [int(side) for side in sides if side]
    return pair[0] * pair[1] if len(pair) == 2 else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SetupError("unreadable file", where=str(path), expected="JSON", got=type(error).__name__) from error
    if not isinstance(content, dict):
        raise SetupError("unreadable file", where=str(path), expected="a JSON object", got=type(content).__name__)
    return content

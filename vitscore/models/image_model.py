"""A checkpoint as a function from pixels to logits over the data set's classes.

The stage between decoding and the row kernel: uint8 pixels are normalised on the device, go through the trunk in the
run's precision and through the head in fp32; a classifier's logits are then matched to the data set's classes, a CLIP's
are logit scale times cosine to the text weights (`heads.py` has that arithmetic). Batches come in one fixed shape (the
engine pads them), so compiled models compile once. Ranking and probabilities are the kernels' work; a checkpoint is
read by `loading.py`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vitscore.classes.matching import HeadMap
from vitscore.models.checkpoint import Checkpoint, Kind
from vitscore.models.cpu_bf16 import attention
from vitscore.models.cpu_bf16.class_token_layer import FirstTokenLayer
from vitscore.models.cpu_bf16.trunk import Trunk, Unsuitable
from vitscore.models.heads import (
    ClassifierNet,
    CosineNet,
    Net,
    PixelNormalizer,
    TrunkClassifierNet,
    VisionTower,
    head_layers,
)
from vitscore.models.loading import load_processor, load_weights, spec_of
from vitscore.preprocess import Geometry, ProcessorGeometry, Spec

# Axes: B images of a batch, H W pixels, K classes of the data set, D the head's input or the projection.

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelOutput:
    """What a batch gives.

    Args:
        logits: float32 (B, K), contiguous, in the data set's order.
        embedding: float32 (B, D): the head's input, or CLIP's unit embedding; None where it was not asked for.
    """

    logits: torch.Tensor
    embedding: torch.Tensor | None


class ImageModel:
    """One model of a run, loaded.

    Attributes:
        name: its name in the run.
        kind: "classifier" or "zero-shot".
        spec: what it asks of its pixels; a ProcessorGeometry where only the processor itself can say that.
        geometry: the spec's part that the decoders carry out.
        num_params: parameters of the whole checkpoint.
        num_classes: K.
        embedding_dim: D.
        notes: what a user should know, in sentences.
        net: the torch module behind it, before it is compiled.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        classes: Sequence[str],
        head_map: HeadMap | None,
        device: str,
        precision: Precision,
        compile: bool,
        save_embeddings: bool,
        text_weights_KD: torch.Tensor | None,
        loaded: Any,
    ) -> None:
        self.name = name
        self.kind: Kind = checkpoint.kind
        self.num_classes = len(classes)
        self.num_params = sum(parameter.numel() for parameter in loaded.parameters())
        self.processor = load_processor(checkpoint)
        self.spec, self.notes = spec_of(checkpoint, self.processor)
        self._checkpoint = checkpoint
        self._head_map = head_map
        self._device = device
        self._precision = precision
        self._save_embeddings = save_embeddings
        self._text_weights_KD = text_weights_KD
        self._fp32: ImageModel | None = None
        self._is_compiled = compile
        self.net = self._build(loaded, _DTYPES[precision])
        self.embedding_dim = self.net.embedding_dim
        self._forward: Any = _compiled(self.net, device) if compile else self.net

    @property
    def geometry(self) -> Geometry | ProcessorGeometry:
        return self.spec.geometry if isinstance(self.spec, Spec) else self.spec

    def __call__(self, pixels: torch.Tensor) -> ModelOutput:
        """Classify a batch.

        Args:
            pixels: uint8 (B, H, W, 3) of the spec's geometry; float32 (B, 3, H, W) for a ProcessorGeometry.
        """
        with torch.inference_mode():
            pixels = pixels.to(self._device, non_blocking=True)
            if self._forward is not self.net and not pixels.is_inference():
                # The compiler tells tensors made in this mode from others, and would compile again for the other kind.
                pixels = pixels.clone()
            logits_BK, embedding_BD = self._forward(pixels)
        return ModelOutput(logits_BK, embedding_BD if self._save_embeddings else None)

    @property
    def is_on_cpu(self) -> bool:
        return self._device == "cpu"

    @property
    def has_own_pixels(self) -> bool:
        """Whether its images go through its processor itself."""
        return isinstance(self.spec, ProcessorGeometry)

    def fp32_twin(self) -> ImageModel:
        """The same model with an fp32 trunk, which is loaded on first use and kept; itself where it has one."""
        if self._precision == "fp32":
            return self
        if self._fp32 is None:
            twin = copy.copy(self)
            twin._precision = "fp32"
            twin.net = self._build(load_weights(self._checkpoint).to(self._device), torch.float32)
            twin._forward = twin.net
            self._fp32 = twin
        return self._fp32

    def rerun_fp32(self, pixels: torch.Tensor) -> ModelOutput:
        """The same batch with an fp32 trunk: for rows that overflowed in half precision."""
        return self.fp32_twin()(pixels)

    def replica(self) -> ImageModel:
        """The same model for another thread: modules of its own, which keep state, and shared weights."""
        weights = [*self.net.parameters(), *self.net.buffers()]
        other = copy.copy(self)
        other.net = copy.deepcopy(self.net, {id(tensor): tensor for tensor in weights})
        other._forward = other.net
        return other

    def cost(self) -> dict[str, Any]:
        """What run.json keeps of a model's size: parameters, GFLOP an image (two a multiply-add), input and filter.

        Where a model does not say its GFLOP, torch's own counter finds them in a forward without numbers; null where
        the model needs numbers to go on.
        """
        gflop = self.net.gflop_per_image
        if gflop is None:
            gflop = self._counted_gflop()
        geometry = self.geometry
        return {
            "parameters": self.num_params,
            "gflop_per_image": None if gflop is None else round(gflop, 6),
            "image_size": [geometry.height, geometry.width],
            "interpolation": getattr(geometry, "interpolation", None),
        }

    def _counted_gflop(self) -> float | None:
        from torch.utils.flop_counter import FlopCounterMode

        weights = [*self.net.parameters(), *self.net.buffers()]
        hollow = copy.deepcopy(self.net, {id(tensor): hollow_twin(tensor) for tensor in weights})
        for module in hollow.modules():
            if isinstance(module, FirstTokenLayer):
                module.is_whole = True
        with contextlib.suppress(Exception), FlopCounterMode(display=False) as counter, torch.inference_mode():
            hollow(self.black_images(1).to("meta"))
            return float(counter.get_total_flops()) / 1e9
        return None

    def black_images(self, batch_size: int) -> torch.Tensor:
        """A batch of the shape and type that it takes, on the host."""
        size = (self.geometry.height, self.geometry.width)
        if isinstance(self.spec, Spec):
            return torch.zeros((batch_size, *size, 3), dtype=torch.uint8)
        return torch.zeros((batch_size, 3, *size))

    def warm_up(self, batch_size: int) -> None:
        """One batch of black images: compiles, and lets the libraries choose their kernels."""
        self(self.black_images(batch_size))
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()

    def _build(self, loaded: Any, dtype: torch.dtype) -> Net:
        normalizer = PixelNormalizer(self.spec if isinstance(self.spec, Spec) else None, dtype)
        trunk = None
        if dtype is torch.bfloat16 and self.is_on_cpu:
            trunk = self._trunk(loaded, normalizer)
            if trunk is None:
                attention.use_where_faster(loaded)
        else:
            attention.use_torchs_on(loaded)
        net: Net
        if self.kind == "classifier":
            assert self._head_map is not None
            columns = self._head_map.columns
            if trunk is None:
                net = ClassifierNet(loaded, normalizer, dtype=dtype, columns=columns)
            else:
                net = TrunkClassifierNet(trunk, loaded.get_submodule(head_layers(loaded)[0]), columns=columns)
        else:
            assert self._text_weights_KD is not None
            tower = trunk or VisionTower(loaded.vision_model, normalizer, dtype=dtype)
            net = CosineNet(tower, loaded, text_weights_KD=self._text_weights_KD)
        return net.to(self._device).eval().requires_grad_(False)

    def _trunk(self, loaded: Any, normalizer: PixelNormalizer) -> Trunk | None:
        """The model's trunk in fewer steps, where it can be and this CPU gains by it."""
        if self._is_compiled or not attention.is_faster_here():
            return None
        size = self.geometry.height, self.geometry.width
        model = loaded if self.kind == "classifier" else loaded.vision_model
        try:
            return Trunk(model, factor_C=normalizer.factor[:3], offset_C=normalizer.offset[:3], image_size=size)
        except Unsuitable:
            return None


def hollow_twin(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's shape and type without its numbers."""
    twin = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(twin, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else twin


def _compiled(net: Net, device: str) -> Any:
    """One static shape; on CUDA the kernels are tuned, but without CUDA graphs: these would own the output buffers."""
    if not device.startswith("cuda"):
        return torch.compile(net, dynamic=False)
    from torch._inductor import select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False  # tables of candidates, on the terminal
    return torch.compile(net, dynamic=False, mode="max-autotune-no-cudagraphs")

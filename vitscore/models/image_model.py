"""A checkpoint as a function from pixels to logits over the data set's classes.

The stage between decoding and the row kernel. On the device uint8 pixels are normalised, encoded in the run's precision
and classified by a head in fp32; a classifier's logits are then matched to the data set's classes, and a CLIP's are
logit scale times cosine with the text weights (`heads.py` has this arithmetic). All batches have one shape (the engine
pads them), so compiled models compile once. Ranking and probabilities are the kernels' work; `loading.py` reads the
checkpoint. On a CPU in bfloat16 `cpu_bf16`, if it is there, may take the model over.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vitscore.models.attention import use_torchs_on
from vitscore.models.checkpoint import Checkpoint, Kind
from vitscore.models.class_token_layer import FirstTokenLayer
from vitscore.models.heads import (
    ClassifierNet,
    CosineNet,
    Encoder,
    EncoderClassifierNet,
    Net,
    PixelNormalizer,
    VisionTower,
    head_layers,
)
from vitscore.models.loading import load_processor, load_weights, spec_of
from vitscore.preprocess import Geometry, ProcessorGeometry, Spec

# Axes: B images of a batch, H W pixels, K classes of the data set, D the head's input or the projection.

Precision = Literal["fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_DOOR = "vitscore.models.cpu_bf16"


@dataclass(frozen=True)
class Placement:
    """Where and how a model computes."""

    device: str = "cpu"
    """"cpu", "cuda" or "cuda:N"."""
    precision: Precision = "fp32"
    """Of the encoder; heads are in fp32."""
    is_compiled: bool = False
    """Compile the model with torch, for batches of one size."""

    @property
    def is_on_cpu(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class ClassHead:
    """The part of a model that yields the data set's classes."""

    num_classes: int
    """K."""
    columns: Sequence[Sequence[int]] = ()
    """A classifier's head outputs of every class."""
    text_weights_KD: torch.Tensor | None = None
    """A zero-shot model's unit vectors."""


@dataclass(frozen=True)
class ModelOutput:
    """A model's output for a batch.

    Args:
        logits: float32 (B, K), contiguous, in the data set's order.
        embedding: float32 (B, D): the head's input, or CLIP's unit embedding; None unless requested.
    """

    logits: torch.Tensor
    embedding: torch.Tensor | None


class ImageModel:
    """A loaded model of a run.

    Args:
        checkpoint: its files.
        name: its name in the run.
        head: how it yields the data set's classes.
        placement: device, precision and compilation.
        save_embeddings: return embeddings with the logits.
        loaded: transformers' model in fp32, on the device; it is changed in place.

    Attributes:
        name: its name in the run.
        spec: the preprocessing of its pixels; a ProcessorGeometry if only the processor itself can do it.
        processor: transformers' image processor.
        notes: sentences for the user.
        num_params: parameters of the whole checkpoint.
        net: the torch module that computes, before compilation.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        name: str,
        head: ClassHead,
        placement: Placement,
        save_embeddings: bool,
        loaded: Any,
    ) -> None:
        self.name = name
        self.num_params = sum(parameter.numel() for parameter in loaded.parameters())
        self.processor = load_processor(checkpoint)
        self.spec, self.notes = spec_of(checkpoint, self.processor)
        self._checkpoint = checkpoint
        self._head = head
        self._placement = placement
        self._save_embeddings = save_embeddings
        self._fp32: ImageModel | None = None
        self.net = self._build(loaded)
        self._forward: Any = _compiled(self.net, placement.device) if placement.is_compiled else self.net

    @property
    def kind(self) -> Kind:
        return self._checkpoint.kind

    @property
    def num_classes(self) -> int:
        """K."""
        return self._head.num_classes

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.net.embedding_dim

    @property
    def geometry(self) -> Geometry | ProcessorGeometry:
        """The part of the spec that the decoders carry out."""
        return self.spec.geometry if isinstance(self.spec, Spec) else self.spec

    def __call__(self, pixels: torch.Tensor) -> ModelOutput:
        """Classify a batch.

        Args:
            pixels: uint8 (B, H, W, 3) of the spec's geometry; float32 (B, 3, H, W) for a ProcessorGeometry.
        """
        with torch.inference_mode():
            pixels = pixels.to(self._placement.device, non_blocking=True)
            if self._forward is not self.net and not pixels.is_inference():
                # The compiler distinguishes tensors made in inference mode and would compile again for the others.
                pixels = pixels.clone()
            logits_BK, embedding_BD = self._forward(pixels)
        return ModelOutput(logits_BK, embedding_BD if self._save_embeddings else None)

    @property
    def is_on_cpu(self) -> bool:
        return self._placement.is_on_cpu

    @property
    def has_own_pixels(self) -> bool:
        """Whether its processor itself makes its pixels."""
        return isinstance(self.spec, ProcessorGeometry)

    def fp32_twin(self) -> ImageModel:
        """Return the same model with an fp32 encoder, loaded on first use and kept; itself if it is in fp32."""
        if self._placement.precision == "fp32":
            return self
        if self._fp32 is None:
            twin = copy.copy(self)
            twin._placement = replace(self._placement, precision="fp32")
            twin.net = twin._build(load_weights(self._checkpoint).to(self._placement.device))
            twin._forward = twin.net
            self._fp32 = twin
        return self._fp32

    def rerun_fp32(self, pixels: torch.Tensor) -> ModelOutput:
        """Classify the batch with an fp32 encoder: for rows that overflowed in half precision."""
        return self.fp32_twin()(pixels)

    def replica(self) -> ImageModel:
        """Return the same model for another thread: separate modules, which keep state, and shared weights."""
        weights = [*self.net.parameters(), *self.net.buffers()]
        other = copy.copy(self)
        other.net = copy.deepcopy(self.net, {id(tensor): tensor for tensor in weights})
        other._forward = other.net
        return other

    def cost(self) -> dict[str, Any]:
        """Return the model's size for run.json: parameters, GFLOP per image, input size and resize filter.

        A multiply-add counts as two operations. If the model does not know its GFLOP, torch's counter runs a forward
        without numbers; null if the model's forward depends on numbers.
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
        """Return a batch of the model's input shape and type, on the host."""
        size = (self.geometry.height, self.geometry.width)
        if isinstance(self.spec, Spec):
            return torch.zeros((batch_size, *size, 3), dtype=torch.uint8)
        return torch.zeros((batch_size, 3, *size))

    def warm_up(self, batch_size: int) -> None:
        """Classify a batch of black images, so that torch compiles and the libraries choose their kernels."""
        self(self.black_images(batch_size))
        if self._placement.device.startswith("cuda"):
            torch.cuda.synchronize()

    def _build(self, loaded: Any) -> Net:
        """Make the torch module of a transformers model, which is changed in place."""
        dtype = _DTYPES[self._placement.precision]
        normalizer = PixelNormalizer(self.spec if isinstance(self.spec, Spec) else None, dtype)
        vision = loaded if self.kind == "classifier" else loaded.vision_model
        use_torchs_on(vision)
        encoder = self._fast_encoder(vision, normalizer)
        net: Net
        if self.kind == "zero-shot":
            assert self._head.text_weights_KD is not None
            tower = encoder or VisionTower(vision, normalizer, dtype=dtype)
            net = CosineNet(tower, loaded, text_weights_KD=self._head.text_weights_KD)
        elif encoder is not None:
            head = loaded.get_submodule(head_layers(loaded)[0])
            net = EncoderClassifierNet(encoder, head, columns=self._head.columns)
        else:
            net = ClassifierNet(loaded, normalizer, dtype=dtype, columns=self._head.columns)
        return net.to(self._placement.device).eval().requires_grad_(False)

    def _fast_encoder(self, vision: Any, normalizer: PixelNormalizer) -> Encoder | None:
        """Return the encoder of `cpu_bf16` if it takes the model over; None if not, or if that folder is absent."""
        if not self.is_on_cpu or self._placement.precision != "bf16":
            return None
        try:
            from vitscore.models.cpu_bf16 import take_over
        except ImportError as error:
            if error.name != _DOOR:
                raise
            return None
        return take_over(
            vision,
            factor_C=normalizer.factor[:3],
            offset_C=normalizer.offset[:3],
            image_size=(self.geometry.height, self.geometry.width),
            is_compiled=self._placement.is_compiled,
        )


def hollow_twin(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the same shape and type without numbers."""
    twin = torch.empty_like(tensor, device="meta")
    return torch.nn.Parameter(twin, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else twin


def _compiled(net: Net, device: str) -> Any:
    """Compile for one static shape; on CUDA tune the kernels, but without CUDA graphs, which would own the outputs."""
    if not device.startswith("cuda"):
        return torch.compile(net, dynamic=False)
    from torch._inductor import select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False  # would print tables of candidates on the terminal
    return torch.compile(net, dynamic=False, mode="max-autotune-no-cudagraphs")

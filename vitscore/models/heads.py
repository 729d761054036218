"""torch modules around an encoder: bytes to normalised pixels before it; an fp32 head and class matching after it.

`image_model.py` builds, compiles and runs these modules. They know tensors only: no files, no names, no options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional

from vitscore.errors import SetupError
from vitscore.models.class_token_layer import shorten
from vitscore.preprocess import Spec

# Axes: B images of a batch, C channels, H W pixels, N outputs of a head, K classes, M head classes of one class, D
# width of an embedding.

# BLAS splits a product of few rows among its threads in ways that change the last bit (measured: up to 11 rows), so
# these products are padded to a multiple of this many rows.
_ROWS = 16


class PixelNormalizer(nn.Module):
    """Normalise uint8 (B, H, W, C) to (B, C, H, W), in fp32 until a last conversion; float pixels are only converted.

    Factor and offset are stored for a whole row of pixels. With three numbers, repeated for each pixel, torch's inner
    loop on a CPU is three numbers long and takes 5% of a ViT-Tiny's forward.

    Args:
        spec: the preprocessing; None if the processor itself makes the pixels.
        dtype: of the output.
    """

    factor: torch.Tensor
    offset: torch.Tensor

    def __init__(self, spec: Spec | None, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype
        mean, std = (spec.mean, spec.std) if spec else ((0.0,) * 3, (1.0,) * 3)
        scale = spec.scale if spec else 1.0
        width = spec.geometry.width if spec else 1
        mean_C, std_C = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
        self.register_buffer("factor", (scale / std_C).float().repeat(width))
        self.register_buffer("offset", (-mean_C / std_C).float().repeat(width))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        if pixels.dtype == torch.uint8:
            rows = pixels.flatten(2).float().mul_(self.factor).add_(self.offset)
            pixels = rows.to(self._dtype).view(pixels.shape).permute(0, 3, 1, 2)
        return pixels.to(self._dtype)


class Fp32Linear(nn.Module):
    """A linear layer in fp32 after an encoder of any precision; it keeps its last input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.float()
        self.last_input: torch.Tensor | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        self.last_input = features
        return linear_rows(features, self.linear.weight, self.linear.bias)


def linear_rows(features_BD: torch.Tensor, weight_ND: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """Apply a linear layer; its rows are the same bits for any number of threads."""
    missing = -len(features_BD) % _ROWS if features_BD.device.type == "cpu" else 0
    if not missing:
        return functional.linear(features_BD, weight_ND, bias_N)
    filled = torch.cat([features_BD, features_BD.new_zeros((missing, *features_BD.shape[1:]))])
    return functional.linear(filled, weight_ND, bias_N)[: len(features_BD)]


class ClassMatching(nn.Module):
    """Map head outputs to the data set's classes: select columns, join several of one class by logsumexp."""

    columns: torch.Tensor
    is_padding: torch.Tensor

    def __init__(self, columns: Sequence[Sequence[int]], num_outputs: int) -> None:
        super().__init__()
        widest = max(len(ids) for ids in columns)
        padded_KM = [[*ids, *[ids[0]] * (widest - len(ids))] for ids in columns]
        padding_KM = [[place >= len(ids) for place in range(widest)] for ids in columns]
        self._is_identity = padded_KM == [[index] for index in range(num_outputs)]
        self._is_single = widest == 1
        self.register_buffer("columns", torch.tensor(padded_KM))
        self.register_buffer("is_padding", torch.tensor(padding_KM))

    def forward(self, logits_BN: torch.Tensor) -> torch.Tensor:
        if self._is_identity:
            return logits_BN.contiguous()
        if self._is_single:
            return logits_BN.index_select(1, self.columns[:, 0]).contiguous()
        picked_BKM = logits_BN[:, self.columns].masked_fill(self.is_padding, -torch.inf)
        return torch.logsumexp(picked_BKM, dim=-1).contiguous()


class Net(nn.Module):
    """A module from pixels to (logits (B, K), embedding (B, D)), both fp32."""

    embedding_dim: int
    gflop_per_image: float | None = None
    """Two operations per multiply-add; None if the work has to be counted by running the module."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class Encoder(Protocol):
    """A function from pixels to features (B, D) in fp32."""

    @property
    def gflop_per_image(self) -> float | None:
        """As of `Net`."""

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor: ...


class ClassifierNet(Net):
    """Any image classification model of transformers: its encoder in `dtype`, its head in fp32.

    Args:
        model: the loaded model, in fp32; it is changed in place.
        normalizer: the first step.
        dtype: of the encoder.
        columns: head outputs of every class.
    """

    def __init__(
        self, model: Any, normalizer: PixelNormalizer, *, dtype: torch.dtype, columns: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        names = head_layers(model)
        heads = {name: Fp32Linear(model.get_submodule(name)) for name in names}
        for name in names:
            _replace(model, name, nn.Identity())
        shorten(model)
        model.to(dtype)
        for name, head in heads.items():
            _replace(model, name, head)
        self.model = model
        self.normalizer = normalizer
        first = next(iter(heads.values()))
        self._head = [first]  # in a list: the model owns it already
        self.embedding_dim = first.linear.in_features
        self.matching = ClassMatching(columns, first.linear.out_features)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_BN = self.model(pixel_values=self.normalizer(pixels)).logits.float()
        embedding = self._head[0].last_input
        assert embedding is not None
        return self.matching(logits_BN), embedding.flatten(1)


class EncoderClassifierNet(Net):
    """An encoder with a classifier's head in fp32.

    Args:
        encoder: pixels to features.
        head: features to classes.
        columns: head outputs of every class.
    """

    def __init__(self, encoder: Encoder, head: nn.Linear, *, columns: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head.float()
        self.embedding_dim = head.in_features
        self.matching = ClassMatching(columns, head.out_features)
        self.gflop_per_image = with_products(encoder.gflop_per_image, head.weight)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BD = self.encoder(pixels)
        return self.matching(linear_rows(features_BD, self.head.weight, self.head.bias)), features_BD


class VisionTower(nn.Module):
    """A transformers vision tower after the normalisation of its pixels: an `Encoder`.

    Args:
        model: the loaded CLIPVisionModel; it is changed in place.
        normalizer: the first step.
        dtype: of the tower.
    """

    gflop_per_image: float | None = None

    def __init__(self, model: Any, normalizer: PixelNormalizer, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.model = model.to(dtype)
        shorten(self.model)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features_BD: torch.Tensor = self.model(pixel_values=self.normalizer(pixels)).pooler_output.float()
        return features_BD


class CosineNet(Net):
    """CLIP's image side: its tower, then projection, normalisation and cosine in fp32. No text tower.

    Args:
        tower: pixels to features.
        model: the loaded CLIPModel, in fp32; its projection and logit scale are used.
        text_weights_KD: unit vectors, one for each class.
    """

    weights_KD: torch.Tensor

    def __init__(self, tower: Encoder, model: Any, *, text_weights_KD: torch.Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.projection = model.visual_projection.float()
        self.register_buffer("weights_KD", text_weights_KD.float() * model.logit_scale.detach().float().exp())
        self.embedding_dim = int(text_weights_KD.shape[1])
        self.gflop_per_image = with_products(tower.gflop_per_image, self.projection.weight, self.weights_KD)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding_BD = linear_rows(self.tower(pixels), self.projection.weight)
        embedding_BD = embedding_BD / embedding_BD.norm(dim=-1, keepdim=True)
        return linear_rows(embedding_BD, self.weights_KD).contiguous(), embedding_BD


def with_products(gflop: float | None, *weights: torch.Tensor) -> float | None:
    """Add an image's products with these weights to an encoder's GFLOP; None stays None."""
    return None if gflop is None else gflop + 2 * sum(weight.numel() for weight in weights) / 1e9


def head_layers(model: Any) -> list[str]:
    """Return the names of the linear layers that output the classes.

    A layer of the encoder may be as wide as the head by chance, so layers outside the encoder (transformers'
    `base_model`) are preferred; without any, it is the last layer of the head's width.

    Raises:
        SetupError: no linear layer has as many outputs as there are labels.
    """
    width = int(model.config.num_labels)
    encoder = model.base_model
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width
    ]
    if not linear:
        raise SetupError(
            "classifier without a linear head", where=type(model).__name__, expected=f"a layer of {width} outputs"
        )
    inside = set() if encoder is model else {id(module) for module in encoder.modules()}
    outside = [name for name, module in linear if id(module) not in inside]
    return outside if outside and encoder is not model else [linear[-1][0]]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

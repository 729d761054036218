"""The arithmetic around a trunk: bytes to normalised pixels before it, an fp32 head and the class matching after it.

These modules are what `models.py` builds, compiles and runs. They know tensors only: no files, no names, no options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vitscore.errors import SetupError
from vitscore.models.cpu_bf16.class_token_layer import shorten
from vitscore.models.cpu_bf16.trunk import Trunk
from vitscore.preprocess import Spec

# Axes: B images of a batch, C channels, H W pixels, N outputs of a head, K classes, M head classes of one class, D
# width of an embedding.

# BLAS splits a product of few rows among its threads in ways that change the last bit (measured: up to 11 rows), so
# such products get rows to spare.
_ROWS = 16


class PixelNormalizer(nn.Module):
    """uint8 (B, H, W, C) to normalised (B, C, H, W), in fp32 until the end; pixels that are float already pass.

    Factor and offset are kept for a whole row of pixels: with three numbers, repeated for each pixel, torch's loop on a
    CPU is three numbers long, and takes 5% of a ViT-Tiny's forward.
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
    """A linear layer that stays in fp32 below a trunk of any precision, and keeps its input."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear.float()
        self.seen: torch.Tensor | None = None

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = features.float()
        self.seen = features
        return linear_rows(features, self.linear.weight, self.linear.bias)


def linear_rows(features_BD: torch.Tensor, weight_ND: torch.Tensor, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer whose rows come out the same, bit for bit, for any number of threads."""
    missing = -len(features_BD) % _ROWS if features_BD.device.type == "cpu" else 0
    if not missing:
        return functional.linear(features_BD, weight_ND, bias_N)
    filled = torch.cat([features_BD, features_BD.new_zeros((missing, *features_BD.shape[1:]))])
    return functional.linear(filled, weight_ND, bias_N)[: len(features_BD)]


class ClassMatching(nn.Module):
    """Head outputs to the data set's classes: columns picked, several of them joined by logsumexp."""

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
    """Pixels in, (logits (B, K), embedding (B, D)) out, both fp32."""

    embedding_dim: int
    gflop_per_image: float | None = None
    """Two a multiply-add; None where it has to be counted."""

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


class ClassifierNet(Net):
    """Any image classification model of transformers: its trunk in `dtype`, its head in fp32.

    Args:
        model: the loaded model, in fp32; it is changed in place.
        normalizer: the first step.
        dtype: the trunk's.
        columns: head ids for every class.
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
        seen = self._head[0].seen
        assert seen is not None
        return self.matching(logits_BN), seen.flatten(1)


class TrunkClassifierNet(Net):
    """A classifier whose trunk is `trunk.Trunk`, with its head in fp32.

    Args:
        trunk: pixels to features.
        head: features to classes.
        columns: head ids for every class.
    """

    def __init__(self, trunk: Trunk, head: nn.Linear, *, columns: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head.float()
        self.embedding_dim = head.in_features
        self.matching = ClassMatching(columns, head.out_features)
        self.gflop_per_image = trunk.gflop_per_image + gflop_of(head.weight)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features_BD = self.trunk(pixels)
        return self.matching(linear_rows(features_BD, self.head.weight, self.head.bias)), features_BD


class VisionTower(nn.Module):
    """A vision tower of transformers with the normalisation before it: pixels to features (B, D) in fp32.

    Args:
        model: the loaded CLIPVisionModel; it is changed in place.
        normalizer: the first step.
        dtype: the tower's.
    """

    def __init__(self, model: Any, normalizer: PixelNormalizer, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.normalizer = normalizer
        self.model = model.to(dtype)
        shorten(self.model)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        features_BD: torch.Tensor = self.model(pixel_values=self.normalizer(pixels)).pooler_output.float()
        return features_BD


class CosineNet(Net):
    """CLIP's image side: its tower; projection, normalisation and cosine in fp32. No text tower.

    Args:
        tower: pixels to features.
        model: the loaded CLIPModel, in fp32, for the rest.
        text_weights_KD: unit vectors, one a class.
    """

    weights_KD: torch.Tensor

    def __init__(self, tower: VisionTower | Trunk, model: Any, *, text_weights_KD: torch.Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.projection = model.visual_projection.float()
        self.register_buffer("weights_KD", text_weights_KD.float() * model.logit_scale.detach().float().exp())
        self.embedding_dim = int(text_weights_KD.shape[1])
        if isinstance(tower, Trunk):
            self.gflop_per_image = tower.gflop_per_image + gflop_of(self.projection.weight, self.weights_KD)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedding_BD = linear_rows(self.tower(pixels), self.projection.weight)
        embedding_BD = embedding_BD / embedding_BD.norm(dim=-1, keepdim=True)
        return linear_rows(embedding_BD, self.weights_KD).contiguous(), embedding_BD


def gflop_of(*weights: torch.Tensor) -> float:
    """Work of an image's products with these weights, two a multiply-add."""
    return 2 * sum(each.numel() for each in weights) / 1e9


def head_layers(model: Any) -> list[str]:
    """Names of the linear layers that give the classes: outside the trunk, else the last of the right width.

    A layer of the trunk may be as wide as the head by chance, so the trunk (transformers' `base_model`) is left out.

    Raises:
        SetupError: no linear layer has as many outputs as there are labels.
    """
    width = int(model.config.num_labels)
    trunk = model.base_model
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module.out_features == width
    ]
    if not linear:
        raise SetupError(
            "classifier without a linear head", where=type(model).__name__, expected=f"a layer of {width} outputs"
        )
    inside = set() if trunk is model else {id(module) for module in trunk.modules()}
    outside = [name for name, module in linear if id(module) not in inside]
    return outside if outside and trunk is not model else [linear[-1][0]]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

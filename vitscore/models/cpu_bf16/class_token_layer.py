"""The last layer of a transformer whose head reads its first token alone, computed for that token alone.

ViT, DeiT and CLIP classify by the class token. In every layer but the last all tokens are needed, since the next layer
attends to them; in the last only their keys and values are. The rest of it (queries, projection and MLP of 196 of 197
tokens) is a fourteenth of the work of a model of twelve layers, and nothing reads it. A layer that is not laid out as
expected stays as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

# Axes: B images, N tokens, F first ones of them, D width of the trunk, H heads, E width of a head.

# With one query torch's attention on a CPU cuts the keys among its threads, and BLAS does so with products of few rows;
# then the last bit hangs on the number of threads.
_FEWEST_TOKENS = 4
_FEWEST_ROWS = 64


class Parts(NamedTuple):
    """What a layer calls its modules."""

    norm_before: str
    attention: str
    projection: str
    norm_after: str


_VIT = Parts("layernorm_before", "attention", "o_proj", "layernorm_after")
_CLIP = Parts("layer_norm1", "self_attn", "out_proj", "layer_norm2")
_LAYERS = {"ViTLayer": _VIT, "DeiTLayer": _VIT, "CLIPEncoderLayer": _CLIP}
_READERS = frozenset({"ViTForImageClassification", "DeiTForImageClassification", "CLIPVisionModel"})
"""Models that read the first token of the last layer and nothing else of it."""


class FirstTokenLayer(nn.Module):
    """A layer of transformers, computed for the first token.

    Args:
        layer: the whole layer, whose modules it uses.
        parts: what they are called.
    """

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.layer: Any = layer
        self.is_whole = False
        """Whether to compute all tokens after all: a model's work is counted as others count it."""
        self._parts = parts

    def forward(
        self, hidden_BND: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """(B, N, D) to (B, F, D), of which the first token counts."""
        if self.is_whole or attention_mask is not None:
            whole_BND: torch.Tensor = self.layer(hidden_BND, attention_mask, **others)
            return whole_BND
        num_first = num_first_tokens(*hidden_BND.shape[:2])
        seen_BFD = self._attend(getattr(self.layer, self._parts.norm_before)(hidden_BND), num_first)
        first_BFD = hidden_BND[:, :num_first] + seen_BFD
        found_BFD: torch.Tensor = first_BFD + self.layer.mlp(getattr(self.layer, self._parts.norm_after)(first_BFD))
        return found_BFD

    def _attend(self, normed_BND: torch.Tensor, num_first: int) -> torch.Tensor:
        """What the first tokens take from all, (B, F, D)."""
        heads: Any = getattr(self.layer, self._parts.attention)
        projected = heads.q_proj(normed_BND[:, :num_first]), heads.k_proj(normed_BND), heads.v_proj(normed_BND)
        query_BHFE, key_BHNE, value_BHNE = (
            each.unflatten(-1, (-1, heads.head_dim)).transpose(1, 2) for each in projected
        )
        seen_BHFE = functional.scaled_dot_product_attention(query_BHFE, key_BHNE, value_BHNE)
        found_BFD: torch.Tensor = getattr(heads, self._parts.projection)(seen_BHFE.transpose(1, 2).flatten(2))
        return found_BFD


def num_first_tokens(num_images: int, num_tokens: int) -> int:
    """How many of an image's tokens are computed when the first one is asked for."""
    return min(max(_FEWEST_TOKENS, -(-_FEWEST_ROWS // num_images)), num_tokens)


def shorten(model: Any) -> None:
    """Have the last layer of a vision model, in place, be computed for the first token, where that is all it needs."""
    if type(model).__name__ not in _READERS:
        return
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and type(module[-1]).__name__ in _LAYERS
    ]
    if len(stacks) != 1:
        return
    last = stacks[0][-1]
    parts = _LAYERS[type(last).__name__]
    heads = getattr(last, parts.attention, None)
    has_all = all(hasattr(last, name) for name in (*parts[:2], parts.norm_after, "mlp")) and all(
        hasattr(heads, name) for name in ("q_proj", "k_proj", "v_proj", parts.projection, "head_dim")
    )
    if has_all:
        stacks[0][-1] = FirstTokenLayer(last, parts)

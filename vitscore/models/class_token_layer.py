"""Compute the last layer of a vision transformer for its class token only, on every device.

ViT, DeiT and CLIP classify by the class token, the first of an image's tokens. Every layer but the last needs all
tokens, since the next layer attends to them; the last layer needs only their keys and values. Its queries, projection
and MLP for the other 196 of 197 tokens are a fourteenth of the work of a model of twelve layers, and no later step
reads them. A layer with an unexpected layout stays as it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

# Axes: B images, N tokens, F first ones of them, D width of the encoder, H heads, E width of a head.

# For a single query torch's attention on a CPU splits the keys among its threads, and BLAS splits products of few rows;
# the last bit then depends on the number of threads.
_FEWEST_TOKENS = 4
_FEWEST_ROWS = 64


class Parts(NamedTuple):
    """Names of a layer's modules."""

    norm_before: str
    attention: str
    projection: str
    norm_after: str


_VIT = Parts("layernorm_before", "attention", "o_proj", "layernorm_after")
_CLIP = Parts("layer_norm1", "self_attn", "out_proj", "layer_norm2")
_LAYERS = {"ViTLayer": _VIT, "DeiTLayer": _VIT, "CLIPEncoderLayer": _CLIP}
_READERS = frozenset({"ViTForImageClassification", "DeiTForImageClassification", "CLIPVisionModel"})
"""Models that read only the first token of the last layer."""


class FirstTokenLayer(nn.Module):
    """A transformers layer, computed for the first token.

    Args:
        layer: the whole layer, whose modules are used.
        parts: the names of these modules.
    """

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.layer: Any = layer
        self.is_whole = False
        """Compute all tokens: for counting a model's work in the usual way."""
        self._parts = parts

    def forward(
        self, hidden_BND: torch.Tensor, attention_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Map (B, N, D) to (B, F, D); only the first of the F tokens is meant to be read."""
        if self.is_whole or attention_mask is not None:
            whole_BND: torch.Tensor = self.layer(hidden_BND, attention_mask, **others)
            return whole_BND
        num_first = num_first_tokens(*hidden_BND.shape[:2])
        mixed_BFD = self._attend(getattr(self.layer, self._parts.norm_before)(hidden_BND), num_first)
        first_BFD = hidden_BND[:, :num_first] + mixed_BFD
        output_BFD: torch.Tensor = first_BFD + self.layer.mlp(getattr(self.layer, self._parts.norm_after)(first_BFD))
        return output_BFD

    def _attend(self, normed_BND: torch.Tensor, num_first: int) -> torch.Tensor:
        """Return the attention of the first tokens to all, projected: (B, F, D)."""
        heads: Any = getattr(self.layer, self._parts.attention)
        projected = heads.q_proj(normed_BND[:, :num_first]), heads.k_proj(normed_BND), heads.v_proj(normed_BND)
        query_BHFE, key_BHNE, value_BHNE = (
            tensor.unflatten(-1, (-1, heads.head_dim)).transpose(1, 2) for tensor in projected
        )
        mixed_BHFE = functional.scaled_dot_product_attention(query_BHFE, key_BHNE, value_BHNE)
        mixed_BFD: torch.Tensor = getattr(heads, self._parts.projection)(mixed_BHFE.transpose(1, 2).flatten(2))
        return mixed_BFD


def num_first_tokens(num_images: int, num_tokens: int) -> int:
    """Return how many of an image's tokens the last layer computes in order to have the first."""
    return min(max(_FEWEST_TOKENS, -(-_FEWEST_ROWS // num_images)), num_tokens)


def shorten(model: Any) -> None:
    """Replace a vision model's last layer, in place, by one for the first token, if the model reads only that."""
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

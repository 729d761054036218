"""Attention on a CPU in bfloat16: two matrix products with the softmax between them.

On a CPU torch's `scaled_dot_product_attention` reaches a sixth of a core's matrix throughput (ViT-Tiny at 224 pixels,
batch of 16: 6.8 ms a layer, 44% of the forward). Products of whole matrices take 2.4 ms and make the forward 1.5 times
as fast. Scores are rounded to bfloat16 between the products, in addition to the rounding of queries and keys: against
fp32 the logits' error grows by at most 8% (ViT-Tiny, random weights, queries and keys up to 16 times as large).
`trunk.py` calls `mix`; other transformers models call `attend` after `use_on`.
"""

from __future__ import annotations

from typing import Any

import torch

from vitscore.kernels.cpu_bf16 import softmax_bfloat16
from vitscore.models.attention import replace_torchs
from vitscore.system.machine import cpu_flags

# Axes: B images, H heads, N tokens, D width of a head, S slices: heads of images, F first tokens or all.

NAME = "vitscore_bfloat16"
_MOST_SCORES_BYTES = 1 << 25
"""Maximum size of the scores of one step; more slices than fit are computed in several steps."""


def attend(
    module: torch.nn.Module,
    query_BHND: torch.Tensor,
    key_BHND: torch.Tensor,
    value_BHND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention for a transformers model; pass to torch's all but plain attention in bfloat16 on a CPU.

    The arguments are those with which transformers calls an attention function.

    Returns:
        (B, N, H, D), and None for the weights.
    """
    is_plain = attention_mask is None and not dropout and not (is_causal or getattr(module, "is_causal", False))
    is_ours = query_BHND.dtype == torch.bfloat16 and query_BHND.device.type == "cpu"
    if not (is_plain and is_ours and query_BHND.shape == key_BHND.shape == value_BHND.shape):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query_BHND,
            key_BHND,
            value_BHND,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **others,
        )
        return output
    num_images, num_heads, num_tokens, width = query_BHND.shape
    inputs_BHND = query_BHND, key_BHND, value_BHND
    query_SND, key_SND, value_SND = (tensor.reshape(-1, num_tokens, width) for tensor in inputs_BHND)
    scale = width**-0.5 if scaling is None else scaling
    joined_SND = mix(query_SND, key_SND, value_SND, scale=scale)
    return joined_SND.view(num_images, num_heads, num_tokens, width).transpose(1, 2), None


def mix(query_SFD: torch.Tensor, key_SND: torch.Tensor, value_SND: torch.Tensor, *, scale: float) -> torch.Tensor:
    """Return softmax(scale * queries keys') values of every slice, (S, F, D), in bfloat16."""
    step = max(1, _MOST_SCORES_BYTES // (2 * query_SFD.shape[1] * key_SND.shape[1]))
    steps = zip(*(torch.split(tensor, step) for tensor in (query_SFD, key_SND, value_SND)), strict=True)
    mixed_SFD = [torch.bmm(_weights(query, key, scale), value) for query, key, value in steps]
    return mixed_SFD[0] if len(mixed_SFD) == 1 else torch.cat(mixed_SFD)


def _weights(query_SFD: torch.Tensor, key_SND: torch.Tensor, scale: float) -> torch.Tensor:
    """Return the attention of every query to every token, (S, F, N)."""
    scores_SFN = torch.bmm(query_SFD, key_SND.transpose(1, 2))
    if torch.compiler.is_compiling():
        return torch.softmax(scores_SFN * scale, dim=-1)
    softmax_bfloat16(scores_SFN.view(torch.int16).numpy().reshape(-1, scores_SFN.shape[-1]), scale)
    return scores_SFN


def is_faster_here() -> bool:
    """Return whether this CPU gains by `mix` and by `trunk.py`: with AVX512-BF16, and as much with AMX beside it.

    ViT-Tiny at 224 pixels on two cores with AMX: 262 images/s with transformers' modules, 380 with these. On other CPUs
    bfloat16 brings no gain.
    """
    return "avx512_bf16" in cpu_flags()


def use_on(model: Any) -> None:
    """Make a transformers model compute attention by `attend`, if it calls torch's now."""
    replace_torchs(model, NAME, attend)

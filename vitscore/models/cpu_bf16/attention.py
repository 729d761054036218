"""Attention on a CPU in bfloat16: two matrix products with the softmax between them.

torch's `scaled_dot_product_attention` reaches a sixth of a core's matrix throughput there (ViT-Tiny at 224 pixels,
batch of 16: 6.8 ms a layer, 44% of the forward); whole matrices at a time take 2.4 ms, so that the forward is 1.5 times
as fast. Scores are rounded to bfloat16 on the way, which adds to the noise that queries and keys have by their own
rounding: against fp32 the logits' error grows by at most 8% (ViT-Tiny, random weights, queries and keys up to 16
times as large).
`trunk.py` calls `mix`; other models of transformers look `attend` up by name, where `models.py` asks for it.
"""

from __future__ import annotations

from typing import Any

import torch

from vitscore.kernels.cpu_bf16 import softmax_bfloat16
from vitscore.system.machine import cpu_flags

# Axes: B images, H heads, N tokens, D width of a head, S slices: heads of images, F first tokens or all.

NAME = "vitscore_bfloat16"
TORCHS_NAME = "vitscore_torchs"
_MOST_SCORES_BYTES = 1 << 25
"""Of one step: more heads than that are taken in several."""


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
    """What transformers calls; whatever is not plain attention in bfloat16 on a CPU goes to torch's own.

    Returns:
        (B, N, H, D), and None for the weights.
    """
    is_plain = attention_mask is None and not dropout and not (is_causal or getattr(module, "is_causal", False))
    is_ours = query_BHND.dtype == torch.bfloat16 and query_BHND.device.type == "cpu"
    if not (is_plain and is_ours and query_BHND.shape == key_BHND.shape == value_BHND.shape):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        found: tuple[torch.Tensor, None] = sdpa_attention_forward(
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
        return found
    num_images, num_heads, num_tokens, width = query_BHND.shape
    query_SND, key_SND, value_SND = (each.reshape(-1, num_tokens, width) for each in (query_BHND, key_BHND, value_BHND))
    scale = width**-0.5 if scaling is None else scaling
    joined_SND = mix(query_SND, key_SND, value_SND, scale=scale)
    return joined_SND.view(num_images, num_heads, num_tokens, width).transpose(1, 2), None


def mix(query_SFD: torch.Tensor, key_SND: torch.Tensor, value_SND: torch.Tensor, *, scale: float) -> torch.Tensor:
    """softmax(scale * queries keys') values of each slice, (S, F, D), in bfloat16."""
    step = max(1, _MOST_SCORES_BYTES // (2 * query_SFD.shape[1] * key_SND.shape[1]))
    seen_SFD = [
        torch.bmm(_weights(query, key, scale), value)
        for query, key, value in zip(
            *(torch.split(each, step) for each in (query_SFD, key_SND, value_SND)), strict=True
        )
    ]
    return seen_SFD[0] if len(seen_SFD) == 1 else torch.cat(seen_SFD)


def _weights(query_SFD: torch.Tensor, key_SND: torch.Tensor, scale: float) -> torch.Tensor:
    """Each query's attention to each token, (S, F, N)."""
    scores_SFN = torch.bmm(query_SFD, key_SND.transpose(1, 2))
    if torch.compiler.is_compiling():
        return torch.softmax(scores_SFN * scale, dim=-1)
    softmax_bfloat16(scores_SFN.view(torch.int16).numpy().reshape(-1, scores_SFN.shape[-1]), scale)
    return scores_SFN


def is_faster_here() -> bool:
    """Whether this CPU gains by `mix` and by `trunk.py`: with AVX512-BF16, and as much with AMX beside it.

    ViT-Tiny at 224 pixels on two cores with AMX: 262 images/s by transformers' modules, 380 so. Elsewhere bfloat16 is
    no gain at all.
    """
    return "avx512_bf16" in cpu_flags()


def use_where_faster(model: Any) -> None:
    """Have a transformers model attend by `attend`, where it would by torch's own attention and this CPU gains.

    Models with an attention of their own keep it; elsewhere torch's own comes without a mask.
    """
    if is_faster_here():
        use_on(model)
    else:
        use_torchs_on(model)


def use_on(model: Any) -> None:
    """Have a transformers model attend by `attend`, on whatever CPU."""
    _replace_torchs(model, NAME, attend)


def use_torchs_on(model: Any) -> None:
    """Have a transformers model attend by torch's own attention, and without a mask also while a graph is captured."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _replace_torchs(model, TORCHS_NAME, sdpa_attention_forward)


def mask_or_none(**wanted: Any) -> torch.Tensor | None:
    """What transformers asks for a mask: None where all tokens attend to all.

    transformers 5.17 makes a mask of ones while a graph is captured: torch has slower kernels for it, and the last
    layer cannot be computed for its first token alone.
    """
    is_open = wanted.get("attention_mask") is None and wanted.get("local_size") is None
    if is_open and wanted.get("allow_is_bidirectional_skip"):
        return None
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(**wanted)
    return mask


def _replace_torchs(model: Any, name: str, function: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_or_none)
    if getattr(model.config, "_attn_implementation", None) == "sdpa":
        model.set_attn_implementation(name)

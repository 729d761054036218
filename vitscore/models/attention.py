"""Choose the function with which a transformers model computes attention.

Every model that uses torch's `scaled_dot_product_attention` (transformers' "sdpa") gets it under a registered name
that comes without a mask; `cpu_bf16` may put a faster function in its place. Models with another attention keep it.
"""

from __future__ import annotations

from typing import Any

import torch

_TORCHS_NAME = "vitscore_torchs"
_REPLACED = ("sdpa", _TORCHS_NAME)


def use_torchs_on(model: Any) -> None:
    """Make a transformers model call torch's attention without a mask, also while a graph is captured."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    replace_torchs(model, _TORCHS_NAME, sdpa_attention_forward)


def replace_torchs(model: Any, name: str, function: Any) -> None:
    """Make a transformers model call `function`, registered as `name`, if it calls torch's attention now."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_or_none)
    if getattr(model.config, "_attn_implementation", None) in _REPLACED:
        model.set_attn_implementation(name)


def mask_or_none(**wanted: Any) -> torch.Tensor | None:
    """Return the mask that transformers asks for, or None if all tokens attend to all.

    transformers 5.17 makes a mask of ones while a graph is captured. With a mask torch uses slower kernels and the last
    layer cannot be computed for the class token only.
    """
    is_open = wanted.get("attention_mask") is None and wanted.get("local_size") is None
    if is_open and wanted.get("allow_is_bidirectional_skip"):
        return None
    from transformers.masking_utils import sdpa_mask

    mask: torch.Tensor | None = sdpa_mask(**wanted)
    return mask

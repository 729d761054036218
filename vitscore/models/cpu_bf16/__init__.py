"""The hand-written encoder for CPUs in bfloat16, behind one function: `take_over`.

`image_model.py` calls it for every model that computes in bfloat16 on a CPU, and uses transformers' modules if it
returns None. `VITSCORE_CPU_BF16=0` in the environment turns all of it off. Without this folder and
`kernels/cpu_bf16/` everything else works as before. The gain is measured by `vitscore bench forward`, whose case
"plain" is the same model with the switch off.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from vitscore.models.cpu_bf16.trunk import Trunk

SWITCH = "VITSCORE_CPU_BF16"


def take_over(
    model: Any, *, factor_C: torch.Tensor, offset_C: torch.Tensor, image_size: tuple[int, int], is_compiled: bool
) -> Trunk | None:
    """Return a fast encoder for a vision model, or None to leave it to transformers.

    On a CPU that gains by it, a model left to transformers computes its attention by `attention.attend`.

    Args:
        model: a classifier of transformers, or a CLIP's vision model, in fp32.
        factor_C: factor for the bytes of a channel.
        offset_C: summand of a channel, after the factor.
        image_size: height and width of the model's input.
        is_compiled: the model will be compiled by torch, which excludes the fast encoder.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    from vitscore.models.cpu_bf16 import attention
    from vitscore.models.cpu_bf16.trunk import Trunk, Unsuitable

    if not attention.is_faster_here():
        return None
    if not is_compiled:
        try:
            return Trunk(model, factor_C=factor_C, offset_C=offset_C, image_size=image_size)
        except Unsuitable:
            pass
    attention.use_on(model)
    return None

"""Buffer for the row kernel's outputs, on the device and on the host, that is copied in one transfer.

The kernel writes four arrays. Copied separately, they would cost four launches and four small transfers for every model
and batch; as views of one buffer they cost one. `forward_cuda` owns the buffers; the kernel itself sees plain arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vitscore.kernels import RowScores

# Axes: B rows, T the k of top-k.

NUM_FIGURES = 5
"""Label log-probability, sum of squares, log-sum-exp, margin, entropy: the order of `DeviceRows`."""


class ScoreBuffer:
    """Typed views of a buffer of bytes.

    Args:
        whole: uint8, `num_bytes(max_rows, width)` long.
        max_rows: B.
        width: T.
    """

    def __init__(self, whole: torch.Tensor, *, max_rows: int, width: int) -> None:
        self.whole = whole
        ids, floats = max_rows * width * 4, NUM_FIGURES * max_rows * 4
        # The four-byte numbers come first, so that every view is aligned.
        pieces = torch.split(whole, [ids, ids, floats, max_rows])
        self.ids_BT = pieces[0].view(torch.int32).view(max_rows, width)
        self.probs_BT = pieces[1].view(torch.float32).view(max_rows, width)
        self.figures_5B = pieces[2].view(torch.float32).view(NUM_FIGURES, max_rows)
        self.is_finite_B = pieces[3]

    @staticmethod
    def num_bytes(max_rows: int, width: int) -> int:
        return max_rows * (2 * width * 4 + NUM_FIGURES * 4 + 1)

    @property
    def arrays(self) -> tuple[torch.Tensor, ...]:
        """The kernel's output arrays, in the kernel's order."""
        return self.ids_BT, self.probs_BT, self.figures_5B, self.is_finite_B

    def read(self, num_rows: int) -> RowScores:
        """Return copies of the first rows; the buffer may then be overwritten."""
        ids_BT = copied(self.ids_BT[:num_rows])
        probs_BT = copied(self.probs_BT[:num_rows])
        label_logprob, sum_sq_prob, log_sum_exp, margin, entropy = copied(self.figures_5B[:, :num_rows])
        return RowScores(
            pred=ids_BT[:, 0].copy(),
            prob=probs_BT[:, 0].copy(),
            topk=ids_BT,
            topk_prob=probs_BT,
            label_logprob=label_logprob,
            sum_sq_prob=sum_sq_prob,
            log_sum_exp=log_sum_exp,
            margin=margin,
            entropy=entropy,
            is_finite=copied(self.is_finite_B[:num_rows]).astype(bool),
        )


def copied(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Copy a host tensor to a new NumPy array."""
    return np.array(tensor.numpy(), order="C")

"""NumPy twins of the kernels in this folder, as oracles for tests.

Axes: R rows of D numbers or N scores; B images of H W pixels and C channels.
"""

from __future__ import annotations

import numpy as np

from vitscore.kernels.arrays import FloatArray, IntArray


def softmax_reference(scores_RN: FloatArray, scale: float) -> FloatArray:
    """Return the softmax of scaled rows, in float64."""
    scaled_RN = np.asarray(scores_RN, np.float64) * scale
    exp_RN = np.exp(scaled_RN - scaled_RN.max(axis=1, keepdims=True))
    probs_RN: FloatArray = exp_RN / exp_RN.sum(axis=1, keepdims=True)
    return probs_RN


def layer_norm_reference(rows_RD: FloatArray, weight_D: FloatArray, bias_D: FloatArray, epsilon: float) -> FloatArray:
    """Return normalised rows, in float64."""
    off_RD = np.asarray(rows_RD, np.float64) - np.mean(rows_RD, axis=1, dtype=np.float64, keepdims=True)
    variance_R1 = np.mean(off_RD**2, axis=1, keepdims=True)
    normed_RD: FloatArray = off_RD / np.sqrt(variance_R1 + epsilon) * weight_D + bias_D
    return normed_RD


def attend_reference(
    queries_FQ: FloatArray, keys_NK: FloatArray, *, num_images: int, num_heads: int, depth: int, scale: float
) -> FloatArray:
    """Return the attention of each image and head, in float64; the columns are those of `attend_bfloat16`."""
    columns = keys_NK.shape[1]
    parts = queries_FQ[:, :depth], keys_NK[:, columns - 2 * depth : columns - depth], keys_NK[:, columns - depth :]
    query, key, value = (
        np.asarray(part, np.float64).reshape(num_images, -1, num_heads, depth // num_heads).swapaxes(1, 2)
        for part in parts
    )
    scores = query @ key.swapaxes(2, 3)
    weights = softmax_reference(scores.reshape(-1, scores.shape[-1]), scale).reshape(scores.shape)
    seen_FD: FloatArray = (weights @ value).swapaxes(1, 2).reshape(-1, depth)
    return seen_FD


def patches_reference(pixels_BHWC: IntArray, factor_C: FloatArray, offset_C: FloatArray, edge: int) -> FloatArray:
    """Return the whole patches of images, with byte * factor + offset in float32, by row, column and channel."""
    values_BHWC: FloatArray = pixels_BHWC.astype(np.float32) * factor_C.astype(np.float32) + offset_C.astype(np.float32)
    patches: list[FloatArray] = [
        image[y : y + edge, x : x + edge].reshape(-1)
        for image in values_BHWC
        for y in range(0, image.shape[0] - edge + 1, edge)
        for x in range(0, image.shape[1] - edge + 1, edge)
    ]
    return np.stack(patches)

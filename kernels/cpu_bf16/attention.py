"""Compute attention among few tokens in bfloat16: scores, softmax and weighted values of a head in one pass.

Runs between a layer's first and second matrix product on a CPU. With 17 tokens, the products of attention are too small
for oneDNN to repay the calls: for demo-vit (17 tokens, 4 heads of width 24) this kernel takes 2.4 us per image and
layer, but 3.7 us as two products, `softmax_bfloat16` and the copies that they need. Queries, keys and values are read
in place, side by side in the rows of the layer's product. Intermediate values are fp32; the result is rounded to
bfloat16 once. An image's bits do not depend on the other images of the batch. Inner functions take many
arguments, since numba inlines them with plain numbers and arrays only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from vitscore.errors import UsageError
from vitscore.kernels.arrays import FloatArray, IntArray
from vitscore.kernels.compiled import compiled
from vitscore.kernels.cpu_bf16.lanes import (
    LANES,
    get,
    larger,
    load_lanes,
    narrow,
    power_of_two,
    put,
    spread,
    spread_from,
    store_lanes,
    times_plus,
    widen,
    zero_lanes,
)

# Axes: B images, F queries of an image, N keys and values of an image, H heads, E width of a head, D = H * E,
# Q = D or 3 D (queries only, or queries, keys and values), K = 2 D or 3 D.

_LOG2_E = math.log2(math.e)
_LOWEST = np.float32(-3e38)
_ONE = np.float32(1)
_TOGETHER = 6
"""Number of keys (in `_score`) or queries (in `_mix`) whose sums are held in registers at a time."""


def attend_bfloat16(
    queries_FQ: IntArray, keys_NK: IntArray, *, num_images: int, num_heads: int, scale: float, out_FD: IntArray
) -> None:
    """Write softmax(scale * queries keys') values of each image and head.

    Args:
        queries_FQ: the bits of bfloat16 numbers as int16, C-contiguous, with F consecutive rows per image; the first D
            columns are the queries, with E adjacent columns per head.
        keys_NK: as `queries_FQ`, with N rows per image; the last D columns are the values, the D before them the keys.
            May be the same array.
        num_images: number of images.
        num_heads: number of heads.
        scale: factor of the scores, above 0.
        out_FD: int16, C-contiguous, with as many rows as `queries_FQ`; its width is D. If a query or one of its scores
            is NaN or infinite, its result in that head is NaN.

    Raises:
        UsageError: the arrays have the wrong type or shape, or the scale is not above 0.
    """
    arrays = (queries_FQ, keys_NK, out_FD)
    are_tables = all(array.ndim == 2 and array.dtype == np.int16 and array.flags.c_contiguous for array in arrays)
    if not (are_tables and _fit(*arrays, num_images=num_images, num_heads=num_heads) and scale > 0):
        got = ", ".join(f"{array.dtype} {array.shape}" for array in arrays)
        raise UsageError(
            "attention arrays do not fit",
            expected=f"int16 (F, Q), (N, K), (F, D), {num_images} images, {num_heads} heads, scale above 0",
            got=f"{got}, scale {scale}",
        )
    _attend(
        queries_FQ.reshape(-1),
        keys_NK.reshape(-1),
        num_images,
        len(queries_FQ) // num_images,
        len(keys_NK) // num_images,
        num_heads,
        out_FD.shape[1] // num_heads,
        np.float32(scale * _LOG2_E),
        out_FD.reshape(-1),
    )


def _fit(queries_FQ: IntArray, keys_NK: IntArray, out_FD: IntArray, *, num_images: int, num_heads: int) -> bool:
    rows, width = out_FD.shape
    return (
        num_images > 0
        and num_heads > 0
        and rows == len(queries_FQ) > 0
        and len(keys_NK) > 0
        and not (rows % num_images or len(keys_NK) % num_images or width % num_heads)
        and width > 0
        and queries_FQ.shape[1] >= width
        and keys_NK.shape[1] >= 2 * width
    )


@register_jitable(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def _transpose(
    query_FQ: FloatArray,
    query_at: int,
    per_query: int,
    num_queries: int,
    width: int,
    padded: int,
    turned_EF: FloatArray,
) -> None:
    """Transpose a head's queries, so that a lane holds one query and reductions need no exchange between lanes."""
    for f in range(num_queries):
        for e in range(width):
            put(turned_EF, e * padded + f, get(query_FQ, query_at + f * per_query + e))


@register_jitable(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def _score(
    turned_EF: FloatArray,
    f: int,
    padded: int,
    key_NK: FloatArray,
    key_at: int,
    per_key: int,
    num_keys: int,
    width: int,
    weight_NF: FloatArray,
) -> Any:
    """Write the scores of `LANES` queries from `f` on with all keys, and return the largest score of each query."""
    zero, largest = zero_lanes(), spread(_LOWEST)
    last_at = key_at + (num_keys - 1) * per_key
    for n in range(0, num_keys, _TOGETHER):
        # Past the last key, the last one is used again.
        key_0 = key_at + n * per_key
        key_1 = min(key_0 + per_key, last_at)
        key_2 = min(key_0 + 2 * per_key, last_at)
        key_3 = min(key_0 + 3 * per_key, last_at)
        key_4 = min(key_0 + 4 * per_key, last_at)
        key_5 = min(key_0 + 5 * per_key, last_at)
        sum_0, sum_1, sum_2, sum_3, sum_4, sum_5 = zero, zero, zero, zero, zero, zero
        for e in range(width):
            query = load_lanes(turned_EF, e * padded + f)
            sum_0 = times_plus(query, spread_from(key_NK, key_0 + e), sum_0)
            sum_1 = times_plus(query, spread_from(key_NK, key_1 + e), sum_1)
            sum_2 = times_plus(query, spread_from(key_NK, key_2 + e), sum_2)
            sum_3 = times_plus(query, spread_from(key_NK, key_3 + e), sum_3)
            sum_4 = times_plus(query, spread_from(key_NK, key_4 + e), sum_4)
            sum_5 = times_plus(query, spread_from(key_NK, key_5 + e), sum_5)
        largest = larger(larger(sum_0, sum_1), larger(larger(sum_2, sum_3), larger(larger(sum_4, sum_5), largest)))
        at = n * padded + f
        store_lanes(weight_NF, at, sum_0)
        store_lanes(weight_NF, at + padded, sum_1)
        store_lanes(weight_NF, at + 2 * padded, sum_2)
        store_lanes(weight_NF, at + 3 * padded, sum_3)
        store_lanes(weight_NF, at + 4 * padded, sum_4)
        store_lanes(weight_NF, at + 5 * padded, sum_5)
    return largest


@register_jitable(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def _weigh(weight_NF: FloatArray, f: int, padded: int, num_keys: int, largest: Any, scales: Any) -> Any:
    """Replace the scores of `LANES` queries by unnormalised weights; return the reciprocals of the weights' sums."""
    total, invalid = zero_lanes(), zero_lanes()
    for n in range(num_keys):
        off = load_lanes(weight_NF, n * padded + f) - largest
        # Becomes NaN if a score or its distance from the largest one is not finite.
        invalid = times_plus(off, zero_lanes(), invalid)
        power = power_of_two(off * scales)
        store_lanes(weight_NF, n * padded + f, power)
        total = total + power
    return spread(_ONE) / (total + invalid)


@register_jitable(inline="always")  # type: ignore[untyped-decorator, unused-ignore]
def _mix(
    weight_NF: FloatArray,
    f: int,
    padded: int,
    factor_F: FloatArray,
    key_NK: FloatArray,
    value_at: int,
    per_key: int,
    num_keys: int,
    answer_FD: FloatArray,
    to: int,
    per_answer: int,
) -> None:
    """Write the weighted values of `_TOGETHER` queries from `f` on, in `LANES` columns."""
    zero = zero_lanes()
    sum_0, sum_1, sum_2, sum_3, sum_4, sum_5 = zero, zero, zero, zero, zero, zero
    for n in range(num_keys):
        at, value = n * padded + f, load_lanes(key_NK, value_at + n * per_key)
        sum_0 = times_plus(spread_from(weight_NF, at), value, sum_0)
        sum_1 = times_plus(spread_from(weight_NF, at + 1), value, sum_1)
        sum_2 = times_plus(spread_from(weight_NF, at + 2), value, sum_2)
        sum_3 = times_plus(spread_from(weight_NF, at + 3), value, sum_3)
        sum_4 = times_plus(spread_from(weight_NF, at + 4), value, sum_4)
        sum_5 = times_plus(spread_from(weight_NF, at + 5), value, sum_5)
    store_lanes(answer_FD, to, sum_0 * spread_from(factor_F, f))
    store_lanes(answer_FD, to + per_answer, sum_1 * spread_from(factor_F, f + 1))
    store_lanes(answer_FD, to + 2 * per_answer, sum_2 * spread_from(factor_F, f + 2))
    store_lanes(answer_FD, to + 3 * per_answer, sum_3 * spread_from(factor_F, f + 3))
    store_lanes(answer_FD, to + 4 * per_answer, sum_4 * spread_from(factor_F, f + 4))
    store_lanes(answer_FD, to + 5 * per_answer, sum_5 * spread_from(factor_F, f + 5))


@compiled
def _attend(
    queries: IntArray,
    keys: IntArray,
    num_images: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    width: int,
    scale: np.float32,
    out: IntArray,
) -> None:
    per_query, per_key = queries.size // (num_images * num_queries), keys.size // (num_images * num_keys)
    depth = num_heads * width
    padded = (num_queries + LANES - 1) // LANES * LANES
    per_answer = depth + LANES
    # Loads past a head or the last row read the next head, the next row or zeros; their results are not kept.
    query_FQ = np.zeros(num_queries * per_query + LANES, np.float32)
    key_NK = np.zeros(num_keys * per_key + LANES, np.float32)
    turned_EF = np.zeros(width * padded, np.float32)
    weight_NF = np.zeros((num_keys + _TOGETHER) * padded, np.float32)
    factor_F = np.zeros(padded + _TOGETHER, np.float32)
    answer_FD = np.zeros((num_queries + _TOGETHER) * per_answer, np.float32)
    scales = spread(scale)
    for image in range(num_images):
        widen(queries, image * num_queries * per_query, num_queries * per_query, query_FQ)
        widen(keys, image * num_keys * per_key, num_keys * per_key, key_NK)
        for head in range(num_heads):
            query_at, value_at = head * width, per_key - depth + head * width
            _transpose(query_FQ, query_at, per_query, num_queries, width, padded, turned_EF)
            for f in range(0, padded, LANES):
                largest = _score(turned_EF, f, padded, key_NK, value_at - depth, per_key, num_keys, width, weight_NF)
                store_lanes(factor_F, f, _weigh(weight_NF, f, padded, num_keys, largest, scales))
            for f in range(0, num_queries, _TOGETHER):
                for e in range(0, width, LANES):
                    to = f * per_answer + query_at + e
                    _mix(
                        weight_NF,
                        f,
                        padded,
                        factor_F,
                        key_NK,
                        value_at + e,
                        per_key,
                        num_keys,
                        answer_FD,
                        to,
                        per_answer,
                    )
        for f in range(num_queries):
            narrow(answer_FD, f * per_answer, depth, out, (image * num_queries + f) * depth)

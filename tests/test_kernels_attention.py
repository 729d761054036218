"""The kernel for attention among few tokens, compared with its NumPy twin."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vitscore.errors import UsageError
from vitscore.kernels.cpu_bf16 import attend_bfloat16
from vitscore.kernels.cpu_bf16.reference import attend_reference


def bits(tensor: torch.Tensor) -> Any:
    return tensor.view(torch.int16).numpy()


def inputs(num_rows: int, num_columns: int, *, gain: float = 1.0, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (gain * torch.randn(num_rows, num_columns, generator=random)).bfloat16()


def attend(
    queries: torch.Tensor, keys: torch.Tensor, *, images: int, heads: int, depth: int, scale: float
) -> torch.Tensor:
    out = torch.full((len(queries), depth), 7.0, dtype=torch.bfloat16)
    attend_bfloat16(bits(queries), bits(keys), num_images=images, num_heads=heads, scale=scale, out_FD=bits(out))
    return out


def assert_near(computed: torch.Tensor, exact: np.ndarray, values: torch.Tensor) -> None:
    # Sums of the values may cancel, so the error is relative to the largest value; rounding to bfloat16 adds 1 in 256.
    bound = values.abs().max().item()
    np.testing.assert_allclose(computed.double().numpy(), exact, rtol=2**-8, atol=4e-6 * bound)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 17, 26, 32, 50])
@pytest.mark.parametrize(("heads", "width"), [(4, 24), (1, 1), (3, 7), (2, 64), (5, 16)])
@pytest.mark.parametrize("gain", [1.0, 5.0])
def test_matches_the_numpy_twin(tokens: int, heads: int, width: int, gain: float) -> None:
    depth = heads * width
    joined = inputs(3 * tokens, 3 * depth, gain=gain, seed=tokens)
    how = {"num_images": 3, "num_heads": heads, "depth": depth, "scale": width**-0.5}
    exact = attend_reference(joined.double().numpy(), joined.double().numpy(), **how)
    computed = attend(joined, joined, images=3, heads=heads, depth=depth, scale=width**-0.5)
    assert_near(computed, exact, joined[:, -depth:])


@settings(max_examples=100, deadline=None)
@given(
    images=st.integers(1, 3),
    queries=st.integers(1, 20),
    keys=st.integers(1, 40),
    heads=st.integers(1, 3),
    width=st.integers(1, 40),
    scale=st.floats(0.01, 2),
    beside=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_queries_in_a_separate_array_match_the_numpy_twin(
    images: int, queries: int, keys: int, heads: int, width: int, scale: float, beside: int, seed: int
) -> None:
    depth = heads * width
    query, key = (
        inputs(images * queries, depth + beside, seed=seed),
        inputs(images * keys, 2 * depth + beside, seed=seed + 1),
    )
    exact = attend_reference(
        query.double().numpy(), key.double().numpy(), num_images=images, num_heads=heads, depth=depth, scale=scale
    )
    computed = attend(query, key, images=images, heads=heads, depth=depth, scale=scale)
    assert_near(computed, exact, key[:, -depth:])


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    joined = inputs(6 * 17, 3 * 96)
    whole = attend(joined, joined, images=6, heads=4, depth=96, scale=0.2)
    for image in range(6):
        rows = slice(17 * image, 17 * image + 17)
        alone = attend(joined[rows], joined[rows], images=1, heads=4, depth=96, scale=0.2)
        assert torch.equal(alone, whole[rows])


@pytest.mark.parametrize("wrong", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [30, 96 + 30, 192 + 30])
def test_an_invalid_number_affects_only_its_head_and_image(wrong: float, column: int) -> None:
    joined = inputs(3 * 17, 3 * 96)
    clean = attend(joined, joined, images=3, heads=4, depth=96, scale=0.2)
    joined[17 + 4, column] = wrong
    affected = attend(joined, joined, images=3, heads=4, depth=96, scale=0.2)
    changed = affected != clean
    assert not changed[:17].any()
    assert not changed[34:].any()
    assert not changed[:, [*range(24), *range(48, 96)]].any()
    is_invalid = ~affected[17:34, 24:48].isfinite()
    # A query affects only its result; a key or a value affects those of all queries.
    rows, columns = ([4], slice(None)) if column < 96 else (slice(None), slice(None))
    if column >= 192:
        columns = slice(6, 7)
    assert is_invalid[rows][:, columns].all()


def test_scores_far_apart_choose_one_value() -> None:
    joined = torch.zeros(4, 3, dtype=torch.bfloat16)
    joined[:, 0] = 1
    joined[:, 1] = torch.tensor([0, 3000, -3000, 1])
    joined[:, 2] = torch.tensor([5, 6, 7, 8])
    assert attend(joined, joined, images=1, heads=1, depth=1, scale=1.0).flatten().tolist() == [6, 6, 6, 6]


@pytest.mark.parametrize(
    "change",
    [
        {"num_images": 3},
        {"num_images": 0},
        {"num_heads": 5},
        {"num_heads": 0},
        {"scale": 0.0},
        {"scale": np.nan},
        {"queries_FQ": np.zeros((8, 7), np.int16)},
        {"keys_NK": np.zeros((8, 15), np.int16)},
        {"queries_FQ": np.zeros((6, 8), np.int16)},
        {"keys_NK": np.zeros((0, 24), np.int16)},
        {"queries_FQ": np.zeros((8, 8), np.float32)},
        {"keys_NK": np.zeros((8, 48), np.int16)[:, ::2]},
        {"out_FD": np.zeros((8, 0), np.int16)},
        {"out_FD": np.zeros(64, np.int16)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    rows = np.zeros((8, 24), np.int16)
    fitting = {
        "queries_FQ": rows,
        "keys_NK": rows,
        "num_images": 2,
        "num_heads": 2,
        "scale": 1.0,
        "out_FD": np.zeros((8, 8), np.int16),
    }
    attend_bfloat16(**fitting)
    with pytest.raises(UsageError, match="attention arrays do not fit"):
        attend_bfloat16(**{**fitting, **change})

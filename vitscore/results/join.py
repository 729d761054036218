"""Join the samples of several runs: find the rows that belong to the same sample.

Samples are matched by shard name and key, or by key alone; a name must be unique in both runs to match. Rows without a
match are counted, not guessed. The comparison of runs computes its figures on the joined rows. Axes: N rows of a run,
J joined samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vitscore.kernels.arrays import Array


@dataclass(frozen=True)
class Joined:
    """The samples common to all runs."""

    rows: list[Array]
    """For every run, the rows (J) of the common samples, in the first run's order."""
    num_by_key: int
    """Number of samples matched by key alone."""


def join(names: Sequence[tuple[pa.Array, pa.Array]]) -> Joined:
    """Join runs by the names of their samples.

    Args:
        names: for every run, the shards and the keys of its rows.
    """
    first_shards, first_keys = names[0]
    num_rows = len(first_keys)
    matches = [np.arange(num_rows)]
    is_by_key_N = np.zeros(num_rows, bool)
    for shards, keys in names[1:]:
        match_N = np.full(num_rows, -1, np.int64)
        # The whole shard name comes first: two folders of a corpus may hold shards of the same base name.
        pairs = [
            (with_shard(first_shards, first_keys), with_shard(shards, keys)),
            (with_shard(base_names(first_shards), first_keys), with_shard(base_names(shards), keys)),
            (first_keys, keys),
        ]
        for level, (ours, theirs) in enumerate(pairs):
            is_new_N = _match(match_N, ours, theirs)
            if level == len(pairs) - 1:
                is_by_key_N |= is_new_N
            if (match_N >= 0).all():
                break
        matches.append(match_N)
    is_common_N = np.all([match_N >= 0 for match_N in matches], axis=0)
    return Joined([match_N[is_common_N] for match_N in matches], int((is_by_key_N & is_common_N).sum()))


def _match(match_N: Array, ours: pa.Array, theirs: pa.Array) -> Array:
    """Match rows without a partner by names that are unique on both sides, in place; return the newly matched rows."""
    indices = pc.index_in(ours, value_set=theirs)
    row_N = indices.fill_null(-1).to_numpy().astype(np.int64)
    is_taken = np.zeros(len(theirs), bool)
    is_taken[match_N[match_N >= 0]] = True
    is_free = is_unique(theirs) & ~is_taken
    is_new_N: Array = (row_N >= 0) & (match_N < 0) & is_unique(ours)
    is_new_N[is_new_N] &= is_free[row_N[is_new_N]]
    match_N[is_new_N] = row_N[is_new_N]
    return is_new_N


def is_unique(values: pa.Array) -> Array:
    """Return a mask of the values that occur once."""
    codes = values.dictionary_encode().indices.to_numpy()
    return np.asarray(np.bincount(codes)[codes] == 1) if len(codes) else np.zeros(0, bool)


def with_shard(shards: pa.Array, keys: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(shards, keys, "\0")


def base_names(shards: pa.Array) -> pa.Array:
    """Return shard names without their folders."""
    encoded = shards.dictionary_encode()
    bases = [name.rstrip("/").rpartition("/")[2] for name in encoded.dictionary.to_pylist()]
    return pa.array(bases, pa.string()).take(encoded.indices)

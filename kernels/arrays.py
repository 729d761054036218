"""What the kernels accept as arrays: NumPy arrays, CPU tensors, anything that can lend its memory.

Stands before every kernel: whatever comes in leaves as a C-contiguous NumPy array of a type that a kernel was written
for, without a copy where none is needed. Tensors are read through the array and DLPack protocols, so no framework is
imported. Checks types and shapes; the kernels check values.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from vitscore.errors import LabelError, UsageError

Array: TypeAlias = npt.NDArray[Any]
IntArray: TypeAlias = npt.NDArray[Any]
FloatArray: TypeAlias = npt.NDArray[Any]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_INT32 = np.dtype(np.int32)
_INT64 = np.dtype(np.int64)


def as_array(values: Any) -> npt.NDArray[Any]:
    """View anything array-like as a NumPy array: by the array protocol, else by DLPack."""
    if isinstance(values, np.ndarray):
        return values
    try:
        return np.asarray(values)
    except (TypeError, RuntimeError) as error:
        problem: Exception = error
    try:
        return np.from_dlpack(values)
    except (TypeError, RuntimeError, BufferError, AttributeError, ValueError):
        raise UsageError(
            "values cannot be read as an array",
            where=type(values).__name__,
            got=str(problem),
            next_step="Pass a NumPy array or a detached tensor in CPU memory.",
        ) from None


def as_ids(values: Any, what: str = "labels") -> IntArray:
    """Bring class ids to one contiguous int32 or int64 axis."""
    ids = as_array(values)
    if ids.dtype != _INT32 and ids.dtype != _INT64:
        # Every id of the narrower types fits; an empty list arrives as float64.
        if ids.size and (ids.dtype.kind not in "iub" or ids.dtype == np.uint64):
            raise LabelError(f"{what} are not class ids", expected="int32 or int64", got=str(ids.dtype))
        ids = ids.astype(_INT64)
    if ids.ndim != 1:
        raise LabelError(f"{what} are not one axis of class ids", expected="shape (B,)", got=str(ids.shape))
    return np.ascontiguousarray(ids)


def as_logits(values: Any) -> FloatArray:
    """Bring logits to contiguous float32 of shape (B, K), K at least 1."""
    logits_BK = as_array(values)
    if logits_BK.ndim != 2 or logits_BK.shape[1] == 0 or logits_BK.dtype.kind not in "fiu":
        got = f"{logits_BK.dtype} of shape {logits_BK.shape}"
        raise UsageError("logits are not a table", expected="numbers of shape (B, K), K at least 1", got=got)
    return np.ascontiguousarray(logits_BK, dtype=np.float32)


def check_same_length(**arrays: npt.NDArray[Any]) -> None:
    """Refuse arrays whose first axes differ: a kernel would read beyond the shorter one."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError("arrays differ in length", expected="one row a sample in each", got=got)

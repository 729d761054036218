"""Convert arguments to the arrays that kernels accept: from NumPy arrays, CPU tensors and other array-likes.

Called before every kernel. The result is a C-contiguous NumPy array of a supported type, copied only if necessary.
Tensors are read through the array and DLPack protocols, so no framework is imported. Types and shapes are checked here;
the kernels check values.
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
    """View an array-like object as a NumPy array, through the array protocol or DLPack.

    Raises:
        UsageError: the object supports neither.
    """
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
            "cannot read the values as an array",
            where=type(values).__name__,
            got=str(problem),
            next_step="Pass a NumPy array or a detached tensor in CPU memory.",
        ) from None


def as_ids(values: Any, what: str = "labels") -> IntArray:
    """Return class ids as a contiguous int32 or int64 array of one axis.

    Args:
        values: any array-like object of integers or booleans.
        what: the name of the values in error messages.

    Raises:
        LabelError: the values are not integers, or have several axes.
    """
    ids = as_array(values)
    if ids.dtype != _INT32 and ids.dtype != _INT64:
        # Every id of the narrower types fits; an empty list arrives as float64.
        if ids.size and (ids.dtype.kind not in "iub" or ids.dtype == np.uint64):
            raise LabelError(f"{what} are not class ids", expected="int32 or int64", got=str(ids.dtype))
        ids = ids.astype(_INT64)
    if ids.ndim != 1:
        raise LabelError(f"{what} have the wrong shape", expected="(B,)", got=str(ids.shape))
    return np.ascontiguousarray(ids)


def as_logits(values: Any) -> FloatArray:
    """Return logits as a contiguous float32 array of shape (B, K) with K at least 1.

    Raises:
        UsageError: the values are not numbers, or have another shape.
    """
    logits_BK = as_array(values)
    if logits_BK.ndim != 2 or logits_BK.shape[1] == 0 or logits_BK.dtype.kind not in "fiu":
        got = f"{logits_BK.dtype} of shape {logits_BK.shape}"
        raise UsageError("logits are not a matrix", expected="numbers of shape (B, K), K at least 1", got=got)
    return np.ascontiguousarray(logits_BK, dtype=np.float32)


def check_same_length(**arrays: npt.NDArray[Any]) -> None:
    """Raise UsageError if the first axes of arrays differ: a kernel would read past the end of the shortest."""
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        got = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError("arrays differ in length", expected="one row per sample in every array", got=got)

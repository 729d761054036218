"""numba kernels on arrays: logits to predictions, predictions to counts. No I/O, no model."""

"""Random draws that stay the same whatever the NumPy version, for splits and orders that outlive an installation."""

import numpy as np


def permutation(size: int, *key: int) -> np.ndarray:
    """Returns 0 to size - 1 in the random order of the key, (size,) int64.

    Keys that differ only by zeros at their end give one order (NumPy's SeedSequence fills up with zeros).

    The order is that of raw PCG64 bits, whose stream NumPy promises to keep; the methods of its `Generator` may change.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(size), kind="stable")

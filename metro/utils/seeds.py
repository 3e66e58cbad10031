"""Random numbers determined by their keys alone, whatever process or order draws them."""

import numpy as np


def draws(*keys: int | np.ndarray) -> np.ndarray:
    """Draw uniform uint64 numbers, independent for different keys.

    One round of splitmix64 (Steele et al., 2014) over each key in turn; keys broadcast.

    Args:
        keys: integers or integer arrays, such as seed, epoch, index.

    Returns:
        uint64 array of the keys' broadcast shape.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state + np.asarray(key).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state

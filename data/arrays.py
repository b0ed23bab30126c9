"""What NumPy and torch name differently, so that one arithmetic serves the arrays of both: NumPy's, which on a CPU are
two to four times as fast where few numbers at a time are worked on, and torch's, which are on any device.

Words of 64 bits are int64, and wrap around."""

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor
# SplitMix64 (Steele, Lea, Flood, OOPSLA 2014): its step, 2^64 over the golden ratio, and its factors
GAMMA, MIX1, MIX2 = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def module_of(x: Array) -> ModuleType:
    """numpy or torch, for functions that both have."""
    return torch if isinstance(x, Tensor) else np


def like(values: np.ndarray, x: Array) -> Array:
    """The values where x is."""
    return torch.from_numpy(values).to(x.device) if isinstance(x, Tensor) else values


def cast(x: Array, dtype: str) -> Array:
    """To float64, int64 and so on."""
    return x.to(getattr(torch, dtype)) if isinstance(x, Tensor) else x.astype(dtype)


def normals(uniform: Array) -> Array:
    """The standard normal distribution's inverse of float64 in (0, 1)."""
    if isinstance(uniform, Tensor):
        return torch.special.ndtri(uniform)
    return torch.special.ndtri(torch.from_numpy(uniform)).numpy()


def shifted(x: Array, bits: int) -> Array:
    """Words to the right, as they are unsigned."""
    y = x >> bits
    y &= (1 << 64 - bits) - 1
    return y


def mix64(x: Array) -> Array:
    """SplitMix64's finaliser, a bijection of words; x is overwritten."""
    x ^= shifted(x, 30)
    x *= MIX1
    x ^= shifted(x, 27)
    x *= MIX2
    x ^= shifted(x, 31)
    return x

"""Which weights an id reads: twins of csrc/index_map.h in torch int64, whose arithmetic wraps as unsigned does."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

POSITION, FIRST_SLOT, NUM_SLOTS, NUM_EMBEDDINGS, SEED = range(
    5
)  # columns of a slab's tables [F, 5]: Table in index_map.h


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the unsigned number (torch's shift copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(seed: Tensor, i: Tensor) -> Tensor:
    """Number i of the SplitMix64 stream that starts at seed (Steele, Lea, Flood, OOPSLA 2014), as int64 bits."""
    z = seed + (i + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def reduce_range(hashes: Tensor, n: Tensor) -> Tensor:
    """High 64 bits of the unsigned product hash * n: uniform in [0, n) (Lemire, ACM TOMACS 2019). n < 2^63."""
    low = (1 << 32) - 1
    a, b = _shift_right(hashes, 32), hashes & low
    c, d = n >> 32, n & low
    middle = _shift_right(b * d, 32) + ((a * d) & low) + ((b * c) & low)
    return a * c + _shift_right(a * d, 32) + _shift_right(b * c, 32) + _shift_right(middle, 32)


def _dense_slots(ids: Tensor, tables: Tensor, chunks: Tensor) -> Tensor:
    return (tables[:, FIRST_SLOT] + ids)[:, None].expand(-1, chunks.numel())


def _hashed_slots(ids: Tensor, tables: Tensor, chunks: Tensor) -> Tensor:
    key = splitmix64(tables[:, SEED], ids)
    hashes = splitmix64(key[:, None], chunks)
    return tables[:, FIRST_SLOT, None] + reduce_range(hashes, tables[:, NUM_SLOTS, None])


class Map(NamedTuple):
    """slots(ids [M], tables [M, 5], chunks [C]) -> [M, C]; ranged: ids have an upper limit."""

    slots: Callable[[Tensor, Tensor, Tensor], Tensor]
    ranged: bool


MAPS = (Map(_dense_slots, True), Map(_hashed_slots, False))  # in the order of embeddings.ops.IndexMap

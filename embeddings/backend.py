"""What a backend is: a frozen dataclass of hyperparameters, how many slots a feature gets, and which map reads them.

Features whose backends compare equal share one slab and one launch. A subclass sets

    index_map   its struct in csrc/index_map.h
    width       numbers in a slot, Z; a divisor of embedding_dim
    slots(rows) feature -> slots, for features with these numbers of rows
"""

from dataclasses import dataclass
from typing import ClassVar

from embeddings.index_map import MAPS
from embeddings.ops import Accumulate, IndexMap

TABLE_BYTES = 5 * 8  # a feature's row in the slab's table of slices and seeds: kept, so counted
NUMBER_BYTES = 4  # float32


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The hyperparameters that every backend has. Raises ValueError for a value out of its range."""

    embedding_dim: int  # D
    compression: float  # bytes of the compressed features / their dense bytes, in (0, 1]
    accumulate: str  # gradients: sorted | atomic | rows

    index_map: ClassVar[IndexMap]

    def __post_init__(self) -> None:
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim={self.embedding_dim} must be at least 1")
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression={self.compression} must be in (0, 1]: compressed bytes over dense bytes")
        allowed = [kind.name.lower() for kind in Accumulate]
        if self.accumulate not in allowed:
            raise ValueError(f"accumulate={self.accumulate!r} is not one of {', '.join(allowed)}")

    @property
    def name(self) -> str:
        """The word on the command line."""
        return type(self).__name__.lower()

    @property
    def ranged(self) -> bool:
        """True if ids have an upper limit, so that unseen ones need an out-of-vocabulary row."""
        return MAPS[self.index_map].ranged

    @property
    def width(self) -> int:
        raise NotImplementedError

    def slots(self, rows: dict[str, int]) -> dict[str, int]:
        raise NotImplementedError

    def dense_bytes(self, num_embeddings: int) -> int:
        """Bytes of a feature's uncompressed float32 table."""
        return num_embeddings * self.embedding_dim * NUMBER_BYTES

    def feature_bytes(self, num_slots: int) -> int:
        """Bytes kept for a feature with so many slots: its weights and its row of the table."""
        return num_slots * self.width * NUMBER_BYTES + TABLE_BYTES


def spread(backend: Backend, rows: dict[str, int], smallest: int = 1) -> dict[str, int]:
    """Slots for each feature so that bytes over all of them are backend.compression of their dense bytes, within 1%.

    Each feature gets its own share, rounded, whatever the others are; only if that misses the total, because features
    too small for their share got `smallest` slots, the others give way. Raises ValueError naming the smallest ratio
    within reach, or the nearest one if slots are too coarse.
    """
    total = sum(map(backend.dense_bytes, rows.values()))

    def share(factor: float) -> dict[str, int]:
        wanted = {
            f: (factor * backend.dense_bytes(n) - TABLE_BYTES) / backend.width / NUMBER_BYTES for f, n in rows.items()
        }
        return {f: max(smallest, round(number)) for f, number in wanted.items()}

    def reached(slots: dict[str, int]) -> float:
        return sum(map(backend.feature_bytes, slots.values())) / total

    def miss(slots: dict[str, int]) -> float:
        return abs(reached(slots) / backend.compression - 1)

    slots = nearest = share(backend.compression)
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection to the last bit of the factor, if the plain share is off
        if miss(slots) <= 0.01:
            return slots
        nearest = min(nearest, slots, key=miss)
        middle = (low + high) / 2
        slots = share(middle)
        low, high = (middle, high) if reached(slots) < backend.compression else (low, middle)
    names = ", ".join(list(rows)[:5]) + (", ..." if len(rows) > 5 else "")
    raise ValueError(
        f"compression={backend.compression:g}: embedding={backend.name} cannot reach it for {names}; "
        f"the smallest it can is {reached(share(0)):.4g}, the nearest {reached(nearest):.4g} "
        f"(slots of {backend.width} numbers; a larger dense_below keeps small features out)"
    )

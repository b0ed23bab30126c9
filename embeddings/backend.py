"""What a backend is: a frozen dataclass of hyperparameters, how many slots a feature gets, and which map reads them.

Features whose backends compare equal share one slab and one launch. A subclass sets

    index_map   its struct in csrc/index_map.h
    width       numbers in a slot, Z; a divisor of embedding_dim
    slots(rows) feature -> slots, for features with these numbers of rows
"""

from dataclasses import dataclass
from typing import ClassVar

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
        from embeddings.reference import MAPS

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

    Each feature gets its share, rounded so that the total is right (largest remainder). Raises ValueError naming the
    smallest and the nearest ratio within reach, if features would fall below `smallest` slots or slots are too coarse.
    """
    dense = {feature: backend.dense_bytes(n) for feature, n in rows.items()}
    slot_bytes = backend.width * NUMBER_BYTES
    wanted = {f: (backend.compression * size - TABLE_BYTES) / slot_bytes for f, size in dense.items()}
    floors = {f: max(smallest, int(share)) for f, share in wanted.items()}
    left = round(sum(wanted.values())) - sum(floors.values())
    by_remainder = sorted(wanted, key=lambda f: floors[f] - wanted[f])  # stable: ties keep the features' order
    for feature in by_remainder[: max(0, left)]:
        floors[feature] += 1

    total = sum(dense.values())
    reached = sum(map(backend.feature_bytes, floors.values())) / total
    if abs(reached / backend.compression - 1) > 0.01:
        least = len(rows) * backend.feature_bytes(smallest) / total
        names = ", ".join(rows) if len(rows) <= 5 else f"{', '.join(list(rows)[:5])}, ..."
        raise ValueError(
            f"compression={backend.compression:g}: embedding={backend.name} cannot reach it for {names}; "
            f"the smallest it can is {least:.4g}, the nearest {reached:.4g} "
            f"(slots of {backend.width} numbers; a larger dense_below keeps small features out)"
        )
    return floors

"""What a backend is: a frozen dataclass of hyperparameters that says which weights a feature gets and who reads them.

Its defaults are those of its yaml in conf/embedding, but for `accumulate`: a dense gradient suits every optimizer.

A feature's weights are one slice of slots or more; by each of its probes an id reads one slot or more of a slice.
Features whose backends are equal, but for embedding_dim, share one slab and one launch. A subclass sets

    index_map      how a probe finds its slots: csrc/index_map.h
    widths         numbers in a slot of each slice
    probes(slots)  what an id reads of slices that have so many slots
    fit(n, bytes)  slots of each slice for n ids in about so many bytes
    bound(s, n)    the weights of slice s begin as U(-bound, bound), if they begin `fair`
"""

from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor

from embeddings import index_map as maps
from embeddings.ops import Accumulate, Combine, IndexMap

TABLE_BYTES = 8 * maps.NUM_COLUMNS  # a probe's row in the slab's table of slices and seeds: kept, so counted
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE_BYTES = 4  # of a number of a dense table: float32, whatever the backend's precision
INITS = ("fair", "upstream")


class Probe(NamedTuple):
    """dim numbers of every id, from one slice of its feature."""

    slice: int
    dim: int
    divisor: int = 1  # of a partition
    seed: int | None = None  # of an upstream's hash; None: one of our own


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The hyperparameters that every backend has. Raises ValueError for a value out of its range."""

    embedding_dim: int  # D
    compression: float  # bytes of the compressed features / their dense bytes, in (0, 1]
    accumulate: str = "sorted"  # gradients: sorted | atomic | rows | auto
    init: str = (
        "fair"  # of the weights: fair (a vector's variance is the same under every backend) | upstream (as its authors)
    )

    precision: str = "fp32"  # of the weights: fp32 | bf16 | fp16; sums and states of optimizers are float32

    combine_kind: ClassVar[Combine] = Combine.ADD

    def __post_init__(self) -> None:
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim={self.embedding_dim} must be at least 1")
        if not 0 < self.compression <= 1:
            raise ValueError(f"compression={self.compression} must be in (0, 1]: compressed bytes over dense bytes")
        self._check("accumulate", [*(kind.name.lower() for kind in Accumulate), "auto"])
        self._check("init", INITS)
        self._check("precision", PRECISIONS)

    def _check(self, field: str, allowed) -> None:
        if getattr(self, field) not in allowed:
            raise ValueError(f"{field}={getattr(self, field)!r} is not one of {', '.join(map(str, allowed))}")

    @property
    def name(self) -> str:
        """The word on the command line."""
        return type(self).__name__.lower()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return PRECISIONS[self.precision]

    @property
    def group(self) -> tuple:
        """What features have in common that share a slab."""
        values = (getattr(self, f.name) for f in fields(self) if f.compare and f.name != "embedding_dim")
        return (type(self), *values)

    @property
    def ranged(self) -> bool:
        """True if ids have an upper limit, so that unseen ones need an out-of-vocabulary row."""
        return self.index_map in maps.RANGED

    @property
    def compresses(self) -> bool:
        """Whether `compression` decides the number of slots."""
        return True

    @property
    def is_shared(self) -> bool:
        """Whether all features of the slab read one slice."""
        return False

    @property
    def index_map(self) -> IndexMap:
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        raise NotImplementedError

    def probes(self, slots: tuple[int, ...]) -> list[Probe]:
        raise NotImplementedError

    def fit(self, num_embeddings: int, num_bytes: float) -> tuple[int, ...]:
        raise NotImplementedError

    def bound(self, s: int, num_embeddings: int) -> float:
        """1 / sqrt(num_embeddings) is that of an uncompressed table (Naumov et al. 2019)."""
        return num_embeddings**-0.5

    def initialise(self, weights: Tensor, s: int, num_embeddings: int, generator: Generator) -> None:
        """Draw the weights [slots, width] of slice s."""
        bound = self.bound(s, num_embeddings)
        weights.uniform_(-bound, bound, generator=generator)

    @property
    def finishes(self) -> bool:
        """Whether `finish` has anything to do."""
        return False

    def finish(self, vectors: Tensor, dims: list[int]) -> Tensor:
        """The features' vectors [B, sum of dims] of what the operator returns."""
        return vectors

    def dense_bytes(self, num_embeddings: int) -> int:
        """Bytes of a feature's uncompressed float32 table."""
        return num_embeddings * self.embedding_dim * DENSE_BYTES

    def slice_bytes(self, slots: tuple[int, ...]) -> int:
        """Bytes of slices with so many slots."""
        return sum(n * width for n, width in zip(slots, self.widths, strict=True)) * self.dtype.itemsize

    def feature_bytes(self, slots: tuple[int, ...]) -> int:
        """Bytes kept for a feature with so many slots: its weights and its rows of the table."""
        return self.slice_bytes(slots) + len(self.probes(slots)) * TABLE_BYTES


def spread(backends: dict[str, Backend], rows: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Slots for each feature so that bytes over all of them are the backends' ratio of their dense bytes, within 1%.

    Each feature gets its own share, whatever the others are; only if that misses the total, because features too small
    for their share got the least there is, the others give way. Raises ValueError naming the smallest ratio within
    reach, or the nearest one if slots are too coarse.
    """
    first = next(iter(backends.values()))
    dense = {f: backends[f].dense_bytes(n) for f, n in rows.items()}
    total = sum(dense.values())

    def share(factor: float) -> dict[str, tuple[int, ...]]:
        if first.is_shared:  # the bytes of a pool, but for the features' rows of the table
            pool = first.fit(sum(rows.values()), factor * total - (len(rows) - 1) * TABLE_BYTES)
            return dict.fromkeys(rows, pool)
        return {f: backends[f].fit(n, factor * dense[f]) for f, n in rows.items()}

    def reached(slots: dict[str, tuple[int, ...]]) -> float:
        num_bytes = sum(backends[f].feature_bytes(s) for f, s in slots.items())
        return (num_bytes - (len(rows) - 1) * first.slice_bytes(slots[next(iter(slots))]) * first.is_shared) / total

    def miss(slots: dict[str, tuple[int, ...]]) -> float:
        return abs(reached(slots) / first.compression - 1)

    slots = nearest = share(first.compression)
    if not first.compresses:
        return slots
    low, high = 0.0, 1.0
    for _ in range(60):  # bisection to the last bit of the factor, if the plain share is off
        if miss(slots) <= 0.01:
            return slots
        nearest = min(nearest, slots, key=miss)
        middle = (low + high) / 2
        slots = share(middle)
        low, high = (middle, high) if reached(slots) < first.compression else (low, middle)
    if reached(share(1.0)) < first.compression * 0.99:  # 16-bit numbers are half of float32's bytes
        why = f"the largest it can is {reached(share(1.0)):.4g}"
    else:
        why = f"the smallest it can is {reached(share(0)):.4g}"
    names = ", ".join(list(rows)[:5]) + (", ..." if len(rows) > 5 else "")
    raise ValueError(
        f"compression={first.compression:g}: embedding={first.name} cannot reach it for {names}; "
        f"{why}, the nearest {reached(nearest):.4g} "
        f"(slots of {', '.join(map(str, first.widths))} numbers; a larger dense_below keeps small features out)"
    )

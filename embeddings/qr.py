"""qr: quotient and remainder of an id pick a row each, which are composed; no two ids share both."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from embeddings.backend import TABLE_BYTES, Backend, Probe
from embeddings.ops import Combine, IndexMap

OPERATIONS = {"add": Combine.ADD, "mult": Combine.MULTIPLY, "mul": Combine.MULTIPLY, "concat": Combine.CONCAT}


@dataclass(frozen=True, kw_only=True)
class QR(Backend):
    """Vector `id` composes row id % m of one table and row id // m of another (Shi et al., KDD 2020, algorithm 2).

    m comes from the ratio. partitions > 2: the id's digits in the mixed radix m, r, r, ..., one table each.
    collisions=c: facebookresearch/dlrm's rule instead, row id // c of ceil(n / c) and row id % c of c, whatever the
    ratio. operation: add | mult | concat (of vectors `dims` long, as DeepRec; equal parts if null). order: compose
    per id, then pool, as the paper; legacy pools each table, then composes, as facebookresearch/dlrm.
    init=upstream: U(1 / sqrt(rows), 1), what facebookresearch/dlrm draws (its mean is far from 0).
    """

    operation: str = "mult"  # add | mult | concat
    partitions: int = 2
    collisions: int | None = None
    order: str = "compose"  # compose | legacy
    dims: tuple[int, ...] | None = None

    index_map = IndexMap.PARTITION

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("operation", OPERATIONS)
        self._check("order", ("compose", "legacy"))
        if not 2 <= self.partitions <= 32:
            raise ValueError(f"partitions={self.partitions} must be 2 to 32")
        if self.collisions is not None and (self.collisions < 1 or self.partitions != 2):
            raise ValueError(
                f"collisions={self.collisions} must be at least 1, and partitions={self.partitions} be 2 beside it"
            )
        self._check_dims()
        if self.dims is not None:
            object.__setattr__(self, "dims", tuple(self.dims))  # a yaml's list cannot be compared by hash

    def _check_dims(self) -> None:
        if self.operation != "concat":
            if self.dims is not None:
                raise ValueError(f"dims={list(self.dims)}: only operation=concat has them, not {self.operation}")
        elif self.dims is None:
            if self.embedding_dim % self.partitions:
                raise ValueError(
                    f"operation=concat: partitions={self.partitions} must divide embedding_dim={self.embedding_dim}, "
                    "or dims say how long each part is"
                )
        elif len(self.dims) != self.partitions or min(self.dims) < 1 or sum(self.dims) != self.embedding_dim:
            raise ValueError(
                f"dims={list(self.dims)} must be {self.partitions} numbers of at least 1 that add up to "
                f"embedding_dim={self.embedding_dim}"
            )

    @property
    def combine_kind(self) -> Combine:
        return Combine.CONCAT if self.order == "legacy" else OPERATIONS[self.operation]

    @property
    def compresses(self) -> bool:
        return self.collisions is None

    @property
    def widths(self) -> tuple[int, ...]:
        if self.operation != "concat":
            return (self.embedding_dim,) * self.partitions
        return self.dims or (self.embedding_dim // self.partitions,) * self.partitions

    def probes(self, slots: tuple[int, ...]) -> list[Probe]:
        if self.collisions is not None:  # the quotient table comes first
            divisors = [self.collisions, 1]
        else:
            divisors = [math.prod(slots[:p]) for p in range(self.partitions)]
        return [Probe(p, dim, divisor) for p, (dim, divisor) in enumerate(zip(self.widths, divisors, strict=True))]

    def fit(self, num_embeddings: int, num_bytes: float) -> tuple[int, ...]:
        n = num_embeddings
        if self.collisions is not None:
            return (-(-n // self.collisions), self.collisions)
        numbers = (num_bytes - self.partitions * TABLE_BYTES) / self.dtype.itemsize
        first, rest = self.widths[0], sum(self.widths[1:])
        # m numbers of the first table and about (n / m)^(1 / others) of each other: fewest where the derivative is 0
        others = self.partitions - 1
        low = round((rest / (first * others) * n ** (1 / others)) ** (others / (others + 1)))
        low, high = min(max(low, 1), n), n
        while low < high:  # the largest m that fits
            middle = (low + high + 1) // 2
            fits = middle * first + _root(-(-n // middle), others) * rest <= numbers
            low, high = (middle, high) if fits else (low, middle - 1)
        return (low, *[_root(-(-n // low), others)] * others)

    def bound(self, s: int, num_embeddings: int) -> float:
        spread = super().bound(s, num_embeddings)
        if self.operation == "concat":
            return spread
        if self.operation == "add":
            return spread * self.partitions**-0.5
        variance = spread**2 / 3  # of the product: the factors' variances multiply
        return (3 * variance ** (1 / self.partitions)) ** 0.5

    def initialise(self, weights: Tensor, s: int, num_embeddings: int, generator: Generator) -> None:
        if self.init == "upstream":
            weights.uniform_(len(weights) ** -0.5, 1, generator=generator)
        else:
            super().initialise(weights, s, num_embeddings, generator)

    @property
    def finishes(self) -> bool:
        return self.order == "legacy" and self.operation != "concat"

    def finish(self, vectors: Tensor, dims: list[int]) -> Tensor:
        if not self.finishes:
            return vectors
        pools = vectors.split([self.partitions * dim for dim in dims], 1)
        pools = [pool.unflatten(1, (self.partitions, -1)) for pool in pools]  # [B, P, dim]
        return torch.cat([pool.sum(1) if self.operation == "add" else pool.prod(1) for pool in pools], 1)


def _root(n: int, degree: int) -> int:
    """The smallest integer whose power is at least n."""
    root = max(1, round(n ** (1 / degree)))
    while root**degree < n:
        root += 1
    while root > 1 and (root - 1) ** degree >= n:
        root -= 1
    return root

"""bloom: every id reads several rows of a small table and sums them; ids seldom share them all."""

from dataclasses import dataclass

from torch import Generator, Tensor

from embeddings.backend import TABLE_BYTES, Backend, Probe
from embeddings.ops import Combine, IndexMap

# of Spotlight's hashes (Kula, 2017), in its order
MURMUR3_SEEDS = (
    179424941, 179425457, 179425907, 179426369, 179424977, 179425517, 179425943, 179426407, 179424989, 179425529,
    179425993, 179426447, 179425003, 179425537, 179426003, 179426453, 179425019, 179425559, 179426029, 179426491,
    179425027, 179425579, 179426081, 179426549,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bloom(Backend):
    """Vector `id` is the sum of rows h_1(id) .. h_K(id) of one table (Serra and Karatzoglou, RecSys 2017).

    combine: sum | mean | learned, where row h_k(id) is first multiplied by a learned weight: number k of a row of a
    second table, which the id is hashed to (hash embeddings: Svenstrup et al., NIPS 2017; the weights begin as 1).
    hash=murmur3: Spotlight's rows, for the same number of them. init=upstream: Spotlight's, normal
    with standard deviation 1 / D.
    """

    num_hashes: int = 2  # K
    combine: str = "sum"  # sum | mean | learned
    hash: str = "mixed"  # mixed | murmur3
    importance: float = 0.1  # share of the bytes that the learned weights get

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("combine", ("sum", "mean", "learned"))
        self._check("hash", ("mixed", "murmur3"))
        most = (len(MURMUR3_SEEDS) if self.hash == "murmur3" else 32) - (self.combine == "learned")
        if not 1 <= self.num_hashes <= most:
            raise ValueError(
                f"num_hashes={self.num_hashes} must be 1 to {most} with hash={self.hash}, combine={self.combine}"
            )
        if not 0 < self.importance < 1:
            raise ValueError(f"importance={self.importance} must be in (0, 1): a share of the bytes")

    @property
    def index_map(self) -> IndexMap:
        return IndexMap.MURMUR3 if self.hash == "murmur3" else IndexMap.MIXED

    @property
    def combine_kind(self) -> Combine:
        return Combine.WEIGHTED if self.combine == "learned" else Combine.ADD

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.embedding_dim, self.num_hashes) if self.combine == "learned" else (self.embedding_dim,)

    def probes(self, slots: tuple[int, ...]) -> list[Probe]:
        seeds = MURMUR3_SEEDS if self.hash == "murmur3" else [None] * (self.num_hashes + 1)
        rows = [Probe(0, self.embedding_dim, seed=seeds[k]) for k in range(self.num_hashes)]
        if self.combine == "learned":
            rows.append(Probe(1, self.num_hashes, seed=seeds[self.num_hashes]))
        return rows

    def fit(self, num_embeddings: int, num_bytes: float) -> tuple[int, ...]:
        learned = self.combine == "learned"
        numbers = (num_bytes - (self.num_hashes + learned) * TABLE_BYTES) / self.dtype.itemsize
        if not learned:
            return (max(1, round(numbers / self.embedding_dim)),)
        weights = max(1, min(num_embeddings, round(numbers * self.importance / self.num_hashes)))
        return (max(1, round((numbers - weights * self.num_hashes) / self.embedding_dim)), weights)

    def bound(self, s: int, num_embeddings: int) -> float:
        spread = super().bound(s, num_embeddings)
        return spread * self.num_hashes ** (0.5 if self.combine == "mean" else -0.5)

    def initialise(self, weights: Tensor, s: int, num_embeddings: int, generator: Generator) -> None:
        if s == 1:
            weights.fill_(1)
        elif self.init == "upstream":
            weights.normal_(std=1 / self.embedding_dim, generator=generator)
        else:
            super().initialise(weights, s, num_embeddings, generator)

    @property
    def finishes(self) -> bool:
        return self.combine == "mean"

    def finish(self, vectors: Tensor, dims: list[int]) -> Tensor:
        return vectors / self.num_hashes if self.finishes else vectors

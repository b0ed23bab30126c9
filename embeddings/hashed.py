"""hashed: chunks of every vector are drawn from a small slab by a hash; any 64-bit id has one. No state per id."""

from dataclasses import dataclass
from typing import ClassVar

from embeddings.backend import Backend, spread
from embeddings.ops import IndexMap


@dataclass(frozen=True, kw_only=True)
class Hashed(Backend):
    """Vector `id` is D / block chunks, chunk c being slot h(id, c) of the feature's slice.

    block = 1 hashes single weights (HashedNets: Chen et al., ICML 2015), 8..32 blocks (ROBE: Desai et al., MLSys 2022,
    here aligned to the block), D whole rows (the hashing trick: Weinberger et al., ICML 2009).
    Raises ValueError if block does not divide embedding_dim.
    """

    block: int  # numbers per hash, Z

    index_map: ClassVar[IndexMap] = IndexMap.HASHED

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.embedding_dim % self.block:
            divisors = [z for z in range(1, self.embedding_dim + 1) if self.embedding_dim % z == 0]
            raise ValueError(f"block={self.block} must divide embedding_dim={self.embedding_dim}: one of {divisors}")

    @property
    def width(self) -> int:
        return self.block

    def slots(self, rows: dict[str, int]) -> dict[str, int]:
        return spread(self, rows)

"""hashed: chunks of every vector are drawn from a small slab by a hash; any 64-bit id has one. No state per id."""

from dataclasses import dataclass

from embeddings.backend import TABLE_BYTES, Backend, Probe
from embeddings.ops import IndexMap


@dataclass(frozen=True, kw_only=True)
class Hashed(Backend):
    """Vector `id` is D / block chunks, chunk c being slot h(id, c) of the feature's slice.

    block = 1 hashes single weights (HashedNets: Chen et al., ICML 2015), 8..32 blocks (ROBE: Desai et al., MLSys 2022,
    here aligned to the block), D whole rows (the hashing trick: Weinberger et al., ICML 2009). sign: half of the chunks
    are negated, by the hash. shared: one pool for all features. hash=affine: the indices of HashedEmbeddingBag, whose
    rows collide whole. init=upstream is what `fair` is. Raises ValueError if block does not divide embedding_dim.
    """

    block: int = 4  # numbers per hash, Z
    hash: str = "mixed"  # mixed | affine
    sign: bool = False
    shared: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1 or self.embedding_dim % self.block:
            divisors = [z for z in range(1, self.embedding_dim + 1) if self.embedding_dim % z == 0]
            raise ValueError(f"block={self.block} must divide embedding_dim={self.embedding_dim}: one of {divisors}")
        self._check("hash", ("mixed", "affine"))
        self._check("sign", (True, False))
        self._check("shared", (True, False))
        if self.hash == "affine" and (self.block != 1 or self.sign):
            raise ValueError(f"hash=affine needs block=1 and sign=false, not block={self.block}, sign={self.sign}")

    @property
    def index_map(self) -> IndexMap:
        if self.hash == "affine":
            return IndexMap.AFFINE
        return IndexMap.SIGNED if self.sign else IndexMap.MIXED

    @property
    def is_shared(self) -> bool:
        return self.shared

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.block,)

    def probes(self, slots: tuple[int, ...]) -> list[Probe]:
        return [Probe(0, self.embedding_dim)]

    def fit(self, num_embeddings: int, num_bytes: float) -> tuple[int, ...]:
        return (max(1, round((num_bytes - TABLE_BYTES) / (self.dtype.itemsize * self.block))),)

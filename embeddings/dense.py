"""dense: one row per id. The uncompressed baseline."""

from dataclasses import dataclass, field

from torch import Generator, Tensor

from embeddings.backend import Backend, Probe
from embeddings.ops import IndexMap


@dataclass(frozen=True, kw_only=True)
class Dense(Backend):
    """Row `id` of a [num_embeddings, D] table. Stores everything, so `compression` does not apply to it.

    init=upstream: N(0, 1), as torch.nn.Embedding."""

    compression: float = field(default=1.0, compare=False)  # any ratio gives the same table

    index_map = IndexMap.PARTITION
    compresses = False

    @property
    def widths(self) -> tuple[int, ...]:
        return (self.embedding_dim,)

    def probes(self, slots: tuple[int, ...]) -> list[Probe]:
        return [Probe(0, self.embedding_dim)]

    def fit(self, num_embeddings: int, num_bytes: float) -> tuple[int, ...]:
        return (num_embeddings,)

    def initialise(self, weights: Tensor, s: int, num_embeddings: int, generator: Generator) -> None:
        if self.init == "upstream":
            weights.normal_(generator=generator)
        else:
            super().initialise(weights, s, num_embeddings, generator)

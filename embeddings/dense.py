"""dense: one row per id. The uncompressed baseline."""

from dataclasses import dataclass, field
from typing import ClassVar

from embeddings.backend import Backend
from embeddings.ops import IndexMap


@dataclass(frozen=True, kw_only=True)
class Dense(Backend):
    """Row `id` of a [num_embeddings, D] table. Stores everything, so `compression` does not apply to it."""

    compression: float = field(compare=False)  # any ratio gives the same table

    index_map: ClassVar[IndexMap] = IndexMap.DENSE

    @property
    def width(self) -> int:
        return self.embedding_dim

    def slots(self, rows: dict[str, int]) -> dict[str, int]:
        return dict(rows)

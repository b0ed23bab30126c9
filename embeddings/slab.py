"""Slab: all features of one backend in one flat parameter, looked up in one launch."""

import hashlib

import torch
from torch import Tensor, nn

from embeddings import native
from embeddings.backend import Backend
from embeddings.index_map import NUM_SLOTS
from embeddings.ops import Accumulate, Pooling
from embeddings.reference import SEPARATOR


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for what is called `name`: one seed fans out, and a feature's draws do not depend on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


class Slab(nn.Module):
    """Vectors of the features that share a backend. weight: [S, Z] float32; tables: [F, 5] int64.

    A row of `tables`: position in the batch, first slot, slots, num_embeddings, hash seed (Table in csrc/index_map.h).
    """

    def __init__(
        self, backend: Backend, rows: dict[str, int], *, positions: list[int], pooling: Pooling, seed: int
    ) -> None:
        super().__init__()
        self.backend, self.rows, self.pooling = backend, rows, pooling
        slots = backend.slots(rows)
        table, first = [], 0
        for position, (feature, num_embeddings) in zip(positions, rows.items(), strict=True):
            table.append([position, first, slots[feature], num_embeddings, seed_of(seed, f"{feature}/hash")])
            first += slots[feature]
        self.register_buffer("tables", torch.tensor(table, dtype=torch.int64))
        self.weight = nn.Parameter(torch.empty(first, backend.width))
        self._features = SEPARATOR.join(rows)
        self._accumulate = Accumulate[backend.accumulate.upper()]
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """U(-a, a), a = 1 / sqrt(num_embeddings) of the uncompressed table (Naumov et al. 2019), so that a vector's
        variance is the same under every backend."""
        for (feature, n), (_, first, num_slots, *_) in zip(self.rows.items(), self.tables.tolist(), strict=True):
            generator = torch.Generator().manual_seed(seed_of(seed, f"{feature}/weights"))
            self.weight[first : first + num_slots].uniform_(-(n**-0.5), n**-0.5, generator=generator)

    def forward(
        self, ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, batch_size: int
    ) -> Tensor:
        """Pooled vectors of this slab's features, [B, F, D]; arguments as `embeddings.ops`."""
        native.ensure()
        return torch.ops.embeddings.bag(
            self.weight,
            ids,
            offsets,
            per_sample_weights,
            self.tables,
            batch_size,
            self.backend.embedding_dim,
            int(self.backend.index_map),
            int(self.pooling),
            int(self._accumulate),
            self._features,
        )

    def raise_noted(self) -> None:
        """Wait for the device and raise RuntimeError if its kernels met a bad id; the CPU raises at once."""
        torch.ops.embeddings.raise_noted(self.weight.detach(), self._features)

    def feature_table(self, extra_bytes: int) -> list[dict]:
        """One dict per feature: feature, rows, backend, weights (numbers kept), bytes, compression.

        extra_bytes: what the collection keeps for each feature beside the slab."""
        rows = []
        for (feature, n), num_slots in zip(self.rows.items(), self.tables[:, NUM_SLOTS].tolist(), strict=True):
            size = self.backend.feature_bytes(num_slots) + extra_bytes
            rows.append(
                {
                    "feature": feature,
                    "rows": n,
                    "backend": self.backend.name,
                    "weights": num_slots * self.backend.width,
                    "bytes": size,
                    "compression": size / self.backend.dense_bytes(n),
                }
            )
        return rows

    def extra_repr(self) -> str:
        return f"{self.backend}, {len(self.rows)} features, weight={tuple(self.weight.shape)}"

"""Slab: all features of one backend in one flat parameter, looked up in one launch."""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embeddings import native
from embeddings.backend import NUMBER_BYTES, TABLE_BYTES, Backend, spread
from embeddings.index_map import DIM, WIDTH
from embeddings.ops import Accumulate, Combine, Pooling
from embeddings.reference import SEPARATOR

# what accumulate=auto goes by: below this share of touched units their rows alone are cheaper than a dense gradient;
# above so many reads of a touched unit atomics queue (not yet measured on a GPU)
SPARSE, CROWDED = 0.25, 8


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for what is called `name`: one seed fans out, and a feature's draws do not depend on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


class Slab(nn.Module):
    """Vectors of the features that share a backend; they may differ in embedding_dim.

    backends, rows: feature -> its backend, and its num_embeddings; positions: their places in the batch.
    weight: [S, Z] float32, S * Z numbers in units of Z, the greatest that divides every slot's width. tables: int64
    [F * K, 9], a row per feature and probe (Table in csrc/index_map.h). layout: the integers that the operators take
    after batch_size (columns, probes, chunks, index_map, combine, pooling).
    """

    def __init__(
        self, backends: dict[str, Backend], rows: dict[str, int], *, positions: list[int], pooling: Pooling, seed: int
    ) -> None:
        super().__init__()
        if len({backend.group for backend in backends.values()}) != 1:
            raise ValueError(f"features of one slab must have one backend, not {list(backends.values())}")
        self.backends, self.rows = backends, rows
        self.backend = next(iter(backends.values()))
        self.slices = _slices(backends, spread(backends, rows))
        tables = _tables(backends, rows, self.slices, positions, seed)
        self.register_buffer("tables", torch.tensor(tables, dtype=torch.int64))
        unit = math.gcd(*(s.width for slices in self.slices.values() for s in slices))
        num_numbers = max(s.end for slices in self.slices.values() for s in slices)
        self.weight = nn.Parameter(torch.empty(num_numbers // unit, unit))
        concat = self.backend.combine_kind == Combine.CONCAT
        columns = sum(row[DIM] for row in tables) if concat else sum(b.embedding_dim for b in backends.values())
        chunks = max(row[DIM] // row[WIDTH] for row in tables)
        how = (self.backend.index_map, self.backend.combine_kind, pooling)
        self.layout = (columns, len(tables) // len(rows), chunks, *map(int, how))
        self._features = SEPARATOR.join(rows)
        # None until `auto` has measured
        self._accumulate = None if self.backend.accumulate == "auto" else Accumulate[self.backend.accumulate.upper()]
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw the weights as the backend's `init` says, each slice by a generator of its own."""
        shared = self.backend.is_shared
        for feature, slices in list(self.slices.items())[: 1 if shared else None]:
            n = max(self.rows.values()) if shared else self.rows[feature]  # of a pool: as dlrm_ssm
            for s, (begin, num_slots, width) in enumerate(slices):
                generator = torch.Generator().manual_seed(seed_of(seed, f"{feature}/weights" + (f"/{s}" if s else "")))
                weights = self.weight.view(-1)[begin : begin + num_slots * width].view(num_slots, width)
                self.backends[feature].initialise(weights, s, n, generator)

    def forward(
        self, ids: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None, batch_size: int
    ) -> Tensor:
        """Pooled vectors of this slab's features side by side, [B, sum of dims]; arguments as `embeddings.ops`."""
        native.ensure()
        if self._accumulate is None and torch.is_grad_enabled() and self.weight.requires_grad and ids.numel():
            self._accumulate = self._measure(ids, offsets, batch_size)
        accumulate = Accumulate.SORTED if self._accumulate is None else self._accumulate
        batch = (self.weight, ids, offsets, per_sample_weights, self.tables, batch_size)
        vectors = torch.ops.embeddings.bag(*batch, *self.layout, int(accumulate), self._features)
        return self.backend.finish(vectors, [backend.embedding_dim for backend in self.backends.values()])

    @torch.no_grad()
    def _measure(self, ids: Tensor, offsets: Tensor | None, batch_size: int) -> Accumulate:
        """What `auto` picks, by what this batch touches; it stays so."""
        columns, *how = self.layout
        grad = self.weight.new_zeros(1, 1).expand(batch_size, columns)
        batch = (self.weight, ids, offsets, None, self.tables)
        units, _ = torch.ops.embeddings.bag_backward_rows(grad, *batch, *how, self._features)
        num_reads = 0  # in units, with repeats
        for position, _, dim, *_ in self.tables.tolist():
            bags = position * batch_size, (position + 1) * batch_size
            num_ids = batch_size if offsets is None else int(offsets[bags[1]] - offsets[bags[0]])
            num_reads += num_ids * dim // self.weight.shape[1]
        if units.numel() < SPARSE * len(self.weight):
            return Accumulate.ROWS
        crowded = num_reads > CROWDED * units.numel()
        repeats = crowded or not self.weight.is_cuda or torch.are_deterministic_algorithms_enabled()
        return Accumulate.SORTED if repeats else Accumulate.ATOMIC

    def raise_noted(self) -> None:
        """Wait for the device and raise RuntimeError if its kernels met a bad id; the CPU raises at once."""
        torch.ops.embeddings.raise_noted(self.weight.detach(), self._features)

    def feature_table(self, extra_bytes: int) -> list[dict]:
        """One dict per feature: feature, rows, backend, weights (numbers kept), bytes, compression.

        A shared pool's weights are counted to the features by their rows. extra_bytes: what the collection keeps for
        each feature beside the slab."""
        rows, before, total = [], 0, sum(self.rows.values())
        for feature, n in self.rows.items():
            weights = sum(s.num_slots * s.width for s in self.slices[feature])
            if self.backend.is_shared:
                before, weights = before + n, weights * (before + n) // total - weights * before // total
            size = weights * NUMBER_BYTES + self.layout[1] * TABLE_BYTES + extra_bytes
            rows.append(
                {
                    "feature": feature,
                    "rows": n,
                    "backend": self.backend.name,
                    "weights": weights,
                    "bytes": size,
                    "compression": size / self.backends[feature].dense_bytes(n),
                }
            )
        return rows

    def extra_repr(self) -> str:
        return f"{self.backend}, {len(self.rows)} features, weight={tuple(self.weight.shape)}"


class Slice(NamedTuple):
    """num_slots slots of width numbers, from number `begin` of the slab on."""

    begin: int
    num_slots: int
    width: int

    @property
    def end(self) -> int:
        return self.begin + self.num_slots * self.width


def _slices(backends: dict[str, Backend], slots: dict[str, tuple[int, ...]]) -> dict[str, list[Slice]]:
    """Feature -> its slices, one after another; of a shared pool all features have the same."""
    slices, end = {}, 0
    for feature, backend in backends.items():
        end = 0 if backend.is_shared else end
        slices[feature] = []
        for num_slots, width in zip(slots[feature], backend.widths, strict=True):
            slices[feature].append(Slice(end, num_slots, width))
            end = slices[feature][-1].end
    return slices


def _tables(backends, rows, slices, positions: list[int], seed: int) -> list[list[int]]:
    """The rows of `tables`, columns as in embeddings.index_map."""
    tables, column = [], 0
    for position, (feature, backend) in zip(positions, backends.items(), strict=True):
        for k, probe in enumerate(backend.probes(tuple(s.num_slots for s in slices[feature]))):
            begin, num_slots, width = slices[feature][probe.slice]
            own_seed = seed_of(seed, f"{feature}/hash" + (f"/{k}" if k else ""))
            where = [position, column, probe.dim, width, begin, num_slots, rows[feature]]
            tables.append([*where, probe.divisor, own_seed if probe.seed is None else probe.seed])
            column += probe.dim if backend.combine_kind == Combine.CONCAT else 0
        column += backend.embedding_dim if backend.combine_kind != Combine.CONCAT else 0
    return tables

"""Arrangement: where tables of one backend keep their weights in a flat slab, and how the operator reads them."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from embeddings import native
from embeddings.backend import Backend
from embeddings.index_map import DIM, WIDTH
from embeddings.ops import Accumulate, Combine, Pooling
from embeddings.pooled import Launch, pooled
from embeddings.reference import SEPARATOR


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for what is called `name`: one seed fans out, and a table's draws do not depend on the others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


class Lookup(NamedTuple):
    """A feature, the table it reads, its place in the batch, and where its vector begins in a row of the output."""

    feature: str
    table: str
    position: int
    column: int | None = None  # None: next to the lookup before


class Slice(NamedTuple):
    """num_slots slots of width numbers, from number `begin` of the slab on."""

    begin: int
    num_slots: int
    width: int

    @property
    def end(self) -> int:
        return self.begin + self.num_slots * self.width


class Arrangement:
    """Tables one after another in a slab of `shape` [S, Z]: S * Z numbers in units of Z, which divides every width.

    backends, rows, slots: table -> its backend, its num_embeddings, and the slots of each of its slices. lookups: who
    reads them, in the order of the output. layout: the integers that the operators take after batch_size (columns,
    probes, chunks, index_map, combine, pooling). tables: [F * K][9], a row per lookup and probe (Table in
    csrc/index_map.h); seed: what their hashes come from, None if not known. Raises ValueError if the tables' backends
    differ in more than embedding_dim.
    """

    def __init__(
        self,
        backends: dict[str, Backend],
        rows: dict[str, int],
        slots: dict[str, tuple[int, ...]],
        lookups: list[Lookup],
        *,
        pooling: Pooling,
        seed: int,
    ) -> None:
        if len({backend.group for backend in backends.values()}) != 1:
            raise ValueError(f"tables of one slab must have one backend, not {list(backends.values())}")
        self.backend = next(iter(backends.values()))
        self.backends, self.rows, self.lookups = backends, rows, lookups
        self.dims = [backends[lookup.table].embedding_dim for lookup in lookups]
        self.slices = self._slices(slots)
        self.seed, self.tables = seed, self._tables(seed)
        unit = math.gcd(*(s.width for slices in self.slices.values() for s in slices))
        self.shape = (max(s.end for slices in self.slices.values() for s in slices) // unit, unit)
        concat = self.backend.combine_kind == Combine.CONCAT
        columns = sum(row[DIM] for row in self.tables) if concat else sum(self.dims)
        chunks = max(row[DIM] // row[WIDTH] for row in self.tables)
        how = (self.backend.index_map, self.backend.combine_kind, pooling)
        self.layout = (columns, len(self.tables) // len(lookups), chunks, *map(int, how))
        self.features = SEPARATOR.join(lookup.feature for lookup in lookups)

    def _slices(self, slots: dict[str, tuple[int, ...]]) -> dict[str, list[Slice]]:
        """Table -> its slices; of a shared pool all tables have the same."""
        slices, end = {}, 0
        for table, backend in self.backends.items():
            end = 0 if backend.is_shared else end
            slices[table] = []
            for num_slots, width in zip(slots[table], backend.widths, strict=True):
                slices[table].append(Slice(end, num_slots, width))
                end = slices[table][-1].end
        return slices

    def _tables(self, seed: int) -> list[list[int]]:
        """The rows of `tables`, columns as in embeddings.index_map."""
        tables, column = [], 0
        for _, table, position, own_column in self.lookups:
            column = column if own_column is None else own_column
            backend, slices = self.backends[table], self.slices[table]
            concat = backend.combine_kind == Combine.CONCAT
            for k, probe in enumerate(backend.probes(tuple(s.num_slots for s in slices))):
                begin, num_slots, width = slices[probe.slice]
                own_seed = seed_of(seed, f"{table}/hash" + (f"/{k}" if k else ""))
                where = [position, column, probe.dim, width, begin, num_slots, self.rows[table]]
                tables.append([*where, probe.divisor, own_seed if probe.seed is None else probe.seed])
                column += probe.dim if concat else 0
            column += 0 if concat else backend.embedding_dim
        return tables

    def adopt(self, tables: list[list[int]], seed: int | None) -> None:
        """Read by the `tables` of a checkpoint. seed: said to be theirs; one that does not give them becomes None."""
        self.tables = tables
        self.seed = None if seed is None or self._tables(seed) != tables else seed

    def weights(self, slab: Tensor, table: str) -> list[Tensor]:
        """A table's slices [slots, width] of the slab: views."""
        numbers = slab.view(-1)
        return [numbers[s.begin : s.end].view(s.num_slots, s.width) for s in self.slices[table]]

    def initialise(self, slab: Tensor, generator: Callable[[str], Generator | None]) -> None:
        """Draw a slab's weights as the backend's `init` says. generator: of the slice called "<table>/weights[/s]"."""
        shared = self.backend.is_shared
        for table in list(self.slices)[: 1 if shared else None]:
            n = max(self.rows.values()) if shared else self.rows[table]  # of a pool: as dlrm_ssm
            for s, weights in enumerate(self.weights(slab, table)):
                draws = generator(f"{table}/weights" + (f"/{s}" if s else ""))
                self.backends[table].initialise(weights, s, n, draws)

    def bag(
        self,
        slab: Tensor,
        tables: Tensor,
        ids: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        batch_size: int,
        accumulate: Accumulate,
    ) -> Tensor:
        """Pooled vectors of the lookups side by side, [B, sum of dims]; arguments as `embeddings.ops`."""
        columns, *layout = self.layout
        if torch.compiler.is_compiling():  # one operator, with its gradient
            batch = (slab, ids, offsets, per_sample_weights, tables, batch_size)
            native.ensure()
            vectors = torch.ops.embeddings.bag(*batch, *self.layout, int(accumulate), self.features)
        else:  # the same, 50 us a call less
            batch = (ids, offsets, per_sample_weights)
            launch = Launch(layout, int(accumulate), self.features)
            vectors = pooled([launch], [slab], [tables], *batch, batch_size=batch_size, columns=columns)
            vectors = vectors.to(slab.dtype)
        return self.backend.finish(vectors, self.dims)

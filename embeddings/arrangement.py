"""Arrangement: where tables of one backend keep their weights in a flat slab, and how the operator reads them."""

import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from embeddings import native
from embeddings.backend import Backend
from embeddings.index_map import COLUMNS, DIM, SEED, WIDTH
from embeddings.ops import Accumulate, Combine, IndexMap, Pooling
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
    differ in more than embedding_dim, or a table has more ids than there are.
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
        for table, n in rows.items():
            if n >= 2**63:
                raise ValueError(f"table {table!r}: num_embeddings={n} must be below 2^63, as ids have 64 bits")
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
        self.seed = seed if seed is not None and self.gives(seed, tables) else None

    def gives(self, seed: int, tables: list[list[int]]) -> bool:
        """Whether these tables are a seed's."""
        return self._tables(seed) == tables

    def description(self) -> dict:
        """How its weights are read, in words and numbers that torch.load takes with weights_only."""
        names = [lookup.table for lookup in self.lookups for _ in range(self.layout[1])]
        kinds = IndexMap(self.layout[3]).name.lower(), Combine(self.layout[4]).name.lower()
        return {"index_map": kinds[0], "combine": kinds[1], "tables": self.tables, "names": names}

    def refusal(self, saved: dict) -> str | None:
        """Why weights are not to be read as these, in words, or None: of all numbers the seeds alone may be others.

        saved: a `description` of them, or some of it."""
        own = self.description()
        saved, names = own | saved, own["names"]
        if len(saved["tables"]) != len(names):
            return f"it has {len(saved['tables'])} rows of tables: here are {len(names)}"
        for kind in ("index_map", "combine"):
            if saved[kind] != own[kind]:
                return f"it has {kind}={saved[kind]}: here it is {own[kind]}"
        for name, its, here in zip(names, saved["tables"], self.tables, strict=True):
            for column, number, expected in zip(COLUMNS[:SEED], its, here, strict=False):
                if number != expected:
                    return f"it has {column}={number} for {name!r}: here it is {expected}"
        seeds = [row[SEED] for row in saved["tables"]], [row[SEED] for row in self.tables]  # which come from the names
        for its, here in ((saved["names"], names), seeds):
            moved = [names[here.index(x)] for x, y in zip(its, here, strict=False) if x != y and x in here]
            if moved:
                return f"its tables are in another order: {moved[0]!r} has another place here"
        return None

    def weights(self, slab: Tensor, table: str) -> list[Tensor]:
        """A table's slices [slots, width] of the slab: views. Raises ValueError if it is not contiguous."""
        if not slab.is_contiguous():
            raise ValueError(
                f"weights have strides {list(slab.stride())}: they must be contiguous, as tables are views"
            )
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


def is_real(tensor: Tensor) -> bool:
    """Whether it has numbers: neither on meta nor fake."""
    return type(tensor) is Tensor and not tensor.is_meta


class Arranged(nn.Module):
    """A module of an `arrangement` and its `tables`. What a checkpoint's tensors do not say of how they are read is in
    the state_dict's metadata; a checkpoint that is read otherwise is an error of load_state_dict, and not loaded."""

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):
            destination._metadata.setdefault(prefix[:-1], {}).update(self.arrangement.description())

    def _load_from_state_dict(self, state_dict, prefix: str, metadata, strict, missing, unexpected, errors) -> bool:
        """Says whether it was loaded."""
        why = self._refusal(state_dict, prefix, metadata)
        if why is None:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        else:
            errors.append(f"{prefix[:-1] or type(self).__name__}: this checkpoint is not read as here: {why}.")
        return why is None

    def _refusal(self, state_dict, prefix: str, metadata: dict) -> str | None:
        """Why not to load it, in words, or None."""
        saved = {key: metadata[key] for key in self.arrangement.description() if key in metadata}
        tables = state_dict.get(prefix + "tables")
        if tables is not None:
            if tables.dtype != torch.int64:
                return f"its tables are {tables.dtype}, as if it was cast: they must be torch.int64"
            if tables.shape != self.tables.shape:
                return f"its tables have shape {list(tables.shape)}: here it is {list(self.tables.shape)}"
            if is_real(tables):
                saved["tables"] = tables.tolist()
        return self.arrangement.refusal(saved)

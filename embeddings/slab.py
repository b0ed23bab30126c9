"""Slab: all tables of one backend in one flat parameter, looked up in one launch."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from embeddings.arrangement import Arranged, Arrangement, Lookup, seed_of
from embeddings.backend import TABLE_BYTES, Backend, spread
from embeddings.ops import Accumulate, Pooling
from embeddings.pages import ask_for_huge_pages
from embeddings.pooled import Launch

# what accumulate=auto goes by: below this share of touched units their rows alone are cheaper than a dense gradient (on
# a CPU up to 0.45 with SGD, 0.65 with Adagrad: benchmarks/accumulate.py; half of that, as batches vary); above so many
# reads of a touched unit atomics queue (not yet measured on a GPU)
SPARSE, CROWDED = 0.25, 8
INDEX_BYTES = 8  # int64, of a touched unit in a sparse gradient


def backends_of(slabs: Iterable["Slab"], names: Iterable[str]) -> dict[str, Backend]:
    """Table -> its backend, for these names of tables."""
    found = {table: backend for slab in slabs for table, backend in slab.backends.items()}
    return {name: found[name] for name in names}


def weights_of(slabs: Iterable["Slab"], names: Iterable[str]) -> dict[str, list[Tensor]]:
    """Table -> its slices of weights, [slots, width], as views, for these names: of a dense table one, its rows."""
    slab_of = {table: slab for slab in slabs for table in slab.rows}
    return {name: slab_of[name].arrangement.weights(slab_of[name].weight, name) for name in names}


def apportion(total: int, parts: dict[str, int]) -> dict[str, int]:
    """total in whole numbers by the ratio of the parts, of which one at least is not 0; they sum to total."""
    shares, before, whole = {}, 0, sum(parts.values())
    for name, part in parts.items():
        shares[name] = total * (before + part) // whole - total * before // whole
        before += part
    return shares


class Slab(Arranged):
    """Vectors of tables that share a backend, but for embedding_dim.

    backends, rows: table -> its backend, and its num_embeddings. lookups: which feature reads which table; of one place
    in the batch there may be one. weight: [S, Z]; tables: int64 [F * K, 9], see `Arrangement`. Raises ValueError if the
    backends differ or a ratio cannot be reached.
    """

    def __init__(
        self,
        backends: dict[str, Backend],
        rows: dict[str, int],
        lookups: list[Lookup],
        *,
        pooling: Pooling,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.backends, self.rows = backends, rows
        slots = spread(backends, rows)
        self.arrangement = Arrangement(backends, rows, slots, lookups, pooling=pooling, seed=seed)
        self.backend = self.arrangement.backend
        self.slices, self.layout = self.arrangement.slices, self.arrangement.layout
        weight = torch.empty(self.arrangement.shape, dtype=self.backend.dtype, device=device)
        self.weight = nn.Parameter(ask_for_huge_pages(weight))
        self.register_buffer("tables", torch.tensor(self.arrangement.tables, dtype=torch.int64, device=device))
        # None until `auto` has measured
        self._accumulate = None if self.backend.accumulate == "auto" else Accumulate[self.backend.accumulate.upper()]
        self._optimizer = None  # one that is fused
        self._launch: Launch | None = None  # as it will be from now on
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Draw the weights as the backend's `init` says, each slice by a generator of its own; on "meta" nothing."""
        if self.weight.is_meta:
            return
        self.tables.copy_(torch.tensor(self.arrangement.tables, dtype=torch.int64, device="cpu"))
        weight = self.weight if self.weight.is_cpu else torch.empty_like(self.weight, device="cpu")
        self.arrangement.initialise(weight, lambda name: torch.Generator().manual_seed(seed_of(seed, name)))
        if weight is not self.weight:
            self.weight.copy_(weight)

    def forward(
        self,
        ids: Tensor,
        offsets: Tensor | None,
        per_sample_weights: Tensor | None,
        batch_size: int,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Pooled vectors of this slab's lookups side by side, [B, sum of dims]; arguments as `embeddings.ops`.

        positions: [F * K], where in this batch the feature of each row of `tables` is, if not where the lookups say."""
        tables = self.tables if positions is None else torch.cat([positions[:, None], self.tables[:, 1:]], 1)
        accumulate = self._accumulate_for(ids, offsets, batch_size, tables)
        batch = (tables, ids, offsets, per_sample_weights, batch_size)
        return self.arrangement.bag(self.weight, *batch, accumulate)

    def launch(self, ids: Tensor, offsets: Tensor | None, batch_size: int) -> Launch:
        """How `pooled` reads this slab, and passes back what it gets."""
        if self._launch is None:
            accumulate = Accumulate.ROWS if self.fused else self._accumulate_for(ids, offsets, batch_size, self.tables)
            update = self._update if self.fused else None
            launch = Launch(self.layout[1:], int(accumulate), self.arrangement.features, update)
            if self._accumulate is None and not self.fused:
                return launch  # `auto` has not looked yet
            self._launch = launch
        return self._launch

    @property
    def fused(self) -> bool:
        """Whether an optimizer steps in the backward pass."""
        return self._optimizer is not None

    def fuse(self, optimizer) -> None:
        """Have the optimizer (of `embeddings.optim`) step in the backward pass, so that no gradient is kept."""
        self._optimizer, self._launch = optimizer, None

    def _update(self, grad: Tensor, batch: tuple, layout: tuple[int, ...], features: str) -> None:
        self._optimizer.step_fused(grad, self.weight, batch, layout, features)

    def _accumulate_for(self, ids: Tensor, offsets: Tensor | None, batch_size: int, tables: Tensor) -> Accumulate:
        """The way of gradients; `auto` looks at its first batch."""
        if self._accumulate is None and torch.is_grad_enabled() and self.weight.requires_grad and ids.numel():
            self._accumulate = self._measure(ids, offsets, batch_size, tables)
        return Accumulate.SORTED if self._accumulate is None else self._accumulate

    @torch.no_grad()
    def _measure(self, ids: Tensor, offsets: Tensor | None, batch_size: int, tables: Tensor) -> Accumulate:
        """What `auto` picks, by what this batch touches; it stays so."""
        columns, *how = self.layout
        grad = self.weight.new_zeros(1, 1).expand(batch_size, columns)
        batch = (self.weight, ids, offsets, None, tables)
        units, _ = torch.ops.embeddings.bag_backward_rows(grad, *batch, *how, self.arrangement.features)
        num_reads = 0  # in units, with repeats
        for position, _, dim, *_ in tables.tolist():
            bags = position * batch_size, (position + 1) * batch_size
            num_ids = batch_size if offsets is None else int(offsets[bags[1]] - offsets[bags[0]])
            num_reads += num_ids * dim // self.weight.shape[1]
        if units.numel() < SPARSE * len(self.weight):
            return Accumulate.ROWS
        crowded = num_reads > CROWDED * units.numel()
        repeats = crowded or not self.weight.is_cuda or torch.are_deterministic_algorithms_enabled()
        return Accumulate.SORTED if repeats else Accumulate.ATOMIC

    def weights_kept(self) -> dict[str, int]:
        """Table -> the numbers kept for it; those of a shared pool are counted by rows."""
        if self.backend.is_shared:
            return apportion(self.weight.numel(), self.rows)
        return {table: sum(s.num_slots * s.width for s in slices) for table, slices in self.slices.items()}

    def gradient_bytes(self, batch_size: int) -> dict[str, int]:
        """Table -> the most that a step's gradient of its weights takes, in a batch of one id per bag; fused: none."""
        if self.fused:
            return dict.fromkeys(self.rows, 0)
        num_units, unit = self.weight.shape
        size = self.weight.element_size()
        if self._accumulate != Accumulate.ROWS:
            return {table: weights * size for table, weights in self.weights_kept().items()}
        # units that ids may touch: of each the gradient has the values and its number
        reads = dict.fromkeys(self.rows, 0)
        for i, (_, _, dim, *_) in enumerate(self.arrangement.tables):
            reads[self.arrangement.lookups[i // self.layout[1]].table] += dim // unit * batch_size
        if self.backend.is_shared:
            touched = apportion(min(num_units, sum(reads.values())), reads)
        else:
            touched = {table: min(weights // unit, reads[table]) for table, weights in self.weights_kept().items()}
        return {table: units * (unit * size + INDEX_BYTES) for table, units in touched.items()}

    def raise_noted(self) -> None:
        """Wait for the device and raise RuntimeError if its kernels met a bad id; the CPU raises at once."""
        torch.ops.embeddings.raise_noted(self.weight.detach(), self.arrangement.features)

    def feature_table(self, extra_bytes: int) -> list[dict]:
        """One dict per feature: feature, rows, backend, weights (numbers kept), bytes, state_bytes (of them, those
        kept per id beside the weights), nominal and compression: the ratio asked for, and the true one of all bytes.

        extra_bytes: what the collection keeps for each feature beside the slab."""
        table = []
        for feature, weights in self.weights_kept().items():
            backend, n = self.backends[feature], self.rows[feature]
            size = weights * self.weight.element_size() + self.layout[1] * TABLE_BYTES + extra_bytes
            table.append(
                {
                    "feature": feature,
                    "rows": n,
                    "backend": backend.name,
                    "weights": weights,
                    "bytes": size,
                    "state_bytes": 0,  # kept per id beside the weights: a hash cache, pointers; no backend has any
                    "nominal": backend.compression if backend.compresses else 1.0,
                    "compression": size / backend.dense_bytes(n),
                }
            )
        return table

    def extra_repr(self) -> str:
        return f"{self.backend}, {len(self.rows)} tables, weight={tuple(self.weight.shape)}"

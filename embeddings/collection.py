"""EmbeddingBags: every sparse feature of a model, each with its own backend, one launch per distinct backend."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from embeddings.arrangement import Lookup
from embeddings.backend import Backend
from embeddings.collisions import collision_traffic
from embeddings.ops import Pooling
from embeddings.pooled import pooled
from embeddings.slab import Slab, apportion, backends_of, weights_of


class EmbeddingBags(nn.Module):
    """ids of F features -> vectors [B, F, D]. Features whose backends are equal share a `Slab`.

    backends, rows: feature -> its backend, and its num_embeddings; in the order of the batch.
    pooling: sum | mean | max, of a bag's vectors (an empty bag is zero). seed: of weights and hashes. device: "meta"
    counts bytes and holds none.
    Raises ValueError if the features differ, or the backends' dims do, or a ratio cannot be reached.
    """

    def __init__(
        self,
        backends: dict[str, Backend],
        rows: dict[str, int],
        *,
        pooling: str,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if list(backends) != list(rows):
            raise ValueError(f"backends name {list(backends)}, rows name {list(rows)}")
        if not rows:
            raise ValueError("an embedding needs at least one feature")
        for feature, n in rows.items():
            if n < 1:
                raise ValueError(f"feature {feature!r} has {n} rows: num_embeddings must be at least 1")
        dims = {backend.embedding_dim for backend in backends.values()}
        if len(dims) != 1:
            raise ValueError(f"features must share one embedding_dim, not {sorted(dims)}")
        allowed = [kind.name.lower() for kind in Pooling]
        if pooling not in allowed:
            raise ValueError(f"pooling={pooling!r} is not one of {', '.join(allowed)}")
        self.embedding_dim = dims.pop()
        self.num_features = len(rows)
        members: dict[tuple, list[str]] = {}
        for feature, backend in backends.items():
            members.setdefault(backend.group, []).append(feature)
        self._order = order = list(rows)
        # slabs write their features' columns of one output, unless what one writes is not yet the features' vectors
        self._together = not any(backend.finishes for backend in backends.values())
        dim = self.embedding_dim if self._together and len(members) > 1 else None
        self.slabs = nn.ModuleList(
            Slab(
                {feature: backends[feature] for feature in features},
                {feature: rows[feature] for feature in features},
                [Lookup(f, f, order.index(f), None if dim is None else order.index(f) * dim) for f in features],
                pooling=Pooling[pooling.upper()],
                seed=seed,
                device=device,
            )
            for features in members.values()
        )
        by_slab = [feature for slab in self.slabs for feature in slab.rows]
        in_order = self._together or by_slab == order
        where = torch.tensor([by_slab.index(feature) for feature in order], device=device)
        # feature f of the batch is row _where[f] of the slabs' concatenated outputs
        self.register_buffer("_where", None if in_order else where)

    def forward(self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pooled vectors [B, F, D], in the features' order.

        ids: [N] int32 or int64, feature-major; offsets: [F * B + 1], or None when every bag has one id.
        Raises ValueError for lengths that fit no B; RuntimeError naming feature, position, id and limit for an id out
        of range.
        """
        num_bags = ids.numel() if offsets is None else offsets.numel() - 1
        if num_bags < 0 or num_bags % self.num_features:
            raise ValueError(f"{num_bags} bags are not a multiple of {self.num_features} features")
        if offsets is not None:
            if offsets.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"offsets are {offsets.dtype}: they must be int32 or int64")
            offsets = offsets.long()
        batch_size = num_bags // self.num_features
        batch = (ids, offsets, per_sample_weights)
        if self._together:
            vectors = _look_up(self.slabs, *batch, batch_size, self.num_features * self.embedding_dim)
            return vectors.view(batch_size, self.num_features, self.embedding_dim)
        parts = [_look_up([slab], *batch, batch_size, slab.layout[0]) for slab in self.slabs]
        parts = [slab.backend.finish(p, slab.arrangement.dims) for slab, p in zip(self.slabs, parts, strict=True)]
        vectors = (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).unflatten(1, (self.num_features, -1))
        return vectors if self._where is None else vectors.index_select(1, self._where)

    def fuses_exactly(self, optimizer: Optimizer) -> bool:
        """Whether fused steps have the effect of the gradients that the backends ask for (`accumulate`)."""
        return not optimizer.moves_untouched or all(slab.backend.accumulate == "rows" for slab in self.slabs)

    def fuse(self, optimizer: Optimizer) -> None:
        """Have an optimizer of `embeddings.optim` step in the backward pass: no gradient is made, and its `step` has
        nothing to do. It must hold the parameters of this collection.

        One backward pass is one step: several, to sum gradients, or one forward pass twice, are not for it. So is one
        by torch.autograd.grad, and one of a loss that a GradScaler scaled, which moves the weights by so many times as
        much. Raises ValueError for another optimizer, RuntimeError in one of several processes of torch.distributed,
        whose copies would go apart: no gradient is left for them to share."""
        num_ranks = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
        if num_ranks > 1:
            raise RuntimeError(f"fused steps of {num_ranks} processes share no gradients: their copies would go apart")
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not hasattr(optimizer, "step_fused"):
            raise ValueError(f"{type(optimizer).__name__} cannot be fused: only optimizers of embeddings.optim can")
        if not all(id(slab.weight) in held for slab in self.slabs):
            raise ValueError("the optimizer does not hold the parameters of these embeddings")
        for slab in self.slabs:
            slab.fuse(optimizer)

    @property
    def is_fused(self) -> bool:
        """Whether an optimizer steps in the backward pass of every slab."""
        return all(slab.fused for slab in self.slabs)

    def raise_noted(self) -> None:
        """Wait for the device and raise RuntimeError if its kernels met a bad id; the CPU raises at once."""
        for slab in self.slabs:
            slab.raise_noted()

    def collision_traffic(self, ids: Tensor, offsets: Tensor | None = None) -> dict[str, Tensor]:
        """Feature -> of each of its lookups the share of the numbers read that another id of the batch reads too."""
        traffic = collision_traffic(self.slabs, self._order, ids, None if offsets is None else offsets.long())
        return dict(zip(self._order, traffic, strict=True))

    def table_backends(self) -> dict[str, Backend]:
        """Feature -> its backend."""
        return backends_of(self.slabs, self._order)

    def table_weights(self) -> dict[str, list[Tensor]]:
        """Feature -> its slices of weights, [slots, width], as views: of a dense one its rows."""
        return weights_of(self.slabs, self._order)

    def num_bytes(self) -> int:
        """embedding_bytes: every parameter and every buffer that the embeddings keep."""
        return sum(t.numel() * t.element_size() for t in [*self.parameters(), *self.buffers()])

    def gradient_bytes(self, batch_size: int) -> dict[str, int]:
        """Feature -> the most that one step's gradient of its weights takes, in a batch of one id per bag."""
        return {feature: size for slab in self.slabs for feature, size in slab.gradient_bytes(batch_size).items()}

    def split(self, num_bytes: Callable[[nn.Parameter], int]) -> dict[str, int]:
        """Feature -> its part of what somebody keeps for each slab's weight: by the weights of the features."""
        shares = (apportion(num_bytes(slab.weight), slab.weights_kept()) for slab in self.slabs)
        return {feature: size for share in shares for feature, size in share.items()}

    def state_bytes(self) -> int:
        """The bytes kept per id beside the weights: hash caches, pointers, dictionaries."""
        return sum(row["state_bytes"] for row in self.feature_table())

    def dense_equivalent_bytes(self) -> int:
        """Bytes of one float32 row per id for every feature."""
        return sum(slab.backends[feature].dense_bytes(n) for slab in self.slabs for feature, n in slab.rows.items())

    def feature_table(self) -> list[dict]:
        """One row per feature, in the batch's order; keys as in `Slab.feature_table`."""
        extra = 0 if self._where is None else self._where.element_size()  # a feature's place in the slabs' outputs
        table = {row["feature"]: row for slab in self.slabs for row in slab.feature_table(extra)}
        return [table[feature] for feature in self._order]


def _look_up(slabs: Iterable[Slab], ids, offsets, per_sample_weights, batch_size: int, columns: int) -> Tensor:
    """What slabs write to [B, columns]."""
    launches = [slab.launch(ids, offsets, batch_size) for slab in slabs]
    weights, tables = [slab.weight for slab in slabs], [slab.tables for slab in slabs]
    batch = (ids, offsets, per_sample_weights)
    return pooled(launches, weights, tables, *batch, batch_size=batch_size, columns=columns)

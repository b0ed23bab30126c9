"""Collections with TorchRec's names and semantics: tables that say which features read them, over KeyedJaggedTensors.

Tables of equal backend, pooling and data type share a `Slab`, so one launch. torchrec is not needed; its
KeyedJaggedTensor, configs and enums are accepted wherever ours are.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import reduce

import torch
from torch import Tensor, nn

from embeddings.arrangement import Lookup, is_real
from embeddings.backend import Backend
from embeddings.dense import Dense
from embeddings.drop_in import draw_seed
from embeddings.jagged import JaggedTensor, KeyedJaggedTensor, KeyedTensor
from embeddings.ops import Pooling
from embeddings.rules import accumulator
from embeddings.slab import Slab, backends_of, weights_of


class DataType(Enum):
    """What a table's weights are kept in."""

    FP32 = "FP32"
    FP16 = "FP16"
    BF16 = "BF16"


class PoolingType(Enum):
    """How the vectors of a bag become one."""

    SUM = "SUM"
    MEAN = "MEAN"
    MAX = "MAX"


@dataclass
class EmbeddingConfig:
    """A table. feature_names: who reads it; none: the feature called as the table.

    backend: called with embedding_dim, as partial(Hashed, compression=0.1). init_fn: is given every slice of the
    table's weights, [slots, width], of a dense table its rows; weight_init_min and weight_init_max: uniform in between
    (one not given: 1 / sqrt(num_embeddings) from zero); without these weights begin as the backend says.
    """

    num_embeddings: int
    embedding_dim: int
    name: str = ""
    data_type: DataType = DataType.FP32
    feature_names: list[str] = field(default_factory=list)
    weight_init_max: float | None = None
    weight_init_min: float | None = None
    init_fn: Callable[[Tensor], object] | None = None
    backend: Callable[..., Backend] = Dense


@dataclass
class EmbeddingBagConfig(EmbeddingConfig):
    """A table whose bags are pooled: sum, mean or max; an empty bag is zero."""

    pooling: PoolingType = PoolingType.SUM


def _one_of(kind: type[Enum], value, table: str, name: str):
    """The member that `value` is, or that has its word: another library's enum, or a string."""
    word = getattr(value, "value", value)
    if word not in [member.value for member in kind]:
        allowed = ", ".join(member.name for member in kind)
        raise ValueError(f"table {table!r}: {name}={value} is not one of {allowed}")
    return kind(word)


class _Collection(nn.Module):
    """The tables of configs in slabs, and the features that read them, table by table."""

    def __init__(
        self, tables: Sequence[EmbeddingConfig], poolings: Sequence[Pooling], device: torch.device | str | None
    ) -> None:
        super().__init__()
        self._configs = [copy(table) for table in tables]
        for table in self._configs:
            table.feature_names = list(table.feature_names or [table.name])
        self._check()
        reads = [(feature, table.name) for table in self._configs for feature in table.feature_names]
        features = [feature for feature, _ in reads]
        self.feature_names = list(dict.fromkeys(features))
        # a feature of several tables has several vectors
        self.embedding_names = [f"{f}@{table}" if features.count(f) > 1 else f for f, table in reads]
        twice = [name for name in self.embedding_names if self.embedding_names.count(name) > 1]
        if twice:
            raise ValueError(
                f"two features would have the vectors {twice[0]!r}: features and tables must tell them apart"
            )
        self._lookups = [Lookup(f, table, self.feature_names.index(f)) for f, table in reads]
        self.slabs = nn.ModuleList(self._make_slab(*slab, draw_seed(), device) for slab in self._group(poolings))
        self._positions: dict[tuple, list[Tensor]] = {}
        self._initialise()

    def _check(self) -> None:
        names = [table.name for table in self._configs]
        if not names:
            raise ValueError("a collection needs at least one table")
        for table in self._configs:
            if names.count(table.name) > 1:
                raise ValueError(f"{names.count(table.name)} tables have the name {table.name!r}: names must differ")
            if table.num_embeddings < 1:
                raise ValueError(f"table {table.name!r}: num_embeddings={table.num_embeddings} must be at least 1")
            if len(set(table.feature_names)) < len(table.feature_names):
                raise ValueError(f"table {table.name!r}: feature_names={table.feature_names} must differ")

    def _group(self, poolings: Sequence[Pooling]) -> list[tuple[dict[str, Backend], Pooling]]:
        """What each slab holds. A feature reads one table of a slab at most: of a second one, in another slab."""
        kinds: dict[tuple, list[tuple[dict[str, Backend], set[str]]]] = {}
        for table, pooling in zip(self._configs, poolings, strict=True):
            backend = getattr(table, "backend", Dense)(embedding_dim=table.embedding_dim)
            precision = _one_of(DataType, table.data_type, table.name, "data_type").name.lower()
            if backend.precision not in ("fp32", precision):
                raise ValueError(
                    f"table {table.name!r}: its backend has precision={backend.precision} and data_type={precision}"
                )
            backend = replace(backend, precision=precision)
            slabs = kinds.setdefault((backend.group, pooling), [])
            slab = next((slab for slab in slabs if slab[1].isdisjoint(table.feature_names)), None)
            if slab is None:
                slabs.append(slab := ({}, set()))
            slab[0][table.name] = backend
            slab[1].update(table.feature_names)
        return [(backends, pooling) for (_, pooling), slabs in kinds.items() for backends, _ in slabs]

    def _make_slab(self, backends: dict[str, Backend], pooling: Pooling, seed: int, device) -> Slab:
        rows = {table.name: table.num_embeddings for table in self._configs if table.name in backends}
        lookups = [lookup for lookup in self._lookups if lookup.table in backends]
        return Slab(backends, rows, lookups, pooling=pooling, seed=seed, device=device)

    @torch.no_grad()
    def _initialise(self) -> None:
        weights = self.table_weights()
        for table in self._configs:
            low, high = table.weight_init_min, table.weight_init_max
            bound = table.num_embeddings**-0.5
            for part in [] if self.device.type == "meta" else weights[table.name]:
                if table.init_fn is not None:
                    table.init_fn(part)
                elif low is not None or high is not None:
                    part.uniform_(-bound if low is None else low, bound if high is None else high)

    def reset_parameters(self) -> None:
        """Draw the weights anew, from torch's own generator; also what `to_empty` leaves to be done."""
        for slab in self.slabs:
            slab.reset_parameters(draw_seed())
        self._initialise()

    def table_backends(self) -> dict[str, Backend]:
        """Table -> its backend."""
        return backends_of(self.slabs, (table.name for table in self._configs))

    def table_weights(self) -> dict[str, list[Tensor]]:
        """Table -> its slices of weights, [slots, width], as views: of a dense table one, its rows."""
        return weights_of(self.slabs, (table.name for table in self._configs))

    @property
    def device(self) -> torch.device:
        return self.slabs[0].weight.device

    def raise_noted(self) -> None:
        """Wait for the device and raise RuntimeError if its kernels met a bad id; the CPU raises at once."""
        for slab in self.slabs:
            slab.raise_noted()

    def _look_up(
        self, features: KeyedJaggedTensor, offsets: Tensor, weights: Tensor | None, batch_size: int
    ) -> list[Tensor]:
        """The vectors of every embedding name, [batch_size, D], in order."""
        vectors = {}
        for slab, positions in zip(self.slabs, self._place(list(features.keys())), strict=True):
            own_weights = None if weights is None else weights.to(accumulator(slab.weight.dtype))
            out = slab(features.values(), offsets, own_weights, batch_size, positions)
            out = out.float() if out.dtype in (torch.float16, torch.bfloat16) else out
            parts = out.split(slab.arrangement.dims, 1)
            vectors.update(zip(slab.arrangement.lookups, parts, strict=True))
        return [vectors[lookup] for lookup in self._lookups]

    def _place(self, keys: list[str]) -> list[Tensor | None]:
        """Where each slab finds its features in a batch of these; None: where they are expected."""
        if keys == self.feature_names:
            return [None] * len(self.slabs)
        case = (tuple(keys), self.device)  # the last is kept, not to copy it to the device for every batch
        kept = self._positions.get(case)
        if kept is not None:
            return kept
        missing = [feature for feature in self.feature_names if feature not in keys]
        if missing:
            raise KeyError(f"the batch has no feature {missing[0]!r}; it has {', '.join(keys) or 'none'}")
        positions = [
            torch.tensor(
                [keys.index(lookup.feature) for lookup in slab.arrangement.lookups], device=self.device
            ).repeat_interleave(slab.layout[1])
            for slab in self.slabs
        ]
        if all(map(is_real, positions)):  # fake ones are no use to real batches
            self._positions.clear()
            self._positions[case] = positions
        return positions


def _larger(a: int, b: int) -> int:
    """Also of numbers that export does not know, for which max would have to."""
    return torch.sym_max(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else max(a, b)


def _offsets_of(features: KeyedJaggedTensor) -> Tensor:
    """int64 [F * B + 1] of a batch that may be torchrec's. Raises ValueError if it is not F features of B samples."""
    if features.variable_stride_per_key():
        raise ValueError("a batch size per key: features must all have the same number of samples")
    offsets, num_bags = features.offsets(), len(features.keys()) * features.stride()
    if offsets.numel() != num_bags + 1:
        raise ValueError(
            f"{len(features.keys())} features of {features.stride()} samples have {num_bags} lengths, "
            f"not {offsets.numel() - 1}"
        )
    return offsets.long()


class EmbeddingBagCollection(_Collection):
    """KeyedJaggedTensor -> KeyedTensor of pooled vectors, by the tables' order (and in each its features').

    is_weighted: bags are sums of weight * vector, under mean pooling divided by the number of ids; not with max.
    device: of the weights; on "meta" they wait for to_empty and reset_parameters. Raises ValueError for tables or
    vectors of one name, or values that are not allowed. The configs are copied.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        is_weighted: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        poolings = [Pooling[_one_of(PoolingType, table.pooling, table.name, "pooling").name] for table in tables]
        for table, pooling in zip(tables, poolings, strict=True):
            if is_weighted and pooling == Pooling.MAX:
                raise ValueError(f"table {table.name!r}: pooling=MAX has no weights; is_weighted needs SUM or MEAN")
        super().__init__(tables, poolings, device)
        self._is_weighted = is_weighted

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self._configs

    def is_weighted(self) -> bool:
        return self._is_weighted

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Vectors [B, sum of dims], float32 (float64 of a float64 collection). Keys that no table reads are ignored.

        Raises KeyError for a feature that the batch lacks, ValueError for missing weights or lengths that do not fit,
        RuntimeError naming feature, position, id and limit for an id out of range.
        """
        weights = features.weights_or_none() if self._is_weighted else None
        if self._is_weighted and weights is None:
            raise ValueError("is_weighted=True, but the batch has no weights")
        vectors = self._look_up(features, _offsets_of(features), weights, features.stride())
        return KeyedTensor(self.embedding_names, [v.shape[1] for v in vectors], torch.cat(vectors, 1))


class EmbeddingCollection(_Collection):
    """KeyedJaggedTensor -> a JaggedTensor of vectors, one per id, of every feature. All dims must be equal.

    need_indices: the ids come back as the weights of the JaggedTensors.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingConfig],
        device: torch.device | str | None = None,
        need_indices: bool = False,
    ) -> None:
        dims = {table.name: table.embedding_dim for table in tables}
        if len(set(dims.values())) > 1:
            raise ValueError(f"tables must share one embedding_dim, not {dims}")
        super().__init__(tables, [Pooling.SUM] * len(tables), device)
        self._need_indices = need_indices

    def embedding_configs(self) -> list[EmbeddingConfig]:
        return self._configs

    def embedding_dim(self) -> int:
        return self._configs[0].embedding_dim

    def need_indices(self) -> bool:
        return self._need_indices

    def embedding_names_by_table(self) -> list[list[str]]:
        names = iter(self.embedding_names)
        return [[next(names) for _ in table.feature_names] for table in self._configs]

    def forward(self, features: KeyedJaggedTensor) -> dict[str, JaggedTensor]:
        """Embedding name -> its ids' vectors [ids of the feature, D] and their lengths. Errors are those of the bags.

        All features are looked up in one launch per slab, with as many bags each as the longest has ids; their numbers
        of ids are read on the host.
        """
        offsets = _offsets_of(features)
        starts = offsets[torch.arange(len(features.keys()), device=offsets.device) * features.stride()]
        counts = torch.tensor(features.length_per_key(), device=offsets.device)
        num_ids = dict(zip(features.keys(), features.length_per_key(), strict=True))
        # at least one bag for each, as the batch may have ids that no table reads
        longest = reduce(_larger, (num_ids.get(feature, 0) for feature in self.feature_names), 1)
        bags = starts[:, None] + torch.minimum(torch.arange(longest, device=starts.device), counts[:, None])
        offsets = torch.cat([bags.flatten(), starts.new_full((1,), features.values().numel())])
        vectors = self._look_up(features, offsets, None, longest)
        ids = features.values().split(features.length_per_key())
        lengths = features.lengths().view(len(ids), features.stride())
        jagged = {}
        for name, lookup, own in zip(self.embedding_names, self._lookups, vectors, strict=True):
            key = features.keys().index(lookup.feature)
            own = own[: ids[key].numel()].contiguous()  # a view would keep the vectors of all features alive
            jagged[name] = JaggedTensor(own, ids[key] if self._need_indices else None, lengths[key])
        return jagged

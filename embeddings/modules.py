"""Drop-in modules: the names and arguments that users of earlier systems know, on our operators.

Forward, errors and options are those of torch.nn.Embedding or torch.nn.EmbeddingBag (`embeddings.drop_in`). Weights
that a constructor is not given (`_weight`) are drawn by torch's own generator; so is a hash's `seed`, if it is None.
"""

import math
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from embeddings.arrangement import Arrangement, Lookup
from embeddings.bloom import Bloom
from embeddings.dense import Dense
from embeddings.drop_in import Options, PerBag, PerId, Tables, refuse
from embeddings.fast import Fast
from embeddings.hashed import Hashed
from embeddings.ops import Pooling
from embeddings.qr import QR

Device = torch.device | str | None


def _checked(name: str, value: str, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}")
    return value


class _ByHash:
    """Weights that mean something only to ids hashed as when they were trained."""

    @classmethod
    def from_pretrained(
        cls, embeddings: Tensor, num_embeddings: int, embedding_dim: int, freeze: bool = True, **options
    ) -> Self:
        """A module of these weights; options: of the constructor. Raises ValueError for hash=mixed without the seed
        that they were trained with (`module.seed`); a state_dict holds it."""
        if options.get("hash", "mixed") == "mixed" and options.get("seed") is None:
            raise ValueError("seed=None: with hash=mixed these weights need the seed they were trained with")
        return cls(num_embeddings, embedding_dim, _weight=embeddings, **options).requires_grad_(not freeze)


# --- hashed: HashedEmbeddingBag (2021) and dlrm_ssm, after HashedNets (Chen et al., ICML 2015) ------------------------


class _Hashed(_ByHash):
    """Weights `hashed_weight` [int(num_embeddings * embedding_dim * compression)], or those of `_weight`."""

    parameter_name = "hashed_weight"

    @property
    def weight_size(self) -> int:
        return self.hashed_weight.numel()

    @property
    def _weights_shape(self) -> tuple[int, ...]:
        return (math.prod(self.arrangement.shape),)

    @property
    def _slab(self) -> Tensor:
        return self.hashed_weight

    @staticmethod
    def _slots(num_embeddings: int, backend: Hashed, weight: Tensor | None) -> tuple[int]:
        """How many blocks the weights have: as many as the ratio leaves, or those of the weights given."""
        size = int(num_embeddings * backend.embedding_dim * backend.compression) if weight is None else weight.numel()
        if weight is not None and (weight.dim() != 1 or size == 0 or size % backend.block):
            wanted = f"[S], S a multiple of block={backend.block}"
            raise ValueError(f"_weight has shape {list(weight.shape)}: it must be {wanted}")
        return (max(size // backend.block, 1),)


class HashedEmbeddingBag(_Hashed, PerBag):
    """torch.nn.EmbeddingBag whose vectors a hash of (id, column) draws from `compression` times as many weights.

    hash=mixed: SplitMix64, by which rows do not collide whole; `block` numbers share one, sign negates half of them.
    hash=affine: the indices of HashedEmbeddingBag. Any 64-bit id has a vector: num_embeddings sizes and scales only.
    """

    shown = ("mode", "hash", "block", "sign")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        compression: float = 1 / 64,
        mode: str = "sum",
        _weight: Tensor | None = None,
        *,
        hash: str = "mixed",
        block: int = 1,
        sign: bool = False,
        seed: int | None = None,
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        backend = Hashed(embedding_dim=embedding_dim, compression=compression, hash=hash, block=block, sign=sign)
        slots, options = self._slots(num_embeddings, backend, _weight), Options(padding_idx, sparse, device, dtype)
        super().__init__(
            backend,
            num_embeddings,
            slots,
            _weight,
            options,
            mode=mode,
            include_last_offset=include_last_offset,
            seed=seed,
        )


class HashedEmbedding(_Hashed, PerId):
    """torch.nn.Embedding whose vectors are drawn as in `HashedEmbeddingBag`.

    shapes=upstream: input [B, n] gives the sums of its rows, [B, D], as there.
    """

    shown = ("hash", "block", "sign", "shapes")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        compression: float = 1 / 64,
        _weight: Tensor | None = None,
        *,
        hash: str = "mixed",
        block: int = 1,
        sign: bool = False,
        seed: int | None = None,
        shapes: str = "torch",
        padding_idx: int | None = None,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        backend = Hashed(embedding_dim=embedding_dim, compression=compression, hash=hash, block=block, sign=sign)
        slots, options = self._slots(num_embeddings, backend, _weight), Options(padding_idx, sparse, device, dtype)
        super().__init__(backend, num_embeddings, slots, _weight, options, seed=seed)
        self.shapes = _checked("shapes", shapes, ("torch", "upstream"))

    def forward(self, input: Tensor) -> Tensor:
        vectors = super().forward(input)
        return vectors.sum(1) if self.shapes == "upstream" and input.dim() == 2 else vectors


# --- dense: FastEmbedding (RTB House, 2018); Spotlight's layers (Kula, 2017) ------------------------------------------


class _OwnRows:
    """A row for every id: weight [num_embeddings, D]; the padding id's begins as zero and is not trained."""

    keeps_padding_row = True

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.padding_idx is not None:
            self.weight[self.padding_idx] = 0

    @classmethod
    def from_pretrained(cls, embeddings: Tensor, freeze: bool = True, **options) -> Self:
        """A module of these rows [num_embeddings, D]; options: of the constructor."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings have shape {list(embeddings.shape)}: it must be [num_embeddings, D]")
        return cls(*embeddings.shape, _weight=embeddings, **options).requires_grad_(not freeze)


class FastEmbedding(_OwnRows, PerId):
    """torch.nn.Embedding whose gradient CUDA sums by atomics, without sorting: fast where few ids fill a batch.

    Its order, so its rounding, changes between runs: under deterministic algorithms backward raises RuntimeError there,
    but for sparse=True. The CPU sums in order.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        _weight: Tensor | None = None,
        *,
        padding_idx: int | None = None,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        backend = Fast(embedding_dim=embedding_dim, init="upstream")
        options = Options(padding_idx, sparse, device, dtype)
        super().__init__(backend, num_embeddings, (num_embeddings,), _weight, options)


class FastMultiEmbedding(Tables):
    """Tables of any sizes and dims in one buffer without padding and one launch; gradients as in `FastEmbedding`.

    weight: [S, Z], the tables one after another; `weights` shows them one by one. _weight: that, or upstream's padded
    [max(embedding_sizes), sum(embedding_dims)].
    """

    def __init__(
        self,
        embedding_sizes: Sequence[int],
        embedding_dims: Sequence[int],
        _weight: Tensor | None = None,
        *,
        sparse: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes, dims = list(embedding_sizes), list(embedding_dims)
        if not sizes or len(sizes) != len(dims) or min(sizes) < 1:
            raise ValueError(f"embedding_sizes={sizes} and embedding_dims={dims} must be as many, and at least 1")
        names = [f"table {t}" for t in range(len(sizes))]
        rows = dict(zip(names, sizes, strict=True))
        backends = {name: Fast(embedding_dim=dim, init="upstream") for name, dim in zip(names, dims, strict=True)}
        lookups = [Lookup(name, name, t) for t, name in enumerate(names)]
        slots = {name: (n,) for name, n in rows.items()}
        arrangement = Arrangement(backends, rows, slots, lookups, pooling=Pooling.SUM, seed=0)
        if _weight is not None and _weight.shape == (max(sizes), sum(dims)) != arrangement.shape:
            columns = zip(sizes, _weight.split(dims, 1), strict=True)
            _weight = torch.cat([part[:n].reshape(-1) for n, part in columns]).view(arrangement.shape)
        super().__init__(arrangement, _weight, Options(None, sparse, device, dtype))
        self.embedding_sizes, self.embedding_dims = sizes, dims

    @property
    def weights(self) -> list[Tensor]:
        """Each table's rows [embedding_sizes[t], embedding_dims[t]], as views."""
        return [self.arrangement.weights(self.weight, table)[0] for table in self.arrangement.rows]

    def forward(self, input: Tensor) -> Tensor:
        """Vectors side by side [B, sum(embedding_dims)] of ids [B, tables], or [B] of a single table.

        Raises ValueError for another shape, IndexError for an id out of its table's range.
        """
        num_tables = len(self.embedding_sizes)
        columns = input.unsqueeze(1) if input.dim() == 1 else input
        if columns.dim() != 2 or columns.shape[1] != num_tables:
            raise ValueError(f"input has shape {list(input.shape)}: it must be [B, {num_tables}], a column per table")
        return self._look_up_ids(columns.t().reshape(-1), columns.shape[0])

    def extra_repr(self) -> str:
        return self._describe(str(self.embedding_sizes), str(self.embedding_dims))


class ScaledEmbedding(_OwnRows, PerId):
    """torch.nn.Embedding, with its arguments, that begins as N(0, 1 / embedding_dim) [standard deviation]."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse(max_norm, scale_grad_by_freq)
        options = Options(padding_idx, sparse, device, dtype)
        super().__init__(Dense(embedding_dim=embedding_dim), num_embeddings, (num_embeddings,), _weight, options)
        self.requires_grad_(not _freeze)

    def _draw(self) -> None:
        self.weight.normal_(std=1 / self.weight.shape[1])


class ZeroEmbedding(ScaledEmbedding):
    """torch.nn.Embedding, with its arguments, that begins as zero: for biases."""

    def _draw(self) -> None:
        self.weight.zero_()


class ScaledEmbeddingBag(_OwnRows, PerBag):
    """torch.nn.EmbeddingBag, with its arguments, that begins as N(0, 1 / embedding_dim) [standard deviation]."""

    shown = ("mode",)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse(max_norm, scale_grad_by_freq)
        table = (Dense(embedding_dim=embedding_dim), num_embeddings, (num_embeddings,), _weight)
        options = Options(padding_idx, sparse, device, dtype)
        super().__init__(*table, options, mode=mode, include_last_offset=include_last_offset)

    def _draw(self) -> None:
        self.weight.normal_(std=1 / self.weight.shape[1])


# --- bloom: Spotlight's BloomEmbedding, after Serra and Karatzoglou (RecSys 2017) -------------------------------------


class BloomEmbedding(_ByHash, PerId):
    """An id's vector is the sum of num_hash_functions rows of a table of int(compression_ratio * num_embeddings).

    No row is set aside for padding_idx, whose vector is zero. bag: accepted, it changes no result. combine=mean divides
    the sum. hash=murmur3: Spotlight's rows; mixed: SplitMix64. shapes=upstream: ids [N] give [N, 1, D], as Spotlight.
    Any 64-bit id has a vector. Weights begin as N(0, 1 / embedding_dim) [standard deviation].
    """

    shown = ("num_hash_functions", "combine", "hash", "shapes")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        compression_ratio: float = 0.2,
        num_hash_functions: int = 4,
        bag: bool = False,
        padding_idx: int | None = 0,
        *,
        combine: str = "sum",
        hash: str = "mixed",
        seed: int | None = None,
        shapes: str = "torch",
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not compression_ratio > 0:
            raise ValueError(f"compression_ratio={compression_ratio} must be above 0: rows kept / num_embeddings")
        how = dict(num_hashes=num_hash_functions, combine=_checked("combine", combine, ("sum", "mean")), hash=hash)
        backend = Bloom(embedding_dim=embedding_dim, compression=1.0, init="upstream", **how)
        rows = max(int(compression_ratio * num_embeddings), 1) if _weight is None else len(_weight)
        options = Options(padding_idx, sparse, device, dtype)
        super().__init__(backend, num_embeddings, (rows,), _weight, options, seed=seed)
        self.compression_ratio, self.num_hash_functions = compression_ratio, num_hash_functions
        self.shapes = _checked("shapes", shapes, ("torch", "upstream"))

    @property
    def compressed_num_embeddings(self) -> int:
        return len(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        vectors = super().forward(input)
        return vectors.unsqueeze(1) if self.shapes == "upstream" and input.dim() == 1 else vectors


# --- qr: facebookresearch/dlrm and DeepRec, after Shi et al. (KDD 2020) -----------------------------------------------


class _QuotientRemainder:
    """weight: [S, Z], the quotient's rows and then the remainder's; weight_q and weight_r are views of them."""

    @property
    def weight_q(self) -> Tensor:
        return self.arrangement.weights(self.weight, "table")[0]

    @property
    def weight_r(self) -> Tensor:
        return self.arrangement.weights(self.weight, "table")[1]

    @staticmethod
    def _backend(operation: str, divisor: int, dims: Sequence[int], order: str = "compose") -> QR:
        if operation != "concat" and dims[0] != dims[1]:
            raise ValueError(f"operation={operation!r}: dims {list(dims)} must be equal")
        how = dict(operation=operation, collisions=divisor, order=order)
        if operation == "concat":
            return QR(embedding_dim=sum(dims), compression=1.0, dims=tuple(dims), **how)
        return QR(embedding_dim=dims[0], compression=1.0, **how)

    @staticmethod
    def _flat(weights: Sequence[Tensor] | None, shapes: Sequence[tuple[int, int]]) -> Tensor | None:
        """The slab of a pair of tables that must have these shapes."""
        if weights is None:
            return None
        if [tuple(part.shape) for part in weights] != list(shapes):
            found = [list(part.shape) for part in weights]
            raise ValueError(f"_weight has shapes {found}: they must be {[list(shape) for shape in shapes]}")
        return torch.cat([part.reshape(-1) for part in weights]).view(-1, math.gcd(*(dim for _, dim in shapes)))

    @classmethod
    def from_pretrained(cls, embeddings: Sequence[Tensor], *arguments, freeze: bool = True, **options) -> Self:
        """A module of these two tables; arguments, options: of the constructor."""
        return cls(*arguments, _weight=embeddings, **options).requires_grad_(not freeze)


class QREmbeddingBag(_QuotientRemainder, PerBag):
    """torch.nn.EmbeddingBag: row id // c of ceil(n / c) and row id % c of c, composed per id by operation, then pooled.

    operation: concat | mult | add; embedding_dim: of each table, or [of the quotient's, of the remainder's].
    order=legacy pools each table and then composes, as facebookresearch/dlrm. The variance of a vector is that of an
    uncompressed table's U(-1 / sqrt(n), 1 / sqrt(n)); upstream's draws U(1 / sqrt(rows), 1) by mistake.
    """

    shown = ("mode", "num_collisions", "operation", "order")

    def __init__(
        self,
        num_categories: int,
        embedding_dim: int | Sequence[int],
        num_collisions: int,
        operation: str = "mult",
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Sequence[Tensor] | None = None,
        *,
        order: str = "compose",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        refuse(max_norm, scale_grad_by_freq)
        dims = [embedding_dim] * 2 if isinstance(embedding_dim, int) else list(embedding_dim)
        if len(dims) != 2:
            raise ValueError(f"embedding_dim={dims} must be one number or two: the quotient's and the remainder's")
        backend = self._backend(operation, num_collisions, dims, order)
        slots = backend.fit(num_categories, 0)
        weight = self._flat(_weight, list(zip(slots, dims, strict=True)))
        table = (backend, num_categories, slots, weight, Options(padding_idx, sparse, device, dtype))
        super().__init__(*table, mode=mode, include_last_offset=include_last_offset)
        self.num_categories, self.num_collisions, self.operation = num_categories, num_collisions, operation


class MultiHashEmbedding(_QuotientRemainder, PerId):
    """torch.nn.Embedding by DeepRec's multi-hash variable: dims = [[rows_q, dim_q], [rows_r, dim_r]].

    Row id // rows_r of the first table and row id % rows_r of the second, composed by operation: add | mul | concat;
    DeepRec divides by rows_q, so that ids share both. num_embeddings: None for all rows_q * rows_r that can be told
    apart; more raises ValueError.
    """

    shown = ("operation",)

    def __init__(
        self,
        dims: Sequence[Sequence[int]],
        complementary_strategy: str = "Q-R",
        operation: str = "add",
        *,
        num_embeddings: int | None = None,
        padding_idx: int | None = None,
        sparse: bool = False,
        _weight: Sequence[Tensor] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _checked("complementary_strategy", complementary_strategy, ("Q-R",))
        shapes = [tuple(shape) for shape in dims]
        if [len(shape) for shape in shapes] != [2, 2] or min(map(min, shapes)) < 1:
            raise ValueError(f"dims={dims} must be [[rows_q, dim_q], [rows_r, dim_r]], of at least 1")
        (rows_q, dim_q), (rows_r, dim_r) = shapes
        most = rows_q * rows_r
        num_embeddings = most if num_embeddings is None else num_embeddings
        if num_embeddings > most:
            raise ValueError(f"num_embeddings={num_embeddings}: dims={dims} tell {most} ids apart")
        backend = self._backend(operation, rows_r, (dim_q, dim_r))
        weight = self._flat(_weight, shapes)
        options = Options(padding_idx, sparse, device, dtype)
        super().__init__(backend, num_embeddings, (rows_q, rows_r), weight, options)

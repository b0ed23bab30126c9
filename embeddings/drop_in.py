"""What the drop-in modules share: weights of tables in one flat parameter, and the forward of torch.nn's two modules.

`PerId` has the forward of torch.nn.Embedding, `PerBag` that of torch.nn.EmbeddingBag, with their errors; a subclass in
`embeddings.modules` says what its constructor's arguments mean.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from embeddings.arrangement import Arranged, Arrangement, Lookup, is_real
from embeddings.backend import Backend
from embeddings.ops import Accumulate, Pooling

INTEGERS = (torch.int32, torch.int64)


def draw_seed() -> int:
    """A seed for a table's hash, from torch's own generator: torch.manual_seed repeats it, two tables differ."""
    return int(torch.randint(2**62, (), device="cpu"))


def pooling_of(mode: str) -> Pooling:
    allowed = [kind.name.lower() for kind in Pooling]
    if mode not in allowed:
        raise ValueError(f"mode={mode!r} is not one of {', '.join(allowed)}")
    return Pooling[mode.upper()]


def refuse(max_norm: float | None, scale_grad_by_freq: bool) -> None:
    """What torch.nn has and these modules have not."""
    if max_norm is not None:
        raise NotImplementedError(f"max_norm={max_norm}: only None, vectors are not renormalised")
    if scale_grad_by_freq:
        raise NotImplementedError("scale_grad_by_freq=True: only False")


def _by_rows(error: str, batch_size: int, num_tables: int) -> str:
    """An error of ids [num_tables, batch_size] with the position that the caller's [batch_size, num_tables] has."""

    def moved(position: re.Match) -> str:
        t, b = divmod(int(position[1]), batch_size)
        return f"position {b * num_tables + t}"

    return re.sub(r"position (\d+)", moved, error)


class Options(NamedTuple):
    """What every drop-in module takes beside its own arguments."""

    padding_idx: int | None = None  # this id is no id: a zero vector, outside of every sum, mean and maximum
    sparse: bool = False  # gradients of touched weights only, as a sparse tensor
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None  # of the weights: float32, float64, float16 or bfloat16


class Tables(Arranged):
    """Tables of one backend behind one parameter, called `parameter_name`, that an `Arrangement` lays out.

    tables: int64 [F * K, 9]; in the checkpoint if it holds seeds of ours, and with it hash_seed, int64 [], which they
    come from. Raises ValueError if the weights given do not have the arrangement's shape.
    """

    parameter_name = "weight"

    def __init__(self, arrangement: Arrangement, weights: Tensor | None, options: Options) -> None:
        super().__init__()
        self.arrangement, self.sparse = arrangement, options.sparse
        num_embeddings = max(arrangement.rows.values())
        self.padding_idx = options.padding_idx
        if self.padding_idx is not None:
            if not -num_embeddings <= self.padding_idx < num_embeddings:
                raise ValueError(f"padding_idx={self.padding_idx} must be within num_embeddings={num_embeddings}")
            self.padding_idx %= num_embeddings
        for name, numbers in self._buffers_on(options.device).items():
            self.register_buffer(name, numbers, persistent=self._has_own_seeds)
        shape = self._weights_shape
        if weights is None:
            kept = torch.empty(shape, device=options.device, dtype=options.dtype)
        elif weights.shape == shape:
            kept = weights.to(options.device, options.dtype).contiguous()
        else:
            raise ValueError(f"_weight has shape {list(weights.shape)}: it must be {list(shape)}")
        self.register_parameter(self.parameter_name, nn.Parameter(kept))
        if weights is None:
            self.reset_parameters()

    @property
    def _weights_shape(self) -> tuple[int, ...]:
        return self.arrangement.shape

    @property
    def _has_own_seeds(self) -> bool:
        """Whether the hash depends on a seed that the constructor drew."""
        return getattr(self.arrangement.backend, "hash", None) == "mixed"

    @property
    def _slab(self) -> Tensor:
        """The weights as the operators take them, [S, Z] or [S]."""
        return self.weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew, from torch's own generator; also what an emptied module needs to be whole again."""
        self._restore()
        self._draw()

    def _buffers_on(self, device: torch.device | str | None) -> dict[str, Tensor]:
        """Name -> the buffer as it should be."""
        numbers = {"tables": self.arrangement.tables}
        if self._has_own_seeds:
            numbers["hash_seed"] = self.arrangement.seed or 0  # a 0 that does not give the tables is not believed
        return {name: torch.tensor(x, dtype=torch.int64, device=device) for name, x in numbers.items()}

    def _adopt_copied(self) -> None:
        """Take for its own the hash that was copied into its buffers, as DDP does: one whose seed gives its tables."""
        if self._has_own_seeds and is_real(self.tables) and is_real(self.hash_seed):
            tables, seed = self.tables.tolist(), int(self.hash_seed)
            if tables != self.arrangement.tables and self.arrangement.gives(seed, tables):
                self.arrangement.adopt(tables, seed)

    def _restore(self, *names: str) -> None:
        """Make these buffers, or all, what they should be, where the weights are."""
        self._adopt_copied()
        for name, numbers in self._buffers_on("cpu").items():
            if names and name not in names:
                continue
            if getattr(self, name).device == self._slab.device:
                getattr(self, name).copy_(numbers)
            else:
                setattr(self, name, numbers.to(self._slab.device))

    def _load_from_state_dict(self, state_dict, prefix: str, metadata, strict: bool, missing: list[str], *how) -> bool:
        """Load a checkpoint; buffers that are not in it come back here, as to_empty and meta leave nothing in them."""
        if not super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *how):
            return False
        loaded, has_seed = state_dict.get(prefix + "tables"), prefix + "hash_seed" in state_dict
        if not self._has_own_seeds or loaded is None:
            self._restore()
            return True
        if is_real(self.tables):
            self.arrangement.adopt(self.tables.tolist(), int(self.hash_seed) if has_seed else self.arrangement.seed)
        if not has_seed:  # older checkpoints have none
            missing[:] = [key for key in missing if key != prefix + "hash_seed"]
            self._restore("hash_seed")
        return True

    def _refusal(self, state_dict, prefix: str, metadata: dict) -> str | None:
        why = super()._refusal(state_dict, prefix, metadata)
        tables, seed = state_dict.get(prefix + "tables"), state_dict.get(prefix + "hash_seed")
        if why is not None or tables is None or seed is None or seed.dim() or not (is_real(tables) and is_real(seed)):
            return why
        if seed.dtype != torch.int64:
            return f"its hash_seed is {seed.dtype}, as if it was cast: it must be torch.int64"
        if int(seed) and not self.arrangement.gives(int(seed), tables.tolist()):  # 0 may stand for one not known
            return f"its hash_seed={int(seed)} is not that of its tables"
        return None

    def _draw(self) -> None:
        self.arrangement.initialise(self._slab, lambda name: None)

    def table_backends(self) -> dict[str, Backend]:
        """Table -> its backend."""
        return self.arrangement.backends

    def table_weights(self) -> dict[str, list[Tensor]]:
        """Table -> its slices of weights, [slots, width], as views: of a dense one its rows."""
        return {table: self.arrangement.weights(self._slab, table) for table in self.arrangement.rows}

    def raise_noted(self) -> None:
        """Wait for the device and raise RuntimeError if its kernels met a bad id; the CPU raises at once."""
        torch.ops.embeddings.raise_noted(self._slab.detach(), self.arrangement.features)

    def _look_up(self, ids: Tensor, offsets: Tensor | None, weights: Tensor | None, batch_size: int) -> Tensor:
        accumulate = Accumulate.ROWS if self.sparse else Accumulate[self.arrangement.backend.accumulate.upper()]
        return self.arrangement.bag(self._slab, self.tables, ids, offsets, weights, batch_size, accumulate)

    def _look_up_ids(self, ids: Tensor, batch_size: int) -> Tensor:
        """One id per bag, of every table; IndexError for an id out of range, as torch.nn.Embedding."""
        try:
            return self._look_up(ids, None, None, batch_size)
        except RuntimeError as error:
            if "id out of range" in str(error):
                num_tables = len(self.arrangement.lookups)
                is_of_these = num_tables > 1 and not ids.is_cuda  # CUDA raises what it met in an earlier call
                raise IndexError(_by_rows(str(error), batch_size, num_tables) if is_of_these else str(error)) from None
            raise

    def _describe(self, *more: str) -> str:
        padding = [] if self.padding_idx is None else [f"padding_idx={self.padding_idx}"]
        sparse = ["sparse=True"] if self.sparse else []
        return ", ".join([*more, *padding, *sparse, f"{self.parameter_name}={list(self._weights_shape)}"])


class OneTable(Tables):
    """One table of num_embeddings ids, read by one feature that errors call by the module's name."""

    shown: tuple[str, ...] = ()  # attributes of the module or of its backend that its repr shows

    def __init__(
        self,
        backend: Backend,
        num_embeddings: int,
        slots: tuple[int, ...],
        weights: Tensor | None,
        options: Options,
        *,
        mode: str = "sum",
        seed: int | None = None,
    ) -> None:
        if num_embeddings < 1:
            raise ValueError(f"num_embeddings={num_embeddings} must be at least 1")
        seed = draw_seed() if seed is None else seed
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed={seed} must be an integer of 64 bits, with its sign")
        arrangement = Arrangement(
            backends={"table": backend},
            rows={"table": num_embeddings},
            slots={"table": slots},
            lookups=[Lookup(type(self).__name__, "table", 0)],
            pooling=pooling_of(mode),
            seed=seed,
        )
        super().__init__(arrangement, weights, options)
        self.num_embeddings, self.embedding_dim = num_embeddings, backend.embedding_dim

    @property
    def seed(self) -> int | None:
        """What the hash comes from, one that was loaded or copied into the buffers too; None if that is not known.

        Waits for the device."""
        self._adopt_copied()
        is_another = is_real(self.tables) and self.tables.tolist() != self.arrangement.tables
        return None if is_another else self.arrangement.seed

    def extra_repr(self) -> str:
        where = {name: self if hasattr(self, name) else self.arrangement.backend for name in self.shown}
        shown = [f"{name}={getattr(owner, name)!r}" for name, owner in where.items()]
        return self._describe(str(self.num_embeddings), str(self.embedding_dim), *shown)


class PerId(OneTable):
    """The forward of torch.nn.Embedding."""

    keeps_padding_row = False  # whether the padding id has a row, that is read but not trained, as in torch.nn

    def forward(self, input: Tensor) -> Tensor:
        """Vectors [*, D] of ids of any shape, int32 or int64. The padding id's is zero and gets no gradient.

        Raises IndexError for an id out of range, as torch.nn.Embedding, where ids have a range.
        """
        ids = input.reshape(-1)
        vectors = self._look_up_ids(ids, ids.numel())
        if self.padding_idx is not None:
            padding = (ids == self.padding_idx)[:, None]
            vectors = torch.where(padding, vectors.detach() if self.keeps_padding_row else 0, vectors)
        return vectors.view(*input.shape, self.embedding_dim)


class PerBag(OneTable):
    """The forward of torch.nn.EmbeddingBag. Subclasses set include_last_offset and mode."""

    def __init__(self, *arguments, mode: str, include_last_offset: bool, seed: int | None = None) -> None:
        super().__init__(*arguments, mode=mode, seed=seed)
        self.mode, self.include_last_offset = mode, include_last_offset

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Pooled vectors [B, D] of B bags; an empty bag is zero, the padding id is left out.

        input: ids [N], int32 or int64, with offsets [B] where each bag begins ([B + 1] and the end, if
        include_last_offset); or [B, n], bags of n ids, without offsets. per_sample_weights: of input's shape and the
        weights' dtype, with mode=sum. Raises ValueError for shapes that do not fit, NotImplementedError for
        per_sample_weights with another mode, RuntimeError for dtypes, offsets and ids that are not allowed.
        """
        weights = per_sample_weights
        if weights is not None and weights.shape != input.shape:
            raise ValueError(
                f"per_sample_weights has shape {list(weights.shape)}: it must be that of input, {list(input.shape)}"
            )
        if weights is not None and self.mode != "sum":
            raise NotImplementedError(f"per_sample_weights with mode={self.mode!r}: only with mode='sum'")
        offsets = self._offsets(input, offsets)
        ids, weights = input.reshape(-1), None if weights is None else weights.reshape(-1)
        batch_size = offsets.numel() - 1
        if self.padding_idx is None:
            return self._look_up(ids, offsets, weights, batch_size)
        try:
            return self._look_up(*without(self.padding_idx, ids, offsets, weights), batch_size)
        except RuntimeError:
            self._look_up(ids, offsets, weights, batch_size)  # names what is wrong by its place in the caller's batch
            raise

    def _offsets(self, input: Tensor, offsets: Tensor | None) -> Tensor:
        """[B + 1], where each bag begins and the last ends."""
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError(f"input of shape {list(input.shape)} has its bags in its rows: offsets must be None")
            num_bags, size = input.shape
            return torch.arange(num_bags + 1, device=input.device) * size
        if input.dim() != 1:
            raise ValueError(f"input has {input.dim()} dimensions: it must have 1, with offsets, or 2")
        if offsets is None or offsets.dim() != 1:
            found = "no offsets" if offsets is None else f"offsets of {offsets.dim()} dimensions"
            raise ValueError(f"input has 1 dimension and {found}: they must have 1")
        if offsets.dtype not in INTEGERS:
            raise RuntimeError(f"offsets are {offsets.dtype}: they must be int32 or int64")
        if self.include_last_offset:
            return offsets.long()
        return torch.cat([offsets.long(), torch.full((1,), input.numel(), device=offsets.device)])


def without(
    padding_idx: int, ids: Tensor, offsets: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same bags less the padding ids, which move, in order, to bags that no table reads: of shapes known ahead.

    ids, weights: [N]; offsets: [B + 1]. Returns ids and weights in their new order, offsets [2 B + 1]: B bags of ids
    that stay, then B bags of which the first has those that left.
    """
    num_ids = ids.numel()
    stays = ids != padding_idx
    before = torch.cat([offsets.new_zeros(1), stays.cumsum(0)])  # [N + 1] how many of the first n stay
    leaves_to = before[-1] + torch.arange(num_ids, device=ids.device) - before[:-1]
    place = torch.where(stays, before[:-1], leaves_to)
    rising = (offsets[:1] == 0).all() & (offsets.diff() >= 0).all()
    begins = torch.where(rising, before[offsets.clamp(0, num_ids)], offsets)  # the operator refuses the others
    offsets = torch.cat([begins, offsets[-1:].expand(offsets.numel() - 1)])
    ids = torch.empty_like(ids).scatter(0, place, ids)
    return ids, offsets, None if weights is None else torch.zeros_like(weights).scatter(0, place, weights)

"""Bags of different sizes, and the rows pooled from them, by the name of their feature: TorchRec's three containers.

Names, order and dtypes are those of torchrec.sparse.jagged_tensor (1.8.0), in plain torch and without batch sizes that
vary by key. Input is checked, which TorchRec does not: shapes and dtypes always; what has to be read (lengths not
negative, their sum) only of CPU tensors outside of tracing, so that no check ever waits for a device.

All three are pytrees and pass through torch.compile and torch.export. Dividing values by key takes F host integers: a
compiled function reads them from the lengths it is given, but takes those that `sync()` has read for constants, and is
compiled again for others (with many keys until torch.compile gives up): hand it what was not synced, or `unsync()`.

Shapes: B bags of a key (the stride), F keys, N values, ... the dimensions of a value (none: an id; D: an embedding).
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import GetAttrKey, register_pytree_node


class _Container:
    """Tensors (some may be None) and what is known about them: what all three have in common.

    A subclass has NAMES, those of its tensors, and `_set(parts, *context)`, which assigns without checks: for pieces of
    what was checked, and for the leaves of a pytree, which need not be tensors."""

    NAMES: tuple[str, ...]

    @classmethod
    def _of(cls, parts: list[Tensor | None], *context: object) -> Self:
        return cls.__new__(cls)._set(parts, *context)

    def _parts(self) -> list[Tensor | None]:
        return [getattr(self, f"_{name}") for name in self.NAMES]

    def _context(self) -> list:
        """What `_set` takes after the parts, in types that JSON has."""
        return []

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        return self._of([None if part is None else function(part) for part in self._parts()], *self._context())

    def values(self) -> Tensor:
        """[N, ...]; of a KeyedTensor [B, sum of D]."""
        return self._values

    def device(self) -> torch.device:
        return self._values.device

    def size_in_bytes(self) -> int:
        """Bytes of the tensors that are there."""
        return sum(part.numel() * part.element_size() for part in self._parts() if part is not None)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        for part in self._parts():
            if part is not None:
                part.record_stream(stream)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name[1:]}={value}" for name, value in vars(self).items() if value is not None)
        return f"{type(self).__name__}({fields})"


class _Jagged(_Container):
    """Values, their weights, and the lengths or offsets that cut them into bags."""

    NAMES = ("values", "weights", "lengths", "offsets")

    def _set(self, parts: list[Tensor | None]) -> Self:
        self._values, self._weights, self._lengths, self._offsets = parts
        return self

    @classmethod
    def empty(
        cls,
        is_weighted: bool = False,
        device: torch.device | str | None = None,
        values_dtype: torch.dtype | None = None,
        weights_dtype: torch.dtype | None = None,
        lengths_dtype: torch.dtype = torch.int32,
    ) -> Self:
        """No keys, no bags, no values; a dtype of None is torch's own."""
        dtypes = [values_dtype, weights_dtype, lengths_dtype]
        values, weights, lengths = (torch.empty(0, dtype=dtype, device=device) for dtype in dtypes)
        _check(values, None, lengths, None)
        return cls._of([values, weights if is_weighted else None, lengths, None])

    def weights(self) -> Tensor:
        """One per value: [N].  Raises ValueError without weights."""
        if self._weights is None:
            raise ValueError(f"this {type(self).__name__} has no weights; weights_or_none() returns None")
        return self._weights

    def weights_or_none(self) -> Tensor | None:
        return self._weights

    def lengths(self) -> Tensor:
        """Number of values of each bag: [B], keyed [F*B]. Made of the offsets, in their dtype, and kept."""
        if self._lengths is None:
            self._lengths = self._offsets.diff()
        return self._lengths

    def lengths_or_none(self) -> Tensor | None:
        """The lengths if they were given or made before."""
        return self._lengths

    def offsets(self) -> Tensor:
        """Where each bag begins, then the end: [B+1], keyed [F*B+1]. Made of the lengths, in their dtype, and kept."""
        if self._offsets is None:
            self._offsets = _offsets(self._lengths)
        return self._offsets

    def offsets_or_none(self) -> Tensor | None:
        """The offsets if they were given or made before."""
        return self._offsets


class JaggedTensor(_Jagged):
    """B bags of values: bag b is values[offsets[b] : offsets[b + 1]].

    values: [N, ...].  weights: [N].  lengths: [B] and offsets: [B+1], int32 or int64, at least one of them.
    Raises ValueError for other shapes and dtypes, and for CPU tensors (not on a device, not while tracing) if the
    lengths or offsets do not cut the N values into bags."""

    def __init__(
        self,
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
    ):
        _check(values, weights, lengths, offsets)
        self._set([values, weights, lengths, offsets])

    @staticmethod
    def from_dense(values: list[Tensor], weights: list[Tensor] | None = None) -> "JaggedTensor":
        """One bag per tensor, lengths in int32.  values: B times [length, ...].  weights: B times [length]."""
        if not values:
            raise ValueError("values must hold one tensor or more, got none; JaggedTensor.empty() has no bags")
        sizes = [len(bag) for bag in values]
        if weights is not None and [len(bag) for bag in weights] != sizes:
            raise ValueError(f"weights must have lengths {sizes} as values do, got {[len(bag) for bag in weights]}")
        lengths = torch.tensor(sizes, dtype=torch.int32, device=values[0].device)
        return JaggedTensor(torch.cat(values), None if weights is None else torch.cat(weights), lengths)

    @staticmethod
    def from_dense_lengths(values: Tensor, lengths: Tensor, weights: Tensor | None = None) -> "JaggedTensor":
        """Of each row b the first lengths[b] values.  values: [B, L, ...].  lengths: [B].  weights: [B, L]."""
        if values.dim() < 2 or lengths.shape != values.shape[:1]:
            shapes = f"{list(values.shape)} and {list(lengths.shape)}"
            raise ValueError(f"values and lengths must have shapes [B, L, ...] and [B], got {shapes}")
        if weights is not None and weights.shape[:2] != values.shape[:2]:
            raise ValueError(f"weights must have shape {list(values.shape[:2])}, got {list(weights.shape)}")
        mask = torch.arange(values.shape[1], device=values.device) < lengths.unsqueeze(1)  # [B, L]
        return JaggedTensor(values[mask], None if weights is None else weights[mask], lengths)

    def to_dense(self) -> list[Tensor]:
        """The bags: B views [length, ...] of the values."""
        return list(self._values.split(self.lengths().tolist()))

    def to_dense_weights(self) -> list[Tensor] | None:
        """The bags' weights: B views [length]; None without weights."""
        return None if self._weights is None else list(self._weights.split(self.lengths().tolist()))

    def to_padded_dense(self, desired_length: int | None = None, padding_value: float = 0.0) -> Tensor:
        """[B, L, ...]: the first L values of each bag, then padding. L is desired_length, or the longest bag's."""
        return self._padded(self._values, desired_length, padding_value)

    def to_padded_dense_weights(self, desired_length: int | None = None, padding_value: float = 0.0) -> Tensor | None:
        """[B, L], as `to_padded_dense`; None without weights."""
        return None if self._weights is None else self._padded(self._weights, desired_length, padding_value)

    def _padded(self, rows: Tensor, length: int | None, padding_value: float) -> Tensor:
        if length is None:
            length = self.lengths().max().item() if self.lengths().numel() else 0
        elif length < 0:
            raise ValueError(f"desired_length must not be negative, got {length}")
        place = torch.arange(length, device=rows.device)  # [L]
        index = self.offsets()[:-1].unsqueeze(1) + place  # [B, L]
        index = index.where(place < self.lengths().unsqueeze(1), rows.shape[0])  # the row of padding comes last
        return torch.cat([rows, rows.new_full((1, *rows.shape[1:]), padding_value)])[index]


class KeyedJaggedTensor(_Jagged):
    """B bags for each of F keys, key after key: the ids of a batch by feature.

    keys: F names.  values: [N, ...].  weights: [N].  lengths: [F*B] and offsets: [F*B+1], int32 or int64, at least one
    of them.  stride: B, which the lengths tell if there are keys.
    Raises ValueError as JaggedTensor does, and for repeated keys, lengths that are no multiple of F, another stride.

                  bag 0   bag 1   bag 2
        "user"    [7, 8]  []      [9]        values   [7, 8, 9, 1, 2, 3, 4]
        "item"    [1]     [2]     [3, 4]     lengths  [2, 0, 1, 1, 1, 2]     offsets  [0, 2, 2, 3, 4, 5, 7]

    `sync()` reads the lengths and keeps how many values each key has. `kjt["user"]`, `to_dict`, `split` and `permute`
    need that and do it if it was not done; lengths on the meta device cannot be read (torch's NotImplementedError)."""

    def __init__(
        self,
        keys: list[str],
        values: Tensor,
        weights: Tensor | None = None,
        lengths: Tensor | None = None,
        offsets: Tensor | None = None,
        stride: int | None = None,
    ):
        _check(values, weights, lengths, offsets)
        _check_distinct("keys", keys)
        num_lengths = offsets.shape[0] - 1 if lengths is None else lengths.shape[0]
        if num_lengths % len(keys) if keys else num_lengths:
            raise ValueError(f"the number of lengths must be a multiple of the {len(keys)} keys, got {num_lengths}")
        if stride is not None and (stride < 0 or stride * len(keys) != num_lengths):
            raise ValueError(f"stride must be that of {num_lengths} lengths by {len(keys)} keys, got {stride}")
        self._set([values, weights, lengths, offsets], keys, stride or 0)

    def _set(
        self,
        parts: list[Tensor | None],
        keys: Sequence[str] = (),
        stride: int | None = 0,
        length_per_key: list[int] | None = None,
    ) -> Self:
        self._keys = list(keys)
        super()._set(parts)
        self._stride = None if keys else stride  # with keys a shape tells it, which stays symbolic in a trace
        self._length_per_key = length_per_key
        return self

    def _context(self) -> list:  # without length_per_key, which would be a constant of an exported program
        return [self._keys, self._stride]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        mapped = super()._map(function)
        mapped._length_per_key = self._length_per_key
        return mapped

    def to(self, device: torch.device | str, non_blocking: bool = False, dtype: torch.dtype | None = None) -> Self:
        """On another device; dtype is that of the weights alone, as in TorchRec."""
        moved = super().to(device, non_blocking)
        if dtype is not None and moved._weights is not None:
            moved._weights = moved._weights.to(dtype)
        return moved

    @staticmethod
    def empty_like(kjt: "KeyedJaggedTensor", device: torch.device | str | None = None) -> "KeyedJaggedTensor":
        """No keys, no values; dtypes, stride and, unless given, device are those of kjt."""
        parts = [kjt._values, kjt._weights, kjt.lengths()]
        parts = [None if part is None else part.new_empty((0, *part.shape[1:]), device=device) for part in parts]
        return KeyedJaggedTensor([], *parts, stride=kjt.stride())

    @staticmethod
    def from_lengths_sync(
        keys: list[str], values: Tensor, lengths: Tensor, weights: Tensor | None = None, stride: int | None = None
    ) -> "KeyedJaggedTensor":
        return KeyedJaggedTensor(keys, values, weights, lengths=lengths, stride=stride).sync()

    @staticmethod
    def from_offsets_sync(
        keys: list[str], values: Tensor, offsets: Tensor, weights: Tensor | None = None, stride: int | None = None
    ) -> "KeyedJaggedTensor":
        return KeyedJaggedTensor(keys, values, weights, offsets=offsets, stride=stride).sync()

    @staticmethod
    def from_jt_dict(jt_dict: dict[str, JaggedTensor]) -> "KeyedJaggedTensor":
        """The inverse of `to_dict`, synced. Raises ValueError as `concat` does; the stride is the number of bags."""
        parts = [([key], jt.values(), jt.weights_or_none(), jt.lengths()) for key, jt in jt_dict.items()]
        return KeyedJaggedTensor.concat([KeyedJaggedTensor(*part) for part in parts]).sync()

    @staticmethod
    def concat(kjt_list: list["KeyedJaggedTensor"]) -> "KeyedJaggedTensor":
        """The keys of all. Raises ValueError unless strides are equal, keys distinct, and all or none have weights."""
        if not kjt_list:
            raise ValueError("there must be one KeyedJaggedTensor or more to concatenate, got none")
        keys = [kjt._keys for kjt in kjt_list]
        strides = [kjt.stride() for kjt in kjt_list]
        if any(stride != strides[0] for stride in strides):
            raise ValueError(f"strides must be equal, got {strides} for keys {keys}")
        weights = [kjt._weights for kjt in kjt_list if kjt._weights is not None]
        if weights and len(weights) != len(kjt_list):
            raise ValueError(f"all or none must have weights, got {len(weights)} of {len(kjt_list)} with, keys {keys}")
        joined = KeyedJaggedTensor(
            sum(keys, []),
            torch.cat([kjt._values for kjt in kjt_list]),
            torch.cat(weights) if weights else None,
            torch.cat([kjt.lengths() for kjt in kjt_list]),
            stride=strides[0],
        )
        if all(kjt._length_per_key is not None for kjt in kjt_list):
            joined._length_per_key = sum((kjt._length_per_key for kjt in kjt_list), [])
        return joined

    def keys(self) -> list[str]:
        return self._keys

    def stride(self) -> int:
        """The number of samples B."""
        if not self._keys:
            return self._stride
        num_lengths = self._offsets.shape[0] - 1 if self._lengths is None else self._lengths.shape[0]
        return num_lengths // len(self._keys)

    def stride_per_key(self) -> list[int]:
        """F times B."""
        return [self.stride()] * len(self._keys)

    def variable_stride_per_key(self) -> bool:
        """False: every key has B bags."""
        return False

    def length_per_key(self) -> list[int]:
        """Number of values of each key: F integers, read from the lengths once."""
        if self._length_per_key is None:
            self._length_per_key = self._by_key().sum(1).tolist() if self._keys else []
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """Where the values of each key begin, then N: F+1 integers."""
        return [0, *accumulate(self.length_per_key())]

    def sync(self) -> Self:
        """Reads `length_per_key` now and returns self."""
        self.length_per_key()
        return self

    def unsync(self) -> Self:
        """Forgets what `sync` read and returns self."""
        self._length_per_key = None
        return self

    def _by_key(self) -> Tensor:
        return self.lengths().view(len(self._keys), self.stride())  # [F, B]

    def _divide(self, sizes: list[int]) -> list[tuple[Tensor, Tensor | None]]:
        """Values and weights of consecutive pieces."""
        values = self._values.split(sizes)
        weights = [None] * len(values) if self._weights is None else self._weights.split(sizes)
        return list(zip(values, weights, strict=True))

    def __getitem__(self, key: str) -> JaggedTensor:
        """The B bags of a key, views. Raises KeyError for another key."""
        index = _index(self._keys, key)
        length_per_key = self.length_per_key()
        sizes = [sum(length_per_key[:index]), length_per_key[index], sum(length_per_key[index + 1 :])]
        return JaggedTensor._of([*self._divide(sizes)[1], self._by_key()[index], None])

    def to_dict(self) -> dict[str, JaggedTensor]:
        """The B bags of every key, views."""
        pieces = zip(self._divide(self.length_per_key()), self._by_key(), _offsets(self._by_key()), strict=True)
        bags = [JaggedTensor._of([*piece, lengths, offsets]) for piece, lengths, offsets in pieces]
        return dict(zip(self._keys, bags, strict=True))

    def split(self, segments: list[int]) -> list["KeyedJaggedTensor"]:
        """The first segments[0] keys, the next segments[1] keys, and so on, views.
        Raises ValueError unless segments are not negative and sum to F."""
        if any(segment < 0 for segment in segments) or sum(segments) != len(self._keys):
            raise ValueError(f"segments must divide the {len(self._keys)} keys, got {segments}")
        spans = [slice(*span) for span in pairwise([0, *accumulate(segments)])]
        length_per_key, stride = self.length_per_key(), self.stride()
        pieces = self._divide([sum(length_per_key[span]) for span in spans])
        lengths = self.lengths().split([segment * stride for segment in segments])
        return [
            self._of([*piece, bags, None], self._keys[span], stride, length_per_key[span])
            for span, piece, bags in zip(spans, pieces, lengths, strict=True)
        ]

    def permute(self, indices: list[int]) -> "KeyedJaggedTensor":
        """Key indices[0], then indices[1], and so on; an index may be left out or, as in TorchRec, come twice.
        Raises ValueError for an index outside of the keys."""
        if not all(0 <= index < len(self._keys) for index in indices):
            raise ValueError(f"indices must be 0 to {len(self._keys) - 1}, got {indices}")
        length_per_key, pieces, by_key = self.length_per_key(), self._divide(self.length_per_key()), self._by_key()
        values = _cat([pieces[i][0] for i in indices], self._values)
        weights = None if self._weights is None else _cat([pieces[i][1] for i in indices], self._weights)
        lengths = _cat([by_key[i] for i in indices], self.lengths())
        keys, length_per_key = [self._keys[i] for i in indices], [length_per_key[i] for i in indices]
        return self._of([values, weights, lengths, None], keys, self.stride(), length_per_key)

    def flatten_lengths(self) -> "KeyedJaggedTensor":
        """The same with lengths [F*B] and no offsets: TorchRec's lengths may be [F, B], these never are."""
        parts = [self._values, self._weights, self.lengths(), None]
        return self._of(parts, self._keys, self._stride, self._length_per_key)


class KeyedTensor(_Container):
    """Tensors side by side in one, by name: the pooled embeddings of a batch by feature.

    keys: F names.  length_per_key: F sizes along key_dim, D of each.  values: [B, sum of D] for a key_dim of 1.
    Raises ValueError for repeated keys, a dimension that values lacks, sizes that do not add up to that of values."""

    NAMES = ("values",)

    def __init__(self, keys: list[str], length_per_key: list[int], values: Tensor, key_dim: int = 1):
        _check_distinct("keys", keys)
        if not -values.dim() <= key_dim < values.dim():
            raise ValueError(f"key_dim must be a dimension of values, of shape {list(values.shape)}, got {key_dim}")
        if len(length_per_key) != len(keys):
            raise ValueError(f"length_per_key must have one length for each of {keys}, got {length_per_key}")
        if any(length < 0 for length in length_per_key) or sum(length_per_key) != values.shape[key_dim]:
            raise ValueError(
                f"length_per_key must sum to the {values.shape[key_dim]} of dimension {key_dim}, got {length_per_key}"
            )
        self._set([values], list(keys), list(length_per_key), key_dim)

    def _set(self, parts: list[Tensor | None], keys: list[str], length_per_key: list[int], key_dim: int) -> Self:
        self._keys, self._length_per_key, self._key_dim, (self._values,) = keys, length_per_key, key_dim, parts
        return self

    def _context(self) -> list:
        return [self._keys, self._length_per_key, self._key_dim]

    @staticmethod
    def from_tensor_list(keys: list[str], tensors: list[Tensor], key_dim: int = 1, cat_dim: int = 1) -> "KeyedTensor":
        """tensors: F times [B, D]. Raises ValueError as the constructor does, so where cat_dim is not key_dim."""
        if not tensors:
            raise ValueError("tensors must hold one tensor or more, got none")
        return KeyedTensor(keys, [tensor.shape[key_dim] for tensor in tensors], torch.cat(tensors, cat_dim), key_dim)

    def keys(self) -> list[str]:
        return self._keys

    def key_dim(self) -> int:
        return self._key_dim

    def length_per_key(self) -> list[int]:
        """F sizes along key_dim."""
        return self._length_per_key

    def offset_per_key(self) -> list[int]:
        """Where each key begins along key_dim, then the end: F+1."""
        return [0, *accumulate(self._length_per_key)]

    def __getitem__(self, key: str) -> Tensor:
        """[B, D], a view. Raises KeyError for another key."""
        index = _index(self._keys, key)
        return self._values.narrow(self._key_dim, self.offset_per_key()[index], self._length_per_key[index])

    def to_dict(self) -> dict[str, Tensor]:
        """[B, D] for every key, views."""
        return dict(zip(self._keys, self._values.split(self._length_per_key, self._key_dim), strict=True))

    @staticmethod
    def regroup(keyed_tensors: list["KeyedTensor"], groups: list[list[str]]) -> list[Tensor]:
        """One tensor per group: its keys, from whichever keyed tensor, side by side along key_dim.
        Raises KeyError for an unknown key, ValueError for a key that two have, or for different key_dim."""
        dims = [kt._key_dim for kt in keyed_tensors]
        if len(set(dims)) != 1:
            raise ValueError(f"keyed_tensors must be one or more and have the same key_dim, got key_dim {dims}")
        keys = [key for kt in keyed_tensors for key in kt._keys]
        _check_distinct("keys of keyed_tensors", keys)
        tensors = [tensor for kt in keyed_tensors for tensor in kt.to_dict().values()]
        nothing = keyed_tensors[0]._values.narrow(dims[0], 0, 0)
        return [_cat([tensors[_index(keys, key)] for key in group], nothing, dims[0]) for group in groups]

    @staticmethod
    def regroup_as_dict(
        keyed_tensors: list["KeyedTensor"], groups: list[list[str]], keys: list[str]
    ) -> dict[str, Tensor]:
        """The tensors of `regroup` by the name of their group. Raises ValueError unless keys are one for each group."""
        _check_distinct("keys", keys)
        if len(keys) != len(groups):
            raise ValueError(f"keys must be one for each of {len(groups)} groups, got {keys}")
        return dict(zip(keys, KeyedTensor.regroup(keyed_tensors, groups), strict=True))


def _check(values: Tensor, weights: Tensor | None, lengths: Tensor | None, offsets: Tensor | None) -> None:
    """Raises ValueError unless these make bags: see JaggedTensor."""
    if values.dim() == 0:
        raise ValueError("values must have shape [N, ...], got a tensor without dimensions")
    num_values = values.shape[0]
    if weights is not None and (weights.dim() == 0 or weights.shape[0] != num_values):
        raise ValueError(f"weights must be one for each of {num_values} values, got shape {list(weights.shape)}")
    if lengths is None and offsets is None:
        raise ValueError("lengths or offsets must be given, got None for both")
    given = {name: t for name, t in (("lengths", lengths), ("offsets", offsets)) if t is not None}
    for name, tensor in given.items():
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be torch.int32 or torch.int64, got {tensor.dtype}")
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have one dimension, got shape {list(tensor.shape)}")
    if offsets is not None and offsets.shape[0] == 0:
        raise ValueError("offsets must begin with 0, got none")
    if len(given) == 2 and offsets.shape[0] != lengths.shape[0] + 1:
        raise ValueError(f"offsets must be one more than the {lengths.shape[0]} lengths, got {offsets.shape[0]}")
    readable = all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in given.values())
    if not torch.compiler.is_compiling() and readable:  # type: a FakeTensor says that it is on the CPU
        _check_numbers(num_values, lengths, offsets)


def _check_numbers(num_values: int, lengths: Tensor | None, offsets: Tensor | None) -> None:
    """The half of `_check` that reads."""
    if offsets is not None:
        if offsets[0] != 0 or offsets[-1] != num_values:
            ends = f"{offsets[0].item()} and {offsets[-1].item()}"
            raise ValueError(f"offsets must begin with 0 and end with the number of values, {num_values}, got {ends}")
        if (falls := offsets[1:] < offsets[:-1]).any():  # compared, not subtracted, which can overflow
            bag = falls.int().argmax().item()
            raise ValueError(f"offsets must not descend, got {offsets[bag : bag + 2].tolist()} for bag {bag}")
    if lengths is not None:
        least, most = (x.item() for x in lengths.aminmax()) if lengths.numel() else (0, 0)
        if least < 0:
            raise ValueError(f"lengths must not be negative, got {least}")
        if most > num_values or lengths.sum() != num_values:  # a sum of larger ones could wrap around
            total = sum(lengths.tolist())
            raise ValueError(f"lengths must sum to the number of values, {num_values}, got {total}")
    if lengths is not None and offsets is not None and (wrong := offsets.diff() != lengths).any():
        bag = wrong.int().argmax().item()
        pair = f"length {lengths[bag].item()} and offsets {offsets[bag : bag + 2].tolist()}"
        raise ValueError(f"lengths must be the steps between offsets, got {pair} for bag {bag}")


def _check_distinct(name: str, keys: list[str]) -> None:
    if len(set(keys)) != len(keys):
        raise ValueError(
            f"{name} must be distinct, got {sorted({key for key in keys if keys.count(key) > 1})} repeated"
        )


def _index(keys: list[str], key: str) -> int:
    if key not in keys:
        raise KeyError(f"no key {key!r}; the keys are {keys}")
    return keys.index(key)


def _offsets(lengths: Tensor) -> Tensor:
    return pad(lengths.cumsum(-1, dtype=lengths.dtype), (1, 0))  # [..., B] -> [..., B+1]


def _cat(pieces: list[Tensor], like: Tensor, dim: int = 0) -> Tensor:
    return torch.cat(pieces, dim) if pieces else like.narrow(dim, 0, 0)


def _register(kind: type[_Container]) -> None:
    """Makes kind a pytree of its tensors, and one of the types that torch.load makes without running what it loads."""

    def flatten(thing: _Container):
        return thing._parts(), thing._context()

    def flatten_with_keys(thing: _Container):
        return list(zip(map(GetAttrKey, kind.NAMES), thing._parts(), strict=True)), thing._context()

    def unflatten(parts: Iterable, context: list):
        return kind._of(list(parts), *context)

    name = f"embeddings.{kind.__name__}"
    register_pytree_node(kind, flatten, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten_with_keys)
    torch.serialization.add_safe_globals([kind])


_register(JaggedTensor)
_register(KeyedJaggedTensor)
_register(KeyedTensor)

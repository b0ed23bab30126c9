"""Random calls of the operators, good ones and hostile ones."""

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from oracle import (
    ADD,
    APART,
    COMBINES,
    CONCAT,
    FEATURES,
    MAPS,
    MAX,
    PARTITION,
    POOLINGS,
    PROBES,
    SUM,
    WEIGHTED,
    Case,
    Table,
    make_case,
)
from torch import Tensor

from embeddings.index_map import BEGIN, COLUMN, DIM, NUM_COLUMNS, NUM_EMBEDDINGS, WIDTH
from embeddings.rules import Rule, accumulator

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MIXED_DTYPES = ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16))
OWN_WIDTHS = (8, 16, 32, 64, 128)  # that have kernels of their own: with_width in csrc/cpu_sums.h
OTHER_DTYPES = (torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.complex64, torch.float8_e4m3fn)
NASTY = (-1, 0, 1, 2, 3, 31, 32, 33, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
ODD = (math.nan, math.inf, -math.inf, -0.0, 1e-310, 1e-45, 65520.0, 3e38, 1e308)
HUGE = 2**40  # numbers: no memory has room for them

# --- good ones -------------------------------------------------------------------------------------------------------


def random_case(rng: random.Random, index_map: int, widths: Sequence[int] = ()) -> tuple[Case, int, Tensor]:
    """A call of any shape, its pooling and a gradient for it; slices and tensors begin at any number of the memory.

    widths: of slots, if they can be one of these."""
    combine, pooling = rng.choice(COMBINES), rng.choice(POOLINGS)
    unit = rng.choice([1, 1, 2, 3, 4, 8])
    # whole units also in the last probe of a weighted sum, of K - 1 numbers
    probes = 1 + unit * rng.randint(1, max(1, 3 // unit)) if combine == WEIGHTED else rng.randint(1, 4)
    width = unit * rng.randint(1, rng.choice([4, 4, 64 // unit, 300 // unit]))
    if fitting := [x for x in widths if x % unit == 0]:
        width = rng.choice(fitting)
    features, batch_size = rng.randint(1, 4), rng.choice([0, 1, 2, 5, 17, 150])

    def dim() -> int:
        chunks = rng.randint(1, max(1, min(5, 300 // width)))
        return rng.choice([width, chunks * width, chunks * width, unit * rng.randint(1, 8)])

    longest = rng.choice([1, 3, 3, 9, 200 if batch_size < 9 else 9])
    counts = [rng.choice([0, 1, rng.randint(0, longest)]) for _ in range(features * batch_size)]
    one_id = rng.random() < 0.4
    digits = probes - (combine == WEIGHTED)  # of an id, where it has a limit
    case = make_case(
        np.array([1] * len(counts) if one_id else counts, int).reshape(features, batch_size),
        index_map=index_map,
        combine=combine,
        probes=probes,
        dims=tuple(dim() for _ in range(rng.randint(1, features * probes))),
        width=width,
        unit=unit,
        rows=tuple(min(10**6, rng.randint(1, rng.choice([1, 2, 3, 7, 40]) ** digits)) for _ in range(features)),
        num_slots=rng.choice([1, 2, 3, 7, 40]),
        shared=rng.choice([APART, PROBES, FEATURES]),
        positions=tuple(rng.sample(range(features), rng.randint(1, features))),
        dtype=rng.choice(DTYPES),
        ids_dtype=rng.choice([torch.int32, torch.int64]),
        weighted=pooling != MAX and rng.random() < 0.5,
        one_id=one_id,
        seed=rng.getrandbits(60),
    )
    generator = torch.Generator().manual_seed(rng.getrandbits(60))

    def numbers(*shape: int, offset: int, dtype: torch.dtype) -> Tensor:
        """The last ones of their memory, `offset` numbers from its beginning."""
        flat = torch.randn(offset + max(1, math.prod(shape)), generator=generator, dtype=torch.float64)
        return flat.to(dtype)[offset : offset + math.prod(shape)].view(shape)

    begins, slice_of = case.tables[:, BEGIN].unique(return_inverse=True)
    gaps = torch.tensor([rng.randint(0, 2) for _ in begins]).cumsum(0)  # units that belong to nobody
    case.tables[:, BEGIN] += unit * gaps[slice_of]
    num_units = len(case.weights) - 1 + int(gaps[-1]) + rng.randint(0, 2)
    own, of_sums = case.weights.dtype, accumulator(case.weights.dtype)
    weights = numbers(num_units, unit, offset=rng.choice([0, 0, 1, 8]), dtype=own)
    grad = numbers(batch_size, case.columns, offset=rng.choice([0, 1]), dtype=rng.choice([own, of_sums]))
    if case.sample_weights is not None and rng.random() < 0.5:
        case = case._replace(sample_weights=case.sample_weights.to(of_sums))
    grad = grad.t().contiguous().t() if rng.random() < 0.3 else grad
    return case._replace(weights=weights, chunks=case.chunks + rng.randint(0, 1)), pooling, grad


def calls(case: Case, pooling: int, grad: Tensor, seed: int = 0) -> dict[str, Callable]:
    """Operator -> function of the kernels that calls it."""
    how = list(Rule)[seed // len(MAPS) % len(Rule)], seed % 2 * 0.01  # of the update: its rule and weight decay
    return {
        "bag": lambda kernels: case.forward(kernels, pooling),
        "bag_into": lambda kernels: case.forward_into(kernels, pooling),
        "bag_backward": lambda kernels: case.backward(kernels, grad, pooling),
        "bag_backward_rows": lambda kernels: case.backward_rows(kernels, grad, pooling),
        "bag_backward_sample_weights": lambda kernels: case.backward_sample_weights(kernels, grad, pooling),
        "bag_update": lambda kernels: case.update(kernels, grad, pooling, *how),
    }


class Call(NamedTuple):
    """The arguments of an operator of torch.ops.embeddings, in its schema's order. label: which one, and how."""

    operator: str
    label: str
    args: dict[str, object]


class _Noted:
    """Kernels that only note how they are called."""

    def __getattr__(self, operator: str) -> Callable:
        schema = getattr(torch.ops.embeddings, operator).default._schema

        def note(*args: object) -> None:
            self.operator, self.args = operator, dict(zip([x.name for x in schema.arguments], args, strict=True))

        return note


def random_call(rng: random.Random) -> Call:
    """Of any operator, nothing wrong with it."""
    kind = rng.choice(["bag", "bag", "bag", "dot_interaction", "relu_backward"])
    if kind != "bag":
        return _interaction(rng) if kind == "dot_interaction" else _relu(rng)
    widths = OWN_WIDTHS if rng.random() < 0.3 else ()
    some, noted = calls(*random_case(rng, rng.choice(MAPS), widths), seed=rng.getrandbits(16)), _Noted()
    some[rng.choice(list(some))](noted)
    args, label = noted.args, noted.operator
    if "atomic" in args:
        args["atomic"] = rng.random() < 0.5
        label += ", atomic" if args["atomic"] else ""
    if "rule" in args:
        label += f", {Rule(args['rule']).name.lower()}"
    return Call(noted.operator, label, args)


def _interaction(rng: random.Random) -> Call:
    batch_size, num_features = rng.choice([0, 1, 2, 9, 33]), rng.randint(0, 30)
    dim = rng.choice([0, 1, 3, 8, 10, 33, 72])
    types = rng.choice([*((dtype, dtype) for dtype in DTYPES), *MIXED_DTYPES])
    dense, embedded = _draw(rng, types[0], batch_size, dim), _draw(rng, types[1], batch_size, num_features, dim)
    args = {"dense": dense, "embedded": embedded, "multiple": rng.choice([1, 8])}
    if rng.random() < 0.5:
        return Call("dot_interaction", "dot_interaction", args)
    columns = dim + num_features * (num_features + 1) // 2
    grad = _draw(rng, types[0], batch_size, columns + -columns % args["multiple"])
    return Call("dot_interaction_backward", "dot_interaction_backward", {"grad": grad} | args)


def _relu(rng: random.Random) -> Call:
    shape = rng.choice([0, 1, 7, 16, 33, 200]), rng.choice([0, 1, 15, 16, 17, 64, 100])
    args = {"grad": _draw(rng, torch.float32, *shape), "out": _draw(rng, torch.float32, *shape).relu()}
    return Call("relu_backward", "relu_backward", args)


def _draw(rng: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """The last numbers of their memory, which begins where a pack of them may not."""
    offset = rng.choice([0, 1])
    return torch.randn(offset + math.prod(shape), generator=_generator(rng)).to(dtype)[offset:].view(shape)


def beyond_the_slab() -> Call:
    """A lookup in weights whose memory is a row shorter than they say: no operator can know."""
    weights = torch.ones(4, 4)
    weights.untyped_storage().resize_(3 * 4 * weights.element_size())
    batch = (torch.tensor([0, 3]), None, None, torch.tensor([Table(0, 0, 4, 4, 0, 4, 4)]), 2)
    case = Case(weights, *batch, 4, 1, 1, PARTITION, ADD, "a")
    noted = _Noted()
    case.forward(noted, SUM)
    return Call("bag", "bag", noted.args)


# --- hostile ones ----------------------------------------------------------------------------------------------------


def spoil(rng: random.Random, call: Call) -> str:
    """Makes something of a call's arguments wrong, or at least odd, and says what."""
    ways = [_a_tensor, _a_tensor]
    if "tables" in call.args:
        ways += [_an_argument, _a_number, _a_number, _a_number, _no_samples_of_giants]
    else:
        ways += [_giants_of_nothing]
    try:
        return rng.choice(ways)(rng, call.args)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        return f"nothing: {error}"


def _nasty(rng: random.Random, near: int, dtype: torch.dtype = torch.int64) -> int:
    """An integer that the dtype has, often one beside a right one."""
    limits = torch.iinfo(dtype)
    numbers = (*NASTY, near - 1, near, near + 1, 2 * near, -near)
    return rng.choice([n for n in numbers if limits.min <= n <= limits.max])


def _an_argument(rng: random.Random, args: dict[str, object]) -> str:
    name = rng.choice([name for name, x in args.items() if isinstance(x, int)])
    args[name] = not args[name] if isinstance(args[name], bool) else _nasty(rng, args[name])
    return f"{name}={args[name]}"


def _integers(x: object) -> Tensor | None:
    """A copy of a tensor of ids, offsets or tables, if it still is one."""
    right = isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64) and 0 < x.numel() < HUGE
    return x.clone(memory_format=torch.contiguous_format) if right else None


def _a_number(rng: random.Random, args: dict[str, object]) -> str:
    """Of ids, offsets or tables: one, all, or a table's column; or all, in another order."""
    name = rng.choice(["ids", "offsets", "tables"])
    if (x := _integers(args[name])) is None:
        return _an_argument(rng, args)
    args[name], flat = x, x.view(-1)
    place = rng.randrange(len(flat))
    step = NUM_COLUMNS if name == "tables" else 1
    where = rng.choice([slice(place, place + 1), slice(place % step, None, step)])
    if name == "offsets" and rng.random() < 0.2:
        flat[:] = flat.flip(0) if rng.random() < 0.5 else flat[torch.randperm(len(flat), generator=_generator(rng))]
        return "offsets in another order"
    near, tables = int(flat[place]), _integers(args["tables"])
    if name == "ids" and tables is not None:
        near = int(tables.view(-1)[min(NUM_EMBEDDINGS, tables.numel() - 1) :: NUM_COLUMNS].max())
    flat[where] = number = _nasty(rng, near, x.dtype)
    return f"{name}[{where.start}:{where.stop}:{where.step}]={number}"


def _no_samples_of_giants(rng: random.Random, args: dict[str, object]) -> str:
    """A batch without samples, of vectors as long as only integers can say."""
    tables, probes, most = _integers(args["tables"]), args["probes"], rng.choice([HUGE, 2**62, 2**63 - 1])
    if tables is None or tables.dim() != 2 or tables.shape[1] != NUM_COLUMNS or not 0 < probes <= len(tables):
        return _an_argument(rng, args)
    width = tables[:, WIDTH].clamp(1)
    tables[:, DIM] = dim = width * (most // width)
    step = 1 if args["combine"] == CONCAT else probes
    begins = dim[::step].cumsum(0) - dim[::step]  # which may wrap
    tables[:, COLUMN] = begins.repeat_interleave(step)[: len(tables)]
    args |= {"tables": tables, "offsets": torch.zeros(1, dtype=torch.int64), "chunks": most}
    for name in ("grad", "out"):
        if isinstance(args.get(name), Tensor):
            args[name] = args[name].new_empty(0, most)
    for name in ("ids", "per_sample_weights"):
        if isinstance(args.get(name), Tensor):
            args[name] = args[name].flatten()[: rng.choice([0, 3])]
    if "batch_size" in args:
        args |= {"batch_size": 0, "columns": most}
    return f"no samples of {most} columns"


def _giants_of_nothing(rng: random.Random, args: dict[str, object]) -> str:
    """Tensors without numbers whose first sizes, or last ones, are as large as integers are."""
    place, most = rng.choice([0, -1]), rng.choice([HUGE, 2**62, 2**63 - 1])
    for name, x in args.items():
        if isinstance(x, Tensor) and x.dim():
            args[name] = x.new_empty(_with([0] * x.dim(), place % x.dim(), most))
    return f"{most} of nothing at {place}"


def _a_tensor(rng: random.Random, args: dict[str, object]) -> str:
    name = rng.choice([name for name, x in args.items() if x is None or isinstance(x, Tensor)])
    others = [x for x in args.values() if isinstance(x, Tensor)]
    if args[name] is None or rng.random() < 0.05:
        args[name] = rng.choice(others) if others else None
        return f"{name}: what another argument is"
    way = rng.choice(list(WAYS) if len(others) > 1 else list(WAYS)[1:])  # a call without tensors has no device
    args[name] = WAYS[way](rng, args[name])
    return f"{name}: {way}"


def _with(shape: Sequence[int], place: int, size: int) -> list[int]:
    return [size if i == place else n for i, n in enumerate(shape)]


def _huge_and_empty(rng: random.Random, x: Tensor) -> Tensor:
    empty = rng.randrange(x.dim())
    return x.new_empty([0 if i == empty else rng.choice([n, HUGE, 2**62]) for i, n in enumerate(x.shape)])


def _with_odd_numbers(rng: random.Random, x: Tensor) -> Tensor:
    x = x.clone()
    for _ in range(rng.randint(1, 9)):
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(ODD)
    return x


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(60))


WAYS: dict[str, Callable[[random.Random, Tensor], Tensor | None]] = {
    "absent": lambda rng, x: None,
    "of another dtype": lambda rng, x: x.to(rng.choice([*DTYPES, *OTHER_DTYPES])),
    "shorter": lambda rng, x: x[: rng.choice([-1, len(x) // 2])],
    "narrower": lambda rng, x: x[..., :-1],
    "longer": lambda rng, x: torch.cat([x, x[:1]]),
    "wider": lambda rng, x: torch.cat([x, x[..., :1]], -1),
    "of one dimension more": lambda rng, x: x.unsqueeze(rng.randint(0, x.dim())),
    "flat": lambda rng, x: x.flatten(),
    "a scalar": lambda rng, x: x.flatten()[0],
    "transposed": lambda rng, x: x.permute(*reversed(range(x.dim()))),
    "transposed in memory": lambda rng, x: x.t().contiguous().t(),
    "with gaps in memory": lambda rng, x: x.repeat_interleave(2, -1)[..., ::2],
    "off by one in memory": lambda rng, x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
    "empty": lambda rng, x: x.new_empty([0] * x.dim()),
    "one number many times": lambda rng, x: x.flatten()[:1].expand(x.shape),
    "one row many times": lambda rng, x: x[:1].expand(x.shape),
    "more than memory holds": lambda rng, x: x.flatten()[:1].expand(_with(x.shape, rng.randrange(x.dim()), HUGE)),
    "huge and empty": _huge_and_empty,
    "of odd numbers": _with_odd_numbers,
}

"""The operators in plain torch: what csrc's kernels must equal, bit for bit, and what runs where they are not built.

The index maps are twins of the structs in csrc/index_map.h, in int64, whose sums and products wrap as unsigned ones.
Sums follow the one order of csrc: runs of RUN contributions, left to right, then the runs. Arguments: `embeddings.ops`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RUN = 64  # kRun in csrc/index_map.h
POSITION, FIRST_SLOT, NUM_SLOTS, NUM_EMBEDDINGS, SEED = range(5)
SUM, MEAN, MAX = range(3)

# --- index maps ----------------------------------------------------------------------------------------------------


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """x >> bits of the unsigned number (torch's shift copies the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(seed: Tensor, i: Tensor) -> Tensor:
    """Number i of the SplitMix64 stream that starts at seed (Steele, Lea, Flood, OOPSLA 2014), as int64 bits."""
    z = seed + (i + 1) * _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift_right(z, 31)


def reduce_range(hashes: Tensor, n: Tensor) -> Tensor:
    """High 64 bits of the unsigned product hash * n: uniform in [0, n) (Lemire, ACM TOMACS 2019). n < 2^63."""
    low = (1 << 32) - 1
    a, b = _shift_right(hashes, 32), hashes & low
    c, d = n >> 32, n & low
    middle = _shift_right(b * d, 32) + ((a * d) & low) + ((b * c) & low)
    return a * c + _shift_right(a * d, 32) + _shift_right(b * c, 32) + _shift_right(middle, 32)


def _dense_slots(ids: Tensor, tables: Tensor, chunks: Tensor) -> Tensor:
    return (tables[:, FIRST_SLOT] + ids)[:, None].expand(-1, chunks.numel())


def _hashed_slots(ids: Tensor, tables: Tensor, chunks: Tensor) -> Tensor:
    key = splitmix64(tables[:, SEED], ids)
    hashes = splitmix64(key[:, None], chunks)
    return tables[:, FIRST_SLOT, None] + reduce_range(hashes, tables[:, NUM_SLOTS, None])


class Map(NamedTuple):
    """slots(ids [M], tables [M, 5], chunks [C]) -> [M, C]; ranged: ids have an upper limit."""

    slots: Callable[[Tensor, Tensor, Tensor], Tensor]
    ranged: bool


MAPS = (Map(_dense_slots, True), Map(_hashed_slots, False))  # in the order of embeddings.ops.IndexMap

# --- one batch, unrolled -------------------------------------------------------------------------------------------


class Unrolled(NamedTuple):
    """The M ids of a slab's features, bag after bag (feature-major), and the weights each reads."""

    where: Tensor  # [M] position in the batch's ids
    bags: Tensor  # [M] number of the bag, f * B + b
    counts: Tensor  # [F * B] ids of each bag
    slots: Tensor  # [M, C]


def unroll(weights, ids, offsets, tables, batch_size, dim, index_map, features) -> Unrolled:
    """Check the batch and find every id's slots. Raises RuntimeError naming feature, position, id and limit."""
    names, num_tables = features.split(","), tables.shape[0]
    bags = (tables[:, POSITION, None] * batch_size + torch.arange(batch_size, device=ids.device)).flatten()
    num_bags = ids.numel() if offsets is None else offsets.numel() - 1
    if bags.numel() and int(bags.max()) >= num_bags:
        f = int(bags.argmax()) // batch_size
        raise RuntimeError(f"the batch has no bags for feature {names[f]} at position {int(tables[f, POSITION])}")
    begins = bags if offsets is None else offsets[bags]
    ends = bags + 1 if offsets is None else offsets[bags + 1]
    counts = ends - begins
    _check_offsets(begins, ends, ids.numel(), batch_size, names)
    bag_of = torch.arange(num_tables * batch_size, device=ids.device).repeat_interleave(counts)  # [M]
    starts = counts.cumsum(0) - counts
    where = begins[bag_of] + torch.arange(bag_of.numel(), device=ids.device) - starts[bag_of]
    wanted = ids[where].long()
    rows = tables[bag_of // max(batch_size, 1)]  # [M, 5]
    index = MAPS[index_map]
    if index.ranged:
        _check_ids(wanted, rows, where, bag_of // max(batch_size, 1), names)
    chunks = torch.arange(dim // weights.shape[1], device=ids.device)
    return Unrolled(where, bag_of, counts, index.slots(wanted, rows, chunks))


def _check_offsets(begins: Tensor, ends: Tensor, num_ids: int, batch_size: int, names: list[str]) -> None:
    bad = ((begins < 0) | (begins > ends) | (ends > num_ids)).nonzero()
    if bad.numel():
        bag = int(bad[0])
        raise RuntimeError(
            f"offsets must not descend or leave the ids: feature {names[bag // batch_size]}, "
            f"sample {bag % batch_size}, bag [{int(begins[bag])}, {int(ends[bag])}) of {num_ids} ids"
        )


def _check_ids(ids: Tensor, rows: Tensor, where: Tensor, table: Tensor, names: list[str]) -> None:
    bad = ((ids < 0) | (ids >= rows[:, NUM_EMBEDDINGS])).nonzero()
    if bad.numel():
        i = int(bad[0])
        limit = int(rows[i, NUM_EMBEDDINGS])
        raise RuntimeError(
            f"id out of range: feature {names[int(table[i])]}, position {int(where[i])} of the batch's ids, "
            f"id {int(ids[i])}, limit {limit} (valid ids are 0..{limit - 1})"
        )


# --- sums in one order -----------------------------------------------------------------------------------------------


def ordered_sum(values: Tensor, counts: Tensor) -> Tensor:
    """Sums [S, Z] of consecutive segments of values [M, Z], counts [S] long: runs of RUN left to right, then runs."""
    num_runs = (counts + RUN - 1) // RUN
    run_of = torch.arange(counts.numel(), device=counts.device).repeat_interleave(num_runs)
    nth_run = torch.arange(run_of.numel(), device=counts.device) - (num_runs.cumsum(0) - num_runs)[run_of]
    run_counts = (counts[run_of] - nth_run * RUN).clamp(max=RUN)
    return _left_to_right(_left_to_right(values, run_counts), num_runs)


def _left_to_right(values: Tensor, counts: Tensor) -> Tensor:
    sums = values.new_zeros(counts.numel(), *values.shape[1:])
    starts = counts.cumsum(0) - counts
    live = (counts > 0).nonzero()[:, 0]
    sums[live] = values[starts[live]]
    for k in range(1, int(counts.max()) if counts.numel() else 0):
        live = live[counts[live] > k]
        sums[live] += values[starts[live] + k]
    return sums


# --- the operators ---------------------------------------------------------------------------------------------------


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(weights, ids, offsets, per_sample_weights, dim, pooling) -> None:
    if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise RuntimeError("ids must be int32 or int64" if ids.dim() == 1 else "ids must be 1-D")
    if offsets is not None and (offsets.dim() != 1 or offsets.dtype != torch.int64):
        raise RuntimeError("offsets must be 1-D int64")
    if weights.dim() != 2 or dim % weights.shape[1]:
        raise RuntimeError("weights must be [num_slots, width] with dim a multiple of width")
    if per_sample_weights is not None:
        if pooling == MAX:
            raise RuntimeError("per_sample_weights: pooling must be sum or mean, not max")
        if per_sample_weights.shape != ids.shape or per_sample_weights.dtype != weights.dtype:
            raise RuntimeError("per_sample_weights must be [N], of the weights' dtype")


def _vectors(weights: Tensor, slots: Tensor, dim: int) -> Tensor:
    return weights[slots].reshape(-1, dim).to(_accumulator(weights.dtype))  # [M, D]


def _argmax(vectors: Tensor, bags: Tensor, num_bags: int) -> Tensor:
    """Which of the M vectors holds each bag's maximum, [num_bags, D]; M in an empty bag. First of equals; NaN wins."""
    num_ids, dim = vectors.shape
    index = bags[:, None].expand(-1, dim)
    best = vectors.new_full((num_bags, dim), -torch.inf).scatter_reduce(0, index, vectors, "amax")
    winning = (vectors == best[bags]) | vectors.isnan()
    place = torch.where(winning, torch.arange(num_ids, device=bags.device)[:, None], num_ids)
    return torch.full_like(best, num_ids, dtype=torch.int64).scatter_reduce(0, index, place, "amin")


def bag(weights, ids, offsets, per_sample_weights, tables, batch_size, dim, index_map, pooling, accumulate, features):
    """Pooled vectors [B, F, D]; an empty bag is zero."""
    _check(weights, ids, offsets, per_sample_weights, dim, pooling)
    batch = unroll(weights, ids, offsets, tables, batch_size, dim, index_map, features)
    vectors = _vectors(weights, batch.slots, dim)
    if pooling == MAX:
        padded = torch.cat([vectors, vectors.new_zeros(1, dim)])
        pooled = padded.gather(0, _argmax(vectors, batch.bags, batch.counts.numel()))
    else:
        if per_sample_weights is not None:
            vectors = vectors * per_sample_weights[batch.where].to(vectors.dtype)[:, None]
        pooled = ordered_sum(vectors, batch.counts)
        if pooling == MEAN:
            pooled = pooled / batch.counts.clamp(min=1)[:, None]
    return pooled.to(weights.dtype).reshape(tables.shape[0], batch_size, dim).transpose(0, 1).contiguous()  # [B, F, D]


def _touched(grad, weights, ids, offsets, per_sample_weights, tables, index_map, pooling, features):
    """The touched slots in ascending order [U] and their gradients [U, Z] in the accumulator's type."""
    batch_size, num_tables, dim = grad.shape
    _check(weights, ids, offsets, per_sample_weights, dim, pooling)
    batch = unroll(weights, ids, offsets, tables, batch_size, dim, index_map, features)
    bag_grads = grad.transpose(0, 1).reshape(num_tables * batch_size, dim).to(_accumulator(weights.dtype))
    grads = bag_grads[batch.bags]  # [M, D]
    if pooling == MAX:
        winner = _argmax(_vectors(weights, batch.slots, dim), batch.bags, batch.counts.numel())
        mine = torch.arange(grads.shape[0], device=grads.device)[:, None] == winner[batch.bags]
        grads = torch.where(mine, grads, 0)
    if per_sample_weights is not None:
        grads = grads * per_sample_weights[batch.where].to(grads.dtype)[:, None]
    if pooling == MEAN:
        grads = grads / batch.counts[batch.bags].clamp(min=1)[:, None]
    slots, order = batch.slots.flatten().sort(stable=True)  # equal slots keep batch order, so sums repeat
    touched, counts = slots.unique_consecutive(return_counts=True)
    return touched, ordered_sum(grads.reshape(-1, weights.shape[1])[order], counts)


def bag_backward(grad, weights, ids, offsets, per_sample_weights, tables, index_map, pooling, atomic, features):
    """Gradient of the whole slab [S, Z]."""
    slots, values = _touched(grad, weights, ids, offsets, per_sample_weights, tables, index_map, pooling, features)
    return torch.zeros_like(weights, memory_format=torch.contiguous_format).index_copy_(
        0, slots, values.to(weights.dtype)
    )


def bag_backward_rows(grad, weights, ids, offsets, per_sample_weights, tables, index_map, pooling, features):
    """The touched slots [U], ascending, and their gradients [U, Z]."""
    slots, values = _touched(grad, weights, ids, offsets, per_sample_weights, tables, index_map, pooling, features)
    return slots, values.to(weights.dtype)


def bag_backward_sample_weights(grad, weights, ids, offsets, tables, index_map, pooling, features):
    """Gradient of the per-sample weights [N]; zero for ids of other slabs."""
    batch_size, num_tables, dim = grad.shape
    batch = unroll(weights, ids, offsets, tables, batch_size, dim, index_map, features)
    bag_grads = grad.transpose(0, 1).reshape(num_tables * batch_size, dim).to(_accumulator(weights.dtype))
    products = _vectors(weights, batch.slots, dim) * bag_grads[batch.bags]
    if pooling == MEAN:
        products = products / batch.counts[batch.bags].clamp(min=1)[:, None]
    sums = ordered_sum(products.reshape(-1, 1), torch.full_like(batch.where, dim))
    return weights.new_zeros(ids.numel()).index_copy_(0, batch.where, sums[:, 0].to(weights.dtype))

"""The operators in plain torch: what csrc's kernels must equal, bit for bit, and what runs where they are not built.

Sums follow the one order of csrc: runs of RUN contributions, left to right, then the runs. Arguments: `embeddings.ops`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from embeddings.index_map import MAPS, NUM_EMBEDDINGS, POSITION

RUN = 64  # kRun in csrc/index_map.h
SEPARATOR = "\x1f"  # between names, kSeparator in csrc/bag.h
SUM, MEAN, MAX = range(3)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# --- what is refused: as make_call and check_tables in csrc ----------------------------------------------------------


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


def _check(weights, ids, offsets, per_sample_weights, tables, batch_size, dim, index_map, pooling, features) -> None:
    """Everything that can be told without looking at ids."""
    width = weights.shape[1] if weights.dim() == 2 else 0
    _require(
        width > 0 and dim > 0 and dim % width == 0, "weights must be [num_slots, width] with dim a multiple of width"
    )
    _require(tables.dim() == 2 and tables.shape[1] == 5 and tables.dtype == torch.int64, "tables must be int64 [F, 5]")
    _require(ids.dim() == 1, "ids must be 1-D")
    _require(ids.dtype in (torch.int32, torch.int64), "ids must be int32 or int64")
    _require(pooling in (SUM, MEAN, MAX), "pooling must be 0 (sum), 1 (mean) or 2 (max)")
    if offsets is not None:
        right = offsets.dim() == 1 and offsets.dtype == torch.int64 and offsets.numel() > 0
        _require(right, "offsets must be 1-D int64, one more than there are bags")
    num_bags = ids.numel() if offsets is None else offsets.numel() - 1
    whole = batch_size >= 0 and (num_bags % batch_size == 0 if batch_size else num_bags == 0)
    _require(whole, "the number of bags must be a multiple of batch_size")
    if per_sample_weights is not None:
        _require(pooling != MAX, "per_sample_weights: pooling must be sum or mean, not max")
        fits = per_sample_weights.shape == ids.shape and per_sample_weights.dtype == weights.dtype
        _require(fits, "per_sample_weights must be [N], of the weights' dtype")
    _require(weights.dtype in DTYPES, "weights must be float32, float64, float16 or bfloat16")
    _require(0 <= index_map < len(MAPS), "unknown index_map")
    _check_tables(tables, num_bags, batch_size, weights.shape[0], MAPS[index_map].ranged, features)


def _check_tables(tables, num_bags: int, batch_size: int, total: int, ranged: bool, features: str) -> None:
    end = 0
    for f, (position, first, num_slots, num_embeddings, _) in enumerate(tables.tolist()):
        name = _name(features, f)
        if position < 0 or (num_bags > 0 and position >= num_bags // batch_size):
            raise RuntimeError(f"the batch has no bags for feature {name} at position {position}")
        needed = max(num_embeddings if ranged else 1, 1)
        if first < end or num_slots < needed or num_slots > total or first > total - num_slots:
            raise RuntimeError(
                f"feature {name}: slots [{first}, +{num_slots}) do not fit its {num_embeddings} ids, "
                f"the slots before and a slab of {total} slots"
            )
        end = first + num_slots


def _name(features: str, f: int) -> str:
    names = features.split(SEPARATOR)
    return names[f] if f < len(names) else ""


def _check_grad(grad: Tensor, weights: Tensor, tables: Tensor) -> None:
    right = grad.dim() == 3 and grad.shape[1] == tables.shape[0] and grad.dtype == weights.dtype
    _require(right, "grad must be [B, F, D], of the weights' dtype and on their device")


# --- one batch, unrolled -------------------------------------------------------------------------------------------


class Unrolled(NamedTuple):
    """The M ids of a slab's features, bag after bag (feature-major), and the weights each reads."""

    where: Tensor  # [M] position in the batch's ids
    bags: Tensor  # [M] number of the bag, f * B + b
    counts: Tensor  # [F * B] ids of each bag
    slots: Tensor  # [M, C]


def unroll(weights, ids, offsets, tables, batch_size, dim, index_map, features) -> Unrolled:
    """Find every id's slots. Raises RuntimeError for the first bad bag or id (by feature, sample, position)."""
    index = MAPS[index_map]
    bags = (tables[:, POSITION, None] * batch_size + torch.arange(batch_size, device=ids.device)).flatten()
    begins = bags if offsets is None else offsets[bags]
    ends = bags + 1 if offsets is None else offsets[bags + 1]
    bad_bags = ((begins < 0) | (begins > ends) | (ends > ids.numel())).nonzero()[:1, 0]
    last = int(bad_bags) if bad_bags.numel() else bags.numel()  # bags before the first bad one may still hold a bad id

    counts = torch.where(torch.arange(bags.numel(), device=ids.device) < last, ends - begins, 0)
    bag_of = torch.arange(bags.numel(), device=ids.device).repeat_interleave(counts)  # [M]
    where = begins[bag_of] + torch.arange(bag_of.numel(), device=ids.device) - (counts.cumsum(0) - counts)[bag_of]
    wanted, table = ids[where].long(), bag_of // max(batch_size, 1)
    if index.ranged:
        _check_ids(wanted, tables[table, NUM_EMBEDDINGS], where, table, features)
    if bad_bags.numel():
        raise RuntimeError(
            f"offsets must not descend or leave the ids: feature {_name(features, last // batch_size)}, "
            f"sample {last % batch_size}, bag [{int(begins[last])}, {int(ends[last])}) of {ids.numel()} ids"
        )
    if offsets is not None and (offsets[0] != 0 or offsets[-1] != ids.numel()):
        raise RuntimeError(
            f"offsets must begin with 0 and end with the number of ids, {ids.numel()}, "
            f"not {int(offsets[0])} and {int(offsets[-1])}"
        )
    chunks = torch.arange(dim // weights.shape[1], device=ids.device)
    return Unrolled(where, bag_of, counts, index.slots(wanted, tables[table], chunks))


def _check_ids(ids: Tensor, limits: Tensor, where: Tensor, table: Tensor, features: str) -> None:
    bad = ((ids < 0) | (ids >= limits)).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise RuntimeError(
            f"id out of range: feature {_name(features, int(table[i]))}, position {int(where[i])} of the batch's ids, "
            f"id {int(ids[i])}, limit {int(limits[i])} (valid ids are 0..{int(limits[i]) - 1})"
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
    _check(weights, ids, offsets, per_sample_weights, tables, batch_size, dim, index_map, pooling, features)
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
    _check_grad(grad, weights, tables)
    batch_size, num_tables, dim = grad.shape
    _check(weights, ids, offsets, per_sample_weights, tables, batch_size, dim, index_map, pooling, features)
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
    _check_grad(grad, weights, tables)
    batch_size, num_tables, dim = grad.shape
    _check(weights, ids, offsets, None, tables, batch_size, dim, index_map, pooling, features)
    batch = unroll(weights, ids, offsets, tables, batch_size, dim, index_map, features)
    bag_grads = grad.transpose(0, 1).reshape(num_tables * batch_size, dim).to(_accumulator(weights.dtype))
    products = _vectors(weights, batch.slots, dim) * bag_grads[batch.bags]
    if pooling == MEAN:
        products = products / batch.counts[batch.bags].clamp(min=1)[:, None]
    sums = ordered_sum(products.reshape(-1, 1), torch.full_like(batch.where, dim))
    return weights.new_zeros(ids.numel()).index_copy_(0, batch.where, sums[:, 0].to(weights.dtype))

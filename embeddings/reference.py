"""The operators in plain torch: what csrc's kernels must equal, bit for bit, and what runs where they are not built.

Sums follow the one order of csrc: runs of RUN contributions, left to right, then the runs. Arguments: `embeddings.ops`.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from embeddings import index_map as maps
from embeddings import rules
from embeddings.index_map import BEGIN, COLUMN, DIM, NUM_COLUMNS, NUM_EMBEDDINGS, POSITION, WIDTH
from embeddings.kinds import Combine, IndexMap, Pooling
from embeddings.rules import accumulator

RUN = 64  # kRun in csrc/index_map.h
MAX_PROBES = 32  # kMaxProbes in csrc/bag.h
SEPARATOR = "\x1f"  # between names, kSeparator in csrc/bag.h
SUM, MEAN, MAX = Pooling
ADD, MULTIPLY, CONCAT, WEIGHTED = Combine
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Layout(NamedTuple):
    """How a call's tables are to be read: integers of the operators' schema, in its order."""

    probes: int  # K
    chunks: int
    index_map: int
    combine: int
    pooling: int


# --- what is refused: as make_call and check_tables in csrc ----------------------------------------------------------


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


def _check(
    weights, ids, offsets, per_sample_weights, tables, batch_size, columns, layout: Layout, features, *, shared=True
) -> None:
    """Everything that can be told without looking at ids. shared: the columns may be those of others, too."""
    _require(weights.dim() == 2 and weights.shape[1] > 0, "weights must be [units, numbers of a unit]")
    _require(1 <= layout.probes <= MAX_PROBES, "probes must be 1 to 32")
    right = tables.dim() == 2 and tables.shape[1] == NUM_COLUMNS and tables.dtype == torch.int64
    _require(right and tables.shape[0] % layout.probes == 0, "tables must be int64 [features * probes, 9]")
    _require(columns >= 0 and layout.chunks >= 1, "columns must be at least 0 and chunks at least 1")
    _require(ids.dim() == 1, "ids must be 1-D")
    _require(ids.dtype in (torch.int32, torch.int64), "ids must be int32 or int64")
    _require(layout.index_map in tuple(IndexMap), "unknown index_map")
    allowed = "combine must be 0 (add), 1 (multiply), 2 (concat) or 3 (weighted)"
    _require(layout.combine in (ADD, MULTIPLY, CONCAT, WEIGHTED), allowed)
    _require(layout.combine != WEIGHTED or layout.probes >= 2, "combine=weighted needs at least 2 probes")
    _require(layout.pooling in (SUM, MEAN, MAX), "pooling must be 0 (sum), 1 (mean) or 2 (max)")
    if offsets is not None:
        right = offsets.dim() == 1 and offsets.dtype == torch.int64 and offsets.numel() > 0
        _require(right, "offsets must be 1-D int64, one more than there are bags")
    num_bags = ids.numel() if offsets is None else offsets.numel() - 1
    whole = batch_size >= 0 and (num_bags % batch_size == 0 if batch_size else num_bags == 0)
    _require(whole, "the number of bags must be a multiple of batch_size")
    if per_sample_weights is not None:
        _require(layout.pooling != MAX, "per_sample_weights: pooling must be sum or mean, not max")
        fits = per_sample_weights.shape == ids.shape and _is_summable(per_sample_weights, weights)
        _require(fits, "per_sample_weights must be [N], of the weights' dtype or that of their sums")
    _require(weights.dtype in DTYPES, "weights must be float32, float64, float16 or bfloat16")
    num_positions = num_bags // batch_size if batch_size else None
    _check_tables(tables, num_positions, columns, weights.shape, layout, features, shared)


def _check_tables(tables, num_positions: int | None, columns: int, slab, layout: Layout, features: str, shared) -> None:
    """num_positions: features of the batch, or None if it has no samples; slab: [units, numbers of a unit]."""
    num_units, unit = slab
    slices, end, column = [], 0, 0  # the slab's slices so far, their end, and that of the output's columns
    for f, probes in enumerate(tables.view(-1, layout.probes, NUM_COLUMNS).tolist()):
        name = _name(features, f)
        position, *_, num_embeddings, _, _ = probes[0]
        if position < 0 or (num_positions is not None and position >= num_positions):
            raise RuntimeError(f"the batch has no bags for feature {name} at position {position}")
        num_ids = 1  # that can differ, under a ranged map
        for k, (place, at, dim, width, begin, num_slots, limit, divisor, _) in enumerate(probes):
            own = place == position and limit == num_embeddings >= 0
            shaped = 0 < width <= dim and dim % width == 0 and dim // width <= layout.chunks
            shaped = shaped and width % unit == 0 and begin % unit == 0 and divisor >= 1
            shaped = shaped and (layout.index_map not in maps.ONE_CHUNK or width == dim)
            inside = shaped and 0 <= begin <= num_units * unit and 1 <= num_slots <= (num_units * unit - begin) // width
            apart = (begin, num_slots, width) in slices or begin >= end
            if not (own and inside and apart):
                raise RuntimeError(
                    f"feature {name}: probe {k} of {dim} numbers in slots of {width}, [{begin}, +{num_slots} slots), "
                    f"does not fit its feature, the slices before or a slab of {num_units} units of {unit}"
                )
            if begin >= end:
                slices.append((begin, num_slots, width))
                end = begin + num_slots * width
            num_ids = min(num_ids * num_slots, 1 << 63)
            if shared and k == 0 and column < at <= columns:
                column = at
            importance = layout.combine == WEIGHTED and k == layout.probes - 1
            alike = (dim, width) == (k, k) if importance else (dim, width) == tuple(probes[0][DIM : WIDTH + 1])
            alone = layout.combine == CONCAT
            if at != column or (dim > columns and not importance) or not (alone or alike):
                raise RuntimeError(f"feature {name}: probe {k} of {dim} numbers at column {at} does not fit the others")
            column += dim if alone else 0
        column += 0 if layout.combine == CONCAT else probes[0][DIM]
        if layout.index_map in maps.RANGED and num_ids < num_embeddings:
            raise RuntimeError(f"feature {name}: its slots tell {num_ids} ids apart, not {num_embeddings}")
    _require(
        column <= columns if shared else column == columns, f"the features' vectors take {column} columns of {columns}"
    )


def _name(features: str, f: int) -> str:
    names = features.split(SEPARATOR)
    return names[f] if f < len(names) else ""


def _check_grad(grad: Tensor, weights: Tensor) -> None:
    right = grad.dim() == 2 and _is_summable(grad, weights)
    _require(right, "grad must be [B, columns], of the weights' dtype or that of their sums and on their device")


def _is_summable(tensor: Tensor, weights: Tensor) -> bool:
    return tensor.dtype in (weights.dtype, accumulator(weights.dtype))


# --- one batch, unrolled -------------------------------------------------------------------------------------------


class Probe(NamedTuple):
    """What M ids read of one probe."""

    units: Tensor  # [M, dim / Z]
    signs: Tensor | None  # [M, dim], or None if no number counts negatively


class Unrolled(NamedTuple):
    """The M ids of features whose vectors have one shape, bag after bag (feature-major), and the weights each reads."""

    order: Tensor  # [M] number among the ids of all the slab's features
    where: Tensor  # [M] position in the batch's ids
    bags: Tensor  # [M] number of the bag among these features' bags
    counts: Tensor  # [bags] ids of each bag
    columns: Tensor  # [features, L] of a row of the output
    probes: list[Probe]  # [K]


def unroll(weights, ids, offsets, tables, batch_size, layout: Layout, features) -> list[Unrolled]:
    """Find every id's weights. Raises RuntimeError for the first bad bag or id (by feature, sample, position)."""
    tables = tables.view(-1, layout.probes, NUM_COLUMNS)  # [F, K, 9]
    bags = (tables[:, 0, POSITION, None] * batch_size + torch.arange(batch_size, device=ids.device)).flatten()
    begins = bags if offsets is None else offsets[bags]
    ends = bags + 1 if offsets is None else offsets[bags + 1]
    bad_bags = ((begins < 0) | (begins > ends) | (ends > ids.numel())).nonzero()[:1, 0]
    last = int(bad_bags) if bad_bags.numel() else bags.numel()  # bags before the first bad one may still hold a bad id

    counts = torch.where(torch.arange(bags.numel(), device=ids.device) < last, ends - begins, 0)
    bag_of = torch.arange(bags.numel(), device=ids.device).repeat_interleave(counts)  # [M]
    where = begins[bag_of] + torch.arange(bag_of.numel(), device=ids.device) - (counts.cumsum(0) - counts)[bag_of]
    feature_of = bag_of // max(batch_size, 1)
    if layout.index_map in maps.RANGED:
        _check_ids(ids[where].long(), tables[feature_of, 0, NUM_EMBEDDINGS], where, feature_of, features)
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
    members: dict[tuple, list[int]] = {}
    for f, shape in enumerate(tables[:, :, DIM : WIDTH + 1].tolist()):
        members.setdefault(tuple(map(tuple, shape)), []).append(f)
    unrolled = []
    for shape, of_shape in members.items():
        chosen = torch.tensor(of_shape, device=ids.device)
        number = torch.full((len(tables),), -1, device=ids.device).index_copy_(
            0, chosen, torch.arange(len(of_shape), device=ids.device)
        )
        order = (number[feature_of] >= 0).nonzero()[:, 0]  # [M]
        length = sum(dim for dim, _ in shape) if layout.combine == CONCAT else shape[0][0]
        unrolled.append(
            Unrolled(
                order,
                where[order],
                number[feature_of[order]] * batch_size + bag_of[order] % max(batch_size, 1),
                counts.view(len(tables), batch_size)[chosen].flatten(),
                tables[chosen, 0, COLUMN, None] + torch.arange(length, device=ids.device),
                [
                    _read(weights, ids[where[order]].long(), tables[feature_of[order], k], dim, width, layout)
                    for k, (dim, width) in enumerate(shape)
                ],
            )
        )
    return unrolled


def _read(weights, ids: Tensor, tables: Tensor, dim: int, width: int, layout: Layout) -> Probe:
    slots, signs = maps.read(layout.index_map, ids, tables, torch.arange(dim // width, device=ids.device))  # [M, C]
    unit = weights.shape[1]
    first = (tables[:, BEGIN, None] + slots * width) // unit  # [M, C]
    units = first[:, :, None] + torch.arange(width // unit, device=ids.device)  # [M, C, width / Z]
    if signs is not None:
        signs = signs.repeat_interleave(width, 1).to(accumulator(weights.dtype))
    return Probe(units.flatten(1), signs)


def _check_ids(ids: Tensor, limits: Tensor, where: Tensor, feature_of: Tensor, features: str) -> None:
    bad = ((ids < 0) | (ids >= limits)).nonzero()
    if bad.numel():
        i = int(bad[0])
        raise RuntimeError(
            f"id out of range: feature {_name(features, int(feature_of[i]))}, position {int(where[i])} of the batch's "
            f"ids, id {int(ids[i])}, limit {int(limits[i])} (valid ids are 0..{int(limits[i]) - 1})"
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


def _vectors(weights: Tensor, batch: Unrolled) -> list[Tensor]:
    """Each probe's vectors, [M, dim]."""
    vectors = []
    for units, signs in batch.probes:
        read = weights[units].flatten(1).to(accumulator(weights.dtype))
        vectors.append(read if signs is None else read * signs)
    return vectors


def _product(factors: list[Tensor]) -> Tensor:
    return math.prod(factors[1:], start=factors[0])  # left to right


def _combined(vectors: list[Tensor], combine: int) -> Tensor:
    """An id's vector [M, L] of its probes'."""
    if combine == CONCAT:
        return torch.cat(vectors, 1)
    if combine == MULTIPLY:
        return _product(vectors)
    if combine == WEIGHTED:
        *vectors, importance = vectors
        vectors = [vector * importance[:, k, None] for k, vector in enumerate(vectors)]
    return sum(vectors[1:], start=vectors[0])


def _argmax(vectors: Tensor, bags: Tensor, num_bags: int) -> Tensor:
    """Which of the M vectors holds each bag's maximum, [num_bags, L]; M in an empty bag. First of equals; NaN wins."""
    num_ids, length = vectors.shape
    index = bags[:, None].expand(-1, length)
    best = vectors.new_full((num_bags, length), -torch.inf).scatter_reduce(0, index, vectors, "amax")
    winning = (vectors == best[bags]) | vectors.isnan()
    place = torch.where(winning, torch.arange(num_ids, device=bags.device)[:, None], num_ids)
    return torch.full_like(best, num_ids, dtype=torch.int64).scatter_reduce(0, index, place, "amin")


def bag(weights, ids, offsets, per_sample_weights, tables, batch_size, columns, *layout_accumulate_features):
    """Pooled vectors [B, columns]; an empty bag is zero."""
    *layout, _, features = layout_accumulate_features
    layout = Layout(*layout)
    weights = weights.unsqueeze(1) if weights.dim() == 1 else weights
    _check(weights, ids, offsets, per_sample_weights, tables, batch_size, columns, layout, features, shared=False)
    out = weights.new_empty(batch_size, columns, dtype=accumulator(weights.dtype))
    _write_bags(out, weights, ids, offsets, per_sample_weights, tables, layout, features)
    return out.to(weights.dtype)


def bag_into(out, weights, ids, offsets, per_sample_weights, tables, *layout_features) -> None:
    """Writes the pooled vectors to their columns of out [B, columns]."""
    *layout, features = layout_features
    layout = Layout(*layout)
    weights = weights.unsqueeze(1) if weights.dim() == 1 else weights
    right = out.dim() == 2 and out.is_contiguous() and out.dtype == accumulator(weights.dtype)
    _require(right, "out must be contiguous [B, columns], of the dtype of the weights' sums and on their device")
    _check(weights, ids, offsets, per_sample_weights, tables, *out.shape, layout, features)
    _write_bags(out, weights, ids, offsets, per_sample_weights, tables, layout, features)


def _write_bags(out, weights, ids, offsets, per_sample_weights, tables, layout: Layout, features) -> None:
    batch_size = len(out)
    for batch in unroll(weights, ids, offsets, tables, batch_size, layout, features):
        vectors = _combined(_vectors(weights, batch), layout.combine)
        if layout.pooling == MAX:
            padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
            pooled = padded.gather(0, _argmax(vectors, batch.bags, batch.counts.numel()))
        else:
            if per_sample_weights is not None:
                vectors = vectors * per_sample_weights[batch.where].to(vectors.dtype)[:, None]
            pooled = ordered_sum(vectors, batch.counts)
            if layout.pooling == MEAN:
                pooled = pooled / batch.counts.clamp(min=1)[:, None]
        pooled = pooled.view(len(batch.columns), batch_size, vectors.shape[1])  # [F, B, L]
        out[:, batch.columns] = pooled.transpose(0, 1)


def _base_grads(grad, weights, per_sample_weights, batch: Unrolled, vectors, layout: Layout) -> Tensor:
    """The gradient of every id's vector, [M, L]."""
    bag_grads = grad[:, batch.columns].transpose(0, 1).flatten(0, 1).to(accumulator(weights.dtype))  # [F * B, L]
    grads = bag_grads[batch.bags]
    if layout.pooling == MAX:
        winner = _argmax(_combined(vectors, layout.combine), batch.bags, batch.counts.numel())
        mine = torch.arange(grads.shape[0], device=grads.device)[:, None] == winner[batch.bags]
        grads = torch.where(mine, grads, 0)
    if per_sample_weights is not None:
        grads = grads * per_sample_weights[batch.where].to(grads.dtype)[:, None]
    if layout.pooling == MEAN:
        grads = grads / batch.counts[batch.bags].clamp(min=1)[:, None]
    return grads


def _probe_grads(grads: Tensor, vectors: list[Tensor], combine: int) -> list[Tensor]:
    """The gradients [M, dim] of each probe's vectors, from that [M, L] of their combination."""
    if combine == CONCAT:
        return list(grads.split([vector.shape[1] for vector in vectors], 1))
    if combine == MULTIPLY and len(vectors) > 1:
        return [grads * _product(vectors[:k] + vectors[k + 1 :]) for k in range(len(vectors))]
    if combine == WEIGHTED:
        *vectors, importance = vectors
        dots = [_row_sums(grads * vector) for vector in vectors]
        return [grads * importance[:, k, None] for k in range(len(vectors))] + [torch.stack(dots, 1)]
    return [grads] * len(vectors)


def _row_sums(values: Tensor) -> Tensor:
    """[M] ordered sums of [M, L]."""
    num_rows, length = values.shape
    return ordered_sum(values.reshape(-1, 1), torch.full((num_rows,), length, device=values.device))[:, 0]


def _touched(grad, weights, ids, offsets, per_sample_weights, tables, layout: Layout, features):
    """The touched units in ascending order [U] and their gradients [U, Z] in the accumulator's type."""
    _check_grad(grad, weights)
    batch_size, columns = grad.shape
    _check(weights, ids, offsets, per_sample_weights, tables, batch_size, columns, layout, features)
    all_units, all_grads, order = [], [], []
    for batch in unroll(weights, ids, offsets, tables, batch_size, layout, features):
        vectors = _vectors(weights, batch)
        grads = _base_grads(grad, weights, per_sample_weights, batch, vectors, layout)
        grads = _probe_grads(grads, vectors, layout.combine)
        signed = [g if probe.signs is None else g * probe.signs for g, probe in zip(grads, batch.probes, strict=True)]
        units = torch.cat([probe.units for probe in batch.probes], 1)  # [M, units of an id]
        all_units.append(units.flatten())
        all_grads.append(torch.cat(signed, 1).reshape(-1, weights.shape[1]))
        order.append(batch.order.repeat_interleave(units.shape[1]))
    if not order:
        return ids.new_empty(0).long(), weights.new_empty(0, weights.shape[1])
    units, grads = torch.cat(all_units), torch.cat(all_grads)
    if len(order) > 1:  # of several shapes: in the order of the slab's features
        by_feature = torch.cat(order).argsort(stable=True)
        units, grads = units[by_feature], grads[by_feature]
    units, by_unit = units.sort(stable=True)  # equal units keep batch order, so sums repeat
    touched, counts = units.unique_consecutive(return_counts=True)
    return touched, ordered_sum(grads[by_unit], counts)


def bag_backward(grad, weights, ids, offsets, per_sample_weights, tables, *layout_atomic_features):
    """Gradient of the whole slab [S, Z]."""
    *layout, _, features = layout_atomic_features
    units, values = _touched(grad, weights, ids, offsets, per_sample_weights, tables, Layout(*layout), features)
    return torch.zeros_like(weights, memory_format=torch.contiguous_format).index_copy_(
        0, units, values.to(weights.dtype)
    )


def bag_backward_rows(grad, weights, ids, offsets, per_sample_weights, tables, *layout_features):
    """The touched units [U], ascending, and their gradients [U, Z]."""
    *layout, features = layout_features
    units, values = _touched(grad, weights, ids, offsets, per_sample_weights, tables, Layout(*layout), features)
    return units, values.to(weights.dtype)


def bag_update(grad, weights, first, second, ids, offsets, per_sample_weights, tables, *layout_step_features) -> None:
    """One step of the optimizer on the touched units."""
    *layout, rule, numbers, features = layout_step_features
    rules.check_state(rule, weights, first, second, numbers)
    units, values = _touched(grad, weights, ids, offsets, per_sample_weights, tables, Layout(*layout), features)
    rules.step_rows(rules.Step.of(rule, numbers), weights, units, values, first, second)


def _check_positions(tables: Tensor, layout: Layout, features: str) -> None:
    """Features with one position would write the gradients of the same sample weights."""
    names, places = features.split(SEPARATOR), tables[:: layout.probes, POSITION].tolist()
    for place, first, second in sorted((b, i, j) for j, b in enumerate(places) for i in range(j) if places[i] == b)[:1]:
        raise RuntimeError(
            f"features {names[first]} and {names[second]} have one position in the batch, {place}: per_sample_weights "
            "have no gradient there"
        )


def bag_backward_sample_weights(grad, weights, ids, offsets, tables, *layout_features):
    """Gradient of the per-sample weights [N]; zero for ids of other slabs."""
    *layout, features = layout_features
    layout = Layout(*layout)
    _check_grad(grad, weights)
    batch_size, columns = grad.shape
    _check(weights, ids, offsets, None, tables, batch_size, columns, layout, features)
    _check_positions(tables, layout, features)
    out = weights.new_zeros(ids.numel(), dtype=accumulator(weights.dtype))
    for batch in unroll(weights, ids, offsets, tables, batch_size, layout, features):
        vectors = _combined(_vectors(weights, batch), layout.combine)
        bag_grads = grad[:, batch.columns].transpose(0, 1).flatten(0, 1).to(vectors.dtype)  # [F * B, L]
        products = vectors * bag_grads[batch.bags]
        if layout.pooling == MEAN:
            products = products / batch.counts[batch.bags].clamp(min=1)[:, None]
        out.index_copy_(0, batch.where, _row_sums(products))
    return out.to(grad.dtype)

"""The lookups of several slabs as one step of autograd: into one output, and back into each slab or its optimizer."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embeddings import native
from embeddings.ops import sample_weights_gradient, weights_gradient
from embeddings.rules import accumulator


class Launch(NamedTuple):
    """How a slab is read, and what its gradient becomes; tensors apart."""

    layout: Sequence[int]  # probes, chunks, index_map, combine, pooling
    accumulate: int
    features: str
    update: Callable | None = None  # update(grad, batch, layout, features) instead of a gradient


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, launches, batch_size, columns, ids, offsets, per_sample_weights, *slabs):
        ctx.launches = launches
        ctx.save_for_backward(ids, offsets, per_sample_weights, *slabs)
        return _look_up(launches, batch_size, columns, ids, offsets, per_sample_weights, *slabs)

    @staticmethod
    def backward(ctx, grad):
        ids, offsets, per_sample_weights, *slabs = ctx.saved_tensors
        num_slabs = len(ctx.launches)
        gradients, of_sample_weights = [], None
        for i, launch in enumerate(ctx.launches):
            weight, batch = slabs[i], (ids, offsets, per_sample_weights, slabs[num_slabs + i])
            if ctx.needs_input_grad[5]:  # before an update moves the weights
                part = sample_weights_gradient(grad, weight, batch, launch.layout, launch.features)
                of_sample_weights = part if of_sample_weights is None else of_sample_weights + part
            gradient = None
            if ctx.needs_input_grad[6 + i]:
                if launch.update is not None:
                    launch.update(grad, batch, launch.layout, launch.features)
                else:
                    gradient = weights_gradient(grad, weight, batch, launch.layout, launch.accumulate, launch.features)
            gradients.append(gradient)
        return (None, None, None, None, None, of_sample_weights, *gradients, *(None,) * num_slabs)


def pooled(
    launches: list[Launch],
    weights: list[Tensor],
    tables: list[Tensor],
    ids: Tensor,
    offsets: Tensor | None,
    per_sample_weights: Tensor | None,
    *,
    batch_size: int,
    columns: int,
) -> Tensor:
    """Pooled vectors [B, columns] of slabs whose tables say which columns are theirs, in the dtype of their sums.

    Arguments as `embeddings.ops`. Where a launch has an update, the backward pass calls it and the weights get no
    gradient."""
    native.ensure()
    # without gradients a step of autograd would only cost its bookkeeping, which small batches feel
    run = _Pooled.apply if torch.is_grad_enabled() else _look_up
    return run(tuple(launches), batch_size, columns, ids, offsets, per_sample_weights, *weights, *tables)


def _look_up(launches, batch_size: int, columns: int, ids, offsets, per_sample_weights, *slabs) -> Tensor:
    """slabs: the launches' weights, then their tables."""
    out = slabs[0].new_empty(batch_size, columns, dtype=accumulator(slabs[0].dtype))
    for i, launch in enumerate(launches):
        batch = (ids, offsets, per_sample_weights, slabs[len(launches) + i])
        torch.ops.embeddings.bag_into(out, slabs[i], *batch, *launch.layout, launch.features)
    return out

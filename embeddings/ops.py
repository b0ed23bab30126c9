"""The operators' schemas, shapes and gradients. The reference is their composite kernel; csrc's replace it when loaded.

    torch.ops.embeddings.bag                          forward
    torch.ops.embeddings.bag_into                     the same, into some columns of an output that slabs share
    torch.ops.embeddings.bag_backward                 gradient of the whole slab
    torch.ops.embeddings.bag_backward_rows            gradient of the touched slots only
    torch.ops.embeddings.bag_backward_sample_weights  gradient of the per-sample weights
    torch.ops.embeddings.bag_update                   the optimizer's step on the touched slots: no gradient is kept
    torch.ops.embeddings.raise_noted                  wait for the device, raise what its kernels noted

Arguments, in this order everywhere (Python, C++, CUDA):
    weights [S, Z]     the slab: S * Z numbers, in units of Z; of which every width is a multiple; bag, bag_into: or [S]
    ids [N]            int32 or int64, feature-major, of the whole batch
    offsets            int64 [features * B + 1], or None when every bag has one id
    per_sample_weights [N], or None (sum: w * v; mean: w * v / count, as in FBGEMM; not with max)
    tables [F * K, 9]  int64, one row per feature of the slab and probe; columns in `embeddings.index_map`
    columns            numbers of a row of the output: the features' vectors side by side, at their tables' columns;
                       of bag_into's out and of a gradient there may be others, of other slabs
    probes, chunks     K, and the most chunks that any table has
    index_map, combine, pooling, accumulate: `embeddings.kinds`;  features: the names, for errors,
    with reference.SEPARATOR between them
    first, second      the optimizer's state; rule, and numbers [7] float64 on the weights' device: a `rules.Step`
Sums are float32, or float64 of float64 weights. Gradients and per_sample_weights have the dtype of the weights or that
of sums; bag's result and the weights' gradients have the weights', bag_into's out that of sums.
Errors: RuntimeError naming feature, position, id and limit when a ranged map meets an id outside [0, num_embeddings).
On CUDA kernels skip such an id and note it: the next call on the same features raises, or raise_noted at once.
RuntimeError also for real weights with tables or a batch on the meta device.
"""

import warnings

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake

from embeddings import reference
from embeddings.kinds import Accumulate as Accumulate
from embeddings.kinds import Combine as Combine
from embeddings.kinds import IndexMap as IndexMap
from embeddings.kinds import Pooling as Pooling

_BATCH = "Tensor ids, Tensor? offsets"
_WEIGHTS = "Tensor? per_sample_weights"
_HOW = "int probes, int chunks, int index_map, int combine, int pooling"

define(
    "embeddings::bag",
    f"(Tensor weights, {_BATCH}, {_WEIGHTS}, Tensor tables, SymInt batch_size, int columns, {_HOW}, int accumulate, "
    "str features) -> Tensor",
)
define(
    "embeddings::bag_into",
    f"(Tensor(a!) out, Tensor weights, {_BATCH}, {_WEIGHTS}, Tensor tables, {_HOW}, str features) -> ()",
)
define(
    "embeddings::bag_backward",
    f"(Tensor grad, Tensor weights, {_BATCH}, {_WEIGHTS}, Tensor tables, {_HOW}, bool atomic, str features) -> Tensor",
)
define(
    "embeddings::bag_backward_rows",
    f"(Tensor grad, Tensor weights, {_BATCH}, {_WEIGHTS}, Tensor tables, {_HOW}, str features) -> (Tensor, Tensor)",
)
define(
    "embeddings::bag_backward_sample_weights",
    f"(Tensor grad, Tensor weights, {_BATCH}, Tensor tables, {_HOW}, str features) -> Tensor",
)
define(
    "embeddings::bag_update",
    "(Tensor grad, Tensor(a!) weights, Tensor(b!)? first, Tensor(c!)? second, "
    f"{_BATCH}, {_WEIGHTS}, Tensor tables, {_HOW}, int rule, Tensor numbers, str features) -> ()",
)
define("embeddings::raise_noted", "(Tensor weights, str features) -> ()")

impl("embeddings::bag", "CompositeExplicitAutograd", reference.bag)
impl("embeddings::bag_into", "CompositeExplicitAutograd", reference.bag_into)
impl("embeddings::bag_backward", "CompositeExplicitAutograd", reference.bag_backward)
impl("embeddings::bag_backward_rows", "CompositeExplicitAutograd", reference.bag_backward_rows)
impl("embeddings::bag_backward_sample_weights", "CompositeExplicitAutograd", reference.bag_backward_sample_weights)
impl("embeddings::bag_update", "CompositeExplicitAutograd", reference.bag_update)
impl("embeddings::raise_noted", "CompositeExplicitAutograd", lambda weights, features: None)  # the CPU raises at once


def _refuse_half_meta(real: Tensor, *others) -> None:
    """Raise RuntimeError where a real tensor goes with one on the meta device, which brings the call to the functions
    below: nothing would be computed, and the result would be what its memory holds."""
    if real.device.type != "meta" and any(isinstance(x, Tensor) and x.device.type == "meta" for x in others):
        raise RuntimeError(
            f"some of weights, tables and batch are on meta and others on {real.device}: load_state_dict with "
            "assign=True, or to_empty and reset_parameters, make a module on meta whole"
        )


@register_fake("embeddings::bag")
def _(weights, ids, offsets, per_sample_weights, tables, batch_size, columns, *how):
    _refuse_half_meta(weights, ids, offsets, per_sample_weights, tables)
    return weights.new_empty(batch_size, columns)


@register_fake("embeddings::bag_into")
def _(out, *slab_batch_and_how):
    _refuse_half_meta(out, *slab_batch_and_how)
    return None


@register_fake("embeddings::bag_update")
def _(grad, weights, *state_batch_and_how):
    _refuse_half_meta(weights, grad, *state_batch_and_how)
    return None


@register_fake("embeddings::bag_backward")
def _(grad, weights, *batch_and_how):
    _refuse_half_meta(weights, grad, *batch_and_how)
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


@register_fake("embeddings::bag_backward_rows")
def _(grad, weights, ids, *batch_and_how):
    _refuse_half_meta(weights, grad, ids, *batch_and_how)
    num_touched = torch.library.get_ctx().new_dynamic_size()
    return ids.new_empty(num_touched, dtype=torch.int64), weights.new_empty(num_touched, weights.shape[1])


@register_fake("embeddings::bag_backward_sample_weights")
def _(grad, weights, ids, *batch_and_how):
    _refuse_half_meta(grad, weights, ids, *batch_and_how)
    return grad.new_empty(ids.shape[0])


def _keep(ctx, inputs, output) -> None:
    weights, ids, offsets, per_sample_weights, tables, _, _, *ctx.how, ctx.accumulate, ctx.features = inputs
    ctx.save_for_backward(weights, ids, offsets, per_sample_weights, tables)


def _in_units(weights: Tensor) -> Tensor:
    return weights.unsqueeze(1) if weights.dim() == 1 else weights


def weights_gradient(grad: Tensor, weights: Tensor, batch: tuple, layout, accumulate: int, features: str) -> Tensor:
    """The gradient of a slab [S, Z] or [S], sparse under accumulate=rows. batch: ids, offsets, per_sample_weights,
    tables."""
    shape = weights.shape
    slab = (grad, _in_units(weights), *batch, *layout)
    if accumulate == Accumulate.ROWS:
        units, values = torch.ops.embeddings.bag_backward_rows(*slab, features)
        values = values.view(-1, *shape[1:])
        return torch.sparse_coo_tensor(units[None], values, shape, is_coalesced=True, check_invariants=False)
    atomic = accumulate == Accumulate.ATOMIC
    if atomic and weights.is_cuda and torch.are_deterministic_algorithms_enabled():  # the CPU sums in order
        why = (
            "accumulate=atomic does not repeat on CUDA, and deterministic algorithms are asked for: use sorted or rows "
            "(FastEmbedding and FastMultiEmbedding: sparse=True)"
        )
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(why)
        warnings.warn(why, stacklevel=2)
    return torch.ops.embeddings.bag_backward(*slab, atomic, features).view(shape)


def sample_weights_gradient(grad: Tensor, weights: Tensor, batch: tuple, layout, features: str) -> Tensor:
    """The gradient [N] of per_sample_weights; arguments as above."""
    ids, offsets, _, tables = batch
    slab = (grad, _in_units(weights), ids, offsets, tables)
    return torch.ops.embeddings.bag_backward_sample_weights(*slab, *layout, features)


def _backward(ctx, grad: Tensor):
    weights, *batch = ctx.saved_tensors
    weights_grad = sample_weights_grad = None
    if ctx.needs_input_grad[0]:
        weights_grad = weights_gradient(grad, weights, batch, ctx.how, ctx.accumulate, ctx.features)
    if ctx.needs_input_grad[3]:
        sample_weights_grad = sample_weights_gradient(grad, weights, batch, ctx.how, ctx.features)
    return (weights_grad, None, None, sample_weights_grad, *(None,) * 10)


register_autograd("embeddings::bag", _backward, setup_context=_keep)


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("embeddings have no second derivative: their gradients cannot be differentiated")


for _name in ("bag_backward", "bag_backward_rows", "bag_backward_sample_weights"):
    register_autograd(f"embeddings::{_name}", _no_second_derivative)

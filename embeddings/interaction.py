"""DLRM's dot interaction as one operator: its schema, shapes and gradients, and the reference in plain torch.

    torch.ops.embeddings.dot_interaction           dense [B, D], embedded [B, F, D], multiple -> [B, D + V (V-1) / 2]
    torch.ops.embeddings.dot_interaction_backward  grad, dense, embedded, multiple -> their gradients

A row is the dense vector, then the products of the V = F + 1 vectors' pairs (i, j), j < i, row by row; the dense vector
is vector 0. Zeros follow up to a multiple of so many columns. A row has dense's dtype. The two are of one dtype, or one
is float32 and the other float16 or bfloat16; sums are float32, or float64 of float64. Neither the V vectors side by
side nor their V * V products are put into memory.
Errors: RuntimeError with the shapes that do not fit. Naumov et al. 2019 (arXiv 1906.00091), section 2.1.3 and figure 1.
"""

import torch
from torch import Tensor
from torch.library import define, impl, register_autograd, register_fake
from torch.nn.functional import pad

from embeddings import native

MAX_MULTIPLE = 1024  # kMaxMultiple of csrc/interaction.h


def dot_interaction(dense: Tensor, embedded: Tensor, multiple: int = 1) -> Tensor:
    """The operator, with the compiled kernels where they can be had.

    Under autocast a float32 `dense` is taken, and the row given, in autocast's dtype: as the next layer wants it.
    `embedded` is read as it is, without a copy in another dtype.
    """
    native.ensure()
    device = dense.device.type
    if dense.dtype == torch.float32 and torch.is_autocast_enabled(device):
        dense = dense.to(torch.get_autocast_dtype(device))
    return torch.ops.embeddings.dot_interaction(dense, embedded, multiple)


define("embeddings::dot_interaction", "(Tensor dense, Tensor embedded, int multiple=1) -> Tensor")
define(
    "embeddings::dot_interaction_backward",
    "(Tensor grad, Tensor dense, Tensor embedded, int multiple=1) -> (Tensor, Tensor)",
)


# --- reference -------------------------------------------------------------------------------------------------------


def reference(dense: Tensor, embedded: Tensor, multiple: int = 1) -> Tensor:
    vectors, pairs = _vectors(dense, embedded, multiple), _pairs(embedded)
    with torch.autocast(dense.device.type, enabled=False):  # it would round the vectors
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)  # [B, V * V]
    # one flat index and index_select: on the CPU twice as fast as products[:, row, column]
    rows = torch.cat([dense, products.index_select(1, pairs).to(dense.dtype)], dim=1)
    return pad(rows, (0, -rows.shape[1] % multiple)) if rows.shape[1] % multiple else rows


def reference_backward(grad: Tensor, dense: Tensor, embedded: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor]:
    vectors, pairs = _vectors(dense, embedded, multiple), _pairs(embedded)
    (batch_size, num_vectors, dim), end = vectors.shape, dense.shape[1] + len(pairs)
    columns = end + -end % multiple
    if grad.shape != (batch_size, columns) or grad.dtype != dense.dtype:
        raise RuntimeError(
            f"dot_interaction: grad must be [{batch_size}, {columns}], of dense's dtype and device, "
            f"not {list(grad.shape)}"
        )
    of_products = vectors.new_zeros(batch_size, num_vectors * num_vectors)
    of_products = of_products.index_copy(1, pairs, grad[:, dim:end].to(vectors.dtype)).unflatten(1, (num_vectors, -1))
    with torch.autocast(dense.device.type, enabled=False):
        of_vectors = torch.bmm(of_products + of_products.transpose(1, 2), vectors)  # [B, V, D]
    of_dense = (of_vectors[:, 0] + grad[:, :dim]).to(dense.dtype)
    return of_dense, of_vectors[:, 1:].to(embedded.dtype).contiguous()


def _vectors(dense: Tensor, embedded: Tensor, multiple: int) -> Tensor:
    """The V vectors of each sample in the type of the sums, the dense one first: [B, V, D]."""
    _check(dense, embedded, multiple)
    dtype = torch.promote_types(dense.dtype, torch.float32)
    return torch.cat([dense.to(dtype).unsqueeze(1), embedded.to(dtype)], dim=1)


def _pairs(embedded: Tensor) -> Tensor:
    """Where the strict lower triangle's pairs are in the flattened [V, V]."""
    num_vectors = embedded.shape[1] + 1
    row, column = torch.tril_indices(num_vectors, num_vectors, offset=-1, device=embedded.device)
    return row * num_vectors + column


def _check(dense: Tensor, embedded: Tensor, multiple: int) -> None:
    """csrc/interaction.h checks the same in the same words."""
    if dense.dim() != 2 or embedded.dim() != 3 or (dense.shape[0], dense.shape[1]) != embedded.shape[::2]:
        raise RuntimeError(
            "dot_interaction: dense must be [B, D] and embedded [B, F, D], "
            f"not {list(dense.shape)} and {list(embedded.shape)}"
        )
    if not 1 <= multiple <= MAX_MULTIPLE:
        raise RuntimeError(f"dot_interaction: multiple must be from 1 to {MAX_MULTIPLE}, not {multiple}")
    dtypes = {dense.dtype, embedded.dtype}
    if not dtypes <= {torch.float32, torch.float64, torch.float16, torch.bfloat16}:
        raise RuntimeError("dot_interaction: dense and embedded must be float32, float64, float16 or bfloat16")
    if len(dtypes) == 2 and (torch.float32 not in dtypes or torch.float64 in dtypes):
        raise RuntimeError(
            "dot_interaction: dense and embedded must be of one dtype, or one float32 and the other float16 or bfloat16"
        )


impl("embeddings::dot_interaction", "CompositeExplicitAutograd", reference)
impl("embeddings::dot_interaction_backward", "CompositeExplicitAutograd", reference_backward)


# --- shapes and gradients --------------------------------------------------------------------------------------------


@register_fake("embeddings::dot_interaction")
def _(dense, embedded, multiple=1):
    num_vectors = embedded.shape[1] + 1
    end = dense.shape[1] + num_vectors * (num_vectors - 1) // 2
    return dense.new_empty(dense.shape[0], (end + multiple - 1) // multiple * multiple)


@register_fake("embeddings::dot_interaction_backward")
def _(grad, dense, embedded, multiple=1):
    return dense.new_empty(dense.shape), embedded.new_empty(embedded.shape)


def _keep(ctx, inputs, output) -> None:
    dense, embedded, ctx.multiple = inputs
    ctx.save_for_backward(dense, embedded)


def _backward(ctx, grad: Tensor):
    return *torch.ops.embeddings.dot_interaction_backward(grad, *ctx.saved_tensors, ctx.multiple), None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("dot_interaction has no second derivative: its gradients cannot be differentiated")


register_autograd("embeddings::dot_interaction", _backward, setup_context=_keep)
register_autograd("embeddings::dot_interaction_backward", _no_second_derivative)

"""ReLU's gradient as a linear layer needs it: the operator's schema, shapes and reference.

    torch.ops.embeddings.relu_backward    grad, out [B, O] -> the gradient [B, O], its transpose [O, B], its sum [O]

out is what the ReLU gave; all are float32, and the results contiguous. The gradient has the bits of torch's
threshold_backward: grad, and 0 where out <= 0. Errors: RuntimeError for other shapes and types.
"""

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from embeddings import native


def relu_backward(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The operator, with the compiled kernels where they can be had."""
    native.ensure()
    return torch.ops.embeddings.relu_backward(grad, out)


define("embeddings::relu_backward", "(Tensor grad, Tensor out) -> (Tensor, Tensor, Tensor)")


def reference(grad: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if grad.dim() != 2 or grad.shape != out.shape or {grad.dtype, out.dtype} != {torch.float32}:
        raise RuntimeError(
            "relu_backward: grad and out must be of one shape [B, O], both float32, "
            f"not {list(grad.shape)} {grad.dtype} and {list(out.shape)} {out.dtype}"
        )
    masked = torch.ops.aten.threshold_backward(grad, out, 0).contiguous()
    return masked, masked.t().clone(memory_format=torch.contiguous_format), masked.sum(0)


impl("embeddings::relu_backward", "CompositeExplicitAutograd", reference)


@register_fake("embeddings::relu_backward")
def _(grad, out):
    return grad.new_empty(grad.shape), grad.new_empty(grad.shape[::-1]), grad.new_empty(grad.shape[1])

"""Optimizers of embedding slabs: they touch only the slots that the gradient names; only state has the slab's size.

A slot is a row of the parameter [S, Z]: a row of a dense table, a block of a hashed one; a piece of either where the
slab's widths differ. Each optimizer takes dense gradients and sparse ones (rows of [S, Z]); for a slot whose gradient
is zero the two agree, except under Adam, lazy on sparse gradients: the moments of an untouched slot do not decay (as in
torch.optim.SparseAdam).
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer


class _Rows(Optimizer):
    """The loop that every optimizer here shares. A subclass says what one step does to the rows it is given."""

    def __init__(self, params: Iterable[Tensor], **options: float) -> None:
        for name, value in options.items():
            if not value >= 0 or (name == "eps" and value == 0):
                raise ValueError(f"{name}={value} must {'be above 0' if name == 'eps' else 'not be negative'}")
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient. closure is not supported."""
        if closure is not None:
            raise ValueError("embedding optimizers take no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(self.initial_state(param))
                if param.grad.is_sparse:
                    slots, values = _touched_rows(param.grad)
                    self.update_rows(param, slots, values, state, group)
                else:
                    self.update_rows(param, None, param.grad, state, group)

    def initial_state(self, param: Tensor) -> dict[str, Tensor | int]:
        return {}

    def update_rows(self, param: Tensor, slots: Tensor | None, grads: Tensor, state: dict, group: dict) -> None:
        """One step on param[slots] (all of it if None), given their gradients [U, Z]."""
        raise NotImplementedError


def _touched_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Unique slots [U] and gradients [U, Z] of a sparse gradient; summed if the slab was used more than once."""
    slots = grad._indices()[0]
    # autograd drops the coalesced flag, so look instead of sorting again: one use of a slab gives ascending slots
    if not grad.is_coalesced() and not bool((slots[1:] > slots[:-1]).all()):
        grad = grad.coalesce()
        slots = grad._indices()[0]
    return slots, grad._values()


def _read(tensor: Tensor, slots: Tensor | None) -> Tensor:
    return tensor if slots is None else tensor.index_select(0, slots)


def _write(tensor: Tensor, slots: Tensor | None, values: Tensor) -> None:
    if slots is None:
        tensor.copy_(values)
    else:
        tensor.index_copy_(0, slots, values)


def _subtract(param: Tensor, slots: Tensor | None, update: Tensor) -> None:
    if slots is None:
        param.sub_(update)
    else:
        param.index_add_(0, slots, update, alpha=-1)


class SGD(_Rows):
    """w -= lr * g."""

    def __init__(self, params: Iterable[Tensor], *, lr: float) -> None:
        super().__init__(params, lr=lr)

    def update_rows(self, param, slots, grads, state, group) -> None:
        _subtract(param, slots, grads * group["lr"])


class Adagrad(_Rows):
    """s += g^2; w -= lr * g / (sqrt(s) + eps). One s per weight. Duchi et al., JMLR 2011."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, eps: float) -> None:
        super().__init__(params, lr=lr, eps=eps)

    def initial_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"sum": torch.zeros_like(param)}

    def update_rows(self, param, slots, grads, state, group) -> None:
        total = _read(state["sum"], slots) + grads * grads
        _write(state["sum"], slots, total)
        _subtract(param, slots, group["lr"] * grads / (total.sqrt() + group["eps"]))


class RowWiseAdagrad(_Rows):
    """s += mean(g^2) over the slot; w -= lr * g / (sqrt(s) + eps). One s per slot of Z weights.

    As in Mudigere et al., ISCA 2022 (section on memory).
    """

    def __init__(self, params: Iterable[Tensor], *, lr: float, eps: float) -> None:
        super().__init__(params, lr=lr, eps=eps)

    def initial_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"sum": param.new_zeros(param.shape[0])}

    def update_rows(self, param, slots, grads, state, group) -> None:
        total = _read(state["sum"], slots) + (grads * grads).mean(1)
        _write(state["sum"], slots, total)
        _subtract(param, slots, grads * (group["lr"] / (total.sqrt() + group["eps"]))[:, None])


class Adam(_Rows):
    """Kingma and Ba, ICLR 2015; lazy on sparse gradients (see the module). Two moments per weight."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, beta1: float, beta2: float, eps: float) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{name}={beta} must be in [0, 1)")
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps)

    def initial_state(self, param: Tensor) -> dict[str, Tensor | int]:
        return {"step": 0, "mean": torch.zeros_like(param), "square": torch.zeros_like(param)}

    def update_rows(self, param, slots, grads, state, group) -> None:
        beta1, beta2 = group["beta1"], group["beta2"]
        state["step"] += 1
        step = int(state["step"])  # a tensor in checkpoints of earlier versions
        mean = _read(state["mean"], slots).lerp(grads, 1 - beta1)
        square = _read(state["square"], slots).lerp(grads * grads, 1 - beta2)
        _write(state["mean"], slots, mean)
        _write(state["square"], slots, square)
        denominator = (square / (1 - beta2**step)).sqrt() + group["eps"]
        _subtract(param, slots, group["lr"] / (1 - beta1**step) * mean / denominator)

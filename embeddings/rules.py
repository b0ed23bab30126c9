"""What one step of an embedding optimizer does to the rows that it is given: csrc/update.h has the same in C++.

Operation by operation in one order, so that fused and unfused steps give the same bits (float64 but for its square
roots, which torch does not round correctly). A row is a unit of the slab
[S, Z]: a row of a dense table, a block of a hashed one, a piece of either where the slab's widths differ. Sums are kept
in float32, or in float64 for float64 weights; weights of 16 bits are rounded at random (`_rounded`).
"""

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from embeddings.index_map import splitmix64


class Rule(IntEnum):
    """How a gradient g moves a weight w, whose state is s. csrc/update.h."""

    SGD = 0  # w -= lr * g
    ADAGRAD = 1  # s += g^2; w -= lr * g / (sqrt(s) + eps); an s per weight. Duchi et al., JMLR 2011
    ROW_WISE_ADAGRAD = 2  # s += mean(g^2) of the row; else the same; an s per row. Mudigere et al., ISCA 2022
    ADAM = 3  # two moments per weight; those of an untouched row stay. Kingma and Ba, ICLR 2015


class Step(NamedTuple):
    """A rule's hyperparameters at one step."""

    rule: Rule
    lr: float  # Adam: over 1 - beta1^t at its step t
    weight_decay: float  # times w is added to g, of touched rows
    eps: float
    beta1: float
    beta2: float
    correction: float  # Adam: 1 - beta2^t
    draw: int  # of the random rounding of 16-bit weights: another number at every step

    @classmethod
    def of(cls, rule: int, numbers: Tensor) -> "Step":
        """The inverse of `numbers`. Raises RuntimeError for a draw that is none."""
        *others, draw = numbers.tolist()
        if not 0 <= draw < 2**53:
            raise RuntimeError("the step's draw must be a whole number below 2^53")
        return cls(Rule(rule), *others, int(draw))

    def numbers(self) -> list[float]:
        """All but the rule, as the operator takes them in a tensor [7] float64."""
        return [*self[1:-1], float(self.draw)]


def state_shapes(rule: Rule, weights: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the states that a rule keeps for weights [S, Z]."""
    num_states = {Rule.SGD: 0, Rule.ADAM: 2}.get(rule, 1)
    return [weights.shape[:1] if rule == Rule.ROW_WISE_ADAGRAD else weights.shape] * num_states


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states, for weights of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


NUM_NUMBERS = len(Step._fields) - 1


def check_state(rule: int, weights: Tensor, first: Tensor | None, second: Tensor | None, numbers: Tensor) -> None:
    """Raises RuntimeError unless the states fit the rule and the weights."""
    if rule not in list(Rule):
        raise RuntimeError("rule must be 0 (sgd), 1 (adagrad), 2 (row-wise adagrad) or 3 (adam)")
    kind = numbers.numel(), numbers.dtype, numbers.device
    if kind != (NUM_NUMBERS, torch.float64, weights.device) or not numbers.is_contiguous():
        raise RuntimeError("the step's numbers must be 7 contiguous float64 on the weights' device")
    if not weights.is_contiguous():
        raise RuntimeError("weights must be contiguous to be updated")
    shapes = [*state_shapes(Rule(rule), weights), None, None]
    for state, shape in zip((first, second), shapes, strict=False):
        right = state is shape is None
        if state is not None and shape is not None:
            right = state.numel() == torch.Size(shape).numel() and state.is_contiguous()
            right = right and state.dtype == accumulator(weights.dtype) and state.device == weights.device
        if not right:
            raise RuntimeError(
                "the rule's state must be contiguous float32 (float64 of float64 weights), a number per weight or per "
                "unit, on the weights' device"
            )


def step_rows(
    step: Step, weights: Tensor, rows: Tensor | None, grads: Tensor, first: Tensor | None, second: Tensor | None
) -> None:
    """Moves weights[rows] (all if None), [U, Z], and their states, given their gradients in the accumulator's type."""
    rule = step.rule
    if step.weight_decay:
        grads = grads + _read(weights, rows).to(grads.dtype) * step.weight_decay
    if rule == Rule.SGD:
        change = grads * step.lr
    elif rule == Rule.ADAGRAD:
        total = _read(first, rows) + grads * grads
        _write(first, rows, total)
        change = step.lr * grads / (_square_root(total) + step.eps)
    elif rule == Rule.ROW_WISE_ADAGRAD:
        total = _read(first, rows) + _divided(fold(grads * grads), grads.shape[1])
        _write(first, rows, total)
        change = grads * (step.lr / (_square_root(total) + step.eps))[:, None]
    else:
        mean = _read(first, rows) * step.beta1 + grads * (1 - step.beta1)
        square = _read(second, rows) * step.beta2 + grads * grads * (1 - step.beta2)
        _write(first, rows, mean)
        _write(second, rows, square)
        change = step.lr * mean / (_square_root(_divided(square, step.correction)) + step.eps)
    if weights.dtype in (torch.float32, torch.float64):
        weights.sub_(change) if rows is None else weights.index_add_(0, rows, change, alpha=-1)
    else:
        moved = _read(weights, rows).to(change.dtype) - change
        _write(weights, rows, _rounded(moved, weights.dtype, rows, step.draw))


def fold(values: Tensor) -> Tensor:
    """Sums [U] of values [U, Z] by halves: the second half is added to the first, until one is left (missing: 0)."""
    half = 1
    while half < values.shape[1]:
        half *= 2
    while half > 1:
        half //= 2
        first, second = values[:, :half], values[:, half:]
        values = torch.cat([first[:, : second.shape[1]] + second, first[:, second.shape[1] :]], 1)
    return values[:, 0]


def _divided(values: Tensor, by: float) -> Tensor:
    """By a tensor on their device: by a plain number torch's CUDA multiplies by the inverse, which can round apart."""
    return values / values.new_full((), by)


def _square_root(values: Tensor) -> Tensor:
    """Of float32 the nearest number, as C++ has it; torch's own is often the one beside it (on a CPU it is MKL's)."""
    return values.double().sqrt().to(values.dtype)


def _rounded(values: Tensor, dtype: torch.dtype, rows: Tensor | None, draw: int) -> Tensor:
    """values [U, Z] in 16 bits, each up or down so that the mean over draws is the value. Gupta et al., ICML 2015.

    Number j of the slab draws 16 bits of number j / 4 of the SplitMix64 stream `draw`."""
    width = values.shape[1]
    rows = torch.arange(len(values), device=values.device) if rows is None else rows
    j = rows[:, None] * width + torch.arange(width, device=values.device)
    words = splitmix64(torch.tensor(draw, device=values.device), j // 4)
    drawn = ((words >> (j % 4 * 16)) & 0xFFFF).int()
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((bits + drawn) & ~0xFFFF).view(torch.float32)
        return torch.where(values.isfinite(), rounded, values).to(dtype)
    size = values.abs()
    normal = ((bits + (drawn >> 3)) & ~0x1FFF).view(torch.float32)
    scaled = size * 2.0**24
    whole = scaled.floor()
    whole = torch.where(scaled - whole > drawn * 2.0**-16, whole + 1, whole)
    small = torch.copysign(whole * 2.0**-24, values)
    rounded = torch.where(size < 2.0**-14, small, normal)
    return torch.where(size < 65504, rounded, values).to(dtype)


def _read(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _write(tensor: Tensor, rows: Tensor | None, values: Tensor) -> None:
    if rows is None:
        tensor.copy_(values)
    else:
        tensor.index_copy_(0, rows, values)

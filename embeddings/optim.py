"""Optimizers of embedding slabs: they touch only the slots that the gradient names; only state has the slab's size.

A slot is a row of the parameter [S, Z]: a row of a dense table, a block of a hashed one; a piece of either where the
slab's widths differ. Each optimizer takes dense gradients and sparse ones (rows of [S, Z]); for a slot whose gradient
is zero the two agree, except where a step moves a slot whatever its gradient: under Adam, lazy on sparse gradients (the
moments of an untouched slot do not decay, as in torch.optim.SparseAdam), and under weight_decay (a sparse gradient's
untouched slots do not decay).

An optimizer may also be fused into the backward pass of a collection (`EmbeddingBags.fuse`): then no gradient is made,
and `step` finds nothing to do for the collection's parameters. Its steps are those of sparse gradients, bit for bit; of
16-bit weights, whose gradient tensor is rounded to 16 bits, they are those of the gradient before that.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from embeddings.pages import ask_for_huge_pages
from embeddings.rules import NUM_NUMBERS, Rule, Step, accumulator, state_shapes, step_rows

PIECE = 1 << 16  # rows
STATES = {Rule.ADAM: ("mean", "square")}  # names of a rule's states; of the others "sum"


class _Rows(Optimizer):
    """What every optimizer here shares. A subclass says its rule (`embeddings.rules`) and its hyperparameters."""

    rule: Rule

    def __init__(self, params: Iterable[Tensor], **options: float) -> None:
        _check(options)
        super().__init__(params, options)
        self._numbers: dict[Tensor, Tensor] = {}  # of each parameter that is stepped fused: `numbers` of bag_update
        self._has_counted = False

    def __setstate__(self, state: dict) -> None:
        """Of a copy: torch hands on its own attributes alone."""
        super().__setstate__(state)
        self._numbers, self._has_counted = {}, False

    def add_param_group(self, param_group: dict) -> None:
        """As torch's, which also takes names that are no options. Raises ValueError for an option out of its range."""
        _check({name: value for name, value in param_group.items() if name in self.defaults})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient. closure is not supported."""
        if closure is not None:
            raise ValueError("embedding optimizers take no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                step, states = self._begin(param, group)
                rows, grads = _touched_rows(param.grad) if param.grad.is_sparse else (None, param.grad)
                slab, grads = _in_rows(param), _in_rows(grads.contiguous())
                shapes = [*state_shapes(self.rule, slab), None, None]
                states = [s if s is None else s.view(shape) for s, shape in zip(states, shapes, strict=False)]
                for some, part in _pieces(slab, rows, grads):
                    step_rows(step, slab, some, part.to(accumulator(param.dtype)), *states)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, but states of 16-bit weights are float32: torch gives them the weights' dtype."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(i, {}) for group in state_dict["param_groups"] for i in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for param, states in zip(params, saved, strict=True):
            for name, value in states.items():
                if torch.is_tensor(value) and value.is_floating_point():
                    self.state[param][name] = value.to(param.device, accumulator(param.dtype), copy=True)

    @property
    def moves_untouched(self) -> bool:
        """Whether a dense gradient also moves slots where it is zero, which rows and fused steps do not touch."""
        decays = any(group.get("weight_decay", 0) for group in self.param_groups)
        return decays or self.rule == Rule.ADAM

    @torch.no_grad()
    def step_fused(self, grad: Tensor, param: Tensor, batch: tuple, layout: tuple[int, ...], features: str) -> None:
        """Update a slab given the gradient [B, columns] of what was looked up in it.

        batch: ids, offsets, per_sample_weights, tables; layout, features: as `embeddings.ops`."""
        if not self._has_counted:
            self._begin_fused(param)
        states = [*(self.state[param][name] for name, _ in self._states_of(param)), None, None][:2]
        numbers = self._numbers[param]
        torch.ops.embeddings.bag_update(
            grad, param.detach(), *states, *batch, *layout, int(self.rule), numbers, features
        )
        torch.autograd.graph.increment_version(param)  # what saved it for a backward pass must not go on with these

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts a fused step of every slab that had one before; inside, `step_fused` launches its kernel and no more.

        So a captured step can be replayed: what changes from step to step is where the kernel reads it."""
        for param in self._numbers:
            self._begin_fused(param)
        self._has_counted = True
        try:
            yield
        finally:
            self._has_counted = False

    @torch.no_grad()
    def _begin_fused(self, param: Tensor) -> None:
        """Counts a step, and puts its hyperparameters where the kernel reads them, without waiting for the device."""
        groups = [group for group in self.param_groups if any(one is param for one in group["params"])]
        if not groups:
            raise RuntimeError(
                "the fused optimizer does not hold this slab's weight, which was replaced (by load_state_dict with "
                "assign=True?): make one of the new parameters, and fuse it"
            )
        step, _ = self._begin(param, groups[0])
        if param not in self._numbers:
            self._numbers[param] = torch.empty(NUM_NUMBERS, dtype=torch.float64, device=param.device)
        values = torch.tensor(step.numbers(), dtype=torch.float64, pin_memory=param.is_cuda)
        self._numbers[param].copy_(values, non_blocking=True)

    def _states_of(self, param: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes of what is kept for a parameter."""
        return zip(STATES.get(self.rule, ("sum",)), state_shapes(self.rule, param), strict=False)

    def _begin(self, param: Tensor, group: dict) -> tuple[Step, list[Tensor | None]]:
        """Counts a step where one is counted. Returns its hyperparameters and both states, None where there is none."""
        state = self.state[param]
        kept = list(self._states_of(param))
        for name, shape in kept:
            if name not in state:
                state[name] = ask_for_huge_pages(param.new_empty(shape, dtype=accumulator(param.dtype))).zero_()
        rounds = param.dtype not in (torch.float32, torch.float64)
        if self.rule == Rule.ADAM or rounds:
            state["step"] = int(state.get("step", 0)) + 1  # a tensor in checkpoints of earlier versions
        t = state.get("step", 0)
        lr, correction = group["lr"], 1.0
        beta1, beta2 = group.get("beta1", 0.0), group.get("beta2", 0.0)
        if self.rule == Rule.ADAM:
            lr, correction = lr / (1 - beta1**t), 1 - beta2**t
        decay, eps = group.get("weight_decay", 0.0), group.get("eps", 0.0)
        step = Step(self.rule, lr, decay, eps, beta1, beta2, correction, t)
        return step, [*(state[name] for name, _ in kept), None, None][:2]


def _check(options: dict[str, float]) -> None:
    """Raises ValueError for hyperparameters out of their range."""
    for name, value in options.items():
        if name in ("beta1", "beta2"):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} must be in [0, 1)")
        elif not value >= 0 or (name == "eps" and value == 0):
            raise ValueError(f"{name}={value} must {'be above 0' if name == 'eps' else 'not be negative'}")


def _in_rows(tensor: Tensor) -> Tensor:
    """A view [S, Z] of what has any other number of dimensions, the first of S slots: a hashed slab [S] is [S, 1]."""
    return tensor.view(*tensor.shape[:1] or (1,), math.prod(tensor.shape[1:]))


def _pieces(param: Tensor, rows: Tensor | None, grads: Tensor) -> Iterator[tuple[Tensor | None, Tensor]]:
    """A step's rows and gradients; dense ones of 16-bit weights in parts, since rounding takes 20 times their bytes."""
    if rows is not None or param.dtype in (torch.float32, torch.float64):
        yield rows, grads
        return
    for begin in range(0, len(grads), PIECE):
        part = grads[begin : begin + PIECE]
        yield torch.arange(begin, begin + len(part), device=grads.device), part


def _touched_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Unique slots [U] and gradients [U, Z] of a sparse gradient; summed if the slab was used more than once."""
    slots = grad._indices()[0]
    # autograd drops the coalesced flag, so look instead of sorting again: one use of a slab gives ascending slots
    if not grad.is_coalesced() and not bool((slots[1:] > slots[:-1]).all()):
        grad = grad.coalesce()
        slots = grad._indices()[0]
    return slots, grad._values()


class SGD(_Rows):
    """w -= lr * g."""

    rule = Rule.SGD

    def __init__(self, params: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)


class Adagrad(_Rows):
    """s += g^2; w -= lr * g / (sqrt(s) + eps). One s per weight. Duchi et al., JMLR 2011."""

    rule = Rule.ADAGRAD

    def __init__(self, params: Iterable[Tensor], *, lr: float, eps: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)


class RowWiseAdagrad(_Rows):
    """s += mean(g^2) over the slot; w -= lr * g / (sqrt(s) + eps). One s per slot of Z weights.

    As in Mudigere et al., ISCA 2022 (section on memory).
    """

    rule = Rule.ROW_WISE_ADAGRAD

    def __init__(self, params: Iterable[Tensor], *, lr: float, eps: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)


class Adam(_Rows):
    """Kingma and Ba, ICLR 2015; lazy on sparse gradients (see the module). Two moments per weight."""

    rule = Rule.ADAM

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)

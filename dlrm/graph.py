"""A training step as one CUDA graph: captured once, then replayed, so that the host launches one thing, not 200."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch.optim import SGD, Adagrad, Optimizer

if TYPE_CHECKING:
    from data.batch import Batch

WARM_UP = 3  # eager steps before the capture: libraries choose their algorithms, optimizers make their states


class GraphedStep:
    """Steps on batches of one shape are replays of a captured one; others, and the first WARM_UP ones, are eager.

    launch(batch): launches a step on the device, and may not wait for it. prepare(): what the host does before each of
    them. counted(): a context of capture and replay, in which the embeddings' optimizer does not count steps as it is
    launched, but has done so. capture(run): has `run` called, and returns what launches the same again.
    """

    def __init__(
        self,
        launch: Callable[["Batch"], None],
        *,
        prepare: Callable[[], None],
        counted: Callable[[], AbstractContextManager],
        capture: Callable[[Callable[[], None]], Callable[[], None]],
    ):
        self._launch, self._prepare, self._counted, self._capture = launch, prepare, counted, capture
        self._num_eager = 0
        self._batch: Batch | None = None  # the tensors that the graph reads
        self._replay: Callable[[], None] | None = None
        self.refusal: str | None = None  # why there is no graph

    def __call__(self, batch: "Batch") -> None:
        """batch: on the device."""
        self._prepare()
        if self.refusal is not None or self._num_eager < WARM_UP or not self._takes(batch):
            self._num_eager += 1
            self._launch(batch)
            return
        if self._batch is None:
            self._batch = batch._make(None if field is None else field.clone() for field in batch)
        else:
            for mine, field in zip(self._batch, batch, strict=True):
                if field is not None:
                    mine.copy_(field, non_blocking=True)
        with self._counted():
            if self._replay is not None or self._captures():
                self._replay()
            else:
                self._launch(batch)

    def _captures(self) -> bool:
        try:
            self._replay = self._capture(lambda: self._launch(self._batch))
        except RuntimeError as error:
            self.refusal = (str(error) or type(error).__name__).splitlines()[0]
            print(f"cuda graph: none, steps are launched one by one: {self.refusal}")
            return False
        return True

    def _takes(self, batch: "Batch") -> bool:
        if batch.offsets is not None:  # the number of ids differs from batch to batch
            return False
        return self._batch is None or all(
            mine is field is None or mine.shape == field.shape for mine, field in zip(self._batch, batch, strict=True)
        )


def cuda_capture(run: Callable[[], None]) -> Callable[[], None]:
    """Captures what run() launches on the current device. Raises RuntimeError where something cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class DenseStep:
    """A step of a torch optimizer that a graph can hold: what changes from step to step is on the device.

    The optimizer's own step, of torch.optim.SGD or Adagrad, on its states. Raises ValueError for other optimizers and
    options."""

    def __init__(self, optimizer: Optimizer):
        plain = {"momentum": 0, "lr_decay": 0, "weight_decay": 0, "maximize": False, "nesterov": False, "dampening": 0}
        if type(optimizer) not in (SGD, Adagrad):
            raise ValueError(f"{type(optimizer).__name__}'s step")
        for group in optimizer.param_groups:
            for name, value in plain.items():
                if group.get(name, value) != value:
                    raise ValueError(f"{type(optimizer).__name__}'s step with {name}={group[name]}")
        self._optimizer = optimizer
        device = optimizer.param_groups[0]["params"][0].device
        self._rates = [torch.empty((), device=device) for _ in optimizer.param_groups]  # -lr of each group

    def prepare(self) -> None:
        """Before each step: rates as they are now, and the count of steps."""
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            rate.fill_(-group["lr"])
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"] += 1

    @torch.no_grad()
    def __call__(self) -> None:
        """Launch the step on the parameters' gradients."""
        for rate, group in zip(self._rates, self._optimizer.param_groups, strict=True):
            params = [param for param in group["params"] if param.grad is not None]
            changes = torch._foreach_mul([param.grad for param in params], rate)
            if isinstance(self._optimizer, SGD):
                torch._foreach_add_(params, changes)
                continue
            sums = [self._optimizer.state[param]["sum"] for param in params]
            grads = [param.grad for param in params]
            torch._foreach_addcmul_(sums, grads, grads)
            roots = torch._foreach_sqrt(sums)
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(params, changes, roots)

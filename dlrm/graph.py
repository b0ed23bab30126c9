"""A training step as one CUDA graph: captured once, then replayed, so that the host launches one thing, not 200."""

import contextlib
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch.optim import SGD, Adagrad, Optimizer

if TYPE_CHECKING:
    from data.batch import Batch

WARM_UP = 3  # eager steps before the capture: libraries choose their algorithms, optimizers make their states


class CudaGraphs:
    """Runs and captures on a stream of a device's own, as capture wants of what it captures."""

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device)

    def warm_up(self, run: Callable[[], None]) -> None:
        """Calls run() there, after all that the current stream has been told, which waits for it."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
        current.wait_stream(self._stream)

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        """Has run() captured, and returns what launches the same. Raises RuntimeError where it cannot be captured."""
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        torch.cuda.synchronize(self._device)
        gc.collect()
        torch.cuda.empty_cache()
        with torch.cuda.stream(self._stream):  # also makes its device the current one
            graph.capture_begin(pool=pool)
            try:
                run()
            except BaseException:
                self._failed = graph  # it stays: the allocator of pinned memory still asks it what it captures
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                with contextlib.suppress(RuntimeError):  # where the end of a capture that failed has failed, too
                    torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
                raise
            graph.capture_end()
        return graph.replay


class GraphedStep:
    """Steps on batches of one shape are replays of a captured one; others, and the first WARM_UP ones, are eager.

    launch(batch): launches a step on the device, and may not wait for it. prepare(): what the host does before each of
    them. counted(): a context of capture and replay, in which the embeddings' optimizer does not count steps as it is
    launched, but has done so. check(): raises what the device has met so far. graphs: CudaGraphs.
    """

    def __init__(
        self,
        launch: Callable[["Batch"], None],
        *,
        prepare: Callable[[], None],
        counted: Callable[[], AbstractContextManager],
        check: Callable[[], None],
        graphs: CudaGraphs,
    ):
        self._launch, self._prepare, self._counted, self._check = launch, prepare, counted, check
        self._graphs = graphs
        self._num_eager = 0
        self._shapes: list | None = None  # of the batch before
        self._batch: Batch | None = None  # the tensors that the graph reads
        self._replay: Callable[[], None] | None = None
        self.refusal: str | None = None  # why there is no graph

    def __call__(self, batch: "Batch") -> None:
        """batch: on the device."""
        self._prepare()
        if not self._takes(batch):
            self._num_eager += 1
            self._graphs.warm_up(lambda: self._launch(batch))
            return
        if self._batch is None:
            self._batch = batch._make(None if field is None else field.clone() for field in batch)
        else:
            for mine, field in zip(self._batch, batch, strict=True):
                if field is not None:
                    mine.copy_(field, non_blocking=True)
        if self._replay is None:
            self._check()  # what a captured call would raise, of the steps before
        with self._counted():
            if self._replay is not None or self._captures():
                self._replay()
            else:
                self._launch(batch)

    def _captures(self) -> bool:
        try:
            self._replay = self._graphs.capture(lambda: self._launch(self._batch))
        except RuntimeError as error:
            self._refuse((str(error) or type(error).__name__).splitlines()[0])
            return False
        return True

    def _refuse(self, why: str) -> None:
        self.refusal = why
        print(f"cuda graph: none, steps are launched one by one: {why}")

    def _takes(self, batch: "Batch") -> bool:
        """Whether a graph holds the batch's step, or shall: of two batches of one shape the second."""
        shapes = [None if field is None else field.shape for field in batch]
        before, self._shapes = self._shapes, shapes
        if batch.offsets is not None and self.refusal is None:
            self._refuse("batches of bags hold another number of ids each time")
        if self.refusal is not None or self._num_eager < WARM_UP:
            return False
        return shapes == (before if self._batch is None else [None if f is None else f.shape for f in self._batch])


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

"""The mean of the weights over the steps of training, which is evaluated in place of the last weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer


class WeightAverage(Optimizer):
    """Keeps every parameter's mean over its own steps: a second copy of the weights, touched whole by each step.

    An optimizer by its interface only: what it keeps is saved, loaded and counted as optimizer state is.
    Polyak and Juditsky, SIAM J. Control and Optimization 1992; of networks: Izmailov et al., UAI 2018.
    """

    def __init__(self, params: Iterable[Tensor]) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Take the weights as they are now into the mean."""
        for param in self._parameters():
            state = self.state[param]
            state["count"] = state.get("count", 0) + 1
            if state["count"] == 1:
                state["mean"] = param.detach().clone(memory_format=torch.preserve_format)
            else:
                state["mean"].lerp_(param, 1 / state["count"])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are their means, if there are any yet. Nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for param in self._parameters():
            if state := self.state.get(param):
                param.data, state["mean"] = state["mean"], param.data

    def _parameters(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

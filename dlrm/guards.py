"""What looks for numbers that went wrong: before a step's update, and in the losses as they are logged."""

import math
from collections import deque
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

NUM_RECENT, SPIKE = 10, 2.0  # a loss this many times the median of so many before it is worth a line


class Guards:
    """Of a model whose embeddings' features and dense columns have these names. On CUDA to look is to wait, so there
    nothing is looked at but the losses, when they are logged.

    step(): how many steps are done. recent_losses: as logged, the last few; they belong to the run's state."""

    def __init__(self, model: nn.Module, feature_names: list[str], dense_names: list[str], step: Callable[[], int]):
        self._model, self._feature_names, self._dense_names = model, feature_names, dense_names
        self._step = step
        dense = set(model.dense_parameters())
        self._layers = {name: param for name, param in model.named_parameters() if param in dense}
        self.recent_losses: deque[float] = deque(maxlen=NUM_RECENT)
        model.embeddings.register_forward_hook(self._watch)

    def check_loss(self, loss: Tensor, dense: Tensor, labels: Tensor) -> None:
        """Raises FloatingPointError, naming the first tensor with a NaN or infinity, if the loss is not finite.

        dense: [B, num_dense]; labels: [B], of the step."""
        if not (loss.is_cuda or torch.isfinite(loss)):
            why = self._explain(dense, labels)
            raise FloatingPointError(f"the loss is not finite at step {self._step() + 1}, before its update: {why}")

    def check_gradients(self) -> None:
        """Of the dense layers; those of the embeddings are looked at in the backward pass, where fused ones step."""
        grads = {name: param.grad for name, param in self._layers.items() if param.grad is not None}
        if any(grad.is_cuda for grad in grads.values()):
            return
        if not math.isfinite(sum(grad.sum().item() for grad in grads.values())):
            for name, grad in grads.items():
                if not torch.isfinite(grad).all():
                    self._refuse_gradient(name)

    def _watch(self, embeddings: nn.Module, given: tuple, vectors: Tensor) -> None:
        if vectors.requires_grad:
            vectors.register_hook(lambda gradient: self.check_embedding_gradient(gradient))

    def check_embedding_gradient(self, gradient: Tensor) -> None:
        """Of the embeddings' vectors [B, F, D]: before their backward pass, and so before any fused step."""
        if gradient.is_cuda or math.isfinite(gradient.sum().item()):
            return
        bad = ~torch.isfinite(gradient).all(2).all(0)  # [F]
        if bad.any():
            self._refuse_gradient(f"feature {self._feature_names[int(bad.nonzero()[0])]}'s vectors")

    def spike(self, loss: float) -> str | None:
        """Words for a logged loss that is far above those before it."""
        usual = median(self.recent_losses) if len(self.recent_losses) == NUM_RECENT else math.inf
        self.recent_losses.append(loss)
        if loss <= SPIKE * usual:
            return None
        words = f"the loss jumped to {loss:.4f}, from {usual:.4f} (the median of {NUM_RECENT} records before)"
        return f"{words}; a lower learning rate or a longer warm-up may help"

    def _refuse_gradient(self, name: str) -> None:
        raise FloatingPointError(
            f"step {self._step() + 1}, before its update: the gradient of {name} has a NaN or an infinity, "
            "though the loss has not; a lower learning rate may help"
        )

    def _explain(self, dense: Tensor, labels: Tensor) -> str:
        """The first tensor with a NaN or infinity, in the order in which they could have caused each other."""
        columns = {f"dense column {name}": dense[:, i] for i, name in enumerate(self._dense_names)}
        tables = self._model.embeddings.table_weights()
        weights = {f"weights of feature {name}": part for name, parts in tables.items() for part in parts}
        layers = {f"weights {name}": param for name, param in self._layers.items()}
        for name, tensor in (columns | {"the labels": labels} | weights | layers).items():
            if not torch.isfinite(tensor).all():
                return f"{name} have a value that is NaN or infinite"
        return "inputs and weights are finite, so the logits overflowed; a lower learning rate may help"

"""A pass over a split: from batches to logits to metrics."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlrm.feed import on_device
from dlrm.metrics import Metrics, exact_auc
from dlrm.model import DLRM
from dlrm.settings import TrainerSettings

if TYPE_CHECKING:
    from data.batch import Batch


def predict(model: DLRM, batch: "Batch", settings: TrainerSettings) -> tuple[Tensor, Tensor]:
    """Logits and labels of a batch on settings.device, both [B] float32, the dense layers in settings.precision."""
    is_bf16 = settings.precision == "bf16"
    with torch.autocast(torch.device(settings.device).type, dtype=torch.bfloat16, enabled=is_bf16):
        return model(batch.dense, batch.ids, batch.offsets), batch.labels


@dataclass(frozen=True)
class Evaluation:
    """What a pass over a split found. scores, labels: [N], kept only for `exact_values`; else [0]."""

    metrics: Metrics
    scores: Tensor
    labels: Tensor

    def values(self) -> tuple[dict[str, float], dict[str, str]]:
        """The streaming metrics, and why those that are NaN are so."""
        return self.metrics.compute(), dict(self.metrics.reasons)

    def exact_values(self, best_possible_auc: float | None) -> tuple[dict[str, float], dict[str, str]]:
        """The same with the AUC by ranks instead of bins, and beside the best possible one where that is known."""
        values, reasons = self.values()
        del values["auc_bound"]
        try:
            values["auc"] = exact_auc(self.scores, self.labels)
        except ValueError as error:
            values["auc"], reasons["auc"] = math.nan, str(error)
        if best_possible_auc is not None:
            values["best_possible_auc"] = best_possible_auc
            values["share_of_best_auc"] = (values["auc"] - 0.5) / (best_possible_auc - 0.5)
            if math.isnan(values["auc"]):
                reasons["share_of_best_auc"] = reasons["auc"]
        return values, reasons


@torch.no_grad()
def evaluate(
    model: DLRM, dataset, split: str, *, settings: TrainerSettings, check: Callable[[], None], exact: bool
) -> Evaluation:
    """The metrics of a model on a split, by one pass over it; `check` is called before each batch, and may raise.

    exact: keeps every score, 5 bytes per sample, for `Evaluation.exact_values`.
    """
    num_kept, num_done = dataset.num_samples[split] if exact else 0, 0
    found = Evaluation(Metrics(settings.device), torch.empty(num_kept), torch.empty(num_kept, dtype=torch.uint8))
    was_training = model.training
    model.eval()
    for batch in on_device(dataset.batches(split, settings.eval_batch_size), settings.device):
        check()
        logits, labels = predict(model, batch, settings)
        found.metrics.update(logits, labels)
        if exact:
            rows = slice(num_done, num_done + len(labels))
            found.scores[rows], found.labels[rows] = logits, labels
        num_done += len(labels)
    model.embeddings.raise_noted()
    model.train(was_training)
    return found

"""What TensorBoard shows of a run beside its scalars: charts side by side, and histograms by feature."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from dlrm.settings import TrainerSettings

if TYPE_CHECKING:
    from data.batch import Batch
    from dlrm.log import RunLog

NUM_SAMPLES = 2048  # of the training split, that the histograms look at: well below a second of work
SHARES = [k / 16 for k in range(17)]  # edges of the bins of collision traffic


def lines(*tags: str) -> list:
    """A chart of the Custom Scalars tab."""
    return ["Multiline", [f"{tag}$" for tag in tags]]  # regular expressions


LAYOUT = {
    "accuracy beside memory": {
        "AUC": lines("eval/auc", "test/auc", "test_at_best/auc"),
        "bytes of embeddings, their gradients and the optimizers": lines(
            "memory/embedding_bytes", "memory/gradient_bytes", "memory/optimizer_bytes"
        ),
        "peak bytes": lines("memory/peak_bytes"),  # a chart of its own: in theirs it would flatten the others
    },
    "loss": {"log loss": lines("train/loss", "eval/log_loss", "test/log_loss")},
    "speed": {"samples per second": lines("train/samples_per_second")},
}


@torch.no_grad()
def add_feature_histograms(
    log: "RunLog", embeddings: nn.Module, batch: "Batch", step: int, settings: TrainerSettings
) -> None:
    """Records of each feature, over the samples of a batch, how long its vectors are and how much of them is shared.

    vector_norm/<feature>: Euclidean norms of the pooled vectors, one per sample. collision_traffic/<feature>: of every
    lookup the share of the numbers it reads that another id of the batch reads too; 0 for dense tables.
    """
    ids, offsets = (None if part is None else part.to(settings.device) for part in (batch.ids, batch.offsets))
    norms = embeddings(ids, offsets).norm(dim=2)  # [B, F]
    for f, (feature, shares) in enumerate(embeddings.collision_traffic(ids, offsets).items()):
        log.histogram(f"vector_norm/{feature}", norms[:, f], "tensorflow", step)
        log.histogram(f"collision_traffic/{feature}", shares, SHARES, step)

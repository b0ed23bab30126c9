"""Other libraries' embedding tables, at their best settings: torch.nn.EmbeddingBag and FBGEMM's fused TBE."""

import importlib.util
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.shapes import Bags

RATE, EPS = 0.01, 1e-8
HAS_FBGEMM = importlib.util.find_spec("fbgemm_gpu") is not None
TORCH_OPTIMIZERS = {  # work -> of sparse gradients, of dense ones
    "sgd": (torch.optim.SGD, torch.optim.SGD),
    "adagrad": (torch.optim.Adagrad, torch.optim.Adagrad),
    "adam": (torch.optim.SparseAdam, partial(torch.optim.Adam, foreach=True)),
}
FBGEMM_OPTIMIZERS = {"sgd": "EXACT_SGD", "adagrad": "EXACT_ADAGRAD", "rowwise_adagrad": "EXACT_ROWWISE_ADAGRAD"}


class TorchBags(nn.Module):
    """One nn.EmbeddingBag per feature. weights: [rows, D] each."""

    def __init__(self, weights: list[Tensor], *, sparse: bool) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(*w.shape, mode="sum", sparse=sparse, include_last_offset=True, _weight=w) for w in weights
        )

    def ready(self, batch: Bags) -> list[tuple[Tensor, Tensor]]:
        """Each feature's ids [B * bag] and offsets [B + 1]."""
        offsets = batch.offsets[: (batch.offsets.numel() - 1) // len(self.bags) + 1]
        return [(ids, offsets) for ids in batch.ids.chunk(len(self.bags))]

    def forward(self, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Pooled vectors [B, F, D], of one feature [B, D]."""
        vectors = [bag(*x) for bag, x in zip(self.bags, inputs, strict=True)]
        return vectors[0] if len(vectors) == 1 else torch.stack(vectors, 1)


class GatheredBags(nn.Module):
    """Every row of the batch gathered, then summed by bag: what a compiler can make one kernel of.

    weights: [sum(rows), D], the tables' rows one after the other."""

    def __init__(self, weights: Tensor, rows: list[int], *, compiles: bool) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.register_buffer("firsts", torch.tensor([0, *rows[:-1]], device=weights.device).cumsum(0))
        self.sums = torch.compile(self._sums, fullgraph=True) if compiles else self._sums

    def forward(self, batch: Bags) -> Tensor:
        """Sums [B, F, D] of bags."""
        return self.sums(self.weights, self.firsts, batch.ids.view(len(self.firsts), -1, batch.bag))

    @staticmethod
    def _sums(weights: Tensor, firsts: Tensor, ids: Tensor) -> Tensor:
        return weights[ids + firsts[:, None, None]].sum(2).transpose(0, 1)


def make_tbe(rows: list[int], dim: int, work: str, *, device: str, weights: Tensor | None = None) -> nn.Module:
    """FBGEMM's SplitTableBatchedEmbeddingBagsCodegen: tbe(ids, offsets) -> [B, F * D]; backward applies the update.

    weights [rows * D], on a CPU: what it shall read and write; by default random ones of its own."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        EmbeddingLocation,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    on_cpu = device == "cpu"
    weights = torch.empty(sum(rows) * dim).uniform_() if weights is None else weights
    place = (
        EmbeddingLocation.HOST if on_cpu else EmbeddingLocation.DEVICE,
        ComputeDevice.CPU if on_cpu else ComputeDevice.CUDA,
    )
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(n, dim, *place) for n in rows],
        optimizer=EmbOptimType[FBGEMM_OPTIMIZERS[work]],
        learning_rate=RATE,
        eps=EPS,
        device=torch.device(device),
        preallocated_host_buffers={"weights": weights} if on_cpu else None,
    )

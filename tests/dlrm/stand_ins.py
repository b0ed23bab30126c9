"""The smallest embeddings, data and settings that the recommender accepts: its tests need no other package."""

from collections.abc import Callable, Iterator

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from data.batch import Batch
from dlrm.checkpoints import CheckpointSettings

SETTINGS = {
    "batch_size": 32,
    "eval_batch_size": 64,
    "epochs": 2,
    "max_steps": None,
    "eval_every": 10,
    "log_every": 5,
    "warmup_steps": 3,
    "decay": "linear",
    "average_from": None,
    "cuda_graph": "auto",
    "checkpoint": CheckpointSettings(every=0, keep=2, asynchronous=False),
    "save_checkpoint": True,
    "keep_best": False,  # it leaves other weights than the last in the model
    "precision": "fp32",
    "device": "cpu",
    "deterministic": True,
}


class StandInBags(nn.Module):
    """One EmbeddingBag per feature behind the interface of embeddings.EmbeddingBags."""

    is_fused = False

    def __init__(self, cardinalities: dict[str, int], embedding_dim: int, *, sparse: bool = False):
        super().__init__()
        self.names = list(cardinalities)
        self.num_features, self.embedding_dim = len(cardinalities), embedding_dim
        bags = (nn.EmbeddingBag(rows, embedding_dim, mode="sum", sparse=sparse) for rows in cardinalities.values())
        self.bags = nn.ModuleList(bags)

    def forward(self, ids: Tensor, offsets: Tensor | None) -> Tensor:
        if offsets is None:
            offsets = torch.arange(len(ids) + 1, device=ids.device)
        batch_size = (len(offsets) - 1) // self.num_features
        vectors = []
        for f, bag in enumerate(self.bags):
            bounds = offsets[f * batch_size : (f + 1) * batch_size + 1]
            vectors.append(bag(ids[bounds[0] : bounds[-1]], bounds[:-1] - bounds[0]))
        return torch.stack(vectors, dim=1)  # [B, F, D]

    def raise_noted(self) -> None:
        pass

    def num_bytes(self) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in self.parameters())

    state_bytes = dense_equivalent_bytes = num_bytes

    def gradient_bytes(self, batch_size: int) -> dict[str, int]:
        return self.split(lambda weight: weight.numel() * 4)

    def split(self, num_bytes: Callable) -> dict[str, int]:
        return {name: num_bytes(bag.weight) for name, bag in zip(self.names, self.bags, strict=True)}

    def table_weights(self) -> dict[str, list[Tensor]]:
        return {name: [bag.weight.detach()] for name, bag in zip(self.names, self.bags, strict=True)}

    def collision_traffic(self, ids: Tensor, offsets: Tensor | None) -> dict[str, Tensor]:
        return {name: torch.zeros(len(ids) // self.num_features) for name in self.names}

    def feature_table(self) -> list[dict]:
        return [
            {
                "feature": name,
                "rows": bag.num_embeddings,
                "backend": "dense",
                "weights": bag.weight.numel(),
                "bytes": bag.weight.numel() * 4,
                "compression": 1.0,
            }
            for name, bag in zip(self.names, self.bags, strict=True)
        ]


class StandInData:
    """Clicks that depend on one dense column and on each id, so that a model can learn them; the dataset interface."""

    def __init__(self, *, num_dense: int = 3, num_valid: int = 200, num_train: int = 640, learnable: bool = True):
        self.cardinalities = {"C1": 7, "C2": 50, "C3": 3}
        self.feature_names = list(self.cardinalities)
        self.dense_names = [f"I{i + 1}" for i in range(num_dense)]
        self.num_samples = {"train": num_train, "valid": num_valid, "test": 300}
        self.fingerprint = "0123456789abcdef"
        self.batches_begun: list[tuple[str, int, int]] = []  # (split, epoch, start) of each call
        self._samples, self._teacher_logits = {}, {}
        for seed, (split, n) in enumerate(self.num_samples.items()):
            generator = torch.Generator().manual_seed(seed)
            dense = torch.randn(n, num_dense, generator=generator)
            ids = torch.stack([torch.randint(rows, (n,), generator=generator) for rows in self.cardinalities.values()])
            logit = torch.sin(ids * 12.9).sum(dim=0) * 1.5 + (dense[:, 0] if num_dense else 0)
            chance = torch.sigmoid(logit if learnable else torch.zeros(n))
            self._samples[split] = Batch(dense, ids, None, (torch.rand(n, generator=generator) < chance).float())
            self._teacher_logits[split] = logit

    def batches(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        self.batches_begun.append((split, epoch, start))
        dense, ids, _, labels = self._samples[split]
        order = torch.arange(len(labels))
        if split == "train":
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(100 + epoch))
        for rows in order[start:].split(batch_size):
            yield Batch(dense[rows], ids[:, rows].flatten(), None, labels[rows])

    def describe(self) -> str:
        return "stand-in (3 categorical)"

    def best_possible_auc(self, split: str) -> float | None:
        return roc_auc_score(self._samples[split].labels, self._teacher_logits[split])

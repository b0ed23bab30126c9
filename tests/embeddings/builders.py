"""Backends, collections and batches that more than one test file builds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from embeddings import Dense, EmbeddingBags, Hashed

YAMLS = sorted((Path(__file__).parents[2] / "conf/embedding").glob("*.yaml"))
DIM = 16
each_yaml = pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)


def dense(accumulate="sorted"):
    return Dense(embedding_dim=DIM, compression=1.0, accumulate=accumulate)


def hashed(compression=0.1, block=8, accumulate="sorted"):
    return Hashed(embedding_dim=DIM, compression=compression, accumulate=accumulate, block=block)


def from_yaml(path: Path, **changes):
    """A backend as train.py composes it: the yaml, and the values it interpolates."""
    values = {"model": {"embedding_dim": DIM}, "compression": 1.0}
    config = OmegaConf.create({**values, "embedding": OmegaConf.load(path)})
    config.embedding.merge_with(changes)
    return instantiate(config).embedding()


def make_bags(backends: list, rows: list[int], *, pooling="sum", seed=0) -> EmbeddingBags:
    names = [f"C{i + 1}" for i in range(len(rows))]
    bags = dict(zip(names, backends, strict=True))
    return EmbeddingBags(bags, dict(zip(names, rows, strict=True)), pooling=pooling, seed=seed)


def make_batch(rows: list[int], batch_size=7, seed=0):
    """Multi-hot ids and offsets, and ids with one per bag: (ids, offsets), feature-major."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 5, (len(rows), batch_size))
    ids = np.concatenate([rng.integers(0, n, c.sum()) for n, c in zip(rows, counts, strict=True)])
    return torch.tensor(ids), torch.tensor([0, *counts.ravel().cumsum()])


def vectors(bags: EmbeddingBags, f: int, ids: torch.Tensor) -> torch.Tensor:
    """Feature f's vectors of ids, [ids, D]; every other feature looks up its id 0."""
    batch = torch.zeros(bags.num_features, len(ids), dtype=torch.int64)
    batch[f] = ids
    return bags(batch.flatten())[:, f]

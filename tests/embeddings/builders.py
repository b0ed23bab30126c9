"""Backends, collections and batches that more than one test file builds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from oracle import Case

from embeddings import Dense, EmbeddingBags, Hashed, Slab
from embeddings.arrangement import Lookup
from embeddings.backend import spread
from embeddings.ops import Pooling
from embeddings.reference import SEPARATOR

YAMLS = sorted((Path(__file__).parents[2] / "conf/embedding").glob("*.yaml"))
DIM = 16
each_yaml = pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)

OPTIONS = {  # of a yaml, beside what it says itself
    "hashed": [
        {"block": 1},
        {"block": 16},
        {"sign": True},
        {"shared": True},
        {"shared": True, "sign": True, "block": 4},
        {"hash": "affine", "block": 1},
    ],
    "bloom": [
        {"num_hashes": 1},
        {"num_hashes": 4, "combine": "mean"},
        {"num_hashes": 4, "combine": "learned"},
        {"num_hashes": 4, "hash": "murmur3"},
        {"num_hashes": 3, "hash": "murmur3", "combine": "learned"},
    ],
    "qr": [
        {"operation": "add"},
        {"operation": "concat"},
        {"operation": "concat", "dims": [12, 4]},
        {"operation": "mul", "partitions": 3},
        {"operation": "add", "partitions": 4},
        {"collisions": 4},
        {"operation": "concat", "collisions": 4},
        {"order": "legacy"},
        {"order": "legacy", "operation": "add", "partitions": 3},
    ],
}
CHOICES = [(path, changes) for path in YAMLS for changes in [{}, *OPTIONS.get(path.stem, [])]]
CHOICE_IDS = ["-".join([path.stem, *(f"{k}={v}" for k, v in changes.items())]) for path, changes in CHOICES]
each_choice = pytest.mark.parametrize("yaml, changes", CHOICES, ids=CHOICE_IDS)


def dense(accumulate="sorted"):
    return Dense(embedding_dim=DIM, compression=1.0, accumulate=accumulate, init="fair")


def hashed(compression=0.1, block=8, accumulate="sorted"):
    how = dict(embedding_dim=DIM, compression=compression, accumulate=accumulate, init="fair")
    return Hashed(**how, block=block, hash="mixed", sign=False, shared=False)


def from_yaml(path: Path, **changes):
    """A backend as train.py composes it: the yaml, and the values it interpolates."""
    values = {"model": {"embedding_dim": changes.pop("embedding_dim", DIM)}, "compression": 1.0}
    config = OmegaConf.create({**values, "embedding": OmegaConf.load(path)})
    assert not set(changes) - set(config.embedding), f"{path.name} has no such keys: {sorted(changes)}"
    config.embedding.merge_with(changes)
    return instantiate(config).embedding()


def named(name: str, **changes):
    """The backend of conf/embedding/<name>.yaml."""
    (path,) = (path for path in YAMLS if path.stem == name)
    return from_yaml(path, **changes)


def slots_of(backend, rows: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Feature -> slots of each of its slices, where all features with these numbers of rows have one backend."""
    return spread(dict.fromkeys(rows, backend), rows)


def make_slab(backends: dict, rows: list[int], *, positions=None, pooling=Pooling.SUM, seed=0) -> Slab:
    """A table for every feature; feature t at position t unless others are given."""
    places = range(len(rows)) if positions is None else positions
    lookups = [Lookup(name, name, position) for name, position in zip(backends, places, strict=True)]
    return Slab(backends, dict(zip(backends, rows, strict=True)), lookups, pooling=pooling, seed=seed)


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


def case_of(slab: Slab, ids, offsets, sample_weights, batch_size: int) -> tuple[Case, int]:
    """The call that a slab makes of its operator, and its pooling."""
    columns, *how, pooling = slab.layout
    batch = (slab.weight.detach(), ids, offsets, sample_weights, slab.tables, batch_size)
    return Case(*batch, columns, *how, SEPARATOR.join(slab.rows)), pooling

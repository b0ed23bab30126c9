"""What the benchmarks share: tables, ids, our backends, and how an optimizer gets to them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.synthetic import zipf_ids
from embeddings import QR, Bloom, Dense, EmbeddingBags, Fast, Hashed
from embeddings.backend import Backend

KAGGLE = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
KAGGLE += [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
TABLES = {"kaggle/10": [-(-n // 10) for n in KAGGLE], "1e6": [10**6], "1e7": [10**7]}
LAWS = {"uniform": 0.0, "zipf": 1.05}  # the k-th most frequent id comes as often as k ** -exponent
DENSE_BELOW = 1000  # as conf/config.yaml: smaller features are not worth compressing
SCATTER = 2654435761  # a prime above any table: times it, frequent ids are no neighbours in memory


class Bags(NamedTuple):
    """ids [F * B * bag], feature-major; offsets [F * B + 1]: every bag has as many ids."""

    ids: Tensor
    offsets: Tensor
    bag: int

    @property
    def arguments(self) -> tuple[Tensor, Tensor | None]:
        """Of our embeddings, which need no offsets where every bag has one id."""
        return self.ids, None if self.bag == 1 else self.offsets


class Draws:
    """Fresh batches, one per call: F features of `rows` ids, batch_size bags of `bag` ids each, by a law of LAWS.

    Drawn where they are used: made on the host, batches of a GPU take longer than what is measured on them."""

    def __init__(self, rows: list[int], *, law: str, bag: int, batch_size: int, device: str, seed: int = 0) -> None:
        self.rows, self.exponent, self.bag, self.batch_size = rows, LAWS[law], bag, batch_size
        self.sizes = np.array(rows)[:, None]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.shape = len(rows), batch_size * bag
        self.offsets = torch.arange(0, len(rows) * batch_size * bag + 1, bag, device=device)

    def __call__(self) -> Bags:
        how = {"generator": self.generator, "device": self.generator.device}
        uniform = torch.rand(self.shape, dtype=torch.float64, **how)
        sizes = torch.from_numpy(self.sizes).to(uniform.device)
        if self.exponent:
            ids = zipf_ids(uniform, self.sizes, self.exponent) * SCATTER % sizes
        else:
            ids = (uniform * sizes).long()
        return Bags(ids.flatten(), self.offsets, self.bag)


def backends(dim: int) -> dict[str, Backend]:
    """Ours by name. Those with blocks of 16 suit a cache line."""
    common = {"embedding_dim": dim, "accumulate": "rows", "init": "fair"}
    hashed = {"hash": "mixed", "sign": False, "shared": False, **common}
    qr = {"partitions": 2, "collisions": None, "order": "compose", "dims": None}
    return {
        "dense": Dense(compression=1.0, **common),
        "hashed 0.01 block 16": Hashed(block=16, compression=0.01, **hashed),
        "hashed 0.1 block 8": Hashed(block=8, compression=0.1, **hashed),
        "hashed 0.1 rows": Hashed(block=dim, compression=0.1, **hashed),
        "bloom 0.1": Bloom(num_hashes=2, combine="sum", hash="mixed", importance=0.1, compression=0.1, **common),
        "qr 0.1": QR(operation="mult", compression=0.1, **qr, **common),
        "fast": Fast(compression=1.0, **common | {"accumulate": "atomic"}),
    }


def make_bags(backend: Backend, rows: list[int], device: str = "cpu") -> EmbeddingBags:
    """Features C1, C2, ... of `rows` ids each under a backend; small ones stay dense."""
    dense = backends(backend.embedding_dim)["dense"]
    chosen = {f"C{i}": dense if backend.compresses and n < DENSE_BELOW else backend for i, n in enumerate(rows, 1)}
    return bags_on(device, chosen, dict(zip(chosen, rows, strict=True)))


def bags_on(device: str, backends: dict[str, Backend], rows: dict[str, int]) -> EmbeddingBags:
    """Sums of bags. On a GPU the weights are drawn there, all alike: a host takes seconds for a billion."""
    if device == "cpu":
        return EmbeddingBags(backends, rows, pooling="sum", seed=0)
    bags = EmbeddingBags(backends, rows, pooling="sum", seed=0, device="meta").to_empty(device=device)
    for slab in bags.slabs:
        nn.init.uniform_(slab.weight, -0.01, 0.01)
        slab.tables.copy_(torch.tensor(slab.arrangement.tables))
    return bags

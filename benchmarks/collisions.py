"""How many ids share their whole vector with another?  python -m benchmarks.collisions

100,000 ids x 16 numbers in 1/64 of their bytes, hashed with seed 0. What ids read is compared, so the counts are exact
and the same on every machine.
"""

import torch
from torch import Tensor

from embeddings import Bloom, EmbeddingBags, Hashed, index_map
from embeddings.backend import Backend
from embeddings.index_map import NUM_SLOTS, WIDTH
from embeddings.ops import IndexMap

NUM_IDS, DIM, COMPRESSION = 100_000, 16, 1 / 64


def backends() -> dict[str, Backend]:
    """Those that hash. Under `dense`, `fast` and `qr` no two ids read the same."""
    common = {"embedding_dim": DIM, "compression": COMPRESSION, "accumulate": "rows", "init": "fair"}
    hashed = {"hash": "mixed", "sign": False, "shared": False, **common}
    bloom = {"combine": "sum", "hash": "mixed", "importance": 0.1, **common}
    named = {f"`hashed`, block {block}": Hashed(block=block, **hashed) for block in (1, 2, 4, 8, 16)}
    named["`hashed`, block 8, `sign=true`"] = Hashed(block=8, **hashed | {"sign": True})
    named["`hashed`, block 1, `hash=affine`"] = Hashed(block=1, **hashed | {"hash": "affine"})
    return named | {f"`bloom`, K = {k}": Bloom(num_hashes=k, **bloom) for k in (1, 2, 3, 4)}


def num_sharing(kind: IndexMap, tables: Tensor) -> int:
    """The ids that read what another one reads. tables: [K, 9], of probes whose vectors are added."""
    ids, chunks = torch.arange(NUM_IDS), torch.arange(DIM // int(tables[0, WIDTH]))
    reads = []
    for table in tables:
        slots, signs = index_map.read(kind, ids, table.expand(NUM_IDS, -1), chunks)
        reads.append((slots + 1) * (1 if signs is None else signs))  # [N, C]
    reads = torch.stack(reads, 2).sort(2).values  # [N, C, K]: a sum is the same whichever probe read what
    _, counts = reads.flatten(1).unique(dim=0, return_counts=True)
    return int(counts[counts > 1].sum())


def main() -> None:
    print("| | slots | ids that share their vector |")
    print("|---|---|---|")
    for name, backend in backends().items():
        tables = EmbeddingBags({"C1": backend}, {"C1": NUM_IDS}, pooling="sum", seed=0).slabs[0].tables
        print_row(name, backend.index_map, tables)
        if backend.index_map == IndexMap.AFFINE:  # upstream spends no bytes on a table of slices and seeds
            tables[:, NUM_SLOTS] = int(NUM_IDS * DIM * COMPRESSION)
            print_row("HashedEmbeddingBag", backend.index_map, tables)


def print_row(name: str, kind: IndexMap, tables: Tensor) -> None:
    print(f"| {name} | {int(tables[0, NUM_SLOTS]):,} | {num_sharing(kind, tables):,} |", flush=True)


if __name__ == "__main__":
    main()

"""Is a lookup as fast as torch.nn.EmbeddingBag's?  python -m benchmarks.lookup [--device cuda]

Forward, and forward + backward with gradients of the touched rows, for one table and for Criteo Kaggle's 26 features
at a tenth of their rows. Fresh ids in every round (cold rows), uniform over the table.
"""

import argparse
from statistics import median

import torch
from torch import nn

from benchmarks.measure import interleave, record
from embeddings import QR, Bloom, Dense, EmbeddingBags, Fast, Hashed, native

KAGGLE = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
KAGGLE += [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
SHAPES = [  # rows per feature, dim, ids per bag, batch size
    ([1_000_000], 16, 1, 2048),
    ([1_000_000], 16, 10, 2048),
    ([1_000_000], 64, 1, 8192),
    ([-(-n // 10) for n in KAGGLE], 16, 1, 2048),
    ([-(-n // 10) for n in KAGGLE], 16, 1, 8192),
]
POOL = 16  # batches of ids, used in turn


class Torch(nn.Module):
    """The competitor: one nn.EmbeddingBag with sparse gradients per feature."""

    def __init__(self, rows: list[int], dim: int):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(n, dim, mode="sum", sparse=True) for n in rows)

    def forward(self, ids: list[torch.Tensor]) -> torch.Tensor:
        """ids: [B, bag] per feature -> [B, F, D]"""
        return torch.stack([bag(x) for bag, x in zip(self.bags, ids, strict=True)], 1)


def compare(rows: list[int], dim: int, bag: int, batch_size: int, *, device: str, rounds: int) -> list[dict]:
    """Times of each backend and of torch, and ratios torch / ours (above 1: ours is faster)."""
    names = {f"C{i + 1}": n for i, n in enumerate(rows)}
    common = {"embedding_dim": dim, "accumulate": "rows", "init": "fair"}
    hashing = {"hash": "mixed", "sign": False, "shared": False, "compression": 0.1, **common}
    qr = {"partitions": 2, "collisions": None, "order": "compose", "dims": None}
    backends = {
        "dense": Dense(compression=1.0, **common),
        "fast": Fast(compression=1.0, **common | {"accumulate": "atomic"}),
        "hashed block 8": Hashed(block=8, **hashing),
        "hashed rows": Hashed(block=dim, **hashing),
        "bloom": Bloom(num_hashes=2, combine="sum", hash="mixed", importance=0.1, compression=0.1, **common),
        "qr": QR(operation="mult", compression=0.1, **qr, **common),
    }
    large = {
        name: {f: backends["dense"] if n < 1000 and b.compresses else b for f, n in names.items()}
        for name, b in backends.items()
    }
    modules = {name: EmbeddingBags(b, names, pooling="sum", seed=0).to(device) for name, b in large.items()}
    peer = Torch(rows, dim).to(device)
    pool = [[torch.randint(n, (batch_size, bag), device=device) for n in rows] for _ in range(POOL)]
    flat = [torch.cat([x.flatten() for x in ids]) for ids in pool]
    offsets = None if bag == 1 else torch.arange(0, flat[0].numel() + 1, bag, device=device)

    def run(module, call, backward):
        def work(i: int) -> None:
            with torch.set_grad_enabled(backward):
                out = call(i)
            if backward:
                out.backward(torch.ones_like(out))
                module.zero_grad(set_to_none=True)

        return work

    results = []
    for backward in (False, True):
        competitors = {"torch": run(peer, lambda i: peer(pool[i % POOL]), backward)}
        for name, module in modules.items():
            call = lambda i, m=module: m(flat[i % POOL], offsets)  # noqa: E731
            competitors[name] = run(module, call, backward)
        times = interleave(competitors, rounds=rounds, device=device)
        seconds = {name: median(times) for name, times in times.items()}
        for name in modules:
            results.append(
                {
                    "features": len(rows),
                    "rows": sum(rows),
                    "dim": dim,
                    "bag": bag,
                    "batch_size": batch_size,
                    "work": "forward+backward" if backward else "forward",
                    "backend": name,
                    "microseconds": round(seconds[name] * 1e6, 1),
                    "torch_microseconds": round(seconds["torch"] * 1e6, 1),
                    "torch_over_ours": round(seconds["torch"] / seconds[name], 2),
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    native.load("require")
    rows = []
    for shape in SHAPES:
        rows += compare(*shape, device=options.device, rounds=options.rounds)
    header = ("features", "dim", "bag", "batch_size", "work", "backend", "microseconds", "torch_microseconds")
    print("  ".join(header), " torch_over_ours")
    for row in rows:
        print("  ".join(str(row[key]).rjust(len(key)) for key in header), f"{row['torch_over_ours']:.2f}".rjust(16))
    print(f"written to {record('lookup', options.device, rows)}")


if __name__ == "__main__":
    main()

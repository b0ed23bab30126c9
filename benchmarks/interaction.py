"""Is the fused dot interaction faster than bmm and a gather?  python -m benchmarks.interaction [--device cuda]

Forward, and forward + backward with respect to both inputs, for Criteo's 26 features and the dense vector. Competitors:
facebookresearch/dlrm's interact_features (bmm, then Z[:, li, lj] with lists of indices made in every call), and bmm
with one index_select of indices made once.
"""

import argparse
from statistics import median

import torch
from torch import Tensor

from benchmarks.measure import interleave, record
from embeddings import dot_interaction, native

NUM_FEATURES = 26
SHAPES = [(dim, batch_size) for dim in (16, 32, 64, 128) for batch_size in (128, 2048, 8192)]


def stacked(dense: Tensor, embedded: Tensor) -> Tensor:
    return torch.cat([dense, embedded.flatten(1)], dim=1).unflatten(1, (-1, dense.shape[1]))  # [B, V, D]


def facebook(dense: Tensor, embedded: Tensor) -> Tensor:
    """facebookresearch/dlrm, dlrm_s_pytorch.py, interact_features."""
    vectors = stacked(dense, embedded)
    products = torch.bmm(vectors, vectors.transpose(1, 2))
    row = torch.tensor([i for i in range(vectors.shape[1]) for j in range(i)])
    column = torch.tensor([j for i in range(vectors.shape[1]) for j in range(i)])
    return torch.cat([dense, products[:, row, column]], dim=1)


def make_index_select(device: str):
    row, column = torch.tril_indices(NUM_FEATURES + 1, NUM_FEATURES + 1, offset=-1, device=device)
    pairs = row * (NUM_FEATURES + 1) + column

    def index_select(dense: Tensor, embedded: Tensor) -> Tensor:
        vectors = stacked(dense, embedded)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return torch.cat([dense, products.index_select(1, pairs)], dim=1)

    return index_select


def compare(dim: int, batch_size: int, *, device: str, dtype: torch.dtype, rounds: int) -> list[dict]:
    """Times of all three, and ratios theirs / ours (above 1: ours is faster)."""
    dense = torch.randn(batch_size, dim, device=device, dtype=dtype, requires_grad=True)
    embedded = torch.randn(batch_size, NUM_FEATURES, dim, device=device, dtype=dtype, requires_grad=True)
    competitors = {"ours": dot_interaction, "facebook": facebook, "index_select": make_index_select(device)}
    grad = torch.randn_like(dot_interaction(dense, embedded))

    def run(function, backward):
        def work(i: int) -> None:
            with torch.set_grad_enabled(backward):
                out = function(dense, embedded)
            if backward:
                torch.autograd.grad(out, (dense, embedded), grad)

        return work

    results = []
    for backward in (False, True):
        times = interleave({n: run(f, backward) for n, f in competitors.items()}, rounds=rounds, device=device)
        seconds = {name: median(times) for name, times in times.items()}
        results.append(
            {
                "features": NUM_FEATURES,
                "dim": dim,
                "batch_size": batch_size,
                "dtype": str(dtype).removeprefix("torch."),
                "work": "forward+backward" if backward else "forward",
                **{f"{name}_microseconds": round(x * 1e6, 1) for name, x in seconds.items()},
                "facebook_over_ours": round(seconds["facebook"] / seconds["ours"], 2),
                "index_select_over_ours": round(seconds["index_select"] / seconds["ours"], 2),
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    native.load("require")
    rows = []
    for dtype in (torch.float32,) if options.device == "cpu" else (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            rows += compare(*shape, device=options.device, dtype=dtype, rounds=options.rounds)
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(str(row[key]).rjust(len(key)) for key in row))
    print(f"written to {record('interaction', options.device, rows)}")


if __name__ == "__main__":
    main()

"""Up to which share of touched rows is their own gradient cheaper?  python -m benchmarks.accumulate

Backward and optimizer step on the CPU, of a dense table of 1,000,000 x 16, with accumulate=rows and with =sorted, which
makes a gradient of the table's size. A batch has a given share of the rows, once each; fresh ids in every round. Where
the two cost the same is what SPARSE in embeddings/slab.py says.
"""

import argparse
import functools
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.measure import interleave, record
from embeddings import Dense, EmbeddingBags, native, optim

NUM_EMBEDDINGS, DIM = 1_000_000, 16
SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
OPTIMIZERS = {
    "sgd": functools.partial(optim.SGD, lr=0.1),
    "adagrad": functools.partial(optim.Adagrad, lr=0.02, eps=1e-8),
}
POOL = 4  # batches of ids, used in turn


def training(accumulate: str, make_optimizer: Callable, batches: list[Tensor]) -> Callable[[int], None]:
    """What is measured: backward and step, of a table of its own, on batch number i of batches."""
    backend = Dense(embedding_dim=DIM, compression=1.0, accumulate=accumulate, init="fair")
    bags = EmbeddingBags({"C1": backend}, {"C1": NUM_EMBEDDINGS}, pooling="sum", seed=0)
    (weight,) = bags.parameters()
    vectors = [bags(ids) for ids in batches]  # [B, 1, D]
    grad = torch.randn_like(vectors[0])
    trained = nn.Parameter(weight.data)  # the same memory: the kept graphs would refuse a change of `weight`
    optimizer = make_optimizer([trained])

    def work(i: int) -> None:
        vectors[i % POOL].backward(grad, retain_graph=True)
        trained.grad, weight.grad = weight.grad, None
        optimizer.step()
        trained.grad = None

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    native.load("require")
    rows = []
    print("share  optimizer  rows_milliseconds  sorted_milliseconds  sorted_over_rows")
    for share in SHARES:
        num_ids = int(share * NUM_EMBEDDINGS)
        batches = [torch.randperm(NUM_EMBEDDINGS)[:num_ids] for _ in range(POOL)]
        for name, make_optimizer in OPTIMIZERS.items():
            competitors = {how: training(how, make_optimizer, batches) for how in ("rows", "sorted")}
            seconds = interleave(competitors, rounds=options.rounds, device="cpu")
            ratio = median(b / a for a, b in zip(seconds["rows"], seconds["sorted"], strict=True))
            times = {f"{how}_milliseconds": round(median(seconds[how]) * 1e3, 2) for how in seconds}
            rows.append({"share": share, "optimizer": name, **times, "sorted_over_rows": round(ratio, 2)})
            print(
                f"{share:<5g}  {name:<9}  {times['rows_milliseconds']:17.2f}  {times['sorted_milliseconds']:19.2f}"
                f"  {ratio:16.2f}",
                flush=True,
            )
    print(f"written to {record('accumulate', 'cpu', rows)}")


if __name__ == "__main__":
    main()

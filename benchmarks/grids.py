"""Do the drop-in modules hold what their originals promised?  python -m benchmarks.grids [--quick]

The grids by which FastEmbedding, FastMultiEmbedding (RTB House, 2018) and HashedEmbeddingBag (2021) were measured, on
today's torch.nn: forward, a linear layer, sum and backward, dense gradients of whole tables, cleared each time.
  fast    one table; ids uniform, 2^-k, all the same, half binomial(n-1, 0.99), a fifth the same
  multi   ten or twenty tables of 1000, 5000, 10000, 50000 rows in turn, in eleven mixes of dims
  hashed  20,000 rows in 10,000 numbers of dim 16, bags of 0..6 ids; and dim 256 at 1/16, as dlrm_ssm
"""

import argparse
import gc
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.measure import (
    Progress,
    added_bytes,
    integers,
    interleave,
    make_parser,
    noted,
    ratio,
    read_options,
    record,
    words,
)
from dlrm import memory
from embeddings import FastEmbedding, FastMultiEmbedding, HashedEmbedding, HashedEmbeddingBag, native

IDS = {  # name -> ids of n rows, B of them
    "uniform": lambda n, b, draw: draw.integers(n, size=b),
    "halving": lambda n, b, draw: np.minimum(draw.geometric(0.5, b) - 1, n - 1),
    "same": lambda n, b, draw: np.full(b, n // 2),
    "half binomial": lambda n, b, draw: np.where(draw.random(b) < 0.5, draw.integers(n, size=b), _top(n, b, draw)),
    "a fifth the same": lambda n, b, draw: np.where(draw.random(b) < 0.2, 0, draw.integers(n, size=b)),
}
MULTI_DIMS = {
    "10XS": [1, 2, 4, 8, 1, 2, 4, 8, 1, 2],
    "20XS": [2, 4, 8] * 6 + [2, 4],
    "5S_5L": [4, 8, 16, 24, 32, 64, 96, 128, 192, 256],
    "5L_5S": [256, 192, 128, 96, 64, 32, 24, 16, 8, 4],
    "5S_5L_RND": [8, 96, 16, 32, 128, 64, 24, 256, 192, 4],
    "10S_10L_RND": [256, 4, 24, 96, 192, 64, 4, 128, 16, 64, 32, 128, 96, 24, 32, 256, 192, 8, 16, 8],
    "10S": [16, 8, 4, 24, 16, 24, 32, 8, 32, 4],
    "10S_UNEVEN": [17, 9, 5, 25, 17, 25, 33, 9, 33, 5],
    "20S": [16, 8, 4, 24, 16, 24, 32, 8, 32, 4] * 2,
    "10L": [128, 256, 64, 192, 256, 128, 96, 192, 64, 96],
    "10S_1L": [16, 8, 256, 4, 24, 16, 24, 32, 8, 32, 4],
}
MULTI_ROWS = (1000, 5000, 10000, 50000)
MULTI_IDS = {  # name -> the law of table t of that dim
    "all uniform": lambda t, dim: "uniform",
    "all half binomial": lambda t, dim: "half binomial",
    "all halving": lambda t, dim: "halving",
    "uniform and half binomial": lambda t, dim: ("uniform", "half binomial")[t % 2],
    "uniform and halving": lambda t, dim: ("uniform", "halving")[t % 2],
    "half binomial above dim 32": lambda t, dim: "half binomial" if dim > 32 else "uniform",
    "half binomial to dim 32": lambda t, dim: "half binomial" if dim <= 32 else "uniform",
}
HOT = {"grid": "fast", "dim": 8, "rows": 100_000, "batch_size": 16384, "ids": "same"}  # atomics on one row: the hardest
HASHED = {"sum": 16, "mean": 16, "max": 16, "single": 16, "sum, dim 256": 256}  # mode -> dim
SHORT = "--rows 1000,100000 --dims 32 --batches 2048 --mixes 10XS,10S_1L --multi-ids 'all uniform,all halving'"
SHORT += " --seconds 0.3"


def _top(n: int, batch_size: int, draw: np.random.Generator) -> np.ndarray:
    return draw.binomial(n - 1, 0.99, size=batch_size)


class Cell(NamedTuple):
    """make: name -> its module. inputs: fresh arguments that all take. width: of what all return."""

    label: dict[str, object]
    make: dict[str, Callable[[], nn.Module]]
    inputs: Callable[[], tuple[Tensor, ...]]
    width: int


class TorchMulti(nn.Module):
    """What FastMultiEmbedding replaces: an nn.Embedding per table, vectors side by side."""

    def __init__(self, rows: list[int], dims: list[int]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, dim) for n, dim in zip(rows, dims, strict=True))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([table(ids[:, t]) for t, table in enumerate(self.tables)], 1)


def fast_cells(options: argparse.Namespace, draw: np.random.Generator) -> Iterator[Cell]:
    for n, dim, batch_size, law in product(options.rows, options.dims, options.batches, IDS):
        yield Cell(
            {"grid": "fast", "rows": n, "dim": dim, "batch_size": batch_size, "ids": law},
            {"torch": partial(nn.Embedding, n, dim), "ours": partial(FastEmbedding, n, dim)},
            lambda n=n, b=batch_size, law=law: (torch.from_numpy(IDS[law](n, b, draw)),),
            dim,
        )


def multi_cells(options: argparse.Namespace, draw: np.random.Generator) -> Iterator[Cell]:
    for mix, batch_size, laws in product(options.mixes, options.batches, options.multi_ids):
        dims = MULTI_DIMS[mix]
        rows = [MULTI_ROWS[t % len(MULTI_ROWS)] for t in range(len(dims))]
        law_of = [MULTI_IDS[laws](t, dim) for t, dim in enumerate(dims)]

        def inputs(rows=rows, law_of=law_of, b=batch_size) -> tuple[Tensor]:
            columns = [IDS[law](n, b, draw) for n, law in zip(rows, law_of, strict=True)]
            return (torch.from_numpy(np.stack(columns, 1)),)

        yield Cell(
            {"grid": "multi", "dims": mix, "batch_size": batch_size, "ids": laws},
            {"torch": partial(TorchMulti, rows, dims), "ours": partial(FastMultiEmbedding, rows, dims)},
            inputs,
            sum(dims),
        )


def hashed_cells(options: argparse.Namespace, draw: np.random.Generator) -> Iterator[Cell]:
    num_bags, n = 2048, 20_000
    for (mode, dim), law in product(HASHED.items(), ("affine", "mixed")):
        ratio_kept = 10_000 / (n * dim) if dim == 16 else 1 / 16

        def bags(sizes=(0, 7)) -> tuple[Tensor, Tensor]:
            counts = draw.integers(*sizes, size=num_bags)
            offsets = np.cumsum(counts) - counts
            return torch.from_numpy(draw.integers(n, size=counts.sum())), torch.from_numpy(offsets)

        if mode == "single":
            theirs, mine = partial(nn.Embedding, n, dim), partial(HashedEmbedding, n, dim, ratio_kept, hash=law)
            inputs = lambda: (torch.from_numpy(draw.integers(n, size=num_bags)),)  # noqa: E731
        else:
            how = {"mode": mode.partition(",")[0]}
            theirs = partial(nn.EmbeddingBag, n, dim, **how)
            mine = partial(HashedEmbeddingBag, n, dim, ratio_kept, hash=law, **how)
            inputs = bags if dim == 16 else partial(bags, (1, 2))
        yield Cell({"grid": "hashed", "mode": mode, "hash": law}, {"torch": theirs, "ours": mine}, inputs, dim)


GRIDS = {"fast": fast_cells, "multi": multi_cells, "hashed": hashed_cells}


def measure(cell: Cell, options: argparse.Namespace) -> dict:
    """Both medians, torch's time over ours, and what each added to the process at its peak."""
    head = nn.Linear(cell.width, 1).to(options.device)
    modules: dict[str, nn.Module] = {}

    def ready(_: int) -> list[Tensor]:
        return [x.to(options.device) for x in cell.inputs()]

    def work(name: str, arguments: list[Tensor]) -> None:
        head(modules[name](*arguments)).sum().backward()
        modules[name].zero_grad(set_to_none=True)
        head.zero_grad(set_to_none=True)

    def begin(name: str) -> None:
        modules[name] = cell.make[name]().to(options.device)
        work(name, ready(0))

    peaks = {name: added_bytes(options.device, partial(begin, name)) for name in cell.make}
    competitors = {name: partial(work, name) for name in modules}
    how = {"rounds": options.rounds, "device": options.device, "budget": options.seconds}
    seconds = interleave(competitors, ready=dict.fromkeys(modules, ready), **how)
    times = {f"{name}_microseconds": round(median(x) * 1e6, 1) for name, x in seconds.items()}
    sizes = {f"{name}_peak_MiB": round(peak / memory.MIB, 2) for name, peak in peaks.items()}
    return cell.label | times | sizes | {"ratio": ratio(seconds["torch"], seconds["ours"])}


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    gc.freeze()  # what is loaded by now: looking through it for garbage, as added_bytes does, takes longer than a cell
    kernels = "compiled" if native.ensure() else "reference"
    print(f"kernels: {kernels}")
    draw = np.random.default_rng(0)
    cells = [cell for grid in options.grids for cell in GRIDS[grid](options, draw)]
    cells.sort(key=lambda cell: not HOT.items() <= cell.label.items())  # first, should time run out
    measure(cells[0], options)  # the first of a process loads code, which is no cell's memory
    progress, results, left_out = Progress(len(cells)), [], {}
    for cell in cells:
        label = ", ".join(map(str, cell.label.values()))
        with noted(left_out, label):
            results.append(row := measure(cell, options))
            progress.say(f"{label}: torch {row['torch_microseconds']:,.0f} us, {row['ratio'].median:.2f} of ours")
        facts = {"command": options.command, "kernels": kernels, "left_out": left_out}
        path = record("grids", options.device, results, **facts)
    print(f"written to {path}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=100, seconds=1.0)
    parser.add_argument("--grids", type=words, default=list(GRIDS))
    parser.add_argument("--rows", type=integers, default=[10, 1000, 10_000, 100_000])
    parser.add_argument("--dims", type=integers, default=[8, 32, 128])
    parser.add_argument("--batches", type=integers, default=[128, 2048, 16384])
    parser.add_argument("--mixes", type=words, default=list(MULTI_DIMS))
    parser.add_argument("--multi-ids", type=words, default=list(MULTI_IDS))
    return read_options(parser, "grids", arguments, SHORT)


if __name__ == "__main__":
    main()

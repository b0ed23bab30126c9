"""Is a lookup, its gradient and its update faster than the field's?  python -m benchmarks.lookup [--quick]

One table, or Criteo Kaggle's 26 at a tenth of their rows, against torch.nn.EmbeddingBag, with sparse gradients and,
where its table is small, dense ones, FBGEMM's TBE where fbgemm_gpu can be imported, and on CUDA a page of Triton. Fresh
ids for everybody in every round (cold rows), drawn outside the time. work: forward; forward+backward; or these and an
optimizer's update. Who fails at a cell is left out of it, and the row says why. Times are a caller's, Python included:
kernels alone are benchmarks.roof's.
"""

import argparse
import gc
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import bandwidth, peers
from benchmarks.measure import (
    Progress,
    integers,
    interleave,
    machine,
    make_parser,
    noted,
    ratio,
    read_options,
    record,
    wait,
    words,
)
from benchmarks.shapes import LAWS, TABLES, Draws, backends, make_bags
from embeddings import EmbeddingBags, native, optim

OPTIMIZERS = {
    "sgd": partial(optim.SGD, lr=peers.RATE),
    "adagrad": partial(optim.Adagrad, lr=peers.RATE, eps=peers.EPS),
    "rowwise_adagrad": partial(optim.RowWiseAdagrad, lr=peers.RATE, eps=peers.EPS),
    "adam": partial(optim.Adam, lr=peers.RATE, beta1=0.9, beta2=0.999, eps=peers.EPS),
}
WORKS = ("forward", "forward+backward", *OPTIMIZERS)
COPIES = {"adagrad": 2, "adam": 3}  # of a table, its optimizer's state included
MOST_BYTES = 7 << 30  # of all competitors' tables
MOST_NUMBERS = 1 << 27  # of a batch's vectors, for each competitor; on a GPU twice as many
MOST_IDS = 1 << 22
DENSE_BYTES = 1 << 26  # above, a dense gradient takes longer than any cell is worth
MakePeer = Callable[[Tensor | None], "Contender"]
MIX = ["dense", "hashed 0.01 block 16", "hashed 0.1 block 8", "bloom 0.1", "qr 0.1"]
SHORT = "--tables kaggle/10,1e6 --dims 16 --bags 1,10 --batches 2048 --laws uniform --seconds 0.6"
SHORT += " --backends 'dense,hashed 0.01 block 16' --works forward,sgd,adagrad,rowwise_adagrad"


class Contender:
    """A module with its optimizer, and how it takes a batch. ready: what a batch becomes before the time runs."""

    def __init__(
        self, module: nn.Module, ready, call, optimizer: torch.optim.Optimizer | None, *, is_fused: bool
    ) -> None:
        self.module, self.ready, self.call, self.optimizer = module, ready, call, optimizer
        self.is_fused = is_fused  # backward applies the update

    def work(self, grad: Tensor | None) -> Callable[[Any], None]:
        """What is timed, of what `ready` returned. grad: of the vectors, or None for the forward pass alone."""
        return self._forward if grad is None else partial(self.train, grad)

    @torch.no_grad()
    def _forward(self, arguments: Any) -> None:
        self.call(arguments)

    def train(self, grad: Tensor, arguments: Any) -> None:
        """Forward, backward, and the update if there is an optimizer."""
        vectors = self.call(arguments)
        vectors.backward(grad.view_as(vectors))
        if self.optimizer is None:
            self.module.zero_grad(set_to_none=True)
            return
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def ours(bags: EmbeddingBags, work: str) -> Contender:
    optimizer = OPTIMIZERS[work](bags.parameters()) if work in OPTIMIZERS else None
    if optimizer is not None:
        bags.fuse(optimizer)
    return Contender(bags, lambda batch: batch.arguments, lambda x: bags(*x), optimizer, is_fused=optimizer is not None)


def theirs(rows: list[int], dim: int, work: str, device: str) -> Iterator[tuple[str, MakePeer]]:
    """Each other library that can do this work: its name, and how it is made, of these weights or of its own.

    weights: [rows * D], or None."""
    updates = work in OPTIMIZERS

    def torch_peer(sparse: bool, weights: Tensor | None) -> Contender:
        weights = torch.empty(sum(rows) * dim, device=device).uniform_() if weights is None else weights
        parts = weights.split([n * dim for n in rows])
        module = peers.TorchBags([part.view(-1, dim) for part in parts], sparse=sparse)
        make = peers.TORCH_OPTIMIZERS[work][0 if sparse else 1] if updates else None
        optimizer = make(module.parameters(), lr=peers.RATE) if updates else None
        return Contender(module, module.ready, module, optimizer, is_fused=False)

    def fbgemm_peer(weights: Tensor | None) -> Contender:
        tbe = peers.make_tbe(rows, dim, work if updates else "sgd", device=device, weights=weights)
        return Contender(tbe, lambda batch: (batch.ids, batch.offsets), lambda x: tbe(*x), None, is_fused=updates)

    def compiled_peer(weights: Tensor | None) -> Contender:
        weights = torch.empty(sum(rows) * dim, device=device).uniform_() if weights is None else weights
        module = peers.GatheredBags(weights.view(-1, dim), rows, compiles=True)
        return Contender(module, lambda batch: batch, module, None, is_fused=False)

    def triton_peer(weights: Tensor | None) -> Contender:
        from benchmarks.triton_bag import TritonBags

        weights = torch.empty(sum(rows) * dim, device=device).uniform_() if weights is None else weights
        module = TritonBags(weights, rows, dim, peers.RATE)
        return Contender(module, lambda batch: batch, module, None, is_fused=updates)

    if not updates or work in peers.TORCH_OPTIMIZERS:
        yield "torch, sparse gradients", partial(torch_peer, True)
        if work != "forward" and sum(rows) * dim * 4 <= DENSE_BYTES:
            yield "torch, dense gradients", partial(torch_peer, False)
    if device != "cpu" and importlib.util.find_spec("triton"):
        if work == "forward":
            yield "torch.compile", compiled_peer
        if work in ("forward", "sgd"):
            yield "triton", triton_peer
    if peers.HAS_FBGEMM and (work == "forward" or work in peers.FBGEMM_OPTIMIZERS):
        yield "fbgemm", fbgemm_peer


def contenders(rows: list[int], dim: int, work: str, options) -> tuple[dict[str, Contender], dict[str, str]]:
    """All that can be made by name, and why others are left out."""
    left_out: dict[str, str] = {}
    made: dict[str, Contender] = {}
    for name in options.backends:
        with noted(left_out, name):
            made[name] = ours(make_bags(backends(dim)[name], rows, options.device), work)
    table = sum(rows) * dim * 4
    copies = COPIES.get(work, 1)
    held = table * copies
    flat = made["dense"].module.slabs[0].weight.detach().view(-1) if "dense" in made else None
    for name, make in theirs(rows, dim, work, options.device):
        # where tables of their own do not fit, all have the same memory, and rows stay cold: each has ids of its own
        is_shared = flat is not None and held + table * copies > MOST_BYTES
        held += table * (copies - is_shared)
        if held > MOST_BYTES:
            left_out[name] = f"more than {MOST_BYTES >> 30} GiB"
            held -= table * (copies - is_shared)
        else:
            with noted(left_out, name):
                made[name] = make(flat if is_shared else None)
    return made, left_out


def cells(rows: list[int], dim: int, options) -> list[tuple[str, int, int]]:
    """Law, bag and batch size of every cell whose batch is not too large."""
    most = MOST_NUMBERS << (options.device != "cpu")
    return [
        (law, bag, batch_size)
        for law, bag, batch_size in product(options.laws, options.bags, options.batches)
        if len(rows) * batch_size * bag <= MOST_IDS and len(rows) * batch_size * dim <= most
    ]


def time_all(made: dict[str, Contender], draws: Draws, grad: Tensor | None, options) -> dict[str, list[float]]:
    """Seconds of each round, everybody's on draws of his own."""
    return interleave(
        {name: contender.work(grad) for name, contender in made.items()},
        ready={name: lambda _, c=contender: c.ready(draws()) for name, contender in made.items()},
        rounds=options.rounds,
        device=options.device,
        budget=options.seconds,
    )


def measure(made: dict[str, Contender], left_out: dict[str, str], rows, dim: int, work: str, cell, options) -> dict:
    """Medians in microseconds and, for each of ours, the fastest peer's time over its own, of all that can do it.

    rows: of each table; left_out: who could not be made, and why."""
    law, bag, batch_size = cell
    draws = Draws(rows, law=law, bag=bag, batch_size=batch_size, device=options.device)
    grad = None if work == "forward" else torch.randn(batch_size, len(rows), dim, device=options.device)
    left_out = dict(left_out)
    if options.device != "cpu":
        torch.compiler.reset()  # or its second shape is compiled for any
    for name, contender in made.items():
        with noted(left_out, name):
            contender.work(grad)(contender.ready(draws()))
            wait(options.device)
    made = {name: contender for name, contender in made.items() if name not in left_out}
    seconds = time_all(made, draws, grad, options)
    medians = {name: median(times) for name, times in seconds.items()}
    row = {"dim": dim, "bag": bag, "ids": law, "batch_size": batch_size, "work": work}
    row |= {"rounds": min(map(len, seconds.values()), default=0), "left_out": left_out}
    row["fused"] = [name for name in made if made[name].is_fused]
    row |= {"microseconds": {name: round(time * 1e6, 1) for name, time in medians.items()}}
    others = [name for name in made if name not in options.backends]
    if others:
        row["best_peer"] = best = min(others, key=medians.get)
        row["ratio"] = {name: ratio(seconds[best], seconds[name]) for name in made if name in options.backends}
    return row


def share_of_measured(row: dict, rows: list[int], rates: bandwidth.Rates | None) -> dict[str, float]:
    """What the machine needs to read and write so many random rows, over the time taken: of whole tables alone."""
    if rates is None or row["ids"] != "uniform" or row["work"] in ("forward+backward", "adam"):
        return {}
    width, table = row["dim"] * 4, max(rows) * row["dim"] * 4
    nanoseconds = rates.of("copy" if row["bag"] == 1 else "read", width, table)
    if row["work"] != "forward":
        nanoseconds += rates.of("update", width, table) * (2 if row["work"] == "adagrad" else 1)
    if row["work"] == "rowwise_adagrad":
        nanoseconds += rates.of("update", 64, max(rows) * 4)  # a number of state, which is a cache line
    limit = nanoseconds * len(rows) * row["batch_size"] * row["bag"] / 1e3
    whole = ("dense", "torch, sparse gradients", "fbgemm")
    return {name: round(limit / time, 2) for name, time in row["microseconds"].items() if name in whole}


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    kernels = "compiled" if native.ensure() else "reference"
    print(f"kernels: {kernels}; fbgemm: {peers.HAS_FBGEMM}")
    rates = bandwidth.read(machine(options.device)["device"])
    plan = list(product(options.tables, options.dims, options.works))
    progress = Progress(sum(len(cells(TABLES[tables], dim, options)) for tables, dim, _ in plan))
    results = []
    for tables, dim, work in plan:
        rows = TABLES[tables]
        if sum(rows) * dim * 4 * COPIES.get(work, 1) > MOST_BYTES:
            print(f"{tables} x {dim}, {work}: left out, more than {MOST_BYTES >> 30} GiB")
            progress.total -= len(cells(rows, dim, options))
            continue
        made, left_out = contenders(rows, dim, work, options)
        for cell in cells(rows, dim, options):
            row = {"tables": tables} | measure(made, left_out, rows, dim, work, cell, options)
            row["share_of_measured"] = share_of_measured(row, rows, rates)
            results.append(row)
            path = record("lookup", options.device, results, command=options.command, kernels=kernels)
            times = ", ".join(f"{name} {time:,.0f}" for name, time in row["microseconds"].items())
            progress.say(f"{tables} x {dim}, {cell[0]}, bag {cell[1]}, batch {cell[2]}, {work}, us: {times}")
        del made
        gc.collect()
    print(f"written to {path}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=50, seconds=2.0)
    parser.add_argument("--tables", type=words, default=list(TABLES))
    parser.add_argument("--dims", type=integers, default=[16, 64, 128])
    parser.add_argument("--bags", type=integers, default=[1, 10, 50])
    parser.add_argument("--batches", type=integers, default=[128, 2048, 8192, 65536])
    parser.add_argument("--laws", type=words, default=list(LAWS))
    parser.add_argument("--works", type=words, default=list(WORKS))
    parser.add_argument("--backends", type=words, default=MIX)
    return read_options(parser, "lookup", arguments, SHORT)


if __name__ == "__main__":
    main()

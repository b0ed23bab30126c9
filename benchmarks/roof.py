"""How near are the kernels to what the machine can do?  python -m benchmarks.roof --device cuda

The GPU's own time: a CUDA graph holds a kernel's calls on several sets of ids, events time its replays, each on fresh
ids, so that rows are cold, and the median counts. (On a CPU: the clock, around the same calls.) One uniform id per bag,
fp32, of Criteo Kaggle's 26 tables at a tenth of their rows and of one of 1e7. The gradient of touched rows, whose
length the host must know, is in no graph. What the machine can do is measured alike, in turn with the kernels:
  copy    a block into another
  gather  as many random rows of the dense tables, copied out side by side: torch.index_select, and Triton
  rmw     as many random rows, none twice, with a row added to each: index_add_, and Triton
Columns: us and num_bytes (benchmarks.predicted's count) of a call; GB_per_s, these over that; of_copy, its share of the
copy's; of_rows, of the faster gather's for the forward pass and of the faster rmw's for the others; predicted_us: the
bytes at the copy's rate, or 2 us a launch if that is more. Goals, of dense tables: predicted_us / us of at least 0.8
for the forward pass and 0.7 for fused updates. Tables that lie in the L2 cache may be above 1.
"""

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.lookup import OPTIMIZERS
from benchmarks.measure import Progress, integers, make_parser, noted, read_options, record, words
from benchmarks.predicted import FLOAT, LAUNCH, lookups, sectors
from benchmarks.shapes import TABLES, Draws, backends, make_bags
from dlrm.graph import CudaGraphs
from embeddings import EmbeddingBags, native
from embeddings.ops import Accumulate, weights_gradient

MIX = ["dense", "hashed 0.01 block 16", "bloom 0.1", "qr 0.1"]
GRADIENT = "gradient of touched rows"
HEAD_START = 1 << 20  # cycles, some 0.6 ms, that the GPU waits first: the host launches the graph in them
SHORT = "--tables kaggle/10 --dims 16 --batches 2048 --backends dense --mebibytes 256"


class Work(NamedTuple):
    """A kernel, or what bounds one: call(ids) is launched for each set that `fresh` has filled."""

    name: tuple[str, str]  # whose, which
    num_bytes: int
    launches: int
    fresh: Callable[[], None]
    call: Callable[[Tensor], object]
    captures: bool = True
    counted: Callable[[], AbstractContextManager] = nullcontext  # around a capture


class Sets:
    """Sets of ids, int32 [F * B] each, filled anew in place, where graphs read them."""

    def __init__(self, rows: list[int], batch_size: int, device: str) -> None:
        self.draws = Draws(rows, law="uniform", bag=1, batch_size=batch_size, device=device)
        self.firsts = torch.tensor([0, *rows[:-1]], device=device).cumsum(0)[:, None]
        self.num_rows = sum(rows)
        num_sets = max(4, min(32, (1 << 17) // batch_size))
        self.ids = [self.draws().ids.int() for _ in range(num_sets)]

    def of_features(self) -> None:
        """Of each feature's own rows."""
        for ids in self.ids:
            ids.copy_(self.draws().ids)

    def of_all(self) -> None:
        """The same as rows of all tables, one after the other."""
        for ids in self.ids:
            ids.copy_((self.draws().ids.view(len(self.firsts), -1) + self.firsts).flatten())

    def apart(self) -> None:
        """Of these, none twice in a set. There must be as many."""
        for ids in self.ids:
            ids.copy_(torch.randperm(self.num_rows, device=ids.device)[: len(ids)])


def roofs(table: Tensor, sets: Sets, mebibytes: int) -> Iterator[Work]:
    """table: [sum(rows), D]."""
    source, copy = table.new_zeros(2, mebibytes << 18)
    yield Work(("torch", "copy"), 2 * source.nbytes, 1, lambda: None, lambda ids: copy.copy_(source))
    num_ids, row = len(sets.ids[0]), sectors(table.shape[1] * FLOAT)
    side = table.new_zeros(num_ids, table.shape[1])
    gather = partial(Work, num_bytes=num_ids * (4 + 2 * row), launches=1, fresh=sets.of_all)
    rmw = partial(Work, num_bytes=num_ids * (4 + 3 * row), launches=1, fresh=sets.apart)
    yield gather(("torch", "gather"), call=lambda ids: torch.index_select(table, 0, ids, out=side))
    yield rmw(("torch", "rmw"), call=lambda ids: table.index_add_(0, ids, side))
    if table.is_cuda and importlib.util.find_spec("triton"):
        from benchmarks import triton_rows

        yield gather(("triton", "gather"), call=lambda ids: triton_rows.gather(table, ids, side))
        yield rmw(("triton", "rmw"), call=lambda ids: triton_rows.add_(table, ids, side))


def ours(backend: str, bags: EmbeddingBags, grad: Tensor, sets: Sets) -> Iterator[Work]:
    """Every call on a collection. grad: [B, F * D]."""
    counts: dict[str, tuple[int, int]] = {}  # kernel -> bytes and launches of all slabs
    for slab in bags.slabs:
        units, width = slab.weight.shape
        how = {"probes": slab.layout[1], "chunks": bags.embedding_dim // width}
        for kernel, *count in lookups(len(slab.rows) * len(grad), units, bags.embedding_dim, **how):
            counts[kernel] = tuple(map(sum, zip(counts.get(kernel, (0, 0)), count, strict=True)))

    def each_slab(call: Callable, ids: Tensor) -> None:
        for slab in bags.slabs:
            call(grad, slab.weight, (ids, None, None, slab.tables), slab.layout[1:], slab.arrangement.features)

    def gradient(grad, weight, batch, layout, features) -> None:
        weights_gradient(grad, weight, batch, layout, int(Accumulate.ROWS), features)

    def work(kernel: str, call: Callable, **how) -> Work:
        return Work((backend, kernel), *counts[kernel], sets.of_features, call, **how)

    yield work("forward", bags)
    yield work(GRADIENT, partial(each_slab, gradient), captures=False)
    for name, make in OPTIMIZERS.items():
        optimizer = make(bags.parameters())
        yield work(f"fused {name}", partial(each_slab, optimizer.step_fused), counted=optimizer.counted)


def works(rows: list[int], dim: int, sets: Sets, failures: dict[tuple[str, str], str], options) -> Iterator[Work]:
    """The roofs, then every backend's calls."""
    grad = torch.randn(sets.draws.batch_size, len(rows) * dim, device=options.device)
    with noted(failures, ("roofs", "all")):
        yield from roofs(grad.new_empty(sum(rows), dim).uniform_(-0.01, 0.01), sets, options.mebibytes)
    for backend in options.backends:
        with noted(failures, (backend, "all")):
            yield from ours(backend, make_bags(backends(dim)[backend], rows, options.device), grad, sets)


def timer(work: Work, sets: list[Tensor], graphs: CudaGraphs | None) -> Callable[[], float]:
    """A function: the seconds of a call, the mean over one on each set. graphs: None on a CPU."""

    def run() -> None:
        for ids in sets:
            work.call(ids)

    def by_clock() -> float:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) / len(sets)

    work.fresh()
    if graphs is None:
        work.call(sets[0])
        return by_clock
    graphs.warm_up(lambda: work.call(sets[0]))
    launch = run
    if work.captures:
        with work.counted():
            launch = graphs.capture(run)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def by_events() -> float:
        torch.cuda._sleep(HEAD_START)
        begin.record()
        launch()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(sets)

    return by_events


@torch.no_grad()
def measure(rows: list[int], dim: int, batch_size: int, options: argparse.Namespace) -> list[dict]:
    """A row for each roof, each call, and each that failed."""
    graphs = None if options.device == "cpu" else CudaGraphs(options.device)
    sets = Sets(rows, batch_size, options.device)
    failures: dict[tuple[str, str], str] = {}
    timers: dict[Work, Callable[[], float]] = {}
    for work in works(rows, dim, sets, failures, options):
        with noted(failures, work.name):
            timers[work] = timer(work, sets.ids, graphs)
    seconds: dict[Work, list[float]] = {work: [] for work in timers}
    for i in range(options.rounds):
        for work in list(timers)[:: 1 if i % 2 else -1]:
            if work.name not in failures:
                with noted(failures, work.name):
                    work.fresh()
                    seconds[work].append(timers[work]())
    medians = {work: median(times) for work, times in seconds.items() if work.name not in failures}
    failed = [{"backend": whose, "kernel": which, "error": why} for (whose, which), why in failures.items()]
    return shares(medians) + failed


def shares(medians: dict[Work, float]) -> list[dict]:
    """Of each its rate, and what that is of the roofs'. medians: seconds of a call."""
    rates = {work: work.num_bytes / seconds for work, seconds in medians.items()}
    best: dict[str, float] = {}  # bytes per second of each roof
    for work, rate in rates.items():
        best[work.name[1]] = max(best.get(work.name[1], 0), rate)
    rows = []
    for work, rate in rates.items():
        backend, kernel = work.name
        row = {"backend": backend, "kernel": kernel, "us": round(medians[work] * 1e6, 2), "num_bytes": work.num_bytes}
        row |= {"GB_per_s": round(rate / 1e9, 1), "captured": work.captures}
        of_rows = "gather" if kernel in ("forward", "gather") else "rmw"
        if "copy" in best:
            row["of_copy"] = round(rate / best["copy"], 3)
            row["predicted_us"] = round(max(work.num_bytes / best["copy"], work.launches * LAUNCH) * 1e6, 2)
        if of_rows in best and kernel != "copy":
            row["of_rows"] = round(rate / best[of_rows], 3)
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    gc.freeze()  # what is loaded by now: every capture looks for garbage
    kernels = "compiled" if native.ensure() else "reference"
    plan = list(product(options.tables, options.dims, options.batches))
    progress, results = Progress(len(plan)), []
    for tables, dim, batch_size in plan:
        cell = {"tables": tables, "dim": dim, "batch_size": batch_size}
        found = measure(TABLES[tables], dim, batch_size, options)
        results += [cell | row for row in found]
        path = record("roof", options.device, results, command=options.command, kernels=kernels)
        rates = ", ".join(f"{row['backend']} {row['kernel']} {row['GB_per_s']:,.0f}" for row in found if "us" in row)
        progress.say(f"{tables} x {dim}, batch {batch_size}, GB/s: {rates}")
        gc.collect()
    print(f"written to {path}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=7, seconds=0)
    parser.add_argument("--tables", type=words, default=["kaggle/10", "1e7"])
    parser.add_argument("--dims", type=integers, default=[16, 64, 128])
    parser.add_argument("--batches", type=integers, default=[2048, 65536])
    parser.add_argument("--backends", type=words, default=MIX)
    parser.add_argument("--mebibytes", type=int, default=512, help="of the block that is copied")
    return read_options(parser, "roof", arguments, SHORT)


if __name__ == "__main__":
    main()

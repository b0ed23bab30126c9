"""What grows with what?  python -m benchmarks.growth [--quick]

Step time (lookup, backward and row-wise Adagrad's update, fused where it can be) and memory, counted and measured,
against
  rows     of one table: dense, and hashed and bloom in the bytes of 1e6 numbers, up to 1e9 virtual rows
  batch    samples of a step, one table of 1e6 rows
  tables   number of tables, 1e6 rows and 8192 ids in all
of dim 16 with uniform fresh ids. Predicted: hashed and bloom take the same time and bytes whatever the rows.
"""

import argparse
import gc
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks import peers
from benchmarks.lookup import Contender, ours, theirs
from benchmarks.measure import Progress, added_bytes, integers, interleave, make_parser, read_options, record
from benchmarks.shapes import Draws, backends, make_bags
from dlrm import memory
from embeddings import Bloom, EmbeddingBags, Hashed, native
from embeddings.backend import Backend

DIM, BATCH, ROWS = 16, 8192, 10**6
NUMBERS = 10**6  # weights of a compressed table, whatever its rows
DENSE_ROWS = 10**7  # at most
WORK = "rowwise_adagrad"
SHORT = "--rows 10000,1000000,1000000000 --batches 128,8192 --tables 1,100 --seconds 0.3"


def choices(num_rows: int) -> dict[str, Backend]:
    """Ours by name, for num_rows in all."""
    how = {"embedding_dim": DIM, "compression": min(1.0, NUMBERS / (num_rows * DIM)), "accumulate": "rows"}
    small = {"hashed": Hashed(block=DIM, **how), "bloom": Bloom(num_hashes=2, **how)}
    return ({"dense": backends(DIM)["dense"]} if num_rows <= DENSE_ROWS else {}) | small


def build(rows: list[int], draws: Draws, device: str) -> tuple[dict[str, Contender], dict[str, int]]:
    """Contenders, and what each added to the process (or the GPU) at its peak, a few steps of it included, in bytes."""
    makers = {name: lambda b=b: ours(make_bags(b, rows, device), WORK) for name, b in choices(sum(rows)).items()}
    if sum(rows) <= DENSE_ROWS:
        for name, make in theirs(rows, DIM, WORK, device):
            makers[name] = partial(make, None)
    made: dict[str, Contender] = {}
    grad = torch.randn(draws.batch_size, len(rows), DIM, device=device)

    def begin(name: str) -> None:
        made[name] = makers[name]()
        for _ in range(3):
            made[name].train(grad, made[name].ready(draws()))

    return made, {name: added_bytes(device, partial(begin, name)) for name in makers}


class Point(NamedTuple):
    """A value on an axis."""

    value: int
    rows: list[int]
    batch_size: int


def measure(axis: str, points: list[Point], options: argparse.Namespace) -> list[dict]:
    """A row for each contender at each point; all of an axis run in turn, so that a slow moment bends no curve."""
    made: dict[tuple[int, str], Contender] = {}
    peaks: dict[tuple[int, str], int] = {}
    works, ready = {}, {}
    for value, rows, batch_size in points:
        draws = Draws(rows, law="uniform", bag=1, batch_size=batch_size, device=options.device)
        grad = torch.randn(batch_size, len(rows), DIM, device=options.device)
        contenders, added = build(rows, draws, options.device)
        for name, contender in contenders.items():
            key = value, name
            made[key], peaks[key], works[key] = contender, added[name], contender.work(grad)
            ready[key] = lambda _, c=contender, d=draws: c.ready(d())
        print(f"{axis} {value:,}: built", flush=True)
    budget = options.seconds * len(points)
    seconds = interleave(works, ready=ready, rounds=options.rounds, device=options.device, budget=budget)
    results = []
    for (value, name), contender in made.items():
        row = {"axis": axis, "value": value, "name": name, "fused": contender.is_fused}
        row["microseconds"] = round(median(seconds[value, name]) * 1e6, 1)
        if isinstance(contender.module, EmbeddingBags):
            state = memory.optimizer_bytes(contender.optimizer)
            row["counted_MiB"] = round((contender.module.num_bytes() + state) / memory.MIB, 2)
        results.append(row | {"peak_MiB": round(peaks[value, name] / memory.MIB, 1)})
    return results


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    gc.freeze()  # what is loaded by now: looking through it for garbage, as added_bytes does, takes longer than a cell
    kernels = "compiled" if native.ensure() else "reference"
    print(f"kernels: {kernels}; fbgemm: {peers.HAS_FBGEMM}")
    plan = {
        "rows": [Point(n, [n], BATCH) for n in options.rows],
        "batch": [Point(n, [ROWS], n) for n in options.batches],
        "tables": [Point(n, [ROWS // n] * n, BATCH // n) for n in options.tables],
    }
    build(
        [100], Draws([100], law="uniform", bag=1, batch_size=128, device=options.device), options.device
    )  # loads code
    progress, results = Progress(len(plan)), []
    for axis, points in plan.items():
        found = measure(axis, points, options)
        results += found
        for point in points:
            rows = [row for row in found if row["value"] == point.value]
            words = ", ".join(f"{row['name']} {row['microseconds']:,.0f} us {row['peak_MiB']:,} MiB" for row in rows)
            print(f"{axis} {point.value:,}: {words}")
        progress.say(axis)
        path = record("growth", options.device, results, command=options.command, kernels=kernels)
    print(f"written to {path}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=100, seconds=3.0)
    parser.add_argument("--rows", type=integers, default=[10**k for k in range(4, 10)])
    parser.add_argument("--batches", type=integers, default=[128, 512, 2048, 8192, 32768, 65536])
    parser.add_argument("--tables", type=integers, default=[1, 10, 26, 100, 1000])
    return read_options(parser, "growth", arguments, SHORT)


if __name__ == "__main__":
    main()

"""Interleaved timing, what a set of times says, and the record that every result carries."""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from dlrm import memory
from dlrm.run_folder import git_commit

RESULTS = Path(__file__).parent / "results"
commit = functools.cache(git_commit)
WARM_UP, LEAST = 2, 5  # rounds that are not counted; counted ones that a budget cannot take away
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "GLIBC_TUNABLES",
    "THP_MEM_ALLOC_ENABLE",
    "LD_PRELOAD",
)


def interleave(
    competitors: dict[str, Callable[[Any], object]],
    *,
    rounds: int,
    device: str,
    budget: float = math.inf,
    ready: dict[str, Callable[[int], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each competitor in each round; all run in turn in every round, so that a slow moment hits all alike.

    Every other round runs them backwards, so that none always follows the same one. The first two rounds warm up.
    competitors: name -> function of the round's number, or of what `ready` makes of that, outside the time.
    budget: seconds after which no further round begins.
    """
    seconds = {name: [] for name in competitors}
    began = time.perf_counter()
    for i in range(rounds + WARM_UP):
        if i >= WARM_UP + LEAST and time.perf_counter() - began > budget:
            break
        for name in list(competitors)[:: 1 if i % 2 else -1]:
            argument = i if ready is None else ready[name](i)
            wait(device)
            start = time.perf_counter()
            competitors[name](argument)
            wait(device)
            stop = time.perf_counter()
            if i >= WARM_UP:
                seconds[name].append(stop - start)
    return seconds


@contextlib.contextmanager
def noted(failures: dict, name: object) -> Iterator[None]:
    """Whatever fails inside is said, with its first line in failures[name], and is no end: others are measured."""
    try:
        yield
    except Exception as error:
        failures[name] = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        print(f"{name} is left out: {failures[name]}", flush=True)


def wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def added_bytes(device: str, work: Callable[[], object]) -> int:
    """By how much work raised the peak of this process, on a GPU of its allocator, above what was in use before."""
    memory.reset_peak(device)
    before = memory.peak_bytes(device)
    work()
    return memory.peak_bytes(device) - before


class Ratio(NamedTuple):
    """The median of paired ratios, and its 95 % interval by order statistics, which supposes no distribution."""

    median: float
    low: float
    high: float


def ratio(theirs: list[float], ours: list[float]) -> Ratio:
    """Their seconds over ours, round by round: above 1, ours is faster."""
    ratios = sorted(a / b for a, b in zip(theirs, ours, strict=True))
    skip = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))  # 0.98: 1.96 sigma of Binomial(n, 1/2)
    return Ratio(*(round(value, 3) for value in (median(ratios), ratios[skip], ratios[-1 - skip])))


class Progress:
    """Says each cell as it is done, with the time that the others will take at this pace."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.began = total, 0, time.perf_counter()

    def say(self, line: str) -> None:
        self.done += 1
        left = (time.perf_counter() - self.began) / self.done * (self.total - self.done)
        print(f"{self.done}/{self.total}, {left:,.0f} s left: {line}", flush=True)


def make_parser(description: str, *, rounds: int, seconds: float) -> argparse.ArgumentParser:
    """With the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="the short set")
    parser.add_argument("--rounds", type=int, default=rounds, help="at most, for each cell")
    parser.add_argument("--seconds", type=float, default=seconds, help="after which a cell begins no further round")
    return parser


def read_options(
    parser: argparse.ArgumentParser, name: str, arguments: list[str] | None, short: str
) -> argparse.Namespace:
    """arguments, or the command line's; `short` is what --quick stands for. command: what is to be recorded."""
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args([*(shlex.split(short) if "--quick" in given else ()), *given])
    options.command = shlex.join(["python", "-m", f"benchmarks.{name}", *given])
    return options


def integers(text: str) -> list[int]:
    """Of an option: 128,2048 -> [128, 2048]."""
    return [int(word) for word in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def machine(device: str) -> dict:
    """What a number depends on: device, torch, threads, commit and date, and who else was there."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit() or os.environ.get("COMMIT", "unknown"),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "load_average": round(os.getloadavg()[0], 1),  # processes that ran or waited to, in the last minute: ours too
    }


def results_folder() -> Path:
    return Path(os.environ.get("OUT") or RESULTS)


def record(name: str, device: str, rows: list[dict], **facts: object) -> Path:
    """Write rows with the machine's facts, and these, to $OUT, or benchmarks/results/, as NAME-DEVICE.json.

    Called after each cell, so that a run that is stopped leaves its rows."""
    results_folder().mkdir(parents=True, exist_ok=True)
    path = results_folder() / f"{name}-{'cpu' if device == 'cpu' else 'cuda'}.json"
    unfinished = path.with_suffix(".part")
    unfinished.write_text(as_text(machine(device) | facts, rows))
    return unfinished.replace(path)


def as_text(facts: dict, rows: list[dict]) -> str:
    """The JSON of a record, a line for each fact and each row."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in facts.items()]
    lines.append('"rows": [\n  ' + ",\n  ".join(map(json.dumps, rows)) + "\n ]")
    return "{\n " + ",\n ".join(lines) + "\n}\n"

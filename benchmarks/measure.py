"""Interleaved timing and the record that every result carries."""

import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from dlrm.run_folder import git_commit

RESULTS = Path(__file__).parent / "results"


def interleave(competitors: dict[str, Callable[[int], object]], *, rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each competitor in each round; all run in turn in every round, so that a slow moment hits all alike.

    competitors: name -> function of the round's number, which picks fresh ids. The first two rounds warm up.
    """
    seconds = {name: [] for name in competitors}
    for i in range(rounds + 2):
        for name, work in competitors.items():
            _wait(device)
            began = time.perf_counter()
            work(i)
            _wait(device)
            if i >= 2:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def machine(device: str) -> dict:
    """What a number depends on: device, torch, threads, commit and date."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else f"{cpu}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git_commit() or os.environ.get("COMMIT", "unknown"),
        "date": datetime.now(UTC).date().isoformat(),
    }


def record(name: str, device: str, rows: list[dict]) -> Path:
    """Write rows with the machine's facts to $OUT, or benchmarks/results/, as NAME-DEVICE.json."""
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{'cpu' if device == 'cpu' else 'cuda'}.json"
    path.write_text(json.dumps(machine(device) | {"rows": rows}, indent=1) + "\n")
    return path

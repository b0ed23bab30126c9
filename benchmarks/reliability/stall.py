"""What do checkpoints cost a run while it goes on?  python -m benchmarks.reliability.stall

Samples a second of two epochs of the default data with checkpoint.every=100 over those without, in turn.
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.measure import ratio
from benchmarks.reliability.runs import ROOT, finish, report


def samples_per_second(folder: Path, *more: str) -> float:
    words = [sys.executable, str(ROOT / "train.py"), "trainer.epochs=2", "embedding=dense", f"hydra.run.dir={folder}"]
    status, text = finish([*words, *more])
    if status:
        raise RuntimeError(text)
    return json.loads((folder / "summary.json").read_text())["samples_per_second"]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    speeds = {"0": [], "100": []}
    with tempfile.TemporaryDirectory() as scratch:
        for i in range(options.rounds):
            for every in list(speeds)[:: 1 if i % 2 else -1]:
                speeds[every].append(samples_per_second(Path(scratch) / f"{every}-{i}", f"checkpoint.every={every}"))
            print(
                f"{i + 1}/{options.rounds}: {speeds['0'][-1]:,.0f} and {speeds['100'][-1]:,.0f} samples/s", flush=True
            )
    found = ratio(speeds["100"], speeds["0"])
    counts = {
        "samples/s without checkpoints": round(median(speeds["0"])),
        "samples/s with one every 100 steps": round(median(speeds["100"])),
        "of those without": f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f}, 95 %)",
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.stall", *given])
    return report("stall", counts, [], command=words)


if __name__ == "__main__":
    sys.exit(main())

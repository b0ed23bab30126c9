"""Does a sweep that is killed again and again do every job once?  python -m benchmarks.reliability.sweeps

Twelve jobs, of which four are made to fail, killed (kill -9) at random moments, twenty times; then the same command
again. It must have the results of a sweep that was left alone, none of them made twice, name those that failed, and end
with a status that is not 0.
"""

import argparse
import csv
import random
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Progress
from benchmarks.reliability.runs import ROOT, finish, report, start

MEASURED = ("samples_per_second", "peak_bytes")  # columns of the report that are of the machine
JOBS = [
    "-m",
    "sweep=pareto",
    "embedding=hashed",
    "compression=0.5,0.2,0.000000001",  # no table is as small as the last
    "seed=0,1,2,3",
    "data.min_count=1",
    "embedding.block=8",
    "embedding.shared=true",
    "data.cardinalities=[50,2000,3000]",
    "data.num_samples={train: 20000, valid: 500, test: 500}",
    "trainer.batch_size=128",
    "trainer.save_checkpoint=false",
]


def command(folder: Path) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *JOBS, f"hydra.sweep.dir={folder}"]


def results(folder: Path) -> list[dict]:
    """The rows of a sweep's report, less what is of the machine."""
    rows = list(csv.DictReader((folder / "report.csv").open()))
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


def times(folder: Path) -> dict[str, int]:
    """When each result was written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    rng, findings, num_again = random.Random(0), [], 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, killed = Path(scratch) / "whole", Path(scratch) / "killed"
        began = time.monotonic()
        status, text = finish(command(whole))
        seconds = time.monotonic() - began
        if status == 0 or text.count("compression=1e-09 seed=") < 4:
            findings.append(f"left alone: status {status}, and not every failed job is named: {text[-500:]}")
        progress, done, num_kills = Progress(options.kills), {}, 0
        for _ in range(options.kills):
            process = start(command(killed))
            try:
                process.communicate(timeout=rng.uniform(2, 2 + seconds / 3))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                num_kills += 1
            now = times(killed)
            num_again += sum(now.get(path) != written for path, written in done.items())
            done = now
            progress.say(f"{len(done)} results")
        status, text = finish(command(killed))
        if status == 0 or text.count("compression=1e-09 seed=") < 4:
            findings.append(f"killed: status {status}, and not every failed job is named: {text[-500:]}")
        if results(killed) != results(whole):
            findings.append("the report is not that of the sweep that was left alone")
        if num_again:
            findings.append(f"{num_again} results were written again")
        num_results = len(times(killed))
    counts = {
        "jobs": 12,
        "made to fail": 4,
        "launches, most of them killed": options.kills,
        "kills": num_kills,
        "results": num_results,
        "written again": num_again,
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.sweeps", *given])
    return report("sweeps", counts, findings, command=words)


if __name__ == "__main__":
    sys.exit(main())

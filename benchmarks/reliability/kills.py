"""Does a run that is killed at any moment go on as if nothing had been?  python -m benchmarks.reliability.kills

kill -9 at moments drawn uniformly over a run, and while a checkpoint is being written; then the same command again.
Weights, optimizer, records and TensorBoard's events must be those of a run that was left alone.
"""

import argparse
import random
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.measure import Progress
from benchmarks.reliability.runs import EVERY, command, differences, finish, report, resumed_at, rows_of, start
from dlrm import checkpoint

POLL = 0.0005  # seconds


class Kill(NamedTuple):
    """What one kill met, and what became of the run."""

    is_inside: bool  # a checkpoint was being written
    had_checkpoint: bool
    repeated: int  # steps that were done again
    findings: list[str]


def kill(process, folder: Path, rng: random.Random, seconds: float, inside: bool) -> bool:
    """Kills it at a moment of the run's seconds, or as one of its checkpoints is written; whether inside a save."""
    began, deadline = time.monotonic(), rng.uniform(0, seconds)
    saves_to_wait = rng.randrange(1, 12) if inside else -1
    seen: set[str] = set()
    while process.poll() is None and time.monotonic() - began < (seconds * 3 if inside else deadline):
        if inside:
            seen |= {path.name for path in (folder / "checkpoints").glob(".tmp-step_*")}
            if len(seen) >= saves_to_wait and any((folder / "checkpoints").glob(".tmp-step_*")):
                break
        time.sleep(POLL)
    process.kill()
    process.communicate()
    return any((folder / "checkpoints").glob(".tmp-step_*"))


def one(number: int, whole: Path, seconds: float, num_samples: int, inside: bool, seed: int) -> Kill:
    """A run that is killed once and then goes on to its end."""
    folder, rng = whole.with_name(f"run-{number}"), random.Random(f"{seed} {number}")
    words = command(folder, num_samples)
    is_inside = kill(start(words), folder, rng, seconds, inside)
    had_checkpoint = bool(checkpoint.all_in(folder)) if folder.exists() else False
    try:
        done = rows_of(folder)[-1]["step"]
    except (OSError, ValueError, IndexError):
        done = 0
    status, text = finish(words)
    if status:
        return Kill(is_inside, had_checkpoint, 0, [f"run {number}: exit status {status}: {text[-500:]}"])
    findings = [f"run {number}: not the same: {what}" for what in differences(folder, whole)]
    repeated = 0 if "has its result" in text else max(0, done - resumed_at(text))
    return Kill(is_inside, had_checkpoint, repeated, findings)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--inside", type=int, default=25, help="of them, so many while a checkpoint is written")
    parser.add_argument("--samples", type=int, default=150_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        began = time.monotonic()
        status, text = finish(command(whole, options.samples))
        seconds = time.monotonic() - began
        if status:
            raise RuntimeError(text)
        print(f"the run that is left alone takes {seconds:.1f} s")
        progress, kills = Progress(options.kills), []
        with ThreadPoolExecutor(options.jobs) as pool:
            jobs = [
                pool.submit(one, i, whole, seconds, options.samples, i < options.inside, options.seed)
                for i in range(options.kills)
            ]
            for job in jobs:
                kills.append(job.result())
                progress.say("killed and gone on" if not kills[-1].findings else kills[-1].findings[0])
    counts = {
        "kills": len(kills),
        "while a checkpoint was written": sum(k.is_inside for k in kills),
        "before the first checkpoint": sum(not k.had_checkpoint for k in kills),
        "ended as the run that was left alone": sum(not k.findings for k in kills),
        "steps done again, at most": max(k.repeated for k in kills),
        "steps between checkpoints": EVERY,
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.kills", *given])
    return report("kills", counts, [finding for k in kills for finding in k.findings], command=words)


if __name__ == "__main__":
    sys.exit(main())

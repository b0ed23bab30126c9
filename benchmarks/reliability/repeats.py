"""Does the same command give the same weights?  python -m benchmarks.reliability.repeats

Five runs of every backend with deterministic=true, three with one thread and two with two, with batches of 128 and of
2048, whose sums MKL would split among the threads: weights, optimizer and records must be the same.
"""

import argparse
import itertools
import shlex
import sys
import tempfile
from pathlib import Path

from benchmarks.measure import Progress
from benchmarks.reliability.runs import ROOT, command, differences, report, start

THREADS = (1, 1, 1, 2, 2)
BATCHES = (128, 2048)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = sys.argv[1:] if arguments is None else arguments
    parser.parse_args(given)
    backends = sorted(path.stem for path in (ROOT / "conf/embedding").glob("*.yaml"))
    cases = list(itertools.product(backends, BATCHES))
    findings, num_same, progress = [], 0, Progress(len(cases))
    with tempfile.TemporaryDirectory() as scratch:
        for backend, batch in cases:
            folders = [Path(scratch) / f"{backend}-{batch}-{i}" for i in range(len(THREADS))]
            how = [f"embedding={backend}", f"trainer.batch_size={batch}", "deterministic=true"]
            # fast sums by atomics on CUDA, and deterministic=true refuses that by its name
            how += ["embedding.accumulate=rows"] * (backend == "fast")
            for folder, threads in zip(folders, THREADS, strict=True):
                process = start(command(folder, 30_000, *how, "compression=0.5"), threads)
                text = process.communicate(timeout=600)[0]
                if process.returncode:
                    findings.append(f"{backend}, batch {batch}: {text[-300:]}")
                elif what := differences(folder, folders[0]):
                    findings.append(f"{backend}, batch {batch}, {threads} threads: {', '.join(what)} differ")
                else:
                    num_same += 1
            progress.say(f"{backend} {batch}")
    counts = {"backends": len(backends), "runs": len(cases) * len(THREADS), "equal to their first": num_same}
    words = shlex.join(["python", "-m", "benchmarks.reliability.repeats", *given])
    return report("repeats", counts, findings, command=words)


if __name__ == "__main__":
    sys.exit(main())

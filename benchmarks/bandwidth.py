"""What do random rows cost on this machine?  python -m benchmarks.bandwidth [--quick]

Nanoseconds per random row of 64, 256 and 512 bytes: read, copied out, or with a gradient row added, by 1 and 2 threads,
with and without huge pages and prefetching; row_bandwidth.cpp says how. The least of them is what benchmarks.lookup
divides by the kernels' own times.
"""

import argparse
import json
import subprocess
import tempfile
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.measure import RESULTS, Progress, integers, machine, make_parser, read_options, record, results_folder

SOURCE = Path(__file__).with_name("row_bandwidth.cpp")
WORKS = ("read", "copy", "update")
SHORT = "--row-bytes 64 --mebibytes 64,1024"


class Rates(NamedTuple):
    """Rows of a result file."""

    rows: list[dict]

    def of(self, work: str, row_bytes: int, table_bytes: int) -> float:
        """Least nanoseconds per row, of any number of threads, in the measured table whose size is the nearest.

        A row between the measured sizes costs in proportion to its bytes."""
        width = min((row["row_bytes"] for row in self.rows), key=lambda w: abs(w - row_bytes))
        nearest = min((row["table_bytes"] for row in self.rows), key=lambda size: abs(size - table_bytes))
        at = {"row_bytes": width, "table_bytes": nearest}
        fits = [row[work] for row in self.rows if at.items() <= row.items()]
        return min(fits) * row_bytes / width


def read(device: str) -> Rates | None:
    """What was recorded on a device of this name, or None."""
    for path in (folder / "bandwidth-cpu.json" for folder in (results_folder(), RESULTS)):
        if path.exists() and (found := json.loads(path.read_text()))["device"] == device:
            return Rates(found["rows"])
    return None


def main(arguments: list[str] | None = None) -> Path:
    options = parse(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "row_bandwidth"
        compiler = ["c++", "-O3", "-march=native", "-std=c++20", "-pthread", "-o", program, SOURCE]
        subprocess.run(compiler, check=True)
        plan = list(product(options.row_bytes, options.mebibytes, options.threads, (0, 1), (0, 1)))
        progress = Progress(len(plan))
        for row_bytes, mebibytes, threads, huge, prefetch in plan:
            command = map(str, [program, mebibytes << 20, row_bytes, threads, huge, prefetch])
            times = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
            row = {"row_bytes": row_bytes, "table_bytes": mebibytes << 20, "threads": threads}
            row |= {"huge_pages": bool(huge), "prefetch": bool(prefetch)}
            row |= dict(zip(WORKS, map(float, times), strict=True))
            rows.append(row)
            progress.say(", ".join(f"{key} {value}" for key, value in row.items()))
    path = record("bandwidth", "cpu", rows, command=options.command)
    print(f"written to {path}; {machine('cpu')['device']}")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, rounds=0, seconds=0)
    parser.add_argument("--row-bytes", type=integers, default=[64, 256, 512])
    parser.add_argument("--mebibytes", type=integers, default=[64, 256, 1024, 2048], help="of the table")
    parser.add_argument("--threads", type=integers, default=sorted({1, torch.get_num_threads()}))
    return read_options(parser, "bandwidth", arguments, SHORT)


if __name__ == "__main__":
    main()

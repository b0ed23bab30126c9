"""How many registers do the CUDA kernels take, and so how many threads run at once?  python -m benchmarks.registers

Counted by ptxas for sm_90, without a GPU: what hides the memory's latency is the threads that an SM holds, and the 16
bytes, or 64 where four rows are read ahead, that each has on their way.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.measure import record
from embeddings import native

ARCHITECTURE = "90"
REGISTERS, THREADS, BLOCK, GRAIN = 65536, 2048, 256, 8  # of an SM; of a block; registers come by 8 to a thread
ENTRY = re.compile(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.DOTALL)
TYPES = {"float": "fp32", "double": "fp64", "BFloat16": "bf16", "Half": "fp16"}


def threads(registers: int) -> int:
    """Of an SM at once, by registers alone."""
    blocks = REGISTERS // (-(-registers // GRAIN) * GRAIN * BLOCK)
    return min(blocks * BLOCK, THREADS)


def of_what(arguments: str) -> str:
    """A kernel's template arguments in words: its map and probes, or the sums that an update takes."""
    words = []
    if squares := re.search(r"Squares\)(\d)", arguments):
        words.append(("SGD, Adagrad or Adam", "row-wise Adagrad", "row-wise Adagrad of long rows")[int(squares[1])])
    if reads := re.search(r"(\w+)Map(?:, (true|false))?", arguments):
        words.append(reads[1].lower() + ", combined" * (reads[2] == "true"))
    if "KeptSums" in arguments:
        words.append("kept sums")
    return ", ".join(words)


def compiled(source: Path) -> str:
    """What ptxas says of a CUDA source. Raises RuntimeError with the compiler's words."""
    command = [*shlex.split(native.nvcc([ARCHITECTURE])), "-Xptxas", "-v", "-c", str(source), "-o", "/dev/null"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout + done.stderr


def kernels(said: str) -> Iterator[dict]:
    """Of what ptxas said: each kernel of ours."""
    found = ENTRY.findall(said)
    names = subprocess.run(["c++filt"], input="\n".join(name for name, *_ in found), capture_output=True, text=True)
    for name, (_, spilled, registers) in zip(names.stdout.splitlines(), found, strict=True):
        if not (match := re.search(r"(\w+_kernel)<(.*)>\(", name)):
            continue  # cub's
        kind = re.search(r"float|double|BFloat16|Half", match[2])  # the first is the weights'
        yield {"kernel": match[1], "of": of_what(match[2]), "type": TYPES[kind[0]] if kind else "any"} | {
            "registers": int(registers),
            "threads": threads(int(registers)),
            "spilled_bytes": int(spilled),
        }


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    with ThreadPoolExecutor() as pool:
        rows = [row for said in pool.map(compiled, sorted(native.CSRC.glob("*.cu"))) for row in kernels(said)]
    path = record("registers", "cpu", rows, nvcc=version)
    print(f"{len(rows)} kernels in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

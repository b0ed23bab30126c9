"""Is a checkpoint with one wrong bit ever used?  python -m benchmarks.reliability.flips

One random bit of a random file of the newest of two checkpoints is flipped, a thousand times; each time that must be
found and said, and the checkpoint before taken. Then the same with files cut short, longer, missing, of other bytes.
"""

import argparse
import contextlib
import io
import random
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.reliability.runs import EVERY, command, finish, report
from dlrm import checkpoint


def damages(rng: random.Random) -> dict[str, Callable[[bytes], bytes | None]]:
    """Name -> what a file's bytes become; None: no file."""
    return {
        "cut short": lambda whole: whole[: rng.randrange(len(whole))],
        "longer": lambda whole: whole + rng.randbytes(8),
        "missing": lambda whole: None,
        "of random bytes": lambda whole: rng.randbytes(len(whole)),
        "of zeros": lambda whole: bytes(len(whole)),
    }


def flipped(whole: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(8 * len(whole))
    damaged = bytearray(whole)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def is_found(run: Path, file: Path, content: bytes | None) -> bool:
    """Whether with this content of a file the checkpoint before is taken, and the damage said."""
    whole, said = file.read_bytes(), io.StringIO()
    newest, before = checkpoint.all_in(run)[:2]
    try:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        with contextlib.redirect_stdout(said):
            taken = checkpoint.newest_whole(run)
    finally:
        file.write_bytes(whole)
    return taken == before and str(newest) in said.getvalue()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", help="folder of a run with two checkpoints; by default one is made")
    given = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(given)
    rng, findings, num_found = random.Random(options.seed), [], {"flipped bits": 0, "other damages": 0}
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(options.run or scratch)
        if not options.run:
            status, text = finish(command(run / "run", 128 * 2 * EVERY))
            if status:
                raise RuntimeError(text)
            run = run / "run"
        files = sorted(checkpoint.find(run).iterdir())
        cases = [
            ("flipped bits", file, flipped(file.read_bytes(), rng)) for file in rng.choices(files, k=options.flips)
        ]
        for file in files:
            cases += [("other damages", file, damage(file.read_bytes())) for damage in damages(rng).values()]
        for kind, file, content in cases:
            if is_found(run, file, content):
                num_found[kind] += 1
            else:
                findings.append(f"{file.name}: {kind} not found")
    counts = {
        "files of the checkpoint": len(files),
        "flipped bits": options.flips,
        "found, and the checkpoint before taken": num_found["flipped bits"],
        "other damages": len(cases) - options.flips,
        "of them found": num_found["other damages"],
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.flips", *given])
    return report("flips", counts, findings, command=words)


if __name__ == "__main__":
    sys.exit(main())

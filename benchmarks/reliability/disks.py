"""Does a full disk cost a checkpoint that was there?  python -m benchmarks.reliability.disks

A run writes to a small tmpfs that has room for the first k of its checkpoints, for k = 0, 1, 2, ... Each must end with
a status that is not 0, say the bytes needed and free, leave the last good checkpoint and no litter, and go on from it
once there is room. Needs root, to mount.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.reliability.runs import EVERY, command, finish, report
from dlrm import checkpoint

NUM_CHECKPOINTS = 6


def attempt(disk: Path, room: int, num_bytes: int, other_bytes: int, num_samples: int) -> list[str]:
    """What went wrong with a run that finds room for so many checkpoints, and for its other files."""
    words = command(disk / "run", num_samples, "checkpoint.keep=99", "checkpoint.asynchronous=false")
    words = [word for word in words if not word.startswith("trainer.eval_every")]
    ballast, findings = disk / "ballast", []
    free = shutil.disk_usage(disk).free
    with ballast.open("wb") as file:
        file.write(bytes(max(0, free - other_bytes - int((room + 0.6) * num_bytes))))
    status, text = finish(words)
    if status == 0 or not re.search(
        r"needs [\d,]+ bytes, the disk has [\d,]+ free|the disk has [\d,]+ bytes free", text
    ):
        findings.append(f"room for {room}: exit status {status}: {text[-300:]}")
    there = checkpoint.all_in(disk / "run")
    if there and checkpoint.newest_whole(disk / "run") != there[0]:
        findings.append(f"room for {room}: the newest checkpoint is damaged")
    ballast.unlink()
    status, text = finish(words)
    if status or (there and "goes on from step" not in text):
        findings.append(f"room for {room}: it did not go on: {status}: {text[-300:]}")
    if litter := [path.name for path in (disk / "run/checkpoints").iterdir() if path.name.startswith(".tmp")]:
        findings.append(f"room for {room}: litter: {litter}")
    print(f"room for {room}: {len(there)} checkpoints when it ended", flush=True)
    shutil.rmtree(disk / "run")
    return findings


def held_by(folder: Path) -> int:
    """Bytes of the disk that a folder's files take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given = sys.argv[1:] if arguments is None else arguments
    parser.parse_args(given)
    num_samples, findings = 128 * EVERY * NUM_CHECKPOINTS, []
    with tempfile.TemporaryDirectory() as disk:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", disk], check=True)
        try:
            status, text = finish(command(Path(disk) / "run", num_samples))
            if status:
                raise RuntimeError(text)
            newest = checkpoint.find(Path(disk) / "run")
            num_bytes = held_by(newest)
            other_bytes = held_by(Path(disk) / "run") - held_by(newest.parent)
            shutil.rmtree(Path(disk) / "run")
            for room in range(NUM_CHECKPOINTS):
                findings += attempt(Path(disk), room, num_bytes, other_bytes, num_samples)
        finally:
            subprocess.run(["umount", disk], check=True)
    counts = {
        "disks that filled up": NUM_CHECKPOINTS,
        "bytes of a checkpoint": num_bytes,
        "last good checkpoint kept, bytes said, no litter, gone on": NUM_CHECKPOINTS - len({f[:12] for f in findings}),
    }
    words = shlex.join(["python", "-m", "benchmarks.reliability.disks", *given])
    return report("disks", counts, findings, command=words)


if __name__ == "__main__":
    sys.exit(main())

"""A folder per run, and what identifies a run: the commit and a hash of its configuration."""

import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

HELD = ".held"  # a file whose lock says that a process trains in its folder; in it the process's number


def make_run_folder(path: str | Path) -> Path:
    """Creates the folder `path`, or `path-1`, `path-2`, ... if it is taken, and returns it. Parents are made as needed.

    mkdir is exclusive, so any number of runs that start at the same moment get a folder each.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in count():
        folder = path.with_name(f"{path.name}-{suffix}") if suffix else path
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, no other process may train in a folder; a dead process's hold ends with it.

    Raises ValueError, with the other's number, if one does."""
    with (folder / HELD).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(f"{folder}: process {file.read().strip() or '?'} is training there") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def git_commit() -> str | None:
    """The commit this code is at, `-dirty` if tracked files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None


def config_hash(config: dict) -> str:
    """16 hex digits, the same for equal resolved configurations only. config: plain dicts, lists and scalars."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

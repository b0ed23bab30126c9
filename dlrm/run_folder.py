"""A folder per run, and what identifies a run: the commit and a hash of its configuration."""

import fcntl
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Iterator
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


def first_difference(saved: object, mine: object, key: str = "") -> tuple[str, object, object] | None:
    """The first dotted key at which two nested dicts differ, and both values (None: missing), or None."""
    if not (isinstance(saved, dict) and isinstance(mine, dict)):
        return None if saved == mine else (key, saved, mine)
    names = list(mine | saved)
    found = (first_difference(saved.get(n), mine.get(n), f"{key}.{n}" if key else n) for n in names)
    return next((difference for difference in found if difference), None)


def check_same_run(path: Path, counters: dict, identity: dict, fingerprint: str, despite: Iterable[str] = ()) -> None:
    """Raises ValueError, with the difference, unless a checkpoint's counters are of a run of this identity and data.

    despite: dotted keys of the identity that may differ, and "data" for the data itself."""
    saved, mine = (without(whole, despite) for whole in (counters.get("identity", {}), identity))
    if difference := first_difference(saved, mine):
        key, *values = difference
        saved, mine = map(json.dumps, values)
        raise ValueError(
            f"resume={path}: that is another run: {key} is {saved} there and {mine} in this run "
            f"(resume_despite=[{key}] goes on all the same)"
        )
    if counters["fingerprint"] != fingerprint and "data" not in despite:
        raise ValueError(
            f"resume={path}: that run's data was other data (fingerprint {counters['fingerprint']}, now {fingerprint}; "
            "resume_despite=[data] goes on all the same)"
        )


def without(whole: dict, keys: Iterable[str]) -> dict:
    """Nested dicts less what these dotted keys name."""
    left = json.loads(json.dumps(whole))
    for key in keys:
        *parents, last = key.split(".")
        inner = left
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            inner.pop(last, None)
    return left


def config_hash(config: dict) -> str:
    """16 hex digits, the same for equal resolved configurations only. config: plain dicts, lists and scalars."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]

"""The jobs of a sweep: which command lines they are, and that each is done once, by one process, whatever is killed."""

import contextlib
import fcntl
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import yaml

from dlrm.log import write_json
from dlrm.refusals import CONF, ConfigError, near, some

PLAIN = re.compile(r"""(['"]?)([^${}'"\\]*)\1""")  # a name that hydra takes as it is, quoted or not


def grids(name: str, given: list[str]) -> list[list[str]]:
    """The command lines, one per grid of conf/sweep/<name>.yaml.

    given: the user's command line, which replaces a grid's keys of the same name. Raises ConfigError for a wrong name.
    """
    file = CONF / "sweep" / f"{name}.yaml"
    if not file.is_file():
        allowed = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise ConfigError(f"sweep={name}: must be one of {some(allowed)}" + near(name, allowed))
    taken = {key_of(argument) for argument in given}
    lines = []
    for grid in yaml.safe_load(file.read_text())["grids"]:
        line = [*given, *(f"{key}={value}" for key, value in grid.items() if key not in taken)]
        if line not in lines:
            lines.append(line)
    return lines


def sweep_folder(name: str, given: list[str]) -> Path:
    """Where a sweep's jobs are: hydra.sweep.dir, or multirun/<name>, so that the same command finds them again."""
    return said_folder(given) or Path(f"multirun/{name}")


def said_folder(given: list[str]) -> Path | None:
    """The hydra.sweep.dir of a command line. Raises ConfigError for what would keep its jobs from being found there."""
    said = None
    for argument in given:
        key, value = key_of(argument), argument.partition("=")[2]
        if key == "hydra.sweep.subdir":
            raise ConfigError(f"{argument}: each job has a folder of its own, which train.py names")
        if key == "hydra.sweep.dir":
            if not (name := PLAIN.fullmatch(value)):
                raise ConfigError(f"{argument}: must be the plain name of a folder")
            said = Path(name[2])
    return said


def job_folder(sweep: object, number: int, overrides: str) -> str:
    """A job's folder in that of its sweep: its number; of a named sweep its overrides, the same in every process.

    Of those only what every file system takes, and not too long a name."""
    if sweep is None:
        return str(number)
    name = re.sub(r"[^\w.=+,@-]+", "_", ",".join(o for o in overrides.split(",") if not o.startswith("sweep=")))
    return name if len(name) <= 150 else f"{name[:120]}-{hashlib.sha256(overrides.encode()).hexdigest()[:16]}"


def announce(folder: Path, num_jobs: int) -> None:
    """Note in a sweep's folder what `progress` needs, as its jobs may run in other processes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", {"jobs": num_jobs, "began": time.time(), "had": _num_results(folder)})


def progress(folder: Path) -> str:
    """How many jobs of the sweep in a folder are done, by any process, and about how long all that are left take."""
    sweep, done = json.loads((folder / "sweep.json").read_text()), _num_results(folder)
    line = f"{done} of {sweep['jobs']} jobs done"
    if new := done - sweep["had"]:
        line += f", about {(time.time() - sweep['began']) / new * (sweep['jobs'] - done) / 60:.0f} min left"
    return line


def _num_results(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*/summary.json"))


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Whether this process may do the job of a folder, and no other meanwhile; a dead process's claim ends with it."""
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def is_completed(folder: Path, config_hash: str, fingerprint: Callable[[], str], *, key: str) -> bool:
    """Whether a folder has the result of this configuration and data. Raises ConfigError if it has another one's.

    fingerprint: gives that of the data, asked for only where there is a result. key: which names the folder."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        summary = json.loads((folder / "summary.json").read_text())
        if summary["status"] == "completed":
            if summary["config_hash"] != config_hash:
                raise ConfigError(
                    f"{folder} has the result of another configuration (its resolved.yaml says which): "
                    f"name another {key}"
                )
            if (had := summary["data_fingerprint"]) != (now := fingerprint()):
                raise ConfigError(
                    f"{folder} has the result of other data (fingerprint {had}, now {now}): "
                    f"name another {key}, or bring back the data as they were"
                )
            return True
    return False


def set_aside(folder: Path) -> None:
    """Move what an attempt left that has no result into attempt-N: nothing is deleted."""
    left = [path for path in folder.iterdir() if not path.name.startswith((".hydra", "lock", "attempt-"))]
    if left:
        for number in count(1):
            with contextlib.suppress(FileExistsError):
                (aside := folder / f"attempt-{number}").mkdir()
                break
        for path in left:
            path.rename(aside / path.name)


def key_of(argument: str) -> str:
    """The key that an override names."""
    return argument.lstrip("+~").partition("=")[0]

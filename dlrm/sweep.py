"""The runs below a folder, read back: what each was, how it ended, and what runs that differ only in their seed say."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from dlrm.jobs import key_of
from dlrm.report import nominal
from dlrm.statistics import Interval, interval, paired

UNSAID = ("seed", "sweep", "hydra", "data.path", "data.cache", "device", "native")  # they name no configuration


@dataclass(frozen=True)
class Run:
    """One run's folder. status: completed, or why there is no result; summary: of a completed run; ended: when."""

    folder: Path
    overrides: tuple[str, ...]
    seed: int
    status: str
    summary: dict
    ended: float = 0.0

    @property
    def data(self) -> str:
        """The fingerprint of its samples, however their ids were numbered; of an older run, which has none, ''."""
        return self.summary.get("samples_fingerprint", "")

    @property
    def words(self) -> tuple[str, ...]:
        """What it was started with, less its seed and where things lie."""
        named = (o.lstrip("+").replace("\\", "") for o in self.overrides)
        return tuple(o for o in named if key_of(o).split(".")[0] not in UNSAID and key_of(o) not in UNSAID)

    def missing(self, tag: str | None) -> str | None:
        """Why there is no last value of a tag, or if that is None no result; None if there is."""
        if self.status != "completed":
            return self.status
        if tag is None or self.summary["last"].get(tag) is not None:
            return None
        return self.summary["reasons"].get(tag, f"no {tag}")


@dataclass
class Configuration:
    """Completed runs of the same data that differ only in their seed; where a seed has several, the newest."""

    label: str
    runs: list[Run]

    def by_seed(self, tag: str) -> dict[int, float]:
        """Seed -> the last value of a tag, where there is one."""
        values = {run.seed: run.summary["last"].get(tag) for run in self.runs}
        return {seed: value for seed, value in values.items() if value is not None}

    def interval(self, tag: str) -> Interval | None:
        values = list(self.by_seed(tag).values())
        return interval(values) if values else None

    def against(self, other: "Configuration", tag: str) -> Interval | None:
        """The paired difference of a tag, this less the other's."""
        return paired(self.by_seed(tag), other.by_seed(tag))

    def mean(self, tag: str) -> float | None:
        """Of the last values; None if no run has one."""
        values = list(self.by_seed(tag).values())
        return sum(values) / len(values) if values else None

    @property
    def data(self) -> str:
        """See `Run`."""
        return self.runs[0].data

    @property
    def nominal(self) -> float | None:
        """The ratio asked for, see `dlrm.report.nominal`."""
        return nominal(self.runs[0].summary)

    @property
    def num_bytes(self) -> float:
        """embedding_bytes: every parameter and buffer that the embeddings keep; the mean over runs."""
        return self.mean("memory/embedding_bytes")

    @property
    def dense_equivalent_bytes(self) -> int:
        """Bytes of one row per id, of the ids that the data kept."""
        return self.runs[0].summary["dense_equivalent_bytes"]

    @property
    def samples_per_second(self) -> float:
        speeds = sorted(run.summary["samples_per_second"] for run in self.runs)
        return speeds[len(speeds) // 2]


def read_runs(folder: Path) -> list[Run]:
    """Every run at or below a folder, by path; those that failed or never ended included.

    Raises ValueError if there is none.
    """
    files = sorted(Path(folder).rglob(".hydra/overrides.yaml"))
    if not files:
        raise ValueError(f"{folder} holds no run: a run's folder has .hydra/overrides.yaml")
    return [_read(file.parent.parent, tuple(yaml.safe_load(file.read_text()) or ())) for file in files]


def shared_words(runs: list[Run]) -> tuple[str, ...]:
    """What all runs were started with, if they are several configurations: it does not tell them apart."""
    if len({run.words for run in runs}) < 2:
        return ()
    return tuple(word for word in runs[0].words if all(word in run.words for run in runs))


def configurations(runs: list[Run]) -> list[Configuration]:
    """The completed runs by what they were and of which data if that differs, less what all were, as first met."""
    completed, shared = [run for run in runs if run.status == "completed"], shared_words(runs)
    differs = len({run.data for run in completed}) > 1
    newest: dict[str, dict[int, Run]] = {}  # label -> seed -> run
    for run in completed:
        words = [word for word in run.words if word not in shared] + [data_word(run.data)] * differs
        seeds = newest.setdefault(" ".join(words) or "(default)", {})
        seeds[run.seed] = max(seeds.get(run.seed, run), run, key=lambda one: one.ended)
    return [Configuration(label, list(seeds.values())) for label, seeds in newest.items()]


def by_data(configurations: Sequence[Configuration]) -> dict[str, list[Configuration]]:
    """Data -> the configurations of it."""
    found: dict[str, list[Configuration]] = {}
    for one in configurations:
        found.setdefault(one.data, []).append(one)
    return found


def data_word(data: str) -> str:
    """What a label calls the data of this fingerprint."""
    return f"data:{data[:8] or 'unknown'}"


def list_missing(runs: list[Run], tag: str | None = None) -> str:
    """A line for each run that did not end, or has no value of a tag: where it is, its overrides, and why."""
    whys = [(run, run.missing(tag)) for run in runs]
    lines = [f"  {r.folder} [{' '.join(r.overrides)}]: {why}" for r, why in whys if why is not None]
    return f"{len(lines)} of {len(runs)} runs have no result:\n" + "\n".join(lines) if lines else ""


def list_repeats(runs: list[Run], found: list[Configuration]) -> str:
    """A line for each completed run that has the seed of a newer one, which stands for both in what was found."""
    counted = {run.folder for one in found for run in one.runs}
    again = [run for run in runs if run.status == "completed" and run.folder not in counted]
    lines = [f"  {run.folder} [{' '.join(run.overrides)}]" for run in again]
    head = f"{len(lines)} of {len(runs)} runs repeat a seed and are not counted, as the newest of each seed is:\n"
    return head + "\n".join(lines) if lines else ""


def front(points: list[tuple[float, float]]) -> list[bool]:
    """Which points (bytes, AUC) no other one beats: fewer bytes and at least the AUC, or as many and more AUC."""
    return [not any(b <= size and a >= auc and (b, a) != (size, auc) for b, a in points) for size, auc in points]


def _read(folder: Path, overrides: tuple[str, ...]) -> Run:
    said = {key_of(o): o.split("=", 1)[1] for o in overrides if "=" in o}
    seed = said.get("seed", "0")
    run = dict(folder=folder, overrides=overrides, seed=int(seed) if seed.isdigit() else 0)
    try:
        summary, ended = json.loads((folder / "summary.json").read_text()), (folder / "summary.json").stat().st_mtime
    except FileNotFoundError:
        error = folder / "error.txt"
        return Run(**run, status=f"failed: {error.read_text().strip()}" if error.exists() else "unfinished", summary={})
    except json.JSONDecodeError as error:
        return Run(**run, status=f"summary.json cannot be read: {error}", summary={})
    run["seed"] = summary.get("seed", run["seed"])
    return Run(**run, status=summary["status"], summary=summary, ended=ended)

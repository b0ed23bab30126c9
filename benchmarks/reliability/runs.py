"""What the reliability scripts share: a small run in a process of its own, and whether two runs are the same."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks import measure
from dlrm import checkpoint

ROOT = Path(__file__).parents[2]
EVERY = 50  # steps between checkpoints
OF_THE_CLOCK = {"train/samples_per_second", "memory/peak_bytes"}  # what differs from run to run
SMALL = [
    "data.cardinalities=[50,2000,3000]",
    "embedding=hashed",
    "compression=0.5",
    "trainer.batch_size=128",
    "trainer.log_every=1",
    "trainer.eval_every=170",
    "resume=auto",
    f"checkpoint.every={EVERY}",
]


def command(folder: Path, num_samples: int, *more: str) -> list[str]:
    """Trains in a folder, or goes on there."""
    samples = f"data.num_samples={{train: {num_samples}, valid: 500, test: 500}}"
    return [sys.executable, str(ROOT / "train.py"), *SMALL, samples, f"hydra.run.dir={folder}", *more]


def start(words: list[str], threads: int = 1) -> subprocess.Popen:
    """A process whose output is read at its end."""
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "COLUMNS": "200"}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def finish(words: list[str]) -> tuple[int, str]:
    """Exit status, and what was printed."""
    process = start(words)
    text = process.communicate(timeout=600)[0]
    return process.returncode, text


def differences(folder: Path, whole: Path) -> list[str]:
    """In what a run is not the whole one: weights and optimizer, records, TensorBoard's scalars, curves' steps."""
    found = []
    files = [json.loads((checkpoint.find(f) / checkpoint.MANIFEST).read_text())["files"] for f in (folder, whole)]
    found += [f"{name}.safetensors" for name in files[1] if files[0].get(name) != files[1][name]]
    if rows_of(folder) != rows_of(whole):
        found.append("metrics.jsonl")
    if events_of(folder) != events_of(whole):
        found.append("TensorBoard's events")
    return found


def rows_of(folder: Path) -> list[dict]:
    """The records, but for what is of the clock."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key not in OF_THE_CLOCK} for row in rows]


def events_of(folder: Path) -> dict[str, list]:
    """Tag -> steps and values of its scalars, or the steps of its curves and histograms."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in set(tags["scalars"]) - OF_THE_CLOCK}
    others = {tag: [e.step for e in events.Histograms(tag)] for tag in tags["histograms"]}
    return scalars | others | {tag: [e.step for e in events.Tensors(tag)] for tag in tags["tensors"]}


def resumed_at(text: str) -> int:
    """The step that a run says it goes on from; 0 if it began anew."""
    found = re.search(r"goes on from step ([\d,]+)", text)
    return int(found[1].replace(",", "")) if found else 0


def report(name: str, counts: dict[str, object], findings: Iterable[str], *, command: str) -> int:
    """Prints the counts as a table and the findings, records both, and returns the exit status: 1 if there are any."""
    findings = list(findings)
    width = max(map(len, counts))
    for key, value in counts.items():
        print(f"{key.ljust(width)}  {value}")
    print("\n".join(findings) or "no findings")
    folder = Path(os.environ.get("OUT") or Path(__file__).parent / "results")
    folder.mkdir(parents=True, exist_ok=True)
    facts = measure.machine("cpu") | {"command": command}
    (folder / f"{name}.json").write_text(measure.as_text(facts, [counts | {"findings": findings}]))
    return int(bool(findings))

"""The records of a run: TensorBoard events, metrics.jsonl, summary.json."""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.errors import DataLossError
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from dlrm.board import LAYOUT
from dlrm.report import markdown_table

HIGHER_IS_BETTER = {"auc", "accuracy", "samples_per_second", "share_of_best_auc"}  # the tag's last word
BEST_AT_ONE = {"calibration"}  # everything else: lower is better


class RunLog:
    """Writes a run's records into `folder`, which exists, and keeps the last and the best value of every tag.

    facts: what summary.json shall say beside the results (seed, git_commit, config_hash, ...).
    hparams: flat {name: value}, what TensorBoard's HParams tab shall show.
    after: how many rows the folder's own run had written where it now goes on: later records go.
    Raises ValueError when the folder holds the records of another run.
    """

    def __init__(self, folder: Path, *, facts: dict, hparams: dict, after: int | None = None):
        self.folder, self.facts, self.hparams = Path(folder), facts, hparams
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  # tag -> why its last value is not a finite number
        self._values: dict[str, float] = {}  # added, not yet written
        self._reasons: dict[str, str] = {}
        self.num_rows = 0  # in metrics.jsonl
        path = self.folder / "metrics.jsonl"
        if after is None:
            if path.exists():
                raise ValueError(f"{folder} holds the records of another run: give a new hydra.run.dir")
        else:
            keep_events(self.folder, self._keep_rows(path, after))
        had_events = any(self.folder.glob("events.out.tfevents.*"))
        self._writer = SummaryWriter(str(self.folder))
        if not had_events:
            self._writer.add_custom_scalars(LAYOUT)
        self._jsonl = path.open("a", encoding="utf-8")

    def add(self, values: dict[str, float], reasons: dict[str, str]) -> None:
        """Notes values {tag: number} for the next `write`. reasons: why those that are NaN or infinite are so."""
        self._values |= values
        self._reasons |= reasons

    def write(self, step: int) -> None:
        """Records what was added since the last call as one object, of this step. No-op when nothing was.

        A NaN or infinite value becomes null in JSON, with its reason beside it: {"reason": {tag: why}}.
        """
        if not self._values:
            return
        values, reasons = self._values, self._reasons
        self._values, self._reasons = {}, {}
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        row = {"step": step} | {tag: value if math.isfinite(value) else None for tag, value in values.items()}
        missing = {tag: reasons.get(tag, f"is {value}") for tag, value in values.items() if not math.isfinite(value)}
        if missing:
            row["reason"] = missing
        self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
        self._jsonl.flush()
        self.num_rows += 1
        self._remember(step, values, missing)

    @property
    def pending(self) -> dict[str, dict]:
        """What was added and is not yet written: `add`'s arguments. A value that is not finite is None."""
        values = {tag: value if math.isfinite(value) else None for tag, value in self._values.items()}
        return {"values": values, "reasons": self._reasons}

    def flush(self) -> None:
        """Waits until what was written is on the disk."""
        self._writer.flush()
        os.fsync(self._jsonl.fileno())

    def text(self, tag: str, rows: list[dict]) -> None:
        """Records rows, dicts with the same keys, as a table in TensorBoard's Text tab."""
        self._writer.add_text(tag, markdown_table(rows), 0)

    def precision_recall(self, tag: str, curve: Tensor | None, step: int) -> None:
        """Records a curve of `Metrics.precision_recall` in the PR Curves tab; None: nothing."""
        if curve is not None:
            self._writer.add_pr_curve_raw(tag, *curve.numpy(), step, num_thresholds=curve.shape[1])

    def histogram(self, tag: str, values: Tensor, bins: str | list[float], step: int) -> None:
        """Records the distribution of values [N]; those that are not finite are left out. bins: edges, or numpy's rule
        or "tensorflow" for edges a factor of 1.1 apart."""
        values = values[values.isfinite()]
        if len(values):
            self._writer.add_histogram(tag, values, step, bins=bins)

    def finish(self, results: dict) -> dict:
        """Writes summary.json and the HParams entry, closes the files, returns the summary.

        The summary is facts, results, and of every tag the last and best value (null where there is no number).
        """
        last = {tag: value if math.isfinite(value) else None for tag, value in self.last.items()}
        summary = self.facts | results | {"last": last, "best": self.best, "best_step": self.best_step}
        summary["reasons"] = self.reasons
        write_json(self.folder / "summary.json", summary)
        # SummaryWriter.add_hparams opens a second event file, which TensorBoard shows as a second run
        values = {name: _hparam(value) for name, value in self.hparams.items()}
        metrics = {tag: value for tag, value in self.last.items() if not tag.startswith("train/")}
        for record in hparams_summaries(values, metrics):
            self._writer.file_writer.add_summary(record)
        self._writer.close()
        self._jsonl.close()
        return summary

    def _keep_rows(self, path: Path, num_rows: int) -> set[tuple[int, str]]:
        """Drops all rows but the first ones, and remembers those; returns their steps and tags."""
        lines = path.read_text(encoding="utf-8").splitlines()[:num_rows] if path.exists() else []
        rows = [json.loads(line) for line in lines]
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
        self.num_rows = len(rows)
        for row in rows:
            values = {tag: value for tag, value in row.items() if tag not in ("step", "reason")}
            missing = row.get("reason", {})
            if isinstance(missing, str):  # of an older version: all of them in one sentence
                missing = {tag: missing for tag, value in values.items() if value is None}
            self._remember(row["step"], values, missing)
        return {(row["step"], tag) for row in rows for tag in row}

    def _remember(self, step: int, values: dict[str, float | None], missing: dict[str, str]) -> None:
        for tag, value in values.items():
            self.reasons.pop(tag, None)
            if tag in missing:
                self.last[tag], self.reasons[tag] = math.nan, missing[tag]
                continue
            self.last[tag] = value
            if tag not in self.best or _badness(tag, value) < _badness(tag, self.best[tag]):
                self.best[tag], self.best_step[tag] = value, step


def keep_events(folder: Path, kept: set[tuple[int, str]]) -> None:
    """Makes the folder's TensorBoard events one file, less what is of no row that is kept; they are (step, tag).

    Whenever the process dies all are there; what is twice in the files then, byte for byte, is once again here."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    if not files:
        return
    temporary, seen = folder / ".events.tmp", set()
    with temporary.open("wb") as out:
        writer = RecordWriter(out)
        for file in files:
            for record in records(file):
                event = Event.FromString(record)
                is_again = record in seen or (event.file_version and seen)
                if not is_again and all(_is_kept(event.step, value.tag, kept) for value in event.summary.value):
                    writer.write(record)
                seen.add(record)
        writer.flush()
        os.fsync(out.fileno())
    os.replace(temporary, files[0])
    for file in files[1:]:
        file.unlink()


def _is_kept(step: int, tag: str, kept: set[tuple[int, str]]) -> bool:
    """A curve stays with the AUC that is logged beside it; what is written at the end of a run stays with no row."""
    named = f"{tag.removesuffix('/precision_recall')}/auc" if tag.endswith("/precision_recall") else tag
    return tag.startswith("custom_scalars") or (step, named) in kept


def records(file: Path) -> Iterator[bytes]:
    """The whole records of an event file; the last may be cut short where a process died."""
    reader = RawEventFileLoader(str(file))
    with contextlib.suppress(DataLossError):
        yield from reader.Load()


def write_json(path: Path, content: dict) -> None:
    """Writes content as JSON so that path holds either the old or the new text, whenever the process dies."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _badness(tag: str, value: float) -> float:
    metric = tag.rsplit("/", 1)[-1]
    if metric in BEST_AT_ONE:
        return abs(value - 1)
    return -value if metric in HIGHER_IS_BETTER else value


def _hparam(value: object) -> int | float | str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)  # torch would show true as 1
    return value if is_number else str(value)

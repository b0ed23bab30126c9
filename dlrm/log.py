"""The records of a run: TensorBoard events, metrics.jsonl, summary.json."""

import json
import math
import os
from pathlib import Path

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
    Raises ValueError when the folder holds the records of another run.
    """

    def __init__(self, folder: Path, *, facts: dict, hparams: dict):
        self.folder, self.facts, self.hparams = Path(folder), facts, hparams
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.best_step: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  # tag -> why its last value is not a finite number
        if (self.folder / "metrics.jsonl").exists():
            raise ValueError(f"{folder} holds the records of another run: give a new hydra.run.dir")
        self._values: dict[str, float] = {}  # added, not yet written
        self._reasons: dict[str, str] = {}
        self._writer = SummaryWriter(str(self.folder))
        self._writer.add_custom_scalars(LAYOUT)
        self._jsonl = (self.folder / "metrics.jsonl").open("x", encoding="utf-8")

    def add(self, values: dict[str, float], reasons: dict[str, str]) -> None:
        """Notes values {tag: number} for the next `write`. reasons: why those that are NaN or infinite are so."""
        self._values |= values
        self._reasons |= reasons

    def write(self, step: int) -> None:
        """Records what was added since the last call as one object, of this step. No-op when nothing was.

        A NaN or infinite value becomes null in JSON, with its reason beside it.
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
            row["reason"] = "; ".join(f"{tag}: {reason}" for tag, reason in missing.items())
        self._jsonl.write(json.dumps(row, allow_nan=False) + "\n")
        self._jsonl.flush()
        self._remember(step, values, missing)

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

    def _remember(self, step: int, values: dict[str, float | None], missing: dict[str, str]) -> None:
        for tag, value in values.items():
            self.reasons.pop(tag, None)
            if tag in missing:
                self.last[tag], self.reasons[tag] = math.nan, missing[tag]
                continue
            self.last[tag] = value
            if tag not in self.best or _badness(tag, value) < _badness(tag, self.best[tag]):
                self.best[tag], self.best_step[tag] = value, step


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

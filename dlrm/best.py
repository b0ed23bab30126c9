"""The weights of a run's best evaluation, kept on the disk while the run goes on."""

import contextlib
import math
import os
import shutil
from pathlib import Path

from torch import nn

from dlrm import checkpoint


class BestWeights:
    """Keeps a model's weights of the highest validation AUC so far in `<folder>/best`, which appears whole or not.

    auc, step: of that evaluation; before the first, or if none had an AUC, step is None.
    error: why the weights of that step are not kept (a full disk), or None.
    """

    def __init__(self, folder: Path):
        self.path = Path(folder) / "best"
        self.auc, self.step, self.error = -math.inf, None, None

    def adopt(self, folder: Path, step: int) -> None:
        """Begins with what a run has kept in `<folder>/best` up to a step, if anything: of another run by links to its
        files, a copy where there can be none.

        Raises ValueError if that is damaged."""
        theirs = folder / "best"
        if not theirs.exists() or (counters := checkpoint.read_weights(theirs))["step"] > step:
            return
        self.auc, self.step = counters["eval_auc"], counters["step"]
        half = self.path.with_name(f".tmp-{self.path.name}")
        try:
            if theirs.absolute() != self.path.absolute():
                shutil.copytree(theirs, half, copy_function=_link_or_copy)
                half.rename(self.path)
        except OSError as full:
            shutil.rmtree(half, ignore_errors=True)
            self.error = str(full)

    def offer(self, model: nn.Module, auc: float, step: int) -> None:
        """Keeps the weights as they are now if no earlier ones were as good."""
        if not auc > self.auc:  # NaN is not
            return
        error = None
        try:
            self._save(model, {"step": step, "eval_auc": auc})
        except OSError as full:
            error = str(full)
        self.auc, self.step, self.error = auc, step, error

    @property
    def kept(self) -> Path | None:
        """Where the best weights are, if they are."""
        return self.path if self.error is None and self.path.exists() else None

    def load(self, model: nn.Module) -> None:
        """Puts the best weights in the place of the model's. Raises ValueError if they are not there or damaged."""
        if self.error is not None:
            raise ValueError(self.error)
        checkpoint.load_weights(self.path, model)

    def give_way(self) -> bool:
        """Takes the weights off a disk that has no room for the checkpoint; whether that can have helped."""
        if not self.path.exists():
            return False
        self.remove()
        self.error = "they made room for the checkpoint"
        return True

    def remove(self) -> None:
        """Takes the weights that this run has kept off the disk."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.parent.exists() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

    def _save(self, model: nn.Module, counters: dict) -> None:
        try:
            checkpoint.save_weights(self.path, model, counters)
        except OSError:
            if not self.path.exists():
                raise
            self.remove()  # of the two the older ones are not wanted any more
            checkpoint.save_weights(self.path, model, counters)


def _link_or_copy(source: str, to: str) -> None:
    with contextlib.suppress(OSError):  # another file system, or one without links
        os.link(source, to)
        return
    shutil.copy2(source, to)

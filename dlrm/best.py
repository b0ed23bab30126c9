"""The weights of a run's best evaluation, kept on the disk while the run goes on."""

import math
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

    def offer(self, model: nn.Module, auc: float, step: int) -> None:
        """Keeps the weights as they are now if no earlier ones were as good."""
        if not auc > self.auc:  # NaN is not
            return
        self.auc, self.step, self.error = auc, step, None
        try:
            checkpoint.save_weights(self.path, model, {"step": step, "eval_auc": auc})
        except OSError as error:
            self.error = str(error)

    @property
    def kept(self) -> Path | None:
        """Where the best weights are, if they are."""
        return self.path if self.error is None and self.path.exists() else None

    def load(self, model: nn.Module) -> None:
        """Puts the best weights in the place of the model's. Raises ValueError if they are not there or damaged."""
        if self.error is not None:
            raise ValueError(self.error)
        checkpoint.load_weights(self.path, model)

    def remove(self) -> None:
        """Takes the weights off the disk."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self.path.parent.exists() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()

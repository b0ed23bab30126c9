"""What the trainer can be told, checked when it is told."""

import difflib
from dataclasses import dataclass
from math import cos, pi

import torch

from dlrm.checkpoints import CheckpointSettings

DECAYS = ("constant", "linear", "cosine")
PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """Keys `trainer.*`, `checkpoint`, and the root's precision, device and deterministic. Raises ValueError, naming the
    key.

    The run ends after `epochs` or `max_steps`, whichever is first; either may be None, not both.
    """

    batch_size: int
    eval_batch_size: int
    epochs: int | None
    max_steps: int | None
    eval_every: int  # steps between evaluations; 0: only at the end
    log_every: int  # steps between records of the loss
    warmup_steps: int  # steps in which the learning rate grows linearly to its value
    decay: str  # from there on: constant, or linear or cosine down to 0 at the last step
    average_from: float | None  # evaluate the mean of the weights since this share of the steps; None: the last ones
    checkpoint: CheckpointSettings
    save_checkpoint: bool  # at the end of the run; false: no weights stay
    keep_best: bool  # on the disk, while the run lasts: the weights of the best eval/auc, to measure test/* on them too
    cuda_graph: bool | str  # on CUDA one graph per step: auto (where it can hold the step), true or false
    precision: str  # of the dense layers: fp32, tf32 (CUDA: products of 10 bits), or bf16 autocast; the loss is fp32
    device: str
    deterministic: bool

    def __post_init__(self):
        for name in ("batch_size", "eval_batch_size", "log_every"):
            _check_integer(name, getattr(self, name), at_least=1)
        for name in ("eval_every", "warmup_steps"):
            _check_integer(name, getattr(self, name), at_least=0)
        for name in ("epochs", "max_steps"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), at_least=1)
        for key in ("trainer.save_checkpoint", "trainer.keep_best", "deterministic"):
            if not isinstance(value := getattr(self, key.removeprefix("trainer.")), bool):
                raise ValueError(f"{key}={value}: must be true or false")
        if self.average_from is not None:
            _check_share("average_from", self.average_from)
        if self.cuda_graph not in (True, False, "auto"):
            raise ValueError(f"trainer.cuda_graph={self.cuda_graph}: must be auto, true or false")
        if self.checkpoint.every and not self.save_checkpoint:
            raise ValueError(f"checkpoint.every={self.checkpoint.every}: with trainer.save_checkpoint=false none stays")
        if self.epochs is None and self.max_steps is None:
            raise ValueError("trainer.epochs and trainer.max_steps are both null: give one, or the run never ends")
        _check_choice("trainer.decay", self.decay, DECAYS)
        _check_choice("precision", self.precision, PRECISIONS)
        _check_device(self.device)
        if self.cuda_graph is True and torch.device(self.device).type != "cuda":
            raise ValueError(f"trainer.cuda_graph=true: needs device=cuda, not {self.device}")
        if self.precision == "tf32" and torch.device(self.device).type != "cuda":
            raise ValueError(f"precision=tf32: needs device=cuda, not {self.device}")

    def num_steps(self, num_samples: int) -> int:
        """Steps of the whole run when an epoch has num_samples samples (the last, smaller batch is a step too)."""
        per_epoch = -(-num_samples // self.batch_size)
        ends = (None if self.epochs is None else self.epochs * per_epoch, self.max_steps)
        return min(end for end in ends if end is not None)

    def learning_rate_factor(self, step: int, num_steps: int) -> float:
        """What the learning rate of step 0, 1, ... num_steps - 1 is multiplied with: 1 where warm-up ends."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[self.decay]


def _check_integer(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"trainer.{name}={value}: must be a whole number, at least {at_least}")


def _check_share(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"trainer.{name}={value}: must be null or a share of the steps in [0, 1)")


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        device = None
    _check_choice("device", device.type if device else name, ("cpu", "cuda"))
    if device.type == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch {torch.__version__} sees no CUDA device here; device=cpu works")
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if (device.index or 0) >= len(there):
        raise ValueError(f"device={name}: GPUs here: {len(there)} ({', '.join(there)})")


def _check_choice(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}" + (f"; {near[0]}?" if near else ""))

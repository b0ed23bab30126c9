"""A run's checkpoints: written beside training by a thread, from a copy, or while the caller waits, with none.

The newest stay, older ones go once a new one is whole.
"""

import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dlrm import checkpoint
from dlrm.memory import available_bytes, format_bytes

PIECE = 1 << 24  # numbers that are looked at at once
SHARE = 0.5  # of the memory that is free: the most that a snapshot may take where `asynchronous` is auto


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """Keys `checkpoint.*`. Raises ValueError, naming the key."""

    every: int  # steps between checkpoints; 0: only at the end
    keep: int  # how many of them stay
    asynchronous: (
        bool | str
    )  # training goes on while one is written, from a copy: true, false, or auto: if that has room

    def __post_init__(self):
        for name, least in (("every", 0), ("keep", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"checkpoint.{name}={value}: must be a whole number, at least {least}")
        if self.asynchronous not in (True, False, "auto"):
            raise ValueError(f"checkpoint.asynchronous={self.asynchronous}: must be auto, true or false")


class Checkpoints:
    """Writes checkpoints of a model and its optimizers into a folder; what is there is always whole.

    last: the newest one that this object has written, or None.
    """

    def __init__(self, folder: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], settings):
        self.folder, self.settings, self.last = Path(folder), settings, None
        self._model, self._optimizers = model, optimizers
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[tuple[str, str], Tensor] = {}  # of the last snapshot: their memory is used again
        self._is_asynchronous: bool | None = None

    def begin(self, counters: dict) -> None:
        """Begins to write one of the weights as they are now, after the one before is written, and returns; without
        room for a copy, once it is written.

        Raises, here or in the next call or in `wait`, OSError when it cannot be written (those before stay), and
        FloatingPointError for a NaN or an infinity, which is not written."""
        self.wait()
        contents = checkpoint.contents(self._model, self._optimizers)
        if self._copies_first(contents):
            snapshot = contents._replace(files=self._snapshot(contents.files))
            self._thread = threading.Thread(target=self._try_to_write, args=(snapshot, counters), name="checkpoint")
            self._thread.start()
        else:
            self._write(contents, counters)

    def save(self, counters: dict) -> None:
        """Writes one from where the weights are, no copy made, and returns once it is on the disk. Raises as `begin`,
        what stopped the one before too."""
        self.wait()
        self._write(checkpoint.contents(self._model, self._optimizers), counters)

    def wait(self) -> None:
        """Returns when nothing is being written. Raises what stopped the last one, once; see `begin`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if (error := self._error) is not None:
            self._error = None
            raise error

    def release(self) -> None:
        """Gives back the memory of the copies; call `wait` first."""
        self._copies.clear()

    def _copies_first(self, contents: checkpoint.Contents) -> bool:
        if self._is_asynchronous is None:
            self._is_asynchronous = self.settings.asynchronous
            if self._is_asynchronous == "auto":
                room = available_bytes()
                self._is_asynchronous = contents.num_bytes <= SHARE * room
                if not self._is_asynchronous:
                    print(
                        f"checkpoint.asynchronous=auto: a copy takes {format_bytes(contents.num_bytes)} of "
                        f"{format_bytes(room)} of free memory, so training waits while a checkpoint is written"
                    )
        return self._is_asynchronous

    def _snapshot(self, files: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """Copies in the host's memory."""
        copies = {}
        for name, tensors in files.items():
            copies[name] = {}
            for key, tensor in tensors.items():
                copy = self._copies.get((name, key))
                if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                    copy = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format)
                    self._copies[name, key] = copy
                copies[name][key] = copy.copy_(tensor.detach())
        return copies

    def _try_to_write(self, contents: checkpoint.Contents, counters: dict) -> None:
        try:
            self._write(contents, counters)
        except Exception as error:
            self._error = error

    def _write(self, contents: checkpoint.Contents, counters: dict) -> None:
        if (name := not_finite(contents)) is not None:
            raise FloatingPointError(f"step {counters['step']:,}: {name} has a NaN or an infinity: not written")
        path = checkpoint.write(checkpoint.path_of(self.folder, counters["step"]), contents, counters)
        checkpoint.check(path)  # as the disk gives it back
        self.last = path
        for old in checkpoint.all_in(self.folder)[self.settings.keep :]:
            checkpoint.remove(old)


def not_finite(contents: checkpoint.Contents) -> str | None:
    """The first tensor with a NaN or an infinity."""
    for file, tensors in contents.files.items():
        for key, tensor in tensors.items():
            if tensor.is_floating_point():
                flat = tensor.detach().reshape(-1)
                if not all(bool(torch.isfinite(part).all()) for part in flat.split(PIECE)):
                    return f"{file} tensor '{key}'"
    return None

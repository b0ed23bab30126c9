"""Batches on their way to the device."""

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from data.batch import Batch


def on_device(batches: Iterable["Batch"], device: torch.device | str) -> Iterator["Batch"]:
    """The batches on a device. To CUDA the next one is copied, from pinned memory, while the last is worked on."""
    device = torch.device(device)
    if device.type != "cuda":
        yield from batches
        return
    copies, waiting = _stream_of(device), None
    for batch in batches:
        coming = _send(batch, device, copies)
        if waiting is not None:
            yield _receive(*waiting)
        waiting = coming
    if waiting is not None:
        yield _receive(*waiting)


@functools.cache  # what is freed on a stream is used again on the same one
def _stream_of(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _send(batch: "Batch", device: torch.device, copies: torch.cuda.Stream) -> tuple["Batch", torch.cuda.Event]:
    with torch.cuda.stream(copies):
        sent = batch._make(
            field if field is None or field.is_cuda else field.pin_memory().to(device, non_blocking=True)
            for field in batch
        )
        return sent, copies.record_event()


def _receive(batch: "Batch", sent: torch.cuda.Event) -> "Batch":
    """The batch, for the current stream, which waits for the copy; the host does not."""
    stream = torch.cuda.current_stream(batch.labels.device)
    stream.wait_event(sent)
    for field in batch:
        if field is not None:
            field.record_stream(stream)
    return batch

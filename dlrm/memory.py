"""Memory as numbers: what is counted (tensors) and what is measured (the process's or the GPU's peak)."""

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from dlrm.average import WeightAverage

MIB = 1024**2
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of glibc's malloc.h


def keep_heap() -> None:
    """Has malloc, where it is glibc's, serve all threads from one heap and keep what is freed; before they start.

    By default a step's tensors are mapped and given back again and again: 1,000 to 5,000 page faults in a step of the
    Criteo Kaggle model at batch 2048, 5 to 15 % of its time, for the same peak (2 CPU cores, Zen 4).
    A heap per thread has holes where another thread frees what one made.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, 32 * MIB)  # the most that older versions take: larger blocks are mapped one by one
        mallopt(M_TRIM_THRESHOLD, 1024 * MIB)  # more than a step frees at the heap's end


def reset_peak(device: torch.device | str) -> bool:
    """Restarts the peak at what is in use now; true if that worked.

    On the CPU this writes 5 to Linux's /proc/self/clear_refs; where it cannot, the peak is since the process began.
    Before that, what earlier runs of the process have freed goes back to the system, if its C library can.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.init()  # before it, torch knows no device to restart the peak of
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device | str) -> int:
    """The most memory in use since `reset_peak`: torch's allocator on a GPU, the whole resident process on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        import resource  # no /proc: the kernel's own maximum, which cannot be reset

        maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return maximum if sys.platform == "darwin" else maximum * 1024
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def available_bytes() -> int:
    """Memory that can still be had, by Linux's reckoning; elsewhere all that the machine has."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor in the optimizer's state."""
    return sum(map(state_bytes, optimizer.state.values()))


def state_bytes(state: dict) -> int:
    """Bytes of every tensor in an optimizer's state of one parameter."""
    return tensor_bytes(value for value in state.values() if torch.is_tensor(value))


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradient_bytes(parameters: Iterable[torch.Tensor]) -> int:
    """Bytes of the gradients that parameters have now; of a sparse one its indices and values."""
    grads = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return tensor_bytes(part for g in grads for part in ((g._indices(), g._values()) if g.is_sparse else (g,)))


class Needs(NamedTuple):
    """Bytes that training embeddings takes."""

    embeddings: int  # weights, and tables of slices and seeds
    optimizer: int  # the state of their optimizer, the mean of the weights (trainer.average_from) included
    gradients: int  # the most of a step, with one id per bag

    def __str__(self) -> str:
        weights, state, gradients = map(format_bytes, self)
        return (
            f"embeddings need {format_bytes(sum(self))}: weights {weights}, state of their optimizer {state}, "
            f"gradients up to {gradients} with an id per bag"
        )


def needs(embeddings: torch.nn.Module, optimizer: torch.optim.Optimizer, batch_size: int, *, averages: bool) -> Needs:
    """What training will hold of embeddings that are on the meta device, so before it holds anything."""
    optimizers = [optimizer, *([WeightAverage(embeddings.parameters())] if averages else [])]
    for parameter in embeddings.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()  # on meta: of shapes alone
    gradients = sum(embeddings.gradient_bytes(batch_size).values())
    return Needs(embeddings.num_bytes(), sum(map(optimizer_bytes, optimizers)), gradients)


def ledger(embeddings: torch.nn.Module, optimizers: Iterable[torch.optim.Optimizer], batch_size: int) -> list[dict]:
    """Every byte of the embeddings by feature: a row of `feature_table` each, and beside it

    optimizer_bytes     of the optimizers' state, the mean of the weights (trainer.average_from) included
    gradient_bytes      the most of a step, in a batch of one id per bag
    serving_bytes       what inference needs: everything that the embeddings keep
    checkpoint_bytes    of the tensors on disk
    """
    optimizers = list(optimizers)

    def kept_for(weight: torch.nn.Parameter) -> int:
        return sum(state_bytes(optimizer.state.get(weight, {})) for optimizer in optimizers)

    states, gradients = embeddings.split(kept_for), embeddings.gradient_bytes(batch_size)
    return [
        row
        | {
            "optimizer_bytes": states[row["feature"]],
            "gradient_bytes": gradients[row["feature"]],
            "serving_bytes": row["bytes"],
            "checkpoint_bytes": row["bytes"] + states[row["feature"]],
        }
        for row in embeddings.feature_table()
    ]


def format_bytes(num_bytes: int) -> str:
    """Megabytes of 1024^2 bytes, three significant digits below 100:  format_bytes(1572864) == '1.50 MiB'."""
    mib = num_bytes / MIB
    digits = 2 if mib < 10 else 1 if mib < 100 else 0
    return f"{mib:,.{digits}f} MiB"

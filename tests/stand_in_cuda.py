"""A CUDA device that is none: tensors say that they are on cuda:0 and keep their numbers on the CPU, whose kernels work
on them. What a real device refuses is refused: operators on tensors of both devices, and NumPy's views.

It shows that every tensor is put where it is used. It shows nothing of CUDA's kernels, streams and graphs, and it knows
neither sparse tensors nor torch.compile. To import it is to have it, in a process that has not
imported torch, which looks for CUDA but once.

    python tests/stand_in_cuda.py -m "not slow" -k cuda tests    # pytest on it
"""

import contextlib
import ctypes
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def library(folder: str) -> str:
    """stand_in_cuda.cpp, compiled into a folder. Raises RuntimeError with the compiler's words."""
    torch, out = Path(importlib.util.find_spec("torch").origin).parent, f"{folder}/stand_in_cuda.so"
    command = ["c++", "-std=c++20", "-shared", "-fPIC", f"-isystem{torch}/include", Path(__file__).with_suffix(".cpp")]
    command += ["-o", out, f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return out


assert "torch" not in sys.modules, "torch has looked for CUDA already"
with tempfile.TemporaryDirectory() as scratch:
    ctypes.CDLL(library(scratch), ctypes.RTLD_GLOBAL)

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

sys.path.insert(0, str(ROOT))
from dlrm.graph import CudaGraphs
from embeddings import native

ATEN = torch.ops.aten
TAKES_BOTH = {
    ATEN._to_copy.default,
    ATEN.copy_.default,
    ATEN.index.Tensor,
    ATEN.index_put.default,
    ATEN.index_put_.default,
}
make_tensor = torch.tensor


class OnDevice(Tensor):
    """held: the tensor with the numbers."""

    @staticmethod
    def __new__(cls, held: Tensor):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device="cuda:0", **how)

    def __init__(self, held: Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        return call(operator, args, kwargs or {})

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        Tensor.data.__set__(self, other)
        self.held = other.held

    def __getitem__(self, index):
        return super().__getitem__(of_tensors(index))

    def __setitem__(self, index, value):
        super().__setitem__(of_tensors(index), value)

    def tolist(self):
        return self.held.tolist()

    def __repr__(self):
        return f"OnDevice({self.held})"


class Dispatch(TorchDispatchMode):
    """Sees what has no tensor of the device, too: makes one, or moves one there."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return call(operator, args, kwargs or {})


def call(operator, args: tuple, kwargs: dict):
    """An operator on what its tensors hold."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_device = {id(x.held): x for x in given if isinstance(x, OnDevice)}
    if on_device and operator not in TAKES_BOTH:  # a number on the CPU goes with everything
        if any(not isinstance(x, OnDevice) and x.dim() > 0 for x in given):
            raise RuntimeError(f"{operator}: expected all tensors on one device, found cuda:0 and cpu")
    is_there, device = bool(on_device), kwargs.get("device")
    if device is not None:
        is_there, kwargs = torch.device(device).type == "cuda", kwargs | {"device": torch.device("cpu")}
    args_held, kwargs_held = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
    out = operator(*args_held, **kwargs_held)
    if operator is ATEN.copy_.default:
        return args[0]
    if not is_there:
        return out
    # what was written in place is given back
    return tree_map_only(Tensor, lambda x: on_device[id(x)] if id(x) in on_device else OnDevice(x), out)


def tensor(data, *, device=None, pin_memory=False, **how) -> Tensor:
    """torch.tensor, which makes it without asking __torch_dispatch__."""
    return make_tensor(data, **how).to(device)


def of_tensors(index):
    """An index with tensors for its lists, which torch makes so, too."""
    return tree_map_only(list, make_tensor, index, is_leaf=lambda x: isinstance(x, list))


class Stream:
    device_index = 0

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, stream): ...
    def wait_event(self, event): ...
    def record_event(self): ...


class Event:
    def __init__(self, *args, **kwargs): ...
    def record(self): ...
    def synchronize(self): ...
    def elapsed_time(self, end) -> float:
        return 1.0


class Generator(torch.Generator):
    """Draws the CPU's numbers."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.of = torch.device(device)
        return made

    @property
    def device(self):
        return self.of


def install() -> None:
    """From here on torch has the device, in this thread and those that it starts."""
    native.load("require")  # for the CPU, while torch knows no device
    cuda, current = torch.cuda, Stream()
    cuda._lazy_init = cuda.init = cuda.synchronize = cuda.empty_cache = lambda *args: None
    cuda.is_available, cuda.device_count, torch._C._cuda_getDevice = lambda: True, lambda: 1, lambda: 0
    cuda.is_bf16_supported, cuda.get_device_name = lambda *args: True, lambda *args: "a stand-in"
    cuda.Stream, cuda.current_stream, cuda.stream = Stream, lambda *args: current, lambda s: contextlib.nullcontext()
    cuda.Event, cuda._sleep, cuda.memory_allocated = Event, lambda cycles: None, lambda *args: 0
    cuda.mem_get_info = lambda *args: (1 << 34, 1 << 34)
    cuda.reset_peak_memory_stats, cuda.max_memory_allocated = lambda *args: None, lambda *args: 1 << 20
    CudaGraphs.capture = lambda self, run: run
    torch.tensor, torch.Generator = tensor, Generator
    Tensor.pin_memory, Tensor.record_stream = lambda self: self, lambda self, stream: None
    torch.__future__.set_swap_module_params_on_conversion(True)  # else a parameter takes another's type, not its `held`
    Dispatch().__enter__()


install()
if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main(["-p", "no:xdist", *sys.argv[1:]]))

"""Linear and ReLU in one layer, in fp32 by MKL, which torch uses for both, or by oneDNN, which is in the same torch.

MKL takes its slower path on AMD CPUs with AVX-512: 200 against oneDNN's 430 GFLOP/s (Zen 5, 2 threads, M, K, N = 2048,
512, 256, torch 2.13.0). Without AVX-512 they are level, and on Intel's CPUs nothing was measured.
"""

import os
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from embeddings.relu import relu_backward

CHOICES = ("auto", "torch", "onednn")
# what torch.compile's CPU backend calls; private to torch, so it is looked at before it is used
SCHEMA = (
    "mkldnn::_linear_pointwise(Tensor X, Tensor W, Tensor? B, str attr, Scalar?[] scalars, str? algorithm) -> Tensor Y"
)


class LinearReLU(nn.Linear):
    """max(0, x W^T + b), x: [B, in_features], or more columns, of zeros.

    By torch the bits of nn.Linear and nn.ReLU in half their memory, but where `alignment` is above 1.
    """

    by_onednn = False

    def forward(self, x: Tensor) -> Tensor:
        if self.by_onednn:
            return _OneDNN.apply(x, self.weight, self.bias)  # [B, out_features]
        multiple = alignment(x.device)
        return F.linear(_pad(x, multiple), _pad(self.weight, multiple), self.bias).relu_()  # [B, out_features]


def alignment(device: torch.device) -> int:
    """Of what number the columns of a product's matrices shall be a multiple.

    8 on CUDA: tensor cores are fed 16 bytes at a time, 8 numbers of 16 bits or 4 of 32, and matrices of other widths
    take a slower path. NVIDIA, "Matrix Multiplication Background User's Guide", on tensor cores' requirements.
    """
    return 8 if device.type == "cuda" else 1


def _pad(x: Tensor, multiple: int) -> Tensor:
    """x with columns of zeros up to a multiple of so many."""
    rest = -x.shape[1] % multiple
    return F.pad(x, (0, rest)) if rest else x


class _OneDNN(torch.autograd.Function):
    """LinearReLU's three products and its bias and ReLU by oneDNN, in fp32."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = _product(x, weight, bias, "relu")
        ctx.save_for_backward(x, weight, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        x, weight, out = ctx.saved_tensors
        gradient, transposed, to_bias = relu_backward(gradient, out)  # [B, out_features] and its transpose
        to_x = _product(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        return to_x, _product(transposed, x.t()), to_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x weight^T + bias, then ReLU or nothing."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")


def mlp(widths: list[int]) -> nn.Sequential:
    """Linear and ReLU for each step of widths, the last included, as in the published code."""
    steps = zip(widths[:-1], widths[1:], strict=True)
    # Identity is where the ReLU was, so the weights keep their names: 0.weight, 2.weight, ...
    return nn.Sequential(*(layer for step in steps for layer in (LinearReLU(*step), nn.Identity())))


def choose(choice: str, *, device: str, precision: str) -> str:
    """Which library shall run the layers, torch or onednn: a function of the CPU, not of a clock, so that runs repeat.

    choice: of CHOICES. A line says when oneDNN was chosen and cannot be used.
    Raises ValueError for onednn where it has no say: on CUDA, and under precision=bf16, which is by oneDNN anyway.
    """
    on_cpu = torch.device(device).type == "cpu"
    if choice == "onednn" and not on_cpu:
        raise ValueError(f"linear=onednn: is for device=cpu, not {device}; linear=auto works")
    if choice == "onednn" and precision != "fp32":
        raise ValueError(f"linear=onednn: is for precision=fp32, not {precision}; linear=auto works")
    if choice == "auto":
        choice = "onednn" if on_cpu and precision == "fp32" and mkl_is_slow(cpu_flags()) else "torch"
    if choice == "onednn" and (fault := onednn_fault()) is not None:
        print(f"linear: oneDNN's layer cannot be used ({fault}); torch's own runs instead")
        return "torch"
    return choice


def use(model: nn.Module, library: str) -> None:
    """Has every LinearReLU of the model run by what `choose` returned."""
    for layer in model.modules():
        if isinstance(layer, LinearReLU):
            layer.by_onednn = library == "onednn"


def repeat_with_any_threads() -> None:
    """MKL's products shall have the same bits whatever the number of threads, among which it else splits long sums.

    Before a process's first product: MKL reads this once. What it costs: docs/reliability.md. oneMKL's guide,
    "Conditional Numerical Reproducibility".
    """
    said = os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    if not said.endswith("STRICT"):
        print(f"deterministic=true: MKL_CBWR={said} repeats with as many threads only; MKL_CBWR={said},STRICT with any")


def cpu_flags() -> set[str]:
    """What Linux says of the first CPU: its vendor and instruction sets, in /proc/cpuinfo's words; empty elsewhere."""
    try:
        first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:
        return set()
    return {word for line in first.splitlines() if line.startswith(("vendor_id", "flags")) for word in line.split()}


def mkl_is_slow(flags: set[str]) -> bool:
    return {"AuthenticAMD", "avx512f"} <= flags


def emulates_bf16(flags: set[str]) -> bool:
    """Whether an x86 CPU has no instructions for bf16 products."""
    return platform.machine() in ("x86_64", "AMD64") and bool(flags) and flags.isdisjoint({"avx512_bf16", "amx_bf16"})


def onednn_fault() -> str | None:
    """Why oneDNN's layer cannot be used, if so: not in this torch, with other arguments, or wrong on whole numbers."""
    if not torch.backends.mkldnn.is_available():
        return f"torch {torch.__version__} is built without oneDNN"
    try:
        schema = str(torch.ops.mkldnn._linear_pointwise.default._schema)
    except AttributeError:
        return f"torch {torch.__version__} has no mkldnn::_linear_pointwise"
    if schema != SCHEMA:
        return f"torch {torch.__version__} has {schema}"
    x, gradient = torch.arange(-6.0, 6.0).view(3, 4), torch.tensor([[1.0, 2.0], [3.0, -4.0], [5.0, 6.0]])
    weight, bias = (
        torch.arange(-4.0, 4.0).view(2, 4),
        torch.tensor([1.0, -2.0]),
    )  # sums of small whole numbers are exact
    try:  # the layer's three products
        got = _product(x, weight, bias, "relu"), _product(gradient, weight.t()), _product(gradient.t(), x.t())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    want = F.linear(x, weight, bias).relu(), gradient @ weight, gradient.t() @ x
    return None if all(map(torch.equal, got, want)) else f"it answers wrongly in torch {torch.__version__}"

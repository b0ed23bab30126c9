"""Linear and ReLU in one layer: torch's bits, oneDNN's within fp32, and which of them runs."""

import os

import pytest
import torch
from torch import nn

from dlrm import linear
from dlrm.linear import LinearReLU, choose, mlp, use

WIDTHS = [13, 64, 16]


def two_layers(layer: LinearReLU) -> nn.Sequential:
    """nn.Linear and nn.ReLU with the layer's weights."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    plain.load_state_dict(layer.state_dict())
    return nn.Sequential(plain, nn.ReLU())


def case(batch_size: int, library: str):
    """A layer, its input, and an upstream gradient that is zero at the kink, where rounding decides which side."""
    torch.manual_seed(batch_size)
    layer = LinearReLU(37, 19)
    use(layer, library)
    x = torch.randn(batch_size, 37, requires_grad=True)
    off_the_kink = nn.functional.linear(x, layer.weight, layer.bias).detach().abs() > 1e-4
    return layer, x, torch.randn(batch_size, 19) * off_the_kink


def outcome(layer: nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
    """Output and the gradients of the input and the parameters."""
    out = layer(x)
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], upstream)]


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_by_torch_the_bits_are_those_of_two_layers(batch_size):
    layer, x, upstream = case(batch_size, "torch")
    for got, want in zip(outcome(layer, x, upstream), outcome(two_layers(layer), x, upstream), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("batch_size", [1, 7, 300])
def test_by_onednn_the_error_against_fp64_is_that_of_fp32(batch_size):
    layer, x, upstream = case(batch_size, "onednn")
    want = outcome(two_layers(layer).double(), x.detach().double().requires_grad_(), upstream.double())
    for got, exact in zip(outcome(layer, x, upstream), want, strict=True):
        assert got.dtype == torch.float32
        # a sum of up to 300 products; bf16 or tf32 inside would err by 1e-3
        assert (got - exact).abs().max() <= 3e-6 * max(1, exact.abs().max())


def test_by_onednn_an_input_without_gradient_needs_none():
    layer = LinearReLU(3, 2)
    use(layer, "onednn")
    layer(torch.ones(4, 3)).sum().backward()
    assert layer.weight.grad is not None
    with torch.no_grad():
        assert layer(torch.ones(4, 3)).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [37, 40])
def test_columns_of_zeros_up_to_a_multiple_change_nothing(columns, dtype, monkeypatch):
    """As on CUDA, where x has them already or not."""
    layer, x, upstream = case(300, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        want = outcome(layer, x, upstream.to(dtype))
        monkeypatch.setattr(linear, "alignment", lambda device: 8)
        wide = nn.functional.pad(x.detach(), (0, columns - 37)).requires_grad_()
        out, to_x, *others = outcome(layer, wide, upstream.to(dtype))
    assert to_x.shape == (300, columns) and not to_x[:, 37:].any()
    # sums of up to 300 products, in another order; bf16 keeps 8 bits of each result
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    for got, exact in zip([out, to_x[:, :37], *others], want, strict=True):
        torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())


def test_matrices_are_aligned_on_cuda_alone():
    assert (linear.alignment(torch.device("cuda", 1)), linear.alignment(torch.device("cpu"))) == (8, 1)


def test_layers_have_the_numbers_of_the_published_code():
    plain = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU())
    assert list(mlp(WIDTHS).state_dict()) == list(plain.state_dict())


def test_autocast_rounds_what_torch_runs():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mlp(WIDTHS)(torch.ones(2, 13)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "library"),
    [
        ({"AuthenticAMD", "avx2", "avx512f"}, "onednn"),
        ({"AuthenticAMD", "avx2"}, "torch"),
        ({"GenuineIntel", "avx2", "avx512f"}, "torch"),
        (set(), "torch"),
    ],
)
def test_auto_goes_by_the_cpu(flags, library, monkeypatch):
    monkeypatch.setattr(linear, "cpu_flags", lambda: flags)
    assert choose("auto", device="cpu", precision="fp32") == library
    assert choose("auto", device="cpu", precision="bf16") == "torch"
    assert choose("auto", device="cuda", precision="fp32") == "torch"
    assert choose("torch", device="cpu", precision="fp32") == "torch"
    assert choose("onednn", device="cpu", precision="fp32") == "onednn"


class Gone:
    """torch.ops without the operator, or with another one in its place."""

    def __init__(self, **instead):
        self.__dict__ |= instead


def test_without_the_operator_torch_runs_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(linear.torch.ops, "mkldnn", Gone())
    assert choose("onednn", device="cpu", precision="fp32") == "torch"
    words = capsys.readouterr().out
    assert "no mkldnn::_linear_pointwise" in words and "torch's own runs instead" in words and words.count("\n") == 1


def test_an_operator_of_other_arguments_is_not_called(monkeypatch, capsys):
    other = Gone(_linear_pointwise=Gone(default=Gone(_schema="mkldnn::_linear_pointwise(Tensor X) -> Tensor")))
    monkeypatch.setattr(linear.torch.ops, "mkldnn", other)
    assert choose("onednn", device="cpu", precision="fp32") == "torch"
    assert "(Tensor X) -> Tensor" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["forgets the ReLU", "raises"])
def test_an_operator_that_answers_wrongly_is_not_used(fault, monkeypatch, capsys):
    def wrong(x, weight, bias=None, then="none"):
        if fault == "raises":
            raise RuntimeError("could not create a primitive\nmore")
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(linear, "_product", wrong)
    assert choose("onednn", device="cpu", precision="fp32") == "torch"
    words = capsys.readouterr().out
    assert {"raises": "could not create a primitive)", "forgets the ReLU": "answers wrongly"}[fault] in words


@pytest.mark.parametrize(
    "unfit", [{"device": "cuda", "precision": "fp32"}, {"device": "cpu", "precision": "bf16"}], ids=str
)
def test_onednn_is_refused_where_it_has_no_say(unfit):
    with pytest.raises(ValueError, match="linear=onednn: is for .*linear=auto works"):
        choose("onednn", **unfit)


def test_bf16_is_emulated_without_its_instructions(monkeypatch):
    monkeypatch.setattr(linear.platform, "machine", lambda: "x86_64")
    assert linear.emulates_bf16({"AuthenticAMD", "avx2"})
    assert not linear.emulates_bf16({"AuthenticAMD", "avx2", "avx512_bf16"})
    assert not linear.emulates_bf16({"GenuineIntel", "amx_bf16"})
    assert not linear.emulates_bf16(set())


@pytest.mark.parametrize(
    ("said", "words"), [(None, ""), ("AVX2,STRICT", ""), ("AVX2", "MKL_CBWR=AVX2,STRICT with any")]
)
def test_what_the_user_asks_of_mkl_stays_and_its_limit_is_said(said, words, monkeypatch, capsys):
    monkeypatch.setenv("MKL_CBWR", said or "")
    if said is None:
        monkeypatch.delenv("MKL_CBWR")
    linear.repeat_with_any_threads()
    assert os.environ["MKL_CBWR"] == (said or "AUTO,STRICT")
    out = capsys.readouterr().out
    assert words in out and bool(words) == bool(out)

"""ReLU's gradient, its transpose and its sum, against torch's own."""

import pytest
import torch

from embeddings import relu
from embeddings.relu import relu_backward


@pytest.fixture(params=["native", "reference"])
def kernel(request):
    return request.getfixturevalue("native_kernels").relu_backward if request.param == "native" else relu.reference


@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 17), (128, 512), (300, 31), (7, 64), (0, 5), (5, 0)], ids=str)
def test_each_form_is_torchs(kernel, shape):
    torch.manual_seed(0)
    grad, out = torch.randn(shape), torch.randn(shape).relu()
    masked, transposed, sums = kernel(grad, out)
    want = torch.ops.aten.threshold_backward(grad, out, 0)
    assert torch.equal(masked, want) and torch.equal(transposed, want.t())
    assert masked.is_contiguous() and transposed.is_contiguous()
    torch.testing.assert_close(sums.double(), want.double().sum(0), rtol=0, atol=1e-5 * max(1, shape[0] ** 0.5))


def test_special_numbers_pass_as_in_torch(kernel):
    numbers = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1.0])
    out = numbers.repeat(24, 3)  # [24, 24]: whole squares and their edges
    grad = torch.stack([numbers.roll(i) for i in range(8)]).repeat(3, 3)
    masked, transposed, _ = kernel(grad, out)
    want = torch.ops.aten.threshold_backward(grad, out, 0)
    torch.testing.assert_close(masked, want, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(transposed, want.t(), rtol=0, atol=0, equal_nan=True)


def test_views_are_read_as_what_they_are(kernel):
    grad, out = torch.randn(20, 40).t(), torch.randn(80, 40)[::2, ::2]
    for got, want in zip(kernel(grad, out), kernel(grad.contiguous(), out.contiguous()), strict=True):
        assert torch.equal(got, want)


def test_the_bits_do_not_depend_on_threads(native_kernels):
    grad, out = torch.randn(1000, 70), torch.randn(1000, 70)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(native_kernels.relu_backward(grad, out))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "bad",
    [
        (torch.ones(2, 3), torch.ones(3, 2)),
        (torch.ones(2), torch.ones(2)),
        (torch.ones(2, 3).double(), torch.ones(2, 3)),
        (torch.ones(2, 3), torch.ones(2, 3).bfloat16()),
    ],
)
def test_other_shapes_and_types_are_refused(kernel, bad):
    with pytest.raises(RuntimeError, match=r"relu_backward: grad and out must be of one shape \[B, O\], both float32"):
        kernel(*bad)


def test_opcheck():
    torch.library.opcheck(torch.ops.embeddings.relu_backward, (torch.randn(5, 6), torch.randn(5, 6)))
    assert len(relu_backward(torch.ones(2, 3), torch.ones(2, 3))) == 3

"""The dot interaction against loops in numpy: values, gradients, every type, and what is refused."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from embeddings import dot_interaction, interaction

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
MIXED = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
DTYPES = [(dtype, dtype) for dtype in FLOATS] + [*MIXED, (torch.float32, torch.float16)]
SHAPES = [(3, 26, 16), (2, 26, 32), (2, 26, 64), (2, 26, 128)]  # B, F, D
SHAPES += [(5, 1, 1), (4, 1, 16), (3, 2, 3), (70, 8, 10), (2, 9, 33), (0, 3, 4), (2, 0, 5), (2, 3, 0), (1, 70, 6)]
SHAPES += [(1, 90, 70)]  # more tiles than a CUDA block has threads, in both directions
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@pytest.fixture(params=["native", "reference"])
def kernels(request):
    if request.param == "native":
        return request.getfixturevalue("native_kernels")
    return SimpleNamespace(
        dot_interaction=interaction.reference, dot_interaction_backward=interaction.reference_backward
    )


def make_case(shape, dtypes=(torch.float32, torch.float32), device="cpu", seed=0) -> tuple[Tensor, Tensor, Tensor]:
    """dense, embedded and a gradient of the row."""
    (b, f, d), generator = shape, torch.Generator().manual_seed(seed)
    shapes = [((b, d), dtypes[0]), ((b, f, d), dtypes[1]), ((b, d + f * (f + 1) // 2), dtypes[0])]
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64).to(t).to(device) for s, t in shapes)


def numbers(*tensors: Tensor) -> list[np.ndarray]:
    return [x.detach().cpu().double().numpy() for x in tensors]


def rows_of(dense: np.ndarray, embedded: np.ndarray) -> np.ndarray:
    vectors = np.concatenate([dense[:, None], embedded], 1)
    pairs = [(i, j) for i in range(vectors.shape[1]) for j in range(i)]
    products = [(vectors[:, i] * vectors[:, j]).sum(1) for i, j in pairs]
    return np.concatenate([dense, np.reshape(products, (len(pairs), len(dense))).T], 1)


def gradients_of(grad: np.ndarray, dense: np.ndarray, embedded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    vectors = np.concatenate([dense[:, None], embedded], 1)
    of_vectors, column = np.zeros_like(vectors), dense.shape[1]
    of_vectors[:, 0] += grad[:, :column]
    for i in range(vectors.shape[1]):
        for j in range(i):
            of_vectors[:, i] += grad[:, column, None] * vectors[:, j]
            of_vectors[:, j] += grad[:, column, None] * vectors[:, i]
            column += 1
    return of_vectors[:, 0], of_vectors[:, 1:]


def assert_within_rounding(found: Tensor, wanted: np.ndarray, of_magnitudes: np.ndarray, terms: int) -> None:
    """Equal but for the rounding of each of so many products and sums, and of the result to its type."""
    eps = torch.finfo(found.dtype).eps
    eps_of_sums = min(eps, torch.finfo(torch.float32).eps)
    limit = (terms + 1) * eps_of_sums * of_magnitudes + eps * np.abs(wanted) + torch.finfo(found.dtype).tiny
    assert found.shape == wanted.shape
    assert (np.abs(numbers(found)[0] - wanted) <= limit).all()


@each_shape
def test_rows_equal_a_loop_over_pairs(kernels, device, shape):
    for dtypes in DTYPES:
        dense, embedded, _ = make_case(shape, dtypes, device)
        out = kernels.dot_interaction(dense, embedded)
        x, y = numbers(dense, embedded)
        assert out.dtype == dense.dtype and torch.equal(out[:, : shape[2]], dense)
        assert_within_rounding(out, rows_of(x, y), rows_of(abs(x), abs(y)), shape[2])


@each_shape
def test_gradients_equal_a_loop_over_pairs(kernels, device, shape):
    for dtypes in DTYPES:
        dense, embedded, grad = make_case(shape, dtypes, device)
        found = kernels.dot_interaction_backward(grad, dense, embedded)
        g, x, y = numbers(grad, dense, embedded)
        assert [tensor.dtype for tensor in found] == [dense.dtype, embedded.dtype]
        magnitudes = gradients_of(abs(g), abs(x), abs(y))
        for ours, wanted, of_magnitudes in zip(found, gradients_of(g, x, y), magnitudes, strict=True):
            assert_within_rounding(ours, wanted, of_magnitudes, shape[1] + 1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_shape
def test_cuda_gives_the_bits_of_the_cpu(native_kernels, shape):
    for dtypes, multiple in itertools.product(DTYPES, (1, 8)):
        dense, embedded, grad = make_case(shape, dtypes)
        case = dense, embedded, torch.nn.functional.pad(grad, (0, -grad.shape[1] % multiple), value=math.nan)
        results = []
        for dense, embedded, grad in (case, [x.cuda() for x in case]):
            results.append([native_kernels.dot_interaction(dense, embedded, multiple)])
            results[-1] += native_kernels.dot_interaction_backward(grad, dense, embedded, multiple)
        assert all(torch.equal(x, y.cpu()) for x, y in zip(*results, strict=True))


@each_shape
@pytest.mark.parametrize("multiple", [2, 8, 1000])
def test_zeros_fill_a_row_up_to_a_multiple_and_their_gradient_is_nobodys(kernels, device, shape, multiple):
    for dtypes in (DTYPES[0], MIXED[0]):
        dense, embedded, grad = make_case(shape, dtypes, device)
        rest = -grad.shape[1] % multiple
        zeros, anything = (torch.full((shape[0], rest), x, dtype=grad.dtype, device=device) for x in (0, math.nan))
        wanted = torch.cat([kernels.dot_interaction(dense, embedded), zeros], 1)
        assert torch.equal(kernels.dot_interaction(dense, embedded, multiple), wanted)
        found = kernels.dot_interaction_backward(torch.cat([grad, anything], 1), dense, embedded, multiple)
        wanted = kernels.dot_interaction_backward(grad, dense, embedded)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("multiple", [0, -8, 1025, 2**62])
def test_a_multiple_out_of_range_is_refused(kernels, device, multiple):
    dense, embedded, grad = make_case((2, 3, 4), device=device)
    words = f"multiple must be from 1 to 1024, not {multiple}"
    with pytest.raises(RuntimeError, match=words):
        kernels.dot_interaction(dense, embedded, multiple)
    with pytest.raises(RuntimeError, match=words):
        kernels.dot_interaction_backward(grad, dense, embedded, multiple)


def test_tensors_of_any_strides_are_read(kernels, device):
    dense, embedded, grad = make_case((6, 3, 5), device=device)
    constant, backwards = dense[:1].expand(6, 5), embedded.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    one = grad[:1, :1].expand_as(grad)
    out, wanted = (kernels.dot_interaction(constant, x) for x in (backwards, embedded))
    assert torch.equal(out, wanted)
    found = kernels.dot_interaction_backward(one, constant, backwards)
    wanted = kernels.dot_interaction_backward(one.clone(), constant.clone(), embedded)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


@pytest.mark.parametrize("shape", [(200, 26, 16), (300, 7, 33)])
def test_the_number_of_threads_changes_no_bit(native_kernels, shape):
    dense, embedded, grad = make_case(shape)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([native_kernels.dot_interaction(dense, embedded)])
            results[-1] += native_kernels.dot_interaction_backward(grad, dense, embedded)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_a_sample_does_not_depend_on_the_others(native_kernels):
    dense, embedded, grad = make_case((90, 26, 16))
    out = native_kernels.dot_interaction(dense, embedded)
    found = native_kernels.dot_interaction_backward(grad, dense, embedded)
    for b in (0, 41, 89):
        one = slice(b, b + 1)
        assert torch.equal(native_kernels.dot_interaction(dense[one], embedded[one]), out[one])
        alone = native_kernels.dot_interaction_backward(grad[one], dense[one], embedded[one])
        assert all(torch.equal(x, y[one]) for x, y in zip(alone, found, strict=True))


@pytest.mark.parametrize("shape", [(2, 3, 5), (1, 4, 2), (0, 2, 3)])
def test_gradcheck(device, shape):
    dense, embedded, _ = make_case(shape, (torch.float64, torch.float64), device)
    for multiple in (1, 8):
        inputs = (dense.requires_grad_(), embedded.requires_grad_(), multiple)
        assert torch.autograd.gradcheck(dot_interaction, inputs)


def test_a_second_derivative_is_refused():
    dense, embedded, _ = make_case((2, 3, 4))
    out = dot_interaction(dense.requires_grad_(), embedded)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), dense, create_graph=True)
    with pytest.raises(RuntimeError, match="dot_interaction has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtypes", [DTYPES[0], MIXED[0]])
def test_opcheck(device, dtypes):
    dense, embedded, grad = make_case((3, 2, 4), dtypes, device)
    ops = torch.ops.embeddings
    leaves, padded = (dense.clone().requires_grad_(), embedded.clone().requires_grad_()), grad.new_ones(3, 8)
    for multiple, of_rows in ((1, grad), (8, padded)):
        torch.library.opcheck(ops.dot_interaction.default, (*leaves, multiple))
        torch.library.opcheck(ops.dot_interaction_backward.default, (of_rows, dense, embedded, multiple))


def test_compiled_whole_it_gives_the_same(device):
    dense, embedded, grad = make_case((3, 2, 4), device=device)
    results = []
    for function in (dot_interaction, torch.compile(dot_interaction, fullgraph=True, backend="aot_eager")):
        leaves = dense.clone().requires_grad_(), embedded.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, grad.bfloat16())])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_under_autocast_the_row_is_of_its_type_and_the_embeddings_are_not_rounded(device):
    dense, embedded, _ = make_case((4, 26, 16), device=device)
    leaves = dense.requires_grad_(), embedded.requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = dot_interaction(*leaves)
    rounded = dense.detach().bfloat16()
    x, y = numbers(rounded, embedded)
    assert out.dtype == torch.bfloat16
    assert_within_rounding(out, rows_of(x, y), rows_of(abs(x), abs(y)), 16)
    out.float().sum().backward()
    assert dense.grad.dtype == embedded.grad.dtype == torch.float32
    wanted = gradients_of(np.ones(out.shape), x, y)
    magnitudes = gradients_of(np.ones(out.shape), abs(x), abs(y))
    assert_within_rounding(dense.grad.bfloat16(), wanted[0], magnitudes[0], 27)
    assert_within_rounding(embedded.grad, wanted[1], magnitudes[1], 27)


@pytest.mark.parametrize(
    ("dense", "embedded", "words"),
    [
        ((5, 4), (5, 3, 3), r"must be \[B, D\] and embedded \[B, F, D\], not \[5, 4\] and \[5, 3, 3\]"),
        ((5, 4), (6, 3, 4), r"not \[5, 4\] and \[6, 3, 4\]"),
        ((5,), (5, 3, 4), r"not \[5\] and \[5, 3, 4\]"),
        ((5, 4), (5, 4), r"not \[5, 4\] and \[5, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(kernels, device, dense, embedded, words):
    dense, embedded = torch.zeros(dense, device=device), torch.zeros(embedded, device=device)
    with pytest.raises(RuntimeError, match=words):
        kernels.dot_interaction(dense, embedded)
    with pytest.raises(RuntimeError, match=words):
        kernels.dot_interaction_backward(dense, dense, embedded)


def test_a_gradient_of_another_shape_or_dtype_is_refused(kernels, device):
    dense, embedded, grad = make_case((2, 3, 4), device=device)
    for bad in (grad[:, 1:], grad[:1], grad.double()):
        with pytest.raises(RuntimeError, match=r"grad must be \[2, 10\], of dense's dtype and device, not \["):
            kernels.dot_interaction_backward(bad, dense, embedded)


def test_types_that_do_not_go_together_are_refused(kernels, device):
    for pair in itertools.product([*FLOATS, torch.int64], repeat=2):
        if pair not in DTYPES:
            dense, embedded = torch.zeros(2, 3, dtype=pair[0]), torch.zeros(2, 4, 3, dtype=pair[1])
            with pytest.raises(RuntimeError, match="dot_interaction: dense and embedded must be"):
                kernels.dot_interaction(dense.to(device), embedded.to(device))

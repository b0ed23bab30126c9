"""Gradients through autograd: exact, repeatable, of any kind and any layout; the operators keep torch's contracts."""

import pytest
import torch
from oracle import ATOMIC, DENSE, HASHED, MAX, MEAN, ROWS, SORTED, SUM, assert_same_bits, make_case
from torch.autograd import gradcheck

from embeddings import EmbeddingBags, Hashed, native, reference

POOLINGS = pytest.mark.parametrize("pooling", [SUM, MEAN, MAX], ids=["sum", "mean", "max"])
MAPS = pytest.mark.parametrize("index_map, width", [(DENSE, 6), (HASHED, 1), (HASHED, 3)])
BAGS = [[2, 0, 3], [1, 1, 4]]


@pytest.fixture
def ops():
    """The operators as the dispatcher picks them in this process."""
    native.ensure()
    return torch.ops.embeddings


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def small_case(index_map, width, weighted=False, dtype=torch.float64):
    return make_case(BAGS, index_map=index_map, width=width, dim=6, rows=5, num_slots=4, weighted=weighted, dtype=dtype)


def weights_grad(case, ops, grad, pooling, accumulate):
    weights = case.weights.clone().requires_grad_()
    case._replace(weights=weights).forward(ops, pooling, accumulate).backward(grad)
    return weights.grad


@MAPS
@POOLINGS
@pytest.mark.parametrize("accumulate", [SORTED, ATOMIC])
def test_gradcheck_of_the_weights(ops, index_map, width, pooling, accumulate):
    case = small_case(index_map, width)
    weights = case.weights.requires_grad_()
    assert gradcheck(lambda w: case._replace(weights=w).forward(ops, pooling, accumulate), weights)


@MAPS
@pytest.mark.parametrize("pooling", [SUM, MEAN], ids=["sum", "mean"])
def test_gradcheck_of_weights_and_sample_weights_together(ops, index_map, width, pooling):
    case = small_case(index_map, width, weighted=True)
    inputs = (case.weights.requires_grad_(), case.sample_weights.requires_grad_())
    assert gradcheck(lambda w, v: case._replace(weights=w, sample_weights=v).forward(ops, pooling), inputs)


@MAPS
@POOLINGS
def test_reference_backward_equals_autograd_through_its_forward(index_map, width, pooling):
    case = small_case(index_map, width, weighted=pooling != MAX)
    weights, grad = case.weights.clone().requires_grad_(), case.random_grad()
    (by_torch,) = torch.autograd.grad(case._replace(weights=weights).forward(reference, pooling), weights, grad)
    torch.testing.assert_close(case.backward(reference, grad, pooling), by_torch, rtol=1e-12, atol=1e-12)


@MAPS
@POOLINGS
def test_expanded_gradient_equals_the_same_numbers_in_full(ops, index_map, width, pooling):
    case, grads = small_case(index_map, width), []
    for reduce in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        weights = case.weights.clone().requires_grad_()
        reduce(case._replace(weights=weights).forward(ops, pooling)).backward()
        grads.append(weights.grad)
    assert grads[0].abs().sum() > 0
    assert_same_bits(*grads)


@MAPS
@POOLINGS
def test_gradient_of_a_slice_equals_that_of_zeros_elsewhere(ops, index_map, width, pooling):
    case = small_case(index_map, width)
    weights = case.weights.clone().requires_grad_()
    case._replace(weights=weights).forward(ops, pooling)[1:, :, ::2].pow(2).sum().backward()
    out = case.forward(ops, pooling)
    grad = torch.zeros_like(out)
    grad[1:, :, ::2] = 2 * out[1:, :, ::2]
    assert_same_bits(weights.grad, case.backward(ops, grad, pooling))


@MAPS
@POOLINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_the_dense_gradient_scattered(ops, index_map, width, pooling, dtype):
    case = small_case(index_map, width, dtype=dtype)
    dense = weights_grad(case, ops, case.random_grad(), pooling, SORTED)
    rows = weights_grad(case, ops, case.random_grad(), pooling, ROWS)
    assert rows.is_sparse and not dense.is_sparse
    slots = rows._indices()[0]
    assert slots.equal(slots.unique()) and len(slots) < len(dense)
    assert_same_bits(rows.to_dense(), dense)


@POOLINGS
@pytest.mark.parametrize("accumulate", [SORTED, ROWS])
def test_sorted_gradients_repeat_and_do_not_depend_on_threads(ops, two_threads, pooling, accumulate):
    counts = torch.randint(0, 40, (3, 700), generator=torch.Generator().manual_seed(0)).numpy()
    case = make_case(counts, num_slots=50, weighted=pooling != MAX)
    outs, grads, runs = [], [], (1, 2, 2, 1)
    for threads in runs:
        torch.set_num_threads(threads)
        outs.append(case.forward(ops, pooling))
        grads.append(weights_grad(case, ops, case.random_grad(), pooling, accumulate).to_dense())
    for out, grad in zip(outs[1:], grads[1:], strict=True):
        assert_same_bits(out, outs[0])
        assert_same_bits(grad, grads[0])


def test_atomic_errs_at_most_twice_as_much_as_the_fp32_reference(kernels, device):
    case = make_case([[3000, 500], [1, 4000]], num_slots=5)
    grad = case.random_grad()
    exact = case._replace(weights=case.weights.double()).backward(reference, grad.double(), SUM)
    atomic = case.to(device).backward(kernels, grad.to(device), SUM, atomic=True).cpu()
    of_reference = (case.backward(reference, grad, SUM) - exact).abs().max()
    assert 0 < of_reference < 1e-5 * exact.abs().max()
    assert (atomic - exact).abs().max() <= 2 * of_reference


def test_atomic_is_refused_when_deterministic_with_the_alternatives_named(ops):
    case = small_case(HASHED, 3)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"atomic.*(sorted|rows)"):
            weights_grad(case, ops, case.random_grad(), SUM, ATOMIC)
        sorted_grad = weights_grad(case, ops, case.random_grad(), SUM, SORTED)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(sorted_grad, weights_grad(case, ops, case.random_grad(), SUM, SORTED))


def test_frozen_weights_get_no_gradient_and_sample_weights_do(ops):
    case = small_case(HASHED, 3, weighted=True)
    sample_weights = case.sample_weights.clone().requires_grad_()
    case._replace(sample_weights=sample_weights).forward(ops, SUM).sum().backward()
    ones = torch.ones(3, 2, 6, dtype=torch.float64)
    assert_same_bits(sample_weights.grad, case.backward_sample_weights(ops, ones, SUM))


@pytest.mark.parametrize("weighted, pooling", [(False, MAX), (True, SUM), (True, MEAN)])
@pytest.mark.parametrize("accumulate", [SORTED, ROWS])
def test_opcheck_of_the_forward(ops, weighted, pooling, accumulate):
    case = small_case(HASHED, 3, weighted, torch.float32)
    how = (case.batch_size, case.dim, HASHED, pooling, accumulate, case.features)
    slab = (case.weights.requires_grad_(), case.ids, case.offsets, case.sample_weights, case.tables)
    # aot_dispatch compares gradients as dense tensors: sparse ones are not traceable in torch
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    utils += ("test_aot_dispatch_dynamic",) if accumulate == SORTED else ()
    torch.library.opcheck(ops.bag.default, (*slab, *how), test_utils=utils)


@pytest.mark.parametrize("one_id", [True, False])
def test_opcheck_of_the_backwards(ops, one_id):
    case = make_case([[1, 1, 1], [1, 1, 1]], weighted=True, one_id=one_id)
    grad = case.random_grad()
    batch = (case.weights, case.ids, case.offsets)
    slab = (grad, *batch, case.sample_weights, case.tables, HASHED, MEAN)
    torch.library.opcheck(ops.bag_backward.default, (*slab, False, case.features))
    torch.library.opcheck(ops.bag_backward_rows.default, (*slab, case.features))
    sample_weights = (grad, *batch, case.tables, HASHED, MEAN, case.features)
    torch.library.opcheck(ops.bag_backward_sample_weights.default, sample_weights)


def test_compiled_whole_equals_eager():
    backend = Hashed(embedding_dim=8, compression=0.5, accumulate="sorted", block=4)
    bags = EmbeddingBags(dict.fromkeys(["C1", "C2"], backend), {"C1": 100, "C2": 300}, pooling="mean", seed=0)
    compiled = torch.compile(bags, fullgraph=True)
    for ids, offsets in [(torch.tensor([0, 99, 5, 299]), None), (torch.arange(5), torch.tensor([0, 2, 2, 3, 5]))]:
        eager_out, out = bags(ids, offsets), compiled(ids, offsets)
        assert_same_bits(out, eager_out)
        (eager_grad,) = torch.autograd.grad(eager_out.pow(2).sum(), bags.slabs[0].weight)
        (grad,) = torch.autograd.grad(out.pow(2).sum(), bags.slabs[0].weight)
        assert_same_bits(grad, eager_grad)

"""Gradients through autograd: exact, repeatable, of any kind and any layout; the operators keep torch's contracts."""

import pytest
import torch
from builders import YAMLS, from_yaml, make_bags, make_batch
from oracle import (
    ATOMIC,
    CONCAT,
    FEATURES,
    MAX,
    MEAN,
    MULTIPLY,
    PARTITION,
    POOLINGS,
    PROBES,
    ROWS,
    SIGNED,
    SORTED,
    SUM,
    WEIGHTED,
    assert_same_bits,
    make_case,
)
from torch._subclasses import FakeTensorMode
from torch.autograd import gradcheck

from embeddings import native, reference
from embeddings.ops import weights_gradient

KINDS = {
    "dense": dict(index_map=PARTITION),
    "hashed-1": dict(width=1),
    "hashed-3": dict(width=3),
    "signed pool of two dims": dict(index_map=SIGNED, dims=(6, 4), width=2, shared=FEATURES),
    "bloom": dict(probes=3, width=6, shared=PROBES),
    "bloom learned": dict(combine=WEIGHTED, probes=4, width=6, shared=PROBES),
    "qr mult": dict(index_map=PARTITION, combine=MULTIPLY, probes=2),
    "qr mult of three": dict(index_map=PARTITION, combine=MULTIPLY, probes=3),
    "qr concat": dict(index_map=PARTITION, combine=CONCAT, probes=2, dims=(2, 3)),
    "weighted signed chunks": dict(index_map=SIGNED, combine=WEIGHTED, probes=3, width=2, shared=FEATURES),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=[name.replace(" ", "-") for name in KINDS])
each_pooling = pytest.mark.parametrize("pooling", POOLINGS, ids=["sum", "mean", "max"])
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


def small_case(kind, weighted=False, dtype=torch.float64):
    return make_case(BAGS, **{"dims": (6,), **kind}, rows=(5,), num_slots=4, weighted=weighted, dtype=dtype)


def weights_grad(case, ops, grad, pooling, accumulate):
    weights = case.weights.clone().requires_grad_()
    case._replace(weights=weights).forward(ops, pooling, accumulate).backward(grad)
    return weights.grad


@each_kind
@each_pooling
@pytest.mark.parametrize("accumulate", [SORTED, pytest.param(ATOMIC, marks=pytest.mark.once)])
def test_gradcheck_of_the_weights(ops, kind, pooling, accumulate):
    case = small_case(kind)
    weights = case.weights.requires_grad_()
    fast = accumulate == ATOMIC  # which is sorted's sum in another order
    assert gradcheck(lambda w: case._replace(weights=w).forward(ops, pooling, accumulate), weights, fast_mode=fast)


@each_kind
@pytest.mark.parametrize("pooling", [SUM, MEAN], ids=["sum", "mean"])
def test_gradcheck_of_weights_and_sample_weights_together(ops, kind, pooling):
    case = small_case(kind, weighted=True)
    inputs = (case.weights.requires_grad_(), case.sample_weights.requires_grad_())
    assert gradcheck(lambda w, v: case._replace(weights=w, sample_weights=v).forward(ops, pooling), inputs)


@each_kind
@each_pooling
def test_reference_backward_equals_autograd_through_its_forward(kind, pooling):
    case = small_case(kind, weighted=pooling != MAX)
    weights, grad = case.weights.clone().requires_grad_(), case.random_grad()
    (by_torch,) = torch.autograd.grad(case._replace(weights=weights).forward(reference, pooling), weights, grad)
    torch.testing.assert_close(case.backward(reference, grad, pooling), by_torch, rtol=1e-12, atol=1e-12)


@each_kind
@each_pooling
def test_expanded_gradient_equals_the_same_numbers_in_full(ops, kind, pooling):
    case, grads = small_case(kind), []
    for reduce in (lambda out: out.sum(), lambda out: (out * torch.ones_like(out)).sum()):
        weights = case.weights.clone().requires_grad_()
        reduce(case._replace(weights=weights).forward(ops, pooling)).backward()
        grads.append(weights.grad)
    assert grads[0].abs().sum() > 0
    assert_same_bits(*grads)


@each_kind
@each_pooling
def test_gradient_of_a_slice_equals_that_of_zeros_elsewhere(ops, kind, pooling):
    case = small_case(kind)
    weights = case.weights.clone().requires_grad_()
    case._replace(weights=weights).forward(ops, pooling)[1:, ::2].pow(2).sum().backward()
    out = case.forward(ops, pooling)
    grad = torch.zeros_like(out)
    grad[1:, ::2] = 2 * out[1:, ::2]
    assert_same_bits(weights.grad, case.backward(ops, grad, pooling))


@each_kind
@each_pooling
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_the_dense_gradient_scattered(ops, kind, pooling, dtype):
    case = small_case(kind, dtype=dtype)
    dense = weights_grad(case, ops, case.random_grad(), pooling, SORTED)
    rows = weights_grad(case, ops, case.random_grad(), pooling, ROWS)
    assert rows.is_sparse and not dense.is_sparse
    units = rows._indices()[0]
    assert units.equal(units.unique()) and len(units) < len(dense)
    assert_same_bits(torch.zeros_like(dense).index_copy_(0, units, rows._values()), dense)


def many_bags(kind, pooling):
    counts = torch.randint(0, 20, (3, 300), generator=torch.Generator().manual_seed(0)).numpy()
    return make_case(counts, **{"num_slots": 50, **kind}, weighted=pooling != MAX)


def test_sorted_gradients_repeat_and_do_not_depend_on_threads(ops, two_threads):
    pooling = MEAN
    case, results = many_bags(KINDS["bloom learned"], pooling), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = weights_grad(case, ops, case.random_grad(), pooling, ROWS)
        dense = weights_grad(case, ops, case.random_grad(), pooling, SORTED)
        results.append((case.forward(ops, pooling), dense, rows._indices(), rows._values()))
    for found, wanted in zip(*results, strict=True):
        assert_same_bits(found, wanted)


@each_kind
@each_pooling
def test_native_kernels_of_two_threads_equal_the_reference_of_one(native_kernels, two_threads, kind, pooling):
    case = many_bags(kind, pooling)
    grad = case.random_grad()
    torch.set_num_threads(1)
    wanted = case.forward(reference, pooling), case.backward(reference, grad, pooling)
    torch.set_num_threads(2)
    assert_same_bits(case.forward(native_kernels, pooling), wanted[0])
    assert_same_bits(case.backward(native_kernels, grad, pooling), wanted[1])
    units, values = case.backward_rows(native_kernels, grad, pooling)
    assert_same_bits(values, wanted[1][units])


@each_kind
def test_atomic_errs_as_sums_taken_one_by_one_and_on_a_cpu_as_the_reference(kernels, device, kind, monkeypatch):
    case = make_case([[3000, 500], [1, 4000]], **{"num_slots": 5, **kind}, rows=(5,))
    grad = case.random_grad()
    exact = case._replace(weights=case.weights.double()).backward(reference, grad.double(), SUM)
    atomic = case.to(device).backward(kernels, grad.to(device), SUM, atomic=True).cpu()

    def error(found):
        return (found - exact).abs().max()

    if device == "cpu":
        assert 0 < error(atomic) == error(case.backward(reference, grad, SUM)) < 1e-5 * exact.abs().max()
    monkeypatch.setattr(reference, "RUN", 1 << 40)  # no runs: from the first contribution to the last
    assert error(atomic) <= 4 * error(case.backward(reference, grad, SUM)) < 1e-3 * exact.abs().max()


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_atomic_is_sorted_on_a_cpu_and_so_allowed_when_deterministic(ops, deterministic):
    case = small_case(KINDS["hashed-3"])
    atomic, of_sorted = (weights_grad(case, ops, case.random_grad(), SUM, how) for how in (ATOMIC, SORTED))
    assert_same_bits(atomic, of_sorted)


def test_atomic_is_refused_on_cuda_when_deterministic_with_the_alternatives_named(deterministic):
    with FakeTensorMode():  # which has CUDA without a GPU
        weights, ids = torch.empty(5, 4, device="cuda"), torch.zeros(3, dtype=torch.int64, device="cuda")
        grad = torch.empty(3, 4, device="cuda")
        call = (grad, weights, (ids, None, None, ids), (1, 1, PARTITION, 0, SUM), ATOMIC, "C1")
        with pytest.raises(RuntimeError, match=r"atomic.*sorted or rows .*sparse=True"):
            weights_gradient(*call)
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="atomic.*sorted or rows"):
            assert weights_gradient(*call).shape == weights.shape


@each_kind
def test_frozen_weights_get_no_gradient_and_sample_weights_do(ops, kind):
    case = small_case(kind, weighted=True)
    sample_weights = case.sample_weights.clone().requires_grad_()
    case._replace(sample_weights=sample_weights).forward(ops, SUM).sum().backward()
    ones = torch.ones(3, case.columns, dtype=torch.float64)
    assert_same_bits(sample_weights.grad, case.backward_sample_weights(ops, ones, SUM))


def test_a_gradient_cannot_be_differentiated_again(ops):
    case = small_case(KINDS["hashed-3"])
    weights = case.weights.clone().requires_grad_()
    out = case._replace(weights=weights).forward(ops, SUM)
    (grad,) = torch.autograd.grad(out.pow(2).sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("weighted, pooling", [(False, MAX), (True, SUM), (True, MEAN)])
@pytest.mark.parametrize("accumulate", [SORTED, ROWS])
@pytest.mark.parametrize("kind", [KINDS[name] for name in ("hashed-3", "bloom learned", "qr concat")])
def test_opcheck_of_the_forward(ops, kind, weighted, pooling, accumulate):
    case = small_case(kind, weighted, torch.float32)
    case.weights.requires_grad_()
    # aot_dispatch compares gradients as dense tensors: sparse ones are not traceable in torch
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    utils += ("test_aot_dispatch_dynamic",) if accumulate == SORTED else ()
    call = (*case[:7], *case.how, pooling, accumulate, case.features)
    torch.library.opcheck(ops.bag.default, call, test_utils=utils)


@pytest.mark.parametrize("one_id", [True, False])
@pytest.mark.parametrize("kind", [KINDS[name] for name in ("hashed-3", "bloom learned", "qr concat")])
def test_opcheck_of_the_backwards(ops, one_id, kind):
    case = make_case([[1, 1, 1], [1, 1, 1]], **kind, weighted=True, one_id=one_id)
    grad = case.random_grad()
    slab = (grad, *case[:5], *case.how, MEAN)
    torch.library.opcheck(ops.bag_backward.default, (*slab, False, case.features))
    torch.library.opcheck(ops.bag_backward_rows.default, (*slab, case.features))
    sample_weights = (grad, *case[:3], case.tables, *case.how, MEAN, case.features)
    torch.library.opcheck(ops.bag_backward_sample_weights.default, sample_weights)


def test_every_backend_compiled_whole_equals_eager():
    rows = [100, 300, 70, 50, 400, 90][: len(YAMLS)]
    backends = [from_yaml(path, compression=0.5, accumulate="sorted") for path in YAMLS]
    bags = make_bags(backends, rows, pooling="mean")
    compiled = torch.compile(bags, fullgraph=True)
    for ids, offsets in [(torch.zeros(2 * len(rows), dtype=torch.int64), None), make_batch(rows, batch_size=3)]:
        eager_out, out = bags(ids, offsets), compiled(ids, offsets)
        assert_same_bits(out, eager_out)
        eager = torch.autograd.grad(eager_out.pow(2).sum(), list(bags.parameters()))
        for found, wanted in zip(torch.autograd.grad(out.pow(2).sum(), list(bags.parameters())), eager, strict=True):
            assert_same_bits(found, wanted)

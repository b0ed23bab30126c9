"""The operators' values: against a float64 oracle in Python loops, and native against reference to the last bit."""

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import DENSE, HASHED, MAX, MEAN, SUM, assert_close, assert_same_bits, make_case

from embeddings import reference

MAPS = pytest.mark.parametrize(
    "index_map, width",
    [(DENSE, 16), (HASHED, 1), (HASHED, 8), (HASHED, 16)],
    ids=["dense", "hashed-1", "hashed-8", "hashed-16"],
)
POOLINGS = pytest.mark.parametrize("pooling", [SUM, MEAN, MAX], ids=["sum", "mean", "max"])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]

BAGS = {  # ids of each bag, [features, samples]
    "some": [[2, 1, 3], [1, 1, 1], [4, 0, 2]],
    "first bag empty": [[0, 2], [3, 1]],
    "last bag empty": [[2, 1], [3, 0]],
    "middle bag empty": [[2, 0, 1]],
    "all bags empty": [[0, 0], [0, 0]],
    "feature empty": [[2, 1], [0, 0], [1, 2]],
    "one sample": [[3], [1]],
    "one feature": [[1, 5, 2]],
    "one bag": [[7]],
    "around a run": [[63, 64, 65, 1], [127, 128, 129, 192]],
    "runs of runs": [[4097, 0, 64]],
}


def assert_equals_oracle(case, kernels, pooling, device):
    there = case.to(device)
    grad = case.random_grad()
    assert_close(there.forward(kernels, pooling), oracle.forward(case, pooling))
    slab_grad = oracle.backward(case, grad, pooling)
    assert_close(there.backward(kernels, grad.to(device), pooling), slab_grad)
    slots, values = there.backward_rows(kernels, grad.to(device), pooling)
    touched = [s for f, b in np.ndindex(len(case.tables), case.batch_size) for n in case.bag(f, b)
               for s in case.slots(f, int(case.ids[n]))]  # fmt: skip
    assert slots.tolist() == sorted(set(touched))
    assert_close(values, slab_grad[slots.cpu().numpy()])
    if pooling != MAX:
        by_hand = oracle.backward_sample_weights(case, grad, pooling)
        assert_close(there.backward_sample_weights(kernels, grad.to(device), pooling), by_hand)


def assert_native_equals_reference(case, native_kernels, pooling, device):
    there, grad = case.to(device), case.random_grad()
    assert_same_bits(there.forward(native_kernels, pooling), case.forward(reference, pooling))
    assert_same_bits(there.backward(native_kernels, grad.to(device), pooling), case.backward(reference, grad, pooling))
    native_rows = there.backward_rows(native_kernels, grad.to(device), pooling)
    for found, wanted in zip(native_rows, case.backward_rows(reference, grad, pooling), strict=True):
        assert_same_bits(found, wanted)
    if pooling != MAX:
        native_grad = there.backward_sample_weights(native_kernels, grad.to(device), pooling)
        assert_same_bits(native_grad, case.backward_sample_weights(reference, grad, pooling))


@MAPS
@POOLINGS
@pytest.mark.parametrize("bags", BAGS.values(), ids=BAGS)
def test_bags_equal_the_oracle(kernels, device, index_map, width, pooling, bags):
    case = make_case(bags, index_map=index_map, width=width, num_slots=211)
    assert_equals_oracle(case, kernels, pooling, device)


@MAPS
@pytest.mark.parametrize("pooling", [SUM, MEAN], ids=["sum", "mean"])
@pytest.mark.parametrize("bags", ["some", "all bags empty", "around a run"])
def test_weighted_bags_equal_the_oracle(kernels, device, index_map, width, pooling, bags):
    case = make_case(BAGS[bags], index_map=index_map, width=width, weighted=True)
    assert_equals_oracle(case, kernels, pooling, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@POOLINGS
def test_every_dtype_equals_the_oracle(kernels, device, dtype, ids_dtype, pooling):
    weighted = pooling != MAX
    case = make_case(BAGS["some"], width=4, dtype=dtype, ids_dtype=ids_dtype, weighted=weighted, num_slots=9)
    assert_equals_oracle(case, kernels, pooling, device)


@pytest.mark.parametrize("one_id", [True, False], ids=["no offsets", "offsets"])
@pytest.mark.parametrize("positions", [(0,), (2,), (1, 3), (3, 0), (0, 1, 2, 3)])
@POOLINGS
def test_a_slab_reads_only_its_features_of_the_batch(kernels, device, one_id, positions, pooling):
    case = make_case(np.ones((4, 5), int), positions=positions, one_id=one_id, weighted=pooling != MAX)
    assert_equals_oracle(case, kernels, pooling, device)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@POOLINGS
def test_a_batch_of_zero_samples_gives_empty_results(kernels, device, ids_dtype, pooling):
    for one_id in (True, False):
        case = make_case(np.zeros((3, 0), int), ids_dtype=ids_dtype, one_id=one_id).to(device)
        assert case.forward(kernels, pooling).shape == (0, 3, 16)
        grad = case.random_grad().to(device)
        assert case.backward(kernels, grad, pooling).equal(torch.zeros_like(case.weights))
        slots, values = case.backward_rows(kernels, grad, pooling)
        assert (slots.shape, slots.dtype, values.shape) == ((0,), torch.int64, (0, 8))
        if pooling != MAX:
            assert case.backward_sample_weights(kernels, grad, pooling).shape == (0,)


@POOLINGS
def test_strided_arguments_mean_what_contiguous_ones_do(kernels, device, pooling):
    case = make_case(BAGS["some"], weighted=pooling != MAX).to(device)

    def every_other(x):
        return torch.stack([x, x + 1], x.dim()).select(-1, 0) if x is not None else None

    strided = case._replace(
        weights=case.weights.t().contiguous().t(),
        ids=every_other(case.ids),
        offsets=every_other(case.offsets),
        sample_weights=every_other(case.sample_weights),
        tables=every_other(case.tables),
    )
    grad = case.random_grad().to(device)
    grads = [every_other(grad), grad.transpose(0, 2).contiguous().transpose(0, 2)]
    assert not any(x.is_contiguous() for x in (strided.weights, strided.ids, strided.offsets, strided.tables, *grads))
    assert_same_bits(strided.forward(kernels, pooling), case.forward(kernels, pooling))
    for strided_grad in grads:
        assert_same_bits(strided.backward(kernels, strided_grad, pooling), case.backward(kernels, grad, pooling))
        for found, wanted in zip(
            strided.backward_rows(kernels, strided_grad, pooling),
            case.backward_rows(kernels, grad, pooling),
            strict=True,
        ):
            assert_same_bits(found, wanted)
        if pooling != MAX:
            found = strided.backward_sample_weights(kernels, strided_grad, pooling)
            assert_same_bits(found, case.backward_sample_weights(kernels, grad, pooling))


def one_bag(weights, *, index_map=DENSE):
    """A dense slab of these rows [S, D], and one bag of all of them."""
    weights = torch.tensor(weights)
    n = len(weights)
    tables = torch.tensor([[0, 0, n, n, 1]])
    return oracle.Case(
        weights, torch.arange(n), torch.tensor([0, n]), None, tables, 1, weights.shape[1], index_map, "C1"
    )


def test_max_of_nan_is_nan_and_its_gradient_goes_to_the_first_nan(kernels, device):
    nan, inf = float("nan"), float("inf")
    case = one_bag([[1.0, nan, -inf, inf], [nan, 3.0, -inf, nan], [nan, nan, 2.0, inf]]).to(device)
    out = case.forward(kernels, MAX).flatten()
    assert out.isnan().tolist() == [True, True, False, True] and out[2] == 2
    grad = torch.tensor([[[10.0, 20.0, 30.0, 40.0]]], device=device)
    assert case.backward(kernels, grad, MAX).tolist() == [[0, 20, 0, 0], [10, 0, 0, 40], [0, 0, 30, 0]]


def test_max_of_minus_infinity_is_minus_infinity_and_has_its_gradient(kernels, device):
    case = one_bag([[-float("inf")], [-float("inf")]]).to(device)
    assert case.forward(kernels, MAX).item() == -float("inf")
    assert case.backward(kernels, torch.ones(1, 1, 1, device=device), MAX).tolist() == [[1], [0]]


@pytest.mark.parametrize("equals", [[5.0, 5.0, 5.0], [-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]])
def test_first_of_equal_maxima_takes_the_gradient(kernels, device, equals):
    case = one_bag([[equals[0]], [equals[1]], [equals[2]]]).to(device)
    assert_same_bits(case.forward(kernels, MAX).flatten(), torch.tensor(equals[:1]))
    assert case.backward(kernels, torch.ones(1, 1, 1, device=device), MAX).tolist() == [[1], [0], [0]]


def test_one_id_twice_in_a_bag_counts_twice_in_sums_and_once_in_max(kernels, device):
    case = one_bag([[3.0], [1.0]]).to(device)._replace(ids=torch.tensor([0, 0], device=device))
    ones = torch.ones(1, 1, 1, device=device)
    assert [case.forward(kernels, pooling).item() for pooling in (SUM, MEAN, MAX)] == [6, 3, 3]
    assert [case.backward(kernels, ones, pooling).tolist() for pooling in (SUM, MEAN, MAX)] == [
        [[2], [0]],
        [[1], [0]],
        [[1], [0]],
    ]


@pytest.mark.parametrize("pooling", [SUM, MEAN], ids=["sum", "mean"])
def test_sums_follow_runs_of_64_then_the_runs(kernels, device, pooling):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((64 * 70 + 9, 1)).astype(np.float32)
    total = None  # float32 additions in the order that csrc/index_map.h fixes
    for start in range(0, len(weights), 64):
        run = weights[start, 0]
        for w in weights[start + 1 : start + 64, 0]:
            run = np.float32(run + w)
        total = run if total is None else np.float32(total + run)
    total = total / np.float32(len(weights)) if pooling == MEAN else total
    assert one_bag(weights.tolist()).to(device).forward(kernels, pooling).item() == total


@pytest.mark.parametrize("dtype", DTYPES)
@MAPS
@POOLINGS
def test_native_equals_reference_bitwise(native_kernels, device, dtype, index_map, width, pooling):
    how = dict(index_map=index_map, width=width, dtype=dtype, weighted=pooling != MAX, num_slots=23)
    assert_native_equals_reference(make_case(BAGS["around a run"], **how), native_kernels, pooling, device)
    assert_native_equals_reference(make_case(BAGS["some"], **how), native_kernels, pooling, device)


@MAPS
@POOLINGS
def test_native_equals_reference_bitwise_with_special_weights(native_kernels, device, index_map, width, pooling):
    case = make_case(BAGS["some"], index_map=index_map, width=width, num_slots=23)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38, 1.0])
    weights = special[torch.randint(8, case.weights.shape, generator=torch.Generator().manual_seed(0))]
    assert_native_equals_reference(case._replace(weights=weights), native_kernels, pooling, device)


@st.composite
def cases(draw):
    features, samples = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    size = draw(st.sampled_from([1, 3, 70]))
    bag_sizes = st.lists(st.integers(0, size), min_size=samples, max_size=samples)
    counts = draw(st.lists(bag_sizes, min_size=features, max_size=features))
    dim = draw(st.sampled_from([1, 6, 16]))
    width = draw(st.sampled_from([z for z in (1, 2, 3, 6, 8, 16) if dim % z == 0]))
    pooling = draw(st.sampled_from([SUM, MEAN, MAX]))
    positions = draw(st.sets(st.integers(0, features - 1), min_size=1))
    case = make_case(
        np.array(counts, dtype=int).reshape(features, samples),
        index_map=draw(st.sampled_from([DENSE, HASHED])),
        width=width,
        dim=dim,
        rows=draw(st.sampled_from([1, 4, 5000])),
        num_slots=draw(st.sampled_from([1, 2, 1000, 2049])),
        positions=tuple(sorted(positions)),
        dtype=draw(st.sampled_from(DTYPES)),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        weighted=draw(st.booleans()) and pooling != MAX,
        seed=draw(st.integers(0, 2**32)),
    )
    return case, pooling


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_any_batch_equals_the_oracle_and_native_equals_reference(native_kernels, device, case_and_pooling):
    case, pooling = case_and_pooling
    assert_native_equals_reference(case, native_kernels, pooling, device)
    if case.weights.dtype == torch.float64:  # ties of rounded weights aside, the oracle has every type above
        assert_equals_oracle(case, native_kernels, pooling, device)

"""The operators' values: those of a numpy oracle to the last bit, in the compiled kernels and in the reference."""

import itertools
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import (
    ADD,
    APART,
    COMBINES,
    CONCAT,
    FEATURES,
    KINDS,
    MAPS,
    MAX,
    MEAN,
    MULTIPLY,
    PARTITION,
    POOLINGS,
    PROBES,
    SUM,
    WEIGHTED,
    Case,
    Table,
    assert_equals_oracle,
    assert_same_bits,
    assert_same_results,
    make_case,
)

from embeddings import reference

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=[name.replace(" ", "-") for name in KINDS])
each_pooling = pytest.mark.parametrize("pooling", POOLINGS, ids=["sum", "mean", "max"])
each_map = pytest.mark.parametrize("index_map", MAPS, ids=["partition", "mixed", "signed", "affine", "murmur3"])
each_combine = pytest.mark.parametrize("combine", COMBINES, ids=["add", "multiply", "concat", "weighted"])
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
each_bags = pytest.mark.parametrize("bags", BAGS.values(), ids=[name.replace(" ", "-") for name in BAGS])


@each_map
@each_combine
def test_every_map_and_combine_equals_the_oracle(kernels, device, index_map, combine):
    layouts = (APART, (16,), 2), (PROBES, (6, 15, 9), 4), (FEATURES, (5,), 3)
    for (shared, dims, probes), pooling in itertools.product(layouts, POOLINGS):
        how = dict(index_map=index_map, combine=combine, shared=shared, dims=dims, probes=probes, width=3)
        case = make_case(BAGS["some"], **how, rows=(50, 9), weighted=pooling != MAX)
        assert_equals_oracle(case, kernels, pooling, device)


@pytest.mark.parametrize("kind", ["dense", "qr mult", "hashed-8", "bloom learned", "signed pool"])
@each_bags
def test_bags_of_every_size_equal_the_oracle(kernels, device, kind, bags):
    for pooling in POOLINGS:
        assert_equals_oracle(make_case(bags, **KINDS[kind]), kernels, pooling, device)


@each_kind
@each_pooling
def test_each_kind_of_backend_equals_the_oracle(kernels, device, kind, pooling):
    case = make_case([[65, 0, 2], [1, 130, 3]], **kind, weighted=pooling != MAX)
    assert_equals_oracle(case, kernels, pooling, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_every_dtype_equals_the_oracle(kernels, device, dtype, ids_dtype):
    for combine, pooling in itertools.product(COMBINES, POOLINGS):
        how = dict(combine=combine, probes=3, width=4, num_slots=9, dtype=dtype, ids_dtype=ids_dtype)
        case = make_case(BAGS["some"], **how, weighted=pooling != MAX)
        assert_equals_oracle(case, kernels, pooling, device)


@pytest.mark.parametrize("one_id", [True, False], ids=["no-offsets", "offsets"])
@pytest.mark.parametrize("positions", [(0,), (2,), (1, 3), (3, 0), (0, 1, 2, 3)])
@each_pooling
def test_a_slab_reads_only_its_features_of_the_batch(kernels, device, one_id, positions, pooling):
    how = dict(positions=positions, one_id=one_id, weighted=pooling != MAX)
    for kind in ("hashed of many dims", "qr concat", "bloom"):
        assert_equals_oracle(make_case(np.ones((4, 5), int), **how, **KINDS[kind]), kernels, pooling, device)


def test_two_features_of_a_slab_may_read_one_feature_of_the_batch(kernels, device):
    case = make_case(BAGS["some"], **KINDS["hashed of many dims"], positions=(1, 2, 1))
    there, grad = case.to(device), case.random_grad()
    assert_same_bits(there.forward(kernels, MEAN), oracle.forward(case, MEAN))
    if device == "cuda" and kernels is not reference:  # it numbers the ids by their positions
        there.backward(kernels, grad.to(device), MEAN)
        with pytest.raises(RuntimeError, match="feature C1: another feature of its slab has the same position 1"):
            kernels.raise_noted(there.weights, there.features)
        return
    assert_same_bits(there.backward(kernels, grad.to(device), MEAN), oracle.backward(case, grad, MEAN)[0])


@pytest.mark.parametrize("width, dim", [(1, 1), (1, 1024), (1025, 1025), (64, 4096), (4096, 4096), (3, 1023)])
@pytest.mark.parametrize("combine", COMBINES, ids=["add", "multiply", "concat", "weighted"])
def test_vectors_of_1_to_4096_numbers_equal_the_oracle(kernels, device, width, dim, combine):
    case = make_case([[2, 0, 3]], combine=combine, probes=2, dims=(dim,), width=width, num_slots=5, weighted=True)
    assert_equals_oracle(case, kernels, MEAN, device)


@pytest.mark.parametrize("probes", [1, 2, 31, 32])
@each_combine
def test_up_to_32_probes_equal_the_oracle(kernels, device, probes, combine):
    if combine == WEIGHTED and probes == 1:
        return  # one probe for the weights leaves none to weigh: refused, see test_bad_ids.py
    case = make_case([[2, 0, 3]], combine=combine, probes=probes, dims=(4,), width=2, num_slots=9)
    assert_equals_oracle(case, kernels, SUM, device)


def test_33_probes_are_refused(kernels):
    case = make_case([[2, 0, 3]], probes=33, dims=(4,), width=2, num_slots=9)
    with pytest.raises(RuntimeError, match="probes must be 1 to 32"):
        case.forward(kernels, SUM)


@pytest.mark.parametrize("unit", [1, 2, 4])
@each_pooling
def test_the_unit_of_a_slab_changes_no_number(kernels, device, unit, pooling):
    how = dict(dims=(16, 8), width=8, probes=2)
    case, whole = (make_case(BAGS["some"], **how, unit=u).to(device) for u in (unit, 8))
    weights = whole.weights.view(-1, unit)
    case = case._replace(weights=weights)
    grad = case.random_grad().to(device)
    assert_same_bits(case.forward(kernels, pooling), whole.forward(kernels, pooling))
    assert_same_bits(case.backward(kernels, grad, pooling).view(-1, 8), whole.backward(kernels, grad, pooling))


@each_map
@each_combine
def test_a_generous_bound_of_the_chunks_changes_no_number(kernels, index_map, combine):
    case = make_case(BAGS["some"], index_map=index_map, combine=combine, probes=3, dims=(16, 6), width=4, shared=PROBES)
    for more in (1, 1000, 2**31, 2**62):
        assert_equals_oracle(case._replace(chunks=case.chunks + more), kernels, SUM)


@each_pooling
@each_combine
def test_a_batch_of_zero_samples_gives_empty_results(kernels, device, pooling, combine):
    for one_id, ids_dtype in itertools.product((True, False), (torch.int32, torch.int64)):
        how = dict(ids_dtype=ids_dtype, one_id=one_id, combine=combine, probes=2)
        case = make_case(np.zeros((3, 0), int), **how).to(device)
        assert case.forward(kernels, pooling).shape == (0, case.columns)
        grad = case.random_grad().to(device)
        assert case.backward(kernels, grad, pooling).equal(torch.zeros_like(case.weights))
        units, values = case.backward_rows(kernels, grad, pooling)
        assert (units.shape, units.dtype, values.shape) == ((0,), torch.int64, (0, case.weights.shape[1]))
        if pooling != MAX:
            assert case.backward_sample_weights(kernels, grad, pooling).shape == (0,)


@each_pooling
def test_a_slab_of_no_features_gives_no_columns(kernels, device, pooling):
    case = make_case(BAGS["some"]).to(device)
    case = case._replace(tables=case.tables[:0], columns=0, features="")
    assert case.forward(kernels, pooling).shape == (3, 0)
    grad = torch.empty(3, 0, device=device)
    assert case.backward(kernels, grad, pooling).equal(torch.zeros_like(case.weights))
    assert case.backward_rows(kernels, grad, pooling)[0].shape == (0,)
    if pooling != MAX:
        assert case.backward_sample_weights(kernels, grad, pooling).equal(
            torch.zeros_like(case.ids, dtype=torch.float32)
        )


def every_other(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, x + 1], x.dim()).select(-1, 0)


STRIDES = {  # of a gradient
    "every other": every_other,
    "transposed": lambda x: x.t().contiguous().t(),
    "of a wider one": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
}


def strided(kernels, stride):
    """The kernels, but for the strides of the tensors they are given: a gradient's are `stride`'s."""

    def of(name: str):
        def call(*arguments):
            layouts = [every_other if name == "bag" else stride, *[every_other] * (len(arguments) - 1)]
            pairs = zip(layouts, arguments, strict=True)
            arguments = [layout(x) if isinstance(x, torch.Tensor) else x for layout, x in pairs]
            assert not any(x.is_contiguous() for x in arguments if isinstance(x, torch.Tensor))
            return getattr(kernels, name)(*arguments)

        return call

    names = ("bag", "bag_backward", "bag_backward_rows", "bag_backward_sample_weights")
    return SimpleNamespace(**{name: of(name) for name in names})


@each_pooling
@pytest.mark.parametrize("kind", ["hashed-8", "bloom learned", "qr mult", "hashed of many dims"])
@pytest.mark.parametrize("stride", STRIDES.values(), ids=[name.replace(" ", "-") for name in STRIDES])
def test_strided_arguments_mean_what_contiguous_ones_do(kernels, device, pooling, kind, stride):
    case = make_case(BAGS["some"], **KINDS[kind], weighted=pooling != MAX)
    assert_same_results(case, strided(kernels, stride), kernels, pooling, device)


def one_bag(weights) -> Case:
    """A dense slab of these rows [S, D], and one bag of all of them."""
    weights = torch.tensor(weights)
    n, dim = weights.shape
    tables = torch.tensor([Table(0, 0, dim, dim, 0, n, n)])
    return Case(weights, torch.arange(n), torch.tensor([0, n]), None, tables, 1, dim, 1, 1, PARTITION, ADD, "C1")


def test_max_of_nan_is_nan_and_its_gradient_goes_to_the_first_nan(kernels, device):
    nan, inf = float("nan"), float("inf")
    case = one_bag([[1.0, nan, -inf, inf], [nan, 3.0, -inf, nan], [nan, nan, 2.0, inf]]).to(device)
    out = case.forward(kernels, MAX).flatten()
    assert out.isnan().tolist() == [True, True, False, True] and out[2] == 2
    grad = torch.tensor([[10.0, 20.0, 30.0, 40.0]], device=device)
    assert case.backward(kernels, grad, MAX).tolist() == [[0, 20, 0, 0], [10, 0, 0, 40], [0, 0, 30, 0]]


def test_max_of_minus_infinity_is_minus_infinity_and_has_its_gradient(kernels, device):
    case = one_bag([[-float("inf")], [-float("inf")]]).to(device)
    assert case.forward(kernels, MAX).item() == -float("inf")
    assert case.backward(kernels, torch.ones(1, 1, device=device), MAX).tolist() == [[1], [0]]


@pytest.mark.parametrize("equals", [[5.0, 5.0, 5.0], [-0.0, 0.0, -0.0], [0.0, -0.0, 0.0]])
def test_first_of_equal_maxima_takes_the_gradient(kernels, device, equals):
    case = one_bag([[equals[0]], [equals[1]], [equals[2]]]).to(device)
    assert_same_bits(case.forward(kernels, MAX).flatten(), torch.tensor(equals[:1]))
    assert case.backward(kernels, torch.ones(1, 1, device=device), MAX).tolist() == [[1], [0], [0]]


def test_max_is_of_the_composed_vectors_not_of_the_probes(kernels, device):
    weights = torch.tensor([[1.0], [5.0], [-4.0], [2.0]])  # quotients 0, 1, then remainders 0, 1
    tables = torch.tensor([Table(0, 0, 1, 1, 0, 2, 4, 2), Table(0, 0, 1, 1, 2, 2, 4, 1)])
    batch = (torch.tensor([0, 2, 1]), torch.tensor([0, 3]), None, tables, 1, 1, 2, 1, PARTITION)
    add, multiply = (Case(weights, *batch, combine, "C1").to(device) for combine in (ADD, MULTIPLY))
    assert add.forward(kernels, MAX).item() == 3  # ids 0, 2, 1 are 1 - 4, 5 - 4, 1 + 2
    assert multiply.forward(kernels, MAX).item() == 2  # and 1 * -4, 5 * -4, 1 * 2
    one = torch.ones(1, 1, device=device)
    assert add.backward(kernels, one, MAX).flatten().tolist() == [1, 0, 0, 1]
    assert multiply.backward(kernels, one, MAX).flatten().tolist() == [2, 0, 0, 1]


def test_one_id_twice_in_a_bag_counts_twice_in_sums_and_once_in_max(kernels, device):
    case = one_bag([[3.0], [1.0]]).to(device)._replace(ids=torch.tensor([0, 0], device=device))
    ones = torch.ones(1, 1, device=device)
    assert [case.forward(kernels, pooling).item() for pooling in POOLINGS] == [6, 3, 3]
    assert [case.backward(kernels, ones, pooling).tolist() for pooling in POOLINGS] == [
        [[2], [0]],
        [[1], [0]],
        [[1], [0]],
    ]


def test_two_probes_on_one_slot_count_twice_and_square(kernels, device):
    weights = torch.tensor([[3.0]])
    tables = torch.tensor([Table(0, 0, 1, 1, 0, 1, 1)] * 2)
    batch = (torch.tensor([0]), None, None, tables, 1, 1, 2, 1, PARTITION)
    one = torch.ones(1, 1, device=device)
    for combine, value, slope in ((ADD, 6, 2), (MULTIPLY, 9, 6)):
        case = Case(weights, *batch, combine, "C1").to(device)
        assert case.forward(kernels, SUM).item() == value
        assert case.backward(kernels, one, SUM).item() == slope


def test_concat_of_one_slice_sums_both_halves_of_the_gradient(kernels, device):
    weights = torch.tensor([[3.0, 4.0]])
    tables = torch.tensor([Table(0, 0, 2, 2, 0, 1, 1), Table(0, 2, 2, 2, 0, 1, 1)])
    case = Case(weights, torch.tensor([0]), None, None, tables, 1, 4, 2, 1, PARTITION, CONCAT, "C1").to(device)
    assert case.forward(kernels, SUM).tolist() == [[3, 4, 3, 4]]
    grad = torch.tensor([[1.0, 2.0, 30.0, 40.0]], device=device)
    assert case.backward(kernels, grad, SUM).tolist() == [[31, 42]]


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


@each_kind
@each_pooling
def test_native_equals_reference_bitwise(native_kernels, device, kind, pooling):
    for bags, dtype in itertools.product(("around a run", "some"), DTYPES):
        case = make_case(BAGS[bags], **{"num_slots": 23, **kind}, dtype=dtype, weighted=pooling != MAX)
        assert_same_results(case, native_kernels, reference, pooling, device)


@each_kind
@each_pooling
def test_native_equals_reference_bitwise_with_special_weights(native_kernels, device, kind, pooling):
    case = make_case(BAGS["some"], **kind)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1e-45, 3e38, 1.0])
    weights = special[torch.randint(len(special), case.weights.shape, generator=torch.Generator().manual_seed(0))]
    case = case._replace(weights=weights)
    there, grad = case.to(device), case.random_grad()

    def results(case, kernels, grad):
        yield case.forward(kernels, pooling)
        yield case.backward(kernels, grad, pooling)
        yield from case.backward_rows(kernels, grad, pooling)
        if pooling != MAX:
            yield case.backward_sample_weights(kernels, grad, pooling)

    pairs = zip(results(there, native_kernels, grad.to(device)), results(case, reference, grad), strict=True)
    for found, wanted in pairs:  # no number is what a NaN is: its sign and payload are the processor's
        assert_same_bits(*(x.cpu().where(~x.cpu().isnan(), 7) for x in (found, wanted)))
        assert found.cpu().isnan().equal(wanted.isnan())


@st.composite
def cases(draw, most_chunks: int):
    """Any call whose ids read at most about so many chunks."""
    features, samples = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    index_map, combine = draw(st.sampled_from(MAPS)), draw(st.sampled_from(COMBINES))
    probes = draw(st.integers(1 + (combine == WEIGHTED), 5))
    dim = st.one_of(st.integers(1, 40), st.sampled_from([31, 32, 33, 64, 127, 129, 256, 1000, 1024, 1025, 4096]))
    dims = tuple(draw(st.lists(dim, min_size=1, max_size=features * probes)))
    width = draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16, 64, 4096]))
    chunks = probes * max(dims) if width < 4 else probes * max(dims) // 4  # about
    size = draw(st.sampled_from([n for n in (1, 3, 70, 300) if n * chunks * features * samples <= most_chunks] or [1]))
    bag_sizes = st.lists(st.integers(0, size), min_size=samples, max_size=samples)
    counts = draw(st.lists(bag_sizes, min_size=features, max_size=features))
    pooling = draw(st.sampled_from(POOLINGS))
    positions = draw(st.permutations(range(features)))[: draw(st.integers(1, features))]
    how = dict(
        index_map=index_map,
        combine=combine,
        probes=probes,
        dims=dims,
        width=width,
        unit=draw(st.sampled_from([None, 1])),
        rows=tuple(draw(st.lists(st.sampled_from([1, 2, 4, 50, 300]), min_size=1, max_size=features))),
        num_slots=draw(st.sampled_from([1, 2, 30, 100])),
        shared=draw(st.integers(0, 2)),
        positions=tuple(positions),
        dtype=draw(st.sampled_from(DTYPES)),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        weighted=draw(st.booleans()) and pooling != MAX,
        seed=draw(st.integers(0, 2**32)),
    )
    return make_case(np.array(counts, dtype=int).reshape(features, samples), **how), pooling


any_case = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@any_case
@given(cases(most_chunks=3000))
def test_any_call_equals_the_oracle(kernels, device, case_and_pooling):
    case, pooling = case_and_pooling
    assert_equals_oracle(case, kernels, pooling, device)


@any_case
@given(cases(most_chunks=300_000))
def test_native_equals_reference_bitwise_in_any_call(native_kernels, device, case_and_pooling):
    case, pooling = case_and_pooling
    assert_same_results(case, native_kernels, reference, pooling, device)


@each_pooling
@each_kind
def test_bag_into_writes_its_own_columns_and_a_gradient_of_more_is_read_at_them(kernels, device, kind, pooling):
    case = make_case([[2, 1, 3], [1, 1, 1], [4, 0, 2]], **kind).to(device)
    out = case.forward_into(kernels, pooling)
    assert (out[:, :3] == -1).all() and (out[:, -2:] == -1).all()
    assert_same_bits(out[:, 3:-2], case.forward(reference, pooling))
    wide = torch.cat([torch.full_like(out[:, :3], torch.nan), case.random_grad().to(device)], 1)
    tables = case.tables.clone()
    tables[:, oracle.COLUMN] += 3
    found = case._replace(tables=tables, columns=wide.shape[1]).backward_rows(kernels, wide, pooling)
    for x, y in zip(found, case.backward_rows(reference, wide[:, 3:], pooling), strict=True):
        assert_same_bits(x, y)


def test_bag_into_refuses_columns_that_do_not_ascend_or_leave_the_output(kernels):
    case = make_case([[2, 1, 3], [1, 1, 1]])
    for before, after in ((-1, 4), (1, -2), (0, -1)):
        with pytest.raises(RuntimeError, match="does not fit the others|columns of"):
            case.forward_into(kernels, SUM, before, after)
    for out in (torch.zeros(3, 2 * case.columns)[:, ::2], torch.zeros(3, case.columns).double(), torch.zeros(3)):
        with pytest.raises(RuntimeError, match="out must be contiguous"):
            kernels.bag_into(out, *case[:5], *case.how, SUM, case.features)

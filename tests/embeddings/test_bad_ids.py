"""Bad input to the operators is a named error, in the same words from both kernels, and never ends the process."""

import random
import subprocess
import sys

import pytest
import torch
from builders import dense, hashed, make_bags
from oracle import (
    ADD,
    COMBINES,
    CONCAT,
    FEATURES,
    MAPS,
    MAX,
    MIXED,
    MULTIPLY,
    MURMUR3,
    PARTITION,
    POOLINGS,
    PROBES,
    SUM,
    WEIGHTED,
    Case,
    Table,
    assert_same_bits,
    make_case,
)

from embeddings import EmbeddingBags, native, reference
from embeddings.reference import SEPARATOR

CALLS = ["forward", "backward", "backward_rows", "update", "backward_sample_weights"]
RANGED = {
    "dense": dict(),
    "qr mult": dict(combine=MULTIPLY, probes=2),
    "qr concat": dict(combine=CONCAT, probes=2),
    "qr weighted": dict(combine=WEIGHTED, probes=3),
}
HASHES = [index_map for index_map in MAPS if index_map != PARTITION]
each_call = pytest.mark.parametrize("name", CALLS)
each_ranged = pytest.mark.parametrize("ranged", RANGED.values(), ids=[name.replace(" ", "-") for name in RANGED])


def call(case: Case, kernels, name: str, grad=None, pooling=SUM):
    if name == "forward":
        result = case.forward(kernels, pooling)
    else:
        result = getattr(case, name)(kernels, case.random_grad() if grad is None else grad, pooling)
    if case.weights.is_cuda and kernels is not reference:
        kernels.raise_noted(case.weights, case.features)  # a CUDA kernel notes, so that no call need wait for it
    return result


def test_sample_weights_have_no_gradient_where_features_have_one_position(kernels):
    tables = torch.tensor([Table(0, 4 * f, 4, 4, 4 * f, 1, 0) for f in range(2)])
    batch = (torch.tensor([5, 6, 7]), torch.tensor([0, 2, 3]), None, tables, 2)
    case = Case(torch.ones(2, 4), *batch, 8, 1, 1, MIXED, ADD, SEPARATOR.join(["a", "b"]))
    with pytest.raises(RuntimeError, match="features a and b have one position in the batch, 0: per_sample_weights"):
        case.backward_sample_weights(kernels, torch.ones(2, 8), SUM)


def small_case(*, index_map=PARTITION, bags=((2, 0, 3),) * 4, **how):
    """Features C1 and C3 of a batch of four; 20 ids each; bags of 2, 0 and 3 ids."""
    return make_case(
        bags, **{"dims": (4,), "width": 2, "rows": (20,), "positions": (1, 3), **how, "index_map": index_map}
    )


def message(case: Case, kernels, name: str, grad=None) -> str:
    with pytest.raises(RuntimeError) as error:
        call(case, kernels, name, grad)
    return str(error.value).splitlines()[0]


@each_call
@each_ranged
def test_an_id_out_of_range_is_named_with_feature_position_and_limit(kernels, device, name, ranged):
    case = small_case(**ranged)
    grad = case.random_grad().to(device)
    for bad in (-1, 20, 21, 2**31, 2**40, 2**63 - 1, -(2**63)):
        case.ids[18] = bad  # of the third bag of C3
        found = message(case.to(device), kernels, name, grad)
        assert found == (
            f"id out of range: feature C3, position 18 of the batch's ids, id {bad}, limit 20 (valid ids are 0..19)"
        )
        call(small_case(**ranged).to(device), kernels, name, grad)  # and the process still works


@each_call
@each_ranged
def test_a_bad_int32_id_is_named(kernels, name, ranged):
    case = small_case(**ranged, ids_dtype=torch.int32)
    for bad in (-1, 20, 2**31 - 1, -(2**31)):
        case.ids[5] = bad
        assert f"feature C1, position 5 of the batch's ids, id {bad}, limit 20" in message(case, kernels, name)


@each_call
def test_ids_that_all_probes_could_tell_apart_but_the_feature_has_not_are_refused(kernels, name):
    case = small_case(combine=ADD, probes=2)  # 5 x 5 slots for 20 ids
    assert case.tables[0, 5] * case.tables[1, 5] == 25
    case.ids[5] = 24
    assert "id 24, limit 20" in message(case, kernels, name)


@each_call
def test_an_id_of_a_wider_table_is_not_read_from_a_narrower_ones_neighbour(kernels, name):
    case = small_case(rows=(10, 20), dims=(4, 8))
    case.ids[5] = 10  # within the slab, and a valid id of C3
    assert "feature C1, position 5 of the batch's ids, id 10, limit 10" in message(case, kernels, name)


@each_call
def test_the_first_of_many_bad_ids_is_named(kernels, name):
    # enough bags for every thread to meet a bad one; features of two shapes, so that no grouping changes the order
    case = make_case([[700] * 5] * 3, index_map=PARTITION, rows=(20,), dims=(16, 8, 16))
    case.ids[4000:] = 99
    assert "position 4000 of the batch's ids, id 99" in message(case, kernels, name)


@each_call
def test_bad_ids_of_other_slabs_are_not_this_slabs_error(kernels, name):
    case = small_case()
    case.ids[:5] = 2**40  # feature 0, which the slab does not have
    call(case, kernels, name)


@each_call
@pytest.mark.parametrize("index_map", HASHES, ids=["mixed", "signed", "affine", "murmur3"])
def test_hashes_take_any_64_bit_id(kernels, name, index_map):
    case = small_case(index_map=index_map)
    case.ids[5:10] = torch.tensor([-1, 2**31, 2**40, 2**63 - 1, -(2**63)])
    call(case, kernels, name)


BAD_OFFSETS = {
    "descend": [0, 2, 2, 5, 7, 6, 10, 12, 12, 15, 17, 17, 20],
    "beyond": [0, 2, 2, 5, 7, 7, 10, 12, 12, 15, 17, 17, 21],
    "far beyond": [0, 2, 2, 5, 7, 7, 10, 12, 12, 15, 17, 17, 2**62],
    "negative": [0, 2, 2, -5, 7, 7, 10, 12, 12, 15, 17, 17, 20],
    "most negative": [0, 2, 2, 5, -(2**63), 7, 10, 12, 12, 15, 17, 17, 20],
}


@each_call
@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
@pytest.mark.parametrize("index_map", [PARTITION, MIXED])
def test_bad_offsets_are_refused(kernels, name, offsets, index_map):
    case = small_case(index_map=index_map)._replace(offsets=torch.tensor(offsets))
    assert "offsets must not descend or leave the ids: feature C" in message(case, kernels, name)


def two_errors():
    """Cases with more than one thing wrong, of which one has to be named first."""
    id_then_offsets, offsets_then_id = small_case(), small_case()
    id_then_offsets.ids[5] = 20
    id_then_offsets.offsets[-1] = 21
    offsets_then_id.ids[19] = 20
    offsets_then_id.offsets[5] = 99
    short = small_case()
    return {
        "id, then offsets": id_then_offsets,
        "offsets, then id": offsets_then_id,
        "no bags for two features": short._replace(offsets=short.offsets[:4]),
    }


@pytest.mark.parametrize("case", two_errors().values(), ids=two_errors())
@each_call
def test_of_two_errors_both_kernels_name_the_same(native_kernels, name, case):
    assert message(case, native_kernels, name) == message(case, reference, name)


def broken(case: Case) -> dict[str, Case]:
    return {
        "float ids": case._replace(ids=case.ids.float()),
        "bool ids": case._replace(ids=case.ids.bool()),
        "int16 ids": case._replace(ids=case.ids.short()),
        "2-D ids": case._replace(ids=case.ids[None]),
        "float offsets": case._replace(offsets=case.offsets.double()),
        "int32 offsets": case._replace(offsets=case.offsets.int()),
        "2-D offsets": case._replace(offsets=case.offsets[None]),
        "no offsets at all": case._replace(offsets=case.offsets[:0]),
        "too few offsets": case._replace(offsets=case.offsets[:-1]),
        "int weights": case._replace(weights=case.weights.int()),
        "complex weights": case._replace(weights=case.weights.cfloat()),
        "3-D weights": case._replace(weights=case.weights[None]),
        "zero-width weights": case._replace(weights=case.weights[:, :0]),
        "too few units": case._replace(weights=case.weights[:10]),
        "float tables": case._replace(tables=case.tables.double()),
        "int32 tables": case._replace(tables=case.tables.int()),
        "tables of 8 columns": case._replace(tables=case.tables[:, :8]),
        "tables of 10 columns": case._replace(tables=case.tables[:, [*range(9), 0]]),
        "1-D tables": case._replace(tables=case.tables.flatten()),
        "tables of no whole feature": case._replace(probes=3),
        "more columns than the features have": case._replace(columns=case.columns + 1),
        "fewer columns than the features have": case._replace(columns=case.columns - 1),
        "negative columns": case._replace(columns=-1),
        "no probes": case._replace(probes=0),
        "negative probes": case._replace(probes=-1),
        "no chunks": case._replace(chunks=0),
        "unknown index map": case._replace(index_map=5),
        "negative index map": case._replace(index_map=-1),
        "unknown combine": case._replace(combine=4),
        "negative combine": case._replace(combine=-1),
        "weighted by nothing": case._replace(combine=WEIGHTED),
    }


def with_sample_weights(case: Case) -> dict[str, Case]:
    v = torch.ones(len(case.ids))
    return {
        "too few": case._replace(sample_weights=v[:-1]),
        "2-D": case._replace(sample_weights=v[:, None]),
        "other dtype": case._replace(sample_weights=v.double()),
    }


@each_call
@pytest.mark.parametrize("what", broken(small_case()))
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_arguments_of_wrong_type_or_length_are_refused(kernels, name, what):
    case = broken(small_case())[what]
    grad = torch.zeros(3, max(case.columns, 0)) if "columns" in what else small_case().random_grad()
    # a gradient's columns are never negative, and may be those of other slabs
    if name == "forward" or what not in ("negative columns", "more columns than the features have"):
        message(case, kernels, name, grad)
    call(small_case(), kernels, name)


def test_a_vector_of_weights_is_one_of_units_of_one_number_forward_alone(kernels, device):
    case = small_case().to(device)
    vector = case._replace(weights=case.weights.flatten())
    assert_same_bits(vector.forward(kernels, SUM), case.forward(kernels, SUM))
    grad = case.random_grad().to(device)
    for backward in (vector.backward, vector.backward_rows, vector.backward_sample_weights):
        with pytest.raises(RuntimeError, match="weights must be"):
            backward(kernels, grad, SUM)


def unfit_tables() -> dict[str, Case]:
    """Cases whose tables contradict themselves, each other, the slab or the output; all of it in feature C3."""
    last = dict(position=2, column=1, dim=2, width=3, begin=4, num_slots=5, num_embeddings=6, divisor=7)
    hashed_case = small_case(index_map=MIXED, num_slots=9, probes=2, unit=1)
    cases = {}

    def add(name: str, case: Case, k: int = 0, **changes: int) -> None:
        case = case._replace(tables=case.tables.clone())
        for key, value in changes.items():
            case.tables[case.probes + k, last[key] if key != "position" else 0] = value
        cases[name] = case

    def of(case: Case, k: int = 0) -> Table:
        return case.feature(1)[k]

    end, first = hashed_case.weights.numel(), hashed_case.feature(0)[0]
    for k in (0, 1):
        for width in (0, -1, -2, 3, 8, 2**62, -(2**63)):
            add(f"probe {k}: slots of {width} numbers", hashed_case, k, width=width)
        for dim in (0, -4, 5, 1, 2**40, -(2**63)):
            add(f"probe {k}: vectors of {dim} numbers", hashed_case, k, dim=dim)
        for divisor in (0, -1, -(2**63)):
            add(f"probe {k}: divisor {divisor}", hashed_case, k, divisor=divisor)
        for num_slots in (0, -1, 2**61, 2**62, 2**63 - 1, -(2**63)):
            add(f"probe {k}: {num_slots} slots", hashed_case, k, num_slots=num_slots)
        for begin in (-2, end, end - 2, 2**62, 2**63 - 1, -(2**63)):
            add(f"probe {k}: begin {begin}", hashed_case, k, begin=begin)
        for column in (3, 5, 0, -4, 2**63 - 1, -(2**63)):
            add(f"probe {k}: column {column}", hashed_case, k, column=column)
        add(
            f"probe {k}: reaches one past the slab", hashed_case, k, num_slots=(end - of(hashed_case, k).begin) // 2 + 1
        )
        add(f"probe {k}: begins inside another's slice", hashed_case, k, begin=first.begin + 2)
        add(
            f"probe {k}: another's slice, but shorter", hashed_case, k, begin=first.begin, num_slots=first.num_slots - 1
        )
        add(
            f"probe {k}: another's slice, in other slots",
            hashed_case,
            k,
            begin=first.begin,
            num_slots=first.num_slots,
            width=4,
        )
        add(f"probe {k}: other rows than its sister", small_case(combine=ADD, probes=2), k, num_embeddings=19)
    add("more chunks than promised", small_case(index_map=MIXED, dims=(4, 8))._replace(chunks=2))
    add("probes of two positions", hashed_case, 1, position=1)
    add("probes of two lengths", hashed_case, 1, dim=2)
    add("probes of two widths", hashed_case, 1, width=1)
    whole = small_case(index_map=MIXED, unit=2)
    add("a width that is no multiple of the unit", whole, width=1, num_slots=1)
    add("a begin that is no multiple of the unit", whole, begin=of(whole).begin + 1, num_slots=1)
    add("a partition in two chunks", small_case(unit=1)._replace(chunks=2), width=2)
    add("murmur3 in two chunks", small_case(index_map=MURMUR3, unit=1)._replace(chunks=2), width=2)
    add("fewer rows than ids", small_case(), num_slots=19)
    add("too few pairs for the ids", small_case(combine=MULTIPLY, probes=2), num_slots=3)
    add("side by side with a gap", small_case(index_map=MIXED, combine=CONCAT, probes=2), 1, column=13)
    add("side by side, one on the other", small_case(index_map=MIXED, combine=CONCAT, probes=2), 1, column=8)
    weighted = small_case(index_map=MIXED, combine=WEIGHTED, probes=3, dims=(2,), unit=1, num_slots=30)
    add("more weights than vectors", weighted, 2, dim=3, width=3, num_slots=9)
    add("fewer weights than vectors", weighted, 2, dim=1, width=1)
    add("weights in two chunks", weighted, 2, width=1)
    add("weights with columns of their own", weighted, 2, column=weighted.columns)
    return cases


UNFIT = unfit_tables()


@pytest.mark.parametrize("what", UNFIT)
def test_tables_that_do_not_fit_are_refused_by_feature(kernels, what):
    case = UNFIT[what]
    for name in CALLS:
        assert message(case, kernels, name, torch.zeros(3, case.columns)).startswith("feature C3: "), name


@pytest.mark.parametrize("what", UNFIT)
def test_tables_that_do_not_fit_are_refused_in_the_same_words(native_kernels, what):
    case, grad = UNFIT[what], torch.zeros(3, UNFIT[what].columns)
    for name in CALLS:
        assert message(case, native_kernels, name, grad) == message(case, reference, name, grad)


@each_call
@pytest.mark.parametrize("position", [4, 99, -1, 2**62, 2**63 - 1, -(2**63)])
def test_a_position_of_no_feature_is_named(kernels, name, position):
    case = small_case(probes=2)
    case.tables[2:, 0] = position
    assert message(case, kernels, name) == f"the batch has no bags for feature C3 at position {position}"


@each_call
@pytest.mark.parametrize("one_id", [True, False])
def test_samples_without_bags_are_refused(kernels, name, one_id):
    case = small_case()
    offsets = None if one_id else case.offsets[:1]
    case = case._replace(ids=case.ids[:0], offsets=offsets)
    assert message(case, kernels, name) == "the batch has no bags for feature C1 at position 1"


@each_call
@pytest.mark.parametrize("combine", COMBINES, ids=["add", "multiply", "concat", "weighted"])
def test_slices_that_are_shared_or_apart_fit(kernels, name, combine):
    for shared in (PROBES, FEATURES):
        case = small_case(index_map=MIXED, combine=combine, probes=3, shared=shared)
        call(case, kernels, name)
        call(case._replace(chunks=case.chunks + 3), kernels, name)  # an upper bound may be generous


@pytest.mark.parametrize("name", CALLS[:4])
@pytest.mark.parametrize("what", with_sample_weights(small_case()))
def test_sample_weights_of_wrong_type_or_length_are_refused(kernels, name, what):
    assert "per_sample_weights" in message(with_sample_weights(small_case())[what], kernels, name)


@pytest.mark.parametrize("name", CALLS[1:])
@pytest.mark.parametrize("what", ["fewer columns", "more samples", "other dtype", "3-D", "1-D"])
def test_gradients_of_wrong_type_or_shape_are_refused(kernels, name, what):
    grad = small_case().random_grad()
    wrong = {"fewer columns": grad[:, :7], "more samples": grad.repeat(2, 1), "other dtype": grad.double(),
             "3-D": grad.unflatten(1, (2, 4)), "1-D": grad[0]}[what]  # fmt: skip
    message(small_case(), kernels, name, wrong)


@pytest.mark.parametrize("pooling", [-1, 3])
def test_an_unknown_pooling_is_refused(kernels, pooling):
    with pytest.raises(RuntimeError, match="pooling"):
        small_case().forward(kernels, pooling)


def test_max_with_sample_weights_is_refused(kernels):
    with pytest.raises(RuntimeError, match="sum or mean"):
        small_case(weighted=True).forward(kernels, MAX)


@pytest.fixture
def bags():
    return make_bags([dense(), hashed(0.5)], [20, 400])


def test_the_collection_names_the_feature_of_a_bad_id(bags):
    with pytest.raises(RuntimeError, match="feature C1, position 1 of the batch's ids, id 20, limit 20"):
        bags(torch.tensor([0, 20, 5, 6]))
    assert bags(torch.tensor([0, 19, 5, 6])).shape == (2, 2, 16)


@pytest.mark.parametrize("name", ["item, new", "a,b,c", "naïve/列", "%s {0}"])
def test_a_feature_of_any_name_is_named_whole(name):
    bags = EmbeddingBags({name: dense(), "user": dense()}, {name: 20, "user": 20}, pooling="sum", seed=0)
    for ids, feature in (([20, 0], name), ([0, 20], "user")):
        with pytest.raises(RuntimeError) as error:
            bags(torch.tensor(ids))
        assert f"feature {feature}, position" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
def test_the_collection_refuses_offsets_that_are_no_integers(bags, dtype):
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        bags(torch.tensor([0, 1, 5, 6]), torch.tensor([0, 1, 2, 3, 4]).to(dtype))


@pytest.mark.parametrize("offsets", [[], [0], [0, 4], [0, 1, 2, 4]])
def test_the_collection_refuses_offsets_of_no_whole_batch(bags, offsets):
    if len(offsets) == 1:
        assert bags(torch.tensor([], dtype=torch.int64), torch.tensor(offsets)).shape == (0, 2, 16)
        return
    with pytest.raises((ValueError, RuntimeError), match="offsets|bags"):
        bags(torch.tensor([0, 1, 5, 6]), torch.tensor(offsets, dtype=torch.int64))


FUZZ = """
import random, sys
sys.path[:0] = {paths!r}
from test_bad_ids import fuzz_once
outcomes = [fuzz_once(random.Random(seed)) for seed in range(3000)]
print(outcomes.count("fine"), outcomes.count("refused"))
print([(seed, outcome) for seed, outcome in enumerate(outcomes) if outcome not in ("fine", "refused")][:9])
"""


def hostile_case(rng: random.Random) -> Case:
    """A valid call after one to three hostile changes. It has a name for every table, whatever they are taken for."""
    combine = rng.choice(COMBINES)
    how = dict(index_map=rng.choice(MAPS), combine=combine, probes=rng.randint(1 + (combine == WEIGHTED), 3))
    case = small_case(**how, shared=rng.randrange(3), dims=rng.choice([(4,), (4, 6)]), unit=rng.choice([None, 1]),
                      weighted=rng.random() < 0.5, seed=rng.randrange(9))  # fmt: skip
    case = case._replace(features=reference.SEPARATOR.join(f"C{i}" for i in range(len(case.tables))))
    nasty = [0, 1, -1, 2, 3, 4, 7, 19, 20, 21, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["ids", "offsets", "tables", "tables", "tables", "length", "number"])
        if kind == "length":
            field = rng.choice(["ids", "offsets", "weights", "tables"])
            return case._replace(**{field: getattr(case, field)[: rng.randrange(5)].clone()})
        if kind == "number":
            field = rng.choice(["batch_size", "columns", "probes", "chunks", "index_map", "combine"])
            case = case._replace(**{field: rng.choice(nasty)})
            continue
        numbers = getattr(case, kind).view(-1)
        place = rng.randrange(len(numbers))
        near = int(numbers[place]) + rng.choice([-4, -2, -1, 1, 2, 4])
        numbers[place] = rng.choice([rng.choice(nasty), max(-(2**63), min(near, 2**63 - 1))])
    return case


def fuzz_once(rng: random.Random) -> str:
    """Whether a hostile call is "fine" or "refused", by both kernels with the same result; else what went wrong."""
    native.ensure()
    case, name, pooling = hostile_case(rng), rng.choice(CALLS), rng.choice(POOLINGS)
    if name == "backward_sample_weights" or case.sample_weights is not None:
        pooling = SUM
    grad = torch.randn(3, min(max(case.columns, 0), 100), generator=torch.Generator().manual_seed(0))
    results = []
    for kernels in (torch.ops.embeddings, reference):
        try:
            found = call(case, kernels, name, grad, pooling)
            results.append(found if isinstance(found, tuple) else (found,))
        except RuntimeError as error:
            results.append(str(error).splitlines()[0])
        except Exception as error:  # what the test looks for
            return f"{name}: {kernels.__name__} {error!r}"
    refused = [isinstance(result, str) for result in results]
    if refused[0] != refused[1] or (refused[0] and results[0] != results[1]):
        return f"{name}: native {results[0]!s:.300}, reference {results[1]!s:.300}"
    if refused[0]:
        return "refused"
    same = all(found.equal(wanted) for found, wanted in zip(*results, strict=True))
    return "fine" if same else f"{name}: results differ for tables {case.tables.tolist()}"


@pytest.mark.once
def test_3000_hostile_calls_end_alike_in_both_kernels_and_do_not_kill_the_process(request):
    code = FUZZ.format(paths=[str(request.config.rootpath), str(request.path.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    counts, others = done.stdout.splitlines()
    assert others == "[]"
    fine, refused = map(int, counts.split())
    assert fine > 300 and refused > 1000 and fine + refused == 3000

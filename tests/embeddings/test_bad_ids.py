"""Bad input to the operators is a named error, in the same words from both kernels, and never ends the process."""

import random
import subprocess
import sys

import pytest
import torch
from oracle import DENSE, HASHED, MAX, SUM, Case, make_case

from embeddings import Dense, EmbeddingBags, Hashed, native, reference

CALLS = ["forward", "backward", "backward_rows", "backward_sample_weights"]
BAD_IDS = [-1, 20, 21, 2**31, 2**40, 2**63 - 1, -(2**63)]


def call(case: Case, kernels, name: str, grad=None):
    if name == "forward":
        result = case.forward(kernels, SUM)
    else:
        result = getattr(case, name)(kernels, case.random_grad() if grad is None else grad, SUM)
    if case.weights.is_cuda and kernels is not reference:
        kernels.raise_noted(case.weights, case.features)  # a CUDA kernel notes, so that no call need wait for it
    return result


def dense_case(*, index_map=DENSE, **how):
    """Features C1 and C3 of a batch of four; 20 ids each; bags of 2, 0 and 3 ids."""
    return make_case([[2, 0, 3]] * 4, index_map=index_map, rows=20, dim=4, width=2, positions=(1, 3), **how)


def message(case: Case, kernels, name: str, grad=None) -> str:
    with pytest.raises(RuntimeError) as error:
        call(case, kernels, name, grad)
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", BAD_IDS)
def test_an_id_out_of_range_is_named_with_feature_position_and_limit(kernels, device, name, bad):
    case = dense_case()
    case.ids[18] = bad  # of the third bag of C3
    expected = f"id out of range: feature C3, position 18 of the batch's ids, id {bad}, limit 20 (valid ids are 0..19)"
    grad = case.random_grad().to(device)
    assert message(case.to(device), kernels, name, grad) == expected
    call(dense_case().to(device), kernels, name, grad)  # and the process still works


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1, -(2**31)])
def test_a_bad_int32_id_is_named(kernels, name, bad):
    case = dense_case(ids_dtype=torch.int32)
    case.ids[5] = bad
    assert f"feature C1, position 5 of the batch's ids, id {bad}, limit 20" in message(case, kernels, name)


@pytest.mark.parametrize("name", CALLS)
def test_the_first_of_many_bad_ids_is_named(kernels, name):
    case = make_case([[700] * 5] * 3, index_map=DENSE, rows=20)  # enough bags for every thread to meet a bad one
    case.ids[4000:] = 99
    assert "position 4000 of the batch's ids, id 99" in message(case, kernels, name)


@pytest.mark.parametrize("name", CALLS)
def test_bad_ids_of_other_slabs_are_not_this_slabs_error(kernels, name):
    case = dense_case()
    case.ids[:5] = 2**40  # feature 0, which the slab does not have
    call(case, kernels, name)


@pytest.mark.parametrize("name", CALLS)
def test_hashed_takes_any_64_bit_id(kernels, name):
    case = dense_case(index_map=HASHED)
    case.ids[5:10] = torch.tensor([-1, 2**31, 2**40, 2**63 - 1, -(2**63)])
    call(case, kernels, name)


BAD_OFFSETS = {
    "descend": [0, 2, 2, 5, 7, 6, 10, 12, 12, 15, 17, 17, 20],
    "beyond": [0, 2, 2, 5, 7, 7, 10, 12, 12, 15, 17, 17, 21],
    "far beyond": [0, 2, 2, 5, 7, 7, 10, 12, 12, 15, 17, 17, 2**62],
    "negative": [0, 2, 2, -5, 7, 7, 10, 12, 12, 15, 17, 17, 20],
    "most negative": [0, 2, 2, 5, -(2**63), 7, 10, 12, 12, 15, 17, 17, 20],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("offsets", BAD_OFFSETS.values(), ids=BAD_OFFSETS)
@pytest.mark.parametrize("index_map", [DENSE, HASHED])
def test_bad_offsets_are_refused(kernels, name, offsets, index_map):
    case = dense_case(index_map=index_map)._replace(offsets=torch.tensor(offsets))
    assert "offsets must not descend or leave the ids: feature C" in message(case, kernels, name)


def two_errors():
    """Cases with more than one thing wrong, of which one has to be named first."""
    id_then_offsets, offsets_then_id = dense_case(), dense_case()
    id_then_offsets.ids[5] = 20
    id_then_offsets.offsets[-1] = 21
    offsets_then_id.ids[19] = 20
    offsets_then_id.offsets[5] = 99
    short = dense_case()
    return {
        "id, then offsets": id_then_offsets,
        "offsets, then id": offsets_then_id,
        "no bags for two features": short._replace(offsets=short.offsets[:4]),
    }


@pytest.mark.parametrize("case", two_errors().values(), ids=two_errors())
@pytest.mark.parametrize("name", CALLS)
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
        "1-D weights": case._replace(weights=case.weights.flatten()),
        "zero-width weights": case._replace(weights=case.weights[:, :0]),
        "width of no divisor": case._replace(weights=case.weights[:, :1].expand(-1, 3)),
        "too few slots": case._replace(weights=case.weights[:10]),
        "float tables": case._replace(tables=case.tables.double()),
        "tables of 4 columns": case._replace(tables=case.tables[:, :4]),
        "position of no feature": case._replace(tables=case.tables + torch.tensor([9, 0, 0, 0, 0])),
        "negative position": case._replace(tables=case.tables - torch.tensor([9, 0, 0, 0, 0])),
        "unknown index map": case._replace(index_map=99),
        "negative index map": case._replace(index_map=-1),
    }


def with_sample_weights(case: Case) -> dict[str, Case]:
    v = torch.ones(len(case.ids))
    return {
        "too few": case._replace(sample_weights=v[:-1]),
        "2-D": case._replace(sample_weights=v[:, None]),
        "other dtype": case._replace(sample_weights=v.double()),
    }


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("what", broken(dense_case()))
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_arguments_of_wrong_type_or_length_are_refused(kernels, name, what):
    grad = dense_case().random_grad()
    message(broken(dense_case())[what], kernels, name, grad)
    call(dense_case(), kernels, name)


@pytest.mark.parametrize("name", CALLS[:3])
@pytest.mark.parametrize("what", with_sample_weights(dense_case()))
def test_sample_weights_of_wrong_type_or_length_are_refused(kernels, name, what):
    assert "per_sample_weights" in message(with_sample_weights(dense_case())[what], kernels, name)


@pytest.mark.parametrize("name", CALLS[1:])
@pytest.mark.parametrize("what", ["fewer features", "fewer samples", "other dim", "other dtype", "2-D"])
def test_gradients_of_wrong_type_or_shape_are_refused(kernels, name, what):
    grad = dense_case().random_grad()
    wrong = {"fewer features": grad[:, :1], "fewer samples": grad[:2], "other dim": grad[..., :2],
             "other dtype": grad.double(), "2-D": grad[0]}[what]  # fmt: skip
    if what == "other dim":
        wrong = grad[..., :3]  # 2 would be a call with another dim, as valid as this one
    if what == "fewer samples":
        wrong = torch.cat([grad] * 2)  # fewer would be the beginning of a batch whose bags do not fit
    message(dense_case(), kernels, name, wrong)


@pytest.mark.parametrize("pooling", [-1, 3])
def test_an_unknown_pooling_is_refused(kernels, pooling):
    with pytest.raises(RuntimeError, match="pooling"):
        dense_case().forward(kernels, pooling)


def test_max_with_sample_weights_is_refused(kernels):
    with pytest.raises(RuntimeError, match="sum or mean"):
        dense_case(weighted=True).forward(kernels, MAX)


@pytest.fixture
def bags():
    how = dict(embedding_dim=4, compression=0.5, accumulate="sorted")
    backends = {"user": Dense(**how), "item": Hashed(**how, block=2)}
    return EmbeddingBags(backends, {"user": 20, "item": 400}, pooling="sum", seed=0)


def test_the_collection_names_the_feature_of_a_bad_id(bags):
    with pytest.raises(RuntimeError, match="feature user, position 1 of the batch's ids, id 20, limit 20"):
        bags(torch.tensor([0, 20, 5, 6]))
    assert bags(torch.tensor([0, 19, 5, 6])).shape == (2, 2, 4)


@pytest.mark.parametrize("name", ["item, new", "a,b,c", "naïve/列", "%s {0}"])
def test_a_feature_of_any_name_is_named_whole(name):
    backend = Dense(embedding_dim=4, compression=1.0, accumulate="sorted")
    bags = EmbeddingBags({name: backend, "user": backend}, {name: 20, "user": 20}, pooling="sum", seed=0)
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
        assert bags(torch.tensor([], dtype=torch.int64), torch.tensor(offsets)).shape == (0, 2, 4)
        return
    with pytest.raises((ValueError, RuntimeError), match="offsets|bags"):
        bags(torch.tensor([0, 1, 5, 6]), torch.tensor(offsets, dtype=torch.int64))


FUZZ = """
import random, sys
sys.path[:0] = {paths!r}
from test_bad_ids import fuzz_once
outcomes = [fuzz_once(random.Random(seed)) for seed in range(2000)]
print(outcomes.count("fine"), outcomes.count("refused"))
print([(seed, outcome) for seed, outcome in enumerate(outcomes) if outcome not in ("fine", "refused")][:9])
"""


def hostile_case(rng: random.Random) -> Case:
    """A valid call after one to three hostile changes."""
    case = dense_case(index_map=rng.choice([DENSE, HASHED]), weighted=rng.random() < 0.5, seed=rng.randrange(9))
    nasty = [0, 1, -1, 2, 7, 19, 20, 21, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63)]
    for _ in range(rng.randint(1, 3)):
        kind = rng.choice(["ids", "offsets", "tables", "length", "batch", "dim", "map"])
        if kind in ("ids", "offsets", "tables"):
            getattr(case, kind).view(-1)[rng.randrange(getattr(case, kind).numel())] = rng.choice(nasty)
        elif kind == "length":
            field = rng.choice(["ids", "offsets", "weights", "tables"])
            return case._replace(**{field: getattr(case, field)[: rng.randrange(4)].clone()})
        elif kind == "batch":
            case = case._replace(batch_size=rng.choice([0, 1, -1, 2, 7, 2**40, 2**62]))
        elif kind == "dim":
            case = case._replace(dim=rng.choice([0, 1, 2, 6, -4, 2**40, 2**62]))
        else:
            case = case._replace(index_map=rng.choice(nasty))
    return case


def fuzz_once(rng: random.Random) -> str:
    """Whether a hostile call is "fine" or "refused", by both kernels with the same result; else what went wrong."""
    native.ensure()
    grad, case, name = dense_case().random_grad(), hostile_case(rng), rng.choice(CALLS)
    results = []
    for kernels in (torch.ops.embeddings, reference):
        try:
            found = call(case, kernels, name, grad)
            results.append(found if isinstance(found, tuple) else (found,))
        except (RuntimeError, IndexError) as error:
            results.append(error)
    refused = [isinstance(result, Exception) for result in results]
    if refused[0] != refused[1]:
        return f"{name}: native {results[0]!s:.300}, reference {results[1]!s:.300}"
    if refused[0]:
        return "refused"
    same = all(found.equal(wanted) for found, wanted in zip(*results, strict=True))
    return "fine" if same else f"{name}: results differ for tables {case.tables.tolist()}"


def test_2000_hostile_calls_end_alike_in_both_kernels_and_do_not_kill_the_process(request):
    code = FUZZ.format(paths=[str(request.config.rootpath), str(request.path.parent)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    counts, others = done.stdout.splitlines()
    assert others == "[]"
    fine, refused = map(int, counts.split())
    assert fine > 100 and refused > 500 and fine + refused == 2000

"""The drop-in modules are torch.nn.Embedding and EmbeddingBag: values, gradients, errors, and what goes with a module.

Dense modules are compared with torch's of the same weights. Of a compressed one the table is written out first, [N, D],
from its parameter through autograd, by hashes in Python integers (`oracle`): so torch's gradient of the parameter
compares as well. All expectations are computed in float64 on the CPU.
"""

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import AFFINE, MIXED, MURMUR3, SIGNED, Table, assert_same_bits
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings.modules import (
    BloomEmbedding,
    FastEmbedding,
    FastMultiEmbedding,
    HashedEmbedding,
    HashedEmbeddingBag,
    MultiHashEmbedding,
    QREmbeddingBag,
    ScaledEmbedding,
    ScaledEmbeddingBag,
    ZeroEmbedding,
)

N, D = 20, 6
ALL_IDS = torch.arange(N)
PADDINGS = (None, 2, -1)
# of numbers around 1: float16 and bfloat16 are rounded once, or twice where a step of ours is torch's in that dtype
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}

Pool = Callable[[Tensor], Tensor]


class Kind(NamedTuple):
    """A module of N ids by torch.nn's options, and what it should give; pool: what torch.nn makes of a table."""

    make: Callable[..., nn.Module]
    expected: Callable[[nn.Module, Pool], Tensor]


def read(module: nn.Module, index_map: int) -> list[Tensor]:
    """What each probe reads of all ids, [N, D], as a function of the parameter."""
    (parameter,) = module.parameters()
    vectors = []
    for table in (Table(*row) for row in module.tables.tolist()):
        chunks = [oracle.reads(table, index_map, id) for id in range(N)]
        numbers = [[table.begin + slot * table.width + j for slot, _ in c for j in range(table.width)] for c in chunks]
        signs = [[1 - 2 * negative for _, negative in c for _ in range(table.width)] for c in chunks]
        vectors.append(parameter.view(-1)[torch.tensor(numbers)] * torch.tensor(signs))
    return vectors


def rows(module: nn.Module, pool: Pool) -> Tensor:
    return pool(module.weight)


def hashed(index_map: int) -> Callable[[nn.Module, Pool], Tensor]:
    return lambda module, pool: pool(sum(read(module, index_map)))


def quotients(module: nn.Module) -> Tensor:
    return module.weight_q[ALL_IDS // len(module.weight_r)]


def remainders(module: nn.Module) -> Tensor:
    return module.weight_r[ALL_IDS % len(module.weight_r)]


COMPOSED = {
    "mult": lambda module, pool: pool(quotients(module) * remainders(module)),
    "add": lambda module, pool: pool(quotients(module) + remainders(module)),
    "concat": lambda module, pool: pool(torch.cat([quotients(module), remainders(module)], 1)),
}
BAGS = {
    "ScaledEmbeddingBag": Kind(partial(ScaledEmbeddingBag, N, D), rows),
    "HashedEmbeddingBag": Kind(partial(HashedEmbeddingBag, N, D, 0.5), hashed(MIXED)),
    "HashedEmbeddingBag-blocks": Kind(partial(HashedEmbeddingBag, N, D, 0.5, block=3, sign=True), hashed(SIGNED)),
    "HashedEmbeddingBag-affine": Kind(partial(HashedEmbeddingBag, N, D, 0.3, hash="affine"), hashed(AFFINE)),
    "QREmbeddingBag": Kind(partial(QREmbeddingBag, N, D, 3), COMPOSED["mult"]),
    "QREmbeddingBag-add": Kind(partial(QREmbeddingBag, N, D, 3, "add"), COMPOSED["add"]),
    "QREmbeddingBag-concat": Kind(partial(QREmbeddingBag, N, [4, 2], 3, "concat"), COMPOSED["concat"]),
    "QREmbeddingBag-legacy": Kind(
        partial(QREmbeddingBag, N, D, 3, order="legacy"), lambda m, pool: pool(quotients(m)) * pool(remainders(m))
    ),
    "QREmbeddingBag-legacy-add": Kind(
        partial(QREmbeddingBag, N, D, 3, "add", order="legacy"),
        lambda m, pool: pool(quotients(m)) + pool(remainders(m)),
    ),
}
SINGLES = {
    "ScaledEmbedding": Kind(partial(ScaledEmbedding, N, D), rows),
    "ZeroEmbedding": Kind(partial(ZeroEmbedding, N, D), rows),
    "FastEmbedding": Kind(partial(FastEmbedding, N, D), rows),
    "HashedEmbedding": Kind(partial(HashedEmbedding, N, D, 0.5), hashed(MIXED)),
    "HashedEmbedding-blocks": Kind(partial(HashedEmbedding, N, D, 0.5, block=2, sign=True), hashed(SIGNED)),
    "BloomEmbedding": Kind(partial(BloomEmbedding, N, D, 0.5), hashed(MIXED)),
    "BloomEmbedding-murmur3": Kind(partial(BloomEmbedding, N, D, 0.4, 3, hash="murmur3"), hashed(MURMUR3)),
    "BloomEmbedding-mean": Kind(
        partial(BloomEmbedding, N, D, 0.5, 3, combine="mean"), lambda m, pool: pool(sum(read(m, MIXED)) / 3)
    ),
    "MultiHashEmbedding": Kind(partial(MultiHashEmbedding, [[5, D], [4, D]]), COMPOSED["add"]),
    "MultiHashEmbedding-mul": Kind(
        partial(MultiHashEmbedding, [[7, D], [3, D]], operation="mul", num_embeddings=N), COMPOSED["mult"]
    ),
    "MultiHashEmbedding-concat": Kind(
        partial(MultiHashEmbedding, [[4, 2], [5, 4]], operation="concat"), COMPOSED["concat"]
    ),
}
DENSE = ("ScaledEmbeddingBag", "ScaledEmbedding", "ZeroEmbedding", "FastEmbedding")  # a row for every id
ALL = {**BAGS, **SINGLES, "FastMultiEmbedding": Kind(partial(FastMultiEmbedding, [N, N], [2, 4]), None)}
# what only an option of the operator tells from its neighbour: test_bag.py holds the reference to every such option
LIKE_ANOTHER = {
    "HashedEmbeddingBag-affine",
    "QREmbeddingBag-add",
    "QREmbeddingBag-legacy-add",
    "HashedEmbedding-blocks",
}
LIKE_ANOTHER |= {"ZeroEmbedding", "BloomEmbedding-murmur3", "MultiHashEmbedding", "MultiHashEmbedding-concat"}
once = pytest.mark.once


def each(names: Iterable[str], seldom: set[str] = LIKE_ANOTHER) -> pytest.MarkDecorator:
    """Runs a test for these modules, with the reference kernels only for those that are not in `seldom`."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=[once] * (n in seldom)) for n in names])


each_bag, each_single, each_module = each(BAGS), each(SINGLES), each(ALL)


def padded(name: str) -> dict:
    return {} if name == "FastMultiEmbedding" else {"padding_idx": 2}


def build(name: str, seed: int = 0, **options) -> nn.Module:
    """A module of weights around 1, also in rows that begin as zero; the same for the same arguments."""
    torch.manual_seed(seed)  # hashes draw their own
    module = ALL[name].make(**options)
    (parameter,) = module.parameters()
    with torch.no_grad():
        parameter.copy_(randn(*parameter.shape, seed=seed).float())  # so that every dtype rounds the same numbers
    return module


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def every_other(x: Tensor) -> Tensor:
    """The same numbers, not contiguous."""
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


def is_weights(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()


class Expected:
    """What torch.nn gives in float64: value, gradients of the parameter and of the sample weights."""

    def __init__(self, name: str, module: nn.Module, torchs: nn.Module, *batch: Tensor | None) -> None:
        exact = copy.deepcopy(module).cpu().double()
        batch = [x.double().requires_grad_() if is_weights(x) else x for x in batch]
        out = ALL[name].expected(exact, lambda table: functional_call(torchs, {"weight": table}, tuple(batch)))
        self.grad = randn(*out.shape).to(next(module.parameters()).dtype)
        self.results = [out, *torch.autograd.grad(out, [*exact.parameters(), *filter(is_weights, batch)], self.grad)]
        # of pools that torch rounds before it composes them
        self.roundings = 8 if "legacy" in name else 1

    def compare(self, what: tuple, module: nn.Module, *batch: Tensor | None) -> None:
        (parameter,) = module.parameters()
        batch = [x.detach().to(parameter).requires_grad_() if is_weights(x) else x for x in batch]
        out = module(*batch)
        grads = torch.autograd.grad(out, [parameter, *filter(is_weights, batch)], self.grad.to(parameter))
        assert grads[0].is_sparse == module.sparse, what
        tolerance = self.roundings * TOLERANCES[parameter.dtype]
        for x, wanted in zip((out, *grads), self.results, strict=True):
            assert x.dtype == parameter.dtype and x.device == parameter.device and x.shape == wanted.shape, what
            error = (x.to_dense().cpu().double() - wanted).abs()
            assert (error <= tolerance * (1 + wanted.abs())).all(), (what, x, wanted)


def moved(device: str, *batch: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.to(device) for x in batch]


# --- values and gradients ---------------------------------------------------------------------------------------------

# empty bags first, between and last; an id twice in a bag; bags of padding alone, for both paddings
IDS = torch.tensor([7, 2, 7, 2, 19, 3, 3, 0, 2, 11, 19, 19])
OFFSETS = torch.tensor([0, 0, 3, 4, 4, 9, 11, 12, 12])
BATCHES = {  # include_last_offset, input, offsets
    "offsets": (False, IDS, OFFSETS[:-1]),
    "last offset": (True, IDS, OFFSETS),
    "rows": (False, IDS[[0, 1, 2, 4, 5, 7, 3, 3, 3, 9, 10, 11]].view(4, 3), None),
    "rows of a last offset": (True, IDS.view(2, 6), None),
    "no ids": (False, IDS[:0], OFFSETS[:3] * 0),
    "no bags": (False, IDS[:0], IDS[:0]),
    "no rows": (False, IDS[:0].view(0, 3), None),
}
INPUTS = {
    "one id": IDS[1],
    "ids": IDS,
    "no ids": IDS[:0],
    "rows": IDS.view(3, 4),
    "no ids, in rows": IDS[:0].view(2, 0),
    "three dimensions": IDS.view(2, 3, 2),
}
each_mode = pytest.mark.parametrize("mode", [pytest.param("sum", marks=once), "weighted sum", "mean", "max"])
INTEGERS = (torch.int64, torch.int32)


def cells(batches: dict) -> list[tuple]:
    """(padding, dtype, batch, dtypes of the ids of a dense and a sparse module): every two of them meet, and of
    batches with ids half of the threes."""
    found = []
    for (p, padding), (t, dtype), (b, batch) in itertools.product(*map(enumerate, (PADDINGS, TOLERANCES, batches))):
        if dtype == torch.float32 if batch.startswith("no ") else (p + t + b) % 2 == 0:
            found.append((padding, dtype, batch, INTEGERS if (p + t // 2) % 2 else INTEGERS[::-1]))
    return found


@each_bag
@each_mode
def test_a_bag_is_torchs_over_paddings_shapes_dtypes_and_sparse(name, mode, device):
    mode, is_weighted = mode.removeprefix("weighted "), mode.startswith("weighted")
    for padding_idx, dtype, shape, integers in cells(BATCHES):
        last, ids, offsets = BATCHES[shape]
        options = dict(mode=mode, padding_idx=padding_idx, include_last_offset=last)
        weights = randn(*ids.shape, seed=2).to(dtype) if is_weighted else None
        modules = [build(name, **options, dtype=dtype, sparse=sparse, device=device) for sparse in (False, True)]
        expected = Expected(name, modules[0], nn.EmbeddingBag(N, D, **options), ids, offsets, weights)
        for module, ids_dtype in zip(modules, integers, strict=True):
            offsets_dtype = INTEGERS[(ids_dtype == torch.int32) != module.sparse]  # with ids of both
            batch = ids.to(ids_dtype), None if offsets is None else offsets.to(offsets_dtype), weights
            if ids_dtype == torch.int32:
                batch = [None if x is None else every_other(x) for x in batch]
            what = (options, dtype, shape, module.sparse, ids_dtype, offsets_dtype)
            expected.compare(what, module, *moved(device, *batch))


@each_single
def test_an_embedding_is_torchs_over_paddings_shapes_dtypes_and_sparse(name, device):
    for padding_idx, dtype, shape, integers in cells(INPUTS):
        ids, options = INPUTS[shape], dict(padding_idx=padding_idx)
        modules = [build(name, **options, dtype=dtype, sparse=sparse, device=device) for sparse in (False, True)]
        expected = Expected(name, modules[0], nn.Embedding(N, D, **options), ids)
        if padding_idx is not None and name not in DENSE:  # no row is set aside for the padding: it is zero
            expected.results[0] = expected.results[0].where((ids != padding_idx % N)[..., None], 0)
        for module, ids_dtype in zip(modules, integers, strict=True):
            batch = every_other(ids.to(ids_dtype)) if ids_dtype == torch.int32 else ids
            expected.compare((options, dtype, shape, module.sparse, ids_dtype), module, *moved(device, batch))


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    name=st.sampled_from(["ScaledEmbeddingBag", "HashedEmbeddingBag", "QREmbeddingBag"]),
    bags=st.lists(st.lists(st.sampled_from([0, 1, 2, 7, 18, 19]), max_size=6), max_size=6),
    mode=st.sampled_from(["sum", "weighted sum", "mean", "max"]),
    padding_idx=st.sampled_from([None, 0, 2, 19, -13]),
    last=st.booleans(),
)
def test_any_bags_are_torchs(name, bags, mode, padding_idx, last):
    mode, is_weighted = mode.removeprefix("weighted "), mode.startswith("weighted")
    options = dict(mode=mode, padding_idx=padding_idx, include_last_offset=last)
    ids = torch.tensor([id for bag in bags for id in bag], dtype=torch.int64)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, bags))])
    batch = ids, offsets if last else offsets[:-1], randn(len(ids), seed=2) if is_weighted else None
    module = build(name, **options, dtype=torch.float64)
    Expected(name, module, nn.EmbeddingBag(N, D, **options), *batch).compare((bags, options), module, *batch)


@each_module
def test_the_gradient_of_a_sum_is_that_of_the_same_numbers_in_full(name):
    for how in ({"mode": "sum"}, {"mode": "mean"}, {"mode": "max"}) if name in BAGS else ({},):
        module = build(name, **how)
        expanded, full = (
            torch.autograd.grad(total(module(IDS.view(6, 2))), list(module.parameters()))[0]
            for total in (Tensor.sum, lambda out: (out * torch.ones_like(out)).sum())
        )
        assert expanded.any()
        assert_same_bits(expanded, full)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_tables_side_by_side_are_torchs_embeddings(dtype, sparse, device):
    sizes, dims = [4, 20, 9], [3, 1, 5]
    ours = FastMultiEmbedding(sizes, dims, sparse=sparse, dtype=dtype, device=device)
    tables = [nn.Embedding(n, dim, dtype=dtype) for n, dim in zip(sizes, dims, strict=True)]
    with torch.no_grad():
        for part, table in zip(ours.weights, tables, strict=True):
            part.copy_(table.weight)
    for num_ids, ids_dtype in itertools.product((0, 1, 50), INTEGERS):
        ids = torch.stack([torch.arange(num_ids) * 7 % n for n in sizes], 1).to(ids_dtype)
        out, wanted = ours(ids.to(device)), torch.cat([t(ids[:, i].long()) for i, t in enumerate(tables)], 1)
        assert_same_bits(out, wanted)
        grad = randn(*out.shape).to(dtype)
        (found,) = torch.autograd.grad(out, ours.weight, grad.to(device))
        assert found.is_sparse == sparse
        exact = [table.weight.detach().double().requires_grad_() for table in tables]
        wanted = torch.cat([rows[ids[:, i].long()] for i, rows in enumerate(exact)], 1)
        grads = torch.autograd.grad(wanted, exact, grad.double())
        tolerance = dict(rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
        torch.testing.assert_close(
            found.to_dense().cpu().double().view(-1), torch.cat([g.flatten() for g in grads]), **tolerance
        )


def test_hashed_rows_of_upstreams_shapes_are_sums(device):
    ours = build("HashedEmbedding", device=device)
    upstreams = build("HashedEmbedding", shapes="upstream", device=device)
    pairs, ids = moved(device, IDS.view(6, 2), IDS)
    assert_same_bits(upstreams(ids), ours(ids))
    wanted = nn.functional.embedding_bag(pairs, ours(ALL_IDS.to(device)), mode="sum")
    torch.testing.assert_close(upstreams(pairs), wanted, rtol=1e-6, atol=1e-6)


def test_any_64_bit_id_has_a_hashed_vector_of_its_own():
    ids = torch.tensor([-(2**63), -1, N, 2**31, 2**40, 2**63 - 1])
    for name in (name for name in ALL if name.startswith(("Hashed", "Bloom"))):
        for padding_idx in (None, -1):  # the last of num_embeddings, not the id -1
            out = build(name, padding_idx=padding_idx)(ids[:, None])
            assert len(out.flatten(1).unique(dim=0)) == len(ids) and out.abs().sum(-1).all(), name


@pytest.mark.parametrize("name", ["ScaledEmbedding", "ScaledEmbeddingBag"])
def test_sparse_gradients_train_as_torchs_do(name):
    ours = build(name, padding_idx=2, sparse=True, dtype=torch.float64)
    theirs = getattr(nn, name.removeprefix("Scaled"))(N, D, padding_idx=2, sparse=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        optimizer = torch.optim.SparseAdam(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            module(IDS.view(3, 4)).pow(2).sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-13, atol=1e-13)


# --- how weights begin ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, mean, deviation",
    [
        (partial(ScaledEmbedding, 20_000, 16), 0, 1 / 16),
        (partial(ScaledEmbeddingBag, 20_000, 16), 0, 1 / 16),
        (partial(FastEmbedding, 20_000, 16), 0, 1),
        (partial(FastMultiEmbedding, [20_000, 10_000], [16, 8]), 0, 1),
        (partial(BloomEmbedding, 100_000, 16), 0, 1 / 16),
        (partial(HashedEmbedding, 20_000, 16, 0.5), 0, (3 * 20_000) ** -0.5),
        (partial(HashedEmbeddingBag, 20_000, 16, 0.5), 0, (3 * 20_000) ** -0.5),
    ],
    ids=lambda make: getattr(getattr(make, "func", None), "__name__", ""),
)
def test_weights_begin_with_their_authors_spread(make, mean, deviation):
    torch.manual_seed(0)
    (weight,) = make().parameters()
    assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert abs(weight.mean().item() - mean) < 0.02 * deviation


@pytest.mark.parametrize(
    "make",
    [
        partial(QREmbeddingBag, 20_000, 16, 100, mode="sum"),
        partial(QREmbeddingBag, 20_000, 16, 100, "add", mode="sum"),
        partial(QREmbeddingBag, 20_000, 8, 100, "concat", mode="sum"),
        partial(MultiHashEmbedding, [[200, 16], [100, 16]]),
    ],
)
def test_composed_vectors_begin_with_the_spread_of_a_dense_table(make):
    torch.manual_seed(0)
    ids = torch.randint(20_000, (5000, 1))
    vectors = make()(ids)
    assert vectors.var().item() * 3 * 20_000 == pytest.approx(1, abs=0.1)
    assert abs(vectors.mean().item()) * 20_000**0.5 < 0.06


@pytest.mark.parametrize("name", DENSE)
def test_the_paddings_row_begins_as_zero_and_the_others_do_not(name):
    weight = ALL[name].make(padding_idx=-1).weight
    assert not weight[-1].any()
    assert weight[:-1].all() or name == "ZeroEmbedding"
    assert name != "ZeroEmbedding" or not weight.any()


@each_module
def test_torchs_seed_decides_weights_and_hash(name):
    modules = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        modules.append(ALL[name].make())
    first, same, other = (list(module.state_dict().values()) for module in modules)
    assert all(x.equal(y) for x, y in zip(first, same, strict=True))
    assert name == "ZeroEmbedding" or not any(x.equal(y) for x, y in zip(first, other, strict=True))


def test_a_hashs_own_seed_repeats_it_alone():
    a, b = (HashedEmbedding(N, D, 0.5, seed=5) for _ in range(2))
    assert a.tables.equal(b.tables) and not a.hashed_weight.equal(b.hashed_weight)
    assert not HashedEmbedding(N, D, 0.5, seed=6).tables.equal(a.tables)


# --- what goes with a module ------------------------------------------------------------------------------------------


def look_up(module: nn.Module) -> Tensor:
    return module(IDS.view(6, 2))


@each_module
def test_a_checkpoint_is_complete(name):
    ours, others = build(name, **padded(name)), build(name, seed=1, **padded(name))
    assert not look_up(others).equal(look_up(ours))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    others.load_state_dict(torch.load(buffer, weights_only=True))
    assert_same_bits(look_up(others), look_up(ours))


@pytest.mark.parametrize("name", DENSE)
def test_checkpoints_are_exchanged_with_torch(name):
    ours = build(name)
    theirs = (nn.EmbeddingBag if name in BAGS else nn.Embedding)(N, D, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    assert_same_bits(theirs.weight.float(), ours.weight)
    ours.load_state_dict(nn.Embedding(N, D).state_dict())


@each_module
def test_copies_and_pickles_give_the_same_and_share_nothing(name):
    ours = build(name, **padded(name))
    before = look_up(ours)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_same_bits(look_up(other), before)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert_same_bits(look_up(ours), before)
        assert not look_up(other).any()


@each_module
def test_a_module_moves_whole(name, device):
    ours = build(name, **padded(name))
    before, ids = look_up(ours), IDS.view(6, 2).to(device)
    there = copy.deepcopy(ours).to(device)
    assert {x.device.type for x in there.state_dict(keep_vars=True).values()} == {device}
    assert_same_bits(there(ids), before)
    for dtype in TOLERANCES:
        cast = copy.deepcopy(ours).to(device, dtype)
        made = build(name, **padded(name), dtype=dtype, device=device)
        assert cast.tables.dtype == torch.int64
        assert_same_bits(cast(ids), made(ids))


@each_module
def test_a_module_made_empty_is_made_whole_by_a_checkpoint_or_a_reset(name):
    torch.manual_seed(7)
    ours = ALL[name].make(**padded(name))
    with torch.device("meta"):
        empty = ALL[name].make(**padded(name))
    assert {x.device.type for x in [*empty.parameters(), *empty.buffers()]} == {"meta"}
    torch.manual_seed(7)
    empty = ALL[name].make(**padded(name), device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for x in (*empty.parameters(), *empty.buffers()):
            x.fill_(77)
    empty.reset_parameters()
    torch.manual_seed(7)
    again = ALL[name].make(**padded(name))
    assert empty.tables.equal(again.tables) and again.tables.equal(ours.tables)
    drawn = look_up(empty)
    assert drawn.isfinite().all() and (drawn.any() or name == "ZeroEmbedding")
    empty.load_state_dict(ours.state_dict())
    assert_same_bits(look_up(empty), look_up(ours))


@pytest.mark.parametrize("assign", [True, False])
@each_module
def test_a_checkpoint_alone_makes_a_module_on_meta_whole(name, device, assign):
    ours = build(name, **padded(name)).to(device)
    with torch.device("meta"):
        empty = nn.Sequential(ALL[name].make(**padded(name)))
    if not assign:
        empty.to_empty(device=device)
        empty[0].tables.fill_(77)  # what memory may hold
    found = empty.load_state_dict({f"0.{key}": x for key, x in ours.state_dict().items()}, assign=assign)
    assert not any(found)
    ids = IDS.view(6, 2).to(device)
    assert_same_bits(empty(ids), ours(ids))


@each_module
def test_weights_alone_make_a_module_whole_and_leave_its_hash(name):
    ours = build(name)
    key, weight = next(iter(ours.state_dict().items()))
    twin = copy.deepcopy(ours).to_empty(device="cpu")
    twin.tables.fill_(77)
    twin.load_state_dict({key: weight}, strict=False)
    assert_same_bits(look_up(twin), look_up(ours))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["FastEmbedding", "HashedEmbeddingBag"])
def test_real_weights_with_the_rest_on_meta_are_an_error(name, compiled):
    for part in ("tables", "ids"):
        ours, ids = build(name), IDS.view(6, 2)
        if part == "tables":
            ours.tables = ours.tables.to("meta")
        call = torch.compile(ours, fullgraph=True, backend="eager") if compiled else ours
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="on meta and others on cpu"):
                call(ids.to("meta") if part == "ids" else ids)


@each_module
def test_functional_call_replaces_the_weights(name):
    ours, others = build(name), build(name, dtype=torch.float64)
    ((key, weight),) = ours.named_parameters()
    assert key == ("hashed_weight" if name.startswith("Hashed") else "weight")
    replaced = (2 * weight).detach().requires_grad_()
    with torch.no_grad():
        next(others.parameters()).copy_(replaced)
    out = functional_call(ours, {key: replaced}, (IDS.view(6, 2),))
    torch.testing.assert_close(out, look_up(others).float(), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sum(), replaced)
    assert grad.any() and weight.grad is None


@pytest.mark.parametrize(
    "kind, arguments, shapes, options",
    [
        *((kind, (), [(N, D)], {}) for kind in (ScaledEmbedding, ZeroEmbedding, FastEmbedding, ScaledEmbeddingBag)),
        (HashedEmbedding, (N, D), [(60,)], {"seed": 3}),
        (HashedEmbeddingBag, (N, D), [(60,)], {"seed": 3, "block": 3, "mode": "max"}),
        (BloomEmbedding, (N, D), [(10, D)], {"seed": 3, "num_hash_functions": 2}),
        (QREmbeddingBag, (N, D, 3), [(7, D), (3, D)], {"operation": "add"}),
        (MultiHashEmbedding, ([[5, D], [4, D]],), [(5, D), (4, D)], {"operation": "mul"}),
    ],
)
def test_pretrained_weights_are_kept_and_frozen_unless_asked(kind, arguments, shapes, options):
    weights = [randn(*shape, seed=i).float() for i, shape in enumerate(shapes)]
    weights = weights if len(weights) > 1 else weights[0]
    wanted = look_up(kind(*(arguments or (N, D)), _weight=weights, **options, padding_idx=2))
    for freeze in (True, False):
        ours = kind.from_pretrained(weights, *arguments, freeze=freeze, **options, padding_idx=2)
        (parameter,) = ours.parameters()
        assert parameter.requires_grad == (not freeze)
        assert parameter.view(-1).equal(
            torch.cat([w.flatten() for w in weights] if len(shapes) > 1 else [weights.flatten()])
        )
        assert_same_bits(look_up(ours), wanted)
    cast = kind(*(arguments or (N, D)), _weight=weights, **options, dtype=torch.float64)
    assert {p.dtype for p in cast.parameters()} == {torch.float64}
    assert kind.from_pretrained(weights, *arguments, **options).padding_idx == (0 if kind is BloomEmbedding else None)
    assert not next(kind.from_pretrained(weights, *arguments, **options).parameters()).requires_grad


@pytest.mark.parametrize(
    "name, options, words",
    [
        (
            "ScaledEmbeddingBag",
            {"mode": "max", "sparse": True},
            "mode='max', padding_idx=2, sparse=True, weight=[20, 6]",
        ),
        ("ScaledEmbedding", {}, "padding_idx=2, weight=[20, 6]"),
        (
            "HashedEmbeddingBag-blocks",
            {},
            "mode='sum', hash='mixed', block=3, sign=True, padding_idx=2, hashed_weight=[60]",
        ),
        (
            "HashedEmbedding",
            {"shapes": "upstream"},
            "hash='mixed', block=1, sign=False, shapes='upstream', padding_idx=2, hashed_weight=[60]",
        ),
        (
            "BloomEmbedding",
            {},
            "num_hash_functions=4, combine='sum', hash='mixed', shapes='torch', padding_idx=2, weight=[10, 6]",
        ),
        (
            "QREmbeddingBag-legacy",
            {},
            "mode='mean', num_collisions=3, operation='mult', order='legacy', padding_idx=2, weight=[10, 6]",
        ),
        ("MultiHashEmbedding-concat", {}, "operation='concat', padding_idx=2, weight=[14, 2]"),
        ("FastMultiEmbedding", {"sparse": True}, "sparse=True, weight=[60, 2]"),
    ],
)
def test_a_module_says_what_it_is(name, options, words):
    sizes = "[20, 20], [2, 4]" if name == "FastMultiEmbedding" else "20, 6"
    assert build(name, **padded(name), **options).extra_repr() == f"{sizes}, {words}"


@each_module
def test_a_batch_is_left_as_it_is(name):
    batch = traced(name)[1](5)
    before, versions = [x.clone() for x in batch], [x._version for x in batch]
    traced(name)[0](*batch).sum().backward()
    assert all(x.equal(y) for x, y in zip(batch, before, strict=True))
    assert [x._version for x in batch] == versions


# --- tracing ----------------------------------------------------------------------------------------------------------

# one of each class, and what does more than its class's first
CLASSES = [name for name in ALL if "-" not in name] + ["QREmbeddingBag-legacy", "BloomEmbedding-mean"]
# of those that trace the same operators, one with the reference kernels too
TWICE = {"ScaledEmbeddingBag", "HashedEmbedding", "QREmbeddingBag-legacy", "BloomEmbedding-mean", "FastMultiEmbedding"}
each_class = each(CLASSES, seldom=set(CLASSES) - TWICE)


def traced(name: str) -> tuple[nn.Module, Callable[[int], tuple]]:
    """A module and its batches, by size: bags with weights and a padding, ids, or rows of ids."""
    is_bag = name in BAGS
    module = build(name, **padded(name), **({"mode": "sum"} if is_bag else {}))

    def batch(size: int) -> tuple[Tensor, ...]:
        ids = torch.arange(3 * size) * 7 % N
        if name == "FastMultiEmbedding":
            return (ids.view(-1, 1).expand(-1, 2),)
        return (ids, torch.arange(size) * 2, randn(3 * size).float()) if is_bag else (ids,)

    return module, batch


@each_class
def test_compiled_whole_once_for_batches_of_any_size(name):
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module, batch = traced(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 5, 8):
        out, wanted = compiled(*batch(size)), module(*batch(size))
        assert_same_bits(out, wanted)
        grads = [torch.autograd.grad(x.pow(2).sum(), list(module.parameters()))[0] for x in (out, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)  # torch's gradient of a product has two orders
    assert counter.frame_count == 1


@each_class
def test_exported_saved_and_loaded_for_batches_of_any_size(name):
    module, batch = traced(name)
    sizes = tuple({0: Dim.DYNAMIC} for _ in batch(3))
    program, buffer = torch.export.export(module, batch(3), dynamic_shapes=sizes), io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for size in (3, 8):
        assert_same_bits(loaded(*batch(size)), module(*batch(size)))


class Calls(TorchDispatchMode):
    """The operator's arguments in the calls that are made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.embeddings.bag.default:
            self.found.append(args)
        return function(*args, **(kwargs or {}))


@each_class
def test_opcheck_of_the_call_a_module_makes(name, monkeypatch):
    module, batch = traced(name)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # eager code calls what the operator is made of
    with Calls() as calls:
        module(*batch(3))
    (call,) = calls.found
    assert call[0].requires_grad
    utils = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.embeddings.bag.default, call, test_utils=utils)


@each_module
def test_gradcheck(name):
    module = build(name, **padded(name), **({"mode": "sum"} if name in BAGS else {}), dtype=torch.float64)
    ((key, weight),) = module.named_parameters()
    ids = torch.tensor([[7, 11 if name in DENSE else 2], [3, 19]])  # a padding's own row is read, and not trained
    weights = [randn(2, 2).requires_grad_()] if name in BAGS else []

    def call(weight: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(module, {key: weight}, (ids, None, *weights) if weights else (ids,))

    assert torch.autograd.gradcheck(call, (weight, *weights))


# --- what is refused --------------------------------------------------------------------------------------------------

FOUR = torch.tensor([1, 2, 3, 4])
TWO = torch.tensor([0, 2])
BAD_BAGS = {  # include_last_offset, batch
    "three dimensions": (False, FOUR.view(1, 2, 2)),
    "no dimension": (False, FOUR[0], TWO),
    "rows with offsets": (False, FOUR.view(2, 2), TWO),
    "no offsets": (False, FOUR),
    "offsets in rows": (False, FOUR, TWO[None]),
    "one offset without dimension": (False, FOUR, TWO[0]),
    "offsets of floats": (False, FOUR, TWO.float()),
    "ids of floats": (False, FOUR.float(), TWO),
    "no ids, of floats": (False, FOUR[:0].float(), TWO * 0),
    "first offset not 0": (False, FOUR, TWO + 1),
    "an offset beyond the ids": (False, FOUR, torch.tensor([0, 5])),
    "a last offset beyond the ids": (True, FOUR, torch.tensor([0, 2, 5])),
    "no last offset": (True, FOUR, TWO[:0]),
    "too few weights": (False, FOUR, TWO, torch.ones(3)),
    "weights of another dtype": (False, FOUR, TWO, torch.ones(4, dtype=torch.float64)),
    "weights of whole numbers": (False, FOUR, TWO, FOUR),
    "weights in rows": (False, FOUR, TWO, torch.ones(2, 2)),
}
BAD_IDS = {
    "of floats": FOUR.float(),
    "none, of floats": FOUR[:0].float(),
    "of int16": FOUR.short(),
    "of uint8": FOUR.byte(),
}
BAD_IDS |= {"of booleans": FOUR.bool()}
RANGED = [
    name for name in ALL if name.startswith(("Scaled", "Zero", "Fast", "QR", "MultiHash")) and name in (BAGS | SINGLES)
]


def error_of(call: Callable, *arguments, **options) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: B017
        call(*arguments, **options)
    return raised.value


@each_bag
@pytest.mark.parametrize("bad", BAD_BAGS)
def test_a_bad_batch_of_bags_is_torchs_error(name, bad):
    last, *batch = BAD_BAGS[bad]
    for padding_idx in (None, 1, 2, 3, 4, -1):
        options = dict(mode="sum", include_last_offset=last, padding_idx=padding_idx)
        ours, theirs = build(name, **options), nn.EmbeddingBag(N, D, **options)
        assert type(error_of(ours, *batch)) is type(error_of(theirs, *batch)), padding_idx
        assert_same_bits(ours(FOUR.view(2, 2)), build(name, **options)(FOUR.view(2, 2)))  # and works afterwards


@each_bag
@pytest.mark.parametrize("mode", ["mean", "max"])
def test_weights_are_of_sums_alone_as_torchs(name, mode):
    for weights in (torch.ones(4), torch.ones(3)):
        errors = [error_of(m, FOUR, TWO, weights) for m in (build(name, mode=mode), nn.EmbeddingBag(N, D, mode=mode))]
        assert type(errors[0]) is type(errors[1]) is (NotImplementedError if len(weights) == 4 else ValueError)
    assert repr(mode) in str(error_of(build(name, mode=mode), FOUR, TWO, torch.ones(4)))


@each_single
@pytest.mark.parametrize("bad", BAD_IDS)
def test_bad_ids_of_an_embedding_are_torchs_error(name, bad):
    errors = [error_of(m, BAD_IDS[bad]) for m in (build(name), nn.Embedding(N, D))]
    assert type(errors[0]) is type(errors[1]) is RuntimeError


@pytest.mark.parametrize("id", [-1, N, 2**31, -(2**63)])
@pytest.mark.parametrize("name", RANGED)
def test_an_id_out_of_range_is_torchs_error_with_the_id_and_the_limit(name, id):
    for padding_idx in PADDINGS:
        torchs = (nn.EmbeddingBag if name in BAGS else nn.Embedding)(N, D, padding_idx=padding_idx)
        ours = build(name, padding_idx=padding_idx)
        ids = torch.tensor([[3 if padding_idx is None else padding_idx % N, id]])
        ours_error, torchs_error = error_of(ours, ids), error_of(torchs, ids)
        assert type(ours_error) is type(torchs_error) is (RuntimeError if name in BAGS else IndexError)
        assert f"position 1 of the batch's ids, id {id}, limit {N}" in str(ours_error)


def test_an_id_of_a_wider_table_beside_it_is_an_index_error():
    ours = FastMultiEmbedding([4, 20], [3, 2])
    with pytest.raises(IndexError, match="feature table 0, position 2 of the batch's ids, id 4, limit 4"):
        ours(torch.tensor([[3, 19], [4, 0]]))
    with pytest.raises(IndexError, match="feature table 1, position 5 of the batch's ids, id 20, limit 20"):
        ours(torch.tensor([[3, 19], [3, 0], [0, 20]]))
    for wrong in (torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(4), torch.zeros(2, 2, 1), torch.tensor(0)):
        with pytest.raises(ValueError, match=r"input has shape .*: it must be \[B, 2\]"):
            ours(wrong.long())
    with pytest.raises(RuntimeError, match="int32 or int64"):
        ours(torch.zeros(2, 2))


@pytest.mark.cuda
@pytest.mark.parametrize("name", RANGED)
def test_on_cuda_an_id_out_of_range_is_raised_when_asked_for(name):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ours = build(name, device="cuda")
    ours(torch.tensor([[3, N]], device="cuda"))
    with pytest.raises(RuntimeError, match=f"id {N}, limit {N}"):
        ours.raise_noted()


def test_fast_gradients_repeat_where_they_must(device):
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("FastEmbedding", "FastMultiEmbedding"):
            ids = IDS.view(6, 2).to(device)
            if device == "cuda":
                with pytest.raises(RuntimeError, match="atomic.*sparse=True"):
                    build(name, device=device)(ids).sum().backward()
            else:  # the CPU sums in order
                module = build(name)
                found = [torch.autograd.grad(module(ids).pow(2).sum(), module.parameters())[0] for _ in range(2)]
                assert found[0].any() and found[0].equal(found[1])
            build(name, sparse=True, device=device)(ids).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


# --- where torch does otherwise, on purpose ---------------------------------------------------------------------------


@each_module
def test_a_padding_idx_out_of_range_is_a_value_error_where_torch_asserts(name):
    if name == "FastMultiEmbedding":
        return
    for padding_idx in (N, -N - 1):
        with pytest.raises(ValueError, match=f"padding_idx={padding_idx} must be within num_embeddings={N}"):
            ALL[name].make(padding_idx=padding_idx)
        with pytest.raises(AssertionError):
            nn.Embedding(N, D, padding_idx=padding_idx)
    assert ALL[name].make(padding_idx=-N).padding_idx == nn.Embedding(N, D, padding_idx=-N).padding_idx == 0


@pytest.mark.parametrize("kind", [ScaledEmbedding, ZeroEmbedding])
def test_a_module_is_frozen_by_torchs_argument(kind):
    for freeze in (False, True):
        for module in (kind(N, D, _freeze=freeze), nn.Embedding(N, D, _freeze=freeze)):
            assert module.weight.requires_grad == (not freeze)


@pytest.mark.parametrize("kind", [HashedEmbedding, HashedEmbeddingBag, BloomEmbedding])
def test_pretrained_weights_of_a_seeded_hash_need_its_seed(kind):
    trained = kind(N, D, 0.5)
    weights = next(trained.parameters()).detach()
    with pytest.raises(ValueError, match="seed=None: with hash=mixed these weights need the seed"):
        kind.from_pretrained(weights, N, D)
    assert_same_bits(look_up(kind.from_pretrained(weights, N, D, seed=trained.seed)), look_up(trained))
    theirs = "murmur3" if kind is BloomEmbedding else "affine"  # which has no seed of ours
    assert kind.from_pretrained(weights, N, D, hash=theirs).arrangement.backend.hash == theirs


each_seeded = pytest.mark.parametrize("kind", [HashedEmbedding, HashedEmbeddingBag, BloomEmbedding])


@each_seeded
@pytest.mark.parametrize("meta", [False, True])
def test_the_seed_of_a_loaded_hash_is_the_checkpoints(kind, meta, device):
    trained, other = kind(N, D, 0.5, device=device), kind(N, D, 0.5, device="meta" if meta else device)
    assert other.seed != trained.seed
    other.load_state_dict(trained.state_dict(), assign=meta)
    assert other.seed == trained.seed
    weights, ids = next(other.parameters()).detach(), IDS.view(6, 2).to(device)
    assert_same_bits(kind.from_pretrained(weights, N, D, seed=other.seed, device=device)(ids), trained(ids))
    for _ in range(2):  # the loaded hash stays, also where memory was lost
        other.to_empty(device=device).reset_parameters()
        assert other.tables.equal(trained.tables) and other.seed == int(other.hash_seed) == trained.seed
        other = copy.deepcopy(other)


@each_seeded
def test_a_hash_copied_into_the_buffers_is_the_modules_own(kind):
    first, other = kind(N, D, 0.5, seed=3), kind(N, D, 0.5, seed=4)
    with torch.no_grad():  # as DDP does
        for x, y in zip(other.buffers(), first.buffers(), strict=True):
            x.copy_(y)
    assert other.seed == 3
    other.reset_parameters()
    assert other.tables.equal(first.tables) and other.seed == 3
    other.tables.copy_(kind(N, D, 0.5, seed=5).tables)
    assert other.seed is None


@each_seeded
def test_a_checkpoint_without_a_seed_gives_its_hash_and_no_seed_but_its_own(kind):
    trained, same, other = (kind(N, D, 0.5, seed=seed) for seed in (3, 3, 4))
    state = trained.state_dict()
    del state["hash_seed"]
    same.load_state_dict(state)
    assert same.seed == 3
    other.load_state_dict(state)
    assert other.seed is None
    assert_same_bits(look_up(other), look_up(trained))
    other.reset_parameters()
    assert other.tables.equal(trained.tables)
    for first in (same, other):  # what was not known stays so
        again = kind(N, D, 0.5, seed=5)
        again.load_state_dict(first.state_dict())
        assert again.seed == first.seed and again.tables.equal(trained.tables)
    with pytest.raises(ValueError, match="seed=None"):
        kind.from_pretrained(next(other.parameters()), N, D, seed=other.seed)


@each_seeded
@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: {"hash_seed": torch.tensor(4)}, "hash_seed=4 is not that of its tables"),
        (lambda state: {"hash_seed": state["hash_seed"].half()}, "hash_seed is torch.float16, as if it was cast"),
        (lambda state: {"tables": state["tables"].float()}, "tables are torch.float32, as if it was cast"),
        (lambda state: {"tables": torch.zeros(7, 9, dtype=torch.int64)}, r"tables have shape \[7, 9\]"),
        (lambda state: {"tables": state["tables"] + (torch.arange(9) == 6)}, f"num_embeddings={N + 1} for 'table'"),
    ],
    ids=["seed", "cast seed", "cast tables", "shape", "rows"],
)
def test_a_hash_that_cannot_be_the_checkpoints_is_refused_and_changes_nothing(kind, change, words):
    ours, state = kind(N, D, 0.5), kind(N, D, 0.5, seed=3).state_dict()
    seed, before = ours.seed, copy.deepcopy(ours.state_dict())
    with pytest.raises(RuntimeError, match=words):
        ours.load_state_dict({**state, **change(state)})
    assert all(x.equal(before[key]) for key, x in ours.state_dict().items())
    ours.to_empty(device="cpu").reset_parameters()
    assert ours.seed == seed and ours.tables.equal(before["tables"])


@pytest.mark.parametrize(
    "theirs, ours, words",
    [
        (partial(HashedEmbedding, N, 6, 0.5), partial(HashedEmbedding, N, 3, 1.0), "dim=6 for 'table': here it is 3"),
        (partial(HashedEmbedding, N, D, sign=True), partial(HashedEmbedding, N, D), "index_map=signed: here it is mix"),
        (partial(QREmbeddingBag, N, D, 4), partial(QREmbeddingBag, N, D, 5), "num_slots=5 for 'table': here it is 4"),
        (partial(QREmbeddingBag, N, D, 4), partial(QREmbeddingBag, N, D, 4, "add"), "combine=multiply: here it is add"),
        (
            partial(FastMultiEmbedding, [3, 5], [4, 4]),
            partial(FastMultiEmbedding, [5, 3], [4, 4]),
            "for .*: here it is",
        ),
        (partial(FastMultiEmbedding, [8], [4]), partial(FastMultiEmbedding, [5, 3], [4, 4]), "1 rows of tables: here"),
    ],
)
def test_weights_that_would_be_read_otherwise_are_refused_although_they_fit(theirs, ours, words):
    theirs, ours = nn.Sequential(theirs()), nn.Sequential(ours())
    before = next(ours.parameters()).detach().clone()
    assert next(theirs.parameters()).shape == before.shape
    with pytest.raises(RuntimeError, match=f"0: this checkpoint is not read as here: it has .*{words}"):
        ours.load_state_dict(theirs.state_dict())
    assert next(ours.parameters()).equal(before)


@each_seeded
def test_a_seed_has_64_bits(kind):
    for seed in (-(2**63), 2**63 - 1):
        ours, other = kind(N, D, 0.5, seed=seed), kind(N, D, 0.5)
        other.load_state_dict(ours.state_dict())
        assert other.seed == seed
    for seed in (-(2**63) - 1, 2**63):
        with pytest.raises(ValueError, match="seed=.* must be an integer of 64 bits"):
            kind(N, D, 0.5, seed=seed)


@pytest.mark.parametrize("kind", [ScaledEmbedding, ZeroEmbedding, FastEmbedding, ScaledEmbeddingBag])
def test_weights_of_another_shape_are_a_value_error_where_torch_asserts(kind):
    for wrong in (torch.zeros(N, D + 1), torch.zeros(N - 1, D), torch.zeros(N * D)):
        with pytest.raises(ValueError, match=r"_weight has shape .*: it must be \[20, 6\]"):
            kind(N, D, _weight=wrong)
        with pytest.raises(AssertionError):
            nn.Embedding(N, D, _weight=wrong)
    with pytest.raises(ValueError, match=r"shape \[120\]"):
        kind.from_pretrained(torch.zeros(N * D))


def test_weights_of_any_strides_are_taken_and_those_assigned_later_must_be_contiguous():
    rows = torch.randn(D, N).t()
    ours = FastEmbedding(N, D, _weight=rows)
    assert_same_bits(ours.table_weights()["table"][0], rows.contiguous())
    ours.load_state_dict({"weight": rows}, assign=True)
    assert_same_bits(ours(IDS), rows[IDS])
    with pytest.raises(ValueError, match=rf"strides \[1, {N}\]: they must be contiguous"):
        ours.table_weights()


@pytest.mark.parametrize(
    "make, words",
    [
        (partial(HashedEmbedding, 2**63, D, 1e-18), rf"num_embeddings={2**63} must be below 2\^63"),
        (partial(BloomEmbedding, 2**64, D, 1e-18), rf"num_embeddings={2**64} must be below 2\^63"),
        (partial(HashedEmbedding, N, D, _weight=torch.zeros(10, 6)), r"\[10, 6\]: it must be \[S\]"),
        (partial(HashedEmbeddingBag, N, D, _weight=torch.zeros(10), block=3), "a multiple of block=3"),
        (partial(HashedEmbeddingBag, N, D, _weight=torch.zeros(0)), r"\[0\]: it must be"),
        (partial(BloomEmbedding, N, D, _weight=torch.zeros(10, 5)), r"\[10, 5\]: it must be \[10, 6\]"),
        (partial(QREmbeddingBag, N, D, 3, _weight=[torch.zeros(6, D), torch.zeros(3, D)]), r"be \[\[7, 6\], \[3, 6\]"),
        (partial(QREmbeddingBag, N, D, 3, _weight=[torch.zeros(7, D)]), r"must be \[\[7, 6\], \[3, 6\]\]"),
        (partial(MultiHashEmbedding, [[5, D], [4, D]], _weight=[torch.zeros(4, D), torch.zeros(5, D)]), "must be"),
        (partial(FastMultiEmbedding, [4, 20], [3, 2], torch.zeros(20, 4)), r"\[20, 4\]: it must be \[52, 1\]"),
        (partial(FastMultiEmbedding, [4, 20], [3]), "must be as many"),
        (partial(FastMultiEmbedding, [], []), "must be as many"),
        (partial(FastMultiEmbedding, [4, 0], [3, 2]), "at least 1"),
        (partial(QREmbeddingBag, N, [6], 3), "one number or two"),
        (partial(QREmbeddingBag, N, [4, 2], 3), "must be equal"),
        (partial(QREmbeddingBag, N, D, 0), "collisions=0"),
        (partial(QREmbeddingBag, N, D, 3, "times"), "operation='times'"),
        (partial(QREmbeddingBag, N, D, 3, order="legecy"), "order='legecy'"),
        (partial(MultiHashEmbedding, [[5, D]]), r"must be \[\[rows_q"),
        (partial(MultiHashEmbedding, [[5, D], [4, D]], num_embeddings=21), "tell 20 ids apart"),
        (partial(MultiHashEmbedding, [[5, D], [4, 3]]), "must be equal"),
        (partial(MultiHashEmbedding, [[5, D], [4, D]], "R-Q"), "complementary_strategy='R-Q' is not one of Q-R"),
        (partial(BloomEmbedding, N, D, 0), "compression_ratio=0 must be above 0"),
        (partial(BloomEmbedding, N, D, num_hash_functions=0), "num_hashes=0 must be 1 to 32"),
        (partial(BloomEmbedding, N, D, num_hash_functions=25, hash="murmur3"), "num_hashes=25 must be 1 to 24"),
        (partial(BloomEmbedding, N, D, combine="max"), "combine='max' is not one of sum, mean"),
        (partial(BloomEmbedding, N, D, shapes="spotlight"), "shapes='spotlight' is not one of torch, upstream"),
        (partial(HashedEmbedding, N, D, shapes="theirs"), "shapes='theirs' is not one of torch, upstream"),
        (partial(HashedEmbedding, N, D, hash="xx"), "hash='xx' is not one of mixed, affine"),
        (partial(HashedEmbedding, N, D, block=4), "block=4 must divide embedding_dim=6"),
        (partial(HashedEmbedding, N, D, hash="affine", block=2), "hash=affine needs block=1"),
        (partial(HashedEmbeddingBag, N, D, 0), "compression=0"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_no_rows_and_no_columns_are_refused_where_torch_makes_a_module():
    for kind in (
        ScaledEmbedding,
        FastEmbedding,
        ScaledEmbeddingBag,
        HashedEmbedding,
        HashedEmbeddingBag,
        BloomEmbedding,
    ):
        with pytest.raises(ValueError, match="num_embeddings=0 must be at least 1"):
            kind(0, D)
        with pytest.raises(ValueError, match="embedding_dim=0 must be at least 1"):
            kind(N, 0)
    with pytest.raises(ValueError, match="num_embeddings=0 must be at least 1"):
        QREmbeddingBag(0, D, 3)
    assert nn.Embedding(0, D).weight.shape == (0, D) and nn.EmbeddingBag(N, 0).weight.shape == (N, 0)


@each_bag
def test_an_unknown_mode_is_refused_at_construction_where_torch_waits_for_a_batch(name):
    with pytest.raises(ValueError, match="mode='median' is not one of sum, mean, max"):
        ALL[name].make(mode="median")
    with pytest.raises(ValueError):
        nn.EmbeddingBag(N, D, mode="median")(FOUR, TWO)


@each_bag
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_rows_of_no_ids_are_zero_where_torch_raises(name, mode):
    for num_rows in (0, 3):
        rows = FOUR[:0].view(num_rows, 0)
        assert build(name, mode=mode, padding_idx=2)(rows).tolist() == [[0] * D] * num_rows
        with pytest.raises(RuntimeError):
            nn.EmbeddingBag(N, D, mode=mode)(rows)


@each_bag
@pytest.mark.parametrize("padding_idx", [None, 1, 2, 4])
def test_ids_outside_of_all_bags_are_refused_where_torch_drops_them(name, padding_idx):
    ours = build(name, padding_idx=padding_idx, include_last_offset=True)
    for offsets in ([0, 2, 3], [0]):
        with pytest.raises(RuntimeError, match="offsets must begin with 0 and end with the number of ids, 4, not 0"):
            ours(FOUR, torch.tensor(offsets))
    with pytest.raises(RuntimeError, match="offsets must begin with 0 and end with the number of ids, 4"):
        build(name, padding_idx=padding_idx)(FOUR, TWO[:0])
    if padding_idx is None:
        assert nn.EmbeddingBag(N, D, include_last_offset=True)(FOUR, torch.tensor([0, 2, 3])).shape == (2, D)


@each_bag
@pytest.mark.parametrize("padding_idx", [None, 2, 3, 4])
def test_descending_offsets_are_refused_where_torch_goes_on(name, padding_idx):
    ours = build(name, padding_idx=padding_idx)
    for offsets, sample, bag in (([0, 3, 2], 1, "[3, 2)"), ([0, 1, 4, 3], 2, "[4, 3)"), ([0, -1], 0, "[0, -1)")):
        with pytest.raises(RuntimeError, match="offsets must not descend or leave the ids") as raised:
            ours(FOUR, torch.tensor(offsets))
        assert f"sample {sample}, bag {bag} of 4 ids" in str(raised.value)


@each_bag
def test_ids_and_offsets_of_small_integers_are_refused_where_torch_widens_one_of_them(name):
    for dtype in (torch.int16, torch.uint8, torch.bool):
        with pytest.raises(RuntimeError, match="ids must be int32 or int64"):
            build(name)(FOUR.to(dtype), TWO)
    with pytest.raises(RuntimeError, match="offsets are torch.int16: they must be int32 or int64"):
        build(name)(FOUR, TWO.short())


@pytest.mark.parametrize(
    "make",
    [
        partial(ScaledEmbedding, N, D),
        partial(ZeroEmbedding, N, D),
        partial(ScaledEmbeddingBag, N, D),
        partial(QREmbeddingBag, N, D, 3),
    ],
)
def test_max_norm_and_scale_grad_by_freq_are_refused_by_name(make):
    with pytest.raises(NotImplementedError, match="max_norm=1.0"):
        make(max_norm=1.0)
    with pytest.raises(NotImplementedError, match="scale_grad_by_freq=True"):
        make(scale_grad_by_freq=True)
    make(max_norm=None, norm_type=1.0, scale_grad_by_freq=False)


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ours, theirs",
    [(ScaledEmbedding, nn.Embedding), (ZeroEmbedding, nn.Embedding), (ScaledEmbeddingBag, nn.EmbeddingBag)],
)
def test_arguments_are_torchs_in_its_order_with_its_defaults(ours, theirs):
    found, wanted = (inspect.signature(kind).parameters.values() for kind in (ours, theirs))
    assert [(p.name, p.default, p.kind) for p in found] == [(p.name, p.default, p.kind) for p in wanted]


NONE = inspect.Parameter.empty
UPSTREAM = {
    HashedEmbeddingBag: dict(num_embeddings=NONE, embedding_dim=NONE, compression=1 / 64, mode="sum", _weight=None),
    HashedEmbedding: dict(num_embeddings=NONE, embedding_dim=NONE, compression=1 / 64, _weight=None),
    FastEmbedding: dict(num_embeddings=NONE, embedding_dim=NONE, _weight=None),
    FastMultiEmbedding: dict(embedding_sizes=NONE, embedding_dims=NONE, _weight=None),
    BloomEmbedding: dict(
        num_embeddings=NONE, embedding_dim=NONE, compression_ratio=0.2, num_hash_functions=4, bag=False, padding_idx=0
    ),
    QREmbeddingBag: dict(
        num_categories=NONE, embedding_dim=NONE, num_collisions=NONE, operation="mult", max_norm=None, norm_type=2.0,
        scale_grad_by_freq=False, mode="mean", sparse=False, _weight=None,
    ),
    MultiHashEmbedding: dict(dims=NONE, complementary_strategy="Q-R", operation="add"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UPSTREAM)
def test_arguments_are_upstreams_in_its_order_and_ours_by_keyword(kind):
    parameters = inspect.signature(kind).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert list(positional.items()) == list(UPSTREAM[kind].items())
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in parameters if p.name not in positional)

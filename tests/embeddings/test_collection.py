"""The collection: grouping changes nothing, every feature keeps to itself, and bytes are what they are said to be."""

import gc
import os
import sys
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
from builders import (
    CHOICES,
    DIM,
    YAMLS,
    case_of,
    dense,
    each_choice,
    each_yaml,
    from_yaml,
    hashed,
    make_bags,
    make_batch,
    make_slab,
    named,
    vectors,
)
from hypothesis import HealthCheck, given, settings
from oracle import MAX, POOLINGS, assert_same_bits, assert_same_results
from torch import nn

from embeddings import EmbeddingBags, Slab, native, reference
from embeddings.ops import Pooling

ROWS = [50, 3000, 7, 400, 20]
INTERLEAVED = [dense(), hashed(), dense(), hashed(0.5, 1), hashed()]
EVERY = [from_yaml(path, compression=0.5, accumulate="sorted") for path in YAMLS]
EXAMPLES = 10 if os.environ.get("EMBEDDINGS_NATIVE") != "off" else 4  # test_bag.py holds the reference to more
EVERY_ROWS = [300 + 100 * f for f in range(len(YAMLS))]


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
@each_choice
def test_fused_equals_one_call_per_table(yaml, changes, pooling):
    rows = [500, 300, 400]
    backend = from_yaml(yaml, compression=0.5, accumulate="sorted", **changes)
    slab = make_bags([backend] * 3, rows, pooling=pooling).slabs[0]
    case, number = case_of(slab, *make_batch(rows), None, 7)
    native.ensure()
    fused = case.forward(torch.ops.embeddings, number)
    grad = case.random_grad()
    fused_grad = case.backward(torch.ops.embeddings, grad, number)
    total, column = torch.zeros_like(fused_grad, dtype=torch.float64), 0
    for f, feature in enumerate(slab.rows):
        tables = case.tables.unflatten(0, (3, -1))[f].clone()
        columns = int(tables[:, 2].sum() if case.combine == oracle.CONCAT else tables[0, 2])
        own = slice(column, column + columns)
        tables[:, 1] -= column
        alone = case._replace(tables=tables, columns=columns, features=feature)
        assert_same_bits(alone.forward(torch.ops.embeddings, number), fused[:, own].contiguous())
        total += alone.backward(torch.ops.embeddings, grad[:, own], number)
        column += columns
    if backend.is_shared:  # features add to one slot: in float32 in another order
        torch.testing.assert_close(fused_grad.double(), total, rtol=1e-6, atol=1e-6)
    else:
        assert fused_grad.equal(total.float())


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_dense_equals_torch_embedding_bag(pooling):
    rows = [50, 7, 20]
    bags = make_bags([dense()] * 3, rows, pooling=pooling)
    ids, offsets = make_batch(rows)
    out, weight = bags(ids, offsets), bags.slabs[0].weight.detach()
    tables = torch.tensor([0, 50, 57]).repeat_interleave(
        torch.tensor([offsets[7], offsets[14] - offsets[7], offsets[21] - offsets[14]])
    )
    wanted = nn.functional.embedding_bag(ids + tables, weight, offsets, mode=pooling, include_last_offset=True)
    torch.testing.assert_close(out, wanted.unflatten(0, (3, 7)).transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backends, rows", [(INTERLEAVED, ROWS), (EVERY, EVERY_ROWS)], ids=["interleaved", "every"])
def test_sample_weights_weigh_the_vectors_of_every_slab(ids_dtype, offsets_dtype, backends, rows):
    bags = make_bags(backends, rows)
    ids, offsets = make_batch(rows)
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = bags(ids.to(ids_dtype), offsets.to(offsets_dtype), weights)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    bag_of = torch.arange(7 * len(rows)).repeat_interleave(offsets.diff())  # number of each id's bag, f * 7 + b
    alone = torch.stack([vectors(bags, int(bag) // 7, i[None])[0] for i, bag in zip(ids, bag_of, strict=True)]).detach()
    by_hand = torch.zeros(7 * len(rows), DIM).index_add(0, bag_of, alone * weights.detach()[:, None])
    torch.testing.assert_close(out.transpose(0, 1).flatten(0, 1), by_hand, rtol=1e-5, atol=1e-6)
    bag_grads = grad.transpose(0, 1).flatten(0, 1)
    torch.testing.assert_close(weights.grad, (alone * bag_grads[bag_of]).sum(1), rtol=1e-5, atol=1e-6)


def test_feature_order_is_kept_when_backends_interleave():
    bags = make_bags(INTERLEAVED, ROWS)
    ids = torch.tensor([3, 4, 5, 6, 6, 0, 399, 1, 19, 2])
    out = bags(ids)
    for f in range(5):
        alone = vectors(bags, f, ids[2 * f : 2 * f + 2])
        assert_same_bits(out[:, f], alone)
        assert not out[:, f].equal(out[:, (f + 1) % 5])
    assert [row["feature"] for row in bags.feature_table()] == ["C1", "C2", "C3", "C4", "C5"]
    assert [row["backend"] for row in bags.feature_table()] == ["dense", "hashed", "dense", "hashed", "hashed"]
    assert [row["rows"] for row in bags.feature_table()] == ROWS


def test_features_of_two_backends_share_two_slabs():
    bags = make_bags([hashed(), dense()] * 13, [1000] * 26)
    assert [len(slab.rows) for slab in bags.slabs] == [13, 13]
    assert len(list(bags.parameters())) == 2


@each_yaml
def test_tables_of_many_sizes_and_dims_are_one_launch(yaml):
    dims, rows = [4, 16, 2, 64, 16], [900, 400, 2000, 300, 500]
    how = {"block": 2} if yaml.stem == "hashed" else {}
    backends = {f"C{f}": from_yaml(yaml, embedding_dim=dim, compression=0.5, **how) for f, dim in enumerate(dims)}
    slab = make_slab(backends, rows)
    ids = torch.cat([torch.arange(100)] * 5)
    out = slab(ids, None, None, 100)
    assert out.shape == (100, sum(dims))
    assert slab.layout[0] == sum(dims) and len(list(slab.parameters())) == 1
    for part in out.split(dims, 1):
        assert len(part.unique(dim=0)) > 50
    if yaml.stem in ("dense", "fast"):
        assert slab.weight.numel() == sum(n * dim for n, dim in zip(rows, dims, strict=True))


def test_features_of_one_slab_must_have_one_backend():
    with pytest.raises(ValueError, match="one backend"):
        make_slab({"C1": dense(), "C2": hashed()}, [9, 900])


@pytest.mark.parametrize("backends, rows", [(INTERLEAVED, ROWS), (EVERY, EVERY_ROWS)], ids=["interleaved", "every"])
def test_one_seed_gives_the_same_weights_and_another_others(backends, rows):
    first, again, other = (make_bags(backends, rows, seed=seed) for seed in (3, 3, 4))
    for key, value in first.state_dict().items():
        assert value.equal(again.state_dict()[key])
        assert key == "_where" or not value.equal(other.state_dict()[key])


@pytest.mark.once
@each_choice
def test_features_of_the_same_size_do_not_share_weights_or_hashes(yaml, changes):
    bags = make_bags([from_yaml(yaml, compression=0.5, **changes)] * 2, [1000] * 2)
    a, b = (vectors(bags, f, torch.arange(1000)).detach() for f in (0, 1))
    assert not (a == b).all(1).any()
    tables = bags.slabs[0].tables.unflatten(0, (2, -1))
    if changes.get("hash") not in ("affine", "murmur3") and yaml.stem != "qr":
        assert not set(tables[0, :, 8].tolist()) & set(tables[1, :, 8].tolist())


@pytest.mark.once
@pytest.mark.parametrize("rows", [[100, 333, 777, 1501], [1000] * 4, [501, 502, 503, 50_000]])
@pytest.mark.parametrize("swapped", [0, 3])
@pytest.mark.parametrize("name", ["hashed", "bloom", "qr"])
def test_swapping_one_features_backend_leaves_the_other_vectors_unchanged(rows, swapped, name):
    before = make_bags([named(name, compression=0.3)] * 4, rows)
    backends = [named(name, compression=0.3)] * 4
    backends[swapped] = dense()
    after = make_bags(backends, rows)
    for f in {0, 1, 2, 3} - {swapped}:
        ids = torch.arange(rows[f])
        assert_same_bits(vectors(after, f, ids), vectors(before, f, ids))


@pytest.mark.once
@each_choice
def test_a_vectors_variance_is_the_same_under_every_backend(yaml, changes):
    n, features = 20_000, 30
    ratio = 0.25
    if yaml.stem == "qr":  # few rows in every table, but none of a handful, whose mean would not be 0
        ratio = {2: 0.016, 3: 0.0055, 4: 0.004}[changes.get("partitions", 2)]
        changes = {**changes, "collisions": 141} if "collisions" in changes else changes
    bags = make_bags([from_yaml(yaml, compression=ratio, **changes)] * features, [n] * features)
    ids = torch.randint(n, (features * 2000,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sample = bags(ids)
    # of U(-a, a), a = 1 / sqrt(n): variance 1 / 3n. A million numbers, of 700 k weights or more: its standard error is
    # below 0.15 %; of qr's 140 k weights in three factors, of which each is seen by many, 1.5 %
    assert sample.var().item() * 3 * n == pytest.approx(1, abs=0.04 if yaml.stem == "qr" else 0.006)
    assert abs(sample.mean().item()) * n**0.5 < (0.02 if yaml.stem == "qr" else 0.005)
    if yaml.stem in ("dense", "fast", "hashed"):
        assert sample.abs().max().item() <= n**-0.5


def reachable(root: object) -> list[object]:
    """Every object that root keeps alive by its attributes, closures and containers; not classes, modules or code."""
    seen, stack = {}, [root]
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, (type, ModuleType, CodeType, BuiltinFunctionType)):
            continue
        seen[id(found)] = found
        if isinstance(found, FunctionType):
            stack += [cell.cell_contents for cell in found.__closure__ or ()]
        elif isinstance(found, torch.Tensor):
            stack += vars(found).values()
        else:
            stack += gc.get_referents(found)
    return list(seen.values())


@pytest.mark.once
@each_choice
@pytest.mark.parametrize("accumulate", ["sorted", "auto"])
def test_memory_held_is_memory_reported(yaml, changes, accumulate):
    rows = [4000, 2500, 3000]
    bags = make_bags([from_yaml(yaml, compression=0.5, accumulate=accumulate, **changes)] * 3, rows)
    for _ in range(2):  # a cache of the first batch would count as well
        bags(*make_batch(rows, batch_size=50)).sum().backward()
    bags.zero_grad()
    held = reachable(bags)
    tensors = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor)
    }
    assert sum(tensors.values()) == bags.num_bytes()
    assert not any(isinstance(x, np.ndarray) for x in held)
    # names, hyperparameters and slices; a list of the ids would be 76 kB
    assert sum(sys.getsizeof(x) for x in held if not isinstance(x, torch.Tensor)) < 40_000


def test_the_walk_over_a_module_finds_what_it_hides():
    bags = make_bags([dense()], [100])
    hidden = [torch.zeros(7) for _ in range(4)]
    bags.cache = {"hash": [hidden[0]]}
    bags.slabs[0].lookup = lambda: hidden[1]
    bags.slabs[0].weight.extra = hidden[2]
    bags.register_forward_hook(lambda *_: hidden[3])
    found = {id(x) for x in reachable(bags)}
    assert all(id(x) in found for x in hidden)


@pytest.mark.parametrize("backends", [INTERLEAVED, [hashed()] * 5, [dense()] * 5, EVERY])
def test_bytes_are_those_of_the_tensors_and_of_the_checkpoint(backends):
    rows = EVERY_ROWS if backends is EVERY else ROWS
    assert_bytes_agree(make_bags(backends, rows), rows)


@pytest.mark.once
@each_choice
def test_bytes_of_each_backend_are_those_of_its_tensors(yaml, changes):
    rows = [500, 3000, 700]
    assert_bytes_agree(make_bags([from_yaml(yaml, compression=0.5, **changes)] * 3, rows), rows)


def assert_bytes_agree(bags: EmbeddingBags, rows: list[int]) -> None:
    held = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*bags.parameters(), *bags.buffers()]}
    saved = sum(t.numel() * t.element_size() for t in bags.state_dict().values())
    table = sum(row["bytes"] for row in bags.feature_table())
    assert {"held": sum(held.values()), "saved": saved, "table": table} == dict.fromkeys(
        ("held", "saved", "table"), bags.num_bytes()
    )
    assert bags.dense_equivalent_bytes() == sum(rows) * DIM * 4
    assert sum(row["weights"] for row in bags.feature_table()) == sum(p.numel() for p in bags.parameters())
    for row, n in zip(bags.feature_table(), rows, strict=True):
        assert row["compression"] == row["bytes"] / (n * DIM * 4)


@pytest.mark.parametrize("backends, rows", [(INTERLEAVED, ROWS), (EVERY, EVERY_ROWS)], ids=["interleaved", "every"])
def test_state_dict_round_trip_gives_the_same_vectors(backends, rows):
    first, other = make_bags(backends, rows, seed=0), make_bags(backends, rows, seed=1)
    ids, offsets = make_batch(rows)
    assert not other(ids, offsets).equal(first(ids, offsets))
    other.load_state_dict(first.state_dict())
    assert_same_bits(other(ids, offsets), first(ids, offsets))


@pytest.mark.parametrize("assign", [True, False])
def test_a_checkpoint_alone_makes_a_collection_on_meta_whole(assign):
    mean = named("bloom", combine="mean")  # so that the slabs' outputs are put in order
    backends, rows = [mean, dense(), mean], [900, 50, 800]
    first = make_bags(backends, rows, seed=0)
    with torch.device("meta"):
        empty = make_bags(backends, rows, seed=1)
    assert all(x.is_meta for x in (*empty.parameters(), *empty.buffers()))
    (empty if assign else empty.to_empty(device="cpu")).load_state_dict(first.state_dict(), assign=assign)
    ids, offsets = make_batch(rows)
    assert_same_bits(empty(ids, offsets), first(ids, offsets))


@each_choice
@pytest.mark.parametrize("pooling", POOLINGS, ids=["sum", "mean", "max"])
def test_each_backend_equals_its_reference(native_kernels, yaml, changes, pooling):
    rows = [300, 4000]
    backend = from_yaml(yaml, compression=0.5, **changes)
    slab = make_bags([backend] * 2, rows, pooling=["sum", "mean", "max"][pooling]).slabs[0]
    case, number = case_of(slab, *make_batch(rows), None, 7)
    assert number == pooling
    assert_same_results(case, native_kernels, reference, pooling)


@each_choice
@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_gradcheck_of_each_backend(yaml, changes, pooling):
    native.ensure()
    rows = [30, 40]
    how = dict(embedding_dim=4, compression=1.0, accumulate="sorted", **changes)
    how |= {"block": min(4, how.get("block", 4))} if yaml.stem == "hashed" else {}
    how |= {"dims": [3, 1]} if "dims" in how else {}
    backends = {f"C{f}": from_yaml(yaml, **how) for f in range(2)}
    try:
        bags = EmbeddingBags(backends, dict(zip(backends, rows, strict=True)), pooling=pooling, seed=0).double()
    except ValueError:  # so small that its slots are too coarse for the ratio
        rows = [200, 300]
        how["compression"] = 0.3
        backends = {f"C{f}": from_yaml(yaml, **how) for f in range(2)}
        bags = EmbeddingBags(backends, dict(zip(backends, rows, strict=True)), pooling=pooling, seed=0).double()
    ids, offsets = make_batch(rows, batch_size=3)
    names, weights = zip(*bags.named_parameters(), strict=True)

    def call(*weights):
        return torch.func.functional_call(bags, dict(zip(names, weights, strict=True)), (ids, offsets))

    assert torch.autograd.gradcheck(call, weights, fast_mode=True)


# --- what the options of a backend do ------------------------------------------------------------------------------


@pytest.mark.parametrize("name, spread", [("dense", 1), ("fast", 1), ("bloom", DIM**-1)])
def test_upstreams_normal_weights_are_by_option(name, spread):
    bags = make_bags([named(name, compression=0.5, init="upstream")], [10_000])
    weights = bags.slabs[0].weight.detach()
    assert weights.std().item() == pytest.approx(spread, rel=0.02)
    assert weights.abs().max() > 3 * spread and abs(weights.mean().item()) < 0.02 * spread


def test_learned_weights_begin_as_a_plain_sum_and_learn():
    backend = named("bloom", compression=0.5, num_hashes=3, combine="learned", accumulate="sorted")
    bags = make_bags([backend], [1000])
    slab = bags.slabs[0]
    begin, slots, width = slab.slices["C1"][1]
    weights = slab.weight.detach().view(-1)[begin : begin + slots * width]
    assert width == 3 and weights.eq(1).all()
    assert slots * width * 4 == pytest.approx(0.1 * 0.5 * 1000 * DIM * 4, rel=0.05)  # importance: 0.1 of the bytes
    bags(torch.arange(1000)).pow(2).sum().backward()
    assert slab.weight.grad.view(-1)[begin : begin + slots * width].ne(0).float().mean() > 0.9


@each_yaml
def test_auto_keeps_touched_rows_of_large_slabs_and_whole_gradients_of_small_ones(yaml):
    backend = from_yaml(yaml, compression=0.5, accumulate="auto")
    large, small = make_bags([backend], [100_000]), make_bags([backend], [300])
    for bags, n, is_sparse in ((large, 100_000, True), (small, 300, False)):
        ids = torch.randint(n, (1000,), generator=torch.Generator().manual_seed(0))
        sorted_bags = make_bags([from_yaml(yaml, compression=0.5, accumulate="sorted")], [n])
        bags(ids[:0]).sum().backward()  # a batch of nothing decides nothing
        bags.zero_grad()
        for found in (bags, sorted_bags):
            found(ids).pow(2).sum().backward()
        assert bags.slabs[0].weight.grad.is_sparse == is_sparse
        assert bags.slabs[0].weight.grad.to_dense().equal(sorted_bags.slabs[0].weight.grad)


# --- every backend, any batch -----------------------------------------------------------------------------------------


def fitting(yaml, changes, dim: int, **how):
    """The backend in this dim, or in the next that its own numbers divide."""
    for d in (dim, -(-dim // 16) * 16):
        try:
            return from_yaml(yaml, embedding_dim=d, **changes, **how)
        except ValueError as error:
            assert "must divide" in str(error) or "dims" in str(error)
    return from_yaml(yaml, embedding_dim=16, **changes, **how)


@st.composite
def slabs_and_batches(draw, yaml, changes):
    """A slab of this backend in any dims, a batch for it, and how to look it up."""
    features, samples = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    dim = st.one_of(st.integers(1, 40), st.sampled_from([64, 127, 129, 256, 1000, 1025, 4096]))
    accumulate = draw(st.sampled_from(["sorted", "rows", "auto"]))
    how = dict(accumulate=accumulate, compression=draw(st.sampled_from([0.5, 0.3])))
    dims = draw(st.lists(dim, min_size=features, max_size=features))
    dims = dims[:1] * features if changes.get("operation") == "concat" else dims  # whose parts are of one length
    backends = {f"C{f}": fitting(yaml, changes, d, **how) for f, d in enumerate(dims)}
    largest = max(backend.embedding_dim for backend in backends.values())
    low, high = (300, 600) if largest > 40 else (3000, 5000)
    rows = draw(st.lists(st.integers(low, high), min_size=features, max_size=features))
    positions = draw(st.permutations(range(4)))[:features]
    pooling = draw(st.sampled_from(list(Pooling)))
    seed = draw(st.integers(0, 9))
    slab = make_slab(backends, rows, positions=positions, pooling=pooling, seed=seed)
    size = draw(st.sampled_from([n for n in (1, 3, 70, 300) if n * largest * features * samples <= 8000] or [1]))
    one_id = draw(st.booleans())
    counts = draw(st.lists(st.integers(0, size), min_size=4 * samples, max_size=4 * samples))
    counts = np.ones((4, samples), int) if one_id else np.array(counts, dtype=int).reshape(4, samples)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    batch_rows = tuple(rows[positions.index(g)] if g in positions else 7 for g in range(4))
    ids = oracle.make_ids(
        rng, counts, (0, 1, 2, 3), batch_rows,
        ranged=slab.backend.ranged, dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )  # fmt: skip
    offsets = None if one_id else torch.tensor([0, *counts.ravel().cumsum()])
    weights = torch.tensor(rng.standard_normal(len(ids))) if pooling != MAX and draw(st.booleans()) else None
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
    weights = None if weights is None else weights.to(dtype)
    return slab.to(dtype), (ids, offsets, weights, samples), draw(st.booleans())


def strided(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else torch.stack([x, x], x.dim()).select(-1, 0)


def finished(slab: Slab, pooled: torch.Tensor) -> torch.Tensor:
    """What a slab makes of the operator's output: nothing, but for the mean of bloom's rows and facebook's order."""
    if getattr(slab.backend, "combine", "") == "mean":
        return pooled / slab.backend.num_hashes
    if getattr(slab.backend, "order", "") != "legacy":
        return pooled
    parts = []
    for pools in pooled.split([len(b.widths) * b.embedding_dim for b in slab.backends.values()], 1):
        pools = pools.unflatten(1, (slab.backend.partitions, -1))
        parts.append(pools.sum(1) if slab.backend.operation == "add" else pools.prod(1))
    return torch.cat(parts, 1)


@each_choice
def test_any_batch_of_each_backend_equals_the_oracle(yaml, changes):
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(slabs_and_batches(yaml, changes))
    def check(drawn):
        slab, (ids, offsets, weights, samples), is_strided = drawn
        case, pooling = case_of(slab, ids, offsets, weights, samples)
        batch = [strided(x) if is_strided else x for x in (ids, offsets, weights)]
        if weights is not None:
            batch[2].requires_grad_()
        out = slab(*batch, samples)
        pooled = oracle.forward(case, pooling).requires_grad_()
        wanted, grad = finished(slab, pooled), torch.ones(out.shape, dtype=out.dtype) - out.detach()
        assert_same_bits(out, wanted)
        out.backward(torch.cat([grad, grad], 1)[:, : grad.shape[1]] if is_strided else grad)
        (grad,) = torch.autograd.grad(wanted, pooled, grad)
        dense_grad, units = oracle.backward(case, grad, pooling)
        found = slab.weight.grad
        if found.is_sparse:
            assert found._indices()[0].tolist() == units
            assert_same_bits(found._values(), dense_grad[units])
        else:
            assert_same_bits(found, dense_grad)
        if weights is not None:
            assert_same_bits(batch[2].grad, oracle.backward_sample_weights(case, grad, pooling))

    check()


def test_every_yaml_is_in_the_suite():
    assert {path for path, _ in CHOICES} == set(YAMLS)
    assert {path.stem for path in YAMLS} >= {"bloom", "dense", "fast", "hashed", "qr"}


@pytest.mark.parametrize("backend", [dense(), hashed()], ids=["dense", "hashed"])
def test_state_of_features_in_another_order_is_refused_by_tensors_alone(backend):
    ours, theirs = (
        EmbeddingBags(dict.fromkeys(names, backend), dict.fromkeys(names, 300), pooling="sum", seed=0)
        for names in ("ab", "ba")
    )
    with pytest.raises(RuntimeError, match="in another order: 'b' has another place here"):
        ours.load_state_dict(dict(theirs.state_dict()))

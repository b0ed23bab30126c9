"""The collection: grouping changes nothing, every feature keeps to itself, and bytes are what they are said to be."""

import pytest
import torch
from builders import DIM, dense, each_yaml, from_yaml, hashed, make_bags, make_batch, vectors
from oracle import MAX, MEAN, SUM, assert_same_bits
from torch import nn

from embeddings import native, reference

ROWS = [50, 3000, 7, 400, 20]
INTERLEAVED = [dense(), hashed(), dense(), hashed(0.5, 1), hashed()]


@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_fused_equals_one_call_per_table(pooling):
    fused = make_bags(INTERLEAVED, ROWS, pooling=pooling)
    ids, offsets = make_batch(ROWS)
    out = fused(ids, offsets)
    out.pow(2).sum().backward()
    for slab in fused.slabs:
        for position, first, slots, rows, seed in slab.tables.tolist():
            own = slice(first, first + slots)
            weights = slab.weight.detach()[own].clone().requires_grad_()
            bags = offsets[position * 7 : (position + 1) * 7 + 1]
            batch = (ids[bags[0] : bags[-1]], bags - bags[0], None, torch.tensor([[0, 0, slots, rows, seed]]))
            how = (7, DIM, int(slab.backend.index_map), ["sum", "mean", "max"].index(pooling), 0, "alone")
            alone = torch.ops.embeddings.bag(weights, *batch, *how)
            alone.pow(2).sum().backward()
            assert_same_bits(alone[:, 0], out[:, position])
            assert_same_bits(weights.grad, slab.weight.grad[own])


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
def test_sample_weights_weigh_the_vectors_of_every_slab(ids_dtype, offsets_dtype):
    bags = make_bags(INTERLEAVED, ROWS)
    ids, offsets = make_batch(ROWS)
    weights = torch.randn(len(ids), generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = bags(ids.to(ids_dtype), offsets.to(offsets_dtype), weights)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    out.backward(grad)
    bag_of = torch.arange(35).repeat_interleave(offsets.diff())  # number of each id's bag, f * 7 + b
    alone = torch.stack([vectors(bags, int(bag) // 7, i[None])[0] for i, bag in zip(ids, bag_of, strict=True)]).detach()
    by_hand = torch.zeros(35, DIM).index_add(0, bag_of, alone * weights.detach()[:, None])
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


def test_one_seed_gives_the_same_weights_and_another_others():
    first, again, other = (make_bags(INTERLEAVED, ROWS, seed=seed) for seed in (3, 3, 4))
    for key, value in first.state_dict().items():
        assert value.equal(again.state_dict()[key])
        assert key == "_where" or not value.equal(other.state_dict()[key])


def test_features_of_the_same_size_do_not_share_weights_or_hashes():
    bags = make_bags([hashed()] * 2, [1000] * 2)
    half = len(bags.slabs[0].weight) // 2
    assert not bags.slabs[0].weight[:half].equal(bags.slabs[0].weight[half:])
    assert bags.slabs[0].tables[0, 4] != bags.slabs[0].tables[1, 4]


@pytest.mark.parametrize("rows", [[100, 333, 777, 1501], [1000] * 4, [501, 502, 503, 50_000]])
@pytest.mark.parametrize("swapped", [0, 3])
def test_swapping_one_features_backend_leaves_the_other_vectors_unchanged(rows, swapped):
    before = make_bags([hashed(0.3)] * 4, rows)
    backends = [hashed(0.3)] * 4
    backends[swapped] = dense()
    after = make_bags(backends, rows)
    for f in {0, 1, 2, 3} - {swapped}:
        ids = torch.arange(rows[f])
        assert_same_bits(vectors(after, f, ids), vectors(before, f, ids))


@each_yaml
def test_a_vectors_variance_is_the_same_under_every_backend(yaml):
    n = 200_000
    bags = make_bags([from_yaml(yaml, compression=0.25)], [n])
    with torch.no_grad():
        sample = vectors(bags, 0, torch.arange(0, n, 2))
    # U(-a, a), a = 1 / sqrt(n): variance 1 / 3n. 400 k independent weights or more: its standard error is below 0.15 %
    assert sample.var().item() * 3 * n == pytest.approx(1, abs=0.006)
    assert abs(sample.mean().item()) * n**0.5 < 0.005
    assert sample.abs().max().item() <= n**-0.5


@pytest.mark.parametrize(
    "backends", [INTERLEAVED, [hashed()] * 5, [dense()] * 5], ids=["interleaved", "hashed", "dense"]
)
def test_bytes_are_those_of_the_tensors_and_of_the_checkpoint(backends):
    bags = make_bags(backends, ROWS)
    held = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*bags.parameters(), *bags.buffers()]}
    saved = sum(t.numel() * t.element_size() for t in bags.state_dict().values())
    table = sum(row["bytes"] for row in bags.feature_table())
    assert {"held": sum(held.values()), "saved": saved, "table": table} == dict.fromkeys(
        ("held", "saved", "table"), bags.num_bytes()
    )
    assert bags.dense_equivalent_bytes() == sum(ROWS) * DIM * 4
    assert sum(row["weights"] for row in bags.feature_table()) == sum(p.numel() for p in bags.parameters())
    for row, n in zip(bags.feature_table(), ROWS, strict=True):
        assert row["compression"] == row["bytes"] / (n * DIM * 4)


def test_state_dict_round_trip_gives_the_same_vectors():
    first, other = make_bags(INTERLEAVED, ROWS, seed=0), make_bags(INTERLEAVED, ROWS, seed=1)
    ids, offsets = make_batch(ROWS)
    other.load_state_dict(first.state_dict())
    assert_same_bits(other(ids, offsets), first(ids, offsets))


@each_yaml
@pytest.mark.parametrize("pooling", [SUM, MEAN, MAX])
def test_each_backend_equals_its_reference(native_kernels, yaml, pooling):
    rows = [300, 4000]
    slab = make_bags([from_yaml(yaml, compression=0.5)] * 2, rows).slabs[0]
    ids, offsets = make_batch(rows)
    backend, features = slab.backend, "\x1f".join(slab.rows)
    batch = (slab.weight.detach(), ids, offsets, None, slab.tables)
    how = (7, DIM, int(backend.index_map), pooling, 0, features)
    assert_same_bits(native_kernels.bag(*batch, *how), reference.bag(*batch, *how))
    grad = torch.randn(7, 2, DIM, generator=torch.Generator().manual_seed(0))
    backward = (grad, *batch, int(backend.index_map), pooling)
    assert_same_bits(
        native_kernels.bag_backward(*backward, False, features), reference.bag_backward(*backward, False, features)
    )


@each_yaml
@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_gradcheck_of_each_backend(yaml, pooling):
    native.ensure()
    rows = [6, 40]
    bags = make_bags([from_yaml(yaml, compression=1.0, accumulate="sorted")] * 2, rows, pooling=pooling).double()
    ids, offsets = make_batch(rows, batch_size=3)
    names, weights = zip(*bags.named_parameters(), strict=True)

    def call(*weights):
        return torch.func.functional_call(bags, dict(zip(names, weights, strict=True)), (ids, offsets))

    assert torch.autograd.gradcheck(call, weights)

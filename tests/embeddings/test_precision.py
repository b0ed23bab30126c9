"""Tables of 16-bit weights: what is kept is half as large, what is computed is float32."""

import copy

import pytest
import torch
from builders import YAMLS, dense, from_yaml, make_bags, make_batch, named
from oracle import assert_same_bits

from embeddings import optim
from embeddings.optim import SGD, Adagrad, Adam, RowWiseAdagrad

ROWS = [40, 3000, 700]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
each_precision = pytest.mark.parametrize("precision", DTYPES)
each_yaml = pytest.mark.parametrize("yaml", YAMLS, ids=lambda path: path.stem)


def bags_of(yaml, precision, compression=0.5):
    return make_bags([from_yaml(yaml, compression=compression, precision=precision)] * 3, ROWS)


@each_yaml
@each_precision
def test_bytes_are_those_of_16_bits_and_the_ratio_is_kept(yaml, precision):
    bags, full = bags_of(yaml, precision), bags_of(yaml, "fp32")
    assert {slab.weight.dtype for slab in bags.slabs} == {DTYPES[precision]}
    held = sum(t.untyped_storage().nbytes() for t in [*bags.parameters(), *bags.buffers()])
    assert bags.num_bytes() == held == sum(row["bytes"] for row in bags.feature_table())
    assert bags.dense_equivalent_bytes() == full.dense_equivalent_bytes() == 4 * 16 * sum(ROWS)
    ratio = bags.num_bytes() / bags.dense_equivalent_bytes()
    if yaml.stem in ("dense", "fast"):  # as many numbers, in half the room
        assert sum(w.numel() for w in bags.parameters()) == sum(w.numel() for w in full.parameters())
    assert ratio == pytest.approx(0.5, rel=0.03)  # of these: twice as many numbers as in 32 bits


@each_yaml
@each_precision
@pytest.mark.parametrize("pooling", ["sum", "mean", "max"])
def test_vectors_and_gradients_are_those_of_the_same_weights_in_float32(yaml, precision, pooling):
    backend = from_yaml(yaml, compression=0.5, precision=precision)
    bags = make_bags([backend] * 3, ROWS, pooling=pooling)
    twin = copy.deepcopy(bags).float()
    ids, offsets = make_batch(ROWS, batch_size=70)
    weights = None if pooling == "max" else torch.rand(len(ids))
    both = [module(ids, offsets, weights) for module in (bags, twin)]
    assert both[0].dtype == torch.float32 and both[0].equal(both[1])
    upstream = torch.randn(both[0].shape)
    for out in both:
        out.backward(upstream)
    for slab, other in zip(bags.slabs, twin.slabs, strict=True):
        mine, theirs = slab.weight.grad.to_dense(), other.weight.grad.to_dense()
        assert mine.equal(theirs.to(mine.dtype))


def test_features_of_several_precisions_meet_in_one_output():
    precisions = ["bf16", "fp32", "fp16"]
    backends = [named("hashed", compression=0.5, precision=precision) for precision in precisions]
    bags = make_bags(backends, ROWS)
    assert [slab.weight.dtype for slab in bags.slabs] == [torch.bfloat16, torch.float32, torch.float16]
    ids, offsets = make_batch(ROWS, batch_size=70)
    out = bags(ids, offsets)
    for i, backend in enumerate(backends):
        alone = make_bags([backend] * 3, ROWS)(ids, offsets)
        assert out[:, i].equal(alone[:, i])


@each_precision
@pytest.mark.parametrize("make", [SGD, Adagrad, RowWiseAdagrad], ids=lambda kind: kind.__name__)
def test_steps_far_below_a_weights_last_bit_add_up(precision, make):
    """1000 steps of a thousandth of the last bit: rounded to the nearest, none would move a weight."""
    bags = make_bags([named("dense", precision=precision)], [4000])
    slab, last_bit = bags.slabs[0], {"bf16": 2.0**-7, "fp16": 2.0**-10}[precision]
    with torch.no_grad():
        slab.weight.fill_(1)
    state = {} if make is SGD else {"eps": 1.0}  # nearly constant: 1 + sqrt(1000 g^2) for the small g below
    optimizer = make(bags.parameters(), lr=1.0, **state)
    bags.fuse(optimizer)
    ids, gradient = torch.arange(4000), -last_bit / 1000
    for _ in range(1000):
        out = bags(ids)
        out.backward(torch.full_like(out, gradient))
    moved = (slab.weight.detach().double() - 1).mean()
    assert moved.item() == pytest.approx(last_bit, rel=0.05)


@each_precision
def test_states_stay_float32_when_loaded(precision):
    def run(steps, bags, optimizer):
        for step in steps:
            bags(*make_batch(ROWS, batch_size=70, seed=step)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        bags = make_bags([dense("rows"), *[named("hashed", precision=precision, compression=0.5)] * 2], ROWS)
        return bags, Adam(bags.parameters(), lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8)

    bags, optimizer = fresh()
    run(range(3), bags, optimizer)
    again, resumed = fresh()
    again.load_state_dict(bags.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    for parameter in again.parameters():
        assert {resumed.state[parameter][name].dtype for name in ("mean", "square")} == {torch.float32}
    run(range(3, 5), bags, optimizer)
    run(range(3, 5), again, resumed)
    for mine, theirs in zip(again.parameters(), bags.parameters(), strict=True):
        assert_same_bits(mine, theirs)


@each_precision
def test_a_dense_gradient_is_stepped_in_parts_with_the_draws_of_the_whole(precision, monkeypatch):
    weights = []
    for piece in (1 << 16, 7):
        monkeypatch.setattr(optim, "PIECE", piece)
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 400).view(100, 4).to(DTYPES[precision]))
        parameter.grad = torch.linspace(-2, 2, 400).view(100, 4).to(DTYPES[precision])
        RowWiseAdagrad([parameter], lr=0.01, eps=1e-8).step()
        weights.append(parameter.detach())
    assert_same_bits(*weights)


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match="precision='fp8' is not one of fp32, bf16, fp16"):
        named("dense", precision="fp8")

"""Fused updates: the optimizer's step inside backward equals the step on sparse gradients, bit for bit."""

import copy

import pytest
import torch
from builders import CHOICE_IDS, CHOICES, DIM, dense, each_choice, from_yaml, hashed, make_bags, make_batch

from embeddings import EmbeddingBags, reference, rules
from embeddings.optim import SGD, Adagrad, Adam, RowWiseAdagrad

# the reference's fused step is its unfused one: what there is to compare are the compiled kernels
pytestmark = pytest.mark.once
MAKERS = {
    "SGD": lambda params, **how: SGD(params, lr=0.1, **how),
    "Adagrad": lambda params, **how: Adagrad(params, lr=0.1, eps=1e-8, **how),
    "RowWiseAdagrad": lambda params, **how: RowWiseAdagrad(params, lr=0.1, eps=1e-8, **how),
    "Adam": lambda params, **how: Adam(params, lr=0.01, beta1=0.9, beta2=0.99, eps=1e-8, **how),
}
each_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
ROWS = [40, 3000, 700]
NUMBERS = torch.tensor([0.1, 0.0, 1e-8, 0.9, 0.99, 1.0, 0.0], dtype=torch.float64)


def train(bags: EmbeddingBags, make, *, fused: bool, steps=4, weighted=False, one_id=False, **how):
    """The weights and states after some steps, with a rate that changes."""
    optimizer = make(bags.parameters(), **how)
    if fused:
        bags.fuse(optimizer)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] *= 0.9
        ids, offsets = make_batch(ROWS, batch_size=70, seed=step)
        if one_id:
            ids, offsets = torch.cat([torch.randint(n, (70,), generator=generator) for n in ROWS]), None
        weights = torch.rand(len(ids), generator=generator).to(bags.slabs[0].weight.dtype) if weighted else None
        out = bags(ids, offsets, weights)
        out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
        assert all(parameter.grad is None for parameter in bags.parameters()) == fused
        optimizer.step()
        optimizer.zero_grad()
    return [[p.detach(), *(s for s in optimizer.state[p].values() if torch.is_tensor(s))] for p in bags.parameters()]


def assert_same_bits(fused, unfused):
    for a, b in zip(fused, unfused, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.dtype == y.dtype and x.equal(y)


def assert_fused_equals_unfused(bags: EmbeddingBags, make, **how):
    before = [p.detach().clone() for p in bags.parameters()]
    twin = copy.deepcopy(bags)
    fused = train(bags, make, fused=True, **how)
    assert_same_bits(fused, train(twin, make, fused=False, **how))
    assert not any(weight.equal(old) for (weight, *_), old in zip(fused, before, strict=True))


def in_rows(yaml, changes, **more):
    return from_yaml(
        yaml, **changes, **more, compression=0.5, **({} if yaml.stem == "fast" else {"accumulate": "rows"})
    )


@each_optimizer
@pytest.mark.parametrize("one_id", [False, True], ids=["bags", "one-id"])
@each_choice
def test_fused_equals_unfused(yaml, changes, one_id, make):
    if yaml.stem == "fast" and make is MAKERS["Adam"]:
        pytest.skip("gradients of fast are dense, and Adam is lazy on rows alone")
    backend = in_rows(yaml, changes)
    assert_fused_equals_unfused(make_bags([dense("rows"), backend, backend], ROWS), make, one_id=one_id)


@each_optimizer
@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("name", ["hashed", "bloom-num_hashes=4-combine=learned", "qr"])
def test_fused_equals_unfused_under_every_pooling(name, pooling, make):
    backend = in_rows(*CHOICES[CHOICE_IDS.index(name)])
    assert_fused_equals_unfused(make_bags([dense("rows"), backend, backend], ROWS, pooling=pooling), make)


@each_optimizer
def test_fused_equals_unfused_with_sample_weights_and_weight_decay(make):
    bags = make_bags([dense("rows"), hashed(accumulate="rows"), dense("rows")], ROWS)
    assert_fused_equals_unfused(bags, make, weighted=True, weight_decay=0.1)


@each_optimizer
def test_fused_equals_unfused_in_float64_but_for_torchs_square_roots(make):
    bags = make_bags([dense("rows"), hashed(accumulate="rows"), dense("rows")], ROWS).double()
    fused = train(twin := copy.deepcopy(bags), make, fused=True)
    torch.testing.assert_close(fused, train(bags, make, fused=False), rtol=1e-13, atol=1e-13)
    assert not twin.slabs[0].weight.equal(make_bags([dense("rows")], ROWS[:1]).slabs[0].weight)


@each_optimizer
@pytest.mark.parametrize("block", [1, 4, 16, 48])
def test_fused_equals_unfused_for_every_width_of_a_block(block, make):
    backend = from_yaml(CHOICES[CHOICE_IDS.index("hashed")][0], embedding_dim=48, block=block, accumulate="rows")
    assert_fused_equals_unfused(make_bags([backend] * 3, ROWS), make)


@each_optimizer
def test_threads_do_not_change_a_bit(make):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(train(make_bags([hashed(0.05)] * 3, [20_000] * 3), make, fused=True, steps=2))
        finally:
            torch.set_num_threads(1)
    assert_same_bits(*results)


def test_a_hot_row_sums_more_than_one_run():
    bags = make_bags([dense("rows")], [3])
    optimizer = SGD(bags.parameters(), lr=1.0)
    bags.fuse(optimizer)
    before = bags.slabs[0].weight.detach().clone()
    out = bags(torch.ones(1000, dtype=torch.int64))
    out.backward(torch.full(out.shape, 0.5))
    assert (before - bags.slabs[0].weight).equal(before - (before - torch.tensor([[0.0], [500.0], [0.0]])))


def test_a_bad_id_moves_nothing():
    bags = make_bags([dense("rows"), dense("rows")], [40, 30])
    before = bags.slabs[0].weight.detach().clone()
    bags.fuse(SGD(bags.parameters(), lr=1.0))
    out = bags(torch.cat([torch.arange(20), torch.arange(20)]))
    with pytest.raises(RuntimeError, match="feature C2, position 39 of the batch's ids, id 30, limit 30"):
        bags(torch.cat([torch.arange(20), torch.arange(11, 31)])).sum().backward()
    assert bags.slabs[0].weight.equal(before)
    out.sum().backward()
    assert not bags.slabs[0].weight.equal(before)


def test_a_second_backward_of_an_older_forward_is_refused():
    bags = make_bags([dense("rows")], [40])
    bags.fuse(SGD(bags.parameters(), lr=1.0))
    first, second = bags(torch.arange(40)), bags(torch.arange(40))
    first.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


def test_a_weight_that_was_replaced_is_not_stepped():
    bags = make_bags([dense("rows")], [40])
    bags.fuse(MAKERS["SGD"](bags.parameters()))
    bags.load_state_dict({name: x.clone() for name, x in bags.state_dict().items()}, assign=True)
    with pytest.raises(RuntimeError, match="does not hold this slab's weight, which was replaced"):
        bags(torch.arange(4)).sum().backward()


def test_one_of_several_processes_is_not_fused(monkeypatch):
    bags = make_bags([dense()], [6])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="fused steps of 2 processes share no gradients"):
        bags.fuse(MAKERS["SGD"](bags.parameters()))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    bags.fuse(MAKERS["SGD"](bags.parameters()))


def test_other_optimizers_and_other_parameters_are_refused():
    bags, others = make_bags([dense()], [40]), make_bags([dense()], [40])
    with pytest.raises(ValueError, match="Adagrad cannot be fused: only optimizers of embeddings.optim"):
        bags.fuse(torch.optim.Adagrad(bags.parameters()))
    with pytest.raises(ValueError, match="does not hold the parameters"):
        bags.fuse(SGD(others.parameters(), lr=1.0))


# --- rounding at random ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1.0009, -0.3003, 3.1e-5, -2e-7])
def test_rounding_at_random_keeps_the_mean(dtype, value):
    values = torch.full((1000, 64), value)
    rounded = rules._rounded(values, dtype, None, 12345)
    neighbours = rounded.unique()
    assert len(neighbours) == 2 and neighbours.min() <= value <= neighbours.max()
    gap = float(neighbours.max().double() - neighbours.min().double())
    # the mean of 64,000 draws is within 5 standard deviations, each of half the gap at most
    assert abs(rounded.double().mean().item() - torch.tensor(value).double().item()) < 5 * gap / 2 / 64_000**0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_has_16_bits_already_is_not_rounded(dtype):
    values = torch.randn(100, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[0] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf] * 4)
    assert rules._rounded(values.float(), dtype, None, 7).view(torch.int16).equal(values.view(torch.int16))
    assert rules._rounded(torch.full((1, 1), torch.nan), dtype, None, 7).isnan().all()


def test_small_steps_are_not_lost_in_bf16():
    bags = make_bags([dense("rows")], [40]).to(torch.bfloat16)
    with torch.no_grad():
        bags.slabs[0].weight.fill_(1)
    optimizer = SGD(bags.parameters(), lr=1e-4)  # the spacing of bf16 below 1 is 2^-8
    bags.fuse(optimizer)
    for _ in range(1000):
        bags(torch.arange(40)).sum().backward()
    moved = 1 - bags.slabs[0].weight.float().mean().item()
    assert abs(moved - 0.1) < 5 * (1000 * 1e-4 * 2**-8 / 640) ** 0.5  # 5 standard deviations of the mean of 640


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 7, 16, 48, 100])
def test_a_fold_is_a_sum(width):
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(rules.fold(values), values.sum(1), rtol=1e-14, atol=1e-14)


def test_states_that_do_not_fit_are_refused():
    bags = make_bags([dense("rows")], [40])
    slab = bags.slabs[0]
    batch = (torch.arange(40), None, None, slab.tables)
    _, *how = slab.layout

    def update(first, second, rule, numbers=NUMBERS):
        grad, weights = torch.ones(40, DIM), slab.weight.detach()
        torch.ops.embeddings.bag_update(grad, weights, first, second, *batch, *how, rule, numbers, "C1")

    wrong = [
        (torch.zeros(40), None, rules.Rule.SGD),
        (None, None, rules.Rule.ROW_WISE_ADAGRAD),
        (torch.zeros(39), None, rules.Rule.ROW_WISE_ADAGRAD),
        (torch.zeros(40), torch.zeros(40), rules.Rule.ROW_WISE_ADAGRAD),
        (torch.zeros(40).double(), None, rules.Rule.ROW_WISE_ADAGRAD),
        (torch.zeros(40), None, rules.Rule.ADAGRAD),
        (torch.zeros(40, DIM), None, rules.Rule.ADAM),
    ]
    for first, second, rule in wrong:
        with pytest.raises(RuntimeError, match="the rule's state must be contiguous float32"):
            update(first, second, rule)
    with pytest.raises(RuntimeError, match="rule must be 0"):
        update(None, None, 4)
    for draw in (torch.nan, torch.inf, -1.0):
        odd = torch.cat([NUMBERS[:-1], torch.tensor([draw], dtype=torch.float64)])
        with pytest.raises(RuntimeError, match="the step's draw must be a whole number below"):
            update(None, None, rules.Rule.SGD, odd)
    for numbers in (NUMBERS[1:], NUMBERS.float(), NUMBERS.repeat_interleave(2)[::2]):
        with pytest.raises(RuntimeError, match="the step's numbers must be 7 contiguous float64"):
            update(None, None, rules.Rule.SGD, numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", rules.Rule, ids=lambda rule: rule.name)
@pytest.mark.parametrize("name", ["hashed", "hashed-sign=True", "bloom-num_hashes=4-combine=learned", "qr"])
def test_the_native_update_equals_the_reference(native_kernels, device, name, rule, dtype):
    backend = in_rows(*CHOICES[CHOICE_IDS.index(name)])
    slab = make_bags([backend] * 3, ROWS).to(dtype).slabs[0]
    ids, offsets = make_batch(ROWS, batch_size=70)
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(70, slab.layout[0], generator=generator)
    results = []
    for kernels, place in ((native_kernels, device), (reference, "cpu")):
        weights = slab.weight.detach().to(place, copy=True)
        states = [torch.full(shape, 0.5, device=place) for shape in rules.state_shapes(rule, weights)]
        numbers = torch.tensor([0.1, 0.01, 1e-8, 0.9, 0.99, 0.5, 3], dtype=torch.float64, device=place)
        batch = (ids.to(place), offsets.to(place), None, slab.tables.to(place), *slab.layout[1:])
        slab_and_states = (weights, *[*states, None, None][:2])
        kernels.bag_update(grad.to(place), *slab_and_states, *batch, rule, numbers, slab.arrangement.features)
        assert not weights.cpu().equal(slab.weight)
        results.append([weights.cpu(), *(state.cpu() for state in states)])
    for a, b in zip(*results, strict=True):
        assert a.view(torch.uint8).equal(b.view(torch.uint8))

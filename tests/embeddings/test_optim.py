"""The optimizers of slabs against torch.optim's and closed forms, on dense and on touched-rows gradients."""

import copy
import math

import numpy as np
import pytest
import torch
from builders import dense, hashed, make_bags
from torch import nn

from embeddings.optim import SGD, Adagrad, Adam, RowWiseAdagrad

MAKERS = {
    "SGD": lambda params: SGD(params, lr=0.1),
    "Adagrad": lambda params: Adagrad(params, lr=0.1, eps=1e-8),
    "RowWiseAdagrad": lambda params: RowWiseAdagrad(params, lr=0.1, eps=1e-8),
    "Adam": lambda params: Adam(params, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8),
}
each_optimizer = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
not_lazy = pytest.mark.parametrize("name", ["SGD", "Adagrad", "RowWiseAdagrad"])


def make_param() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))


def gradients(steps=5):
    """(slots, values) of each step: a different few of the six slots; slot 5 never."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        slots = torch.randperm(5, generator=generator)[:3].sort().values
        yield slots, torch.randn(3, 4, generator=generator)


def run(optimizer, param, *, sparse: bool) -> torch.Tensor:
    for slots, values in gradients():
        grad = torch.sparse_coo_tensor(slots[None], values, param.shape, is_coalesced=True)
        param.grad = grad if sparse else grad.to_dense()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize(
    "ours, theirs",
    [
        (MAKERS["SGD"], lambda p: torch.optim.SGD(p, lr=0.1)),
        (MAKERS["Adagrad"], lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-8)),
    ],
    ids=["SGD", "Adagrad"],
)
def test_each_step_equals_torch_optim(ours, theirs, sparse):
    a, b = make_param(), make_param()
    torch.testing.assert_close(
        run(ours([a]), a, sparse=sparse), run(theirs([b]), b, sparse=sparse), rtol=1e-6, atol=1e-6
    )
    assert a[5].equal(make_param()[5]) and not a[:5].equal(make_param()[:5])


def test_adam_on_dense_gradients_equals_torch_adam():
    a, b = make_param(), make_param()
    theirs = torch.optim.Adam([b], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    torch.testing.assert_close(
        run(MAKERS["Adam"]([a]), a, sparse=False), run(theirs, b, sparse=False), rtol=1e-6, atol=1e-6
    )


def test_adam_on_rows_equals_torch_sparse_adam():
    a, b = make_param(), make_param()
    theirs = torch.optim.SparseAdam([b], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
    # SparseAdam adds eps before the bias correction, we after: 1e-8 beside gradients of size 1
    torch.testing.assert_close(
        run(MAKERS["Adam"]([a]), a, sparse=True), run(theirs, b, sparse=True), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
def test_row_wise_adagrad_equals_numpy(sparse):
    param = make_param()
    weights, total = param.detach().double().numpy().copy(), np.zeros(6)
    for slots, values in gradients():
        for slot, g in zip(slots.tolist(), values.double().numpy(), strict=True):
            total[slot] += (g * g).sum() / 4
            weights[slot] -= 0.1 * g / (np.sqrt(total[slot]) + 1e-8)
    found = run(MAKERS["RowWiseAdagrad"]([param]), param, sparse=sparse)
    np.testing.assert_allclose(found.numpy(), weights, rtol=1e-6, atol=1e-6)


@each_optimizer
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6,), (6, 2, 2)], ids=str)
def test_a_parameter_of_any_dimensions_is_stepped_as_its_rows(make, sparse, dtype, shape):
    results = []
    for view in (shape, (6, math.prod(shape[1:]))):
        param = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).view(view))
        optimizer = make([param])
        for slots, values in gradients():
            values = values[:, : math.prod(shape[1:])].to(dtype).reshape(-1, *view[1:])
            grad = torch.sparse_coo_tensor(slots[None], values, view, is_coalesced=True)
            param.grad = grad if sparse else grad.to_dense()
            optimizer.step()
        assert all(param.shape[: s.dim()] == s.shape for s in optimizer.state[param].values() if torch.is_tensor(s))
        results.append(param.detach().view(shape))
    assert results[0].equal(results[1])


def test_row_wise_adagrad_of_width_one_is_adagrad():
    results = []
    for name in ("RowWiseAdagrad", "Adagrad"):
        param = nn.Parameter(torch.tensor([[1.0], [2.0]]))
        optimizer = MAKERS[name]([param])
        for g in (3.0, -1.0, 0.5):
            param.grad = torch.tensor([[g], [2 * g]])
            optimizer.step()
        results.append(param.detach())
    assert results[0].equal(results[1])


@not_lazy
def test_rows_and_dense_gradients_train_alike(name):
    a, b = make_param(), make_param()
    rows, full = run(MAKERS[name]([a]), a, sparse=True), run(MAKERS[name]([b]), b, sparse=False)
    torch.testing.assert_close(rows, full, rtol=1e-6, atol=1e-7)


@each_optimizer
def test_repeated_slots_of_an_uncoalesced_gradient_are_summed_first(make):
    a, b = make_param(), make_param()
    slots, values = torch.tensor([[1, 3, 1, 1]]), torch.randn(4, 4, generator=torch.Generator().manual_seed(2))
    a.grad = torch.sparse_coo_tensor(slots, values, a.shape)
    summed = torch.stack([values[0] + values[2] + values[3], values[1]])
    b.grad = torch.sparse_coo_tensor(torch.tensor([[1, 3]]), summed, b.shape)
    make([a]).step()
    make([b]).step()
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@each_optimizer
@pytest.mark.parametrize("again", [[0, 1, 2], [3, 4, 5], [2, 1, 0]], ids=["same ids", "other ids", "reversed"])
def test_a_slab_used_twice_in_one_step_equals_its_dense_gradient(make, again):
    results = []
    for accumulate in ("rows", "sorted"):
        bags = make_bags([hashed(0.5, 4, accumulate), dense(accumulate)], [300, 6])
        optimizer = make(bags.parameters())
        for ids in ([0, 1, 2, 0, 1, 2], again * 2):
            bags(torch.tensor(ids)).pow(2).sum().backward()
        assert all(p.grad.is_sparse == (accumulate == "rows") for p in bags.parameters())
        optimizer.step()
        results.append([p.detach() for p in bags.parameters()])
    for rows, full in zip(*results, strict=True):
        torch.testing.assert_close(rows, full, rtol=1e-5, atol=1e-6)


@each_optimizer
def test_an_empty_gradient_changes_nothing(make):
    param = make_param()
    param.grad = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 4), param.shape)
    optimizer = make([param])
    optimizer.step()
    assert param.equal(make_param())
    param.grad = None
    optimizer.step()
    assert param.equal(make_param())


@each_optimizer
def test_no_tensor_of_the_slabs_size_is_made_in_a_step(make):
    n = 100_000
    bags = make_bags([dense("rows")], [n])
    optimizer = make(bags.parameters())
    ids = torch.tensor([5, 7, n - 1])
    bags(ids).sum().backward()
    assert bags.slabs[0].weight.grad.is_sparse and bags.slabs[0].weight.grad._nnz() == 3
    optimizer.step()  # makes the state, once
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.zero_grad()
        bags(ids).sum().backward()
        optimizer.step()
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert 0 < largest < n * 4  # a row each would be 16 times as much, a number each this


@pytest.mark.parametrize("name, numbers", [("SGD", 0), ("Adagrad", 24), ("RowWiseAdagrad", 6), ("Adam", 48)])
def test_state_is_as_large_as_it_is_said_to_be(name, numbers):
    param = make_param()
    optimizer = MAKERS[name]([param])
    run(optimizer, param, sparse=True)
    assert sum(t.numel() for key, t in optimizer.state[param].items() if key != "step") == numbers


@each_optimizer
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "rows"])
def test_a_restored_optimizer_goes_on_bit_for_bit(make, sparse):
    param = make_param()
    optimizer = make([param])
    run(optimizer, param, sparse=sparse)
    other = nn.Parameter(param.detach().clone())
    restored = make([other])
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run(restored, other, sparse=sparse).equal(run(optimizer, param, sparse=sparse))


@each_optimizer
def test_the_learning_rate_of_a_group_is_obeyed(make):
    param = make_param()
    optimizer = make([param])
    optimizer.param_groups[0]["lr"] = 0.0
    assert run(optimizer, param, sparse=True).equal(make_param())


@pytest.mark.parametrize(
    "bad", [{"lr": -0.1}, {"lr": float("nan")}, {"eps": -1e-8}, {"eps": 0.0}, {"beta1": 1.0}, {"beta2": -0.1}]
)
def test_values_out_of_range_are_refused_by_name(bad):
    values = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, **bad}
    with pytest.raises(ValueError, match=next(iter(bad))):
        Adam([make_param()], **values)
    optimizer = MAKERS["Adam"]([make_param()])
    with pytest.raises(ValueError, match=next(iter(bad))):
        optimizer.add_param_group({"params": [make_param()], **bad})
    assert len(optimizer.param_groups) == 1


def test_a_group_may_have_names_of_its_own_as_schedulers_and_wrappers_give_it():
    optimizer = SGD([{"params": [make_param()], "lr": 0.2, "initial_lr": 0.2, "name": "emb"}], lr=0.1)
    assert optimizer.param_groups[0] == optimizer.param_groups[0] | {"lr": 0.2, "weight_decay": 0.0, "name": "emb"}


@each_optimizer
def test_a_closure_is_refused(make):
    with pytest.raises(ValueError, match="closure"):
        make([make_param()]).step(lambda: 0.0)

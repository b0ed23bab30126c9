"""accumulate=auto: measures its first batch, picks by what it touches, and stays with it."""

import pytest
import torch
from builders import DIM, make_bags

from embeddings import Dense, Hashed
from embeddings.ops import Accumulate


def one_feature(rows: int, backend=Dense, **how):
    backend = backend(embedding_dim=DIM, accumulate="auto", init="fair", **{"compression": 1.0, **how})
    bags = make_bags([backend], [rows])
    return bags, bags.slabs[0]


@pytest.mark.parametrize("touched, expected", [(10, Accumulate.ROWS), (249, Accumulate.ROWS), (250, Accumulate.SORTED)])
def test_few_touched_rows_give_rows_and_many_a_dense_gradient(touched, expected):
    bags, slab = one_feature(1000)
    bags(torch.arange(touched).repeat(3)).sum().backward()
    assert slab._accumulate == expected
    assert slab.weight.grad.is_sparse == (expected == Accumulate.ROWS)


def test_the_pick_stays_and_is_made_by_a_batch_that_has_a_gradient():
    bags, slab = one_feature(1000)
    with torch.no_grad():
        bags(torch.arange(900))
    bags(torch.tensor([], dtype=torch.int64))
    assert slab._accumulate is None
    bags(torch.arange(10)).sum().backward()
    slab.weight.grad = None
    bags(torch.arange(1000)).sum().backward()
    assert slab.weight.grad.is_sparse


def test_what_it_measures_counts_every_chunk_of_bags_of_any_size():
    how = {"block": 4, "hash": "mixed", "sign": False, "shared": False, "compression": 0.5}
    bags, slab = one_feature(4000, Hashed, **how)
    bags(torch.arange(900), torch.tensor([0, 0, 500, 900])).sum().backward()
    assert slab._accumulate == Accumulate.SORTED  # 900 * 4 draws touch more than a third of 8,000 slots


def test_the_gradient_is_that_of_its_pick_named():
    ids = torch.randint(1000, (3000,), generator=torch.Generator().manual_seed(0))
    bags, slab = one_feature(1000)
    named = make_bags([Dense(embedding_dim=DIM, accumulate="sorted", init="fair", compression=1.0)], [1000])
    for module in (bags, named):
        module(ids).pow(2).sum().backward()
    assert slab.weight.grad.equal(named.slabs[0].weight.grad)

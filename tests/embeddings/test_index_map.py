"""Which weights an id reads: published vectors, Python integers, and the two kernels, at the ends of every range."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from oracle import DENSE, HASHED, SUM, Case

from embeddings import index_map as maps
from embeddings import reference

EXTREME_IDS = [0, 1, 49, -1, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63), -(2**31) - 1]
EXTREME_HASHES = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]


def signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


def slots_read(kernels, ids, index_map=HASHED, *, num_slots=1000, width=1, dim=16, first=0, seed=7, device="cpu"):
    """[ids, chunks]: a slab of weights that hold their own slot number tells which were read."""
    weights = torch.arange(first + num_slots, dtype=torch.float64)[:, None].expand(-1, width).contiguous()
    tables = torch.tensor([[0, first, num_slots, num_slots, seed]])
    ids = torch.as_tensor(ids)
    case = Case(weights, ids, None, None, tables, len(ids), dim, index_map, "C1").to(device)
    vectors = case.forward(kernels, SUM)[:, 0].unflatten(1, (-1, width)).cpu()
    assert vectors.eq(vectors[..., :1]).all()
    return vectors[..., 0].long()


def test_splitmix64_is_the_published_stream():
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert (
        list(itertools.islice(oracle.splitmix64(1234567), 5)) == first
    )  # Vigna's splitmix64.c, as Rosetta Code prints it
    assert maps.splitmix64(torch.tensor(1234567), torch.arange(5)).tolist() == [signed(x) for x in first]


def test_splitmix64_equals_python_integers_for_any_seed_and_place():
    for seed, i in itertools.product(EXTREME_HASHES, EXTREME_IDS):
        found = maps.splitmix64(torch.tensor(signed(seed)), torch.tensor(i))
        assert found.item() == signed(oracle.jump(seed, i)), (seed, i)


def test_reduce_range_equals_python_integers():
    rng = np.random.default_rng(0)
    hashes = EXTREME_HASHES + [int(x) for x in rng.integers(0, 2**64, 200, dtype=np.uint64)]
    for n in [1, 2, 3, 1000, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1]:
        found = maps.reduce_range(torch.tensor([signed(h) for h in hashes]), torch.tensor(n))
        assert found.tolist() == [h * n >> 64 for h in hashes], n


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("num_slots", [1, 2, 1000, 2**17 + 1])
def test_hashed_slots_equal_python_integers(kernels, device, width, num_slots):
    seed = 2**63 - 25
    found = slots_read(kernels, EXTREME_IDS, num_slots=num_slots, width=width, first=3, seed=seed, device=device)
    table = [0, 3, num_slots, num_slots, seed]
    assert found.tolist() == [[oracle.slot(table, HASHED, i, c) for c in range(16 // width)] for i in EXTREME_IDS]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_int32_ids_read_what_int64_ids_read(kernels, device, dtype):
    ids = [0, 1, 2**31 - 1, -1, -(2**31)]
    found = slots_read(kernels, torch.tensor(ids, dtype=dtype), device=device)
    assert found.tolist() == [[oracle.slot([0, 0, 1000, 0, 7], HASHED, i, c) for c in range(16)] for i in ids]


def test_dense_reads_row_id(kernels, device):
    assert slots_read(kernels, [0, 999, 5], DENSE, width=16, first=2, device=device).tolist() == [[2], [1001], [7]]


def test_slots_beyond_two_to_the_31_are_read(kernels):
    num_slots = 2**31 + 5
    table, ids = [0, 0, num_slots, 0, 7], torch.arange(64)
    slots = torch.tensor([[oracle.slot(table, HASHED, i, c) for c in range(2)] for i in ids.tolist()])
    assert slots.max() > 2**31 - 2**27
    weights = torch.from_numpy(
        np.zeros((num_slots, 1), np.float16)
    )  # calloc: 4 GiB that are never touched, so never in memory
    weights[slots.flatten(), 0] = torch.arange(1.0, 129.0).half()
    case = Case(weights, ids, None, None, torch.tensor([table]), 64, 2, HASHED, "C1")
    assert case.forward(kernels, SUM).flatten().tolist() == list(range(1, 129))


@pytest.mark.parametrize("ids", [torch.arange(64_000), torch.arange(64_000) * 2**32, -torch.arange(64_000)])
def test_hashed_slots_are_uniform(ids):
    num_slots = 1000
    counts = slots_read(reference, ids, num_slots=num_slots, dim=1).flatten().bincount(minlength=num_slots)
    expected = len(ids) / num_slots
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert (
        abs(chi_square - num_slots) < 5 * (2 * num_slots) ** 0.5
    )  # five standard deviations of chi-square, fixed seed
    assert counts.max() < expected + 6 * expected**0.5


def test_chunks_of_an_id_are_independent():
    slots = slots_read(reference, torch.arange(20_000), num_slots=10)
    joint = (slots[:, 3] * 10 + slots[:, 4]).bincount(minlength=100)
    assert abs(((joint - 200) ** 2 / 200).sum().item() - 99) < 5 * (2 * 99) ** 0.5


def test_features_with_other_seeds_read_other_slots():
    a, b = (slots_read(reference, torch.arange(10_000), num_slots=1000, dim=1, seed=seed) for seed in (7, 8))
    assert abs((a == b).sum().item() - 10) < 5 * 10**0.5  # chance: one in a thousand


def test_no_two_of_100_000_rows_share_all_slots_at_one_64th():
    slots = slots_read(reference, torch.arange(100_000), num_slots=100_000 * 16 // 64)
    assert len(slots.unique(dim=0)) == 100_000

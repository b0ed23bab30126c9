"""Which weights an id reads: published vectors, Python integers, and the two kernels, at the ends of every range."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from oracle import ADD, AFFINE, MAPS, MIXED, MURMUR3, PARTITION, SIGNED, SUM, Case, Table
from sklearn.utils import murmurhash3_32

from embeddings import index_map as maps
from embeddings import reference

HASHES = [MIXED, SIGNED, AFFINE, MURMUR3]
IDS = ["partition", "mixed", "signed", "affine", "murmur3"]
each_map = pytest.mark.parametrize("index_map", MAPS, ids=IDS)
each_hash = pytest.mark.parametrize("index_map", HASHES, ids=IDS[1:])
EXTREME_IDS = [0, 1, 49, -1, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63), -(2**31), -(2**31) - 1, 1_877_623_597]
EXTREME_HASHES = [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]


def signed(bits: int) -> int:
    return (bits + 2**63) % 2**64 - 2**63


def chunks_read(kernels, ids, table: Table, index_map: int, device="cpu"):
    """(slots, negative) [ids, chunks]: a slab of weights that hold one more than their own slot tells which were read,
    and the sign of the output that they were negated."""
    numbers = torch.arange(1, table.num_slots + 1, dtype=torch.float64)[:, None].expand(-1, table.width)
    weights = torch.cat([torch.full((table.begin,), 0.5), numbers.flatten()])[:, None]
    ids = torch.as_tensor(ids)
    batch = (weights, ids, None, None, torch.tensor([table]), len(ids), table.dim)
    case = Case(*batch, 1, table.dim // table.width, index_map, ADD, "C1").to(device)
    vectors = case.forward(kernels, SUM).unflatten(1, (-1, table.width)).cpu()
    assert vectors.eq(vectors[..., :1]).all()
    return vectors[..., 0].abs().long() - 1, vectors[..., 0] < 0


def assert_reads_equal_the_oracle(kernels, ids, table: Table, index_map: int, device="cpu"):
    slots, negative = chunks_read(kernels, ids, table, index_map, device)
    expected = [oracle.reads(table, index_map, id) for id in torch.as_tensor(ids).tolist()]
    assert slots.tolist() == [[slot for slot, _ in chunks] for chunks in expected]
    assert negative.tolist() == [[negated for _, negated in chunks] for chunks in expected]


def hash_table(index_map, *, num_slots=1000, width=1, dim=16, begin=0, seed=7) -> Table:
    return Table(0, 0, dim, dim if index_map == MURMUR3 else width, begin, num_slots, 0, 1, seed)


def test_splitmix64_is_the_published_stream():
    # Vigna's splitmix64.c, as Rosetta Code prints it
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert list(itertools.islice(oracle.splitmix64(1234567), 5)) == first
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


def test_murmur3_equals_scikit_learn():
    rng = np.random.default_rng(0)
    narrow = [0, 1, -1, 2**31 - 1, -(2**31), *rng.integers(-(2**31), 2**31, 200).tolist()]
    wide = [2**31, -(2**31) - 1, 2**63 - 1, -(2**63), 2**32, *rng.integers(2**31, 2**63, 200).tolist()]
    for seed in (0, 1, 179424941, 2**31, 2**32 - 1, 2**62 + 5):
        for size, ids in ((4, narrow), (8, wide)):
            keys = [id.to_bytes(size, "little", signed=True) for id in ids]
            published = [murmurhash3_32(key, seed=seed % 2**32, positive=True) for key in keys]
            assert [oracle.murmur3(key, seed) % 2**32 for key in keys] == published
            assert maps.murmur3(torch.tensor(ids), torch.tensor(seed)).tolist() == published


def test_affine_equals_python_integers_also_where_uint64_wraps():
    columns = [0, 1, 15, 127, 318_828, 318_829, 2**40, 2**62]
    for id, column in itertools.product(EXTREME_IDS, columns):
        found = maps.affine(torch.tensor(id), torch.tensor(column))
        assert found.item() == oracle.affine(id, column), (id, column)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("num_slots", [1, 2, 1000, 2**17 + 1])
@each_hash
def test_hashed_slots_equal_python_integers(kernels, device, index_map, width, num_slots):
    for seed in (2**63 - 25, 0, 1 << 31, -1):
        table = hash_table(index_map, num_slots=num_slots, width=width, begin=3, seed=seed)
        assert_reads_equal_the_oracle(kernels, EXTREME_IDS, table, index_map, device)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@each_hash
def test_int32_ids_read_what_int64_ids_read(kernels, device, dtype, index_map):
    ids = torch.tensor([0, 1, 2**31 - 1, -1, -(2**31)], dtype=dtype)
    assert_reads_equal_the_oracle(kernels, ids, hash_table(index_map), index_map, device)


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("divisor, num_slots", [(1, 1000), (4, 250), (3, 334), (1000, 1), (1, 7), (60, 5), (2**40, 1)])
def test_a_partition_reads_one_digit_of_the_id(kernels, device, ids_dtype, divisor, num_slots):
    ids = torch.tensor([0, 1, 2, 3, 4, 59, 60, 61, 998, 999], dtype=ids_dtype)
    rest = Table(0, 0, 2, 2, 4 + 2 * num_slots, 1000, 1000)  # so that all ids differ
    table = Table(0, 0, 2, 2, 4, num_slots, 1000, divisor)
    weights = torch.zeros(2 + num_slots + 1000, 2, dtype=torch.float64)
    weights[2 : 2 + num_slots] = torch.arange(num_slots)[:, None]
    case = Case(weights, ids, None, None, torch.tensor([table, rest]), 10, 2, 2, 1, PARTITION, ADD, "C1").to(device)
    assert case.forward(kernels, SUM)[:, 0].tolist() == [id // divisor % num_slots for id in ids.tolist()]


@each_map
def test_slots_beyond_two_to_the_31_are_read(kernels, index_map):
    num_slots, num_ids = 2**31 + 5, 64
    ids = torch.arange(num_ids) if index_map != PARTITION else num_slots - 1 - torch.arange(num_ids)
    chunks = 1 if index_map in (PARTITION, MURMUR3) else 2
    table = Table(0, 0, chunks, 1, 0, num_slots, num_slots, 1, 7)
    reads = [oracle.reads(table, index_map, id) for id in ids.tolist()]
    slots = torch.tensor([slot for chunks in reads for slot, _ in chunks])
    assert index_map == AFFINE or slots.max() > 2**31 - 2**27
    # calloc: 4 GiB that are never touched, so never in memory
    weights = torch.from_numpy(np.zeros((num_slots, 1), np.float16))
    numbers = torch.arange(1.0, len(slots) + 1)
    weights[slots, 0] = numbers.half()
    case = Case(weights, ids, None, None, torch.tensor([table]), 64, chunks, 1, chunks, index_map, ADD, "C1")
    signs = torch.tensor([-1 if negative else 1 for chunks in reads for _, negative in chunks])
    assert case.forward(kernels, SUM).flatten().tolist() == (numbers * signs).tolist()


@pytest.mark.parametrize("index_map", [MIXED, SIGNED, MURMUR3], ids=["mixed", "signed", "murmur3"])
@pytest.mark.parametrize("ids", [torch.arange(64_000), torch.arange(64_000) * 2**32, -torch.arange(64_000)])
def test_hashed_slots_are_uniform(ids, index_map):
    num_slots = 1000
    table = hash_table(index_map, num_slots=num_slots, dim=1)
    counts = chunks_read(reference, ids, table, index_map)[0].flatten().bincount(minlength=num_slots)
    expected = len(ids) / num_slots
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # five standard deviations of chi-square, fixed seed
    assert abs(chi_square - num_slots) < 5 * (2 * num_slots) ** 0.5
    assert counts.max() < expected + 6 * expected**0.5


def test_chunks_of_an_id_are_independent():
    slots, _ = chunks_read(reference, torch.arange(20_000), hash_table(MIXED, num_slots=10), MIXED)
    joint = (slots[:, 3] * 10 + slots[:, 4]).bincount(minlength=100)
    assert abs(((joint - 200) ** 2 / 200).sum().item() - 99) < 5 * (2 * 99) ** 0.5


def test_signs_are_fair_and_independent_of_slots_and_of_each_other():
    table = hash_table(SIGNED, num_slots=10, dim=2)
    slots, negative = chunks_read(reference, torch.arange(20_000), table, SIGNED)
    assert slots.equal(chunks_read(reference, torch.arange(20_000), table, MIXED)[0])
    joint = (slots[:, 0] * 4 + negative[:, 0] * 2 + negative[:, 1]).bincount(minlength=40)
    assert abs(((joint - 500) ** 2 / 500).sum().item() - 39) < 5 * (2 * 39) ** 0.5


@pytest.mark.parametrize("index_map", [MIXED, SIGNED, MURMUR3], ids=["mixed", "signed", "murmur3"])
def test_tables_with_other_seeds_read_other_slots(index_map):
    tables = [hash_table(index_map, dim=1, seed=seed) for seed in (7, 8)]
    a, b = (chunks_read(reference, torch.arange(10_000), table, index_map)[0] for table in tables)
    assert abs((a == b).sum().item() - 10) < 5 * 10**0.5  # chance: one in a thousand


def test_no_two_of_100_000_rows_share_all_slots_at_one_64th():
    slots, _ = chunks_read(reference, torch.arange(100_000), hash_table(MIXED, num_slots=100_000 * 16 // 64), MIXED)
    assert len(slots.unique(dim=0)) == 100_000

"""Collision traffic against loops over ids, probes and chunks, and where its value is known."""

from collections import defaultdict

import numpy as np
import oracle
import pytest
import torch
from builders import case_of, dense, each_choice, from_yaml, hashed, make_bags, make_batch

ROWS = [300, 40, 500]


def counted(bags, ids, offsets):
    """Feature -> of each lookup the share of its reads that another (feature, id) reads too, by the oracle's hashes."""
    by_bag = np.split(ids.numpy(), offsets.numpy()[1:-1])
    readers, reads_of, lookups = defaultdict(set), {}, {}
    for slab in bags.slabs:
        case, _ = case_of(slab, ids, offsets, None, (len(offsets) - 1) // bags.num_features)
        for f, name in enumerate(slab.rows):
            tables = case.feature(f)
            begin = tables[0].position * case.batch_size
            lookups[name] = np.concatenate(by_bag[begin : begin + case.batch_size]).tolist()
            for id in set(lookups[name]):
                numbers = [
                    (slab, table.begin + slot * table.width + z)
                    for table in tables
                    for slot, _ in oracle.reads(table, case.index_map, id)
                    for z in range(table.width)
                ]
                reads_of[name, id] = numbers
                for number in numbers:
                    readers[number].add((name, id))
    return {
        name: [np.mean([len(readers[number]) > 1 for number in reads_of[name, id]]) for id in ids]
        for name, ids in lookups.items()
    }


@each_choice
def test_traffic_is_the_share_of_reads_that_another_id_has_too(yaml, changes):
    backend = from_yaml(yaml, compression=0.5, **changes)
    bags = make_bags([backend, dense(), backend], ROWS)
    ids, offsets = make_batch(ROWS, batch_size=9)
    found, expected = bags.collision_traffic(ids, offsets), counted(bags, ids, offsets)
    assert list(found) == ["C1", "C2", "C3"]
    for name, shares in found.items():
        assert shares.tolist() == pytest.approx(expected[name]), name
    assert not found["C2"].any() and len(found["C1"]) == offsets[9]


@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.bfloat16, "meta")], ids=str)
def test_torchs_defaults_do_not_change_the_traffic(dtype, device):
    bags, batch = make_bags([hashed(0.5, 16), dense()], [300, 300]), make_batch([300, 300])
    expected = bags.collision_traffic(*batch)
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        found = bags.collision_traffic(*batch)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert all(share.equal(expected[name]) and share.dtype == torch.float32 for name, share in found.items())


def test_repeats_of_one_id_are_no_collision_and_two_ids_of_one_slot_are():
    bags = make_bags([hashed(0.5, 16), dense()], [300, 300])
    ids = torch.arange(300)
    slots = oracle_slots(bags, ids)
    same = next((a, b) for a in range(300) for b in range(a) if slots[a] == slots[b])
    apart = next(c for c in range(300) if slots[c] != slots[same[0]])
    batch = torch.tensor([apart, same[0], apart, same[1], 5, 5, 6, 7])
    found = bags.collision_traffic(batch)
    assert found["C1"].tolist() == [0, 1, 0, 1] and found["C2"].tolist() == [0, 0, 0, 0]


def oracle_slots(bags, ids):
    (table,) = case_of(bags.slabs[0], ids, None, None, len(ids))[0].feature(0)
    return [oracle.reads(table, oracle.MIXED, int(id))[0][0] for id in ids]

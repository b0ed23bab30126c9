"""Samples that are kept on a device: the dataset's own batches, whatever the dataset."""

import pytest
import torch

from data.resident import Resident
from data.synthetic import Synthetic

LINES = "y,d,c,e\n" + "".join(f"{i % 2},{i},v{i % 7},w{i % 3}\n" for i in range(60))


def synthetic(table):
    dataset = Synthetic(
        [1000, 3],
        {"train": 101, "valid": 9, "test": 20},
        seed=0,
        shuffle_seed=0,
        num_dense=2,
        zipf_exponent=1.1,
        click_rate=0.25,
        teacher_auc=0.8,
        signal={"dense": 0.28, "ids": 0.68, "pairs": 0.04, "tail_decay": 0.3},
        min_count=1,
    )
    dataset.prepare(set())
    return dataset


def from_file(table):
    return table(LINES, categorical=["c", "e"])


def unshuffled(table):
    return table(LINES, categorical=["c", "e"], shuffle=False)


def without_dense(table):
    return table(LINES, categorical=["c", "e"], dense={})


@pytest.mark.parametrize("make", [synthetic, from_file, unshuffled, without_dense])
def test_batches_are_the_datasets_own(table, monkeypatch, make):
    monkeypatch.setattr("data.resident.PIECE", 16)  # samples are loaded in several pieces
    dataset = make(table)
    resident = Resident(dataset, "cpu")
    for split, epoch, start in [
        ("train", 0, 0),
        ("train", 1, 0),
        ("train", 3, 13),
        ("train", 0, 10**6),
        ("test", 0, 0),
    ]:
        both = [list(d.batches(split, 8, epoch=epoch, start=start)) for d in (resident, dataset)]
        assert len(both[0]) == len(both[1])
        for mine, own in zip(*both, strict=True):
            assert mine.offsets is own.offsets is None
            for a, b in zip(mine[:2] + mine[3:], own[:2] + own[3:], strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)


def test_it_is_its_dataset_in_all_else(table):
    dataset = from_file(table)
    resident = Resident(dataset, "cpu")
    for name in ("feature_names", "dense_names", "fingerprint", "cardinalities", "num_samples"):
        assert getattr(resident, name) == getattr(dataset, name)
    assert resident.describe() == dataset.describe()


def test_samples_with_bags_are_refused(table):
    dataset = table("y,d,c,m\n0,1,a,a|b\n1,2,a,b\n0,1,b,a\n1,2,a,c\n", multi_valued={"m": "|"})
    with pytest.raises(ValueError, match="data_on_device=true: keeps samples with one id per feature"):
        Resident(dataset, "cpu")


def test_what_is_said_to_be_needed_is_what_is_held(table, capsys):
    dataset = synthetic(table)
    resident = Resident(dataset, "cpu")
    indices = [sum(len(b.labels) for b in resident.batches(split, 8)) for split in ("train", "valid", "test")]
    assert indices == [101, 9, 20]  # of int64: each split's order, whole on the device while its batches are drawn
    held = sum(field.numel() * field.element_size() for fields in resident._kept.values() for field in fields)
    assert f"with their order: {(held + 8 * sum(indices)) / 2**20:,.1f} MiB" in capsys.readouterr().out


def test_what_does_not_fit_is_refused_with_bytes_needed_and_free(table, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    with pytest.raises(ValueError, match=r"the samples and their order take 1,440 bytes, cuda has 100"):
        Resident(from_file(table), "cuda")  # 60 samples of a dense column, two ids, a label and an index

"""The generator is a pure function of its counters, and the teacher is as calibrated as it says."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from data.synthetic import Synthetic, zipf_ids
from data.teacher import exact_auc, expected_auc

SIGNAL = {"dense": 0.28, "ids": 0.68, "pairs": 0.04, "tail_decay": 0.3}
CRITEO_KAGGLE = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194]
CRITEO_KAGGLE += [27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]


def make(*, is_prepared=True, **changes):
    options = {
        "cardinalities": [1000, 3, 50000, 10],
        "num_samples": {"train": 5000, "valid": 1000, "test": 2000},
        "seed": 0,
        "shuffle_seed": 0,
        "num_dense": 5,
        "zipf_exponent": 1.1,
        "min_count": 1,
        "click_rate": 0.25,
        "teacher_auc": 0.8,
        "signal": SIGNAL,
    }
    dataset = Synthetic(**(options | changes))
    if is_prepared:
        dataset.prepare(set())
    return dataset


@functools.cache
def default():
    return make()


@functools.cache
def whole_epoch(epoch):
    return joined(default().batches("train", 512, epoch=epoch))


def joined(batches):
    """All samples as (dense [N, num_dense], ids [N, F], labels [N])."""
    batches = list(batches)
    ids = [b.ids.view(-1, len(b.labels)).T for b in batches]
    return torch.cat([b.dense for b in batches]), torch.cat(ids), torch.cat([b.labels for b in batches])


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_samples_do_not_depend_on_the_batch_size():
    dataset = default()
    assert equal(joined(dataset.batches("train", 64)), joined(dataset.batches("train", 777)))


@given(start=st.integers(0, 5000), epoch=st.integers(0, 3), batch_size=st.integers(1, 999))
@settings(max_examples=20, deadline=None)
def test_start_skips_exactly_that_many_samples(start, epoch, batch_size):
    dataset, whole = default(), whole_epoch(epoch)
    if start == 5000:
        assert list(dataset.batches("train", batch_size, epoch=epoch, start=start)) == []
    else:
        assert equal([x[start:] for x in whole], joined(dataset.batches("train", batch_size, epoch=epoch, start=start)))


def test_samples_are_made_on_the_device_that_is_asked_for():
    dataset = default()
    with FakeTensorMode(allow_non_fake_inputs=True):  # it refuses what reads tensors of two devices
        batch = dataset.take("train", np.arange(10), "meta")
    assert batch.offsets is None and all(field.is_meta for field in (batch.dense, batch.ids, batch.labels))
    assert [list(field.shape) for field in (batch.dense, batch.ids, batch.labels)] == [[10, 5], [40], [10]]


def test_torch_makes_the_samples_that_numpy_makes(monkeypatch):
    """A device's are torch's, here on the CPU."""
    dataset = make(cardinalities=CRITEO_KAGGLE, num_dense=13, num_samples={"train": 20_000, "valid": 0, "test": 1})
    own = dataset.take("train", np.arange(20_000))
    samples = Synthetic._samples
    monkeypatch.setattr(Synthetic, "_samples", lambda self, split, i: samples(self, split, torch.from_numpy(i)))
    by_torch = dataset.take("train", np.arange(20_000))
    assert by_torch.ids.equal(own.ids) and by_torch.labels.equal(own.labels)
    torch.testing.assert_close(by_torch.dense, own.dense, rtol=1e-7, atol=0)


def test_two_builds_give_the_same_bits_and_another_seed_does_not():
    assert equal(joined(make().batches("test", 512)), joined(make().batches("test", 512)))
    assert not torch.equal(joined(make().batches("test", 512))[1], joined(make(seed=1).batches("test", 512))[1])


def test_an_epoch_has_the_same_samples_in_another_order():
    dataset = default()
    first, second = (joined(dataset.batches("train", 512, epoch=e))[0] for e in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(first[first[:, 0].argsort()], second[second[:, 0].argsort()])


def test_splits_share_no_sample():
    dataset = default()
    train, valid, test = (joined(dataset.batches(s, 512))[0][:, 0] for s in ("train", "valid", "test"))
    assert len(torch.unique(torch.cat([train, valid, test]))) == 8000


def test_shapes_types_and_ranges_keep_the_contract():
    dataset = default()
    batches = list(dataset.batches("train", 2048))
    assert [len(b.labels) for b in batches] == [2048, 2048, 904]
    batch = batches[0]
    assert batch.offsets is None and batch.ids.dtype == torch.int32 and batch.ids.shape == (4 * 2048,)
    assert batch.dense.dtype == batch.labels.dtype == torch.float32 and batch.dense.shape == (2048, 5)
    for row, count in zip(batch.ids.view(4, -1), dataset.cardinalities.values(), strict=True):
        assert row.min() >= 0 and row.max() < count
    assert set(batch.labels.unique().tolist()) == {0.0, 1.0}
    assert (batch.dense >= 0).all() and 0.5 < batch.dense.std() < 2  # as log1p of a count


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.05, 2.0])
def test_zipf_matches_its_density(exponent):
    count, n = 200_000, 1000
    uniform = (np.arange(count) + 0.5) / count
    ids = zipf_ids(uniform[None], np.array([[n]]), exponent)[0]
    edges = np.arange(1, n + 2, dtype=np.float64)
    cdf = np.log(edges) if exponent == 1 else (edges ** (1 - exponent) - 1) / (1 - exponent)
    expected = np.diff(cdf) / cdf[-1] * count
    np.testing.assert_allclose(np.bincount(ids, minlength=n), expected, atol=2)


@given(n=st.integers(1, 2**31 - 1), exponent=st.floats(0.1, 3.9))
@settings(deadline=None)
def test_zipf_never_leaves_the_table(n, exponent):
    uniform = np.array([[0.0, 2.0**-53, 0.5, 1 - 2.0**-53]])
    ids = zipf_ids(uniform, np.array([[n]]), exponent)
    assert ids.min() == 0 and ids.max() < n


def test_teacher_has_the_asked_auc_and_click_rate():
    dataset = make(num_samples={"train": 1, "valid": 0, "test": 100_000}, cardinalities=CRITEO_KAGGLE, num_dense=13)
    labels = joined(dataset.batches("test", 8192))[2]
    assert labels.mean().item() == pytest.approx(0.25, abs=0.01)
    assert dataset.best_possible_auc("test") == pytest.approx(0.80, abs=0.01)


def test_a_split_without_samples_has_no_batches_and_no_auc():
    dataset = make(num_samples={"train": 10, "valid": 0, "test": 10})
    assert list(dataset.batches("valid", 5)) == [] and np.isnan(dataset.best_possible_auc("valid"))


def test_expected_auc_is_what_drawn_labels_give():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=200_000)
    labels = rng.random(200_000) < 1 / (1 + np.exp(-logits))
    assert expected_auc(logits) == pytest.approx(exact_auc(logits, labels), abs=0.003)


def test_exact_auc_agrees_with_scikit_learn_on_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 20, 1000) / 20.0, rng.integers(0, 2, 1000)
    assert exact_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert np.isnan(exact_auc(scores, np.ones(1000)))


def test_no_memory_grows_with_the_tables():
    assert make(cardinalities=[2**31 - 1] * 26).batches("train", 10).__next__().ids.max() < 2**31 - 1


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.3])
def test_min_count_joins_the_ids_that_are_rarer_and_changes_nothing_else(exponent):
    how = {"num_samples": {"train": 50_000, "valid": 0, "test": 100}, "zipf_exponent": exponent}
    whole, cut = make(**how), make(**how, min_count=50)
    assert cut.fingerprint != whole.fingerprint
    (dense, ids, labels), (cut_dense, cut_ids, cut_labels) = (
        joined(whole.batches("train", 4096)),
        joined(cut.batches("train", 4096)),
    )
    assert dense.equal(cut_dense) and labels.equal(cut_labels)
    for f, (n, kept) in enumerate(zip(whole.cardinalities.values(), cut.cardinalities.values(), strict=True)):
        assert cut_ids[:, f].equal(ids[:, f].clamp(max=kept - 1))
        counts = ids[:, f].bincount(minlength=n)
        if kept < n:  # id kept - 1 is the first of the rare; counts deviate by their square root
            assert counts[kept - 2] > 50 - 5 * 50**0.5 and counts[kept:].max() < 50 + 5 * 50**0.5
        else:
            assert counts.min() > 50 - 5 * 50**0.5
    assert cut.cardinalities["C3"] < 5000


def test_fingerprint_follows_every_option():
    changes = [{"seed": 1}, {"cardinalities": [5]}, {"click_rate": 0.3}, {"teacher_auc": 0.7}, {"zipf_exponent": 1.0}]
    changes += [{"min_count": 9}]
    changes += [{"num_dense": 4}, {"signal": SIGNAL | {"pairs": 0}}]
    changes += [{"num_samples": {"train": 1, "valid": 0, "test": 1}}]
    assert len({make(**c, is_prepared=False).fingerprint for c in [{}, *changes]}) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": -1}, "data.seed=-1"),
        ({"zipf_exponent": 0}, "data.zipf_exponent=0"),
        ({"min_count": 0}, "data.min_count=0"),
        ({"click_rate": 1.0}, "data.click_rate=1.0"),
        ({"teacher_auc": 0.5}, "data.teacher_auc=0.5"),
        ({"num_dense": 1.5}, "data.num_dense=1.5"),
        ({"cardinalities": []}, "data.cardinalities is empty"),
        ({"cardinalities": [3, 0]}, r"data.cardinalities\[1\]=0"),
        ({"cardinalities": [2**31]}, r"data.cardinalities\[0\]=2147483648"),
        ({"cardinalities": 5}, r"data.cardinalities=5: must be a list, as in \[1000, 50\]"),
        ({"cardinalities": None}, "data.cardinalities=None: must be a list"),
        ({"num_samples": 5}, "data.num_samples=5: must be a mapping with train, valid, test"),
        ({"signal": [1, 2]}, r"data.signal=\[1, 2\]: must be a mapping with dense, ids, pairs, tail_decay"),
        ({"num_samples": {"train": 1, "valid": 0}}, "data.num_samples lacks test"),
        ({"num_samples": {"trian": 1, "valid": 0, "test": 1}}, "'trian'.*did you mean 'train'"),
        ({"num_samples": {"train": 0, "valid": 0, "test": 1}}, "data.num_samples.train=0"),
        ({"signal": SIGNAL | {"ids": -1}}, "data.signal.ids=-1"),
        ({"signal": SIGNAL | {"ids": 0, "dense": 0}}, "nothing could be learnt"),
    ],
)
def test_bad_options_are_refused_by_name(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_unknown_split_and_feature_are_refused():
    dataset = default()
    with pytest.raises(ValueError, match="'tets'.*did you mean 'test'"):
        next(dataset.batches("tets", 10))
    with pytest.raises(ValueError, match="C9"):
        dataset.prepare({"C9"})

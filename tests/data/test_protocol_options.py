"""What published protocols need of the data: id orders, shared rows, magnitudes, splits that are files, file order."""

import duckdb
import numpy as np
import pytest
import torch
from tables import samples_of

from data.batch import Batch
from data.multi_hot import multi_hot

ROWS = "y,d,c\n1,1,b\n0,2,c\n1,3,b\n0,4,\n1,5,a\n0,6,ç\n1,7,a\n0,8,a\n"  # the first four train


def ids(dataset, split="test"):
    return [bags[0][0] for _, bags, _ in samples_of(dataset, split)]


@pytest.mark.parametrize(
    ("id_order", "vocabulary", "want"),
    [
        ("appearance", "train", [0, 0, 0, 0]),  # b c empty
        ("appearance", "all", [4, 5, 4, 4]),  # b c empty a ç
        ("frequency", "all", [1, 5, 1, 1]),  # a b c empty ç
        ("lexical", "all", [2, 5, 2, 2]),  # empty a b c ç
    ],
)
def test_ids_are_numbered_in_the_order_and_over_the_rows_asked_for(id_order, vocabulary, want, table):
    dataset = table(ROWS, id_order=id_order, vocabulary=vocabulary)
    assert ids(dataset) == want
    assert dataset.cardinalities == {"c": 4 if vocabulary == "train" else 6}


def test_lexical_order_is_that_of_pythons_sorted(table):
    values = ["Z", "a", "10", "9", "B", "é", "_", "aa", "\U0001f600", "\uffff"]
    dataset = table("y,c\n" + "".join(f"{i % 2},{v}\n" for i, v in enumerate(values * 2)), dense={}, id_order="lexical")
    assert ids(dataset) == [sorted(values).index(v) + 1 for v in values]


def test_ids_from_max_rows_on_wrap_around_and_those_never_trained_stay_apart(table):
    text = "y,c\n" + "".join(f"{i % 2},{v}\n" for i, v in enumerate("abcdefabcxyz"))
    assert ids(table(text, dense={}, max_rows=4)) == [1, 2, 3, 0, 0, 0]
    whole = table(text, dense={}, max_rows=4, vocabulary="all")  # a..f x y z are 1..9
    assert whole.cardinalities == {"c": 4} and ids(whole) == [1, 2, 3, 7 % 4, 8 % 4, 9 % 4]
    assert sorted(ids(whole, "train")) == sorted([1, 2, 3, 4 % 4, 5 % 4, 6 % 4])
    kept = table(text, dense={}, max_rows=4, keep_unseen=["c"])
    assert kept.cardinalities == {"c": 4} and ids(kept) == [1, 2, 3, 7, 8, 9]
    assert table(text, dense={}, max_rows=7).cardinalities == {"c": 7}
    assert table(text, dense={}, max_rows=99).cardinalities == {"c": 7}


@pytest.mark.parametrize("kind", ["INTEGER", "DOUBLE", "VARCHAR"])
def test_buckets_of_parquet_are_those_of_the_same_text(table, tmp_path, kind):
    values = [-3, 0, 2, 7, 1000, 3]
    rows = ", ".join(f"({i % 2}, CAST({v} AS {kind}))" for i, v in enumerate(values))
    duckdb.execute(f"COPY (SELECT * FROM (VALUES {rows}) v(y, c)) TO '{tmp_path / 't.parquet'}'")
    found = table(None, name="t.parquet", dense={}, buckets=["c"])
    assert ids(found) == ids(
        table("y,c\n" + "".join(f"{i % 2},{v}\n" for i, v in enumerate(values)), dense={}, buckets=["c"])
    )


def test_buckets_are_magnitudes(table):
    numbers = ["-3", "0", "", "1", "2", "3", "4", "5", "7", "1000"]
    want = [-3, 0, 0, 1, 2, 1, 1, 2, 3, 47]  # floor(ln(x)^2) above 2
    text = "y,c\n" + "".join(f"{i % 2},{v}\n" for i, v in enumerate(numbers * 2))
    dataset = table(text, dense={}, buckets=["c"], id_order="lexical")
    assert ids(dataset) == [sorted(set(map(str, want))).index(str(w)) + 1 for w in want]
    with pytest.raises(ValueError, match=r"t\.csv:4:c: must be a number"):
        table(text.replace("\n0,\n", "\n0,many\n", 1), dense={}, buckets=["c"])
    for value in ("nan", "0x10", "-1e30", "-99999999999999999999"):
        with pytest.raises(ValueError, match=f"data.buckets.*, not {value}"):
            table(text.replace("\n0,\n", f"\n0,{value}\n", 1), dense={}, buckets=["c"])
    with pytest.raises(ValueError, match="data.buckets.* has no 'd'; allowed: c"):
        table(ROWS, buckets=["d"])


def test_the_shifted_log_takes_empty_for_zero(table):
    text = "y,d,c\n1,0,a\n0,0,a\n1,0,a\n1,,a\n0,-2,a\n1,7,a\n"
    got = [dense[0] for dense, _, _ in samples_of(table(text, dense={"d": "shifted_log"}), "test")]
    assert got == pytest.approx([np.log(3), 0.0, np.log(10)], rel=1e-6)


SPLITS = {"train": "y,c,d\n1,a,1\n0,b,2\n1,a,3\n", "valid": "d,y,c\n4,0,b\n", "test": "y,c,d\n0,c,5\n1,b,6\n"}


@pytest.fixture
def folder(tmp_path):
    for split, text in SPLITS.items():
        (tmp_path / f"{split}.csv").write_text(text)
    return tmp_path


FILES = {"files": {split: f"{split}.csv" for split in SPLITS}, "split": None}


@pytest.mark.parametrize("last", ["test", "valid"])
def test_the_splits_are_the_files_whatever_the_order_of_their_columns(last, folder, table):
    dataset = table(None, name="", last=last, **FILES)
    assert dataset.num_samples == {"train": 3, "valid": 1, "test": 2} and "split by files" in dataset.describe()
    assert sorted(samples_of(dataset, "train")) == [([1.0], [[1]], 1.0), ([2.0], [[2]], 0.0), ([3.0], [[1]], 1.0)]
    assert samples_of(dataset, "valid") == [([4.0], [[2]], 0.0)]
    assert samples_of(dataset, "test") == [([5.0], [[0]], 0.0), ([6.0], [[2]], 1.0)]


def test_a_split_without_a_file_is_empty_and_a_bad_row_is_named_by_its_file(folder, table):
    files = {"train": "train.csv", "test": "test.csv"}
    assert table(None, name="", files=files, split=None).num_samples == {"train": 3, "valid": 0, "test": 2}
    (folder / "test.csv").write_text("y,c,d\n0,c,5\n2,b,6\n")
    with pytest.raises(ValueError, match=r"test\.csv:3:y: the label must be 0 or 1"):
        table(None, name="", **FILES)
    skipping = table(None, name="", on_error="skip", **FILES)
    assert skipping.num_samples == {"train": 3, "valid": 1, "test": 1} and skipping.num_rejected == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": {"train": 0.5, "valid": 0, "test": 0.5}}, "here the files are the splits; set data.split=null"),
        ({"files": {"train": "train.csv"}}, "data.files=.*needs train and test"),
        ({"files": {"train": "train.csv", "tset": "x"}}, "data.files has no 'tset'.*did you mean 'test'"),
        ({"files": {"train": "train.csv", "test": "tst.csv"}}, "no file .*tst.csv; did you mean 'test.csv'"),
        ({"order": "random"}, "do not go with them"),
        ({"time": "d", "dense": {}}, "do not go with them"),
        ({"files": {"train": "train.csv", "test": "other.csv"}}, "other.csv has no column 'c', which train.csv has"),
        ({"last": "train"}, "data.last='train'"),
        ({"vocabulary": "test"}, "data.vocabulary='test'"),
        ({"max_rows": 0}, "data.max_rows=0"),
        ({"shuffle": "no"}, "data.shuffle='no'"),
    ],
)
def test_files_that_cannot_be_the_splits_are_refused_by_name(options, words, folder, table):
    (folder / "other.csv").write_text("y,d\n1,1\n")
    with pytest.raises(ValueError, match=words):
        table(None, name="", **(FILES | options))


def test_more_rows_than_a_row_group_keep_their_order_over_files(tmp_path, table):
    for split, first, rows in (("train", 0, 130_000), ("test", 130_000, 125_000)):  # DuckDB's groups have 122,880
        lines = (f"{i % 2},{i},{i // 30_000}\n" for i in range(first, first + rows))
        (tmp_path / f"{split}.csv").write_text("y,d,c\n" + "".join(lines))
    dataset = table(None, name="", files={"train": "train.csv", "test": "test.csv"}, split=None, shuffle=False)
    train = torch.cat([batch.dense for batch in dataset.batches("train", 50_000)])[:, 0]
    test = torch.cat([batch.dense for batch in dataset.batches("test", 50_000)])[:, 0]
    assert train.tolist() == list(range(130_000)) and test.tolist() == list(range(130_000, 255_000))


def test_without_shuffling_batches_follow_the_file_from_any_sample_on(table):
    text = "y,d,c\n" + "".join(f"{i % 2},{i},a\n" for i in range(40))
    dataset = table(text, shuffle=False, shuffle_block=8)
    for start in (0, 7):
        for epoch in (0, 1):
            batches = dataset.batches("train", 6, epoch=epoch, start=start)
            assert [d for batch in batches for d in batch.dense[:, 0].tolist()] == list(range(start, 20))
    assert [d[0] for d, _, _ in samples_of(table(text), "train")] != list(range(20))


def test_a_bag_is_its_own_id_then_draws_that_depend_on_it_alone():
    own = torch.tensor([[5, 0, 5], [7, 7, 1], [2, 3, 4]], dtype=torch.int32)
    batch = Batch(torch.zeros(3, 0), own.reshape(-1), None, torch.zeros(3))
    many = multi_hot(batch, [3, 1, 2], [1000, 8, 5])
    assert many.offsets.tolist() == [0, 3, 6, 9, 10, 11, 12, 14, 16, 18] and many.ids.dtype == torch.int32
    bags = [many.ids[a:b].tolist() for a, b in zip(many.offsets, many.offsets[1:], strict=False)]
    assert [bag[0] for bag in bags] == own.reshape(-1).tolist()
    assert bags[0] == bags[2] != bags[1] and len(set(bags[0])) == 3
    assert all(0 <= i < 1000 for bag in bags[:3] for i in bag) and all(0 <= i < 5 for bag in bags[6:] for i in bag)
    alone = multi_hot(Batch(torch.zeros(1, 0), own[:, 1], None, torch.zeros(1)), [3, 1, 2], [1000, 8, 5])
    assert alone.ids.tolist() == bags[1] + bags[4] + bags[7]


def test_draws_are_uniform_over_the_rows():
    rows, count = 10, 20_000
    own = torch.arange(count, dtype=torch.int32)
    many = multi_hot(Batch(torch.zeros(count, 0), own, None, torch.zeros(count)), [6], [rows])
    drawn = many.ids.view(count, 6)[:, 1:]
    for k in range(5):
        counts = np.bincount(drawn[:, k], minlength=rows)
        chi2 = ((counts - count / rows) ** 2).sum() / (count / rows)
        assert len(counts) == rows and chi2 < 34  # 9 degrees of freedom: exceeded once in 10,000 times
    joint = np.bincount(drawn[:, 0] * rows + drawn[:, 1], minlength=rows**2)
    assert ((joint - count / 100) ** 2).sum() / (count / 100) < 165  # 99 degrees: once in 30,000

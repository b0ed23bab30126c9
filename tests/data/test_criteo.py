"""train.txt as published, on generated files of its format: parsing, transform, split, bad rows."""

import gzip
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from tables import samples_of

from data import encode
from data.criteo import Criteo1TB, CriteoKaggle

OPTIONS = {
    "split": {"train": 6 / 7, "valid": 1 / 14, "test": 1 / 14},
    "last": "test",
    "vocabulary": "train",
    "min_count": 1,
    "id_order": "appearance",
    "max_rows": None,
    "on_error": "stop",
    "memory_limit": "500MB",
    "shuffle": True,
    "shuffle_block": 1 << 20,
    "shuffle_seed": 0,
    "dense": "log1p",
    "max_ind_range": None,
}


@pytest.fixture
def criteo(tmp_path):
    def make(lines, **options):
        path = tmp_path / "train.txt"
        path.write_text("".join("\t".join(line) + "\n" for line in lines))
        dataset = CriteoKaggle(os.fspath(path), os.fspath(tmp_path / "cache"), **(OPTIONS | options))
        dataset.prepare(set(dataset.feature_names))
        return dataset

    return make


def random_lines(count, seed=0):
    rng = np.random.default_rng(seed)

    def line():
        dense = ["" if rng.random() < 0.3 else str(rng.integers(-2, 1000)) for _ in range(13)]
        hashes = ["" if rng.random() < 0.2 else f"{rng.integers(0, 5) * 0x33333333:08x}" for _ in range(26)]
        return [str(rng.integers(0, 2)), *dense, *hashes]

    return [line() for _ in range(count)]


def test_samples_are_what_the_lines_say(criteo):
    lines = random_lines(140)
    dataset = criteo(lines)
    assert dataset.num_samples == {"train": 120, "valid": 10, "test": 10}
    vocabularies = [{} for _ in range(26)]
    for line in lines:
        for vocabulary, value in zip(vocabularies, line[14:], strict=True):
            vocabulary.setdefault(value, len(vocabulary) + 1)  # all occur within the first 120
    assert dataset.cardinalities == {f"C{i + 1}": len(v) + 1 for i, v in enumerate(vocabularies)}

    def sample(line):
        dense = [math.log1p(max(int(x), 0)) if x else 0.0 for x in line[1:14]]
        return dense, [[v[x]] for v, x in zip(vocabularies, line[14:], strict=True)], float(line[0])

    got = samples_of(dataset, "valid") + samples_of(dataset, "test")
    assert [(bags, y) for _, bags, y in got] == [sample(line)[1:] for line in lines[120:]]
    np.testing.assert_allclose([d for d, _, _ in got], [sample(line)[0] for line in lines[120:]], rtol=1e-6)
    train = samples_of(dataset, "train")
    assert sorted(bags for _, bags, _ in train) == sorted(sample(line)[1] for line in lines[:120])


def preparation(split, last="test"):
    return encode.Preparation(
        split=split,
        last=last,
        order="file",
        split_seed=0,
        vocabulary="train",
        min_count=1,
        id_order="frequency",
        max_rows=None,
    )


def test_the_split_of_the_published_file():
    text = (Path(encode.__file__).parents[1] / "conf/data/criteo_kaggle.yaml").read_text()
    split = yaml.safe_load(text)["split"]
    counts = preparation(split).counts(45_840_617)
    assert counts == {"train": 39_291_957, "valid": 3_274_330, "test": 3_274_330}


BAD_FIELDS = [
    (0, "2", "label: the label must be 0 or 1"),
    (3, "1.2.3", "I3: cast"),
    (13, "nan", "I13: must be finite"),
    (14, "68fd1e6", "C1: must be 8 hex digits"),
    (20, "68fd1e64a", "C7: must be 8 hex digits"),
    (39, "68fd1e6g", "C26: must be 8 hex digits"),
    (39, "68fd_e64", "C26: must be 8 hex digits"),
    (39, "-8fd1e64", "C26: must be 8 hex digits"),
    (39, "68fd1e6 ", "C26: must be 8 hex digits"),
]


@pytest.mark.parametrize(("column", "value", "reason"), BAD_FIELDS)
def test_a_bad_field_is_named(criteo, column, value, reason):
    lines = random_lines(30)
    lines[17][column] = value
    with pytest.raises(ValueError, match=rf"train\.txt:18:{reason}"):
        criteo(lines)


def test_lines_of_bad_fields_are_kept(criteo):
    lines = random_lines(30)
    for i, (column, value, _) in enumerate(BAD_FIELDS):
        lines[3 * i][column] = value
    dataset = criteo(lines, on_error="quarantine")
    assert dataset.num_rejected == len(BAD_FIELDS) and sum(dataset.num_samples.values()) == 30 - len(BAD_FIELDS)
    kept = [line.split("\t") for line in (dataset.folder / "quarantine.tsv").read_text().splitlines()[1:]]
    assert [(int(row[1]), row[4]) for row in kept] == [
        (3 * i + 1, "\\t".join(lines[3 * i])) for i in range(len(BAD_FIELDS))
    ]
    for row, (_, _, reason) in zip(kept, BAD_FIELDS, strict=True):
        assert re.match(reason, f"{row[2]}: {row[3]}"), row


def test_a_row_of_30_columns_is_not_taken(criteo):
    lines = random_lines(30)
    lines[5] = lines[5][:30]
    with pytest.raises(ValueError, match=r"train\.txt:6:C17: missing columns"):
        criteo(lines)
    with pytest.raises(ValueError, match=r"train\.txt:1: 5 columns"):
        criteo([line[:5] for line in lines])


def test_hashes_modulo_max_ind_range_share_ids_and_empty_is_hash_zero(criteo):
    lines = random_lines(30)
    hashes = ["00000007", "00000011", "0000000a", "00000000", "", "ffffffff"] * 5  # mod 10: 7 7 0 0 0 5
    for line, value in zip(lines, hashes, strict=True):
        line[14] = value
    dataset = criteo(lines, max_ind_range=10, vocabulary="all", split=SPLIT)
    assert dataset.cardinalities["C1"] == 4
    assert [bags[0][0] for _, bags, _ in samples_of(dataset, "test")] == [1, 1, 2, 2, 2, 3] * 2
    plain = criteo(lines, vocabulary="all", split=SPLIT)
    assert [bags[0][0] for _, bags, _ in samples_of(plain, "test")] == [1, 2, 3, 4, 5, 6] * 2
    lexical = criteo(lines, vocabulary="all", split=SPLIT, id_order="lexical")
    assert [bags[0][0] for _, bags, _ in samples_of(lexical, "test")] == [3, 5, 4, 2, 1, 6] * 2
    lines[3][14] = "0000000g"
    with pytest.raises(ValueError, match=r"train\.txt:4:C1: must be 8 hex digits"):
        criteo(lines, max_ind_range=10)


SPLIT = {"train": 0.6, "valid": 0, "test": 0.4}


def test_the_split_of_facebookresearch_tests_on_the_first_half_of_the_seventh_day(criteo):
    conf = Path(encode.__file__).parents[1] / "conf/protocol/dlrm_kaggle_1epoch.yaml"
    data = yaml.safe_load(conf.read_text())["data"]
    counts = preparation(data["split"], data["last"]).counts(45_840_617)
    days = [45_840_617 // 7 + (day < 45_840_617 % 7) for day in range(7)]  # data_utils.py, getCriteoAdData
    assert counts == {"train": sum(days[:6]), "test": -(-days[6] // 2), "valid": days[6] // 2}
    lines = random_lines(28)
    for i, line in enumerate(lines):
        line[1] = str(i)
    dataset = criteo(lines, split=data["split"], last=data["last"])
    assert [math.expm1(d[0]) for d, _, _ in samples_of(dataset, "test")] == pytest.approx([24, 25])
    assert [math.expm1(d[0]) for d, _, _ in samples_of(dataset, "valid")] == pytest.approx([26, 27])
    assert sorted(math.expm1(d[0]) for d, _, _ in samples_of(dataset, "train")) == pytest.approx(list(range(24)))


def test_the_split_of_cafe():
    conf = Path(encode.__file__).parents[1] / "conf/protocol/cafe.yaml"
    split = yaml.safe_load(conf.read_text())["data"]["split"]
    train = 45_840_617 * 6 // 7  # load_data.py
    assert preparation(split).counts(45_840_617) == {"train": train, "valid": 0, "test": 45_840_617 - train}


@pytest.fixture
def days(tmp_path):
    """days(**options): three days of 20, 20 and 5 lines, the second compressed; I1 is the line's place."""
    lines = random_lines(45)
    for i, line in enumerate(lines):
        line[1] = str(i)
    texts = ["\t".join(line) + "\n" for line in lines]
    (tmp_path / "day_0").write_text("".join(texts[:20]))
    (tmp_path / "day_1.gz").write_bytes(gzip.compress("".join(texts[20:40]).encode()))
    (tmp_path / "day_2").write_text("".join(texts[40:]))

    def make(**options):
        options = OPTIONS | {"split": None, "days": 3, "multi_hot": None} | options
        dataset = Criteo1TB(os.fspath(tmp_path), os.fspath(tmp_path / "cache"), **options)
        dataset.prepare(set())
        return dataset

    return make


@pytest.mark.parametrize(("last", "first_half"), [("valid", "test"), ("test", "valid")])
def test_all_days_but_the_last_train_and_its_longer_half_comes_first(last, first_half, days):
    dataset = days(last=last)
    assert dataset.num_samples == {"train": 40, first_half: 3, last: 2}
    for split, places in (("train", range(40)), (first_half, range(40, 43)), (last, range(43, 45))):
        assert sorted(math.expm1(d[0]) for d, _, _ in samples_of(dataset, split)) == pytest.approx(list(places))
    assert "split by files" in dataset.describe()


def test_days_are_made_multi_hot_and_the_samples_fingerprint_says_so(days):
    plain, sizes = days(), [3, 1, *[2] * 24]
    many = days(multi_hot=sizes)
    assert many.folder == plain.folder and many.fingerprint != plain.fingerprint
    for (dense, bags, label), (want_dense, want_bags, want_label) in zip(
        samples_of(many, "test"), samples_of(plain, "test"), strict=True
    ):
        assert (dense, label) == (want_dense, want_label) and [len(bag) for bag in bags] == sizes
        assert [bag[:1] for bag in bags] == want_bags
        assert all(i < n for bag, n in zip(bags, many.cardinalities.values(), strict=True) for i in bag)


def test_days_that_are_not_there_and_sizes_that_do_not_fit_are_refused(days):
    with pytest.raises(ValueError, match="no file .*day_3"):
        days(days=4)
    with pytest.raises(ValueError, match="data.multi_hot has 2 sizes; it needs 26"):
        days(multi_hot=[1, 2])
    with pytest.raises(ValueError, match=r"data.multi_hot\[1\]=0"):
        days(multi_hot=[1, 0, *[1] * 24])
    with pytest.raises(ValueError, match="data.dense='log'"):
        days(dense="log")

"""train.txt as published, on generated files of its format: parsing, transform, split, bad rows."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from tables import samples_of

from data import encode
from data.criteo import CriteoKaggle

OPTIONS = {
    "split": {"train": 6 / 7, "valid": 1 / 14, "test": 1 / 14},
    "min_count": 1,
    "id_order": "appearance",
    "on_error": "stop",
    "memory_limit": "500MB",
    "shuffle_block": 1 << 20,
    "shuffle_seed": 0,
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


def test_the_split_of_the_published_file():
    text = (Path(encode.__file__).parents[1] / "conf/data/criteo_kaggle.yaml").read_text()
    split = yaml.safe_load(text)["split"]
    counts = encode.Preparation(split=split, order="file", split_seed=0, min_count=1, id_order="frequency").counts(
        45_840_617
    )
    assert counts == {"train": 39_291_957, "valid": 3_274_330, "test": 3_274_330}


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        (0, "2", "label: the label must be 0 or 1"),
        (3, "1.2.3", "I3: cast"),
        (13, "nan", "I13: must be finite"),
        (14, "68fd1e6", "C1: must be 8 hex digits"),
        (20, "68fd1e64a", "C7: must be 8 hex digits"),
        (39, "68fd1e6g", "C26: must be 8 hex digits"),
        (39, "68fd_e64", "C26: must be 8 hex digits"),
        (39, "-8fd1e64", "C26: must be 8 hex digits"),
        (39, "68fd1e6 ", "C26: must be 8 hex digits"),
    ],
)
def test_a_bad_field_is_named(criteo, column, value, reason):
    lines = random_lines(30)
    lines[17][column] = value
    with pytest.raises(ValueError, match=rf"train\.txt:18:{reason}"):
        criteo(lines)
    dataset = criteo(lines, on_error="quarantine")
    assert dataset.num_rejected == 1 and sum(dataset.num_samples.values()) == 29
    kept = (dataset.folder / "quarantine.tsv").read_text().splitlines()[1].split("\t")
    assert kept[1] == "18" and kept[4] == "\\t".join(lines[17])


def test_a_row_of_30_columns_is_not_taken(criteo):
    lines = random_lines(30)
    lines[5] = lines[5][:30]
    with pytest.raises(ValueError, match=r"train\.txt:6:C17: missing columns"):
        criteo(lines)
    with pytest.raises(ValueError, match=r"train\.txt:1: 5 columns"):
        criteo([line[:5] for line in lines])

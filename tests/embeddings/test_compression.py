"""compression=r is r of the dense bytes within one percent, or is refused with the smallest that can be had."""

import re
from functools import cache
from pathlib import Path

import pytest
from builders import DIM, YAMLS, dense, each_yaml, from_yaml, hashed, make_bags

from embeddings import Dense, EmbeddingBags, Hashed

CRITEO_KAGGLE = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306,
                 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]  # fmt: skip


@cache
def compressed(yaml: Path) -> bool:
    """Whether compression applies to this backend: dense keeps every row."""
    return from_yaml(yaml, compression=0.5).slots({"C1": 10_000}) != {"C1": 10_000}


def reached(backend, rows: dict[str, int]) -> float:
    size = sum(backend.feature_bytes(n) for n in backend.slots(rows).values())
    return size / sum(map(backend.dense_bytes, rows.values()))


@each_yaml
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.01])
def test_compression_is_reached_within_one_percent_on_criteo(yaml, ratio):
    rows = {f"C{i + 1}": n for i, n in enumerate(CRITEO_KAGGLE)}
    backend = from_yaml(yaml, compression=ratio)
    slots = backend.slots(rows)
    assert list(slots) == list(rows)
    if not compressed(yaml):
        assert slots == rows
        return
    assert reached(backend, rows) == pytest.approx(ratio, rel=0.01)
    for f in ("C3", "C12", "C24"):  # and every large feature gets its own share, not another's
        assert backend.feature_bytes(slots[f]) / backend.dense_bytes(rows[f]) == pytest.approx(ratio, rel=0.02)


@each_yaml
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.1])
def test_compression_of_allocated_tensors_is_within_one_percent(yaml, ratio):
    bags = make_bags([from_yaml(yaml, compression=ratio)] * 3, [3000, 5000, 40_000])
    measured = bags.num_bytes() / bags.dense_equivalent_bytes()
    assert measured == pytest.approx(ratio if compressed(yaml) else 1, rel=0.01)


def test_some_yaml_compresses_and_some_does_not():
    assert {compressed(yaml) for yaml in YAMLS} == {True, False}


@pytest.mark.parametrize("block", [1, 8, 16])
def test_an_unreachable_ratio_is_refused_with_the_smallest_that_works(block):
    rows = {"C1": 3000, "C2": 5000, "C3": 4}
    with pytest.raises(ValueError, match=r"compression=1e-05: .*smallest it can is ([\d.e-]+)") as error:
        hashed(0.00001, block).slots(rows)
    smallest = float(re.search(r"smallest it can is ([\d.e-]+)", str(error.value)).group(1))
    assert smallest < 0.001
    assert reached(hashed(smallest, block), rows) == pytest.approx(smallest, rel=0.01)


@pytest.mark.parametrize("ratio", [0.03, 0.05, 0.1, 0.3])
def test_every_ratio_above_the_smallest_is_reached_also_beside_tiny_features(ratio):
    rows = {"C1": 100_000, **{f"C{i}": 2 for i in range(2, 1002)}}  # alone they take 0.0067
    assert reached(hashed(ratio, 1), rows) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("compression", [0, 0.0, -5, 1.5, float("nan"), float("inf"), -0.1])
@pytest.mark.parametrize("make", [hashed, lambda c: Dense(embedding_dim=DIM, compression=c, accumulate="sorted")])
def test_a_compression_outside_zero_to_one_is_refused(make, compression):
    with pytest.raises(ValueError, match=f"compression={compression} must be in"):
        make(compression)


@pytest.mark.parametrize("block", [0, -8, 3, 32])
def test_a_block_that_does_not_divide_the_dim_is_refused_with_those_that_do(block):
    with pytest.raises(ValueError, match=rf"block={block} .*\[1, 2, 4, 8, 16\]"):
        hashed(0.5, block)


@pytest.mark.parametrize("accumulate", ["", "sort", "SORTED", "row"])
def test_an_unknown_accumulate_is_refused_with_those_known(accumulate):
    with pytest.raises(ValueError, match=rf"accumulate={accumulate!r}.*sorted.*atomic.*rows"):
        dense(accumulate)


def test_a_misspelt_or_leftover_key_is_refused():
    with pytest.raises(TypeError, match="blok"):
        Hashed(embedding_dim=DIM, compression=0.5, accumulate="sorted", blok=8)
    with pytest.raises(TypeError, match="block"):
        Dense(embedding_dim=DIM, compression=0.5, accumulate="sorted", block=8)


@pytest.mark.parametrize("embedding_dim", [0, -16])
def test_an_impossible_dim_is_refused(embedding_dim):
    with pytest.raises(ValueError, match=f"embedding_dim={embedding_dim}"):
        Dense(embedding_dim=embedding_dim, compression=1.0, accumulate="sorted")


@pytest.mark.parametrize("backend", [dense(), hashed(0.5)], ids=["dense", "hashed"])
@pytest.mark.parametrize("rows", [0, -3])
def test_a_feature_without_ids_is_refused_by_name(backend, rows):
    with pytest.raises(ValueError, match="C2"):
        make_bags([backend] * 2, [1000, rows])


def test_features_must_agree_with_rows_in_dim_and_pooling():
    wide = Dense(embedding_dim=32, compression=1.0, accumulate="sorted")
    with pytest.raises(ValueError, match=r"embedding_dim.*\[16, 32\]"):
        EmbeddingBags({"C1": dense(), "C2": wide}, {"C1": 5, "C2": 5}, pooling="sum", seed=0)
    with pytest.raises(ValueError, match="C2"):
        EmbeddingBags({"C1": dense()}, {"C1": 5, "C2": 5}, pooling="sum", seed=0)
    with pytest.raises(ValueError, match="pooling='summ' is not one of sum, mean, max"):
        EmbeddingBags({"C1": dense()}, {"C1": 5}, pooling="summ", seed=0)
    with pytest.raises(ValueError, match="feature"):
        EmbeddingBags({}, {}, pooling="sum", seed=0)

"""compression=r is r of the dense bytes within one percent, or is refused with the smallest that can be had."""

import dataclasses
import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from builders import DIM, YAMLS, dense, each_choice, each_yaml, from_yaml, hashed, make_bags, named, slots_of
from omegaconf import OmegaConf

from embeddings import Bloom, Dense, EmbeddingBags, Fast, Hashed

CRITEO_KAGGLE = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306,
                 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]  # fmt: skip


@cache
def compressed(yaml: Path) -> bool:
    """Whether compression applies to this backend: dense and fast keep every row."""
    backend = from_yaml(yaml, compression=0.5)
    return slots_of(backend, {"C1": 10_000}) != slots_of(from_yaml(yaml, compression=0.25), {"C1": 10_000})


def reached(backend, rows: dict[str, int]) -> float:
    slots = list(slots_of(backend, rows).values())
    size = sum(map(backend.feature_bytes, slots))
    if getattr(backend, "shared", False):  # one pool, which every feature says it keeps
        assert len(set(slots)) == 1
        size -= (len(rows) - 1) * slots[0][0] * backend.block * 4
    return size / sum(map(backend.dense_bytes, rows.values()))


@each_yaml
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.01])
def test_compression_is_reached_within_one_percent_on_criteo(yaml, ratio):
    rows = {f"C{i + 1}": n for i, n in enumerate(CRITEO_KAGGLE)}
    backend = from_yaml(yaml, compression=ratio)
    slots = slots_of(backend, rows)
    assert list(slots) == list(rows)
    if not compressed(yaml):
        assert slots == {feature: (n,) for feature, n in rows.items()}
        return
    assert reached(backend, rows) == pytest.approx(ratio, rel=0.01)
    for f in ("C3", "C12", "C24"):  # and every large feature gets its own share, not another's
        assert backend.feature_bytes(slots[f]) / backend.dense_bytes(rows[f]) == pytest.approx(ratio, rel=0.02)


@each_choice
@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.03])
def test_compression_of_allocated_tensors_is_within_one_percent(yaml, changes, ratio):
    backend = from_yaml(yaml, compression=ratio, **changes)
    bags = make_bags([backend] * 3, [3000, 5000, 40_000])
    measured = bags.num_bytes() / bags.dense_equivalent_bytes()
    if "collisions" in changes:  # ceil(n / 4) rows and 4, whatever the ratio; of half the dim each, if side by side
        ratio = 0.125 if "operation" in changes else 0.25
    assert measured == pytest.approx(ratio if compressed(yaml) else 1, rel=0.01)


@pytest.mark.parametrize("partitions", [2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 9973, 10_131_227])
def test_slots_of_every_partition_tell_all_ids_apart(partitions, n):
    for ratio in (1.0, 0.5, 0.1, 0.01):
        try:
            (slots,) = slots_of(named("qr", compression=ratio, partitions=partitions), {"C1": n}).values()
        except ValueError:
            continue
        assert len(slots) == partitions and math.prod(slots) >= n


@pytest.mark.parametrize("n", [10_000, 286_181, 10_131_227])
def test_the_smallest_quotients_and_remainders_are_two_square_roots(n):
    with pytest.raises(ValueError, match=r"smallest it can is ([\d.e-]+)") as error:
        slots_of(named("qr", compression=1e-7), {"C1": n})
    smallest = float(re.search(r"smallest it can is ([\d.e-]+)", str(error.value)).group(1))
    table_bytes = 2 * 9 * 8 / (n * DIM * 4)
    assert smallest - table_bytes == pytest.approx(2 * n**-0.5, rel=0.01)


@pytest.mark.parametrize("changes", [{"operation": "concat"}, {"operation": "concat", "dims": [12, 4]}])
def test_no_more_than_every_row_of_the_first_part_can_be_kept(changes):
    for ratio in (0.8, 1.0):
        with pytest.raises(ValueError, match="cannot reach it for C1"):
            slots_of(named("qr", compression=ratio, **changes), {"C1": 10_000})


def test_a_ratio_too_large_for_16_bits_is_refused_with_the_largest():
    with pytest.raises(ValueError, match=r"largest it can is 0\.5003, the nearest 0\.5003"):
        slots_of(named("qr", compression=1.0, precision="bf16"), {"C1": 10_000})
    slots_of(named("qr", compression=0.5, precision="bf16"), {"C1": 10_000})


def test_some_yaml_compresses_and_some_does_not():
    assert {compressed(yaml) for yaml in YAMLS} == {True, False}


@pytest.mark.parametrize("block", [1, 8, 16])
def test_an_unreachable_ratio_is_refused_with_the_smallest_that_works(block):
    rows = {"C1": 3000, "C2": 5000, "C3": 4}
    with pytest.raises(ValueError, match=r"compression=1e-05: .*smallest it can is ([\d.e-]+)") as error:
        slots_of(hashed(0.00001, block), rows)
    smallest = float(re.search(r"smallest it can is ([\d.e-]+)", str(error.value)).group(1))
    assert smallest < 0.001
    assert reached(hashed(smallest, block), rows) == pytest.approx(smallest, rel=0.01)


@each_choice
def test_the_smallest_ratio_that_a_refusal_names_can_be_had(yaml, changes):
    if not compressed(yaml) or "collisions" in changes:
        return
    rows = {"C1": 3000, "C2": 5000, "C3": 40}
    with pytest.raises(ValueError, match=f"compression=1e-05: embedding={yaml.stem} cannot") as error:
        slots_of(from_yaml(yaml, compression=0.00001, **changes), rows)
    smallest = float(re.search(r"smallest it can is ([\d.e-]+)", str(error.value)).group(1))
    assert reached(from_yaml(yaml, compression=smallest, **changes), rows) == pytest.approx(smallest, rel=0.01)


@pytest.mark.parametrize("ratio", [0.03, 0.05, 0.1, 0.3])
def test_every_ratio_above_the_smallest_is_reached_also_beside_tiny_features(ratio):
    rows = {"C1": 100_000, **{f"C{i}": 2 for i in range(2, 1002)}}  # alone they take 0.0067
    assert reached(hashed(ratio, 1), rows) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize("compression", [0, 0.0, -5, 1.5, float("nan"), float("inf"), -0.1])
@each_yaml
def test_a_compression_outside_zero_to_one_is_refused(yaml, compression):
    with pytest.raises(Exception, match=f"compression={compression} must be in") as error:
        from_yaml(yaml, compression=compression)
    assert isinstance(error.value.__cause__ or error.value, ValueError)


@pytest.mark.parametrize("block", [0, -8, 3, 32])
def test_a_block_that_does_not_divide_the_dim_is_refused_with_those_that_do(block):
    with pytest.raises(ValueError, match=rf"block={block} .*\[1, 2, 4, 8, 16\]"):
        hashed(0.5, block)


@pytest.mark.parametrize("accumulate", ["", "sort", "SORTED", "row"])
def test_an_unknown_accumulate_is_refused_with_those_known(accumulate):
    with pytest.raises(ValueError, match=rf"accumulate={accumulate!r}.*sorted.*atomic.*rows"):
        dense(accumulate)


def test_a_misspelt_or_leftover_key_is_refused():
    how = dict(embedding_dim=DIM, compression=0.5, accumulate="sorted", init="fair")
    with pytest.raises(TypeError, match="blok"):
        Hashed(**how, blok=8, hash="mixed", sign=False, shared=False)
    for kind in (Dense, Fast):
        with pytest.raises(TypeError, match="block"):
            kind(**how, block=8)
    with pytest.raises(TypeError, match="num_hash"):
        Bloom(**how, num_hash=2, combine="sum", hash="mixed")


REFUSED = {
    "dense": [{"accumulate": "fused"}, {"init": "zeros"}, {"embedding_dim": 0}, {"embedding_dim": -16}],
    "fast": [{"accumulate": "atomics"}, {"init": ""}, {"embedding_dim": 0}],
    "hashed": [
        *({"block": block} for block in (0, -8, 3, 32)),
        {"hash": "murmur3"},
        {"hash": "affine"},  # of single weights only
        {"hash": "affine", "block": 1, "sign": True},
        {"sign": "yes"},
        {"shared": 2},
        {"block": 8, "embedding_dim": 12},
    ],
    "bloom": [
        *({"num_hashes": k} for k in (0, -1, 33)),
        {"num_hashes": 32, "combine": "learned"},
        {"num_hashes": 25, "hash": "murmur3"},
        {"num_hashes": 24, "hash": "murmur3", "combine": "learned"},
        {"combine": "max"},
        {"hash": "affine"},
        *({"importance": share} for share in (0, 1, -0.1, 1.5, float("nan"))),
    ],
    "qr": [
        {"operation": "sub"},
        *({"partitions": p} for p in (-1, 0, 1, 33)),
        *({"collisions": c} for c in (0, -4)),
        {"collisions": 4, "partitions": 3},
        {"order": "paper"},
        {"dims": [8, 8]},  # of concat only
        *({"operation": "concat", "dims": dims} for dims in ([8, 4], [16], [16, 0], [20, -4], [4, 4, 8])),
        {"operation": "concat", "partitions": 3},
    ],
}


@pytest.mark.parametrize("name, changes", [(name, changes) for name in REFUSED for changes in REFUSED[name]])
def test_a_hyperparameter_out_of_its_range_is_refused_by_name(name, changes):
    with pytest.raises(Exception, match="|".join(f"{key}=" for key in changes)) as error:
        named(name, compression=0.5, **changes)
    assert isinstance(error.value.__cause__ or error.value, ValueError)


@pytest.mark.parametrize("num_hashes, how", [(32, {}), (31, {"combine": "learned"}), (24, {"hash": "murmur3"})])
def test_the_most_hashes_that_are_allowed_work(num_hashes, how):
    bags = make_bags([named("bloom", compression=0.5, num_hashes=num_hashes, **how)], [1000])
    assert bags.slabs[0].layout[1] == num_hashes + ("combine" in how)
    assert len(bags(torch.arange(1000)).detach().flatten(1).unique(dim=0)) == 1000


@pytest.mark.parametrize("embedding_dim", [1, 2, 3])
def test_more_hashes_than_numbers_in_a_vector_work(embedding_dim):
    backend = named("bloom", embedding_dim=embedding_dim, compression=0.5, num_hashes=5, combine="learned")
    bags = make_bags([backend], [5000])
    assert bags(torch.arange(5000)).shape == (5000, 1, embedding_dim)


@each_yaml
@pytest.mark.parametrize("rows", [0, -3])
def test_a_feature_without_ids_is_refused_by_name(yaml, rows):
    with pytest.raises(ValueError, match="C2"):
        make_bags([from_yaml(yaml, compression=0.5)] * 2, [1000, rows])


def test_features_must_agree_with_rows_in_dim_and_pooling():
    wide = named("dense", embedding_dim=32)
    with pytest.raises(ValueError, match=r"embedding_dim.*\[16, 32\]"):
        EmbeddingBags({"C1": dense(), "C2": wide}, {"C1": 5, "C2": 5}, pooling="sum", seed=0)
    with pytest.raises(ValueError, match="C2"):
        EmbeddingBags({"C1": dense()}, {"C1": 5, "C2": 5}, pooling="sum", seed=0)
    with pytest.raises(ValueError, match="pooling='summ' is not one of sum, mean, max"):
        EmbeddingBags({"C1": dense()}, {"C1": 5}, pooling="summ", seed=0)
    with pytest.raises(ValueError, match="feature"):
        EmbeddingBags({}, {}, pooling="sum", seed=0)


@each_yaml
def test_a_yaml_says_every_field_of_its_backend_and_its_default_but_for_a_dense_gradient(yaml):
    composed = from_yaml(yaml)
    assert {"_target_", "_partial_", *(f.name for f in dataclasses.fields(composed))} == set(OmegaConf.load(yaml))
    default = type(composed)(embedding_dim=DIM, compression=1.0)
    assert default.accumulate == ("atomic" if yaml.stem == "fast" else "sorted")
    assert dataclasses.replace(composed, accumulate=default.accumulate) == default

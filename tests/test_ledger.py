"""The ledger: every byte of the embeddings by feature, for every backend and optimizer of conf/."""

from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate

import embeddings
from dlrm import memory
from dlrm.average import WeightAverage
from embeddings.slab import apportion

pytestmark = pytest.mark.once
CONF = Path(__file__).parents[1] / "conf"
OPTIMIZERS = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "optimizer/embedding").glob("*.yaml")}
BACKENDS = {
    path.stem: {
        key: 8 if key == "embedding_dim" else 0.5 if key == "compression" else value
        for key, value in yaml.safe_load(path.read_text()).items()
    }
    for path in (CONF / "embedding").glob("*.yaml")
}
CHOICES = [(name, {}) for name in BACKENDS] + [
    (name, {"shared": True}) for name in BACKENDS if "shared" in BACKENDS[name]
]
ROWS = {"C1": 40, "C2": 3000, "C3": 700}
BATCH = 64


@pytest.mark.parametrize("average", [False, True], ids=["last", "average"])
@pytest.mark.parametrize("accumulate", ["rows", "sorted"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name, changes", CHOICES, ids=[name + "-shared" * bool(changes) for name, changes in CHOICES])
def test_the_ledger_of_each_feature_sums_to_what_is_held(name, changes, optimizer, accumulate, average):
    big = instantiate(BACKENDS[name] | changes | {"accumulate": accumulate})()
    small = embeddings.Dense(embedding_dim=8, compression=1.0, accumulate=accumulate)
    bags = embeddings.EmbeddingBags({"C1": small, "C2": big, "C3": big}, ROWS, pooling="sum", seed=0)
    optimizers = [instantiate(OPTIMIZERS[optimizer])(bags.parameters())]
    if average:
        optimizers.append(WeightAverage(bags.parameters()))
    bags(torch.cat([torch.randint(0, n, (BATCH,)) for n in ROWS.values()])).sum().backward()
    gradients = memory.gradient_bytes(bags.parameters())
    for each in optimizers:
        each.step()
    rows = memory.ledger(bags, optimizers, BATCH)
    planned = embeddings.EmbeddingBags(bags.table_backends(), ROWS, pooling="sum", seed=0, device="meta")
    needed = memory.needs(planned, instantiate(OPTIMIZERS[optimizer])(planned.parameters()), BATCH, averages=average)

    def total(key: str) -> int:
        return sum(row[key] for row in rows)

    assert total("bytes") == total("serving_bytes") == bags.num_bytes()
    assert total("optimizer_bytes") == sum(map(memory.optimizer_bytes, optimizers))
    assert total("checkpoint_bytes") == bags.num_bytes() + sum(map(memory.optimizer_bytes, optimizers))
    beside = [*(slab.tables for slab in bags.slabs), *([] if bags._where is None else [bags._where])]
    assert total("state_bytes") == bags.num_bytes() - total("weights") * 4 - memory.tensor_bytes(beside)
    assert bags.state_bytes() == total("state_bytes")
    assert needed == (bags.num_bytes(), total("optimizer_bytes"), total("gradient_bytes"))
    if accumulate == "sorted":
        assert total("gradient_bytes") == gradients
    else:  # ids repeat, so a batch touches fewer
        assert gradients <= total("gradient_bytes") <= sum(weight.numel() * 12 for weight in bags.parameters())
    for row in rows:
        assert row["compression"] == row["bytes"] / (ROWS[row["feature"]] * 8 * 4)
        assert row["nominal"] == (0.5 if row["feature"] != "C1" and big.compresses else 1)
    if optimizer == "adagrad" and not average:  # as many numbers of state as weights
        assert [row["optimizer_bytes"] for row in rows] == [row["weights"] * 4 for row in rows]


@pytest.mark.parametrize("averages", [False, True], ids=["last", "average"])
def test_what_is_needed_is_counted_before_it_is_held(averages):
    dense = embeddings.Dense(embedding_dim=8, compression=1.0)
    planned = embeddings.EmbeddingBags(dict.fromkeys(ROWS, dense), ROWS, pooling="sum", seed=0, device="meta")
    needed = memory.needs(planned, instantiate(OPTIMIZERS["adam"])(planned.parameters()), BATCH, averages=averages)
    size = sum(ROWS.values()) * 8 * 4
    assert needed == (planned.num_bytes(), (2 + averages) * size, size)


def test_a_sparse_gradients_most_is_what_distinct_ids_take():
    bags = embeddings.EmbeddingBags(
        {"C1": (dense := embeddings.Dense(embedding_dim=8, compression=1.0, accumulate="rows")), "C2": dense},
        {"C1": 40, "C2": 3000},
        pooling="sum",
        seed=0,
    )
    bags(torch.cat([torch.arange(BATCH) % 40, torch.arange(BATCH)])).sum().backward()
    assert memory.gradient_bytes(bags.parameters()) == (40 + BATCH) * (8 * 4 + 8)
    assert bags.gradient_bytes(BATCH) == {"C1": 40 * (8 * 4 + 8), "C2": BATCH * (8 * 4 + 8)}


def test_what_is_split_by_weights_keeps_its_sum():
    assert apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 3, "b": 3, "c": 4}
    assert apportion(7, {"a": 0, "b": 5}) == {"a": 0, "b": 7}
    assert apportion(0, {"a": 2, "b": 5}) == {"a": 0, "b": 0}

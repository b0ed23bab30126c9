"""EmbeddingBagCollection and EmbeddingCollection: TorchRec's numbers and rules on any backend, in one launch per slab.

T: TorchRec; its numbers are in oracles/torchrec_ebc.json, made by torchrec 1.8.0. Weights there are dyadic rationals,
so that sums are exact in float32 and are compared with ==. What needs torchrec itself is in test_torchrec.py.
"""

import copy
import functools
import io
import itertools
import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

import hypothesis.strategies as st
import oracle
import pytest
import torch
from builders import CHOICES, each_yaml, from_yaml, named
from hypothesis import HealthCheck, given, settings
from oracle import assert_same_bits
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn.functional import embedding_bag
from torch.utils._python_dispatch import TorchDispatchMode

from embeddings import (
    DataType,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingCollection,
    EmbeddingConfig,
    Hashed,
    KeyedJaggedTensor,
    PoolingType,
)
from embeddings.backend import PRECISIONS
from embeddings.index_map import SEED
from embeddings.ops import Combine

RECORDED = json.loads((Path(__file__).parent / "oracles/torchrec_ebc.json").read_text())
SUM, MEAN, MAX = PoolingType
HASHED = partial(Hashed, compression=0.5, block=2)
LOWEST, HIGHEST = -(2**63), 2**63 - 1


def dyadic(*shape: int, mul=37, mod=101, off=50, den=64) -> torch.Tensor:
    """The weights and gradients of the recorded numbers: ((k * mul mod mod) - off) / den, row-major."""
    k = torch.arange(torch.Size(shape).numel())
    return ((k * mul % mod - off) / den).float().reshape(shape)


def kjt(bags: dict[str, list[list[int]]], weights=None, *, ids=torch.int64, lengths=torch.int32) -> KeyedJaggedTensor:
    """The bags of ids of each feature; weights: the same, of numbers."""
    flat = [id for of_feature in bags.values() for bag in of_feature for id in bag]
    sizes = torch.tensor([len(bag) for of_feature in bags.values() for bag in of_feature], dtype=lengths)
    if weights is not None:
        weights = torch.tensor([w for of_feature in weights.values() for bag in of_feature for w in bag])
    return KeyedJaggedTensor(list(bags), torch.tensor(flat, dtype=ids), weights, lengths=sizes)


def unchecked(keys: list[str], values: list[int], lengths: list[int]) -> KeyedJaggedTensor:
    """A batch that no constructor checked, as torchrec's are not."""
    return KeyedJaggedTensor._of([torch.tensor(values), None, torch.tensor(lengths), None], keys, None)


def table(name: str, features: str = "", n: int = 20, dim: int = 4, **how) -> EmbeddingBagConfig:
    """A table read by these features, a word each."""
    return EmbeddingBagConfig(n, dim, name, feature_names=features.split(), **how)


def unpooled(name: str, features: str = "", n: int = 20, dim: int = 4, **how) -> EmbeddingConfig:
    return EmbeddingConfig(n, dim, name, feature_names=features.split(), **how)


@torch.no_grad()
def fill(collection, **rows: torch.Tensor) -> None:
    """Give dense tables these rows."""
    for name, values in rows.items():
        collection.table_weights()[name][0].copy_(values)


def slab_grads(collection) -> list[torch.Tensor]:
    return [slab.weight.grad.to_dense() for slab in collection.slabs]


def table_grads(collection, name: str) -> torch.Tensor:
    """The gradient of a dense table's rows."""
    (slab,) = (slab for slab in collection.slabs if name in slab.rows)
    return slab.arrangement.weights(slab.weight.grad.to_dense(), name)[0]


def numbers(collection, batch) -> torch.Tensor:
    """All that a collection of either kind returns, in one tensor."""
    out = collection(batch)
    return torch.cat([jt.values() for jt in out.values()]) if isinstance(out, dict) else out.values()


# --- T: TorchRec ------------------------------------------------------------------------------------------------------


def test_t1_the_tutorials_values_and_gradient_rows_are_torchrecs(device):
    known = RECORDED["tutorial"]
    names = {"product_table": "product", "user_table": "user"}
    ebc = EmbeddingBagCollection([table(name, feature, 4096, 64) for name, feature in names.items()], device=device)
    fill(ebc, product_table=dyadic(4096, 64), user_table=dyadic(4096, 64, mul=39))
    values, lengths = torch.tensor(known["values"]), torch.tensor(known["lengths"])
    batch = KeyedJaggedTensor(known["keys"], values, lengths=lengths).to(device)
    assert batch.offsets().tolist() == known["offsets"]
    out = ebc(batch)
    assert (out.keys(), out.length_per_key()) == (known["out_keys"], known["length_per_key"])
    assert out.values().tolist() == known["out"]
    out.values().backward(dyadic(2, 128, mul=13, mod=29, off=14, den=16).to(device))
    for name, rows in known["grad_nonzero_rows"].items():
        grad = table_grads(ebc, name).cpu()
        assert {str(row): grad[row].tolist() for row in grad.any(1).nonzero()[:, 0].tolist()} == rows


def test_t1_the_first_tutorials_mean_is_its_printed_one():
    known = RECORDED["seed_tutorial_embeddingbag_default_mean"]
    rows = torch.tensor(known["weights"])
    ebc = EmbeddingBagCollection([table("t", "f", *rows.shape, pooling=MEAN)])
    fill(ebc, t=rows)
    pooled = ebc(kjt({"f": known["ids"]})).values()
    torch.testing.assert_close(pooled, torch.tensor(known["pooled"]), rtol=1e-6, atol=0)
    assert pooled[0].tolist() == pytest.approx(known["printed"], abs=1e-4)


@pytest.mark.parametrize("case", ["SUM", "MEAN", "WEIGHTED_SUM"])
def test_t2_t3_shared_features_pool_and_are_named_as_torchrecs(case):
    known = RECORDED["small"]
    how = dict(n=10, pooling=MEAN if case == "MEAN" else SUM)
    tables = [table("t1", "f1 f3", dim=3, **how), table("t2", "f2 f1", dim=4, **how)]
    ebc = EmbeddingBagCollection(tables, is_weighted=case == "WEIGHTED_SUM")
    fill(ebc, t1=dyadic(10, 3), t2=dyadic(10, 4, mul=39))
    ids, lengths, weights = (torch.tensor(known[key]) for key in ("values", "lengths", "psw"))
    out = ebc(KeyedJaggedTensor(known["keys"], ids, weights, lengths=lengths))
    wanted = known[case]
    assert (out.keys(), out.length_per_key()) == (wanted["keys"], wanted["length_per_key"])
    assert out.offset_per_key() == wanted["offset_per_key"]
    if case == "MEAN":
        torch.testing.assert_close(out.values(), torch.tensor(wanted["values"]), rtol=1e-6, atol=1e-7)
    else:
        assert out.values().tolist() == wanted["values"]


def test_t2_two_features_of_a_table_read_its_rows_and_add_their_gradients():
    ebc = EmbeddingBagCollection([table("t", "a b", 5, 2)])
    assert len(ebc.slabs) == 1 and ebc.slabs[0].weight.shape == (5, 2)
    fill(ebc, t=dyadic(5, 2))
    out = ebc(kjt({"b": [[1], [3]], "a": [[1, 4], []]}))
    rows = dyadic(5, 2)
    assert out["a"].tolist() == [(rows[1] + rows[4]).tolist(), [0, 0]]
    assert out["b"].tolist() == rows[[1, 3]].tolist()
    (2 * out["a"] + 3 * out["b"]).sum().backward()
    assert table_grads(ebc, "t").tolist() == [[0, 0], [5, 5], [0, 0], [3, 3], [2, 2]]


@pytest.mark.parametrize("backend", [None, HASHED], ids=["dense", "hashed"])
def test_t2_a_feature_of_equal_tables_has_the_vectors_of_each(backend):
    how = {} if backend is None else dict(backend=backend, n=200)
    ebc = EmbeddingBagCollection([table("t", "a b", **how), table("u", "a", **how), table("v", "b", **how)])
    assert ebc.embedding_names == ["a@t", "b@t", "a@u", "b@v"]
    assert [list(slab.rows) for slab in ebc.slabs] == [["t"], ["u", "v"]]
    out = ebc(kjt({"b": [[7]], "a": [[7]]}))
    assert_same_bits(out["a@t"], out["b@t"])  # of one id
    assert not out["a@t"].equal(out["a@u"]) and not out["a@u"].equal(out["b@v"])


def test_t2_a_table_without_features_is_read_by_the_one_called_as_it():
    assert EmbeddingBagCollection([table("t"), table("u", "a")]).embedding_names == ["t", "a"]


@pytest.mark.parametrize("collection", [EmbeddingBagCollection, EmbeddingCollection])
def test_t2_vectors_of_one_name_are_refused(collection):
    with pytest.raises(ValueError, match="two features would have the vectors 'a@u'"):
        collection([table("t", "a@u a"), table("u", "a")])


@pytest.mark.parametrize("pooling", [SUM, MEAN])
def test_t3_weights_are_ignored_unless_weighted(pooling):
    ebc = EmbeddingBagCollection([table("t", "a", pooling=pooling)])
    bags = {"a": [[1, 2], [3]]}
    assert_same_bits(ebc(kjt(bags, {"a": [[9.0, 9.0], [9.0]]})).values(), ebc(kjt(bags)).values())


def test_t3_a_weighted_collection_needs_weights():
    ebc = EmbeddingBagCollection([table("t", "a")], is_weighted=True)
    assert ebc.is_weighted() and not EmbeddingBagCollection([table("t", "a")]).is_weighted()
    with pytest.raises(ValueError, match="is_weighted=True, but the batch has no weights"):
        ebc(kjt({"a": [[1, 2], [3]]}))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_t4_output_is_in_the_tables_order_for_every_order_of_the_batchs_keys(device, weighted):
    tables = [table("t", "c a", 9, 4), table("u", "b", 500, 6, backend=HASHED)]
    tables += [table("v", "d", 9, 4), table("w", "a", 9, 2, pooling=MEAN)]  # in the slab of t, and in one of its own
    ebc = EmbeddingBagCollection(tables, is_weighted=weighted, device=device)
    bags = {"a": [[1, 2], []], "b": [[3], [4, 4]], "c": [[], [8]], "d": [[0], [7]], "no table's": [[999], [-1, 77]]}
    weights = {key: [[0.5 + id % 7 for id in bag] for bag in of_key] for key, of_key in bags.items()}
    first = None
    for keys in itertools.permutations(bags):
        out = ebc(kjt({key: bags[key] for key in keys}, {key: weights[key] for key in keys}).to(device))
        assert (out.keys(), out.length_per_key()) == (["c", "a@t", "b", "d", "a@w"], [4, 4, 6, 4, 2])
        first = out.values() if first is None else first
        assert_same_bits(out.values(), first)
    scale = [1.5, 2.5] if weighted else [1, 1]
    rows = ebc.table_weights()["w"][0].detach().cpu()
    torch.testing.assert_close(first[0, -2:].cpu(), (scale[0] * rows[1] + scale[1] * rows[2]) / 2)


def test_t4_gradients_do_not_depend_on_the_order_of_the_batchs_keys():
    bags = {"a": [[1, 2], []], "b": [[3], [4, 4]], "c": [[], [8]], "z": [[999], [7]]}
    grads = []
    for keys in itertools.permutations(bags):
        torch.manual_seed(0)
        ebc = EmbeddingBagCollection([table("t", "c a"), table("u", "b", 500, backend=HASHED), table("v", "a")])
        ebc(kjt({key: bags[key] for key in keys})).values().pow(2).sum().backward()
        grads.append(slab_grads(ebc))
    assert all(grad.any() for grad in grads[0])
    for found in grads[1:]:
        for grad, wanted in zip(found, grads[0], strict=True):
            assert_same_bits(grad, wanted)


EMPTY = {"no samples": {"a": [], "b": []}, "all bags empty": {"b": [[], []], "a": [[], []]}}
each_empty = pytest.mark.parametrize("bags", EMPTY.values(), ids=EMPTY)


@each_empty
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@each_yaml
def test_t5_an_empty_batch_gives_zeros_and_trains_nothing(yaml, weighted, bags):
    backend = partial(from_yaml, yaml, compression=0.5, accumulate="auto")
    tables = [table("t", "a b", 400, 8, backend=backend), table("u", "b", 300, 8, pooling=MEAN)]
    tables += [] if weighted else [table("v", "a", 300, 8, pooling=MAX)]
    ebc = EmbeddingBagCollection(tables, is_weighted=weighted)
    out = ebc(kjt(bags, bags)).values()
    assert out.tolist() == [[0.0] * 8 * len(ebc.embedding_names)] * len(bags["a"])
    out.sum().backward()
    assert not any(grad.any() for grad in slab_grads(ebc))


@each_empty
def test_t5_an_empty_batch_has_no_unpooled_vectors(bags):
    ec = EmbeddingCollection([unpooled("t", "a b"), unpooled("u", "b")])
    out = ec(kjt(bags))
    assert list(out) == ["a", "b@t", "b@u"]
    for jt in out.values():
        assert jt.values().shape == (0, 4) and jt.lengths().tolist() == [0] * len(bags["a"])
    numbers(ec, kjt(bags)).sum().backward()
    assert not slab_grads(ec)[0].any()


@pytest.mark.parametrize("collection", [EmbeddingBagCollection, EmbeddingCollection])
def test_t6_lengths_that_are_no_multiple_of_the_keys_are_refused(collection):
    module = collection([table("t", "a b")])
    with pytest.raises(ValueError, match="multiple of the 2 keys, got 3"):
        KeyedJaggedTensor(["a", "b"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]))
    with pytest.raises(ValueError, match="2 features of 1 samples have 2 lengths, not 3"):
        module(unchecked(["a", "b"], [1, 2, 3], [1, 1, 1]))


@pytest.mark.parametrize("collection", [EmbeddingBagCollection, EmbeddingCollection])
@pytest.mark.parametrize("lengths", [[1, 1], [1, 3], [4, -1]], ids=["too few", "too many", "negative"])
def test_t6_lengths_that_do_not_cover_the_ids_are_refused(collection, lengths):
    with pytest.raises((ValueError, RuntimeError), match="offsets|sizes|sum|negative|length"):
        collection([table("t", "a b")])(unchecked(["a", "b"], [1, 2, 3], lengths))


def test_t6_a_batch_size_per_key_is_refused():
    batch = kjt({"a": [[1]], "b": [[2]]})
    batch.variable_stride_per_key = lambda: True
    with pytest.raises(ValueError, match="a batch size per key"):
        EmbeddingBagCollection([table("t", "a b")])(batch)


@pytest.mark.parametrize("collection", [EmbeddingBagCollection, EmbeddingCollection])
def test_t7_configs_are_neither_changed_nor_kept(collection):
    configs = [table("t"), table("u", "a b", data_type="FP16")]
    before = [asdict(config) for config in configs]
    module = collection(configs)
    own = module.embedding_configs() if collection is EmbeddingCollection else module.embedding_bag_configs()
    assert [asdict(config) for config in configs] == before
    own[1].feature_names.append("own")
    assert configs[1].feature_names == ["a", "b"]
    configs[1].feature_names.append("c")
    configs.append(table("v"))
    assert module.embedding_names == ["t", "a", "b"] and len(own) == 2
    assert [config.feature_names for config in own] == [["t"], ["a", "b", "own"]]


class TheirDataType(Enum):
    """As torchrec's: other members, the same words."""

    FP32 = "FP32"
    FP16 = "FP16"
    BF16 = "BF16"
    INT8 = "INT8"


@pytest.mark.parametrize("kind", [lambda word: word, DataType, TheirDataType], ids=["word", "ours", "theirs"])
@pytest.mark.parametrize("word", ["FP32", "FP16", "BF16"])
def test_t8_weights_have_the_data_type_and_vectors_are_float32(word, kind):
    ebc = EmbeddingBagCollection([table("t", "a", data_type=kind(word))])
    (weight,), rows = ebc.parameters(), torch.linspace(-1, 1, 80).view(20, 4)
    assert weight.dtype == PRECISIONS[word.lower()]
    fill(ebc, t=rows)
    out = ebc(kjt({"a": [[1, 2, 3]]})).values()
    assert out.dtype == torch.float32
    kept = rows.to(weight.dtype).float()
    assert_same_bits(out[0], (kept[1] + kept[2] + kept[3]).to(weight.dtype).float())
    out.sum().backward()
    assert weight.grad.dtype == weight.dtype and weight.grad[1:4].eq(1).all()


def test_the_backend_and_the_data_type_say_one_precision():
    def collection(data_type, **changes):
        config = table("t", "a", n=4000, data_type=data_type)
        config.backend = lambda embedding_dim: Hashed(embedding_dim=embedding_dim, compression=0.5, **changes)
        return EmbeddingBagCollection([config])

    full, half = collection("FP32"), collection("BF16")
    assert half.slabs[0].weight.numel() > 1.5 * full.slabs[0].weight.numel()  # a ratio is of float32 bytes
    assert collection("BF16", precision="bf16").slabs[0].weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="table 't': its backend has precision=bf16 and data_type=fp32"):
        collection("FP32", precision="bf16")


@pytest.mark.parametrize("wrong", ["INT8", "fp16", "", None, 16, torch.float16, TheirDataType.INT8, ["FP32"]])
@pytest.mark.parametrize("collection", [EmbeddingBagCollection, EmbeddingCollection])
def test_t8_another_data_type_is_refused(collection, wrong):
    with pytest.raises(ValueError, match="table 't': data_type=.* is not one of FP32, FP16, BF16"):
        collection([table("t", "a", data_type=wrong)])


def test_t8_tables_of_three_data_types_are_three_slabs_of_one_output():
    ebc = EmbeddingBagCollection([table(word, "a", data_type=word) for word in ("FP16", "FP32", "BF16")])
    assert [slab.weight.dtype for slab in ebc.slabs] == [torch.float16, torch.float32, torch.bfloat16]
    fill(ebc, **dict.fromkeys(["FP16", "FP32", "BF16"], dyadic(20, 4)))
    out = ebc(kjt({"a": [[1, 5]]})).to_dict()
    wanted = dyadic(20, 4)[[1, 5]].sum(0)
    assert out["a@FP16"][0].tolist() == out["a@FP32"][0].tolist() == wanted.tolist()
    assert out["a@BF16"][0].tolist() == wanted.bfloat16().tolist()


@pytest.mark.parametrize("word", ["FP16", "BF16"])
@pytest.mark.parametrize("pooling", [SUM, MEAN])
def test_t8_t9_weights_go_with_every_data_type(word, pooling):
    tables = [table("t", "a", data_type=word, pooling=pooling), table("u", "a", pooling=pooling)]
    ebc = EmbeddingBagCollection(tables, is_weighted=True)
    fill(ebc, t=dyadic(20, 4), u=dyadic(20, 4))
    batch = kjt({"a": [[1, 5]]}, {"a": [[0.5, -2.0]]})
    batch.weights().requires_grad_()
    out = ebc(batch)
    rows = dyadic(20, 4)
    wanted = (0.5 * rows[1] - 2 * rows[5]) / (2 if pooling is MEAN else 1)
    assert out["a@u"][0].tolist() == wanted.tolist()
    assert out["a@t"][0].tolist() == wanted.to(PRECISIONS[word.lower()]).tolist()
    out.values().sum().backward()
    assert batch.weights().grad.dtype == torch.float32
    wanted = 2 * rows[[1, 5]].sum(1) / (2 if pooling is MEAN else 1)
    torch.testing.assert_close(batch.weights().grad, wanted, rtol=2**-7, atol=2**-7)  # half of it through BF16


def test_t9_a_weighted_mean_is_the_weighted_sum_over_the_number_of_ids():
    ebc = EmbeddingBagCollection([table("t", "a", 5, 2, pooling=MEAN)], is_weighted=True)
    fill(ebc, t=dyadic(5, 2))
    rows = dyadic(5, 2)
    weights = [[2.0, -3.0], [], [4.0], [1.0, -1.0, 0.0, 0.0]]  # not over their sum, which may be zero
    batch = kjt({"a": [[1, 2], [], [3], [4, 0, 0, 1]]}, {"a": weights})
    batch.weights().requires_grad_()
    out = ebc(batch).values()
    wanted = [(2 * rows[1] - 3 * rows[2]) / 2, torch.zeros(2), 4 * rows[3], (rows[4] - rows[0]) / 4]
    assert out.tolist() == torch.stack(wanted).tolist()
    grad = torch.tensor([[1.0, 2.0], [8.0, 8.0], [4.0, -4.0], [-8.0, 16.0]])
    out.backward(grad)
    assert table_grads(ebc, "t").tolist() == [[2, -4], [1, 2], [-1.5, -3], [16, -16], [-2, 4]]
    dots = [
        rows[id] @ grad[b] / n for b, n, id in [(0, 2, 1), (0, 2, 2), (2, 1, 3), *((3, 4, id) for id in (4, 0, 0, 1))]
    ]
    assert batch.weights().grad.tolist() == torch.stack(dots).tolist()


# --- launches ---------------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Which of our operators were called, and the numbers that each one's output, given or returned, has."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.numbers = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.namespace == "embeddings":
            self.names.append(function.name().removeprefix("embeddings::"))
            self.numbers.append((args[0] if out is None else out).numel())
        return out


@pytest.mark.parametrize("keys", ["abcd", "dcba"], ids=["in order", "permuted"])
@pytest.mark.parametrize("collection", [EmbeddingBagCollection, EmbeddingCollection])
def test_each_group_of_tables_is_one_launch(collection, keys):
    how = [dict(n=300), dict(n=300, backend=HASHED), dict(n=400), dict(n=500, backend=HASHED)]
    module = collection([table(name, f, **h) for name, f, h in zip("tuvw", "abcd", how, strict=True)])
    with Launches() as launches:
        numbers(module, kjt({key: [[1, 2], [3]] for key in keys})).sum().backward()
    assert launches.names == ["bag_into"] * 2 + ["bag_backward"] * 2


def test_tables_share_a_launch_if_backend_pooling_and_data_type_are_equal():
    cases = [
        (1, [dict(dim=4), dict(dim=8), dict(dim=6)]),
        (2, [dict(pooling=SUM), dict(pooling=MEAN), dict(pooling="MEAN")]),
        (2, [dict(data_type="FP16"), dict(data_type="FP32"), dict()]),
        (2, [dict(backend=HASHED), dict(), dict(backend=partial(Hashed, compression=0.5, block=2))]),
        (2, [dict(backend=HASHED), dict(backend=partial(Hashed, compression=0.4, block=2)), dict(backend=HASHED)]),
        (1, [dict(n=30 + n) for n in range(20)]),
    ]
    for number, tables in cases:
        ebc = EmbeddingBagCollection([table(f"t{t}", **{"n": 300, **how}) for t, how in enumerate(tables)])
        with Launches() as launches:
            ebc(kjt({f"t{t}": [[1]] for t in range(len(tables))}))
        assert launches.names == ["bag_into"] * number == ["bag_into"] * len(ebc.slabs)


# --- every backend ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", list(PoolingType))
@each_yaml
def test_bags_of_each_backend_pool_the_vectors_that_its_table_gives_alone(yaml, pooling):
    backend = partial(from_yaml, yaml, compression=0.5, accumulate="sorted")
    tables = [
        table("t", "a b", 400, 8, backend=backend, pooling=pooling),
        table("u", "c", 300, 8),
        table("v", "b", 500, 16, backend=backend, pooling=pooling),
        table("w", "c a", 350, 8, backend=backend, pooling=pooling),
    ]
    ebc = EmbeddingBagCollection(tables)
    ids = torch.arange(300)
    bags = {"a": [[5, 5, 299], [], [0]], "b": [[1], [2, 3, 4, 0], []], "c": [[], [299, 7], [7, 8, 9]]}
    out = ebc(kjt(bags)).to_dict()
    for name, dim in zip(ebc.embedding_names, (8, 8, 8, 16, 8, 8), strict=True):
        feature, _, owner = name.partition("@")
        alone = {key: [[id] if key == feature else [] for id in ids.tolist()] for key in "abc"}
        vectors = ebc(kjt(alone)).to_dict()
        for other in vectors.keys() - {name}:  # what another feature reads is not this one's
            assert other.startswith(feature) or not vectors[other].any()
        vectors = vectors[name].detach()
        assert vectors.shape == (300, dim) and len(vectors.unique(dim=0)) > 250
        mode = "sum" if owner == "u" else pooling.name.lower()
        offsets = torch.tensor([0, *itertools.accumulate(map(len, bags[feature]))])
        flat = torch.tensor(sum(bags[feature], []))
        wanted = embedding_bag(flat, vectors, offsets, mode=mode, include_last_offset=True)
        torch.testing.assert_close(out[name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.once
@each_yaml
def test_each_backend_learns_what_a_table_of_rows_learns(yaml):
    torch.manual_seed(0)
    tables = [table("t", "a b", 300, 8, backend=partial(from_yaml, yaml, compression=0.9)), table("u", "a", 300, 8)]
    ebc = EmbeddingBagCollection(tables)
    batch = kjt({"b": [[id] for id in range(30)], "a": [[30 + id, 60 + id] for id in range(30)]})
    target = torch.randn(30, 24)
    losses = []
    for _ in range(150):
        loss = (ebc(batch).values() - target).pow(2).mean()
        for slab in ebc.slabs:
            slab.weight.grad = None
        loss.backward()
        with torch.no_grad():
            for slab in ebc.slabs:
                slab.weight -= 30 * slab.weight.grad.to_dense()
        losses.append(loss.item())
    assert losses[0] > 0.8 and losses[-1] < 0.4


# --- any collection, any batch ----------------------------------------------------------------------------------------

COMPOSED = [c for c, (_, changes) in enumerate(CHOICES) if changes.get("order") != "legacy"]


@functools.cache
def backend_of(choice: int, accumulate: str, embedding_dim: int):
    """A config's backend."""
    yaml, changes = CHOICES[choice]
    return from_yaml(yaml, embedding_dim=embedding_dim, compression=0.5, accumulate=accumulate, **changes)


def expanded(slab, weight: torch.Tensor, name: str, ids: torch.Tensor) -> torch.Tensor:
    """A table's vectors of these ids, [ids, D], by the oracle's index maps: differentiable in the slab's weight."""
    f, probes = [lookup.table for lookup in slab.arrangement.lookups].index(name), slab.layout[1]
    read = []
    for row in slab.tables[f * probes : (f + 1) * probes].tolist():
        row = oracle.Table(*row)
        chunks = [oracle.reads(row, slab.backend.index_map, id) for id in ids.tolist()]
        slots = torch.tensor([[slot for slot, _ in of_id] for of_id in chunks])  # [ids, C]
        signs = torch.tensor([[-1.0 if negative else 1.0 for _, negative in of_id] for of_id in chunks])
        places = (row.begin + slots * row.width)[..., None] + torch.arange(row.width)
        read.append((weight.view(-1)[places] * signs[..., None]).flatten(1))
    kind = slab.backend.combine_kind
    if kind == Combine.CONCAT:
        return torch.cat(read, 1)
    if kind == Combine.MULTIPLY:
        return torch.stack(read).prod(0)
    if kind == Combine.WEIGHTED:
        *read, importance = read
        read = [vectors * importance[:, k, None] for k, vectors in enumerate(read)]
    mean = getattr(slab.backend, "combine", "") == "mean"
    return sum(read) / (len(read) if mean else 1)


@st.composite
def collections_and_batches(draw, kind, *, is_weighted: bool):
    """Tables of one or two backends, and a batch for them with keys in any order, some of them nobody's."""
    choices = draw(st.lists(st.sampled_from(COMPOSED), min_size=1, max_size=2))
    accumulate = draw(st.sampled_from(["sorted", "rows", "auto"]))
    backends = [lambda embedding_dim, c=c: backend_of(c, accumulate, embedding_dim) for c in choices]
    poolings = [SUM, MEAN] if is_weighted else list(PoolingType)
    dims = st.sampled_from([16] if kind is EmbeddingCollection else [16, 32])
    tables = [
        EmbeddingBagConfig(
            draw(st.integers(300, 500)),
            16 if "dims" in CHOICES[choices[b]][1] else draw(dims),
            f"t{t}",
            feature_names=draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True)),
            backend=backends[b],
            pooling=draw(st.sampled_from(poolings)),
        )
        for t, b in enumerate(draw(st.lists(st.integers(0, len(backends) - 1), min_size=1, max_size=4)))
    ]
    torch.manual_seed(draw(st.integers(0, 99)))
    how = dict(is_weighted=True) if is_weighted else {}
    module = kind(tables, **how).double()
    read = [config.feature_names for config in tables]
    others = draw(st.lists(st.sampled_from(["x", "y"]), unique=True))
    keys = draw(st.permutations([*dict.fromkeys(sum(read, [])), *others]))
    ids_dtype, lengths_dtype = (draw(st.sampled_from([torch.int32, torch.int64])) for _ in range(2))
    wide = 2**31 - 1 if ids_dtype == torch.int32 else HIGHEST
    samples = draw(st.integers(0, 3))
    bags = {}
    for key in keys:
        readers = [config for config in tables if key in config.feature_names]
        ranged = [c.num_embeddings for c in readers if c.backend(embedding_dim=c.embedding_dim).ranged]
        id = st.integers(0, min(ranged) - 1) if ranged else st.integers(-wide - 1, wide)
        bag = st.lists(st.one_of(id, st.integers(0, 2)), max_size=5)
        bags[key] = draw(st.lists(bag, min_size=samples, max_size=samples))
    batch = kjt(bags, ids=ids_dtype, lengths=lengths_dtype)
    if is_weighted:
        dtype = draw(st.sampled_from([torch.float32, torch.float64]))
        weights = torch.randn(batch.values().numel(), dtype=dtype, requires_grad=True)
        batch = KeyedJaggedTensor(keys, batch.values(), weights, lengths=batch.lengths())
    return module, tables, batch


def any_of(kind, is_weighted=False):
    how = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    drawn = collections_and_batches(kind, is_weighted=is_weighted)
    return lambda test: settings(max_examples=40, **how)(given(drawn)(test))


def by_torch(module, tables, batch, weights) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """A plain loop over tables and features: what torch.nn makes of the tables' vectors, by embedding name, and the
    slabs' weights that these depend on."""
    leaves = [slab.weight.detach().clone().requires_grad_() for slab in module.slabs]
    slab_of = {name: s for s, slab in enumerate(module.slabs) for name in slab.rows}
    begin = dict(zip(batch.keys(), batch.offset_per_key(), strict=False))
    jagged, out = batch.to_dict(), {}
    names = iter(module.embedding_names)
    for config in tables:
        for feature in config.feature_names:
            ids, offsets = jagged[feature].values(), jagged[feature].offsets().long()
            used, places = torch.cat([ids.long(), torch.tensor([0])]).unique(return_inverse=True)
            s = slab_of[config.name]
            vectors = expanded(module.slabs[s], leaves[s], config.name, used)
            if isinstance(module, EmbeddingCollection):
                out[next(names)] = nn.functional.embedding(places[:-1], vectors)
                continue
            own = None if weights is None else weights[begin[feature] :][: len(ids)].double()
            mode = config.pooling.name.lower() if own is None else "sum"
            pooled = embedding_bag(places[:-1], vectors, offsets, None, 2, False, mode, False, own, True)
            if own is not None and config.pooling is MEAN:
                pooled = pooled / offsets.diff().clamp(min=1)[:, None]
            out[next(names)] = pooled
    return out, leaves


def assert_equals_torch(module, tables, batch) -> None:
    weights = None if batch.weights_or_none() is None else batch.weights().detach().clone().requires_grad_()
    wanted, leaves = by_torch(module, tables, batch, weights)
    out = module(batch)
    found = {name: jt.values() for name, jt in out.items()} if isinstance(out, dict) else out.to_dict()
    assert list(found) == list(wanted)
    tight = dict(rtol=1e-12, atol=1e-12)
    grads = {name: torch.randn_like(vectors) for name, vectors in wanted.items()}
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **tight)
    sum((found[name] * grad).sum() for name, grad in grads.items()).backward()
    sum((wanted[name] * grad).sum() for name, grad in grads.items()).backward()
    for grad, leaf in zip(slab_grads(module), leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad, **tight)
    if weights is not None:
        found, wanted = batch.weights().grad, weights.grad
        wanted = torch.zeros_like(weights) if wanted is None else wanted
        if weights.dtype == torch.float64:
            torch.testing.assert_close(found, wanted, **tight)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@any_of(EmbeddingBagCollection)
def test_any_collection_of_bags_equals_a_loop_over_torch_embedding_bags(drawn):
    assert_equals_torch(*drawn)


@any_of(EmbeddingBagCollection, is_weighted=True)
def test_any_weighted_collection_equals_a_loop_over_torch_embedding_bags(drawn):
    assert_equals_torch(*drawn)


@any_of(EmbeddingCollection)
def test_any_collection_of_ids_equals_a_loop_over_torch_embeddings(drawn):
    module, tables, batch = drawn
    assert_equals_torch(module, tables, batch)
    for jt, feature in zip(module(batch).values(), sum((c.feature_names for c in tables), []), strict=True):
        assert jt.lengths().tolist() == batch[feature].lengths().tolist()


# --- what a collection keeps ------------------------------------------------------------------------------------------


def mixed(kind=EmbeddingBagCollection, seed: int = 0, **how):
    """Five tables, of which three are compressed; seed: of weights and hashes."""
    torch.manual_seed(seed)
    bloom, qr = (partial(named, name, compression=0.5, accumulate="sorted") for name in ("bloom", "qr"))
    names = zip("tuvwx", ["a b", "c", "a", "b d", "c"], [None, HASHED, bloom, qr, None], strict=True)
    configs = [(name, f, {} if backend is None else {"backend": backend}) for name, f, backend in names]
    return kind([table(name, f, 400, 8, **backend) for name, f, backend in configs], **how)


BATCH = {"d": [[3], [399, 4]], "a": [[1, 2, 2], []], "c": [[], [5]], "b": [[6, 7], [8]]}
ORDERED = {key: BATCH[key] for key in "abcd"}


def larger(bags: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
    """Two samples more."""
    return {key: [*of_key, [1, 2, 3], [9]] for key, of_key in bags.items()}


each_kind = pytest.mark.parametrize("kind", [EmbeddingBagCollection, EmbeddingCollection], ids=["EBC", "EC"])


def after_load(module, other):
    module.load_state_dict(other.state_dict())
    return module


def after_assign(module, other):
    module.load_state_dict(other.state_dict(), assign=True)
    return module


def after_save(module, other):
    buffer = io.BytesIO()
    torch.save(other.state_dict(), buffer)
    buffer.seek(0)
    module.load_state_dict(torch.load(buffer, weights_only=True))
    return module


def after_copy(module, other):
    return after_load(copy.deepcopy(module), other)


def after_double(module, other):
    return after_load(module.to(torch.float64), other.to(torch.float64))


def after_meta(module, other):
    return after_assign(module.to("meta"), other)


CHANGES = [after_load, after_assign, after_save, after_copy, after_double, after_meta]


@pytest.mark.parametrize("change", CHANGES)
@each_kind
def test_state_of_another_collection_replaces_its_hashes_and_weights(kind, change):
    module, other = mixed(kind, 0), mixed(kind, 1)
    seeds = [slab.tables[:, SEED] for slab in module.slabs]
    assert not any(own.equal(slab.tables[:, SEED]) for own, slab in zip(seeds[1:4], other.slabs[1:4], strict=True))
    before = [numbers(module, kjt(bags)) for bags in (BATCH, ORDERED)]  # that a cache could remember
    changed = change(module, other)
    for bags, old in zip((BATCH, ORDERED), before, strict=True):
        wanted = numbers(other, kjt(bags))
        assert not wanted.equal(old)
        assert_same_bits(numbers(changed, kjt(bags)), wanted)


@pytest.mark.parametrize("backend", [{}, {"backend": HASHED}], ids=["dense", "hashed"])
@pytest.mark.parametrize(
    "theirs, words",
    [({"b": 900, "a": 900}, "'b' has another place here"), ({"b": 900, "a": 800}, "for '.': here it is")],
)
def test_state_of_tables_in_another_order_is_refused(backend, theirs, words):
    def make(sizes):
        return EmbeddingBagCollection([EmbeddingBagConfig(n, 4, name, **backend) for name, n in sizes.items()])

    ours, state = make({key: theirs[key] for key in sorted(theirs)}), make(theirs).state_dict()
    before = ours.slabs[0].weight.detach().clone()
    with pytest.raises(RuntimeError, match=rf"slabs\.0: this checkpoint is not read as here: .*{words}"):
        ours.load_state_dict(state)
    assert ours.slabs[0].weight.equal(before)


@each_kind
def test_a_copy_shares_nothing(kind):
    module = mixed(kind)
    before = numbers(module, kjt(BATCH)).detach()
    twin = copy.deepcopy(module)
    assert_same_bits(numbers(twin, kjt(BATCH)), before)
    twin.reset_parameters()
    assert not numbers(twin, kjt(BATCH)).equal(before)
    assert_same_bits(numbers(module, kjt(BATCH)), before)


@each_kind
def test_float64_vectors_are_the_float32_ones_to_float32(kind):
    module = mixed(kind)
    before = numbers(module, kjt(BATCH)).detach()
    after = numbers(module.to(torch.float64), kjt(BATCH))
    assert after.dtype == torch.float64
    torch.testing.assert_close(after.float(), before, rtol=1e-6, atol=1e-7)


@each_kind
def test_batches_without_gradients_leave_nothing_that_training_cannot_use(kind):
    module = mixed(kind)
    with torch.inference_mode():
        before = numbers(module, kjt(BATCH))
    out = numbers(module, kjt(BATCH))
    assert_same_bits(out, before.clone())
    out.sum().backward()
    assert all(grad.any() for grad in slab_grads(module))


@each_kind
def test_everything_that_is_kept_is_in_the_state_dict_and_counted(kind):
    module = mixed(kind)
    module(kjt(BATCH))
    kept = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = module.state_dict()
    assert state.keys() == kept.keys() and all(state[name].data_ptr() == kept[name].data_ptr() for name in kept)
    weights = {id(part): part.numel() for parts in module.table_weights().values() for part in parts}
    # of the lookups: t 2, u 1, v 1 and x 1 of a probe each, v and w of two hashes
    probes = {"t": 2, "u": 1, "v": 2, "w": 4, "x": 1}
    num_bytes = sum(weights.values()) * 4 + sum(probes.values()) * 9 * 8
    assert sum(t.numel() * t.element_size() for t in kept.values()) == num_bytes
    for name, backend in module.table_backends().items():
        numel = sum(part.numel() for part in module.table_weights()[name])
        wanted = (0.5 if backend.compresses else 1) * 400 * 8
        assert numel == pytest.approx(wanted, rel=0.03)  # of a table without the bytes of its probes


def test_table_weights_are_views_of_what_is_looked_up():
    ebc = mixed()
    with torch.no_grad():
        for parts in ebc.table_weights().values():
            for part in parts:
                part.fill_(2)
    assert list(ebc.table_weights()) == list(ebc.table_backends()) == list("tuvwx")
    out = {name: vectors[0, 0].item() for name, vectors in ebc(kjt({key: [[1]] for key in "abcd"})).to_dict().items()}
    assert out == {"a@t": 2, "b@t": 2, "c@u": 2, "a@v": 4, "b@w": 4, "d": 4, "c@x": 2}  # sums of two and products


# --- devices ----------------------------------------------------------------------------------------------------------


@each_kind
def test_device_is_the_argument_or_the_contexts(kind):
    with torch.device("meta"):
        on_meta, on_cpu = mixed(kind), mixed(kind, device="cpu")
    assert on_meta.device == mixed(kind, device="meta").device == torch.device("meta")
    assert on_cpu.device == mixed(kind).device == mixed(kind, device=torch.device("cpu")).device == torch.device("cpu")
    for module in (on_meta, on_cpu):
        assert {t.device for t in [*module.parameters(), *module.buffers()]} == {module.device}
    assert_same_bits(numbers(on_cpu, kjt(BATCH)), numbers(mixed(kind), kjt(BATCH)))


@each_kind
def test_a_default_device_does_not_change_a_forward(kind):
    module, batch = mixed(kind), kjt(BATCH)
    wanted = numbers(mixed(kind), batch)
    with torch.device("meta"):
        assert_same_bits(numbers(module, batch), wanted)


@each_kind
def test_a_collection_on_meta_is_whole_after_to_empty_and_reset(kind):
    wanted, module = mixed(kind), mixed(kind, device="meta")
    module.to_empty(device="cpu")
    for t in [*module.parameters(), *module.buffers()]:
        t.data.fill_(77)  # what memory may hold
    module.reset_parameters()
    for slab, other in zip(module.slabs, wanted.slabs, strict=True):
        assert slab.tables.equal(other.tables)  # of the same hashes
        assert 0 < slab.weight.abs().max() <= 2 * other.weight.abs().max() and len(slab.weight.unique()) > 100
    assert numbers(module, kjt(BATCH)).isfinite().all()


@pytest.mark.parametrize("assign", [True, False])
@each_kind
def test_a_checkpoint_alone_makes_a_collection_on_meta_whole(kind, assign):
    wanted, module = mixed(kind), mixed(kind, seed=1, device="meta")
    (module if assign else module.to_empty(device="cpu")).load_state_dict(wanted.state_dict(), assign=assign)
    assert_same_bits(numbers(module, kjt(BATCH)), numbers(wanted, kjt(BATCH)))


def test_a_fake_batch_leaves_nothing_that_a_real_one_reads():
    module = mixed()
    wanted = numbers(copy.deepcopy(module), kjt(BATCH))
    with FakeTensorMode(allow_non_fake_inputs=True):
        module(kjt(BATCH))
    assert_same_bits(numbers(module, kjt(BATCH)), wanted)


def test_vectors_on_meta_have_their_shape():
    out = mixed(device="meta")(kjt(BATCH).to("meta"))
    assert out.values().shape == (2, 56) and out.values().is_meta


# --- initial weights --------------------------------------------------------------------------------------------------


@each_kind
def test_one_seed_gives_the_same_weights_and_hashes_and_another_others(kind):
    first, again, other = (mixed(kind, seed).state_dict() for seed in (3, 3, 4))
    for key, value in first.items():
        assert value.equal(again[key])
        assert not value.equal(other[key])


@each_kind
def test_reset_draws_other_weights_which_one_seed_repeats(kind):
    module = mixed(kind)
    states = [copy.deepcopy(module.state_dict())]
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        module.reset_parameters()
        states.append(copy.deepcopy(module.state_dict()))
    for key in states[0]:
        hashes = key.endswith("tables")  # which stay
        assert states[1][key].equal(states[2][key])
        assert states[1][key].equal(states[0][key]) == states[1][key].equal(states[3][key]) == hashes


def test_weights_begin_as_the_backend_says_if_nothing_else_is_said():
    ebc = EmbeddingBagCollection([table("t", n=10_000, dim=8), table("u", n=100, dim=8)])
    for name, bound in {"t": 0.01, "u": 0.1}.items():
        (rows,) = ebc.table_weights()[name]
        assert rows.abs().max() <= bound and rows.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("device", [None, "meta"])
@each_kind
def test_init_fn_is_given_the_rows_of_its_own_table(kind, device):
    given = []

    def init(rows):
        given.append(tuple(rows.shape))
        rows.copy_(dyadic(*rows.shape))

    tables = [table("t", "a", 6, 4), table("u", "b", 5, 4, init_fn=init), table("v", "c", 7, 4)]
    torch.manual_seed(0)
    module = kind(tables, device=device)
    if device == "meta":
        assert not given
        module.to_empty(device="cpu").reset_parameters()
    assert given == [(5, 4)]
    weights = module.table_weights()
    assert weights["u"][0].equal(dyadic(5, 4))
    assert weights["t"][0].abs().max() <= 6**-0.5 and weights["v"][0].abs().max() <= 7**-0.5 < dyadic(7, 4).abs().max()
    module.reset_parameters()
    assert given == [(5, 4)] * 2 and module.table_weights()["u"][0].equal(dyadic(5, 4))


def test_init_fn_is_given_every_slice_of_a_compressed_table():
    given = []
    ebc = EmbeddingBagCollection([table("t", n=400, dim=8, backend=partial(named, "qr"), init_fn=given.append)])
    assert [part.shape for part in given] == [part.shape for part in ebc.table_weights()["t"]]
    assert len(given) == 2 and given[0].data_ptr() == ebc.slabs[0].weight.data_ptr()


def test_init_fn_goes_before_the_bounds():
    ebc = EmbeddingBagCollection([table("t", weight_init_min=1.0, weight_init_max=2.0, init_fn=nn.init.zeros_)])
    assert not ebc.slabs[0].weight.any()


@pytest.mark.parametrize("low, high", [(2.0, 3.0), (-1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("backend", [{}, {"backend": HASHED}], ids=["dense", "hashed"])
def test_weights_begin_between_the_bounds(backend, low, high):
    tables = [table("t", n=2000, weight_init_min=low, weight_init_max=high, **backend), table("u", n=2000, **backend)]
    ebc = EmbeddingBagCollection(tables)
    own, other = (ebc.table_weights()[name][0] for name in "tu")
    assert own.min() >= low and own.max() <= high and other.abs().max() < 0.03
    assert own.mean().item() == pytest.approx((low + high) / 2, abs=0.03)
    assert own.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.05)


@pytest.mark.parametrize(
    "bounds, low, high",
    [({"weight_init_min": 0.0}, 0.0, 0.1), ({"weight_init_max": 0.5}, -0.1, 0.5)],
    ids=["min", "max"],
)
def test_a_bound_that_is_not_given_is_one_over_the_root_of_the_rows(bounds, low, high):
    ebc = EmbeddingBagCollection([table("t", n=100, **bounds)])
    (weights,) = ebc.table_weights()["t"]
    span = high - low
    assert low <= weights.min() < low + 0.05 * span and high - 0.05 * span < weights.max() <= high


def test_a_backend_set_on_a_config_of_another_kind_is_kept():
    @dataclass
    class Theirs:
        num_embeddings: int = 1000
        embedding_dim: int = 4
        name: str = "t"
        data_type: str = "FP32"
        feature_names: list[str] = field(default_factory=list)
        weight_init_min = weight_init_max = init_fn = None
        pooling: str = "SUM"

    theirs = Theirs()
    theirs.backend = partial(Hashed, compression=0.1)
    ebc = EmbeddingBagCollection([theirs])
    assert ebc.table_backends()["t"] == Hashed(embedding_dim=4, compression=0.1)
    assert theirs.feature_names == []


def test_a_collection_on_meta_takes_no_memory():
    ebc = EmbeddingBagCollection([table("t", n=10**13)], device="meta")
    assert ebc.device.type == "meta" and ebc.table_weights()["t"][0].shape[0] == 10**13


# --- what is refused --------------------------------------------------------------------------------------------------


class TheirPooling(Enum):
    """As torchrec's."""

    MEAN = "MEAN"
    NONE = "NONE"


@each_kind
def test_tables_that_make_no_collection_are_refused(kind):
    cases = [
        ([], "at least one table"),
        ([table("t", "a"), table("u"), table("t", "b")], "2 tables have the name 't'"),
        ([table("", "a"), table("", "b")], "2 tables have the name ''"),
        ([table("t", n=0)], "table 't': num_embeddings=0 must be at least 1"),
        ([table("t", dim=0)], "embedding_dim=0 must be at least 1"),
        ([table("t", "a b a")], "table 't': feature_names=.* must differ"),
    ]
    for tables, message in cases:
        with pytest.raises(ValueError, match=message):
            kind(tables)


@pytest.mark.parametrize("wrong", ["mean", "NONE", None, 1, TheirPooling.NONE])
def test_another_pooling_is_refused(wrong):
    with pytest.raises(ValueError, match="table 'u': pooling=.* is not one of SUM, MEAN, MAX"):
        EmbeddingBagCollection([table("t"), table("u", pooling=wrong)])


def test_a_pooling_may_be_its_word_or_another_librarys():
    tables = [table("t", pooling="MEAN"), table("u", pooling=TheirPooling.MEAN), table("v", pooling=MEAN)]
    ebc = EmbeddingBagCollection(tables)
    assert len(ebc.slabs) == 1
    fill(ebc, **dict.fromkeys("tuv", dyadic(20, 4)))
    wanted = (dyadic(20, 4)[[1, 2]].sum(0) / 2).tolist()
    assert ebc(kjt({key: [[1, 2]] for key in "tuv"})).values().tolist() == [wanted * 3]


def test_maxima_have_no_weights():
    with pytest.raises(ValueError, match="table 'u': pooling=MAX has no weights"):
        EmbeddingBagCollection([table("t"), table("u", pooling="MAX")], is_weighted=True)


@each_kind
@pytest.mark.parametrize("batch, has", [(kjt({"c": [[1]], "a": [[1]]}), "c, a"), (KeyedJaggedTensor.empty(), "none")])
def test_a_feature_that_the_batch_lacks_is_named(kind, batch, has):
    with pytest.raises(KeyError, match=f"the batch has no feature '(a|b)'; it has {has}"):
        kind([table("t", "a b")])(batch)


@pytest.mark.parametrize("bad", [400, -1, HIGHEST, LOWEST])
@pytest.mark.parametrize("feature, place", [("a", 1), ("d", 3), ("c", 7)])
@each_kind
def test_an_id_out_of_range_is_named_with_its_feature_and_place(kind, feature, place, bad):
    batch = kjt({"a": [[7, 5], []], "d": [[6], [3, 3]], "b": [[399], []], "c": [[7], [5]]})
    module = kind([table("t", "d a b", 400), table("u", "c", 400)])
    module(batch)
    batch.values()[place] = bad
    with pytest.raises(RuntimeError, match=rf"feature {feature}, position {place} .* id {bad}, limit 400\b"):
        module(batch)


def test_a_features_limit_is_that_of_the_smaller_of_its_tables():
    ebc = EmbeddingBagCollection([table("t", "a", 400), table("u", "a", 300), table("v", "a", 500, backend=HASHED)])
    ebc(kjt({"a": [[299]]}))
    with pytest.raises(RuntimeError, match=r"feature a, position 0 .* id 300, limit 300\b"):
        ebc(kjt({"a": [[300]]}))


def test_ids_that_no_table_reads_may_be_anything():
    ebc = EmbeddingBagCollection([table("t", "a"), table("u", "h", 400, backend=HASHED)])
    bags = {"z": [[HIGHEST, -5]], "h": [[LOWEST, HIGHEST]], "a": [[3]]}
    assert_same_bits(ebc(kjt(bags))["a"], ebc(kjt({**bags, "z": [[]]}))["a"])


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths", [torch.int32, torch.int64])
@pytest.mark.parametrize("bags", [BATCH, ORDERED], ids=["permuted", "in order"])
@each_kind
def test_ids_and_lengths_may_be_int32_or_int64(kind, bags, ids, lengths):
    batch = kjt(bags, ids=ids, lengths=lengths)
    assert (batch.values().dtype, batch.lengths().dtype) == (ids, lengths)
    by_offsets = KeyedJaggedTensor(batch.keys(), batch.values(), offsets=batch.offsets().to(lengths))
    wanted = numbers(mixed(kind), kjt(bags, lengths=torch.int64))
    assert_same_bits(numbers(mixed(kind), batch), wanted)
    assert_same_bits(numbers(mixed(kind), by_offsets), wanted)


# --- torch.compile and torch.export -----------------------------------------------------------------------------------


class Scorer(nn.Module):
    """A model around a collection."""

    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> torch.Tensor:
        return self.embeddings(features).values().tanh()


@pytest.mark.parametrize(
    "bags, weighted",
    [(BATCH, True), pytest.param(ORDERED, False, marks=pytest.mark.once)],
    ids=["permuted, weighted", "in order"],
)
def test_compiles_without_breaks_to_the_same_vectors_and_gradients(bags, weighted):
    torch._dynamo.reset()
    model, twin = (Scorer(mixed(is_weighted=weighted)) for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (bags, larger(bags), larger(bags)):
        weights = {key: [[0.5] * len(bag) for bag in of_key] for key, of_key in batch.items()}
        out, wanted = compiled(kjt(batch, weights)), twin(kjt(batch, weights))
        assert_same_bits(out, wanted)
        out.sum().backward()
        wanted.sum().backward()
    for grad, other in zip(slab_grads(model.embeddings), slab_grads(twin.embeddings), strict=True):
        assert grad.any()
        assert_same_bits(grad, other)


def exported(model: nn.Module, batch: KeyedJaggedTensor) -> nn.Module:
    """For any number of samples and ids."""
    some = {0: torch.export.Dim.AUTO}
    return torch.export.export(model, (batch,), dynamic_shapes=([some, None, some, None],)).module()


@pytest.mark.parametrize("bags", [BATCH, ORDERED], ids=["permuted", "in order"])
def test_an_exported_program_serves_other_batches_and_leaves_the_module_whole(bags):
    model = Scorer(mixed())
    program = exported(model, kjt(bags))
    for batch in (larger(bags), bags):
        assert_same_bits(program(kjt(batch)), model(kjt(batch)))
    model(kjt(bags)).sum().backward()
    assert all(grad.any() for grad in slab_grads(model.embeddings))


class Jagged(nn.Module):
    """A model around unpooled vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = mixed(EmbeddingCollection)

    def forward(self, features: KeyedJaggedTensor) -> list[torch.Tensor]:
        return [jt.values().tanh() for jt in self.embeddings(features).values()]


@pytest.mark.parametrize("how", ["compiled", "exported"])
def test_one_program_gives_the_unpooled_vectors_of_any_lengths(how):
    torch._dynamo.reset()
    model = Jagged()
    if how == "compiled":
        program = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        program = exported(model, kjt(BATCH))
    for bags in (BATCH, {**larger(BATCH), "a": [[], [9], [], []], "b": [[], [8] * 9, [], [7]]}):
        for found, wanted in zip(program(kjt(bags).sync()), model(kjt(bags)), strict=True):
            assert_same_bits(found, wanted)


# --- EmbeddingCollection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("need_indices", [False, True])
def test_every_id_has_the_row_of_each_of_its_tables(device, need_indices):
    tables = [unpooled("t", "c a", 30, 3), unpooled("u", "b a", 40, 3)]
    ec = EmbeddingCollection(tables, device, need_indices)
    assert (ec.embedding_dim(), ec.need_indices()) == (3, need_indices)
    assert ec.embedding_names_by_table() == [["c", "a@t"], ["b", "a@u"]]
    assert [config.name for config in ec.embedding_configs()] == ["t", "u"]
    rows = {"t": dyadic(30, 3), "u": dyadic(40, 3, mul=39)}
    fill(ec, **rows)
    batch = kjt({"a": [[1, 2, 2], [], [29]], "z": [[77], [], []], "b": [[39], [0, 1], []], "c": [[], [], [3, 4]]})
    out = ec(batch.to(device))
    assert list(out) == ["c", "a@t", "b", "a@u"]
    for name, owner, ids in [("c", "t", [3, 4]), ("a@t", "t", [1, 2, 2, 29]), ("b", "u", [39, 0, 1])]:
        assert out[name].values().tolist() == rows[owner][ids].tolist()
        indices = out[name].weights_or_none()
        assert (indices.tolist() == ids) if need_indices else (indices is None)
    assert out["a@u"].values().tolist() == rows["u"][[1, 2, 2, 29]].tolist()
    assert out["a@t"].lengths().tolist() == out["a@u"].lengths().tolist() == [3, 0, 1]
    assert [part.tolist() for part in out["b"].to_dense()] == [rows["u"][[39]].tolist(), rows["u"][[0, 1]].tolist(), []]
    (out["a@t"].values().sum() + 3 * out["c"].values().sum()).backward()
    wanted = torch.zeros(30, 3).index_add(
        0, torch.tensor([1, 2, 2, 29, 3, 4]), torch.tensor([1.0] * 4 + [3] * 2)[:, None].expand(6, 3)
    )
    assert table_grads(ec, "t").tolist() == wanted.tolist()


@pytest.mark.parametrize("long", ["a", "b", "c"])
def test_features_of_very_different_lengths_keep_their_own_ids(long):
    sizes = {"a": 2, "b": 0, "c": 1, long: 5000}
    bags = {key: [list(range(n)), [n % 7] * (key == "c")] for key, n in sizes.items()}
    ec = EmbeddingCollection([unpooled("t", "b a", 5000), unpooled("u", "c", 5000)])
    out = ec(kjt(bags))
    for key, owner in {"a": "t", "b": "t", "c": "u"}.items():
        ids = bags[key][0] + bags[key][1]
        assert_same_bits(out[key].values(), ec.table_weights()[owner][0][ids])
        assert out[key].lengths().tolist() == [len(bag) for bag in bags[key]]


def test_unpooled_vectors_are_not_views_of_those_of_all_features():
    out = EmbeddingCollection([unpooled("t", "a b c")])(kjt({"a": [[1] * 9], "b": [[2] * 3], "c": [[3]]}))
    for key, n in {"a": 9, "b": 3, "c": 1}.items():
        assert out[key].values().view(-1).shape == (4 * n,)
        assert n == 1 or out[key].values().untyped_storage().nbytes() == 4 * 4 * n


def test_ids_that_no_table_reads_take_no_room():
    ec = EmbeddingCollection([unpooled("t", "a b")])
    with Launches() as launches:
        ec(kjt({"z": [[1] * 5000], "a": [[1, 2]], "b": [[3]], "y": [[4] * 5000]}))
    assert launches.numbers == [2 * 2 * 4]
    out = ec(kjt({"z": [[1], [2]], "b": [[], []], "a": [[], []]}))
    assert all(jt.values().shape == (0, 4) and jt.lengths().tolist() == [0, 0] for jt in out.values())


def test_dims_of_unpooled_tables_must_be_equal():
    with pytest.raises(ValueError, match=r"one embedding_dim, not \{'t': 4, 'u': 8\}"):
        EmbeddingCollection([unpooled("t", "a"), unpooled("u", "b", dim=8)])


def test_unpooled_vectors_of_small_floats_are_float32():
    ec = EmbeddingCollection([unpooled("t", "a", data_type="FP16"), unpooled("u", "a", data_type="BF16")])
    fill(ec, t=dyadic(20, 4), u=dyadic(20, 4))
    out = ec(kjt({"a": [[5, 6]]}))
    assert {jt.values().dtype for jt in out.values()} == {torch.float32}
    assert out["a@t"].values().tolist() == dyadic(20, 4)[[5, 6]].tolist()
    assert out["a@u"].values().tolist() == dyadic(20, 4)[[5, 6]].bfloat16().tolist()

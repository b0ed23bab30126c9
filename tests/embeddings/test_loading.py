"""load_dense: rows of torch.nn's, TorchRec's and facebookresearch/dlrm's checkpoints get where they belong, or nothing
changes."""

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from builders import DIM, each_yaml, from_yaml, make_bags, named
from oracle import assert_same_bits
from torch import nn

from embeddings import (
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    EmbeddingBags,
    EmbeddingCollection,
    EmbeddingConfig,
    FastEmbedding,
    FastMultiEmbedding,
    HashedEmbeddingBag,
    KeyedJaggedTensor,
    ScaledEmbedding,
    ScaledEmbeddingBag,
    ZeroEmbedding,
    load_dense,
)

ROWS = {"C1": 50, "C2": 30, "C3": 70, "C4": 400}


class TorchRecBags(nn.Module):
    """What torchrec's EmbeddingBagCollection calls its parameters."""

    def __init__(self, rows: dict[str, int]) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict({name: nn.EmbeddingBag(n, DIM) for name, n in rows.items()})


class TorchRecIds(nn.Module):
    """What torchrec's EmbeddingCollection calls its parameters."""

    def __init__(self, rows: dict[str, int]) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({name: nn.Embedding(n, DIM) for name, n in rows.items()})


class Dlrm(nn.Module):
    """What facebookresearch/dlrm calls its parameters."""

    def __init__(self, rows: dict[str, int]) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(n, DIM) for n in rows.values())
        self.bot_l = nn.Sequential(nn.Linear(13, DIM), nn.ReLU())
        self.top_l = nn.Sequential(nn.Linear(DIM, 1))


class Model(nn.Module):
    """A model that holds tables."""

    def __init__(self, tables: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(3, 3)
        self.sparse = nn.ModuleDict({"tables": tables})


SOURCES = {
    "torchrec bags": TorchRecBags,
    "torchrec bags in a model": lambda rows: Model(TorchRecBags(rows)),
    "torchrec ids": TorchRecIds,
    "torchrec ids in a model": lambda rows: Model(TorchRecIds(rows)),
    "dlrm": Dlrm,
    "dlrm in DataParallel": lambda rows: nn.DataParallel(Dlrm(rows)),
}
each_source = pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)


def checkpoint(source: Callable, rows: dict[str, int]) -> tuple[dict, dict[str, torch.Tensor]]:
    """A state_dict, and the rows of each table in it."""
    module = source(rows)
    tables = [part.weight.detach() for part in module.modules() if isinstance(part, (nn.EmbeddingBag, nn.Embedding))]
    return module.state_dict(), dict(zip(rows, tables, strict=True))


def bags(backends: list[str]) -> EmbeddingBags:
    """Features C1, C2, ...: of the backends' names."""
    return make_bags([named(name, compression=0.9) for name in backends], list(ROWS.values())[: len(backends)])


def collection(kind, backends: list[str]):
    """Tables C1, C2, ..., read by features called otherwise."""
    config = EmbeddingBagConfig if kind is EmbeddingBagCollection else EmbeddingConfig
    backend = {name: partial(named, name, compression=0.9) for name in backends}
    return kind(
        [
            config(n, DIM, table, feature_names=[f"feature of {table}"], backend=backend[name])
            for (table, n), name in zip(ROWS.items(), backends, strict=False)
        ]
    )


TARGETS = {
    "EmbeddingBags": bags,
    "EmbeddingBagCollection": partial(collection, EmbeddingBagCollection),
    "EmbeddingCollection": partial(collection, EmbeddingCollection),
    "a model": lambda backends: Model(bags(backends)),
}
each_target = pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)


def vectors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Table -> the vectors of all its ids, looked up."""
    if isinstance(module, Model):
        return vectors(module.sparse["tables"])
    if isinstance(module, EmbeddingBags):
        names = [row["feature"] for row in module.feature_table()]
        found = {}
        for f, name in enumerate(names):
            ids = torch.zeros(len(names), ROWS[name], dtype=torch.int64)
            ids[f] = torch.arange(ROWS[name])
            found[name] = module(ids.flatten())[:, f]
        return found
    names = list(module.table_weights())
    ids = torch.cat([torch.arange(ROWS[name]) for name in names])
    batch_size = max(ROWS.values())
    lengths = (torch.arange(batch_size) < torch.tensor([ROWS[name] for name in names])[:, None]).long()
    keys = [f"feature of {name}" for name in names]
    out = module(KeyedJaggedTensor(keys, ids, lengths=lengths.flatten()))
    if isinstance(out, dict):
        return {name: out[key].values() for name, key in zip(names, keys, strict=True)}
    return {name: out[key][: ROWS[name]] for name, key in zip(names, keys, strict=True)}


@contextmanager
def unchanged(module: nn.Module):
    """Checks that its weights, and the tables of its hashes, are the same bits afterwards."""
    before = {name: t.clone() for name, t in module.state_dict().items()}
    yield
    assert module.state_dict().keys() == before.keys()
    for name, t in module.state_dict().items():
        assert t.equal(before[name]), name


# --- what is loaded ---------------------------------------------------------------------------------------------------


@each_source
@each_target
@pytest.mark.parametrize("backends", [["dense"] * 4, ["dense", "fast"] * 2], ids=["one slab", "interleaved slabs"])
def test_every_id_of_every_table_gets_its_row(source, target, backends):
    module, (state, rows) = target(backends), checkpoint(source, ROWS)
    assert load_dense(module, state) == list(ROWS)
    found = vectors(module)
    assert found.keys() == rows.keys()
    for name, values in rows.items():
        assert_same_bits(found[name], values)


@each_source
@each_target
def test_compressed_tables_keep_their_weights(source, target):
    module = target(["hashed", "dense", "bloom", "fast"])
    before = vectors(module)
    state, rows = checkpoint(source, ROWS)
    lost = [rows[name].data_ptr() for name in ("C1", "C3")]
    state = {key: t for key, t in state.items() if t.data_ptr() not in lost}
    assert load_dense(module, state) == ["C2", "C4"]
    after = vectors(module)
    for name in ("C1", "C3"):
        assert_same_bits(after[name], before[name])
    for name in ("C2", "C4"):
        assert_same_bits(after[name], rows[name])


def test_dlrms_tables_are_numbered_by_the_order_of_the_features_and_not_of_the_words():
    rows = {f"C{f + 1}": 10 + f for f in range(12)}
    state, wanted = checkpoint(Dlrm, rows)
    state = dict(sorted(state.items()))  # emb_l.0, emb_l.1, emb_l.10, emb_l.11, emb_l.2, ...
    backends = [named(["dense", "fast", "dense"][f % 3]) for f in range(12)]
    module = make_bags(backends, list(rows.values()))
    assert load_dense(module, state)[:4] == ["C1", "C2", "C11", "C12"]
    for name, (part,) in module.table_weights().items():
        assert_same_bits(part, wanted[name])


ONE_TABLE = {
    "FastEmbedding": lambda: FastEmbedding(50, DIM),
    "ScaledEmbedding": lambda: ScaledEmbedding(50, DIM),
    "ZeroEmbedding": lambda: ZeroEmbedding(50, DIM),
    "ScaledEmbeddingBag": lambda: ScaledEmbeddingBag(50, DIM, mode="sum"),
    "a model": lambda: Model(FastEmbedding(50, DIM)),
}
each_single = pytest.mark.parametrize("make", ONE_TABLE.values(), ids=ONE_TABLE)


@each_single
@pytest.mark.parametrize(
    "state",
    [nn.EmbeddingBag(50, DIM).state_dict(), nn.Embedding(50, DIM).state_dict(), checkpoint(Dlrm, {"C1": 50})[0]],
    ids=["EmbeddingBag", "Embedding", "dlrm"],
)
def test_a_module_of_one_table_gets_the_only_table(make, state):
    module = make()
    (rows,) = (t for key, t in state.items() if key in ("weight", "emb_l.0.weight"))
    assert load_dense(module, state) == ["table"]
    own = module.sparse["tables"] if isinstance(module, Model) else module
    assert_same_bits(own(torch.arange(50)[:, None]).view(50, DIM), rows)


def test_a_module_of_many_tables_gets_the_only_table_if_it_has_only_one_of_rows():
    module = bags(["dense", "hashed", "bloom"])
    rows = nn.Embedding(50, DIM).weight.detach()
    assert load_dense(module, {"weight": rows}) == ["C1"]
    assert_same_bits(vectors(module)["C1"], rows)


def test_tables_of_other_dims_in_one_buffer_get_their_own_rows():
    module = FastMultiEmbedding([5, 9, 7], [4, 2, 6])
    rows = [torch.randn(n, dim) for n, dim in [(5, 4), (9, 2), (7, 6)]]
    assert load_dense(module, {f"emb_l.{t}.weight": part for t, part in enumerate(rows)}) == [
        "table 0",
        "table 1",
        "table 2",
    ]
    ids = torch.tensor([[4, 8, 6], [0, 3, 1]])
    assert_same_bits(module(ids), torch.cat([part[ids[:, t]] for t, part in enumerate(rows)], 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_rows_are_rounded_to_the_tables_own_type(dtype):
    state, rows = checkpoint(TorchRecBags, {"C1": 50})
    ours = EmbeddingBagCollection([EmbeddingBagConfig(50, DIM, "C1")]).to(dtype)
    load_dense(ours, state)
    assert_same_bits(ours.table_weights()["C1"][0], rows["C1"].to(dtype))
    into = EmbeddingBagCollection([EmbeddingBagConfig(50, DIM, "C1")])
    load_dense(into, {key: t.to(dtype) for key, t in state.items()})
    assert_same_bits(into.table_weights()["C1"][0], rows["C1"].to(dtype).float())


def test_parameters_stay_the_ones_that_an_optimizer_has():
    module = bags(["dense", "fast", "hashed"])
    before = dict(module.named_parameters())
    state, _ = checkpoint(TorchRecBags, {"C1": 50, "C2": 30})
    load_dense(module, state)
    for name, parameter in module.named_parameters():
        assert parameter is before[name] and parameter.requires_grad and parameter.is_leaf and parameter.grad is None
    module(torch.tensor([1, 2, 3])).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_checkpoint_is_not_changed_by_training_what_was_loaded():
    state, rows = checkpoint(TorchRecBags, {"C1": 50})
    before = rows["C1"].clone()
    module = bags(["dense"])
    load_dense(module, state)
    with torch.no_grad():
        module.slabs[0].weight.add_(1)
    assert_same_bits(rows["C1"], before)


# --- what is refused --------------------------------------------------------------------------------------------------

STATE, _ = checkpoint(TorchRecBags, ROWS)
KEY = "embedding_bags.{}.weight"


def less(*names: str) -> dict[str, torch.Tensor]:
    return {key: t for key, t in STATE.items() if key not in [KEY.format(name) for name in names]}


REFUSED = {
    "no key": ({}, "the state_dict has no tables: its keys are none"),
    "no table": ({"bot_l.0.weight": torch.ones(2)}, "has no tables: its keys are bot_l.0.weight"),
    "of a layer": (nn.Linear(DIM, 50).state_dict(), "has no tables: its keys are weight, bias"),
    "its file": ({"iter": 1, "state_dict": STATE}, "has no tables: its keys are iter, state_dict"),
    "our own state": (bags(["dense"]).state_dict(), "has no tables: its keys are slabs.0.weight, slabs.0.tables"),
    "two of one name": ({**STATE, "user.embedding_bags.C2.weight": torch.ones(30, DIM)}, "two tables 'C2'.*'user.emb"),
    "two of one number": ({f"{p}emb_l.0.weight": torch.ones(50, DIM) for p in ("", "a.")}, "two tables 'C1'"),
    "another table": ({**STATE, KEY.format("D"): torch.ones(4, DIM)}, "table 'D'; the module's are C1, C2, C3, C4$"),
    "another number": ({**checkpoint(Dlrm, ROWS)[0], "emb_l.4.weight": torch.ones(9, DIM)}, "table 'number 4'"),
    "fewer rows": ({**STATE, KEY.format("C4"): torch.ones(399, DIM)}, r"'C4' is \[399, 16\] in .* \[400, 16\] here"),
    "another dim": ({**STATE, KEY.format("C4"): torch.ones(400, 8)}, r"'C4' is \[400, 8\] in .* \[400, 16\] here"),
    "turned": ({**STATE, KEY.format("C4"): torch.ones(DIM, 400)}, r"'C4' is \[16, 400\] in .* \[400, 16\] here"),
    "not the last": (less("C4"), "has no table 'C4'; its tables are C1, C2, C3$"),
    "only the last": (less("C1", "C2", "C3"), "has no table 'C1'; its tables are C4$"),
    "only one": ({"weight": torch.ones(50, DIM)}, "has no table 'C2'; its tables are C1$"),
}  # fmt: skip


@pytest.mark.parametrize("state, message", REFUSED.values(), ids=REFUSED)
@each_target
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(target, state, message):
    module = target(["dense", "fast", "dense", "fast"])
    with unchanged(module), pytest.raises(ValueError, match=message):
        load_dense(module, state)


@pytest.mark.parametrize("name", ["hashed", "bloom", "qr"])
@each_target
def test_rows_of_a_compressed_table_are_refused_and_change_nothing(target, name):
    module = target(["dense", "fast", "dense", name])
    with unchanged(module), pytest.raises(ValueError, match=f"'C4' is {name} here: only dense and fast keep a row"):
        load_dense(module, STATE)


def test_a_hashed_module_takes_no_rows():
    module = HashedEmbeddingBag(50, DIM, compression=1.0)
    with unchanged(module), pytest.raises(ValueError, match="'table' is hashed here"):
        load_dense(module, nn.EmbeddingBag(50, DIM).state_dict())


def test_long_lists_of_names_are_shortened():
    rows = {f"T{t}": 3 for t in range(26)}
    module = bags(["dense"])
    with unchanged(module), pytest.raises(ValueError, match="'T0'; the module's are C1$"):
        load_dense(module, checkpoint(TorchRecBags, rows)[0])
    with unchanged(module), pytest.raises(ValueError, match=r"its keys are a0, a1, a2, a3, a4, \.\.\. \(26\)$"):
        load_dense(module, {f"a{t}": torch.ones(1) for t in range(26)})


def test_a_model_must_hold_one_module_of_tables():
    none = Model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Model holds 0 modules of tables: pass the one to be loaded"):
        load_dense(none, STATE)
    two = nn.ModuleList([bags(["dense"]), bags(["fast"])])
    with unchanged(two), pytest.raises(ValueError, match="ModuleList holds 2 modules of tables"):
        load_dense(two, {KEY.format("C1"): torch.ones(50, DIM)})
    load_dense(two[1], {KEY.format("C1"): torch.ones(50, DIM)})
    assert not two[0].slabs[0].weight.eq(1).any() and two[1].slabs[0].weight.eq(1).all()


@pytest.mark.parametrize("kind", [EmbeddingBagCollection, EmbeddingCollection])
def test_weights_on_meta_are_refused(kind):
    module = kind([EmbeddingBagConfig(50, DIM, "C1")], device="meta")
    with pytest.raises(ValueError, match=f"{kind.__name__} is on the meta device: first to_empty and reset_parameters"):
        load_dense(module, {KEY.format("C1"): torch.ones(50, DIM)})
    module.to_empty(device="cpu").reset_parameters()
    load_dense(module, {KEY.format("C1"): torch.ones(50, DIM)})
    assert module.slabs[0].weight.eq(1).all()


@each_yaml
def test_a_table_is_loaded_if_it_keeps_a_row_per_id_and_else_refused(yaml):
    table = EmbeddingBagConfig(300, DIM, "t", backend=partial(from_yaml, yaml, compression=0.9))
    module, state = EmbeddingBagCollection([table]), {KEY.format("t"): torch.ones(300, DIM)}
    if [part.shape for part in module.table_weights()["t"]] == [(300, DIM)]:
        assert load_dense(module, state) == ["t"] and module.slabs[0].weight.eq(1).all()
    else:
        with unchanged(module), pytest.raises(ValueError, match=f"'t' is {yaml.stem} here"):
            load_dense(module, state)

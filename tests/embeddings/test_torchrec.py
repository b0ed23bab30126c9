"""Beside torchrec itself: its batches, configs, models and checkpoints are ours, and its collections give our vectors.

make torchrec installs it; without it this file is skipped.
"""

import io
import itertools
from functools import partial

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn

import embeddings
from embeddings import QR, Bloom, Fast, Hashed, load_dense

torchrec = pytest.importorskip("torchrec")
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain  # noqa: E402
from torchrec.modules.embedding_configs import DataType, PoolingType  # noqa: E402

pytestmark = [pytest.mark.torchrec, pytest.mark.filterwarnings("ignore")]

COLLECTIONS = {
    "EBC": (torchrec.EmbeddingBagCollection, embeddings.EmbeddingBagCollection, torchrec.EmbeddingBagConfig),
    "EC": (torchrec.EmbeddingCollection, embeddings.EmbeddingCollection, torchrec.EmbeddingConfig),
}
each_kind = pytest.mark.parametrize("kind", COLLECTIONS.values(), ids=COLLECTIONS)


def kjt(bags: dict[str, list[list[int]]], weights=None, dtype=torch.int64) -> torchrec.KeyedJaggedTensor:
    """torchrec's, of the bags of ids of each feature."""
    flat = torch.tensor([id for of_feature in bags.values() for bag in of_feature for id in bag], dtype=dtype)
    lengths = torch.tensor([len(bag) for of_feature in bags.values() for bag in of_feature], dtype=torch.int32)
    return torchrec.KeyedJaggedTensor(list(bags), flat, weights, lengths=lengths, stride=len(next(iter(bags.values()))))


def table(kind, name: str, features: str = "", n: int = 20, dim: int = 4, **how):
    return kind[2](num_embeddings=n, embedding_dim=dim, name=name, feature_names=features.split(), **how)


def pair(kind, tables, **how) -> tuple[nn.Module, nn.Module]:
    """torchrec's collection, and ours with its rows."""
    theirs = kind[0](tables=tables, **how)
    ours = kind[1](tables, **how)
    assert load_dense(ours, theirs.state_dict()) == [config.name for config in tables]
    return theirs, ours


def tensors(out) -> dict[str, torch.Tensor]:
    return {name: jt.values() for name, jt in out.items()} if isinstance(out, dict) else out.to_dict()


def assert_equal_training(theirs: nn.Module, ours: nn.Module, batch) -> None:
    """Names, vectors and gradients of the tables are the same."""
    wanted, found = theirs(batch), ours(batch)
    if isinstance(wanted, dict):
        for name, jt in wanted.items():
            assert found[name].lengths().equal(jt.lengths()) and found[name].offsets().tolist() == jt.offsets().tolist()
            indices, own = jt.weights_or_none(), found[name].weights_or_none()
            assert own is None if indices is None else own.equal(indices)
    else:
        assert found.length_per_key() == wanted.length_per_key() and found.offset_per_key() == wanted.offset_per_key()
        assert found.values().dtype == wanted.values().dtype == torch.float32
    wanted, found = tensors(wanted), tensors(found)
    assert list(found) == list(wanted)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    for name in wanted:
        close(found[name], wanted[name])
    grads = {name: torch.randn_like(vectors) for name, vectors in wanted.items()}
    for out in (wanted, found):
        sum((out[name] * grad).sum() for name, grad in grads.items()).backward()
    their_tables = {key.split(".")[-2]: parameter for key, parameter in theirs.named_parameters()}
    for slab in ours.slabs:
        for name in slab.rows:
            (grad,) = slab.arrangement.weights(slab.weight.grad, name)
            own = their_tables[name].grad
            close(grad, torch.zeros_like(grad) if own is None else own)


# --- the same vectors and gradients -----------------------------------------------------------------------------------


@st.composite
def cases(draw, kind, is_weighted: bool):
    pooled = kind is COLLECTIONS["EBC"]
    poolings = [PoolingType.SUM] if is_weighted else [PoolingType.SUM, PoolingType.MEAN]
    tables = [
        table(
            kind,
            f"t{t}",
            " ".join(draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))),
            draw(st.integers(1, 30)),
            draw(st.sampled_from([3, 4, 8])) if pooled else 4,
            **({"pooling": draw(st.sampled_from(poolings))} if pooled else {}),
        )
        for t in range(draw(st.integers(1, 4)))
    ]
    features = dict.fromkeys(feature for config in tables for feature in config.feature_names)
    keys = draw(st.permutations([*features, *draw(st.lists(st.sampled_from("xy"), unique=True))]))
    samples, bags = draw(st.integers(1, 4)), {}
    for key in keys:
        limit = min([config.num_embeddings for config in tables if key in config.feature_names], default=99)
        bag = st.lists(st.integers(0, limit - 1), max_size=4)
        bags[key] = draw(st.lists(bag, min_size=samples, max_size=samples))
    batch = kjt(bags, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    torch.manual_seed(draw(st.integers(0, 99)))
    if is_weighted:
        weights = torch.randn(batch.values().numel())
        batch = torchrec.KeyedJaggedTensor(batch.keys(), batch.values(), weights, lengths=batch.lengths())
    return tables, batch


def any_of(kind: str, is_weighted: bool = False):
    how = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    return lambda test: settings(max_examples=60, **how)(given(cases(COLLECTIONS[kind], is_weighted))(test))


@any_of("EBC")
def test_any_bags_are_torchrecs(case):
    tables, batch = case
    assert_equal_training(*pair(COLLECTIONS["EBC"], tables), batch)


@any_of("EBC", is_weighted=True)
def test_any_weighted_bags_are_torchrecs(case):
    tables, batch = case
    assert_equal_training(*pair(COLLECTIONS["EBC"], tables, is_weighted=True), batch)


@any_of("EC")
def test_any_unpooled_vectors_are_torchrecs(case):
    tables, batch = case
    for need_indices in (False, True):
        theirs, ours = pair(COLLECTIONS["EC"], tables, need_indices=need_indices)
        assert ours.embedding_names_by_table() == theirs.embedding_names_by_table()
        assert_equal_training(theirs, ours, batch)


@each_kind
def test_batches_that_torchrec_made_of_others_are_taken(kind):
    theirs, ours = pair(kind, [table(kind, "t", "a b"), table(kind, "u", "c a")])
    whole = kjt({"b": [[1], [2, 3]], "a": [[4, 5], []], "z": [[7], [8]], "c": [[6], [6]]})
    a, b = (whole.split(part) for part in ([1, 3], [2, 2]))
    joined = torchrec.KeyedJaggedTensor.concat([b[1], b[0]])
    of_jagged = torchrec.KeyedJaggedTensor.from_jt_dict(whole.to_dict())
    by_offsets = torchrec.KeyedJaggedTensor.from_offsets_sync(whole.keys(), whole.values(), whole.offsets())
    for batch in (whole, whole.permute([3, 0, 1]), joined, of_jagged, by_offsets, whole.sync(), whole.unsync()):
        assert_equal_training(theirs, ours, batch)
        theirs.zero_grad()
        ours.zero_grad()
    with pytest.raises(KeyError, match="no feature 'b'; it has a, z, c"):
        ours(a[1])


@each_kind
def test_empty_bags_are_torchrecs(kind):
    theirs, ours = pair(kind, [table(kind, "t", "a b"), table(kind, "u", "a")])
    assert_equal_training(theirs, ours, kjt({"b": [[], []], "a": [[], []]}))
    assert all(vectors.shape == (0, 4) for vectors in tensors(ours(kjt({"b": [], "a": []}))).values())


# --- what is refused --------------------------------------------------------------------------------------------------


@each_kind
def test_t6_lengths_that_torchrec_accepts_for_too_many_keys_are_refused(kind):
    theirs, ours = pair(kind, [table(kind, "t", "a b")])
    batch = torchrec.KeyedJaggedTensor(["a", "b"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]))
    assert batch.stride() == 1  # and what the third length is of, nobody says
    with pytest.raises(ValueError, match="2 features of 1 samples have 2 lengths, not 3"):
        ours(batch)


@each_kind
@pytest.mark.parametrize("lengths", [[1, 1], [1, 3]], ids=["too few", "too many"])
def test_lengths_that_do_not_cover_the_ids_are_refused(kind, lengths):
    _, ours = pair(kind, [table(kind, "t", "a b")])
    with pytest.raises((ValueError, RuntimeError), match="offsets|sum"):
        ours(torchrec.KeyedJaggedTensor(["a", "b"], torch.tensor([1, 2, 3]), lengths=torch.tensor(lengths)))


@each_kind
def test_a_batch_size_per_key_is_refused(kind):
    _, ours = pair(kind, [table(kind, "t", "a b")])
    batch = torchrec.KeyedJaggedTensor(
        ["a", "b"], torch.tensor([1, 2, 3]), lengths=torch.tensor([1, 1, 1]), stride_per_key_per_rank=[[2], [1]]
    )
    with pytest.raises(ValueError, match="a batch size per key"):
        ours(batch)


@each_kind
def test_an_id_out_of_range_is_named(kind):
    _, ours = pair(kind, [table(kind, "t", "a"), table(kind, "u", "b", n=30)])
    with pytest.raises(RuntimeError, match=r"feature a, position 2 .* id 20, limit 20\b"):
        ours(kjt({"b": [[29], [1]], "a": [[20], [3]]}))


# --- configs ----------------------------------------------------------------------------------------------------------


@each_kind
def test_t7_torchrecs_configs_are_not_changed(kind):
    tables = [table(kind, "t"), table(kind, "u", "a b")]
    before = [{**vars(config), "feature_names": list(config.feature_names)} for config in tables]
    assert kind[1](tables).feature_names == ["t", "a", "b"]
    assert [vars(config) for config in tables] == before and before[0]["feature_names"] == []


@pytest.mark.parametrize("kind", [COLLECTIONS["EBC"]], ids=["EBC"])
def test_t8_bf16_is_bf16_which_torchrec_makes_fp16(kind):
    dtypes = {DataType.FP32: torch.float32, DataType.FP16: torch.float16, DataType.BF16: torch.bfloat16}
    tables = [table(kind, name.value, data_type=name) for name in dtypes]
    assert [slab.weight.dtype for slab in kind[1](tables).slabs] == list(dtypes.values())
    for data_type in set(DataType) - set(dtypes):
        with pytest.raises(ValueError, match=f"data_type={data_type.value} is not one of FP32, FP16, BF16"):
            kind[1]([table(kind, "t", data_type=data_type)])


def test_unpooled_bags_are_refused():
    kind = COLLECTIONS["EBC"]
    with pytest.raises(ValueError, match="table 't': pooling=PoolingType.NONE is not one of SUM, MEAN, MAX"):
        kind[1]([table(kind, "t", pooling=PoolingType.NONE)])


@each_kind
def test_weights_begin_as_torchrecs_configs_say(kind):
    plain, bounded, filled = (
        kind[1](
            [
                table(kind, "t", n=400, dim=32),
                table(kind, "u", n=400, dim=32, weight_init_min=2.0, weight_init_max=3.0),
                table(kind, "v", n=400, dim=32, init_fn=lambda rows: nn.init.constant_(rows, 7)),
            ]
        )
        .table_weights()
        .values()
    )
    for (rows,), low, high in ((plain, -0.05, 0.05), (bounded, 2, 3)):
        assert rows.min() >= low and rows.max() <= high
        assert rows.std().item() == pytest.approx((high - low) / 12**0.5, rel=0.03)
    assert filled[0].eq(7).all()


# --- models and checkpoints -------------------------------------------------------------------------------------------

FEATURES = ["a", "b", "c", "d", "e"]
BACKENDS = [None, Fast, partial(Hashed, compression=0.5), partial(Bloom, compression=0.5), partial(QR, compression=0.5)]


def our_tables(backends) -> list[embeddings.EmbeddingBagConfig]:
    return [
        embeddings.EmbeddingBagConfig(
            300, 8, f"t_{feature}", feature_names=[feature], pooling=pooling, **({"backend": b} if b else {})
        )
        for feature, b, pooling in zip(FEATURES, backends, itertools.cycle(embeddings.PoolingType), strict=False)
    ]


def their_tables() -> list[torchrec.EmbeddingBagConfig]:
    return [table(COLLECTIONS["EBC"], f"t_{feature}", feature, 300, 8) for feature in FEATURES]


ARCHITECTURE = dict(dense_in_features=5, dense_arch_layer_sizes=[16, 8], over_arch_layer_sizes=[16, 1])
MODELS = {
    "DLRM": partial(DLRM, **ARCHITECTURE),
    "DLRM_DCN": partial(DLRM_DCN, **ARCHITECTURE, dcn_num_layers=2, dcn_low_rank_dim=8),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def samples(n: int = 64) -> tuple[torch.Tensor, torchrec.KeyedJaggedTensor, torch.Tensor]:
    """Dense features, ids of the features in another order than the tables', and labels that depend on both."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 4, (5 * n,), generator=generator)
    ids = torch.randint(0, 300, (int(lengths.sum()),), generator=generator)
    dense = torch.randn(n, 5, generator=generator)
    batch = torchrec.KeyedJaggedTensor.from_lengths_sync(["d", "a", "e", "c", "b"], ids, lengths)
    labels = (torch.rand(n, generator=generator) < 0.5).float()
    return dense, batch, labels


@each_model
def test_torchrecs_models_learn_with_backends_of_every_kind(model):
    torch.manual_seed(0)
    ours = embeddings.EmbeddingBagCollection(our_tables(BACKENDS))
    before = {name: parameter.clone() for name, parameter in ours.named_parameters()}
    network = DLRMTrain(model(ours))
    dense, batch, labels = samples()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss, _ = network(torchrec.datasets.utils.Batch(dense, batch, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(0.69, abs=0.1) and losses[-1] < 0.05
    assert len(before) == 5 and not any(parameter.equal(before[name]) for name, parameter in ours.named_parameters())


@each_model
def test_a_checkpoint_of_torchrecs_model_gives_its_logits(model):
    torch.manual_seed(0)
    theirs = DLRMTrain(model(torchrec.EmbeddingBagCollection(tables=their_tables())))
    ours = DLRMTrain(model(embeddings.EmbeddingBagCollection(their_tables())))
    buffer = io.BytesIO()
    torch.save(theirs.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert load_dense(ours, state) == [f"t_{feature}" for feature in FEATURES]
    missing, unexpected = ours.load_state_dict(
        {k: v for k, v in state.items() if "embedding_bags" not in k}, strict=False
    )
    assert not unexpected and all(".slabs." in key for key in missing)
    dense, batch, _ = samples()
    wanted, found = theirs.model(dense, batch), ours.model(dense, batch)
    assert wanted.std() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)  # through matrix products


@each_model
def test_a_model_with_our_collection_saves_and_loads_all_of_it(model):
    first, other = (model(embeddings.EmbeddingBagCollection(our_tables(BACKENDS))) for _ in range(2))
    dense, batch, _ = samples()
    assert not other(dense, batch).equal(first(dense, batch))
    other.load_state_dict(first.state_dict())
    assert other(dense, batch).equal(first(dense, batch))


@each_kind
def test_checkpoints_of_torchrecs_collections_load(kind):
    tables = [table(kind, "t", "a"), table(kind, "u", "b", n=30)]
    theirs, ours = kind[0](tables=tables), kind[1](tables)
    for state in (theirs.state_dict(), {f"module.sparse.{key}": rows for key, rows in theirs.state_dict().items()}):
        ours.reset_parameters()
        assert load_dense(ours, state) == ["t", "u"]
        batch = kjt({"a": [[id] for id in range(20)] + [[]] * 10, "b": [[id] for id in range(30)]})
        assert_equal_training(theirs, ours, batch)
        theirs.zero_grad()
        ours.zero_grad()

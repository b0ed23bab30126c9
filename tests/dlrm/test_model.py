"""The model against brute force, closed forms and numpy."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from stand_ins import StandInBags
from torch import nn

from dlrm import linear
from dlrm.interaction import DotInteraction, LowRankCross
from dlrm.model import DLRM

MODELS = sorted((Path(__file__).parents[2] / "conf/model").glob("*.yaml"))
CARDINALITIES = {"C1": 5, "C2": 11, "C3": 4}
IDS = torch.tensor([0, 4, 10, 1, 3, 3])  # two samples, feature by feature


def make_dlrm(num_dense=3, *, embedding_dim=4, bottom_mlp=(8, 4), top_mlp=(6, 1), interaction=DotInteraction):
    bags = StandInBags(CARDINALITIES, embedding_dim=4)
    return DLRM(
        bags,
        num_dense,
        embedding_dim=embedding_dim,
        bottom_mlp=bottom_mlp,
        top_mlp=top_mlp,
        interaction=interaction,
    )


def test_dot_interaction_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    dense, embedded = torch.randn(5, 4), torch.randn(5, 3, 4)
    interaction = DotInteraction(3, 4)
    rows = []
    for b in range(5):
        vectors, row = [dense[b], *embedded[b]], dense[b].tolist()
        for i in range(len(vectors)):
            row += [sum(x * y for x, y in zip(vectors[i].tolist(), vectors[j].tolist(), strict=True)) for j in range(i)]
        rows.append(row)
    out = interaction(dense, embedded)
    torch.testing.assert_close(out, torch.tensor(rows), rtol=1e-6, atol=1e-6)
    assert out.shape[1] == interaction.out_features == 4 + 6


def test_low_rank_cross_equals_its_formula_in_numpy():
    torch.manual_seed(0)
    cross = LowRankCross(3, 4, num_layers=2, rank=3)
    for widen in cross.widen:
        nn.init.normal_(widen.bias)
    dense, embedded = torch.randn(5, 4), torch.randn(5, 3, 4)
    first = np.concatenate([dense.numpy(), embedded.numpy().reshape(5, -1)], axis=1).astype(np.float64)
    x = first
    for narrow, widen in zip(cross.narrow, cross.widen, strict=True):
        v, u, bias = (tensor.detach().double().numpy() for tensor in (narrow.weight, widen.weight, widen.bias))
        x = first * (x @ v.T @ u.T + bias) + x
    np.testing.assert_allclose(cross(dense, embedded).detach().numpy(), x, rtol=1e-5, atol=1e-5)


def test_parameter_count_of_dlrm_kaggle_is_the_closed_form():
    config = yaml.safe_load((Path(__file__).parents[2] / "conf/model/dlrm_kaggle.yaml").read_text())
    bags = StandInBags({f"C{i}": 10 for i in range(26)}, embedding_dim=16)
    bottom = [16 if width == "${model.embedding_dim}" else width for width in config["bottom_mlp"]]
    assert ([13, *bottom], config["top_mlp"]) == ([13, 512, 256, 64, 16], [512, 256, 1])
    model = DLRM(
        bags,
        13,
        embedding_dim=16,
        bottom_mlp=bottom,
        top_mlp=config["top_mlp"],
        interaction=DotInteraction,
    )
    widths = [(13, 512), (512, 256), (256, 64), (64, 16), (16 + 27 * 26 // 2, 512), (512, 256), (256, 1)]
    dense_count = sum(parameter.numel() for parameter in model.dense_parameters())
    assert dense_count == sum(n * m + m for n, m in widths)
    assert sum(parameter.numel() for parameter in model.parameters()) == dense_count + 26 * 10 * 16


@pytest.mark.parametrize("num_dense", [0, 3])
@pytest.mark.parametrize("interaction", [DotInteraction, partial(LowRankCross, num_layers=2, rank=3)])
def test_logits_equal_the_layers_applied_by_hand(num_dense, interaction):
    torch.manual_seed(0)
    model = make_dlrm(num_dense, interaction=interaction)
    dense = torch.randn(2, num_dense)
    x = dense if num_dense else torch.stack([model.bottom.value] * 2)
    for layer in (model.bottom[0], model.bottom[2]) if num_dense else ():
        x = torch.relu(x @ layer.weight.T + layer.bias)
    x = model.interaction(x, model.embeddings(IDS, None))
    x = torch.relu(x @ model.top[0].weight.T + model.top[0].bias)
    expected = (x @ model.head.weight.T + model.head.bias).flatten()
    torch.testing.assert_close(model(dense, IDS, None), expected)


@pytest.mark.parametrize("top_mlp", [(6, 1), (1,)])
def test_aligned_as_on_cuda_the_model_is_the_same(top_mlp, monkeypatch):
    torch.manual_seed(0)
    model, dense, handed = make_dlrm(top_mlp=top_mlp), torch.randn(2, 3), []
    model.top.register_forward_pre_hook(lambda module, args: handed.append(args[0].shape[1]))
    results = []
    for multiple in (1, 8):
        monkeypatch.setattr(linear, "alignment", lambda device, multiple=multiple: multiple)
        logits = model(dense, IDS, None)
        results.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    assert handed == [10, 16]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_every_parameter_of_the_model_gets_a_gradient():
    torch.manual_seed(0)
    model = make_dlrm()
    model(torch.randn(2, 3), IDS, None).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_logits_stay_float32_under_bf16_autocast():
    torch.manual_seed(0)
    model, dense = make_dlrm(), torch.randn(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(dense, IDS, None)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, logits.bfloat16().float())
    # bf16 keeps 8 significant bits through two hidden layers: 3 % of a logit of order 1
    torch.testing.assert_close(logits, model(dense, IDS, None), rtol=0.03, atol=0.03)


@pytest.mark.parametrize("num_dense", [0, 3])
def test_under_autocast_the_top_mlp_is_handed_its_own_type(num_dense):
    model, handed = make_dlrm(num_dense), []
    model.top.register_forward_pre_hook(lambda module, args: handed.append(args[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.randn(2, num_dense), IDS, None).sum().backward()
    assert handed == [torch.bfloat16]
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_initial_weights_have_the_published_spread():
    model = make_dlrm(300, bottom_mlp=(500, 4))
    weight, bias = model.bottom[0].weight, model.bottom[0].bias
    assert weight.std().item() == pytest.approx((2 / 800) ** 0.5, rel=0.02)  # 150,000 draws
    assert bias.std().item() == pytest.approx((1 / 500) ** 0.5, rel=0.15)  # 500 draws: 3.2 % standard error


def test_reset_parameters_depends_on_its_generator_only():
    model = make_dlrm(interaction=partial(LowRankCross, num_layers=1, rank=2))
    states = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        model.reset_parameters(torch.Generator().manual_seed(5))
        states.append([parameter.clone() for parameter in model.dense_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bottom_mlp": [8, 5]}, r"model.bottom_mlp=\[8, 5\].*must be 4.*model.embedding_dim"),
        ({"bottom_mlp": []}, "model.bottom_mlp"),
        ({"bottom_mlp": [0, 4]}, "model.bottom_mlp.*at least 1"),
        ({"top_mlp": [8, 2]}, r"model.top_mlp=\[8, 2\].*must be 1"),
        ({"embedding_dim": 8, "bottom_mlp": [8]}, "model.embedding_dim=8, but the embeddings have 4"),
        ({"interaction": partial(LowRankCross, num_layers=0, rank=2)}, "model.interaction.num_layers=0"),
    ],
)
def test_widths_that_cannot_work_are_refused_with_their_key(options, words):
    with pytest.raises(ValueError, match=words):
        make_dlrm(**options)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
@pytest.mark.parametrize("num_dense", [0, 13])
def test_every_model_config_makes_a_model_that_trains(path, num_dense):
    hydra, omegaconf = pytest.importorskip("hydra.utils"), pytest.importorskip("omegaconf")
    config = omegaconf.OmegaConf.create({"model": omegaconf.OmegaConf.load(path)})
    bags = StandInBags(CARDINALITIES, embedding_dim=config.model.embedding_dim)
    model = hydra.instantiate(config.model)(bags, num_dense)
    logits = model(torch.randn(2, num_dense), IDS, None)
    logits.sum().backward()
    assert logits.shape == (2,) and torch.isfinite(logits).all()
    assert all(parameter.grad is not None for parameter in model.dense_parameters())

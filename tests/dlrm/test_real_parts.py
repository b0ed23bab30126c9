"""The trainer with the embeddings, optimizers and data that ship with it, as the configuration makes them."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from stand_ins import SETTINGS

from dlrm.log import RunLog
from dlrm.settings import TrainerSettings
from dlrm.trainer import Trainer
from embeddings import EmbeddingBags

CONF = Path(__file__).parents[2] / "conf"
OVERRIDES = [
    "embedding=hashed",
    "compression=0.1",
    "data.cardinalities=[5000,7,300]",
    "data.num_samples={train: 2400, valid: 500, test: 3000}",
]


def make_trainer(folder, optimizer, max_steps):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*OVERRIDES, f"optimizer/embedding={optimizer}"])
    data = instantiate(config.data)
    data.prepare(set())
    backend = instantiate(config.embedding)()
    bags = EmbeddingBags(dict.fromkeys(data.cardinalities, backend), data.cardinalities, pooling="sum", seed=0)
    torch.manual_seed(0)
    model = instantiate(config.model)(bags, len(data.dense_names))
    folder.mkdir()
    return Trainer(
        model,
        data,
        dense_optimizer=torch.optim.Adam(model.dense_parameters(), lr=0.01),
        embedding_optimizer=instantiate(config.optimizer.embedding)(bags.parameters()),
        settings=TrainerSettings(**SETTINGS | {"epochs": 1, "decay": "constant", "max_steps": max_steps}),
        log=RunLog(folder, facts={}, hparams={}),
        identity={},
    )


OPTIMIZERS = sorted(path.stem for path in (CONF / "optimizer/embedding").glob("*.yaml"))


# the optimizers are torch's operations, the same after whichever kernels
@pytest.mark.parametrize(
    "optimizer", [OPTIMIZERS[0], *(pytest.param(x, marks=pytest.mark.once) for x in OPTIMIZERS[1:])]
)
def test_resume_is_bitwise_and_the_model_learns(tmp_path, optimizer):
    whole = make_trainer(tmp_path / "whole", optimizer, None)
    summary = whole.train()
    first = make_trainer(tmp_path / "first", optimizer, 29)
    first.train()
    second = make_trainer(tmp_path / "second", optimizer, None)
    second.resume(tmp_path / "first")
    assert second.train()["steps"] == summary["steps"] == 75
    assert summary["last"]["test/auc"] == second.log.last["test/auc"] > 0.6
    for (name, a), b in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

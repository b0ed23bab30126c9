"""A small run, ready to train."""

import pytest
import torch
from stand_ins import SETTINGS, StandInBags, StandInData

from dlrm.interaction import DotInteraction
from dlrm.log import RunLog
from dlrm.model import DLRM
from dlrm.settings import TrainerSettings
from dlrm.trainer import Trainer


@pytest.fixture
def make_trainer(tmp_path):
    """make_trainer(folder name, data=..., sparse=..., lr=..., identity=..., after=..., any of SETTINGS) -> Trainer."""

    def make(folder="run", *, data=None, sparse=False, lr=0.05, identity=None, after=None, **settings):
        data = data or StandInData()
        torch.manual_seed(0)
        bags = StandInBags(data.cardinalities, embedding_dim=4, sparse=sparse)
        model = DLRM(
            bags, len(data.dense_names), embedding_dim=4, bottom_mlp=[4], top_mlp=[8, 1], interaction=DotInteraction
        )
        model.to(settings.get("device", "cpu"))
        (tmp_path / folder).mkdir(exist_ok=True)
        log = RunLog(tmp_path / folder, facts={"seed": 0}, hparams={"lr": lr}, after=after)
        return Trainer(
            model,
            data,
            dense_optimizer=torch.optim.Adam(model.dense_parameters(), lr=lr / 5),
            embedding_optimizer=torch.optim.Adagrad(bags.parameters(), lr=lr * 10),
            settings=TrainerSettings(**SETTINGS | settings),
            log=log,
            identity=identity or {},
        )

    return make

"""What TensorBoard is given beside scalars, read back with its own reader."""

import re

import numpy as np
import pytest
import stand_ins
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.util import tensor_util

from data.batch import Batch
from dlrm.board import add_feature_histograms
from dlrm.log import RunLog
from dlrm.metrics import NUM_THRESHOLDS
from dlrm.settings import TrainerSettings
from embeddings import Dense, EmbeddingBags, Hashed

SETTINGS = {"save_checkpoint": False, "keep_best": True}


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0})
    events.Reload()
    return events


def test_every_chart_of_the_layout_has_a_curve_and_the_layout_comes_once(make_trainer):
    trainer = make_trainer(**SETTINGS, epochs=1)
    trainer.train()
    events = read_events(trainer.log.folder)
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == ["accuracy beside memory", "loss", "speed"]
    found = {
        title: {tag for tag in events.Tags()["scalars"] for pattern in patterns if re.match(pattern, tag)}
        for title, patterns in charts.items()
    }
    assert found["AUC"] == {"eval/auc", "test/auc", "test_at_best/auc"}  # not eval/auc_bound
    assert found["log loss"] == {"train/loss", "eval/log_loss", "test/log_loss"}
    memory = set.union(*(tags for title, tags in found.items() if "bytes" in title))
    assert memory == {f"memory/{name}_bytes" for name in ("embedding", "gradient", "optimizer", "peak")}
    assert found["samples per second"] == {"train/samples_per_second"}


def test_curves_come_with_each_evaluation_and_histograms_and_hparams_once(make_trainer):
    trainer = make_trainer(**SETTINGS, epochs=1)
    trainer.train()
    (path,) = trainer.log.folder.glob("events.out.tfevents.*")
    events = read_events(path)
    curves = events.Tensors("eval/precision_recall")
    assert [event.step for event in curves] == [10, 20]
    assert [event.step for event in events.Tensors("test/precision_recall")] == [20]
    *_, precision, recall = tensor_util.make_ndarray(curves[-1].tensor_proto)
    labels = next(trainer.dataset.batches("valid", 1000)).labels
    assert (recall[0], precision[0]) == (1, pytest.approx(labels.mean())) and len(recall) == NUM_THRESHOLDS
    for tag in ("vector_norm", "collision_traffic"):
        for feature in ("C1", "C2", "C3"):
            (event,) = events.Histograms(f"{tag}/{feature}")
            assert (event.step, event.histogram_value.num) == (20, 640)  # all training samples: fewer than 2048
    hparams = [tag for tag in events.summary_metadata if tag.startswith("_hparams_")]
    assert sorted(hparams) == [f"_hparams_/{name}" for name in ("experiment", "session_end_info", "session_start_info")]


def test_histograms_hold_each_features_norms_and_traffic(tmp_path):
    how = {"embedding_dim": 2, "accumulate": "sorted", "init": "fair"}
    backends = {"C1": Dense(**how), "C2": Hashed(compression=0.5, block=2, **how)}
    bags = EmbeddingBags(backends, {"C1": 5, "C2": 200}, pooling="sum", seed=0)
    weights = bags.table_weights()
    weights["C1"][0].data.copy_(torch.tensor([[3.0, 4.0]] * 4 + [[np.nan, 0.0]]))
    weights["C2"][0].data.copy_(torch.tensor([0.0, 2.0]).expand_as(weights["C2"][0]))
    C1, C2 = torch.tensor([0, 1, 1, 4]), torch.tensor([7, 7, 7, 7])
    batch = Batch(torch.empty(4, 0), torch.cat([C1, C2]), None, torch.zeros(4))
    log = RunLog(tmp_path, facts={}, hparams={})
    settings = TrainerSettings(**stand_ins.SETTINGS)
    add_feature_histograms(log, bags, batch, 3, settings)
    log.histogram("nothing", torch.tensor([np.nan, np.inf]), "tensorflow", 3)
    log.finish({})
    events = read_events(tmp_path)

    def total(tag):
        (event,) = events.Histograms(tag)
        return event.histogram_value.num, event.histogram_value.sum

    assert total("vector_norm/C1") == (3, 15.0) and total("vector_norm/C2") == (4, 8.0)  # NaN is left out
    assert total("collision_traffic/C1") == (4, 0.0) and total("collision_traffic/C2") == (4, 0.0)
    assert "nothing" not in events.Tags()["histograms"]

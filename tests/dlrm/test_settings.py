"""Settings that cannot work are refused with their key; the schedule is its formula."""

import math

import pytest
import torch
from stand_ins import SETTINGS

from dlrm.settings import TrainerSettings


def make_settings(**changes):
    return TrainerSettings(**SETTINGS | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "trainer.batch_size=0: .* at least 1"),
        ({"batch_size": 2.5}, "trainer.batch_size=2.5: must be a whole number"),
        ({"batch_size": True}, "trainer.batch_size=True"),
        ({"eval_batch_size": -1}, "trainer.eval_batch_size=-1"),
        ({"epochs": 0}, "trainer.epochs=0"),
        ({"max_steps": -5}, "trainer.max_steps=-5"),
        ({"epochs": None, "max_steps": None}, "trainer.epochs and trainer.max_steps are both null"),
        ({"eval_every": -1}, "trainer.eval_every=-1: .* at least 0"),
        ({"log_every": 0}, "trainer.log_every=0"),
        ({"warmup_steps": -1}, "trainer.warmup_steps=-1"),
        ({"average_from": 1}, "trainer.average_from=1: must be null or a share of the steps in"),
        ({"average_from": "half"}, "trainer.average_from=half"),
        ({"decay": "cosin"}, r"trainer.decay=cosin: must be one of constant, linear, cosine; cosine\?"),
        ({"precision": "fp16"}, r"precision=fp16: must be one of fp32, tf32, bf16"),
        ({"precision": "tf32"}, "precision=tf32: needs device=cuda, not cpu"),
        ({"cuda_graph": True}, "trainer.cuda_graph=true: needs device=cuda, not cpu"),
        ({"cuda_graph": "yes"}, "trainer.cuda_graph=yes: must be auto, true or false"),
        ({"device": "gpu"}, "device=gpu: must be one of cpu, cuda"),
        ({"save_checkpoint": 3}, "trainer.save_checkpoint=3: must be true or false"),
        ({"keep_best": 1}, "trainer.keep_best=1: must be true or false"),
        ({"save_checkpoint": "no"}, "trainer.save_checkpoint=no: must be true or false"),
        ({"deterministic": 1}, "deterministic=1: must be true or false"),
    ],
)
def test_bad_values_are_refused_with_key_value_and_what_is_allowed(changes, words):
    with pytest.raises(ValueError, match=words):
        make_settings(**changes)


@pytest.mark.parametrize(
    ("num_devices", "words"),
    [(1, r"GPUs here: 1 \(cuda:0\)"), (2, r"GPUs here: 2 \(cuda:0, cuda:1\)")],
)
def test_a_gpu_that_is_not_there_is_refused_with_how_many_there_are(monkeypatch, num_devices, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    with pytest.raises(ValueError, match=f"device=cuda:7: {words}"):
        make_settings(device="cuda:7")
    assert make_settings(device="cuda").device == "cuda"
    assert make_settings(device=f"cuda:{num_devices - 1}").device == f"cuda:{num_devices - 1}"


def test_misspelt_keys_are_refused():
    with pytest.raises(TypeError, match="batchsize"):
        make_settings(batchsize=3)


@pytest.mark.parametrize(("epochs", "max_steps", "num_steps"), [(2, None, 8), (2, 5, 5), (None, 50, 50), (2, 50, 8)])
def test_run_ends_at_epochs_or_max_steps_whichever_is_first(epochs, max_steps, num_steps):
    assert make_settings(batch_size=32, epochs=epochs, max_steps=max_steps).num_steps(100) == num_steps


@pytest.mark.parametrize(
    ("decay", "middle", "end"),
    [("constant", 1, 1), ("linear", 0.5, 1 - 89 / 90), ("cosine", 0.5, (1 + math.cos(math.pi * 89 / 90)) / 2)],
)
def test_learning_rate_warms_up_then_decays(decay, middle, end):
    settings = make_settings(warmup_steps=10, decay=decay)
    factors = [settings.learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1])
    assert factors[55] == pytest.approx(middle) and factors[99] == pytest.approx(end)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))

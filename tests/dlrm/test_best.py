"""The best weights: chosen on validation alone, as they were evaluated, and no checkpoint to go on from."""

import json
import math
import shutil

import pytest
import torch
from stand_ins import StandInData

from dlrm import checkpoint
from dlrm.best import BestWeights
from dlrm.report import final_table

# a rate so high that the stand-in data's 640 samples are soon fitted too well: of 60 steps, evaluated every 10, step 30
# is the best on validation (40 of the mean of the weights), on test one after it
RUN = {"lr": 0.5, "decay": "constant", "epochs": 3}
BEST_OF = [({"max_steps": 50}, 30), ({"average_from": 0}, 40)]


@pytest.mark.parametrize(("settings", "best"), BEST_OF, ids=["last weights", "their mean"])
def test_what_was_best_on_validation_is_kept_as_it_was_evaluated_and_tested(make_trainer, settings, best):
    trainer = make_trainer("whole", keep_best=True, **RUN | settings)
    summary = trainer.train()  # the same weights up to there: no evaluation changes them
    ended = make_trainer("ended", eval_every=0, **RUN | settings | {"max_steps": best}).train()["last"]
    last = summary["last"]
    assert last["test_at_best/step"] == best == summary["best_step"]["eval/auc"]
    for name in ("auc", "log_loss", "normalized_entropy", "share_of_best_auc"):
        assert last[f"test_at_best/{name}"] == ended[f"test/{name}"] != last[f"test/{name}"]
    assert last["test_at_best/auc"] < last["test/auc"]  # on test the last ones are better: chosen on it, they would be
    assert last["eval/auc"] < summary["best"]["eval/auc"] == ended["eval/auc"]
    assert trainer.dataset.batches_begun.count(("test", 0, 0)) == 2
    text = (
        f"{last['test/auc']:.5f} last; {last['test_at_best/auc']:.5f} at the best validation AUC (step {best})  (best"
    )
    assert text in final_table(summary)
    other = make_trainer("other", lr=0.1)
    counters = checkpoint.load_weights(summary["best_weights"], other.model)
    assert counters == {"step": best, "eval_auc": summary["best"]["eval/auc"]}
    assert other._evaluate("valid", exact=False).values()[0]["auc"] == summary["best"]["eval/auc"]


def test_last_weights_that_are_the_best_are_tested_once_and_kept(make_trainer):
    trainer = make_trainer(keep_best=True, **RUN | {"max_steps": 30})
    summary = trainer.train()
    assert summary["last"]["test_at_best/step"] == 30
    assert summary["last"]["test_at_best/auc"] == summary["last"]["test/auc"]
    assert trainer.dataset.batches_begun.count(("test", 0, 0)) == 1
    model = trainer.model.state_dict()
    kept = {name: tensor.clone() for name, tensor in model.items()}
    for tensor in model.values():
        tensor.fill_(9)
    checkpoint.load_weights(summary["best_weights"], trainer.model)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.items())


@pytest.mark.parametrize(
    ("data", "settings"),
    [({}, {"eval_every": 0}), ({}, {"keep_best": False}), ({"num_valid": 0}, {})],
    ids=["no evaluation on the way", "not asked for", "no validation samples"],
)
def test_without_a_choice_nothing_is_kept_or_said(make_trainer, data, settings):
    trainer = make_trainer(data=StandInData(**data), **{"keep_best": True, "epochs": 1} | settings)
    summary = trainer.train()
    assert not [tag for tag in summary["last"] if tag.startswith("test_at_best")] and summary["best_weights"] is None
    assert not (trainer.log.folder / "checkpoints/best").exists() and "last;" not in final_table(summary)


def test_a_validation_split_of_one_class_has_no_best(make_trainer):
    data = StandInData()
    data._samples["valid"].labels.zero_()
    summary = make_trainer(data=data, keep_best=True, epochs=1).train()
    assert summary["last"]["eval/auc"] is None and "test_at_best/step" not in summary["last"]
    assert summary["last"]["test/auc"] > 0.5 and summary["status"] == "completed"


def test_only_a_higher_auc_replaces_the_weights_and_nan_never_does(tmp_path):
    best, model = BestWeights(tmp_path), torch.nn.Linear(1, 1, bias=False)
    for step, auc in enumerate([math.nan, 0.6, 0.5, 0.6, 0.7, math.nan, 0.65]):
        model.weight.data.fill_(step)
        best.offer(model, auc, step)
    assert (best.step, best.auc) == (4, 0.7) and [path.name for path in tmp_path.iterdir()] == ["best"]
    best.load(model)
    assert model.weight.item() == 4


def test_a_full_disk_costs_the_best_weights_and_not_the_run(make_trainer, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    trainer = make_trainer(keep_best=True, save_checkpoint=False, **RUN | {"max_steps": 50})
    summary = trainer.train()
    assert (summary["status"], summary["best_weights"]) == ("completed", None)
    assert summary["last"]["test_at_best/step"] == 30 and summary["last"]["test_at_best/auc"] is None
    assert "the disk has 10 free" in summary["reasons"]["test_at_best/auc"] and summary["last"]["test/auc"] > 0.6
    captured = capsys.readouterr()
    assert "the weights of step 30, the best so far, are not kept" in captured.err
    assert "last; none (the weights of the best step are not there" in captured.out


def test_damaged_best_weights_cost_their_test_and_not_the_run(make_trainer):
    trainer = make_trainer(keep_best=True, **RUN | {"max_steps": 50})

    def damage(model, load=trainer.best.load):
        (trainer.best.path / "model.safetensors").write_bytes(b"x")
        load(model)

    trainer.best.load = damage
    summary = trainer.train()
    assert summary["last"]["test_at_best/auc"] is None and "damaged" in summary["reasons"]["test_at_best/auc"]
    assert summary["status"] == "completed" and summary["last"]["test/auc"] > 0.6


def test_no_weights_stay_of_a_run_that_saves_none(make_trainer):
    trainer = make_trainer(keep_best=True, save_checkpoint=False, **RUN | {"max_steps": 50})
    summary = trainer.train()
    assert summary["last"]["test_at_best/step"] == 30 and summary["best_weights"] is None
    assert not (trainer.log.folder / "checkpoints").exists()


def test_best_weights_are_nothing_to_resume_from_but_a_resumed_run_begins_with_them(make_trainer, capsys):
    first = make_trainer("first", keep_best=True, **RUN | {"max_steps": 50})
    first.train()
    assert checkpoint.find(first.log.folder).name == "step_000000050"
    second = make_trainer("second", keep_best=True, **RUN | {"max_steps": 55})
    with pytest.raises(ValueError, match=r"resume=.*/best: these are weights alone.* give the run's folder"):
        second.resume(first.best.path)
    second.resume(first.log.folder)
    summary = second.train()
    whole = make_trainer("uninterrupted", keep_best=True, **RUN | {"max_steps": 55}).train()["last"]
    for name in ("step", "auc", "log_loss"):
        assert summary["last"][f"test_at_best/{name}"] == whole[f"test_at_best/{name}"]
    assert summary["last"]["test_at_best/step"] == 30 and summary["best_weights"] == str(second.best.path)
    assert summary["samples"] == 50 * 32 + 5 * 32 and summary["train_seconds"] > first.train_seconds > 0
    assert "kept no best weights" not in capsys.readouterr().out
    steps = [
        [json.loads(line)["step"] for line in (run.log.folder / "metrics.jsonl").open()] for run in (first, second)
    ]
    assert steps == [list(range(5, 51, 5)), [55]]  # no step twice
    shutil.rmtree(first.log.folder)
    third = make_trainer("third", keep_best=True, **RUN | {"max_steps": 56})
    third.resume(second.log.folder)
    assert third.train()["last"]["test_at_best/step"] == 30  # of what the second has kept of the first


def test_a_run_that_goes_on_from_one_without_best_weights_says_so(make_trainer, capsys):
    first = make_trainer("first", **RUN | {"max_steps": 50})
    first.train()
    second = make_trainer("second", keep_best=True, **RUN)
    second.resume(first.log.folder)
    assert second.train()["last"]["test_at_best/step"] == 60
    assert "resumed at step 50 of a run that kept no best weights" in capsys.readouterr().out


class Disk:
    """Has room for so many saves of weights or of checkpoints; what is removed gives its room back."""

    def __init__(self, monkeypatch, folder, room: int):
        self.folder, self.room, self.write = folder, room, checkpoint.write
        monkeypatch.setattr(checkpoint, "write", self.save)

    def save(self, path, *content):
        if len(list(self.folder.glob("*"))) >= self.room:
            raise OSError("the disk has 0 free")
        return self.write(path, *content)


def test_on_a_disk_without_room_for_both_better_weights_replace_the_older(monkeypatch, tmp_path):
    Disk(monkeypatch, tmp_path, room=1)
    best, model = BestWeights(tmp_path), torch.nn.Linear(1, 1, bias=False)
    for step in (1, 2):
        model.weight.data.fill_(step)
        best.offer(model, step / 10, step)
    model.weight.data.fill_(9)
    best.load(model)
    assert (best.step, best.error, model.weight.item()) == (2, None, 2)


def test_the_best_weights_make_room_for_the_checkpoint(make_trainer, monkeypatch, capsys):
    trainer = make_trainer(keep_best=True, **RUN | {"max_steps": 50})
    Disk(monkeypatch, trainer.log.folder / "checkpoints", room=1)
    summary = trainer.train()
    assert checkpoint.find(trainer.log.folder).name == "step_000000050" and summary["checkpoint_error"] is None
    assert summary["last"]["test_at_best/auc"] is None and summary["best_weights"] is None
    assert "they made room for the checkpoint" in summary["reasons"]["test_at_best/auc"]
    assert "no room for the checkpoint beside the best weights" in capsys.readouterr().err

"""The same command again goes on as if nothing had been: weights, records and samples, wherever the run ended."""

import json
import os
import signal

import pytest
import torch
from stand_ins import StandInData
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_trainer import equal, read_rows, state_tensors, weights
from torch import nn

from dlrm import checkpoint
from dlrm.checkpoints import CheckpointSettings
from dlrm.guards import Guards
from dlrm.resume import check_same_run, keep_config, kept_configs, without

RUN = {"num_train": 160, "batch_size": 32, "epochs": 3}  # 15 steps
TIMES = {"train/samples_per_second", "memory/peak_bytes"}


class Death(BaseException):
    """The process ends here."""


def settings_of(every=1, **more):
    settings = {key: value for key, value in RUN.items() if key != "num_train"} | {"eval_every": 4, "log_every": 3}
    return settings | {"checkpoint": CheckpointSettings(every=every, keep=99, asynchronous=False)} | more


@pytest.fixture
def start(make_trainer, tmp_path):
    """start(folder, **settings) -> a trainer; in a folder that a run has left, one that goes on with that run."""

    def begin(folder, **settings):
        there = checkpoint.all_in(tmp_path / folder)
        has_records = (tmp_path / folder / "metrics.jsonl").exists()
        after = checkpoint.read_counters(there[0])["rows"] if there else 0 if has_records else None
        data = StandInData(num_train=RUN["num_train"])
        trainer = make_trainer(folder, data=data, after=after, **settings_of(**settings))
        if there:
            trainer.resume(trainer.log.folder)
        trainer.seen = []
        inner = trainer._train_step
        trainer._train_step = lambda batch: (trainer.seen.append(batch.ids.tolist()), inner(batch))
        return trainer

    return begin


def die_after(trainer, step):
    """Has the process end when so many steps are done, wherever in the code."""
    inner = trainer._train_step

    def train_step(batch):
        inner(batch)
        if trainer.step == step:
            raise Death

    trainer._train_step = train_step


def send_after(trainer, step, number):
    """Sends this process a signal when so many steps are done."""
    inner = trainer._train_step

    def train_step(batch):
        inner(batch)
        if trainer.step == step:
            os.kill(os.getpid(), number)

    trainer._train_step = train_step


def records(trainer):
    """Rows, and what TensorBoard shows, but for what is of the clock."""
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in read_rows(trainer)]
    events = EventAccumulator(str(trainer.log.folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in set(tags["scalars"]) - TIMES}
    return rows, scalars, {tag: [e.step for e in events.Tensors(tag)] for tag in tags["tensors"]}


def assert_same_weights(trainer, whole):
    assert equal(weights(trainer), weights(whole)) and equal(state_tensors(trainer), state_tensors(whole))


def assert_ended_alike(trainer, whole):
    assert_same_weights(trainer, whole)
    for found, expected in zip(records(trainer), records(whole), strict=True):
        assert found == expected
    summary, wanted = (json.loads((t.log.folder / "summary.json").read_text()) for t in (trainer, whole))
    for key in ("status", "steps", "epochs", "reasons"):
        assert summary[key] == wanted[key], key
    assert all(summary["best_step"][tag] == step for tag, step in wanted["best_step"].items() if tag not in TIMES)


def test_a_run_that_dies_after_any_step_goes_on_as_if_it_had_not(start):
    whole = start("whole")
    whole.train()
    assert whole.step == len(whole.seen) == 15
    for step in range(1, 16):
        every = 1 if step % 2 else 4
        first = start(f"dies-{step}", every=every)
        die_after(first, step)
        with pytest.raises(Death):
            first.train()
        second = start(f"dies-{step}", every=every)
        assert second.step == (step - 1) // every * every
        second.train()
        assert second.seen == whole.seen[(step - 1) // every * every :]  # the same samples, in later epochs too
        assert_same_weights(second, whole)
        if step in (1, 4, 10, 15):
            assert_ended_alike(second, whole)


def test_a_signal_at_any_step_saves_and_ends_and_the_run_goes_on(start):
    whole = start("whole")
    whole.train()
    for step in (4, 5, 9, 15):  # at an evaluation, at an epoch's end, at a record, at the last
        number = signal.SIGINT if step % 2 else signal.SIGTERM
        first = start(f"signal-{step}", every=0)
        send_after(first, step, number)
        summary = first.train()
        assert (summary["status"], summary["signal"], summary["steps"]) == ("interrupted", number, step)
        second = start(f"signal-{step}", every=0)
        assert second.step == step
        second.train()
        assert second.seen == whole.seen[step:]
        assert_ended_alike(second, whole)


@pytest.mark.parametrize("ends_at", [None, 7])
def test_only_a_checkpoint_beside_training_is_of_a_copy(start, monkeypatch, ends_at):
    trainer = start("run", checkpoint=CheckpointSettings(every=3, keep=99, asynchronous=True))
    if ends_at is not None:
        send_after(trainer, ends_at, signal.SIGTERM)
    copied, write = {}, checkpoint.write

    def note(path, contents, counters):
        theirs = [parameter.data_ptr() for parameter in trainer.model.parameters()]
        copied[counters["step"]] = not any(t.data_ptr() in theirs for t in contents.files["model"].values())
        return write(path, contents, counters)

    monkeypatch.setattr(checkpoint, "write", note)
    trainer.train()
    last = ends_at or trainer.num_steps
    assert copied == {step: True for step in range(3, last, 3)} | {last: False}
    assert not trainer.checkpoints._copies  # their memory went before the last one was written


def test_a_signal_in_an_evaluation_leaves_it_due(start):
    whole = start("whole")
    whole.train()
    first = start("run", every=0)
    evaluate = first._evaluate
    first._evaluate = lambda *given, **how: (os.kill(os.getpid(), signal.SIGTERM), evaluate(*given, **how))[1]
    assert first.train()["steps"] == 4
    second = start("run", every=0)
    second.train()
    assert_ended_alike(second, whole)


def test_a_run_that_dies_in_its_last_evaluation_is_evaluated_again(start):
    whole = start("whole")
    whole.train()
    first = start("run")
    first._evaluate_at_end = lambda: (first.log.add({"test/auc": 0.5}, {}), first.log.write(first.step), 1 / 0)
    with pytest.raises(ZeroDivisionError):
        first.train()
    second = start("run")
    second.train()
    assert second.seen == []
    assert_ended_alike(second, whole)


def test_what_may_differ_is_named(tmp_path):
    counters = {"identity": {"seed": 0, "data": {"min_count": 1, "seed": 3}}, "fingerprint": "a"}
    mine = {"seed": 1, "data": {"min_count": 2, "seed": 3}}
    words = r"seed is 0 there and 1 in this run \(resume_despite=\[seed\] goes on all the same\)"
    with pytest.raises(ValueError, match=words):
        check_same_run(tmp_path, counters, mine, "a")
    with pytest.raises(ValueError, match="data.min_count is 1 there and 2"):
        check_same_run(tmp_path, counters, mine, "a", ["seed"])
    check_same_run(tmp_path, counters, mine, "a", ["seed", "data.min_count"])
    with pytest.raises(ValueError, match=r"other data \(fingerprint a, now b; resume_despite=\[data\]"):
        check_same_run(tmp_path, counters, mine, "b", ["seed", "data.min_count"])
    check_same_run(tmp_path, counters, mine, "b", ["seed", "data"])
    assert without(mine, ["data.seed", "nothing.here"]) == {"seed": 1, "data": {"min_count": 2}}


def test_training_draws_from_no_global_stream(start):
    """So there is none to save."""
    trainer = start("run")
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before)


# --- guards ----------------------------------------------------------------------------------------------------------


def inject(trainer, step, place):
    """A NaN at a step, in a weight or a gradient, behind the loss."""
    inner = trainer._train_step

    def train_step(batch):
        if trainer.step == step - 1:
            place(trainer)
        inner(batch)

    trainer._train_step = train_step


def nan_in_dense_gradient(trainer):
    trainer.model.head.weight.register_hook(lambda gradient: gradient * torch.nan)


def nan_in_embedding_gradient(trainer):
    def poison(module, given):
        dense, embedded = given
        embedded = embedded * 1
        embedded.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([1]), torch.nan))
        return dense, embedded

    trainer.model.interaction.register_forward_pre_hook(poison)


def nan_in_feature_weights(trainer):
    trainer.model.embeddings.bags[2].weight.data[:] = torch.inf


@pytest.mark.parametrize(
    "place, words",
    [
        (nan_in_dense_gradient, "step 5, before its update: the gradient of head.weight has a NaN or an infinity"),
        (nan_in_embedding_gradient, "step 5, before its update: the gradient of feature C2's vectors has a NaN"),
        (nan_in_feature_weights, "not finite at step 5, before its update: weights of feature C3 have a value"),
    ],
)
def test_what_is_not_finite_stops_before_the_update_and_is_named(start, place, words):
    trainer = start("run", every=2)
    inject(trainer, 5, place)
    before = {}
    inner = trainer._backward
    trainer._backward = lambda batch: (before.update(weights=weights(trainer)), inner(batch))
    with pytest.raises(FloatingPointError, match=words):
        trainer.train()
    assert equal(before["weights"], weights(trainer)) and trainer.step == 4
    newest = checkpoint.newest_whole(trainer.log.folder)
    assert newest.name == "step_000000004"
    again = start("run", every=2)
    assert all(tensor.isfinite().all() for tensor in weights(again))


def test_a_jump_of_the_loss_is_found(start):
    guards = start("run").guards
    assert not any(guards.spike(loss) for loss in [0.5] * 9 + [1.1])  # nine records are too few to tell
    assert guards.spike(0.9) is None
    assert guards.spike(1.2).startswith("the loss jumped to 1.2000, from 0.5000")


def test_a_jump_of_the_loss_is_said(start, monkeypatch, capsys):
    monkeypatch.setattr(Guards, "spike", lambda self, loss: "it jumped")
    start("run").train()
    assert "step 3: it jumped\n" in capsys.readouterr().err


def test_a_configuration_is_kept_for_the_steps_that_it_led_to(tmp_path, capsys):
    def go(rate, start):
        path = None if start is None else checkpoint.path_of(tmp_path / "checkpoints", start)
        keep_config(tmp_path, f"lr: {rate}\nresume: {start}\n", path)
        return [path.name for _, path in kept_configs(tmp_path)], capsys.readouterr().out.splitlines()

    for step in (4, 8):
        counters = {"step": step}
        checkpoint.save(
            tmp_path / "checkpoints", nn.Linear(1, 1), {"o": torch.optim.SGD(nn.Linear(1, 1).parameters())}, counters
        )
    assert go(1, None) == ([], [])
    assert go(2, 4) == (["resolved-until-4.yaml"], ["goes on with lr=2, which was 1"])
    assert go(3, 4) == (["resolved-until-4.yaml"], ["goes on with lr=3, which was 1"])  # 2 led to no checkpoint
    assert go(5, 8) == (["resolved-until-4.yaml", "resolved-until-8.yaml"], ["goes on with lr=5, which was 3"])
    assert go(1, 4) == (["resolved-until-4.yaml"], [])  # back, and as it was then: 5 to 8 are done again
    assert go(1, 8) == (["resolved-until-4.yaml"], [])

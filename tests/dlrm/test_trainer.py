"""The run as a whole: what it learns, writes, refuses, and that stopping and going on changes no bit."""

import json
import math
import os
import signal
import threading
import time

import pytest
import torch
from stand_ins import StandInData

from dlrm import checkpoint
from dlrm.checkpoint import read_counters
from dlrm.metrics import Metrics, exact_auc


def read_rows(trainer):
    return [json.loads(line) for line in (trainer.log.folder / "metrics.jsonl").read_text().splitlines()]


def weights(trainer):
    return [tensor.clone() for tensor in trainer.model.state_dict().values()]


def state_tensors(trainer):
    states = (s for o in trainer.optimizers.values() for s in o.state_dict()["state"].values())
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_run_learns_what_was_planted_and_reports_it(make_trainer, capsys):
    trainer = make_trainer(data=StandInData(num_train=16_000), epochs=1, eval_every=200)
    summary = trainer.train()
    last = summary["last"]
    best = trainer.dataset.best_possible_auc("test")
    assert 0.75 < last["test/auc"] and last["test/share_of_best_auc"] > 0.9
    assert last["test/normalized_entropy"] < 0.85
    assert last["train/loss"] < 0.5 and summary["beats_constant_predictor"]
    assert last["test/share_of_best_auc"] == pytest.approx((last["test/auc"] - 0.5) / (best - 0.5))
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("completed", 500, 1)
    assert summary["samples"] == 16_000 and summary["samples_per_second"] > 0
    text = capsys.readouterr().out
    assert f"{last['test/auc']:.5f}  (best possible {best:.5f}" in text and "stand-in (3 categorical)" in text


def test_reported_test_metrics_are_those_of_the_final_weights(make_trainer):
    trainer = make_trainer()
    last = trainer.train()["last"]
    batch = next(trainer.dataset.batches("test", 1000))
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(batch.dense, batch.ids, batch.offsets)
    assert last["test/auc"] == exact_auc(logits, batch.labels)
    metrics = Metrics("cpu")
    metrics.update(logits, batch.labels)
    assert last["test/log_loss"] == pytest.approx(metrics.compute()["log_loss"], rel=1e-6)


def test_rows_come_at_the_steps_asked_for_with_the_contracts_tags(make_trainer):
    trainer = make_trainer()  # 640 samples, 2 epochs of 20 steps, log every 5, evaluate every 10
    trainer.train()
    rows = {row["step"]: row for row in read_rows(trainer)}
    assert len(rows) == len(read_rows(trainer)) and list(rows) == [5, 10, 15, 20, 25, 30, 35, 40]
    train = {"train/loss", "train/samples_per_second", "train/learning_rate"}
    evaluation = {f"eval/{name}" for name in ("auc", "log_loss", "normalized_entropy", "accuracy", "calibration")}
    memory = {f"memory/{name}_bytes" for name in ("embedding", "state", "optimizer", "peak")} | {"memory/compression"}
    assert train <= rows[5].keys() and not evaluation & rows[5].keys()
    assert train | evaluation | memory <= rows[10].keys()
    test = {name.replace("eval", "test") for name in evaluation}
    assert train | evaluation | memory | test <= rows[40].keys() and "test/auc_bound" not in rows[40]


def test_memory_tags_are_exact(make_trainer):
    trainer = make_trainer()
    last = trainer.train()["last"]
    assert last["memory/embedding_bytes"] == (7 + 50 + 3) * 4 * 4
    assert last["memory/compression"] == 1
    dense_state = sum(8 * parameter.numel() + 4 for parameter in trainer.model.dense_parameters())  # Adam
    assert last["memory/optimizer_bytes"] == dense_state + (7 + 50 + 3) * 4 * 4 + 3 * 4  # and Adagrad
    assert last["memory/peak_bytes"] > 50 * 2**20


def test_logged_loss_is_the_mean_since_the_last_record(make_trainer):
    every_step, every_fifth = make_trainer("a", log_every=1), make_trainer("b", log_every=5)
    every_step.train()
    every_fifth.train()
    losses = [row["train/loss"] for row in read_rows(every_step)]
    assert read_rows(every_fifth)[1]["train/loss"] == pytest.approx(sum(losses[5:10]) / 5, rel=1e-6)


def test_learning_rates_follow_warm_up_and_decay_for_both_optimizers(make_trainer):
    trainer = make_trainer(log_every=1, warmup_steps=4, decay="linear", epochs=1)
    trainer.train()
    rows = read_rows(trainer)
    factors = [(step + 1) / 4 if step < 4 else 1 - (step - 4) / 16 for step in range(20)]
    assert [row["train/learning_rate"] for row in rows] == pytest.approx([0.01 * factor for factor in factors])
    assert [row["train/embedding_learning_rate"] for row in rows] == pytest.approx([0.5 * f for f in factors])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("stop", [7, 20, 27])  # inside the first epoch, between the two, inside the second
def test_resume_is_bitwise_equal_to_not_stopping(make_trainer, stop, sparse):
    whole = make_trainer("whole", sparse=sparse, decay="constant")
    whole.train()
    first = make_trainer("first", sparse=sparse, decay="constant", max_steps=stop)
    first.train()
    second = make_trainer("second", sparse=sparse, decay="constant", lr=0.05)
    for parameter in second.model.parameters():
        parameter.data.fill_(9)
    second.resume(first.log.folder)
    assert second.step == stop
    summary = second.train()
    assert summary["steps"] == 40
    assert equal(weights(whole), weights(second)) and equal(state_tensors(whole), state_tensors(second))
    assert whole.log.last["test/auc"] == second.log.last["test/auc"]


def test_average_is_the_mean_of_the_weights_after_each_step_since_then(make_trainer):
    trainer = make_trainer(average_from=0.75)
    after_steps = []
    trainer._train_step = lambda batch, inner=trainer._train_step: (inner(batch), after_steps.append(weights(trainer)))
    summary = trainer.train()
    assert trainer.optimizers["dense_optimizer"].state and summary["steps"] == len(after_steps) == 40
    for i, (parameter, state) in enumerate(trainer.average.state.items()):
        assert state["count"] == 10 and parameter.equal(after_steps[-1][i])
        mean = torch.stack([after[i].double() for after in after_steps[30:]]).mean(0)
        torch.testing.assert_close(state["mean"].double(), mean, rtol=1e-5, atol=1e-7)


def test_averaged_weights_are_evaluated_and_the_last_ones_trained_and_saved(make_trainer):
    plain, averaged = make_trainer("plain"), make_trainer("averaged", average_from=0.5)
    plain.train()
    summary = averaged.train()
    assert equal(weights(plain), weights(averaged))
    assert summary["last"]["test/auc"] != plain.log.last["test/auc"]
    num_bytes = sum(p.numel() * p.element_size() for p in averaged.model.parameters())
    assert summary["last"]["memory/optimizer_bytes"] == plain.log.last["memory/optimizer_bytes"] + num_bytes
    means = make_trainer("means")
    for parameter, state in zip(means.model.parameters(), averaged.average.state.values(), strict=True):
        parameter.data.copy_(state["mean"])
    assert means._evaluate("test", exact=True).exact_values(None)[0]["auc"] == summary["last"]["test/auc"]


def test_an_average_is_resumed_bitwise(make_trainer):
    whole = make_trainer("whole", decay="constant", average_from=0)
    whole.train()
    first = make_trainer("first", decay="constant", average_from=0, max_steps=25)
    first.train()
    second = make_trainer("second", decay="constant", average_from=0)
    second.resume(first.log.folder)
    assert {state["count"] for state in second.average.state.values()} == {25}
    second.train()
    means = [[state["mean"] for state in trainer.average.state.values()] for trainer in (whole, second)]
    assert equal(*means) and equal(weights(whole), weights(second))


def test_two_runs_of_one_seed_are_bitwise_equal(make_trainer):
    a, b = make_trainer("a"), make_trainer("b", eval_every=0)  # evaluation changes nothing in training
    a.train()
    b.train()
    assert equal(weights(a), weights(b))


def test_resume_with_other_data_is_refused(make_trainer):
    make_trainer("a", epochs=1).train()
    trainer = make_trainer("b")
    trainer.dataset.fingerprint = "other"
    with pytest.raises(ValueError, match="resume=.*fingerprint 0123456789abcdef"):
        trainer.resume(trainer.log.folder.parent / "a")


IDENTITY = {"pooling": "sum", "seed": 0, "embedding": {"block": 8, "widths": (1, 2)}, "features": {}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pooling": "mean"}, 'pooling is "sum" there and "mean" in this run'),
        ({"seed": 1, "features": {"C3": {"block": 4}}}, "seed is 0 there and 1 in this run"),
        ({"embedding": {"block": 4, "widths": (1, 2)}}, "embedding.block is 8 there and 4 in this run"),
        ({"embedding": {"block": 8}}, r"embedding.widths is \[1, 2\] there and null in this run"),
        ({"features": {"C3": {"block": 4}}}, 'features.C3 is null there and {"block": 4} in this run'),
    ],
)
def test_resume_of_another_run_is_refused_with_the_first_key_that_differs(make_trainer, changes, words):
    make_trainer("a", identity=IDENTITY, epochs=1).train()
    trainer = make_trainer("b", identity=IDENTITY | changes)
    with pytest.raises(ValueError, match=f"resume=.*: {words}"):
        trainer.resume(trainer.log.folder.parent / "a")
    same = make_trainer("c", identity=IDENTITY)
    same.resume(same.log.folder.parent / "a")
    assert same.step == 20


@pytest.mark.parametrize(("max_steps", "num_samples"), [(None, 1300), (25, 650 + 4 * 32), (21, 650), (3, 96)])
def test_progress_counts_up_to_what_is_trained_on(make_trainer, max_steps, num_samples):
    trainer = make_trainer(data=StandInData(num_train=650), max_steps=max_steps)  # 21 steps, the last of 10 samples
    trainer.train()
    assert trainer.progress.total == trainer.progress.done == num_samples


@pytest.mark.parametrize(
    ("warmup_steps", "words"),
    [
        (41, "the learning rate never reaches its value: warm-up takes 41 of 40 steps"),
        (1000, "the learning rate never reaches its value: warm-up takes 1,000 of 40 steps"),
        (40, "the learning rate reaches its value only at the last step: warm-up takes 40 of 40 steps"),
        (39, None),
    ],
)
def test_a_warm_up_that_takes_the_whole_run_is_said(make_trainer, capsys, warmup_steps, words):
    make_trainer(warmup_steps=warmup_steps).train()
    text = capsys.readouterr().out
    assert (words + "\n" in text) if words else ("warm-up" not in text)


def test_a_full_disk_costs_the_checkpoint_and_not_the_result(make_trainer, capsys, monkeypatch):
    whole = make_trainer("whole").train()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    capsys.readouterr()
    trainer = make_trainer()
    summary = trainer.train()
    assert json.loads((trainer.log.folder / "summary.json").read_text()) == summary
    assert (summary["status"], summary["checkpoint"]) == ("completed", None)
    assert "needs" in summary["checkpoint_error"] and "the disk has 10 free" in summary["checkpoint_error"]
    assert summary["last"]["test/auc"] == whole["last"]["test/auc"] and whole["checkpoint_error"] is None
    captured = capsys.readouterr()
    assert "NO CHECKPOINT" in captured.err and summary["checkpoint_error"] in captured.err
    assert f"test AUC       {summary['last']['test/auc']:.5f}" in captured.out


def test_without_validation_samples_the_test_split_is_evaluated_and_the_run_says_so(make_trainer, capsys):
    trainer = make_trainer(data=StandInData(num_valid=0))
    summary = trainer.train()
    assert summary["eval_split"] == "test"
    assert "eval/* is measured on the test split" in capsys.readouterr().out
    assert summary["last"]["eval/log_loss"] == summary["last"]["test/log_loss"]
    assert trainer.dataset.batches_begun.count(("test", 0, 0)) == 4  # steps 10, 20, 30; once at the end


def test_data_without_dense_columns_trains(make_trainer):
    summary = make_trainer(data=StandInData(num_dense=0, num_train=16_000), epochs=1).train()
    assert summary["last"]["test/auc"] > 0.7  # without the planted dense column


def test_bf16_trains_close_to_fp32_and_differs(make_trainer):
    a, b = make_trainer("a", epochs=6), make_trainer("b", epochs=6, precision="bf16")
    fp32, bf16 = a.train()["last"], b.train()["last"]
    assert fp32["train/loss"] != bf16["train/loss"]
    assert bf16["test/auc"] == pytest.approx(fp32["test/auc"], abs=0.02)  # 300 samples, 8 significant bits
    assert all(tensor.dtype == torch.float32 for tensor in b.model.state_dict().values())


class PoisonedData(StandInData):
    """Puts a value into one field of the third training batch (step 3)."""

    def __init__(self, field, value):
        super().__init__()
        self.field, self.value = field, value

    def batches(self, split, batch_size, *, epoch=0, start=0):
        for i, batch in enumerate(super().batches(split, batch_size, epoch=epoch, start=start)):
            if split == "train" and i == 2:
                tensor = getattr(batch, self.field).clone()
                tensor[(4, 1) if tensor.dim() == 2 else 4] = self.value
                batch = batch._replace(**{self.field: tensor})
            yield batch


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dense", math.nan, "dense column I2"),
        ("dense", math.inf, "dense column I2"),
        ("labels", math.nan, "the labels"),
    ],
)
def test_non_finite_loss_stops_before_the_update_and_names_step_and_tensor(make_trainer, field, value, words):
    reference = make_trainer("reference", max_steps=2, warmup_steps=0, decay="constant")
    reference.train()
    trainer = make_trainer("poisoned", data=PoisonedData(field, value), warmup_steps=0, decay="constant")
    with pytest.raises(FloatingPointError, match=f"not finite at step 3, before its update: {words}"):
        trainer.train()
    assert equal(weights(reference), weights(trainer))
    summary = json.loads((trainer.log.folder / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["status"].startswith("failed: the loss is not finite at step 3")
    assert not (trainer.log.folder / "checkpoints").exists()


@pytest.mark.parametrize(("log_every", "words"), [(2, "steps 3 to 4"), (3, "steps 1 to 3"), (1, "steps 3 to 3")])
def test_non_finite_loss_stops_at_the_next_record_and_names_the_steps(make_trainer, log_every, words):
    trainer = make_trainer(data=PoisonedData("dense", math.nan), log_every=log_every)
    as_on_cuda(trainer)
    with pytest.raises(FloatingPointError, match=f"not finite in {words}"):
        trainer.train()
    assert not (trainer.log.folder / "checkpoints").exists()


def test_non_finite_loss_before_ctrl_c_in_an_evaluation_leaves_no_checkpoint(make_trainer):
    trainer = make_trainer(data=PoisonedData("dense", math.nan), log_every=100, eval_every=10)
    as_on_cuda(trainer)
    trainer.dataset.batches = press_in_first_evaluation(trainer.dataset.batches, trainer.interrupt)
    with pytest.raises(FloatingPointError, match=r"step 10: model tensor '.*' has a NaN or an infinity: not written"):
        trainer.train()
    assert not (trainer.log.folder / "checkpoints").exists()


def as_on_cuda(trainer):
    """No step's loss and gradients are looked at."""
    for check in ("check_loss", "check_gradients", "check_embedding_gradient"):
        setattr(trainer.guards, check, lambda *given: None)


def press_in_first_evaluation(batches, interrupt):
    def pressed(split, *arguments, **options):
        interrupt.requested = interrupt.requested or split != "train"
        return batches(split, *arguments, **options)

    return pressed


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_diverging_run_on_cuda_leaves_the_device_usable(make_trainer):
    settings = {"device": "cuda", "deterministic": False, "log_every": 2}
    trainer = make_trainer("a", data=PoisonedData("dense", math.nan), **settings)
    with pytest.raises(FloatingPointError, match="not finite in steps 3 to 4"):
        trainer.train()
    assert make_trainer("b", **settings).train()["status"] == "completed"


def test_non_finite_weights_are_named(make_trainer):
    trainer = make_trainer()
    trainer.model.top[0].bias.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="step 1, .*weights top.0.bias"):
        trainer.train()


class InterruptedData(StandInData):
    """Presses Ctrl-C before the third batch of a split."""

    split = "train"

    def batches(self, split, batch_size, *, epoch=0, start=0):
        for i, batch in enumerate(super().batches(split, batch_size, epoch=epoch, start=start)):
            if split == self.split and i == 2:
                self.press()
            yield batch

    def press(self):
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_after_the_step_with_summary_and_checkpoint(make_trainer):
    trainer, handler = make_trainer(data=InterruptedData()), signal.getsignal(signal.SIGINT)
    summary = trainer.train()
    assert json.loads((trainer.log.folder / "summary.json").read_text()) == summary
    assert (summary["status"], summary["steps"]) == ("interrupted", 3)
    assert read_counters(trainer.log.folder)["step"] == 3
    assert signal.getsignal(signal.SIGINT) is handler
    whole, second = make_trainer("whole"), make_trainer("second")
    whole.train()
    second.resume(trainer.log.folder)
    second.train()
    assert equal(weights(whole), weights(second))


@pytest.mark.parametrize(("split", "step"), [("valid", 10), ("test", 40)])
def test_ctrl_c_during_an_evaluation_keeps_the_weights(make_trainer, split, step):
    data = InterruptedData()
    data.split = split
    trainer = make_trainer(data=data)
    summary = trainer.train()
    assert (summary["status"], summary["steps"]) == ("interrupted", step)
    assert read_counters(trainer.log.folder)["step"] == step
    assert "test/auc" not in summary["last"]


def test_time_of_an_evaluation_that_ctrl_c_ends_is_not_training_time(make_trainer):
    data = InterruptedData()
    data.split = "valid"

    def press():
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    data.press = press
    trainer = make_trainer(data=data)
    began = time.perf_counter()
    summary = trainer.train()
    assert summary["train_seconds"] < time.perf_counter() - began - 0.5


def test_keyboard_interrupt_in_another_thread_still_writes_the_summary(make_trainer):
    data = InterruptedData()

    def press():
        raise KeyboardInterrupt

    data.press = press
    trainer, summaries = make_trainer(data=data), []
    thread = threading.Thread(target=lambda: summaries.append(trainer.train()))
    thread.start()
    thread.join()
    assert (summaries[0]["status"], summaries[0]["steps"]) == ("interrupted", 2)


def test_a_model_that_learns_nothing_is_told_loudly(make_trainer, capsys):
    summary = make_trainer(data=StandInData(learnable=False), lr=0.5, epochs=3).train()
    assert summary["last"]["eval/normalized_entropy"] >= 1 and not summary["beats_constant_predictor"]
    text = capsys.readouterr().err
    assert "HAS NOT BEATEN THE CONSTANT PREDICTOR" in text and "Likely causes" in text


def test_one_class_in_test_gives_null_with_the_reason(make_trainer):
    data = StandInData()
    data.best_possible_auc = lambda split: None
    data._samples["test"].labels.zero_()
    trainer = make_trainer(data=data)
    summary = trainer.train()
    assert summary["last"]["test/auc"] is None and summary["reasons"]["test/auc"] == "all 300 labels are 0"
    row = read_rows(trainer)[-1]
    assert row["test/auc"] is None and row["reason"]["test/auc"] == "all 300 labels are 0"
    assert summary["last"]["test/log_loss"] > 0


def test_no_training_samples_is_refused(make_trainer):
    data = StandInData()
    data.num_samples["train"] = 0
    with pytest.raises(ValueError, match="training split has no samples"):
        make_trainer(data=data)


def test_deterministic_mode_ends_with_the_run(make_trainer):
    make_trainer(epochs=1).train()
    assert not torch.are_deterministic_algorithms_enabled()

"""What a run leaves behind, read back with TensorBoard's own reader and a JSON parser."""

import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from dlrm.log import RunLog, write_json
from dlrm.report import final_table, markdown_table


def make_log(folder):
    folder.mkdir(exist_ok=True)
    return RunLog(folder, facts={"seed": 7}, hparams={"lr": 0.1, "model": None, "ok": True})


def read_events(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_scalars_reach_tensorboard_and_jsonl_with_their_steps(tmp_path):
    log = make_log(tmp_path)
    for step in (10, 20):
        log.add({"train/loss": 1 / step}, {})
        log.add({"eval/auc": step / 100}, {})
        log.write(step)
    log.write(30)  # nothing was added
    log.finish({})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 10, "train/loss": 0.1, "eval/auc": 0.1},
        {"step": 20, "train/loss": 0.05, "eval/auc": 0.2},
    ]
    scalars = read_events(tmp_path).Scalars("train/loss")
    assert [event.step for event in scalars] == [10, 20]
    assert [event.value for event in scalars] == pytest.approx([0.1, 0.05])  # float32 on TensorBoard's side


def test_one_event_file_and_one_run_entry_hold_hparams_and_their_metrics(tmp_path):
    log = make_log(tmp_path)
    log.add({"test/auc": 0.75}, {})
    log.write(5)
    log.finish({})
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    plugin = read_events(tmp_path).summary_metadata
    content = plugin["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["lr"].number_value == 0.1
    assert (hparams["ok"].string_value, hparams["model"].string_value) == ("True", "None")
    content = plugin["_hparams_/experiment"].plugin_data.content
    metrics = plugin_data_pb2.HParamsPluginData.FromString(content).experiment.metric_infos
    assert [metric.name.tag for metric in metrics] == ["test/auc"]


def test_nan_becomes_null_with_its_reason_and_never_the_best(tmp_path):
    log = make_log(tmp_path)
    log.add({"eval/auc": 0.7, "eval/log_loss": 0.5}, {})
    log.write(1)
    log.add({"eval/auc": math.nan, "eval/log_loss": math.inf}, {"eval/auc": "all 3 labels are 1"})
    log.write(2)
    summary = log.finish({})
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])
    reasons = {"eval/auc": "all 3 labels are 1", "eval/log_loss": "is inf"}
    assert row == {"step": 2, "eval/auc": None, "eval/log_loss": None, "reason": reasons}
    assert summary["last"] == {"eval/auc": None, "eval/log_loss": None}
    assert summary["reasons"] == reasons
    assert summary["best"] == {"eval/auc": 0.7, "eval/log_loss": 0.5}


@pytest.mark.parametrize("reason", [{"eval/auc": "a; b/c: d"}, "eval/auc: a; b/c: d"], ids=["", "of_an_older_version"])
def test_a_reason_is_whole_in_the_run_that_goes_on(tmp_path, reason):
    row = {"step": 1, "eval/auc": None, "eval/log_loss": 0.5, "reason": reason}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    summary = RunLog(tmp_path, facts={}, hparams={}, after=1).finish({})
    assert summary["reasons"] == {"eval/auc": reason if isinstance(reason, str) else reason["eval/auc"]}
    assert summary["last"] == {"eval/auc": None, "eval/log_loss": 0.5}


def test_best_knows_which_way_is_better(tmp_path):
    log = make_log(tmp_path)
    for step, value in enumerate((0.5, 1.5, 0.9)):
        log.add({f"eval/{name}": value for name in ("auc", "log_loss", "calibration")}, {})
        log.write(step)
    summary = log.finish({})
    assert summary["best"] == {"eval/auc": 1.5, "eval/log_loss": 0.5, "eval/calibration": 0.9}
    assert summary["best_step"] == {"eval/auc": 1, "eval/log_loss": 0, "eval/calibration": 2}
    assert set(summary["last"].values()) == {0.9}


def test_summary_on_disk_is_what_finish_returns(tmp_path):
    log = make_log(tmp_path)
    summary = log.finish({"steps": 3})
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["seed"] == 7 and summary["steps"] == 3
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_summary_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_new_run_in_another_runs_folder_is_refused(tmp_path):
    make_log(tmp_path).finish({})
    with pytest.raises(ValueError, match="holds the records of another run"):
        make_log(tmp_path)


def test_feature_table_is_markdown_in_the_text_tab(tmp_path):
    log = make_log(tmp_path)
    rows = [{"feature": "C1", "rows": 1000, "compression": 0.1}]
    log.text("embeddings/features", rows)
    log.finish({})
    assert markdown_table(rows) == "| feature | rows | compression |\n| --- | --- | --- |\n| C1 | 1,000 | 0.1 |"
    tensor = read_events(tmp_path).Tensors("embeddings/features/text_summary")[0]
    assert tensor.tensor_proto.string_val[0].decode() == markdown_table(rows)


def test_final_table_says_why_a_number_is_missing():
    summary = {
        "last": {"test/auc": None, "memory/embedding_bytes": 2**20, "memory/compression": 0.1}
        | {"memory/optimizer_bytes": 2**19, "memory/peak_bytes": 300 * 2**20},
        "reasons": {"test/auc": "all 3 labels are 1"},
        "dense_equivalent_bytes": 10 * 2**20,
        "samples_per_second": 1234.5,
        "steps": 1000,
        "epochs": 1.5,
        "seconds": 61.0,
        "status": "completed",
        "data": "synthetic",
        "folder": "runs/x",
    }
    text = final_table(summary)
    assert "test AUC       none (all 3 labels are 1)" in text
    assert "1.00 MiB  (0.1000 of 10.0 MiB dense)" in text and "300 MiB" in text
    assert "none (not measured)" in text  # test/log_loss

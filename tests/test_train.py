"""The command line: what it makes, and what it refuses."""

import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import train
from data.synthetic import Synthetic
from data.teacher import Teacher
from dlrm import checkpoint, jobs
from dlrm.linear import cpu_flags, emulates_bf16
from dlrm.refusals import keys_below
from dlrm.run_folder import held
from dlrm.trainer import Trainer

ROOT = Path(__file__).parent.parent
SMALL = [
    "data.num_samples={train: 4096, valid: 1024, test: 1024}",
    "data.cardinalities=[50, 2000, 3000]",
    "trainer.batch_size=512",
    "trainer.log_every=2",
]
EVAL_TAGS = {f"eval/{name}" for name in ("auc", "log_loss", "normalized_entropy", "accuracy", "calibration")}
MEMORY_TAGS = {
    f"memory/{name}" for name in ("embedding_bytes", "state_bytes", "optimizer_bytes", "peak_bytes", "compression")
}
TRAIN_TAGS = {"train/loss", "train/samples_per_second", "train/learning_rate"}
BACKENDS = sorted(path.stem for path in (ROOT / "conf" / "embedding").glob("*.yaml"))
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module", autouse=True)
def calibrated_once():
    """Of the same synthetic data many runs: each is spared a fifth of a second that gives the same three numbers."""
    known, calibrate = {}, Teacher.calibrate

    def calibrate_once(self: Teacher, parts: np.ndarray, **wanted: float) -> None:
        key = (self.part_scales.tobytes(), parts.tobytes(), *sorted(wanted.items()))
        if key not in known:
            calibrate(self, parts, **wanted)
            known[key] = self.part_scales, self.bias, self.scale
        self.part_scales, self.bias, self.scale = known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "calibrate", calibrate_once)
        yield


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(*arguments) runs train.py in an empty folder -> (exit status, stdout, stderr)."""
    # reads the configuration the same, eight times as fast
    monkeypatch.setattr(yaml, "SafeLoader", getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
        status = train.main()
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    monkeypatch.chdir(tmp_path)
    return run


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


# --- what a run makes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_trains_and_leaves_the_contracts_files(name, cli, tmp_path):
    status, out, err = cli(f"embedding={name}", "compression=0.5", "trainer.eval_every=4", *SMALL)
    assert status == 0, err
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert {"metrics.jsonl", "summary.json", "checkpoints", ".hydra"} <= {path.name for path in folder.iterdir()}
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1

    logged = set().union(*(json.loads(line).keys() for line in (folder / "metrics.jsonl").read_text().splitlines()))
    assert EVAL_TAGS | MEMORY_TAGS | TRAIN_TAGS <= logged
    events = EventAccumulator(str(folder)).Reload()
    assert EVAL_TAGS | MEMORY_TAGS | TRAIN_TAGS <= set(events.Tags()["scalars"])

    summary = summary_of(folder)
    assert summary["steps"] == 8 and summary["seed"] == 0 and summary["device"] == "cpu"
    assert summary["last"]["memory/embedding_bytes"] == sum(row["bytes"] for row in summary["features"])
    assert summary["dense_equivalent_bytes"] == 5050 * 16 * 4
    assert [row["feature"] for row in summary["features"]] == ["C1", "C2", "C3"]
    for word in ("test AUC", "embeddings", "optimizer", "peak memory", "samples/s", "synthetic"):
        assert word in out


@pytest.mark.once
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_learns(name, cli, tmp_path):
    samples = "data.num_samples={train: 120000, valid: 0, test: 20000}"
    shape = ["data.cardinalities=[50, 3000, 20000]", "trainer.batch_size=1024", "trainer.save_checkpoint=false"]
    status, _, err = cli(f"embedding={name}", "compression=0.2", samples, *shape, "hydra.run.dir=run")
    assert status == 0, err
    assert summary_of(tmp_path / "run")["last"]["test/share_of_best_auc"] > 0.9


@pytest.mark.once
def test_sweep_makes_a_folder_per_job(cli, tmp_path):
    status, _, err = cli("-m", "embedding=dense,hashed", "compression=0.5,0.1", *SMALL)
    assert status == 0, err
    folders = sorted((tmp_path / "multirun").glob("*/*/[0-9]"))
    assert [folder.name for folder in folders] == ["0", "1", "2", "3"]
    backends = [[row["backend"] for row in summary_of(folder)["features"]] for folder in folders]
    assert backends == [["dense"] * 3] * 2 + [["dense", "hashed", "hashed"]] * 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.once
def test_a_job_that_fails_is_kept_and_named_at_the_end_and_the_others_go_on(cli, tmp_path):
    status, _, err = cli("-m", "embedding=hashed", "compression=0.00001,0.5", "hydra.sweep.dir=two", *SMALL)
    assert status == 1
    assert "1 of 2 runs have no result:\n  two/0 [embedding=hashed compression=1e-05" in err
    assert err.splitlines()[-1].partition("]: failed: ConfigError: compression=1e-05: ")[2]
    assert (tmp_path / "two/0/error.txt").read_text().startswith("ConfigError: compression=1e-05: ")
    assert summary_of(tmp_path / "two/1")["status"] == "completed" and not (tmp_path / "multirun").exists()


@pytest.mark.once
@pytest.mark.parametrize("named", [[], ["sweep=pareto"]], ids=["", "named"])
def test_a_launcher_that_fails_is_status_1(named, cli, monkeypatch):
    def run():
        raise RuntimeError("no sbatch on this machine\nand more")

    monkeypatch.setattr(train, "run", run)
    status, _, err = cli("-m", *named, "seed=0,1")
    assert status == 1 and set(err.splitlines()) == {"error: no sbatch on this machine"}


@pytest.mark.once
def test_a_feature_gets_its_own_backend_and_ratio(cli, tmp_path):
    status, _, err = cli("+embedding@features.C3=hashed", "features.C3.compression=0.05", *SMALL)
    assert status == 0, err
    (folder,) = (tmp_path / "runs").glob("*/*")
    by_name = {row["feature"]: row for row in summary_of(folder)["features"]}
    assert [by_name[f]["backend"] for f in ("C1", "C2", "C3")] == ["dense", "dense", "hashed"]
    assert by_name["C3"]["compression"] == pytest.approx(0.05, rel=0.01)
    metadata = EventAccumulator(str(folder)).Reload().SummaryMetadata("_hparams_/session_start_info")
    shown = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert shown["embedding@features.C3"].string_value == "hashed" and shown["data.min_count"].number_value == 1
    assert shown["embedding"].string_value == "dense" and "data.seed" not in shown


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments, atomic",
    [
        (["embedding=fast"], "fast"),
        (["+embedding@features.C3=fast"], "fast"),  # the others are dense
        (["embedding=hashed", "embedding.accumulate=atomic", "compression=0.5"], "dense, hashed"),
        (["embedding=fast", "embedding.accumulate=sorted"], None),
    ],
    ids=["all", "one-feature", "hashed", "sorted"],
)
def test_a_cpu_run_says_whose_gradients_it_sums_in_order_instead_of_by_atomics(arguments, atomic, cli):
    status, out, err = cli(*arguments, "trainer.max_steps=1", *SMALL)
    assert status == 0, err
    said = [line for line in out.splitlines() if "on the CPU gradients are summed in order" in line]
    wanted = f"{atomic}: on the CPU gradients are summed in order (accumulate=atomic is for CUDA)"
    assert said == ([wanted] if atomic else [])


@pytest.mark.once
@pytest.mark.parametrize("library", ["torch", "onednn"])
def test_both_libraries_of_the_dense_layers_train_and_the_summary_names_the_one(library, cli, tmp_path):
    status, _, err = cli(f"linear={library}", "trainer.max_steps=2", *SMALL, "hydra.run.dir=run")
    assert status == 0, err
    assert summary_of(tmp_path / "run")["linear"] == library


@pytest.mark.once
def test_an_optimizer_that_torch_cannot_fuse_there_steps_as_it_can_and_that_is_said(capsys):
    """As torch 2.11 Adagrad on CUDA; here on "meta"."""
    dense = {"_target_": "torch.optim.Adagrad", "_partial_": True, "lr": 0.1, "fused": True}
    node = {"dense": dense, "embedding": {"_target_": "embeddings.optim.SGD", "_partial_": True, "lr": 0.1}}
    for device, said in (("cpu", ""), ("meta", f"fused=true: torch {torch.__version__} cannot on meta, so steps are")):
        make, _ = train.optimizers(node, device)
        assert make([torch.zeros(1)]).param_groups[0]["fused"] == (True if device == "cpu" else None)
        out = capsys.readouterr().out
        assert said in out and bool(said) == bool(out)


def test_bf16_says_where_it_is_emulated(cli):
    status, out, err = cli("precision=bf16", "trainer.max_steps=1", *SMALL)
    assert status == 0, err
    assert ("precision=bf16: this CPU has no bf16" in out) == emulates_bf16(cpu_flags())


@pytest.mark.once
def test_d8_options_that_are_false_are_off(cli, tmp_path):
    def run(folder: str, *arguments: str) -> tuple[float, bool]:
        short = ["embedding=hashed", "compression=0.5", *SMALL, "trainer.max_steps=2"]
        status, _, err = cli(*short, f"hydra.run.dir={folder}", *arguments)
        assert status == 0, err
        return summary_of(tmp_path / folder)["last"]["test/log_loss"], any(
            (tmp_path / folder / "checkpoints").glob("*")
        )

    keys = ("trainer.save_checkpoint", "deterministic", "embedding.sign", "embedding.shared")
    loss, is_saved = run("plain")
    assert is_saved
    for word in ("false", "False"):
        assert run(f"off-{word}", *(f"{key}={word}" for key in keys)) == (loss, False)
    for key in ("embedding.sign", "embedding.shared"):
        assert run(f"on-{key}", f"{key}=true")[0] != loss
    for word, expected in (("false", 0), ("true", 2)):  # gradients by atomics do not repeat
        assert cli("embedding=fast", *SMALL, "trainer.max_steps=1", f"deterministic={word}")[0] == expected


@pytest.mark.once
def test_same_seed_same_result_other_seed_another(cli, tmp_path):
    losses = []
    for seed in (0, 0, 1):
        assert cli("embedding=hashed", "compression=0.5", f"seed={seed}", *SMALL)[0] == 0
        newest = max((tmp_path / "runs").glob("*/*"), key=lambda folder: folder.stat().st_mtime_ns)
        losses.append(summary_of(newest)["last"]["test/log_loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resume_ends_where_one_run_would(precision, cli, tmp_path):
    asked = ("embedding=hashed", f"embedding.precision={precision}", "compression=0.5", *SMALL)
    assert cli(*asked, "hydra.run.dir=whole")[0] == 0
    assert cli(*asked, "hydra.run.dir=half", "trainer.max_steps=4")[0] == 0
    assert cli(*asked, "hydra.run.dir=rest", "resume=half")[0] == 0
    whole, rest = summary_of(tmp_path / "whole"), summary_of(tmp_path / "rest")
    assert rest["steps"] == whole["steps"] == 8
    assert rest["last"]["test/log_loss"] == whole["last"]["test/log_loss"]


class Death(BaseException):
    """The process ends here."""


@pytest.fixture
def dies_after(monkeypatch):
    """dies_after(step, do=...): the next run does this after that step, by default ending there."""

    def arrange(step, do=None):
        record = Trainer._record

        def record_or_die(self):
            if self.step == step:
                monkeypatch.setattr(Trainer, "_record", record)
                if do is None:
                    raise Death
                do()
            record(self)

        monkeypatch.setattr(Trainer, "_record", record_or_die)

    return arrange


AUTO = ("embedding=hashed", "compression=0.5", *SMALL, "checkpoint.every=2", "resume=auto", "hydra.run.dir=run")


@pytest.mark.once
def test_the_same_command_goes_on_with_its_run_and_ends_as_one_run_would(cli, tmp_path, dies_after):
    assert cli(*AUTO[:-2], "hydra.run.dir=whole")[0] == 0
    dies_after(5)
    with pytest.raises(Death):
        cli(*AUTO)
    status, out, _ = cli(*AUTO)
    assert status == 0 and "goes on from step 4 (" in out and "run/checkpoints/step_000000004)" in out
    whole, run = summary_of(tmp_path / "whole"), summary_of(tmp_path / "run")
    assert run["last"]["test/log_loss"] == whole["last"]["test/log_loss"] and run["steps"] == whole["steps"] == 8
    rows = [[json.loads(line)["step"] for line in (tmp_path / f / "metrics.jsonl").open()] for f in ("whole", "run")]
    assert rows[0] == rows[1] == [2, 4, 6, 8]
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run/checkpoints").rglob("*"))
    status, out, _ = cli(*AUTO)
    assert status == 0 and "run: this run has its result, of step 8" in out
    assert before == sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run/checkpoints").rglob("*"))


@pytest.mark.once
def test_without_a_folders_name_the_same_command_finds_its_run(cli, tmp_path, dies_after):
    for _ in range(2):
        dies_after(3)
        with pytest.raises(Death):
            cli(*AUTO[:-1])
    assert cli(*AUTO[:-1], "resume_despite=[pooling]")[0] == 0
    assert len(list((tmp_path / "runs").glob("auto-*"))) == 1
    assert cli(*AUTO[:-1], "seed=1")[0] == 0
    assert len(list((tmp_path / "runs").glob("auto-*"))) == 2


@pytest.mark.once
def test_a_run_that_died_before_its_first_checkpoint_begins_anew_as_the_same_run(cli, tmp_path, dies_after):
    dies_after(1)
    with pytest.raises(Death):
        cli(*AUTO)
    (tmp_path / "run/checkpoints/best").mkdir(parents=True)  # of an evaluation
    before = contents(tmp_path / "run")
    status, _, err = cli(*AUTO, "seed=1")
    assert status == 2 and "run has the records of another run, and no checkpoint: seed is 0 there and 1" in err
    assert contents(tmp_path / "run") == before
    status, out, _ = cli(*AUTO)
    assert status == 0 and "run: this run ended before its first checkpoint and begins anew" in out
    assert not (tmp_path / "run/checkpoints/best").exists()


@pytest.mark.once
def test_a_changed_configuration_is_refused_unless_allowed_by_name_and_nothing_is_lost(cli, tmp_path, dies_after):
    dies_after(5)
    with pytest.raises(Death):
        cli(*AUTO)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".held"]
    before = {path: path.read_bytes() for path in files}
    status, _, err = cli(*AUTO, "pooling=mean")
    assert status == 2 and 'pooling is "sum" there and "mean" in this run (resume_despite=[pooling]' in err
    status, _, err = cli(*AUTO, "optimizer/dense=adam")
    assert status == 2 and "its dense_optimizer is Adagrad, this run's is Adam" in err
    status, _, err = cli(*AUTO, "trainer.average_from=0.5", "resume_despite=[average_from]")
    assert status == 2 and "its average is not there, this run's is WeightAverage" in err
    assert before == {path: path.read_bytes() for path in files}
    dies_after(5)
    with pytest.raises(Death):  # with a configuration that leads to no checkpoint
        cli(*AUTO, "trainer.decay=cosine")
    status, out, _ = cli(*AUTO, "pooling=mean", "resume_despite=[pooling]", "trainer.warmup_steps=6")
    assert status == 0 and 'goes on with pooling="mean", which was "sum"' in out
    assert "goes on with trainer.warmup_steps=6, which was 0" in out
    assert (tmp_path / "run/resolved-until-4.yaml").read_bytes() == before[tmp_path / "run/resolved.yaml"]


@pytest.mark.once
@pytest.mark.parametrize("num_steps", [3, 4])
def test_a_run_that_is_past_the_new_end_is_refused_and_can_still_go_on(num_steps, cli, tmp_path, dies_after):
    dies_after(5)
    with pytest.raises(Death):
        cli(*AUTO)
    before = contents(tmp_path / "run")
    status, _, err = cli(*AUTO, f"trainer.max_steps={num_steps}")
    assert status == 2 and "step_000000004 is of step 4, and this run ends after" in err and "trainer.max_steps" in err
    assert contents(tmp_path / "run") == before
    assert cli(*AUTO)[0] == 0 and summary_of(tmp_path / "run")["steps"] == 8


@pytest.mark.once
def test_a_damaged_checkpoint_is_said_and_the_one_before_used(cli, tmp_path, dies_after):
    dies_after(5)
    with pytest.raises(Death):
        cli(*AUTO)
    newest = tmp_path / "run/checkpoints/step_000000004/model.safetensors"
    newest.write_bytes(b"x" + newest.read_bytes()[1:])
    status, out, _ = cli(*AUTO)
    assert status == 0 and "step_000000004: model.safetensors is damaged (SHA-256); the one before is looked at" in out
    assert "goes on from step 2" in out


@pytest.mark.once
def test_another_process_in_the_folder_is_refused_and_loses_nothing(cli, tmp_path):
    (tmp_path / "run/.hydra").mkdir(parents=True)
    with held(tmp_path / "run"):
        status, _, err = cli(*AUTO)
        assert status == 2 and f"run: process {os.getpid()} is training there" in err
        assert (tmp_path / "run/.held").exists()
    assert cli(*AUTO)[0] == 0


def test_a_folder_that_is_no_runs_is_refused(cli, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("all of it")
    status, _, err = cli(*AUTO)
    assert status == 2 and "hydra.run.dir=run: that folder is not empty" in err


@pytest.mark.once
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_status_and_the_run_goes_on(cli, tmp_path, dies_after, number, status):
    dies_after(3, do=lambda: os.kill(os.getpid(), number))
    assert cli(*AUTO)[0] == status
    assert (tmp_path / "run/checkpoints/step_000000004/manifest.json").exists()
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    code, out, _ = cli(*AUTO)
    assert code == 0 and "goes on from step 4" in out and summary_of(tmp_path / "run")["status"] == "completed"


@pytest.mark.once
def test_a_full_disk_keeps_the_last_checkpoint_and_ends_with_status_1(cli, tmp_path, dies_after, monkeypatch):
    usage = shutil.disk_usage
    dies_after(3, do=lambda: monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10)))
    status, _, err = cli(*AUTO, "checkpoint.asynchronous=false")  # that of step 2 is there when the disk is full
    assert status == 1 and "no checkpoint of the last weights" in err
    assert re.search(r"a checkpoint could not be written: .* needs [\d,]+ bytes, the disk has 10 free", err)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_000000002"]
    assert summary_of(tmp_path / "run")["last"]["test/auc"] > 0.5
    monkeypatch.setattr(shutil, "disk_usage", usage)
    checkpoint.newest_whole(tmp_path / "run")


@pytest.mark.parametrize("bad", ["checkpoint.every=-1", "checkpoint.evry=3", "resume_despite=seed", "checkpoint=3"])
def test_bad_checkpoint_keys_are_refused(bad, cli):
    status, _, err = cli(*SMALL, bad)
    assert status == 2 and bad.split("=")[0] in err


def test_a_mean_of_16_bit_weights_is_refused(cli):
    status, _, err = cli("embedding.precision=bf16", "trainer.average_from=0.5", *SMALL)
    assert (
        status == 2 and "trainer.average_from=0.5: the mean would be rounded away with embedding.precision=bf16" in err
    )


def test_a_checkpoint_older_than_precision_is_resumed(cli, tmp_path):
    asked = ("embedding=hashed", "compression=0.5", "+embedding@features.C1=dense", *SMALL)
    assert cli(*asked, "hydra.run.dir=half", "trainer.max_steps=4")[0] == 0
    (manifest,) = (tmp_path / "half/checkpoints").rglob("manifest.json")
    text = manifest.read_text()
    assert '"block"' in text and '"precision"' not in text
    assert cli(*asked, "hydra.run.dir=rest", "resume=half")[0] == 0


@pytest.fixture
def ratings(tmp_path) -> Path:
    """A folder with 400 made-up ratings in both formats that the experiments read."""
    folder = tmp_path / "ratings"
    folder.mkdir()
    rng = random.Random(0)
    rows = [(rng.randrange(30), rng.randrange(90), rng.randint(1, 5), 1000 + i) for i in range(400)]
    csv = "\n".join(f"{user},{movie},{stars},{time}" for user, movie, stars, time in rows)
    (folder / "ratings.csv").write_text(f"userId,movieId,rating,timestamp\n{csv}\n")
    movies = "\n".join(f"{m},Film {m} ({1950 + m}),Drama|Comedy" for m in range(90))
    (folder / "movies.csv").write_text(f"movieId,title,genres\n{movies}\n")
    tsv = csv.replace(",", "\t")
    (folder / "ml-1m.inter").write_text(f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{tsv}\n")
    users = "\n".join(f"{u}\t{18 + u}\tF\t{u % 7}\t{u:05}" for u in range(30))
    (folder / "ml-1m.user").write_text(
        f"user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token\n{users}\n"
    )
    items = "\n".join(f"{m}\tFilm {m}\t{1950 + m}\tDrama Comedy" for m in range(90))
    (folder / "ml-1m.item").write_text(f"item_id:token\tmovie_title:token\trelease_year:float\tgenre:token\n{items}\n")
    return folder


@pytest.mark.once
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_trains(name, cli, ratings):
    reads_files = "data.path" in (ROOT / f"conf/experiment/{name}.yaml").read_text()
    path = [f"data.path={ratings}"] if reads_files else ["data.num_samples={train: 4096, valid: 1024, test: 1024}"]
    # so few ids cannot be had in a tenth of their bytes
    status, _, err = cli(f"experiment={name}", *path, "trainer.max_steps=2", "compression=0.9")
    assert status == 0, err


@pytest.mark.once
def test_an_experiment_mixes_four_backends_over_the_features(cli, tmp_path):
    assert cli("experiment=mixed_backends", "data.num_samples={train: 4096, valid: 1024, test: 1024}")[0] == 0
    (folder,) = (tmp_path / "runs").glob("*/*")
    backends = {row["feature"]: row["backend"] for row in summary_of(folder)["features"]}
    assert {name: backends[name] for name in ("C1", "C2", "C12", "C16", "C21")} == {
        "C1": "hashed", "C2": "dense", "C12": "qr", "C16": "bloom", "C21": "fast"
    }  # fmt: skip


@pytest.mark.once
def test_a_run_folder_is_never_overwritten(cli, tmp_path):
    assert cli(*SMALL, "hydra.run.dir=mine")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}
    status, _, err = cli(*SMALL, "hydra.run.dir=mine", "seed=5")
    assert status == 2 and "not empty" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file()}


@pytest.mark.once
def test_a_run_that_ends_before_its_first_record_leaves_its_folder_free(cli, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Synthetic, "prepare", interrupted)
        assert cli(*SMALL, "hydra.run.dir=mine")[0] == 130
    assert not (tmp_path / "mine").exists()
    (tmp_path / "mine/.hydra").mkdir(parents=True)  # as a kill leaves it
    for name in (".held", ".hydra/config.yaml", "resolved.yaml"):
        (tmp_path / "mine" / name).touch()
    with held(tmp_path / "mine"):
        status, _, err = cli(*SMALL, "hydra.run.dir=mine")
        assert status == 2 and f"mine: process {os.getpid()} is training there" in err
        assert (tmp_path / "mine/.hydra/config.yaml").read_bytes() == b""
    assert cli(*SMALL, "hydra.run.dir=mine")[0] == 0


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".held"}


@pytest.mark.once
@pytest.mark.parametrize(
    "spelling",
    ["hydra.run.dir='run 5'", "++hydra.run.dir=run 5", "hydra.run.dir='run ${seed}'"],
)
@pytest.mark.parametrize("resume", ["never", "auto"])
def test_however_a_folder_is_spelt_nothing_in_it_is_overwritten(resume, spelling, cli, tmp_path):
    (tmp_path / "run 5").mkdir()
    (tmp_path / "run 5/summary.json").write_text("my own")
    status, _, err = cli(*SMALL, "seed=5", f"resume={resume}", spelling)
    assert status == 2 and "hydra.run.dir=run 5: that folder is not empty" in err
    assert contents(tmp_path / "run 5") == {tmp_path / "run 5/summary.json": b"my own"}


@pytest.mark.once
def test_a_refused_command_leaves_the_records_of_a_run_whose_folder_is_interpolated(cli, tmp_path):
    command = [*SMALL, "seed=5", "compression=1", "trainer.max_steps=2", "resume=auto", "hydra.run.dir='run_${seed}'"]
    assert cli(*command)[0] == 0
    before = contents(tmp_path / "run_5")
    status, _, err = cli(*command, "embedding=hashed", "compression=0.1")
    assert (
        status == 2 and "run_5 has the result of another configuration" in err and "name another hydra.run.dir" in err
    )
    assert contents(tmp_path / "run_5") == before


@pytest.mark.once
def test_a_refused_run_leaves_no_folder(cli, tmp_path):
    assert cli("compression=2")[0] == 2
    assert not list((tmp_path / "runs").glob("*/*"))


@pytest.mark.once
@pytest.mark.parametrize("bad", ["model.top_mlp=[64,2]", "+model.foo=1", "resume=nowhere"])
def test_model_and_resume_are_refused_before_data_is_read(bad, cli, ratings):
    status, out, err = cli("data=movielens", f"data.path={ratings}", bad)
    assert status == 2 and "preparing" not in out + err
    assert not Path("data/cache").exists()


@pytest.mark.once
def test_resume_of_another_run_is_refused_with_the_difference(cli):
    assert cli(*SMALL, "hydra.run.dir=half", "trainer.max_steps=4")[0] == 0
    status, _, err = cli(*SMALL, "resume=half", "pooling=mean")
    assert status == 2 and "pooling" in err and "mean" in err and "sum" in err


# --- what is refused: exit status 2, the key, the value, what is allowed, the nearest spelling -----------------------

REFUSED = [
    (["embeding=hashed"], ["embeding", "did you mean embedding?"]),
    (["compresion=0.1"], ["compresion", "did you mean compression?"]),
    (["embedding=hashd"], ["embedding=hashd", "bloom, dense, fast, hashed, qr", "did you mean hashed?"]),
    (["embedding=null"], ["embedding=null: must be one of bloom, dense, fast, hashed, qr, or left out"]),
    (["embedding=5"], ["embedding=5: must be one of bloom, dense, fast, hashed, qr"]),
    (["embedding=1e5"], ["embedding=1e5: must be one of bloom, dense, fast, hashed, qr"]),
    (["embedding=[null]"], ["embedding=[null]: must be one of bloom, dense, fast, hashed, qr"]),
    (["hydra/launcher=null"], ["hydra/launcher=null: must be the name of one of Hydra's"]),
    (["~embedding"], ["~embedding: every run needs embedding; it can be set, embedding=..., not removed"]),
    (["~trainer.batch_size"], ["every run needs trainer.batch_size; it can be set"]),
    (["~optimizer/dense"], ["every run needs optimizer/dense"]),
    (["embedding=hashed", "~embedding.compression"], ["embedding.compression is not set, and has no default"]),
    (["optimizer/dense=null"], ["optimizer/dense=null: must be one of adagrad, adam, sgd"]),
    (["+embedding@features.C3=null"], ["features.C3=null: must be one of bloom, dense"]),
    (["-m", "experiment=qr,null"], ["experiment=qr,null: must be one of bloom, cut_off"]),
    (["data.path=/tmp/é.csv"], ["quote the value, for Hydra and for the shell: \"data.path='/tmp/é.csv'\""]),
    (["hydra.run.dir=/tmp/a=b"], ["mismatched input '='", "\"hydra.run.dir='/tmp/a=b'\""]),
    (["data=sinthetic"], ["data=sinthetic", "did you mean synthetic?"]),
    (["embedding=hashed", "embedding.blok=8"], ["embedding.blok", "did you mean block?"]),
    (["trainer.batch_sise=3"], ["trainer.batch_sise", "did you mean batch_size?"]),
    (["optimizer=adagrd"], ["optimizer=adagrd", "did you mean adagrad?"]),
    (["optimizer/dense=adm"], ["optimizer/dense=adm", "adagrad, adam, sgd"]),
    (["optimizer.dense.lrr=1"], ["optimizer.dense.lrr", "did you mean lr?"]),
    (["+foo=1"], ["foo is no key"]),
    (["foo.bar=1"], ["foo.bar is no key; the root has compression"]),
    (["compression.foo=1"], ["compression.foo is no key; compression has none"]),
    (["optimizer.fusd=true"], ["optimizer has fused, dense, embedding - did you mean fused?"]),
    (["optimizer/dens=adam"], ["optimizer/dens is no key; optimizer has", "did you mean dense?"]),
    (["optimizer.dens.lr=1"], ["optimizer has fused, dense, embedding - did you mean dense?"]),
    (["hydra.rn.dir=x"], ["no key of Hydra's", "--cfg hydra", "did you mean hydra.run.dir?"]),
    (["+embeding@features.C3=qr"], ["embeding is no group", "did you mean embedding?"]),
    (["hydra/sweeper=foo"], ["hydra/sweeper=foo: must be one of basic", "`make launchers` installs more"]),
    (["hydra/launcher=foo"], ["hydra/launcher=foo: must be one of basic", "docs/sweeps.md"]),
    (["expected.source=x"], ["expected.source is not in the config as composed", "+expected.source=..."]),
    (["+expected.sorce=x"], ["did you mean source?"]),
    (["+trainer.foo=1"], ["foo"]),
    (["compression=-5"], ["compression=-5", "0 to 1"]),
    (["compression=0"], ["compression=0"]),
    (["compression=1.5"], ["compression=1.5"]),
    (["compression=nan"], ["compression=nan"]),
    (["compression=abc"], ["compression=abc"]),
    (["dense_below=-1"], ["dense_below=-1"]),
    (["seed=1.5"], ["seed=1.5"]),
    (["trainer.batch_size=0"], ["trainer.batch_size=0"]),
    (["trainer.batch_size=abc"], ["trainer.batch_size=abc"]),
    (["trainer.epochs=null"], ["trainer.epochs", "max_steps"]),
    (["optimizer.dense.lr=-1"], ["optimizer.dense.lr=-1"]),
    (["optimizer.embedding.eps=-1"], ["eps=-1"]),
    (["native=on"], ["native=on", "auto, require, off"]),
    (["linear=mkl"], ["linear=mkl", "auto, torch, onednn"]),
    (["linear=onednn", "precision=bf16"], ["linear=onednn", "precision=fp32", "linear=auto"]),
    (["precision=fp16"], ["precision=fp16", "fp32, tf32, bf16"]),
    (["device=gpu"], ["device=gpu", "cpu, cuda"]),
    (["pooling=avg"], ["pooling=avg", "sum, mean, max"]),
    (["deterministic=maybe"], ["deterministic=maybe"]),
    (["embedding=hashed", "embedding.block=7"], ["block=7", "16"]),
    (["embedding=hashed", "embedding.accumulate=row"], ["accumulate='row'", "rows"]),
    (["embedding=hashed", "embedding.accumulate=atomic", "deterministic=true"], ["atomic", "rows or sorted"]),
    (["embedding=fast", "deterministic=true"], ["atomic", "rows or sorted"]),
    (
        ["embedding=bloom", "embedding.accumulate=auto", "optimizer/embedding=adam"],
        ["embedding.accumulate=auto", "Adam", "rows or sorted"],
    ),
    (
        ["embedding=bloom", "embedding.accumulate=auto", "optimizer.embedding.weight_decay=0.5"],
        ["embedding.accumulate=auto", "RowWiseAdagrad with weight_decay=0.5", "rows or sorted"],
    ),
    (
        ["+features.C3.accumulate=auto", "optimizer/embedding=sgd", "optimizer.embedding.weight_decay=1"],
        ["features.C3.accumulate=auto", "SGD with weight_decay=1", "rows or sorted"],
    ),
    (["embedding=bloom", "embedding.num_hashes=0"], ["num_hashes=0", "1 to 32"]),
    (["embedding=bloom", "embedding.hash=murmur"], ["hash='murmur'", "mixed, murmur3"]),
    (["embedding=bloom", "embedding.combine=learned", "embedding.importance=1"], ["importance=1"]),
    (["embedding=hashed", "embedding.hash=affine"], ["hash=affine needs block=1"]),
    (["embedding=hashed", "embedding.sign=maybe"], ["embedding.sign=maybe: must be true or false"]),
    (["embedding=qr", "embedding.operation=times"], ["operation='times'", "add, mult, mul, concat"]),
    (["embedding=qr", "embedding.partitions=1"], ["partitions=1"]),
    (["embedding=qr", "embedding.collisions=0"], ["collisions=0"]),
    (["embedding=qr", "embedding.operation=concat", "embedding.dims=[9,9]"], ["dims=[9, 9]", "embedding_dim=16"]),
    (["embedding=qr", "embedding.order=legecy"], ["order='legecy'", "compose, legacy"]),
    (["embedding=qr", "compression=0.01"], ["compression=0.01", "the smallest it can is"]),
    (["+embedding@features.C99=hashed"], ["C99", "C1, C2, C3"]),
    (["+embedding@features.C3=hashd"], ["hashd", "did you mean hashed?"]),
    (["+embedding@features.C3=dense", "+features.C3.block=8"], ["features.C3.block", "Dense has no such key"]),
    (
        ["+embedding@features.C3=qr", "features.C3.compresion=1"],
        ["features.C3.compresion", "did you mean compression?"],
    ),
    (["+features.C3=hashed"], ["features.C3=hashed"]),
    (["optimizer.embedding._target_=torch.optim.Adam"], ["torch.optim.Adam", "embeddings.optim"]),
    (["+optimizer.embedding.momentum=0.1"], ["momentum"]),
    (["optimizer.embedding.weight_decay=-1"], ["weight_decay=-1"]),
    (["optimizer.fused=maybe"], ["optimizer.fused=maybe", "auto, true, false"]),
    (["embedding=hashed", "compression=1e-6"], ["compression=1e-06", "the smallest it can is"]),
    (["resume=nowhere"], ["nowhere"]),
    (["model.bottom_mlp=[64,8]"], ["bottom_mlp"]),
    (["+model.foo=1"], ["model.foo", "bottom_mlp"]),
    (["+data.foo=1"], ["data.foo", "cardinalities"]),
    (["+trainer.max_step=3"], ["trainer.max_step", "did you mean max_steps?"]),
    (["+optimizer.dense.foo=1"], ["optimizer.dense.foo", "lr"]),
    (["optimizer/dense=adam", "optimizer.dense._target_=torch.optim.LBFGS"], ["optimizer.dense"]),
    (["features=3"], ["features=3"]),
    (["hydra.output_subdir=null"], ["hydra.output_subdir=null", ".hydra"]),
    (["-m", "seed=0,1", "hydra.run.dir=x"], ["hydra.run.dir=x", "hydra.sweep.dir"]),
    (["-m", "sweep=pareto", "embedding=qr"], ["sweep=pareto: its grid", "embedding.block is not in the config"]),
    (["embedding.embedding_dim=1.5"], ["embedding.embedding_dim=1.5: must be a whole number"]),
    (["embedding=hashed", "embedding.block=null"], ["embedding.block=null: must be a whole number"]),
    (["embedding=hashed", "embedding.block=true"], ["embedding.block=true: must be a whole number"]),
    (["embedding=hashed", "embedding.compression=abc"], ["embedding.compression=abc: must be a number"]),
    (["embedding=hashed", "+features.C3.compression=abc"], ["features.C3.compression=abc: must be a number"]),
    (["embedding=bloom", "embedding.num_hashes=2.5"], ["embedding.num_hashes=2.5: must be a whole number"]),
    (["embedding=qr", "embedding.partitions=abc"], ["embedding.partitions=abc: must be a whole number"]),
    (["embedding=qr", "embedding.dims=3"], ["embedding.dims=3: must be a list of whole numbers or null"]),
    (["model.embedding_dim=1.5"], ["model.embedding_dim=1.5: must be a whole number"]),
    (["model.bottom_mlp=null"], ["model.bottom_mlp=null: must be a list of whole numbers"]),
    (["model.top_mlp=1.5"], ["model.top_mlp=1.5: must be a list of whole numbers"]),
    (["model=dcn_v2", "model.interaction.num_layers=abc"], ["model.interaction.num_layers=abc: must be a whole"]),
    (["optimizer.dense.fused=abc"], ["optimizer.dense.fused=abc: must be true or false or null"]),
    (["optimizer.dense.fused=-1"], ["optimizer.dense.fused=-1: must be true or false or null"]),
    (["device=null"], ["device=None: must be one of cpu, cuda"]),
    (["resume=true"], ["resume=True", "never, auto or the path"]),
    (["resume_despite=[1,2]"], ["resume_despite=[1, 2]", "list of keys"]),
    (["resume_despite=[sed]"], ["resume_despite=[sed]", "compression", "did you mean seed?"]),
    (["resume_despite=[trainer.batch_size]"], ["trainer.batch_size", "did you mean batch_size?"]),
    (["features.C3.compression=0.05"], ["+features.C3.compression"]),
]


@pytest.mark.once
@pytest.mark.parametrize("arguments, words", REFUSED, ids=[" ".join(arguments) for arguments, _ in REFUSED])
def test_refused_with_the_key_and_what_is_allowed(arguments, words, cli):
    status, out, err = cli(*SMALL, *arguments)
    assert status == 2
    message = next(line for line in err.splitlines() if line.startswith("error: "))
    assert all(word in message for word in words), message
    assert "Traceback" not in err


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments, line",
    [
        (["compression=0.5"], "embedding=dense: its rows are given, so compression=0.5 does not apply to it"),
        (["+features.C3.compression=0.05"], "features.C3=dense: its rows are given, so compression=0.05 does not"),
        (["embedding=hashed", "dense_below=4000"], "embedding=hashed: no feature gets it, all others have fewer rows"),
    ],
)
def test_what_of_a_choice_has_no_effect_is_said(arguments, line, cli):
    status, out, _ = cli(*SMALL, "trainer.max_steps=1", "trainer.save_checkpoint=false", *arguments)
    assert status == 0 and line in out


@pytest.mark.once
def test_a_key_that_has_no_default_is_named(cli):
    status, _, err = cli("data=criteo_1tb")
    assert status == 2 and "error: data.path is not set, and has no default: data.path=..." in err


@pytest.mark.once
def test_every_key_misspelt_by_one_letter_is_refused_with_the_right_suggestion(cli):
    keys = [*keys_below(""), *(f"trainer.{key}" for key in keys_below("trainer"))]
    keys = [key for key in keys if key not in ("features", "trainer")]
    right = 0
    for key in keys:
        middle = len(key) - len(key.rpartition(".")[2]) // 2 - 1
        status, _, err = cli(f"{key[:middle]}{key[middle + 1 :]}=1")
        assert status == 2, key
        right += bool(re.search(rf"did you mean {key.rpartition('.')[2]}\?", err))
    assert right >= 0.95 * len(keys)


@pytest.mark.once
def test_misspelt_key_is_refused_by_the_real_process_with_status_2(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "compresion=0.1"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "did you mean compression?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.once
@pytest.mark.parametrize("asked", [["native=off", "linear=onednn"], ["native=off", "precision=bf16"]], ids=" ".join)
def test_native_off_is_obeyed_by_the_real_process(asked, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "EMBEDDINGS_NATIVE"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *asked, *SMALL, "hydra.run.dir=run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["native"] is False


def test_a_run_says_that_gradients_of_16_bit_weights_are_rounded(cli):
    asked = ("embedding.precision=bf16", *SMALL, "trainer.max_steps=1")
    words = "gradients of bf16 weights are rounded to 16 bits"
    assert words in cli(*asked, "optimizer.fused=false")[1] and words not in cli(*asked)[1]


# --- the memory ledger -----------------------------------------------------------------------------------------------

OPTIMIZERS = sorted(path.stem for path in (ROOT / "conf/optimizer/embedding").glob("*.yaml"))


def mib(text: str, name: str) -> float:
    return float(re.search(rf"{name} ([\d.,]+) MiB", text).group(1).replace(",", ""))


# every backend with every optimizer: tests/test_ledger.py
@pytest.mark.once
@pytest.mark.parametrize("name, optimizer", zip(BACKENDS, cycle(OPTIMIZERS), strict=False))
def test_what_a_run_says_it_needs_before_it_allocates_is_what_it_holds(name, optimizer, cli, tmp_path):
    accumulate = "sorted" if name in ("hashed", "fast") else "rows"
    choice = [f"embedding={name}", f"optimizer/embedding={optimizer}", f"embedding.accumulate={accumulate}"]
    large = ["data.cardinalities=[50, 20000, 30000]", "compression=0.5"]
    status, out, err = cli(*choice, *SMALL, *large, "optimizer/dense=sgd", "optimizer.fused=false")
    assert status == 0, err
    (said,) = (line for line in out.splitlines() if line.startswith("embeddings need"))
    summary = summary_of(next((tmp_path / "runs").glob("*/*")))
    held = {key: summary["last"][f"memory/{key}_bytes"] / 2**20 for key in ("embedding", "optimizer", "gradient")}
    assert mib(said, "weights") == pytest.approx(held["embedding"], abs=0.0051, rel=0.005)
    assert mib(said, "optimizer") == pytest.approx(held["optimizer"], abs=0.0051, rel=0.005)
    assert mib(said, "need") == pytest.approx(
        sum(mib(said, key) for key in ("weights", "optimizer", "gradients up to")), abs=0.011, rel=0.005
    )
    if accumulate == "sorted":
        assert mib(said, "gradients up to") == pytest.approx(held["gradient"], abs=0.0051, rel=0.005)
    else:  # ids repeat in a batch, so it touches fewer
        assert 0.1 * mib(said, "gradients up to") < held["gradient"] <= mib(said, "gradients up to") + 0.0051
    serving, saved = summary["last"]["memory/serving_bytes"], summary["checkpoint_bytes"]
    tensors = serving + summary["last"]["memory/optimizer_bytes"]
    assert (
        serving > summary["last"]["memory/embedding_bytes"] and 0 <= saved - tensors < 20_000
    )  # headers, the manifest


# --- named sweeps, launchers and searches -----------------------------------------------------------------------------

TINY = [*SMALL, "trainer.save_checkpoint=false", "data.num_samples={train: 1024, valid: 512, test: 512}"]
THREE = ["-m", "sweep=pareto", "seed=0", "embedding=hashed", "data.min_count=1", *TINY]
ONE = [*THREE, "embedding.block=8", "embedding.shared=true"]  # makes the three grids one


MEASURED = ("samples_per_second", "peak_bytes")


def results(folder: Path) -> list[dict]:
    """The rows of a sweep's report, less what is measured of the machine."""
    rows = list(csv.DictReader((folder / "report.csv").open()))
    return [{key: value for key, value in row.items() if key not in MEASURED} for row in rows]


@pytest.mark.once
@pytest.mark.parametrize(
    "name, more, num_jobs",
    [
        ("pareto", [], 5 * 4 * 3 + 3 + 4 * 3),  # 5 methods at 4 ratios of 3 seeds beside two baselines
        ("pareto", ["seed=7", "data.cardinalities=[50,20]"], 5 * 4 + 1 + 4),
        ("pareto", ["seed=range(0,4)"], 4 * (5 * 4 + 1 + 4)),
        ("pareto", ["seed=0", "optimizer=choice(sgd,adam)", "model=glob(d*n_v2)"], 2 * (5 * 4 + 1 + 4)),
        ("papers", [], 54),  # block=1,${model.embedding_dim} is two of them
    ],
)
def test_the_jobs_of_a_named_sweep_are_counted_as_hydra_makes_them(name, more, num_jobs):
    lines = jobs.grids(name, ["-m", f"sweep={name}", *more])
    assert sum(map(train.count_jobs, lines)) == num_jobs


@pytest.mark.once
def test_a_named_sweep_runs_its_grids_reports_and_runs_again_only_what_is_missing(cli, tmp_path):
    status, out, err = cli(*THREE, "compression=0.5")
    assert status == 0, err
    folder = tmp_path / "multirun/pareto"
    first, folders = results(folder), sorted(path.parent for path in folder.glob("*/summary.json"))
    assert len(first) == len(folders) == 3 and "2 of 3 jobs done" in out and first[0]["configuration"] in out
    when = [(path / "summary.json").stat().st_mtime_ns for path in folders]
    (folders[1] / "summary.json").unlink()  # as a kill leaves it
    status, out, err = cli(*THREE, "compression=0.5")
    assert status == 0, err
    assert out.count("has its result") == 2 and results(folder) == first
    now = [(path / "summary.json").stat().st_mtime_ns for path in folders]
    assert [a == b for a, b in zip(when, now, strict=True)] == [True, False, True]
    assert (folders[1] / "attempt-1/metrics.jsonl").exists()


@pytest.mark.once
def test_a_sweep_goes_on_after_a_job_that_fails_names_it_and_ends_with_status_1(cli, tmp_path):
    status, out, err = cli(*ONE, "compression=0.00001,0.5")
    assert status == 1
    assert len(results(tmp_path / "multirun/pareto")) == 1
    assert "1 of 2 runs have no result" in out and "compression=1e-05" in out and "cannot reach it" in out
    assert err.count("FAILED") == 1


@pytest.mark.once
def test_a_sweeps_folder_with_the_result_of_another_configuration_is_refused_and_kept(cli, tmp_path):
    assert cli(*ONE, "compression=0.5")[0] == 0
    (file,) = (tmp_path / "multirun/pareto").glob("*/summary.json")
    kept = file.read_text().replace(summary_of(file.parent)["config_hash"], "0" * 16)  # conf has changed since
    file.write_text(kept)
    status, _, err = cli(*ONE, "compression=0.5")
    assert status == 2 and "has the result of another configuration" in err and "hydra.sweep.dir" in err
    assert file.read_text() == kept


@pytest.mark.once
@pytest.mark.parametrize("name", sorted(path.stem for path in (train.CONF / "sweep").glob("*.yaml")))
def test_every_sweep_has_three_seeds_or_more(name):
    lines = jobs.grids(name, ["-m", f"sweep={name}"])
    assert sum(map(train.count_jobs, lines)) >= 3 * len(lines)


@pytest.fixture
def clicks(tmp_path) -> list[str]:
    """The arguments for a table of 600 made-up rows, clicks.csv."""
    rows = "".join(f"{i % 3 // 2},{i},{i % 50}\n" for i in range(600))
    (tmp_path / "clicks.csv").write_text(f"click,user,site\n{rows}")
    return [
        "data=table",
        "data.path=clicks.csv",
        "data.label=click",
        "data.categorical=[user,site]",
        "data.cache=cache",
    ]


def halve(file: Path) -> None:
    """Other data in the same file."""
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]))


@pytest.mark.once
@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
def test_the_result_of_other_data_in_the_same_file_is_refused_and_kept(sweep, cli, clicks, tmp_path):
    one = [argument for argument in ONE if argument not in SMALL + TINY]
    more = [*one, "compression=0.5"] if sweep else ["resume=auto", "hydra.run.dir=run"]
    command = [*clicks, *more, "dense_below=0", "trainer.max_steps=2"]
    assert cli(*command)[0] == 0
    (file,) = tmp_path.rglob("summary.json")
    kept, had = file.read_text(), summary_of(file.parent)["data_fingerprint"]
    halve(tmp_path / "clicks.csv")
    status, _, err = cli(*command)
    key = "hydra.sweep.dir" if sweep else "hydra.run.dir"
    assert status == 2 and f"has the result of other data (fingerprint {had}, now " in err and f"another {key}" in err
    assert file.read_text() == kept and list(tmp_path.rglob("summary.json")) == [file]


@pytest.mark.once
def test_the_samples_of_a_cut_off_are_those_of_the_data_that_it_cuts(cli, clicks, tmp_path):
    assert cli("-m", "data.min_count=1,20", *clicks, "trainer.max_steps=1", "hydra.sweep.dir=two")[0] == 0
    whole, cut = (summary_of(tmp_path / f"two/{number}") for number in (0, 1))
    assert whole["samples_fingerprint"] == cut["samples_fingerprint"] == whole["data_fingerprint"]
    assert cut["data_fingerprint"] != whole["data_fingerprint"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-m", "hydra.sweep.dir=m/${now:%Y}"], "must be the plain name of a folder"),
        (["-m", "hydra.sweep.subdir=all"], "each job has a folder of its own"),
        (["hydra.mode=MULTIRUN"], "several runs are python train.py -m"),
        (["expected={source: a, auc: 0.7, within: inf}"], "expected.within=inf"),
        (["expected={source: a, auc: 0.7, within: 1, at_best: true}"], "needs trainer.eval_every above 0"),
    ],
    ids=["unresolved", "one-folder", "mode", "infinite", "no-best"],
)
@pytest.mark.once
def test_what_would_lose_jobs_or_results_is_refused_before_anything_runs(arguments, words, cli, tmp_path):
    status, _, err = cli("embedding=hashed", "compression=0.5", *SMALL, *arguments)
    assert status == 2 and words in err
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.once
def test_several_runs_begin_wherever_the_flag_stands_in_a_quoted_folder_and_a_failed_ones_traceback_is_kept(
    cli, tmp_path
):
    arguments = ["embedding=hashed", "compression=0.00001", "seed=0", *SMALL, "trainer.max_steps=1", "-m"]
    status, _, err = cli(*arguments, "hydra.sweep.dir='é=many'")
    assert status == 1 and "1 of 1 runs have no result" in err and "cannot reach it" in err
    assert "train(config, folder)" in (tmp_path / "é=many/0/traceback.txt").read_text()


@pytest.mark.once
def test_a_sweep_without_multirun_of_an_unknown_name_or_with_a_search_is_refused(cli, tmp_path):
    status, _, err = cli("sweep=pareto")
    assert status == 2 and "python train.py -m sweep=pareto" in err
    status, _, err = cli("-m", "sweep=paret")
    assert status == 2 and err.startswith("error: sweep=paret: must be one of ") and "did you mean pareto?" in err
    status, _, err = cli("-m", "sweep=pareto", "hydra/sweeper=optuna")
    assert status == 2 and "it takes no hydra/sweeper" in err
    assert not list(tmp_path.iterdir())


def _run_without_main(folder: Path, arguments: list[str]) -> None:
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    train.run()


@pytest.mark.once
def test_a_job_in_a_fresh_process_finds_its_resolvers_and_leaves_its_folder(cli, tmp_path):
    folder = tmp_path / "multirun/pareto"
    jobs.announce(folder, 1)
    arguments = [*ONE, "compression=0.5", f"hydra.sweep.dir={folder}"]
    other = multiprocessing.get_context("spawn").Process(target=_run_without_main, args=(tmp_path, arguments))
    other.start()
    other.join(timeout=100)
    assert other.exitcode == 0
    (job,) = (path.parent for path in folder.glob("*/summary.json"))
    assert job.name.startswith("compression=0.5,") and summary_of(job)["status"] == "completed"
    status, out, err = cli(*ONE, "compression=0.5")
    assert status == 0 and out.count("has its result") == 1, err


@pytest.mark.once
@pytest.mark.launchers
@pytest.mark.parametrize("launcher, package", [("joblib", "joblib"), ("submitit_local", "submitit")])
def test_a_launchers_jobs_end_as_those_of_one_process(launcher, package, cli, tmp_path):
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    arguments = ["-m", "embedding=hashed", "compression=0.00001,0.5", *TINY]
    assert cli(*arguments, "hydra.sweep.dir=one")[0] == 1
    command = [sys.executable, str(ROOT / "train.py"), *arguments, f"hydra/launcher={launcher}"]
    done = subprocess.run([*command, "hydra.sweep.dir=many"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "1 of 2 runs have no result" in done.stderr, done.stderr
    assert "ConfigError: compression=1e-05" in (tmp_path / "many/0/error.txt").read_text()
    one, many = (summary_of(tmp_path / name / "1") for name in ("one", "many"))
    assert one["last"]["test/log_loss"] == many["last"]["test/log_loss"] and one["config_hash"] == many["config_hash"]
    named = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *ONE, "compression=0.5,0.2", f"hydra/launcher={launcher}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert named.returncode == 0, named.stderr
    assert len(results(tmp_path / "multirun/pareto")) == 2


@pytest.mark.once
@pytest.mark.launchers
def test_optuna_maximises_the_validation_auc(cli, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "embedding=hashed"]
    search += ["compression=choice(0.5,0.2)", "optimizer.dense.lr=interval(0.001,0.1)", *TINY]
    maximise = "hydra.sweeper.direction=maximize"
    status, _, err = cli(*search, maximise, "hydra.sweep.dir=found")
    assert status == 0, err
    aucs = [summary_of(tmp_path / f"found/{number}")["last"]["eval/auc"] for number in range(3)]
    assert yaml.safe_load((tmp_path / "found/optimization_results.yaml").read_text())["best_value"] == max(aucs)
    status, _, err = cli(
        *search, maximise, "hydra.sweep.dir=test", "data.num_samples={train: 1024, valid: 0, test: 512}"
    )
    assert status == 2 and "a search is judged on the validation split" in err
    status, _, err = cli(
        *search, maximise, "hydra.sweep.dir=fails", "hydra.sweeper.max_failure_rate=1", "device=cuda:99"
    )
    assert status == 1 and "3 of 3 runs have no result" in err


@pytest.mark.once
def test_a_search_that_would_minimise_is_refused(monkeypatch):
    for direction, answer in ((None, False), ("maximize", True)):
        sweeper = {} if direction is None else {"direction": direction}
        monkeypatch.setattr(train.HydraConfig, "initialized", lambda: True)
        monkeypatch.setattr(train.HydraConfig, "get", lambda sweeper=sweeper: SimpleNamespace(sweeper=sweeper))
        assert train.is_search() == answer
    monkeypatch.setattr(train.HydraConfig, "get", lambda: SimpleNamespace(sweeper={"direction": "minimize"}))
    with pytest.raises(train.ConfigError, match="direction=minimize: runs are judged by eval/auc"):
        train.is_search()


@pytest.mark.once
@pytest.mark.slow
def test_a_sweep_killed_at_random_moments_gives_the_report_of_one_never_killed(cli, tmp_path):
    arguments = [*THREE, "compression=0.5,0.2", "data.num_samples={train: 200000, valid: 1024, test: 1024}"]
    status, _, err = cli(*arguments, "hydra.sweep.dir=whole")
    assert status == 0, err
    command = [sys.executable, str(ROOT / "train.py"), *arguments, "hydra.sweep.dir=killed"]
    rng = random.Random(0)
    for _ in range(10):
        with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(timeout=rng.uniform(2, 7))
            except subprocess.TimeoutExpired:
                process.kill()
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_fused_or_not_a_run_ends_with_the_same_weights_and_fused_keeps_no_gradient(cli, tmp_path):
    ends = {}
    for fused in ("auto", "false"):
        folder = tmp_path / fused
        arguments = ["embedding=hashed", "compression=0.5", f"optimizer.fused={fused}", *SMALL]
        assert cli(*arguments, f"hydra.run.dir={folder}")[0] == 0
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["fused"] == (fused == "auto")
        assert (summary["last"]["memory/gradient_bytes"] == 0) == summary["fused"]
        ends[fused] = summary["last"]["train/loss"], summary["last"]["test/auc"]
    assert ends["auto"] == ends["false"]

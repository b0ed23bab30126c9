"""Sweeps read back: intervals, paired verdicts, the front, reports of what is missing; and jobs that are done once."""

import csv
import json
import math
import multiprocessing
import os
from pathlib import Path

import pytest

from dlrm import jobs
from dlrm.refusals import CONF, ConfigError
from dlrm.statistics import interval, paired
from dlrm.sweep import configurations, front, read_runs
from dlrm.sweep_report import main

SWEEPS = sorted(path.stem for path in (CONF / "sweep").glob("*.yaml"))


def make_run(folder: Path, *overrides: str, auc: float | None = 0.79, size=1000.0, status="completed", **facts) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text("".join(f"- {word}\n" for word in overrides))
    seed = next((int(word.split("=")[1]) for word in overrides if word.startswith("seed=")), 0)
    last = {"test/auc": auc, "test/log_loss": 0.4, "memory/embedding_bytes": size}
    summary = {"seed": seed, "status": status, "last": last, "reasons": {"test/auc": "one class"}, "data": "toy"}
    summary |= {"samples_per_second": 1e5, "dense_equivalent_bytes": 4000, "git_commit": "abc", "torch": "2"} | facts
    (folder / "summary.json").write_text(json.dumps(summary))


# --- statistics -------------------------------------------------------------------------------------------------------


def test_an_interval_is_students_of_the_textbook():
    found = interval([1.0, 2.0, 3.0])  # t(0.975, 2) = 4.30265, standard deviation 1
    assert found.mean == 2.0 and found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found.differs_from_zero is False and interval([2.0, 2.1, 2.2]).differs_from_zero
    assert interval([5.0]) == (5.0, None) and not interval([5.0]).differs_from_zero
    with pytest.raises(ValueError, match="at least one value"):
        interval([])


def test_a_paired_difference_takes_out_what_a_seed_does_to_both():
    theirs = {seed: 0.7 + 0.01 * seed for seed in range(5)}
    ours = {seed: value + 0.001 + 0.0001 * (seed % 2) for seed, value in theirs.items()}
    assert paired(ours, theirs).differs_from_zero and paired(ours, theirs).mean == pytest.approx(0.00104)
    assert not interval([*ours.values()]).half < 0.01  # unpaired, the seeds' spread hides it
    assert paired({1: 0.5}, {2: 0.4}) is None
    assert paired({1: 0.5, 2: 0.6}, {2: 0.4}) == (pytest.approx(0.2), None)


def test_the_front_is_what_no_other_point_beats():
    points = [(1, 0.70), (2, 0.75), (3, 0.74), (4, 0.80), (5, 0.80), (2, 0.75), (1, 0.69)]
    assert front(points) == [True, True, False, True, False, True, False]


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def sweep(tmp_path):
    aucs = {"dense": 0.790, "hashed": 0.785, "qr": 0.7899}
    for i, (name, auc) in enumerate(aucs.items()):
        for seed in range(3):
            wobble = 0.001 * seed + (0.0004 * (-1) ** seed if name == "qr" else 0.0001 * seed)
            words = (f"embedding={name}", f"seed={seed}", "trainer.epochs=2", "sweep=pareto", "data.path=/x")
            make_run(tmp_path / f"{name}-{seed}", *words, auc=auc + wobble, size=4000 / (i + 1))
    return tmp_path


def test_runs_that_differ_in_their_seed_are_one_configuration_called_by_what_tells_it_apart(sweep):
    found = configurations(read_runs(sweep))
    assert [one.label for one in found] == ["embedding=dense", "embedding=hashed", "embedding=qr"]
    assert found[1].by_seed("test/auc") == {0: 0.785, 1: pytest.approx(0.7861), 2: pytest.approx(0.7872)}
    assert [one.num_bytes for one in found] == [4000, 2000, pytest.approx(4000 / 3)]


def test_a_report_says_means_verdicts_and_the_front_and_draws_them(sweep, capsys):
    assert main([str(sweep)]) == 0
    rows = list(csv.DictReader((sweep / "report.csv").open()))
    assert [row["configuration"] for row in rows] == ["embedding=dense", "embedding=hashed", "embedding=qr"]  # by bytes
    assert [row["verdict"] for row in rows] == ["baseline", "worse", "same within noise"]
    assert [row["on_front"] for row in rows] == ["True", "False", "True"]
    assert float(rows[1]["difference"]) == pytest.approx(-0.005) and float(rows[1]["of_dense"]) == 0.5
    assert float(rows[0]["test_auc"]) == pytest.approx(0.7911)
    text = (sweep / "report.md").read_text()
    assert text.strip() in capsys.readouterr().out and "all with: trainer.epochs=2" in text
    assert "| `embedding=hashed` | 0.7861 ± 0.0027 |" in text
    assert (sweep / "pareto.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    html = (sweep / "pareto.html").read_text()
    assert "embedding=qr" in html and "same within noise" in html
    assert 'src="http' not in html and "src='http" not in html  # one file, no network


def test_a_column_at_the_best_validation_step_is_there_if_any_run_has_it(sweep):
    assert main([str(sweep)]) == 0
    assert "at best validation" not in (sweep / "report.md").read_text()
    path = sweep / "qr-1/summary.json"
    summary = json.loads(path.read_text())
    summary["last"] |= {"test_at_best/auc": 0.7777, "test_at_best/step": 300}
    path.write_text(json.dumps(summary))
    assert main([str(sweep)]) == 0
    rows = list(csv.DictReader((sweep / "report.csv").open()))
    assert [row["test_auc_at_best"] for row in rows] == ["", "", "0.7777"]
    header, _, *lines = (sweep / "report.md").read_text().splitlines()
    assert header.split(" | ")[1:3] == ["test AUC", "at best validation"] and lines[2].split(" | ")[2] == "0.7777"


def test_the_report_has_the_ratio_asked_for_beside_the_true_one_and_the_ledger(tmp_path):
    for name, nominal, size in (("dense", 1.0, 4000.0), ("hashed", 0.1, 440.0)):
        memory = {"optimizer": 50.0, "gradient": 70.0, "serving": 900.0, "peak": 3 * 2**20}
        for seed in (0, 1):
            folder = tmp_path / f"{name}-{seed}"
            features = [{"nominal": 1}, {"nominal": nominal}]
            make_run(folder, f"embedding={name}", f"seed={seed}", size=size, features=features)
            summary = json.loads((folder / "summary.json").read_text())
            summary["last"] |= {f"memory/{part}_bytes": value + 2 * seed for part, value in memory.items()}
            (folder / "summary.json").write_text(json.dumps(summary))
    assert main([str(tmp_path)]) == 0
    row = list(csv.DictReader((tmp_path / "report.csv").open()))[1]
    assert float(row["nominal"]) == 0.1 and float(row["of_dense"]) == 0.11
    parts = ("optimizer", "gradient", "serving", "peak")
    assert [float(row[f"{part}_bytes"]) for part in parts] == [51, 71, 901, 3 * 2**20 + 1]
    header, _, _, line = (tmp_path / "report.md").read_text().splitlines()[:4]
    shown = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert (shown["nominal"], shown["of dense"], shown["peak MiB"]) == ("0.1", "0.110", "3")


def test_runs_that_say_less_than_others_have_blanks_in_the_report(tmp_path):
    make_run(tmp_path / "old", "embedding=dense", size=4000.0)
    make_run(tmp_path / "new", "embedding=qr", size=400.0, features=[{"nominal": 1}, {"nominal": 0.1}])
    make_run(tmp_path / "each", "embedding=each", size=300.0, features=[{"nominal": 0.2}, {"nominal": 0.1}])
    summary = json.loads((tmp_path / "new/summary.json").read_text())
    summary["last"] |= {"memory/peak_bytes": 2**21}
    (tmp_path / "new/summary.json").write_text(json.dumps(summary))
    assert main([str(tmp_path)]) == 0
    header, _, *lines = (tmp_path / "report.md").read_text().splitlines()[:5]
    shown = [dict(zip(header.split(" | "), line.split(" | "), strict=True)) for line in lines]
    assert [(row["nominal"], row["peak MiB"]) for row in shown] == [("", ""), ("0.1", "2"), ("", "")]


def test_another_baseline_can_be_named_and_an_unknown_one_is_refused(sweep, capsys):
    assert main([str(sweep), "--baseline", "embedding=hashed"]) == 0
    rows = list(csv.DictReader((sweep / "report.csv").open()))
    assert [row["verdict"] for row in rows] == ["better", "baseline", "better"]
    assert main([str(sweep), "--baseline", "embedding=bloom"]) == 2
    assert "baseline 'embedding=bloom': the configurations are embedding=dense;" in capsys.readouterr().err


def test_what_is_of_other_data_is_apart_and_compared_with_its_own_baseline(tmp_path, capsys):
    for i, path in enumerate(("/a/c.csv", "/b/c.csv")):
        facts = {"samples_fingerprint": f"{i}" * 64, "data": f"c.csv {i}"}
        for seed in range(3):
            words = (f"seed={seed}", f"data.path={path}")
            make_run(tmp_path / f"{i}d{seed}", "embedding=dense", *words, auc=0.7 + i * (0.1 + 0.01 * seed), **facts)
            cut = {"data_fingerprint": f"{i}cut", "auc": 0.6 + i * (0.1 + 0.01 * seed), "size": 500.0}
            make_run(tmp_path / f"{i}c{seed}", "embedding=dense", "data.min_count=9", *words, **facts | cut)
    make_run(tmp_path / "old", "embedding=qr", size=400.0, data_fingerprint="2" * 64)
    assert main([str(tmp_path)]) == 0
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    names = ["embedding=dense", "embedding=dense data.min_count=9"]
    labels = ["embedding=qr data:unknown"] + [f"{name} data:{i * 8}" for i in "01" for name in names]
    assert [(row["configuration"], row["seeds"]) for row in rows] == list(zip(labels, "13333", strict=True))
    assert [row["verdict"] for row in rows] == ["baseline"] + ["baseline", "worse"] * 2
    assert [row["on_front"] for row in rows] == ["True"] * 5
    assert [float(row["difference"]) for row in rows if row["difference"]] == pytest.approx([0] + [0, -0.1] * 2)
    text = capsys.readouterr().out
    for line in ("data:00000000: c.csv 0, data.path=/a/c.csv", "data:11111111: c.csv 1, data.path=/b/c.csv"):
        assert line in text.splitlines()
    assert main([str(tmp_path), "--baseline", labels[2]]) == 0
    verdicts = [row["verdict"] for row in csv.DictReader((tmp_path / "report.csv").open())]
    other = "not comparable: the baseline is of other data"
    assert verdicts == [other, "better", "baseline", other, other]
    assert main([str(tmp_path), "--baseline", names[1]]) == 0
    verdicts = [row["verdict"] for row in csv.DictReader((tmp_path / "report.csv").open())]
    assert verdicts == [other] + ["better", "baseline"] * 2


def test_a_seed_counts_once_by_its_newest_run_and_the_others_are_listed(tmp_path, capsys):
    for when, (name, native, seed) in enumerate([("z", "auto", 0), ("a", "off", 0), ("b", "auto", 1)]):
        make_run(tmp_path / name, "embedding=qr", f"native={native}", f"seed={seed}", auc=0.5 + when / 10)
        os.utime(tmp_path / name / "summary.json", (when, when))
    assert main([str(tmp_path)]) == 0
    (row,) = csv.DictReader((tmp_path / "report.csv").open())
    assert row["seeds"] == "2" and float(row["test_auc"]) == pytest.approx(0.65)
    assert f"1 of 3 runs repeat a seed and are not counted, as the newest of each seed is:\n  {tmp_path}/z [" in (
        capsys.readouterr().out
    )


def test_missing_failed_and_half_written_runs_are_listed_and_make_the_status_1(sweep, capsys):
    make_run(sweep / "a", "embedding=bloom", "seed=0", status="failed: loss is nan at step 7")
    make_run(sweep / "b", "embedding=bloom", "seed=1", status="interrupted")
    make_run(sweep / "c", "embedding=bloom", "seed=2", auc=None)
    for name in "def":
        make_run(sweep / name, "embedding=bloom", f"seed={ord(name)}")
    (sweep / "d/summary.json").unlink()
    (sweep / "e/summary.json").write_text('{"seed": 1, "sta')
    (sweep / "f/summary.json").unlink()
    (sweep / "f/error.txt").write_text("ConfigError: out of reach\n")
    assert main([str(sweep)]) == 1
    out = capsys.readouterr().out
    assert "6 of 15 runs have no result" in out
    for line in ("a [embedding=bloom seed=0]: failed: loss is nan at step 7", "b [embedding=bloom seed=1]: interrupted",
                 "c [embedding=bloom seed=2]: one class", "d [embedding=bloom seed=100]: unfinished",
                 "e [embedding=bloom seed=101]: summary.json cannot be read",
                 "f [embedding=bloom seed=102]: failed: ConfigError: out of reach"):  # fmt: skip
        assert line in out
    assert len(list(csv.DictReader((sweep / "report.csv").open()))) == 3


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_one_run_alone_is_reported_without_an_interval(tmp_path):
    make_run(tmp_path / "only", "embedding=qr")
    assert main([str(tmp_path)]) == 0
    assert "| `embedding=qr` | 0.7900 |" in (tmp_path / "report.md").read_text()


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_dense_and_the_frequency_cut_off(name):
    lines = jobs.grids(name, ["-m", f"sweep={name}"])
    assert any("embedding=dense" in line and not any("min_count" in word for word in line) for line in lines)
    assert any(word.startswith("data.min_count=") for line in lines for word in line)


def test_what_the_user_says_replaces_a_grids_key():
    lines = jobs.grids("pareto", ["-m", "sweep=pareto", "seed=0", "embedding=qr", "compression=0.5,0.1"])
    assert all([word for word in line if word.startswith("embedding=")] == ["embedding=qr"] for line in lines)
    assert all([word for word in line if word.startswith("seed=")] == ["seed=0"] for line in lines)
    assert len({tuple(line) for line in lines}) == len(lines)


def test_an_unknown_sweep_is_refused_with_those_known():
    with pytest.raises(ConfigError, match="sweep=paretto: must be one of .*pareto.* - did you mean pareto?"):
        jobs.grids("paretto", [])


def test_a_jobs_folder_is_named_by_its_overrides_and_tells_jobs_apart():
    assert jobs.job_folder(None, 7, "seed=1") == "7"
    assert jobs.job_folder({"grids": []}, 7, "compression=0.1,seed=1,sweep=pareto") == "compression=0.1,seed=1"
    long = [jobs.job_folder({}, 0, f"data.path=/a b/{'x' * 300},seed={seed}") for seed in (1, 2)]
    assert long[0] != long[1] and all(len(name) <= 150 and "/" not in name and " " not in name for name in long)


def _try(folder: Path, answers) -> None:
    with jobs.claim(folder) as is_ours:
        answers.put(is_ours)


def test_a_job_is_claimed_by_one_process_until_that_lets_go(tmp_path):
    context = multiprocessing.get_context("fork")  # its own open of the file is what a lock is of; spawn takes seconds
    answers = context.Queue()

    def other() -> bool:
        process = context.Process(target=_try, args=(tmp_path, answers))
        process.start()
        process.join()
        return answers.get(timeout=60)

    with jobs.claim(tmp_path) as is_ours:
        assert is_ours and not other()
    assert other()


def test_what_an_attempt_left_is_set_aside_and_never_overwritten(tmp_path):
    (tmp_path / ".hydra").mkdir()
    for number, text in ((1, "first"), (2, "second")):
        (tmp_path / "metrics.jsonl").write_text(text)
        (tmp_path / "lock").write_text("")
        jobs.set_aside(tmp_path)
        assert (tmp_path / f"attempt-{number}/metrics.jsonl").read_text() == text
        assert not (tmp_path / "metrics.jsonl").exists()
    jobs.set_aside(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".hydra", "lock", "attempt-1", "attempt-2"}


def test_only_a_completed_run_of_the_same_configuration_and_data_counts_as_done(tmp_path):
    def is_completed(config_hash="1234", fingerprint="ab"):
        return jobs.is_completed(tmp_path, config_hash, lambda: fingerprint, key="hydra.run.dir")

    summary = {"config_hash": "1234", "data_fingerprint": "ab"}
    assert not is_completed()
    (tmp_path / "summary.json").write_text('{"status": "comp')
    assert not is_completed()
    for status in ("interrupted", "failed: disk full"):
        (tmp_path / "summary.json").write_text(json.dumps(summary | {"status": status}))
        assert not is_completed("5678", "cd")
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"status": "completed"}))
    assert is_completed()
    with pytest.raises(ConfigError, match=r"result of another configuration .*: name another hydra\.run\.dir"):
        is_completed("5678")
    with pytest.raises(
        ConfigError, match=r"result of other data \(fingerprint ab, now cd\): name another hydra\.run\.dir"
    ):
        is_completed(fingerprint="cd")

"""The reliability scripts, each on a few cases: benchmarks/reliability/results has the long ones."""

import re
from pathlib import Path

import pytest

from benchmarks.reliability import flips, harm, kills, runs, table
from dlrm import linear

pytestmark = pytest.mark.once  # which kernels run changes nothing of it
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path / "results"))


def test_killed_runs_end_as_one_that_is_left_alone(capsys):
    assert kills.main(["--kills", "2", "--inside", "1", "--samples", "12000"]) == 0
    assert re.search(r"ended as the run that was left alone +2\n", capsys.readouterr().out)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run with two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    status, text = runs.finish(runs.command(folder, 2 * 128 * runs.EVERY))
    assert status == 0, text
    return folder


def test_every_flipped_bit_is_found(run, capsys):
    assert flips.main(["--flips", "60", "--run", str(run)]) == 0
    assert re.search(r"found, and the checkpoint before taken +60\n", capsys.readouterr().out)


def test_runs_that_differ_are_told_apart(run, tmp_path):
    """So the scripts could fail."""
    other = tmp_path / "other"
    assert runs.finish(runs.command(other, 1280, "seed=1"))[0] == 0
    assert runs.differences(run, run) == []
    found = runs.differences(other, run)
    assert "model.safetensors" in found and "metrics.jsonl" in found and "TensorBoard's events" in found


@pytest.mark.skipif("GenuineIntel" not in linear.cpu_flags(), reason="MKL promises it on Intel's CPUs only")
def test_a_run_is_the_same_with_one_thread_and_with_two(tmp_path):
    """With batches whose sums MKL would split among threads: without MKL_CBWR the second step's weights differ."""
    folders = [tmp_path / "one", tmp_path / "two"]
    for threads, folder in enumerate(folders, 1):
        process = runs.start(runs.command(folder, 20_000, "trainer.batch_size=2048", "deterministic=true"), threads)
        text = process.communicate(timeout=600)[0]
        assert process.returncode == 0, text
    assert runs.differences(*folders) == []


def test_manifests_that_were_made_to_do_harm_are_refused_and_change_nothing(capsys):
    assert harm.main(["--cases", "400"]) == 0
    refused = re.search(r"refused, nothing changed +(\d+)\n", capsys.readouterr().out)
    assert int(refused[1]) > 300


def test_the_readme_has_the_table_of_the_recorded_results():
    text = table.README.read_text()
    assert table.rewritten(text) == text, "python -m benchmarks.reliability.table"

"""The reliability scripts, each on a few cases: benchmarks/reliability/results has the long ones."""

import re
from pathlib import Path

import pytest

from benchmarks.reliability import flips, harm, kills, runs, table

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


def test_manifests_that_were_made_to_do_harm_are_refused_and_change_nothing(capsys):
    assert harm.main(["--cases", "400"]) == 0
    refused = re.search(r"refused, nothing changed +(\d+)\n", capsys.readouterr().out)
    assert int(refused[1]) > 300


def test_the_readme_has_the_table_of_the_recorded_results():
    text = table.README.read_text()
    assert table.rewritten(text) == text, "python -m benchmarks.reliability.table"

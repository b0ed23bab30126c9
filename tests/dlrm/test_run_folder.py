"""A folder per run, also for runs that start together."""

import subprocess
import sys
from multiprocessing import get_context

from dlrm.run_folder import config_hash, git_commit, make_run_folder


def _make(barrier, path, queue):
    barrier.wait()
    queue.put(str(make_run_folder(path)))


def test_twenty_processes_at_once_get_twenty_folders(tmp_path):
    context = get_context("fork")
    barrier, queue = context.Barrier(20), context.Queue()
    path = tmp_path / "2026-01-01" / "10-00-00"
    processes = [context.Process(target=_make, args=(barrier, path, queue)) for _ in range(20)]
    for process in processes:
        process.start()
    made = {queue.get(timeout=30) for _ in processes}
    for process in processes:
        process.join()
    assert made == {str(folder) for folder in path.parent.iterdir()} and len(made) == 20
    assert made == {str(path)} | {f"{path}-{i}" for i in range(1, 20)}


def test_config_hash_ignores_order_and_sees_every_value():
    assert config_hash({"a": 1, "b": {"c": [1, 2]}}) == config_hash({"b": {"c": [1, 2]}, "a": 1})
    assert config_hash({"a": 1}) != config_hash({"a": 2}) and len(config_hash({})) == 16


def test_git_commit_is_the_checkouts_own():
    commit = git_commit()
    command = ["git", "-C", str(__file__.rsplit("/", 1)[0]), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert commit.removesuffix("-dirty") == result.stdout.strip() if result.returncode == 0 else commit is None


def test_importing_the_package_writes_nothing_and_needs_no_config():
    command = [sys.executable, "-c", "import dlrm.trainer, sys; assert not {'hydra', 'omegaconf'} & sys.modules.keys()"]
    subprocess.run(command, check=True, cwd=__file__.rsplit("/tests/", 1)[0])

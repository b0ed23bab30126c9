"""A checkpoint gives back every bit, or says what is wrong; and a big table is never held twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dlrm import checkpoint

COUNTERS = {"step": 12, "epoch": 1, "sample": 34, "fingerprint": "f"}


def make_parts(seed, *, rows=5, kind=torch.optim.Adam, steps=2):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"table": nn.Embedding(rows, 3), "layer": nn.Linear(3, 1)})
    model.register_buffer("count", torch.tensor(seed))
    model.register_buffer("none", torch.empty(0, 3))
    optimizers = {
        "dense_optimizer": kind(model["layer"].parameters(), lr=0.1),
        "embedding_optimizer": torch.optim.Adagrad(model["table"].parameters(), lr=0.1),
    }
    for _ in range(steps):
        model["layer"](model["table"](torch.tensor([0, 1, 1]))).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
    return model, optimizers


def flat(model, optimizers):
    tensors = dict(model.state_dict())
    for name, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{entry}": torch.as_tensor(value) for entry, value in state.items()}
    return tensors


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("steps", [0, 2])  # before its first step, Adam has no state of its own
def test_load_gives_back_every_bit_and_the_counters(tmp_path, kind, steps):
    saved, other = make_parts(1, kind=kind), make_parts(2, kind=kind, steps=steps)
    expected = {key: tensor.clone() for key, tensor in flat(*saved).items()}
    checkpoint.save(tmp_path / "checkpoints", *saved, COUNTERS)
    pointers = [parameter.data_ptr() for parameter in other[0].parameters()]
    assert checkpoint.load(tmp_path, *other) == COUNTERS == checkpoint.read_counters(tmp_path)
    assert_equal(flat(*other), expected)
    assert pointers == [parameter.data_ptr() for parameter in other[0].parameters()]


def test_training_goes_on_bitwise_after_load(tmp_path):
    saved, other = make_parts(1), make_parts(2, steps=0)
    checkpoint.save(tmp_path, *saved, COUNTERS)
    checkpoint.load(tmp_path, *other)
    for model, optimizers in (saved, other):
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        model["layer"](model["table"](torch.tensor([4, 0]))).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
    expected, found = flat(*saved), flat(*other)
    for key in expected.keys() - {"count"}:
        assert torch.equal(expected[key], found[key]), key


def test_newest_checkpoint_is_found_from_run_checkpoints_and_own_folder(tmp_path):
    parts = make_parts(1)
    for step in (9, 1000, 200):
        path = checkpoint.save(tmp_path / "checkpoints", *parts, COUNTERS | {"step": step})
    assert checkpoint.find(tmp_path).name == checkpoint.find(tmp_path / "checkpoints").name == "step_000001000"
    assert checkpoint.find(path) == path and path.name == "step_000000200"
    with pytest.raises(ValueError, match="resume=.*nowhere: no checkpoint there"):
        checkpoint.find(tmp_path / "nowhere")


def test_saving_a_step_again_replaces_it_and_leaves_no_litter(tmp_path):
    (tmp_path / ".tmp-step_000000003").mkdir()  # of a run that was killed
    checkpoint.save(tmp_path, *make_parts(1), COUNTERS)
    newer = make_parts(2)
    checkpoint.save(tmp_path, *newer, COUNTERS)
    other = make_parts(3)
    checkpoint.load(tmp_path, *other)
    assert_equal(flat(*other), flat(*newer))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000012"]


def test_a_save_that_fails_leaves_the_last_good_one(tmp_path, monkeypatch):
    good = make_parts(1)
    checkpoint.save(tmp_path, *good, COUNTERS)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_tensors", full)
    for step in (12, 13):
        with pytest.raises(OSError):
            checkpoint.save(tmp_path, *make_parts(2), COUNTERS | {"step": step})
    other = make_parts(3)
    checkpoint.load(tmp_path, *other)
    assert_equal(flat(*other), flat(*good))
    assert [path.name for path in tmp_path.iterdir()] == ["step_000000012"]


def test_too_small_a_disk_is_refused_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(OSError, match="needs [0-9,]+ bytes, the disk has 10 free"):
        checkpoint.save(tmp_path, *make_parts(1), COUNTERS)
    assert not list(tmp_path.iterdir())


FILL = """
import resource, sys
from test_checkpoint import COUNTERS, checkpoint, make_parts
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # what a write past the end of the disk does, without a disk
try:
    checkpoint.save(sys.argv[1], *make_parts(1), COUNTERS)
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_while_writing_is_an_os_error_with_needed_and_free_bytes(tmp_path):
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    paths = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parent}"}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | paths)
    assert re.search(r"File too large.*the checkpoint needs [0-9,]+ bytes, the disk has [0-9,]+ free", result.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_new_there", [False, True])
def test_a_replaced_checkpoint_survives_a_crash_before_the_new_one_is_there(tmp_path, is_new_there):
    good, newer = make_parts(1), make_parts(2)
    path = checkpoint.save(tmp_path, *good, COUNTERS)
    path.rename(tmp_path / f".tmp-old-{path.name}")  # between the two renames
    if is_new_there:  # or after both
        written = checkpoint.save(tmp_path / "elsewhere", *newer, COUNTERS)
        written.rename(path)
        written.parent.rmdir()
    checkpoint.save(tmp_path, *make_parts(3), COUNTERS | {"step": 13})
    other = make_parts(4)
    checkpoint.load(path, *other)
    assert_equal(flat(*other), flat(*(newer if is_new_there else good)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000000012", "step_000000013"]


def test_a_failed_rename_brings_the_replaced_checkpoint_back(tmp_path, monkeypatch):
    good, rename = make_parts(1), Path.rename
    path = checkpoint.save(tmp_path, *good, COUNTERS)

    def fail_for_the_new_one(self, target):
        if self.name == f".tmp-{path.name}":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.save(tmp_path, *make_parts(2), COUNTERS)
    other = make_parts(3)
    checkpoint.load(path, *other)
    assert_equal(flat(*other), flat(*good))


@pytest.mark.parametrize("name", ["model", "dense_optimizer", "embedding_optimizer"])
def test_any_flipped_bit_is_found_before_anything_changes(tmp_path, name):
    path = checkpoint.save(tmp_path, *make_parts(1), COUNTERS) / f"{name}.safetensors"
    whole = path.read_bytes()
    other = make_parts(2)
    expected = {key: tensor.clone() for key, tensor in flat(*other).items()}
    for position in range(0, len(whole), 37):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}.safetensors is damaged"):
            checkpoint.load(tmp_path, *other)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}.safetensors is missing"):
        checkpoint.load(tmp_path, *other)
    assert_equal(flat(*other), expected)


def test_a_damaged_manifest_and_a_future_format_are_refused(tmp_path):
    path = checkpoint.save(tmp_path, *make_parts(1), COUNTERS) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format"] == 2
    (path.parent / "manifest.sha256").unlink()
    with pytest.raises(ValueError, match="manifest.sha256 is missing"):
        checkpoint.load(tmp_path, *make_parts(1))
    path.write_text(json.dumps(manifest | {"format": 1}))  # which had no digest
    checkpoint.load(tmp_path, *make_parts(1))
    path.write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="checkpoint format 99; this version reads 2"):
        checkpoint.load(tmp_path, *make_parts(1))
    path.write_text("{")
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        checkpoint.load(tmp_path, *make_parts(1))


def test_another_model_or_optimizer_is_refused_with_the_first_difference(tmp_path):
    checkpoint.save(tmp_path, *make_parts(1), COUNTERS)
    with pytest.raises(
        ValueError, match=r"model tensor 'table.weight' is \['float32', \[5, 3\]\] there and .*\[6, 3\]"
    ):
        checkpoint.load(tmp_path, *make_parts(1, rows=6))
    with pytest.raises(ValueError, match="its dense_optimizer is Adam, this run's is SGD"):
        checkpoint.load(tmp_path, *make_parts(1, kind=torch.optim.SGD))
    model, optimizers = make_parts(1)
    model["new"] = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="model tensor 'new.bias' exists only in this run"):
        checkpoint.load(tmp_path, model, optimizers)


def test_another_optimizer_layout_is_refused_before_anything_changes(tmp_path):
    checkpoint.save(tmp_path, *make_parts(1), COUNTERS)
    model, optimizers = make_parts(2, steps=0)
    table, layer = model["table"].weight, model["layer"]
    for dense, sparse, words in [
        (
            [table, *layer.parameters()],
            [],
            "embedding_optimizer has 0 parameters in this run, too few for the saved '0.s",
        ),
        (layer.parameters(), [table, table.detach().clone()], "'1.step' exists only in this run"),
        (layer.parameters(), [torch.zeros(5, 4)], r"'0.sum' is .*\[5, 3\]\] there and .*\[5, 4\]\] in this run"),
    ]:
        optimizers["dense_optimizer"] = torch.optim.Adam(dense)
        if sparse:
            optimizers["embedding_optimizer"] = torch.optim.Adagrad(sparse)
        else:
            optimizers["embedding_optimizer"].param_groups[0]["params"] = []
            optimizers["embedding_optimizer"].state.clear()
        expected = {key: tensor.clone() for key, tensor in flat(model, optimizers).items()}
        with pytest.raises(ValueError, match=words):
            checkpoint.load(tmp_path, model, optimizers)
        assert_equal(flat(model, optimizers), expected)


@pytest.mark.parametrize("content", ['{"format": 1, "files": {}, "rows": 5}', "[1, 2]", "3"])
def test_a_folder_with_another_manifest_is_refused_as_no_checkpoint(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)  # such as a prepared data folder's
    with pytest.raises(
        ValueError, match=r"resume=.*: no checkpoint: its manifest.json has no .*counters, .*optimizers"
    ):
        checkpoint.read_counters(tmp_path)
    with pytest.raises(ValueError, match="no checkpoint"):
        checkpoint.load(tmp_path, *make_parts(1))


MEASURE = """
import sys, torch
from dlrm import checkpoint, memory
model = torch.nn.Embedding(2**18, 64)  # 64 MiB
optimizer = torch.optim.Adagrad(model.parameters())  # and as much state
optimizers = {"embedding_optimizer": optimizer}
memory.reset_peak("cpu"); before = memory.peak_bytes("cpu")
checkpoint.save(sys.argv[1], model, optimizers, {"step": 1})
saved = memory.peak_bytes("cpu")
checkpoint.load(sys.argv[1], model, optimizers)
print((saved - before) // 2**20, (memory.peak_bytes("cpu") - before) // 2**20)
"""


def test_saving_and_loading_hold_no_second_copy(tmp_path):
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    save_MiB, load_MiB = map(int, result.stdout.split())
    assert save_MiB < 16 and load_MiB < 16  # of 128


@pytest.mark.parametrize("fused", [True, False])
def test_a_count_of_steps_is_read_to_where_the_optimizer_keeps_it(fused):
    optimizer = torch.optim.Adam([torch.empty(2, device="meta", requires_grad=True)])
    optimizer.param_groups[0]["fused"] = fused  # as on CUDA, where a fused step reads it on the device
    manifest = {"files": {"o": {"tensors": {"0.step": ["float32", []]}}}, "optimizers": {"o": {"scalars": {}}}}
    targets = checkpoint._targets(Path("x"), "o", manifest, optimizer)
    assert targets["0.step"].device.type == ("meta" if fused else "cpu")

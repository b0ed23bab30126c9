"""A run's checkpoints: written beside training, rotated, and never of weights that training has moved on meanwhile."""

import hashlib
import json
import threading

import pytest
import torch
from test_checkpoint import COUNTERS, assert_equal, flat, make_parts

from dlrm import checkpoint
from dlrm.checkpoints import Checkpoints, CheckpointSettings

both = pytest.mark.parametrize("asynchronous", [False, True])


def make(folder, parts, *, keep=2, asynchronous=True):
    settings = CheckpointSettings(every=1, keep=keep, asynchronous=asynchronous)
    return Checkpoints(folder, *parts, settings)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@both
def test_the_newest_stay_and_load_gives_back_what_was_saved(tmp_path, asynchronous):
    parts = make_parts(1)
    checkpoints = make(tmp_path, parts, asynchronous=asynchronous)
    for step in (1, 2, 3, 10):
        with torch.no_grad():
            parts[0]["table"].weight.fill_(step)
        checkpoints.begin(COUNTERS | {"step": step})
    checkpoints.wait()
    assert names(tmp_path) == ["step_000000003", "step_000000010"] and checkpoints.last == tmp_path / "step_000000010"
    other = make_parts(2)
    assert checkpoint.load(tmp_path, *other)["step"] == 10
    assert_equal(flat(*other), flat(*parts))


def test_training_goes_on_while_one_is_written_and_is_not_in_it(tmp_path, monkeypatch):
    parts, may_write = make_parts(1), threading.Event()
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *given: (may_write.wait(10), write(*given))[1])
    checkpoints = make(tmp_path, parts)
    before = {key: tensor.clone() for key, tensor in flat(*parts).items()}
    checkpoints.begin(COUNTERS)  # returns, though nothing can be written yet
    with torch.no_grad():
        for tensor in parts[0].state_dict().values():
            tensor.zero_()
    assert not names(tmp_path)
    may_write.set()
    checkpoints.wait()
    other = make_parts(2)
    checkpoint.load(tmp_path, *other)
    assert_equal(flat(*other), before)


@pytest.mark.parametrize("asynchronous", [False, True, "auto"])
def test_a_save_that_waits_writes_the_weights_where_they_are(tmp_path, monkeypatch, asynchronous):
    parts, written = make_parts(1), []
    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", lambda *given: (written.append(given[1]), write(*given))[1])
    checkpoints = make(tmp_path, parts, asynchronous=asynchronous)
    checkpoints.save(COUNTERS | {"step": 1})
    assert checkpoints.last == tmp_path / "step_000000001" and names(tmp_path) == ["step_000000001"]
    mine = checkpoint.contents(*parts)
    for file, tensors in mine.files.items():
        assert all(written[0].files[file][key].data_ptr() == tensor.data_ptr() for key, tensor in tensors.items())


def test_the_best_weights_are_saved_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """In the same folder, where each also clears away what a run that was killed has left."""
    parts, is_written, may_go_on = make_parts(1), threading.Event(), threading.Event()
    write_tensors = checkpoint._write_tensors

    def pause(path, tensors):
        digest = write_tensors(path, tensors)
        if threading.current_thread().name == "checkpoint":
            is_written.set()
            may_go_on.wait(10)
        return digest

    monkeypatch.setattr(checkpoint, "_write_tensors", pause)
    checkpoints = make(tmp_path, parts)
    checkpoints.begin(COUNTERS | {"step": 1})
    assert is_written.wait(10)
    for _ in range(2):  # the second replaces the first
        checkpoint.save_weights(tmp_path / "best", parts[0], {"step": 1})
    may_go_on.set()
    checkpoints.wait()
    assert names(tmp_path) == ["best", "step_000000001"]
    checkpoint.check(tmp_path / "step_000000001")
    checkpoint.check(tmp_path / "best")


@both
def test_what_cannot_be_written_is_raised_once_and_the_others_stay(tmp_path, monkeypatch, asynchronous):
    parts = make_parts(1)
    checkpoints = make(tmp_path, parts, asynchronous=asynchronous)
    checkpoints.begin(COUNTERS | {"step": 1})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
        with pytest.raises(OSError, match="needs [0-9,]+ bytes, the disk has 10 free"):
            checkpoints.begin(COUNTERS | {"step": 2})
            checkpoints.wait()
    assert names(tmp_path) == ["step_000000001"]
    checkpoints.begin(COUNTERS | {"step": 3})
    checkpoints.wait()
    assert names(tmp_path) == ["step_000000001", "step_000000003"]


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_written(tmp_path, asynchronous, value):
    parts = make_parts(1)
    checkpoints = make(tmp_path, parts, asynchronous=asynchronous)
    checkpoints.begin(COUNTERS | {"step": 1})
    checkpoints.wait()
    parts[0]["table"].weight.data[3, 1] = value
    with pytest.raises(FloatingPointError, match="step 2: model tensor 'table.weight' has a NaN or an infinity"):
        checkpoints.begin(COUNTERS | {"step": 2})
        checkpoints.wait()
    assert names(tmp_path) == ["step_000000001"]


def test_an_older_one_goes_only_when_the_new_one_is_whole_on_the_disk(tmp_path, monkeypatch):
    checkpoints = make(tmp_path, make_parts(1), keep=1, asynchronous=False)
    checkpoints.begin(COUNTERS | {"step": 1})

    def torn(path, tensors):
        digest = write_tensors(path, tensors)
        path.write_bytes(path.read_bytes()[:-1])
        return digest

    write_tensors = checkpoint._write_tensors
    monkeypatch.setattr(checkpoint, "_write_tensors", torn)
    with pytest.raises(checkpoint.Damaged, match="step_000000002: .* is damaged"):
        checkpoints.begin(COUNTERS | {"step": 2})
    assert names(tmp_path) == ["step_000000001", "step_000000002"]
    assert checkpoint.newest_whole(tmp_path).name == "step_000000001"


def test_without_room_for_a_copy_training_waits_and_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dlrm.checkpoints.available_bytes", lambda: 100)
    checkpoints = make(tmp_path, make_parts(1), asynchronous="auto")
    for step in (1, 2):
        checkpoints.begin(COUNTERS | {"step": step})
        assert names(tmp_path)[-1] == f"step_{step:09d}"  # without a wait
    assert capsys.readouterr().out.count("checkpoint.asynchronous=auto: a copy takes") == 1


def test_the_newest_whole_one_is_found_and_each_damaged_one_named(tmp_path, capsys):
    parts = make_parts(1)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / "checkpoints", *parts, COUNTERS | {"step": step})
    (tmp_path / "checkpoints/step_000000003/manifest.json").write_text("{")
    file = tmp_path / "checkpoints/step_000000002/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert checkpoint.newest_whole(tmp_path).name == "step_000000001"
    said = capsys.readouterr().out
    assert "step_000000003: manifest.json is damaged" in said and "step_000000002: model.safetensors is damaged" in said
    (tmp_path / "checkpoints/step_000000001/model.safetensors").unlink()
    with pytest.raises(ValueError, match="every checkpoint there is damaged"):
        checkpoint.newest_whole(tmp_path)


def test_tensors_are_a_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    dtypes = [getattr(torch, name) for name in checkpoint.DTYPES]
    tensors = {str(t): torch.arange(7).to(t).view(7, 1)[::2] for t in dtypes} | {"none": torch.empty(0, 3)}
    checkpoint._write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert_equal(found, tensors)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"every": -1}, "checkpoint.every=-1: must be a whole number, at least 0"),
        ({"keep": 0}, "checkpoint.keep=0: must be a whole number, at least 1"),
        ({"keep": True}, "checkpoint.keep=True"),
        ({"asynchronous": "yes"}, "checkpoint.asynchronous=yes: must be auto, true or false"),
    ],
)
def test_bad_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        CheckpointSettings(**{"every": 1, "keep": 1, "asynchronous": False} | changes)


@pytest.mark.parametrize(
    "header",
    [b"", b"[]", b"3", b"{", b'{"table.weight": 3}', b'{"table.weight": {"dtype": "F32", "data_offsets": [0, 8]}}'],
)
@pytest.mark.parametrize("length", [None, 2**40, 2**63])
def test_a_header_that_was_made_to_do_harm_is_an_error(tmp_path, header, length):
    path = checkpoint.save(tmp_path, *make_parts(1), COUNTERS)
    size = (path / "model.safetensors").stat().st_size
    content = (len(header) if length is None else length).to_bytes(8, "little") + header
    (path / "model.safetensors").write_bytes(content + bytes(size - len(content)))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model"]["sha256"] = checkpoint._sha256(path / "model.safetensors")
    text = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_text(hashlib.sha256(text).hexdigest())
    other = make_parts(2)
    expected = {key: tensor.clone() for key, tensor in flat(*other).items()}
    with pytest.raises(checkpoint.Damaged, match="model.safetensors has a header of its own"):
        checkpoint.load(tmp_path, *other)
    assert_equal(flat(*other), expected)


def test_damaged_manifests_are_errors_and_nothing_more(tmp_path):
    """A header is JSON, read only where its SHA-256 is the manifest's; a manifest only where its own is."""
    path = checkpoint.save(tmp_path, *make_parts(1), COUNTERS)
    text, generator = (path / "manifest.json").read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(300):
        damaged = bytearray(text)
        for place in torch.randint(len(text), (3,), generator=generator).tolist():
            damaged[place] = int(torch.randint(256, (1,), generator=generator))
        if damaged == text:
            continue
        (path / "manifest.json").write_bytes(damaged)
        with pytest.raises(checkpoint.Damaged):
            checkpoint.newest_whole(tmp_path)

"""Checkpoints: safetensors files and a JSON manifest with their SHA-256. No pickle; a large table is never held twice.

A checkpoint is a folder `<run>/checkpoints/step_000001000`, which appears by one rename once it is whole on the disk.
Beside them `best` holds weights alone (`dlrm.best`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1  # of the manifest: raised when an old reader would misread a new checkpoint
MANIFEST = "manifest.json"
KEYS = ("format", "counters", "files", "optimizers")  # of the manifest
REPLACED = ".tmp-old-"  # before the name of a checkpoint that is about to be replaced


def save(folder: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], counters: dict) -> Path:
    """Writes folder/step_<counters["step"]> and returns it. counters: JSON values; what the training loop goes on from.

    Raises OSError, with the bytes needed and free, when it cannot be written; what was there is still there.
    """
    return _write(Path(folder) / f"step_{counters['step']:09d}", model, optimizers, counters)


def save_weights(path: Path, model: nn.Module, counters: dict) -> Path:
    """Writes a model's weights alone and returns path, a folder, whose name is not step_*. Raises as `save`."""
    return _write(path, model, {}, counters)


def load(path: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Restores model and optimizers, tensor by tensor in place, and returns the counters. path: see `find`.

    The optimizers' hyperparameters stay as they are: those belong to the configuration of the run that goes on.
    Raises ValueError when the checkpoint is damaged or of another model or optimizer, before anything is changed.
    """
    path = find(path)
    manifest = _read_manifest(path)
    _check_whole(path, manifest)
    _check_same_run(path, manifest, model, optimizers)
    targets = {name: _targets(path, name, manifest, optimizer) for name, optimizer in optimizers.items()}
    _check_files(path, manifest)
    _read_into(path / "model.safetensors", model.state_dict())
    for name, optimizer in optimizers.items():
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        _read_into(path / f"{name}.safetensors", targets[name])
        for key, value in (targets[name] | manifest["optimizers"][name]["scalars"]).items():
            index, entry = _key(key)
            optimizer.state[parameters[index]][entry] = value
    return manifest["counters"]


def load_weights(path: Path, model: nn.Module) -> dict:
    """Restores a model from what `save_weights` or `save` has written there, and returns the counters.

    Raises ValueError when it is damaged or of another model, before anything is changed.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    _check_layout(path, "model", manifest["files"]["model"]["tensors"], model.state_dict())
    _check_files(path, manifest)
    _read_into(path / "model.safetensors", model.state_dict())
    return manifest["counters"]


def read_weights(path: Path) -> dict:
    """The counters of what `save_weights` has written there; no tensor is read. Raises ValueError if damaged."""
    return _read_manifest(Path(path))["counters"]


def find(path: Path | str) -> Path:
    """The newest checkpoint in a run's folder or its checkpoints folder; or path itself, if it is a checkpoint."""
    path = Path(path)
    if (path / MANIFEST).exists():
        return path
    for folder in (path / "checkpoints", path):
        found = sorted(manifest.parent for manifest in folder.glob(f"step_*/{MANIFEST}"))
        if found:
            return found[-1]
    raise ValueError(f"resume={path}: no checkpoint there (looked for checkpoints/step_*/{MANIFEST})")


def read_counters(path: Path | str) -> dict:
    """The counters of the checkpoint that `load` would take, without reading any tensor."""
    path = find(path)
    manifest = _read_manifest(path)
    _check_whole(path, manifest)
    return manifest["counters"]


def _write(path: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], counters: dict) -> Path:
    states = {name: _split(optimizer) for name, optimizer in optimizers.items()}
    files = {"model": dict(model.state_dict())} | {name: tensors for name, (tensors, _) in states.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(t.numel() * t.element_size() for tensors in files.values() for t in tensors.values())
    with _named_errors(path.parent, num_bytes), _appear(path) as temporary:
        manifest = {"format": FORMAT, "counters": counters, "files": {}, "optimizers": {}}
        for name, tensors in files.items():
            file = temporary / f"{name}.safetensors"
            save_file(tensors, file)  # reads the tensors' memory in place: no second copy
            _sync(file)
            layout = {key: [str(t.dtype).removeprefix("torch."), list(t.shape)] for key, t in tensors.items()}
            manifest["files"][name] = {"sha256": _sha256(file), "bytes": file.stat().st_size, "tensors": layout}
        for name, optimizer in optimizers.items():
            manifest["optimizers"][name] = {"kind": type(optimizer).__name__, "scalars": states[name][1]}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False))
        _sync(temporary / MANIFEST)
    return path


def _split(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, object]]:
    """An optimizer's state as {"<parameter's index>.<entry>": tensor} and the same for what is no tensor."""
    state = optimizer.state_dict()["state"]
    flat = {f"{index}.{entry}": value for index, entries in state.items() for entry, value in entries.items()}
    tensors = {key: value for key, value in flat.items() if torch.is_tensor(value)}
    return tensors, {key: value for key, value in flat.items() if key not in tensors}


def _key(key: str) -> tuple[int, str]:
    """Index of the parameter and name of the entry: what `_split` has joined."""
    index, entry = key.split(".", 1)
    return int(index), entry


def _targets(path: Path, name: str, manifest: dict, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Where to read an optimizer's tensors: its own, or new ones. Raises ValueError if they are not the saved ones."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved, targets = manifest["files"][name]["tensors"], _split(optimizer)[0]
    for key in [*saved, *manifest["optimizers"][name]["scalars"]]:
        if _key(key)[0] >= len(parameters):
            raise ValueError(
                f"resume={path}: {name} has {len(parameters)} parameters in this run, too few for the saved '{key}'"
            )
    for key, (dtype, shape) in saved.items():
        if key not in targets:
            # made by the first step of most optimizers; counts of steps live on the CPU
            device = parameters[_key(key)[0]].device if shape else "cpu"
            targets[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    _check_layout(path, name, saved, targets)
    return targets


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"resume={path}: {MANIFEST} is damaged: {error}") from None
    missing = [key for key in KEYS if not isinstance(manifest, dict) or key not in manifest]
    if missing:  # a folder of prepared data has a manifest.json too
        raise ValueError(f"resume={path}: no checkpoint: its {MANIFEST} has no {', '.join(missing)}")
    if manifest["format"] != FORMAT:
        raise ValueError(f"resume={path}: checkpoint format {manifest['format']}; this version reads {FORMAT}")
    return manifest


def _check_whole(path: Path, manifest: dict) -> None:
    if not manifest["optimizers"]:
        raise ValueError(f"resume={path}: these are weights alone, which no run can go on from; give the run's folder")


def _check_files(path: Path, manifest: dict) -> None:
    for name, entry in manifest["files"].items():
        file = path / f"{name}.safetensors"
        if not file.exists() or _sha256(file) != entry["sha256"]:
            raise ValueError(f"resume={path}: {file.name} is {'damaged' if file.exists() else 'missing'} (SHA-256)")


def _check_same_run(path: Path, manifest: dict, model: nn.Module, optimizers: dict) -> None:
    _check_layout(path, "model", manifest["files"]["model"]["tensors"], model.state_dict())
    for name, optimizer in optimizers.items():
        saved, mine = manifest["optimizers"][name]["kind"], type(optimizer).__name__
        if saved != mine:
            raise ValueError(f"resume={path}: its {name} is {saved}, this run's is {mine}")


def _check_layout(path: Path, name: str, saved: dict[str, list], mine: dict[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that the checkpoint and this run do not have alike."""
    for key in sorted(saved.keys() | mine.keys()):
        if key not in saved or key not in mine:
            where = "this run" if key in mine else "the checkpoint"
            raise ValueError(f"resume={path}: {name} tensor '{key}' exists only in {where}")
        here = [str(mine[key].dtype).removeprefix("torch."), list(mine[key].shape)]
        if saved[key] != here:
            raise ValueError(f"resume={path}: {name} tensor '{key}' is {saved[key]} there and {here} in this run")


def _read_into(path: Path, targets: dict[str, Tensor]) -> None:
    """Fills targets from a safetensors file whose layout was checked: 8 bytes length, JSON header, then raw tensors.

    Plain reads: a memory map would count every page of the file as resident memory beside the table itself.
    """
    with path.open("rb", buffering=0) as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for key, target in targets.items():
            assert target.is_contiguous(), key
            host = target.detach() if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            begin, end = header[key]["data_offsets"]
            file.seek(8 + length + begin)
            left = memoryview(host.reshape(-1).view(torch.uint8).numpy()) if end > begin else memoryview(b"")
            while left:  # one read returns at most 2 GiB
                left = left[file.readinto(left) :]
            if host is not target:
                target.detach().copy_(host)


@contextmanager
def _named_errors(folder: Path, num_bytes: int) -> Iterator[None]:
    """Makes any error of writing an OSError that says how many bytes are needed and free; raises it now if too few."""

    def needs() -> str:
        return f"the checkpoint needs {num_bytes:,} bytes, the disk has {shutil.disk_usage(folder).free:,} free"

    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(f"{folder}: {needs()}")
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors: what its writer says of a full disk
        raise OSError(f"{folder}: {error}; {needs()}") from error


@contextmanager
def _appear(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes path, all or nothing, when the block ends without an error."""
    _tidy(path.parent)  # after a run that was killed here
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.mkdir()
    try:
        yield temporary
        _sync(temporary)
        if path.exists():
            path.rename(path.with_name(f"{REPLACED}{path.name}"))
        temporary.rename(path)
        _sync(path.parent)
    finally:
        _tidy(path.parent)


def _tidy(folder: Path) -> None:
    """Removes what a save that did not end has left; a replaced checkpoint comes back if the new one is not there."""
    for replaced in folder.glob(f"{REPLACED}*"):
        path = folder / replaced.name.removeprefix(REPLACED)
        if not path.exists():
            replaced.rename(path)
    for litter in folder.glob(".tmp-*"):
        shutil.rmtree(litter, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

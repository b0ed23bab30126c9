"""Checkpoints: safetensors files, a JSON manifest with their SHA-256, and its own. No pickle.

Tensors are written from where they lie and read into where they belong, so that on the CPU no table is held twice.
A checkpoint is a folder `<run>/checkpoints/step_000001000`, which appears by one rename once it is whole on the disk.
Beside them `best` holds weights alone (`dlrm.best`). `dlrm.checkpoints` writes them beside training, from a copy.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

FORMAT = 2  # of the manifest: raised when an old reader would misread a new checkpoint
FORMATS = (1, FORMAT)  # that this version reads; 1 has no DIGEST
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"
DTYPES = {  # torch's name -> safetensors'
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
KEYS = ("format", "counters", "files", "optimizers")  # of the manifest
REPLACED = ".tmp-old-"  # before the name of a checkpoint that is about to be replaced


class Damaged(ValueError):
    """A checkpoint that is not as it was written."""


class Contents(NamedTuple):
    """What is written: tensors by file and name, and of each optimizer its kind and what it keeps beside tensors."""

    files: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for tensors in self.files.values() for t in tensors.values())


def contents(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> Contents:
    """What a checkpoint of these holds: their own tensors, not copies."""
    states = {name: _split(optimizer) for name, optimizer in optimizers.items()}
    files = {"model": dict(model.state_dict())} | {name: tensors for name, (tensors, _) in states.items()}
    kinds = {name: type(optimizer).__name__ for name, optimizer in optimizers.items()}
    return Contents(files, {name: {"kind": kind, "scalars": states[name][1]} for name, kind in kinds.items()})


def save(folder: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer], counters: dict) -> Path:
    """Writes folder/step_<counters["step"]> and returns it. counters: JSON values; what the training loop goes on from.

    Raises OSError, with the bytes needed and free, when it cannot be written; what was there is still there.
    """
    return write(path_of(folder, counters["step"]), contents(model, optimizers), counters)


def save_weights(path: Path, model: nn.Module, counters: dict) -> Path:
    """Writes a model's weights alone and returns path, a folder, whose name is not step_*. Raises as `save`."""
    return write(path, contents(model, {}), counters)


def remove(path: Path) -> None:
    """Takes a checkpoint off the disk; whenever the process dies it is there whole, or counts no more."""
    gone = path.with_name(f".tmp-gone-{path.name}")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def path_of(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return Path(folder) / f"step_{step:09d}"


def load(path: Path, model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> dict:
    """Restores model and optimizers, tensor by tensor in place, and returns the counters. path: a checkpoint, as
    `newest_whole` finds it.

    The optimizers' hyperparameters stay as they are: those belong to the configuration of the run that goes on.
    Raises ValueError when the checkpoint is damaged or of another model or optimizer, before anything is changed.
    """
    path = find(path)
    manifest = _read_manifest(path)
    _check_complete(path, manifest)
    _check_same_run(path, manifest, model, optimizers)
    _check_files(path, manifest)
    targets = {name: _targets(path, name, manifest, optimizer) for name, optimizer in optimizers.items()}
    for name, tensors in {"model": model.state_dict(), **targets}.items():
        _offsets(path / f"{name}.safetensors", tensors)
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


def all_in(path: Path | str) -> list[Path]:
    """The checkpoints, newest first, of a run's folder or its checkpoints folder; or path itself, if it is one."""
    path = Path(path)
    if (path / MANIFEST).exists():
        return [path]
    folders = (path / "checkpoints", path)
    return next((found for folder in folders if (found := sorted(folder.glob("step_*"), reverse=True))), [])


def find(path: Path | str) -> Path:
    """The newest of `all_in`. Raises ValueError if there is none."""
    if found := all_in(path):
        return found[0]
    raise ValueError(f"resume={path}: no checkpoint there (looked for checkpoints/step_*)")


def newest_whole(path: Path | str) -> Path:
    """The newest of `all_in` that is as it was written, all its bytes read; says which newer ones are not.

    Raises ValueError if there is none."""
    find(path)
    for candidate in all_in(path):
        try:
            check(candidate)
        except Damaged as error:
            print(f"{error}; the one before is looked at")
        else:
            return candidate
    raise Damaged(f"resume={path}: every checkpoint there is damaged")


def check(path: Path) -> None:
    """Raises `Damaged` unless every file is as it was written."""
    _check_files(path, _read_manifest(path))


def check_kinds(path: Path, kinds: dict[str, str]) -> None:
    """Raises ValueError unless the optimizers of a checkpoint are of these classes. kinds: name -> class."""
    _check_kinds(path, _read_manifest(path), kinds)


def read_counters(path: Path | str) -> dict:
    """The counters of the newest checkpoint whose manifest is whole, without reading any tensor."""
    find(path)
    for candidate in all_in(path):
        try:
            manifest = _read_manifest(candidate)
        except Damaged as error:
            last = error
        else:
            _check_complete(candidate, manifest)
            return manifest["counters"]
    raise last


def write(path: Path, contents: Contents, counters: dict) -> Path:
    """Writes a checkpoint, all or nothing, and returns path. Raises as `save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _named_errors(path.parent, contents.num_bytes), _appear(path) as temporary:
        manifest = {"format": FORMAT, "counters": counters, "files": {}, "optimizers": contents.optimizers}
        for name, tensors in contents.files.items():
            file = temporary / f"{name}.safetensors"
            digest = _write_tensors(file, tensors)
            layout = {key: [_name(t.dtype), list(t.shape)] for key, t in tensors.items()}
            manifest["files"][name] = {"sha256": digest, "bytes": file.stat().st_size, "tensors": layout}
        text = json.dumps(manifest, indent=1, allow_nan=False).encode()
        for name, content in ((MANIFEST, text), (DIGEST, hashlib.sha256(text).hexdigest().encode())):
            (temporary / name).write_bytes(content)
            _sync(temporary / name)
    return path


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a safetensors file and waits for the disk; returns its SHA-256, of what was in memory.

    Each tensor's memory is written where it is, and other threads run meanwhile: safetensors' own writer stops them."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": DTYPES[_name(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in chain([len(text).to_bytes(8, "little") + text], map(_bytes_of, tensors.values())):
            digest.update(part)
            left = memoryview(part)
            while left:  # one write takes at most 2 GiB
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's numbers, in place if it is contiguous and on the CPU."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


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
    groups = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    saved, targets = manifest["files"][name]["tensors"], _split(optimizer)[0]
    for key in [*saved, *manifest["optimizers"][name]["scalars"]]:
        if _key(key)[0] >= len(groups):
            raise ValueError(
                f"resume={path}: {name} has {len(groups)} parameters in this run, too few for the saved '{key}'"
            )
    for key, (dtype, shape) in saved.items():
        if key not in targets:
            # made by the first step of most optimizers; counts of steps live on the CPU, but of fused steps
            parameter, group = groups[_key(key)[0]]
            is_there = shape or group.get("fused") or group.get("capturable")
            device = parameter.device if is_there else "cpu"
            targets[key] = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    _check_layout(path, name, saved, targets)
    return targets


def _read_manifest(path: Path) -> dict:
    try:
        text = (path / MANIFEST).read_bytes()
        has_digest = (path / DIGEST).exists()
        if has_digest and (path / DIGEST).read_bytes() != hashlib.sha256(text).hexdigest().encode():
            raise ValueError("SHA-256")
        manifest = json.loads(text)
    except (ValueError, OSError) as error:
        raise Damaged(f"resume={path}: {MANIFEST} is damaged: {error}") from None
    missing = [key for key in KEYS if not isinstance(manifest, dict) or key not in manifest]
    if missing:  # a folder of prepared data has a manifest.json too
        raise ValueError(f"resume={path}: no checkpoint: its {MANIFEST} has no {', '.join(missing)}")
    if manifest["format"] not in FORMATS:
        raise ValueError(f"resume={path}: checkpoint format {manifest['format']}; this version reads {FORMAT}")
    if manifest["format"] > 1 and not has_digest:
        raise Damaged(f"resume={path}: {DIGEST} is missing")
    if (what := _misshapen(manifest)) is not None:
        raise Damaged(f"resume={path}: {MANIFEST} is damaged: {what}")
    return manifest


def _misshapen(manifest: dict) -> str | None:
    """What in a manifest is not as `write` makes it: it may have been made to do harm."""
    counters, files, optimizers = (manifest[key] for key in KEYS[1:])
    if not all(isinstance(part, dict) for part in (counters, files, optimizers)):
        return "counters, files and optimizers must be objects"
    if set(files) != {"model", *optimizers} or not all(name.isidentifier() for name in files):
        return f"files {sorted(files)} are not model and the optimizers"
    for name, entry in files.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and _is_count(entry.get("bytes"))):
            return f"{name} has no sha256 and bytes"
        if not isinstance(tensors := entry.get("tensors"), dict) or not all(map(_is_layout, tensors.values())):
            return f"{name} has no tensors with a type and a shape each"
        if sum(_num_bytes(*layout) for layout in tensors.values()) > entry["bytes"]:
            return f"{name}: its tensors take more than the file's {entry['bytes']} bytes"
    for name, entry in optimizers.items():
        if not (isinstance(entry, dict) and isinstance(entry.get("kind"), str)):
            return f"{name} has no kind"
        if not isinstance(entry.get("scalars"), dict):
            return f"{name} has no scalars"
        if not all(re.fullmatch(r"[0-9]{1,9}\..+", key) for key in [*files[name]["tensors"], *entry["scalars"]]):
            return f"{name}: its state is not named by parameters"
    for name in ("step", "epoch", "sample", "rows", "num_losses"):
        if name in counters and not _is_count(counters[name]):
            return f"counters.{name} is {counters[name]}"
    return None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _is_layout(value: object) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and isinstance(value[1], list)
    return is_pair and value[0] in list(DTYPES) and all(map(_is_count, value[1]))


def _num_bytes(dtype: str, shape: list[int]) -> int:
    return math.prod(shape) * getattr(torch, dtype).itemsize


def _check_complete(path: Path, manifest: dict) -> None:
    if not manifest["optimizers"]:
        raise ValueError(f"resume={path}: these are weights alone, which no run can go on from; give the run's folder")


def _check_files(path: Path, manifest: dict) -> None:
    for name, entry in manifest["files"].items():
        file = path / f"{name}.safetensors"
        if not file.exists() or _sha256(file) != entry["sha256"]:
            raise Damaged(f"resume={path}: {file.name} is {'damaged' if file.exists() else 'missing'} (SHA-256)")


def _check_same_run(path: Path, manifest: dict, model: nn.Module, optimizers: dict) -> None:
    _check_layout(path, "model", manifest["files"]["model"]["tensors"], model.state_dict())
    _check_kinds(path, manifest, {name: type(optimizer).__name__ for name, optimizer in optimizers.items()})


def _check_kinds(path: Path, manifest: dict, kinds: dict[str, str]) -> None:
    for name, mine in kinds.items():
        saved = manifest["optimizers"].get(name, {}).get("kind")
        if saved != mine:
            raise ValueError(f"resume={path}: its {name} is {saved or 'not there'}, this run's is {mine}")


def _check_layout(path: Path, name: str, saved: dict[str, list], mine: dict[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that the checkpoint and this run do not have alike."""
    for key in sorted(saved.keys() | mine.keys()):
        if key not in saved or key not in mine:
            where = "this run" if key in mine else "the checkpoint"
            raise ValueError(f"resume={path}: {name} tensor '{key}' exists only in {where}")
        here = [_name(mine[key].dtype), list(mine[key].shape)]
        if saved[key] != here:
            raise ValueError(f"resume={path}: {name} tensor '{key}' is {saved[key]} there and {here} in this run")


def _offsets(path: Path, targets: dict[str, Tensor]) -> dict[str, int]:
    """Where in a safetensors file each tensor begins. Raises `Damaged` if the file has them otherwise."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= size - 8 else {}
            spans = {key: [int(offset) for offset in header[key]["data_offsets"]] for key in targets}
            same = all(header[key]["dtype"] == DTYPES[_name(target.dtype)] for key, target in targets.items())
        except (ValueError, KeyError, TypeError) as error:
            raise Damaged(f"resume={path.parent}: {path.name} has a header of its own: {error!r}") from None
    for key, target in targets.items():
        begin, end = spans[key]
        if not (same and 0 <= begin <= size and end - begin == target.numel() * target.element_size()):
            raise Damaged(f"resume={path.parent}: {path.name} has a header of its own: '{key}' is at {spans[key]}")
    return {key: 8 + length + begin for key, (begin, _) in spans.items()}


def _read_into(path: Path, targets: dict[str, Tensor]) -> None:
    """Fills targets from a safetensors file whose layout was checked: 8 bytes length, JSON header, then raw tensors.

    Plain reads: a memory map would count every page of the file as resident memory beside the table itself.
    """
    offsets = _offsets(path, targets)
    with path.open("rb", buffering=0) as file:
        for key, target in targets.items():
            assert target.is_contiguous(), key
            host = target.detach() if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            file.seek(offsets[key])
            left = memoryview(host.reshape(-1).view(torch.uint8).numpy()) if target.numel() else memoryview(b"")
            while left:  # one read returns at most 2 GiB
                if not (count := file.readinto(left)):
                    raise Damaged(f"resume={path.parent}: {path.name} ends within '{key}'")
                left = left[count:]
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
    except OSError as error:
        raise OSError(f"{folder}: {error}; {needs()}") from error


@contextmanager
def _appear(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes path, all or nothing, when the block ends without an error."""
    _tidy(path.parent)  # after a run that was killed here
    temporary, replaced = path.with_name(f".tmp-{path.name}"), path.with_name(f"{REPLACED}{path.name}")
    in_use = {temporary, replaced}
    _in_use.update(in_use)
    try:
        temporary.mkdir()
        yield temporary
        _sync(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        _in_use.difference_update(in_use)
        _tidy(path.parent)


_in_use: set[Path] = set()  # by threads of this process: the best weights are saved beside a checkpoint


def _tidy(folder: Path) -> None:
    """Removes what a save that did not end has left; a replaced checkpoint comes back if the new one is not there."""
    for replaced in folder.glob(f"{REPLACED}*"):
        path = folder / replaced.name.removeprefix(REPLACED)
        if replaced not in _in_use and not path.exists():
            replaced.rename(path)
    for litter in folder.glob(".tmp-*"):
        if litter not in _in_use:
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

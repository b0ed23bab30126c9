"""The compact form that every file becomes once: flat arrays that training reads by memory map.

A folder holds dense.bin float32 [rows, num_dense], ids.bin int32 [rows, F1] of the single-valued features, labels.bin
uint8 [rows], per multi-valued feature values.K.bin int32 [N] and indptr.K.bin int64 [rows+1], and manifest.json. Rows
are ordered train, valid, test, or train, test, valid, as the manifest's `last` says. The manifest, with size and
SHA-256 of every file, and its own SHA-256 are written last and the folder renamed into place, so what has the final
name is complete; the name is the fingerprint of files and options, which says what of a file it sees. Hashes are looked
at when a file's size, times or place on the disk are others than when they last were (`checked.json`)."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import IO

import numpy as np
import torch

from data.batch import Batch

FORMAT_VERSION = 3
MANIFEST, DIGEST, CHECKED = "manifest.json", "manifest.sha256", "checked.json"
CHUNK_ROWS = 4096  # rows read in sequence when a split is too large for a global shuffle
WHOLE_BYTES = 1 << 28  # up to here a file's fingerprint is its content, which takes less than a second
ENDS_BYTES = 64 * 1024  # of the head and of the tail of a larger file go into its fingerprint
KEEP_ALL = np.iinfo(np.int32).max


def fingerprint(files: list[Path], options: object) -> str:
    """sha256 (hex) of the format version, the options (by repr) and the content of each file. Of a file of more than
    WHOLE_BYTES: size, mtime, ctime, head and tail. No program can set the ctime back, as it can the mtime."""
    digest = hashlib.sha256(repr((FORMAT_VERSION, options)).encode())
    for path in files:
        status = path.stat()
        with open(path, "rb") as file:
            if status.st_size <= WHOLE_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            digest.update(repr((status.st_size, status.st_mtime_ns, status.st_ctime_ns)).encode())
            digest.update(file.read(ENDS_BYTES))
            file.seek(max(0, status.st_size - ENDS_BYTES))
            digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


class HashedFile:
    """A new file, and the SHA-256 of what is written to it."""

    def __init__(self, path: Path):
        self._file, self._digest, self.num_bytes = open(path, "wb"), hashlib.sha256(), 0

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)

    def close(self) -> str:
        """Brings it to the disk. Returns the hash in hex."""
        flush(self._file)
        return self._digest.hexdigest()


class Writer:
    """Appends rows to the files of a folder under construction, in order; memory is that of one call's rows."""

    def __init__(self, folder: Path, num_multi: int):
        self.folder, self.rows, self.ends = folder, 0, [0] * num_multi
        names = ["dense.bin", "ids.bin", "labels.bin"]
        names += [f"{part}.{k}.bin" for k in range(num_multi) for part in ("indptr", "values")]
        self.files = {name: HashedFile(folder / name) for name in names}
        for k in range(num_multi):
            self.files[f"indptr.{k}.bin"].write(np.zeros(1, np.int64).tobytes())

    def append(
        self, dense: np.ndarray, ids: np.ndarray, labels: np.ndarray, bags: list[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Rows: dense [R, num_dense], ids [R, F1], labels [R], and per multi-valued feature (lengths [R], values)."""
        self.rows += len(labels)
        self.files["dense.bin"].write(np.ascontiguousarray(dense, np.float32).tobytes())
        self.files["ids.bin"].write(np.ascontiguousarray(ids, np.int32).tobytes())
        self.files["labels.bin"].write(np.ascontiguousarray(labels, np.uint8).tobytes())
        for k, (lengths, values) in enumerate(bags):
            self.files[f"indptr.{k}.bin"].write((self.ends[k] + np.cumsum(lengths, dtype=np.int64)).tobytes())
            self.files[f"values.{k}.bin"].write(np.ascontiguousarray(values, np.int32).tobytes())
            self.ends[k] += len(values)

    def finish(self, manifest: dict) -> None:
        """Brings every file to the disk, then writes the manifest, with the size in bytes and the hash of each file."""
        hashes = {name: file.close() for name, file in self.files.items()}
        sizes = {name: file.num_bytes for name, file in self.files.items()}
        manifest = manifest | {"format": FORMAT_VERSION, "rows": self.rows, "sizes": sizes, "sha256": hashes}
        text = json.dumps(manifest, indent=1).encode()
        for name, content in ((MANIFEST, text), (DIGEST, hashlib.sha256(text).hexdigest().encode())):
            with open(self.folder / name, "wb") as file:
                file.write(content)
                flush(file)


def flush(file: IO) -> None:
    """Brings a file to the disk and closes it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def is_complete(folder: Path) -> bool:
    """Whether the folder has what was written: every file, of the size and the SHA-256 that the manifest states."""
    try:
        text = (folder / MANIFEST).read_bytes()
        if (folder / DIGEST).read_bytes() != hashlib.sha256(text).hexdigest().encode():
            return False
        manifest = json.loads(text)
        if any((folder / name).stat().st_size != size for name, size in manifest["sizes"].items()):
            return False
        seen = {name: _looks(folder / name) for name in manifest["sizes"]}
        if _checked(folder) == seen:
            return True
        size = sum(manifest["sizes"].values())
        if size > WHOLE_BYTES:
            print(f"data: {folder} is read once to check it ({size / 2**20:,.0f} MiB)", flush=True)
        for name, wanted in manifest["sha256"].items():
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != wanted:
                    return False
    except (FileNotFoundError, ValueError, KeyError):
        return False
    with suppress(OSError):  # a folder that is not ours to write is read at every start
        temporary = folder / f".{CHECKED}.{os.getpid()}"
        temporary.write_text(json.dumps(seen))
        os.replace(temporary, folder / CHECKED)
    return True


def _looks(path: Path) -> list[int]:
    """What changes when a file is written to, by whoever."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _checked(folder: Path) -> dict | None:
    """How the files looked when their hashes were last right."""
    with suppress(OSError, ValueError):
        return json.loads((folder / CHECKED).read_text())
    return None


def prepare_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Makes the folder by build(temporary folder) unless it is there; at any time one process builds, others wait.
    What a killed build left behind is removed by the next one."""
    if is_complete(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel drops it when the process dies, however it dies
        if is_complete(folder):
            return
        temporary = folder.parent / f".{folder.name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            build(temporary)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if folder.exists():
            print(f"data: {folder} was damaged (a file is missing, or is not what was written) and is prepared again")
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        descriptor = os.open(folder.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def shuffled(count: int, *, seed: int, epoch: int, block: int, start: int) -> Iterator[np.ndarray]:
    """Index arrays that together are a permutation of range(count) from place `start` on: a pure function of
    (seed, epoch). Up to `block` rows this is one uniform permutation. Larger files are cut into chunks of CHUNK_ROWS
    neighbours; the chunks are shuffled, and the rows of each `block` of chunks: reads stay nearly sequential."""
    if count <= block:
        rows = np.arange(count, dtype=np.int32 if count <= 1 << 31 else np.int64)  # 32 bits sort twice as fast
        yield np.random.default_rng([seed, epoch, 0]).permutation(rows)[start:]
        return
    chunk_rows = min(CHUNK_ROWS, block)
    chunks = np.random.default_rng([seed, epoch]).permutation(count // chunk_rows)
    chunks = np.append(chunks, count // chunk_rows)  # the short chunk comes last
    pool, seen = block // chunk_rows, 0
    for first in range(0, len(chunks), pool):
        index = (chunks[first : first + pool, None] * chunk_rows + np.arange(chunk_rows)).reshape(-1)
        index = index[index < count]
        order = np.random.default_rng([seed, epoch, first]).permutation(len(index))
        yield index[order[max(0, start - seen) :]]
        seen += len(index)


def stored_order(last: str) -> tuple[str, str, str]:
    """The splits as they follow each other in the arrays. last: test or valid."""
    return ("train", "valid", "test") if last == "test" else ("train", "test", "valid")


def in_batches(indices: Iterator[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """The same indices in arrays of batch_size; the last may be shorter."""
    rest = np.zeros(0, np.int64)
    for index in indices:
        rest = np.concatenate([rest, index])
        full = len(rest) // batch_size * batch_size
        yield from (rest[i : i + batch_size] for i in range(0, full, batch_size))
        rest = rest[full:]
    if len(rest):
        yield rest


class Prepared:
    """A finished folder, opened for reading by memory map."""

    def __init__(self, folder: Path):
        self.manifest = json.loads((folder / MANIFEST).read_text())
        self.folder, self.rows = folder, self.manifest["rows"]
        self.cardinalities: dict[str, int] = self.manifest["cardinalities"]
        self.num_samples: dict[str, int] = self.manifest["num_samples"]
        num_multi = self.manifest["num_multi"]
        self.num_single = len(self.cardinalities) - num_multi
        self.dense = self._open("dense.bin", np.float32, (self.rows, self.manifest["num_dense"]))
        self.ids = self._open("ids.bin", np.int32, (self.rows, self.num_single))
        self.labels = self._open("labels.bin", np.uint8, (self.rows,))
        self.indptrs = [self._open(f"indptr.{k}.bin", np.int64, (self.rows + 1,)) for k in range(num_multi)]
        self.values = [self._open(f"values.{k}.bin", np.int32, (int(p[-1]),)) for k, p in enumerate(self.indptrs)]

    def _open(self, name: str, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
        if 0 in shape:
            return np.zeros(shape, dtype)
        # as a plain array: memmap's own class makes every look at it slower
        return np.asarray(np.memmap(self.folder / name, dtype=dtype, mode="r", shape=shape))

    def picks(
        self, split: str, batch_size: int, *, epoch: int, start: int, seed: int, block: int | None
    ) -> Iterator[np.ndarray]:
        """The samples of each batch of a split, by their numbers in it, from sample `start` on: train shuffled by
        (seed, epoch) unless block is None, the others in stored order."""
        count = self.num_samples[split]
        if split != "train" or block is None:
            return (np.arange(edge, min(edge + batch_size, count)) for edge in range(start, count, batch_size))
        order = shuffled(count, seed=seed, epoch=epoch, block=block, start=start)
        # ascending reads; the sum over a batch has no order
        return (np.sort(index) for index in in_batches(order, batch_size))

    def limits(self, keep_unseen: set[str]) -> torch.Tensor:
        """Of each feature the first id [F] that becomes 0, since training never had it: in keep_unseen none."""
        limits = [KEEP_ALL if f in keep_unseen else n for f, n in self.cardinalities.items()]
        return torch.tensor(limits, dtype=torch.int32)

    def take(self, split: str, index: np.ndarray, limits: torch.Tensor) -> Batch:
        """Samples of a split as a Batch. limits: of `limits`."""
        before = takewhile(split.__ne__, stored_order(self.manifest["last"]))
        first = sum(self.num_samples[name] for name in before)
        return self._batch(index + first if first else index, limits)

    def _batch(self, index: np.ndarray, limits: torch.Tensor) -> Batch:
        """The rows index [B] as a Batch; limits [F]: the first id of each feature that becomes 0."""
        ids = torch.from_numpy(np.ascontiguousarray(self.ids.take(index, axis=0).T))  # [F1, B]
        most = limits[: self.num_single]
        # the largest of each feature is cheap to see, and where the vocabulary is training's, that is all
        if ids.numel() and (ids.amax(1) >= most).any():
            ids.masked_fill_(ids >= most[:, None], 0)
        ids, offsets = ids.view(-1), None  # [F1 * B]
        if self.indptrs:
            bags, lengths = [ids.numpy()], [np.ones(len(ids), np.int64)]
            for indptr, values, limit in zip(
                self.indptrs, self.values, limits[self.num_single :].tolist(), strict=True
            ):
                begin, length = indptr[index], indptr[index + 1] - indptr[index]
                before = np.cumsum(length) - length
                bag = values[np.repeat(begin - before, length) + np.arange(length.sum())]
                bags.append(np.where(bag >= limit, 0, bag).astype(np.int32))
                lengths.append(length)
            ids = torch.from_numpy(np.concatenate(bags))  # [N]
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(lengths))]))  # [F*B+1]
        return Batch(
            dense=torch.from_numpy(self.dense.take(index, axis=0)),
            ids=ids,
            offsets=offsets,
            labels=torch.from_numpy(self.labels.take(index).astype(np.float32)),
        )

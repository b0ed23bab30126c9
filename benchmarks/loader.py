"""Does the loader ever limit? Batches per second of a prepared table in Criteo Kaggle's shape, and its preparation.

python -m benchmarks.loader     # some minutes, 1.5 GB in a temporary folder; writes results/loader-cpu.json
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as train.py

import numpy as np

from benchmarks.measure import interleave, record
from data.criteo import DENSE, CriteoKaggle

CARDINALITIES = [1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306]
CARDINALITIES += [10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572]
BATCHES = (128, 2048, 8192)
CHUNK = 50_000  # rows of text made at once
SAMPLES = 400_000  # of one measurement, at most


def write_table(path: Path, num_rows: int) -> None:
    """train.txt as published: a label, counts, and hashes of Zipf ids; every 20th value is empty."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        for start in range(0, num_rows, CHUNK):
            shape = min(CHUNK, num_rows - start)
            columns = [rng.integers(0, 2, shape).astype(str)]
            columns += [np.exp(rng.normal(1, 2, shape)).astype(np.int64).astype(str) for _ in DENSE]
            for rows in CARDINALITIES:
                ids = np.minimum(np.exp(rng.random(shape) * np.log(rows + 1)).astype(np.uint64), rows)
                columns.append([f"{i:08x}" for i in (ids * np.uint64(2654435761) % np.uint64(2**32)).tolist()])
            for column in columns[1:]:
                for i in rng.integers(0, shape, shape // 20).tolist():
                    column[i] = ""
            file.writelines("\t".join(row) + "\n" for row in zip(*columns, strict=True))


def dataset(folder: Path, cache: Path) -> CriteoKaggle:
    """The table with the options of conf/data/criteo_kaggle.yaml."""
    split = {"train": 0.857142857142, "valid": 0.071428571429, "test": 0.071428571429}
    numbering = {"vocabulary": "train", "min_count": 1, "id_order": "frequency", "max_rows": None}
    order = {"shuffle": True, "shuffle_block": 1 << 24, "shuffle_seed": 0}
    columns = {"dense": "log1p", "max_ind_range": None}
    reading = {"split": split, "last": "test", "on_error": "stop", "memory_limit": "1GB"}
    return CriteoKaggle(str(folder / "train.txt"), str(cache), **reading, **numbering, **order, **columns)


def read(table: CriteoKaggle, batch_size: int, epoch: int) -> int:
    """Takes the training batches of an epoch; returns how many samples they had."""
    num_samples = 0
    for batch in table.batches("train", batch_size, epoch=epoch):
        num_samples += len(batch.labels)
        if num_samples >= SAMPLES:
            break
    return num_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_500_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder / "train.txt", options.rows)
        table = dataset(folder, folder / "cache")
        began = time.perf_counter()
        table.prepare(set())
        rate = options.rows / (time.perf_counter() - began)
        rows = [{"what": "preparing", "rows": options.rows, "rows_per_second": rate}]
        counts = {batch_size: read(table, batch_size, 0) for batch_size in BATCHES}  # and the page cache has the files
        work = {str(b): lambda i, b=b: read(table, b, i) for b in BATCHES}
        for batch_size, seconds in interleave(work, rounds=options.rounds, device="cpu").items():
            rates = [counts[int(batch_size)] / taken for taken in seconds]
            rows.append(
                {"what": "loading", "batch_size": int(batch_size)}
                | {"samples_per_second": median(rates), "best_samples_per_second": max(rates)}
            )
    print(*rows, sep="\n")
    print(record("loader", "cpu", rows))


if __name__ == "__main__":
    main()

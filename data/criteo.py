"""Criteo's two public sets: the Display Advertising Challenge ("Kaggle") file train.txt, 45,840,617 rows of one week,
11 GB; and the 1TB Click Logs day_0 .. day_23, 4,373,472,329 rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.batch import Batch
from data.checks import check_choice, check_int, check_list
from data.database import column_sql, quoted
from data.dataset import FileDataset
from data.encode import Schema
from data.multi_hot import multi_hot
from data.prepared import fingerprint, stored_order
from data.source import open_source

DENSE = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
MALFORMED = -1  # hashes are 32-bit and unsigned


def hash_sql(name: str, max_ind_range: int | None) -> str:
    """SQL that parses 8 hex digits to an integer, modulo max_ind_range: NULL stays NULL (a value of its own), or is 0
    under a modulus, as in facebookresearch/dlrm; anything else is MALFORMED."""
    column = quoted(name)
    modulo, empty = ("", "NULL") if max_ind_range is None else (f" % {max_ind_range}", "0")
    number = f"coalesce(TRY_CAST('0x' || {column} AS BIGINT){modulo}, {MALFORMED})"
    # DuckDB reads 0x1234_567 as a number
    well_formed = f"length({column}) = 8 AND NOT contains({column}, '_')"
    return f"CASE WHEN {column} IS NULL THEN {empty} WHEN {well_formed} THEN {number} ELSE {MALFORMED} END"


def schema_of(paths: Sequence[Path], *, dense: str, max_ind_range: int | None) -> Schema:
    """Files as published: tab-separated, no header: label, I1..I13 (integers, empty, or a few negative), C1..C26 (8 hex
    digits, or empty). dense: the transform."""
    check_choice("data.dense", dense, ("log1p", "shifted_log"))
    if max_ind_range is not None:
        check_int("data.max_ind_range", max_ind_range, 1)
    columns = ("label", *DENSE, *CATEGORICAL)
    expressions = {c: hash_sql(c, max_ind_range) for c in CATEGORICAL}
    checks = {c: (f"{column_sql(c)} IS DISTINCT FROM {MALFORMED}", "must be 8 hex digits") for c in CATEGORICAL}
    sources = [open_source(path, delimiter="\t", quote="", header=False, columns=columns) for path in paths]
    main, *more = [replace(source, expressions=expressions, checks=checks) for source in sources]
    return Schema(
        main=main,
        more=tuple(more),
        sides=(),
        label="label",
        threshold=None,
        dense=dict.fromkeys(DENSE, dense),
        categorical=CATEGORICAL,
        multi_valued={},
        time=None,
        id_type="BIGINT",
    )


@dataclass(eq=False, kw_only=True)
class CriteoKaggle(FileDataset):
    """train.txt, see schema_of; it is in order of time, and split so. dense: the transform. max_ind_range: hashes
    are taken modulo this; None: as they are."""

    dense: str
    max_ind_range: int | None

    def open(self) -> tuple[str, Schema]:
        """See FileDataset."""
        path = Path(self.path)
        return f"criteo_kaggle {path.name}", schema_of([path], dense=self.dense, max_ind_range=self.max_ind_range)


@dataclass(eq=False, kw_only=True)
class Criteo1TB(FileDataset):
    """The files day_0, day_1, ... of a folder, plain, .gz or .zst, see schema_of. All days but the last train; the last
    is halved, valid and test in the order of `last`, the longer half first.

    multi_hot: ids that each of C1..C26 is made to have, see multi_hot; None: one. dense, max_ind_range: as those of
    CriteoKaggle. Raises ValueError for a day that is not there."""

    days: int
    dense: str
    max_ind_range: int | None
    multi_hot: Sequence[int] | None

    def __post_init__(self):
        check_int("data.days", self.days, 2)
        super().__post_init__()
        if self.multi_hot is None:
            return
        check_list("data.multi_hot", self.multi_hot, "[3, 2, 1, ...]")
        for i, size in enumerate(self.multi_hot):
            check_int(f"data.multi_hot[{i}]", size, 1)
        if len(self.multi_hot) != len(CATEGORICAL):
            raise ValueError(f"data.multi_hot has {len(self.multi_hot)} sizes; it needs {len(CATEGORICAL)}, of C1..C26")
        self.fingerprint = fingerprint([], (self.fingerprint, list(self.multi_hot)))

    def open(self) -> tuple[str, Schema]:
        """See FileDataset."""
        paths = [self._day(i) for i in range(self.days)]
        return f"criteo_1tb {self.days} days", schema_of(paths, dense=self.dense, max_ind_range=self.max_ind_range)

    def splits_are_files(self) -> bool:
        """See FileDataset."""
        return True

    def counts(self, rows: list[int]) -> dict[str, int]:
        """See FileDataset."""
        return dict(zip(stored_order(self.last), (sum(rows[:-1]), -(-rows[-1] // 2), rows[-1] // 2), strict=True))

    def take(self, split: str, index: np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """See FileDataset."""
        batch = super().take(split, index)
        if self.multi_hot is not None:
            batch = multi_hot(batch, self.multi_hot, list(self.cardinalities.values()))
        return batch.to(device)

    def _day(self, number: int) -> Path:
        """The file of a day, in whichever form is there."""
        forms = [Path(self.path) / f"day_{number}{suffix}" for suffix in ("", ".gz", ".zst")]
        return next((path for path in forms if path.is_file()), forms[0])  # opening the first says what is there

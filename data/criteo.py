"""Criteo's Display Advertising Challenge ("Kaggle") file train.txt: 45,840,617 rows of one week, 11 GB."""

from dataclasses import dataclass, replace
from pathlib import Path

from data.database import quoted
from data.dataset import FileDataset
from data.encode import Schema
from data.source import open_source

DENSE = tuple(f"I{i}" for i in range(1, 14))
CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
MALFORMED = -1  # hashes are 32-bit and unsigned


def hash_sql(name: str) -> str:
    """SQL that parses 8 hex digits to an integer: NULL stays NULL (a value of its own), anything else is MALFORMED."""
    column = quoted(name)
    number = f"coalesce(TRY_CAST('0x' || {column} AS BIGINT), {MALFORMED})"
    # DuckDB reads 0x1234_567 as a number
    well_formed = f"length({column}) = 8 AND NOT contains({column}, '_')"
    return f"CASE WHEN {column} IS NULL THEN NULL WHEN {well_formed} THEN {number} ELSE {MALFORMED} END"


@dataclass(eq=False)
class CriteoKaggle(FileDataset):
    """train.txt as published: tab-separated, no header: label, I1..I13 (integers, empty, or a few negative), C1..C26
    (8 hex digits, or empty). Dense becomes log1p(max(x, 0)), empty 0. The file is in order of time, and split so."""

    def open(self) -> tuple[str, Schema]:
        """See FileDataset."""
        columns = ("label", *DENSE, *CATEGORICAL)
        source = open_source(Path(self.path), delimiter="\t", quote="", header=False, columns=columns)
        checks = {c: (f"{quoted(c)} IS DISTINCT FROM {MALFORMED}", "must be 8 hex digits") for c in CATEGORICAL}
        return f"criteo_kaggle {source.path.name}", Schema(
            main=replace(source, expressions={c: hash_sql(c) for c in CATEGORICAL}, checks=checks),
            sides=(),
            label="label",
            threshold=None,
            dense=dict.fromkeys(DENSE, "log1p"),
            categorical=CATEGORICAL,
            multi_valued={},
            time=None,
            id_type="BIGINT",
        )

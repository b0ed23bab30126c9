"""From rows to arrays: joins, split, vocabularies, dense transforms, all by DuckDB in bounded memory.

The table `rows` holds every used column in the order train, valid, test, so that its rowid is the row's place in the
prepared arrays. Each feature becomes a table of its own (place, id), one after the other; then ranges of places are
fetched and appended to the files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.checks import check_choice, check_exact_keys, check_int, check_number
from data.database import Database, column_sql, literal
from data.prepared import Writer
from data.source import Source

CHUNK_ROWS = 1 << 18  # rows that are in Python's memory at once: 42 MB for Criteo's 39 columns
ID_ORDERS = {  # SQL; first: the row where the value first occurs
    "frequency": "seen DESC, first, value",
    "appearance": "first, value",
    "lexical": "value NULLS FIRST",  # by code points, as sklearn's LabelEncoder; fixed-width hex sorts as its number
}


@dataclass(frozen=True)
class Schema:
    """What the columns mean. more: files of the same columns, whose rows follow main's. sides: further files, each with
    the column that it shares with main. threshold: the label is value >= threshold; None: it is 0 or 1. dense: column
    -> none, log1p, shifted_log or standardize. multi_valued: column -> separator, None where it
    is a list. time: the column that orders the split. id_type: SQL type of the categorical columns."""

    main: Source
    sides: tuple[tuple[Source, str], ...]
    label: str
    threshold: float | None
    dense: Mapping[str, str]
    categorical: tuple[str, ...]
    multi_valued: Mapping[str, str | None]
    time: str | None
    id_type: str = "VARCHAR"
    more: tuple[Source, ...] = ()

    @property
    def parts(self) -> tuple[Source, ...]:
        """The files whose rows are the samples."""
        return (self.main, *self.more)

    @property
    def features(self) -> list[str]:
        """Features in the order of Batch.ids."""
        return [*self.categorical, *self.multi_valued]

    def identity(self) -> tuple:
        """Everything that changes the prepared arrays, but the files' content."""
        sides = [(side.identity(), key) for side, key in self.sides]
        roles = (
            self.label,
            self.threshold,
            list(self.dense.items()),
            self.categorical,
            list(self.multi_valued.items()),
        )
        return [part.identity() for part in self.parts], sides, roles, self.time, self.id_type


@dataclass(frozen=True)
class Preparation:
    """How rows are split and ids are numbered. split: fractions {train, valid, test}, sum 1; None: the files say it.
    last: which split has the last rows, test or valid. order: file or random, for data without a time. vocabulary: the
    rows whose ids are counted and numbered, train or all. min_count: ids counted fewer times become 0. id_order:
    frequency, appearance or lexical. max_rows: ids from there on wrap around to id % max_rows; None: no id does."""

    split: Mapping[str, float] | None
    last: str
    order: str
    split_seed: int
    vocabulary: str
    min_count: int
    id_order: str
    max_rows: int | None

    def __post_init__(self):
        if self.split is not None:
            self._check_split()
        check_choice("data.last", self.last, ("test", "valid"))
        check_choice("data.order", self.order, ("file", "random"))
        check_choice("data.vocabulary", self.vocabulary, ("train", "all"))
        check_choice("data.id_order", self.id_order, tuple(ID_ORDERS))
        check_int("data.min_count", self.min_count, 1)
        check_int("data.split_seed", self.split_seed, 0)
        if self.max_rows is not None:
            check_int("data.max_rows", self.max_rows, 1)

    def _check_split(self) -> None:
        check_exact_keys("data.split", self.split, ("train", "valid", "test"))
        for name, fraction in self.split.items():
            check_number(f"data.split.{name}", fraction, 0.0, 1.0)
        if abs(sum(self.split.values()) - 1.0) > 1e-6:
            raise ValueError(
                f"data.split={dict(self.split)}: the fractions must sum to 1, not {sum(self.split.values())}"
            )
        for name in ("train", "test"):
            if not self.split[name]:
                raise ValueError(f"data.split.{name}=0: only valid may be 0")

    def identity(self) -> tuple:
        """Everything that changes the prepared arrays."""
        split = None if self.split is None else sorted(self.split.items())
        numbering = self.vocabulary, self.min_count, self.id_order, self.max_rows
        return split, self.last, self.order, self.split_seed, numbering

    def counts(self, rows: int) -> dict[str, int]:
        """Rows of each split, by the fractions."""
        train = int(rows * self.split["train"] + 0.5)
        test = rows - int(rows * (self.split["train"] + self.split["valid"]) + 0.5)
        return {"train": train, "valid": rows - train - test, "test": test}


def arrange(db: Database, schema: Schema, preparation: Preparation) -> None:
    """Makes `rows` of the tables main, side0, side1, ...: joined, and ordered by time, chance or place in the file.
    Raises ValueError if a key occurs twice in a side table, or none of main's rows has a partner there."""
    columns, joins = [f"main.{column_sql(c)}" for c in used_columns(schema, schema.main)], ""
    for i, (side, key) in enumerate(schema.sides):
        name = column_sql(key)
        twice = db.rows(f"SELECT {name}, count(*) FROM side{i} GROUP BY {name} HAVING count(*) > 1 LIMIT 1")
        if twice:
            raise ValueError(f"data.joins: {side.path} has {twice[0][1]} rows with {key}={twice[0][0]!r}; it needs one")
        report_unmatched(db, schema.main, side, f"side{i}", key)
        columns += [f"side{i}.{column_sql(c)}" for c in used_columns(schema, side) if c != key]
        joins += f" LEFT JOIN side{i} ON main.{name} = side{i}.{name}"
    if schema.time:
        order = f"{column_sql(schema.time)}, main.rowid"  # stable: equal times keep the file's order
    elif preparation.order == "random":
        order = f"md5({literal(preparation.split_seed)} || '/' || main.rowid), main.rowid"
    elif not schema.sides:
        db.run("ALTER TABLE main RENAME TO rows")
        return
    else:
        order = "main.rowid"
    db.run(f"CREATE TABLE rows AS SELECT {', '.join(columns)} FROM main{joins} ORDER BY {order}")
    db.run("DROP TABLE main")


def report_unmatched(db: Database, main: Source, side: Source, table: str, key: str) -> None:
    """Says how many rows of main have no partner in the side table. Raises ValueError if none has one."""
    name, total = column_sql(key), db.value("SELECT count(*) FROM main")
    unmatched = db.value(f"SELECT count(*) FROM main ANTI JOIN {table} ON main.{name} = {table}.{name}")
    if unmatched and unmatched == total:
        ours, theirs = (db.value(f"SELECT min({name}) FROM {t}") for t in ("main", table))
        raise ValueError(
            f"data.joins: no row of {main.path} has a partner in {side.path} by {key}; e.g. {key} is {ours!r} in "
            f"{main.path.name} and {theirs!r} in {side.path.name}"
        )
    if unmatched:
        print(
            f"data: {side.path.name} has no row for {unmatched:,} of the {total:,} rows of {main.path.name} "
            f"({100 * unmatched / total:.3g}%), by {key}; its columns are empty there"
        )


def used_columns(schema: Schema, source: Source) -> list[str]:
    """Columns of a source that the schema needs, keys of joins included; main comes before sides."""
    is_part = any(source is part for part in schema.parts)
    keys = [key for _, key in schema.sides] if is_part else [k for s, k in schema.sides if s is source]
    wanted = [schema.label, schema.time, *schema.dense, *schema.features]
    if not is_part:
        wanted = [c for c in wanted if c not in schema.main.names]
    return [c for c in source.names if c in wanted or c in keys]


def number_ids(db: Database, counted: str, preparation: Preparation) -> int:
    """Makes `vocabulary` (value, id) of SQL that gives (value, seen, first): how often the counted rows have the value,
    and the row where it first occurs. Ids from 1 are the values that they have at least min_count times, 0 those they
    have fewer times, and from n on those they never have. Returns n, the number of ids with row 0, or max_rows if that
    is less; then ids below n have wrapped around."""
    order = ID_ORDERS[preparation.id_order]
    db.run(
        "CREATE OR REPLACE TEMP TABLE vocabulary AS SELECT value, kind, CASE kind WHEN 0 THEN 0 ELSE "
        f"row_number() OVER (PARTITION BY kind ORDER BY {order}) END AS id FROM (SELECT *, CASE WHEN seen = 0 THEN 2 "
        f"WHEN seen >= {preparation.min_count} THEN 1 ELSE 0 END AS kind FROM ({counted}))"
    )
    kept = db.value("SELECT count(*) FROM vocabulary WHERE kind = 1")
    db.run(f"UPDATE vocabulary SET id = id + {kept} WHERE kind = 2")
    if preparation.max_rows is None or kept < preparation.max_rows:
        return kept + 1
    db.run(f"UPDATE vocabulary SET id = id % {preparation.max_rows} WHERE kind = 1")
    return preparation.max_rows


def encode_single(db: Database, name: str, table: str, counted: int, preparation: Preparation) -> int:
    """Makes `table` (place, id) of a single-valued feature; NULL is a value. counted: the first so many rows are those
    whose ids count. Returns the number of ids."""
    column = column_sql(name)
    grouped = f"count(*) FILTER (rowid < {counted}) AS seen, min(rowid) AS first"
    num_ids = number_ids(db, f"SELECT {column} AS value, {grouped} FROM rows GROUP BY {column}", preparation)
    db.run(
        f"CREATE TABLE {table} AS SELECT rows.rowid AS place, CAST(v.id AS INTEGER) AS id "
        f"FROM rows JOIN vocabulary v ON rows.{column} IS NOT DISTINCT FROM v.value"
    )
    return num_ids


def encode_multi(
    db: Database, name: str, table: str, counted: int, preparation: Preparation, separator: str | None
) -> int:
    """Makes `table` (place, ids: list) of a multi-valued feature; NULL and '' are empty bags. separator: None where the
    column is a list. counted: see encode_single. Work is per distinct text: few where it comes from a side table."""
    column = column_sql(name)
    split = column if separator is None else f"string_split({column}, {literal(separator)})"
    parts = f"list_filter(list_transform({split}, lambda x: trim(x)), lambda x: x <> '')"
    db.run(
        f"CREATE OR REPLACE TEMP TABLE texts AS SELECT {column} AS text, count(*) FILTER (rowid < {counted}) AS seen, "
        f"min(rowid) AS first, {parts} AS parts FROM rows WHERE {column} IS NOT NULL GROUP BY {column}"
    )
    grouped = "SELECT value, sum(seen) AS seen, min(first) AS first FROM parted GROUP BY value"
    db.run(
        "CREATE OR REPLACE TEMP TABLE parted AS SELECT text, seen, first, unnest(parts) AS value, "
        "unnest(range(len(parts))) AS nth FROM texts"
    )
    num_ids = number_ids(db, grouped, preparation)
    db.run(
        f"CREATE TABLE {table} AS SELECT rows.rowid AS place, coalesce(bags.ids, []) AS ids FROM rows LEFT JOIN "
        "(SELECT text, list(CAST(id AS INTEGER) ORDER BY nth) AS ids FROM parted JOIN vocabulary USING (value) "
        f"GROUP BY text) bags ON rows.{column} = bags.text"
    )
    return num_ids


def dense_sql(db: Database, schema: Schema, train: int) -> list[str]:
    """SQL of each dense column, transformed. Empty is 0 after the transform. standardize: mean 0 and variance 1 over
    the training rows that have a value; log1p: of max(x, 0); shifted_log: ln(3 + x) of max(x, -2), empty as x = 0."""
    expressions = []
    for name, transform in schema.dense.items():
        x = column_sql(name)
        if transform == "log1p":
            x = f"ln(1 + greatest({x}, 0))"
        elif transform == "shifted_log":
            x = f"ln(3 + greatest(coalesce({x}, 0), -2))"
        elif transform == "standardize":
            sql = f"SELECT coalesce(avg({x}), 0), coalesce(stddev_pop({x}), 0) FROM rows WHERE rowid < {train}"
            mean, deviation = db.rows(sql)[0]
            x = f"({x} - {mean!r}::DOUBLE) / {deviation or 1.0!r}::DOUBLE"  # a constant column becomes 0
        expressions.append(f"CAST(coalesce({x}, 0) AS FLOAT)")
    return expressions


def write_arrays(db: Database, schema: Schema, folder: Path, train: int) -> Writer:
    """Appends all rows to the files of the folder, a range at a time; the caller finishes the writer."""
    singles, multis = range(len(schema.categorical)), range(len(schema.categorical), len(schema.features))
    threshold = 0.5 if schema.threshold is None else float(schema.threshold)
    label = f"{column_sql(schema.label)} >= {threshold!r}::DOUBLE"
    dense = dense_sql(db, schema, train)
    select = ", ".join(f"{sql} AS d{i}" for i, sql in enumerate(dense + [f"CAST({label} AS UTINYINT)"]))
    total, writer = db.value("SELECT count(*) FROM rows"), Writer(folder, len(multis))
    for first in range(0, total, CHUNK_ROWS):
        end = min(first + CHUNK_ROWS, total)
        block = db.columns(f"SELECT {select} FROM rows WHERE rowid >= {first} AND rowid < {end} ORDER BY rowid")
        numbers = np.empty((end - first, len(dense)), np.float32)
        for i in range(len(dense)):
            numbers[:, i] = block[f"d{i}"]
        ids = np.empty((end - first, len(singles)), np.int32)
        within = f"place >= {first} AND place < {end}"
        for i in singles:
            feature = db.columns(f"SELECT place, id FROM feature{i} WHERE {within}")
            assert len(feature["place"]) == end - first
            ids[feature["place"] - first, i] = feature["id"]
        bags = []
        for i in multis:
            lengths = db.columns(f"SELECT len(ids) AS n FROM feature{i} WHERE {within} ORDER BY place")["n"]
            ordered = f"(SELECT ids FROM feature{i} WHERE {within} ORDER BY place)"
            bags.append((lengths, db.columns(f"SELECT unnest(ids) AS id FROM {ordered}")["id"]))
        writer.append(numbers, ids, block[f"d{len(dense)}"], bags)
        db.progress(end / total)
    return writer

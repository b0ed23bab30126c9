"""A dataset made of files: prepared once, then read as batches. Table, MovieLens and Criteo's are faces of it."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import duckdb
import numpy as np
import torch

from data.batch import Batch
from data.checks import check_bool, check_choice, check_int, check_keys
from data.database import Database, column_sql
from data.encode import Preparation, Schema, arrange, encode_multi, encode_single, used_columns, write_arrays
from data.prepared import Prepared, Writer, fingerprint, prepare_once
from data.rejects import Rejected, load, refusing, write_quarantine
from data.source import FINITE, LIST, Source, describe, means_more, reading_sql

SPLITS = ("train", "valid", "test")
READING, ORDERING, NUMBERING, WRITING = 0.5, 0.05, 0.3, 0.15  # shares of the time, as measured on Criteo rows
TIME_SAMPLE = 1000  # rows that say whether times are numbers or dates: one bad row must not decide it


@dataclass(eq=False)
class FileDataset:
    """Samples of one or more files. The constructor has read their first lines; prepare() reads all.

    path: of the file or the folder. cache: folder of prepared folders. split, last, vocabulary, min_count, id_order,
    max_rows: see Preparation.
    on_error: what a bad row does: stop, skip, or quarantine (skip, and keep its text in the prepared folder's
    quarantine.tsv). memory_limit: DuckDB's, e.g. 1GB. shuffle: whether every epoch of training has an order of its own.
    shuffle_block: training files of more rows are shuffled in blocks of so many (see prepared.shuffled). shuffle_seed:
    of the training order.

    A subclass says in open() what the files are, and adds the keys of its own as fields."""

    path: str
    cache: str
    _: KW_ONLY
    split: Mapping[str, float] | None
    last: str
    vocabulary: str
    min_count: int
    id_order: str
    max_rows: int | None
    on_error: str
    memory_limit: str
    shuffle: bool
    shuffle_block: int
    shuffle_seed: int

    def __post_init__(self):
        check_choice("data.on_error", self.on_error, ("stop", "skip", "quarantine"))
        check_bool("data.shuffle", self.shuffle)
        check_int("data.shuffle_block", self.shuffle_block, 1)
        check_int("data.shuffle_seed", self.shuffle_seed, 0)
        self.name, self.schema = self.open()
        order, split_seed = self.split_order()
        numbering = {k: getattr(self, k) for k in ("vocabulary", "min_count", "id_order", "max_rows")}
        self.preparation = Preparation(self.split, self.last, order, split_seed, **numbering)
        if self.split is None and not self.splits_are_files():
            raise ValueError("data.split=null: give the fractions of train, valid and test")
        if self.split is not None and self.splits_are_files():
            raise ValueError(f"data.split={dict(self.split)}: here the files are the splits; set data.split=null")
        self.feature_names, self.dense_names = self.schema.features, list(self.schema.dense)
        options = (self.schema.identity(), self.preparation.identity(), self.on_error)
        paths = [source.path for source in self._sources()]
        if any(map(means_more, paths)):
            options += ("one file each",)  # what was prepared when others were read as well is not taken for this
        self.fingerprint = fingerprint(paths, options)
        stem = "".join(c if c.isalnum() or c in "-._" else "-" for c in self.name)
        self.folder = Path(self.cache) / f"{stem}-{self.fingerprint[:16]}"
        self._prepared: Prepared | None = None
        self._limits: torch.Tensor | None = None

    def open(self) -> tuple[str, Schema]:
        """The name to print, and what the columns of the files mean; reads no more than their first lines."""
        raise NotImplementedError

    def split_order(self) -> tuple[str, int]:
        """Order of the split of data without a time, and its seed (see Preparation)."""
        return "file", 0

    def splits_are_files(self) -> bool:
        """Whether it is the files that say which rows train (see counts), and data.split is None."""
        return False

    def counts(self, rows: list[int]) -> dict[str, int]:
        """Samples of train, valid and test, of how many good rows each of schema.parts has."""
        return self.preparation.counts(sum(rows))

    def prepare(self, keep_unseen: set[str]) -> None:
        """Reads the files into the prepared folder unless it is there. Features of keep_unseen will show the ids that
        training never had (>= the cardinality, distinct); in the others these ids are 0. Raises ValueError for bad rows
        (on_error=stop: the first of them, and how many there are), and for a folder that cannot be written."""
        check_keys("keep_unseen", keep_unseen, self.feature_names)
        try:
            prepare_once(self.folder, self._build)
        except OSError as error:
            raise ValueError(
                f"data.cache={self.cache} (which is $DLRM_DATA unless set): preparing there failed: {error}; name a "
                "folder that can be written, with room for the arrays"
            ) from error
        self._prepared = Prepared(self.folder)
        self._limits = self._prepared.limits(set(keep_unseen))

    @property
    def prepared(self) -> Prepared:
        """The opened arrays; prepare() comes first."""
        assert self._prepared is not None, "prepare() comes first"
        return self._prepared

    @property
    def cardinalities(self) -> dict[str, int]:
        """Feature -> number of ids that training has, with row 0, in the order of Batch.ids."""
        return self.prepared.cardinalities

    @property
    def num_samples(self) -> dict[str, int]:
        """Rows of train, valid and test."""
        return self.prepared.num_samples

    @property
    def num_rejected(self) -> int:
        """Rows that were left out as bad."""
        return self.prepared.manifest["num_rejected"]

    def batches(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """Batches of a split from sample `start` on; the last may be smaller. Train is shuffled, a pure function of
        (shuffle_seed, epoch); valid and test come in the order of the split (time, chance or place in the file)."""
        check_keys("split", [split], SPLITS)
        picks = self.picks(split, batch_size, epoch=epoch, start=start)
        return (self.take(split, index) for index in picks)

    def picks(self, split: str, batch_size: int, *, epoch: int = 0, start: int = 0) -> Iterator[np.ndarray]:
        """The samples of each of these batches, by their numbers in the split."""
        block = self.shuffle_block if self.shuffle else None
        return self.prepared.picks(split, batch_size, epoch=epoch, start=start, seed=self.shuffle_seed, block=block)

    def take(self, split: str, index: np.ndarray, device: torch.device | str = "cpu") -> Batch:
        """Samples of a split as a batch on a device."""
        return self.prepared.take(split, index, self._limits).to(device)

    def best_possible_auc(self, split: str) -> None:
        """None: only synthetic data knows."""
        check_keys("split", [split], SPLITS)

    def describe(self) -> str:
        """One line: name, rows, split, bad rows."""
        counts = self.num_samples
        rows = " + ".join(f"{counts[split]:,} {split}" for split in SPLITS if counts[split])
        order = f"by {self.schema.time}" if self.schema.time else f"in {self.preparation.order} order"
        order = "by files" if self.splits_are_files() else order
        bad = f", {self.num_rejected:,} bad rows left out" if self.num_rejected else ""
        return (
            f"{self.name}: {sum(counts.values()):,} samples ({rows}, split {order}), {len(self.dense_names)} dense, "
            f"{len(self.feature_names)} categorical, {sum(self.cardinalities.values()):,} ids{bad}"
        )

    def _build(self, folder: Path) -> None:
        """Makes the arrays in an empty folder."""
        size = sum(source.path.stat().st_size for source in self._sources())
        free = shutil.disk_usage(folder).free
        print(
            f"data: preparing {self.name} ({size / 2**20:,.0f} MiB of files) once, in {self.folder} "
            f"(memory for the reading: {self.memory_limit}; {free / 2**30:,.1f} GiB of disk are free)"
        )
        scratch = folder / "scratch"
        db = Database(scratch, self.memory_limit)
        try:
            rejected, rows = self._load(db)
            manifest, writer = self._encode(db, folder, self._counts(rows))
        finally:
            db.close()
        shutil.rmtree(scratch)
        if self.on_error == "quarantine":
            write_quarantine(folder / "quarantine.tsv", rejected)
        writer.finish(manifest | {"num_rejected": sum(r.num_lines for r in rejected)})

    def _sources(self) -> list[Source]:
        return [*self.schema.parts, *(side for side, _ in self.schema.sides)]

    def _counts(self, rows: list[int]) -> dict[str, int]:
        """Samples of each split. Raises ValueError if train or test would be empty."""
        counts = self.counts(rows)
        if not (counts["train"] and counts["test"]):
            how = "the split by files" if self.split is None else f"data.split={dict(self.split)}"
            raise ValueError(f"{how} of {sum(rows)} good rows leaves none for training or for test")
        return counts

    def _load(self, db: Database) -> tuple[list[Rejected], list[int]]:
        """Loads main, what follows it, and sides into the database. Returns the bad rows, or raises for them, and how
        many good rows each part has."""
        rejected: list[Rejected] = []
        rows: list[int] = []
        total = sum(source.path.stat().st_size for source in self._sources())
        tables = ["main", *("part" for _ in self.schema.more), *(f"side{i}" for i in range(len(self.schema.sides)))]
        for source, table in zip(self._sources(), tables, strict=True):
            db.step(f"reading {source.path.name}", READING * source.path.stat().st_size / total)
            types = {c: self._type_of(c) for c in used_columns(self.schema, source)}
            rejected += load(db, with_checks(source, self.schema), table=table, types=types)
            if table in ("main", "part"):
                rows.append(db.value(f"SELECT count(*) FROM {table}"))
            if table == "part":
                db.run("INSERT INTO main BY NAME SELECT * FROM part; DROP TABLE part")
        if not rejected:
            return rejected, rows
        lines = sum(r.num_lines for r in rejected)
        count = f"{lines:,} bad row{'s' if lines > 1 else ''}"
        if self.on_error == "stop":
            raise ValueError(f"{rejected[0]}\n{count} in all; data.on_error=skip or quarantine leaves them out")
        kept = f", kept in {self.folder / 'quarantine.tsv'}" if self.on_error == "quarantine" else ""
        print(f"data: {count} left out{kept}; the first: {rejected[0]}")
        return rejected, rows

    def _type_of(self, column: str) -> str:
        """SQL type in which a column is read."""
        if column == self.schema.label or column in self.schema.dense:
            return "DOUBLE"
        if column == self.schema.time:
            return time_type(self.schema)
        if column in self.schema.categorical:
            return self.schema.id_type
        return LIST if self.schema.multi_valued.get(column, "") is None else "VARCHAR"

    def _encode(self, db: Database, folder: Path, counts: dict[str, int]) -> tuple[dict, Writer]:
        """Writes the arrays. Returns what the manifest says, and the writer to finish."""
        db.step("ordering rows", ORDERING)
        arrange(db, self.schema, self.preparation)
        counted = counts["train"] if self.vocabulary == "train" else sum(counts.values())
        cardinalities = {}
        for i, name in enumerate(self.feature_names):
            db.step(f"numbering {name}", NUMBERING / len(self.feature_names))
            job = (db, name, f"feature{i}", counted, self.preparation)
            multi = self.schema.multi_valued
            cardinalities[name] = encode_multi(*job, multi[name]) if name in multi else encode_single(*job)
        db.step("writing arrays", WRITING)
        writer = write_arrays(db, self.schema, folder, counts["train"])
        manifest = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "cardinalities": cardinalities,
            "num_samples": counts,
            "last": self.last,
            "dense_names": self.dense_names,
            "num_dense": len(self.dense_names),
            "num_multi": len(self.schema.multi_valued),
        }
        return manifest, writer


def with_checks(source: Source, schema: Schema) -> Source:
    """The source with what must hold of the label, the time and the dense columns, beside its own checks."""
    label, checks = column_sql(schema.label), dict(source.checks)
    if schema.threshold is None:
        checks[schema.label] = (f"{label} IN (0, 1)", "the label must be 0 or 1 (or set data.label_threshold)")
    else:
        checks[schema.label] = (f"isfinite({label})", "the label must be a finite number")
    if schema.time:
        checks[schema.time] = (f"isfinite({column_sql(schema.time)})", "the time must be a finite number or date")
    if not source.is_parquet:
        for name in used_columns(schema, source):
            checks.setdefault(
                name, (f"coalesce(NOT contains({column_sql(name)}, chr(0)), true)", "must hold no NUL byte")
            )
    for name in schema.dense:
        finite = FINITE.format(column_sql(name))
        checks[name] = (f"{column_sql(name)} IS NULL OR ({finite})", "must be finite as float32")
    return Source(**{**vars(source), "checks": checks})


def time_type(schema: Schema) -> str:
    """DOUBLE if most of the first values of the time column are numbers, else TIMESTAMP."""
    source = next(s for s in (schema.main, *(side for side, _ in schema.sides)) if schema.time in s.names)
    if source.is_parquet:
        kind = dict(describe(source.path)).get(schema.time, "DOUBLE")
        return "TIMESTAMP" if kind.startswith(("TIMESTAMP", "DATE")) else "DOUBLE"
    con = duckdb.connect()  # its own: the rejects of these few rows are nobody's
    column = column_sql(schema.time)
    sql = reading_sql(source, {schema.time: "VARCHAR"})
    first = f"SELECT {column} AS x FROM ({sql}) WHERE {column} IS NOT NULL LIMIT {TIME_SAMPLE}"
    with refusing(source):
        numbers, dates = con.execute(
            f"SELECT count(TRY_CAST(x AS DOUBLE)), count(TRY_CAST(x AS TIMESTAMP)) FROM ({first})"
        ).fetchone()
    return "TIMESTAMP" if dates > numbers else "DOUBLE"

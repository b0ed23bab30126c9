"""What a file is: its columns, how they are separated, what must hold of them; and the SQL that reads it."""

import csv
import gzip
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import duckdb

from data.checks import nearest
from data.database import column_sql, literal, quoted

FINITE = "isfinite({0}) AND abs({0}) <= 3.4e38"  # beyond that a float32 is infinite
TYPED_HEADER = re.compile(r"(.+):(token|token_seq|float|float_seq)")  # RecBole's atomic files: user_id:token
COMPRESSED = {".gz", ".zst"}
DELIMITERS = {".tsv": "\t", ".txt": "\t", ".inter": "\t", ".user": "\t", ".item": "\t", ".dat": "::"}
LIST = "VARCHAR[]"  # the SQL type in which a list column is read
NUMBERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "U", "FLOAT", "DOUBLE", "DECIMAL", "BOOLEAN")
MAX_LINE = 2_000_000  # bytes; DuckDB refuses longer ones
MAX_BAD_ROWS = 100_000  # beyond this the format is misunderstood, whatever data.on_error says; it also bounds memory
MAX_ERRORS = 4 * MAX_BAD_ROWS  # a row may have several
FORMATS = {b"PAR1\x15": ".parquet", b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}  # by a file's first bytes


@dataclass(frozen=True)
class Source:
    """One file. columns: our names of all its columns, in order. expressions: SQL over these that replaces a column or
    adds one. checks: by column, an SQL condition on loaded columns (see column_sql) that must hold (NULL counts as
    failed) and what to say if not."""

    path: Path
    columns: tuple[str, ...]
    delimiter: str
    quote: str
    header: bool
    expressions: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    encoding: str = "utf-8"

    @property
    def names(self) -> list[str]:
        """Columns that can be used, those of the expressions included."""
        return [*self.columns, *(name for name in self.expressions if name not in self.columns)]

    @property
    def is_parquet(self) -> bool:
        """Whether DuckDB reads it as Parquet; anything else is text."""
        return self.path.suffix == ".parquet"

    def identity(self) -> tuple:
        """Everything that changes what is read, but the file's content."""
        form = self.delimiter, self.quote, self.header, self.encoding, self.path.suffixes
        return self.columns, form, sorted(self.expressions.items())


def open_source(
    path: Path, *, delimiter: str | None, quote: str | None, header: bool, columns: Sequence[str] | None
) -> Source:
    """A Source with the names of its columns, from its first line or its Parquet schema; nothing else is read. A column
    without a name, as that of the index in pandas' files, is called column1, column2, ... by its place.
    delimiter: None chooses by the file's name (`DELIMITERS`, else a comma). quote: None is '"' with a comma, else none.
    Raises ValueError if there is no such file, it is empty or not what its name says, or its first line does not fit
    the columns."""
    if not path.is_file():
        known = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"data.path: no file {path}{nearest(path.name, known)}")
    if delimiter is not None and not 1 <= len(delimiter.encode()) <= 4:
        raise ValueError(f"data.delimiter={delimiter!r}: must be text of 1 to 4 bytes, as ';' or '::'")
    if quote is not None and len(quote.encode()) > 1:
        raise ValueError(f"data.quote={quote!r}: must be one ASCII character, or '' for none")
    check_format(path)
    if path.suffix == ".parquet":
        return Source(path, tuple(row[0] for row in describe(path)), "", "", False)
    kind = path.suffixes[-2:-1] if path.suffix in COMPRESSED else path.suffixes[-1:]
    delimiter = delimiter if delimiter is not None else DELIMITERS.get("".join(kind), ",")
    quote = quote if quote is not None else ('"' if delimiter == "," else "")
    found = first_row(path, delimiter, quote)
    if columns is None and header:
        columns = [m.group(1) if (m := TYPED_HEADER.fullmatch(c)) else c for c in found]
    columns = [name or f"column{i}" for i, name in enumerate(columns or [""] * len(found), 1)]
    if len(columns) != len(found):
        raise ValueError(
            f"{path}:1: {len(found)} columns with data.delimiter={delimiter!r}, but data.columns names {len(columns)}"
        )
    lowered = [c.lower() for c in columns]  # SQL names have no case
    if twice := sorted({c for c in columns if lowered.count(c.lower()) > 1}):
        raise ValueError(f"{path}: column names occur twice: {', '.join(twice)}; name all of them in data.columns")
    return Source(path, tuple(columns), delimiter, quote, header)


def check_format(path: Path) -> None:
    """Raises ValueError if a file's first bytes are of a format that its name does not end in."""
    with open(path, "rb") as file:
        start = file.read(5)
    found = next((suffix for magic, suffix in FORMATS.items() if start.startswith(magic)), None)
    if found is not None and path.suffix.lower() != found:
        raise ValueError(f"data.path: {path} begins as a {found} file does, so its name must end in {found}")


def first_row(path: Path, delimiter: str, quote: str) -> list[str]:
    """The fields of the first line of a text file, plain or compressed. Raises ValueError if there is none."""
    try:
        line = first_line_of_zst(path) if path.suffix == ".zst" else first_line_of(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}:1: is not UTF-8 ({error.reason}): convert the file, as with iconv") from None
    except (duckdb.Error, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data.path: {path} cannot be read: {error}") from None
    if not line:
        raise ValueError(f"{path}:1: the first line is empty")
    if quote and len(delimiter) == 1:
        return next(csv.reader([line], delimiter=delimiter, quotechar=quote))
    return line.split(delimiter)


def first_line_of(path: Path) -> str:
    """The first line of a plain or gzip file, without its end and a byte order mark."""
    with open_bytes(path) as file:
        first, *_ = file.readline(MAX_LINE + 1).splitlines() or [b""]
    if len(first) > MAX_LINE:
        raise ValueError(f"{path}:1: the first line has more than {MAX_LINE:,} bytes")
    return first.decode("utf-8-sig")


def first_line_of_zst(path: Path) -> str | None:
    """The first line that is UTF-8, which only DuckDB can see."""
    sql = (
        f"SELECT line FROM read_csv({one_file(path)}, auto_detect=false, header=false, delim='\x01', quote='', "
        "escape='', columns={'line': 'VARCHAR'}, strict_mode=false, ignore_errors=true) LIMIT 1"
    )
    row = duckdb.execute(sql).fetchone()
    return None if row is None else row[0]


def open_bytes(path: Path) -> IO[bytes]:
    """A plain or gzip file, opened to read its bytes."""
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb")


def one_file(path: Path) -> str:
    """The arguments with which DuckDB reads this file alone: see `means_more`."""
    return literal(re.sub(r"[*?[]", r"[\g<0>]", str(path))) + ", hive_partitioning=false"


def means_more(path: Path) -> bool:
    """Whether DuckDB reads more into a file's name by itself: * ? [ mean other files too, and a folder named user=7
    replaces the column user."""
    return re.search(r"[*?[=]", str(path)) is not None


def describe(path: Path) -> list[tuple[str, str]]:
    """(name, SQL type) of each column of a Parquet file. Raises ValueError if it is none."""
    try:
        rows = duckdb.execute(f"DESCRIBE SELECT * FROM read_parquet({one_file(path)})").fetchall()
    except duckdb.Error as error:
        raise ValueError(f"data.path: {path} cannot be read: {str(error).splitlines()[0]}") from None
    return [(row[0], row[1]) for row in rows]


def list_columns(source: Source) -> list[str]:
    """The columns of a Parquet file whose values are lists; text has none."""
    return [name for name, kind in describe(source.path) if kind.endswith("]")] if source.is_parquet else []


def reading_sql(source: Source, types: Mapping[str, str]) -> str:
    """SQL for the columns of `types` (name -> SQL type) of all rows, named by column_sql.

    Rows of a text file that cannot be read go to the tables rejects and rejects_scan. Raises ValueError if a Parquet
    column has another type than it must."""
    wanted = {name: source.expressions.get(name, quoted(name)) for name in types}
    select = ", ".join(f"CAST({sql} AS {types[name]}) AS {column_sql(name)}" for name, sql in wanted.items())
    if source.is_parquet:
        for name, kind in describe(source.path):
            if types.get(name) == "DOUBLE" and not kind.startswith(NUMBERS):
                raise ValueError(f"{source.path}: column {name!r} has type {kind}; a number is needed")
            if kind.endswith("]") and types.get(name, LIST) != LIST:
                raise ValueError(f"{source.path}: column {name!r} is a list ({kind}); name it in data.multi_valued")
        return f"SELECT {select} FROM read_parquet({one_file(source.path)})"
    kinds = {c: "VARCHAR" if c in source.expressions else types.get(c, "VARCHAR") for c in source.columns}
    columns = ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in kinds.items())
    return (
        f"SELECT {select} FROM read_csv({one_file(source.path)}, auto_detect=false, header={source.header}, "
        f"delim={literal(source.delimiter)}, quote={literal(source.quote)}, escape={literal(source.quote)}, "
        f"columns={{{columns}}}, nullstr='', encoding={literal(source.encoding)}, store_rejects=true, "
        f"rejects_table='rejects', rejects_scan='rejects_scan', rejects_limit={MAX_ERRORS + 1})"
    )

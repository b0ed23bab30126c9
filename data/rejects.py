"""Bad rows: each is found, named by file, line and column, and counted.

Two kinds: rows that DuckDB cannot read (missing or extra columns, a number that is none, broken quotes or encoding),
which its rejects tables hold; and rows whose value means nothing (a label that is not 0 or 1, a dense value that is not
finite), which the checks of the Source find among the rows that were read."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import duckdb

from data.database import Database, column_sql, quoted
from data.source import MAX_BAD_ROWS, MAX_ERRORS, Source, open_bytes, reading_sql


@dataclass(frozen=True)
class Rejected:
    """One bad row. line: 1 is the file's first; unit is 'row ' where only rows can be counted (Parquet, and files with
    blank lines, quoted line ends or zstd), and then 1 is the first row that could be read."""

    path: Path
    line: int
    column: str
    reason: str
    raw: str
    unit: str = ""

    @property
    def num_lines(self) -> int:
        """Lines of the file that are lost: more than one where an open quote swallows the lines that follow."""
        return 1 + self.raw.count("\n")

    def __str__(self) -> str:
        return f"{self.path}:{self.unit}{self.line}:{self.column}: {self.reason}"


def load(db: Database, source: Source, *, table: str, types: Mapping[str, str]) -> list[Rejected]:
    """Makes `table` of the good rows of a source, in file order, with the columns of `types` (name -> SQL type).
    Returns the bad rows in file order, one entry each. Raises ValueError if the file cannot be read at all."""
    raw_table = quoted(f"{table} raw")
    sql = reading_sql(source, types)
    with refusing(source):
        db.run(f"CREATE TABLE {raw_table} AS {sql}")
    bad = [] if source.is_parquet else unreadable(db, source)
    checks = {name: check for name, check in source.checks.items() if name in types}
    failed = " OR ".join(f"({condition}) IS NOT TRUE" for condition, _ in checks.values()) or "false"
    if db.value(f"SELECT count(*) FROM {raw_table} WHERE {failed}"):
        bad = sorted(bad + without_meaning(db, source, raw_table, checks, bad), key=lambda rejected: rejected.line)
        db.run(f"CREATE TABLE {quoted(table)} AS SELECT * FROM {raw_table} WHERE NOT ({failed})")
        db.run(f"DROP TABLE {raw_table}")
    else:
        db.run(f"ALTER TABLE {raw_table} RENAME TO {quoted(table)}")
    if len(bad) > MAX_BAD_ROWS:
        raise ValueError(too_many(source, bad[0]))
    return bad


@contextmanager
def refusing(source: Source) -> Iterator[None]:
    """Reading a source within raises ValueError, not DuckDB's errors, if the file cannot be read at all."""
    try:
        yield
    except duckdb.Error as error:
        is_mixed = isinstance(error, duckdb.InvalidInputException) and "invalid state" in str(error)
        raise ValueError(mixed_line_ends(source) if is_mixed else f"{source.path}: {error}") from None


def unreadable(db: Database, source: Source) -> list[Rejected]:
    """The rows that DuckDB could not read, one entry per line (its leftmost error); empties the rejects tables."""
    errors = db.value("SELECT count(*) FROM rejects")
    rows = db.rows(
        "SELECT line, column_idx, column_name, error_type, error_message, csv_line FROM rejects "
        "QUALIFY row_number() OVER (PARTITION BY line ORDER BY column_idx) = 1 "
        f"ORDER BY line LIMIT {MAX_BAD_ROWS + 1}"
    )
    db.run("DROP TABLE rejects; DROP TABLE rejects_scan")
    found = []
    for line, index, name, kind, message, raw in rows:
        raw, column = (raw or "").strip("\r\n"), name or f"column {index or 1}"
        reason = f"{kind.lower()}: {(message or '').strip().splitlines()[0] if message else 'cannot be read'}"
        found.append(Rejected(source.path, line, column, reason, raw))
        if found[-1].num_lines > 1:
            found[-1] = replace(found[-1], reason=f"{reason} It swallows the {raw.count(chr(10))} lines that follow.")
    if errors > MAX_ERRORS or len(found) > MAX_BAD_ROWS:
        raise ValueError(too_many(source, found[0]))
    return found


def too_many(source: Source, first: Rejected) -> str:
    """What to say when so many rows are bad that the file must have been misunderstood."""
    return (
        f"{first}\n{source.path} has more than {MAX_BAD_ROWS:,} bad rows: is data.delimiter={source.delimiter!r} "
        f"(with data.quote={source.quote!r}, data.header={source.header}) right, and the kind of each column?"
    )


def without_meaning(
    db: Database,
    source: Source,
    table: str,
    checks: Mapping[str, tuple[str, str]],
    unread: list[Rejected],
) -> list[Rejected]:
    """The rows of `table` (in file order, those of `unread` missing) that fail a check, with the first check failed."""
    names = list(checks)
    cases = " ".join(f"WHEN ({checks[name][0]}) IS NOT TRUE THEN {i}" for i, name in enumerate(names))
    values = " ".join(f"WHEN {i} THEN CAST({column_sql(name)} AS VARCHAR)" for i, name in enumerate(names))
    rows = db.rows(
        f"SELECT place, failed, CASE failed {values} END FROM (SELECT rowid AS place, CASE {cases} END AS failed, * "
        f"FROM {table}) WHERE failed IS NOT NULL ORDER BY place LIMIT {MAX_BAD_ROWS + 1}"
    )
    skipped = sorted(r.line + i for r in unread for i in range(r.num_lines))
    total = db.value(f"SELECT count(*) FROM {table}") + len(skipped)
    exact = not source.is_parquet and count_lines(source.path) == total + source.header
    before, found = 0, []
    for place, failed, value in rows:
        line = place + 1 + source.header * exact
        while exact and before < len(skipped) and skipped[before] <= line + before:
            before += 1
        name, unit = names[failed], "" if exact else "row "
        reason = f"{checks[name][1]}, not {'empty' if value is None else value}"
        found.append(Rejected(source.path, line + before, name, reason, "", unit))
    return with_text(source.path, found) if exact else found


def count_lines(path: Path) -> int | None:
    """Number of lines of a plain or gzip file; None for another, whose lines only DuckDB can see."""
    if path.suffix == ".zst":
        return None
    count, last = 0, b"\n"
    with open_bytes(path) as file:
        while chunk := file.read(1 << 20):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


def with_text(path: Path, rejected: list[Rejected]) -> list[Rejected]:
    """The same rows with the text of their lines."""
    lines = {r.line for r in rejected}
    with open_bytes(path) as file:
        text = {n: line.rstrip(b"\r\n").decode(errors="replace") for n, line in enumerate(file, 1) if n in lines}
    return [replace(r, raw=text.get(r.line, "")) for r in rejected]


def mixed_line_ends(source: Source) -> str:
    """Says where the line ends begin to differ, which DuckDB does not read, as file:line:column: reason."""
    line_number: int | str = "?"
    if source.path.suffix != ".zst":
        with open_bytes(source.path) as file:
            windows = file.readline().endswith(b"\r\n")
            odd = (n for n, line in enumerate(file, 2) if line.endswith(b"\r\n") != windows or b"\r" in line[:-2])
            line_number = next(odd, "?")
    return (
        f"{source.path}:{line_number}:{source.columns[-1]}: a carriage return: line ends \\n and \\r\\n are mixed, or "
        f"one is within a value. Make them one kind, e.g. sed -i 's/\\r//g' {source.path.name}"
    )


def write_quarantine(path: Path, rejected: list[Rejected]) -> None:
    """Writes the rows as a TSV with a header: file, line, column, reason, text (tabs and line ends escaped; empty for
    what has no text, as Parquet)."""
    with open(path, "w") as file:
        file.write("file\tline\tcolumn\treason\ttext\n")
        for r in rejected:
            fields = (str(r.path), f"{r.unit}{r.line}", r.column, r.reason, r.raw)
            escaped = (f.replace("\\", "\\\\").replace("\t", "\\t").replace("\n", "\\n") for f in fields)
            file.write("\t".join(escaped) + "\n")

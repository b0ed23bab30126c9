"""A guess of what the columns of a file mean, as a yaml to correct and save."""

from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from data.database import column_sql
from data.rejects import refusing
from data.source import LIST, Source, list_columns, reading_sql

SAMPLE_ROWS = 10_000
LABELS = ("label", "click", "clicked", "target", "is_click", "conversion", "rating", "y")
TIMES = ("timestamp", "time", "datetime", "date", "ts", "created_at")
MANY_VALUES = 100  # a whole number with more distinct values in the sample is taken for a quantity, not a category
SEPARATORS = ("|", ";")  # of several values in one field; commas and spaces are too common in plain text
SEVERAL = 1.3  # parts per field on average, from which a field is taken to hold several values


@dataclass(frozen=True)
class Facts:
    """What the first values of a column look like."""

    is_number: bool
    is_whole: bool
    is_binary: bool
    is_date: bool
    low: float
    median: float
    distinct: int
    separator: str | None

    def is_quantity(self, name: str) -> bool:
        """Whether the column counts or measures something, rather than names it."""
        named_id = name.lower().endswith("id")
        return self.is_number and not named_id and (not self.is_whole or self.distinct > MANY_VALUES)


def facts_of(con: duckdb.DuckDBPyConnection, name: str) -> Facts:
    """Facts of a column of the table sample, all VARCHAR."""
    x, number = column_sql(name), f"TRY_CAST({column_sql(name)} AS DOUBLE)"
    parts = ", ".join(f"avg(len(string_split({x}, '{separator}')))" for separator in SEPARATORS)
    count, numbers, dates, distinct, whole, binary, low, median, *means = con.execute(
        f"SELECT count({x}), count({number}), count(TRY_CAST({x} AS TIMESTAMP)), count(DISTINCT {x}), "
        f"bool_and({number} = floor({number})), bool_and({number} IN (0, 1)), min({number}), "
        f"quantile_disc({number}, 0.5), {parts} FROM sample"
    ).fetchone()
    is_number = 0 < count == numbers
    separators = [s for s, mean in zip(SEPARATORS, means, strict=True) if mean is not None and mean > SEVERAL]
    return Facts(
        is_number=is_number,
        is_whole=bool(is_number and whole),
        is_binary=bool(is_number and binary),
        is_date=0 < count == dates and not is_number,
        low=low if is_number else 0.0,
        median=median if is_number else 0.0,
        distinct=distinct,
        separator=None if is_number or not separators else separators[0],
    )


def inferred_yaml(sources: Sequence[Source], keys: Sequence[str]) -> str:
    """Text of a yaml that names label, dense, categorical and multi-valued columns and the time, from the first
    SAMPLE_ROWS rows of each file (a bad row there is passed over). keys: the column that each file after the first
    shares with it."""
    facts: dict[str, Facts] = {}
    lists: list[str] = []
    for source in sources:
        con = duckdb.connect()
        own = [name for name in list_columns(source) if name not in facts]
        sql = reading_sql(source, {name: LIST if name in own else "VARCHAR" for name in source.names})
        with refusing(source):
            con.execute(f"CREATE TABLE sample AS SELECT * FROM ({sql}) LIMIT {SAMPLE_ROWS}")
        facts |= {name: facts_of(con, name) for name in source.names if name not in (*facts, *own)}
        lists += own
    label = next((n for word in LABELS for n in facts if n.lower() == word), None)
    label = label or next((n for n in facts if facts[n].is_binary), None)
    rest = [n for n in facts if n != label]
    time = next((n for word in TIMES for n in rest if n.lower() == word), None)
    time = time or next((n for n in rest if facts[n].is_date), None)
    rest = [n for n in rest if n != time]
    multi = [n for n in rest if facts[n].separator and n not in keys]
    dense = [n for n in rest if facts[n].is_quantity(n) and n not in keys]
    joins = [f"  - {{path: {word(s.path.name)}, key: {word(k)}}}" for s, k in zip(sources[1:], keys, strict=True)]
    several = [f"  {word(n)}: {word(facts[n].separator)}" for n in multi] + [f"  {word(n)}: null" for n in lists]
    lines = [
        "# conf/data/NAME.yaml; python train.py data=NAME",
        "defaults: [table, _self_]",
        f"path: {word(str(sources[0].path))}",
        *(["joins:", *joins] if joins else []),
        f"label: {word(label) if label else '???'}",
        *([f"label_threshold: {facts[label].median}  # 1 from this value on"] if is_graded(label, facts) else []),
        block("dense", [f"  {word(n)}: {'log1p' if facts[n].low >= 0 else 'standardize'}" for n in dense], "null"),
        block("categorical", [f"  - {word(n)}" for n in rest if n not in dense and n not in multi], "[]"),
        block("multi_valued", several, "null"),
        f"time: {word(time)}" if time else "time: null  # the split follows the file's order",
    ]
    return "\n".join(lines)


def is_graded(label: str | None, facts: dict[str, Facts]) -> bool:
    """Whether the label has values other than 0 and 1."""
    return label is not None and facts[label].is_number and not facts[label].is_binary


def block(key: str, lines: list[str], empty: str) -> str:
    """A yaml key with its lines below, or with the empty value."""
    return "\n".join([f"{key}:", *lines]) if lines else f"{key}: {empty}"


def word(text: str) -> str:
    """The text as a yaml scalar that is a string, whatever it looks like."""
    is_plain = text.replace("_", "").replace("/", "").replace(".", "").replace("-", "").isalnum()
    is_special = text.lower() in ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "~")
    if is_plain and text[0].isalpha() and not is_special:
        return text
    return "'" + text.replace("'", "''") + "'"

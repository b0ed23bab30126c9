"""Any CSV, TSV or Parquet file, plain, .gz or .zst, by one yaml that says what its columns mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.checks import check_choice, check_keys, check_list, check_mapping, check_number, check_text, nearest
from data.database import column_sql, quoted
from data.dataset import FileDataset
from data.encode import Schema
from data.infer import inferred_yaml
from data.prepared import stored_order
from data.source import Source, list_columns, open_source

TRANSFORMS = ("none", "log1p", "shifted_log", "standardize")
# floor(ln(x)^2) above 2, else x; empty as 0: that of FuxiCTR for Criteo_x4, as the winners of Criteo's challenge.
# What is no number stays as it is, to be refused by what it says
BUCKET = (
    "CASE WHEN {0} IS NULL THEN '0' ELSE coalesce(CAST(TRY_CAST(CASE WHEN {1} > 2 THEN "
    "floor(pow(ln(greatest({1}, 1)), 2)) ELSE trunc({1}) END AS BIGINT) AS VARCHAR), CAST({0} AS VARCHAR)) END"
)


@dataclass(eq=False, kw_only=True)
class Table(FileDataset):
    """Samples are the rows of `path`, or in the folder `path` of the file `file`, or of the `files` {train, valid,
    test}; conf/data/table.yaml says what each key means.

    dense: {column: one of TRANSFORMS}. categorical: columns; buckets: those of them that are numbers, to be taken by
    their magnitude. multi_valued: {column: separator, None for a list column of Parquet}. joins: list of {path, key}:
    side files, looked up by a column of the same name, whose paths are relative to the main file's folder.
    dense and multi_valued may be None: no such columns (the yaml says null, which the command line can replace).
    With neither dense, categorical nor multi_valued columns, prints the yaml that the file suggests and raises
    ValueError. ValueError too for a column that is not there, with the nearest name."""

    file: str | None
    files: Mapping[str, str] | None
    delimiter: str | None
    quote: str | None
    header: bool
    columns: Sequence[str] | None
    joins: Sequence[Mapping[str, str]]
    label: str | None
    label_threshold: float | None
    dense: Mapping[str, str] | None
    categorical: Sequence[str]
    buckets: Sequence[str]
    multi_valued: Mapping[str, str | None] | None
    time: str | None
    order: str
    split_seed: int

    def open(self) -> tuple[str, Schema]:
        """See FileDataset."""
        if self.path is None:
            raise ValueError("data.path is not set: name the file, as in data.path=clicks.csv")
        dense = {} if self.dense is None else self.dense
        multi_valued = {} if self.multi_valued is None else self.multi_valued
        check_mapping("data.dense", dense, "{price: log1p}")
        check_mapping("data.multi_valued", multi_valued, "{genres: '|'}")
        check_list("data.categorical", self.categorical, "[user, item]")
        check_list("data.buckets", self.buckets, "[price, age]")
        check_keys("data.categorical, which data.buckets is of,", self.buckets, self.categorical)
        main, *more = self._open_parts()
        sides = self._open_sides(main)
        sources = [main, *(side for side, _ in sides)]
        if not (dense or self.categorical or multi_valued):
            print(inferred_yaml(sources, [key for _, key in sides]))
            raise ValueError(
                "data: no columns are named. The lines above are what the file suggests: correct them, save them as "
                "conf/data/NAME.yaml, and run with data=NAME (or give data.label, data.dense, ... on the command line)"
            )
        check_roles(self.label, dense, self.categorical, multi_valued, self.time, sources)
        if self.label_threshold is not None:
            check_number("data.label_threshold", self.label_threshold, -3e38, 3e38)
        parts = [self._in_buckets(part) for part in (main, *more)]
        return main.path.name if not more else Path(self.path).resolve().name, Schema(
            main=parts[0],
            more=tuple(parts[1:]),
            sides=tuple((self._in_buckets(side), key) for side, key in sides),
            label=self.label,
            threshold=self.label_threshold,
            dense=dict(dense),
            categorical=tuple(self.categorical),
            multi_valued=dict(multi_valued),
            time=self.time,
        )

    def split_order(self) -> tuple[str, int]:
        """See FileDataset."""
        return self.order, self.split_seed

    def splits_are_files(self) -> bool:
        """See FileDataset."""
        return self.files is not None

    def counts(self, rows: list[int]) -> dict[str, int]:
        """See FileDataset."""
        if self.files is None:
            return super().counts(rows)
        return {"valid": 0} | dict(zip(self._splits(), rows, strict=True))

    def _splits(self) -> list[str]:
        """The splits that files has, in the order of the prepared arrays."""
        return [split for split in stored_order(self.last) if split in self.files]

    def _open_parts(self) -> list[Source]:
        """The file of path and file, or the files of path and files."""
        if self.files is None:
            return [self._open_main(Path(self.path) / self.file if self.file else Path(self.path))]
        example = "{train: train.csv, valid: valid.csv, test: test.csv}"
        check_mapping("data.files", self.files, example)
        check_keys("data.files", self.files, ("train", "valid", "test"))
        if not {"train", "test"} <= set(self.files):
            raise ValueError(f"data.files={dict(self.files)}: needs train and test, as in {example}")
        if self.file is not None or self.time is not None or self.order != "file":
            raise ValueError(
                "data.files are the splits: data.file, data.time and data.order=random do not go with them"
            )
        parts = [self._open_main(Path(self.path) / self.files[split]) for split in self._splits()]
        for part in parts[1:]:
            if missing := [name for name in parts[0].names if name not in part.names]:
                raise ValueError(f"{part.path} has no column {missing[0]!r}, which {parts[0].path.name} has")
        return parts

    def _in_buckets(self, source: Source) -> Source:
        """The same source, with the magnitudes of the columns in buckets."""
        sql = {c: BUCKET.format(quoted(c), f"TRY_CAST({quoted(c)} AS DOUBLE)") for c in self.buckets}
        whole = "TRY_CAST({0} AS BIGINT) IS NOT NULL AND regexp_full_match({0}, '-?[0-9]+')"
        checks = {c: (whole.format(column_sql(c)), "must be a number (data.buckets)") for c in self.buckets}
        sql, checks = ({c: x for c, x in some.items() if c in source.columns} for some in (sql, checks))
        return replace(source, expressions={**source.expressions, **sql}, checks={**source.checks, **checks})

    def _open_main(self, path: Path) -> Source:
        """A file of samples."""
        if path.is_dir():
            names = ", ".join(sorted(p.name for p in path.iterdir())[:10])
            raise ValueError(f"data.path={self.path}: is a folder; name a file in it with data.file: {names}")
        if self.columns is not None:
            check_list("data.columns", self.columns, "[click, price, user]")
            for i, name in enumerate(self.columns):
                check_text(f"data.columns[{i}]", name)
        return self._open(path, self.columns)

    def _open_sides(self, main: Source) -> list[tuple[Source, str]]:
        """The files of joins, each with its key."""
        example, sides = "{path: users.csv, key: user_id}", []
        check_list("data.joins", self.joins, f"[{example}]")
        for i, join in enumerate(self.joins):
            check_mapping(f"data.joins[{i}]", join, example)
            if set(join) != {"path", "key"}:
                raise ValueError(f"data.joins[{i}]={dict(join)}: needs path and key, as in {example}")
            for name in ("path", "key"):
                check_text(f"data.joins[{i}].{name}", join[name])
            side = self._open(main.path.parent / join["path"], None)
            check_keys(f"data.joins[{i}].key: {side.path}", [join["key"]], side.names)
            check_keys(f"data.joins[{i}].key: {main.path}", [join["key"]], main.names)
            sides.append((side, join["key"]))
        return sides

    def _open(self, path: Path, columns: Sequence[str] | None) -> Source:
        return open_source(path, delimiter=self.delimiter, quote=self.quote, header=self.header, columns=columns)


def check_roles(
    label: str | None,
    dense: Mapping[str, str],
    categorical: Sequence[str],
    multi_valued: Mapping[str, str | None],
    time: str | None,
    sources: Sequence[Source],
) -> None:
    """Raises ValueError unless every named column exists in exactly one file and has one role."""
    known = [name for source in sources for name in source.names]
    roles: dict[str, str] = {}
    for role, names in (
        ("label", [label] if label is not None else []),
        ("dense", dense),
        ("categorical", categorical),
        ("multi_valued", multi_valued),
        ("time", [time] if time is not None else []),
    ):
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"data.{role} names {name!r}: a column's name is text; put it in quotes")
            if name not in known:
                raise ValueError(
                    f"data.{role} names no column {name!r}; {sources[0].path.name} has "
                    f"{', '.join(dict.fromkeys(known))}{nearest(name, known)}"
                )
            if name in roles:
                raise ValueError(
                    f"data.{role} names {name!r}, which data.{roles[name]} names too; a column has one role"
                )
            if name not in sources[0].names and known.count(name) > 1:
                raise ValueError(f"data.{role} names {name!r}, which more than one file of data.joins has")
            roles[name] = role
    if label is None:
        raise ValueError(f"data.label is not set: name the column of the labels, one of {', '.join(known)}")
    if not (categorical or multi_valued):
        raise ValueError(
            "data.categorical and data.multi_valued are empty: a DLRM needs one categorical column or more"
        )
    for name, transform in dense.items():
        check_choice(f"data.dense.{name}", transform, TRANSFORMS)
    lists = [name for source in sources for name in list_columns(source)]
    for name, separator in multi_valued.items():
        if name in lists and separator is not None:
            raise ValueError(f"data.multi_valued.{name}={separator!r}: the column is a list, so it must be null")
        if name not in lists and (not isinstance(separator, str) or not separator):
            raise ValueError(f"data.multi_valued.{name}={separator!r}: must be the text that separates the values")

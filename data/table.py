"""Any CSV, TSV or Parquet file, plain, .gz or .zst, by one yaml that says what its columns mean."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.checks import check_choice, check_keys, check_number, nearest
from data.dataset import FileDataset
from data.encode import Preparation, Schema
from data.infer import inferred_yaml
from data.source import Source, joined_lists, open_source

TRANSFORMS = ("none", "log1p", "standardize")


class Table(FileDataset):
    """Samples are the rows of `path`, or of the file `file` in the folder `path`; conf/data/table.yaml says what each
    key means.

    dense: {column: none | log1p | standardize}. categorical: columns. multi_valued: {column: separator}. joins: list of
    {path, key}: side files, looked up by a column of the same name, whose paths are relative to the main file's folder.
    With neither dense, categorical nor multi_valued columns, prints the yaml that the file suggests and raises
    ValueError. ValueError too for a column that is not there, with the nearest name."""

    def __init__(
        self,
        path: str,
        cache: str,
        *,
        file: str | None,
        delimiter: str | None,
        quote: str | None,
        header: bool,
        columns: Sequence[str] | None,
        joins: Sequence[Mapping[str, str]],
        label: str | None,
        label_threshold: float | None,
        dense: Mapping[str, str],
        categorical: Sequence[str],
        multi_valued: Mapping[str, str],
        time: str | None,
        split: Mapping[str, float],
        order: str,
        split_seed: int,
        min_count: int,
        id_order: str,
        on_error: str,
        memory_limit: str,
        shuffle_block: int,
        shuffle_seed: int,
    ):
        if path is None:
            raise ValueError("data.path is not set: name the file, as in data.path=clicks.csv")
        main_path = Path(path) / file if file else Path(path)
        if main_path.is_dir():
            names = ", ".join(sorted(p.name for p in main_path.iterdir())[:10])
            raise ValueError(f"data.path={path}: is a folder; name a file in it with data.file: {names}")
        main = open_source(main_path, delimiter=delimiter, quote=quote, header=header, columns=columns)
        sides = []
        for i, join in enumerate(joins):
            if set(join) != {"path", "key"}:
                raise ValueError(
                    f"data.joins[{i}]={dict(join)}: needs path and key, as in {{path: users.csv, key: user_id}}"
                )
            side = open_source(
                main_path.parent / join["path"], delimiter=delimiter, quote=quote, header=header, columns=None
            )
            check_keys(f"data.joins[{i}].key: {side.path}", [join["key"]], side.names)
            check_keys(f"data.joins[{i}].key: {main.path}", [join["key"]], main.names)
            sides.append((joined_lists(side, multi_valued), join["key"]))
        if not (dense or categorical or multi_valued):
            print(inferred_yaml([main, *(side for side, _ in sides)], [key for _, key in sides]))
            raise ValueError(
                "data: no columns are named. The lines above are what the file suggests: correct them, save them as "
                "conf/data/NAME.yaml, and run with data=NAME (or give data.label, data.dense, ... on the command line)"
            )
        check_roles(label, dense, categorical, multi_valued, time, [main, *(side for side, _ in sides)])
        if label_threshold is not None:
            check_number("data.label_threshold", label_threshold, -3e38, 3e38)
        schema = Schema(
            main=joined_lists(main, multi_valued),
            sides=tuple(sides),
            label=label,
            threshold=label_threshold,
            dense=dict(dense),
            categorical=tuple(categorical),
            multi_valued=dict(multi_valued),
            time=time,
        )
        super().__init__(
            schema,
            Preparation(split=split, order=order, split_seed=split_seed, min_count=min_count, id_order=id_order),
            name=main_path.name,
            cache=cache,
            on_error=on_error,
            memory_limit=memory_limit,
            shuffle_block=shuffle_block,
            shuffle_seed=shuffle_seed,
        )


def check_roles(
    label: str | None,
    dense: Mapping[str, str],
    categorical: Sequence[str],
    multi_valued: Mapping[str, str],
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
    for name, separator in multi_valued.items():
        if not isinstance(separator, str) or not separator:
            raise ValueError(f"data.multi_valued.{name}={separator!r}: must be the text that separates the values")

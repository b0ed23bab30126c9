"""A table's batches are what a plain Python reading of the file gives, whatever its format, joins and cache."""

import csv
import errno
import gzip
import io
import os
from collections import Counter
from pathlib import Path

import duckdb
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import TABLE, samples_of

from data import table as table_module
from data.prepared import Writer, fingerprint
from data.table import Table

pytestmark = pytest.mark.once  # hydra only makes its readers
CONF = Path(table_module.__file__).parents[1] / "conf"

ROWS = "y,d,c,m,t\n1,0.5,a,x|y,3\n0,,b,,1\n1,2,,y,2\n0,-1,a,z|x,9\n1,3,q,w,8\n0,4,b,x|w,9\n"
ROLES = {"categorical": ["c"], "multi_valued": {"m": "|"}, "dense": {"d": "none"}}


def expected(rows, *, train, min_count, id_order):
    """Cardinalities and samples of rows [(y, d, c, m)] in their order, by dictionaries."""
    counts, first = (Counter(), Counter()), ({}, {})
    for i, (_, _, c, m) in enumerate(rows):
        for k, values in enumerate(([c], [v for v in m.split("|") if v])):
            for value in values:
                first[k].setdefault(value, i)
                counts[k][value] += i < train
    vocabularies, sizes = [], []
    for seen, at in zip(counts, first, strict=True):
        frequency = id_order == "frequency"
        order = sorted(at, key=lambda v, s=seen, a=at, f=frequency: (-s[v] if f else 0, a[v], v))
        kept = [v for v in order if seen[v] >= min_count]
        unseen = [v for v in order if seen[v] == 0]
        vocabularies.append({v: i + 1 for i, v in enumerate(kept + unseen)})
        sizes.append(len(kept) + 1)
    samples = [
        (d, [[vocabularies[0].get(c, 0)], [vocabularies[1].get(v, 0) for v in m.split("|") if v]], y)
        for y, d, c, m in rows
    ]
    return {"c": sizes[0], "m": sizes[1]}, samples


words = st.sampled_from(["a", "b", "c", "", "déjà", 'q"t', "x,y", "1"])
rows_strategy = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(-5, 5),
        words,
        st.lists(st.sampled_from(["u", "v", "w w", "ß"]), max_size=4).map("|".join),
    ),
    min_size=4,
    max_size=30,
)


@given(rows=rows_strategy, min_count=st.integers(1, 3), id_order=st.sampled_from(["frequency", "appearance"]))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_ids_agree_with_a_plain_python_reading(rows, min_count, id_order, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("y", "d", "c", "m"), *rows])
    (folder / "t.csv").write_text(text.getvalue())
    options = TABLE | ROLES | {"min_count": min_count, "id_order": id_order}
    dataset = Table(os.fspath(folder / "t.csv"), os.fspath(folder / "cache"), **options)
    dataset.prepare({"c", "m"})
    train = int(len(rows) * 0.5 + 0.5)
    sizes, samples = expected(rows, train=train, min_count=min_count, id_order=id_order)
    assert dataset.cardinalities == sizes
    got = samples_of(dataset, "train") + samples_of(dataset, "test")
    want = [([float(d)], bags, float(y)) for d, bags, y in samples]
    assert sorted(got[:train]) == sorted(want[:train]) and got[train:] == want[train:]


def test_empty_is_a_value_of_its_own_or_an_empty_bag(table):
    dataset = table(ROWS, **ROLES)
    assert dataset.cardinalities == {"c": 4, "m": 3}  # a b empty; x y
    assert samples_of(dataset, "test")[1] == ([3.0], [[0], [0]], 1.0)  # q and w were never seen in training
    assert [bags[1] for _, bags, _ in samples_of(dataset, "train") if bags[0] == [2]] == [[]]


def test_unseen_ids_are_distinct_where_they_are_kept(table):
    dataset = table(ROWS, keep_unseen=["m"], **ROLES)
    assert [bags for _, bags, _ in samples_of(dataset, "test")] == [[[1], [3, 1]], [[0], [4]], [[2], [1, 4]]]


def test_ids_below_min_count_are_zero_even_where_unseen_are_kept(table):
    dataset = table(ROWS, keep_unseen=["c", "m"], min_count=2, **ROLES)
    assert dataset.cardinalities == {"c": 1, "m": 2}  # only y occurs twice in training
    assert [bags for _, bags, _ in samples_of(dataset, "test")] == [[[0], [2, 0]], [[1], [3]], [[0], [0, 3]]]


def test_split_by_time_is_stable(table):
    dataset = table(ROWS, time="t", split={"train": 0.5, "valid": 1 / 6, "test": 1 / 3}, **ROLES)
    assert dataset.num_samples == {"train": 3, "valid": 1, "test": 2}
    assert [d for d, _, _ in samples_of(dataset, "valid")] == [[3.0]]
    assert [d for d, _, _ in samples_of(dataset, "test")] == [[-1.0], [4.0]]  # both t=9: in the file's order
    assert sorted(d for d, _, _ in samples_of(dataset, "train")) == [[0.0], [0.5], [2.0]]


def test_time_may_be_a_date(table):
    text = "y,d,c,t\n1,1,a,2024-03-01\n0,2,a,2024-01-31 10:00:00\n1,3,a,2023-12-31\n0,4,a,2024-02-02\n"
    assert [d for d, _, _ in samples_of(table(text, time="t"), "test")] == [[4.0], [1.0]]


def test_random_split_follows_its_seed_only(table):
    text = "y,d,c\n" + "".join(f"{i % 2},{i},a\n" for i in range(200))

    def test_rows(**options):
        return [d[0] for d, _, _ in samples_of(table(text, order="random", **options), "test")]

    first = test_rows()
    assert first == test_rows(shuffle_seed=5) != sorted(first) and set(first) != set(test_rows(split_seed=1))


def test_dense_transforms(table):
    text = "y,d,e,f,c\n1,-3,10,7,a\n0,1,,7,a\n1,0,20,7,a\n0,7,100,9,a\n1,,,,a\n0,3,15,7,a\n"
    dataset = table(text, dense={"d": "log1p", "e": "standardize", "f": "standardize"})
    got = [d for d, _, _ in samples_of(dataset, "test")]
    want = [[2.0794415, 17.0, 2.0], [0.0, 0.0, 0.0], [1.3862944, 0.0, 0.0]]  # e: mean 15, deviation 5; f: constant
    assert got == [pytest.approx(row, rel=1e-6) for row in want]


@pytest.mark.parametrize(
    "name", ["t.tsv", "t.csv.gz", "t.tsv.gz", "t.csv.zst", "t.parquet", "t.txt", "crlf.csv", "t.dat"]
)
def test_every_format_gives_the_same_batches(table, tmp_path, name):
    want = table(ROWS, name="plain.csv", time="t", **ROLES)
    if name.endswith((".zst", ".parquet")):
        (tmp_path / "s.csv").write_text(ROWS)
        kind = "FORMAT parquet" if name.endswith(".parquet") else "FORMAT csv, COMPRESSION zstd"
        source = f"read_csv('{tmp_path / 's.csv'}', all_varchar={'false' if 'parquet' in name else 'true'})"
        duckdb.execute(f"COPY (SELECT * FROM {source}) TO '{tmp_path / name}' ({kind})")
        content = None
    elif "csv" in name:
        content = ROWS.replace("\n", "\r\n").encode() if "crlf" in name else gzip.compress(ROWS.encode())
    else:
        text = ROWS.replace(",", "::" if name.endswith("dat") else "\t").encode()
        content = gzip.compress(text) if name.endswith("gz") else text
    got = table(content, name=name, time="t", **ROLES)
    assert got.cardinalities == want.cardinalities
    assert samples_of(got, "train", 100) == samples_of(want, "train", 100)
    assert samples_of(got, "test") == samples_of(want, "test")


@pytest.mark.parametrize("name", ["t[1]", "t*", "t?", "{t,t1}", "d=9/t", "[t]*/t"])
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_named_file_alone_is_read_whatever_its_name(table, tmp_path, name, kind):
    for other, dense in (("t1", 5), ("tt", 6), (name, 1)):
        path = tmp_path / f"{other}.{kind}"
        path.parent.mkdir(exist_ok=True)
        rows = f"(VALUES (1, {dense}, 'a'), (0, 0, 'b')) v(y, d, c)"
        duckdb.execute(f"COPY (SELECT * FROM {rows}) TO '{path}' (FORMAT {kind})")
    dataset = table(None, name=f"{name}.{kind}")
    assert samples_of(dataset, "train") == [([1.0], [[1]], 1.0)] and dataset.num_samples["test"] == 1
    options = (dataset.schema.identity(), dataset.preparation.identity(), dataset.on_error)
    is_plain = dataset.fingerprint == fingerprint([path], options)  # by which rows of other files may lie prepared
    assert is_plain == (name == "{t,t1}")


@pytest.mark.parametrize(
    "content, name, words",
    [
        ("y,d,prix\u00e9\n".encode("latin-1"), "t.csv", "t.csv:1: is not UTF-8 .*iconv"),
        (ROWS.encode("utf-16"), "t.csv", "t.csv:1: is not UTF-8"),
        (gzip.compress("y,d,prix\u00e9\n".encode("latin-1")), "t.csv.gz", "t.csv.gz:1: is not UTF-8"),
        (gzip.compress(ROWS.encode()), "t.csv", "begins as a .gz file does, so its name must end in .gz"),
        (b"PAR1\x15 and the rest", "t.csv", "begins as a .parquet file does"),
        (b"y," + b"d" * 2_000_000 + b",c\n", "t.csv", "t.csv:1: the first line has more than 2,000,000 bytes"),
        (ROWS.encode(), "t.parquet", "t.parquet cannot be read: [^\n]*magic[^\n]*$"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(content, name, words, table, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words):
        table(None, name=name, **ROLES)


def test_a_byte_order_mark_is_no_part_of_a_name(table, tmp_path):
    (tmp_path / "t.csv").write_bytes(ROWS.encode("utf-8-sig"))
    marked = samples_of(table(None, **ROLES), "test")
    assert marked == samples_of(table(ROWS, **ROLES), "test")


def test_a_quote_or_delimiter_that_is_none(table):
    with pytest.raises(ValueError, match="data.quote='abc': must be one ASCII character, or '' for none"):
        table(ROWS, quote="abc", **ROLES)
    for delimiter in ("", "abcde"):
        with pytest.raises(ValueError, match=f"data.delimiter='{delimiter}': must be text of 1 to 4 bytes"):
            table(ROWS, delimiter=delimiter, **ROLES)


def test_a_list_column_of_parquet_is_multi_valued(table, tmp_path, capsys):
    rows = (
        "(VALUES (1, 0.5, 'a', ['x|z', 'y', 'x', 'y']), (0, 1.0, 'b', []), (1, 2.0, 'a', NULL), "
        "(0, 3.0, 'a', ['y', NULL, 'x|z', ''])) v(y, d, c, m)"
    )
    duckdb.execute(f"COPY (SELECT * FROM {rows}) TO '{tmp_path / 't.parquet'}'")
    dataset = table(None, name="t.parquet", **ROLES | {"multi_valued": {"m": None}, "id_order": "lexical"})
    bags = [bags[1] for split in ("train", "test") for _, bags, _ in samples_of(dataset, split)]
    assert bags == [[2, 3, 1, 3], [], [], [3, 2]]
    with pytest.raises(ValueError, match="no columns are named"):
        table(None, name="t.parquet", label=None, dense={}, categorical=[])
    assert "multi_valued:\n  m: null\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="multi_valued.m='|': the column is a list, so it must be null"):
        table(None, name="t.parquet", **ROLES)
    with pytest.raises(ValueError, match="multi_valued.c=None: must be the text that separates"):
        table(None, name="t.parquet", dense={}, categorical=["d"], multi_valued={"c": None})
    with pytest.raises(ValueError, match="'m' is a list .*data.multi_valued"):
        table(None, name="t.parquet", categorical=["c", "m"])
    with pytest.raises(ValueError, match="'c' has type VARCHAR; a number is needed"):
        table(None, name="t.parquet", dense={"c": "none"}, categorical=["d"])


def test_label_threshold(table):
    text = "y,d,c\n4,1,a\n3.5,1,a\n5,1,a\n-1,1,a\n"
    assert [y for _, _, y in samples_of(table(text, label_threshold=4), "test")] == [1.0, 0.0]
    assert [y for _, _, y in samples_of(table(text, label_threshold=0), "test")] == [1.0, 0.0]


def test_columns_may_be_named_where_there_is_no_header(table):
    dataset = table("1,2,a\n0,3,b\n", header=False, columns=["y", "d", "c"])
    assert samples_of(dataset, "test") == [([3.0], [[0]], 0.0)]


@pytest.mark.parametrize("text", [",y,d,c\n0,1,2,a\n1,0,3,b\n", '"",y,d,c\n0,1,2,a\n1,0,3,b\n'])
def test_a_column_without_a_name_is_called_by_its_place(table, text, capsys):
    assert samples_of(table(text), "test") == [([3.0], [[0]], 0.0)]
    assert table(text, categorical=["column1"]).cardinalities == {"column1": 2}
    assert samples_of(table("y,d,c,\n1,2,a,\n0,3,b,\n", name="trailing.csv"), "test") == [([3.0], [[0]], 0.0)]
    with pytest.raises(ValueError, match="no columns are named"):
        table(text, label=None, dense={}, categorical=[])
    assert "column1" in capsys.readouterr().out
    with pytest.raises(ValueError, match="names occur twice: column1; name all of them in data.columns"):
        table(text.replace("d", "column1"))


def test_typed_headers_lose_their_types(table):
    dataset = table("y:float\td:float\tc:token\n1\t2\ta\n0\t3\tb\n", name="t.inter")
    assert dataset.feature_names == ["c"] and dataset.dense_names == ["d"]


def test_joins_look_up_by_key(table, tmp_path):
    (tmp_path / "users.csv").write_text("u,age,tags\n1,30,p|q\n2,40,\n")
    options = {"joins": [{"path": "users.csv", "key": "u"}], "dense": {"age": "none"}}
    text = "y,u\n1,2\n0,1\n1,3\n0,1\n"
    dataset = table(text, categorical=["u"], multi_valued={"tags": "|"}, id_order="frequency", **options)
    assert samples_of(dataset, "test") == [([0.0], [[0], []], 1.0), ([30.0], [[2], [1, 2]], 0.0)]
    (tmp_path / "users.csv").write_text("u,age,tags\n1,30,p|q\n1,40,\n")
    with pytest.raises(ValueError, match=r"users.csv has 2 rows with u='1'; it needs one"):
        table(text, categorical=["u"], multi_valued={"tags": "|"}, **options)
    (tmp_path / "users.csv").write_text("u,age,tags\n1,30,p|q\n2,x,\n")
    with pytest.raises(ValueError, match=r"users.csv:3:age: "):
        table(text, categorical=["u"], multi_valued={"tags": "|"}, **options)


def test_main_rows_without_a_partner_are_counted(table, tmp_path, capsys):
    (tmp_path / "users.csv").write_text("u,age\n1,30\n2,40\n")
    options = {"joins": [{"path": "users.csv", "key": "u"}], "dense": {"age": "none"}, "categorical": ["u"]}
    table("y,u\n1,2\n0,1\n1,2\n0,1\n", **options)
    assert "no row for" not in capsys.readouterr().out
    table("y,u\n1,2\n0,3\n1,\n0,1\n0,1\n0,1\n0,1\n0,1\n", **options)  # an empty key has no partner
    assert "users.csv has no row for 2 of the 8 rows of t.csv (25%), by u" in capsys.readouterr().out
    words = r"no row of .*t\.csv has a partner in .*users\.csv by u; e\.g\. u is ' 1' in t\.csv and '1' in users\.csv"
    with pytest.raises(ValueError, match=words):
        (tmp_path / "users.csv").write_text("u,age\n1,30\n2,40\n")
        table("y,u\n1, 1\n0, 1\n1, 2\n0, 2\n", **options)
    (tmp_path / "users.csv").write_text("u,age\n")
    with pytest.raises(ValueError, match="and None in users.csv"):
        table("y,u\n1,1\n0,1\n", **options)


def test_the_cache_is_used_only_for_the_same_files_and_options(table, tmp_path, capsys):
    first = table(ROWS, **ROLES)
    content_time = os.stat(tmp_path / "t.csv").st_mtime_ns
    capsys.readouterr()
    assert table(None, **ROLES).fingerprint == first.fingerprint and "preparing" not in capsys.readouterr().out
    changes = [
        {"min_count": 2},
        {"id_order": "frequency"},
        {"time": "t"},
        {"split": {"train": 0.6, "valid": 0, "test": 0.4}},
    ]
    changes += [{"order": "random"}, {"dense": {"d": "log1p"}}, {"dense": {}}, {"multi_valued": {"m": ","}}]
    changes += [{"label_threshold": 1}, {"on_error": "skip"}, {"split_seed": 1}]
    prints = {table(None, **(ROLES | change)).fingerprint for change in changes}
    assert len(prints | {first.fingerprint}) == len(changes) + 1
    (tmp_path / "t.csv").write_text(ROWS.replace("9\n", "7\n"))
    os.utime(tmp_path / "t.csv", ns=(content_time, content_time))
    assert table(None, **ROLES).fingerprint != first.fingerprint  # same size and time, other content
    assert table(None, shuffle_seed=9, **ROLES).fingerprint == table(None, **ROLES).fingerprint


def test_training_order_follows_the_shuffle_seed_and_the_epoch(table):
    text = "y,d,c\n" + "".join(f"{i % 2},{i},a\n" for i in range(200))

    def order(epoch, **options):
        batches = table(text, **options).batches("train", 30, epoch=epoch)
        return tuple(tuple(b.dense[:, 0].tolist()) for b in batches)

    assert order(0) == order(0) and len({order(0), order(1), order(0, shuffle_seed=1)}) == 3


def test_describe_says_what_the_data_is(table):
    text = table(ROWS + "7,1,a,,1\n", on_error="skip", time="t", **ROLES).describe()
    assert text.startswith("t.csv: 6 samples (3 train + 3 test, split by t), 1 dense, 2 categorical, ")
    assert text.endswith("1 bad rows left out")


def test_without_columns_the_inferred_yaml_is_printed(table, tmp_path, capsys):
    yaml = pytest.importorskip("yaml")
    text = "click,price,user_id,tags,site,ts\n" + "".join(
        f"{i % 2},{i * 0.5},{i},a|b|{i % 3},s{i % 4},2024-01-{i % 28 + 1:02d}\n" for i in range(300)
    )
    with pytest.raises(ValueError, match="no columns are named"):
        table(text, label=None, dense={}, categorical=[])
    guess = yaml.safe_load(capsys.readouterr().out)
    defaults = guess.pop("defaults")
    assert defaults == ["table", "_self_"] and guess.pop("path") == os.fspath(tmp_path / "t.csv")
    want = {
        "label": "click",
        "dense": {"price": "log1p"},
        "categorical": ["user_id", "site"],
        "multi_valued": {"tags": "|"},
    }
    assert guess == want | {"time": "ts"}
    assert table(None, **guess).cardinalities["tags"] == 6  # what is printed can be used as it is


@pytest.mark.parametrize("role", ["y", "d", "c", "m", "t", "u"])
@pytest.mark.parametrize("name", ["rowid", "ROWID", "failed"])
def test_a_column_may_be_named_as_what_the_sql_makes(table, tmp_path, role, name):
    (tmp_path / "users.csv").write_text("u,a\n1,5\n".replace("u", name if role == "u" else "u"))
    text = "y,d,c,m,t,u\n1,1,a,x|y,3,1\n0,2,b,x,2,1\n1,3,a,,2,1\n0,4,a,z|x,1,1\n2,4,a,z|x,9,1\n"  # 2: no label
    names = {n: name if n == role else n for n in "ydcmtu"}
    options = {
        "label": names["y"],
        "time": names["t"],
        "dense": {names["d"]: "standardize", "a": "none"},
        "categorical": [names["c"]],
        "multi_valued": {names["m"]: "|"},
        "joins": [{"path": "users.csv", "key": names["u"]}],
        "on_error": "skip",
    }
    dataset = table(text.replace("y,d,c,m,t,u", ",".join(names.values())), shuffle=False, **options)
    want = [([1.0, 5.0], [[1], [2, 1]], 0.0), ([-1.0, 5.0], [[2], [1]], 0.0)]
    assert samples_of(dataset, "train") == want
    assert samples_of(dataset, "test") == [([0.0, 5.0], [[1], []], 1.0), ([-2.0, 5.0], [[1], [1, 0]], 1.0)]


def test_a_graded_label_is_given_a_threshold(table, capsys):
    yaml = pytest.importorskip("yaml")
    with pytest.raises(ValueError, match="no columns are named"):
        table("userId,rating,on\n1,4,x\n2,3,x\n1,5,z\n2,2,x\n", label=None, dense={}, categorical=[])
    guess = yaml.safe_load(capsys.readouterr().out)
    assert guess["label"] == "rating" and guess["label_threshold"] == 3 and guess["categorical"] == ["userId", "on"]


def test_open_maps_can_be_given_on_the_command_line(tmp_path):
    (tmp_path / "t.csv").write_text(ROWS)
    overrides = [f"data.path={tmp_path}/t.csv", f"data.cache={tmp_path}/cache", "data.label=y", "data.categorical=[c]"]
    given = [[], ["data.dense={d: log1p}"], ["data.dense={d: log1p}", "data.multi_valued={m: '|'}"]]
    with initialize_config_dir(os.fspath(CONF), version_base="1.3"):
        made = [instantiate(compose("config", ["data=table", *overrides, *more]).data) for more in given]
    assert [(d.dense_names, d.feature_names) for d in made] == [([], ["c"]), (["d"], ["c"]), (["d"], ["c", "m"])]


@pytest.mark.parametrize("kind", ["file", "below a file", "read-only"])
def test_a_cache_that_cannot_be_written_is_named(table, tmp_path, kind):
    cache = tmp_path / "no"
    if kind == "read-only":
        cache.mkdir(mode=0o500)
        if os.access(cache, os.W_OK):
            pytest.skip("root may write anywhere")
    else:
        cache.write_text("")
    path = cache / "below" if kind == "below a file" else cache
    (tmp_path / "t.csv").write_text(ROWS)
    dataset = Table(os.fspath(tmp_path / "t.csv"), os.fspath(path), **(TABLE | ROLES))
    with pytest.raises(ValueError, match=f"data.cache={path} .*DLRM_DATA.*(exists|directory|denied)"):
        dataset.prepare(set())


def test_a_full_disk_is_an_error_of_the_cache(table, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Writer, "append", full)
    with pytest.raises(ValueError, match="data.cache=.*No space left"):
        table(ROWS, **ROLES)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"categorical": "c"}, r"data.categorical='c': must be a list, as in \[user, item\]"),
        ({"categorical": 5}, "data.categorical=5: must be a list"),
        ({"categorical": [1]}, "data.categorical names 1: a column's name is text; put it in quotes"),
        ({"label": ["y"]}, r"data.label names \['y'\]: a column's name is text"),
        ({"dense": ["d"]}, r"data.dense=\['d'\]: must be a mapping, as in {price: log1p}"),
        ({"dense": "d"}, "data.dense='d': must be a mapping"),
        ({"multi_valued": "m"}, "data.multi_valued='m': must be a mapping, as in {genres: '|'}"),
        ({"joins": "users.csv"}, "data.joins='users.csv': must be a list, as in "),
        ({"joins": {"path": "u.csv", "key": "u"}}, "data.joins={.*}: must be a list, as in "),
        (
            {"joins": ["users.csv"]},
            r"data.joins\[0\]='users.csv': must be a mapping, as in {path: users.csv, key: user_id}",
        ),
        ({"joins": [{"path": 5, "key": "u"}]}, r"data.joins\[0\].path=5: must be text"),
        ({"columns": "y,d"}, r"data.columns='y,d': must be a list, as in \[click, price, user\]"),
        ({"columns": [1, 2, 3, 4, 5]}, r"data.columns\[0\]=1: must be text"),
        ({"split": 0.8}, "data.split=0.8: must be a mapping with train, valid, test"),
        ({"split": None}, "data.split=null: give the fractions of train, valid and test"),
        ({"categorical": ["cc"]}, "data.categorical names no column 'cc'.*has y, d, c, m, t; did you mean 'c'"),
        ({"label": "why"}, "data.label names no column 'why'"),
        ({"label": None}, "data.label is not set"),
        (
            {"dense": {"d": "log"}},
            "data.dense.d='log': allowed are none, log1p, shifted_log, standardize; did you mean 'log1p'",
        ),
        ({"dense": {"c": "none"}}, "data.categorical names 'c', which data.dense names too"),
        ({"time": "y"}, "data.time names 'y', which data.label names too"),
        ({"categorical": []}, "are empty"),
        ({"multi_valued": {"m": ""}}, "data.multi_valued.m=''"),
        ({"on_error": "skp"}, "data.on_error='skp': allowed are stop, skip, quarantine; did you mean 'skip'"),
        ({"order": "rnd"}, "data.order='rnd'"),
        ({"id_order": "freq"}, "data.id_order='freq'.*did you mean 'frequency'"),
        ({"min_count": 0}, "data.min_count=0"),
        ({"shuffle_block": 0}, "data.shuffle_block=0"),
        ({"split": {"train": 0.5, "valid": 0.2, "test": 0.2}}, "must sum to 1"),
        ({"split": {"train": 1.0, "valid": 0, "test": 0}}, "data.split.test=0"),
        ({"split": {"train": 1.5, "valid": 0, "test": -0.5}}, "data.split.train=1.5"),
        ({"split": {"train": 0.5, "test": 0.5}}, "data.split lacks valid"),
        ({"joins": [{"path": "users.csv"}]}, r"data.joins\[0\].*needs path and key"),
        ({"joins": [{"path": "users.csv", "key": "u"}]}, "no file .*users.csv"),
        ({"columns": ["y", "d"]}, "5 columns .* data.columns names 2"),
        ({"memory_limit": "lots"}, "data.memory_limit='lots'"),
        ({"file": "u.csv"}, "no file"),
        ({"keep_unseen": ["z"]}, "keep_unseen has no 'z'"),
        ({"split": {"train": 0.01, "valid": 0, "test": 0.99}}, "leaves none for training"),
    ],
)
def test_bad_options_are_refused_by_name(table, options, words):
    with pytest.raises(ValueError, match=words):
        table(ROWS, **options)


def test_a_missing_file_and_a_folder_are_refused(table, tmp_path):
    (tmp_path / "clicks.csv").write_text(ROWS)
    with pytest.raises(ValueError, match="no file .*click.csv; did you mean 'clicks.csv'"):
        table(None, name="click.csv")
    with pytest.raises(ValueError, match="is a folder; name a file in it with data.file: clicks.csv"):
        table(None, name="")
    with pytest.raises(ValueError, match="names occur twice: C, c"):
        table("y,c,C\n", name="twice.csv")
    (tmp_path / "x.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="x.parquet cannot be read"):
        table(None, name="x.parquet")

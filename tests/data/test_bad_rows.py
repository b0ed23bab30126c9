"""Every kind of bad row is named by file, line and column, counted exactly, and kept on request."""

import os
import re

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tables import TABLE, samples_of

from data import rejects, source
from data.table import Table

HEAD, GOOD = b"y,d,c\n", b"0,1,a\n1,2,b\n"
BAD = {  # name: (rows, line of the first bad one, its column, reason, lines lost)
    "missing column": (b"1,2\n", 4, "c", "missing columns", 1),
    "missing columns": (b"1\n", 4, "d", "missing columns", 1),
    "extra column": (b"1,2,3,4\n", 4, "column 4", "too many columns", 1),
    "bad number": (b"1,zz,c\n", 4, "d", "cast.*'?zz'?", 1),
    "hex as a number": (b"1,0x10,c\n", 4, "d", "cast", 1),
    "nan": (b"1,nan,c\n", 4, "d", "must be finite as float32, not nan", 1),
    "infinity": (b"1,-inf,c\n", 4, "d", "must be finite as float32, not -inf", 1),
    "overflow of float32": (b"1,1e300,c\n", 4, "d", "must be finite", 1),
    "overflow of float64": (b"1,1e999,c\n", 4, "d", "must be finite", 1),
    "label 2": (b"2,1,c\n", 4, "y", "label must be 0 or 1 .*not 2.0", 1),
    "empty label": (b",1,c\n", 4, "y", "label must be 0 or 1 .*not empty", 1),
    "label no number": (b"yes!,1,c\n", 4, "y", "cast", 1),
    "NUL in a value": (b"1,1,a\x00b\n", 4, "c", "must hold no NUL byte", 1),
    "NUL as a number": (b"1,\x00,c\n", 4, "d", "cast", 1),
    "not UTF-8": (b"1,1,\xff\xfe\n", 4, "c", "invalid encoding", 1),
    "huge line": (b"1,1," + b"x" * 3_000_000 + b"\n", 4, "column 1", "line size over maximum", 1),
    "text after a quote": (b'1,1,"ab"c"\n', 4, "c", "unquoted value", 1),
    "several": (b"2,2,c\n1\n0,1,a\n1,inf,2\n3,2,2\n1,2,3,4\n", 4, "y", "label", 5),
}
REST = [name for name in BAD if name != "several"]


@pytest.mark.parametrize("name", BAD)
def test_stop_names_file_line_column_and_reason(table, tmp_path, name):
    rows, line, column, reason, lost = BAD[name]
    plural = "bad row in all" if lost == 1 else "bad rows in all"
    with pytest.raises(ValueError, match=rf"(?s)t\.csv:{line}:{column}: .*{reason}.*\n{lost} {plural}"):
        table(HEAD + GOOD + rows + GOOD)
    assert [p.name for p in (tmp_path / "cache").iterdir() if not p.name.endswith(".lock")] == []


@pytest.mark.parametrize("on_error", ["skip", "quarantine"])
@pytest.mark.parametrize("name", BAD)
def test_skip_leaves_exactly_the_bad_rows_out(table, name, on_error):
    rows, line, column, _, lost = BAD[name]
    dataset = table(HEAD + GOOD + rows + GOOD, on_error=on_error)
    assert dataset.num_rejected == lost and sum(dataset.num_samples.values()) == 4 + ("several" == name)
    path = dataset.folder / "quarantine.tsv"
    assert path.exists() == (on_error == "quarantine")
    if path.exists():
        kept = [text.split("\t") for text in path.read_text().splitlines()]
        assert kept[0] == ["file", "line", "column", "reason", "text"] and len(kept) == lost + 1
        assert kept[1][1:3] == [str(line), column]
        if name not in ("not UTF-8", "NUL as a number"):  # these have bytes that no text has
            assert kept[1][4] == rows.split(b"\n")[0].decode()[:10_000]  # DuckDB keeps as much of a huge line


@pytest.mark.parametrize("name", REST)
def test_line_ends_of_windows_change_nothing(table, name):
    rows, line, column, reason, _ = BAD[name]
    with pytest.raises(ValueError, match=rf"(?s)t\.csv:{line}:{column}: .*{reason}"):
        table((HEAD + GOOD + rows + GOOD).replace(b"\n", b"\r\n"))


@pytest.mark.parametrize("name", REST)
def test_a_missing_final_line_end_changes_nothing(table, name):
    rows, line, column, reason, _ = BAD[name]
    with pytest.raises(ValueError, match=rf"(?s)t\.csv:{line}:{column}: .*{reason}"):
        table((HEAD + GOOD + rows)[:-1])
    assert sum(table((HEAD + GOOD)[:-1]).num_samples.values()) == 2


def test_an_open_quote_counts_the_lines_it_swallows(table):
    dataset = table(HEAD + GOOD + b'1,1,"ab\n' + GOOD, on_error="skip")
    assert dataset.num_rejected == 3 and sum(dataset.num_samples.values()) == 2


def test_line_ends_within_quotes_are_read_and_then_rows_are_counted(table):
    content = HEAD + GOOD + b'1,1,"a\nb"\n2,1,c\n'
    with pytest.raises(ValueError, match=r"t\.csv:row 4:y: the label"):  # no line is claimed that may be wrong
        table(content)
    assert sum(table(content, on_error="skip").num_samples.values()) == 3


def test_mixed_line_ends_are_refused_with_the_place(table):
    for rows in (b"1,1,c\r\n", b"1,1,c\rd\n"):
        with pytest.raises(ValueError, match=r"t\.csv:4:c: a carriage return"):
            table(HEAD + GOOD + rows + GOOD, on_error="skip")
        for options in ({"time": "d", "dense": {}}, {"categorical": [], "dense": {}}):  # what reads the first rows
            with pytest.raises(ValueError, match=r"t\.csv:4:c: a carriage return"):
                table(HEAD + GOOD + rows + GOOD, **options)


def test_bad_times_are_bad_rows(table):
    for value in (b"nan", b"", b"soon"):
        with pytest.raises(ValueError, match=r"t\.csv:4:t: "):
            table(b"y,d,c,t\n1,1,a,5\n0,1,a,6\n1,1,a," + value + b"\n", time="t")


def test_a_bad_first_time_does_not_decide_the_kind(table):
    rows = b"1,1,a,soon\n" + b"".join(b"1,1,a,%d\n" % i for i in range(9))
    dataset = table(b"y,d,c,t\n" + rows, time="t", on_error="skip")
    assert dataset.num_rejected == 1 and sum(dataset.num_samples.values()) == 9


def test_parquet_rows_are_named_by_number(table, tmp_path):
    rows = "(VALUES (1, 0.5::DOUBLE, 'a'), (0, 1.0, 'b'), (3, 2.0, 'a'), (0, 'nan'::DOUBLE, 'a')) v(y, d, c)"
    duckdb.execute(f"COPY (SELECT * FROM {rows}) TO '{tmp_path / 't.parquet'}'")
    with pytest.raises(ValueError, match=r"t\.parquet:row 3:y: .*not 3.*\n2 bad rows in all"):
        table(None, name="t.parquet")
    assert table(None, name="t.parquet", on_error="quarantine").num_rejected == 2


def test_too_many_bad_rows_mean_a_wrong_format(table, monkeypatch):
    for module in (source, rejects):
        monkeypatch.setattr(module, "MAX_BAD_ROWS", 100)
        monkeypatch.setattr(module, "MAX_ERRORS", 400)
    for row in (b"1\n", b"7,1,a\n"):
        with pytest.raises(ValueError, match=r"(?s)t\.csv:4:.*more than 100 bad rows: is data.delimiter=','"):
            table(HEAD + GOOD + row * 101, on_error="skip")
        assert table(HEAD + GOOD + row * 100, on_error="skip").num_rejected == 100


def test_lines_are_right_far_into_a_file_that_is_read_in_parallel(table):
    lines = [b"%d,%d,c%d" % (i % 2, i, i % 1000) for i in range(400_000)]
    bad = {10: b"1,2", 123_456: b"5,1,c", 300_000: b"1,1,1,1", 399_998: b"1,inf,c", 399_999: b"0,x,c"}
    for place, row in bad.items():
        lines[place] = row
    dataset = table(HEAD + b"\n".join(lines) + b"\n", on_error="quarantine")
    assert sum(dataset.num_samples.values()) == 400_000 - 5 == 400_000 - dataset.num_rejected
    kept = [row.split("\t") for row in (dataset.folder / "quarantine.tsv").read_text().splitlines()[1:]]
    assert [(int(row[1]), row[4].encode()) for row in kept] == [(i + 2, row) for i, row in bad.items()]
    assert [d[0] for d, _, _ in samples_of(dataset, "test", 8192)][-1] == 399_997  # in the file's order


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_damage_ends_in_a_named_error_or_exact_counts(data, tmp_path_factory):
    body = bytearray(b"".join(b"%d\t%d\tv%d\n" % (i % 2, i, i % 5) for i in range(20)))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        action = data.draw(st.sampled_from(["set", "delete", "insert"]))
        byte = data.draw(st.sampled_from(list(b'\t\n0",x.-e\xff\x00 9')))
        if action == "set":
            body[place] = byte
        elif action == "delete":
            del body[place]
        else:
            body.insert(place, byte)
    folder = tmp_path_factory.mktemp("damage")
    path = folder / "t.tsv"
    path.write_bytes(b"y\td\tc\n" + body)
    options = TABLE | {"on_error": "quarantine"}
    dataset = Table(os.fspath(path), os.fspath(folder / "cache"), **options)
    dataset.prepare(set())
    lines = [line for line in bytes(body).split(b"\n") if line]
    assert sum(dataset.num_samples.values()) + dataset.num_rejected == len(lines)
    for row in (dataset.folder / "quarantine.tsv").read_text().splitlines()[1:]:
        assert re.fullmatch(r"(row )?\d+", row.split("\t")[1])

"""docs/conformance.md has a row for every line of the list, and every test that it names exists."""

import ast
import functools
import re
from pathlib import Path

TESTS = Path(__file__).parent
LAST = {"H": 15, "F": 11, "B": 11, "Q": 12, "T": 9, "D": 9}
LINES = [f"{letter}{number}" for letter, last in LAST.items() for number in range(1, last + 1)]
MEASURED = {"F10"}  # a speed, which no test can hold: the row names its benchmark
STATUSES = {"passes", "host", "not run", "-", "measured"}


def rows() -> dict[str, list[str]]:
    """Line -> the other cells of its row."""
    text = (TESTS.parent / "docs/conformance.md").read_text()
    found = [
        [cell.strip() for cell in row.strip("|").split(" | ")] for row in re.findall(r"^\| [A-Z]\d+ .*\|$", text, re.M)
    ]
    assert len({line for line, *_ in found}) == len(found)
    return {line: cells for line, *cells in found}


@functools.cache
def defined_in(file: str) -> set[str]:
    return {node.name for node in ast.parse((TESTS / file).read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_line_has_a_row_in_the_lists_order_and_a_status():
    assert list(rows()) == LINES
    for line, cells in rows().items():
        says, _, *statuses = cells
        assert says and len(statuses) == 3 and STATUSES.issuperset(statuses), line


def test_every_test_named_exists_and_every_line_names_one():
    for line, (_, cell, *_) in rows().items():
        named = re.findall(r"`([^`]+\.py)::(test_\w+)`", cell)
        assert cell == "<br>".join(f"`{file}::{test}`" for file, test in named) or line in MEASURED
        assert bool(named) != (line in MEASURED), line
        for file, test in named:
            assert test in defined_in(file), f"{line}: {file} has no {test}"
    modules = re.findall(r"python -m ([\w.]+)", " ".join(rows()[line][1] for line in MEASURED))
    assert len(modules) == len(MEASURED)
    assert all((TESTS.parent / f"{module.replace('.', '/')}.py").exists() for module in modules)


def test_every_test_called_after_a_line_is_in_its_row():
    for path in sorted(TESTS.rglob("test_*.py")):
        file = path.relative_to(TESTS).as_posix()
        for test in defined_in(file):
            for line in re.findall(r"[a-z]\d+(?=_)", (re.match(r"test_([a-z]\d+_)+", test) or [""])[0]):
                assert line.upper() not in LINES or f"`{file}::{test}`" in rows()[line.upper()][1], (line, file, test)

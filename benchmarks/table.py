"""The tables of benchmarks/README.md from the recorded results.  python -m benchmarks.table [FOLDER]

Rewrites what stands between `<!-- table NAME -->` and `<!-- end -->`, so that no number is typed by hand. With FOLDER it
prints the tables of the results there instead.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

from benchmarks.measure import RESULTS
from dlrm.report import markdown_table

README = RESULTS.parent / "README.md"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
Rows = list[dict]


def bandwidth(rows: Rows) -> str:
    """The best of huge pages and prefetching, nanoseconds per row."""
    best: dict[tuple, dict] = {}
    for row in rows:
        key = row["row_bytes"], row["table_bytes"], row["threads"]
        least = best.setdefault(key, {work: float("inf") for work in ("read", "copy", "update")})
        best[key] = {work: min(least[work], row[work]) for work in least}
    return markdown_table(
        [
            {"row, bytes": row_bytes, "table, MiB": table >> 20, "threads": threads}
            | {f"{work}, ns": time for work, time in times.items()}
            for (row_bytes, table, threads), times in sorted(best.items())
        ]
    )


def lookup(rows: Rows) -> str:
    """A summary of all cells, and the cells of dim 16, uniform ids and batch 2048 one by one."""
    groups: dict[tuple, list[list[float]]] = {}
    for row in rows:
        for name, ratio in row.get("ratio", {}).items():
            groups.setdefault((row["tables"], row["work"], name), []).append(ratio)
    summary = [
        {"tables": tables, "work": work, "ours": name, "cells": len(ratios)}
        | {"mean": geometric_mean(r[0] for r in ratios)}
        | {"least": min(r[0] for r in ratios), "most": max(r[0] for r in ratios)}
        | {"surely faster": sum(r[1] > 1 for r in ratios), "surely slower": sum(r[2] < 1 for r in ratios)}
        for (tables, work, name), ratios in groups.items()
    ]
    chosen = [row for row in rows if (row["dim"], row["ids"], row["batch_size"]) == (16, "uniform", 2048)]
    cells = [
        {key: row[key] for key in ("tables", "bag", "work")}
        | {"fastest peer": row.get("best_peer", "none")}
        | {"its us": row["microseconds"].get(row.get("best_peer"), "-")}
        | {name: _interval(ratio) for name, ratio in row.get("ratio", dict.fromkeys(_ours(rows), ())).items()}
        | {"dense, of the machine's limit": row["share_of_measured"].get("dense", "-")}
        for row in chosen
    ]
    return f"{markdown_table(summary)}\n\n{markdown_table(cells)}"


def step(rows: Rows) -> str:
    return markdown_table(
        [
            {"optimizer": row["optimizer"], "batch": row["batch_size"], "": row["name"]}
            | {"ms": row["milliseconds"], "samples/s": row["samples_per_second"]}
            | {"its time / ours": _interval(row["ratio"]), "peak MiB": row["peak_MiB"]}
            for row in rows
        ]
    )


def growth(rows: Rows) -> str:
    names = list(dict.fromkeys(row["name"] for row in rows))
    places = dict.fromkeys((row["axis"], row["value"]) for row in rows)
    found = {(row["axis"], row["value"], row["name"]): row for row in rows}
    table = []
    for axis, value in places:
        line = {"axis": axis, "value": value}
        for name in names:
            row = found.get((axis, value, name))
            line[f"{name}: us"] = "-" if row is None else row["microseconds"]
            line["MiB" + " " * names.index(name)] = "-" if row is None else row["peak_MiB"]  # a key of its own
        table.append(line)
    return markdown_table(table)


def grids(rows: Rows) -> str:
    """Of each module and law of ids: torch's time over ours, and the bytes."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        mode = f"{row.get('mode')}, hash={row.get('hash')}"
        groups.setdefault((row["grid"], mode if row["grid"] == "hashed" else row["ids"]), []).append(row)
    return markdown_table(
        [
            {"grid": grid, "": label, "cells": len(members)}
            | {"mean": geometric_mean(row["ratio"][0] for row in members)}
            | {"least": min(row["ratio"][0] for row in members), "most": max(row["ratio"][0] for row in members)}
            | {"torch, MiB": max(row["torch_peak_MiB"] for row in members)}
            | {"ours, MiB": max(row["ours_peak_MiB"] for row in members)}
            for (grid, label), members in groups.items()
        ]
    )


TABLES: dict[str, Callable[[Rows], str]] = {
    "bandwidth": bandwidth,
    "lookup": lookup,
    "step": step,
    "growth": growth,
    "grids": grids,
}


def _interval(ratio: list[float]) -> str:
    return "{} ({}..{})".format(*ratio) if ratio else "-"


def _ours(rows: Rows) -> list[str]:
    return next((list(row["ratio"]) for row in rows if "ratio" in row), [])


def text_of(name: str, folder: Path) -> str:
    """The tables of one benchmark on every device it was recorded on, each under a line that says how."""
    parts = []
    for path in (folder / f"{name}-{device}.json" for device in ("cpu", "cuda")):
        if path.exists():
            found = json.loads(path.read_text())
            facts = f"torch {found['torch']}, {found['date']}, commit {found['commit']}"
            parts.append(f"`{found['command']}` on {found['device']}; {facts}:\n\n{TABLES[name](found['rows'])}\n")
    return "\n" + ("\n".join(parts) or f"Not recorded yet: `python -m benchmarks.{name}`.\n") + "\n"


def rewritten(text: str, folder: Path) -> str:
    """A README with every block made anew."""
    return BLOCK.sub(lambda block: block[1] + text_of(block[2], folder), text)


def main() -> None:
    if len(sys.argv) > 1:
        for name in TABLES:
            print(f"{name}:{text_of(name, Path(sys.argv[1]))}")
    else:
        README.write_text(rewritten(README.read_text(), RESULTS))


if __name__ == "__main__":
    main()

"""The tables of benchmarks/README.md from the recorded results.  python -m benchmarks.table [FOLDER]

Rewrites what stands between `<!-- table NAME -->` and `<!-- end -->`, so that no number is typed by hand. With FOLDER
it prints the tables of the results there instead.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean

from benchmarks import predicted
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
    """The fastest peer's time over ours: a summary of all cells, and those of dim 16, uniform ids and batch 2048."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        groups.setdefault((row["tables"], row["work"]), []).append(row)
    names = list(dict.fromkeys(name for row in rows for name in row.get("ratio", {})))
    summary = [
        {"tables": tables, "work": work, "cells": len(cells)}
        | {name: _mean([row["ratio"][name] for row in cells if name in row.get("ratio", {})]) for name in names}
        for (tables, work), cells in groups.items()
    ]
    cells = [
        {key: row[key] for key in ("tables", "bag", "work")}
        | {"fastest peer": row.get("best_peer", "none")}
        | {"its us": _time(row["microseconds"].get(row.get("best_peer")))}
        | {name: _interval(row.get("ratio", {}).get(name)) for name in names}
        | {"dense, of the machine's limit": row["share_of_measured"].get("dense", "-")}
        for row in rows
        if (row["dim"], row["ids"], row["batch_size"]) == (16, "uniform", 2048)
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


def loader(rows: Rows) -> str:
    return markdown_table(
        [
            {"": row["what"], "batch": row.get("batch_size", "-")}
            | {"samples/s": round(row.get("samples_per_second", row.get("rows_per_second")))}
            | {"best": round(row["best_samples_per_second"]) if "best_samples_per_second" in row else "-"}
            for row in rows
        ]
    )


def mlp(rows: Rows) -> str:
    """Forward and backward of the model's layers, and nn.Linear's time over each library's."""
    return markdown_table(
        [
            {"batch": row["batch_size"], "nn.Linear, ms": round(row["nn.Linear_ms"], 2)}
            | {"torch, ms": round(row["torch_ms"], 2), "its ratio": round(row["nn.Linear/torch"], 2)}
            | {"oneDNN, ms": round(row["onednn_ms"], 2), "ratio": round(row["nn.Linear/onednn"], 2)}
            for row in rows
        ]
    )


def growth(rows: Rows) -> str:
    names = list(dict.fromkeys(row["name"] for row in rows))
    found = {(row["axis"], row["value"], row["name"]): row for row in rows}
    table = []
    for axis, value in dict.fromkeys((row["axis"], row["value"]) for row in rows):
        line = {"against": axis, "of": value}
        for name in names:
            row = found.get((axis, value, name), {})
            line |= {f"{name}, us": _time(row.get("microseconds")), f"{name}, MiB": row.get("peak_MiB", "-")}
        table.append(line)
    return markdown_table(table)


def grids(rows: Rows) -> str:
    """Of each module and law of ids: torch's time over ours, geometric mean, least and most, and the most bytes."""
    groups: dict[tuple[str, str], Rows] = {}
    for row in rows:
        mode = f"{row.get('mode')}, hash={row.get('hash')}"
        groups.setdefault((row["grid"], mode if row["grid"] == "hashed" else row["ids"]), []).append(row)
    return markdown_table(
        [
            {"grid": grid, "": label, "cells": len(members), "torch / ours": _mean([row["ratio"] for row in members])}
            | {"torch, MiB": max(row["torch_peak_MiB"] for row in members)}
            | {"ours, MiB": max(row["ours_peak_MiB"] for row in members)}
            for (grid, label), members in groups.items()
        ]
    )


def roof(rows: Rows) -> str:
    """us of a call, and its share of a copy's bandwidth and of random rows'."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        key = row["tables"], row["backend"], row["kernel"]
        line = lines.setdefault(key, dict(zip(("tables", "", "kernel"), key, strict=True)))
        shares = ", ".join(f"{row[share]:.2f}" for share in ("of_copy", "of_rows") if row.get(share) is not None)
        text = "failed" if "error" in row else f"{row['us']:,.1f} ({shares})"
        line[f"{row['dim']} x {row['batch_size']}"] = text
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    return markdown_table([{name: line.get(name, "-") for name in columns} for line in lines.values()])


def registers(rows: Rows) -> str:
    """Of the kernels of one name the most registers, the threads of an SM that leaves, and bytes spilled."""
    most: dict[tuple[str, str], dict] = {}
    for row in rows:
        line = most.setdefault((row["kernel"].removesuffix("_kernel"), row["of"]), {})
        if row["registers"] >= line.get(row["type"], row)["registers"]:
            line[row["type"]] = row
    kinds = ("fp32", "bf16")
    return markdown_table(
        [
            {"kernel": kernel, "of": of}
            | {
                kind: "{registers} ({threads}), {spilled_bytes}".format(**line[kind]) if kind in line else "-"
                for kind in kinds
            }
            for (kernel, of), line in most.items()
            if line.keys() & kinds
        ]
    )


TABLES: dict[str, Callable[[Rows], str]] = {
    "bandwidth": bandwidth,
    "roof": roof,
    "registers": registers,
    "lookup": lookup,
    "lookup_wide": lookup,
    "step": step,
    "step_spinning": step,
    "mlp": mlp,
    "loader": loader,
    "growth": growth,
    "grids": grids,
}
COMPUTED = {"predicted": predicted.table}  # of no result


def _interval(ratio: list[float] | None) -> str:
    return "{:.2f} ({:.2f}..{:.2f})".format(*ratio) if ratio else "-"


def _mean(ratios: list[list[float]]) -> str:
    """Geometric mean, least and most of medians."""
    medians = [ratio[0] for ratio in ratios]
    return f"{geometric_mean(medians):.2f} ({min(medians):.2f}..{max(medians):.2f})" if medians else "-"


def _time(microseconds: float | None) -> str:
    return "-" if microseconds is None else f"{microseconds:,.0f}"


def text_of(name: str, folder: Path) -> str:
    """The tables of one benchmark on every device it was recorded on, each under a line that says how."""
    if name in COMPUTED:
        return f"\n{COMPUTED[name]()}\n\n"
    parts = []
    for path in (folder / f"{name}-{device}.json" for device in ("cpu", "cuda")):
        if path.exists():
            found = json.loads(path.read_text())
            commit = found["commit"][:7] + "-dirty" * found["commit"].endswith("-dirty")
            facts = f"torch {found['torch']}, {found['date']}, commit {commit}, load average {found['load_average']}"
            environment = found["environment"].items() - {("OMP_WAIT_POLICY", "passive")}  # benchmarks/__init__.py's
            command = found.get("command", f"python -m benchmarks.{name}")
            command = " ".join([*(f"{key}={value}" for key, value in sorted(environment)), command])
            parts.append(f"`{command}` on {found['device']}; {facts}:\n\n{TABLES[name](found['rows'])}\n")
    return "\n" + ("\n".join(parts) or f"Not recorded yet: `python -m benchmarks.{name}`.\n") + "\n"


def rewritten(text: str, folder: Path) -> str:
    """A README with every block made anew."""
    return BLOCK.sub(lambda block: block[1] + text_of(block[2], folder), text)


def main() -> None:
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        for name in TABLES:
            if any(folder.glob(f"{name}-*.json")):
                print(f"{name}:{text_of(name, folder)}")
    else:
        README.write_text(rewritten(README.read_text(), RESULTS))


if __name__ == "__main__":
    main()

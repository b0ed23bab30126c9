"""The report of a sweep: a table, a picture and what is missing.  python -m dlrm.report FOLDER

Writes into FOLDER report.md, report.csv, pareto.png and pareto.html (one file, no network needed).
"""

import argparse
import csv
import sys
from pathlib import Path

from dlrm.jobs import key_of
from dlrm.memory import MIB
from dlrm.pareto import TAG, draw_html, draw_png, fronts
from dlrm.report import markdown_table
from dlrm.statistics import Interval
from dlrm.sweep import (
    Configuration,
    Run,
    by_data,
    configurations,
    data_word,
    list_missing,
    list_repeats,
    read_runs,
    shared_words,
)


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if any run below the folder has no result."""
    parser = argparse.ArgumentParser(prog="python -m dlrm.report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of a run, of a sweep, or of several")
    parser.add_argument("--baseline", help="configuration to compare with; else dense, or the one with most bytes")
    options = parser.parse_args(arguments)
    try:
        return report(options.folder, options.baseline)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(folder: Path, baseline: str | None = None) -> int:
    """Write and print a folder's report; returns 1 if any run is without a result.

    Raises ValueError if there is no run, or none called like the baseline.
    """
    runs = read_runs(folder)
    found = configurations(runs)
    measured = [one for one in found if one.interval(TAG) is not None]
    measured.sort(key=lambda one: (one.data, -one.num_bytes))
    text = missing = list_missing(runs, TAG)
    if measured:
        baselines = _baselines(measured, baseline)
        verdicts = {one.label: verdict(one, baselines.get(one.data)) for one in measured}
        edge = [one for part in fronts(measured) for one in part]
        rows = [_row(one, baselines.get(one.data), verdicts, edge) for one in measured]
        with (folder / "report.csv").open("w", newline="", encoding="utf-8") as file:
            columns = _without_empty(rows)
            writer = csv.DictWriter(file, list(columns[0]))
            writer.writeheader()
            writer.writerows(columns)
        draw_png(measured, folder / "pareto.png")
        draw_html(measured, folder / "pareto.html", verdicts)
        table = markdown_table(_without_empty([_shown(row) for row in rows]))
        text = "\n\n".join(
            part for part in (table, _legend(runs, measured, baselines), list_repeats(runs, found), missing) if part
        )
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if measured:
        print(f"\n{folder}/report.md, report.csv, pareto.png, pareto.html")
    return int(bool(missing))


def verdict(one: Configuration, other: Configuration | None) -> str:
    """Whether a difference is more than noise: by the paired difference over the seeds that both have.

    other: the baseline of the same data, None if there is none."""
    if one is other:
        return "baseline"
    if other is None:
        return "not comparable: the baseline is of other data"
    difference = one.against(other, TAG)
    if difference is None or difference.half is None:
        return "not comparable: fewer than two seeds in common"
    if not difference.differs_from_zero:
        return "same within noise"
    return "better" if difference.mean > 0 else "worse"


def _without_empty(rows: list[dict]) -> list[dict]:
    """The rows less the columns in which none of them has anything."""
    names = [name for name in rows[0] if any(row[name] not in (None, "") for row in rows)]
    return [{name: row[name] for name in names} for row in rows]


def _baselines(measured: list[Configuration], label: str | None) -> dict[str, Configuration]:
    """Data -> the baseline of all that is of it. Data that has none called like the label is not in it."""
    if label is not None:
        named = {one.data: one for one in measured if label in (one.label, _without_data(one))}
        if not named:
            raise ValueError(f"baseline {label!r}: the configurations are {'; '.join(one.label for one in measured)}")
        return named
    found = {}
    for data, members in by_data(measured).items():
        dense = [one for one in members if {"embedding=dense", "method=dense"} & set(one.label.split())]
        found[data] = max(dense or members, key=lambda one: one.num_bytes)
    return found


def _without_data(one: Configuration) -> str:
    return one.label.removesuffix(f" {data_word(one.data)}")


def _row(one: Configuration, other: Configuration | None, verdicts: dict[str, str], edge: list[Configuration]) -> dict:
    def mean_and_half(name: str, found: Interval | None) -> dict:
        return {name: found and found.mean, f"{name}_half": found and found.half}

    return {
        "configuration": one.label,
        **mean_and_half("test_auc", one.interval(TAG)),
        **mean_and_half("test_auc_at_best", one.interval("test_at_best/auc")),
        **mean_and_half("test_log_loss", one.interval("test/log_loss")),
        "embedding_bytes": one.num_bytes,
        "nominal": one.nominal,
        "of_dense": other and one.num_bytes / other.dense_equivalent_bytes,
        **{f"{name}_bytes": one.mean(f"memory/{name}_bytes") for name in ("optimizer", "gradient", "serving", "peak")},
        **mean_and_half("difference", other and one.against(other, TAG)),
        "verdict": verdicts[one.label],
        "on_front": one in edge,
        "samples_per_second": one.samples_per_second,
        "seeds": len(one.runs),
    }


def _shown(row: dict) -> dict:
    """A row for people; what it lacks is blank."""

    def spread(name: str, sign: str = "") -> str:
        mean, half = row[name], row[f"{name}_half"]
        return "" if mean is None else f"{mean:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")

    nominal, of_dense, peak = row["nominal"], row["of_dense"], row["peak_bytes"]
    return {
        "configuration": f"`{row['configuration']}`",
        "test AUC": spread("test_auc"),
        "at best validation": spread("test_auc_at_best"),
        "log loss": spread("test_log_loss"),
        "MiB": f"{row['embedding_bytes'] / MIB:.2f}",
        "nominal": "" if nominal is None else f"{nominal:g}",
        "of dense": "" if of_dense is None else f"{of_dense:.3f}",
        "peak MiB": "" if peak is None else f"{peak / MIB:,.0f}",
        "AUC less baseline's": "" if row["verdict"] == "baseline" else spread("difference", "+"),
        "verdict": row["verdict"],
        "front": "*" if row["on_front"] else "",
        "samples/s": f"{row['samples_per_second']:,.0f}",
        "seeds": row["seeds"],
    }


def _legend(runs: list[Run], measured: list[Configuration], baselines: dict[str, Configuration]) -> str:
    summaries = [run.summary for one in measured for run in one.runs]
    facts = {name: sorted({str(summary.get(name)) for summary in summaries}) for name in ("git_commit", "torch")}
    facts |= _data_sets(measured, baselines)
    if shared := shared_words(runs):
        facts["all with"] = [" ".join(shared)]
    compared_with = " or ".join(f"`{one.label}`" for one in baselines.values())
    return (
        "Mean and 95 % interval over seeds (Student, 1908); differences are paired by seed, with "
        f"{compared_with}. MiB: everything the embeddings keep; nominal: the ratio asked for;\n"
        "of dense: the true one, of the baseline's rows; peak: the process's measured maximum.\n"
        "Front: no other configuration of the same data has at least this AUC in fewer bytes.\n"
        + "\n".join(f"{name}: {', '.join(values)}" for name, values in facts.items())
    )


def _data_sets(measured: list[Configuration], baselines: dict[str, Configuration]) -> dict[str, list[str]]:
    """What the data are, by the baselines' runs, and the paths that these were told."""
    found, sets = {}, by_data(measured)
    for data, members in sets.items():
        runs = baselines.get(data, members[0]).runs
        paths = {word for run in runs for word in run.overrides if key_of(word) == "data.path"}
        name = data_word(data) if len(sets) > 1 else "data"
        found[name] = sorted({run.summary["data"] for run in runs}) + sorted(paths)
    return found

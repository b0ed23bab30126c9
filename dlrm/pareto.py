"""AUC against bytes: the picture of a sweep, as a PNG and as one HTML file that needs no network."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dlrm.memory import MIB
from dlrm.sweep import Configuration, by_data, front

TAG = "test/auc"


def families(configurations: Sequence[Configuration]) -> dict[str, list[Configuration]]:
    """Configurations that differ in their ratio alone, by their other words, the smallest first: one line each."""
    found: dict[str, list[Configuration]] = {}
    for one in configurations:
        words = [word for word in one.label.split() if not word.startswith(("compression=", "data.min_count="))]
        words += ["min_count"] * ("min_count=" in one.label)
        found.setdefault(" ".join(words), []).append(one)
    return {name: sorted(members, key=lambda one: one.num_bytes) for name, members in found.items()}


def fronts(configurations: Sequence[Configuration]) -> list[list[Configuration]]:
    """Of each data those that no other one of it beats in both bytes and mean AUC, the smallest first."""
    found = []
    for members in by_data(configurations).values():
        best = front([(one.num_bytes, one.interval(TAG).mean) for one in members])
        edge = [one for one, kept in zip(members, best, strict=True) if kept]
        found.append(sorted(edge, key=lambda one: one.num_bytes))
    return found


def draw_png(configurations: Sequence[Configuration], path: Path) -> None:
    """Mean test AUC and its 95 % interval against MiB of the embeddings, log scale; the front as a band behind."""
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(10, 6.5), layout="constrained")
        axes = figure.subplots()
        band = {"color": "0.85", "linewidth": 9, "solid_capstyle": "round", "zorder": 0}
        for i, edge in enumerate(fronts(configurations)):
            axes.plot(*_line(edge), label="_" * bool(i) + "front", **band)  # once in the legend
        for i, (name, members) in enumerate(families(configurations).items()):
            halves = [one.interval(TAG).half or 0 for one in members]
            style = {"color": f"C{i % 10}", "marker": "osD^v<>*"[i % 8], "markersize": 4, "capsize": 2, "linewidth": 1}
            axes.errorbar(*_line(members), halves, label=name, **style)
        axes.set(xscale="log", xlabel="MiB of embeddings, everything kept counted", ylabel="test AUC, 95 % interval")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color="0.93")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
        figure.savefig(path, dpi=150)


def draw_html(configurations: Sequence[Configuration], path: Path, verdicts: dict[str, str]) -> None:
    """The same, to hover over and zoom. verdicts: label -> what its comparison with the baseline says."""
    figure, edges = go.Figure(), fronts(configurations)
    for edge in edges:
        x, y = _line(edge)
        figure.add_scatter(x=x, y=y, mode="lines", line={"width": 12, "color": "#dddddd"}, name="front")
    best = [one for edge in edges for one in edge]
    for name, members in families(configurations).items():
        x, y = _line(members)
        said = [
            f"{one.label}<br>{one.interval(TAG)}, {len(one.runs)} seeds<br>{one.num_bytes / MIB:.4g} MiB<br>"
            f"{verdicts.get(one.label, '')}" + ("<br>on the front" if one in best else "")
            for one in members
        ]
        halves = {"type": "data", "array": [one.interval(TAG).half or 0 for one in members]}
        figure.add_scatter(x=x, y=y, error_y=halves, mode="lines+markers", name=name, text=said, hoverinfo="text")
    figure.update_layout(template="plotly_white", hovermode="closest", title="Test AUC against bytes of embeddings")
    figure.update_xaxes(type="log", title="MiB of embeddings, everything kept counted")
    figure.update_yaxes(title="test AUC, 95 % interval over seeds")
    figure.write_html(path, include_plotlyjs=True)


def _line(members: Sequence[Configuration]) -> tuple[list[float], list[float]]:
    return [one.num_bytes / MIB for one in members], [one.interval(TAG).mean for one in members]

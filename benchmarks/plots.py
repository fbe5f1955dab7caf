"""Plots of records: one function a figure."""

from collections.abc import Hashable, Sequence
from itertools import cycle, product
from math import log
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from lines import (
    LARGE,
    MOST_LARGE,
    MOST_SECONDS,
    MOST_SMALL,
    SMALLEST,
    USUAL_STEPS,
    adaptive_lines,
    best,
    build_lines,
    fit,
    growth_lines,
    is_ours,
    merged,
    shaped,
    shared_loops,
    unique,
)
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from records import Adaptive, Build, EndToEnd, Growth, Law, Step, WorkPrecision
from step import IDEAL

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
)  # Okabe & Ito: safe for the colour-blind
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "grid.color": "#e6e6e6",
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "savefig.dpi": 130,
}
TICKS = (5, 10, 20, 50, 100)
WORST = 1.0
SHOWN = 8  # methods in one row of a figure
APART = 1.35  # a ratio at which two names do not touch


Name = TypeVar("Name", bound=Hashable)


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Axes [rows, columns] of error against calls, on common scales."""
    size = (3.1 * columns + 0.5, 2.5 * rows + 0.9)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel in axes.flat:
        panel.set(xscale="log", yscale="log")
        _ticks(panel, TICKS)
        panel.grid(True)
    for panel in axes[-1]:
        panel.set_xlabel("model calls")
    for panel in axes[:, 0]:
        panel.set_ylabel("RMSE against the exact flow")
    return figure, axes


def _ticks(panel: Axes, values: Sequence[float]) -> None:
    """At these values of a logarithmic axis, as plain numbers."""
    panel.xaxis.set_major_locator(FixedLocator(values))
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.xaxis.set_minor_locator(NullLocator())


def _mean_log(line: Sequence[WorkPrecision]) -> float:
    """The mean logarithm of the error, by which methods are ranked; a method that takes few of the calls ranks behind."""
    return sum(log(min(r.rmse, WORST)) for r in line) / max(len(line), 1)


def _plot(panel: Axes, line: Sequence[WorkPrecision], **style) -> None:
    """A line from where it is of interest: the data has a variance of order 1."""
    line = [r for r in line if r.rmse < WORST]
    panel.plot([r.nfe for r in line], [r.rmse for r in line], **style)


def _legend(panel: Axes, title: str) -> None:
    """To the right of a row of panels."""
    panel.legend(title=title, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, alignment="left")


def draw_methods(records: Sequence[WorkPrecision], schedule: str) -> Figure:
    """Error against calls, each method on the grid that suits it best: a column a problem, a row an order, its best methods."""
    records = [r for r in records if r.schedule == schedule]
    panels = {
        p: best([r for r in records if r.problem == p], lambda r: r.method)
        for p in unique(records, "problem")
    }
    frontier = {
        p: best([r for r in records if r.problem == p], lambda r: "best of all")["best of all"]
        for p in panels
    }
    names = merged(panels)
    order = {r.method: r.order for r in records}
    rows: dict[int, list[str]] = {}
    for name in sorted(
        names, key=lambda name: _mean_log([r for p in panels.values() for r in p.get(name, [])])
    ):
        row = rows.setdefault(
            min(max(order[name], 2), 4), []
        )  # first order stands with the second, fifth with the fourth
        if len(row) < SHOWN:
            row.append(name)
    rows = dict(sorted(rows.items()))
    figure, axes = _panels(len(rows), len(panels))
    dashed = {"color": "black", "linewidth": 0.8, "linestyle": (0, (4, 3)), "label": "best of all"}
    for row, mine in zip(axes, rows.values(), strict=True):
        for (problem, lines), panel in zip(panels.items(), row, strict=True):
            _plot(panel, frontier[problem], **dashed)
            for name, colour, marker in zip(mine, cycle(COLOURS), cycle("os^Dv<>P"), strict=False):
                label = "\n= ".join(names[name])
                _plot(panel, lines.get(name, []), color=colour, marker=marker, label=label)
        title = "order " + " and ".join(str(q) for q in sorted({order[name] for name in mine}))
        _legend(row[-1], title)
    for panel, problem in zip(axes[0], panels, strict=True):
        panel.set_title(f"{problem}, {schedule}")
    return figure


def draw_grids(records: Sequence[WorkPrecision]) -> Figure:
    """Error against calls, each grid with the method that suits it best: a column a problem, a row a schedule."""
    records = [r for r in records if is_ours(r.method)]  # peers have grids of their own
    schedules, problems = unique(records, "schedule"), unique(records, "problem")
    figure, axes = _panels(len(schedules), len(problems))
    for (schedule, problem), panel in zip(product(schedules, problems), axes.flat, strict=True):
        lines = best([r for r in records if (r.schedule, r.problem) == (schedule, problem)], lambda r: r.grid)
        for (grid, line), colour, marker in zip(lines.items(), cycle(COLOURS), cycle("os^D"), strict=False):
            _plot(panel, line, color=colour, marker=marker, label=grid)
        panel.set_title(f"{problem}, {schedule}")
    _legend(axes[0, -1], "grid, with its best method")
    return figure


def draw_step(records: Sequence[Step]) -> Figure:
    """Time per call over the time of the ideal pass, a panel a shape, of the loops that were run at each; log scale."""
    records = shared_loops(records)
    shapes = list(dict.fromkeys(tuple(r.shape) for r in records))
    figure, axes = plt.subplots(
        1,
        len(shapes),
        figsize=(3.2 * len(shapes) + 1.2, 0.8 + 0.2 * len(unique(records, "method"))),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for shape, panel in zip(shapes, axes.flat, strict=True):
        chosen = [r for r in records if tuple(r.shape) == shape]
        ideal = next(r.between for r in chosen if r.method == IDEAL)
        colours = [COLOURS[0] if is_ours(r.method) else "#b0b0b0" for r in chosen]
        ratios = [r.between / ideal for r in chosen]
        bars = panel.barh([r.method for r in chosen], ratios, color=colours, height=0.7)
        labels = [f"{ratio:.2g}x  {_time(r.between)}" for r, ratio in zip(chosen, ratios, strict=True)]
        for label in panel.bar_label(bars, labels, padding=4, fontsize=8):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.set(
            xscale="log",
            title=shaped(shape),
            xlabel="time per call / ideal single pass",
        )
        panel.set_xlim(0.3, 15 * max(ratios))
        panel.axvline(1, color="black", linewidth=0.7, zorder=0)
        panel.tick_params(axis="y", length=0)
    axes[0, 0].invert_yaxis()
    return figure


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"


MEASURES = {"KL(exact || sampler's), nats": "kl", "Wasserstein-2, per element": "distance"}
CHOSEN = (
    "ddpm", "ddpm_large", "analytic_ddpm", "analytic_ddpm, optimal trajectory", "analytic_ddim", "dpm_solver_pp_sde_2m",
    "sa_solver", "er_sde_3", "seeds_2", "recommended",
)  # of the figures; the tables have all  # fmt: skip


def draw_laws(records: Sequence[Law], grid: str) -> Figure:
    """Divergence and distance of exact laws against calls: a column a problem."""
    records = [r for r in records if r.grid == grid and r.method in CHOSEN]
    problems = unique(records, "problem")
    figure, axes = plt.subplots(
        2, len(problems), figsize=(3.4 * len(problems) + 2.2, 6.2), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )  # fmt: skip
    styles = _styles(unique(records, "method"))
    for (i, (label, key)), (j, problem) in product(enumerate(MEASURES.items()), enumerate(problems)):
        panel = axes[i, j]
        for name, style in styles.items():
            line = [r for r in records if (r.method, r.problem) == (name, problem)]
            points = [(r.nfe, getattr(r, key)) for r in line if getattr(r, key) > SMALLEST ** (2 - i)]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, **style)
        panel.set(xscale="log", yscale="log", title=problem if i == 0 else "")
        panel.grid(True)
        if i:
            panel.set_xlabel("model calls")
        if j == 0:
            panel.set_ylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside right center", frameon=False, title=f"grid {grid}", alignment="left"
    )
    return figure


def draw_samples(records: Sequence[Law]) -> Figure:
    """Sliced distance of samples against calls, and what exact samples have between them: a panel a grid."""
    grids = unique(records, "grid")
    figure, axes = plt.subplots(
        1, len(grids), figsize=(3.8 * len(grids) + 2.0, 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    styles = _styles(unique(records, "method"))
    for panel, grid in zip(axes[0], grids, strict=True):
        for name, style in styles.items():
            line = [r for r in records if (r.method, r.grid) == (name, grid)]
            panel.plot([r.nfe for r in line], [r.distance for r in line], label=name, **style)
        panel.axhline(records[0].floor, color="0.4", linestyle=":", label="exact samples")
        panel.set(
            xscale="log", yscale="log", title=f"{records[0].problem}, grid {grid}", xlabel="model calls"
        )
        panel.grid(True)
    axes[0, 0].set_ylabel("sliced Wasserstein-2")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def _styles(names: Sequence[Name]) -> dict[Name, dict[str, str]]:
    """A colour and a dash for each name."""
    dashes = ["-"] * len(COLOURS) + ["--"] * len(COLOURS)
    return {
        name: {"color": colour, "linestyle": dash, "marker": "."}
        for name, colour, dash in zip(names, cycle(COLOURS), dashes, strict=False)
    }


def draw_adaptive(records: Sequence[Adaptive]) -> Figure:
    """Error against calls, a panel a problem."""
    problems = unique(records, "problem")
    figure, axes = plt.subplots(
        1,
        len(problems),
        figsize=(3.9 * len(problems) + 2.2, 4.2),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    styles = _styles(
        [name for name in unique(records, "solver") if any(r.tolerance for r in records if r.solver == name)]
    )
    styles["best fixed plan"] = {"color": "black", "linestyle": ":", "marker": "x"}
    for panel, problem in zip(axes[0], problems, strict=True):
        for name, line in adaptive_lines(records, problem).items():
            panel.plot(*zip(*line, strict=True), label=name, **styles[name])
        panel.set(xscale="log", yscale="log", title=problem, xlabel="model calls of a start, mean")
        panel.grid(True)
    axes[0, 0].set_ylabel("RMSE against the exact flow")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def draw_builds(records: Sequence[Build]) -> Figure:
    """The time to build a plan: of every method at the usual steps, and of some against steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    usual = sorted((r for r in records if r.steps == USUAL_STEPS), key=lambda r: -r.seconds)
    left.plot(range(1, len(usual) + 1), [1e3 * r.seconds for r in usual], "o", color=COLOURS[0])
    above = float("inf")  # the last that has its name beside it
    for rank, r in enumerate(usual, 1):
        if APART * r.seconds < above and r.seconds > MOST_SECONDS:
            place = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            left.annotate(r.method, (rank, 1e3 * r.seconds), **place)
            above = r.seconds
    left.axhline(1e3 * MOST_SECONDS, color="black", linewidth=0.8, linestyle=":")
    left.set(yscale="log", xlabel="methods, the slowest first", ylabel=f"build of {USUAL_STEPS} steps, ms")
    lines = build_lines(records)
    for (name, line), style in zip(lines.items(), _styles(list(lines)).values(), strict=True):
        right.plot(*_in(line, 1e3), label=name, **style)
    right.set(xscale="log", yscale="log", xlabel="steps", ylabel="build, ms")
    for panel in (left, right):
        panel.grid(True)
    _legend(right, "")
    return figure


def draw_growth(records: Sequence[Growth]) -> Figure:
    """A run less its bare calls against each quantity, with the straight lines fitted: a panel a quantity."""
    quantities, executors = unique(records, "quantity"), unique(records, "executor")
    figure, axes = plt.subplots(
        1, len(quantities), figsize=(3.1 * len(quantities) + 1.2, 3.2), squeeze=False, layout="constrained"
    )
    for quantity, panel in zip(quantities, axes[0], strict=True):
        lines = growth_lines(records, quantity)
        for name, colour in zip(executors, COLOURS, strict=False):
            if name in lines:
                values, line = [value for value, _ in lines[name]], fit(lines[name])
                panel.plot(*_in(lines[name], 1e3), "o", color=colour, label=name)
                dense = np.geomspace(values[0], values[-1], 100)
                panel.plot(dense, 1e3 * (line.fixed + line.per_unit * dense), color=colour, linewidth=0.8)
        panel.set(xscale="log", yscale="log", xlabel=quantity)
        if max(values) < 100:
            _ticks(panel, values)
        panel.grid(True)
    axes[0, 0].set_ylabel("run less its bare calls, ms")
    _legend(axes[0, -1], "points, and the fit\nfixed + per unit * value")
    return figure


def draw_end_to_end(records: Sequence[EndToEnd]) -> Figure:
    """Time over that of the bare calls, and throughput, against the batch size: a column a network."""
    networks = unique(records, "network")
    figure, axes = plt.subplots(
        2, len(networks), figsize=(3.1 * len(networks) + 1.8, 5.2), sharex="col", sharey="row", squeeze=False, layout="constrained"
    )  # fmt: skip
    ways = list(dict.fromkeys((r.method, r.executor) for r in records))
    for network, (above, below) in zip(networks, axes.T, strict=True):
        mine = [r for r in records if r.network == network]
        for (method, executor), style in _styles(ways).items():
            line = [r for r in mine if (r.method, r.executor) == (method, executor)]
            batches, label = [r.shape[0] for r in line], f"{executor}, {method}"
            above.plot(batches, [r.ratio for r in line], label=label, **style)
            below.plot(batches, [r.shape[0] / r.seconds for r in line], label=label, **style)
        bare = {r.shape[0]: r.shape[0] / r.bare for r in mine if r.executor != "graph"}
        below.plot(list(bare), list(bare.values()), color="black", linestyle=":", label="bare calls")
        large = mine[0].parameters >= LARGE
        above.axhline(MOST_LARGE if large else MOST_SMALL, color="black", linewidth=0.8, linestyle=":")
        above.set(title=f"{network}, {mine[0].parameters / 1e6:.3g} M parameters")
        below.set(xscale="log", yscale="log", xlabel="batch")
        _ticks(below, sorted(bare))
        for panel in (above, below):
            panel.grid(True)
    axes[0, 0].set_ylabel("run / bare calls")
    axes[1, 0].set_ylabel("samples per second")
    _legend(axes[1, -1], "dotted above: the target")
    return figure


def _in(line: Sequence[tuple[float, float]], unit: float) -> tuple[list[float], list[float]]:
    """Values, and seconds in parts of a second."""
    return [value for value, _ in line], [unit * seconds for _, seconds in line]

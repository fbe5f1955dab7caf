"""Figures and Markdown tables from records, and from nothing else.

python benchmarks/report.py results/*.jsonl --out results --into docs/benchmarks.md docs/which-solver.md
"""

import argparse
import re
from collections.abc import Callable, Sequence
from itertools import chain, cycle, product
from math import exp, log, prod
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from records import Adaptive, Law, Record, Step, WorkPrecision, read

from solvers.comparison import price

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
BASELINES = ("one torch.add_", "ideal single pass", "diffusers 2M")  # grey in the figure: not ours
TICKS = (5, 10, 20, 50, 100)
WORST = 1.0
SHOWN = 8  # methods in one row of a figure
USUAL = ("dpm_solver_pp_2m", "logsnr")  # what most people run, the last row of a table of ratios

Lines = dict[str, list[WorkPrecision]]


def unique(records: Sequence[Record], name: str) -> list[str]:
    """The values of one field in the order in which they come."""
    return list(dict.fromkeys(getattr(r, name) for r in records))


def best(records: Sequence[WorkPrecision], name: Callable[[WorkPrecision], str]) -> Lines:
    """For every name, the record of least RMSE at each number of calls."""
    lines: dict[str, dict[int, WorkPrecision]] = {}
    for record in records:
        line = lines.setdefault(name(record), {})
        if record.calls not in line or record.rmse < line[record.calls].rmse:
            line[record.calls] = record
    return {key: [line[calls] for calls in sorted(line)] for key, line in lines.items()}


def merged(panels: dict[str, Lines]) -> dict[str, list[str]]:
    """Names, each with those after it whose errors are the same to 6 digits in every panel: one method under many names."""
    curves: dict[tuple, list[str]] = {}
    for name in {name: None for lines in panels.values() for name in lines}:
        points = [(key, r.nfe, f"{r.rmse:.6g}") for key, lines in panels.items() for r in lines.get(name, [])]
        curves.setdefault(tuple(points), []).append(name)
    return {names[0]: names for names in curves.values()}


def _panels(rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    """Axes [rows, columns] of error against calls, on common scales."""
    size = (3.1 * columns + 0.5, 2.5 * rows + 0.9)
    figure, axes = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel in axes.flat:
        panel.set(xscale="log", yscale="log")
        panel.xaxis.set_major_locator(FixedLocator(TICKS))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
        panel.grid(True)
    for panel in axes[-1]:
        panel.set_xlabel("model calls")
    for panel in axes[:, 0]:
        panel.set_ylabel("RMSE against the exact flow")
    return figure, axes


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
    """Time per call over the time of the ideal pass, a panel a shape; log scale."""
    shapes = list(dict.fromkeys(tuple(r.shape) for r in records))
    figure, axes = plt.subplots(
        1,
        len(shapes),
        figsize=(3.2 * len(shapes) + 1.2, 2.9),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for shape, panel in zip(shapes, axes.flat, strict=True):
        chosen = [r for r in records if tuple(r.shape) == shape]
        ideal = next(r.between for r in chosen if r.method == BASELINES[1])
        colours = ["#b0b0b0" if r.method in BASELINES else COLOURS[0] for r in chosen]
        ratios = [r.between / ideal for r in chosen]
        bars = panel.barh([r.method for r in chosen], ratios, color=colours, height=0.7)
        labels = [f"{ratio:.2g}x  {_time(r.between)}" for r, ratio in zip(chosen, ratios, strict=True)]
        for label in panel.bar_label(bars, labels, padding=4, fontsize=8):
            label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        panel.set(
            xscale="log",
            title="(" + ", ".join(map(str, shape)) + ")",
            xlabel="time per call / ideal single pass",
        )
        panel.set_xlim(0.3, 15 * max(ratios))
        panel.axvline(1, color="black", linewidth=0.7, zorder=0)
        panel.tick_params(axis="y", length=0)
    axes[0, 0].invert_yaxis()
    return figure


def _time(seconds: float) -> str:
    return f"{1e6 * seconds:.1f} µs" if seconds < 1e-3 else f"{1e3 * seconds:.1f} ms"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def _made_by(records: Sequence[Record]) -> str:
    """One line of what made the records."""
    made = {", ".join(f"{name} {value}" for name, value in r.versions.items()) for r in records}
    return f"{len(records)} records; " + "; ".join(sorted(made)) + "."


def step_table(records: Sequence[Step]) -> str:
    """One row per shape and method."""
    rows = []
    for shape in dict.fromkeys(tuple(r.shape) for r in records):
        chosen = sorted((r for r in records if tuple(r.shape) == shape), key=lambda r: r.between)
        add, ideal = (next(r.between for r in chosen if r.method == name) for name in BASELINES[:2])
        for r in chosen:
            times = [f"{1e6 * value:.1f}" for value in (r.between, r.seconds, r.best, r.between - add)]
            rows.append([f"{shape}", str(r.nfe), r.method, *times, f"{r.between / ideal:.2f}"])
    heads = ["shape", "calls", "loop", "between, µs", "whole, µs", "best, µs", "- add, µs", "/ ideal"]
    return _made_by(records) + "\n\n" + _markdown(heads, rows)


def error_table(records: Sequence[WorkPrecision], columns: Sequence[int]) -> str:
    """RMSE at the numbers of calls in `columns`, on the best grid; a table a schedule."""
    parts = [_made_by(records)]
    problems = unique(records, "problem")
    columns = [calls for calls in columns if any(r.calls == calls for r in records)]
    for schedule in unique(records, "schedule"):
        chosen = [r for r in records if r.schedule == schedule]
        cells: dict[str, list[str]] = {}
        for problem in problems:
            for name, line in best([r for r in chosen if r.problem == problem], lambda r: r.method).items():
                at = {r.calls: f"{r.rmse:.1e}" for r in line}
                cells.setdefault(name, []).extend(at.get(calls, "") for calls in columns)
        shown = ((f"{problem}: {columns[0]} calls", *map(str, columns[1:])) for problem in problems)
        heads = [f"{schedule}: method", *chain.from_iterable(shown)]
        parts.append(_markdown(heads, [[f"`{name}`", *row] for name, row in cells.items()]))
    return "\n\n".join(parts)


def ratio_table(records: Sequence[WorkPrecision], shown: int = 24) -> str:
    """Error over the least of all methods and grids at as many calls: geometric mean over problems and schedules, a table a measure.

    Each method on the grid where its mean over the numbers of calls is least; those `shown` that are best.
    """
    columns = sorted({r.calls for r in records})
    parts = [_made_by(records)]
    for measure in ("median", "rmse"):
        cells: dict[tuple[str, str, int], dict[tuple[str, str], float]] = {}
        for r in records:
            cells.setdefault((r.problem, r.schedule, r.calls), {})[r.method, r.grid] = getattr(r, measure)
        logs: dict[tuple[str, str], dict[int, list[float]]] = {}
        for (_, _, calls), errors in cells.items():
            least = min(errors.values())
            for pair, error in errors.items():
                logs.setdefault(pair, {}).setdefault(calls, []).append(log(error / least))
        whole = max(len(v) for by_calls in logs.values() for v in by_calls.values())
        means = {
            pair: {calls: sum(v) / whole for calls, v in by_calls.items() if len(v) == whole}
            for pair, by_calls in logs.items()
        }
        ranked = sorted(
            (sum(row.values()) / len(row), method, grid)
            for (method, grid), row in means.items()
            if len(row) == len(columns)
        )
        firsts = {method: (method, grid) for _, method, grid in reversed(ranked)}
        lines = sorted(firsts.values(), key=lambda pair: sum(means[pair].values()))[:shown]
        lines += [pair for pair in [USUAL] if pair in means]
        heads = [f"{measure}: method", "grid", *(f"{calls} calls" for calls in columns)]
        rows = [[f"`{m}`", f"`{g}`", *(f"{exp(means[m, g][n]):.3g}" for n in columns)] for m, g in lines]
        parts.append(_markdown(heads, rows))
    return "\n\n".join(parts)


MEASURES = {"KL(exact || sampler's), nats": "kl", "Wasserstein-2, per element": "distance"}
SMALLEST = 1e-8  # of a distance, and its square of a divergence: the root of rounding
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


def _styles(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """A colour and a dash for each name."""
    dashes = ["-"] * len(COLOURS) + ["--"] * len(COLOURS)
    return {
        name: {"color": colour, "linestyle": dash, "marker": "."}
        for name, colour, dash in zip(names, cycle(COLOURS), dashes, strict=False)
    }


def by_calls(records: Sequence[Law], head: str, cell: Callable[[Law], str], columns: Sequence[int]) -> str:
    """A row a method, a column a number of calls."""
    rows: dict[str, dict[int, str]] = {}
    for r in records:
        rows.setdefault(r.method, {})[r.calls] = cell(r)
    cells = [[name, *(row.get(n, "") for n in columns)] for name, row in rows.items()]
    return _markdown([head, *(f"{n} calls" for n in columns)], cells)


def law_table(records: Sequence[Law]) -> str:
    """KL and Wasserstein-2 of exact laws by calls: a table for each problem and grid."""

    def cell(r: Law) -> str:
        return f"{r.kl:.1e}, {r.distance:.1e}" if r.distance > SMALLEST else "exact"

    columns, parts = sorted({r.calls for r in records}), [_made_by(records)]
    for problem, grid in product(unique(records, "problem"), unique(records, "grid")):
        chosen = [r for r in records if (r.problem, r.grid) == (problem, grid)]
        parts.append(by_calls(chosen, f"{problem}, `{grid}`: KL, W2", cell, columns))
    return "\n\n".join(parts)


def sample_table(records: Sequence[Law]) -> str:
    """Sliced distances by calls, less what exact samples have between them: sqrt(max(d^2 - floor^2, 0))."""

    def cell(r: Law) -> str:
        excess = max(r.distance**2 - r.floor**2, 0.0) ** 0.5
        return f"{excess:.1e}" if excess > r.floor / 2 else f"< {r.floor / 2:.0e}"

    columns, some = sorted({r.calls for r in records}), records[0]
    floor = f"{some.samples} samples; exact ones have {some.floor:.1e} between them, which is taken off (of the squares)."
    parts = [_made_by(records), floor]
    for grid in unique(records, "grid"):
        chosen = [r for r in records if r.grid == grid]
        parts.append(by_calls(chosen, f"{some.problem}, `{grid}`", cell, columns))
    return "\n\n".join(parts)


PRICED = (1e-1, 1e-2, 1e-3, 1e-4)  # errors
OURS = "adams"
PEERS = ("bosh3", "dopri5", "DPM-Solver-23, coupled")  # whose names begin so


def lines_of(records: Sequence[Adaptive], problem: str) -> dict[str, list[tuple[float, float]]]:
    """(calls, RMSE) of each solver on a problem, of fixed plans the least error of all with at most so many calls."""
    lines: dict[str, list[tuple[float, float]]] = {}
    fixed: dict[float, float] = {}
    for r in records:
        if r.problem != problem:
            continue
        if r.tolerance is None:
            fixed[r.nfe] = min(r.rmse, fixed.get(r.nfe, r.rmse))
        else:
            lines.setdefault(r.solver, []).append((r.nfe, r.rmse))
    least = [
        (calls, rmse)
        for calls, rmse in sorted(fixed.items())
        if rmse <= min(e for n, e in fixed.items() if n <= calls)
    ]
    return lines | ({"best fixed plan": least} if least else {})


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
        for name, line in lines_of(records, problem).items():
            panel.plot(*zip(*line, strict=True), label=name, **styles[name])
        panel.set(xscale="log", yscale="log", title=problem, xlabel="model calls of a start, mean")
        panel.grid(True)
    axes[0, 0].set_ylabel("RMSE against the exact flow")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def price_table(records: Sequence[Adaptive]) -> str:
    """The calls that an error costs, and ours over the best peer's and over the best fixed plan's."""
    problems = unique(records, "problem")
    prices: dict[str, list[float | None]] = {}
    every = {problem: lines_of(records, problem) for problem in problems}
    names = list(dict.fromkeys(name for lines in every.values() for name in lines))
    for name in names:
        prices[name] = [price(every[p].get(name, []), target) for p, target in product(problems, PRICED)]

    def ratios(others: Sequence[str]) -> list[str]:
        cells = []
        for k, mine in enumerate(prices[OURS]):
            least = min((v for name in others if (v := prices[name][k])), default=None)
            cells.append(f"{mine / least:.2f}" if mine and least else "")
        return cells

    rows = [[name, *("" if v is None else f"{v:.1f}" for v in row)] for name, row in prices.items()]
    if OURS in prices:
        peers = [name for name in names if name.startswith(PEERS)]
        rows += [[f"*{OURS} / best of {', '.join(PEERS)}*", *ratios(peers)]] if peers else []
        rows += (
            [[f"*{OURS} / best fixed plan*", *ratios(["best fixed plan"])]]
            if "best fixed plan" in names
            else []
        )
    shown = ((f"{problem}: {PRICED[0]:g}", *(f"{target:g}" for target in PRICED[1:])) for problem in problems)
    return _made_by(records) + "\n\n" + _markdown(["calls for an RMSE of", *chain.from_iterable(shown)], rows)


def kept_table(records: Sequence[Adaptive]) -> str:
    """RMSE over the tolerance, the least and the largest over all tolerances from 0.1 to 1e-5, by problem."""
    problems = unique(records, "problem")
    rows = []
    for name in unique(records, "solver"):
        cells = []
        for problem in problems:
            kept = [
                r.rmse / r.tolerance
                for r in records
                if (r.solver, r.problem) == (name, problem) and r.tolerance and r.tolerance <= 0.11
            ]
            cells.append(f"{min(kept):.2g} to {max(kept):.2g}" if kept else "")
        rows += [[name, *cells]] if any(cells) else []
    return _made_by(records) + "\n\n" + _markdown(["RMSE / tolerance", *problems], rows)


def insert(text: str, name: str, table: str) -> str:
    """The text with what stands between the comments `begin name` and `end name` replaced."""
    begin, end = f"<!-- report.py: begin {name} -->", f"<!-- report.py: end {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the document has no place for the table: expected the lines {begin} and {end}")
    return re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text)


def main(argv: list[str] | None = None) -> None:
    """Draw whatever the records allow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "records",
        type=Path,
        nargs="+",
        help="JSONL files of step.py, work_precision.py, stochastic.py and adaptive.py",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for figures and tables")
    parser.add_argument(
        "--into",
        type=Path,
        nargs="+",
        help="Markdown files, each with places for some of the tables; default: files of their own in the folder",
    )
    parser.add_argument(
        "--columns", type=int, nargs="+", default=[5, 10, 20, 50], help="calls shown in the table"
    )
    given = parser.parse_args(argv)
    records = [record for path in given.records for record in read(path)]
    steps = [r for r in records if isinstance(r, Step)]
    runs = [r for r in records if isinstance(r, WorkPrecision)]
    laws = [r for r in records if isinstance(r, Law)]
    adaptive = [r for r in records if isinstance(r, Adaptive)]
    figures, tables = {}, {}
    with plt.rc_context(STYLE):
        if steps:
            steps.sort(key=lambda r: prod(r.shape))
            figures["step"], tables["step"] = draw_step(steps), step_table(steps)
        if runs:
            for schedule in unique(runs, "schedule"):
                figures[f"work_precision_{schedule.lower()}"] = draw_methods(runs, schedule)
            figures["grids"], tables["work_precision"] = draw_grids(runs), error_table(runs, given.columns)
            tables["ratios"] = ratio_table(runs)
        if exact := [r for r in laws if r.kl is not None]:
            tables["laws"] = law_table(exact)
            for grid in unique(exact, "grid"):
                figures[f"laws_{grid}"] = draw_laws(exact, grid)
        if by_samples := [r for r in laws if r.kl is None]:
            figures["samples"], tables["samples"] = draw_samples(by_samples), sample_table(by_samples)
        if adaptive:
            figures["adaptive"] = draw_adaptive(adaptive)
            tables["prices"], tables["kept"] = price_table(adaptive), kept_table(adaptive)
        given.out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(given.out / f"{name}.png")
            plt.close(figure)
    if not given.into:
        for name, table in tables.items():
            (given.out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        return
    pages = {path: path.read_text(encoding="utf-8") for path in given.into}
    for name, table in tables.items():
        path = next((path for path, text in pages.items() if f"begin {name} -->" in text), given.into[0])
        pages[path] = insert(pages[path], name, table)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

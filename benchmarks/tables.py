"""Markdown tables of records: one function a table."""

from collections.abc import Callable, Sequence
from itertools import chain, product
from math import exp, isnan, log
from typing import NamedTuple

from lines import (
    EXECUTORS,
    LARGE,
    LINEAR,
    MOST_LARGE,
    MOST_SECONDS,
    MOST_SMALL,
    PASSES,
    SMALLEST,
    USUAL_STEPS,
    adaptive_lines,
    best,
    build_lines,
    fit,
    growth_lines,
    is_ours,
    shaped,
    shared_loops,
    unique,
)
from records import Adaptive, Build, EndToEnd, Growth, Law, Record, Step, WorkPrecision
from step import ADD, IDEAL, MOST_MICROSECONDS, TARGETS
from step import USUAL as LOOP
from step import ratios as step_ratios

from solvers.comparison import price

USUAL = ("dpm_solver_pp_2m", "logsnr")  # what most people run, the last row of a table of ratios


def made_by(records: Sequence[Record]) -> str:
    """One line of what made the records."""
    made = {", ".join(f"{name} {value}" for name, value in r.versions.items()) for r in records}
    return f"{len(records)} records; " + "; ".join(sorted(made)) + "."


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns but the first stand to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def step_table(records: Sequence[Step]) -> str:
    """One row per shape and method."""
    rows = []
    for shape in dict.fromkeys(tuple(r.shape) for r in records):
        chosen = sorted((r for r in records if tuple(r.shape) == shape), key=lambda r: r.between)
        add, ideal = (next(r.between for r in chosen if r.method == name) for name in (ADD, IDEAL))
        for r in chosen:
            times = [f"{1e6 * value:.1f}" for value in (r.between, r.seconds, r.best, r.between - add)]
            rows.append([shaped(shape), str(r.nfe), r.method, *times, f"{r.between / ideal:.2f}"])
    heads = ["shape", "calls", "loop", "between, µs", "whole, µs", "best, µs", "- add, µs", "/ ideal"]
    return markdown(heads, rows)


def headline_table(records: Sequence[Step]) -> str:
    """A row per shape and loop of ours: what lies between two of its calls over the passes over memory, and that of each peer over it.

    Of the loops that were run at every shape.
    """
    records = shared_loops(records)
    others = [name for name in unique(records, "method") if not is_ours(name)]
    rows = []
    for shape in dict.fromkeys(tuple(r.shape) for r in records):
        cost = {r.method: r.between for r in records if tuple(r.shape) == shape}
        for name in filter(is_ours, cost):
            ratios = (
                f"{cost[name] / cost[other]:.2f}" if other in PASSES else f"{cost[other] / cost[name]:.1f}"
                for other in others
            )
            rows.append([shaped(shape), name, *ratios])
    heads = [f"it / {name}" if name in PASSES else f"{name} / it" for name in others]
    return markdown(["shape", "loop", *heads], rows)


def error_table(records: Sequence[WorkPrecision], columns: Sequence[int]) -> str:
    """RMSE at the numbers of calls in `columns`, on the best grid; a table a schedule."""
    parts = []
    problems = unique(records, "problem")
    known = {r.calls for r in records}
    columns = [calls for calls in columns if calls in known] or sorted(known)
    for schedule in unique(records, "schedule"):
        chosen = [r for r in records if r.schedule == schedule]
        cells: dict[str, list[str]] = {}
        for problem in problems:
            for name, line in best([r for r in chosen if r.problem == problem], lambda r: r.method).items():
                at = {r.calls: f"{r.rmse:.1e}" for r in line}
                cells.setdefault(name, []).extend(at.get(calls, "") for calls in columns)
        shown = ((f"{problem}: {columns[0]} calls", *map(str, columns[1:])) for problem in problems)
        heads = [f"{schedule}: method", *chain.from_iterable(shown)]
        parts.append(markdown(heads, [[f"`{name}`", *row] for name, row in cells.items()]))
    return "\n\n".join(parts)


def ratio_table(records: Sequence[WorkPrecision], shown: int = 24) -> str:
    """Error over the least of all methods and grids at as many calls: geometric mean over problems and schedules, a table a measure.

    Each method on the grid where its mean over the numbers of calls is least; those `shown` that are best.
    """
    columns = sorted({r.calls for r in records})
    parts = []
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
        parts.append(markdown(heads, rows))
    return "\n\n".join(parts)


def by_calls(records: Sequence[Law], head: str, cell: Callable[[Law], str], columns: Sequence[int]) -> str:
    """A row a method, a column a number of calls."""
    rows: dict[str, dict[int, str]] = {}
    for r in records:
        rows.setdefault(r.method, {})[r.calls] = cell(r)
    cells = [[name, *(row.get(n, "") for n in columns)] for name, row in rows.items()]
    return markdown([head, *(f"{n} calls" for n in columns)], cells)


def law_table(records: Sequence[Law]) -> str:
    """KL and Wasserstein-2 of exact laws by calls: a table for each problem and grid."""

    def cell(r: Law) -> str:
        return f"{r.kl:.1e}, {r.distance:.1e}" if r.distance > SMALLEST else "exact"

    columns, parts = sorted({r.calls for r in records}), []
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
    parts = [floor]
    for grid in unique(records, "grid"):
        chosen = [r for r in records if r.grid == grid]
        parts.append(by_calls(chosen, f"{some.problem}, `{grid}`", cell, columns))
    return "\n\n".join(parts)


PRICED = (1e-1, 1e-2, 1e-3, 1e-4)  # errors


OURS = "adams"
PEERS = ("bosh3", "dopri5", "DPM-Solver-23, coupled")  # whose names begin so


def price_table(records: Sequence[Adaptive]) -> str:
    """The calls that an error costs, and ours over the best peer's and over the best fixed plan's."""
    problems = unique(records, "problem")
    prices: dict[str, list[float | None]] = {}
    every = {problem: adaptive_lines(records, problem) for problem in problems}
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
    return markdown(["calls for an RMSE of", *chain.from_iterable(shown)], rows)


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
    return markdown(["RMSE / tolerance", *problems], rows)


def build_table(records: Sequence[Build]) -> str:
    """The time to build each method's plan at the usual steps, the slowest first."""
    chosen = sorted((r for r in records if r.steps == USUAL_STEPS), key=lambda r: -r.seconds)
    rows = [[f"`{r.method}`", str(r.rows), f"{1e3 * r.seconds:.2f}"] for r in chosen]
    return markdown(["method", "rows", "build, ms"], rows)


def fit_row(name: Sequence[str], points: Sequence[tuple[float, float]]) -> list[str]:
    """The range, the line, and how straight it is."""
    line, values = fit(points), [value for value, _ in points]
    straight = "" if isnan(line.exponent) else "yes" if line.exponent <= LINEAR else "no"
    numbers = [
        f"{1e6 * line.fixed:.1f}",
        f"{1e6 * line.per_unit:.3g}",
        f"{line.worst:.0%}",
        "" if isnan(line.exponent) else f"{line.exponent:.2f}",
    ]
    return [*name, f"{min(values)} to {max(values)}", *numbers, straight]


def growth_table(records: Sequence[Growth | Build]) -> str:
    """seconds = fixed + per unit * value for each quantity and executor, and for the building of some methods by steps."""
    runs = [r for r in records if isinstance(r, Growth)]
    rows = [
        fit_row([f"run, {executor}", quantity], line)
        for quantity in unique(runs, "quantity")
        for executor, line in growth_lines(runs, quantity).items()
    ]
    builds = build_lines([r for r in records if isinstance(r, Build)])
    rows += [fit_row([f"build of `{name}`", "steps"], line) for name, line in builds.items()]
    heads = ["cost", "against", "from", "fixed, µs", "per unit, µs", "off by", "exponent", "linear"]
    return markdown(heads, rows)


def end_to_end_table(records: Sequence[EndToEnd]) -> str:
    """A row a network, batch size, method and executor."""
    rows = []
    for r in records:
        size = f"{r.parameters / 1e6:.3g} M, {r.dtype}"
        times = [
            f"{1e3 * r.seconds:.2f}",
            f"{1e3 * r.bare:.2f}",
            f"{r.ratio:.4f}",
            f"{r.shape[0] / r.seconds:.3g}",
        ]
        counts = [_known(r.syncs, "d"), _known(r.loop_syncs, "d"), _known(r.extra_states, ".2f")]
        rows.append(
            [r.network, size, shaped(r.shape), f"`{r.method}`", str(r.nfe), r.executor, *times, *counts]
        )
    heads = ["network", "parameters", "x", "method", "calls", "executor"]
    heads += ["run, ms", "bare, ms", "run / bare", "samples/s", "waits", "in the loop", "extra states"]
    return markdown(heads, rows)


def _known(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


class Target(NamedTuple):
    """What is claimed, what was measured of it, and the most that any of that may be."""

    claim: str
    found: list[float]
    most: float
    form: str = ".4f"


def targets(records: Sequence[Record]) -> list[Target]:
    """All that has a target."""
    builds = [1e3 * r.seconds for r in records if isinstance(r, Build) and r.steps == USUAL_STEPS]
    runs = [r for r in records if isinstance(r, EndToEnd)]
    ratios: dict[tuple[str, bool], list[float]] = {}
    for r in runs:
        ratios.setdefault((r.executor, r.parameters >= LARGE), []).append(r.ratio)
    calls = [r for r in records if isinstance(r, Step)]
    parts = {"between": "between calls", "whole": "whole runs"}
    steps = [
        Target(
            f"{row['method']} / {row['over']} at {shaped(row['shape'])}, {words}",
            [row[part]],
            row["at most"],
            ".3f",
        )
        for row, (part, words) in product(step_ratios(calls), parts.items())
    ]
    small = [r for r in calls if r.method == LOOP and tuple(r.shape) == TARGETS[0][0]]
    for words, field in (("between calls", "between"), ("of whole runs", "best")):
        micro = [1e6 * getattr(r, field) for r in small]
        steps.append(
            Target(f"{LOOP} at {shaped(TARGETS[0][0])}: µs a call, {words}", micro, MOST_MICROSECONDS, ".1f")
        )
    syncs = [r.loop_syncs for r in runs if r.loop_syncs is not None]
    large = ("run / bare calls of a large network", MOST_LARGE)
    return [
        *steps,
        Target(f"building a plan of {USUAL_STEPS} steps, ms", builds, 1e3 * MOST_SECONDS, ".2f"),
        *(Target(f"{name}: {large[0]}", ratios.get((name, True), []), large[1]) for name in EXECUTORS),
        Target(
            "graph: run / graph of the bare calls of a small network",
            ratios.get(("graph", False), []),
            MOST_SMALL,
        ),
        Target("times the host waits for the device between the first call and the last", syncs, 0, ".0f"),
    ]


def target_table(records: Sequence[Record]) -> str:
    """Each target with the largest of what was measured, over methods, networks and batch sizes."""
    rows = []
    for claim, found, most, form in targets(records):
        verdict = "" if not found else "met" if max(found) <= most else "missed"
        shown = format(max(found), form) if found else "not measured"
        rows.append([claim, shown, f"{most:.3g}", str(len(found)), verdict])
    return markdown(["what", "largest measured", "target: at most", "records", ""], rows)

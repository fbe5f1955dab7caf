"""Lines through records, which tables print and plots draw: the best of many, what an error costs, how a cost grows."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from records import PEERS, Adaptive, Build, Growth, Record, Step, WorkPrecision
from scipy.optimize import nnls
from step import ADD, ADDCMUL, IDEAL

PASSES = (ADD, ADDCMUL, IDEAL)  # over memory, which the loops of step.py are held against
SMALLEST = 1e-8  # of a distance, and its square of a divergence: the root of rounding
EXECUTORS = ("eager", "fused", "graph")

USUAL_STEPS = 20  # of the plans whose building has a target
MOST_SECONDS = 2e-3  # of building one
LINEAR = (
    1.1  # an exponent of growth above it is taken for no straight line; the borders of caches reach up to it
)
LARGE = 100e6  # parameters, of a network that is called large
MOST_LARGE = 1.01  # of a run, over the bare calls of a large network
MOST_SMALL = 1.05  # of a run in a graph, over a graph of the bare calls of a small one

Lines = dict[str, list[WorkPrecision]]


def shaped(shape: Sequence[int]) -> str:
    """(1, 4, 64, 64)."""
    return f"({', '.join(map(str, shape))})"


def unique(records: Sequence[Record], name: str) -> list[str]:
    """The values of one field in the order in which they come."""
    return list(dict.fromkeys(getattr(r, name) for r in records))


def is_ours(name: str) -> bool:
    """Whether a method, or a loop of step.py, is this library's, and neither a bare pass over memory nor a peer's."""
    return not name.startswith((*PASSES, *PEERS))


def shared_loops(records: Sequence[Step]) -> list[Step]:
    """Those whose loop was run at every shape."""
    shapes = {tuple(r.shape) for r in records}
    ran = {(r.method, tuple(r.shape)) for r in records}
    return [r for r in records if all((r.method, shape) in ran for shape in shapes)]


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


def adaptive_lines(records: Sequence[Adaptive], problem: str) -> dict[str, list[tuple[float, float]]]:
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


class Fit(NamedTuple):
    """seconds = fixed + per_unit * value, and how straight the line is."""

    fixed: float
    per_unit: float
    worst: float  # the largest relative distance of a point from the line
    exponent: float  # of a power of the value through the points in the upper half on logarithmic axes


def fit(points: Iterable[tuple[float, float]]) -> Fit:
    """Least squares of relative errors with neither term below 0; a point at 0 or below is noise and left out."""
    value, seconds = np.array(sorted(p for p in points if p[1] > 0), dtype=float).T
    terms = np.stack([np.ones_like(value), value / value[-1]], axis=1)
    weights, _ = nnls(terms / seconds[:, None], np.ones_like(seconds))
    upper = value >= (value[0] * value[-1]) ** 0.5
    exponent = np.polyfit(np.log(value[upper]), np.log(seconds[upper]), 1)[0] if upper.sum() > 1 else np.nan
    worst = np.abs(terms @ weights / seconds - 1).max()
    return Fit(float(weights[0]), float(weights[1] / value[-1]), float(worst), float(exponent))


def growth_lines(records: Sequence[Growth], quantity: str) -> dict[str, list[tuple[int, float]]]:
    """(value, seconds of a run) by executor."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        if r.quantity == quantity:
            lines.setdefault(r.executor, []).append((r.value, r.seconds))
    return {name: sorted(line) for name, line in lines.items()}


def build_lines(records: Sequence[Build]) -> dict[str, list[tuple[int, float]]]:
    """(steps, seconds of a build) of the methods that were built at several numbers of steps."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for r in records:
        lines.setdefault(r.method, []).append((r.steps, r.seconds))
    return {name: sorted(line) for name, line in lines.items() if len(line) > 1}

"""Comparing solvers on one problem: plans within a budget of calls, the exact answer, errors."""

import math
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import solvers as sv
from solvers.methods import BUILDS, METHODS, SDES
from solvers.predictions import AnyModel, as_model
from solvers.rows import rows_of

Grid = Callable[..., Tensor]  # (schedule, steps) -> times
Build = Callable[[sv.Schedule, Tensor], sv.Plan]

FAST = "dpm_solver_fast"  # takes a budget of calls instead of times, so it stands beside the table of methods
CERTIFIED = 1e-11  # how well the digits' exact answer is known


@dataclass(frozen=True)
class Problem:
    """What is sampled.

    Attributes:
        model: as for `sv.run`.
        x: [B, ...], states at the start of the grid.
        schedule: noise schedule.
        flow: (x, schedule, s, t) -> the exact answer, if it is known.
        origin: where it all comes from, for the records.
    """

    model: AnyModel
    x: Tensor
    schedule: sv.Schedule
    flow: Callable[..., Tensor] | None
    origin: dict[str, Any]


class Answer(NamedTuple):
    """What runs are held against: the states [B, ...] at the end of the grid, how well they are known, what they are."""

    x: Tensor
    resolution: float
    name: str


def analytic(gamma: Callable[[Tensor], Tensor]) -> dict[str, Build]:
    """Every method by name, those of Analytic-DPM with the data's own gamma."""
    mine = {"analytic_ddpm": 1.0, "analytic_ddim": 0.0}
    return BUILDS | {name: partial(sv.analytic_dpm, gamma=gamma, eta=eta) for name, eta in mine.items()}


def within(
    name: str, schedule: sv.Schedule, grid: Grid, calls: int, builds: Mapping[str, Build] = BUILDS
) -> sv.Plan | None:
    """The plan of most steps that makes at most so many calls; None where one step makes more."""
    if name == FAST:
        if grid is not sv.logsnr:
            raise ValueError(
                "it stands on a grid of its own, uniform in log-SNR: compare it on --grid logsnr"
            )
        return sv.dpm_solver_fast(schedule, calls)
    per_step = (METHODS | SDES)[name].calls_per_step if name in METHODS | SDES else 1
    for steps in range(calls // per_step, 0, -1):
        plan = builds[name](schedule, grid(schedule, steps))
        if plan.nfe <= calls:
            return plan
    return None


def candidates(
    names: Iterable[str],
    problem: Problem,
    grid: Grid,
    budgets: Iterable[int],
    builds: Mapping[str, Build] = BUILDS,
) -> tuple[dict[tuple[str, int], sv.Plan], dict[tuple[str, int], str]]:
    """The plans that fit, by (name, calls), and of those that this grid and model do not allow the reasons."""
    plans, reasons = {}, {}
    for name, calls in product(names, budgets):
        try:
            if plan := within(name, problem.schedule, grid, calls, builds):
                rows_of(plan, as_model(problem.model))  # refuses what the network cannot read
                plans[name, calls] = plan
        except ValueError as error:
            reasons[name, calls] = str(error)
    return plans, reasons


def answer(problem: Problem, grid: Grid, calls: int) -> Answer:
    """The exact answer at the end of the grid, or a fine run and its distance to one of half as many calls.

    The fine run is singlestep, of order 3; on a Discrete schedule multistep, of order 2, which calls at levels only.
    """
    if problem.flow:
        start, stop = grid(problem.schedule, 1)[[0, -1]].tolist()
        return Answer(problem.flow(problem.x, problem.schedule, start, stop), CERTIFIED, "the exact answer")
    method = "dpm_solver_pp_3s"
    if isinstance(problem.schedule, sv.Discrete):
        method, calls = "dpm_solver_pp_2m", min(calls, problem.schedule.levels)
    plans = [within(method, problem.schedule, grid, n) for n in (calls // 2, calls)]
    coarse, fine = (sv.run(plan, problem.model, problem.x) for plan in plans if plan)
    made = plans[1].nfe if plans[1] else 0
    return Answer(fine, errors(coarse, fine)["error"], f"a fine run of {made} calls")


def errors(x: Tensor, exact: Tensor) -> dict[str, float]:
    """The root-mean-square error over all elements, and the median over the samples of theirs."""
    squares = (x - exact).double().flatten(1).square().mean(1)
    return {"error": squares.mean().sqrt().item(), "median_error": squares.sqrt().median().item()}


def price(points: Iterable[tuple[float, float]], target: float) -> float | None:
    """The calls that an error costs, between (calls, error) where it is reached for good, on logarithmic scales; None if it is not.

    Where the dearest point misses the target there is no price; where the cheapest meets it, its calls are it.
    """
    line = sorted(points)
    above = [k for k, (_, error) in enumerate(line) if error > target]
    if not line or (above and above[-1] == len(line) - 1):
        return None
    if not above:
        return line[0][0]
    (low, worse), (high, better) = line[above[-1]], line[above[-1] + 1]
    share = math.log(worse / target) / math.log(worse / better)
    return low * (high / low) ** share


def versions() -> dict[str, str]:
    """Of what a measurement depends on."""
    return {
        "solvers": version("diffusion-solvers"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

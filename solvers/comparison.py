"""Comparing solvers on one problem: plans within a budget of calls, the exact answer, errors."""

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

import solvers as sv
from solvers.methods import METHODS
from solvers.run import AnyModel

Grid = Callable[..., Tensor]  # (schedule, steps) -> times

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


def within(name: str, schedule: sv.Schedule, grid: Grid, calls: int) -> sv.Plan | None:
    """The plan of most steps that makes at most so many calls; None where one step makes more."""
    try:
        if name == FAST:
            start, stop = grid(schedule, 1)[[0, -1]].tolist()
            return sv.dpm_solver_fast(schedule, calls, start=start, stop=stop)
        method = METHODS[name]
        for steps in range(calls // method.calls_per_step, 0, -1):
            plan = method.build(schedule, grid(schedule, steps))
            if plan.nfe <= calls:
                return plan
    except ValueError as error:
        error.add_note(f"building {name} for {calls} calls; choose other --solvers or another --grid")
        raise
    return None


def answer(problem: Problem, grid: Grid, calls: int) -> tuple[Tensor, float]:
    """The states [B, ...] at the end of the grid that runs are held against, and how well they are known.

    Without a known flow: a singlestep run of order 3, and its distance to one of half as many calls.
    """
    if problem.flow:
        start, stop = grid(problem.schedule, 1)[[0, -1]].tolist()
        return problem.flow(problem.x, problem.schedule, start, stop), CERTIFIED
    plans = (within("dpm_solver_pp_3s", problem.schedule, grid, n) for n in (calls // 2, calls))
    coarse, fine = (sv.run(plan, problem.model, problem.x) for plan in plans if plan)
    return fine, errors(coarse, fine)["error"]


def errors(x: Tensor, exact: Tensor) -> dict[str, float]:
    """The root-mean-square error over all elements, and the median over the samples of theirs."""
    squares = (x - exact).double().flatten(1).square().mean(1)
    return {"error": squares.mean().sqrt().item(), "median_error": squares.sqrt().median().item()}


def versions() -> dict[str, str]:
    """Of what a measurement depends on."""
    return {
        "solvers": version("diffusion-solvers"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }

"""From data to latents and back by the probability-flow ODE; what may solve it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from solvers.blackbox import odeint
from solvers.control import Solution
from solvers.elements import elements
from solvers.plan import Plan
from solvers.predictions import AnyModel
from solvers.run import run
from solvers.schedules import Inversion, Schedule

Solver = Plan | Callable[..., Solution]
DOPRI5 = functools.partial(odeint, variable="angle")


def encode(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    solver: Solver = DOPRI5,
    *,
    start: float | None = None,
    stop: float | None = None,
) -> Tensor:
    """The latent at `start` of states at `stop`, by the probability-flow ODE, [B, ...].

    Args:
        model: as for `run`.
        schedule: noise schedule.
        x: the states at `stop`, [B, ...].
        solver: as for `log_likelihood`: (model, schedule, x, start=, stop=) -> Solution, or a plan for sv.Inversion(schedule).
        start: time of the latent; the schedule's own if None, or the plan's.
        stop: time of x; the schedule's own if None, or the plan's.
    """
    first, last = ends_of_solver(schedule, solver, start, stop)
    return _carried(model, Inversion(schedule), x, solver, last, first)


def decode(
    model: AnyModel,
    schedule: Schedule,
    z: Tensor,
    solver: Solver = DOPRI5,
    *,
    start: float | None = None,
    stop: float | None = None,
) -> Tensor:
    """The states at `stop` of latents at `start`, [B, ...]; see `encode`. A plan is one for the schedule itself, from noise to data."""
    first, last = ends_of_solver(schedule, solver, start, stop, downwards=True)
    return _carried(model, schedule, z, solver, first, last)


def round_trip_error(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    solver: Callable[..., Solution] = DOPRI5,
    *,
    start: float | None = None,
    stop: float | None = None,
) -> Tensor:
    """The root mean square of decode(encode(x)) - x over the elements of each sample, [B]; arguments as for `encode`, but no plan."""
    if isinstance(solver, Plan):
        raise TypeError(
            "solver is a Plan, which leads one way: compare decode(model, schedule, encode(model, schedule, x, up), down) with x yourself"
        )
    there = encode(model, schedule, x, solver, start=start, stop=stop)
    back = decode(model, schedule, there, solver, start=start, stop=stop)
    return elements(back - x).square().mean(1).sqrt()


def _carried(
    model: AnyModel, schedule: Schedule, x: Tensor, solver: Solver, start: float, stop: float
) -> Tensor:
    if isinstance(solver, Plan):
        return run(solver, model, x)
    return solver(model, schedule, x, start=start, stop=stop).x


def ends_of_solver(
    schedule: Schedule, solver: Solver, start: float | None, stop: float | None, downwards: bool = False
) -> tuple[float, float]:
    """The times of the latent and of the data, once a plan is known to lead from one to the other."""
    if not isinstance(solver, Plan):
        if not callable(solver):
            raise TypeError(
                f"solver = {solver!r:.100}: expected (model, schedule, x, start=, stop=) -> Solution, e.g. functools.partial(sv.odeint, rtol=1e-8, "
                "atol=1e-8, variable='angle'), or a plan for sv.Inversion(schedule)"
            )
        return schedule.start if start is None else start, schedule.stop if stop is None else stop
    if not (start is None and stop is None):
        raise ValueError(
            "start and stop are the plan's own: leave them out, or build the plan on other times"
        )
    ends = solver.times[[0, -1]].tolist()
    if solver.is_stochastic or (ends[0] > ends[1]) != downwards:
        kind = "stochastic" if solver.is_stochastic else f"from t = {ends[0]:g} to {ends[1]:g}"
        expected = (
            "the schedule, from noise to data"
            if downwards
            else "the inversion: method(sv.Inversion(schedule), sv.angle(sv.Inversion(schedule), steps))"
        )
        raise ValueError(f"the plan is {kind}: expected a deterministic one for {expected}")
    for name in ("alpha", "sigma"):
        if not torch.allclose(
            getattr(schedule, name)(solver.times), getattr(solver, name), rtol=1e-6, atol=1e-9
        ):
            raise ValueError(
                f"the plan's {name} is not that of {schedule!r:.100} at its times: give the schedule that it was built with"
            )
    return (ends[0], ends[1]) if downwards else (ends[1], ends[0])

"""Predictor-corrector: UniPC, its corrector on top of any multistep plan, and the recommended method."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from solvers.arguments import choice, numbers, whole
from solvers.grids import PREDICTS_NOISE, given, has_levels
from solvers.methods.exponential import Form, Levels
from solvers.methods.multistep import (
    FINALS,
    MAX_ORDER,
    VARIANTS,
    adams_on,
    adams_weights,
    corrected_steps,
    corrector_nodes,
    exponential_adams,
    orders_of_steps,
)
from solvers.plan import Plan
from solvers.schedules import Schedule

PLACES = ("half_logsnr", "sigma", "angle", "asinh")  # variables that the levels tell, without the schedule


def unipc(
    schedule: Schedule,
    times: Tensor,
    order: int = 3,
    variant: str = "bh2",
    predicts: str = "data",
    variable: str = "half_logsnr",
    scale: float = 1.0,
    corrector: bool = True,
    start: str = "ramp",
    final: str = "full",
) -> Plan:
    """UniPC: an exponential Adams predictor and, once the model is called at its end, a corrector that has that call too.

    Order p + 1 (3 and 4 need start = "singlestep", else 3), without corrector p (or 2 by a ramp); 1 call per step; ODE; noise,
    data or velocity form. start = "singlestep" takes the first p - 2 steps by singlestep methods
    of order p. The last step is not corrected, which would cost a call.
    Source: Zhao et al. 2023 (arXiv 2302.04867), algorithms 1 and 2. Differs: the released "vary_coeff" corrector leaves the
    new call out of all but one of its equations and is of first order; here it is the exact Adams-Moulton corrector.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: p, 1 to 4.
        variant: "bh1" | "bh2" | "vary_coeff", which differ where a row has one other call (first and second order steps).
        predicts: "noise" | "data" | "velocity".
        variable: what polynomials are in: "half_logsnr", as in the paper, or "sigma", "angle" or "asinh"; see `exponential_adams`.
        scale: of the velocity form: 1 for v, the data's standard deviation for EDM's F.
        corrector: False for UniP alone.
        start: "ramp" | "singlestep".
        final: "full" | "lower"; "lower" ends with predictors of orders p - 1, ..., 1.
    """
    whole("order", order, 1, 4)
    starting = (order - 2, order) if corrector else None
    form = Form(predicts, choice("variable", variable, PLACES), scale)
    choice("variant", variant, VARIANTS)
    levels = Levels.of(schedule, times)
    rows, ends, some, weights = adams_on(
        schedule, levels, order, form, start, final, variant, starting, corrector
    )
    if some:
        rows = rows._replace(b=with_corrections(rows.a, rows.b, ends, some, weights))
    return rows.plan(predicts, form.scale)


def corrected(
    plan: Plan,
    order: int,
    variant: str = "bh2",
    variable: str = "half_logsnr",
    times: Tensor | None = None,
    final: str = "full",
) -> Plan:
    """A multistep plan, each of its steps corrected once the model has been called at its end (PEC), at no further call.

    Order p + 1 for a predictor of order p or p + 1, begun as well, and a corrector of order p; 1 call per step; ODE; form of the
    plan. x at
    call i is the predicted state; with the predictor's weights P and the corrector's C of the step before, row i becomes::

        x <- a_i (x + sum_j (C - P)_{i-1,j} m_{i-j}) + sum_j P_ij m_{i-j},

    since the weight of x cancels: order + 1 columns.
    Source: UniC of Zhao et al. 2023 (arXiv 2302.04867), algorithm 1.

    Args:
        plan: a predictor not yet corrected, in noise, data or velocity form, whose rows read the calls as an Adams method does. A
            step that makes one call is corrected, a step of several is not.
        order: p, the number of calls before the new one that the corrector reads; fewer in the first steps.
        variant: "bh1" | "bh2" | "vary_coeff", of corrections that read one call before the new one.
        variable: what the corrector's polynomial is in: "half_logsnr" | "sigma" | "angle" | "asinh".
        times: the outer steps of a plan that begins with singlestep steps; None: every row is a step.
        final: "full" | "lower"; "lower" ends with correctors of orders ..., 3, 2, as a predictor with it does.

    Returns:
        The corrected plan: the same grid, calls and form.

    Raises:
        ValueError: the plan is stochastic, a mixture or per element, or times are not in it; or two calls stand at one time, or
            a time turns back, and `times` do not say which calls are stages.
    """
    whole("order", order, 1, MAX_ORDER)
    choice("variant", variant, VARIANTS)
    if plan.is_stochastic or plan.predicts == "mixture" or not plan.is_scalar:
        raise ValueError(
            f"a plan in {plan.predicts} form, stochastic = {plan.is_stochastic}: expected a deterministic one in noise, data or velocity form"
        )
    calls = calls_of_steps(plan, times)
    ends = torch.cat([calls, calls.new_tensor([plan.rows])])
    levels = Levels(plan.times[ends], plan.alpha[ends], plan.sigma[ends], plan.half_logsnr[ends])
    form = Form(plan.predicts, choice("variable", variable, PLACES), plan.scale)
    orders = orders_of_steps(levels, form, order, choice("final", final, FINALS))
    return with_corrector(plan, levels, form, ends, orders, variant)


def with_corrector(
    plan: Plan, levels: Levels, form: Form, ends: Tensor, orders: list[int], variant: str
) -> Plan:
    """The plan of `corrected`, whose steps begin at the calls `ends` ([steps + 1], the last behind them all)."""
    return dataclasses.replace(plan, b=corrected_rows(plan.a, plan.b, levels, form, ends, orders, variant))


def corrected_rows(
    a: Tensor, b: Tensor, levels: Levels, form: Form, ends: Tensor, orders: list[int], variant: str
) -> Tensor:
    """The b of `corrected`, for rows (a, b); see `with_corrector`."""
    some = corrected_steps(form, levels, ends)
    if not some:
        return b
    steps, order = torch.tensor([[i, orders[i]] for i in some], device="cpu").T
    weights = adams_weights(None, form, levels, steps, corrector_nodes(max(orders)), variant, order + 1)
    return with_corrections(a, b, ends, some, weights)


def with_corrections(a: Tensor, b: Tensor, ends: Tensor, corrected: list[int], weights: Tensor) -> Tensor:
    """The b of `corrected` from the weights of the correctors of some steps."""
    steps = torch.tensor(corrected, device="cpu")
    end, nodes = ends[steps + 1], torch.tensor(corrector_nodes(weights.shape[1] - 1), device="cpu")
    columns = end[:, None] - ends[(steps[:, None] + nodes).clamp(min=0)]
    change = b.new_zeros(len(b), 1 + max(b.shape[1], int(columns.max())))  # C - P of the step before each row
    change[end, 1 : 1 + b.shape[1]] = -b[end - 1]
    change.index_put_((end[:, None], columns), weights, accumulate=True)
    change *= a[:, None]
    change[:, : b.shape[1]] += b
    used = int((change != 0).any(0).nonzero().max()) + 1
    return change[:, :used]


def recommended(
    schedule: Schedule,
    times: Tensor,
    scale: float = 1.0,
    start: str | None = None,
    variable: str = "angle",
) -> Plan:
    """The method that `sample` takes if none is given: UniPC in velocity form, of an order that suits the steps and with polynomials that suit the network.

    Order 5 from 40 steps on; 1 call per step, 4 in the first two of 40 and more; ODE; velocity form. Order p = 2 below 9 steps,
    4 above; the last steps of lower order below 14 steps. On a Discrete schedule it stays on the levels, without the singlestep
    start, and has order 3 in the limit. It is regular where sigma = 0 and, with a network that predicts data, velocity or flow, where alpha = 0.
    Source: this library; chosen by benchmarks/work_precision.py and benchmarks/trained.py, see docs/which-solver.md. In the angle, its natural time, it is
    the classical Adams-Bashforth-Moulton method on the circle alpha = cos(theta), sigma = sin(theta).

    Args:
        schedule: noise schedule.
        times: [steps + 1]; its grid is `angle`, with variable = "asinh" `logalpha`, on discrete levels those of `angle_levels`, `logalpha_levels`.
        scale: the data's standard deviation. 1 suits from 0.2 to 1.5; data in other units want theirs, here and in the grid.
        start: as of `unipc`; "ramp" for 1 call per step throughout. None: "singlestep" from 40 steps on, but for a Discrete schedule.
        variable: "angle", or "asinh" of sigma / alpha for a trained network that predicts noise or the score: it is like log-SNR where alpha is
            small, where such a network knows least of the data, and like the angle near the data. Order p = 2 below 12 steps, 4 above; no corrector below 7; the last
            steps of lower order below 25.
    """
    times = given(schedule, times)
    steps = len(times) - 1
    if choice("variable", variable, ("angle", "asinh")) == "asinh":
        if steps < 7:
            return exponential_adams(schedule, times, 2, "velocity", scale=scale)
        order, final = 2 if steps < 12 else 4, "lower" if steps < 25 else "full"
    else:
        order, final = 2 if steps < 9 else 4, "lower" if steps < 14 else "full"
    return unipc(
        schedule,
        times,
        order=order,
        predicts="velocity",
        variable=variable,
        scale=scale,
        start=start or ("ramp" if steps < 40 or has_levels(schedule) else "singlestep"),
        final=final,
    )


def recommended_for(predicts: str) -> Callable[..., Plan]:
    """`recommended` as it suits a network that predicts noise, or something else."""
    return partial(recommended, variable="asinh") if predicts in PREDICTS_NOISE else recommended


def first_calls(plan: Plan, times: Tensor) -> Tensor:
    """The number, among the calls, of the one that comes first in each step of the outer grid, [steps]."""
    return torch.searchsorted(plan.is_called.nonzero().flatten(), calls_of_steps(plan, times))


def calls_of_steps(plan: Plan, times: Tensor | None) -> Tensor:
    """The number of the row that begins each step: the last one at its time before the next step's, as a stage may stand there before it."""
    if times is None:
        steps = plan.times.diff() * (plan.times[-1] - plan.times[0])
        if not (steps > 0).all():
            raise ValueError(
                "the plan calls twice at one time, so some calls are stages: give the outer steps, corrected(plan, order, times=times)"
            )
        return torch.arange(plan.rows, device="cpu")
    outer = numbers("times", times)
    if not torch.equal(outer[[0, -1]], plan.times[[0, -1]]):
        raise ValueError(
            f"times go from {outer[0]:g} to {outer[-1]:g}: expected the plan's ends, {plan.times[0]:g} and {plan.times[-1]:g}"
        )
    outer = outer[:-1]
    there = plan.times[:-1] == outer[:, None]
    if not there.any(1).all():
        raise ValueError(
            f"times[{int((~there.any(1)).nonzero()[0])}] is not among the times of the plan's calls: give the times it was built on"
        )
    return torch.tensor(calls_at(plan, outer.tolist()), device="cpu")


def calls_at(plan: Plan, outer: list[float]) -> list[int]:
    """The same, of the times of calls that steps begin at: from the last step back, as a restart comes by an outer time again."""
    back, begins, passed = plan.times[:-1].tolist()[::-1], [], 0
    for t in reversed(outer):
        passed = back.index(t, passed) + 1
        begins.append(plan.rows - passed)
    return begins[::-1]

"""Singlestep exponential Runge-Kutta methods: DPM-Solver-1/2/3, DPM-Solver-fast, DPM-Solver++(2S, 3S)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from solvers.arguments import choice, number, whole
from solvers.grids import MAX_STEPS, logsnr
from solvers.methods.exponential import FORMS, RATE, Levels, exact_part, reaches_infinity
from solvers.phi import phi
from solvers.plan import Plan, fold
from solvers.schedules import Schedule

Phi = Callable[..., Tensor]  # (k, c=1.0) -> phi_k(c z), [steps]


def dpm_solver(
    schedule: Schedule, times: Tensor, order: int = 3, r1: float | None = None, r2: float | None = None
) -> Plan:
    """DPM-Solver: singlestep exponential Runge-Kutta in noise form; `times` are the outer steps.

    Order 1, 2 or 3; as many calls per step; ODE; noise form. A step from alpha = 0 has no noise form; a step to
    sigma = 0 is taken with order 1. Stages stand between the outer steps, on a discrete network also between its levels.
    Source: Lu et al. 2022 (arXiv 2206.00927), algorithms 1, 4, 5 (r1, r2 of appendix B).
    Differs: the paper's third order holds at r2 = 2/3 alone and is second at any other; the weights here are those of
    Hochbruck & Ostermann 2005, section 5, which are the paper's at r2 = 2/3 and third order at every r2.

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1].
        order: 1, 2 or 3.
        r1: for order 2 and 3, position of the first stage within a step of half log-SNR; default 1/2, 1/3.
        r2: for order 3, position of the second stage; default 2/3.
    """
    return singlestep(schedule, times, order, "noise", r1, r2)


def dpm_solver_fast(
    schedule: Schedule, nfe: int = 10, *, start: float | None = None, stop: float | None = None
) -> Plan:
    """DPM-Solver-fast: DPM-Solver-3 on a log-SNR-uniform grid, its last steps lowered so that exactly `nfe` calls are made.

    Order 2, by the lowered last steps (3 where nfe = 2 mod 3); ODE; noise form.
    Source: Lu et al. 2022 (arXiv 2206.00927), section 3.4.

    Args:
        schedule: noise schedule.
        nfe: calls, at least 1.
        start: first time; the schedule's own if None.
        stop: last time, with sigma > 0; the schedule's own if None.
    """
    whole("nfe", nfe, 1, MAX_STEPS, example=10)
    thirds, left = divmod(nfe, 3)
    orders = [3] * (thirds - 1) + [2, 1] if left == 0 else [3] * thirds + [left]
    times = logsnr(schedule, len(orders), start=start, stop=stop)
    runs = [
        (order, [i for i, o in enumerate(orders) if o == order]) for order in (3, 2, 1) if order in orders
    ]
    plans = [dpm_solver(schedule, times[steps[0] : steps[-1] + 2], order) for order, steps in runs]
    return sum(plans[1:], plans[0])


def singlestep(
    schedule: Schedule,
    times: Tensor,
    order: int,
    predicts: str,
    r1: float | None = None,
    r2: float | None = None,
) -> Plan:
    """Singlestep DPM-Solver in noise form, DPM-Solver++ in data form: orders 1, 2, 3, as many calls per step.

    Order 2 is the paper's variant: weight phi_1 / (2 r1) of the stage.
    Source: Lu et al. 2022 (arXiv 2206.00927) and (arXiv 2211.01095), algorithm 1; see `dpm_solver`.
    """
    choice("predicts", predicts, FORMS)
    whole("order", order, 1, 3)
    for name, value, least in (("r1", r1, 2), ("r2", r2, 3)):
        if value is not None and order < least:
            raise ValueError(f"{name} = {value!r} has no use with order = {order}: leave it out")
    if order == 1:
        return explicit_exponential(schedule, times, predicts, (0.0,), lambda p: [[]])
    if order == 2:
        c2 = _position("r1", 1 / 2 if r1 is None else r1)
        return explicit_exponential(schedule, times, predicts, (0.0, c2), lambda p: [[], [p(1) / (2 * c2)]])
    c2, c3 = _position("r1", 1 / 3 if r1 is None else r1), _position("r2", 2 / 3 if r2 is None else r2)
    if not c2 < c3 or abs(c2 - 2 / 3) < 0.05:
        raise ValueError(
            f"r1 = {c2:g}, r2 = {c3:g}: order 3 needs r1 < r2 and r1 away from 2/3, where the weights grow without bound, e.g. r1=1/3, r2=2/3"
        )

    def weights(p: Phi) -> list[list[Tensor]]:
        gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))
        b3 = p(2) / (gamma * c2 + c3)
        return [[], [gamma * c2 * p(2, c2) + c3**2 / c2 * p(2, c3)], [gamma * b3, b3]]

    return explicit_exponential(schedule, times, predicts, (0.0, c2, c3), weights)


def explicit_exponential(
    schedule: Schedule,
    times: Tensor,
    predicts: str,
    positions: Sequence[float],
    weights: Callable[[Phi], list[list[Tensor]]],
) -> Plan:
    """Explicit exponential Runge-Kutta method, folded to rows.

    Stage i stands at lam_s + c_i h and is the exact part over c_i h plus scale_i h sum_j a_ij m_j; the step's end likewise
    with b_j. The first output takes what consistency leaves: a_i1 = c_i phi_1(c_i z) - sum_{j > 1} a_ij.
    A step that touches infinite half log-SNR is taken with order 1.
    Source: Hochbruck & Ostermann 2005 (doi 10.1137/040611434), section 2, with z = h (noise form) or -h (data form).

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1].
        predicts: "noise" | "data".
        positions: c_1 = 0, c_2, ..., each in [0, 1], not decreasing.
        weights: from the phi-functions, the weights of outputs 2, 3, ... in stages 2, 3, ... and in the step's end.
    """
    levels = Levels.of(schedule, times)
    infinite = reaches_infinity(levels)
    stages = len(positions)
    if stages > 1 and infinite.any():
        pieces = []
        for first_order, i, j in _runs(infinite):
            tableau = ((0.0,), lambda p: [[]]) if first_order else (positions, weights)
            pieces.append(explicit_exponential(schedule, levels.times[i : j + 1], predicts, *tableau))
        return sum(pieces[1:], pieces[0])
    s, t = levels[:-1], levels[1:]
    h = t.half_logsnr - s.half_logsnr
    inner = [Levels.at(schedule, schedule.time(s.half_logsnr + c * h)) if c < 1 else t for c in positions[1:]]

    def phi_at(k: int, c: float = 1.0) -> Tensor:
        return phi(k, RATE[predicts] * c * h)

    x_weights, table = h.new_zeros(len(h), stages), h.new_zeros(len(h), stages, stages)
    for k, (end, outputs) in enumerate(zip([*inner, t], weights(phi_at), strict=True)):
        x_weights[:, k], total, scale = exact_part(predicts, s, end)
        for j, weight in enumerate(outputs, start=1):
            table[:, k, j] = scale * h * weight
        table[:, k, 0] = total - table[:, k, 1:].sum(1)
    a, b = fold(x_weights, table)

    def at_calls(name: str) -> Tensor:
        calls = torch.stack([getattr(stage, name) for stage in (s, *inner)], 1)
        return torch.cat([calls.flatten(), getattr(t, name)[-1:]])

    return Plan(at_calls("times"), at_calls("alpha"), at_calls("sigma"), a, b, predicts=predicts)


def _position(name: str, value: float) -> float:
    if not 0 < number(name, value) <= 1:
        raise ValueError(f"{name} = {value}: expected a position within the step, 0 < {name} <= 1")
    return float(value)


def _runs(flags: Tensor) -> list[tuple[bool, int, int]]:
    """Runs of equal flags as (flag, first, last + 1)."""
    cuts = [0, *((flags.diff().nonzero().flatten() + 1).tolist()), len(flags)]
    return [(bool(flags[i]), i, j) for i, j in zip(cuts[:-1], cuts[1:], strict=True)]

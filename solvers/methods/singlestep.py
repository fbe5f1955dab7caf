"""Singlestep methods: exponential and classical Runge-Kutta, DPM-Solver-1/2/3, DPM-Solver-fast, 2S, 3S, Heun."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from solvers.arguments import whole
from solvers.grids import MAX_STEPS, logsnr
from solvers.methods.exponential import (
    NATURAL,
    RATE,
    Form,
    Levels,
    noise_weight,
    stochastic_factor,
    touched,
)
from solvers.methods.tableaux import (
    Phi,
    Tableau,
    dpm_solver_2,
    euler,
    krogstad,
    position,
    second_order,
    third_order,
    two_positions,
)
from solvers.phi import phi, phis
from solvers.plan import Piece, Plan, chained, fold
from solvers.schedules import Schedule


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
    return singlestep(schedule, times, whole("order", order, 1, 3), "noise", r1, r2)


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
    levels, form = Levels.at(schedule, times), Form("noise")
    runs = [
        (order, [i for i, o in enumerate(orders) if o == order]) for order in (3, 2, 1) if order in orders
    ]
    pieces = [
        stages(schedule, levels[steps[0] : steps[-1] + 2], singlestep_tableau(order), form)
        for order, steps in runs
    ]
    return chained(pieces).plan("noise")


def heun(schedule: Schedule, times: Tensor, alpha: float = 1.0) -> Plan:
    """Heun's method of EDM and the family it belongs to: a stage at rho_s + alpha (rho_t - rho_s), weights 1 - 1/(2 alpha), 1/(2 alpha).

    Order 2; 2 calls per step; ODE; noise form. The last step to sigma = 0 is Euler's, so 2 N - 1 calls.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 1; the family is in its appendix.

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1].
        alpha: place of the stage in (0, 1]: 1 is Heun's, 2/3 Ralston's, 1/2 the midpoint method.
    """
    return exponential_rk(schedule, times, second_order(position("alpha", alpha)), "noise", "sigma")


def exponential_rk(
    schedule: Schedule,
    times: Tensor,
    tableau: Tableau,
    predicts: str = "data",
    variable: str = "half_logsnr",
    scale: float = 1.0,
) -> Plan:
    """Explicit Runge-Kutta by any tableau of `solvers.tableaux`: exponential in half log-SNR, classical in a natural time.

    Order of the tableau; as many calls per step as it has stages; ODE; noise, data or velocity form. In the natural time of
    a form nothing is left of the linear part, z = 0, and the tableau is classical: in noise form with variable = "sigma"
    these are the rhoRK methods of DEIS. A step to infinite half log-SNR has order 1, and but for the angle one from it.
    Source: Hochbruck & Ostermann 2005 (doi 10.1137/040611434), section 2, with z = h (noise form) or -h (data form);
    rhoRK: Zhang & Chen 2023 (arXiv 2204.13902), section 3.

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1]; stages stand between them, on a discrete network also between its levels.
        tableau: e.g. tableaux.third_order(c2=1/3), tableaux.krogstad.
        predicts: "noise" | "data" | "velocity".
        variable: "half_logsnr" for noise and data form, "sigma" for noise form, "angle" for velocity form.
        scale: of the velocity form.
    """
    form = Form(predicts, variable, scale)
    if not _is_classical(form) and (variable != "half_logsnr" or predicts not in RATE):
        raise ValueError(
            f"predicts = {predicts!r}, variable = {variable!r}: expected variable='half_logsnr' for noise and data, 'sigma' for noise, "
            "'angle' for velocity"
        )
    if not isinstance(tableau, Tableau):
        raise TypeError(f"tableau = {tableau!r:.100}: expected a Tableau, e.g. tableaux.krogstad")
    return runge_kutta(schedule, Levels.of(schedule, times), tableau, form)


def runge_kutta(schedule: Schedule, levels: Levels, tableau: Tableau, form: Form) -> Plan:
    """The steps of a tableau on a grid, with order 1 where half log-SNR is infinite; of an SDE, if the form has a clock."""
    return stages(schedule, levels, tableau, form).plan(form.predicts, form.scale)


def stages(schedule: Schedule, levels: Levels, tableau: Tableau, form: Form) -> Piece:
    """The rows of `runge_kutta`."""
    lowered = first_order_steps(form.variable, levels) & (tableau.stages > 1)
    pieces = [
        _regular_stages(schedule, levels[i : j + 1], euler if first_order else tableau, form)
        for first_order, i, j in _runs(lowered)
    ]
    return chained(pieces) if len(pieces) > 1 else pieces[0]


def textbook_stages(
    schedule: Schedule, s: Levels, t: Levels, tableau: Tableau, form: Form
) -> tuple[list[Levels], Tensor, Tensor]:
    """The steps from s to t by a tableau as a textbook writes them, every stage from the x at the step's start.

    Returns:
        (calls, x_weights, table): the levels of each call; the weight of x in stages 2, 3, ... and in the end, [steps, stages]; the
        weights of the outputs in them, [steps, stages, stages].
    """
    start, count = form.place(s), len(s)
    inner = sorted({c for c in tableau.positions if 0 < c < 1})
    between = {0.0: s, 1.0: t}
    if inner:
        shares = torch.tensor(inner, dtype=torch.float64, device="cpu")[:, None]
        place = (start + shares * (form.place(t) - start)).flatten()
        at = Levels.at(schedule, schedule.time(form.half_logsnr(form.variable, place)), form.clock)
        between |= {c: at[k * count : (k + 1) * count] for k, c in enumerate(inner)}
    calls = [between[c] for c in tableau.positions]
    weights = tableau.weights(phi_of_steps(form, s, t, tableau.positions))
    if [len(row) for row in weights] != (expected := [*range(tableau.stages - 1), tableau.stages - 1]):
        raise ValueError(
            f"the tableau has {[len(row) for row in weights]} weights: expected {expected}, of outputs 2, 3, ... in stages 2, 3, ... "
            "and in the end"
        )
    every = Levels.stacked([*calls, t])  # [stages + 1, steps]
    ends = every[1:]
    x_weights, parts = form.exact_part(s, ends)
    scale = scale_of_weights(form, s, t, ends, parts[-1])
    none, stages = torch.zeros_like(s.sigma), tableau.stages
    entries = [
        [none, *(scale[k] * weight for weight in row), *[none] * (stages - 1 - len(row))]
        for k, row in enumerate(weights)
    ]
    others = torch.stack([entry for row in entries for entry in row]).unflatten(0, (stages, stages))
    others[:, 0] = parts - others.sum(1)  # the first output takes what consistency leaves
    table = others / form.unit(every)[:-1]
    return calls, x_weights.T, table.permute(2, 0, 1)


def phi_of_steps(form: Form, s: Levels, t: Levels, positions: Sequence[float] = ()) -> Phi:
    """What a tableau's weights are made of over the steps from s to t: (k, c = 1) -> phi_k(c z), [steps], at once for c of its positions."""
    h = t.half_logsnr - s.half_logsnr
    if _is_classical(form):  # z = 0
        return lambda k, c=1.0: torch.full_like(h, 1 / math.factorial(k))
    z = RATE[form.predicts] * stochastic_factor(s, t) * h
    shares = sorted({*positions, 1.0})

    @cache
    def known() -> Tensor:
        """phi_1, ..., phi_4 of every share, all that the tableaux here ask for."""
        return phis(4, torch.tensor(shares, dtype=torch.float64, device="cpu")[:, None] * z)

    def p(k: int, c: float = 1.0) -> Tensor:
        return known()[shares.index(c), :, k - 1] if 1 <= k <= 4 and c in shares else phi(k, c * z)

    return p


def scale_of_weights(form: Form, s: Levels, t: Levels, end: Levels, total: Tensor | None = None) -> Tensor:
    """What multiplies a tableau's weights, of steps from s to t, in the stage at `end`, [steps]; `total` by `exact_part`, if it is known."""
    if _is_classical(form):
        total = form.exact_part(s, t)[1] if total is None else total
        return total / form.norm(t) * form.norm(end)
    return form.slope(end) * stochastic_factor(s, t) * (t.half_logsnr - s.half_logsnr)


def _regular_stages(schedule: Schedule, levels: Levels, tableau: Tableau, form: Form) -> Piece:
    """The rows of a tableau on a grid none of whose steps is special."""
    s, t = levels[:-1], levels[1:]
    calls, x_weights, table = textbook_stages(schedule, s, t, tableau, form)
    a, b = fold(x_weights, table)
    c = a.new_zeros(len(a), 0)
    if form.clock is not None:  # each row adds the noise of its own part of the step
        parts = zip(calls, [*calls[1:], t], strict=True)
        c = torch.stack([noise_weight(form, *ends) for ends in parts], 1).reshape(-1, 1)
    return Piece(*at_calls(calls, t), a, b, c)


def at_calls(calls: list[Levels], t: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Times, alpha and sigma of every call of steps that call at some levels each, and of the end."""

    def flat(name: str) -> Tensor:
        return torch.cat(
            [torch.stack([getattr(call, name) for call in calls], 1).flatten(), getattr(t, name)[-1:]]
        )

    return flat("times"), flat("alpha"), flat("sigma")


def _is_classical(form: Form) -> bool:
    """Whether stages are placed in the natural time, where nothing is left of the linear part."""
    return form.variable == NATURAL.get(form.predicts)


def singlestep(
    schedule: Schedule,
    times: Tensor,
    order: int,
    predicts: str,
    r1: float | None = None,
    r2: float | None = None,
    scale: float = 1.0,
) -> Plan:
    """Orders 1 to 4 at as many calls per step: DPM-Solver (noise form), DPM-Solver++ (data form), classical in theta (velocity form).

    Order 2 is the paper's variant: weight phi_1 / (2 r1) of the stage. Order 4 is Krogstad's.
    Source: Lu et al. 2022 (arXiv 2206.00927) and (arXiv 2211.01095), algorithm 1; see `dpm_solver`.
    """
    tableau = singlestep_tableau(order, r1, r2)
    return exponential_rk(schedule, times, tableau, predicts, singlestep_variable(predicts), scale)


def singlestep_tableau(order: int, r1: float | None = None, r2: float | None = None) -> Tableau:
    """The tableau of `singlestep`."""
    whole("order", order, 1, 4)
    for name, value, least in (("r1", r1, (2, 3)), ("r2", r2, (3,))):
        if value is not None and order not in least:
            raise ValueError(f"{name} = {value!r} has no use with order = {order}: leave it out")
    if order == 2:
        return dpm_solver_2(position("r1", 1 / 2 if r1 is None else r1))
    if order == 3:
        places = two_positions(r1=1 / 3 if r1 is None else r1, r2=2 / 3 if r2 is None else r2)
        return third_order(*places)
    return euler if order == 1 else krogstad


def singlestep_variable(predicts: str) -> str:
    """The variable in which `singlestep` places its stages."""
    return "angle" if predicts == "velocity" else "half_logsnr"


def first_order_steps(variable: str, levels: Levels) -> Tensor:
    """Which steps a Runge-Kutta method takes with order 1: to and, but for the angle, from infinite half log-SNR, [steps].

    In the angle a step from alpha = 0 is like any other. Into sigma = 0 a stage may stand at the end, where not every network can
    be asked.
    """
    infinite = levels.half_logsnr.isinf()
    return infinite[1:] if variable == "angle" else touched(infinite)


def _runs(flags: Tensor) -> list[tuple[bool, int, int]]:
    """Runs of equal flags as (flag, first, last + 1)."""
    values = flags.tolist()
    cuts = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
    return [(values[i], i, j) for i, j in pairwise(cuts)]

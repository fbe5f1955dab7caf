"""Multistep methods: exponential Adams of any order and form: DDIM, DPM-Solver(++) multistep, DEIS, LMS; PNDM."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from solvers.arguments import choice, number, whole
from solvers.methods.exponential import Form, Levels, interpolatory, refuse_no_data
from solvers.methods.singlestep import (
    at_calls,
    first_order_steps,
    singlestep,
    singlestep_tableau,
    singlestep_variable,
    stages,
)
from solvers.plan import Piece, Plan, chained, fold
from solvers.schedules import Schedule

MAX_ORDER = 8
MAX_STARTED = 5  # one above the highest singlestep order
STARTS, FINALS, KINDS = ("ramp", "singlestep"), ("full", "lower"), ("multistep", "singlestep")
VARIANTS = ("bh1", "bh2", "vary_coeff")


def ddim(schedule: Schedule, times: Tensor, eta: float = 0.0) -> Plan:
    """DDIM: exponential Euler, the data prediction held over the step; DPM-Solver-1; Euler in sigma; with eta = 1 the DDPM posterior step.

    Order 1; 1 call per step; ODE (eta = 0) or SDE; data form.
    Source: Song, Meng & Ermon 2021 (arXiv 2010.02502), eq. 12 and 16: x_t = alpha_t x_0 + sigma_t (sqrt(1 - q^2) eps + q z)
    with q^2 = eta^2 (1 - e^{-2h}).

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        eta: share of the posterior's noise, in [0, 1].
    """
    levels = Levels.of(schedule, times)
    a, total, deviation = first_order_step(levels, eta)
    c = deviation[:, None] if eta else deviation[:0]
    return Plan(levels.times, levels.alpha, levels.sigma, a, total[:, None], c, predicts="data")


def first_order_step(levels: Levels, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of eq. 16 in data form: the weights of x and x_0, and the standard deviation sigma_t q, each [steps].

    x_t = alpha_t x_0 + sigma_t (sqrt(1 - q^2) eps + q z), q^2 = eta^2 (1 - e^{-2h}).
    """
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"eta = {eta}: expected a number from 0 (deterministic) to 1 (DDPM)")
    s, t = levels[:-1], levels[1:]
    if not eta:
        return *Form("data").exact_part(s, t), torch.zeros_like(t.sigma)
    if (t.half_logsnr < s.half_logsnr).any():
        raise ValueError(f"eta = {eta}: from data to noise there is eta = 0 alone; leave it out")
    fraction = eta**2 * -torch.expm1(-2 * (t.half_logsnr - s.half_logsnr))
    a = t.sigma / s.sigma * torch.sqrt(1 - fraction)
    return a, t.alpha - a * s.alpha, t.sigma * torch.sqrt(fraction)


def exponential_adams(
    schedule: Schedule,
    times: Tensor,
    order: int,
    predicts: str = "data",
    variable: str = "half_logsnr",
    scale: float = 1.0,
    start: str = "ramp",
    final: str = "full",
) -> Plan:
    """Exponential Adams-Bashforth: the prediction's polynomial through past calls, integrated exactly over the form's natural time.

    Order p with start = "singlestep" (p <= 5), else 2 for p >= 3; 1 call per step; ODE; noise, data or velocity form. The rows
    have order p for every p; a method has it only if its start does. start = "ramp" begins with orders 1, 2, ..., cheap and
    often as good in practice, of order 2 in the limit; start = "singlestep" takes the first p - 1 steps by singlestep
    methods of order p - 1, at (p - 1)^2 calls.
    The velocity form is exact on Gaussian data of standard deviation `scale`, and regular where alpha = 0 or sigma = 0.
    Source: Hochbruck & Ostermann 2010 (doi 10.1017/S0962492910000048), section 2.5, in the variables of Lu et al. 2022.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: 1 to 8.
        predicts: "noise" | "data" | "velocity".
        variable: what the polynomial is in: "half_logsnr" | "t" | "sigma" (sigma / alpha) | "angle" (arctan(sigma / (scale alpha))) |
            "asinh" (arsinh(sigma / (scale alpha)): like the angle where that is small, like log-SNR where it is large).
        scale: of the velocity form: 1 for v, the data's standard deviation for EDM's F.
        start: "ramp" | "singlestep", how the history is begun.
        final: "full" | "lower"; "lower" ends with orders p - 1, ..., 1, steadier where the last steps of half log-SNR
            are large. A last step to sigma = 0 has order 1 where the variable or the natural time is infinite there.
    """
    whole("order", order, 1, MAX_ORDER)
    return adams(schedule, times, order, Form(predicts, variable, scale), start, final)


def dpm_solver_multistep(
    schedule: Schedule, times: Tensor, order: int = 3, start: str = "ramp", final: str = "full"
) -> Plan:
    """DPM-Solver multistep in noise form.

    Order 1, 2 or 3; 1 call per step; ODE; noise form. Third order needs start = "singlestep"; a ramp leaves order 2 overall.
    Source: Lu et al. 2022 (arXiv 2206.00927), released code. Differs: that code's third order lacks the factor 2 of the
    second difference and is of second order; here the weights are exact (`exponential_adams`).
    See `exponential_adams` for start and final.
    """
    whole("order", order, 1, 3)
    return adams(schedule, times, order, Form("noise"), start, final, "bh2")


def dpm_solver_pp(
    schedule: Schedule,
    times: Tensor,
    order: int = 2,
    kind: str = "multistep",
    start: str = "ramp",
    final: str = "full",
) -> Plan:
    """DPM-Solver++(2M, 3M) or, with kind = "singlestep", DPM-Solver++(2S, 3S).

    Order 1, 2 or 3; multistep 1 call per step, singlestep as many as the order; ODE; data form. Third order multistep
    needs start = "singlestep"; a ramp leaves order 2 overall.
    Source: Lu et al. 2022 (arXiv 2211.01095), algorithms 1 and 2. Differs: the released third-order multistep lacks the
    factor 2 of the second difference and is of second order; here its weights are exact (`exponential_adams`).
    See `exponential_adams` for start and final, which belong to kind = "multistep".
    """
    whole("order", order, 1, 3)
    if choice("kind", kind, KINDS) == "multistep":
        return adams(schedule, times, order, Form("data"), start, final, "bh2")
    if (start, final) != ("ramp", "full"):
        raise ValueError(
            f"start = {start!r}, final = {final!r} have no use with kind = 'singlestep': leave them out"
        )
    return singlestep(schedule, times, order, "data")


def deis(
    schedule: Schedule,
    times: Tensor,
    order: int = 3,
    variable: str = "t",
    start: str = "ramp",
    final: str = "full",
) -> Plan:
    """DEIS: tAB, rhoAB or, with variable = "half_logsnr", log-rho AB.

    Order p with start = "singlestep" (p <= 5), else 2 for p >= 3; 1 call per step; ODE; noise form.
    On a Discrete schedule t bends at the levels, and the integrals over t keep 1e-4 of their value.
    Source: Zhang & Chen 2023 (arXiv 2204.13902), tAB-DEIS and rhoAB-DEIS; its "order r" is a polynomial of degree r, here order r + 1.
    Differs: the released code integrates by Riemann sums, with relative errors of 1e-4; here the weights are closed forms or
    Gauss-Legendre in float64. rhoRK is `exponential_rk` with predicts="noise", variable="sigma".
    See `exponential_adams` for start and final.
    """
    whole("order", order, 1, MAX_ORDER)
    return adams(schedule, times, order, Form("noise", variable), start, final)


def lms(schedule: Schedule, times: Tensor, order: int = 4, start: str = "ramp", final: str = "full") -> Plan:
    """LMS, the variable-step Adams-Bashforth method in sigma / alpha; rhoAB of DEIS.

    Order p with start = "singlestep" (p <= 5), else 2 for p >= 3; 1 call per step; ODE; noise form.
    Source: Katherine Crowson's k-diffusion, sample_lms, which integrates by adaptive quadrature; here in closed form.
    See `exponential_adams` for start and final.
    """
    return deis(schedule, times, order, "sigma", start, final)


def ipndm(schedule: Schedule, times: Tensor, order: int = 4) -> Plan:
    """iPNDM: the Adams-Bashforth weights of equal steps in sigma / alpha, whatever the steps are; begun by orders 1, 2, ...

    Order 2 for every `order` above 1, 1 where steps never settle; 1 call per step; ODE; noise form. Only on a grid of equal steps in sigma / alpha do the
    rows have order `order`; `ipndm_v` has the weights of the steps taken.
    Source: Zhang & Chen 2023 (arXiv 2204.13902), after Liu et al. 2022 (arXiv 2202.09778).

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: 1 to 4, the number of past outputs in a row.
    """
    whole("order", order, 1, 4)
    levels = Levels.of(schedule, times)
    a, total = Form("noise").exact_part(levels[:-1], levels[1:])
    orders = [min(i + 1, order) for i in range(len(a))]
    return Plan(
        levels.times, levels.alpha, levels.sigma, a, total[:, None] * _equal_steps(orders), predicts="noise"
    )


def ipndm_v(
    schedule: Schedule, times: Tensor, order: int = 4, start: str = "ramp", final: str = "full"
) -> Plan:
    """iPNDM with the weights of the steps taken, which makes it `lms`.

    Order p with start = "singlestep" (p <= 5), else 2 for p >= 3; 1 call per step; ODE; noise form.
    Source: Zhou et al. 2024 (arXiv 2312.00094), released code. Differs: that code's third- and fourth-order weights have
    (1 - AB) / 2 for (1 - A) B / 2 and hold on equal steps alone; here they are exact.
    """
    return lms(schedule, times, order, start, final)


def pndm(schedule: Schedule, times: Tensor) -> Plan:
    """PNDM: iPNDM of order 4, begun by three pseudo Runge-Kutta steps with their middle at the middle of t.

    Order 2, 1 where steps never settle; 1 call per step, 4 in each of the first three; ODE; noise form.
    Source: Liu et al. 2022 (arXiv 2202.09778), algorithm 2.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
    """
    levels = Levels.of(schedule, times)
    refuse_no_data("pndm", levels)
    started = min(3, len(levels.times) - 1)
    s, t = levels[:started], levels[1 : started + 1]
    middle = Levels.at(schedule, (s.times + t.times) / 2)
    form = Form("noise")
    ends = [form.exact_part(s, end) for end in (middle, middle, t, t)]
    shares = torch.tensor(
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1 / 6, 1 / 3, 1 / 3, 1 / 6]],
        dtype=torch.float64,
        device="cpu",
    )
    weights = torch.stack([total[:, None] * share for (_, total), share in zip(ends, shares, strict=True)], 1)
    a, b = fold(torch.stack([a for a, _ in ends], 1), weights)

    head = Piece(*at_calls([s, middle, middle, t], t), a, b, a.new_zeros(len(a), 0))
    steps = len(levels.times) - 1
    if started == steps:
        return head.plan("noise")
    a, total = form.exact_part(levels[started:-1], levels[started + 1 :])
    calls = torch.tensor([0, 4, 8, *range(12, 12 + steps - started)], device="cpu")
    b = at_columns(total[:, None] * _equal_steps([4] * (steps - started)), calls, started)
    return chained([head, rows_on(levels[started:], a, b)]).plan("noise")


def adams(
    schedule: Schedule,
    times: Tensor,
    order: int,
    form: Form,
    start: str = "ramp",
    final: str = "full",
    variant: str = "vary_coeff",
    starting: tuple[int, int] | None = None,
) -> Plan:
    """Adams rows behind a ramp or a singlestep start; see `adams_on`."""
    levels = Levels.of(schedule, times)
    rows, *_ = adams_on(schedule, levels, order, form, start, final, variant, starting)
    return rows.plan(form.predicts, form.scale)


def adams_on(
    schedule: Schedule,
    levels: Levels,
    order: int,
    form: Form,
    start: str,
    final: str,
    variant: str,
    starting: tuple[int, int] | None,
    corrector: bool = False,
) -> tuple[Piece, Tensor, list[int], Tensor]:
    """Adams steps behind a ramp or a singlestep start.

    Args:
        schedule: noise schedule.
        levels: the grid.
        order: of the rows.
        form: of the prediction, and the variable of its polynomial.
        start: "ramp" | "singlestep".
        final: "full" | "lower".
        variant: weight of the past call in rows of order 2; see `first_moment`.
        starting: (steps, order) of a singlestep start, if not (p - 1, p - 1).
        corrector: whether the weights of the correctors of `corrected_steps` are asked for.

    Returns:
        (rows, calls, corrected, corrections): the rows; the number of each step's first call, and behind them all, [steps + 1];
        the steps that have a corrector, and its weights, as `adams_tables` has them.
    """
    choice("start", start, STARTS)
    choice("final", final, FINALS)
    steps = len(levels.times) - 1
    calls, orders = torch.arange(steps + 1, device="cpu"), orders_of_steps(levels, form, order, final)
    started, start_order = (0, 0) if start == "ramp" or order < 3 else starting or (order - 1, order - 1)
    if started:
        if start_order >= MAX_STARTED:
            raise ValueError(
                f"order = {order} with start = 'singlestep': expected a whole number from 1 to {MAX_STARTED}, or start='ramp'"
            )
        place = Form(form.predicts, singlestep_variable(form.predicts), form.scale)
        lowered = first_order_steps(place.variable, levels).tolist()
        started = min(started + lowered[0], steps)
        head = stages(schedule, levels[: started + 1], singlestep_tableau(start_order), place)
        made = [1 if first_order else start_order for first_order in lowered[:started]]
        first = accumulate([*made, *[1] * (steps - started)], initial=0)
        calls = torch.tensor([*first], device="cpu")
        if started == steps:
            return head, calls, [], head.b[:0]

    some = corrected_steps(form, levels, calls) if corrector else []
    a, weights, corrections = adams_tables(schedule, form, levels, orders, started, some, variant)
    if not started:
        return rows_on(levels, a, weights), calls, some, corrections
    rows = rows_on(levels[started:], a, at_columns(weights, calls, started))
    return chained([head, rows]), calls, some, corrections


def rows_on(levels: Levels, a: Tensor, b: Tensor) -> Piece:
    """Rows of an ODE method, one a step."""
    return Piece(levels.times, levels.alpha, levels.sigma, a, b, a.new_zeros(len(a), 0))


def adams_rows(
    schedule: Schedule, form: Form, levels: Levels, orders: list[int], variant: str
) -> tuple[Tensor, Tensor]:
    """The last len(orders) steps of a grid, each of its order: the weights of x, [rows], and of the outputs, [rows, max order]."""
    first = len(levels.times) - 1 - len(orders)
    return adams_tables(schedule, form, levels, [1] * first + orders, first, [], variant)[:2]


def adams_tables(
    schedule: Schedule | None,
    form: Form,
    levels: Levels,
    orders: list[int],
    first: int,
    corrected: list[int],
    variant: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of a grid from the first on, each of its order, and correctors of some, all in one pass.

    Returns:
        (a, b, corrections): the weights of x, [rows], and of the outputs, [rows, max order]; and those in the correctors, of
        `corrector_nodes`, [corrected, max order + 1].
    """
    s, most = levels[:-1], max(orders[first:])
    a, total = form.exact_part(s, levels[1:])
    weights = torch.cat([(total / form.unit(s))[first:, None], a.new_zeros(len(a) - first, most - 1)], 1)
    above = [i for i in range(first, len(orders)) if orders[i] > 1]
    if not (above or corrected):
        return a[first:], weights, weights[:0]
    counts = [orders[i] for i in above] + [orders[i] + 1 for i in corrected]
    kinds = [0] * len(above) + [1] * len(corrected)
    steps, count, kind = torch.tensor([above + corrected, counts, kinds], device="cpu")
    nodes = [
        [*range(0, -max(orders) - 1, -1)],
        corrector_nodes(max(orders)),
    ]  # of one length, with or without
    at = torch.tensor(nodes, device="cpu")[kind]
    every = adams_weights(schedule, form, levels, steps, at, variant, count, total[steps])
    weights[steps[: len(above)] - first] = every[: len(above), :most]
    return a[first:], weights, every[len(above) :]


def corrector_nodes(order: int) -> list[int]:
    """The grid points that a corrector reads, counted from the one where its step begins: that, the step's end, and those before."""
    return [0, 1, *range(-1, -order, -1)]


def corrected_steps(form: Form, levels: Levels, ends: Tensor) -> list[int]:
    """The steps that a corrector goes with: of one call, with one at their end, and nowhere infinite."""
    infinite, calls = form.is_infinite(levels), ends.diff().tolist()
    return [i for i in range(len(calls) - 1) if calls[i] == 1 and not (infinite[i] or infinite[i + 1])]


def adams_weights(
    schedule: Schedule | None,
    form: Form,
    levels: Levels,
    steps: Tensor,
    nodes: Sequence[int] | Tensor,
    variant: str,
    counts: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Weights of the outputs at some nodes that integrate their polynomial over each step.

    Args:
        schedule: for polynomials in t alone.
        form: of the prediction, and the variable of its polynomial.
        levels: the grid.
        steps: the steps' numbers, [rows].
        nodes: grid points, counted from the one where the step begins: 0, which takes what consistency leaves, then the others;
            [nodes], or [rows, nodes] for each its own.
        variant: of the weight of one other node; see `first_moment`.
        counts: how many of the nodes, the first of them, each row has, [rows]; None for all.
        total: of the steps, by `Form.exact_part`, if it is known.

    Returns:
        [rows, nodes].
    """
    s, t = levels[steps], levels[steps + 1]
    total = form.exact_part(s, t)[1] if total is None else total
    at = steps[:, None] + (nodes if isinstance(nodes, Tensor) else torch.tensor(nodes, device="cpu"))
    size = at.shape[1]
    if size == 1:
        return (total / form.unit(s))[:, None]
    if counts is None:
        counts = torch.full_like(steps, size)
    at = torch.where(torch.arange(size, device="cpu") < counts[:, None], at, steps[:, None])
    moments = form.moments(schedule, s, t, total, size - 1)
    if variant != "vary_coeff" and (two := counts == 2).any():
        first = first_moment(form, s, t, total, variant)
        moments[:, 0] = torch.where(two, first, moments[:, 0])
    place = form.place(levels)
    places, end = place[at], place[steps + 1]
    here = places[:, :1]
    others = interpolatory((places[:, 1:] - here) / (end[:, None] - here), moments)
    return torch.cat([total[:, None] - others.sum(1, keepdim=True), others], 1) / form.unit(levels)[at]


def first_moment(form: Form, s: Levels, t: Levels, total: Tensor, variant: str) -> Tensor:
    """The moment of k = 1 as a paper has it, [rows]: where one other node is in a row the moment is all that matters.

    "vary_coeff" has the exact one; "bh2" has half the sum of the weights, B(h) = e^z - 1 (DPM-Solver multistep, 2M); "bh1" has half
    of what the prediction at the end would weigh over the step, B(h) = z.
    Source: Zhao et al. 2023 (arXiv 2302.04867), section 3.
    """
    if choice("variant", variant, VARIANTS) == "bh2":
        return total / 2
    if form.variable != "half_logsnr":
        raise ValueError(
            f"variant = 'bh1' with variable = {form.variable!r}: B(h) = h is a step of half log-SNR; take variant='bh2'"
        )
    return form.slope(t) * (t.half_logsnr - s.half_logsnr) / 2


def orders_of_steps(levels: Levels, form: Form, order: int, final: str = "full") -> list[int]:
    """The order of each step: what its history allows, lowered at the end if asked, 1 where time or variable are infinite."""
    steps = len(levels.times) - 1
    infinite = form.is_infinite(levels)
    nodes = [*accumulate(not at for at in infinite)]
    most = [steps - i if final == "lower" else order for i in range(steps)]
    return [1 if infinite[i] or infinite[i + 1] else min(order, nodes[i], most[i]) for i in range(steps)]


def at_columns(weights: Tensor, calls: Tensor, started: int) -> Tensor:
    """Weights of the outputs at grid points, [rows, q], in the columns of their calls, for the steps from `started` on."""
    rows, q = weights.shape
    node = torch.arange(started, started + rows, device="cpu")[:, None]
    read = node - torch.arange(q, device="cpu")
    columns = torch.where(read >= 0, calls[node] - calls[read.clamp(min=0)], 0)
    used = torch.where(weights != 0, columns, 0)
    return weights.new_zeros(rows, 1 + int(used.max())).scatter_add_(1, used, weights)


def _equal_steps(orders: list[int]) -> Tensor:
    """Adams-Bashforth weights of equal steps, [rows, max order], each row summing to 1: {1}, {3, -1} / 2, {23, -16, 5} / 12, ..."""
    k = torch.arange(1, max(orders), dtype=torch.float64, device="cpu")
    has = k < torch.tensor(orders, device="cpu")[:, None]
    past = interpolatory(torch.where(has, -k, 0.0), (1 / (k + 1)).expand(has.shape))
    return torch.cat([1 - past.sum(1, keepdim=True), past], 1)

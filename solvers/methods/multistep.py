"""Exponential Adams methods of any order: DDIM, DPM-Solver(++) multistep."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.arguments import choice, number, whole
from solvers.methods.exponential import FORMS, RATE, Levels, exact_part, reaches_infinity
from solvers.methods.singlestep import singlestep
from solvers.phi import moment
from solvers.plan import Plan, stacked
from solvers.schedules import Schedule

Weights = Callable[
    [Tensor, Tensor, float], Tensor
]  # (offsets [rows, q-1], h [rows], rate) -> weights [rows, q-1]

MAX_ORDER = 8
MAX_STARTED = 4  # one above the highest singlestep order
STARTS, FINALS, KINDS = ("ramp", "singlestep"), ("full", "lower"), ("multistep", "singlestep")


def ddim(schedule: Schedule, times: Tensor, eta: float = 0.0) -> Plan:
    """DDIM: exponential Euler, the data prediction held over the step; DPM-Solver-1; with eta = 1 the DDPM posterior step.

    Order 1; 1 call per step; ODE (eta = 0) or SDE; data form.
    Source: Song, Meng & Ermon 2021 (arXiv 2010.02502), eq. 12 and 16: x_t = alpha_t x_0 + sigma_t (sqrt(1 - q^2) eps + q z)
    with q^2 = eta^2 (1 - e^{-2h}).

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        eta: share of the posterior's noise, in [0, 1].
    """
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"eta = {eta}: expected a number from 0 (deterministic) to 1 (DDPM)")
    levels = Levels.of(schedule, times)
    s, t = levels[:-1], levels[1:]
    fraction = eta**2 * -torch.expm1(-2 * (t.half_logsnr - s.half_logsnr))
    a = t.sigma / s.sigma * torch.sqrt(1 - fraction)
    c = (t.sigma * torch.sqrt(fraction))[:, None] if eta else a.new_zeros(len(a), 0)
    return Plan(levels.times, levels.alpha, levels.sigma, a, (t.alpha - a * s.alpha)[:, None], c, "data")


def exponential_adams(
    schedule: Schedule,
    times: Tensor,
    order: int,
    predicts: str = "data",
    start: str = "ramp",
    final: str = "full",
) -> Plan:
    """Exponential Adams-Bashforth: the prediction's polynomial in half log-SNR through past calls, integrated exactly.

    Order p with start = "singlestep" (p <= 4), else 2 for p >= 3; 1 call per step; ODE; noise or data form. The rows have
    order p for every p; a method has it only if its start does. start = "ramp" begins with orders 1, 2, ..., cheap and often
    as good in practice, of order 2 in the limit; start = "singlestep" takes the first p - 1 steps by singlestep methods of
    order p - 1, at (p - 1)^2 calls.
    Source: Hochbruck & Ostermann 2010 (doi 10.1017/S0962492910000048), section 2.5, in the variables of Lu et al. 2022.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: 1 to 8.
        predicts: "noise" | "data".
        start: "ramp" | "singlestep", how the history is begun.
        final: "full" | "lower"; "lower" ends with orders p - 1, ..., 1, steadier where the last steps of half log-SNR
            are large. A last step to sigma = 0 always has order 1.
    """
    whole("order", order, 1, MAX_ORDER)
    return _multistep(schedule, times, order, predicts, start, final, second_order=_fitted)


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
    return _multistep(schedule, times, order, "noise", start, final, second_order=_midpoint)


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
        return _multistep(schedule, times, order, "data", start, final, second_order=_midpoint)
    if (start, final) != ("ramp", "full"):
        raise ValueError(
            f"start = {start!r}, final = {final!r} have no use with kind = 'singlestep': leave them out"
        )
    return singlestep(schedule, times, order, "data")


def _multistep(
    schedule: Schedule,
    times: Tensor,
    order: int,
    predicts: str,
    start: str,
    final: str,
    second_order: Weights,
) -> Plan:
    """Adams rows behind a ramp or a singlestep start; second_order gives the weights of rows of order 2."""
    choice("predicts", predicts, FORMS)
    choice("start", start, STARTS)
    choice("final", final, FINALS)
    levels = Levels.of(schedule, times)
    steps = len(levels.times) - 1
    started = 0
    if start == "singlestep" and order > 2:
        if order > MAX_STARTED:
            raise ValueError(
                f"order = {order} with start = 'singlestep': expected a whole number from 1 to {MAX_STARTED}, or start='ramp'"
            )
        started = min(order - 1 + int(levels.half_logsnr[0].isinf()), steps)
    head = singlestep(schedule, levels.times[: started + 1], order - 1, predicts) if started else None
    if head is not None and started == steps:
        return head

    orders = _orders(levels, order, final)[started:]
    calls = _calls_of_nodes(levels, order - 1, started)
    s, t = levels[started:-1], levels[started + 1 :]
    a, total, scale = exact_part(predicts, s, t)
    reach = max(int(calls[i] - calls[i - q + 1]) for i, q in enumerate(orders, start=started))
    b = a.new_zeros(len(a), 1 + reach)
    for q in set(orders) - {1}:
        rows = torch.tensor([i for i, o in enumerate(orders) if o == q], device="cpu")
        nodes = (rows + started)[:, None] - torch.arange(1, q, device="cpu")
        here = s.half_logsnr[rows]
        weights = second_order if q == 2 else _fitted
        columns = calls[rows + started][:, None] - calls[nodes]
        offsets = levels.half_logsnr[nodes] - here[:, None]
        b[rows[:, None], columns] = scale[rows, None] * weights(
            offsets, t.half_logsnr[rows] - here, RATE[predicts]
        )
    b[:, 0] = total - b.sum(1)
    if head is None:
        return Plan(levels.times, levels.alpha, levels.sigma, a, b, predicts=predicts)

    def behind_head(name: str) -> Tensor:
        return torch.cat([getattr(head, name)[:-1], getattr(levels, name)[started:]])

    grid = (behind_head("times"), behind_head("alpha"), behind_head("sigma"))
    return Plan(*grid, torch.cat([head.a, a]), stacked(head.b, b), predicts=predicts)


def _orders(levels: Levels, order: int, final: str) -> list[int]:
    """The order of each step: what its history allows, lowered at the end if asked, 1 at infinite half log-SNR."""
    steps = len(levels.times) - 1
    finite = torch.isfinite(levels.half_logsnr).cumsum(0)[:-1].tolist()
    infinite = reaches_infinity(levels).tolist()
    most = [steps - i if final == "lower" else order for i in range(steps)]
    return [1 if infinite[i] else min(order, finite[i], most[i]) for i in range(steps)]


def _calls_of_nodes(levels: Levels, start_order: int, started: int) -> Tensor:
    """The number of the call made at each grid point: the first `started` steps make start_order calls, the rest one."""
    per_step = torch.ones(len(levels.times) - 1, dtype=torch.long, device="cpu")
    per_step[:started] = torch.where(reaches_infinity(levels)[:started], 1, start_order)
    return per_step.cumsum(0) - per_step


def _fitted(offsets: Tensor, h: Tensor, rate: float) -> Tensor:
    """Weights w_j that integrate polynomials exactly: sum_j w_j d_j^k = k! h^{k+1} phi_{k+1}(rate h), k = 1..q-1.

    Args:
        offsets: d_j, half log-SNR of the past calls from the current one, [rows, q - 1].
        h: step lengths, [rows].
        rate: of the kernel.

    Returns:
        [rows, q - 1]; the current call takes what consistency leaves, which is k = 0.
    """
    powers = torch.arange(1, offsets.shape[1] + 1, device="cpu")
    ratios = offsets / h[:, None]
    moments = torch.stack([moment(k, h, rate) / h**k for k in powers.tolist()], 1)
    return torch.linalg.solve(ratios[:, None, :] ** powers[:, None], moments)


def _midpoint(offsets: Tensor, h: Tensor, rate: float) -> Tensor:
    """The second-order weight of the papers: h phi_1 / 2 in place of h phi_2, before the divided difference."""
    return moment(0, h, rate)[:, None] / 2 * h[:, None] / offsets

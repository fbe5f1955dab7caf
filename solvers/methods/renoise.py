"""Noise between the steps of any ODE method: the ancestral form, EDM's churn, Restart."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from solvers.arguments import number, whole
from solvers.grids import has_levels, karras, on_grid, trailing
from solvers.methods.exponential import Levels, refuse_falling, refuse_upwards
from solvers.methods.singlestep import heun
from solvers.methods.unipc import calls_at
from solvers.plan import Piece, Plan, joined, nonzero
from solvers.schedules import BothWays, Schedule

Build = Callable[[Schedule, Tensor], Plan]
TRIED = 8  # steps on which it is seen whether a method reads calls of earlier steps


def ancestral(schedule: Schedule, times: Tensor, method: Build = heun, eta: float = 1.0) -> Plan:
    """Ancestral steps with any one-step ODE method: from s to a time cleaner than t, then noise up to t.

    Order of the method, in law, and also above 2: if the ODE's step is exact, so is the law, whatever the step; as many calls per step
    as the method's; SDE; the method's form. With rho_down = rho_t sqrt(1 - q^2), q^2 = eta^2 (1 - e^{-2h}); with DDIM it is `ddim`
    of that eta. Where the schedule ends before rho_down (VE, LogSNR) a step goes down to its end, and less noise is added.
    Source: Katherine Crowson's k-diffusion, get_ancestral_step, as in sample_dpmpp_2s_ancestral.

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1].
        method: (schedule, times) -> plan of an ODE method that reads no call of an earlier step, e.g. heun, functools.partial(dpm_solver_pp, kind="singlestep").
        eta: share of the noise, in [0, 1]; 0 is the method itself.
    """
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"eta = {eta}: expected a number from 0 (the method itself) to 1")
    times, lam = _grid(schedule, times)
    if not eta:
        _check_one_step("ancestral", schedule, times, method)
        return _built(method, schedule, times)
    down = lam[1:] - torch.log1p(eta**2 * torch.expm1(-2 * lam.diff())) / 2
    ends = torch.where(lam[1:].isinf(), times[1:], schedule.time(down))
    return _renoised("ancestral", schedule, method, times, times[:-1], _within(schedule, ends))


def churn(
    schedule: Schedule,
    times: Tensor,
    method: Build = heun,
    amount: float = 40.0,
    low: float = 0.0,
    high: float = math.inf,
    noise_scale: float = 1.0,
) -> Plan:
    """EDM's stochastic sampler with any one-step ODE method: before a step noise is added, up to rho (1 + gamma).

    Order of the method, in law, with noise_scale = 1; as many calls per step as the method's; SDE; the method's form. gamma =
    min(amount / steps, sqrt(2) - 1) in steps that begin between the times `low` and `high`, else 0. No level is
    noisier than a bounded schedule's start; on a Discrete one it is the nearest that the network knows.
    Source: Karras et al. 2022 (arXiv 2206.00364), algorithm 2; there amount is S_churn, low S_tmin, high S_tmax, noise_scale S_noise,
    40, 0.05, 50, 1.003 on ImageNet.

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1].
        method: (schedule, times) -> plan of an ODE method that reads no call of an earlier step.
        amount: S_churn, from 0, where the plan is the method's.
        low: least time that is churned.
        high: greatest time that is churned; on EDM, which has no noisiest level, the authors leave out those above 50.
        noise_scale: of the added noise; a little above 1 makes up for networks that take out too much.
    """
    for name, value in (("amount", amount), ("noise_scale", noise_scale)):
        if not 0 <= number(name, value) < math.inf:
            raise ValueError(f"{name} = {value}: expected a finite number from 0")
    if not 0 <= number("low", low) <= number("high", high):
        raise ValueError(f"low = {low}, high = {high}: expected times with 0 <= low <= high")
    times, lam = _grid(schedule, times)
    starts = times[:-1]
    gamma = min(amount / len(starts), math.sqrt(2) - 1)
    churned = (starts >= low) & (starts <= high) & lam[:-1].isfinite()
    if not gamma or not churned.any():
        _check_one_step("churn", schedule, times, method)
        return _built(method, schedule, times)
    noisier = schedule.time(lam[:-1] - math.log1p(gamma))
    if has_levels(schedule):
        count = schedule.levels  # type: ignore[attr-defined]
        noisier = (noisier * count).round() / count
    noisier = torch.where(churned, torch.maximum(noisier, starts), starts)
    begins = _within(schedule, noisier)
    return _renoised("churn", schedule, method, times, begins, times[1:], noise_scale)


def restart(
    schedule: Schedule,
    times: Tensor,
    intervals: Sequence[tuple[float, float, int, int]],
    method: Build = heun,
    noise_scale: float = 1.0,
    grid: Callable[..., Tensor] | None = None,
) -> Plan:
    """Restart sampling with any ODE method: at some times noise is added back and the way down taken again, some times over.

    Order of the method, in law, with noise_scale = 1; calls as the intervals ask; SDE; the method's form. A multistep method begins
    anew after each restart.
    Source: Xu et al. 2023 (arXiv 2306.14878), algorithm 1. Differs: in the released code an interval's steps are one fewer than its
    number of nodes, and noise_scale is 0 unless given.

    Args:
        schedule: noise schedule.
        times: outer steps of the main way, [steps + 1].
        intervals: (low, high, steps, repeats) each: from the grid point nearest to the time `low` (in sigma / alpha) noise is added up
            to the time `high` and `steps` steps are taken down again, `repeats` times over.
        method: (schedule, times) -> plan of any ODE method.
        noise_scale: of the added noise; the authors take 1.003.
        grid: (schedule, steps, start=, stop=) -> times of an interval; by default `karras`, on a Discrete schedule `trailing`.
    """
    if not 0 <= number("noise_scale", noise_scale) < math.inf:
        raise ValueError(f"noise_scale = {noise_scale}: expected a finite number from 0")
    spacing: Callable[..., Tensor] = grid or (trailing if has_levels(schedule) else karras)
    if not callable(spacing):
        raise TypeError(
            f"grid = {spacing!r:.100}: expected (schedule, steps, start=, stop=) -> times, e.g. sv.karras"
        )
    if not isinstance(intervals, Sequence):
        raise TypeError(f"intervals = {intervals!r:.100}: expected a list, e.g. [(0.05, 0.3, 3, 2)]")
    levels = Levels.of(schedule, times)
    refuse_upwards(levels)
    points, rho = levels.times, levels.sigma / levels.alpha
    again: dict[int, list[Tensor]] = {}
    for interval in intervals:
        if not (isinstance(interval, tuple) and len(interval) == 4):
            raise TypeError(
                f"interval = {interval!r:.100}: expected (low, high, steps, repeats), e.g. (0.05, 0.3, 3, 2)"
            )
        low, high, steps, repeats = interval
        whole("steps", steps, 1, 10**5)
        whole("repeats", repeats, 1, 10**5)
        at = Levels.at(schedule, torch.tensor([number("low", low)], dtype=torch.float64, device="cpu"))
        node = 1 + int((rho[1:] - at.sigma / at.alpha).abs().argmin())
        if not points[node] < number("high", high) < math.inf:
            raise ValueError(
                f"interval = {interval}: its high must be noisier than t = {points[node]:g}, the grid point nearest to its low"
            )
        if levels.sigma[node] == 0:
            raise ValueError(
                f"interval = {interval}: the grid point nearest to its low has sigma = 0; give a low that is nearer to another"
            )
        inner = spacing(schedule, steps, start=high, stop=points[node].item())
        again.setdefault(node, []).extend([inner] * repeats)
    pieces, first = [], 0
    for node in sorted(again):
        pieces += [_built(method, schedule, points[first : node + 1])] if node > first else []
        pieces += [_built(method, schedule, inner) for inner in again[node]]
        first = node
    if first < len(points) - 1:
        pieces.append(_built(method, schedule, points[first:]))
    return _joined(schedule, pieces, points[-1], noise_scale=noise_scale)


def _built(method: Build, schedule: Schedule, times: Tensor) -> Plan:
    """The method's plan, if it is one."""
    if not callable(method):
        raise TypeError(f"method = {method!r:.100}: expected (schedule, times) -> Plan, e.g. method=sv.heun")
    plan = method(schedule, times)
    if not isinstance(plan, Plan):
        raise TypeError(f"method gave {type(plan).__name__}: expected a Plan")
    if plan.is_stochastic:
        raise ValueError("the method adds noise itself; give an ODE method, e.g. heun")
    return plan


def _grid(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """The times of a grid from noise to data, and half log-SNR at each."""
    times, lam = on_grid(schedule, times)
    refuse_falling(lam)
    return times, lam


def _check_one_step(name: str, schedule: Schedule, times: Tensor, method: Build) -> None:
    """That the method takes each step by itself, on the first of them."""
    some = times[: TRIED + 1]
    whole_way = _built(method, schedule, some)
    alone = [_built(method, schedule, some[i : i + 2]) for i in range(len(some) - 1)]
    if not whole_way.allclose(_joined(schedule, alone, some[-1]), rtol=1e-9):
        raise ValueError(
            f"{name}: the method reads calls of earlier steps, which the noise between them makes worthless; give a one-step method "
            "(heun, ddim, dpm_solver, partial(dpm_solver_pp, kind='singlestep')), or take the multistep methods of the SDE: "
            "dpm_solver_pp_sde, sa_solver"
        )


def _renoised(
    name: str,
    schedule: Schedule,
    method: Build,
    times: Tensor,
    begins: Tensor,
    ends: Tensor,
    noise_scale: float = 1.0,
) -> Plan:
    """The method's steps from each begin to its end, and a row of noise wherever the next is noisier, or the last of the times."""
    plan = _at_once(schedule, method, times, begins, ends, noise_scale)
    if plan is not None:
        return plan
    _check_one_step(name, schedule, times, method)
    pieces = [
        _built(method, schedule, torch.stack([begin, end])) for begin, end in zip(begins, ends, strict=True)
    ]
    return _joined(schedule, pieces, times[-1], times[0], noise_scale)


def _at_once(
    schedule: Schedule, method: Build, times: Tensor, begins: Tensor, ends: Tensor, noise_scale: float
) -> Plan | None:
    """The plan of `_renoised` by one call of the method, on the way down and up again, with the steps up replaced by noise.

    None for a method that does not go both ways, or whose plan is more than rows that read the calls of their own step.
    """
    way = torch.cat([times[:1], torch.stack([begins, ends], 1).flatten(), times[-1:]])
    moves = way.diff() != 0
    adds = torch.arange(len(moves), device="cpu")[moves] % 2 == 0  # which of the steps add noise
    way = torch.cat([way[:1], way[1:][moves]])
    try:
        plan = _built(method, BothWays(schedule), way)
        first = torch.tensor(calls_at(plan, way[:-1].tolist()), device="cpu")  # the row that begins each step
    except ValueError:
        return None
    step = torch.searchsorted(first, torch.arange(plan.rows, device="cpu"), right=True) - 1
    own = torch.arange(plan.rows, device="cpu") - first[step]  # a row's number within its step
    early = nonzero(plan.b) & (torch.arange(plan.window, device="cpu") > own[:, None])
    if early.any() or plan.shift.numel() or plan.mix.numel() or plan.element_shape or not plan.consistent:
        return None
    kept = (~adds[step] | (own == 0)).nonzero().flatten()
    at = torch.cat([kept, first.new_tensor([plan.rows])])
    t, alpha, sigma = plan.times[at], plan.alpha[at], plan.sigma[at]
    noisy = adds[step[kept]]
    a = torch.where(noisy, alpha[1:] / alpha[:-1], plan.a[kept])
    b = torch.where(noisy[:, None], 0.0, plan.b[kept])
    b = b[:, : 1 + int((b != 0).any(0).nonzero().max())]
    added = (sigma[1:] - a * sigma[:-1]) * (sigma[1:] + a * sigma[:-1])
    c = noise_scale * torch.sqrt(torch.where(noisy, added, 0.0))
    c = c[:, None] if noisy.any() else plan.c
    return Piece(t, alpha, sigma, a, b, c).plan(plan.predicts, plan.scale)


def _within(schedule: Schedule, times: Tensor) -> Tensor:
    """The times, or where a schedule has none beyond its ends, those ends."""
    try:
        schedule.half_logsnr(times)
    except ValueError:
        return times.clamp(schedule.stop, schedule.start)
    return times


def _joined(
    schedule: Schedule,
    pieces: Sequence[Plan],
    stop: Tensor,
    start: Tensor | None = None,
    noise_scale: float = 1.0,
) -> Plan:
    """Plans one after the other; where one begins noisier than the way has come, a row of noise and no call goes before it."""
    start = pieces[0].times[0] if start is None else start
    level = torch.stack([start, schedule.alpha(start), schedule.sigma(start)])
    whole_way: list[Plan] = []
    for piece in pieces:
        begin = torch.stack([piece.times[0], piece.alpha[0], piece.sigma[0]])
        if begin[0] != level[0]:
            whole_way.append(_noise(level, begin, piece, noise_scale))
        elif whole_way:
            piece = _from(level, piece)
        whole_way.append(piece)
        level = torch.stack([piece.times[-1], piece.alpha[-1], piece.sigma[-1]])
    if level[0] != stop:
        end = torch.stack([stop, schedule.alpha(stop), schedule.sigma(stop)])
        whole_way.append(_noise(level, end, whole_way[-1], noise_scale))
    return joined(whole_way)


def _noise(level: Tensor, end: Tensor, like: Plan, noise_scale: float) -> Plan:
    """A row that adds noise up to another level, in the form of its neighbour."""
    _, alpha_s, sigma_s = level
    _, alpha_t, sigma_t = end
    a = alpha_t / alpha_s
    weight = noise_scale * torch.sqrt((sigma_t - a * sigma_s) * (sigma_t + a * sigma_s))
    row = like[:1]  # whose form, mixture and dimensions it has
    levels = dict(zip(("times", "alpha", "sigma"), torch.stack([level, end], 1), strict=True))
    own = {
        "a": a * torch.ones_like(row.a),
        "b": torch.zeros_like(row.b),
        "shift": torch.zeros_like(row.shift),
    }
    return replace(row, **levels, **own, c=weight.reshape(1, 1), turns=0)


def _from(level: Tensor, plan: Plan) -> Plan:
    """The plan with exactly this first level, which is its own but for rounding."""
    alpha, sigma = (
        torch.cat([v[None], old[1:]]) for v, old in zip(level[1:], (plan.alpha, plan.sigma), strict=True)
    )
    return replace(plan, alpha=alpha, sigma=sigma)

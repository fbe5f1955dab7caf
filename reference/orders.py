"""Measured orders: of a plan's rows, of one step, of trajectories, of laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cosh, exp, factorial, inf, log
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference.distances import wasserstein2
from reference.distribution import Distribution
from reference.gaussian import Gaussian
from reference.law import law

if TYPE_CHECKING:
    from solvers.plan import Plan
    from solvers.schedules import Schedule

    Build = Callable[[Schedule, Tensor], Plan]  # (schedule, times) -> plan
    Spacing = Callable[[int], Tensor]  # steps -> fractions [steps + 1] from 0 to 1


def slopes(errors: Tensor | Sequence[float]) -> Tensor:
    """Observed orders log2(error_i / error_{i+1}) of errors at doubling N; signed, so divergence is negative."""
    e = torch.as_tensor(errors, dtype=torch.float64)
    return (e[:-1] / e[1:]).log2()


def even(steps: int) -> Tensor:
    """Equal steps: fractions [steps + 1] from 0 to 1."""
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


PATTERN = (
    1.0,
    2.0,
    1.5,
    0.8,
    1.6,
    1.1,
    0.7,
)  # neighbours, also across the seam, differ by at most a factor 2


def uneven(steps: int) -> Tensor:
    """Steps that never settle, however many: fractions [steps + 1] from 0 to 1 with step ratios in [0.5, 2].

    The steps repeat a pattern, so neighbours differ by O(h) and coefficients made for equal steps show, and the error
    still falls smoothly.
    """
    step = torch.tensor(PATTERN, dtype=torch.float64).repeat(steps // len(PATTERN) + 1)[:steps]
    fractions = torch.cat([torch.zeros(1, dtype=torch.float64), step.cumsum(0) / step.sum()])
    fractions[-1] = 1.0
    return fractions


def grid(schedule: Schedule, start: float, stop: float, fractions: Tensor) -> Tensor:
    """Times [N + 1] at the given fractions of the way from start to stop in half log-SNR; the ends are exact, and finite."""
    ends = torch.tensor([start, stop], dtype=torch.float64)
    low, high = schedule.half_logsnr(ends)
    times = schedule.time(low + (high - low) * fractions)
    times[[0, -1]] = ends
    return times


def trajectory_errors(
    build: Build,
    run: Callable[[Plan, Callable, Tensor], Tensor],
    distribution: Distribution,
    schedule: Schedule,
    x: Tensor,
    start: float,
    stop: float,
    counts: Sequence[int],
    spacing: Spacing = even,
) -> Tensor:
    """Root-mean-square errors against the exact flow of x [B, *shape], one for every number of steps in counts.

    `run(plan, model, x) -> x_end` gets the exact noise prediction. Slopes tend to p.
    """
    exact = distribution.flow(x, schedule, start, stop)
    model = distribution.model(schedule)
    ends = [run(build(schedule, grid(schedule, start, stop, spacing(n))), model, x) for n in counts]
    return torch.stack([(end - exact).double().square().mean().sqrt() for end in ends])


def law_errors(
    build: Build,
    data: Gaussian,
    schedule: Schedule,
    start: float,
    stop: float,
    counts: Sequence[int],
    spacing: Spacing = even,
) -> Tensor:
    """Wasserstein-2 distances of the plan's law to the exact marginal at `stop`. Slopes tend to the weak order."""
    plans = [build(schedule, grid(schedule, start, stop, spacing(n))) for n in counts]
    exact = [data.marginal(plan.alpha[-1].item(), plan.sigma[-1].item()) for plan in plans]
    errors = [wasserstein2(law(plan, data), marginal) for plan, marginal in zip(plans, exact, strict=True)]
    return torch.tensor(errors, dtype=torch.float64)


def row_defects(
    build: Build, schedule: Schedule, half_logsnr: float, steps: Sequence[float], h: float, degree: int
) -> Tensor:
    """What the last step of a plan gets wrong when the prediction is (lambda - lambda_s)^k, [degree + 1], k = 0..

    In velocity form it is velocity / sqrt(scale^2 alpha^2 + sigma^2) that is a power. The outer steps have lengths h * steps in half log-SNR (steps[-1] = 1 makes the last one h) and the last begins
    at lambda_s = half_logsnr; give as many steps as the method looks back, and one. State and history are exact, and
    the prediction depends on time alone, so this is the order of the weights as a quadrature: what multistep methods
    need, and necessary for the others. An exact weight leaves rounding. A row with a folded corrector answers for
    its predictor.
    """
    plan, first = _last_step(build, schedule, half_logsnr, steps, h)
    if plan.predicts == "mixture":
        raise ValueError(
            "a mixture says nothing of its linear part, so what its rows should integrate is not known"
        )
    away = (plan.alpha[:-1] / plan.sigma[:-1]).log() - half_logsnr
    norm = torch.hypot(plan.scale * plan.alpha, plan.sigma)
    defects = []
    for k in range(degree + 1):
        outputs = away**k * norm[:-1] if plan.predicts == "velocity" else away**k
        end = _run_from(plan, first, torch.ones((), dtype=torch.float64), _prescribed(outputs))
        if plan.predicts == "noise":
            exact = plan.alpha[-1] / plan.alpha[first] - plan.sigma[-1] * _moment(k, h * steps[-1], 1)
        elif plan.predicts == "data":
            exact = plan.sigma[-1] / plan.sigma[first] + plan.alpha[-1] * _moment(k, h * steps[-1], -1)
        else:
            turn = _turn_moment(k, h * steps[-1], half_logsnr + log(plan.scale))
            exact = norm[-1] * (1 / norm[first] + turn)
        defects.append(end - exact)
    return torch.stack(defects)


def row_order(
    build: Build, schedule: Schedule, half_logsnr: float, steps: Sequence[float], h: float, degree: int
) -> float:
    """The least order, over k = 0..degree, at which `row_defects` fall from h to h / 2; inf when all are rounding."""
    coarse = row_defects(build, schedule, half_logsnr, steps, h, degree)
    fine = row_defects(build, schedule, half_logsnr, steps, h / 2, degree)
    orders = [
        slopes(torch.stack(pair).abs()).item() - 1
        for pair in zip(coarse, fine, strict=True)
        if abs(pair[0]) > 1e-13
    ]
    return min(orders, default=inf)


def local_errors(
    build: Build,
    distribution: Distribution,
    schedule: Schedule,
    x: Tensor,
    half_logsnr: float,
    steps: Sequence[float],
    widths: Sequence[float],
) -> Tensor:
    """Root-mean-square errors of one outer step from the exact state x and exact history, one for every h in widths.

    The grid is that of `row_defects`. Calls before the last outer step are on the exact trajectory; calls
    inside it are at the computed stages, so single-step methods show their full order. Slopes tend to p + 1.
    """
    errors = []
    for h in widths:
        plan, first = _last_step(build, schedule, half_logsnr, steps, h)
        model, s = distribution.model(schedule, plan.predicts), plan.times[first].item()

        def predict(i: int, state: Tensor | None, plan=plan, model=model, s=s) -> Tensor:
            if state is None:
                state = distribution.flow(x, schedule, s, plan.times[i].item())
            return model(state, plan.times[i].expand(len(x)))

        exact = distribution.flow(x, schedule, s, plan.times[-1].item())
        errors.append((_run_from(plan, first, x, predict) - exact).square().mean().sqrt())
    return torch.stack(errors)


def _last_step(build, schedule, half_logsnr, steps, h) -> tuple[Plan, int]:
    """The plan on the grid of `row_defects`, and the index of the first row of its last outer step."""
    steps = torch.as_tensor(steps, dtype=torch.float64)
    nodes = torch.cat([-steps[:-1].flip(0).cumsum(0).flip(0), steps.new_zeros(1), steps[-1:]])
    times = schedule.time(half_logsnr + h * nodes)
    plan = build(schedule, times)
    near = (plan.times[:-1] - times[-2]).abs() <= 1e-9 * (times[-2] - times[-1])
    if not near.any():
        raise ValueError(f"the plan makes no call at the outer time {times[-2].item()}, only at {plan.times}")
    return plan, near.nonzero().max().item()


def _run_from(plan: Plan, first: int, x: Tensor, predict: Callable[[int, Tensor | None], Tensor]) -> Tensor:
    """The state x after the rows first..N-1; predict(i, state) is the output of call i, state None for the exact history."""
    outputs = [predict(i, None) for i in range(first)]
    for i in range(first, len(plan.a)):
        outputs.append(predict(i, x))
        x = plan.a[i] * x + sum(plan.b[i, j] * outputs[i - j] for j in range(min(i + 1, plan.b.shape[1])))
    return x


def _prescribed(outputs: Tensor) -> Callable[[int, Tensor | None], Tensor]:
    return lambda i, x: outputs[i]


def _moment(k: int, h: float, c: int) -> float:
    """int_0^h exp(c (h - u)) u^k du for c = 1 or -1, by series of positive terms (h > 0)."""
    if c == 1:
        return sum(h ** (k + 1 + j) * factorial(k) / factorial(k + 1 + j) for j in range(60))
    return exp(-h) * sum(h ** (k + 1 + j) / (factorial(j) * (k + 1 + j)) for j in range(60))


def _turn_moment(k: int, h: float, z: float) -> float:
    """int_0^h u^k dtheta(z + u) with theta(z) = arctan(e^-z), so dtheta = -du / (2 cosh(z + u)), by Simpson's rule on 2000 steps."""
    n = 2000
    values = [(i * h / n) ** k / (-2 * cosh(z + i * h / n)) for i in range(n + 1)]
    return h / n / 3 * (values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]))

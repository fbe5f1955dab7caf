"""Textbook tables written by hand, independent of `solvers.methods`: what the measuring functions are measured on."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Table:
    """The fields of a plan that `reference` reads."""

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor
    c: Tensor = field(default_factory=lambda: torch.zeros(0, 0).double())
    predicts: str = "noise"
    scale = 1.0
    element_shape = ()
    shift = torch.zeros(0)
    variances = torch.zeros(0)

    def mixture(self):
        """The weights of data and noise in the outputs."""
        alpha, sigma = self.alpha[:-1], self.sigma[:-1]
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        return {"noise": (zero, one), "data": (one, zero), "velocity": (-sigma, alpha)}[self.predicts]


def table(schedule, times, a, b, c=None, predicts="noise"):
    c = torch.zeros(len(a), 0, dtype=torch.float64) if c is None else c
    return Table(times, schedule.alpha(times), schedule.sigma(times), a, b, c, predicts)


def ddim(schedule, times, predicts="noise"):
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    if predicts == "noise":
        a = alpha[1:] / alpha[:-1]
        return table(schedule, times, a, (sigma[1:] - a * sigma[:-1])[:, None])
    if predicts == "data":
        a = sigma[1:] / sigma[:-1]
        return table(schedule, times, a, (alpha[1:] - a * alpha[:-1])[:, None], predicts="data")
    # x0 = (alpha x - sigma v) / D, eps = (sigma x + alpha v) / D, D = alpha^2 + sigma^2
    norm = alpha[:-1] ** 2 + sigma[:-1] ** 2
    a = (alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]) / norm
    b = (sigma[1:] * alpha[:-1] - alpha[1:] * sigma[:-1]) / norm
    return table(schedule, times, a, b[:, None], predicts="velocity")


def two_step(schedule, times):
    """DPM-Solver++(2M), midpoint weights, first step DDIM: second order."""
    first, h = ddim(schedule, times, "data"), schedule.half_logsnr(times).diff()
    ratio = torch.cat([h.new_zeros(1), h[1:] / (2 * h[:-1])])
    return table(schedule, times, first.a, first.b * torch.stack([1 + ratio, -ratio], 1), predicts="data")


def heun(schedule, times):
    """Heun in sigma / alpha: two calls a step, folded to rows; second order."""
    nodes = torch.cat([torch.stack([times[:-1], times[1:]], 1).flatten(), times[-1:]])
    alpha, rho = schedule.alpha(nodes), schedule.sigma(nodes) / schedule.alpha(nodes)
    step = (rho[1::2] - rho[:-1:2]).repeat_interleave(2)
    first = torch.arange(len(step)) % 2 == 0
    a = alpha[1:] / alpha[:-1]
    b = alpha[1:, None] * step[:, None] * torch.where(first[:, None], torch.tensor([[1.0, 0.0]]), 0.5)
    b[~first, 1] -= alpha[1:][~first] * step[~first]
    return table(schedule, nodes, a, b)


def ancestral(schedule, times, predicts="data"):
    """The DDPM posterior step in data form: tau = 1, order 1 in law."""
    alpha, sigma, lam = schedule.alpha(times), schedule.sigma(times), schedule.half_logsnr(times)
    h = lam.diff()
    a = sigma[1:] / sigma[:-1] * torch.exp(-h)
    c = sigma[1:] * torch.sqrt(-torch.expm1(-2 * h))
    return table(schedule, times, a, (alpha[1:] - a * alpha[:-1])[:, None], c[:, None], predicts)


def run(plan, model, x):
    """The executor, in five lines, for a model of plan.predicts."""
    outputs = []
    for i in range(len(plan.a)):
        outputs.append(model(x, plan.times[i].expand(len(x))))
        x = plan.a[i] * x + sum(plan.b[i, j] * outputs[i - j] for j in range(min(i + 1, plan.b.shape[1])))
    return x

"""The exact law of a plan's output on Gaussian data, with the exact model: no samples, no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from reference.distribution import ratio
from reference.gaussian import Gaussian

if TYPE_CHECKING:
    from solvers.plan import Plan


def law(plan: Plan, data: Gaussian, start: Gaussian | None = None) -> Gaussian:
    """The law of the plan's output for data ~ `data`, from `start` (the exact marginal at times[0] when None).

    Per eigen-direction of data.cov every register is affine in (1, x_init - E x_init, z_0, .., z_{N-1}), so the
    rows of the plan act on these coefficients, and so does the exact prediction, a combination of::

        noise = sigma (x - alpha mu) / P,   data = mu + alpha v (x - alpha mu) / P,   P = alpha^2 v + sigma^2.

    Where the plan leaves the noise to the model's second output, that is the exact one of Extended-Analytic-DPM.
    """
    if not isinstance(data, Gaussian):
        raise TypeError(
            f"data is {type(data).__name__}: a law is exact on Gaussian data alone; take data.moments of a mixture, or "
            "measure with trajectory_errors"
        )
    if plan.element_shape:
        raise ValueError(
            f"the plan's coefficients are per element {list(plan.element_shape)}, and a law goes by eigen-direction: run the plan"
        )
    if start is None:
        start = data.marginal(plan.alpha[0].item(), plan.sigma[0].item())
    mean, v = data.mean.flatten() @ data.basis, data.variances
    rows, window = plan.b.shape
    draws = rows if plan.c.numel() or plan.variances.numel() else 0
    x = torch.zeros(
        2 + draws, len(v), dtype=torch.float64, device="cpu"
    )  # mean, gain of x_init, gain of every draw
    x[0], x[1] = start.mean.flatten() @ data.basis, 1.0
    outputs: list[torch.Tensor] = []  # the newest first
    if plan.variances.numel() and (data.cov - data.cov.diagonal().diag()).any():
        raise ValueError(
            "the model's second output is per element, so the law is known for data with independent elements alone: expected a diagonal cov"
        )
    ones = torch.ones_like(mean) @ data.basis  # a shift is the same number for every element
    for i, (alpha, sigma, of_data, of_noise) in enumerate(
        zip(plan.alpha[:-1], plan.sigma[:-1], *plan.mixture(), strict=True)
    ):
        centred = x.clone()
        centred[0] -= alpha * mean
        output = ratio(of_noise * sigma + of_data * alpha * v, alpha**2 * v + sigma**2) * centred
        output[0] += of_data * mean
        outputs = [output, *outputs[: window - 1]]
        x = plan.a[i] * x + sum(b * output for b, output in zip(plan.b[i], outputs, strict=False))
        if plan.shift.numel():
            x[0] += plan.shift[i] * ones
        for k in range(min(i + 1, plan.c.shape[1])):
            x[2 + i - k] += plan.c[i, k]
        if plan.variances.numel():  # chosen by the exact second moments, Cov(eps | x) = alpha^2 v / P
            least, most, cap = plan.variances[i]
            share = ratio(alpha**2 * v, alpha**2 * v + sigma**2)
            x[2 + i] += (least + (most - least) * share).clamp(max=cap).sqrt()
    gain = data.basis * x[1] @ data.basis.T
    cov = gain @ start.cov @ gain.T + data.basis * x[2:].square().sum(0) @ data.basis.T
    return Gaussian((data.basis @ x[0]).reshape(data.shape), (cov + cov.T) / 2)


def path_kl(plan: Plan, data: Gaussian) -> float:
    """KL divergence, in nats, of the forward process at all the plan's times from the plan's own path, which starts exactly.

    For plans whose rows read no earlier call or draw, x_t | x_s ~ N(a x_s + b m(x_s), c^2), and per eigen-direction::

        sum over rows of .5 [v / c^2 + E (mean - mean_plan)^2 / c^2 - 1 - log(v / c^2)],

    v being the variance of x_t | x_s in the forward process. Infinite where a row adds no noise.
    """
    if plan.variances.numel() or plan.shift.numel() or plan.predicts == "mixture":
        raise ValueError("expected a plan of numbers, whose noise c alone weighs, e.g. ddim with eta=1")
    if not plan.c.numel():
        return torch.inf
    if plan.window > 1 or plan.c.shape[1] > 1:
        raise ValueError(
            "expected a plan whose rows read their own call and draw alone, e.g. ddim with eta=1"
        )
    mean, v = data.mean.flatten() @ data.basis, data.variances
    alpha, sigma = plan.alpha[:, None], plan.sigma[:, None]
    total = alpha**2 * v + sigma**2  # P, [N + 1, d]
    of_data, of_noise = (w[:, None] for w in plan.mixture())
    rate = (of_noise * sigma[:-1] + of_data * alpha[:-1] * v) / total[
        :-1
    ]  # output = rate (x - alpha mean) + of_data mean
    gain = plan.a[:, None] + plan.b * rate
    forward = alpha[:-1] / alpha[1:]
    back = forward * total[1:] / total[:-1]  # of the forward process reversed
    variance = total[1:] * (sigma[:-1] ** 2 - (forward * sigma[1:]) ** 2) / total[:-1]
    shift = (plan.a[:, None] * alpha[:-1] + plan.b * of_data - alpha[1:]) * mean
    off = (gain - back) ** 2 * total[:-1] + shift**2
    noise = plan.c**2
    terms = (variance + off) / noise - 1 - torch.log(variance / noise)
    return 0.5 * torch.where(noise > 0, terms, torch.inf).sum().item()

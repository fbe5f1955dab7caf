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
    rows of the plan act on these coefficients, and so does the exact prediction, a combination of

        noise = sigma (x - alpha mu) / P,   data = mu + alpha v (x - alpha mu) / P,   P = alpha^2 v + sigma^2.
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
    nfe, window = plan.b.shape
    draws = nfe if plan.c.numel() else 0
    x = torch.zeros(
        2 + draws, len(v), dtype=torch.float64, device="cpu"
    )  # mean, gain of x_init, gain of every draw
    x[0], x[1] = start.mean.flatten() @ data.basis, 1.0
    outputs: list[torch.Tensor] = []  # the newest first
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
    gain = data.basis * x[1] @ data.basis.T
    cov = gain @ start.cov @ gain.T + data.basis * x[2:].square().sum(0) @ data.basis.T
    return Gaussian((data.basis @ x[0]).reshape(data.shape), (cov + cov.T) / 2)

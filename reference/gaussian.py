"""Gaussian data: marginals, posterior means, density, exact ODE and SDE transitions."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference.distribution import Distribution, eigen, levels, ratio

if TYPE_CHECKING:
    from solvers.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Gaussian(Distribution):
    """x0 ~ N(mean, cov); cov may be singular. Exact at alpha = 0 and at sigma = 0 too."""

    mean: Tensor  # [*shape] float64
    cov: Tensor  # [d, d] float64
    variances: Tensor = field(init=False, repr=False)  # [d] eigenvalues of cov
    basis: Tensor = field(init=False, repr=False)  # [d, d] its eigenvectors, as columns

    def __post_init__(self):
        mean = torch.as_tensor(self.mean, dtype=torch.float64, device="cpu")
        cov = torch.as_tensor(self.cov, dtype=torch.float64, device="cpu")
        if mean.ndim == 0:
            raise ValueError("mean is a scalar, expected at least one dimension: mean.reshape(1)")
        if cov.shape != (mean.numel(), mean.numel()):
            raise ValueError(f"cov has shape {list(cov.shape)}, expected [d, d] with d = {mean.numel()}")
        variances, basis = eigen("cov", cov)
        for name, value in {"mean": mean, "cov": cov, "variances": variances, "basis": basis}.items():
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x0."""
        return tuple(self.mean.shape)

    def marginal(self, alpha: float, sigma: float) -> Gaussian:
        """The law of alpha x0 + sigma eps."""
        return Gaussian(alpha * self.mean, alpha**2 * self.cov + sigma**2 * torch.eye(len(self.cov)).double())

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples of x0, [n, *shape], float64."""
        z = torch.randn(n, len(self.cov), dtype=torch.float64, generator=generator)
        return self.mean + (z * self.variances.sqrt() @ self.basis.T).reshape(n, *self.shape)

    def flow(self, x: Tensor, schedule: Schedule, s: float, t: float) -> Tensor:
        """x_t = alpha_t mean + sqrt(P_t / P_s) (x_s - alpha_s mean), P = alpha^2 cov + sigma^2."""
        gain, offset, _ = self.transition(schedule, s, t, tau=0.0)
        u, *_ = self._flat(x, 1.0, 0.0)
        return (u @ gain.T + offset).to(x).reshape(x.shape)

    def transition(
        self, schedule: Schedule, s: float, t: float, tau: float = 1.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(A [d, d], offset [d], cov [d, d]) of the exact SDE step x_t = A x_s + offset + N(0, cov).

        Constant tau; tau = 0 is the ODE, tau = 1 the reverse SDE. Per eigenvalue, with Q = P / alpha^2,
        A = sqrt(P_t / P_s) (Q_t / Q_s)^(tau^2 / 2) and variance P_t (1 - (Q_t / Q_s)^(tau^2)).
        """
        (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, s), levels(schedule, t)
        p_s, p_t = alpha_s**2 * self.variances + sigma_s**2, alpha_t**2 * self.variances + sigma_t**2
        exponent = torch.xlogy(torch.tensor(tau**2).double(), ratio(p_t * alpha_s**2, p_s * alpha_t**2))
        gain = self._matrix(ratio(p_t, p_s).sqrt() * (exponent / 2).exp())
        mean = self.mean.flatten()
        return gain, alpha_t * mean - alpha_s * gain @ mean, self._matrix(p_t * -exponent.expm1())

    def _matrix(self, diagonal: Tensor) -> Tensor:
        return self.basis * diagonal @ self.basis.T

    def _whiten(self, x, alpha, sigma):
        """P [B or 1, d] and (x - alpha mean) / P [B, d], per eigen-direction."""
        p = alpha**2 * self.variances + sigma**2
        return p, ratio((x - alpha * self.mean.flatten()) @ self.basis, p)

    def _posterior(self, x, alpha, sigma):
        _, u = self._whiten(x, alpha, sigma)
        return sigma * u @ self.basis.T, self.mean.flatten() + alpha * (self.variances * u) @ self.basis.T

    def _log_density(self, x, alpha, sigma):
        p, u = self._whiten(x, alpha, sigma)
        return -0.5 * ((2 * pi * p).log() + p * u**2).sum(-1)

    def _jacobian(self, x, alpha, sigma):
        p = alpha**2 * self.variances + sigma**2
        gain = self.basis * ratio(alpha * self.variances, p)[:, None] @ self.basis.T
        return gain.expand(len(x), -1, -1)

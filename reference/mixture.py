"""Gaussian mixtures: exact posterior means and Jacobian; the exact 1-D flow by matching distribution functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference.distribution import Distribution, eigen, integrate, levels, ratio
from reference.gaussian import Gaussian

if TYPE_CHECKING:
    from reference.distribution import Level
    from solvers.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Mixture(Distribution):
    """x0 ~ sum_k weights_k N(means_k, covs_k)."""

    weights: Tensor  # [K] float64; given to 1e-6, made to sum to 1
    means: Tensor  # [K, *shape] float64
    covs: Tensor  # [K, d, d] float64
    variances: Tensor = field(init=False, repr=False)  # [K, d] eigenvalues of covs
    bases: Tensor = field(init=False, repr=False)  # [K, d, d] their eigenvectors, as columns

    def __post_init__(self):
        weights = torch.as_tensor(self.weights, dtype=torch.float64, device="cpu")
        means = torch.as_tensor(self.means, dtype=torch.float64, device="cpu")
        covs = torch.as_tensor(self.covs, dtype=torch.float64, device="cpu")
        if weights.ndim != 1 or not (weights >= 0).all() or not abs(weights.sum() - 1) <= 1e-6:
            raise ValueError(f"weights = {weights.tolist()}, expected [K], >= 0 and summing to 1")
        k = len(weights)
        if means.ndim < 2 or len(means) != k:
            raise ValueError(f"means has shape {list(means.shape)}, expected [K, *shape] with K = {k}")
        d = means[0].numel()
        if covs.shape != (k, d, d):
            raise ValueError(f"covs has shape {list(covs.shape)}, expected [K, d, d] = [{k}, {d}, {d}]")
        variances, bases = eigen("covs", covs)
        weights = weights / weights.sum()
        names = ("weights", "means", "covs", "variances", "bases")
        for name, value in zip(names, (weights, means, covs, variances, bases), strict=True):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x0."""
        return tuple(self.means.shape[1:])

    @property
    def moments(self) -> Gaussian:
        """The Gaussian with this mixture's mean and covariance."""
        mean = torch.tensordot(self.weights, self.means, 1)
        spread = (self.means - mean).flatten(1)
        within = torch.tensordot(self.weights, self.covs, 1)
        return Gaussian(mean, within + self.weights * spread.T @ spread)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples of x0, [n, *shape], float64."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.covs.shape[-1], dtype=torch.float64, generator=generator)
        offset = torch.einsum("nij,nj->ni", self.bases[k], self.variances[k].sqrt() * z)
        return self.means[k] + offset.reshape(n, *self.shape)

    def flow(self, x: Tensor, schedule: Schedule, s: float, t: float, tol: float = 1e-11) -> Tensor:
        """The probability-flow map from time s to time t: exact to the last digits for d = 1, else certified to tol.

        In one dimension the flow is the monotone transport, F_t(x_t) = F_s(x_s).
        """
        if self.covs.shape[-1] > 1:
            return integrate(self, x, schedule, s, t, tol)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, s), levels(schedule, t)
        mean, variance = self.means.flatten(), self.covs.flatten()
        scale_s = (alpha_s**2 * variance + sigma_s**2).sqrt()
        scale_t = (alpha_t**2 * variance + sigma_t**2).sqrt()
        z = (self._flat(x, alpha_s, sigma_s)[0] - alpha_s * mean) / scale_s
        keep = self.weights > 0
        end = _same_quantile(self.weights[keep].log(), z[:, keep], (alpha_t * mean)[keep], scale_t[keep])
        return end.to(x).reshape(x.shape)

    def _components(self, x, alpha, sigma):
        """P [B or 1, K, d] and u = (x - alpha m) / P [B, K, d], per eigen-direction; log w_k q_k(x) [B, K]."""
        p = alpha[..., None] ** 2 * self.variances + sigma[..., None] ** 2
        if (p == 0).any():
            raise ValueError(
                "no density at sigma = 0: a component's variance is 0; take Empirical for a finite data set"
            )
        centred = x[:, None] - alpha[..., None] * self.means.flatten(1)
        u = ratio(torch.einsum("bki,kij->bkj", centred, self.bases), p)
        return p, u, self.weights.log() - 0.5 * ((2 * pi * p).log() + p * u**2).sum(-1)

    def _posterior(self, x, alpha, sigma):
        _, u, log = self._components(x, alpha, sigma)
        share = log.softmax(-1)
        weighted = share[..., None] * u
        noise = sigma * torch.einsum("bkj,kij->bi", weighted, self.bases)
        shift = alpha * torch.einsum("bkj,kij->bi", self.variances * weighted, self.bases)
        return noise, share @ self.means.flatten(1) + shift

    def noise_square(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[eps^2|x], element by element, [B, *shape], without the Jacobian: of each component and then their mean."""
        flat, alpha, sigma = self._flat(x, alpha, sigma)
        p, u, log = self._components(flat, alpha, sigma)
        noise = sigma[..., None] * torch.einsum("bkj,kij->bki", u, self.bases)
        own = 1 - sigma[..., None] ** 2 * torch.einsum("bkj,kij->bki", 1 / p, self.bases**2)
        return torch.einsum("bk,bki->bi", log.softmax(-1), noise**2 + own).to(x).reshape(x.shape)

    def _log_density(self, x, alpha, sigma):
        return self._components(x, alpha, sigma)[2].logsumexp(-1)

    def _jacobian(self, x, alpha, sigma):
        """sum_k r_k [alpha S_k C_k^-1 + (x0_k - x0)(s_k - s)^T], s_k and x0_k the score and data of component k."""
        p, u, log = self._components(x, alpha, sigma)
        share = log.softmax(-1)
        score = -torch.einsum("bkj,kij->bki", u, self.bases)
        shift = torch.einsum("bkj,kij->bki", self.variances * u, self.bases)
        data = self.means.flatten(1) + alpha[..., None] * shift
        gain = share[..., None] * ratio(alpha[..., None] * self.variances, p)
        within = torch.einsum("bkj,kij,klj->bil", gain, self.bases, self.bases)
        score = score - torch.einsum("bk,bki->bi", share, score)[:, None]
        data = data - torch.einsum("bk,bki->bi", share, data)[:, None]
        return within + torch.einsum("bk,bki,bkj->bij", share, data, score)


def _same_quantile(log_weights: Tensor, z: Tensor, means: Tensor, scales: Tensor) -> Tensor:
    """The y [B] with sum_k w_k Phi((y - means_k) / scales_k) = sum_k w_k Phi(z_k), z [B, K], by bisection.

    Each component is compared by its own smaller tail, Phi(z) or Phi(-z), and the upper tails stand on the other
    side of the equation: all terms are positive, and keep their digits far out as well as between components.
    """
    lower = z <= 0
    side = torch.where(lower, 1.0, -1.0)
    before = log_weights + torch.special.log_ndtr(side * z)
    low = (means + scales * z.amin(1, keepdim=True)).amin(1)
    high = (means + scales * z.amax(1, keepdim=True)).amax(1)
    for _ in range(80):
        middle = (low + high) / 2
        after = log_weights + torch.special.log_ndtr(side * (middle[:, None] - means) / scales)
        left = torch.where(lower, after, before).logsumexp(1)
        right = torch.where(lower, before, after).logsumexp(1)
        low, high = torch.where(left > right, low, middle), torch.where(left > right, middle, high)
    return (low + high) / 2

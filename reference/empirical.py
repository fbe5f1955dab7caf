"""A finite data set as data distribution; the digits data set as a Gaussian mixture."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import log, pi
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from reference.distribution import Distribution, integrate, ratio
from reference.mixture import Mixture

if TYPE_CHECKING:
    from solvers.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Empirical(Distribution):
    """x0 is one of `points`, all equally likely; at sigma = 0 the posterior is the nearest point."""

    points: Tensor  # [n, *shape] float64

    def __post_init__(self):
        points = torch.as_tensor(self.points, dtype=torch.float64, device="cpu")
        if points.ndim < 2 or not len(points) or not points.isfinite().all():
            raise ValueError(f"points has shape {list(points.shape)}, expected [n, *shape], n >= 1, finite")
        object.__setattr__(self, "points", points)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one x0."""
        return tuple(self.points.shape[1:])

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples of x0, [n, *shape], float64."""
        return self.points[torch.randint(len(self.points), (n,), generator=generator)]

    def flow(self, x: Tensor, schedule: Schedule, s: float, t: float, tol: float = 1e-11) -> Tensor:
        """The probability-flow map from time s to time t, certified to tol; it stiffens as sigma_t -> 0."""
        return integrate(self, x, schedule, s, t, tol)

    def _compare(self, x, alpha, sigma):
        """Squared distance to the nearest alpha x_i [B, 1]; log posterior weights relative to it [B, n]."""
        squares = (x[:, None] - alpha[..., None] * self.points.flatten(1)).square().sum(-1)
        nearest = squares.amin(1, keepdim=True)
        return nearest, (nearest - squares) / (2 * sigma**2).clamp_min(1e-300)

    def _posterior(self, x, alpha, sigma):
        _, logits = self._compare(x, alpha, sigma)
        data = logits.softmax(-1) @ self.points.flatten(1)
        return ratio(x - alpha * data, sigma), data

    def _log_density(self, x, alpha, sigma):
        nearest, logits = self._compare(x, alpha, sigma)
        normaliser = log(len(self.points)) + 0.5 * x.shape[1] * (2 * pi * sigma**2).log()
        return (logits.logsumexp(-1, keepdim=True) - nearest / (2 * sigma**2) - normaliser).squeeze(1)

    def _jacobian(self, x, alpha, sigma):
        share = self._compare(x, alpha, sigma)[1].softmax(-1)
        points = self.points.flatten(1)
        spread = points - (share @ points)[:, None]
        return (alpha / sigma**2)[..., None] * torch.einsum("bn,bni,bnj->bij", share, spread, spread)


@functools.cache
def digits() -> Mixture:
    """scikit-learn's 8 x 8 handwritten digits, in [-1, 1], shape (1, 8, 8), as a mixture of 80 Gaussians.

    Every class is split by k-means; a cluster's covariance is mixed with the pooled one, and no standard deviation
    is below a floor: samples are legible and dE[x0|x]/dy is below about 5 on the way, so orders can be measured.
    """
    clusters, pooling, floor = 8, 0.1, 0.05
    try:
        from sklearn.cluster import KMeans
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits() needs scikit-learn: pip install 'diffusion-solvers[cli]'") from error
    images, labels = load_digits(return_X_y=True)
    images = images / 8 - 1
    groups = []
    for label in range(10):
        members = images[labels == label]
        assigned = KMeans(clusters, random_state=0).fit_predict(members)
        groups += [torch.as_tensor(members[assigned == k]) for k in range(clusters)]
    sizes = torch.tensor([len(group) for group in groups]).double()
    weights = sizes / sizes.sum()
    covs = torch.stack([torch.cov(group.T, correction=0) for group in groups])
    pooled = torch.tensordot(weights, covs, 1)
    values, vectors = torch.linalg.eigh((1 - pooling) * covs + pooling * pooled)
    covs = vectors * values.clamp_min(floor**2)[:, None] @ vectors.mT
    means = torch.stack([group.mean(0) for group in groups])
    return Mixture(weights, means.reshape(-1, 1, 8, 8), (covs + covs.mT) / 2)

"""Distances: KL and Wasserstein-2 between Gaussians, sliced Wasserstein-2 between samples."""

from __future__ import annotations

import torch
from torch import Tensor

from reference.gaussian import Gaussian


def kl(p: Gaussian, q: Gaussian) -> float:
    """KL(p || q) in nats; inf when p is singular.

    .5 sum(delta - log(1 + delta)) + .5 |q.cov^-1/2 (p.mean - q.mean)|^2, where delta are the eigenvalues of
    q.cov^-1/2 (p.cov - q.cov) q.cov^-1/2: accurate also when p is close to q.
    """
    if not (q.variances > 0).all():
        raise ValueError(f"q.cov must be positive definite: its least eigenvalue is {q.variances.min():.3g}")
    root = q.basis * q.variances.rsqrt()
    delta = torch.linalg.eigvalsh(root.T @ (p.cov - q.cov) @ root).clamp_min(-1.0)
    shift = (p.mean - q.mean).flatten() @ root
    return 0.5 * ((delta - delta.log1p()).sum() + shift.square().sum()).item()


def wasserstein2(p: Gaussian, q: Gaussian) -> float:
    """The Wasserstein-2 distance (not its square) between two Gaussians; singular covariances are fine.

    W2^2 = |p.mean - q.mean|^2 + min over orthogonal U of |p.cov^1/2 - q.cov^1/2 U|^2 (Frobenius), which equals
    tr(S1 + S2 - 2 (S2^1/2 S1 S2^1/2)^1/2) without its cancellation.
    """
    root_p, root_q = (g.basis * g.variances.sqrt() @ g.basis.T for g in (p, q))
    left, _, right = torch.linalg.svd(root_q @ root_p)
    difference = root_p - root_q @ left @ right
    return ((p.mean - q.mean).square().sum() + difference.square().sum()).sqrt().item()


def sliced_wasserstein2(x: Tensor, y: Tensor, projections: int = 128, seed: int = 0) -> float:
    """Root mean square, over random unit directions, of the 1-D Wasserstein-2 distances of x and y, both [B, ...]."""
    if x.shape != y.shape:
        raise ValueError(f"x and y must have one shape: {list(x.shape)} and {list(y.shape)}")
    u, v = (samples.to("cpu", torch.float64).flatten(1) for samples in (x, y))
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(u.shape[1], projections, dtype=torch.float64, generator=generator)
    directions = directions / directions.norm(dim=0)
    difference = (u @ directions).sort(0).values - (v @ directions).sort(0).values
    return difference.square().mean().sqrt().item()

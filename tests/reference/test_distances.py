"""Distances between Gaussians against their textbook formulas, and where those lose their digits."""

import math

import pytest
import torch

from reference import Gaussian, kl, sliced_wasserstein2, wasserstein2

P = Gaussian([0.3, -1.0, 0.5], [[1.0, 0.2, 0.1], [0.2, 0.5, -0.3], [0.1, -0.3, 0.8]])
Q = Gaussian([0.0, 0.4, 1.5], [[0.4, -0.1, 0.2], [-0.1, 0.9, 0.3], [0.2, 0.3, 1.2]])


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def test_kl_is_the_textbook_formula():
    other = torch.distributions.MultivariateNormal
    expected = torch.distributions.kl_divergence(other(P.mean, P.cov), other(Q.mean, Q.cov)).item()
    assert kl(P, Q) == pytest.approx(expected, rel=1e-12)
    assert kl(P, P) == 0


def test_wasserstein2_is_the_textbook_formula():
    cross = root(root(Q.cov) @ P.cov @ root(Q.cov))
    square = (P.mean - Q.mean).square().sum() + torch.trace(P.cov + Q.cov - 2 * cross)
    assert wasserstein2(P, Q) == pytest.approx(square.sqrt().item(), rel=1e-12)
    assert wasserstein2(P, Q) == pytest.approx(wasserstein2(Q, P), rel=1e-12)


def test_small_distances_keep_their_digits():
    """A covariance (1 + e)^2 S has W2 = e sqrt(tr S) and KL = e^2 d + O(e^3), at e = 1e-9."""
    e = 1e-9
    near = Gaussian(P.mean, P.cov * (1 + e) ** 2)
    assert wasserstein2(near, P) == pytest.approx(e * P.cov.trace().sqrt().item(), rel=1e-5)
    assert wasserstein2(P, P) < 1e-15
    nearer = Gaussian(P.mean, P.cov * (1 + 1e-5) ** 2)
    assert kl(nearer, P) == pytest.approx(1e-10 * 3, rel=1e-4)


def test_singular_covariances():
    flat = Gaussian([0.0, 0.0], torch.diag(torch.tensor([1.0, 0.0])))
    point, round_ = Gaussian([3.0, 4.0], torch.zeros(2, 2)), Gaussian([0.0, 0.0], torch.eye(2))
    assert wasserstein2(flat, point) == pytest.approx(math.sqrt(26), rel=1e-14)
    assert wasserstein2(flat, round_) == pytest.approx(1.0, rel=1e-14)
    assert kl(flat, round_) == math.inf
    with pytest.raises(ValueError, match=r"q\.cov must be positive definite"):
        kl(round_, flat)


def test_sliced_distance_of_a_shift_is_its_mean_projection():
    x = torch.randn(11, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shift = torch.full((2, 3), 0.5, dtype=torch.float64)
    shuffled = (x + shift)[torch.randperm(11, generator=torch.Generator().manual_seed(1))]
    expected = shift.norm().item() / math.sqrt(6)
    assert sliced_wasserstein2(x, shuffled, projections=20_000, seed=0) == pytest.approx(expected, rel=0.02)
    assert sliced_wasserstein2(x, x.flip(0)) < 1e-15  # a matrix product may round rows differently
    with pytest.raises(ValueError, match="one shape"):
        sliced_wasserstein2(x, x[1:])

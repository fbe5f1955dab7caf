"""Small distributions and states that every test of `reference` shares."""

import pytest
import torch

from reference import Empirical, Gaussian, Mixture
from solvers.schedules import EDM, VP, Cosine, Flow

SCHEDULES = {"vp": VP(), "cosine": Cosine(), "edm": EDM(), "flow": Flow()}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(d, seed):
    root = torch.randn(d, d, dtype=torch.float64, generator=generator(seed)) / d**0.5
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def make_gaussian(shape=(3,), seed=0):
    mean = torch.randn(shape, dtype=torch.float64, generator=generator(seed))
    return Gaussian(mean, covariance(mean.numel(), seed))


def make_mixture(shape=(3,), k=2, seed=0):
    means = torch.randn((k, *shape), dtype=torch.float64, generator=generator(seed))
    covs = torch.stack([covariance(means[0].numel(), seed + i) for i in range(k)])
    return Mixture(torch.arange(1, k + 1) / (k * (k + 1) / 2), means, covs)


DISTRIBUTIONS = {
    "gaussian": make_gaussian((3, 1)),
    "mixture": make_mixture((3, 1), k=2),
    "empirical": Empirical(torch.randn(5, 3, 1, dtype=torch.float64, generator=generator(1))),
}


@pytest.fixture(params=SCHEDULES.values(), ids=SCHEDULES.keys())
def schedule(request):
    return request.param


@pytest.fixture(params=DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def distribution(request):
    return request.param


@pytest.fixture
def gaussian():
    return make_gaussian()


@pytest.fixture
def mixture():
    return make_mixture()


@pytest.fixture
def line():
    """A mixture in one dimension."""
    return Mixture([0.2, 0.5, 0.3], [[-1.5], [0.1], [1.0]], [[[0.16]], [[0.25]], [[0.09]]])


@pytest.fixture
def x():
    """States of the distributions above, [5, 3, 1]."""
    return torch.randn(5, 3, 1, dtype=torch.float64, generator=generator(7))

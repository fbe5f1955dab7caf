"""Exact flows and transitions: they solve their equations, compose, and keep the marginals."""

import pytest
import torch
from torch.testing import assert_close

from reference import Empirical, Gaussian, Mixture, digits
from reference.distribution import integrate, levels
from solvers.schedules import EDM, VP, Flow

X = torch.tensor([[-4.0], [-1.3], [-0.2], [0.01], [0.9], [3.5]], dtype=torch.float64)


@pytest.mark.parametrize("there_and_back", [(0.9, 0.05), (0.05, 0.9)])
def test_matching_distribution_functions_solves_the_ode(line, schedule, there_and_back):
    s, t = there_and_back
    exact = line.flow(X, schedule, s, t)
    certified = integrate(line, X, schedule, s, t)
    assert_close(exact, certified, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(exact * (1 + 1e-9), certified, rtol=1e-11, atol=1e-11)


def test_flow_is_exact_far_out_and_between_components():
    """Far tails move like the outermost component; the gap of a symmetric mixture moves symmetrically."""
    two = Mixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.01]], [[0.01]]])
    x = torch.tensor([[60.0], [-60.0], [0.0], [1e-3], [-1e-3]], dtype=torch.float64)
    y = two.flow(x, VP(), 1.0, 0.5)
    there = two.flow(y, VP(), 0.5, 1.0)
    assert_close(there, x, rtol=1e-10, atol=1e-13)
    assert_close(y[0], -y[1], rtol=1e-14, atol=0)
    assert abs(y[2]) < 1e-15
    narrow = EDM().time(torch.tensor(0.9).double()).item()
    gap = torch.tensor([[1e-3], [0.2]], dtype=torch.float64)
    assert_close(
        two.flow(gap, EDM(), narrow, 0.05), integrate(two, gap, EDM(), narrow, 0.05), rtol=1e-9, atol=0
    )


def test_flow_runs_from_pure_noise_to_data(line, gaussian):
    assert_close(line.flow(X, Flow(), 1.0, 0.0), integrate(line, X, Flow(), 1.0, 0.0), rtol=1e-11, atol=1e-11)
    x = torch.ones(2, 3, dtype=torch.float64)
    assert_close(
        gaussian.flow(x, Flow(), 1.0, 0.0), integrate(gaussian, x, Flow(), 1.0, 0.0), rtol=1e-11, atol=1e-11
    )
    root = gaussian.basis * gaussian.variances.sqrt() @ gaussian.basis.T
    assert_close(gaussian.flow(x, Flow(), 1.0, 0.0), gaussian.mean + x @ root, rtol=1e-12, atol=1e-12)


def test_gaussian_flow_solves_the_ode(gaussian, schedule):
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(
        gaussian.flow(x, schedule, 0.9, 0.1), integrate(gaussian, x, schedule, 0.9, 0.1), rtol=0, atol=1e-11
    )


def test_flow_of_nothing_is_the_identity(line, mixture):
    assert_close(line.flow(X, VP(), 0.4, 0.4), X, rtol=1e-14, atol=1e-14)
    x = torch.ones(2, 3, dtype=torch.float64)
    assert_close(mixture.flow(x, VP(), 0.4, 0.4), x)


def test_uncertain_flow_is_an_error(mixture):
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"only certain to .*, not tol = 1e-20"):
        mixture.flow(x, VP(), 0.9, 0.1, tol=1e-20)


def test_flow_keeps_to_the_nearest_point():
    points = Empirical([[-1.0, 0.0], [1.0, 0.5]])
    x = torch.tensor([[-0.9, 0.1], [0.7, 0.6]], dtype=torch.float64)
    t = 0.01
    end = points.flow(x, EDM(), 0.4, t)
    assert_close(points.data(end, 1.0, t), points.points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.7])
def test_transitions_compose_and_keep_the_marginal(gaussian, schedule, tau):
    s, middle, t = 0.9, 0.5, 0.1
    (a1, b1, c1), (a2, b2, c2) = (
        gaussian.transition(schedule, s, middle, tau),
        gaussian.transition(schedule, middle, t, tau),
    )
    a, b, c = gaussian.transition(schedule, s, t, tau)
    close = {"rtol": 1e-12, "atol": 1e-12}
    assert_close(a, a2 @ a1, **close)
    assert_close(b, a2 @ b1 + b2, **close)
    assert_close(c, a2 @ c1 @ a2.T + c2, **close)
    first, last = (gaussian.marginal(*(v.item() for v in levels(schedule, time))) for time in (s, t))
    assert_close(a @ first.mean + b, last.mean, **close)
    assert_close(a @ first.cov @ a.T + c, last.cov, **close)
    assert tau == 0 or not torch.allclose(a @ first.cov @ a.T + c * 1.001, last.cov, **close)


def test_transition_with_tau_1_is_the_reversed_forward_process(gaussian):
    """Bayes: x_t given x_s from q(x_t) and x_s | x_t ~ N(r x_t, sigma_s^2 - r^2 sigma_t^2)."""
    s, t = 0.8, 0.3
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(VP(), s), levels(VP(), t)
    before = gaussian.marginal(alpha_t.item(), sigma_t.item())
    r = alpha_s / alpha_t
    joint = r**2 * before.cov + (sigma_s**2 - r**2 * sigma_t**2) * torch.eye(3).double()
    gain = r * before.cov @ torch.linalg.inv(joint)
    a, b, c = gaussian.transition(VP(), s, t)
    assert_close(a, gain, rtol=1e-12, atol=1e-12)
    assert_close(b, before.mean - gain @ (r * before.mean), rtol=1e-12, atol=1e-12)
    assert_close(c, before.cov - gain @ before.cov * r, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_transition_from_pure_noise_to_data_is_the_limit(tau):
    singular = Gaussian([1.0, -1.0], torch.diag(torch.tensor([0.5, 0.0])))
    a, b, c = singular.transition(Flow(), 1.0, 0.0, tau)
    assert_close(
        a, torch.diag(torch.tensor([0.5**0.5 if tau == 0 else 0.0, 0.0]).double()), rtol=1e-6, atol=0
    )
    assert_close(b, singular.mean)
    assert_close(c + a @ a.T, singular.cov)


def test_digits_flow_is_certified():
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    back = digits().flow(digits().flow(x, Flow(), 1.0, 0.2), Flow(), 0.2, 1.0)
    assert_close(back, x, rtol=0, atol=1e-9)

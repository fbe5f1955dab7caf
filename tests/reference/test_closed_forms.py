"""Posterior means, density, Jacobian and exact models agree with one another and with their definitions."""

import pytest
import torch
from torch.testing import assert_close

from reference import Empirical, Gaussian, Mixture, digits

ALPHA, SIGMA = 0.6, 0.7
TIGHT = {"rtol": 1e-11, "atol": 1e-12}


def test_score_is_the_gradient_of_the_log_density(distribution, x):
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(distribution.log_density(x, ALPHA, SIGMA).sum(), x)
    assert_close(distribution.score(x, ALPHA, SIGMA), gradient, **TIGHT)


def test_jacobian_is_the_derivative_of_the_data_prediction(distribution, x):
    for n in range(len(x)):
        expected = torch.autograd.functional.jacobian(
            lambda u: distribution.data(u, ALPHA, SIGMA), x[n : n + 1]
        )
        assert_close(distribution.jacobian(x[n : n + 1], ALPHA, SIGMA)[0], expected.reshape(3, 3), **TIGHT)


def test_noise_and_data_add_up_to_the_state(distribution, x):
    noise, data = distribution.noise(x, ALPHA, SIGMA), distribution.data(x, ALPHA, SIGMA)
    assert_close(ALPHA * data + SIGMA * noise, x, **TIGHT)


def test_data_is_the_posterior_mean(line):
    """Tweedie against the definition: E[x0|x] by quadrature of x0 p(x0) N(x; alpha x0, sigma^2)."""
    x0 = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    for x in (-0.9, 0.3):
        weight = (line.log_density(x0) - (x - ALPHA * x0[:, 0]) ** 2 / (2 * SIGMA**2)).exp()
        expected = (weight * x0[:, 0]).sum() / weight.sum()
        assert_close(
            line.data(torch.tensor([[x]], dtype=torch.float64), ALPHA, SIGMA).squeeze(), expected, **TIGHT
        )


def test_densities_integrate_to_one(line):
    points = Empirical([[-1.0], [0.5]])
    x = torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None]
    for distribution in (line, points, line.moments):
        mass = distribution.log_density(x, ALPHA, SIGMA).exp().sum() * (x[1] - x[0])
        assert_close(mass.item(), 1.0, **TIGHT)


def test_levels_may_differ_within_a_batch(distribution, x):
    alpha, sigma = torch.linspace(0.2, 0.9, 5).double(), torch.linspace(0.8, 0.3, 5).double()
    for name in ("noise", "data", "score", "log_density", "jacobian"):
        function = getattr(distribution, name)
        apart = torch.cat([function(x[n : n + 1], alpha[n], sigma[n].item()) for n in range(5)])
        assert_close(function(x, alpha, sigma), apart, **TIGHT)


def test_float32_in_is_float32_out(distribution, x, schedule):
    single, t = x.float(), torch.full((5,), 0.4)
    for name in ("noise", "data", "score", "log_density", "jacobian"):
        out = getattr(distribution, name)(single, ALPHA, SIGMA)
        assert out.dtype == torch.float32
        assert_close(out, getattr(distribution, name)(single.double(), ALPHA, SIGMA).float())
    assert distribution.model(schedule)(single, t).dtype == torch.float32
    assert distribution.flow(single, schedule, 0.5, 0.4).dtype == torch.float32


def test_one_component_is_a_gaussian(gaussian, schedule):
    one = Mixture([1.0], gaussian.mean[None], gaussian.cov[None])
    x = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    for name in ("noise", "data", "score", "log_density", "jacobian"):
        for levels in ((ALPHA, SIGMA), (0.0, 1.0), (1.0, 1e-9)):
            assert_close(getattr(one, name)(x, *levels), getattr(gaussian, name)(x, *levels), **TIGHT)
    assert_close(
        one.flow(x, schedule, 0.9, 0.1), gaussian.flow(x, schedule, 0.9, 0.1), rtol=1e-11, atol=1e-11
    )


def test_points_are_a_mixture_of_narrow_components(x):
    points = torch.tensor([[0.3, 1.0, -1.0], [1.2, -0.4, 0.0]], dtype=torch.float64).reshape(2, 3, 1)
    narrow = Mixture([0.5, 0.5], points, torch.zeros(2, 3, 3))
    for name in ("noise", "data", "score", "log_density", "jacobian"):
        args = x, ALPHA, SIGMA
        assert_close(getattr(Empirical(points), name)(*args), getattr(narrow, name)(*args), **TIGHT)


def test_limits_at_the_ends(mixture, gaussian):
    x = torch.linspace(-2, 2, 15, dtype=torch.float64).reshape(5, 3)
    for distribution in (mixture, gaussian):
        assert_close(distribution.data(x, 1.0, 0.0), x, **TIGHT)
        assert_close(distribution.noise(x, 1.0, 0.0), torch.zeros_like(x))
        assert_close(distribution.noise(x, 0.0, 1.0), x, **TIGHT)
    assert_close(mixture.data(x, 0.0, 1.0), mixture.moments.mean.expand(5, 3), **TIGHT)
    points = Empirical([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
    assert_close(points.data(x + 3, 1.0, 0.0), points.points[1].expand(5, 3))


def test_small_noise_keeps_its_digits(mixture):
    """At sigma = 1e-9 the noise still has its digits: E[eps|x] = -sigma grad log p(x) to first order."""
    x = torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x).sum(), x)
    assert_close(mixture.noise(x.detach(), 1.0, 1e-9) / -1e-9, gradient, **TIGHT)


def test_delta_data_is_fine():
    delta = Gaussian([1.0, -2.0], torch.zeros(2, 2))
    x = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    assert_close(delta.data(x, 0.3, 0.5), delta.mean[None])
    assert_close(delta.data(x, 1.0, 0.0), delta.mean[None])
    assert_close(delta.noise(x, 0.3, 0.5), (x - 0.3 * delta.mean) / 0.5)
    with pytest.raises(ValueError, match="no density"):
        delta.log_density(x)


def test_draws_have_the_moments(distribution):
    x = distribution.draw(40_000, torch.Generator().manual_seed(0)).flatten(1)
    if isinstance(distribution, Empirical):
        points = distribution.points.flatten(1)
        mean, cov = points.mean(0), torch.cov(points.T, correction=0)
    else:
        moments = distribution.moments if isinstance(distribution, Mixture) else distribution
        mean, cov = moments.mean.flatten(), moments.cov
    assert_close(x.mean(0), mean, atol=0.03, rtol=0)
    assert_close(torch.cov(x.T), cov, atol=0.04, rtol=0.0)


def test_models_are_the_conventions(distribution, schedule, x):
    t = torch.linspace(0.2, 0.7, 5).double()
    alpha, sigma = (level(t)[:, None, None] for level in (schedule.alpha, schedule.sigma))
    noise = distribution.noise(x, alpha, sigma)
    data = distribution.data(x, alpha, sigma)
    exact = {
        name: distribution.model(schedule, name)(x, t) for name in ("noise", "data", "velocity", "score")
    }
    assert_close(exact["noise"], noise)
    assert_close(exact["data"], data)
    assert_close(exact["velocity"], alpha * noise - sigma * data)
    assert_close(exact["score"], distribution.score(x, alpha, sigma))


def test_flow_model_is_the_time_derivative_of_the_flow(gaussian, schedule):
    x, t, h = torch.tensor([[0.3, -0.4, 1.0]], dtype=torch.float64), 0.6, 1e-3
    ends = [gaussian.flow(x, schedule, t, t + shift) for shift in (-2 * h, -h, h, 2 * h)]
    slope = (ends[0] - 8 * ends[1] + 8 * ends[2] - ends[3]) / (12 * h)
    velocity = gaussian.model(schedule, "flow")(x, torch.tensor([t], dtype=torch.float64))
    assert_close(velocity, slope, rtol=1e-8, atol=1e-9)
    assert not torch.allclose(velocity * 1.000001, slope, rtol=1e-8, atol=1e-9)


def test_models_work_where_gradients_are_off(gaussian, schedule):
    x, t = torch.ones(1, 3), torch.tensor([0.5])
    expected = gaussian.model(schedule, "flow")(x, t)
    with torch.no_grad():
        assert_close(gaussian.model(schedule, "flow")(x, t), expected)
    with torch.inference_mode():
        assert_close(gaussian.model(schedule, "flow")(x, t), expected)


def test_edm_network_gives_back_the_data(distribution, schedule, x):
    sd, t = 0.6, torch.linspace(0.2, 0.7, 5).double()
    rho = (schedule.sigma(t) / schedule.alpha(t))[:, None, None]
    y = x / schedule.alpha(t)[:, None, None]
    cin = (rho**2 + sd**2).rsqrt()
    out = distribution.model(schedule, "edm", sigma_data=sd)(cin * y, t)
    data = sd**2 * cin**2 * y + rho * sd * cin * out
    assert_close(data, distribution.model(schedule, "data")(x, t), rtol=1e-10, atol=1e-11)


def test_errors_name_the_argument(gaussian, mixture, schedule):
    eye = torch.eye(2)
    with pytest.raises(ValueError, match="cov has shape"):
        Gaussian([0.0], eye)
    with pytest.raises(ValueError, match="cov must be positive semidefinite"):
        Gaussian([0.0, 0.0], -eye)
    with pytest.raises(ValueError, match="covs must be finite and symmetric"):
        Mixture([1.0], [[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]])
    with pytest.raises(ValueError, match="cov must be finite"):
        Gaussian([0.0, 0.0], eye * torch.nan)
    with pytest.raises(ValueError, match="weights"):
        Mixture([0.5, 0.6], torch.zeros(2, 2), torch.stack([eye, eye]))
    with pytest.raises(ValueError, match="means has shape"):
        Mixture([1.0], torch.zeros(2, 2), torch.stack([eye, eye]))
    with pytest.raises(ValueError, match="points has shape"):
        Empirical([1.0, 2.0])
    with pytest.raises(ValueError, match=r"x has shape \[5, 4\], expected \[B, 3\]"):
        mixture.noise(torch.zeros(5, 4), 1.0, 1.0)
    with pytest.raises(ValueError, match="not one of noise, data, velocity, score, flow, edm"):
        gaussian.model(schedule, "epsilon")


def test_digits_are_digits():
    """Samples lie as close to a real digit as real digits lie to one another, and all ten classes come up."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = torch.as_tensor(images) / 8 - 1
    x = digits().draw(500, torch.Generator().manual_seed(0))
    assert x.shape == (500, 1, 8, 8)
    near, index = torch.cdist(x.flatten(1), images).min(1)
    apart = torch.cdist(images, images).fill_diagonal_(torch.inf).amin(1)
    assert near.median() < 1.3 * apart.median()
    assert set(labels[index]) == set(range(10))
    assert digits() is digits()


def test_a_mixture_of_points_is_refused_where_it_has_no_density():
    points = Mixture([0.5, 0.5], [[-1.0], [1.0]], torch.zeros(2, 1, 1))
    assert points.data(torch.tensor([[0.9]]), 1.0, 0.1).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="take Empirical"):
        points.data(torch.tensor([[0.9]]), 1.0, 0.0)

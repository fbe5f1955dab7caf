"""The law of a table on Gaussian data: against samples, against the matrix of the map, and exact where a table is."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from reference import Gaussian, law
from solvers.schedules import VP, Flow
from textbook import ancestral, ddim, heun, run, table, two_step

TIMES = torch.linspace(0.9, 0.1, 6, dtype=torch.float64)


@pytest.mark.parametrize("build", [ddim, two_step, heun, lambda s, t: ddim(s, t, "velocity")])
def test_law_of_an_ode_table_is_the_image_of_its_start(build, gaussian):
    """Run the table on the mean and on mean + e_i: these are the mean and the matrix of the affine map."""
    plan = build(VP(), TIMES)
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.7, 0.0], [-0.2, 0.1, 0.3]], dtype=torch.float64)
    start = Gaussian([0.3, -0.1, 0.8], root @ root.T)  # does not commute with the data
    x = torch.cat([start.mean[None], start.mean + torch.eye(3)])
    y = run(plan, gaussian.model(VP(), plan.predicts), x)
    matrix = (y[1:] - y[0]).T
    exact = law(plan, gaussian, start)
    assert_close(exact.mean, y[0], rtol=1e-12, atol=1e-12)
    assert_close(exact.cov, matrix @ start.cov @ matrix.T, rtol=1e-12, atol=1e-12)


def test_law_of_a_stochastic_table_is_what_sampling_finds(gaussian):
    """Correlated noise: draw i is used again by row i + 1."""
    plan = ancestral(VP(), TIMES[:5])
    reuse = torch.cat([plan.c, 0.4 * plan.c.flip(0)], 1)
    reuse[0, 1] = 0.0
    plan = table(VP(), plan.times, plan.a, plan.b, reuse, "data")
    exact = law(plan, gaussian)
    n, generator = 200_000, torch.Generator().manual_seed(0)
    start = gaussian.marginal(plan.alpha[0].item(), plan.sigma[0].item())
    x, before = start.draw(n, generator), 0.0
    for i in range(4):
        z = torch.randn(n, 3, dtype=torch.float64, generator=generator)
        m = gaussian.data(x, plan.alpha[i], plan.sigma[i])
        x = plan.a[i] * x + plan.b[i, 0] * m + plan.c[i, 0] * z + plan.c[i, 1] * before
        before = z
    assert_close(x.mean(0), exact.mean, rtol=0, atol=0.008)
    assert_close(torch.cov(x.T), exact.cov, rtol=0, atol=0.012)
    plain = law(table(VP(), plan.times, plan.a, plan.b, plan.c[:, :1], "data"), gaussian)
    assert (plain.cov - exact.cov).abs().max() > 0.03


def test_law_of_the_exact_transition_is_the_marginal():
    """With the rows of the exact SDE step of isotropic data, the law is the marginal to rounding."""
    data, times = Gaussian([0.7], [[0.3]]), TIMES
    rows = [data.transition(VP(), s.item(), t.item()) for s, t in pairwise(times)]
    alpha, sigma = VP().alpha(times), VP().sigma(times)
    # x_t = A x_s + offset is a x + b E[x0|x] for b = (A - a) / gain, and a to match the offset.
    p = alpha[:-1] ** 2 * 0.3 + sigma[:-1] ** 2
    gain, shift = alpha[:-1] * 0.3 / p, 0.7 - alpha[:-1] ** 2 * 0.3 / p * 0.7
    b = torch.stack([row[1].squeeze() for row in rows]) / shift
    a = torch.stack([row[0].squeeze() for row in rows]) - b * gain
    c = torch.stack([row[2].squeeze() for row in rows]).sqrt()
    end = law(table(VP(), times, a, b[:, None], c[:, None], "data"), data)
    exact = data.marginal(alpha[-1].item(), sigma[-1].item())
    assert_close(end.mean, exact.mean, rtol=1e-13, atol=0)
    assert_close(end.cov, exact.cov, rtol=1e-13, atol=0)
    wrong = law(table(VP(), times, a, b[:, None] * 1.001, c[:, None], "data"), data)
    assert not torch.allclose(wrong.cov, exact.cov, rtol=1e-5, atol=0)


def test_law_does_not_depend_on_the_form(gaussian):
    laws = [law(ddim(VP(), TIMES, form), gaussian) for form in ("noise", "data", "velocity")]
    for other in laws[1:]:
        assert_close(other.mean, laws[0].mean, rtol=1e-13, atol=1e-13)
        assert_close(other.cov, laws[0].cov, rtol=1e-13, atol=1e-13)


def test_law_runs_from_pure_noise_to_a_point():
    """Delta data, alpha = 0 at the start and sigma = 0 at the end: every consistent table is exact."""
    data = Gaussian([1.0, -2.0], torch.zeros(2, 2))
    end = law(ddim(Flow(), torch.linspace(1, 0, 4, dtype=torch.float64), "data"), data)
    assert_close(end.mean, data.mean)
    assert_close(end.cov, data.cov)


def test_a_law_on_other_data_is_refused(mixture):
    with pytest.raises(TypeError, match="data is Mixture: a law is exact on Gaussian data alone"):
        law(None, mixture)

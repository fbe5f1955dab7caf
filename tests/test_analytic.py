"""Analytic-DPM: the reverse variance is the exact one, bounds hold, trajectories are optimal, gamma is estimated and kept."""

import itertools
import math
from functools import partial

import pytest
import torch

import solvers as sv
from problems import PROBLEMS, VP, generator
from reference import Gaussian, Mixture, law, path_kl, wasserstein2

SCHEDULES = {
    "vp": VP, "ve": sv.VE(), "edm": sv.EDM(), "flow": sv.Flow(start=0.95, stop=0.01), "subvp": sv.SubVP(),
    "discrete": sv.Discrete.linear(1000),
}  # fmt: skip
VARIANCES = torch.tensor([0.05, 0.3, 2.0], dtype=torch.float64)
DATA = Gaussian(torch.tensor([0.7, -0.4, 1.1]), torch.diag(VARIANCES))
ISOTROPIC = Gaussian(torch.tensor([0.7, -0.4, 1.1]), 0.3 * torch.eye(3, dtype=torch.float64))
GAMMA = sv.gaussian_gamma(VARIANCES)
GRIDS = {"even": [-3.9, -2.0, 0.0, 2.0, 4.0], "uneven": [-3.9, -3.6, -0.4, 0.1, 4.0], "one step": [-3.9, 4.0]}


def times_of(schedule, grid):
    return schedule.time(torch.tensor(GRIDS[grid], dtype=torch.float64))


def marginal_of(plan, data):
    return data.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_isotropic_gaussian_data_are_sampled_exactly_in_any_steps(schedule, grid, eta):
    schedule = SCHEDULES[schedule]
    plan = sv.analytic_dpm(schedule, times_of(schedule, grid), sv.gaussian_gamma(0.3), eta=eta)
    assert wasserstein2(law(plan, ISOTROPIC), marginal_of(plan, ISOTROPIC)) < 1e-10 * plan.alpha[-1]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_variance_is_the_mean_of_the_exact_reverse_variances(schedule, grid):
    """P_t b / (a^2 P_t + b) for every variance of the data; the exact transition of the reverse SDE."""
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, grid)
    plan = sv.analytic_dpm(schedule, times, GAMMA)
    for i, (s, t) in enumerate(itertools.pairwise(times.tolist())):
        _, _, exact = DATA.transition(schedule, s, t, tau=1.0)
        assert plan.c[i, 0].item() ** 2 == pytest.approx(exact.trace().item() / 3, rel=1e-10)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_no_factor_on_its_noise_makes_the_marginal_better_and_a_thousandth_is_seen(eta, steps):
    """On isotropic data, where the optimum is exact: the square root of the sum of squares cannot be met by other noise."""
    plan = sv.analytic_dpm(VP, sv.logsnr(VP, steps), sv.gaussian_gamma(0.3), eta=eta)
    damaged = sv.Plan(plan.times, plan.alpha, plan.sigma, plan.a, plan.b, 1.001 * plan.c)
    exact = marginal_of(plan, ISOTROPIC)
    assert wasserstein2(law(damaged, ISOTROPIC), exact) > 1e4 * wasserstein2(law(plan, ISOTROPIC), exact)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_bounds_hold_and_are_reached(schedule):
    """L^2 <= variance <= L^2 + A^2 rho_s^2; the upper one of DDPM is b / a^2, and b for N(0, I) data on VP."""
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, "uneven")
    for eta in (0.0, 0.4, 1.0):
        least = sv.ddim(schedule, times, eta)
        low = least.c[:, 0] ** 2 if eta else torch.zeros(4, dtype=torch.float64)
        high = low + (least.b[:, 0] * least.sigma[:-1] / least.alpha[:-1]) ** 2
        found = sv.analytic_dpm(schedule, times, GAMMA, eta=eta).c[:, 0] ** 2
        assert (low < found).all()
        assert (found < high).all()
        for gamma, bound in ((1.0, low), (0.0, high), (1.3, low), (-0.2, high)):
            plan = sv.analytic_dpm(schedule, times, torch.full((4,), gamma), eta=eta)
            assert torch.allclose(plan.c[:, 0] ** 2, bound, rtol=1e-12, atol=0)
    large = sv.ddpm(schedule, times, "large")
    a = large.alpha[:-1] / large.alpha[1:]
    assert torch.allclose(high, (large.c[:, 0] / a) ** 2, rtol=1e-12, atol=0)


def test_the_large_variance_is_the_optimum_of_standard_normal_data_on_vp():
    times = sv.logsnr(VP, 5)
    optimum = sv.analytic_dpm(VP, times, VP.sigma(times[:-1]) ** 2)
    assert torch.allclose(optimum.c, sv.ddpm(VP, times, "large").c, rtol=1e-10)


def test_data_of_bounded_variance_bound_the_reverse_variance():
    """limit = 1 for data in [-1, 1]: at most L^2 + A^2."""
    plan = sv.analytic_dpm(VP, sv.logsnr(VP, 3), torch.zeros(3), limit=1.0)
    least = sv.ddpm(VP, plan.times)
    assert torch.allclose(plan.c[0] ** 2, least.c[0] ** 2 + least.b[0] ** 2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_last_noise_moves_pixels_by_at_most_what_is_said(eta):
    schedule = sv.Discrete.linear(1000)
    free, clipped = (
        sv.analytic_dpm(schedule, sv.trailing(schedule, 6), torch.full((6,), 0.5), eta, pixels=pixels)
        for pixels in (0, 2)
    )
    assert torch.equal(free.c[[0, 1, 2, 3]], clipped.c[[0, 1, 2, 3]])
    assert clipped.c[4, 0] * math.sqrt(2 / math.pi) == pytest.approx(2 * 2 / 255)  # E |N(0, c^2)|
    assert free.c[4, 0] > clipped.c[4, 0]
    assert free.c[5, 0] == clipped.c[5, 0] == 0


def test_a_step_to_the_data_adds_noise_only_if_asked():
    flow = sv.Flow(start=0.9)
    mean, noise = (
        sv.analytic_dpm(flow, sv.uniform(flow, 2), sv.gaussian_gamma(0.3), last=last)
        for last in ("mean", "noise")
    )
    assert mean.c[-1] == 0
    assert wasserstein2(law(noise, ISOTROPIC), ISOTROPIC) < 1e-12
    assert wasserstein2(law(mean, ISOTROPIC), ISOTROPIC) > 1e-3


# The path


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_paths_divergence_is_never_above_that_of_a_fixed_variance(schedule, grid):
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, grid)
    optimum = path_kl(sv.analytic_dpm(schedule, times, GAMMA), DATA)
    for other in (sv.ddpm(schedule, times), sv.ddpm(schedule, times, "large")):
        assert optimum <= path_kl(other, DATA)
    assert optimum >= 0


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 25, 100, 1000])
def test_nor_at_any_number_of_steps(steps):
    for times in (sv.logsnr(VP, steps), sv.uniform(VP, steps), sv.quadratic(VP, steps)):
        optimum, *others = (
            path_kl(plan, DATA)
            for plan in (sv.analytic_dpm(VP, times, GAMMA), sv.ddpm(VP, times), sv.ddpm(VP, times, "large"))
        )
        assert 0 <= optimum <= min(others)


def test_noise_a_thousandth_off_has_a_longer_path():
    plan = sv.analytic_dpm(VP, sv.logsnr(VP, 6), GAMMA)
    for factor in (0.999, 1.001):
        other = sv.Plan(plan.times, plan.alpha, plan.sigma, plan.a, plan.b, factor * plan.c)
        assert path_kl(other, DATA) > path_kl(plan, DATA) + 1e-6


def test_the_paths_divergence_is_what_samples_of_the_forward_process_show():
    """E log q(x_t | x_s) - log p(x_t | x_s), over steps, by 2e5 draws."""
    plan = sv.ddpm(VP, sv.logsnr(VP, 3), "large")
    x = [DATA.draw(200_000, generator(7))]
    for i in (3, 2, 1, 0):  # the forward process, from the data
        alpha, sigma = (1.0, 0.0) if i == 3 else (plan.alpha[i + 1].item(), plan.sigma[i + 1].item())
        a = plan.alpha[i].item() / alpha
        noise = torch.randn(x[0].shape, dtype=torch.float64, generator=generator(8 + i))
        x.insert(0, a * x[0] + math.sqrt(plan.sigma[i].item() ** 2 - (a * sigma) ** 2) * noise)
    total, model = torch.zeros(200_000, dtype=torch.float64), DATA.model(VP, "data")
    for i in range(3):
        gain, offset, cov = DATA.transition(VP, plan.times[i].item(), plan.times[i + 1].item(), tau=1.0)
        exact = (x[i + 1] - x[i] @ gain.T - offset) ** 2 / cov.diagonal()
        mean = plan.a[i] * x[i] + plan.b[i, 0] * model(x[i], plan.times[i].expand(len(x[i])))
        ours = (x[i + 1] - mean) ** 2 / plan.c[i, 0] ** 2
        total += ((ours - exact + torch.log(plan.c[i, 0] ** 2) - torch.log(cov.diagonal())) / 2).sum(1)
    error = total.std() / math.sqrt(len(total))
    assert abs(total.mean() - path_kl(plan, DATA)) < 4.5 * error
    assert error < 0.01 * path_kl(plan, DATA)


def cost(times, gamma, schedule=VP):
    lam = schedule.half_logsnr(times)
    return torch.log1p(-(1 - torch.exp(-2 * lam.diff())) * gamma(lam[:-1])).sum().item()


@pytest.mark.parametrize("gamma", [GAMMA, lambda lam: 0.5 + 0.4 * torch.sin(3 * lam)], ids=["data", "wavy"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_the_optimal_trajectory_is_the_best_of_all(steps, gamma):
    candidates = sv.uniform(VP, 8)
    found = sv.optimal_trajectory(VP, candidates, gamma, steps)
    inner = range(1, 8)
    every = [candidates[[0, *chosen, 8]] for chosen in itertools.combinations(inner, steps - 1)]
    assert cost(found, gamma) == pytest.approx(min(cost(times, gamma) for times in every), abs=1e-12)
    assert set(found.tolist()) <= set(candidates.tolist())
    assert found[[0, -1]].tolist() == candidates[[0, -1]].tolist()


def test_the_optimal_trajectory_has_the_least_divergence_of_its_path():
    """The cost is what of the path's divergence depends on the times: it orders trajectories as the divergence itself does."""
    candidates = sv.quadratic(VP, 7)
    every = [candidates[[0, *chosen, 7]] for chosen in itertools.combinations(range(1, 7), 3)]
    divergences = [path_kl(sv.analytic_dpm(VP, times, GAMMA), DATA) for times in every]
    costs = [1.5 * cost(times, GAMMA) for times in every]  # d / 2 of it
    apart = [divergence - lowered for divergence, lowered in zip(divergences, costs, strict=True)]
    assert max(apart) - min(apart) < 1e-9
    best = sv.optimal_trajectory(VP, candidates, GAMMA, 4)
    assert path_kl(sv.analytic_dpm(VP, best, GAMMA), DATA) <= min(divergences) + 1e-9


def test_an_estimate_that_reaches_1_has_no_optimal_trajectory():
    """A step from there would cost nothing, so one great step would look best; the estimate by "error" cannot reach it."""
    x0, candidates = DATA.draw(300, generator(2)), sv.uniform(VP, 30)
    square, error = (
        sv.estimate_gamma(DATA.model(VP), VP, x0, candidates, 1, by=by) for by in ("square", "error")
    )
    with pytest.raises(
        ValueError, match=r"gamma = 1\.\d+ at times\[\d+\] .* expected gamma < 1, as estimate_gamma"
    ):
        sv.optimal_trajectory(VP, candidates, square.values.flip(0)[:-1], 5)
    found = sv.optimal_trajectory(VP, candidates, error, 5)
    assert cost(found, GAMMA) < cost(sv.optimal_trajectory(VP, candidates, GAMMA, 5), GAMMA) + 0.05
    with pytest.raises(ValueError, match="alpha = 0"):
        sv.optimal_trajectory(sv.Flow(), sv.uniform(sv.Flow(), 10), torch.full((10,), 0.5), 4)


def test_a_path_without_noise_is_infinitely_far():
    flow = sv.Flow(start=0.9)
    assert path_kl(sv.ddpm(flow, sv.uniform(flow, 4)), DATA) == math.inf
    assert path_kl(sv.ddim(VP, sv.logsnr(VP, 4)), DATA) == math.inf
    assert path_kl(sv.euler_maruyama(VP, sv.logsnr(VP, 4), eta=0.0), DATA) == math.inf
    with pytest.raises(ValueError, match="whose noise c alone weighs"):
        path_kl(sv.extended_analytic_dpm(VP, sv.logsnr(VP, 4)), DATA)


def test_the_estimate_is_the_same_in_any_batches_of_a_seed():
    x0, times = DATA.draw(7, generator(2)), sv.logsnr(VP, 3)
    whole, parts = (
        sv.estimate_gamma(DATA.model(VP), VP, x0, times, noise=4, batch_size=size) for size in (7, 2)
    )
    assert torch.allclose(whole.values, parts.values, rtol=1e-12)
    for noise in (torch.Generator().manual_seed(1), lambda draw, like: torch.sin(like + draw)):
        assert sv.estimate_gamma(DATA.model(VP), VP, x0, times, noise, batch_size=3).values.isfinite().all()
    with pytest.raises(ValueError, match="noise is for 3 samples, but there are 7"):
        sv.estimate_gamma(DATA.model(VP), VP, x0, times, sv.noise.per_sample(0, range(3)))


def test_a_discrete_network_of_a_thousand_levels_gets_its_trajectory_on_its_levels():
    schedule = sv.Discrete.linear(1000)
    levels = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    times = sv.optimal_trajectory(schedule, levels, GAMMA, 10)
    assert schedule.step(times).dtype == torch.int64
    assert cost(times, GAMMA, schedule) < cost(
        levels[torch.linspace(0, 999, 11).round().long()], GAMMA, schedule
    )


# Gamma


@pytest.mark.parametrize("by", ["error", "square"])
def test_the_estimate_is_within_its_standard_errors(by):
    x0 = DATA.draw(4000, generator(5))
    times = sv.logsnr(VP, 12)
    gamma = sv.estimate_gamma(DATA.model(VP), VP, x0, times, noise=3, by=by, batch_size=999)
    z = (gamma.values - GAMMA(gamma.half_logsnr)) / gamma.standard_error
    assert z.abs().max() < 4
    assert z.square().mean().sqrt() > 0.3  # the errors are not overstated either


def test_the_estimate_by_error_knows_what_is_left_at_both_ends():
    """1 - gamma, which the variance is made of: within a few percent of it, where "square" has not one digit at the noisy end."""
    x0, times = DATA.draw(500, generator(5)), sv.logsnr(VP, 8)
    left = {}
    for by in ("error", "square"):
        gamma = sv.estimate_gamma(DATA.model(VP), VP, x0, times, noise=3, by=by)
        left[by] = gamma.standard_error / (1 - GAMMA(gamma.half_logsnr))
    assert left["error"].max() < 0.06
    assert left["square"][0] > 10


def test_of_an_imperfect_model_the_error_gives_the_better_variance():
    """A mean that is off leaves more variance; E ||eps - eps^||^2 counts it, E ||eps^||^2 does not."""

    def biased(x, t):
        return 0.8 * DATA.noise(x, VP.alpha(t[0]).item(), VP.sigma(t[0]).item())

    x0, times = DATA.draw(6000, generator(5)), sv.logsnr(VP, 3)
    z = torch.randn(x0.shape, dtype=torch.float64, generator=generator(6))
    left = []
    for t in times:
        x = sv.noised(x0, VP, t, z)
        left.append((z - biased(x, t.double().expand(len(x)))).square().mean())
    gammas = {
        by: sv.estimate_gamma(sv.Model(biased, label=lambda t: t), VP, x0, times, 3, by=by)
        for by in ("error", "square")
    }
    for m, lam in enumerate(gammas["error"].half_logsnr):
        error, square = (1 - gammas[by](lam[None]) for by in ("error", "square"))
        assert error.item() == pytest.approx(left[m].item(), rel=0.06, abs=1e-4)
        assert abs(square - left[m]) > 2 * abs(error - left[m]) or m == 3


def test_interpolation_is_exact_for_isotropic_data_and_refuses_to_guess_outside():
    nodes = torch.tensor([-4.0, -1.0, 0.5, 4.0], dtype=torch.float64)
    exact = sv.gaussian_gamma(0.3)
    gamma = sv.Gamma(nodes, exact(nodes), torch.zeros(4))
    between = torch.linspace(-4, 4, 33, dtype=torch.float64)
    assert torch.allclose(gamma(between), exact(between), rtol=1e-9)
    with pytest.raises(ValueError, match=r"half log-SNR 4\.5 is outside gamma's range \[-4, 4\]"):
        gamma(torch.tensor([0.0, 4.5], dtype=torch.float64))


def test_gamma_is_saved_whole_and_comes_back(tmp_path):
    gamma = sv.Gamma([-1.0, 0.0, 2.0], [0.9, 0.5, 0.01], [0.01, 0.02, 0.001])
    gamma.save(tmp_path / "gamma.safetensors")
    back = sv.Gamma.load(tmp_path / "gamma.safetensors")
    assert all(
        torch.equal(getattr(back, n), getattr(gamma, n)) for n in ("half_logsnr", "values", "standard_error")
    )
    (tmp_path / "broken").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        sv.Gamma.load(tmp_path / "broken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "gamma.safetensors"]


def test_a_progress_bar_is_shown_when_asked(capsys):
    sv.estimate_gamma(DATA.model(VP), VP, DATA.draw(4, generator()), sv.logsnr(VP, 2), 0, progress=True)
    assert "gamma" in capsys.readouterr().err


def test_an_estimate_on_a_mixture_gives_samples_nearer_to_the_data_than_a_fixed_variance_does():
    """In 8 dimensions, 10 steps: the mean variance of the samples, which DDPM gets too small and its large variance too large."""
    wide = PROBLEMS["eight"]
    data = Mixture(wide.weights, wide.means / 2, wide.covs / 4)
    model, x0, times = data.model(VP), data.draw(1000, generator(1)), sv.quadratic(VP, 10)
    gamma = sv.estimate_gamma(model, VP, x0, sv.quadratic(VP, 20), noise=2)
    x = torch.randn(2000, 8, dtype=torch.float64, generator=generator(4))
    off = {}
    for name, plan in {
        "analytic": sv.analytic_dpm(VP, times, gamma),
        "small": sv.ddpm(VP, times),
        "large": sv.ddpm(VP, times, "large"),
    }.items():
        off[name] = (
            sv.run(plan, model, x, noise=5).var(0).sum() - data.draw(100_000, generator(9)).var(0).sum()
        ).abs()
    assert off["analytic"] < min(off["small"], off["large"]) / 2


# ML-SDE


def test_the_ml_sde_step_is_the_ddpm_posterior_and_with_the_trace_term_analytic():
    times = sv.logsnr(VP, 5)
    assert sv.ml_sde(VP, times) == sv.ddpm(VP, times)
    assert sv.ml_sde(VP, times, GAMMA) == sv.analytic_dpm(VP, times, GAMMA)


@pytest.mark.parametrize("predicts", ["noise", "score", "data"])
def test_a_prior_with_a_mean_is_a_change_of_variables(predicts):
    """x_t = m + alpha (x_0 - m) + sigma eps: centred on m, data of mean mu are data of mean mu - m."""
    mean = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    moved = Gaussian(DATA.mean - mean, DATA.cov).model(VP, predicts)
    shift = mean if predicts == "data" else torch.zeros(3)

    def net(x, t):  # trained on x itself
        return moved(x - mean, t) + shift

    x = mean + torch.randn(6, 3, dtype=torch.float64, generator=generator())
    plan = sv.ml_sde(VP, sv.logsnr(VP, 4))
    got = sv.run(plan, sv.centred(sv.Model(net, predicts), mean), x - mean, noise=1) + mean
    expected = sv.run(plan, sv.Model(moved, predicts), x - mean, noise=1) + mean
    assert torch.allclose(got, expected, rtol=1e-12)


def test_centred_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="predicts = 'flow': expected noise, score or data"):
        sv.centred(sv.Model(lambda x, t: x, predicts="flow"), torch.zeros(3))


# Refusals


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: sv.analytic_dpm(VP, sv.logsnr(VP, 3), torch.ones(2)), "gamma has shape [2]: expected a number for each of the 3 calls"),
        (lambda: sv.analytic_dpm(VP, sv.logsnr(VP, 3), torch.tensor([1.0, math.nan, 0.5])), "gamma[1] = nan"),
        (lambda: sv.analytic_dpm(sv.Flow(), sv.uniform(sv.Flow(), 3), torch.ones(3)), "alpha = 0"),
        (lambda: sv.analytic_dpm(VP, sv.logsnr(VP, 3), GAMMA, eta=1.5), "eta = 1.5"),
        (lambda: sv.analytic_dpm(VP, sv.logsnr(VP, 3), GAMMA, limit=0.0), "limit = 0.0"),
        (lambda: sv.analytic_dpm(VP, sv.logsnr(VP, 3), GAMMA, pixels=-1.0), "pixels = -1.0"),
        (lambda: sv.analytic_dpm(VP, sv.logsnr(VP, 3), GAMMA, last="none"), "last = 'none'"),
        (lambda: sv.gaussian_gamma(0.0), "variance = 0.0"),
        (lambda: sv.optimal_trajectory(VP, sv.logsnr(VP, 3), GAMMA, 4), "steps = 4"),
        (lambda: sv.Gamma([0.0, 0.0], [0.5, 0.5], [0.0, 0.0]), "increasing"),
        (lambda: sv.Gamma([0.0, 1.0], [0.5], [0.0, 0.0]), "values has shape [1]"),
        (lambda: sv.estimate_gamma(lambda x, t: x, VP, torch.zeros(2, 3), sv.logsnr(VP, 3), 0), "n >= 3"),
        (lambda: sv.estimate_gamma(lambda x, t: x / 0, VP, torch.ones(4, 3), sv.logsnr(VP, 3), 0), "not finite"),
        (lambda: sv.estimate_gamma(lambda x, t: x, VP, torch.ones(4, 3), sv.logsnr(VP, 3), 0, by="mean"), "by = 'mean'"),
        (lambda: sv.estimate_gamma(lambda x, t: x, sv.Flow(), torch.ones(4, 3), [1.0, 0.5], 0), "infinite half log-SNR"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_was_given(act, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        act()
    assert words in str(refusal.value)


def test_no_global_generator_is_touched():
    before = torch.get_rng_state()
    sv.estimate_gamma(DATA.model(VP), VP, DATA.draw(4, generator()), sv.logsnr(VP, 2), noise=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_schedules_own_callable_and_a_list_of_numbers_are_the_same_gamma():
    times = sv.logsnr(VP, 4)
    by_list = sv.analytic_dpm(VP, times, GAMMA(VP.half_logsnr(times[:-1])).tolist())
    assert by_list == partial(sv.analytic_dpm, gamma=GAMMA)(VP, times)

"""Variational bounds: each term in closed form on Gaussian data, the whole below the log-density and tight where it can be."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import solvers as sv
from problems import VP, Counted, generator
from reference import Gaussian, grid, law

SCHEDULES = {
    "vp": VP, "ve": sv.VE(), "flow": sv.Flow(start=0.95, stop=0.01), "cosine": sv.Cosine(),
    "discrete": sv.Discrete.linear(20),
}  # fmt: skip
GRIDS = {"even": [0, 1 / 3, 2 / 3, 1], "uneven": [0, 0.1, 0.15, 0.8, 1], "to data": [0, 0.6, 0.9]}
SOME = [
    ("vp", "even"), ("vp", "to data"), ("ve", "even"), ("flow", "to data"), ("cosine", "uneven"), ("discrete", "to data"),
]  # fmt: skip
REST = [(s, g) for s in SCHEDULES for g in GRIDS if (s, g) not in [*SOME, ("ve", "to data")]]


def on(default, others=()):
    """Parameters (schedule, spacing), those of `others` slow."""
    marked = [(case, ()) for case in default] + [(case, pytest.mark.slow) for case in others]
    cases = [pytest.param(*case, id=" ".join(case), marks=mark) for case, mark in marked]
    return pytest.mark.parametrize(("schedule", "spacing"), cases)


MEAN = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
VARIANCES = torch.tensor([0.05, 0.3, 2.0], dtype=torch.float64)
DATA = Gaussian(MEAN, torch.diag(VARIANCES))
X0 = torch.tensor([[0.9, -1.3, 0.2]], dtype=torch.float64)
BLEND = 0.3  # of the learned variance, in [-1, 1]
PLANS = {  # and what the second output is that each reads
    "small": (sv.ddpm, None),
    "large": (partial(sv.ddpm, variance="large"), None),
    "learned": (partial(sv.ddpm, variance="learned"), "range"),
    "analytic": (partial(sv.analytic_dpm, gamma=sv.gaussian_gamma(VARIANCES)), None),
    "square": (sv.extended_analytic_dpm, "square"),
    "residual": (sv.extended_analytic_dpm, "residual"),
    "eta 1": (partial(sv.ddim, eta=1.0), None),
    "eta 0.5": (partial(sv.ddim, eta=0.5), None),
    "euler": (sv.euler_maruyama, None),
}
NAMES = pytest.mark.parametrize("name", PLANS)


def f64(*values):
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def times_of(schedule, spacing):
    """The fractions of GRIDS in half log-SNR; the last step of "to data" is to sigma = 0."""
    fractions = GRIDS[spacing] + [1] * (spacing == "to data")
    times = grid(schedule, schedule.start, schedule.stop, f64(fractions))
    return torch.cat([times[:-1], times.new_zeros(1)]) if spacing == "to data" else times


def exact(schedule, kind=None, data=DATA):
    """The exact noise prediction, and the second output that a plan asks for."""
    noise = data.model(schedule)

    def pair(x, t):
        eps, level = noise(x, t), (schedule.alpha(t), schedule.sigma(t))
        if kind == "range":
            return eps, torch.full_like(eps, BLEND)
        square = data.noise_square(x, *level)
        return eps, square if kind == "square" else square - eps**2

    return sv.Model(pair if kind else noise, variance=kind)


def made(name, schedule, times, data=DATA):
    build, kind = PLANS[name]
    return build(schedule, times), exact(schedule, kind, data)


def net(x, t):
    """Nothing in particular: a prediction that is not linear, and a second output in (0, 1)."""
    column = t.reshape(-1, *[1] * (x.ndim - 1))
    return (0.9 * x).sin() + 0.2 * column, 0.5 + 0.4 * (3 * x + column).cos()


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# Expectations without Monte Carlo


def gauss(n):
    """Nodes and weights of the standard normal, exact up to degree 2 n - 1."""
    z, w = (torch.from_numpy(v) for v in hermegauss(n))
    return z, w / w.sum()


def column(values, like):
    return values.reshape(-1, *[1] * (like.ndim - 1)).expand_as(like)


def expected_elbo(plan, model, x0, n=3, size=1.0, **options):
    """The expectation over the noise of every term at x0 [B, ...]: elements share the node, as each term is a sum over elements."""
    z, w = gauss(n)
    z = size * z
    wide = x0.repeat_interleave(n, 0)
    bound = sv.elbo(plan, model, wide, lambda draw, like: column(z.repeat(len(x0)), like), **options)
    return sv.Bound(*(v.unflatten(-1, (len(x0), n)) @ w for v in (bound.prior, bound.diffusion, bound.reconstruction)))  # fmt: skip


def expected_continuous(model, schedule, x0, pieces=1, points=48, n=3, **options):
    """Of `continuous_elbo`: the means over its uniform times and normal noises, and the variance of each piece, [K, B]."""
    u, of_time = (torch.from_numpy(v) for v in leggauss(points))
    z, of_noise = gauss(n)
    clock = torch.special.ndtri((1 + u) / 2).repeat_interleave(n).repeat(len(x0))
    w = torch.outer(of_time / 2, of_noise).flatten()

    def source(draw, like):
        if draw % 2 == 0 and draw < 2 * pieces:
            return clock
        return column(z.repeat(points * len(x0)), like)

    wide = x0.repeat_interleave(len(w), 0)
    bound = sv.continuous_elbo(model, schedule, wide, source, pieces, **options)
    prior, terms, last = (
        v.unflatten(-1, (len(x0), len(w))) for v in (bound.prior, bound.diffusion, bound.reconstruction)
    )
    means = sv.Bound(prior @ w, terms @ w, last @ w)
    return means, terms.square() @ w - means.diffusion**2


def over_data(mean, variances, n=3):
    """x0 at the nodes of a Gaussian, [n, d], and the weights."""
    z, w = gauss(n)
    return mean + variances.sqrt() * z[:, None], w


# The papers' formulas


def kernel(name, schedule, s, t, mean=MEAN, v=VARIANCES):
    """Gain, offset and variance of p(x_t | x_s) at the exact prediction x0^ = mean + alpha_s v / P (x_s - alpha_s mean), each [d]."""
    (alpha_s, alpha_t), (sigma_s, sigma_t) = (
        f(torch.stack([s, t])) for f in (schedule.alpha, schedule.sigma)
    )
    total, a = alpha_s**2 * v + sigma_s**2, alpha_s / alpha_t
    large = sigma_s**2 - (a * sigma_t) ** 2  # of x_s given x_t
    small = large * sigma_t**2 / sigma_s**2
    if name == "euler":
        f, g2 = drift_and_diffusion(schedule, s)
        dt = t - s
        return 1 + dt * (f + g2 / total), -dt * g2 / total * alpha_s * mean, -dt * g2 + 0 * v
    own = small * (0.25 if name == "eta 0.5" else 1)
    of_noise = torch.sqrt(sigma_t**2 - own) / sigma_s
    of_data = alpha_t - of_noise * alpha_s
    left = v * sigma_s**2 / total  # Var(x_0 | x_s)
    gain = of_noise + of_data * alpha_s * v / total
    offset = of_data * sigma_s**2 / total * mean
    variance = {
        "small": small,
        "large": large,
        "learned": torch.exp((1 + BLEND) / 2 * large.log() + (1 - BLEND) / 2 * small.log()),
        "analytic": large / a**2 * (1 - large * (1 / total).mean()),
        "square": small + of_data**2 * left,
        "residual": small + of_data**2 * left,
    }.get(name, own)
    return gain, offset, variance + 0 * v


def drift_and_diffusion(schedule, t):
    """f = d log alpha / dt and g^2 = d sigma^2 / dt - 2 f sigma^2."""
    t = t.clone().requires_grad_()
    log_alpha, square = schedule.alpha(t[None]).log() + 0 * t, schedule.sigma(t[None]) ** 2
    (f,), (rate,) = torch.autograd.grad(log_alpha.sum(), t), torch.autograd.grad(square.sum(), t)
    return f, rate - 2 * f * square.detach()


def step_term(schedule, s, t, x0, gain, offset, variance):
    """E KL(q(x_t | x_s, x_0) || N(gain x_s + offset, variance)) over x_s given x_0, [B]."""
    (alpha_s, alpha_t), (sigma_s, sigma_t) = (
        f(torch.stack([s, t])) for f in (schedule.alpha, schedule.sigma)
    )
    a = alpha_s / alpha_t
    of = (sigma_s**2 - (a * sigma_t) ** 2) * sigma_t**2 / sigma_s**2
    still = alpha_t * x0 - gain * alpha_s * x0 - offset
    moving = (a * sigma_t**2 / sigma_s**2 - gain) * sigma_s
    return 0.5 * (of / variance - 1 - torch.log(of / variance) + (still**2 + moving**2) / variance).sum(1)


def end_terms(schedule, start, stop, x0, prior_variance=None, decoder_variance=None):
    """The prior's KL divergence and E log N(x_0; x0^(x_stop), .), [B] each."""
    alpha, sigma = schedule.alpha(start), schedule.sigma(start)
    to = sigma**2 if prior_variance is None else f64(prior_variance)
    prior = 0.5 * (sigma**2 / to - 1 - torch.log(sigma**2 / to) + (alpha * x0) ** 2 / to).sum(1)
    alpha, sigma = schedule.alpha(stop), schedule.sigma(stop)
    total = alpha**2 * VARIANCES + sigma**2
    off = (sigma**2 / total * (x0 - MEAN)) ** 2 + (alpha * VARIANCES / total * sigma) ** 2
    variance = (sigma / alpha) ** 2 if decoder_variance is None else f64(decoder_variance)
    return prior, -0.5 * (torch.log(2 * math.pi * variance) + off / variance).sum(1)


def integral(schedule, start, stop, x0):
    """int E ||eps - eps^||^2 dlambda at x0 [B, d]: with s = sigmoid(2 lambda + log v), of s^2 + s (1 - s) (x0 - mean)^2 / v, where s' = 2 s (1 - s)."""
    z = 2 * schedule.half_logsnr(f64([start], [stop])) + VARIANCES.log()
    area, rise = nn.functional.softplus(z).diff(dim=0) / 2, torch.sigmoid(z).diff(dim=0) / 2
    return (area - rise + rise * (x0 - MEAN) ** 2 / VARIANCES).sum(1)


# Each term is its closed form


def last_with_noise(schedule, times):
    return times[schedule.sigma(times) > 0][-1]


def closed(name, schedule, times, x0=X0):
    """The expectation of every term, from the papers' formulas alone."""
    stop = last_with_noise(schedule, times)
    steps = [(s, t) for s, t in zip(times, times[1:], strict=False) if t >= stop]
    terms = [step_term(schedule, s, t, x0, *kernel(name, schedule, s, t)) for s, t in steps]
    prior, reconstruction = end_terms(schedule, times[0], stop, x0)
    return sv.Bound(prior, torch.stack(terms), reconstruction)


def assert_same(got, wanted, rtol=1e-10, atol=1e-10):
    for name in ("prior", "diffusion", "reconstruction"):
        assert_close(getattr(got, name), getattr(wanted, name), rtol=rtol, atol=atol, msg=f"{name}: {got}, not {wanted}")  # fmt: skip


@NAMES
@on(SOME, REST)
def test_every_term_is_its_closed_form(name, schedule, spacing):
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, spacing)
    got = expected_elbo(*made(name, schedule, times), X0)
    assert_same(got, closed(name, schedule, times))
    assert_close(got.log_p, got.reconstruction - got.prior - got.diffusion.sum(0), rtol=1e-15, atol=0)


@pytest.mark.parametrize("part", ["model", "noise", "variance", "x0"])
def test_a_thousandth_anywhere_is_seen(part):
    """In every term that it can reach, a thousand times the tolerance above."""
    times, x0 = times_of(VP, "even"), X0
    plan, model = made("small", VP, times)
    if part == "variance":
        plan = sv.Plan(plan.times, plan.alpha, plan.sigma, plan.a, plan.b, 1.0005 * plan.c)
    if part == "model":
        model, good = sv.Model(lambda x, t: 1.001 * good.net(x, t)), model
    got = expected_elbo(
        plan, model, x0 * (1.001 if part == "x0" else 1), size=1.001 if part == "noise" else 1
    )
    wanted = closed("small", VP, times)
    assert ((got.diffusion - wanted.diffusion).abs() > 1e-7 * wanted.diffusion).all()
    if part != "variance":
        assert (got.reconstruction - wanted.reconstruction).abs() > 1e-7


@pytest.mark.parametrize("name", ["large", "euler"])
@pytest.mark.parametrize("schedule", [sv.EDM(), sv.VE()], ids=["edm", "ve"])
def test_a_step_of_the_whole_way_keeps_its_digits(schedule, name):
    """The posterior's variance is 1e-9 of the row's, of which a logarithm is left."""
    times = f64(schedule.start, schedule.stop)
    assert_same(expected_elbo(*made(name, schedule, times), X0), closed(name, schedule, times))


@NAMES
@on(SOME[3:5], SOME[:3] + SOME[5:])
def test_given_the_noise_the_terms_are_divergences_from_what_run_does(name, schedule, spacing):
    """Of any network: each row's law is read off `run`, q(x_t | x_s, x_0) is Bayes' rule, KL divergences are torch's."""
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, spacing)
    build, kind = PLANS[name]
    plan = build(schedule, times)
    model = sv.Model(net if kind else lambda x, t: net(x, t)[0], variance=kind)
    x0, source = normals(4, 2, 3), sv.noise.per_sample(1, range(4))
    bound = sv.elbo(plan, model, x0, noise=1, prior_variance=1.7)
    last = len(bound.diffusion)
    assert last == plan.rows - (spacing == "to data")
    far = 2.0**20  # deviations away, so that the difference keeps its digits
    for i in range(last):
        x, (alpha, sigma) = noised(plan, i, x0, source), (plan.alpha[i : i + 2], plan.sigma[i : i + 2])
        mean, moved = (
            sv.run(plan[i : i + 1], model, x, lambda draw, like, z=z: torch.full_like(like, z)) for z in (0.0, far)
        )  # fmt: skip
        a = alpha[0] / alpha[1]
        forward = sigma[0] ** 2 - (a * sigma[1]) ** 2
        precision = 1 / sigma[1] ** 2 + a**2 / forward
        center = (alpha[1] * x0 / sigma[1] ** 2 + a * x / forward) / precision
        wanted = kl_divergence(Normal(center, precision.rsqrt()), Normal(mean, (moved - mean) / far))
        assert_close(bound.diffusion[i], wanted.sum((1, 2)), rtol=1e-12, atol=1e-11)
    x, alpha, sigma = noised(plan, last, x0, source), plan.alpha[last].item(), plan.sigma[last].item()
    data = sv.convert(net(x, times[last].expand(4))[0], x, alpha, sigma, have="noise", want="data")
    wanted = Normal(data, sigma / alpha).log_prob(x0)
    assert_close(bound.reconstruction, wanted.sum((1, 2)), rtol=1e-12, atol=0)
    wanted = kl_divergence(Normal(plan.alpha[0] * x0, plan.sigma[0]), Normal(0.0, f64(1.7) ** 0.5))
    assert_close(bound.prior, wanted.sum((1, 2)), rtol=1e-12, atol=0)


def noised(plan, i, x0, source):
    return plan.alpha[i] * x0 + plan.sigma[i] * source(i, x0)


@pytest.mark.parametrize("name", ["small", "eta 1"])
@on(SOME, REST)
def test_with_the_posterior_s_variance_a_term_is_the_change_in_snr_times_the_error(name, schedule, spacing):
    """.5 (SNR_t - SNR_s) ||x_0 - x_0^||^2, of any network: Kingma et al. 2021, eq. 13."""
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, spacing)
    plan, source, x0 = PLANS[name][0](schedule, times), sv.noise.per_sample(5, range(4)), normals(4, 3)
    bound = sv.elbo(plan, lambda x, t: net(x, t)[0], x0, noise=5)
    snr = (schedule.alpha(times) / schedule.sigma(times)) ** 2
    for i, term in enumerate(bound.diffusion):
        x, level = noised(plan, i, x0, source), (plan.alpha[i].item(), plan.sigma[i].item())
        error = x0 - sv.convert(net(x, times[i].expand(4))[0], x, *level, have="noise", want="data")
        assert_close(term, 0.5 * (snr[i + 1] - snr[i]) * (error**2).sum(1), rtol=1e-10, atol=0)


@pytest.mark.parametrize("kind", ["noise", "data", "velocity", "score", "flow", "edm"])
@pytest.mark.parametrize("schedule", ["vp", "flow", pytest.param("cosine", marks=pytest.mark.slow)])
def test_networks_of_every_prediction_have_one_bound(kind, schedule):
    schedule = SCHEDULES[schedule]
    own = schedule if kind == "flow" else None
    model, x0 = sv.Model(DATA.model(schedule, kind), kind, schedule=own), normals(3, 3)
    times = times_of(schedule, "to data")
    plan, noise = made("small", schedule, times)
    assert_same(sv.elbo(plan, model, x0, 0), sv.elbo(plan, noise, x0, 0))
    got, wanted = (sv.continuous_elbo(m, schedule, x0, 0, 2) for m in (model, exact(schedule)))
    assert_same(got, wanted)


@pytest.mark.parametrize("variance", ["square", "residual"])
def test_a_second_output_beside_a_velocity_is_the_same_as_beside_noise(variance):
    plan, beside_noise = made(variance, VP, times_of(VP, "to data"))

    def velocity(x, t):
        eps, second = beside_noise.net(x, t)
        level = VP.alpha(t[0]).item(), VP.sigma(t[0]).item()
        return sv.convert(eps, x, *level, have="noise", want="velocity"), second

    got = sv.elbo(plan, sv.Model(velocity, "velocity", variance=variance), normals(3, 3), 0)
    assert_same(got, sv.elbo(plan, beside_noise, normals(3, 3), 0))


def test_from_pure_noise_there_is_no_prior_term_and_any_first_step_is_right():
    """alpha = 0: x_s says nothing of x_0, q(x_t | x_s, x_0) is N(alpha_t x_0, sigma_t^2), and the exact x_0^ is the mean."""
    schedule = sv.Flow()
    plan = sv.ddpm(schedule, f64(1.0, 0.4, 0.0))
    got = expected_elbo(plan, sv.Model(DATA.model(schedule, "data"), "data"), X0)
    assert got.prior == 0
    assert_close(got.diffusion[0], 0.5 * (0.6 / 0.4) ** 2 * ((X0 - MEAN) ** 2).sum(1), rtol=1e-12, atol=0)
    assert_close(got.reconstruction, end_terms(schedule, plan.times[0], plan.times[1], X0)[1])


def test_a_network_of_whole_steps_is_asked_at_its_levels_down_to_the_last():
    schedule, asked = SCHEDULES["discrete"], Counted(lambda x, t: 0 * x)
    model = sv.Model(asked, label=schedule.step)
    for times, levels in ((sv.trailing(schedule, 4), [19, 14, 9, 4]), (sv.trailing(schedule, 3, stop=0.1), [19, 13, 7, 1])):  # fmt: skip
        asked.times.clear()
        sv.elbo(sv.ddpm(schedule, times), model, X0, 0)
        assert asked.times == levels


# The whole, against the log-density of the sampler and of the data


def joint_bound(name, schedule, times, mean=MEAN, v=VARIANCES, prior=None, decoder=None):
    """E_q log p(x_0..N) - E_q log q(x_1..N | x_0) over x_0 too, all of it one Gaussian for each element; and E log p(x_0)."""
    stop = last_with_noise(schedule, times)
    times = times[times >= stop]
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    total = alpha[-1] ** 2 * v + sigma[-1] ** 2
    steps = [kernel(name, schedule, s, t, mean, v) for s, t in zip(times, times[1:], strict=False)]
    last = (sigma[-1] / alpha[-1]) ** 2 if decoder is None else decoder
    steps.append((alpha[-1] * v / total, sigma[-1] ** 2 / total * mean, last + 0 * v))
    bound, evidence = 0.0, 0.0
    for e in range(len(v)):  # rows: x_start, .., x_stop, x_0
        n = len(times) + 1
        levels = torch.cat([alpha, alpha.new_ones(1)]), torch.cat([sigma, sigma.new_zeros(1)])
        cleaner = torch.arange(n)[:, None].maximum(torch.arange(n))
        ratio = levels[0][:, None] * levels[0] / levels[0][cleaner] ** 2
        q = levels[0][:, None] * levels[0] * v[e] + ratio * levels[1][cleaner] ** 2
        p, center = torch.zeros(n, n).double(), torch.zeros(n).double()
        p[0, 0] = sigma[0] ** 2 if prior is None else prior
        for i, (gain, offset, variance) in enumerate(steps):
            p[i + 1, : i + 1] = p[: i + 1, i + 1] = gain[e] * p[i, : i + 1]
            p[i + 1, i + 1] = gain[e] ** 2 * p[i, i] + variance[e]
            center[i + 1] = gain[e] * center[i] + offset[e]
        off = levels[0] * mean[e] - center
        of_q = -entropy(q) + entropy(v[e].reshape(1, 1))
        bound = bound + cross(p, q + torch.outer(off, off)) - of_q
        evidence = evidence + cross(p[-1:, -1:], v[e] + off[-1:, None] ** 2)
    return bound, evidence


def entropy(cov):
    return 0.5 * torch.logdet(2 * math.pi * math.e * cov)


def cross(cov, square):
    """E log N(x; 0, cov) where E x x^T = square."""
    return -0.5 * (torch.logdet(2 * math.pi * cov) + torch.linalg.solve(cov, square).trace())


@NAMES
@on([("vp", "uneven"), ("flow", "to data")], [("cosine", "to data"), ("discrete", "even")])
def test_the_whole_is_the_evidence_bound_of_one_great_gaussian(name, schedule, spacing):
    schedule = SCHEDULES[schedule]
    times = times_of(schedule, spacing)
    x0, w = over_data(MEAN, VARIANCES)
    options = {"prior_variance": 1.3, "decoder": sv.Decoder(variance=0.02)}
    got = expected_elbo(*made(name, schedule, times), x0, **options).log_p @ w
    bound, evidence = joint_bound(name, schedule, times, prior=1.3, decoder=0.02)
    assert_close(got, bound, rtol=1e-9, atol=1e-9)
    assert got < evidence - 1e-3


def log_density(plan, stop, data):
    """log p(x_0) of the sampler: the plan's law from its prior, and the decoder's step."""
    start = Gaussian(0 * data.mean, plan.sigma[0] ** 2 * torch.eye(len(data.mean)).double())
    end = law(plan[:stop] if stop < plan.rows else plan, data, start) if stop else start
    alpha, sigma = plan.alpha[stop], plan.sigma[stop]
    gain = alpha * data.variances / (alpha**2 * data.variances + sigma**2)  # in the basis, here diagonal
    gain = data.basis * gain @ data.basis.T
    mean = data.mean + gain @ (end.mean - alpha * data.mean)
    return Gaussian(mean, gain @ end.cov @ gain + (sigma / alpha) ** 2 * torch.eye(len(mean)).double())


@pytest.mark.parametrize("name", ["small", "large", "analytic", "square", "eta 0.5", "euler"])
@on(SOME[1:5], SOME[:1] + SOME[5:] + REST)
def test_it_is_below_the_log_density_of_the_sampler_at_every_x0(name, schedule, spacing):
    schedule = SCHEDULES[schedule]
    plan, model = made(name, schedule, times_of(schedule, spacing))
    x0 = torch.cat([2 * normals(6, 3), MEAN[None]])
    bound = expected_elbo(plan, model, x0)
    sampler = log_density(plan, len(bound.diffusion), DATA)
    assert (bound.log_p < sampler.log_density(x0)).all()


@on(SOME[:1] + SOME[3:])
def test_the_analytic_variance_has_the_better_bound_than_small_and_large(schedule, spacing):
    schedule = SCHEDULES[schedule]
    times, (x0, w) = times_of(schedule, spacing), over_data(MEAN, VARIANCES)
    analytic, per_element, *others = (
        expected_elbo(*made(name, schedule, times), x0).log_p @ w
        for name in ("analytic", "square", "small", "large", "learned")
    )
    assert max(others) + 1e-3 < analytic < per_element


@pytest.mark.parametrize("schedule", ["vp", "ve", "flow", "cosine", "discrete"])
def test_with_exact_reverse_variances_it_loses_at_the_prior_alone(schedule):
    """Isotropic data, the decoder exact too: E log q(x_0) - KL(q(x_start) || p(x_start)); nothing, where the prior is exact."""
    schedule, v = SCHEDULES[schedule], 0.3
    times = times_of(schedule, "uneven")
    (alpha, stop), (sigma, left) = ((f(times[0]).item(), f(times[-1]).item()) for f in (schedule.alpha, schedule.sigma))  # fmt: skip
    plan = sv.analytic_dpm(schedule, times, sv.gaussian_gamma(v))
    decoder = sv.Decoder(variance=v * left**2 / (stop**2 * v + left**2))
    for mean, to in ((MEAN, 1.3 * sigma**2), (0 * MEAN, alpha**2 * v + sigma**2)):
        data = Gaussian(mean, v * torch.eye(3).double())
        x0, w = over_data(mean, f64(v, v, v))
        got = expected_elbo(plan, exact(schedule, data=data), x0, decoder=decoder, prior_variance=to)
        start = kl_divergence(
            Normal(alpha * mean, (alpha**2 * v + sigma**2) ** 0.5), Normal(0.0, f64(to) ** 0.5)
        ).sum()
        wanted = -1.5 * math.log(2 * math.pi * math.e * v) - start
        assert_close(got.log_p @ w, wanted, rtol=1e-9, atol=1e-9)
    assert_close(got.log_p, data.log_density(x0), rtol=1e-9, atol=1e-9)  # then also at every x_0
    assert start < 1e-12
    worse = sv.Plan(plan.times, plan.alpha, plan.sigma, plan.a, plan.b, 1.001 * plan.c)
    assert expected_elbo(worse, exact(schedule, data=data), x0, decoder=decoder, prior_variance=to).log_p @ w < got.log_p @ w - 1e-6  # fmt: skip


LINE = Gaussian(torch.zeros(1), f64([[0.4]]))


@pytest.mark.parametrize("of", ["small", "analytic", "continuous"])
@pytest.mark.parametrize("network", ["exact", "any"])
def test_the_exponential_of_the_bound_is_a_density_of_mass_at_most_1(of, network):
    """Of any network: int exp(E bound(x_0)) dx_0 <= int p(x_0) dx_0 = 1, by the trapezoidal rule."""
    x0 = torch.linspace(-7, 7, 201, dtype=torch.float64)[:, None]
    model = exact(VP, data=LINE) if network == "exact" else lambda x, t: x.sin()
    if of == "continuous":
        bound, _ = expected_continuous(model, VP, x0, points=24, n=12)
    else:
        gamma = {"gamma": sv.gaussian_gamma(0.4)} if of == "analytic" else {}
        plan = (sv.analytic_dpm if of == "analytic" else sv.ddpm)(VP, sv.logsnr(VP, 24), **gamma)
        bound = expected_elbo(plan, model, x0, n=12)
    mass = bound.log_p.exp().sum() * (x0[1, 0] - x0[0, 0])
    assert mass < 1 + 1e-12
    if network == "exact":
        assert mass > {"small": 0.15, "analytic": 0.999, "continuous": 0.999}[of]


# Continuous time


@pytest.mark.parametrize("pieces", [1, 3, 10])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_continuous_time_the_terms_are_closed_forms_whatever_the_pieces(schedule, pieces):
    """The mean over the estimator's own times and noises is the integral: it is unbiased."""
    schedule = SCHEDULES[schedule]
    got, _ = expected_continuous(exact(schedule), schedule, X0, pieces)
    prior, reconstruction = end_terms(schedule, f64(schedule.start), f64(schedule.stop), X0)
    assert got.diffusion.shape == (pieces, 1)
    whole = sv.Bound(got.prior, got.diffusion.sum(0, keepdim=True), got.reconstruction)
    assert_same(whole, sv.Bound(prior, integral(schedule, schedule.start, schedule.stop, X0)[None], reconstruction))  # fmt: skip
    ends = torch.linspace(*schedule.half_logsnr(f64(schedule.start, schedule.stop)).tolist(), pieces + 1, dtype=torch.float64)  # fmt: skip
    ends = schedule.time(ends).clamp(schedule.stop, schedule.start)
    for piece, (s, t) in zip(got.diffusion, ends.unfold(0, 2, 1).tolist(), strict=True):
        assert_close(piece, integral(schedule, s, t, X0), rtol=1e-9, atol=1e-9)


def test_more_pieces_have_less_variance_than_more_draws():
    spread = {k: expected_continuous(exact(VP, data=LINE), VP, f64([[0.8]]), k)[1].sum() for k in (1, 3, 10)}
    assert spread[3] < spread[1] / 3
    assert spread[10] < min(spread[1] / 10, spread[3] * 3 / 10)


@pytest.mark.parametrize(("kind", "count"), [("seed", 500), ("generator", 4000)])
@pytest.mark.parametrize("pieces", [1, 4])
def test_draws_have_the_mean_and_the_variance_of_the_quadrature(pieces, kind, count):
    """Of each piece, and of their sum: the pieces are independent."""
    model, noise = exact(VP, data=LINE), 3 if kind == "seed" else generator(3)
    means, variances = expected_continuous(model, VP, f64([[0.8]]), pieces)
    drawn = sv.continuous_elbo(model, VP, f64([[0.8]]).expand(count, 1), noise, pieces).diffusion
    drawn, mean, variance = (
        torch.cat([v, v.sum(0, keepdim=True)]) for v in (drawn, means.diffusion, variances)
    )
    assert ((drawn.mean(1) - mean[:, 0]).abs() < 4 * (variance[:, 0] / count).sqrt()).all()
    assert_close(drawn.var(1), variance[:, 0], rtol=15 / count**0.5, atol=0)


def test_the_draws_are_a_time_and_a_noise_for_each_piece_and_one_at_the_stop():
    seen, asked = [], Counted(lambda x, t: 0 * x)

    def source(draw, like):
        seen.append((draw, list(like.shape), like.dtype))
        return torch.zeros_like(like)

    sv.continuous_elbo(sv.Model(asked), VP, X0.float(), source, 2)
    time, noise = ([1], torch.float64), ([1, 3], torch.float32)
    assert seen == [(0, *time), (1, *noise), (2, *time), (3, *noise), (4, *noise)]
    low, high = VP.half_logsnr(f64(VP.start, VP.stop))
    inner = VP.time(low + (high - low) * f64(0.25, 0.75))
    assert asked.times == pytest.approx([*inner.tolist(), VP.stop], rel=1e-6)


@pytest.mark.parametrize("z", [-50.0, 50.0])
@pytest.mark.parametrize("schedule", [*SCHEDULES.values(), sv.EDM(), sv.LogSNR(), sv.SubVP()], ids=str)
def test_no_draw_leads_out_of_the_schedule(schedule, z):
    asked = Counted(lambda x, t: 0 * x)
    sv.continuous_elbo(asked, schedule, X0, lambda draw, like: torch.full_like(like, z))
    first, last = asked.times
    assert schedule.stop <= first <= schedule.start
    assert first == pytest.approx(schedule.start if z < 0 else schedule.stop, rel=1e-12, abs=1e-12)
    assert last == schedule.stop


def test_start_and_stop_are_where_it_begins_and_ends():
    ends = {"start": 0.8, "stop": 0.02}
    whole, _ = expected_continuous(exact(VP), VP, X0, **ends)
    prior, reconstruction = end_terms(VP, f64(0.8), f64(0.02), X0)
    assert_same(whole, sv.Bound(prior, integral(VP, 0.8, 0.02, X0)[None], reconstruction))
    parts = [expected_continuous(exact(VP), VP, X0, start=s, stop=t)[0] for s, t in ((0.8, 0.3), (0.3, 0.02))]
    assert_close(sum(part.diffusion for part in parts), whole.diffusion, rtol=1e-10, atol=0)


def test_prior_and_decoder_are_those_given():
    got, _ = expected_continuous(exact(VP), VP, X0, decoder=sv.Decoder(variance=0.3), prior_variance=2.0)
    prior, reconstruction = end_terms(VP, f64(VP.start), f64(VP.stop), X0, 2.0, 0.3)
    assert_close(got.prior, prior)
    assert_close(got.reconstruction, reconstruction)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_in_continuous_time_it_is_below_the_log_density_of_the_data(schedule):
    """In the mean over the data, by what q(x_start) is off the prior and the decoder off q(x_0 | x_stop)."""
    schedule = SCHEDULES[schedule]
    x0, w = over_data(MEAN, VARIANCES)
    got, _ = expected_continuous(exact(schedule), schedule, x0)
    known = -0.5 * torch.log(2 * math.pi * math.e * VARIANCES).sum()
    (alpha, near), (sigma, left) = (f(f64(schedule.start, schedule.stop)) for f in (schedule.alpha, schedule.sigma))  # fmt: skip
    prior = Normal(alpha * MEAN, (alpha**2 * VARIANCES + sigma**2).sqrt())
    exactly = Normal(0 * MEAN, (VARIANCES * left**2 / (near**2 * VARIANCES + left**2)).sqrt())
    lost = kl_divergence(prior, Normal(0.0, sigma)) + kl_divergence(exactly, Normal(0.0, left / near))
    assert_close(got.log_p @ w, known - lost.sum(), rtol=1e-9, atol=1e-9)
    assert got.log_p @ w < known


@pytest.mark.parametrize(
    ("schedule", "name"), [("vp", "small"), ("vp", "analytic"), ("flow", "euler"), ("flow", "large")]
)
def test_it_is_the_limit_of_many_steps_and_the_difference_is_of_order_1(schedule, name):
    schedule = SCHEDULES[schedule]
    limit, gaps = integral(schedule, schedule.start, schedule.stop, X0), []
    for steps in (32, 64):
        plan, model = made(name, schedule, sv.logsnr(schedule, steps))
        gaps.append((expected_elbo(plan, model, X0).diffusion.sum(0) - limit).item())
    assert 0.85 < math.log2(gaps[0] / gaps[1]) < 1.15
    assert abs(gaps[1]) < 0.2 * limit


# Decoders

LEVELS = torch.linspace(-1, 1, 5, dtype=torch.float64)
UNEVEN = f64(-1.0, -0.7, 0.1, 0.2, 1.5)


def every(levels, elements):
    """All x0 of so many elements on the levels, [n, elements]."""
    return torch.cartesian_prod(*[levels] * elements).reshape(-1, elements)


@pytest.mark.parametrize("levels", [LEVELS, UNEVEN, LEVELS[:2]], ids=["even", "uneven", "two"])
@pytest.mark.parametrize("level", [1e-3, 0.1, 0.5, 3.0, 30.0])
@pytest.mark.parametrize("center", [-40.0, 0.05, 0.15])
def test_the_cells_of_all_levels_have_mass_1(levels, level, center):
    x0 = every(levels, 2)
    log_p = sv.Decoder(levels=levels).log_p(x0, torch.full_like(x0, center), level)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-12)
    assert (log_p <= 0).all()


@pytest.mark.parametrize("deviation", [1e4, 1e8])
def test_the_outermost_cells_reach_to_infinity_under_any_variance(deviation):
    x0 = LEVELS[:, None]
    log_p = sv.Decoder(levels=LEVELS, variance=deviation**2).log_p(x0, torch.zeros_like(x0), 1.0)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_a_cell_has_the_mass_of_a_normal_between_the_middles():
    x0, deviation = UNEVEN[:, None], 0.4
    normal = Normal(f64(0.3), f64(deviation))
    below = torch.cat([f64([0.0]), normal.cdf(f64(-0.85, -0.3, 0.15, 0.85)), f64([1.0])])
    for decoder, level in ((sv.Decoder(levels=UNEVEN), deviation), (sv.Decoder(deviation**2, UNEVEN), 9.0)):
        got = decoder.log_p(x0, torch.full_like(x0, 0.3), level)
        assert_close(got, below.diff().log(), rtol=1e-12, atol=0)
        assert not torch.allclose(
            decoder.log_p(x0, torch.full_like(x0, 0.3003), level), below.diff().log(), rtol=1e-6
        )


@pytest.mark.parametrize("side", [-1, 1])
def test_a_cell_far_out_in_a_tail_keeps_its_digits_and_its_gradient(side):
    """30 deviations away, where the cumulative distribution is 1 in float64; 3000, where the tail is below 1e-300."""
    mean = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    levels = torch.arange(-31, 32, dtype=torch.float64) * 100
    near = sv.Decoder(levels=levels / 100).log_p(side * f64([[30.0]]), mean, 1.0)
    tail = 0.5 * (math.erfc(29.5 / 2**0.5) - math.erfc(30.5 / 2**0.5))
    assert near.item() == pytest.approx(math.log(tail), rel=1e-13)
    far = sv.Decoder(levels=levels).log_p(side * f64([[3000.0]]), mean, 1.0)
    assert far.item() == pytest.approx(-(2950**2) / 2 - math.log(2950 * (2 * math.pi) ** 0.5), rel=1e-9)
    (slope,) = torch.autograd.grad(far, mean)
    assert slope.item() == pytest.approx(side * 2950, rel=1e-3)


@pytest.mark.parametrize("variance", [None, 0.3])
def test_without_levels_it_is_the_normal_density(variance):
    x0, mean = normals(2, 4, 3)
    wanted = Normal(mean, 0.3**0.5 if variance else 0.2).log_prob(x0).sum(1)
    assert_close(sv.Decoder(variance).log_p(x0, mean, 0.2), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("spacing", ["even", "to data"])
def test_in_the_bound_too_the_last_step_s_probabilities_of_all_x0_sum_to_1(spacing):
    """Given one x_stop, which a noise that knows x_0 leads every x_0 to."""
    plan = sv.ddpm(VP, times_of(VP, spacing))
    x0, stop = every(LEVELS, 2), plan.rows - (spacing == "to data")
    alpha, sigma = plan.alpha[stop], plan.sigma[stop]

    def source(draw, like):
        return (0.3 - alpha * x0) / sigma if draw == stop else 0 * x0

    bound = sv.elbo(plan, lambda x, t: x.sin(), x0, source, sv.Decoder(levels=LEVELS))
    assert bound.reconstruction.exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 6, 24])
def test_the_bounds_of_all_levels_are_log_probabilities_of_no_more_than_1(steps):
    """For any network: sum over x_0 of exp(E bound(x_0)) <= sum over x_0 of P(x_0) = 1."""
    x0, decoder, times = every(LEVELS, 1), sv.Decoder(levels=LEVELS), sv.logsnr(VP, steps, stop=0.05)
    data = Gaussian(torch.zeros(1), f64([[0.5]]))  # as the levels are spread
    plan = sv.analytic_dpm(VP, times, sv.gaussian_gamma(0.5))
    for model, least in ((exact(VP, data=data), 0.8), (lambda x, t: x.sin(), 0.0)):
        bound = expected_elbo(plan, model, x0, n=40, decoder=decoder)
        assert least <= bound.log_p.exp().sum() < 1 + 1e-9


def test_what_is_on_no_level_is_refused_and_rounding_is_none():
    plan, decoder = sv.ddpm(VP, times_of(VP, "even")), sv.Decoder(levels=torch.linspace(-1, 1, 256))
    pixels = (torch.arange(256) / 127.5 - 1).reshape(-1, 4)
    for bound in (
        lambda x0: sv.elbo(plan, lambda x, t: x, x0, 0, decoder),
        lambda x0: sv.continuous_elbo(lambda x, t: x, VP, x0, 0, decoder=decoder),
    ):
        assert bound(pixels).log_p.isfinite().all()
        off = pixels + 0.003 * (pixels == pixels[5, 2])
        words = f"x0 has a value {off[5, 2]:g} that is none of the 256 levels from -1 to 1: give"
        with pytest.raises(ValueError, match=words):
            bound(off)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_data_of_so_many_bits_are_on_their_levels_in_single_precision(bits):
    x0 = (torch.arange(2**bits) / (2**bits - 1) * 2 - 1)[:, None]
    decoder = sv.Decoder(levels=torch.linspace(-1, 1, 2**bits, dtype=torch.float64))
    assert decoder.log_p(x0, x0, 0.1).isfinite().all()


# Batches, shapes, dtypes, gradients

BOUNDS = {
    "elbo": lambda model, x0, noise, **options: sv.elbo(sv.ddpm(VP, times_of(VP, "to data")), model, x0, noise, **options),
    "learned": lambda model, x0, noise, **options: sv.elbo(sv.ddpm(VP, times_of(VP, "to data"), "learned"), model, x0, noise, **options),
    "square": lambda model, x0, noise, **options: sv.elbo(sv.extended_analytic_dpm(VP, times_of(VP, "to data")), model, x0, noise, **options),
    "continuous": lambda model, x0, noise, **options: sv.continuous_elbo(model, VP, x0, noise, 3, **options),
    "continuous on cosine": lambda model, x0, noise, **options: sv.continuous_elbo(model, sv.Cosine(), x0, noise, 3, **options),
}  # fmt: skip
OF = pytest.mark.parametrize("of", BOUNDS)


def network(of, outputs=net):
    kind = {"learned": "range", "square": "square"}.get(of)
    return sv.Model(outputs if kind else lambda x, t: outputs(x, t)[0], variance=kind)


@OF
def test_a_sample_s_terms_do_not_depend_on_its_batch(of):
    x0, ids = normals(7, 2, 3), [4, 8, 1, 5, 0, 9, 2]
    whole = BOUNDS[of](network(of), x0, sv.noise.per_sample(1, ids))
    for part in (slice(0, 1), slice(2, 5), slice(6, 7)):
        got = BOUNDS[of](network(of), x0[part], sv.noise.per_sample(1, ids[part]))
        assert_same(got, sv.Bound(whole.prior[part], whole.diffusion[:, part], whole.reconstruction[part]), rtol=1e-13, atol=1e-13)  # fmt: skip
    assert BOUNDS[of](network(of), x0[[4]], 1).log_p == pytest.approx(whole.log_p[4].item(), rel=1e-12)
    assert (BOUNDS[of](network(of), x0, 1).log_p != whole.log_p).all()


@OF
def test_terms_are_sums_over_elements_of_any_shape(of):
    """Scalars [B], images [B, 2, 3]: those of their elements as samples of their own, whose noise is theirs."""
    x0, z = normals(4, 2, 3), normals(10, 4, 2, 3, seed=2)

    def source(shape):
        def draw(number, like):
            clock = like.ndim == 1 and of.startswith("continuous") and number % 2 == 0 and number < 6
            return torch.full_like(like, 0.3 * number - 1) if clock else z[number].reshape(shape)

        return draw

    image = BOUNDS[of](network(of), x0, source((4, 2, 3)))
    scalar = BOUNDS[of](network(of), x0.flatten(), source((24,)))
    flat = BOUNDS[of](network(of), x0.reshape(4, 6), source((4, 6)))
    assert_same(image, flat, rtol=1e-13, atol=1e-13)
    summed = (
        v.unflatten(-1, (4, 6)).sum(-1) for v in (scalar.prior, scalar.diffusion, scalar.reconstruction)
    )
    assert_same(image, sv.Bound(*summed), rtol=1e-12, atol=1e-12)


@OF
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_single_precision_it_is_close_and_the_terms_are_double(of, dtype):
    x0, seen = normals(5, 3).to(dtype), set()

    def watched(x, t):
        seen.add((x.dtype, t.dtype))
        return tuple(v.to(x.dtype) for v in net(x.double(), t.double()))

    got = BOUNDS[of](network(of, watched), x0, 0)
    wanted = BOUNDS[of](network(of), x0.double(), 0)
    assert seen == {(dtype, torch.float32)}
    assert {v.dtype for v in (got.prior, got.diffusion, got.reconstruction, got.log_p)} == {torch.float64}
    assert_same(got, wanted, **({"rtol": 1e-4, "atol": 1e-2} if dtype == torch.float32 else {"rtol": 0.3, "atol": 3.0}))  # fmt: skip


def small(theta, x, t):
    """The second output is above the square of the first, so that no clamp acts."""
    a, b, c, d = theta
    return (a * x + b * t[:, None]).sin(), 1.2 + 0.2 * (c * x + d).tanh()


THETA = f64(0.8, -0.3, 0.5, 0.2)


def value(of, theta, x0, **options):
    return BOUNDS[of](network(of, partial(small, theta)), x0, 0, **options)


@OF
def test_the_gradient_is_that_of_the_bound_in_weights_and_in_the_data(of):
    theta, x0 = THETA.clone().requires_grad_(), normals(1, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda *inputs: value(of, *inputs, grad=True).log_p, (theta, x0), rtol=1e-5, atol=1e-5)  # fmt: skip
    (slope,) = torch.autograd.grad(value(of, theta, x0, grad=True).log_p.sum(), theta)
    assert (slope[:2] != 0).all()
    assert ((slope[2:] != 0) == (of in ("learned", "square"))).all()


@OF
def test_no_gradient_is_kept_unless_asked_for(of):
    theta = THETA.clone().requires_grad_()
    bound = value(of, theta, normals(2, 3))
    assert not any(v.requires_grad for v in (bound.prior, bound.diffusion, bound.reconstruction, bound.log_p))
    with torch.no_grad():
        kept = value(of, theta, normals(2, 3), grad=True)
    assert kept.log_p.requires_grad
    assert_same(sv.Bound(kept.prior, kept.diffusion.detach(), kept.reconstruction.detach()), bound, rtol=1e-15, atol=0)  # fmt: skip
    with pytest.raises(ValueError, match=r"requires a gradient, .* pass grad=True, or x.*\.detach\(\)"):
        value(of, theta, normals(2, 3).requires_grad_())


def test_decoders_on_levels_have_a_gradient_too():
    x0, theta = every(LEVELS, 2)[:6], THETA.clone().requires_grad_()
    decoder = sv.Decoder(levels=LEVELS)
    assert torch.autograd.gradcheck(
        lambda w: value("elbo", w, x0, decoder=decoder, grad=True).reconstruction, theta
    )


@OF
def test_a_network_in_training_is_warned_of_unless_gradients_are_kept(of):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, x, t):
            return network(of).net(x, t)

    model = sv.Model(Net(), variance=network(of).variance)
    BOUNDS[of](model, normals(2, 3), 0, grad=True)
    with pytest.warns(UserWarning, match="training mode") as caught:
        BOUNDS[of](model, normals(2, 3), 0)
    assert caught[0].filename == __file__


@OF
@pytest.mark.parametrize("kind", ["seed", "generator"])
def test_no_global_generator_is_touched_and_nothing_given_is_changed(of, kind):
    before, x0 = torch.get_rng_state(), normals(3, 3)
    kept = x0.clone()
    bound = BOUNDS[of](network(of), x0, 0 if kind == "seed" else generator(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x0, kept)
    assert repr(bound).startswith("Bound(3 samples, nats on average: prior ")
    assert f"log_p {bound.log_p.mean():.6g})" in repr(bound)


@OF
def test_a_batch_of_none_has_no_terms(of):
    """As `run` gives none of no samples."""
    assert BOUNDS[of](network(of), normals(0, 3), 0).log_p.shape == (0,)


# Plans that it takes, and what is refused


@pytest.mark.parametrize(
    "build",
    [
        partial(sv.sa_solver, order=1, corrector=0), partial(sv.seeds, order=1), partial(sv.er_sde, order=1),
        partial(sv.dpm_solver_sde, order=1), partial(sv.dpm_solver_pp_sde, order=1), sv.reverse_diffusion, sv.ml_sde,
    ],
    ids=["sa_solver", "seeds", "er_sde", "dpm_solver_sde", "dpm_solver_pp_sde", "reverse_diffusion", "ml_sde"],
)  # fmt: skip
@pytest.mark.parametrize("spacing", ["uneven", "to data"])
def test_any_method_of_one_call_and_one_draw_has_a_bound(build, spacing):
    plan = build(VP, times_of(VP, spacing))
    bound = expected_elbo(plan, exact(VP), X0)
    assert (bound.log_p < log_density(plan, len(bound.diffusion), DATA).log_density(X0)).all()


def test_a_plan_of_one_step_to_the_data_is_prior_and_decoder():
    plan = sv.ddpm(VP, f64(0.3, 0.0))
    bound = expected_elbo(plan, exact(VP), X0)
    assert bound.diffusion.shape == (0, 1)
    prior, reconstruction = end_terms(VP, f64(0.3), f64(0.3), X0)
    assert_same(bound, sv.Bound(prior, bound.diffusion, reconstruction))


@pytest.mark.parametrize("decoder", [None, sv.Decoder(variance=0.5)])
def test_from_pure_noise_to_the_data_in_one_step_there_is_a_bound_if_the_decoder_has_a_variance(decoder):
    """x_stop has alpha = 0: (sigma / alpha)^2 is infinite, a given variance is not."""
    plan = sv.ddpm(sv.Flow(), f64(1.0, 0.0))
    model = sv.Model(lambda x, t: 0 * x, "data")
    if decoder is None:
        with pytest.raises(ValueError, match=r"alpha = 0|Decoder\(variance"):
            sv.elbo(plan, model, X0, 0)
    else:
        wanted = Normal(0.0, f64(0.5) ** 0.5).log_prob(X0).sum(1)
        assert_close(sv.elbo(plan, model, X0, 0, decoder).log_p, wanted)


def test_where_the_second_output_leaves_no_variance_the_divergence_is_infinite():
    """eta = 0 and E[(eps - eps^)^2 | x] = 0 for one element: -inf, not NaN."""
    plan = sv.extended_analytic_dpm(VP, times_of(VP, "even"), eta=0.0)
    model = sv.Model(lambda x, t: (x, f64(0.5, 0.0, 0.5).expand_as(x)), variance="residual")
    assert sv.elbo(plan, model, X0, 0).log_p == -math.inf


TIMES = times_of(VP, "even")
DDPM = sv.ddpm(VP, TIMES)
PAIR = sv.Model(net, variance="square")


def bare(x, t):
    return net(x, t)[0]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: sv.elbo(sv.ddim(VP, TIMES), bare, X0, 0), "row 0 of the plan adds no noise, so its KL divergence is infinite: take a stochastic method"),
        (lambda: sv.elbo(sv.analytic_dpm(VP, TIMES, torch.ones(3), eta=0.0), bare, X0, 0), "adds no noise"),
        (lambda: sv.elbo(sv.euler_maruyama(VP, TIMES, eta=0.0), bare, X0, 0), "adds no noise"),
        (lambda: sv.elbo(sv.ddpm(VP, TIMES)[:2] + sv.ddim(VP, TIMES)[2:], bare, X0, 0), "row 2 of the plan adds no noise"),
        (lambda: sv.elbo(sv.sa_solver(VP, TIMES), bare, X0, 0), "reads 3 calls, 1 draws: expected one of each"),
        (lambda: sv.elbo(sv.seeds(VP, TIMES, order=2), bare, X0, 0), "reads 2 calls, 1 draws"),
        (lambda: sv.elbo(sv.heun(VP, TIMES), bare, X0, 0), "reads 2 calls, 0 draws"),
        (lambda: sv.elbo(sv.ddim(sv.Inversion(VP), TIMES.flip(0)), bare, X0, 0), "from noise to data"),
        (lambda: sv.elbo(sv.ancestral(VP, TIMES, sv.ddim), bare, X0, 0), "goes up and down in noise"),
        (lambda: sv.elbo(sv.ancestral(VP, TIMES), bare, X0, 0), "goes up and down in noise"),
        (lambda: sv.elbo(sv.churn(VP, TIMES, sv.ddim), bare, X0, 0), "goes up and down in noise"),
        (lambda: sv.elbo(sv.restart(VP, TIMES, [(0.1, 0.3, 2, 1)], sv.ddim), bare, X0, 0), "goes up and down in noise"),
        (lambda: sv.elbo(sv.ddpm(VP, TIMES, "learned"), bare, X0, 0), "leaves the variance of its noise to the model's second output: say what that is"),
        (lambda: sv.elbo(sv.ddpm(VP, TIMES, "learned"), PAIR, X0, 0), "takes the model's second output for range, but it is 'square'"),
        (lambda: sv.elbo(sv.extended_analytic_dpm(VP, TIMES), sv.Model(bare, variance="square"), X0, 0), "expected the pair (prediction, second output)"),
        (lambda: sv.elbo(DDPM, sv.Model(bare, "flow"), X0, 0), 'predicts="flow" on a path that is not straight'),
        (lambda: sv.elbo(DDPM, bare, X0, 0, prior_variance=0.0), "prior_variance = 0.0: expected a finite number above 0"),
        (lambda: sv.elbo(DDPM, bare, X0, 0, prior_variance=-1.0), "prior_variance = -1.0"),
        (lambda: sv.elbo(DDPM, lambda x, t: x[:, :2], X0, 0), "returned shape [1, 2] in call 0 of 3"),
        (lambda: sv.elbo(DDPM, bare, X0, sv.noise.per_sample(0, [1, 2])), "noise is for 2 samples, but the batch has 1"),
        (lambda: sv.elbo(DDPM, bare, X0, lambda draw, like: like[0]), "noise gave shape [3]"),
        (lambda: sv.elbo(DDPM, bare, X0 / 0, 0), "must be finite"),
        (lambda: sv.elbo(DDPM, bare, X0[0, 0], 0), "no batch dimension"),
        (lambda: sv.continuous_elbo(bare, VP, X0, 0, 0), "pieces = 0: expected a whole number from 1"),
        (lambda: sv.continuous_elbo(bare, VP, X0, 0, prior_variance=0.0), "prior_variance = 0.0"),
        (lambda: sv.continuous_elbo(sv.Model(bare, "data"), sv.Flow(), X0, 0), "start = 1 has alpha = 0 (half log-SNR -inf): give a start below it"),
        (lambda: sv.continuous_elbo(sv.Model(bare, "data"), sv.Flow(start=0.9), X0, 0), "stop = 0 has sigma = 0 (half log-SNR inf): give a stop above it"),
        (lambda: sv.continuous_elbo(bare, VP, X0, 0, stop=0.0), "stop = 0 has sigma = 0"),
        (lambda: sv.continuous_elbo(bare, sv.Cosine(), X0, 0, start=1.0), "start = 1 has alpha = 0"),
        (lambda: sv.continuous_elbo(bare, VP, X0, 0, start=0.2, stop=0.3), "expected 0 <= stop < start"),
        (lambda: sv.continuous_elbo(bare, sv.Inversion(VP), X0, 0), "noise to data"),
        (lambda: sv.continuous_elbo(lambda x, t: x[:, :2], VP, X0, 0), "[1, 2]"),
        (lambda: sv.Decoder(variance=0.0), "variance = 0.0: expected a finite number above 0"),
        (lambda: sv.Decoder(variance=-1.0), "variance = -1.0"),
        (lambda: sv.Decoder(levels=f64(0.0, 1.0, 1.0)), "expected at least 2 finite increasing numbers, e.g. torch.linspace(-1, 1, 256)"),
        (lambda: sv.Decoder(levels=f64(1.0, 0.0)), "increasing"),
        (lambda: sv.Decoder(levels=f64([1.0])), "at least 2"),
        (lambda: sv.Decoder(levels=f64(0.0, math.inf)), "finite"),
        (lambda: sv.Decoder().log_p(X0, X0, 0.0), "sigma = 0 at x_stop, where nothing is left to decode"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_what_was_given(act, words):
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        act()
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: sv.elbo(DDPM, bare, X0, None), "noise is NoneType: expected an int seed, a torch.Generator, or a function"),
        (lambda: sv.continuous_elbo(bare, VP, X0, None), "noise is NoneType"),
        (lambda: sv.elbo(DDPM, bare, X0, 0, grad=1), "grad = 1: expected True or False"),
        (lambda: sv.continuous_elbo(bare, VP, X0, 0, pieces=1.5), "pieces = 1.5: expected a whole number"),
        (lambda: sv.elbo(DDPM, bare, X0.long(), 0), "expected a real floating-point tensor"),
        (lambda: sv.Decoder(variance="1"), "variance = '1': expected a real number"),
    ],
)  # fmt: skip
def test_the_wrong_kind_is_refused_with_what_was_given(act, words):
    with pytest.raises(TypeError) as refusal:
        act()
    assert words in str(refusal.value)


def test_a_plan_is_refused_before_the_network_is_called():
    asked = Counted(lambda x, t: x)
    for plan in (
        sv.ddim(VP, TIMES),
        sv.sa_solver(VP, TIMES),
        sv.churn(VP, TIMES),
        sv.ddpm(VP, TIMES, "learned"),
    ):
        with pytest.raises(ValueError, match=r"noise|second output|calls"):
            sv.elbo(plan, asked, X0, 0)
    assert asked.times == []


def test_a_network_that_is_not_finite_is_named_with_its_call_and_samples():
    def breaks(x, t):
        bad = (t[:, None] < 0.3) & (torch.arange(len(x))[:, None] == 1)
        return torch.where(bad, math.nan, 0.1 * x)

    x0 = normals(3, 3)
    for act in (
        lambda: sv.elbo(DDPM, breaks, x0, 0),
        lambda: sv.continuous_elbo(breaks, VP, x0, 0, pieces=4),
    ):
        with pytest.raises(sv.NonFiniteError, match=r"not finite in call \d of the bound") as found:
            act()
        assert found.value.samples == [1]
        assert found.value.time < 0.3


def test_noise_beside_that_of_the_second_output_is_refused():
    plan = sv.ddpm(VP, TIMES, "learned")
    both = replace(plan, c=torch.full((plan.rows, 1), 0.1, dtype=torch.float64))
    with pytest.raises(ValueError, match="noise of their own besides"):
        sv.elbo(both, sv.Model(net, variance="range"), X0, 0)

"""Published stochastic samplers, read off as tables: equal to ours, or wrong in what is named here."""

import dataclasses
import math
import sys
from functools import partial
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad
from torch.testing import assert_close

import solvers as sv
from problems import VP, generator
from reference import Gaussian, law_errors, row_order, rows, slopes, trace

PEERS_WARN = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
EDM = sv.EDM()
SIGMAS = EDM.time(torch.tensor([-3.0, -2.2, -1.8, -0.7, 0.1, 0.9, 1.7, 3.0], dtype=torch.float64))
TO_ZERO = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])
UNEVEN = torch.tensor([1.0, 0.9, 0.55, 0.3, 0.21, 0.05, 0.001], dtype=torch.float64)


def ours(plan, predicts="data", every=False):
    """Our executor, read off like any sampler: a row that adds noise asks once, for the draw of its number.

    Others ask nothing; with `every` there is a column for the draw of each row, asked for or not.
    """
    noisy = (plan.c != 0).any(1).nonzero().flatten().tolist()
    asked = []

    def sampler(model, x, noise):
        drawn = {row: noise() for row in (range(plan.rows) if every else noisy)}

        def source(draw, like):
            asked.append(draw)
            return drawn[draw]

        return sv.run(plan, sv.Model(model, predicts=predicts), x, noise=source)

    table = trace(sampler, plan.nfe, plan.rows if every else len(noisy))
    assert asked == noisy
    return table


def gap(plan, loop, predicts="data"):
    """The largest difference, over max(1, weight), of a plan's table and a loop's with as many draws."""
    mine = ours(plan, predicts)
    theirs = trace(loop, plan.nfe, mine.shape[1] - 1 - plan.nfe)
    return ((mine - theirs).abs() / theirs.abs().clamp(min=1)).max().item()


def louder(plan):
    """A planted error: noise off by a thousandth."""
    return dataclasses.replace(plan, c=plan.c * 1.001)


def as_method(loop, calls=1, draws=0):
    """A published loop as one of our methods: traced on the times it is given and folded to rows.

    It makes `calls` in a step, evenly over log-SNR, and `draws` for each of them.
    """

    def build(schedule, times):
        lam = schedule.half_logsnr(times)
        inner = [schedule.time(lam[:-1] + k / calls * lam.diff()) for k in range(1, calls)]
        at = torch.cat([torch.stack([times[:-1], *inner], 1).flatten(), times[-1:]])
        count = len(at) - 1
        a, b, c = rows(trace(partial(loop, times=times), count, draws * count), count)
        return sv.Plan(at, schedule.alpha(at), schedule.sigma(at), a, b.round(decimals=14), c, "data")

    return build


# --- k-diffusion (crowsonkb/k-diffusion, sampling.py): model(x, sigma) -> denoised, alpha = 1 ---------------


def ancestral_step(s, t, eta):
    up = min(t, eta * (t**2 * (s**2 - t**2) / s**2) ** 0.5)
    return (t**2 - up**2) ** 0.5, up


def euler_ancestral(model, x, noise, times, eta):
    for s, t in pairwise(times):
        down, up = ancestral_step(s, t, eta)
        x = x + (x - model(x, s)) / s * (down - s)
        if t > 0:
            x = x + noise() * up
    return x


def dpm_2_ancestral(model, x, noise, times, eta):
    for s, t in pairwise(times):
        down, up = ancestral_step(s, t, eta)
        slope = (x - model(x, s)) / s
        if down == 0:
            x = x + slope * (down - s)
        else:
            middle = s.log().lerp(down.log(), 0.5).exp()
            stage = x + slope * (middle - s)
            x = x + (stage - model(stage, middle)) / middle * (down - s)
            x = x + noise() * up
    return x


def dpmpp_2s_ancestral(model, x, noise, times, eta):
    for s, t in pairwise(times):
        down, up = ancestral_step(s, t, eta)
        denoised = model(x, s)
        if down == 0:
            x = x + (x - denoised) / s * (down - s)
        else:
            h = s.log() - down.log()
            middle = (-(-s.log() + h / 2)).exp()
            stage = middle / s * x - (-h / 2).expm1() * denoised
            x = down / s * x - (-h).expm1() * model(stage, middle)
        if t > 0:
            x = x + noise() * up
    return x


def dpmpp_2m_sde(model, x, noise, times, eta, solver_type):
    old = last = None
    for s, t in pairwise(times):
        denoised = model(x, s)
        if t == 0:
            return denoised
        h = s.log() - t.log()
        x = t / s * (-eta * h).exp() * x + (-h - eta * h).expm1().neg() * denoised
        if old is not None:
            r = last / h
            weight = {
                "heun": (-h - eta * h).expm1().neg() / (-h - eta * h) + 1,
                "midpoint": 0.5 * (-h - eta * h).expm1().neg(),
            }[solver_type]
            x = x + weight * (1 / r) * (denoised - old)
        x = x + noise() * t * (-2 * eta * h).expm1().neg().sqrt()
        old, last = denoised, h
    return x


def dpmpp_3m_sde(model, x, noise, times, eta, doubled=False):
    """`doubled` repairs its second difference."""
    outputs, steps = [], []
    for s, t in pairwise(times):
        outputs.append(model(x, s))
        if t == 0:
            return outputs[-1]
        h = s.log() - t.log()
        h_eta = h * (eta + 1)
        x = torch.exp(-h_eta) * x + (-h_eta).expm1().neg() * outputs[-1]
        phi_2 = h_eta.neg().expm1() / h_eta + 1
        if len(steps) >= 2:
            r0, r1 = steps[-1] / h, steps[-2] / h
            d1_0, d1_1 = (outputs[-1] - outputs[-2]) / r0, (outputs[-2] - outputs[-3]) / r1
            d1 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1)
            d2 = (d1_0 - d1_1) / (r0 + r1) * (2 if doubled else 1)
            x = x + phi_2 * d1 - (phi_2 / h_eta - 0.5) * d2
        elif steps:
            x = x + phi_2 * (outputs[-1] - outputs[-2]) / (steps[-1] / h)
        if eta:
            x = x + noise() * t * (-2 * h * eta).expm1().neg().sqrt()
        steps.append(h)
    return x


def singlestep_2s(schedule, times):
    return sv.dpm_solver_pp(schedule, times, 2, kind="singlestep")


ANCESTRAL = {
    "euler_ancestral": (sv.ddim, euler_ancestral),
    "euler_ancestral as renoising": (partial(sv.ancestral, method=sv.ddim), euler_ancestral),
    "dpm_2_ancestral": (partial(sv.ancestral, method=partial(sv.dpm_solver, order=2)), dpm_2_ancestral),
    "dpmpp_2s_ancestral": (partial(sv.ancestral, method=singlestep_2s), dpmpp_2s_ancestral),
}
MULTISTEP = {
    "dpmpp_2m_sde midpoint": (
        partial(sv.dpm_solver_pp_sde, order=2),
        partial(dpmpp_2m_sde, solver_type="midpoint"),
    ),
    "dpmpp_2m_sde heun": (
        lambda schedule, times, eta: sv.sa_solver(schedule, times, 2, corrector=0, tau=math.sqrt(eta)),
        partial(dpmpp_2m_sde, solver_type="heun"),
    ),
    "dpmpp_3m_sde repaired": (
        lambda schedule, times, eta: sv.sa_solver(schedule, times, 3, corrector=0, tau=math.sqrt(eta)),
        partial(dpmpp_3m_sde, doubled=True),
    ),
}


@pytest.mark.parametrize("times", [SIGMAS, TO_ZERO], ids=["above 0", "to 0"])
@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("name", ANCESTRAL)
def test_kdiffusions_ancestral_samplers_are_our_tables(name, eta, times):
    method, loop = ANCESTRAL[name]
    assert gap(method(EDM, times, eta=eta), partial(loop, times=times, eta=eta)) < 1e-12


@pytest.mark.parametrize("times", [SIGMAS, TO_ZERO], ids=["above 0", "to 0"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("name", MULTISTEP)
def test_kdiffusions_multistep_sde_samplers_are_our_tables(name, eta, times):
    method, loop = MULTISTEP[name]
    assert gap(method(EDM, times, eta=eta), partial(loop, times=times, eta=eta)) < 1e-12


@pytest.mark.parametrize("field", ["a", "b", "c"])
@pytest.mark.parametrize("name", ANCESTRAL | MULTISTEP)
def test_a_weight_off_by_a_thousandth_is_no_longer_the_published_one(name, field):
    method, loop = (ANCESTRAL | MULTISTEP)[name]
    plan = method(EDM, SIGMAS, eta=0.5)
    damaged = dataclasses.replace(plan, **{field: getattr(plan, field) * 1.001}, consistent=False)
    assert gap(damaged, partial(loop, times=SIGMAS, eta=0.5)) > 1e-6


def test_kdiffusion_3m_sde_differs_from_our_third_order_in_its_second_step_too():
    """There it has the exact first moment, and ours, as 2M, half the sum: both are of second order."""
    plan = sv.dpm_solver_pp_sde(EDM, SIGMAS, order=3)
    right = rows(trace(partial(dpmpp_3m_sde, times=SIGMAS, eta=1.0, doubled=True), 7, 7), 7)[1]
    off = (plan.b - right).abs().amax(1)
    assert off[1] > 1e-2
    assert off[[0, 2, 3, 4, 5, 6]].max() < 1e-12


def curvature_share(loop, h):
    """What share of its integral a step of h in log-SNR makes where the denoised image is lambda^2."""
    lam = h * torch.arange(-2.0, 2.0, dtype=torch.float64)
    _, b, _ = rows(trace(partial(loop, times=torch.exp(-lam), eta=1.0), 3, 3), 3)
    got = sum(b[2, j] * lam[2 - j] ** 2 for j in range(3)).item()
    return got / quad(lambda v: 2 * v**2 * math.exp(2 * (v - h)), 0, h, epsabs=0)[0]


def test_kdiffusion_3m_sde_takes_half_of_a_curvature_and_all_of_it_with_its_second_difference_doubled():
    assert curvature_share(dpmpp_3m_sde, 0.01) == pytest.approx(0.5, abs=0.01)
    assert curvature_share(partial(dpmpp_3m_sde, doubled=True), 0.01) == pytest.approx(1, abs=1e-7)


def brownian(clock):
    """From two draws the unit increments of W(clock(sigma)) over a stage and a step; None: unrelated."""

    def pair(z1, z2, s, middle, t):
        if clock is None:
            return z1, z2
        first, second = (clock(middle) - clock(s)).abs(), (clock(t) - clock(middle)).abs()
        return z1, (first.sqrt() * z1 + second.sqrt() * z2) / (first + second).sqrt()

    return pair


def dpmpp_sde(model, x, noise, times, pair, eta=1.0):
    """Its stage is at the middle of log-SNR (r = 1/2), its noise from s to the middle and from s to t."""
    for s, t in pairwise(times):
        denoised = model(x, s)
        middle = (-(-s.log() + (s.log() - t.log()) / 2)).exp()
        (down, up), (down_2, up_2) = ancestral_step(s, middle, eta), ancestral_step(s, t, eta)
        z1, z2 = noise(), noise()
        of_stage, of_step = pair(z1, z2, s, middle, t)
        stage = down / s * x - (down.log() - s.log()).expm1() * denoised + of_stage * up
        x = down_2 / s * x - (down_2.log() - s.log()).expm1() * model(stage, middle) + of_step * up_2
    return x


INVERSE_SQUARE, IDENTITY = brownian(lambda sigma: sigma**-2), brownian(lambda sigma: sigma)


def test_kdiffusion_dpmpp_sde_is_seeds_2_if_its_brownian_tree_runs_in_the_inverse_square_of_sigma():
    """It runs in sigma: right for each draw, wrong for the two together."""
    plan = sv.seeds(EDM, SIGMAS, order=2)
    assert gap(plan, partial(dpmpp_sde, times=SIGMAS, pair=INVERSE_SQUARE)) < 1e-12
    assert gap(plan, partial(dpmpp_sde, times=SIGMAS, pair=IDENTITY)) > 1e-2


@pytest.mark.parametrize(
    ("pair", "order"),
    [(INVERSE_SQUARE, 2), (IDENTITY, 2), (brownian(None), 1)],
    ids=["sigma^-2", "sigma", "independent"],
)
def test_kdiffusion_dpmpp_sde_has_second_order_in_law_with_either_tree_and_first_with_independent_draws(
    pair, order
):
    data = Gaussian(torch.tensor([0.7, -0.4]), torch.diag(torch.tensor([0.1, 2.0])))
    build = as_method(partial(dpmpp_sde, pair=pair), calls=2, draws=1)
    errors = law_errors(build, data, EDM, 3.0, 0.1, (20, 40, 80))
    assert slopes(errors)[-1] == pytest.approx(order, abs=0.15)


# --- noise between the steps --------------------------------------------------------------------------------


def kdiffusion_euler(model, x, noise, times, churn, low=0.0, high=math.inf, s_noise=1.0):
    """sample_euler; what it draws where gamma = 0, and throws away, is left out."""
    for s, t in pairwise(times):
        gamma = min(churn / (len(times) - 1), 2**0.5 - 1) if low <= s <= high else 0.0
        hat = s * (gamma + 1)
        if gamma > 0:
            x = x + noise() * s_noise * (hat**2 - s**2) ** 0.5
        x = x + (x - model(x, hat)) / hat * (t - hat)
    return x


def edm_step(model, x, s, t):
    d_cur = (x - model(x, s)) / s
    x_next = x + (t - s) * d_cur
    if t > 0:
        d_prime = (x_next - model(x_next, t)) / t
        x_next = x + (t - s) * (0.5 * d_cur + 0.5 * d_prime)
    return x_next


def edm_sampler(model, x, noise, times, churn, low=0.0, high=math.inf, s_noise=1.0):
    """Algorithm 2 of arXiv 2206.00364."""
    num_steps = len(times) - 1
    for t_cur, t_next in pairwise(times):
        gamma = min(churn / num_steps, math.sqrt(2) - 1) if low <= t_cur <= high else 0
        t_hat = t_cur + gamma * t_cur
        if gamma:
            x = x + (t_hat**2 - t_cur**2).sqrt() * s_noise * noise()
        x = edm_step(model, x, t_hat, t_next)
    return x


CHURNS = [
    {"churn": 2.0},
    {"churn": 40.0, "s_noise": 1.003},
    {"churn": 1.5, "low": 0.5, "high": 10.0, "s_noise": 1.01},
]


@pytest.mark.parametrize("options", CHURNS, ids=["all", "the most", "some"])
@pytest.mark.parametrize(("method", "loop"), [(sv.ddim, kdiffusion_euler), (sv.heun, edm_sampler)])
def test_churn_is_algorithm_2_also_before_the_first_call(method, loop, options):
    names = {"churn": "amount", "s_noise": "noise_scale"}
    times = torch.cat([karras_nodes(0.002, 80.0, 7), torch.zeros(1, dtype=torch.float64)])
    plan = sv.churn(EDM, times, method, **{names.get(name, name): v for name, v in options.items()})
    assert plan.is_called[0] == ("high" in options)
    loop = partial(loop, times=times, **options)
    assert gap(plan, loop) < 1e-12
    assert gap(louder(plan), loop) > 1e-6


def karras_nodes(low, high, nodes, rho=7):
    i = torch.arange(nodes, dtype=torch.float64)
    return (high ** (1 / rho) + i / (nodes - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def restart_sampler(model, x, noise, t_steps, restart_list, s_noise=1.003):
    """The released loop, S_churn = 0; restart_list has [nodes, K, t_min, t_max]."""
    at = {int((t_steps - entry[2]).abs().argmin()): entry for entry in restart_list}
    for i, (t_cur, t_next) in enumerate(pairwise(t_steps)):
        x = edm_step(model, x, t_cur, t_next)
        if i + 1 in at:
            nodes, repeats, _, high = at[i + 1]
            for _ in range(repeats):
                inner = karras_nodes(t_steps[i + 1], high, nodes)
                x = x + noise() * (inner[0] ** 2 - inner[-1] ** 2).sqrt() * s_noise
                for s, t in pairwise(inner):
                    x = edm_step(model, x, s, t)
    return x


def test_restart_is_the_released_loop_whose_intervals_count_nodes():
    t_steps = torch.cat([karras_nodes(0.002, 80.0, 9), torch.zeros(1, dtype=torch.float64)])
    loop = partial(restart_sampler, t_steps=t_steps, restart_list=[[3, 2, 0.06, 0.3], [4, 1, 1.0, 20.0]])
    plan = sv.restart(EDM, t_steps, [(0.06, 0.3, 2, 2), (1.0, 20.0, 3, 1)], noise_scale=1.003)
    assert plan.nfe == 17 + 2 * 2 * 2 + 2 * 3
    assert gap(plan, loop) < 1e-12
    assert gap(louder(plan), loop) > 1e-6


# --- score SDE (yang-song/score_sde_pytorch): model -> score ------------------------------------------------


def vp_sde(x, t, beta_0=0.1, beta_1=20.0):
    beta_t = beta_0 + t * (beta_1 - beta_0)
    return -0.5 * beta_t * x, torch.sqrt(beta_t)


def sub_vp_sde(x, t, beta_0=0.1, beta_1=20.0):
    beta_t = beta_0 + t * (beta_1 - beta_0)
    discount = 1.0 - torch.exp(-2 * beta_0 * t - (beta_1 - beta_0) * t**2)
    return -0.5 * beta_t * x, torch.sqrt(beta_t * discount)


def ve_sde(x, t, sigma_min=0.01, sigma_max=50.0):
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    return torch.zeros_like(x), sigma * math.sqrt(2 * (math.log(sigma_max) - math.log(sigma_min)))


def euler_maruyama(model, x, noise, times, sde, dt=None):
    """Released, `dt` is -1 / N for N updates; without it the step is the grid's."""
    for s, t in pairwise(times):
        step = t - s if dt is None else torch.tensor(dt)
        drift, diffusion = sde(x, s)
        x = x + (drift - diffusion**2 * model(x, s)) * step + diffusion * (-step).sqrt() * noise()
    return x


@pytest.mark.parametrize(
    ("schedule", "sde"),
    [(VP, vp_sde), (sv.SubVP(), sub_vp_sde), (sv.VE(), ve_sde)],
    ids=["vp", "sub-vp", "ve"],
)
def test_euler_maruyama_of_score_sde_is_our_table_if_its_step_is_the_grids(schedule, sde):
    """Released, it is 1 / N on N points (1 - eps) / (N - 1) apart: x is not where the network is told."""
    plan = sv.euler_maruyama(schedule, UNEVEN)
    loop = partial(euler_maruyama, times=UNEVEN, sde=sde)
    assert gap(plan, loop, "score") < 1e-12
    assert gap(louder(plan), loop, "score") > 1e-6
    even = torch.linspace(1, 1e-3, 7, dtype=torch.float64)
    assert gap(sv.euler_maruyama(schedule, even), partial(loop, times=even, dt=-1 / 7), "score") > 1e-2


def vp_reverse_diffusion(model, x, noise, betas):
    for n in reversed(range(len(betas))):
        f, g = torch.sqrt(1 - betas[n]) * x - x, torch.sqrt(betas[n])
        x = x - (f - g**2 * model(x, n))
        x = x + g * noise() if n else x  # x_mean is what it returns
    return x


def vp_ancestral(model, x, noise, betas):
    for n in reversed(range(len(betas))):
        x = (x + betas[n] * model(x, n)) / torch.sqrt(1 - betas[n])
        x = x + torch.sqrt(betas[n]) * noise() if n else x
    return x


def ve_reverse_diffusion(model, x, noise, sigmas):
    for n in reversed(range(len(sigmas))):
        adjacent = sigmas[n - 1] if n else torch.zeros_like(sigmas[0])
        g = torch.sqrt(sigmas[n] ** 2 - adjacent**2)
        x = x + g**2 * model(x, n)
        x = x + g * noise() if n else x
    return x


def ve_ancestral(model, x, noise, sigmas):
    for n in reversed(range(len(sigmas))):
        adjacent = sigmas[n - 1] if n else torch.zeros_like(sigmas[0])
        x = x + model(x, n) * (sigmas[n] ** 2 - adjacent**2)
        std = torch.sqrt((adjacent**2 * (sigmas[n] ** 2 - adjacent**2)) / (sigmas[n] ** 2))
        x = x + std * noise() if n else x
    return x


BETAS = torch.linspace(0.1, 20, 11, dtype=torch.float64) / 40
LEVELS = torch.arange(11, -1, -1, dtype=torch.float64) / 11


@pytest.mark.parametrize(
    ("plan", "loop"),
    [
        (sv.reverse_diffusion(sv.Discrete(BETAS), LEVELS), partial(vp_reverse_diffusion, betas=BETAS)),
        (sv.ddpm(sv.Discrete(BETAS), LEVELS, "large"), partial(vp_ancestral, betas=BETAS)),
        (sv.reverse_diffusion(EDM, TO_ZERO), partial(ve_reverse_diffusion, sigmas=SIGMAS.flip(0))),
        (sv.ddpm(EDM, TO_ZERO, "small"), partial(ve_ancestral, sigmas=SIGMAS.flip(0))),
    ],
    ids=[
        "vp reverse diffusion",
        "vp ancestral is ddpm large",
        "ve reverse diffusion",
        "ve ancestral is ddpm small",
    ],
)
def test_predictors_of_score_sde_are_our_tables(plan, loop):
    """Also the mean of VP ancestral sampling, (x + beta s) / sqrt(1 - beta): it is the DDPM posterior's."""
    assert gap(plan, loop, "score") < 1e-12
    assert gap(louder(plan), loop, "score") > 1e-6


# --- DDPM, Improved DDPM ------------------------------------------------------------------------------------

DISCRETE = sv.Discrete.linear(50)
LINEAR = torch.linspace(1e-4, 0.02, 50, dtype=torch.float64)
FULL_CHAIN = torch.cat([torch.zeros(1, dtype=torch.float64), LINEAR])  # beta_0 = 0, then beta_1 .. beta_50
EVERY, SOME, UNTIDY = list(range(1, 51)), [1, 11, 21, 31, 41, 50], [3, 4, 17, 44]
LEVELS_OF = {"argvalues": [EVERY, SOME, UNTIDY], "ids": ["every level", "every tenth", "uneven"]}


def times_of(levels):
    """Levels of 50, 1-based and increasing as the authors have them, as our times down to clean data."""
    return torch.tensor([*reversed(levels), 0], dtype=torch.float64) / 50


def respaced(levels):
    """Betas of the chain that stands on some levels alone, again with beta_0 = 0."""
    abar = torch.cumprod(1 - FULL_CHAIN, 0)[[0, *levels]]
    return torch.cat([abar[:1] * 0, 1 - abar[1:] / abar[:-1]])


def ho_sampler(model, x, noise, betas, large):
    """Algorithm 2 of arXiv 2006.11239 as its code has it: q_posterior of eq. 6 and 7 at the predicted x_0."""
    alphas, abar = 1 - betas, torch.cumprod(1 - betas, 0)
    for t in range(len(betas) - 1, 0, -1):
        x_0 = torch.rsqrt(abar[t]) * x - torch.sqrt(1 / abar[t] - 1) * model(x, t)
        mean = torch.sqrt(abar[t - 1]) * betas[t] / (1 - abar[t]) * x_0
        mean = mean + torch.sqrt(alphas[t]) * (1 - abar[t - 1]) / (1 - abar[t]) * x
        variance = betas[t] if large else betas[t] * (1 - abar[t - 1]) / (1 - abar[t])
        x = mean + variance.sqrt() * noise() if t > 1 else mean
    return x


@pytest.mark.parametrize("levels", **LEVELS_OF)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_is_hos_sampler_at_every_level_and_on_respaced_betas(variance, levels):
    plan = sv.ddpm(DISCRETE, times_of(levels), variance)
    loop = partial(ho_sampler, betas=respaced(levels), large=variance == "large")
    assert gap(plan, loop, "noise") < 1e-12
    assert gap(louder(plan), loop, "noise") > 1e-6


@pytest.mark.parametrize("levels", **LEVELS_OF)
def test_the_rows_of_ddpm_are_the_posteriors_mean_and_variance(levels):
    betas = respaced(levels)
    abar, before = (v.flip(0) for v in (torch.cumprod(1 - betas, 0)[1:], torch.cumprod(1 - betas, 0)[:-1]))
    betas = betas[1:].flip(0)
    small, large = (sv.ddpm(DISCRETE, times_of(levels), variance) for variance in ("small", "large"))
    same = partial(assert_close, rtol=1e-12, atol=1e-15)
    same(small.b[:, 0], before.sqrt() * betas / (1 - abar))
    same(small.a, (1 - betas).sqrt() * (1 - before) / (1 - abar))
    same(small.c[:, 0] ** 2, betas * (1 - before) / (1 - abar))
    same(large.c[:-1, 0] ** 2, betas[:-1])


def normals(draw, shape=(3, 2, 5)):
    return torch.randn(shape, dtype=torch.float64, generator=generator(draw))


def two_heads(x, n):
    """A nonlinear network with twice the channels, which reads whole steps n = 0 .. 49."""
    n = n.reshape(-1, 1, 1).double() / 50
    return torch.cat([(x + n).sin() + 0.3 * x, torch.tanh(x.flip(1) - n)], 1)


def improved_ddpm(net, x, levels, off=0.0):
    """p_mean_variance and p_sample of arXiv 2102.09672 with learn_sigma, on a SpacedDiffusion: 0-based."""
    betas = respaced(levels)[1:]
    abar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1), abar[:-1]])
    posterior = betas * (1 - before) / (1 - abar)
    min_log, max_log = torch.log(torch.cat([posterior[1:2], posterior[1:]])), torch.log(betas)
    for draw, i in enumerate(reversed(range(len(levels)))):
        eps, values = torch.split(net(x, torch.full((len(x),), levels[i] - 1)), x.shape[1], dim=1)
        frac = (values + 1) / 2 + off
        log_variance = frac * max_log[i] + (1 - frac) * min_log[i]
        x_start = torch.sqrt(1 / abar[i]) * x - torch.sqrt(1 / abar[i] - 1) * eps
        mean = betas[i] * torch.sqrt(before[i]) / (1 - abar[i]) * x_start
        mean = mean + (1 - before[i]) * torch.sqrt(1 - betas[i]) / (1 - abar[i]) * x
        x = mean + (i != 0) * torch.exp(0.5 * log_variance) * normals(draw)
    return x


@pytest.mark.parametrize("levels", **LEVELS_OF)
def test_learned_variances_are_improved_ddpms(levels):
    plan = sv.ddpm(DISCRETE, times_of(levels), "learned")
    model = sv.Model(two_heads, variance="range", label=DISCRETE.step)
    x = normals(99)
    got = sv.run(plan, model, x, noise=lambda draw, like: normals(draw))
    assert_close(got, improved_ddpm(two_heads, x, levels), rtol=1e-12, atol=1e-12)
    assert (got - improved_ddpm(two_heads, x, levels, off=0.001)).abs().max() > 1e-6


# --- Analytic-DPM and its extension (baofff/Analytic-DPM): betas 1-based, a step goes from r down to s ------


BETAS_50 = torch.linspace(1e-4, 0.2, 50, dtype=torch.float64)
DEEP = sv.Discrete(BETAS_50)  # to sigma / alpha = 14, where the variance of x_0 is clipped
CUM_ALPHAS = torch.cumprod(1 - torch.cat([BETAS_50[:1] * 0, BETAS_50]), 0)
# E ||eps^||^2 / d of each level as estimated, above 1 at the noisy end
MS_EPS = torch.linspace(0.2, 1.02, 51, dtype=torch.float64)


def ddpm_forward(abar_s, abar_r):
    """E[x_s | x_r, x_0], the variance without that of x_0, and what that of x_0 is multiplied by."""
    skip_alpha, bbar_s, bbar_r = abar_r / abar_s, 1 - abar_s, 1 - abar_r
    skip_beta = 1 - skip_alpha

    def mean(x, x_0, eps):
        return skip_beta * abar_s**0.5 / bbar_r * x_0 + skip_alpha**0.5 * bbar_s / bbar_r * x

    return mean, skip_beta * bbar_s / bbar_r, abar_s * skip_beta**2 / bbar_r**2


def ddim_forward(abar_s, abar_r, eta):
    bbar_s, bbar_r = 1 - abar_s, 1 - abar_r
    lamb2 = eta**2 * (1 - abar_r / abar_s) * bbar_s / bbar_r

    def mean(x, x_0, eps):
        return abar_s**0.5 * x_0 + (bbar_s - lamb2) ** 0.5 * eps

    return mean, lamb2, (abar_s**0.5 - ((bbar_s - lamb2) * abar_r / bbar_r) ** 0.5) ** 2


def bao_sampler(heads, x, noise, levels, forward, clip_cov=True, clip_pixel=0):
    """heads(x, r) -> eps and Cov[eps | x], also by element; clip_sigma_idx = 1; no draws of weight 0."""
    abar = CUM_ALPHAS
    for s, r in list(zip([0, *levels], levels, strict=False))[::-1]:
        mean, small, coeff = forward(abar[s], abar[r])
        eps, cov_eps = heads(x, r)
        x = mean(x, abar[r] ** -0.5 * x - (1 / abar[r] - 1) ** 0.5 * eps, eps)
        if s:
            cov_x_0 = (1 - abar[r]) / abar[r] * cov_eps
            sigma2 = small + coeff * (cov_x_0.clamp(0, 1) if clip_cov else cov_x_0)
            if clip_pixel and s < levels[1]:
                sigma2 = sigma2.clamp(0, (clip_pixel * 2 / 255 * (math.pi / 2) ** 0.5) ** 2)
            x = x + sigma2**0.5 * noise() if (sigma2 > 0).any() else x
    return x


FORWARDS = {
    "ddpm": (1.0, ddpm_forward),
    "ddim": (0.0, partial(ddim_forward, eta=0.0)),
    "ddim eta .6": (0.6, partial(ddim_forward, eta=0.6)),
}
CLIPS = {
    "none": ({"limit": math.inf}, {"clip_cov": False}),
    "cov": ({"limit": 1.0}, {}),
    "a pixel": ({"limit": 1.0, "pixels": 1}, {"clip_pixel": 1}),
    "two pixels": ({"limit": 1.0, "pixels": 2}, {"clip_pixel": 2}),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("levels", **LEVELS_OF)
def test_analytic_dpm_is_its_authors_sampler_with_its_clipping(levels, forward, clip):
    (eta, step), (options, theirs) = FORWARDS[forward], CLIPS[clip]
    ms_eps = MS_EPS if theirs.get("clip_cov", True) else MS_EPS.clamp(max=0.999)
    build = partial(sv.analytic_dpm, DEEP, times_of(levels), ms_eps[list(reversed(levels))], eta)
    plan = build(**options)

    def loop(model, x, noise):
        def heads(x, r):
            return model(x, r), 1 - ms_eps[r]

        return bao_sampler(heads, x, noise, levels, step, **theirs)

    assert gap(plan, loop, "noise") < 1e-12
    assert gap(louder(plan), loop, "noise") > 1e-6
    assert clip == "none" or gap(build(), loop, "noise") > 1e-3
    assert "pixels" not in options or gap(build(limit=1.0), loop, "noise") > 1e-3


def sn_heads(net, x, r):
    eps, second = net(x, r)
    return eps, second - eps.pow(2)


def npr_heads(net, x, r):
    return net(x, r)


def eps_heads(net, x, r):
    """Its heuristic for a network without a second head."""
    eps, _ = net(x, r)
    return eps, 1 - eps.pow(2)


def noisy_net(x, r):
    """A prediction and a second output that is sometimes less than its square, for levels r = 1 .. 50."""
    eps = 0.6 * torch.tanh(x + r / 50)
    return eps, 0.5 * (x.flip(2) + r / 25).sin().square() + 0.1


HEADS = {"square": sn_heads, "residual": npr_heads, "square of ones": eps_heads}


@pytest.mark.parametrize("pixels", [0, 2])
@pytest.mark.parametrize("forward", FORWARDS)
@pytest.mark.parametrize("kind", HEADS)
def test_extended_analytic_dpm_is_its_authors_sampler_element_by_element(kind, forward, pixels):
    eta, step = FORWARDS[forward]
    levels, x = SOME, normals(99)
    build = partial(sv.extended_analytic_dpm, DEEP, times_of(levels), eta)

    def net(x, n):
        eps, second = noisy_net(x, n.reshape(-1, 1, 1).double() + 1)
        return eps, torch.ones_like(second) if kind == "square of ones" else second

    model = sv.Model(net, variance=kind.split()[0], label=DEEP.step)
    run = partial(sv.run, model=model, x=x, noise=lambda draw, like: normals(draw))
    got = run(build(limit=1.0, pixels=pixels))
    draws = iter(range(50))
    heads = partial(HEADS[kind], noisy_net)
    published = bao_sampler(heads, x, lambda: normals(next(draws)), levels, step, clip_pixel=pixels)
    assert_close(got, published, rtol=1e-12, atol=1e-12)
    again = iter(range(50))
    off = bao_sampler(heads, x, lambda: 1.001 * normals(next(again)), levels, step, clip_pixel=pixels)
    assert (got - off).abs().max() > 1e-6
    assert (got - run(build(pixels=pixels))).abs().max() > 1e-3  # the variance of x_0 is clipped


# --- the maximum-likelihood SDE solver (huawei-noah/Speech-Backbones, DiffVC): model -> score ---------------


def get_gamma(s, t, p=1.0, beta_min=0.1, beta_max=20.0):
    return math.exp(-0.5 * p * (beta_min + 0.5 * (beta_max - beta_min) * (t + s)) * (t - s))


def diffvc(model, x, noise, mean, steps, trace_term=lambda t: 0.0):
    """reverse_diffusion(mode="ml"), its omega held times beta_t h; the trace term is the paper's alone."""
    h = 1 / steps
    for i in range(steps):
        t, s = 1 - i * h, 1 - (i + 1) * h if i < steps - 1 else 0.0
        beta_t = 0.1 + (20.0 - 0.1) * t
        before, within, whole = (1 - get_gamma(*ends, p=2.0) for ends in ((0, s), (s, t), (0, t)))
        mu, nu = get_gamma(s, t) * before / whole, get_gamma(0, s) * within / whole
        kappa = get_gamma(0, s) * within / (get_gamma(0, t) * beta_t * h) - 1.0
        omega = nu / get_gamma(0, t) + mu - (0.5 * beta_t * h + 1.0)
        variance = before * within / whole + nu**2 * trace_term(t)
        dxt = (mean - x) * (0.5 * beta_t * h + omega)
        dxt = dxt - model(x, t) * (1.0 + kappa) * (beta_t * h)
        x = x - dxt
        x = x + math.sqrt(variance) * noise() if s else x
    return x


def with_mean(plan):
    """The plan run on a prior of another mean, which is the first draw, so that it has a column."""

    def sampler(model, x, noise):
        mean = noise()
        centred = sv.centred(sv.Model(model, predicts="score"), mean)
        return sv.run(plan, centred, x - mean, noise=lambda draw, like: noise()) + mean

    return trace(sampler, plan.nfe, plan.rows)


def posterior_variance(t, v=0.3):
    """E tr Cov(X_0 | X_t) / d of isotropic Gaussian data."""
    return v * (1 - get_gamma(0, t, p=2.0)) / (1 - get_gamma(0, t, p=2.0) + v * get_gamma(0, t, p=2.0))


@pytest.mark.parametrize(
    ("options", "trace_term"),
    [({}, lambda t: 0.0), ({"gamma": sv.gaussian_gamma(0.3)}, posterior_variance)],
    ids=["as released", "with the trace term"],
)
def test_the_maximum_likelihood_sde_of_diffvc_is_our_table_mean_included(options, trace_term):
    steps = 7
    times = sv.uniform(VP, steps, stop=0.0)
    plan = sv.ml_sde(VP, times, **options)

    def loop(model, x, noise):
        return diffvc(model, x, noise, mean=noise(), steps=steps, trace_term=trace_term)

    theirs = trace(loop, steps, steps)
    assert_close(with_mean(plan), theirs, rtol=1e-12, atol=1e-12)
    assert (with_mean(louder(plan)) - theirs).abs().max() > 1e-6


# --- SA-Solver, by adaptive quadrature of Lagrange polynomials under its kernel -----------------------------


def sa_weights(nodes, s, t, tau, few_steps=False):
    """The weights of the data over alpha_t: (1 + tau^2) int e^{-(1 + tau^2) (t - v)} l_j(v) dv from s to t.

    few_steps replaces the integral of (v - s) by h^2 / 2 where there are two nodes ("rescaling", appendix D).
    """
    rate, h = 1 + tau**2, t - s
    if few_steps and len(nodes) == 2:
        other = 1 - nodes.index(s)
        slope = rate * h**2 / 2 / (nodes[other] - s)
        weights = [-math.expm1(-rate * h) - slope] * 2
        weights[other] = slope
        return weights

    def under_kernel(j):
        def integrand(v):
            return (
                rate
                * math.exp(-rate * (t - v))
                * math.prod((v - node) / (nodes[j] - node) for k, node in enumerate(nodes) if k != j)
            )

        return quad(integrand, s, t, epsabs=0, epsrel=1e-13)[0]

    return [under_kernel(j) for j in range(len(nodes))]


def sa_sampler(
    model, x, noise, levels, predictor, corrector, taus, few_steps=False, lower=False, every=False
):
    """Algorithm 1 (PEC) on (alpha, sigma, lambda), no corrector at the end; `every` draws at tau = 0 too."""
    alpha, sigma, lam = levels
    steps = len(lam) - 1
    outputs = [model(x, 0)]
    for i in range(steps):
        left = steps - i if lower else steps
        p, q = min(predictor, i + 1, left), min(corrector, i + 2, left + 1)
        h, tau = lam[i + 1] - lam[i], taus[i]
        base = sigma[i + 1] / sigma[i] * math.exp(-(tau**2) * h) * x
        if tau or every:
            base = base + sigma[i + 1] * math.sqrt(-math.expm1(-2 * tau**2 * h)) * noise()
        nodes = [lam[i - j] for j in range(p)]
        weights = sa_weights(nodes, lam[i], lam[i + 1], tau, few_steps)
        x = base + alpha[i + 1] * sum(w * outputs[i - j] for j, w in enumerate(weights))
        if i + 1 < steps:
            outputs.append(model(x, i + 1))
            if q > 1:
                nodes = [lam[i + 1 - j] for j in range(q)]
                weights = sa_weights(nodes, lam[i], lam[i + 1], tau, few_steps)
                x = base + alpha[i + 1] * sum(w * outputs[i + 1 - j] for j, w in enumerate(weights))
    return x


def numbers_of(plan):
    return plan.alpha.tolist(), plan.sigma.tolist(), plan.half_logsnr.tolist()


TAUS = {
    "0.6": (0.6, lambda t: 0.6),
    "growing": (lambda t: 0.2 + t, lambda t: 0.2 + t),
    "1 inside": (lambda t: ((t >= 0.1) & (t <= 0.6)).double(), lambda t: float(0.1 <= t <= 0.6)),
}


@pytest.mark.parametrize("lower", [False, True], ids=["full", "lower"])
@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 2), (2, 2), (3, 4), (2, 0)])
def test_sa_solver_is_its_integrals_by_adaptive_quadrature(predictor, corrector, tau, lower):
    """A step has the tau of its end; one without noise asks for none."""
    of_times, of_time = TAUS[tau]
    final = "lower" if lower else "full"
    plan = sv.sa_solver(VP, UNEVEN, predictor, corrector, of_times, final)
    loop = partial(
        sa_sampler,
        levels=numbers_of(plan),
        predictor=predictor,
        corrector=corrector,
        taus=[of_time(t) for t in UNEVEN[1:].tolist()],
        lower=lower,
    )
    assert gap(plan, loop) < 1e-12
    assert gap(louder(plan), loop) > 1e-6
    if predictor == corrector == 2:
        assert gap(plan, partial(loop, few_steps=True)) > 1e-2


# --- SEEDS (ComfyUI): model -> denoised, a stage's noise carried on by e^{-eta h} of each part of the step --


def ei_h_phi_1(h):
    return torch.expm1(h)


def ei_h_phi_2(h):
    return (torch.expm1(h) - h) / h


def sample_seeds_2(model, x, noise, times, eta, r=0.5):
    for s, t in pairwise(times):
        denoised = model(x, s)
        if t == 0:
            return denoised
        h = s.log() - t.log()
        h_eta, fac = h * (eta + 1), 1 / (2 * r)
        sigma_1 = torch.lerp(-s.log(), -t.log(), r).neg().exp()
        x_2 = sigma_1 / s * (-r * h * eta).exp() * x - ei_h_phi_1(-r * h_eta) * denoised
        sde_noise = (-2 * r * h * eta).expm1().neg().sqrt() * noise()
        x_2 = x_2 + sde_noise * sigma_1
        denoised_d = torch.lerp(denoised, model(x_2, sigma_1), fac)
        x = t / s * (-h * eta).exp() * x - ei_h_phi_1(-h_eta) * denoised_d
        segment = (r - 1) * h * eta
        sde_noise = sde_noise * segment.exp() + segment.mul(2).expm1().neg().sqrt() * noise()
        x = x + sde_noise * t
    return x


def sample_seeds_3(model, x, noise, times, eta, r_1=1 / 3, r_2=2 / 3):
    for s, t in pairwise(times):
        denoised = model(x, s)
        if t == 0:
            return denoised
        h = s.log() - t.log()
        h_eta = h * (eta + 1)
        sigma_1, sigma_2 = (torch.lerp(-s.log(), -t.log(), r).neg().exp() for r in (r_1, r_2))
        x_2 = sigma_1 / s * (-r_1 * h * eta).exp() * x - ei_h_phi_1(-r_1 * h_eta) * denoised
        sde_noise = (-2 * r_1 * h * eta).expm1().neg().sqrt() * noise()
        x_2 = x_2 + sde_noise * sigma_1
        denoised_2 = model(x_2, sigma_1)
        a3_2 = r_2 / r_1 * ei_h_phi_2(-r_2 * h_eta)
        a3_1 = ei_h_phi_1(-r_2 * h_eta) - a3_2
        x_3 = sigma_2 / s * (-r_2 * h * eta).exp() * x - (a3_1 * denoised + a3_2 * denoised_2)
        segment = (r_1 - r_2) * h * eta
        sde_noise = sde_noise * segment.exp() + segment.mul(2).expm1().neg().sqrt() * noise()
        x_3 = x_3 + sde_noise * sigma_2
        denoised_3 = model(x_3, sigma_2)
        b3 = ei_h_phi_2(-h_eta) / r_2
        b1 = ei_h_phi_1(-h_eta) - b3
        x = t / s * (-h * eta).exp() * x - (b1 * denoised + b3 * denoised_3)
        segment = (r_2 - 1) * h * eta
        sde_noise = sde_noise * segment.exp() + segment.mul(2).expm1().neg().sqrt() * noise()
        x = x + sde_noise * t
    return x


@pytest.mark.parametrize("times", [SIGMAS, TO_ZERO], ids=["above 0", "to 0"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize(("order", "loop"), [(2, sample_seeds_2), (3, sample_seeds_3)])
def test_seeds_of_comfyui_are_our_tables(order, loop, eta, times):
    plan = sv.seeds(EDM, times, order, eta)
    loop = partial(loop, times=times, eta=eta)
    assert gap(plan, loop) < 1e-12
    assert gap(louder(plan), loop) > 1e-6


# --- ER-SDE-Solver (QinpengCui/ER-SDE-Solver, vp_*_order*): model -> x_0 ------------------------------------


def fn_5(rho):
    return rho * (torch.exp(rho**0.3) + 10)


def over(fn, start, end, power, points):
    """int (v - end)^power / fn(v) dv from start to end: exact, or the released left Riemann sum."""
    if points:
        v = start + torch.arange(points, dtype=torch.float64) / points * (end - start)
        return ((v - end) ** power / fn(v)).sum() * (end - start) / points

    def integrand(v):
        return (v - end.item()) ** power / fn(torch.tensor(v, dtype=torch.float64)).item()

    return quad(integrand, start.item(), end.item(), epsabs=0, epsrel=1e-13)[0]


def er_sde_sampler(model, x, noise, times, schedule, order, fn, corrected=True, points=0):
    """Released, it is not `corrected`: the first difference stands for the slope at s, not at its middle."""
    alphas = schedule.alpha(times)
    rho = schedule.sigma(times) / alphas
    outputs, firsts = [], []
    for i, (s, t) in enumerate(pairwise(rho)):
        outputs.append(model(x, times[i]))
        r = fn(t) / fn(s)
        x = alphas[i + 1] / alphas[i] * r * x + alphas[i + 1] * (1 - r) * outputs[-1]
        if order > 1 and i:
            firsts.append((outputs[-1] - outputs[-2]) / (s - rho[i - 1]))
            slope = firsts[-1]
            if order > 2 and i > 1:
                curvature = 2 * (slope - firsts[-2]) / (s - rho[i - 2])
                slope = slope + (curvature / 2 * (s - rho[i - 1]) if corrected else 0)
                second = (t - s) ** 2 / 2 + over(fn, t, s, 1, points) * fn(t)
                x = x + alphas[i + 1] * second * curvature
            x = x + alphas[i + 1] * (t - s + over(fn, t, s, 0, points) * fn(t)) * slope
        variance = t**2 - s**2 * r**2
        x = x + variance.sqrt() * alphas[i + 1] * noise() if variance >= 1e-6 else x  # numerical_clip
    return x


@pytest.mark.parametrize("fn", [fn_5, lambda rho: rho**1.5, lambda rho: rho**2], ids=["5", "1.5", "sde"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_is_its_authors_solver_with_exact_integrals_and_its_first_difference_corrected(order, fn):
    plan = sv.er_sde(VP, UNEVEN, order, fn)
    loop = partial(er_sde_sampler, times=UNEVEN, schedule=VP, order=order, fn=fn)
    assert gap(plan, loop) < 1e-12
    assert gap(louder(plan), loop) > 1e-6
    assert (gap(plan, partial(loop, points=100)) < 1e-4) == (order == 1)
    assert (gap(plan, partial(loop, corrected=False)) < 1e-4) == (order < 3)


@pytest.mark.parametrize(("corrected", "order"), [(True, 3), (False, 2)])
def test_er_sde_3_has_rows_of_second_order_without_its_correction(corrected, order):
    """On the ODE, fn(rho) = rho."""
    loop = partial(er_sde_sampler, schedule=EDM, order=3, fn=lambda rho: rho, corrected=corrected)
    measured = row_order(as_method(loop), EDM, 0.5, [1.0, 2.0, 1.5, 0.8], 0.02, degree=3)
    assert measured == pytest.approx(order, abs=0.1)


def test_er_sde_as_released_adds_no_noise_in_the_last_step_of_edms_grid():
    """Its numerical_clip takes a variance below 1e-6 for rounding; there the noise is an eighth of sigma."""
    last = karras_nodes(0.002, 80.0, 18)[-2:]
    released = trace(partial(er_sde_sampler, times=last, schedule=EDM, order=1, fn=fn_5), 1, draws=0)
    plan = sv.er_sde(EDM, last, 1, fn_5)
    assert plan.c[0, 0] > 0.12 * plan.sigma[-1]
    assert_close(ours(plan)[:, :2], released, rtol=1e-12, atol=1e-12)


# --- diffusers ----------------------------------------------------------------------------------------------


def peer(name, **config):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, name)(**betas, **config)
    return scheduler, sv.Discrete.from_alphas_cumprod(scheduler.alphas_cumprod)


def diffusers_table(scheduler, monkeypatch, draws):
    """The scheduler's own loop read off as a table, its noise fed draw by draw, and the times it stood on."""
    module, count = sys.modules[type(scheduler).__module__], len(scheduler.timesteps)

    def sampler(model, x, noise):
        monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: noise().float())
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)  # without it some warn
            x = scheduler.step(model(x, t).float(), t, x.float()).prev_sample
        return x.double()

    times = torch.cat([(scheduler.timesteps.double() + 1) / 1000, torch.zeros(1, dtype=torch.float64)])
    return trace(sampler, count, draws), times


def is_theirs(plan, theirs, tolerance=1e-4):
    """Whether a scheduler in float32 has our weights, where it may draw at the last step too."""
    mine = ours(plan, "noise", every=theirs.shape[1] == 1 + 2 * plan.nfe)
    return torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_diffusers_ddpm_is_our_table(variance, monkeypatch):
    """It ends on level 0, from where it adds no noise."""
    scheduler, schedule = peer("DDPMScheduler", clip_sample=False, variance_type=f"fixed_{variance}")
    scheduler.set_timesteps(8)
    theirs, times = diffusers_table(scheduler, monkeypatch, draws=7)
    plan = sv.ddpm(schedule, times, variance)
    assert is_theirs(plan, theirs)
    assert not is_theirs(louder(plan), theirs)


def test_diffusers_fixed_large_ddpm_adds_noise_to_its_samples_where_the_last_call_is_above_level_0(
    monkeypatch,
):
    """As it is with trailing levels; the small variance is 0 there."""
    noise = {}
    for variance in ("small", "large"):
        scheduler, _ = peer(
            "DDPMScheduler", clip_sample=False, variance_type=f"fixed_{variance}", timestep_spacing="trailing"
        )
        scheduler.set_timesteps(8)
        theirs, _ = diffusers_table(scheduler, monkeypatch, draws=8)
        noise[variance] = theirs[-1, -1].item()
    assert noise["small"] < 1e-9
    assert noise["large"] > 0.3


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"solver_order": 1}, partial(sv.dpm_solver_pp_sde, order=1)),
        ({"solver_order": 2}, partial(sv.dpm_solver_pp_sde, order=2)),
        ({"solver_order": 2, "solver_type": "heun"}, partial(sv.sa_solver, order=2, corrector=0)),
        ({"solver_order": 1, "algorithm_type": "sde-dpmsolver"}, partial(sv.dpm_solver_sde, order=1)),
        ({"solver_order": 2, "algorithm_type": "sde-dpmsolver"}, partial(sv.dpm_solver_sde, order=2)),
    ],
    ids=["++ 1", "++ 2M", "++ 2M heun", "1", "2M"],
)
@PEERS_WARN
def test_diffusers_sde_multistep_is_our_table(config, method, monkeypatch):
    to_zero = "algorithm_type" not in config
    scheduler, schedule = peer(
        "DPMSolverMultistepScheduler",
        **{"algorithm_type": "sde-dpmsolver++"} | config,
        timestep_spacing="trailing",
        final_sigmas_type="zero" if to_zero else "sigma_min",
        lower_order_final=False,
    )
    scheduler.set_timesteps(8)
    theirs, times = diffusers_table(scheduler, monkeypatch, draws=8)
    times[-1] = 0.0 if to_zero else 1 / 1000
    plan = method(schedule, times)
    assert is_theirs(plan, theirs)
    assert not is_theirs(louder(plan), theirs)


@PEERS_WARN
def test_diffusers_third_order_sde_multistep_weighs_its_second_difference_by_phi_3_with_a_wrong_sign(
    monkeypatch,
):
    """(1 - e^{-z} - z) / z^2 - 1/2, z = 2h, for + 1/2: where h goes to 0 it tends to -1, and not to 0."""
    scheduler, schedule = peer(
        "DPMSolverMultistepScheduler",
        algorithm_type="sde-dpmsolver++",
        solver_order=3,
        timestep_spacing="trailing",
        lower_order_final=False,
    )
    scheduler.set_timesteps(8)
    theirs, times = diffusers_table(scheduler, monkeypatch, draws=8)
    plan = sv.dpm_solver_pp_sde(schedule, times, order=3)
    off = (ours(plan, "noise", every=True) - theirs).abs().amax(1)
    assert off[:3].max() < 1e-4
    assert off[3:].min() > 1e-2

    lam, b = plan.half_logsnr, plan.b.clone()
    for i in range(2, 7):  # the last step, to sigma 0, is of first order
        h, h_0, h_1 = (lam[i + 1 - k] - lam[i - k] for k in range(3))
        z = 2 * h
        slope, curvature = 1 - (1 - torch.exp(-z)) / z, (1 - torch.exp(-z) - z) / z**2 - 0.5
        new, old = (
            torch.tensor([1.0, -1, 0]).double() * h / h_0,
            torch.tensor([0.0, 1, -1]).double() * h / h_1,
        )
        d1, d2 = new + h_0 / (h_0 + h_1) * (new - old), h / (h_0 + h_1) * (new - old)
        total = torch.tensor([1.0, 0, 0]).double() * (1 - torch.exp(-z))
        b[i] = plan.alpha[i + 1] * (total + slope * d1 + curvature * d2)
    assert is_theirs(dataclasses.replace(plan, b=b), theirs)


def diffusers_sa_solver(monkeypatch, orders, tau_func):
    scheduler, schedule = peer(
        "SASolverScheduler", predictor_order=orders[0], corrector_order=orders[1], tau_func=tau_func
    )
    scheduler.set_timesteps(8)
    theirs, times = diffusers_table(scheduler, monkeypatch, draws=8)
    times[-1] = 1 / 1000
    return theirs, schedule, times, scheduler.timesteps.tolist()


@pytest.mark.parametrize("orders", [(1, 2), (2, 2), (3, 4)])
@pytest.mark.parametrize("tau", [0.0, 0.6, None], ids=["ode", "0.6", "default"])
@PEERS_WARN
def test_diffusers_sa_solver_has_the_few_steps_rule_and_each_step_the_tau_of_its_start(
    tau, orders, monkeypatch
):
    """By default tau is 1 for steps 200 to 800, else 0. The authors' code takes that of the end, as ours."""
    of_step = (lambda t: float(200 <= t <= 800)) if tau is None else lambda t: tau
    theirs, schedule, times, steps = diffusers_sa_solver(
        monkeypatch, orders, None if tau is None else of_step
    )
    plan = sv.ddim(schedule, times)

    def same(steps_of_tau, few_steps):
        def loop(model, x, noise):
            def predict(x, i):
                return (x - plan.sigma[i] * model(x, i)) / plan.alpha[i]

            taus, options = [of_step(t) for t in steps_of_tau], {"lower": True, "every": True}
            return sa_sampler(predict, x, noise, numbers_of(plan), *orders, taus, few_steps, **options)

        return torch.allclose(trace(loop, 8, 8), theirs, rtol=1e-4, atol=1e-5)

    assert same(steps, few_steps=True)
    assert not same(steps, few_steps=False)
    assert same([*steps[1:], 0], few_steps=True) == (tau is not None)


@pytest.mark.parametrize("order", [1, 2])
@PEERS_WARN
def test_diffusers_sa_solver_without_noise_is_unipc_with_bh1_and_the_corrector_of_order_1(order, monkeypatch):
    theirs, schedule, times, _ = diffusers_sa_solver(monkeypatch, (order, 2), lambda t: 0.0)
    predictor = sv.unipc(schedule, times, order, "bh1", corrector=False, final="lower")
    mine = ours(sv.corrected(predictor, order=1, variant="bh1"), "noise")
    assert_close(mine, theirs[:, :9], rtol=1e-4, atol=1e-5)
    assert (theirs[:, 9:] == 0).all()


@PEERS_WARN
def test_diffusers_euler_ancestral_is_ddim_with_eta_1(monkeypatch):
    """In sigma, x / alpha being its state."""
    scheduler, _ = peer("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")
    scheduler.set_timesteps(8)
    theirs, _ = diffusers_table(scheduler, monkeypatch, draws=8)
    plan = sv.ddim(EDM, scheduler.sigmas.double(), eta=1.0)
    assert is_theirs(plan, theirs)
    assert not is_theirs(louder(plan), theirs)

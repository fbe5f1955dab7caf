"""Networks of EDM, score_sde, flow matching and discrete steps as (model, schedule), against their own samplers and exact flows.

The networks are stand-ins: small, with the preconditioning, rounding and signatures of the published ones.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import solvers as sv
from problems import Counted, generator
from reference import Gaussian
from solvers.adapters import edm_grid, from_edm, from_flow, from_score

EXACT = {"rtol": 1e-12, "atol": 1e-12}
SHAPE = (3, 2, 4, 5)
STEPS = 18  # of EDM's sampler


def column(v):
    return v.reshape(-1, 1, 1, 1)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


# --- EDM: table 1 of Karras et al. 2022 (arXiv 2206.00364) -------------------------------------------------------


class Preconditioned(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x, c_noise), as EDM's networks are called; F takes what reaches it in its weights' dtype."""

    sigma_min, sigma_max = 0.0, math.inf
    classes, unit = 4, 1.0  # unit is of c_noise

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.eval()
        self.mixing = nn.Parameter((normals(5, 5, seed=1) / 2).to(dtype), requires_grad=False)
        self.of_class = nn.Parameter(normals(self.classes, 5, seed=2).to(dtype), requires_grad=False)
        self.asked = []

    def raw(self, x, noise, class_labels=None):
        bias = 0 if class_labels is None else (class_labels.to(x) @ self.of_class)[:, None, None]
        return torch.tanh(x @ self.mixing + column(noise).to(x) / self.unit + bias)

    def forward(self, x, sigma, class_labels=None):
        self.asked.append(torch.as_tensor(sigma).flatten()[0].item())
        x, sigma = x.to(self.mixing), column(torch.as_tensor(sigma)).to(self.mixing)
        skip, out, into, noise = self.scalings(sigma)
        return skip * x + out * self.raw(into * x, noise, class_labels)

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


class OfEDM(Preconditioned):
    def scalings(self, sigma, sigma_data=0.5):
        norm = torch.sqrt(sigma**2 + sigma_data**2)
        return (sigma_data / norm) ** 2, sigma * sigma_data / norm, 1 / norm, sigma.log() / 4


class OfVE(Preconditioned):
    sigma_min, sigma_max = 0.02, 100.0

    def scalings(self, sigma):
        return torch.ones_like(sigma), sigma, torch.ones_like(sigma), torch.log(sigma / 2)


class OfVP(Preconditioned):
    """sigma(t)^2 = exp(19.9 t^2 / 2 + 0.1 t) - 1, c_noise = 999 t."""

    unit = 300.0
    sigma_min, sigma_max = (math.sqrt(math.expm1(19.9 * t**2 / 2 + 0.1 * t)) for t in (1e-5, 1.0))

    def scalings(self, sigma):
        t = (torch.sqrt(0.1**2 + 2 * 19.9 * torch.log1p(sigma**2)) - 0.1) / 19.9
        return torch.ones_like(sigma), -sigma, torch.rsqrt(sigma**2 + 1), 999 * t


class OfIDDPM(Preconditioned):
    """It knows M levels u_j, kept in float32, and takes any sigma for the nearest of them."""

    unit, levels = 300.0, 1000

    def __init__(self, dtype=torch.float64):
        super().__init__(dtype)
        j = torch.arange(self.levels + 1, dtype=torch.float64)
        alpha_bar = torch.sin(math.pi / 2 * j / (1.008 * self.levels)) ** 2
        u = torch.zeros_like(j)
        for k in range(self.levels, 0, -1):
            u[k - 1] = torch.sqrt((u[k] ** 2 + 1) / (alpha_bar[k - 1] / alpha_bar[k]).clamp(min=0.001) - 1)
        self.register_buffer("u", u.float())
        self.sigma_min, self.sigma_max = float(self.u[-2]), float(self.u[0])

    def index(self, sigma):
        return (self.u - sigma.float().reshape(-1, 1)).abs().argmin(1)

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        return self.u[self.index(sigma)].to(sigma.dtype).reshape(sigma.shape)

    def scalings(self, sigma):
        noise = self.levels - 1 - self.index(sigma).reshape(sigma.shape)
        return torch.ones_like(sigma), -sigma, torch.rsqrt(sigma**2 + 1), noise


NETWORKS = {"EDM": OfEDM, "VE": OfVE, "VP": OfVP, "iDDPM": OfIDDPM}


def karras_sampler(
    net, z, steps, class_labels=None, ends=(0.002, 80.0), rho=7.0, s_churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0,
    noise=None,
):  # fmt: skip
    """Algorithm 2 of the paper on the grid of its eq. 5, each sigma rounded as the network does; algorithm 1 where nothing is churned."""
    low, high = max(ends[0], net.sigma_min), min(ends[1], net.sigma_max)
    i = torch.arange(steps, dtype=torch.float64)
    t = (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    t = torch.cat([net.round_sigma(t), torch.zeros(1, dtype=torch.float64)])
    x = z * t[0]
    for i in range(steps):
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= t[i] <= s_max else 0.0
        t_hat = net.round_sigma(t[i] + gamma * t[i])
        if gamma:
            x = x + torch.sqrt(t_hat**2 - t[i] ** 2) * s_noise * noise[i]
        slope = (x - net(x, t_hat, class_labels).double()) / t_hat
        euler = x + (t[i + 1] - t_hat) * slope
        if t[i + 1] > 0:
            second = (euler - net(euler, t[i + 1], class_labels).double()) / t[i + 1]
            x = x + (t[i + 1] - t_hat) * (slope + second) / 2
        else:
            x = euler
    return x


def edm_samples(net, z, steps=STEPS, method=sv.heun, rho=7.0, **options):
    model, schedule = from_edm(net, **options)
    grid = edm_grid(net, rho=rho)
    return sv.sample(model, grid(schedule, steps)[0] * z, schedule, steps, method, grid)


@pytest.mark.parametrize("steps", [5, STEPS, 40])
@pytest.mark.parametrize("name", NETWORKS)
def test_heun_on_the_grid_of_the_network_is_edms_sampler(name, steps):
    z, theirs, mine = normals(*SHAPE), NETWORKS[name](), NETWORKS[name]()
    expected = karras_sampler(theirs, z, steps)
    assert_close(edm_samples(mine, z, steps), expected, **EXACT)
    assert len(mine.asked) == 2 * steps - 1
    assert_close(mine.asked, theirs.asked, rtol=1e-13, atol=0)
    assert (edm_samples(mine, z, steps, rho=6.9) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_float32_with_a_state_in_float64_is_edms_sampler_too(name):
    z, net = normals(*SHAPE), NETWORKS[name](torch.float32)
    found = edm_samples(net, z)
    assert found.dtype == torch.float64
    assert_close(found, karras_sampler(net, z, STEPS), rtol=0, atol=1e-5)


def test_a_network_moved_to_float64_still_knows_its_levels_in_float32():
    """net.double() makes float64 of the table too, whose values are those of float32."""
    z, net = normals(*SHAPE), OfIDDPM(torch.float32)
    assert net.double().u.dtype == torch.float64
    assert_close(edm_samples(net, z), karras_sampler(net, z, STEPS), **EXACT)


@pytest.mark.parametrize("name", NETWORKS)
def test_class_labels_reach_the_network(name):
    z, net = normals(*SHAPE), NETWORKS[name]()
    labels = torch.eye(net.classes)[[0, 2, 3]]
    expected = karras_sampler(net, z, STEPS, labels)
    assert_close(edm_samples(net, z, class_labels=labels), expected, **EXACT)
    assert (edm_samples(net, z) - expected).abs().max() > 1e-3
    others = edm_samples(net, z, class_labels=labels[[0, 2, 1]])
    assert torch.equal(others[0], edm_samples(net, z, class_labels=labels)[0])
    assert (others[1:] - expected[1:]).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("name", ["EDM", "VE", "VP"])
def test_churn_is_edms_stochastic_sampler(name):
    """Of its draws ours are those of the steps between S_tmin and S_tmax, in the same order."""
    z, net, noise = normals(*SHAPE), NETWORKS[name](), normals(STEPS, *SHAPE, seed=3)
    expected = karras_sampler(net, z, STEPS, s_churn=6.0, s_min=0.05, s_max=50.0, s_noise=1.003, noise=noise)
    model, schedule = from_edm(net)
    times = edm_grid(net)(schedule, STEPS)
    churned = iter(noise[(times[:-1] >= 0.05) & (times[:-1] <= 50.0)])
    method = partial(sv.churn, amount=6.0, low=0.05, high=50.0)
    plan = method(schedule, times, noise_scale=1.003)
    found = sv.run(plan, model, times[0] * z, noise=lambda draw, like: next(churned))
    assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert next(churned, None) is None
    churned = iter(noise[(times[:-1] >= 0.05) & (times[:-1] <= 50.0)])
    quieter = sv.run(method(schedule, times), model, times[0] * z, noise=lambda draw, like: next(churned))
    assert (quieter - expected).abs().max() > 1e-5


def test_the_schedule_has_the_range_that_the_network_and_its_user_have_in_common():
    assert from_edm(OfEDM())[1] == sv.EDM(0.002, 80.0)
    assert from_edm(OfVE())[1] == sv.EDM(0.02, 80.0)
    assert from_edm(OfVE(), sigma_min=0.001, sigma_max=200.0)[1] == sv.EDM(0.02, 100.0)
    assert from_edm(OfVP(), sigma_min=0.1, sigma_max=10.0)[1] == sv.EDM(0.1, 10.0)
    z, net = normals(*SHAPE), OfVE()
    expected = karras_sampler(net, z, STEPS, ends=(0.1, 10.0))
    assert_close(edm_samples(net, z, sigma_min=0.1, sigma_max=10.0), expected, **EXACT)


def test_a_grid_of_one_step_is_the_first_call_and_then_data():
    _, schedule = from_edm(OfEDM())
    assert edm_grid(OfEDM())(schedule, 1).tolist() == [80.0, 0.0]
    with pytest.raises(ValueError, match="steps = 0"):
        edm_grid(OfEDM())(schedule, 0)


def test_every_call_on_edms_grid_is_a_level_of_the_network():
    net = OfIDDPM()
    model, schedule = from_edm(net)
    calls = edm_grid(net)(schedule, STEPS)[:-1]
    assert torch.isin(calls, net.u.double()).all()
    assert_close(model.label(calls), calls, rtol=0, atol=0)
    assert abs(calls[0] - schedule.sigma_max) > 0.1  # so x at the start is calls[0] z, and not 80 z
    plain = sv.karras(schedule, STEPS - 1)
    assert 1e-4 < ((calls - plain).abs() / plain).max() < 0.05


OFF = r"would take sigma = .* for .*: stand on its levels, grid=edm_grid\(net\)"


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (sv.ddim, sv.karras),
        (sv.recommended, None),
        (partial(sv.heun, alpha=0.5), "its own"),
        (partial(sv.dpm_solver, order=2), "its own"),
        (sv.churn, "its own"),
    ],
    ids=["karras", "the default", "a midpoint", "a stage", "churn"],
)
def test_a_sigma_that_the_network_would_round_is_refused_with_the_line_to_write(method, grid):
    net = OfIDDPM()
    model, schedule = from_edm(net)
    with pytest.raises(ValueError, match=OFF):
        sv.sample(
            model, normals(*SHAPE), schedule, 6, method, edm_grid(net) if grid == "its own" else grid, noise=0
        )
    assert not net.asked
    free, schedule = from_edm(OfVP())
    sv.sample(
        free, normals(*SHAPE), schedule, 6, method, edm_grid(OfVP()) if grid == "its own" else grid, noise=0
    )


def test_a_method_of_one_call_per_step_stands_on_the_levels_of_the_network():
    net, z = OfIDDPM(), normals(*SHAPE)
    for method in (sv.ddim, sv.dpm_solver_pp, sv.unipc, sv.lms, sv.recommended):
        assert edm_samples(net, z, 8, method).isfinite().all()
    assert set(net.asked) <= set(net.u.tolist())


def test_an_iddpm_network_is_a_noise_prediction_that_reads_whole_steps():
    """Level n of Discrete has sigma / alpha = u_{M-1-n}, and the network reads n."""
    net = OfIDDPM()
    levels = sv.Discrete.from_alphas_cumprod(1 / (1 + net.u[:-1].double().flip(0) ** 2))
    own = sv.Model(net.raw, label=levels.step)
    model, schedule = from_edm(net)
    times = sv.angle_levels(levels, 8)
    sigmas = torch.cat([net.round_sigma(torch.exp(-levels.half_logsnr(times[:-1]))), times[-1:]])
    x = normals(*SHAPE)
    for method in (sv.ddim, sv.dpm_solver_pp, sv.heun):
        found = sv.run(method(schedule, sigmas), model, x / levels.alpha(times[0]))
        assert_close(found, sv.run(method(levels, times), own, x), rtol=1e-9, atol=1e-9)


def test_a_vp_network_is_a_noise_prediction_that_reads_the_time():
    net, vp = OfVP(), sv.VP()
    own = sv.Model(net.raw, label=lambda t: 999 * t)
    model, schedule = from_edm(net)
    times = sv.logsnr(vp, 8)
    x, plan = normals(*SHAPE), sv.dpm_solver_pp(schedule, torch.exp(-vp.half_logsnr(times)))
    found = sv.run(plan, model, x / vp.alpha(times[0])) * vp.alpha(times[-1])
    assert_close(found, sv.run(sv.dpm_solver_pp(vp, times), own, x), rtol=1e-10, atol=1e-10)


def test_the_raw_network_of_edm_is_a_prediction_of_its_own():
    net, z = OfEDM(), normals(*SHAPE)
    model, schedule = from_edm(net)
    raw = sv.Model(net.raw, predicts="edm", label=lambda t: t.log() / 4)
    found = sv.sample(raw, 80 * z, schedule, STEPS, sv.heun, edm_grid(net))
    assert_close(found, sv.sample(model, 80 * z, schedule, STEPS, sv.heun, edm_grid(net)), **EXACT)


@pytest.mark.parametrize("missing", ["sigma_min", "sigma_max", "round_sigma"])
def test_a_network_that_is_none_of_edms_is_refused(missing):
    class Other:
        sigma_min, sigma_max, round_sigma = 0.0, 1.0, staticmethod(lambda sigma: sigma)

        def __call__(self, x, sigma):
            return x

    from_edm(Other())
    delattr(Other, missing)
    with pytest.raises(TypeError, match=rf"net is Other, without {missing}.*Model\(net, predicts='data'\)"):
        from_edm(Other())
    Other.sigma_min, Other.sigma_max, Other.round_sigma = 0.0, 1.0, 0
    del Other.__call__
    with pytest.raises(TypeError, match="without a call"):
        from_edm(Other())


# --- score_sde: the SDEs of Song et al. 2021 (arXiv 2011.13456) --------------------------------------------------


class VPSDE:
    """mean exp(-1/4 t^2 (beta_1 - beta_0) - 1/2 t beta_0) x, variance 1 - exp(2 log mean): eq. 33 of its appendix C."""

    def __init__(self, beta_min=0.1, beta_max=20.0):
        self.beta_0, self.beta_1 = beta_min, beta_max

    def log_mean(self, t):
        return -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0

    def marginal_prob(self, x, t):
        log_mean = self.log_mean(t)
        return torch.exp(column(log_mean)) * x, torch.sqrt(1 - torch.exp(2 * log_mean))


class SubVPSDE(VPSDE):
    """The same mean, and its variance squared."""

    def marginal_prob(self, x, t):
        log_mean = self.log_mean(t)
        return torch.exp(column(log_mean)) * x, 1 - torch.exp(2 * log_mean)


class VESDE:
    """mean x, deviation sigma_min (sigma_max / sigma_min)^t."""

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def marginal_prob(self, x, t):
        return x, self.sigma_min * (self.sigma_max / self.sigma_min) ** t


SDES = {
    "VP": (VPSDE(), sv.VP()),
    "VP of other betas": (VPSDE(0.2, 10.0), sv.VP(0.2, 10.0)),
    "sub-VP": (SubVPSDE(), sv.SubVP()),
    "VE": (VESDE(), sv.VE(stop=1e-5)),
    "VE of other sigmas": (VESDE(0.02, 348.0), sv.VE(0.02, 348.0, stop=1e-5)),
}

ROOT = normals(3, 3, seed=4)
DATA = Gaussian(torch.tensor([0.7, -1.2, 0.4]).double(), ROOT @ ROOT.T / 3 + 0.1 * torch.eye(3).double())


def posterior(x, alpha, sigma):
    """Noise and data of Gaussian data given x [B, 3], at alpha, sigma [B]."""
    alpha, sigma = alpha[:, None], sigma[:, None]
    total = alpha[..., None] ** 2 * DATA.cov + sigma[..., None] ** 2 * torch.eye(3).double()
    whitened = torch.linalg.solve(total, x - alpha * DATA.mean)
    return sigma * whitened, DATA.mean + alpha * whitened @ DATA.cov


def exact_score(sde):
    """grad log p_t of DATA, from the sde's own marginal."""

    def score(x, t):
        alpha, sigma = sde.marginal_prob(torch.ones(len(x), 1, 1, 1, dtype=x.dtype), t)
        noise, _ = posterior(x, alpha.flatten(), sigma)
        return -noise / sigma[:, None]

    return score


def at_start(schedule, z):
    return schedule.sigma(torch.tensor(schedule.start).double()) * z


@pytest.mark.parametrize("name", SDES)
def test_the_schedule_of_an_sde_is_recognised(name):
    sde, schedule = SDES[name]
    model, found = from_score(exact_score(sde), sde)
    assert found == schedule
    assert model.predicts == "score"


@pytest.mark.parametrize("name", SDES)
def test_samples_by_a_score_are_those_of_the_exact_network_and_near_the_exact_flow(name):
    sde, expected = SDES[name]
    model, schedule = from_score(exact_score(sde), sde)
    x = at_start(schedule, normals(4, 3))
    exact_net = DATA.model(expected)
    for method in (sv.ddim, sv.dpm_solver_pp, sv.heun, partial(sv.ddim, eta=1.0)):
        times = sv.logsnr(schedule, 12)
        found = sv.run(method(schedule, times), model, x, noise=1)
        assert_close(found, sv.run(method(expected, times), exact_net, x, noise=1), rtol=1e-9, atol=1e-9)
    flow = DATA.flow(x, schedule, schedule.start, schedule.stop)
    gaps = [
        (sv.sample(model, x, schedule, steps, sv.dpm_solver_pp, sv.logsnr) - flow).abs().max()
        for steps in (40, 160)
    ]
    assert gaps[1] < 1e-3
    assert gaps[1] < gaps[0] / 10
    untold = sv.run(sv.dpm_solver_pp(schedule, sv.logsnr(schedule, 160)), exact_score(sde), x)
    assert (untold - flow).abs().max() > 0.1  # as a noise prediction it is none


def test_an_sde_is_recognised_by_its_formulas_and_not_by_its_name():
    named_otherwise = type("VPSDE", (SubVPSDE,), {})
    assert from_score(exact_score(named_otherwise()), named_otherwise())[1] == sv.SubVP()
    assert from_score(exact_score(VPSDE()), type("SDE", (VPSDE,), {})())[1] == sv.VP()


def changed(sde, **marginals):
    """An sde with something of its marginal changed."""

    class Changed(sde):
        def marginal_prob(self, x, t):
            mean, std = super().marginal_prob(x, t)
            return mean * marginals.get("mean", 1.0), std * marginals.get("std", 1.0)

    return Changed()


class Cosine(VPSDE):
    def log_mean(self, t):
        return torch.log(torch.cos((t + 0.008) / 1.008 * math.pi / 2) + 1e-5)


class NoMarginal:
    beta_0, beta_1 = 0.1, 20.0


class NoBetas:
    marginal_prob = VPSDE().marginal_prob


@pytest.mark.parametrize(
    "sde",
    [
        changed(VPSDE, mean=1.001),
        changed(VPSDE, std=0.999),
        changed(SubVPSDE, std=1.001),
        changed(VESDE, std=1.001),
        changed(VESDE, mean=0.999),
        Cosine(),
        NoMarginal(),
        NoBetas(),
        None,
    ],
    ids=["VP mean", "VP std", "sub-VP std", "VE std", "VE mean", "cosine", "no marginal", "no betas", "none"],
)
def test_an_sde_of_another_schedule_is_refused(sde):
    with pytest.raises(
        ValueError, match=r"expected a VPSDE, subVPSDE or VESDE.*Model\(score, predicts='score'\)"
    ):
        from_score(exact_score(sde), sde)


@pytest.mark.parametrize("sde", [VPSDE, SubVPSDE, VESDE])
def test_an_sde_that_computes_in_float32_is_recognised(sde):
    class Single(sde):
        def marginal_prob(self, x, t):
            return super().marginal_prob(x.float(), t.float())

    from_score(exact_score(Single()), Single())


# --- flow matching -----------------------------------------------------------------------------------------------


def exact_velocity(x, t):
    """eps - x_0 of DATA on the straight path, noise at t = 1."""
    noise, data = posterior(x, 1 - t, t)
    return noise - data


def upwards(x, t):
    """The same network as flow matching first had it: x_0 - eps, noise at t = 0."""
    return -exact_velocity(x, 1 - t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method", [sv.recommended, sv.ddim, sv.dpm_solver_pp, sv.unipc, sv.obelm])
def test_a_flow_has_the_same_samples_in_both_directions_of_time(method, shift):
    x, flow = normals(4, 3), sv.Flow(shift)
    samples = {}
    for noise_at, velocity in ((1, exact_velocity), (0, upwards)):
        model, schedule = from_flow(velocity, noise_at, shift)
        assert schedule == flow
        times = sv.angle(schedule, 9, start=0.999)  # obelm is in noise form, which alpha = 0 has not
        samples[noise_at] = sv.run(method(schedule, times), model, x)
    own = sv.Model(exact_velocity, predicts="flow", label=flow.sigma)
    assert_close(samples[0], samples[1], **EXACT)
    assert_close(samples[1], sv.run(method(flow, times), own, x), rtol=0, atol=0)
    wrong, schedule = from_flow(exact_velocity, 0, shift)
    assert (sv.run(method(schedule, times), wrong, x) - samples[1]).abs().max() > 0.1


@pytest.mark.parametrize("noise_at", [1, 0])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_near_the_exact_flow_of_gaussian_data(noise_at, shift):
    """From pure noise to clean data, which both are on the path."""
    x = normals(4, 3)
    exact = DATA.flow(x, sv.Flow(), 1.0, 0.0)
    model, schedule = from_flow(exact_velocity if noise_at else upwards, noise_at, shift)
    gaps = [(sv.sample(model, x, schedule, steps) - exact).abs().max() for steps in (10, 40)]
    assert gaps[1] < 1e-4
    assert gaps[1] < gaps[0] / 30


@pytest.mark.parametrize("noise_at", [1, 0])
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_a_shift_is_of_the_grid_and_the_network_is_told_the_time_it_was_trained_on(noise_at, shift):
    """shift t / (1 + (shift - 1) t) is that time, and what the state has of noise."""
    t = torch.linspace(1.0, 0.0, 6, dtype=torch.float64)
    trained = shift * t / (1 + (shift - 1) * t)
    net = Counted(exact_velocity if noise_at else upwards)
    model, schedule = from_flow(net, noise_at, shift)
    x = normals(4, 3)
    found = sv.run(sv.ddim(schedule, t), model, x)
    assert_close(net.times, (trained if noise_at else 1 - trained)[:-1].tolist(), rtol=0, atol=1e-15)
    expected = x
    for now, then in zip(trained[:-1], trained[1:], strict=True):  # Euler in the trained time
        expected = expected + (then - now) * exact_velocity(expected, now.expand(len(x)))
    assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("noise_at", [0.5, 2, -1, "data"])
def test_a_flow_without_noise_at_an_end_is_refused(noise_at):
    with pytest.raises(ValueError, match=r"noise_at = .*expected 1 or 0"):
        from_flow(exact_velocity, noise_at)


# --- networks of whole steps -------------------------------------------------------------------------------------

LEVELS = sv.Discrete.linear(100, 1e-3, 0.15)


class Whole:
    """A table of one bias for each level; a fraction has no place in it."""

    def __init__(self):
        self.table, self.numbers = normals(100, 5, seed=5), []

    def __call__(self, x, n):
        assert n.dtype == torch.int64
        self.numbers.append(n[0].item())
        return torch.tanh(x + self.table[n][:, None, None])


def interpolating(x, n):
    """The same network, which takes any number."""
    assert n.dtype == x.dtype
    table, low = Whole().table, n.floor().long()
    bias = torch.lerp(table[low], table[(low + 1).clamp(max=99)], (n - low)[:, None])
    return torch.tanh(x + bias[:, None, None])


GRIDS = {
    "angle_levels": sv.angle_levels,
    "trailing": sv.trailing,
    "leading": sv.leading,
    "linspace": sv.linspace,
    "logsnr snapped": lambda schedule, steps: sv.snap(schedule, sv.logsnr(schedule, steps)),
    "karras snapped": lambda schedule, steps: sv.snap(schedule, sv.karras(schedule, steps)),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", [sv.ddim, sv.dpm_solver_pp, sv.unipc, partial(sv.ddim, eta=1.0)])
def test_on_levels_whole_and_interpolated_labels_are_the_same(grid, method):
    x, net = normals(*SHAPE), Whole()
    times = GRIDS[grid](LEVELS, 7)
    plan = method(LEVELS, times)
    found = sv.run(plan, sv.Model(net, label=LEVELS.step), x, noise=1)
    assert torch.equal(found, sv.run(plan, sv.Model(interpolating, label=LEVELS.label), x, noise=1))
    assert net.numbers == (100 * times[:-1] - 1).round().long().tolist()
    assert net.numbers == sorted(set(net.numbers), reverse=True)


def test_heuns_stages_are_on_the_levels_of_its_grid():
    x, plan = normals(*SHAPE), sv.heun(LEVELS, sv.trailing(LEVELS, 7))
    found = sv.run(plan, sv.Model(Whole(), label=LEVELS.step), x)
    assert torch.equal(found, sv.run(plan, sv.Model(interpolating, label=LEVELS.label), x))


@pytest.mark.parametrize(
    "plan",
    [
        sv.ddim(LEVELS, sv.logsnr(LEVELS, 7)),
        sv.dpm_solver(LEVELS, sv.trailing(LEVELS, 7), order=2),
        sv.heun(LEVELS, sv.trailing(LEVELS, 7), alpha=0.5),
    ],
    ids=["grid", "stage", "midpoint"],
)
def test_between_levels_a_whole_label_is_refused_and_an_interpolated_one_is_a_fraction(plan):
    x, net = normals(*SHAPE), Whole()
    with pytest.raises(
        ValueError, match=r"step [0-9.]+ lies between two levels.*snap\(schedule, times\).*schedule.label"
    ):
        sv.run(plan, sv.Model(net, label=LEVELS.step), x)
    assert not net.numbers
    counted = Counted(interpolating)
    sv.run(plan, sv.Model(counted, label=LEVELS.label), x)
    assert any(n != round(n) for n in counted.times)


def test_below_the_first_level_either_label_is_refused():
    plan = sv.ddim(LEVELS, [1.0, 0.5, 0.005, 0.0])
    for label in (LEVELS.step, LEVELS.label):
        with pytest.raises(ValueError, match="below the first level 1/100"):
            sv.run(plan, sv.Model(Whole(), label=label), normals(*SHAPE))


def test_a_snapped_grid_moves_the_numbers_of_the_table_with_the_label():
    """The level in the table is the level that the network is told."""
    plain = sv.logsnr(LEVELS, 7)
    snapped = sv.snap(LEVELS, plain)
    assert (snapped != plain).any()
    plan = sv.ddim(LEVELS, snapped)
    assert_close(plan.alpha, LEVELS.alpha(snapped), rtol=0, atol=0)
    assert (plan.a - sv.ddim(LEVELS, plain).a).abs().max() > 1e-4

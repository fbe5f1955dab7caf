"""One trained network by way of every adapter: the UNet of docs/examples, whose samples are the same whatever library it seems to come from.

It predicts the noise from x = alpha x_0 + sigma eps of VP and half log-SNR lambda. Every interface below is a change of variables around that one
network: of the state, x / alpha_t being the same on all schedules; of the time, each library's being some function of lambda; and of the prediction,
where noise, data, score and velocity follow from one another and x. A method in data form is a recursion in x / alpha and the data prediction, whose
coefficients depend on the lambdas alone, and the noise of its SDE is the same multiple of sigma / alpha. So on grids of equal lambdas all routes are
one computation, and differ by rounding. One wrong scale, sign, label or level in an adapter would show in the samples: lambda off by a thousandth does.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import solvers as sv
from problems import generator
from solvers.adapters import from_denoiser, from_diffusers, from_edm, from_flow, from_score, sampler
from solvers.methods import BUILDS
from test_docs import ROOT, loaded

EXAMPLE = loaded(ROOT / "docs/examples/digits_unet.py")
VP = EXAMPLE.SCHEDULE
METHODS = ("ddim", "dpm_solver_pp_2m", "dpm_solver_pp_sde_2m")
SEED = 7  # of the noise of the last one
NUMBERS = [999, 930, 800, 640, 480, 330, 200, 100, 40, 9]  # of 1000 levels, at (n + 1) / 1000
TIMES = torch.tensor([*((n + 1) / 1000 for n in NUMBERS), 0.0], dtype=torch.float64)
LAMBDAS = VP.half_logsnr(TIMES)
SIGMAS = torch.exp(-LAMBDAS)  # sigma / alpha
FIRST_ALPHA, FIRST_SIGMA = (float(level(TIMES[0])) for level in (VP.alpha, VP.sigma))


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=["float64", "float32"])
def net(request):
    return EXAMPLE.load().net.to(request.param)


def column(v):
    return v.reshape(-1, 1, 1, 1)


def start(net):
    return torch.randn(3, 1, 8, 8, dtype=torch.float64, generator=generator()).to(net.frequencies)


def natively(net, name, x, off=0.0):
    model = sv.Model(net, label=lambda t: VP.half_logsnr(t) + off)
    return sv.run(BUILDS[name](VP, TIMES), model, x, noise=SEED)


# --- the network as each library has it --------------------------------------------------------------------------


class OfDiffusers(nn.Module):
    """A module that reads step numbers, called as diffusers' pipelines call theirs."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        levels = torch.arange(1, 1001, dtype=torch.float64) / 1000
        self.register_buffer("half_logsnr", VP.half_logsnr(levels).to(net.frequencies))
        self.eval()

    def forward(self, sample, timestep, return_dict=True):
        number = torch.as_tensor(timestep).expand(len(sample))
        assert (number == number.round()).all()
        noise = self.net(sample, self.half_logsnr[number.long()])
        return SimpleNamespace(sample=noise) if return_dict else (noise,)


def config():
    """Of a scheduler whose 1000 levels lie on VP: alphas_cumprod[n] = alpha((n + 1) / 1000)^2."""
    alpha = VP.alpha(torch.arange(1001, dtype=torch.float64) / 1000)
    betas = 1 - (alpha[1:] / alpha[:-1]) ** 2
    return {"num_train_timesteps": 1000, "trained_betas": betas.tolist(), "prediction_type": "epsilon"}


class OfEDM(nn.Module):
    """D(x; sigma) of x = x_0 + sigma eps, with what EDM's networks have besides."""

    sigma_min, sigma_max = float(SIGMAS[-2]), float(SIGMAS[0])

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.eval()

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)

    def forward(self, x, sigma, class_labels=None):
        assert class_labels is None
        alpha = torch.rsqrt(1 + sigma**2)
        return x - column(sigma) * self.net(column(alpha) * x, -sigma.log())


class VPSDE:
    """As of score_sde."""

    beta_0, beta_1 = VP.beta_min, VP.beta_max

    def marginal_prob(self, x, t):
        log_mean = -0.25 * t**2 * (self.beta_1 - self.beta_0) - 0.5 * t * self.beta_0
        return torch.exp(column(log_mean)) * x, torch.sqrt(-torch.expm1(2 * log_mean))


def score_of(net):
    def score(x, t):
        mean, std = VPSDE().marginal_prob(torch.ones_like(x[:, :1, :1, :1]), t)
        return -net(x, mean.flatten().log() - std.log()) / column(std)

    return score


def velocity_of(net):
    """eps - x_0 on the straight path; the network is asked at the level of equal half log-SNR, with x in VP's scale."""

    def velocity(x, t):
        half_logsnr = torch.log1p(-t) - t.log()
        alpha = torch.sigmoid(2 * half_logsnr).sqrt()
        noise = net(column(alpha / (1 - t)) * x, half_logsnr)
        return noise - (x - column(t) * noise) / column(1 - t)

    return velocity


# --- the routes ----------------------------------------------------------------------------------------------------


def by_from_diffusers(net, name, x):
    model, schedule = from_diffusers(OfDiffusers(net), config())
    return sv.run(BUILDS[name](schedule, TIMES), model, x, noise=SEED)


def by_a_pipelines_loop(net, name, x):
    pytest.importorskip("diffusers")
    from solvers.adapters.diffusers import SolversScheduler

    module = OfDiffusers(net)
    scheduler = SolversScheduler.from_config(config(), method=name, seed=SEED)
    scheduler.set_timesteps(timesteps=NUMBERS)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        noise = module(scheduler.scale_model_input(x, t), t).sample
        x = scheduler.step(noise, t, x).prev_sample
    return x


def by_k_diffusion(net, name, x):
    return sampler(BUILDS[name])(OfEDM(net), x / FIRST_ALPHA, SIGMAS, disable=True, noise=SEED)


def by_from_denoiser(net, name, x):
    model, schedule = from_denoiser(OfEDM(net))
    return sv.run(BUILDS[name](schedule, SIGMAS), model, x / FIRST_ALPHA, noise=SEED)


def by_from_edm(net, name, x):
    model, schedule = from_edm(OfEDM(net))
    return sv.run(BUILDS[name](schedule, SIGMAS), model, x / FIRST_ALPHA, noise=SEED)


def by_from_score(net, name, x):
    model, schedule = from_score(score_of(net), VPSDE())
    return sv.run(BUILDS[name](schedule, TIMES), model, x, noise=SEED)


def by_from_flow(net, name, x, noise_at=1, shift=1.0):
    velocity = velocity_of(net)
    model, schedule = from_flow(
        velocity if noise_at else lambda x, t: -velocity(x, 1 - t), noise_at=noise_at, shift=shift
    )
    plan = BUILDS[name](schedule, schedule.time(LAMBDAS))
    return sv.run(plan, model, x / (FIRST_ALPHA + FIRST_SIGMA), noise=SEED)


def by_comfyuis_flow(net, name, x):
    """sampler on x = (1 - sigma) x_0 + sigma eps, with a denoiser and the seed among its arguments."""
    velocity = velocity_of(net)

    def denoiser(x, sigma, seed):
        return x - column(sigma) * velocity(x, sigma)

    flow = sv.Flow()
    sample = sampler(BUILDS[name], schedule=flow)
    return sample(denoiser, x / (FIRST_ALPHA + FIRST_SIGMA), flow.time(LAMBDAS), {"seed": SEED})


ROUTES = {
    "from_diffusers": by_from_diffusers,
    "SolversScheduler": by_a_pipelines_loop,
    "k-diffusion's interface": by_k_diffusion,
    "from_denoiser": by_from_denoiser,
    "from_edm": by_from_edm,
    "from_score": by_from_score,
    "from_flow": by_from_flow,
    "from_flow, noise at 0": partial(by_from_flow, noise_at=0),
    "from_flow, shift 3": partial(by_from_flow, shift=3.0),
    "ComfyUI's flow": by_comfyuis_flow,
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("route", ROUTES)
def test_the_same_network_has_the_same_samples_by_every_route(net, route, name):
    """They are one recursion in x / alpha over equal half log-SNRs, as this file's first lines say; only rounding tells them apart."""
    x = start(net)
    kept = x.clone()
    found, expected = ROUTES[route](net, name, x), natively(net, name, x)
    assert torch.equal(x, kept)
    assert found.dtype == x.dtype
    assert_close(found, expected, rtol=0, atol=1e-11 if x.dtype == torch.float64 else 5e-5)


def test_a_thousandth_of_half_logsnr_would_be_seen(net):
    """So that agreement to the tolerances above means that every route told the network its level, and the right method ran."""
    x = start(net)
    samples = {name: natively(net, name, x) for name in METHODS}
    for name in METHODS:
        assert (natively(net, name, x, off=1e-3) - samples[name]).abs().max() > 2e-4
    for name, other in zip(METHODS, METHODS[1:], strict=False):
        assert (samples[name] - samples[other]).abs().max() > 0.01

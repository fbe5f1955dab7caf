"""SolversScheduler keeps the contract of diffusers' schedulers, takes their steps where theirs are right, and refuses misuse."""

import copy
import inspect
import pickle
import sys
import threading
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import solvers as sv
from solvers.methods import BUILDS, METHODS, SDES

pytest.importorskip("diffusers")
import diffusers
from diffusers import (
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from solvers.adapters import diffusers as adapter
from solvers.adapters.configs import schedule_of
from solvers.adapters.diffusers import GRIDS, SolversScheduler, from_diffusers

# diffusers' own schedulers convert 0-d arrays and pass on deprecated arguments
PEERS_WARN = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"prediction_type": "flow_prediction", "shift": 3.0}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
STEPS = [999, 850, 700, 400, 150, 30]
SIGMAS = [1.0, 0.8, 0.55, 0.3, 0.1]
ONE_CALL = ("ddim", "dpm_solver_pp_2m", "unipc_2", "recommended")
SDE = ("ddpm", "ddim_half", "dpm_solver_pp_sde_2m", "sa_solver", "ancestral_2s", "churn_heun")
LEVELS = torch.arange(1, 1001, dtype=torch.float64) / 1000


def normals(*shape, seed=0):
    return torch.randn(*(shape or (2, 3, 5, 4)), generator=torch.Generator().manual_seed(seed))


X = normals()


def network(x, t):
    """No linear function of x, and different at every step."""
    return torch.tanh(1.3 * x + 0.2) * (0.5 + float(t) / 2000)


class Network:
    """The same as a network of diffusers is called."""

    def __init__(self, net=network):
        self.net = net

    def __call__(self, x, timestep, return_dict):
        return (self.net(x, timestep[0]),)


def loop(scheduler, x=X, net=network, timesteps=None, **options):
    """What a pipeline does: the states after each call, [calls, B, ...]."""
    states = []
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)  # flow matching has none
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(net(scaled(x, t), t), t, x, **options).prev_sample
        states.append(x)
    return torch.stack(states)


def made(steps=6, grid=None, **config):
    """A scheduler with its steps set."""
    scheduler = SolversScheduler(grid=grid, **config)
    scheduler.set_timesteps(steps, mu=1.15 if config.get("use_dynamic_shifting") else None)
    return scheduler


def stream(seed=3):
    return torch.Generator().manual_seed(seed)


def settings(scheduler):
    """The entries of a config that are arguments of our scheduler."""
    return {k: v for k, v in scheduler.config.items() if k in inspect.signature(SolversScheduler).parameters}


# --- the contract ----------------------------------------------------------------------------------------------------

CONFIGS = {
    "defaults": {},
    "betas": {"beta_start": 0.001, "beta_end": 0.05},
    "scaled_linear": BETAS,
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "laplace": {"beta_schedule": "laplace"},
    "exp": {"beta_schedule": "exp"},
    "trained_betas": {"trained_betas": torch.linspace(0.001, 0.3, 50).tolist()},
    "100 levels": {"num_train_timesteps": 100, "beta_end": 0.1},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    # on the default grid, in the angle, a shift makes no difference
    "flow": FLOW | {"grid": "uniform"},
    "flow of another shift": FLOW | {"grid": "uniform", "shift": 5.0},
    "data on the flow's path": {"prediction_type": "sample", "use_flow_sigmas": True},
    "dynamic": FLOW | {"grid": "uniform", "use_dynamic_shifting": True},
    "dynamic, linear": FLOW | {"grid": "uniform", "use_dynamic_shifting": True, "time_shift_type": "linear"},
    "SNR of another scale": {"snr_shift_scale": 3.0},
    "zero SNR": ZERO_SNR,
    "clipped": {"clip_sample": True, "clip_sample_range": 0.7},
    "thresholded": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.3},
    "method": {"method": "dpm_solver_pp_2m"},
    "stages": {"method": "heun"},
    "options": {"method": "ddim", "options": {"eta": 0.4}, "seed": 5},
    "another seed": {"method": "ddim", "options": {"eta": 0.4}, "seed": 6},
    "grid": {"grid": "trailing"},
    "karras": {"grid": "karras"},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_takes_the_same_steps(name, tmp_path):
    before = made(**CONFIGS[name])
    before.save_pretrained(tmp_path)
    after = SolversScheduler.from_pretrained(tmp_path)
    for scheduler in (before, after):
        assert not scheduler.config.get(
            "_use_default_values"
        )  # which other classes would replace by their own
    assert settings(after) == settings(before)
    after.set_timesteps(6, mu=1.15 if "dynamic" in name else None)
    assert torch.equal(after.timesteps, before.timesteps)
    assert after.plan == before.plan
    assert torch.equal(loop(after), loop(before))


def test_every_setting_makes_a_difference():
    """A setting that is read from the file and then ignored would pass the round trip above (failures.md A3)."""
    last = {name: loop(made(**config))[-1] for name, config in CONFIGS.items()}
    names = list(last)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert not torch.allclose(last[one], last[other], rtol=1e-4, atol=1e-4), (one, other)


@PEERS_WARN
@pytest.mark.parametrize("name", ["stages", "options", "zero SNR"])
def test_through_every_compatible_scheduler_and_back(name):
    """An entry that another class does not know travels along in its config."""
    ours = SolversScheduler(**CONFIGS[name])
    assert DPMSolverMultistepScheduler in ours.compatibles
    assert len(ours.compatibles) > 10
    steps = loop(made(**CONFIGS[name]))
    for other in ours.compatibles:
        if other is EDMEulerScheduler:
            continue
        back = SolversScheduler.from_config(other.from_config(ours.config).config)
        assert settings(back) == settings(ours), other
        back.set_timesteps(6)
        assert torch.equal(loop(back), steps), other


def test_the_loading_can_be_overridden(tmp_path):
    made(method="heun", **BETAS).save_config(tmp_path)
    loaded = SolversScheduler.from_pretrained(tmp_path, method="ddim", grid="trailing")
    assert (loaded.config.method, loaded.config.grid, loaded.config.beta_end) == ("ddim", "trailing", 0.012)
    scheduler, unused = SolversScheduler.from_config(
        loaded.config, return_unused_kwargs=True, colour="red", seed=4
    )
    assert (unused["colour"], scheduler.config.seed) == ("red", 4)


def test_no_scheduler_is_compatible_whose_config_is_refused():
    assert EDMEulerScheduler not in SolversScheduler().compatibles


@pytest.mark.parametrize("method", ["ddim", "dpm_solver_pp_2m", "heun", "ddpm", "recommended"])
@pytest.mark.parametrize("shape", [(3,), (1, 7), (2, 3, 5), (2, 3, 5, 4), (2, 3, 2, 5, 4)])
def test_a_step_keeps_the_shape(method, shape):
    x = normals(*shape)
    states = loop(made(4, method=method, seed=0), x)
    assert states.shape[1:] == x.shape
    assert states.isfinite().all()


@pytest.mark.parametrize("method", ["ddim", "unipc_2", "heun"])
def test_a_transposed_sample_is_a_sample(method):
    x = X.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    assert not x.is_contiguous()
    assert torch.equal(loop(made(method=method), x), loop(made(method=method)))


def test_a_tuple_holds_what_the_dataclass_holds():
    for method in ("ddim", "heun", "unipc_2"):
        one, other = made(method=method), made(method=method)
        for t in one.timesteps.tolist()[:2]:
            output = network(X, t)
            (first,) = one.step(output, one.timesteps[one.step_index or 0], X, return_dict=False)
            second = other.step(output, other.timesteps[other.step_index or 0], X)
            assert torch.equal(first, second.prev_sample)
            assert torch.equal(second["prev_sample"], second[0])


def test_what_pipelines_look_at():
    scheduler = SolversScheduler(method="dpm_solver_pp_2m")
    assert (len(scheduler), scheduler.init_noise_sigma, scheduler.order) == (1000, 1.0, 1)
    assert torch.equal(scheduler.timesteps, torch.arange(999, -1, -1))
    assert (scheduler.num_inference_steps, scheduler.step_index, scheduler.begin_index) == (None, None, None)
    assert scheduler.scale_model_input(X, 3) is X
    scheduler.set_timesteps(6)
    assert (scheduler.num_inference_steps, len(scheduler.timesteps), scheduler.step_index) == (6, 6, None)
    scheduler.set_begin_index(0)
    assert scheduler.begin_index == 0
    for i, t in enumerate(scheduler.timesteps):
        scheduler.step(network(X, t), t, X)
        assert scheduler.step_index == i + 1
    scheduler.set_timesteps(4)
    assert (scheduler.num_inference_steps, scheduler.step_index, scheduler.begin_index) == (4, None, None)


@pytest.mark.parametrize(
    ("method", "order"), [("ddim", 1), ("unipc_2", 1), ("heun", 2), ("dpm_solver_3", 3), ("etdrk4", 4)]
)
def test_order_is_the_number_of_calls_in_a_step(method, order):
    """By which pipelines multiply a number of steps to get an index of `timesteps`."""
    scheduler = made(method=method)
    assert scheduler.order == order
    assert (
        len(scheduler.timesteps) == scheduler.plan.nfe == 1 + 5 * order
    )  # a step to sigma = 0 makes one call


def test_timesteps_are_whole_where_all_are():
    assert made(method="ddim").timesteps.dtype == torch.int64
    for stages in (made(method="dpm_solver_2"), made(method="ddim", grid="karras"), made(**FLOW)):
        assert stages.timesteps.dtype == torch.float32
        assert stages.timesteps.min() >= 0
    assert made(method="ddim").timesteps[0] == 999
    assert made(**FLOW).timesteps[0] == 1000


# --- the schedules of diffusers' configs -----------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "scaled_linear",
        "squaredcos_cap_v2",
        "sigmoid",
        "laplace",
    ],
)
def test_levels_are_those_of_diffusers(name, zero_snr):
    """Theirs are float32 products of up to 1000 factors: relative 2e-6 of alpha^2. Zero SNR subtracts the last level's from a small number, which takes some digits."""
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=zero_snr)
    ours = schedule_of(theirs.config).alpha(LEVELS)
    assert_close(ours[:-1] ** 2, theirs.alphas_cumprod[:-1].double(), rtol=5e-5 if zero_snr else 2e-6, atol=0)
    assert_close(
        ours[-1] ** 2, theirs.alphas_cumprod[-1].double(), rtol=3e-5, atol=0
    )  # of beta = 0.999: 1 - beta
    assert (ours[-1] == 0) == zero_snr


@PEERS_WARN
def test_levels_exp_are_those_of_diffusers():
    theirs = HeunDiscreteScheduler(beta_schedule="exp")
    ours = schedule_of(theirs.config).alpha(LEVELS) ** 2
    assert_close(ours, theirs.alphas_cumprod.double(), rtol=5e-5, atol=0)  # a thousand equal errors


@pytest.mark.parametrize("levels", [2, 10, 4000])
def test_levels_of_other_numbers_are_those_of_diffusers(levels):
    theirs = DDPMScheduler(num_train_timesteps=levels, beta_end=0.01)
    ours = schedule_of(theirs.config)
    t = torch.arange(1, levels + 1, dtype=torch.float64) / levels
    assert_close(ours.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=3e-6, atol=0)
    assert_close(ours.label(t), torch.arange(levels, dtype=torch.float64))


def test_trained_betas_are_those_of_diffusers():
    betas = torch.linspace(0.003, 0.2, 40).tolist()
    theirs = DDPMScheduler(trained_betas=betas)
    t = torch.arange(1, 41, dtype=torch.float64) / 40
    ours = schedule_of(theirs.config)
    assert_close(ours.alpha(t) ** 2, theirs.alphas_cumprod.double(), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("config", "mu"),
    [
        ({}, None),
        ({"shift": 3.0}, None),
        ({"use_dynamic_shifting": True}, 1.15),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.15),
    ],
)
def test_flow_sigmas_are_those_of_diffusers(config, mu):
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    theirs.set_timesteps(sigmas=SIGMAS, mu=mu)
    ours = SolversScheduler(prediction_type="flow_prediction", method="ddim", **config)
    ours.set_timesteps(sigmas=SIGMAS, mu=mu)
    assert_close(ours.plan.sigma, theirs.sigmas.double(), rtol=3e-7, atol=0)
    assert_close(ours.timesteps, theirs.timesteps, rtol=3e-7, atol=0)


@PEERS_WARN
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_flow_shift_is_that_of_diffusers(name):
    theirs = getattr(diffusers, name)(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    theirs.set_timesteps(8)
    schedule = SolversScheduler.from_config(theirs.config, method="ddim")
    schedule.set_timesteps(sigmas=unshifted(theirs.sigmas[:-1], 3.0))
    assert_close(schedule.plan.sigma, theirs.sigmas.double(), rtol=3e-7, atol=0)
    assert type(schedule_of(theirs.config)) is sv.Flow
    assert schedule_of(theirs.config).shift == 3.0


def unshifted(sigmas, shift):
    """t of sigma = shift t / (1 + (shift - 1) t)."""
    return sigmas.double() / (shift + (1 - shift) * sigmas.double())


# --- whole runs equal theirs -----------------------------------------------------------------------------------------


def gap(ours, theirs):
    """The largest difference, as a share of the largest state: both are float32, rounded in each of some ten operations a step."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


ROUNDING = 3e-6  # measured 1e-7 to 1.4e-6 over six to ten steps; an error of 1e-4 in the weights is seen at 6e-5 and more


def agree(theirs, ours, calls=None, theirs_scale=None, net=network, **options):
    """Both loops agree after each call, and would not if our network were off by 1e-4; nor does sv.run differ from our loop."""
    start = X if theirs_scale is None else X / theirs_scale[0]
    reference = loop(theirs, start, net, **options)[:calls]
    if theirs_scale is not None:
        reference = reference * theirs_scale[1:].reshape(-1, *[1] * X.ndim)
    mine = loop(ours, net=net)
    assert len(mine) == len(reference) or calls
    assert gap(mine[:calls], reference) < ROUNDING
    planted = loop(again(ours), net=lambda x, t: net(x, t) * 1.0001)
    assert gap(planted[:calls], reference) > 3 * ROUNDING
    model, _ = from_diffusers(Network(net), theirs.config)
    assert torch.equal(sv.run(ours.plan, model, X), mine[-1])


def again(scheduler):
    """The same scheduler at the start of the same run."""
    fresh = SolversScheduler.from_config(scheduler.config)
    flow = type(schedule_of(scheduler.config)) is sv.Flow
    if flow:
        fresh.set_timesteps(sigmas=unshifted(scheduler.plan.sigma[:-1], schedule_of(scheduler.config).shift))
    else:
        steps = scheduler.timesteps.tolist()
        fresh.set_timesteps(timesteps=sorted(set(steps), reverse=True))
    assert torch.equal(fresh.timesteps, scheduler.timesteps)
    return fresh


def ours_like(theirs, method, steps, **options):
    scheduler = SolversScheduler.from_config(theirs.config, method=method, options=options)
    scheduler.set_timesteps(timesteps=steps)
    return scheduler


def trailing(name, steps=10, **config):
    """A scheduler of diffusers on the one spacing that all of them have right."""
    theirs = getattr(diffusers, name)(**BETAS, timestep_spacing="trailing", **config)
    theirs.set_timesteps(steps)
    return theirs


PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_is_theirs(prediction):
    theirs = trailing("DDIMScheduler", clip_sample=False, prediction_type=prediction)
    ours = ours_like(theirs, "ddim", theirs.timesteps)
    agree(theirs, ours)
    named = SolversScheduler.from_config(theirs.config, method="ddim", grid="trailing")
    named.set_timesteps(10)
    assert named.plan == ours.plan


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipped_ddim_is_theirs_with_the_clipped_output_used(prediction):
    theirs = trailing(
        "DDIMScheduler", clip_sample=True, clip_sample_range=0.8, prediction_type=prediction, steps=10
    )
    agree(theirs, ours_like(theirs, "ddim", theirs.timesteps), use_clipped_model_output=True)


def test_ddim_of_zero_terminal_snr_is_theirs():
    theirs = trailing(
        "DDIMScheduler", clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )
    ours = ours_like(theirs, "ddim", theirs.timesteps)
    assert ours.plan.alpha[0] == 0
    agree(theirs, ours)


def dpm(order, **config):
    theirs = DPMSolverMultistepScheduler(**BETAS, solver_order=order, lower_order_final=False, **config)
    theirs.set_timesteps(timesteps=STEPS)
    return theirs


@PEERS_WARN
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("order", "method"), [(1, "ddim"), (2, "dpm_solver_pp_2m")])
def test_dpm_solver_pp_is_theirs(order, method, prediction):
    agree(
        theirs := dpm(order, prediction_type=prediction),
        ours_like(theirs, method, STEPS),
    )


@PEERS_WARN
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dynamic_thresholding_is_theirs(prediction):
    bounds = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}
    theirs = dpm(2, prediction_type=prediction, **bounds)
    ours = ours_like(theirs, "dpm_solver_pp_2m", STEPS)

    def loud(x, t):
        return 3 * network(x, t)

    agree(theirs, ours, net=loud)
    free = ours_like(dpm(2, prediction_type=prediction), "dpm_solver_pp_2m", STEPS)
    assert gap(loop(free, net=loud), loop(again(ours), net=loud)) > 1e-2  # the bounds bind


def test_thresholding_goes_before_clipping_as_theirs():
    bounds = {
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1.5,
        "clip_sample": True,
    }
    theirs = trailing("DDIMScheduler", prediction_type="sample", **bounds)

    def loud(x, t):
        return 3 * network(x, t)

    agree(theirs, ours_like(theirs, "ddim", theirs.timesteps), net=loud, use_clipped_model_output=True)


@PEERS_WARN
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_third_order_multistep_is_not_theirs(prediction):
    """Their second difference is half of what it ought to be (test_published.py), from the third call on."""
    theirs = dpm(3, prediction_type=prediction)
    mine = loop(ours_like(theirs, "dpm_solver_pp_3m_ramp", STEPS))
    reference = loop(theirs)
    assert gap(mine[:2], reference[:2]) < ROUNDING
    assert gap(mine[2:], reference[2:]) > 1e-3


@PEERS_WARN
@pytest.mark.parametrize(("order", "method"), [(1, "unipc_1"), (2, "unipc_2"), (3, "unipc_3_ramp")])
def test_unipc_is_theirs(order, method):
    theirs = UniPCMultistepScheduler(**BETAS, solver_order=order)
    theirs.set_timesteps(10)
    agree(theirs, ours_like(theirs, method, theirs.timesteps, final="lower"))


@PEERS_WARN
def test_heun_is_theirs():
    """Their state is x / alpha, between stages too."""
    theirs = HeunDiscreteScheduler(**BETAS)
    theirs.set_timesteps(timesteps=STEPS)
    ours = ours_like(theirs, "heun", STEPS)
    assert torch.equal(ours.timesteps.float(), theirs.timesteps)
    assert ours.order == theirs.order
    agree(theirs, ours, theirs_scale=ours.plan.alpha.float())


@PEERS_WARN
@pytest.mark.parametrize(("order", "method"), [(1, "ddim"), (3, "deis_logrho_3")])
def test_deis_is_theirs_but_for_its_last_step(order, method):
    """Theirs ends at the lowest level, sigma > 0; ours goes on to clean data."""
    theirs = DEISMultistepScheduler(**BETAS, solver_order=order)
    theirs.set_timesteps(10)
    options = {"start": "ramp", "final": "lower"} if order > 1 else {}
    agree(theirs, ours_like(theirs, method, theirs.timesteps, **options), calls=9)


def flow(method, **config):
    scheduler = SolversScheduler(method=method, **(FLOW | config))
    scheduler.set_timesteps(sigmas=SIGMAS)
    return scheduler


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_on_the_flow_is_ddim(shift):
    """On the straight path x_0 and eps are held over a step together or not at all, so that all first-order methods are one."""
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=SIGMAS)
    agree(theirs, flow("ddim", shift=shift))
    theirs.set_timesteps(sigmas=SIGMAS)
    assert (
        gap(loop(flow("adams_velocity_1", shift=shift)), loop(theirs)) > 1e-2
    )  # of the circle, not the line


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_euler_on_a_flow_of_dynamic_shift_is_ddim(kind):
    config = {"use_dynamic_shifting": True, "time_shift_type": kind}
    theirs = FlowMatchEulerDiscreteScheduler(**config)
    ours = SolversScheduler(prediction_type="flow_prediction", method="ddim", **config)
    for mu in (0.5, 1.15):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(sigmas=SIGMAS, mu=mu)
        assert gap(loop(ours), loop(theirs)) < ROUNDING


@PEERS_WARN
@pytest.mark.parametrize(
    ("name", "method"),
    [("DPMSolverMultistepScheduler", "dpm_solver_pp_2m"), ("UniPCMultistepScheduler", "unipc_2")],
)
def test_multistep_on_the_flow_is_theirs_but_for_what_the_network_is_told(name, method):
    """They cut 1000 sigma to a whole number before they tell the network."""
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    theirs = getattr(diffusers, name)(lower_order_final=method == "unipc_2", **config)
    theirs.set_timesteps(8)
    options = {"final": "lower"} if method == "unipc_2" else {}
    ours = SolversScheduler.from_config(theirs.config, method=method, options=options)
    ours.set_timesteps(sigmas=unshifted(theirs.sigmas[:-1], 3.0))

    def timeless(x, t):
        return network(x, 700.0)

    assert (
        gap(loop(ours, net=timeless), loop(theirs, net=timeless)) < 10 * ROUNDING
    )  # theirs: logs in float32
    assert (ours.timesteps - 1000 * ours.plan.sigma[:-1].float()).abs().max() < 1e-3
    assert (theirs.timesteps - 1000 * theirs.sigmas[:-1]).abs().max() > 0.5


def test_heun_on_the_flow_nears_what_ours_does():
    """Runge-Kutta in sigma itself is no table of ours, whose `heun` is in sigma / alpha: another step to the same end."""
    x, steps = X.double(), torch.linspace(1, 0, 201).tolist()
    for s, t in zip(steps, steps[1:], strict=False):  # the classical one, in float64
        h = t - s
        k1 = network(x, 1000 * s)
        k2 = network(x + h / 2 * k1, 500 * (s + t))
        k3 = network(x + h / 2 * k2, 500 * (s + t))
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + network(x + h * k3, 1000 * t))
    errors = []
    for n in (20, 60):
        theirs = FlowMatchHeunDiscreteScheduler()
        theirs.set_timesteps(n)
        mine = made(2 * n, prediction_type="flow_prediction")
        errors.append([gap(loop(scheduler)[-1].double(), x) for scheduler in (theirs, mine)])
    assert max(errors[1]) < 1e-4
    assert all(after < before / 2 for before, after in zip(*errors, strict=True)), errors


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variance", "method"), [("fixed_small", "ddpm"), ("fixed_large", "ddpm_large")])
def test_ddpm_is_theirs_on_the_same_noise(variance, method):
    theirs = DDPMScheduler(**BETAS, clip_sample=False, variance_type=variance)
    theirs.set_timesteps(timesteps=[999, 700, 400, 150, 30, 0])
    ours = ours_like(theirs, method, theirs.timesteps)
    assert gap(loop(ours, generator=stream()), loop(theirs, generator=stream())) < ROUNDING
    other = loop(ours_like(theirs, method, theirs.timesteps), generator=stream(4))
    assert gap(other, loop(theirs, generator=stream())) > 0.1


def test_ddpm_is_theirs_on_the_training_grid():
    """A thousand steps on levels that they know to 2e-6."""
    theirs = DDPMScheduler(**BETAS, clip_sample=False)
    theirs.set_timesteps(1000)
    ours = SolversScheduler.from_config(theirs.config, method="ddpm", grid="trailing")
    ours.set_timesteps(1000)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    mine, reference = (loop(s, normals(1, 1, 3, 3), generator=stream()) for s in (ours, theirs))
    assert gap(mine, reference) < 1e-4


def test_ddpm_of_a_learned_variance_is_theirs():
    theirs = DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range")
    theirs.set_timesteps(timesteps=[999, 700, 400, 150, 30, 0])
    ours = ours_like(theirs, "ddpm", theirs.timesteps, variance="learned")

    def doubled(x, t):
        return torch.cat([network(x, t), torch.sin(3 * x)], 1)

    reference = loop(theirs, net=doubled, generator=stream())
    assert gap(loop(ours, net=doubled, generator=stream()), reference) < ROUNDING
    fixed = loop(ours_like(theirs, "ddpm", theirs.timesteps), net=doubled, generator=stream())
    assert gap(fixed, reference) > 1e-2


@PEERS_WARN
def test_stochastic_multistep_and_ancestral_euler_are_theirs_on_the_same_noise():
    for order in (1, 2):
        theirs = dpm(order, algorithm_type="sde-dpmsolver++")
        ours = ours_like(theirs, "dpm_solver_pp_sde_2m", STEPS, order=order, eta=1.0)
        assert gap(loop(ours, generator=stream()), loop(theirs, generator=stream())) < ROUNDING
    theirs = trailing("EulerAncestralDiscreteScheduler")
    ours = ours_like(theirs, "ddim", theirs.timesteps.long(), eta=1.0)
    alpha = ours.plan.alpha.float()
    reference = loop(theirs, X / alpha[0], generator=stream()) * alpha[1:].reshape(-1, 1, 1, 1, 1)
    assert gap(loop(ours, generator=stream()), reference) < ROUNDING


@pytest.mark.parametrize("method", SDE)
def test_a_seed_gives_each_sample_noise_of_its_own(method):
    whole = loop(made(method=method, seed=7))
    assert torch.equal(loop(made(method=method, seed=7)), whole)
    assert torch.equal(loop(made(method=method, seed=7), X[:1]), whole[:, :1])
    assert gap(loop(made(method=method, seed=8)), whole) > 1e-3
    alike = loop(made(method=method, seed=7), X[:1].expand(2, -1, -1, -1))
    assert gap(alike[:, 0], alike[:, 1]) > 1e-3


@pytest.mark.parametrize("method", SDE)
def test_a_generator_per_sample_gives_each_sample_noise_of_its_own(method):
    whole = loop(made(method=method), generator=[stream(1), stream(2)])
    assert torch.equal(loop(made(method=method), X[1:], generator=[stream(2)]), whole[:, 1:])
    assert torch.equal(loop(made(method=method), X[1:], generator=stream(2)), whole[:, 1:])


@pytest.mark.parametrize("method", SDE)
def test_a_generator_goes_before_the_seed_and_repeats(method):
    first = loop(made(method=method, seed=0), generator=stream())
    assert torch.equal(loop(made(method=method), generator=stream()), first)
    assert gap(loop(made(method=method, seed=0)), first) > 1e-3


@pytest.mark.parametrize("method", ["ddpm", "churn_heun", "ancestral_2s"])
def test_a_stochastic_step_is_that_of_run(method):
    scheduler = made(method=method, seed=7)
    mine = loop(scheduler)
    assert torch.equal(run(scheduler.plan, noise=7), mine[-1])


@pytest.mark.parametrize("method", SDE)
def test_without_noise_both_remedies_are_named(method):
    scheduler = made(method=method)
    with pytest.raises(ValueError, match=r"needs noise: pass the pipeline a generator.*seed=0"):
        loop(scheduler)


def test_eta_of_the_step_is_not_ignored():
    scheduler = made(method="ddim", seed=0)
    with pytest.raises(ValueError, match=r"eta = 0.5: the noise belongs to the method.*'eta': 0.5"):
        scheduler.step(X, scheduler.timesteps[0], X, eta=0.5)
    loop(scheduler, eta=0.0)


# --- a step touches nothing else -------------------------------------------------------------------------------------


def run(plan, x=X, noise=None, config=None, grad=False):
    """The same by sv.run, as from_diffusers has it."""
    model, _ = from_diffusers(Network(), SolversScheduler(**(config or {})).config)
    return sv.run(plan, model, x, noise, grad=grad)


@pytest.mark.parametrize("method", [*ONE_CALL, "heun", "ddpm", "churn_heun"])
def test_the_loop_is_run(method):
    """Bit by bit: the step is the executor on one row."""
    scheduler = made(method=method, seed=2)
    assert torch.equal(loop(scheduler)[-1], run(scheduler.plan, noise=2))


def test_the_default_is_sample():
    for config in ({}, {"prediction_type": "v_prediction"}, FLOW):
        scheduler = made(10, **config)
        model, schedule = from_diffusers(Network(), scheduler.config)
        assert torch.equal(loop(scheduler)[-1], sv.sample(model, X, schedule, 10))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*ONE_CALL, "heun", "ddpm"])
def test_a_step_leaves_its_arguments_and_gives_their_dtype(method, dtype):
    scheduler, x = made(method=method, seed=1), X.to(dtype)
    for t in scheduler.timesteps:
        output = network(x, t)
        copies = [v.clone() for v in (x, output, scheduler.timesteps)]
        following = scheduler.step(output, t, x).prev_sample
        assert following.dtype == dtype
        assert following.data_ptr() not in (x.data_ptr(), output.data_ptr())
        for value, before in zip((x, output, scheduler.timesteps), copies, strict=True):
            assert torch.equal(value, before)
        x = following


@pytest.mark.parametrize("method", ["unipc_2", "ddpm"])
def test_a_step_keeps_no_alias_of_its_arguments(method):
    """A network may write its next output into the memory of the last, and a pipeline overwrite its latents."""
    scheduler = made(method=method, seed=1)
    expected, x = loop(made(method=method, seed=1)), X.clone()
    for i, t in enumerate(scheduler.timesteps):
        output = network(x, t)
        following = scheduler.step(output, t, x).prev_sample
        output.fill_(torch.nan)
        x.fill_(torch.nan)
        assert torch.equal(following, expected[i])
        x = following.clone()
        following.fill_(torch.nan)


@pytest.mark.parametrize("method", [*ONE_CALL, "heun", "ddpm", "sa_solver"])
def test_no_global_random_numbers_are_drawn(method):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    scheduler = made(method=method, seed=1)
    loop(scheduler)
    scheduler.add_noise(X, X, scheduler.timesteps[:1])
    assert torch.equal(torch.rand(3), expected)


def half_loop(scheduler, dtype, touch=lambda x: x):
    """A pipeline whose latents and network are in half precision."""
    x = X.to(dtype)
    for t in scheduler.timesteps:
        x = touch(scheduler.step(network(x, t).to(dtype), t, x).prev_sample)
    return x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["ddim", "unipc_2", "recommended", "heun"])
def test_the_state_between_steps_is_float32(method, dtype):
    """Where the pipeline hands back the very tensor that it got. A copy, which may have been changed, is taken at its word."""
    config = {"method": method, "prediction_type": "v_prediction"}
    steps = 200
    scheduler = made(steps, **config)
    kept = half_loop(scheduler, dtype)
    expected = sv.run(scheduler.plan, from_diffusers(Network(), scheduler.config)[0], X.to(dtype))
    assert torch.equal(kept, expected.to(dtype))

    cloned = half_loop(made(steps, **config), dtype, touch=torch.clone)
    exact = loop(made(steps, **config))[-1]
    lost, left = (float((x.float() - exact).abs().max()) for x in (cloned, kept))
    assert lost > 2 * left


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_change_in_place_between_steps_is_seen(dtype):
    """As an inpainting pipeline may make it."""

    def added(x):
        return x.add_(0.5)

    in_place = half_loop(made(method="unipc_2"), dtype, touch=added)
    elsewhere = half_loop(made(method="unipc_2"), dtype, touch=lambda x: x.clone().add_(0.5))
    assert torch.equal(in_place, elsewhere)
    assert (in_place - half_loop(made(method="unipc_2"), dtype)).abs().max() > 0.1


@pytest.mark.parametrize("method", [*ONE_CALL, "heun", "ddpm"])
def test_gradients_flow_through_steps(method):
    """Those of sv.run with grad=True, and no graph where none is asked for."""
    x, scheduler = X.clone().requires_grad_(), made(method=method, seed=1)
    loop(scheduler, x)[-1].square().sum().backward()
    other = X.clone().requires_grad_()
    run(scheduler.plan, other, noise=1, grad=True).square().sum().backward()
    assert_close(x.grad, other.grad, rtol=1e-5, atol=1e-4)
    assert x.grad.abs().max() > 0.1
    assert loop(made(method=method, seed=1))[-1].grad_fn is None
    with torch.no_grad():
        assert loop(made(method=method, seed=1), x)[-1].grad_fn is None


def test_gradients_flow_to_the_network():
    weight = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def end(weight):
        return loop(made(method="unipc_2"), X.double(), net=lambda x, t: weight * network(x, t))[-1].sum()

    end(weight).backward()
    step = 1e-5
    slope = (end(weight.detach() + step) - end(weight.detach() - step)) / (2 * step)
    assert_close(weight.grad, slope, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_in_inference_mode(dtype):
    """As services run pipelines, whatever their own no_grad."""
    expected = half_loop(made(method="unipc_2"), dtype)
    with torch.inference_mode():
        assert torch.equal(half_loop(made(method="unipc_2"), dtype), expected)


READS = {
    torch.ops.aten.item.default,
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.masked_select.default,
}


class OnDevice(TorchDispatchMode):
    """Some tensors, and whatever is computed of them, are taken to lie on a device from which nothing is read."""

    def __init__(self):
        super().__init__()
        self.there = {}

    def put(self, *tensors):
        self.there |= {id(t): t for t in tensors}
        return tensors[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = func(*args, **(kwargs or {}))
        if any(self.there.get(id(t)) is t for t in inputs):
            if func in READS:
                raise RuntimeError(f"{func} waits for the device")
            self.put(*[t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)] or inputs)
        return outputs


def loop_on_device(scheduler, dtype=torch.float32, **options):
    with OnDevice() as device:
        x = device.put(X.to(dtype))
        timesteps = device.put(scheduler.timesteps)
        for t in timesteps:
            x = scheduler.step(device.put(torch.sin(x)), t, x, **options).prev_sample
    return x


CONFIGS_ON_DEVICE = [
    *({"method": method} for method in (*ONE_CALL, "heun", "ddpm", "churn_heun")),
    {"clip_sample": True},
    {"thresholding": True},
    ZERO_SNR,
    FLOW,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS_ON_DEVICE, ids=lambda config: "-".join(map(str, config.values())))
def test_a_step_reads_nothing_back(config, dtype, monkeypatch):
    """The check for NaN, which is made on a CPU alone, is the only read of torch's own operations, and the test can see one."""
    monkeypatch.setattr(sys.modules["solvers.loop"], "kernel_for", lambda *given: None)
    with pytest.raises(RuntimeError, match="_local_scalar_dense"):
        loop_on_device(made(seed=1, **config), dtype)
    monkeypatch.setattr(
        adapter, "execute", lambda *a, check, **k: sv.run.__globals__["execute"](*a, check=False, **k)
    )
    end = loop_on_device(made(seed=1, **config), dtype)
    assert end.isfinite().all()
    expected = made(seed=1, **config)
    assert torch.equal(end, half_loop_of_sine(expected, dtype))


def half_loop_of_sine(scheduler, dtype):
    x = X.to(dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.sin(x), t, x).prev_sample
    return x


# --- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (X[:1], r"shape \[1, 3, 5, 4\].*expected \[2, 3, 5, 4\]"),
        (X[:, :2], r"shape \[2, 2, 5, 4\].*expected \[2, 3, 5, 4\]"),
        (X[..., :1], r"shape \[2, 3, 5, 1\].*expected \[2, 3, 5, 4\]"),
        (X[0], r"shape \[3, 5, 4\].*expected \[2, 3, 5, 4\]"),
        (torch.cat([X, X], 1), r"shape \[2, 6, 5, 4\].*learned variance"),
        (X.long(), r"torch.int64.*floating-point"),
    ],
)
@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_an_output_of_another_kind_is_refused(method, output, message):
    """Shapes that would broadcast among them."""
    scheduler = made(method=method)
    with pytest.raises((ValueError, TypeError), match=message):
        scheduler.step(output, scheduler.timesteps[0], X)


@pytest.mark.parametrize("output", [None, (X,), {"sample": X}], ids=["None", "tuple", "dict"])
def test_an_output_that_is_no_tensor_is_refused(output):
    scheduler = made(method="ddim")
    with pytest.raises(TypeError, match="tensor"):
        scheduler.step(output, scheduler.timesteps[0], X)


@pytest.mark.parametrize("sample", [None, X.long()], ids=["None", "int64"])
def test_a_sample_of_another_kind_is_refused(sample):
    scheduler = made(method="ddim")
    with pytest.raises(TypeError, match="sample"):
        scheduler.step(X, scheduler.timesteps[0], sample)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("call", [0, 3])
def test_an_output_that_is_not_finite_is_named(value, call):

    def broken(x, t):
        output = network(x, t)
        output[1, 0, 0, 0] = value if t == scheduler.timesteps[call] else output[1, 0, 0, 0]
        return output

    scheduler = made(method="dpm_solver_pp_2m")
    with pytest.raises(sv.NonFiniteError, match=rf"call {call} of 6.*samples \[1\]") as caught:
        loop(scheduler, net=broken)
    assert (caught.value.call, caught.value.samples) == (call, [1])


def test_a_failed_step_can_be_taken_again():
    """A pipeline that catches the error goes on where it was."""
    scheduler = made(method="unipc_2")
    expected, x = loop(made(method="unipc_2")), X
    for i, t in enumerate(scheduler.timesteps):
        with pytest.raises(sv.NonFiniteError):
            scheduler.step(network(x, t) * torch.nan, t, x)
        x = scheduler.step(network(x, t), t, x).prev_sample
        assert torch.equal(x, expected[i])


@pytest.mark.parametrize("method", ["ddim", "heun"])
def test_a_timestep_out_of_turn_is_refused(method):
    scheduler = made(method=method)
    t = scheduler.timesteps
    first = scheduler.step(network(X, t[0]), t[0], X).prev_sample
    for wrong in (t[0], t[3], t[0].item(), t[3].clone(), 1, -5, 0.5, 10**6):
        with pytest.raises(ValueError, match=rf"out of turn: expected {t[1]}, the one of call 1"):
            scheduler.step(first, wrong, first)
    for right in (t[1].item(), float(t[1]), t[1].clone(), t[1:2], t[1]):
        again = copy.copy(scheduler)
        again._threads = threading.local()
        again.set_timesteps(6)
        again.step(network(X, t[0]), again.timesteps[0], X)
        again.step(first, right, first)
    assert scheduler.step_index == 1


@pytest.mark.parametrize("wrong", [None, "999", torch.arange(6)], ids=["None", "text", "all of them"])
def test_a_timestep_that_is_no_number_is_refused(wrong):
    scheduler = made(method="ddim")
    with pytest.raises((ValueError, TypeError), match="timestep = "):
        scheduler.step(X, wrong, X)


def test_a_first_timestep_that_is_not_there_is_refused():
    scheduler = made(method="heun")
    with pytest.raises(ValueError, match=r"timestep = 77 is not among.*set_begin_index"):
        scheduler.step(X, 77, X)
    twice = scheduler.timesteps[1].item()
    with pytest.raises(ValueError, match=rf"timestep = {twice} is more than once in.*set_begin_index"):
        scheduler.step(X, twice, X)
    assert scheduler.step_index is None


def test_a_step_past_the_end_is_refused():
    scheduler = made(method="ddim")
    last = loop(scheduler)[-1]
    for t in (scheduler.timesteps[-1], 0):
        with pytest.raises(ValueError, match=r"the run is over after 6 calls: call scheduler.set_timesteps"):
            scheduler.step(last, t, last)


def test_a_step_before_set_timesteps_is_refused():
    scheduler = SolversScheduler()
    for use in (
        lambda: scheduler.step(X, 999, X),
        lambda: scheduler.set_begin_index(1),
        lambda: scheduler.plan,
    ):
        with pytest.raises(ValueError, match=r"call scheduler.set_timesteps\(num_inference_steps\) first"):
            use()


@pytest.mark.parametrize("method", [*ONE_CALL, "heun", "ddpm"])
def test_a_second_run_is_the_first(method):
    """Nothing is left over from the last run, ended or broken off, of another length or batch (failures.md H2, H3)."""
    scheduler = made(method=method, seed=1)
    first = loop(scheduler)
    scheduler.set_timesteps(6)
    assert torch.equal(loop(scheduler), first)
    scheduler.set_timesteps(9)
    loop(scheduler, normals(1, 2, 3), timesteps=scheduler.timesteps[:4])
    scheduler.set_timesteps(6)
    assert torch.equal(loop(scheduler), first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes num_inference_steps, timesteps or sigmas"),
        ({"timesteps": [5], "sigmas": [1.0]}, "one of the last two at most"),
        ({"num_inference_steps": 2, "timesteps": [5]}, "num_inference_steps = 2, but 1 times are given"),
        ({"num_inference_steps": 0}, "num_inference_steps = 0: expected a whole number from 1"),
        ({"num_inference_steps": -3}, "num_inference_steps = -3: expected a whole number from 1"),
        ({"num_inference_steps": True}, "num_inference_steps = True: expected a whole number"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5: expected a whole number"),
        ({"num_inference_steps": "20"}, "num_inference_steps = '20': expected a whole number"),
        ({"num_inference_steps": 10**7}, "num_inference_steps = 10000000: expected a whole number"),
        ({"num_inference_steps": 1001}, "steps = 1001: expected at most 1000"),
        ({"timesteps": [999, 500, 500, 0]}, r"must strictly decrease: times\[1\] = 0.501"),
        ({"timesteps": [0, 500]}, r"must strictly decrease: times\[0\] = 0.001"),
        ({"timesteps": []}, "at least one step"),
        ({"timesteps": [1000]}, r"t = 1.001 is outside the schedule's range"),
        ({"timesteps": [500, -2]}, r"must strictly decrease: times\[1\] = -0.001"),
        ({"timesteps": [500, float("nan")]}, r"times\[1\] = nan"),
        ({"timesteps": ["a"]}, r"timesteps = \['a'\]"),
        ({"sigmas": [1.0, 2.0]}, "must strictly decrease"),
        ({"sigmas": []}, "at least one step"),
        ({"sigmas": [-1.0]}, "sigmas from -1 to -1: expected sigma / alpha within the network's levels"),
        ({"sigmas": [1e9]}, r"sigmas from 1e\+09"),
        ({"sigmas": [5.0, float("nan")]}, "nan"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_set_timesteps_refuses(arguments, message):
    scheduler = made(method="ddim")
    plan = scheduler.plan
    with pytest.raises((ValueError, TypeError), match=message):
        scheduler.set_timesteps(**arguments)
    assert scheduler.plan is plan  # what was set before still is


def test_set_timesteps_refuses_what_a_schedule_has_no_meaning_for():
    with pytest.raises(ValueError, match="give sigmas, before the shift"):
        SolversScheduler(**FLOW).set_timesteps(timesteps=[999, 500])
    with pytest.raises(ValueError, match="outside the schedule's range"):
        SolversScheduler(**FLOW).set_timesteps(sigmas=[1.1, 0.5])
    with pytest.raises(ValueError, match="a noise prediction does not determine data"):
        loop(made(method="ddim", rescale_betas_zero_snr=True))


def test_set_timesteps_takes_lists_arrays_and_tensors():
    expected = None
    for steps in (STEPS, tuple(STEPS), torch.tensor(STEPS), torch.tensor(STEPS).numpy(), map_to_float(STEPS)):
        scheduler = SolversScheduler(method="unipc_2")
        scheduler.set_timesteps(timesteps=steps)
        assert scheduler.timesteps.tolist() == STEPS
        expected = expected or scheduler.plan
        assert scheduler.plan == expected
    scheduler.set_timesteps(len(STEPS), timesteps=STEPS)
    assert scheduler.plan == expected


def map_to_float(values):
    return [float(value) for value in values]


def test_sigmas_of_a_discrete_schedule_are_ratios():
    scheduler = SolversScheduler(method="ddim", **BETAS)
    scheduler.set_timesteps(sigmas=[10.0, 3.0, 0.5])
    assert_close(scheduler.plan.sigma / scheduler.plan.alpha, torch.tensor([10.0, 3.0, 0.5, 0.0]).double())
    ended = SolversScheduler(method="ddim", **BETAS)
    ended.set_timesteps(sigmas=[10.0, 3.0, 0.5, 0.0])
    assert ended.plan == scheduler.plan


SWEEP = [
    ("ddim", "leading", {}),
    ("dpm_solver_pp_2m", "trailing", BETAS),
    ("dpm_solver_pp_3m_ramp", "karras", BETAS),
    ("unipc_2", "linspace", {"beta_schedule": "squaredcos_cap_v2"}),
    ("unipc_3_ramp", "logsnr", {}),
    ("deis_t_3_ramp", "quadratic", {}),
    ("recommended", None, {}),
    ("recommended", None, FLOW),
    ("recommended", None, ZERO_SNR),
    ("recommended", "uniform", {"prediction_type": "sample"}),
    ("heun", "karras", BETAS),
    ("dpm_solver_3", "angle", {}),
    ("dpm_solver_pp_3s", "power", FLOW),
    ("ddpm", "angle_levels", {}),
    ("sa_solver", "trailing", {}),
]


@pytest.mark.parametrize(
    ("method", "grid", "config"), SWEEP, ids=lambda v: str(v) if isinstance(v, str) else ""
)
@pytest.mark.parametrize(
    "numbers",
    [(*range(1, 12), 19, 39, 40, 60), pytest.param(range(1, 61), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_any_number_of_steps(method, grid, config, numbers):
    """diffusers' own fail at some (failures.md A, B, C)."""
    scheduler = SolversScheduler(method=method, grid=grid, seed=0, **config)
    x = normals(1, 5)
    calls = getattr({**METHODS, **SDES}.get(method), "calls_per_step", 1)
    for n in numbers:
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == scheduler.plan.nfe
        assert scheduler.num_inference_steps == n
        assert n <= len(scheduler.timesteps) <= calls * n
        end = loop(scheduler, x)[-1]
        assert end.isfinite().all()
        assert scheduler.plan.sigma[-1] == 0


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_starts_at_pure_noise_and_ends_at_clean_data(grid):
    for steps in (1, 2, 7):
        scheduler = made(steps, method="ddim", grid=grid)
        assert scheduler.timesteps[0] == 999
        assert len(scheduler.timesteps) == steps
        assert scheduler.plan.sigma[-1] == 0
        assert (scheduler.timesteps >= 0).all()


def test_every_method_runs_or_says_why_not():
    refused = {}
    for method in BUILDS:
        for config in ({}, FLOW):
            scheduler = SolversScheduler(method=method, seed=0, **config)
            try:
                scheduler.set_timesteps(10)
            except ValueError as error:
                refused[method, config.get("prediction_type")] = str(error)
                continue
            assert loop(scheduler, normals(2, 3))[-1].isfinite().all(), method
    on_levels = {method for method, kind in refused if kind is None}
    assert on_levels <= {"dpm_solver_v3_1", "dpm_solver_v3_2", "ancestral_heun", "ancestral_3s"}
    assert {"heun", "pndm"} <= {method for method, kind in refused if kind}  # which divide by alpha
    assert len(refused) < 40
    for message in refused.values():
        assert any(
            word in message for word in ("alpha = 0", "infinite half log-SNR", "below the first level")
        ), message


# --- starting in the middle ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*ONE_CALL, "heun", "dpm_solver_pp_3s", "ddpm"])
@pytest.mark.parametrize("how", ["index", "view", "number", "copy"])
def test_image_to_image_starts_at_any_step(method, how):
    """The plan is that of the method on the rest of the grid."""
    if how in ("number", "copy") and method == "dpm_solver_pp_3s":
        pytest.skip("its stages are no whole steps, and floats are rounded to float32")
    whole = made(8, method=method, seed=0)
    calls = whole.order
    for step in range(8):
        scheduler = made(8, method=method, seed=0)
        rest = scheduler.timesteps[step * calls :]
        if how == "index":
            scheduler.set_begin_index(step * calls)
        elif how == "number":
            rest = rest.tolist()
        elif how == "copy":
            rest = rest.clone()
        if how in ("number", "copy") and calls > 1 and step:  # a step's start is the stage's end before it
            with pytest.raises(ValueError, match="more than once in"):
                loop(scheduler, timesteps=rest)
            continue
        states = loop(scheduler, timesteps=rest)
        starts = torch.cat(
            [whole.plan.times[whole.plan.is_called.nonzero().flatten()], whole.plan.times[-1:]]
        )
        assert len(states) == len(whole.timesteps) - step * calls
        build = scheduler._build
        plan = build(schedule_of(scheduler.config), outer(whole, starts, calls)[step:])
        assert scheduler.plan == plan
        assert torch.equal(states[-1], run(plan, noise=0))


def outer(scheduler, starts, calls):
    """The times of the steps among those of the calls."""
    return torch.cat([starts[:-1][::calls], starts[-1:]])


def test_the_middle_of_a_step_is_no_place_to_start():
    for method in ("heun", "dpm_solver_pp_3s"):
        scheduler = made(6, method=method)
        scheduler.set_begin_index(scheduler.order + 1)
        with pytest.raises(
            ValueError, match=rf"cannot start at call {scheduler.order + 1}: it is in the middle"
        ):
            scheduler.step(X, scheduler.timesteps[scheduler.order + 1], X)


def test_a_method_that_begins_with_other_calls_is_no_method_to_start_late():
    """Of an Adams method with a singlestep start the rest of the grid is called elsewhere."""
    scheduler = made(10, method="unipc_3")
    with pytest.raises(ValueError, match="more calls in some steps than in others"):
        scheduler.set_begin_index(6)
    with pytest.raises(ValueError, match="cannot start at call 6: begun there, it has other calls"):
        scheduler.step(X, scheduler.timesteps[6], X)


@pytest.mark.parametrize("index", [-1, 7, True, 1.0])
def test_a_begin_index_that_is_not_there_is_refused(index):
    with pytest.raises(
        (ValueError, TypeError), match=r"begin_index = .*: expected a whole number from 0 to 5"
    ):
        made(6, method="ddim").set_begin_index(index)


def test_nothing_is_left_at_strength_zero():
    with pytest.raises(ValueError, match=r"begin_index = 6: nothing is left of 6 calls.*raise strength"):
        made(6, method="ddim").set_begin_index(6)


@pytest.mark.parametrize("config", [{}, BETAS, ZERO_SNR, FLOW, {"beta_schedule": "exp"}])
def test_noise_is_added_to_the_level_that_the_network_is_told(config):
    scheduler = made(7, **config)
    noise = normals(seed=1)
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = scheduler.plan.alpha[i], scheduler.plan.sigma[i]
        for timesteps in (t, t[None], t.repeat(2)):
            noisy = scheduler.add_noise(X.double(), noise.double(), timesteps)
            # float32 timesteps of a flow are rounded once
            expected = alpha * X.double() + sigma * noise.double()
            assert_close(noisy, expected, rtol=1e-6, atol=1e-6 if config == FLOW else 1e-12)
    assert torch.equal(scheduler.scale_noise(X, t[None], noise), scheduler.add_noise(X, noise, t[None]))


def test_noise_is_added_sample_by_sample():
    scheduler = made(7)
    noise = normals(seed=1)
    noisy = scheduler.add_noise(X, noise, torch.tensor([999, 20]))
    for i, t in enumerate((999, 20)):
        alone = scheduler.add_noise(X[i : i + 1], noise[i : i + 1], torch.tensor([t]))
        assert torch.equal(noisy[i : i + 1], alone)
    with pytest.raises(ValueError, match=r"t has shape \[3\].*2 samples"):
        scheduler.add_noise(X, noise, torch.tensor([999, 20, 5]))
    with pytest.raises(ValueError, match="noise has shape"):
        scheduler.add_noise(X, noise[:1], torch.tensor([999]))


@pytest.mark.parametrize("config", [BETAS, ZERO_SNR, {"beta_schedule": "squaredcos_cap_v2"}])
def test_added_noise_is_theirs(config):
    theirs, ours = DDPMScheduler(**config), SolversScheduler(**config)
    noise, steps = normals(seed=1), torch.tensor([999, 3])
    for timesteps in (steps, torch.tensor([0]), torch.tensor([500])):
        mine, reference = (s.add_noise(X, noise, timesteps) for s in (ours, theirs))
        assert mine.dtype == torch.float32
        assert_close(mine, reference, rtol=1e-6, atol=2e-5)  # sqrt(1 - alpha^2) of 1 - 1e-4 in float32
    assert (
        ours.add_noise(X, noise, steps) - theirs.add_noise(X, noise, steps - 3 * (steps > 500))
    ).abs().max() > 1e-4


def test_scaled_noise_is_theirs_on_the_flow():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=SIGMAS)
    ours = flow("ddim")
    for i in range(5):
        mine, reference = (s.scale_noise(X, s.timesteps[i : i + 1], normals(seed=1)) for s in (ours, theirs))
        assert_close(mine, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_noise_of_low_levels(dtype):
    """Theirs casts alpha^2 first, which is 1 in bfloat16 at the lowest levels: no noise at all (failures.md D1)."""
    noise, ours = normals(seed=1).to(dtype), SolversScheduler(**BETAS)
    x = torch.zeros_like(noise)
    for t in range(4):
        sigma = ours_sigma(ours, t)
        noisy = ours.add_noise(x, noise, torch.tensor([t]))
        assert noisy.dtype == dtype
        assert_close(noisy.double(), sigma * noise.double(), rtol=4e-3, atol=0)
    if dtype == torch.bfloat16:
        assert (DDPMScheduler(**BETAS).add_noise(x, noise, torch.tensor([0])) == 0).all()


def ours_sigma(scheduler, step):
    return float(schedule_of(scheduler.config).sigma(torch.tensor((step + 1) / 1000, dtype=torch.float64)))


def test_image_to_image_of_gaussian_data_has_the_marginal_exactly():
    """From x_0 ~ N(0, s^2), noised to any step, the exact network leads back to N(0, s^2): the level is the same in both."""
    spread = 0.5
    scheduler = SolversScheduler(method="recommended", **BETAS)
    schedule = schedule_of(scheduler.config)
    for begin in (0, 20, 45):
        scheduler.set_timesteps(60)
        rest = scheduler.timesteps[begin:]
        t = (rest[:1].double() + 1) / 1000
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = alpha**2 * spread**2 + sigma**2
        x = variance.sqrt() * normals(3, 5).double()
        noisy = scheduler.add_noise(spread * torch.ones(1, 1).double(), torch.ones(1, 1).double(), rest[:1])
        assert_close(noisy, (alpha * spread + sigma)[None])

        def exact(x, label):
            level = (torch.as_tensor(label).double() + 1) / 1000
            a, s = schedule.alpha(level), schedule.sigma(level)
            return s * x / (a**2 * spread**2 + s**2)

        end = loop(scheduler, x, net=exact, timesteps=rest)[-1]
        assert_close(end, spread * x / variance.sqrt(), rtol=2e-3, atol=0)


# --- threads, copies -------------------------------------------------------------------------------------------------


def test_threads_share_a_scheduler():
    """Each with its own number of steps, at once (failures.md H1)."""
    shared = SolversScheduler(method="recommended", **BETAS)
    lengths = [5 + i % 7 for i in range(32)]
    expected = {n: loop(made(n, **BETAS))[-1] for n in set(lengths)}
    barrier, results = threading.Barrier(32), [None] * 32

    def work(i):
        barrier.wait()
        for _ in range(3):
            shared.set_timesteps(lengths[i])
            results[i] = loop(shared)[-1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, result in zip(lengths, results, strict=True):
        assert torch.equal(result, expected[n])


def test_threads_share_a_plan():
    plan = made(9, method="unipc_2").plan
    expected = run(plan)
    results = [None] * 32

    def work(i):
        results[i] = run(plan)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(result, expected) for result in results)


def test_another_thread_has_no_run_of_this_one():
    scheduler, caught = made(method="ddim"), []

    def work():
        try:
            scheduler.step(X, 999, X)
        except ValueError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert "no run in this thread yet" in caught[0]


@pytest.mark.parametrize(
    "method", ["recommended", "ddim", "heun", "ddpm", "unipc_4", "etdrk4", "res_2", "analytic_ddpm"]
)
def test_a_pickle_is_another_scheduler_of_the_same_settings(method):
    scheduler = made(method=method, seed=3, **BETAS)
    copied = pickle.loads(pickle.dumps(scheduler))
    assert dict(copied.config) == dict(scheduler.config)
    check_copy(scheduler, copied)


@pytest.mark.parametrize("method", ["recommended", "ddim", "heun", "ddpm", "etdrk4"])
@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
def test_a_copy_is_another_scheduler_of_the_same_settings(method, copier):
    scheduler = made(method=method, seed=3, **BETAS)
    check_copy(scheduler, copier(scheduler))


def check_copy(scheduler, copied):
    with pytest.raises(ValueError, match="no run in this thread yet"):
        copied.step(X, 999, X)
    expected = loop(scheduler)
    copied.set_timesteps(6)
    assert torch.equal(loop(copied), expected)
    assert scheduler.step_index == len(scheduler.timesteps)


# --- configs that contradict themselves, or are of something else ----------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "linaer"}, r"beta_schedule = 'linaer': expected one of 'linear'"),
        ({"prediction_type": "noise"}, r"prediction_type = 'noise': expected one of 'epsilon'"),
        ({"method": "ddmi"}, r"method = 'ddmi': expected one of 'recommended'"),
        ({"method": 3}, r"method = 3: expected one of"),
        ({"grid": "exponential"}, r"grid = 'exponential': expected one of 'angle'"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "-1"),
        ({"thresholding": True, "sample_max_value": 0.5}, "most = 0.5: expected at least"),
        ({"thresholding": True, "dynamic_thresholding_ratio": 1.5}, "quantile = 1.5"),
        ({"seed": -1}, "seed = -1: expected a whole number"),
        ({"seed": 1.5}, "seed = 1.5: expected a whole number"),
        ({"trained_betas": [0.1, 2.0]}, r"betas\[1\] = 2: expected 0 < beta"),
        ({"trained_betas": [0.1]}, "expected .* N >= 2"),
        ({"num_train_timesteps": 0}, "num_train_timesteps = 0: expected a whole number"),
        ({"beta_start": 0.0}, r"beta.* = 0"),
        ({"beta_end": float("nan")}, r"beta.* = nan"),
        ({**FLOW, "shift": -1.0}, "shift = -1"),
        ({"shift": 3.0}, "shift = 3.0.*only a flow is shifted"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting = True.*only a flow is shifted"),
        ({**FLOW, "grid": "trailing"}, "grid = 'trailing': expected one of 'angle', 'uniform'"),
        ({"method": "ddim", "options": {"order": 2}}, "order=2|order"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_settings_are_refused_when_made(config, message):
    with pytest.raises((ValueError, TypeError), match=message):
        SolversScheduler(**config)


@pytest.mark.parametrize("options", [{"order": 2}, 5, ["eta"]], ids=str)
def test_options_of_another_method_are_refused_by_name(options):
    with pytest.raises(TypeError, match=r"options = .* of method = 'ddim'"):
        SolversScheduler(method="ddim", options=options)


def test_a_value_of_an_option_is_refused_when_the_steps_are_set():
    scheduler = SolversScheduler(method="ddim", options={"eta": -1})
    with pytest.raises(ValueError, match="eta = -1"):
        scheduler.set_timesteps(5)


def test_dynamic_shifting_is_given_its_mu():
    config = {"prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    with pytest.raises(ValueError, match="give mu, which depends on the image's size"):
        SolversScheduler(**config).set_timesteps(5)
    with pytest.raises(ValueError, match="give mu"):
        from_diffusers(Network(), config)
    with pytest.raises(ValueError, match=r"mu = 1.0: the config has use_dynamic_shifting = False"):
        from_diffusers(Network(), FLOW, mu=1.0)
    with pytest.raises(ValueError, match=r"mu = 1.0: only a flow"):
        from_diffusers(Network(), BETAS, mu=1.0)
    with pytest.raises(ValueError, match="time_shift_type = 'cubic'"):
        from_diffusers(Network(), config | {"time_shift_type": "cubic"}, mu=1.0)
    with pytest.raises(TypeError, match="mu = 'big': expected a real number"):
        from_diffusers(Network(), config, mu="big")
    made(5, **FLOW).set_timesteps(
        5, mu=1.0
    )  # pipelines compute it whether the config has a use for it or not


class Latent:
    """A network with a config."""

    def __init__(self, channels, out_channels=None):
        self.config = {"in_channels": channels, "out_channels": out_channels or channels}

    def __call__(self, x, timestep, return_dict):
        return (torch.cat([x] * (self.config["out_channels"] // self.config["in_channels"]), 1),)


def test_thresholds_are_for_pixels():
    bounds = {"thresholding": True, **BETAS}
    from_diffusers(Latent(3), bounds)
    for channels in (4, 16):
        with pytest.raises(ValueError, match=rf"a network of {channels} channels is of latents"):
            from_diffusers(Latent(channels), bounds)


def test_a_network_of_twice_the_channels_has_a_second_output():
    model, schedule = from_diffusers(Latent(3, 6), BETAS)
    assert model.variance == "range"
    plan = sv.ddpm(schedule, sv.grids.trailing(schedule, 5), variance="learned")
    assert sv.run(plan, model, X, 0).isfinite().all()
    assert from_diffusers(Latent(3), BETAS)[0].variance is None


@PEERS_WARN
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "SCMScheduler"])
def test_a_preconditioned_network_is_refused(name):
    config = getattr(diffusers, name)().config
    for read in (SolversScheduler.from_config, partial(from_diffusers, Network())):
        with pytest.raises(ValueError, match=r"take sv.Model\(net, predicts='edm'"):
            read(config)


def test_a_flow_from_data_to_noise_is_refused():
    config = FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config
    for read in (SolversScheduler.from_config, partial(from_diffusers, Network())):
        with pytest.raises(ValueError, match=r"from_flow\(net, noise_at=0\)"):
            read(config)


def loaded(scheduler, tmp_path):
    """As a pipeline loads it: then the config knows the class that it is of."""
    scheduler.save_pretrained(tmp_path)
    return type(scheduler).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "made in Python"])
def test_the_config_of_a_flow_is_read_as_one(name, is_loaded, tmp_path):
    """Made in Python it has no _class_name."""
    theirs = getattr(diffusers, name)(shift=3.0)
    theirs = loaded(theirs, tmp_path) if is_loaded else theirs
    assert ("_class_name" in theirs.config) == is_loaded
    ours = SolversScheduler.from_config(theirs.config, method="ddim")
    assert (ours.config.prediction_type, ours.config.shift) == ("flow_prediction", 3.0)
    ours.set_timesteps(sigmas=SIGMAS)
    assert ours.plan == flow("ddim").plan
    assert from_diffusers(Network(), theirs.config)[1] == sv.Flow(3.0)
    assert from_diffusers(Network(), theirs.config)[0].predicts == "flow"


@PEERS_WARN
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "UnCLIPScheduler",
    ],
)
def test_the_levels_of_a_scheduler_made_by_default_are_taken_over(name):
    """The network was trained on them, whoever wrote them down; from_diffusers reads them right."""
    theirs = getattr(diffusers, name)()
    alphas = theirs.alphas_cumprod.double()
    assert_close(schedule_of(theirs.config).alpha(LEVELS) ** 2, alphas, rtol=3e-5, atol=0)
    ours = SolversScheduler.from_config(theirs.config)
    assert_close(schedule_of(ours.config).alpha(LEVELS) ** 2, alphas, rtol=3e-5, atol=0)


@PEERS_WARN
def test_the_prediction_of_a_scheduler_made_by_default_is_taken_over():
    theirs = diffusers.HeliosScheduler()
    assert theirs.config.prediction_type == "flow_prediction"
    assert SolversScheduler.from_config(theirs.config).config.prediction_type == "flow_prediction"


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_levels_of_a_shifted_snr_are_those_of_diffusers(name):
    theirs = getattr(diffusers, name)()
    ours = schedule_of(theirs.config).alpha(LEVELS) ** 2
    assert_close(ours, theirs.alphas_cumprod.double(), rtol=5e-6, atol=0)


@PEERS_WARN
@pytest.mark.parametrize(
    "name",
    [
        "ScoreSdeVeScheduler",
        "IPNDMScheduler",
        "DDPMWuerstchenScheduler",
        "BlockRefinementScheduler",
        "LTXEulerAncestralRFScheduler",
    ],
)
def test_a_config_of_no_schedule_of_ours_is_refused(name, tmp_path):
    theirs = loaded(getattr(diffusers, name)(), tmp_path)
    with pytest.raises(ValueError, match="schedule"):
        schedule_of(theirs.config)


def test_a_network_that_reads_log_sigma_is_refused():
    """Stable Video Diffusion's: it reads log(sigma) / 4."""
    theirs = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", sigma_min=0.002, sigma_max=700.0
    )
    with pytest.raises(ValueError, match=r"reads log\(sigma\) / 4"):
        SolversScheduler.from_config(theirs.config)


def test_velocity_on_the_straight_path_is_what_it_says():
    """v = alpha eps - sigma x_0 gives x_0 = (alpha x - sigma v) / (alpha^2 + sigma^2); theirs does not divide."""
    data, noise = normals(seed=1), normals(seed=2)
    config = {"use_flow_sigmas": True, "prediction_type": "v_prediction"}
    theirs = DPMSolverMultistepScheduler(**config)
    ours = SolversScheduler.from_config(theirs.config, method="ddim")
    ours.set_timesteps(sigmas=[0.6, 0.2])
    x = 0.4 * data + 0.6 * noise
    following = ours.step(0.4 * noise - 0.6 * data, ours.timesteps[0], x).prev_sample
    assert_close(following, 0.8 * data + 0.2 * noise)


def test_a_method_that_adds_noise_first_is_refused_by_name():
    """The pipeline has no place for it."""
    scheduler = SolversScheduler(method="churn_heun", seed=0)
    with pytest.raises(ValueError, match=r"method = 'churn_heun' adds noise before its first call.*sv.run"):
        scheduler.set_timesteps(timesteps=[500, 300, 100])
    scheduler.set_timesteps(10)  # from t = 1 it does not


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"methd": "unipc_2"}, "methd = 'unipc_2' .*did you mean method"),
        ({"eta": 0.5}, "eta = 0.5 .*options="),
        ({"use_karras_sigmas": True}, "use_karras_sigmas = True .*grid="),
    ],
)
def test_an_argument_that_from_config_does_not_know_is_refused(wrong, says):
    with pytest.raises(TypeError, match=says):
        SolversScheduler.from_config(diffusers.DDIMScheduler().config, **wrong)


def test_what_is_passed_in_the_place_of_a_network_or_config_is_named():
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TypeError, match=r"scheduler_config is DDIMScheduler: .*pipe.scheduler.config"):
        from_diffusers(Network(), scheduler)
    with pytest.raises(TypeError, match=r"config is a DDIMScheduler: pass its config, scheduler.config"):
        SolversScheduler.from_config(scheduler)
    with pytest.raises(TypeError, match="inputs is Tensor: expected a mapping"):
        from_diffusers(Network(), scheduler.config, inputs=torch.ones(2))
    with pytest.raises(TypeError, match="guide is float: expected a function from model to model"):
        from_diffusers(Network(), scheduler.config, guide=3.0)
    with pytest.raises(ValueError, match=r"method = 'unipc2': expected .*did you mean 'unipc_2'\?"):
        SolversScheduler(method="unipc2")

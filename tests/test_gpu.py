"""On a CUDA device: a loop waits for nothing, holds what is promised, and gives what it gives on a CPU; skipped where there is none."""

import contextlib
import math
import warnings
from importlib.util import find_spec

import pytest
import torch

import solvers as sv
from problems import VP
from solvers.methods import BUILDS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    # what torch says once, when the mode is set
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature"),
]

SHAPE = (3, 4, 5, 7)
ODE = ("ddim", "adams_data_4", "unipc_angle_4", "heun", "etdrk4", "pndm", "recommended")
SDE = ("ddpm", "dpm_solver_pp_sde_2m", "sa_solver", "seeds_3", "ancestral_3s")
WAYS = [
    pytest.param(False, id="eager"),
    pytest.param(True, id="fused", marks=pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")),
]
LAYOUTS = {
    "in order": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
}


def plan_of(name, steps=6):
    return BUILDS[name](VP, sv.logsnr(VP, steps))


def randn(seed=0, shape=SHAPE, dtype=torch.float32):
    """The same numbers on the device as on the host."""
    host = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return host.to(dtype)


def wavy(x, t):
    return torch.tanh(x) + 0.2 * torch.sin(3 * x + t.reshape(-1, *[1] * (x.ndim - 1)))


def linear(x, t):
    return 0.3 * x


def streams():
    """Noise that depends on nothing but seed, sample and draw, so that it is the same on every device."""
    return sv.noise.per_sample(11, (4, 0, 9))


def on_device(seed=3):
    return torch.Generator("cuda").manual_seed(seed)


def apart(a, b):
    """How far two results are from each other, in the norm, relative."""
    a, b = a.double().cpu(), b.double().cpu()
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def syncs_are(mode):
    """What waits for the device warns, or is an error; afterwards all is as before."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def without_waiting(go):
    """What a call gives the second time, when it may not wait for the device; the first compiles and allocates what stays."""
    go()
    torch.cuda.synchronize()
    with syncs_are("error"):
        return go()


def test_waiting_is_an_error_and_only_inside():
    x = torch.ones(3, device="cuda")
    for wait in (
        lambda: x.sum().item(),
        lambda: bool(x.isfinite().all()),
        lambda: x.nonzero(),
        lambda: x.cpu(),
    ):
        with syncs_are("error"), pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
            wait()
        wait()
    assert torch.cuda.get_sync_debug_mode() == 0


# Nothing waits


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("name", ODE)
def test_an_unchecked_run_waits_for_nothing(name, fused):
    plan, x = plan_of(name), randn().cuda()
    for kind in ("noise", "data", "velocity"):
        model = sv.Model(wavy, predicts=kind)
        end = without_waiting(lambda model=model: sv.run(plan, model, x, fused=fused, check=False))
        assert apart(end, sv.run(plan, model, x, fused=fused)) < 1e-5


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("noise", [on_device, streams])
@pytest.mark.parametrize("name", SDE)
def test_an_unchecked_stochastic_run_waits_for_nothing(name, noise, fused):
    plan, x = plan_of(name), randn().cuda()
    end = without_waiting(lambda: sv.run(plan, wavy, x, noise(), fused=fused, check=False))
    assert apart(end, sv.run(plan, wavy, x, noise(), fused=fused)) < 1e-5


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("options", ["half input", "history", "scaled input", "callback", "channels last"])
def test_nor_do_options_wait(options, fused):
    plan, x, more = plan_of("unipc_3"), randn().cuda(), {}
    if options == "half input":
        x = x.half()
    elif options == "history":
        more = {"history": torch.bfloat16}
    elif options == "scaled input":
        edm = sv.EDM()
        plan, x = BUILDS["unipc_3"](edm, sv.karras(edm, 6)), 80 * x
        more = {"model": sv.Model(wavy, predicts="edm")}
    elif options == "callback":
        more = {"callback": lambda state: state.x.mul_(0.9)}
    else:
        x = LAYOUTS["channels last"](x)
    model = more.pop("model", wavy)
    end = without_waiting(lambda: sv.run(plan, model, x, fused=fused, check=False, **more))
    assert end.isfinite().all()


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("name", ["adams_data_4", "sa_solver"])
def test_a_checked_run_waits_once(name, fused):
    plan, x = plan_of(name), randn().cuda()
    sv.run(plan, wavy, x, on_device(), fused=fused)
    with warnings.catch_warnings(record=True) as caught, syncs_are("warn"):
        warnings.simplefilter("always")
        sv.run(plan, wavy, x, on_device(), fused=fused)
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    assert len(waits) == 1


@pytest.mark.parametrize("noise", [on_device, streams])
@pytest.mark.parametrize("name", ["adams_data_4", *SDE])
def test_a_replay_waits_for_nothing(name, noise):
    plan, x = plan_of(name), randn().cuda()
    sampler = sv.compiled_sampler(plan, wavy, SHAPE, device="cuda", check=False)
    assert sampler.captured
    end = without_waiting(lambda: sampler(x, noise()))
    assert apart(end, sv.run(plan, wavy, x, noise())) < 1e-5


@pytest.mark.parametrize("method", ["dpm_solver_pp_2m", "unipc_3", "heun", "ddpm", "ancestral_2s"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_of_diffusers_loop_waits_for_nothing(method, dtype):
    pytest.importorskip("diffusers")
    from solvers.adapters.diffusers import SolversScheduler

    def sampled(device):
        scheduler = SolversScheduler(method=method)
        scheduler.set_timesteps(6, device=device)
        generator = torch.Generator(device).manual_seed(0)
        x, net = randn(dtype=dtype).to(device), lambda x: 0.3 * torch.tanh(x)
        with syncs_are("error" if device == "cuda" else "default"):
            for t in scheduler.timesteps:
                x = scheduler.step(net(x), t, x, generator=generator).prev_sample
        return x

    end = sampled("cuda")
    assert end.dtype == dtype
    assert end.isfinite().all()
    if method not in ("ddpm", "ancestral_2s"):  # whose generators differ with the device
        assert apart(end, sampled("cpu")) < (1e-5 if dtype == torch.float32 else 5e-3)


# The same samples


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("name", [*ODE, *SDE])
def test_fused_eager_graph_and_cpu_are_equal_to_rounding(name, dtype, rounding):
    plan, x = plan_of(name), randn(dtype=dtype)
    expected = sv.run(plan, wavy, x, streams())
    ends = {"eager": sv.run(plan, wavy, x.cuda(), streams(), fused=False)}
    if find_spec("triton"):
        ends["fused"] = sv.run(plan, wavy, x.cuda(), streams(), fused=True)
    for fused in (False, True) if find_spec("triton") else (False,):
        sampler = sv.compiled_sampler(plan, wavy, SHAPE, dtype, "cuda", fused)
        assert sampler.captured
        ends[f"graph {fused}"] = sampler(x.cuda(), streams())
    for way, end in ends.items():
        assert (end.dtype, end.device.type) == (dtype, "cuda")
        assert apart(end, expected) < rounding, way
        assert apart(1.01 * end, expected) > rounding


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_outputs_of_other_layouts_and_dtypes(layout, fused):
    plan, x = plan_of("unipc_3"), randn()
    nets = {
        "linear": linear,
        "in order": lambda x, t: linear(x, t).contiguous(),
        "float64": lambda x, t: linear(x.double(), t),
        "its input": lambda x, t: x,
        "expanded": lambda x, t: linear(x, t)[:1].expand_as(x),
    }
    for name, net in nets.items():
        end = sv.run(plan, net, LAYOUTS[layout](x).cuda(), fused=fused)
        assert apart(end, sv.run(plan, net, LAYOUTS[layout](x))) < 1e-4, name


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1023), (1, 1024), (1, 1025), (1025, 3), ((5, 0))])
def test_sizes_around_a_block(shape, fused):
    plan, x = plan_of("unipc_3"), randn(shape=shape)
    end = sv.run(plan, wavy, x.cuda(), fused=fused)
    assert end.shape == shape
    assert x.numel() == 0 or apart(end, sv.run(plan, wavy, x)) < 1e-4


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize(("half", "rounding"), [(torch.bfloat16, 2.0**-9), (torch.float16, 2.0**-12)])
def test_a_history_in_half_precision_costs_one_rounding(half, rounding, fused):
    plan, x, states = plan_of("adams_data_4", 20), randn().cuda(), []
    model = sv.Model(lambda x, t: torch.tanh(x), predicts="data")
    exact = sv.run(plan, model, x, fused=fused)
    end = sv.run(plan, model, x, fused=fused, history=half)
    assert rounding / 50 < apart(end, exact) < 4 * rounding
    sv.run(plan, model, x, fused=fused, history=half, callback=states.append)
    assert {v.dtype for s in states for v in s.outputs.values()} == {half}


@pytest.mark.parametrize("fused", WAYS)
def test_labels_are_on_the_device(fused):
    seen = []
    sv.run(plan_of("unipc_3"), lambda x, t: seen.append(t) or linear(x, t), randn().cuda(), fused=fused)
    assert {(t.device.type, t.dtype, t.data_ptr() % 16) for t in seen} == {("cuda", torch.float32, 0)}
    times = plan_of("unipc_3").times[:-1].float()
    assert torch.equal(torch.stack(seen).cpu(), times[:, None].expand(-1, 3))


# What is not finite


def spoiling(value, call):
    """NaN or an infinity in samples 1 and 2 of one call, and nothing that waits."""
    count = iter(range(10**6))

    def net(x, t):
        out = linear(x, t)
        if next(count) == call:
            out[1, 0, 0, 0] = out[2, 3, 4, 6] = value
        return out

    return net


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_error_names_call_and_samples(value, layout, fused):
    for name, call in (("ddim", 0), ("adams_data_4", 3), ("ddim", 5)):
        plan = plan_of(name)
        said = rf"call {call} of {plan.rows} .*samples \[1, 2\]; all outputs before it are finite"
        with pytest.raises(sv.NonFiniteError, match=said) as caught:
            sv.run(plan, spoiling(value, call), LAYOUTS[layout](randn()).cuda(), fused=fused)
        assert (caught.value.call, caught.value.samples) == (call, [1, 2])


@pytest.mark.parametrize("fused", WAYS)
def test_a_start_that_is_not_finite_takes_the_blame(fused):
    x = randn().cuda()
    x[1, 0, 0, 0] = math.inf
    with pytest.raises(
        sv.NonFiniteError, match=r"call 0 .*samples \[1\]; the x it was given is not finite either"
    ):
        sv.run(plan_of("ddim"), linear, x, fused=fused)


@pytest.mark.parametrize("fused", WAYS)
def test_unchecked_what_is_not_finite_goes_through(fused):
    end = sv.run(plan_of("ddim"), spoiling(math.nan, 2), randn().cuda(), fused=fused, check=False)
    assert end[1:].isnan().flatten(1).any(1).all()
    assert end[0].isfinite().all()


@pytest.mark.parametrize("call", [0, 3])
def test_the_error_behind_a_replay_names_the_call(call):
    """The network reads the switch from the device, where a replay finds it changed."""
    plan = plan_of("ddim")
    spoil, at = torch.zeros((), device="cuda"), plan.times[call].item()

    def net(x, t):
        here = ((t - at).abs() < 1e-6) & (spoil > 0)
        return linear(x, t).masked_fill(here[:, None, None, None], math.nan)

    sampler = sv.compiled_sampler(plan, net, SHAPE, device="cuda")
    unchecked = sv.compiled_sampler(plan, net, SHAPE, device="cuda", check=False)
    assert sampler.captured
    good = sampler(randn().cuda())
    spoil.fill_(1)
    with pytest.raises(sv.NonFiniteError, match=rf"call {call} of {plan.rows} .*samples \[0, 1, 2\]"):
        sampler(randn().cuda())
    assert unchecked(randn().cuda()).isnan().all()
    spoil.fill_(0)
    assert torch.equal(sampler(randn().cuda()), good)


# Memory

LARGE = (8, 2**18)  # 8 MiB: what is small beside it is of no account


def peak(go):
    """The most device memory that a call holds beside what was there, in states."""
    go()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    end = go()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / (end.numel() * end.element_size())


def test_one_state_more_is_seen():
    x = torch.randn(LARGE, device="cuda")
    plan = plan_of("dpm_solver_pp_2m")
    least = peak(lambda: sv.run(plan, linear, x, check=False))

    def copies(x, t):
        first = linear(x, t)
        return first.clone()

    assert peak(lambda: sv.run(plan, copies, x, check=False)) - least == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "name",
    ["ddim", "dpm_solver_pp_2m", "dpm_solver_pp_3m_ramp", "adams_velocity_4_ramp", "heun", "recommended"],
)
def test_a_run_holds_its_window_and_two_states(name, check, fused):
    plan, x = plan_of(name, 12), torch.randn(LARGE, device="cuda")
    assert peak(lambda: sv.run(plan, linear, x, fused=fused, check=check)) < plan.window + 2.1


@pytest.mark.parametrize("fused", WAYS)
@pytest.mark.parametrize("name", ["ddpm", "sa_solver", "ancestral_3s"])
def test_a_stochastic_run_holds_its_draws_besides(name, fused):
    plan, x = plan_of(name, 6), torch.randn(LARGE, device="cuda")
    held = peak(lambda: sv.run(plan, linear, x, on_device(), fused=fused))
    assert held < plan.window + 2 + plan.c.shape[1] + 1.1


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")
def test_a_history_in_half_precision_holds_less():
    plan, x = plan_of("adams_velocity_4_ramp", 12), torch.randn(LARGE, device="cuda")
    whole, half = (
        peak(lambda kept=kept: sv.run(plan, linear, x, fused=True, history=kept))
        for kept in (None, torch.bfloat16)
    )
    assert half < whole


# Networks that cannot be captured: last, as a capture that fails may leave torch's allocator as it was in it


def reads_back(x, t):
    return linear(x, t) * (1.0 if x.abs().max().item() >= 0 else 0.0)


@pytest.mark.parametrize("name", ["adams_data_4", "ddpm"])
def test_a_network_that_reads_back_is_run_call_by_call(name):
    plan = plan_of(name)
    with pytest.warns(UserWarning, match="the network could not be captured .*call by call"):
        sampler = sv.compiled_sampler(plan, reads_back, SHAPE, device="cuda")
    assert sampler.captured is False
    for seed in range(2):
        x = randn(seed)
        assert apart(sampler(x.cuda(), streams()), sv.run(plan, linear, x, streams())) < 1e-4


def test_a_capture_that_failed_is_not_in_the_way_of_the_next():
    with pytest.warns(UserWarning, match="could not be captured"):
        sv.compiled_sampler(plan_of("ddim"), reads_back, SHAPE, device="cuda")
    sampler = sv.compiled_sampler(plan_of("ddim"), wavy, SHAPE, device="cuda")
    assert sampler.captured
    assert apart(sampler(randn().cuda()), sv.run(plan_of("ddim"), wavy, randn())) < 1e-4

"""What holds for every method, grid, schedule and shape. The numbers are those of the properties the project agreed on."""

import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import solvers as sv
from reference import Gaussian, Mixture
from tests.methods import METHODS, ODE, SINGLESTEP

SHAPES = [(2,), (3, 2), (2, 3, 5), (1, 2, 1, 3)]
SCHEDULES = {
    "vp": sv.VP(),
    "cosine": sv.Cosine(),
    "ve": sv.VE(sigma_max=100.0),
    "sub-vp": sv.SubVP(),
    "edm": sv.EDM(),
    "flow": sv.Flow(shift=2.0),
    "log-snr": sv.LogSNR(gamma_min=-12.0, gamma_max=10.0),
    "ddpm": sv.Discrete.linear(1000),
}
methods, odes = st.sampled_from(sorted(METHODS)), st.sampled_from(sorted(ODE))
schedules = st.sampled_from(sorted(SCHEDULES))
savable = st.sampled_from(sorted(set(METHODS) - {"v3 2"}))  # which is made again from its statistics
shapes = st.sampled_from(SHAPES)
seeds = st.integers(0, 2**31)


@st.composite
def half_logsnrs(draw, least=1, most=7):
    """An uneven grid of half log-SNR with step ratios up to 4, within [-4, 4]."""
    steps = draw(st.lists(st.floats(0.2, 0.8), min_size=least, max_size=most))
    first = draw(st.floats(-4.0, -2.0))
    return (first + torch.tensor([0.0, *steps], dtype=torch.float64).cumsum(0)).clamp(max=4.0)


def randn(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def apart(a, b, scale=0.0):
    """The largest difference, relative to the largest value."""
    return float((a - b).abs().max() / max(float(b.abs().max()), scale, 1e-300))


def wavy(x, t):
    """A nonlinear noise prediction, element by element."""
    return torch.tanh(x) + 0.3 * torch.sin(2 * x)


def tame(schedule):
    """The same of x in units of its size, as trained networks read it, so that rounding is not amplified."""

    def model(x, t):
        t = t.to(torch.float64)
        size = torch.hypot(schedule.alpha(t), schedule.sigma(t))
        return wavy(x / size.reshape(-1, *[1] * (x.ndim - 1)), t)

    return model


class Counted:
    """A model that remembers the times at which it was called."""

    def __init__(self, model=wavy):
        self.model, self.times = model, []

    def __call__(self, x, t):
        self.times.append(t.clone())
        return self.model(x, t)


ROOTS = randn(5, 2, 3, 3) / 2
MIXTURE = Mixture([0.4, 0.6], randn(4, 2, 3), ROOTS @ ROOTS.mT + 0.1 * torch.eye(3, dtype=torch.float64))


def seeded(plan):
    """Noise for a plan that needs it."""
    return 7 if plan.is_stochastic else None


# Exactness


@given(odes, schedules, half_logsnrs(), shapes, seeds)
def test_constant_noise_and_constant_data_are_solved_exactly(method, schedule, lam, shape, seed):
    """8: where x_0 and eps are constant both predictions are, and x stays alpha x_0 + sigma eps."""
    schedule = SCHEDULES[schedule]
    plan = ODE[method](schedule, schedule.time(lam))
    data, noise = randn(seed, *shape), randn(seed + 1, *shape)
    x, exact = (plan.alpha[i] * data + plan.sigma[i] * noise for i in (0, -1))
    weights = float((plan.b.abs().sum(1) * torch.hypot(plan.alpha, plan.sigma)[1:]).max())
    for net, predicts in ((noise, "noise"), (data, "data")):
        out = sv.run(plan, sv.Model(lambda x, t, net=net: net.clone(), predicts=predicts), x)
        assert apart(out, exact, scale=max(1.0, weights)) < 1e-13


@given(schedules, half_logsnrs(least=2), st.sampled_from([2, 3, 4, 5]), seeds)
def test_noise_linear_in_half_logsnr_is_solved_exactly(schedule, lam, order, seed):
    """9: by third-order singlestep, and by Adams from the second step on, its history being exact."""
    schedule = SCHEDULES[schedule]
    times = schedule.time(lam)
    lam = schedule.half_logsnr(times)
    c0, c1 = randn(seed, 2, 3), randn(seed + 1, 2, 3)

    def line(x, t):
        return c0 + c1 * schedule.half_logsnr(t)[:, None].to(x)

    def solution(x, plan, i):
        """x_t / alpha_t = x_s / alpha_s - int e^-lam eps dlam."""
        parts = [torch.exp(-level) * (c0 + c1 * (level + 1)) for level in (lam[i], lam[-1])]
        return plan.alpha[-1] * (x / plan.alpha[i * plan.nfe // (len(lam) - 1)] - (parts[0] - parts[1]))

    x = randn(seed + 2, 2, 3)
    single = sv.dpm_solver(schedule, times, 3)
    assert apart(sv.run(single, line, x), solution(x, single, 0)) < 1e-11
    adams = sv.exponential_adams(schedule, times, order, predicts="noise")
    state = sv.State(x, 1, {0: line(x, times[:1].expand(2))}, input_dtype=x.dtype)
    assert apart(sv.run(adams, line, state), solution(x, adams, 1)) < 1e-11


# Invariance


@given(odes, schedules, half_logsnrs(most=4), seeds)
def test_every_prediction_of_one_model_gives_the_same_run(method, schedule, lam, seed):
    """7: noise, data, velocity, score, flow and EDM parameterisations of one mixture."""
    schedule = SCHEDULES[schedule]
    plan = ODE[method](schedule, schedule.time(lam))
    x = torch.hypot(plan.alpha[0], plan.sigma[0]) * randn(seed, 2, 3)
    runs = {}
    for predicts in ("noise", "data", "velocity", "score", "flow", "edm"):
        net = MIXTURE.model(schedule, predicts, sigma_data=0.7)
        model = sv.Model(net, predicts, schedule=schedule if predicts == "flow" else None, sigma_data=0.7)
        runs[predicts] = sv.run(plan, model, x)
    for predicts, out in runs.items():
        assert apart(out, runs["noise"]) < 1e-11, predicts


@given(odes, schedules, half_logsnrs(most=4), seeds)
def test_every_schedule_is_one_problem_at_equal_half_logsnr(method, schedule, lam, seed):
    """5: a sampler depends on alpha through x / alpha alone."""
    y = randn(seed, 2, 3) * torch.exp(-lam[0])
    outs = []
    for path in (SCHEDULES[schedule], SCHEDULES["edm"], SCHEDULES["flow"]):
        plan = ODE[method](path, path.time(lam))
        outs.append(sv.run(plan, MIXTURE.model(path), plan.alpha[0] * y) / plan.alpha[-1])
    assert apart(outs[0], outs[1]) < 1e-11
    assert apart(outs[2], outs[1]) < 1e-11


@dataclass(frozen=True)
class HalfSpeed:
    """A schedule whose clock shows twice the time, which is exact in binary."""

    base: sv.Schedule
    start: float = 2.0
    stop: float = 0.002

    def alpha(self, t):
        return self.base.alpha(t / 2)

    def sigma(self, t):
        return self.base.sigma(t / 2)

    def half_logsnr(self, t):
        return self.base.half_logsnr(t / 2)

    def time(self, half_logsnr):
        return self.base.time(half_logsnr) * 2


@given(methods, schedules, half_logsnrs())
def test_another_clock_changes_no_bit(method, schedule, lam):
    """6: of the coefficients, at equal half log-SNR."""
    schedule = SCHEDULES[schedule]
    times = schedule.time(lam)
    plain, doubled = METHODS[method](schedule, times), METHODS[method](HalfSpeed(schedule), 2 * times)
    assert torch.equal(doubled.times, 2 * plain.times)
    for name in ("a", "b", "c", "alpha", "sigma"):
        assert torch.equal(getattr(doubled, name), getattr(plain, name))


@given(odes, schedules, half_logsnrs(), seeds)
def test_a_rotation_of_space_rotates_the_samples(method, schedule, lam, seed):
    """1."""
    schedule = SCHEDULES[schedule]
    plan = ODE[method](schedule, schedule.time(lam))
    q, _ = torch.linalg.qr(randn(seed, 3, 3))
    x = torch.hypot(plan.alpha[0], plan.sigma[0]) * randn(seed + 1, 4, 3)
    net = tame(schedule)
    turned = sv.run(plan, lambda x, t: net(x @ q.T, t) @ q, x @ q)
    assert apart(turned, sv.run(plan, net, x) @ q, scale=float(x.abs().max())) < 1e-12


@given(odes, half_logsnrs(), st.floats(1e-3, 1e3), seeds)
def test_a_change_of_units_scales_the_samples(method, lam, scale, seed):
    """2: data, sigma and state in units of `scale`."""
    edm = sv.EDM()
    times = edm.time(lam)
    x = float(times[0]) * randn(seed, 2, 3)
    net = tame(edm)
    plain = sv.run(ODE[method](edm, times), net, x)
    scaled = sv.run(ODE[method](edm, times * scale), lambda x, t: net(x / scale, t / scale), x * scale)
    assert apart(scaled / scale, plain, scale=float(x.abs().max())) < 1e-12


@given(odes, half_logsnrs(), st.floats(-100, 100), seeds)
def test_a_shift_of_the_origin_shifts_the_samples(method, lam, shift, seed):
    """3: where alpha = 1."""
    edm = sv.EDM()
    plan = ODE[method](edm, edm.time(lam))
    x = float(plan.times[0]) * randn(seed, 2, 3)
    net = tame(edm)
    moved = sv.run(plan, lambda x, t: net(x - shift, t), x + shift)
    assert float((moved - shift - sv.run(plan, net, x)).abs().max()) < 1e-11 * (1 + abs(shift))


@given(methods, schedules, half_logsnrs(), seeds)
def test_the_order_of_samples_and_of_coordinates_changes_no_bit(method, schedule, lam, seed):
    """4."""
    schedule = SCHEDULES[schedule]
    plan = METHODS[method](schedule, schedule.time(lam))
    x = randn(seed, 4, 5, dtype=torch.float32)
    if plan.is_stochastic:
        ids, order = [3, 1, 4, 15], [2, 0, 3, 1]
        out = sv.run(plan, wavy, x, sv.noise.per_sample(7, ids))
        moved = sv.run(plan, wavy, x[order], sv.noise.per_sample(7, [ids[i] for i in order]))
        assert torch.equal(moved, out[order])
    else:
        out = sv.run(plan, wavy, x)
        assert torch.equal(sv.run(plan, wavy, x.flip(0)), out.flip(0))
        assert torch.equal(sv.run(plan, wavy, x.flip(1)), out.flip(1))
        assert torch.equal(sv.run(plan, wavy, x.T.contiguous().T), out)
        assert torch.equal(sv.run(plan, wavy, x.T), out.T)


@given(methods, schedules, half_logsnrs(), seeds)
def test_a_sample_does_not_depend_on_its_batch(method, schedule, lam, seed):
    """14: bit for bit in batches of 1, 2, 7 and 64."""
    schedule = SCHEDULES[schedule]
    plan = METHODS[method](schedule, schedule.time(lam))
    x = randn(seed, 64, 3, dtype=torch.float32)
    whole = sv.run(plan, wavy, x, noise=seeded(plan))
    for size in (1, 2, 7):
        ids = range(20, 20 + size)
        source = sv.noise.per_sample(7, ids) if plan.is_stochastic else None
        assert torch.equal(sv.run(plan, wavy, x[20 : 20 + size], noise=source), whole[20 : 20 + size])


# Running


@given(methods, schedules, half_logsnrs(), shapes, st.sampled_from([torch.float32, torch.float64]), seeds)
def test_a_run_is_the_same_however_it_is_taken(method, schedule, lam, shape, dtype, seed):
    """10, 12, 19, 20, 23: split at any call, repeated, watched, as a trajectory; x untouched, calls as planned."""
    schedule = SCHEDULES[schedule]
    plan = METHODS[method](schedule, schedule.time(lam))
    x = randn(seed, *shape, dtype=dtype)
    before, model, states = x.clone(), Counted(), []
    out = sv.run(plan, model, x, noise=seeded(plan))
    assert len(model.times) == plan.nfe
    for t, planned in zip(model.times, plan.times[:-1][plan.is_called], strict=True):
        assert torch.equal(t, torch.full((len(x),), float(planned), dtype=dtype))
    assert out.dtype == dtype
    assert torch.equal(out, sv.run(plan, wavy, x, noise=seeded(plan)))
    assert torch.equal(out, sv.run(plan, wavy, x, noise=seeded(plan), callback=states.append))
    path = sv.trajectory(plan, wavy, x, noise=seeded(plan))
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], out)
    assert [s.call for s in states] == list(range(1, plan.rows + 1))
    for state, stop in zip(states, path[1:], strict=True):
        assert torch.equal(state.x, stop)
        kept = copy.deepcopy(state)
        assert torch.equal(sv.run(plan, wavy, state, noise=seeded(plan)), out)
        assert torch.equal(state.x, kept.x)
        assert all(torch.equal(state.outputs[call], kept.outputs[call]) for call in kept.outputs)
        assert all(torch.equal(state.draws[draw], kept.draws[draw]) for draw in kept.draws)
    assert torch.equal(x, before)
    assert out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


@pytest.mark.parametrize("method", METHODS)
def test_grad_does_not_change_the_answer(method):
    """The formula that gradients flow through is the same formula."""
    plan = METHODS[method](sv.VP(), sv.logsnr(sv.VP(), 6))
    x = randn(0, 2, 3, 5)
    plain = sv.run(plan, wavy, x, noise=seeded(plan))
    with_grad = sv.run(plan, wavy, x, noise=seeded(plan), grad=True)
    assert apart(with_grad, plain) < 1e-13
    assert not plain.requires_grad
    leaf = x.clone().requires_grad_()
    assert sv.run(plan, wavy, leaf, noise=seeded(plan), grad=True).requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_right(method):
    """32."""
    plan = METHODS[method](sv.VP(), sv.logsnr(sv.VP(), 4, start=0.8, stop=0.1))
    scale = randn(3, 3).requires_grad_()

    def sampled(x, scale):
        return sv.run(plan, lambda x, t: torch.tanh(scale * x), x, noise=seeded(plan), grad=True)

    assert torch.autograd.gradcheck(sampled, (randn(1, 1, 3).requires_grad_(), scale))


@given(st.sampled_from(sorted(SINGLESTEP)), schedules, half_logsnrs(least=2), st.data())
def test_singlestep_plans_split_between_steps_without_a_state(method, schedule, lam, data):
    """11."""
    schedule = SCHEDULES[schedule]
    plan = METHODS[method](schedule, schedule.time(lam))
    steps = len(lam) - 1
    cut = data.draw(st.integers(1, steps - 1)) * plan.nfe // steps
    assert plan[:cut] + plan[cut:] == plan
    x = randn(0, 2, 3)
    assert torch.equal(sv.run(plan[cut:], wavy, sv.run(plan[:cut], wavy, x)), sv.run(plan, wavy, x))


@given(methods, schedules, half_logsnrs())
def test_a_plan_ends_where_its_grid_does(method, schedule, lam):
    """23: both ends exactly, every call strictly between them, no turning back."""
    schedule = SCHEDULES[schedule]
    times = schedule.time(lam)
    plan = METHODS[method](schedule, times)
    assert (float(plan.times[0]), float(plan.times[-1])) == (float(times[0]), float(times[-1]))
    stages = ("pndm", "heun", "rho rk4", "krogstad", "unipc 4 singlestep")
    repeated = method in stages  # two at one time, or one where the next step begins
    turns = method in ("hochbruck_ostermann noise", "ancestral 2S")  # behind a stage, or up again by noise
    assert (plan.times.diff() <= 0 if repeated or turns else plan.times.diff() < 0)[
        : 2 if turns else None
    ].all()
    assert set(times.tolist()) <= set(plan.times.tolist())


def test_threads_share_a_plan():
    """13: 32 of them, bit-equal to a serial run."""
    plan = sv.exponential_adams(sv.VP(), sv.logsnr(sv.VP(), 12), 4, start="singlestep")
    starts = [randn(i, 2, 3, 5, dtype=torch.float32) for i in range(32)]
    serial = [sv.run(plan, wavy, x) for x in starts]
    with ThreadPoolExecutor(32) as pool:
        for _ in range(3):
            assert all(map(torch.equal, pool.map(lambda x: sv.run(plan, wavy, x), starts), serial))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_network_leaves_the_state_in_float32(dtype):
    """18: only the call is in half precision, and time is not."""
    seen = set()

    def net(x, t):
        seen.add((x.dtype, t.dtype))
        return wavy(x, t)

    plan = sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5))
    out = sv.run(plan, net, randn(0, 2, 3, dtype=dtype))
    assert out.dtype == torch.float32
    assert seen == {(dtype, torch.float32)}
    single = sv.run(plan, wavy, randn(0, 2, 3, dtype=dtype).float())
    assert 0 < apart(out, single) < 0.05


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_step_is_no_call(schedule):
    """31: there is no plan without a step; a run that has reached its end, and an empty batch, are returned as they are."""
    plan = sv.ddim(
        SCHEDULES[schedule], SCHEDULES[schedule].time(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))
    )
    model, x = Counted(), randn(0, 2, 3)
    assert torch.equal(sv.run(plan, model, sv.State(x, plan.rows, input_dtype=x.dtype)), x)
    assert sv.run(plan, model, x[:0]).shape == (0, 3)
    assert model.times == []


def globals_of_torch():
    return (
        torch.get_rng_state().tolist(),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("outside", [torch.enable_grad, torch.no_grad])
def test_nothing_global_is_touched(outside, grad):
    """27: also after an exception."""
    plan = sv.ddim(sv.VP(), sv.logsnr(sv.VP(), 4), eta=0.5)
    x = randn(0, 2, 3)

    def broken(x, t):
        if float(t[0]) < 0.5:
            raise RuntimeError("out of memory")
        return wavy(x, t)

    with outside():
        before = globals_of_torch()
        sv.run(plan, wavy, x, noise=3, grad=grad)
        sv.run(plan, sv.Model(wavy, "flow", schedule=sv.VP()), x, noise=3, grad=grad)
        assert globals_of_torch() == before
        with pytest.raises(RuntimeError, match="out of memory"):
            sv.run(plan, broken, x, noise=3, grad=grad)
        assert globals_of_torch() == before


def test_autocast_reaches_the_network_and_not_the_state():
    """27: the row is float32 arithmetic inside autocast too."""
    plan = sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5), 3)
    x = randn(0, 2, 3, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sv.run(plan, wavy, x), sv.run(plan, wavy, x, callback=lambda state: None))
        inside = sv.run(plan, wavy, x)
    assert torch.equal(inside, sv.run(plan, wavy, x))


@pytest.mark.parametrize("method", METHODS)
def test_coefficients_do_not_follow_the_default_dtype(method):
    plan = METHODS[method](sv.VP(), sv.logsnr(sv.VP(), 6))
    try:
        torch.set_default_dtype(torch.bfloat16)
        other = METHODS[method](sv.VP(), sv.logsnr(sv.VP(), 6))
    finally:
        torch.set_default_dtype(torch.float32)
    assert other == plan


RETURNED = {
    "x": lambda x: x,
    "slice": lambda x: x[:],
    "view": lambda x: x.view(x.shape),
    "detached": lambda x: x.detach(),
}


@pytest.mark.parametrize("give", RETURNED.values(), ids=RETURNED.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_may_return_its_input(give, dtype):
    """19: noise predictions such as x itself, or a view of it, are not overwritten before they are read."""
    plan = sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5), 3)
    x = randn(0, 2, 3, dtype=dtype)
    copied = sv.run(plan, lambda x, t: x.clone(), x)
    assert torch.equal(sv.run(plan, lambda x, t: give(x), x, callback=lambda state: None), copied)
    assert torch.equal(sv.run(plan, lambda x, t: give(x), x), copied)


def test_a_state_is_not_changed_by_the_run_that_starts_from_it():
    """19: nor is one that is not dense in memory."""
    plan = sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5), 3)
    x = randn(0, 2, 6)[:, ::2]
    before, out = x.clone(), sv.run(plan, wavy, x)
    assert torch.equal(sv.run(plan, wavy, sv.State(x, 0, input_dtype=x.dtype)), out)
    assert torch.equal(x, before)


def test_a_run_from_the_end_returns_a_copy():
    """19: outputs never share memory with inputs."""
    plan = sv.ddim(sv.VP(), sv.logsnr(sv.VP(), 2))
    x = randn(0, 2, 3)
    ended = sv.run(plan, wavy, sv.State(x, plan.rows, input_dtype=x.dtype))
    assert ended.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_the_trajectory_of_an_empty_batch_is_empty():
    plan = sv.ddim(sv.VP(), sv.logsnr(sv.VP(), 4))
    assert sv.trajectory(plan, wavy, randn(0, 0, 3)).shape == (5, 0, 3)


def test_numpy_s_whole_numbers_are_sample_numbers():
    """16: ids often come from np.arange."""
    plain, numpy = sv.noise.per_sample(3, [0, 1, 2]), sv.noise.per_sample(np.int64(3), np.arange(3))
    assert plain == numpy
    assert torch.equal(plain.initial(5), numpy.initial(5))


def test_every_sample_draw_and_seed_has_its_own_noise():
    """16: no two alike, and an id has the same noise in any company."""
    assert sv.noise.per_sample(3, [0, 1])(0, torch.zeros(2)).shape == (2,)
    like = torch.zeros(3, 5)
    draws = [sv.noise.per_sample(seed, [0, 1, 2])(draw, like) for seed in (3, 4) for draw in (0, 1)]
    rows = torch.cat([*draws, sv.noise.per_sample(3, [0, 1, 2]).initial(5)])
    assert len({tuple(row.tolist()) for row in rows}) == 15
    assert torch.equal(sv.noise.per_sample(3, [7, 2])(1, like[:2])[1], draws[1][2])


# Files


@given(savable, schedules, half_logsnrs())
def test_a_saved_plan_comes_back_to_the_byte(method, schedule, lam):
    """24."""
    schedule = SCHEDULES[schedule]
    plan = METHODS[method](schedule, schedule.time(lam))
    text = plan.to_json()
    again = sv.Plan.from_json(text)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.to_json() == text


bytes_of_json = st.sampled_from(b'0123456789-+.eE[]{},:"x\x00\xff')


@given(
    savable,
    st.lists(st.tuples(st.integers(0, 10**6), bytes_of_json | st.integers(0, 255)), min_size=1, max_size=4),
)
def test_a_damaged_plan_is_refused_or_is_a_plan(tmp_path_factory, method, damage):
    """24: whatever bytes are changed, nothing but ValueError comes out; what is read back is a plan, and writes itself."""
    plan = METHODS[method](sv.VP(), sv.logsnr(sv.VP(), 4))
    file = tmp_path_factory.getbasetemp() / "damaged.json"
    content = bytearray(plan.to_json().encode())
    for where, value in damage:
        content[where % len(content)] = value
    file.write_bytes(content)
    try:
        again = sv.Plan.load(file)
    except ValueError:
        return
    assert sv.Plan.from_json(again.to_json()) == again


@given(
    st.text(max_size=200)
    | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists, max_leaves=20).map(str)
)
def test_no_text_is_a_plan_by_accident(text):
    with pytest.raises(ValueError, match=r"not a plan|characters"):
        sv.Plan.from_json(text)


def test_a_plan_is_the_same_text_in_another_process():
    """24: and the text is what identifies it."""
    line = "import solvers as sv; print(sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5)).to_json(), end='')"
    env = os.environ | {"PYTHONHASHSEED": "17"}
    root = Path(__file__).parents[1]
    there = subprocess.run(
        [sys.executable, "-c", line], env=env, cwd=root, capture_output=True, text=True, check=True
    )
    assert there.stdout == sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5)).to_json()


# The tests above have power: the errors they are there for are seen.


def test_a_planted_error_is_seen():
    """A weight off by a millionth is refused by the plan; one that keeps it consistent, by constant noise or the clock."""
    plan = sv.dpm_solver_pp(sv.VP(), sv.logsnr(sv.VP(), 5))
    with pytest.raises(ValueError, match="not consistent"):
        sv.Plan(plan.times, plan.alpha, plan.sigma, plan.a, plan.b * (1 + 1e-6), predicts="data")
    gaussian = Gaussian(torch.zeros(3), torch.eye(3))
    x = randn(0, 2, 3)
    right, wrong = (
        sv.run(plan, sv.Model(gaussian.model(sv.VP(), p), "velocity"), x) for p in ("velocity", "noise")
    )
    assert apart(wrong, right) > 1e-3

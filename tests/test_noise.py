"""Brownian paths: what is drawn, of what it is independent, and that on one path more steps converge."""

import functools
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import NARROW, VP, line_model, starts
from reference import slopes
from solvers.noise import LEAST_STEP

INF = math.inf
CLOCK = [
    -INF,
    -6.0,
    -5.999,
    -1.0,
    0.0,
    1e-4,
    2.0,
    9.0,
    9.0002,
    INF,
]  # steps of every length, on both sides of 0


def brownian(clock=CLOCK, seed=0, ids=(0,)):
    return sv.noise.brownian(seed, ids, torch.as_tensor(clock, dtype=torch.float64))


def draws(source, elements=10_000):
    """Every draw of one sample, [steps, elements]."""
    like = torch.zeros(1, elements, dtype=torch.float64)
    return torch.cat([source(i, like) for i in range(len(source.clock) - 1)])


def assert_uncorrelated(a, b):
    assert abs((a * b).mean()) < 4.5 / a.numel() ** 0.5


# What is drawn


@pytest.mark.parametrize("clock", [CLOCK, [-90.0, -89.0, 0.0, 89.0, 90.0], [-0.001, -1e-4, 1e-4, 0.001]])
def test_increments_are_independent_standard_normals(clock):
    z = draws(brownian(clock))
    n = z.shape[1]
    assert (z.mean(1).abs() < 4.5 / n**0.5).all()
    assert (((z**2).mean(1) - 1).abs() < 4.5 * (2 / n) ** 0.5).all()
    assert (((z**4).mean(1) - 3).abs() < 4.5 * (96 / n) ** 0.5).all()
    products = z @ z.T / n - torch.diag((z**2).mean(1))
    assert products.abs().max() < 4.5 / n**0.5


@pytest.mark.parametrize("start", [-8.0, -0.001, 5.0])
def test_the_smallest_steps_are_no_smaller_than_they_should_be(start):
    """Where the path is halved no further, and neighbours share the last half."""
    z = draws(brownian(start + 1.01 * LEAST_STEP * torch.arange(31, dtype=torch.float64)), 3000)
    assert abs((z**2).mean() - 1) < 4.5 * (2 / z.numel()) ** 0.5
    assert_uncorrelated(z[:-1], z[1:])


def test_samples_and_seeds_are_independent_and_the_other_streams_too():
    like = torch.zeros(40, 300, dtype=torch.float64)
    path, other = (brownian(seed=seed, ids=range(40)) for seed in (0, 1))
    z = path(3, like)
    assert abs((z**2).mean() - 1) < 4.5 * (2 / z.numel()) ** 0.5
    plain = sv.noise.per_sample(0, range(40))
    initial = plain.initial(300, dtype=torch.float64)
    for step in range(9):
        assert_uncorrelated(z, other(step, like))
        assert_uncorrelated(z, plain(step, like))
        assert_uncorrelated(path(step, like), initial)
    assert_uncorrelated(z[:-1], z[1:])


def test_fine_increments_add_up_to_the_coarse_one():
    """W(u_t) - W(u_s) with u = e^{2T}, however the way is cut."""
    fine = torch.tensor([-INF, -5.0, -4.999, -2.0, -0.3, 0.0, 0.0001, 0.7, 1.9, 2.0, 5.0])
    like = torch.zeros(2, 7, dtype=torch.float64)
    parts, length = brownian(fine, ids=[4, 1]), torch.exp(2 * fine.double()).diff().sqrt()
    for coarse in ([0, 2, 10], [1, 4, 6, 9]):
        whole = brownian(fine[coarse], ids=[4, 1])
        for k, (i, j) in enumerate(zip(coarse[:-1], coarse[1:], strict=True)):
            total = length[i:j].norm()
            added = sum(parts(m, like) * length[m] for m in range(i, j))
            assert_close(added / total, whole(k, like), rtol=0, atol=1e-12)


def test_a_fine_grid_is_the_same_path_far_out_on_either_side():
    """In units of the increment over the whole step; at T = 40 and -40 alike."""
    like = torch.zeros(1, 5, dtype=torch.float64)
    for start in (-40.0, 39.0):
        clock = start + torch.linspace(0, 1, 24, dtype=torch.float64)
        weight = torch.exp(clock - clock[-1]) ** 2
        source, length = brownian(clock), weight.diff().sqrt()
        added = sum(source(m, like) * length[m] for m in range(23)) / length.norm()
        assert_close(added, brownian(clock[[0, -1]])(0, like), rtol=0, atol=1e-12)


def test_the_step_to_infinity_is_one_draw_wherever_it_starts():
    like = torch.zeros(1, 5, dtype=torch.float64)
    last = [brownian([start, INF])(0, like) for start in (-INF, -3.0, 0.0, 8.0)]
    assert all(torch.equal(z, last[0]) for z in last)


def test_a_sample_s_path_depends_on_seed_and_sample_alone():
    like = torch.zeros(3, 2, 5, dtype=torch.float64)
    together = brownian(seed=7, ids=[4, 9, 2])
    alone, moved = brownian(seed=7, ids=[9]), brownian(seed=7, ids=[2, 4, 9])
    for step in range(9):
        z = together(step, like)
        assert torch.equal(z[1:2], alone(step, like[:1]))
        assert torch.equal(z, moved(step, like)[[1, 2, 0]])
        assert torch.equal(z, together(step, like))
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(z.to(dtype), together(step, like.to(dtype)))
        for other in (brownian(seed=8, ids=[4, 9, 2]), brownian(seed=7, ids=[5, 10, 3])):
            assert (z - other(step, like)).abs().amax((1, 2)).min() > 0.1


def test_no_global_generator_is_touched():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    draws(brownian(), 3)
    sv.run(sv.ddpm(VP, sv.logsnr(VP, 3)), lambda x, t: x, torch.zeros(2, 3), noise=0)
    assert torch.equal(states[0], torch.get_rng_state())
    assert random.getstate() == states[1]
    legacy = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(legacy, states[2], strict=True))


# What is refused


def test_steps_too_small_for_the_path_are_refused():
    like = torch.zeros(1, 3)
    for start in (-7.0, 0.0, 3.0):
        assert brownian([start, start + 1.01 * LEAST_STEP])(0, like).isfinite().all()
        with pytest.raises(ValueError, match=r"T from .* expected an increase by more than 2.38419e-07"):
            brownian([start, start + 0.99 * LEAST_STEP])(0, like)


def test_a_clock_may_stand_still_where_nothing_is_drawn():
    """As where tau(t) = 0."""
    plan = sv.sa_solver(VP, sv.logsnr(VP, 6), order=2, corrector=0, tau=lambda t: (t < 0.4).double())
    clock = torch.cat([torch.zeros(1), (plan.half_logsnr.diff() * (plan.times[1:] < 0.4)).cumsum(0)])
    x = sv.run(plan, lambda x, t: x.tanh(), torch.ones(2, 3).double(), noise=brownian(clock, ids=range(2)))
    assert x.isfinite().all()
    with pytest.raises(ValueError, match="expected an increase"):
        brownian(clock)(0, torch.zeros(1, 3))


@pytest.mark.parametrize("clock", [[1.0, 0.0], [0.0], [[0.0, 1.0]], [0.0, math.nan]])
def test_clocks_that_fall_are_refused(clock):
    with pytest.raises(
        ValueError, match=r"clock = .*expected T at the times of the plan, \[N\+1\], not falling"
    ):
        brownian(clock)


def test_seeds_ids_and_draws_out_of_range_are_refused():
    with pytest.raises(ValueError, match="seed = -1"):
        brownian(seed=-1)
    with pytest.raises(ValueError, match="ids has a sample twice"):
        brownian(ids=[3, 3])
    for draw in (-1, 9):
        with pytest.raises(ValueError, match=f"draw = {draw}: the clock has 9 steps"):
            brownian()(draw, torch.zeros(1, 3))


def test_a_clock_too_far_from_zero_is_refused():
    """e^{2T} must be a number."""
    assert brownian([-300.0, 300.0])(0, torch.zeros(1, 3)).isfinite().all()
    with pytest.raises(ValueError, match="clock has T = 400: expected -300 to 300"):
        brownian([0.0, 400.0])


def test_a_default_device_moves_no_path():
    like = torch.zeros(1, 3)
    for clock in ([-1.0, 2.0], [-INF, 0.5]):
        path = brownian(clock)
        expected = path(0, like)
        with torch.device("meta"):
            assert torch.equal(path(0, like), expected)


def test_paths_of_another_batch_are_refused_before_the_first_call():
    plan, calls = sv.ddpm(VP, sv.logsnr(VP, 4)), []
    source = brownian(plan.half_logsnr, ids=range(3))
    with pytest.raises(ValueError, match="noise is for 3 samples, but the batch has 4"):
        sv.run(plan, lambda x, t: calls.append(t) or x, torch.zeros(4, 2), noise=source)
    assert calls == []


@pytest.mark.parametrize("steps", [3, 5])
def test_a_clock_of_another_grid_is_refused_before_the_first_call(steps):
    plan, calls = sv.ddpm(VP, sv.logsnr(VP, 4)), []
    source = brownian(VP.half_logsnr(sv.logsnr(VP, steps)), ids=range(2))
    with pytest.raises(ValueError, match=f"clock has {steps} steps"):
        sv.run(plan, lambda x, t: calls.append(t) or x, torch.zeros(2, 2), noise=source)
    assert calls == []


# Runs


def test_a_run_on_a_path_does_not_know_its_batch():
    plan = sv.seeds(VP, sv.logsnr(VP, 5))

    def model(x, t):
        return (x * 0.3).sin()

    x = torch.linspace(-2, 2, 21, dtype=torch.float64).reshape(3, 7)
    together = sv.run(plan, model, x, noise=brownian(plan.half_logsnr, 3, [5, 0, 8]))
    for i, sample in enumerate((5, 0, 8)):
        alone = sv.run(plan, model, x[i : i + 1], noise=brownian(plan.half_logsnr, 3, [sample]))
        assert torch.equal(alone, together[i : i + 1])
    single = sv.run(plan, model, x.float(), noise=brownian(plan.half_logsnr, 3, [5, 0, 8]))
    assert_close(single.double(), together, rtol=1e-5, atol=1e-5)


def test_ends_of_infinite_half_logsnr_have_their_place_on_the_path():
    flow = sv.Flow()
    plan = sv.ddpm(flow, sv.uniform(flow, 6))
    assert plan.half_logsnr[[0, -1]].tolist() == [-INF, INF]
    ended = sv.run(
        plan,
        sv.Model(lambda x, t: -x, "flow"),
        torch.ones(2, 3),
        noise=brownian(plan.half_logsnr, ids=[0, 1]),
    )
    assert ended.isfinite().all()


MEAN, VARIANCE, SIZE = 0.4, 0.3, 1000
COUNTS, FINE = (16, 32, 64), 512


def gaussian_model(x, t):
    """The exact noise prediction of N(0.4, 0.3)."""
    alpha, sigma = VP.alpha(t[:1]), VP.sigma(t[:1])
    return sigma * (x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)


@functools.cache
def path(*clock):
    """The draws of SIZE independent paths, which are the elements of one sample, [steps, SIZE, 1]."""
    return draws(brownian(clock, seed=5), SIZE)[..., None]


def ended(build, problem, steps, eta):
    plan = build(VP, sv.logsnr(VP, steps, start=NARROW[0], stop=NARROW[1]))
    z = path(*(eta * plan.half_logsnr).tolist())
    model = gaussian_model if problem == "gaussian" else line_model(VP)
    return sv.run(plan, model, starts("line", NARROW, SIZE), noise=lambda draw, like: z[draw])


@functools.cache
def answer(problem, eta):
    """Of the line, a fine run. Of Gaussian data, the SDE's solution driven by the path, by the midpoint rule.

    y = (x - alpha mu) e^T / sigma has dy = (1 + eta) v / (v + rho^2) y dlambda + dW(e^2T), so that y / M is
    int dW / M, M = (1 + v / rho^2)^((1 + eta) / 2).
    """
    if problem == "line":
        return ended(partial(sv.dpm_solver_pp_sde, eta=eta), problem, FINE, eta)
    times = sv.logsnr(VP, FINE, start=NARROW[0], stop=NARROW[1])
    alpha, sigma, lam = VP.alpha(times), VP.sigma(times), VP.half_logsnr(times)

    def growth(lam):
        return (1 + VARIANCE * torch.exp(2 * lam)) ** ((1 + eta) / 2)

    scale, clock = sigma * torch.exp(-eta * lam), eta * lam
    step = torch.exp(2 * clock).diff().sqrt() / growth((lam[1:] + lam[:-1]) / 2)
    noise = (path(*clock.tolist()) * step[:, None, None]).sum(0)
    begin = (starts("line", NARROW, SIZE) - alpha[0] * MEAN) / scale[0] / growth(lam[0])
    return alpha[-1] * MEAN + scale[-1] * growth(lam[-1]) * (begin + noise)


def rms(x):
    return x.square().mean().sqrt().item()


STRONG = {  # methods and the tau^2 of the SDE that they are of
    "ddpm": (sv.ddpm, 1.0),
    "ddpm large": (partial(sv.ddpm, variance="large"), 1.0),
    "dpm_solver_pp_sde 2M": (sv.dpm_solver_pp_sde, 1.0),
    "dpm_solver_pp_sde 3M half": (partial(sv.dpm_solver_pp_sde, order=3, eta=0.5), 0.5),
    "dpm_solver_sde 2": (sv.dpm_solver_sde, 1.0),
    "sa_solver": (sv.sa_solver, 1.0),
    "sa_solver half": (partial(sv.sa_solver, tau=0.5**0.5), 0.5),
    "seeds 2": (partial(sv.seeds, order=2), 1.0),
    "seeds 3 half": (partial(sv.seeds, eta=0.5), 0.5),
    "er_sde": (partial(sv.er_sde, noise_scale=lambda rho: rho**2), 1.0),
    "ddim half": (partial(sv.ddim, eta=0.5**0.5), 0.5),
    "euler_maruyama": (sv.euler_maruyama, 1.0),
    "euler_maruyama half": (partial(sv.euler_maruyama, eta=0.5), 0.5),
    "reverse_diffusion": (sv.reverse_diffusion, 1.0),
}


@pytest.mark.parametrize(
    ("name", "problem"),
    [(name, "gaussian") for name in STRONG] + [(name, "line") for name in STRONG if STRONG[name][1] == 1],
)
def test_runs_on_one_path_converge_to_one_answer_with_order_1(name, problem):
    """Strongly: also the steps in t, whose noise is the path's only up to the square of the step."""
    build, eta = STRONG[name]
    counts = [n // 2 for n in COUNTS] if "seeds" in name else COUNTS
    errors = [rms(ended(build, problem, n, eta) - answer(problem, eta)) for n in counts]
    assert slopes(errors).mean() == pytest.approx(1, abs=0.25), errors
    assert slopes(errors).min() > 0.4
    assert errors[-1] < 0.1


def test_a_fine_run_is_the_exact_solution_on_its_path():
    fine = ended(sv.dpm_solver_pp_sde, "gaussian", FINE, 1.0)
    assert rms(fine - answer("gaussian", 1.0)) < 1e-3


@pytest.mark.parametrize("method", [sv.ddpm, sv.sa_solver, sv.euler_maruyama])
def test_with_plain_noise_more_steps_do_not_converge(method):
    """Every grid has a path of its own, so runs stay as far apart as independent samples."""
    x, model = starts("line", NARROW, SIZE).T, line_model(VP)
    plans = [method(VP, sv.logsnr(VP, n, start=NARROW[0], stop=NARROW[1])) for n in COUNTS]
    fine = ended(method, "line", COUNTS[-1], 1.0)

    def end(plan):
        source = sv.noise.per_sample(5, [0])
        return sv.run(plan, model, x.T, noise=lambda draw, like: source(draw, like.T).T)

    apart = [rms(a - b) for a, b in zip(map(end, plans[:-1]), map(end, plans[1:]), strict=True)]
    spread = rms(fine - fine.mean())
    assert min(apart) > 0.4 * spread
    assert apart[-1] > 0.8 * apart[0]
    refined = rms(ended(method, "line", COUNTS[-2], 1.0) - fine)
    assert refined < 0.2 * apart[-1]


def test_ids_may_be_a_tensor_and_must_be_many():
    assert sv.noise.per_sample(3, torch.arange(4)) == sv.noise.per_sample(3, range(4))
    with pytest.raises(TypeError, match=r"ids = 4: expected the samples' numbers, e.g. range\(4\)"):
        sv.noise.per_sample(3, 4)

"""Published samplers, read off as tables by `trace`, equal ours where they are right, and named where they are not."""

import dataclasses
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import VP
from reference import row_order, rows, trace

PEERS_WARN = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
EDM = sv.EDM()
SIGMAS = EDM.time(torch.tensor([-3.0, -2.2, -1.8, -0.7, 0.1, 0.9, 1.7, 3.0], dtype=torch.float64))
TO_ZERO = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])


def ours(plan, predicts="noise"):
    """Our executor read off like any other sampler: the states of each call in terms of x and the network's outputs."""

    def sampler(model, x, noise):
        return sv.run(plan, sv.Model(model, predicts=predicts), x)

    return trace(sampler, plan.nfe)


# --- k-diffusion (crowsonkb/k-diffusion, sampling.py), as loops: model(x, sigma) -> denoised, alpha = 1 -------------


def kdiffusion_2m(model, x, sigmas):
    previous = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        h = sigmas[i].log() - sigmas[i + 1].log()
        target = denoised
        if previous is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            target = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * target
        previous = denoised
    return x


def kdiffusion_dpm_2(model, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        middle = (s.log() + t.log()).div(2).exp()
        stage = x + (x - model(x, s)) / s * (middle - s)
        x = x + (stage - model(stage, middle)) / middle * (t - s)
    return x


def kdiffusion_dpmpp_2s(model, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = s.log() - t.log()
        middle = (s.log() + t.log()).div(2).exp()
        stage = middle / s * x - torch.expm1(-h / 2) * model(x, s)
        x = t / s * x - torch.expm1(-h) * model(stage, middle)
    return x


def kdiffusion_3m(model, x, sigmas, doubled=False):
    """sample_dpmpp_3m_sde with eta = 0; `doubled` repairs its second difference."""
    outputs, steps = [], []
    for i in range(len(sigmas) - 1):
        outputs.append(model(x, sigmas[i]))
        h = sigmas[i].log() - sigmas[i + 1].log()
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * outputs[-1]
        phi_2 = torch.expm1(-h) / h + 1
        if i >= 2:
            r0, r1 = steps[-1] / h, steps[-2] / h
            d0, d1 = (outputs[-1] - outputs[-2]) / r0, (outputs[-2] - outputs[-3]) / r1
            slope, curvature = d0 + (d0 - d1) * r0 / (r0 + r1), (d0 - d1) / (r0 + r1)
            phi_3 = phi_2 / h - 0.5
            x = x + phi_2 * slope - phi_3 * curvature * (2 if doubled else 1)
        elif i == 1:
            x = x + phi_2 * (outputs[-1] - outputs[-2]) / (steps[-1] / h)
        steps.append(h)
    return x


@pytest.mark.parametrize(
    ("loop", "method", "sigmas"),
    [
        (kdiffusion_2m, partial(sv.dpm_solver_pp, order=2), SIGMAS),
        (kdiffusion_2m, partial(sv.dpm_solver_pp, order=2), TO_ZERO),
        (kdiffusion_dpm_2, partial(sv.dpm_solver, order=2), SIGMAS),
        (kdiffusion_dpmpp_2s, partial(sv.dpm_solver_pp, order=2, kind="singlestep"), SIGMAS),
        (
            partial(kdiffusion_3m, doubled=True),
            partial(sv.exponential_adams, order=3, predicts="data"),
            SIGMAS,
        ),
    ],
    ids=["2m", "2m to sigma 0", "dpm_2", "2s", "3m repaired"],
)
def test_kdiffusion_is_our_table(loop, method, sigmas):
    plan = method(EDM, sigmas)
    theirs = trace(lambda model, x, noise: loop(model, x, sigmas), plan.nfe)
    assert_close(ours(plan, "data"), theirs, rtol=1e-12, atol=1e-12)


def as_method(loop):
    """A published loop as one of our methods: traced on the times it is given, and folded to rows."""

    def build(schedule, times):
        steps = len(times) - 1
        weights = trace(lambda model, x, noise: loop(model, x, schedule.sigma(times)), steps)
        a, b, _ = rows(weights, steps)
        return sv.Plan(
            times, schedule.alpha(times), schedule.sigma(times), a, b.round(decimals=14), predicts="data"
        )

    return build


def test_kdiffusion_3m_is_of_second_order_and_of_third_with_its_second_difference_doubled():
    """It is h^2 m'' / 2, and is multiplied by the weight of h^2 m''. History is exact, so the start is not to blame."""
    shape = [1.0, 2.0, 1.5, 0.8]
    released = row_order(as_method(kdiffusion_3m), EDM, 0.5, shape, 0.02, degree=3)
    repaired = row_order(as_method(partial(kdiffusion_3m, doubled=True)), EDM, 0.5, shape, 0.02, degree=3)
    assert released == pytest.approx(2, abs=0.1)
    assert repaired == pytest.approx(3, abs=0.1)


# --- the DPM-Solver authors (LuChengTHU/dpm-solver), in noise form as printed ----------------------------------------


def authors_singlestep_3(model, x, times, schedule, r1=1 / 3, r2=2 / 3):
    """Algorithm 5 of arXiv 2206.00927 (solver_type "dpmsolver")."""
    for s, t in zip(times[:-1], times[1:], strict=True):
        lam_s, lam_t = schedule.half_logsnr(s), schedule.half_logsnr(t)
        h = lam_t - lam_s
        s1, s2 = schedule.time(lam_s + r1 * h), schedule.time(lam_s + r2 * h)
        alpha, sigma = schedule.alpha, schedule.sigma
        m0 = model(x, s)
        u1 = alpha(s1) / alpha(s) * x - sigma(s1) * torch.expm1(r1 * h) * m0
        d1 = model(u1, s1) - m0
        phi = torch.expm1(r2 * h) / (r2 * h) - 1
        u2 = alpha(s2) / alpha(s) * x - sigma(s2) * (torch.expm1(r2 * h) * m0 + r2 / r1 * phi * d1)
        d2 = model(u2, s2) - m0
        x = alpha(t) / alpha(s) * x - sigma(t) * (torch.expm1(h) * m0 + (torch.expm1(h) / h - 1) * d2 / r2)
    return x


def test_authors_dpm_solver_3_is_our_table():
    times = sv.logsnr(VP, 3)
    theirs = trace(lambda model, x, noise: authors_singlestep_3(model, x, times, VP), 9)
    assert_close(ours(sv.dpm_solver(VP, times, 3)), theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("nfe", range(1, 40))
def test_dpm_solver_fast_allocates_as_its_authors_do(nfe):
    """Section 3.4: K = nfe // 3 + 1 outer steps, orders [3] * (K - 2) + [2, 1], [3] * (K - 1) + [1] or + [2]."""
    outer = nfe // 3 + 1
    orders = {0: [3] * (outer - 2) + [2, 1], 1: [3] * (outer - 1) + [1], 2: [3] * (outer - 1) + [2]}[nfe % 3]
    plan = sv.dpm_solver_fast(VP, nfe)
    assert plan.nfe == sum(orders) == nfe
    first_calls = torch.tensor([0, *orders]).cumsum(0)
    assert_close(plan.times[first_calls], sv.logsnr(VP, outer), rtol=0, atol=0)


# --- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_states(scheduler, steps):
    """The scheduler's own loop read off as a table, and the grid it stood on, as our times."""
    scheduler.set_timesteps(steps)
    levels = scheduler.config.num_train_timesteps

    def sampler(model, x, noise):
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).float(), t, x.float()).prev_sample
        return x.double()

    times = torch.cat([(scheduler.timesteps.double() + 1) / levels, torch.zeros(1, dtype=torch.float64)])
    return trace(sampler, len(scheduler.timesteps)), times


def peer(name, **config):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, name)(**betas, **config)
    return scheduler, sv.Discrete.from_alphas_cumprod(scheduler.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@PEERS_WARN
def test_diffusers_multistep_is_our_table(algorithm, order, spacing):
    zero = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    scheduler, schedule = peer(
        "DPMSolverMultistepScheduler",
        algorithm_type=algorithm,
        solver_order=order,
        timestep_spacing=spacing,
        final_sigmas_type=zero,
        lower_order_final=False,
        steps_offset=1,
    )
    theirs, times = diffusers_states(scheduler, 8)
    if zero == "sigma_min":
        if times[-2] == 1 / 1000:
            pytest.skip("diffusers repeats its last level here: a step of no length")
        times[-1] = 1 / 1000
    method = sv.dpm_solver_pp if algorithm == "dpmsolver++" else sv.dpm_solver_multistep
    assert_close(ours(method(schedule, times, order)), theirs, rtol=2e-4, atol=2e-5)


@PEERS_WARN
def test_diffusers_third_order_multistep_has_the_rows_of_second_order():
    """Ours but for its third-order rows, and those of k-diffusion's 3M: the halved second difference shown above."""
    scheduler, schedule = peer(
        "DPMSolverMultistepScheduler", solver_order=3, timestep_spacing="trailing", lower_order_final=False
    )
    theirs, times = diffusers_states(scheduler, 8)
    plan = sv.dpm_solver_pp(schedule, times, 3)
    gap = (ours(plan) - theirs).abs().amax(1)
    assert gap[:3].max() < 1e-4  # x, and the steps of order 1 and 2
    assert gap[3:].min() > 1e-2

    rho = (plan.sigma / plan.alpha)[:-1]  # its last step, to sigma 0, is of first order
    weights = trace(lambda model, x, noise: kdiffusion_3m(model, x, rho), plan.nfe - 1)  # of x / alpha
    released = plan.b.clone()
    for i in range(2, plan.nfe - 1):
        step = weights[i + 1] - rho[i + 1] / rho[i] * weights[i]
        released[i] = plan.alpha[i + 1] * step[[i + 1, i, i - 1]]
    assert_close(ours(dataclasses.replace(plan, b=released)), theirs, rtol=2e-4, atol=2e-5)


def test_diffusers_ddim_is_our_table():
    scheduler, schedule = peer(
        "DDIMScheduler", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    theirs, times = diffusers_states(scheduler, 8)
    assert_close(ours(sv.ddim(schedule, times)), theirs, rtol=1e-4, atol=1e-5)


def test_diffusers_ddim_leaves_its_own_grid_where_the_stride_does_not_divide_the_levels():
    """It steps to t - 1000 // n whatever the next time is (failures.md B5)."""
    scheduler, schedule = peer(
        "DDIMScheduler", clip_sample=False, timestep_spacing="linspace", set_alpha_to_one=True
    )
    theirs, times = diffusers_states(scheduler, 7)
    assert (ours(sv.ddim(schedule, times)) - theirs).abs().max() > 1e-2

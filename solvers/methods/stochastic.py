"""SDE methods: DDPM, Euler-Maruyama, reverse diffusion, SDE-DPM-Solver(++), SA-Solver, SEEDS, ER-SDE."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from solvers.arguments import choice, number, numbers, whole
from solvers.methods.exponential import (
    Clock,
    Form,
    Levels,
    elapsed,
    noise_weight,
    refuse_no_data_at_start,
    refuse_upwards,
)
from solvers.methods.multistep import (
    FINALS,
    MAX_ORDER,
    adams_rows,
    ddim,
    dpm_solver_multistep,
    dpm_solver_pp,
    orders_of_steps,
)
from solvers.methods.singlestep import runge_kutta, singlestep
from solvers.methods.tableaux import dpm_solver_2, euler, third_order
from solvers.methods.unipc import corrected_rows
from solvers.plan import Piece, Plan
from solvers.predictions import path_derivative
from solvers.schedules import Schedule

FAR = 230.0  # half log-SNR that is as good as infinite, and rho = e^230 still a number
NO_DRIFT = "where the drift alpha' / alpha is infinite"
DDPM_VARIANCES = ("small", "large", "learned")


def ddpm(schedule: Schedule, times: Tensor, variance: str = "small") -> Plan:
    """DDPM: the mean of the posterior q(x_t | x_s, x_0) at the predicted x_0, with the posterior's variance or a larger one.

    Order 1; 1 call per step; SDE; data form. The small variance sigma_t^2 (1 - e^{-2h}) is right for data in one point, the
    large one sigma_s^2 (1 - e^{-2h}) on VP for N(0, I); "learned" takes them as the ends between which the model's second
    output chooses. A step to sigma = 0 adds no noise. These are the ancestral samplers of score SDE: large on VP, small on VE.
    Source: Ho et al. 2020 (arXiv 2006.11239), section 3.2; learned: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        variance: "small" | "large" | "learned" (with Model(net, variance="range")).
    """
    choice("variance", variance, DDPM_VARIANCES, {"fixed_small": "small", "fixed_large": "large"})
    plan = ddim(schedule, times, eta=1.0)
    if variance == "small":
        return plan
    levels = Levels.of(schedule, times)
    large = levels.sigma[:-1] ** 2 * -torch.expm1(-2 * levels.half_logsnr.diff())
    large = torch.where(levels.sigma[1:] == 0, 0.0, large)
    if variance == "large":
        return replace(plan, c=torch.sqrt(large)[:, None])
    cap = torch.where(large > 0, math.inf, 0.0)
    variances = torch.stack([plan.c[:, 0] ** 2, large, cap], 1)
    return replace(plan, c=plan.c[:, :0], variances=variances, second="range")


def euler_maruyama(schedule: Schedule, times: Tensor, eta: float = 1.0) -> Plan:
    """Euler-Maruyama: one step in t of dx = [f x - (1 + eta) / 2 g^2 s] dt + sqrt(eta) g dw, s the score.

    Order 1; 1 call per step; SDE; noise form. A step to sigma = 0 adds no noise.
    Source: Song et al. 2021 (arXiv 2011.13456), eq. 6, with g scaled as in appendix D.3's family. Differs: dt is the grid's
    step; the released code takes 1 / N on a grid of N points.

    Args:
        schedule: noise schedule, with alpha > 0 on the grid.
        times: [steps + 1].
        eta: tau^2, 1 for the reverse SDE; 0 is Euler's method for the ODE.
    """
    stochasticity("eta", eta)
    levels = Levels.of(schedule, times)
    refuse_upwards(levels)
    s, dt = levels[:-1], levels.times.diff()
    refuse_no_data_at_start(NO_DRIFT, levels)
    f, g2 = drift_and_diffusion(schedule, s)
    b = (1 + eta) / 2 * g2 / s.sigma * dt
    c = torch.where(levels.sigma[1:] == 0, 0.0, torch.sqrt(eta * g2 * -dt))[:, None]
    return Plan(
        levels.times, levels.alpha, levels.sigma, 1 + f * dt, b[:, None], c, "noise", consistent=False
    )


def drift_and_diffusion(schedule: Schedule, at: Levels) -> tuple[Tensor, Tensor]:
    """f and g^2 of the forward SDE dx = f x dt + g dw at some levels with alpha > 0: alpha' / alpha and 2 sigma (sigma' - f sigma)."""
    alpha_dot, sigma_dot = path_derivative(schedule, at.times, at.alpha, at.sigma)
    f = alpha_dot / at.alpha
    return f, 2 * at.sigma * (sigma_dot - f * at.sigma)


def reverse_diffusion(schedule: Schedule, times: Tensor) -> Plan:
    """The reverse-diffusion predictor: with x_s = x_t + F(x_t) + G z the forward step, x_t = x_s - F(x_s) + G^2 s + G z.

    Order 1; 1 call per step; SDE; noise form. F = (alpha_s / alpha_t - 1) x, G^2 = sigma_s^2 (1 - e^{-2h}). A step to sigma = 0
    adds no noise.
    Source: Song et al. 2021 (arXiv 2011.13456), eq. 46, whose VP and VE forms this is on any grid.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
    """
    levels = Levels.of(schedule, times)
    refuse_upwards(levels)
    refuse_no_data_at_start(NO_DRIFT, levels)
    s, t = levels[:-1], levels[1:]
    g2 = s.sigma**2 * -torch.expm1(-2 * (t.half_logsnr - s.half_logsnr))
    c = torch.where(t.sigma == 0, 0.0, torch.sqrt(g2))[:, None]
    a, b = 2 - s.alpha / t.alpha, -g2 / s.sigma
    return Plan(levels.times, levels.alpha, levels.sigma, a, b[:, None], c, "noise", consistent=False)


def dpm_solver_pp_sde(
    schedule: Schedule, times: Tensor, order: int = 2, eta: float = 1.0, final: str = "full"
) -> Plan:
    """SDE-DPM-Solver++ 1, 2M, 3M: the multistep method with the exact kernel of the SDE, and one draw of noise per step.

    Order 1 in law at order 1, else 2 (with eta = 0 that of `dpm_solver_pp`); 1 call per step; SDE; data form. With eta = 0 it is
    `dpm_solver_pp`; with eta = 1 and order 1 the DDPM posterior step.
    Source: Lu et al. 2022 (arXiv 2211.01095), section 6, and k-diffusion's sample_dpmpp_2m_sde ("midpoint"), _3m_sde, whose eta
    it is. Differs: the third order there has half the second difference, in diffusers a wrong constant; here it is exact, with
    "midpoint" in its second step too (`sa_solver` with order=3, corrector=0, tau=eta^0.5 has all of k-diffusion's, put right).

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: 1, 2 or 3.
        eta: tau^2 of the SDE, 1 for the reverse SDE, any number from 0.
        final: "full" | "lower"; "lower" ends with orders ..., 2, 1.
    """
    return _sde_of(dpm_solver_pp, "data", schedule, times, order, eta, final)


def dpm_solver_sde(
    schedule: Schedule, times: Tensor, order: int = 2, eta: float = 1.0, final: str = "full"
) -> Plan:
    """SDE-DPM-Solver: the same in noise form.

    Order 1 in law at order 1, else 2 (with eta = 0 that of `dpm_solver_multistep`); 1 call per step; SDE; noise form. It adds more
    noise than data in one point have, by (tau^2 + tau^4) (e^h - 1)^2 of the variance in a step: data form is the better one.
    A step to sigma = 0 is the ODE's.
    Source: Lu et al. 2022 (arXiv 2211.01095), section 6.
    See `dpm_solver_pp_sde` for the arguments.
    """
    return _sde_of(dpm_solver_multistep, "noise", schedule, times, order, eta, final)


def sa_solver(
    schedule: Schedule,
    times: Tensor,
    order: int = 3,
    corrector: int = 4,
    tau: float | Callable[[Tensor], Tensor] = 1.0,
    final: str = "full",
) -> Plan:
    """SA-Solver: stochastic Adams, a predictor and, once the model is called at its end, a corrector with the same noise.

    Order 2 in law, 1 at order 1 without corrector; 1 call per step; SDE; data form. With tau = 0 it is Adams-Bashforth-Moulton, of order
    one above the predictor's. The last step is not corrected, which would cost a call.
    Source: Xue et al. 2023 (arXiv 2309.05019), algorithm 1. Differs: weights from moments about the call, where the released code's
    powers of lambda lose digits; each step has the tau of its end, as there.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: of the predictor, 1 to 8.
        corrector: of the corrector, which reads the new call and `corrector - 1` before it, 2 to 9; 0 for none.
        tau: stochasticity, a number from 0 or a function of the times that steps end at, [steps] -> [steps].
        final: "full" | "lower"; "lower" ends with lower orders.
    """
    whole("order", order, 1, MAX_ORDER)
    if corrector:
        whole("corrector", corrector, 2, MAX_ORDER + 1)
    choice("final", final, FINALS)
    levels = Levels.of(schedule, times)
    taus = numbers("tau", tau(levels.times[1:]) if callable(tau) else tau)
    taus = taus.expand(len(levels.times) - 1) if taus.ndim == 0 else taus
    if taus.shape != levels.times[1:].shape or not (taus.isfinite() & (taus >= 0)).all():
        raise ValueError(
            f"tau = {taus!s:.200}: expected a finite number from 0 for each of the {len(levels.times) - 1} steps"
        )
    if (taus > 0).any():
        levels = replace(levels, clock=_by_step(levels, taus**2))
    form = Form("data", clock=None if levels.clock is None else constant(1.0))  # linear in each step
    rows = _adams_sde(schedule, levels, form, order, final, "vary_coeff")
    if corrector:
        orders = orders_of_steps(levels, form, corrector - 1, final)
        ends = torch.arange(len(levels), device="cpu")
        rows = rows._replace(b=corrected_rows(rows.a, rows.b, levels, form, ends, orders, "vary_coeff"))
    return rows.plan("data")


def seeds(schedule: Schedule, times: Tensor, order: int = 3, eta: float = 1.0) -> Plan:
    """SEEDS-1, -2, -3: singlestep exponential integrators of the SDE, each stage with the noise of its own part of the step.

    Order 1 in law at order 1, else 2 (with eta = 0 that of DPM-Solver++ singlestep); as many calls per step as `order`; SDE; data form.
    What a stage has added stays in x, so stages and step have the right correlation, on which the second order depends.
    Source: Gonzalez et al. 2023 (arXiv 2305.14267), algorithms 1 to 4, here in data form as its ports are.

    Args:
        schedule: noise schedule.
        times: outer steps, [steps + 1].
        order: 1, 2 or 3; stages at 1/2, or 1/3 and 2/3 of the step.
        eta: tau^2 of the SDE, 1 for the reverse SDE, any number from 0.
    """
    whole("order", order, 1, 3)
    if not stochasticity("eta", eta):
        return singlestep(schedule, times, order, "data")
    tableau = (euler, dpm_solver_2(1 / 2), third_order(1 / 3, 2 / 3))[order - 1]
    form = Form("data", clock=constant(eta))
    levels = Levels.of(schedule, times, form.clock)
    refuse_upwards(levels)
    return runge_kutta(schedule, levels, tableau, form)


def usual_noise_scale(rho: Tensor) -> Tensor:
    """ER-SDE's noise scale phi(rho) = rho (exp(rho^0.3) + 10): little noise near the data, much far from it."""
    return rho * (torch.exp(rho**0.3) + 10)


def er_sde(
    schedule: Schedule,
    times: Tensor,
    order: int = 3,
    noise_scale: Callable[[Tensor], Tensor] = usual_noise_scale,
    final: str = "full",
) -> Plan:
    """ER-SDE-Solver 1, 2, 3: the extended reverse SDE of noise scale phi(rho), polynomials of the data prediction in rho.

    Order 1 in law at order 1, else 2; 1 call per step; SDE; data form. Its stochasticity is 1 + tau^2 = d log phi / d log rho: rho is
    the ODE, rho^2 the reverse SDE.
    Source: Cui et al. 2023 (arXiv 2309.06169), algorithms 1 to 3 and eq. 12. Differs: the released third order lacks a term of its
    first difference, integrates by a sum of 100 terms and drops variances below 1e-6; here all are exact. Its clock, for
    `noise.brownian`, is log(rho / phi(rho)).

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        order: 1, 2 or 3.
        noise_scale: phi, a function of rho = sigma / alpha, [n] -> [n] float64, growing at least as fast as rho.
        final: "full" | "lower"; "lower" ends with orders ..., 2, 1.
    """
    whole("order", order, 1, 3)

    if not callable(noise_scale):
        raise TypeError(
            f"noise_scale = {noise_scale!r:.100}: expected a function of rho [n] -> [n], e.g. lambda rho: rho**2"
        )

    def clock(lam: Tensor) -> Tensor:
        rho = torch.exp(-lam.clamp(-FAR, FAR))
        scale = noise_scale(rho)
        if not isinstance(scale, Tensor) or (scale.shape, scale.dtype) != (rho.shape, torch.float64):
            came = f"{scale.dtype} {list(scale.shape)}" if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"noise_scale gave {came}: expected float64 {list(rho.shape)}, as rho is")
        return torch.log(rho) - torch.log(scale)

    levels = Levels.of(schedule, times, clock)
    refuse_upwards(levels)
    s, t = levels[:-1], levels[1:]
    passed = elapsed(s, t)
    rounding = 1e-12 * s.half_logsnr.abs().clamp(1, FAR)
    if not (passed >= -rounding).all():
        rho = float((t.sigma / t.alpha)[~(passed >= -rounding)][0])
        raise ValueError(
            f"noise_scale grows more slowly than rho near rho = {rho:g}, or is not a number there: expected phi / rho that does not "
            "fall, e.g. lambda rho: rho**2"
        )
    if (passed <= rounding).all():  # the ODE
        levels, form = replace(levels, clock=None), Form("data", "sigma")
    else:
        form = Form("data", "sigma", clock=clock)
    rows = _adams_sde(schedule, levels, form, order, final, "vary_coeff")
    return rows.plan("data")


def stochasticity(name: str, value: float) -> float:
    """A finite number from 0."""
    if not 0 <= number(name, value) < math.inf:
        raise ValueError(f"{name} = {value}: expected a finite number from 0 (the ODE); 1 is the reverse SDE")
    return float(value)


def constant(eta: float) -> Clock:
    """The clock of tau^2 = eta."""
    return lambda lam: eta * lam


def _by_step(levels: Levels, eta: Tensor) -> Tensor:
    """The clock of a tau^2 for each step, at the grid's points; steps of infinite length have all or nothing of it."""
    h = levels.half_logsnr.diff()
    clock = torch.cat([h.new_zeros(1), torch.where(h.isfinite(), eta * h, 0.0).cumsum(0)])
    for point, step, end in ((0, 0, -math.inf), (-1, -1, math.inf)):
        if h[step].isinf() and eta[step] > 0 and levels.half_logsnr[point] == end:
            clock[point] = end
    return clock


def _sde_of(
    ode: Callable[..., Plan],
    predicts: str,
    schedule: Schedule,
    times: Tensor,
    order: int,
    eta: float,
    final: str,
) -> Plan:
    """DPM-Solver multistep of the SDE, or the method of the ODE where eta is 0."""
    whole("order", order, 1, 3)
    if not stochasticity("eta", eta):
        return ode(schedule, times, order, final=final)
    form = Form(predicts, clock=constant(eta))
    rows = _adams_sde(schedule, Levels.of(schedule, times, form.clock), form, order, final, "bh2")
    return rows.plan(predicts)


def _adams_sde(schedule: Schedule, levels: Levels, form: Form, order: int, final: str, variant: str) -> Piece:
    """Adams rows and the noise of each step, begun by orders 1, 2, ..."""
    if form.clock:
        refuse_upwards(levels)
    orders = orders_of_steps(levels, form, order, choice("final", final, FINALS))
    a, b = adams_rows(schedule, form, levels, orders, variant)
    c = noise_weight(form, levels[:-1], levels[1:])[:, None] if form.clock else a.new_zeros(len(a), 0)
    return Piece(levels.times, levels.alpha, levels.sigma, a, b, c)

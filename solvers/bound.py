"""The variational bound on the log-likelihood, of a stochastic plan and in continuous time, term by term."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.arguments import flag, positive, whole
from solvers.decoder import Decoder
from solvers.elements import elements
from solvers.grids import logsnr, within_logsnr
from solvers.loop import NonFiniteError, called
from solvers.noise import Noise, as_source, drawn, noised
from solvers.plan import Plan
from solvers.predictions import AnyModel, as_model, predictor
from solvers.rows import combined, deviation_of, rows_of
from solvers.run import started, warn_of_training
from solvers.schedules import Schedule


@dataclass(frozen=True, eq=False)
class Bound:
    """An estimate of the variational bound, in nats, float64: its mean over the noise is at most log p(x_0) of the sampler.

    Attributes:
        prior: KL(q(x_start | x_0) || p(x_start)), [B].
        diffusion: KL of each step, [N, B]; in continuous time of each piece of log-SNR.
        reconstruction: log p(x_0 | x_stop), [B].
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor

    @property
    def log_p(self) -> Tensor:
        """reconstruction - prior - the sum of diffusion, [B]."""
        return self.reconstruction - self.prior - self.diffusion.sum(0)

    def __repr__(self) -> str:
        means = {
            "prior": self.prior, "diffusion": self.diffusion.sum(0), "reconstruction": self.reconstruction, "log_p": self.log_p,
        }  # fmt: skip
        return f"Bound({len(self.prior)} samples, nats on average: {', '.join(f'{name} {v.detach().mean():.6g}' for name, v in means.items())})"


def elbo(
    plan: Plan,
    model: AnyModel,
    x0: Tensor,
    noise: Noise,
    decoder: Decoder | None = None,
    prior_variance: float | None = None,
    grad: bool = False,
) -> Bound:
    """The variational bound of a stochastic sampler whose rows read one call and one draw: DDPM with any variance, Analytic-DPM, SN-, NPR-DPM.

    Row i is a Gaussian p(x_{i+1} | x_i); its term is KL(q(x_{i+1} | x_i, x_0) || p(x_{i+1} | x_i)) at one x_i drawn from q(x_i | x_0), with q the forward
    process. A last row to sigma = 0 is left out: from the last x at sigma > 0 on, the decoder speaks.
    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 5; any variance: Bao et al. 2022 (arXiv 2201.06503).

    Args:
        plan: from noise to data, e.g. ddpm(schedule, times), analytic_dpm(schedule, times, gamma).
        model: as for `run`, with its second output where the plan reads it.
        x0: data, [B, ...].
        noise: a noise source, a torch.Generator, or an int seed; draw i is the noise of x_i, N + 1 draws.
        decoder: p(x_0 | x_stop); by default a density of variance (sigma / alpha)^2.
        prior_variance: of the Gaussian at the start; None for sigma(start)^2.
        grad: keep the gradient graph, for training by it.

    Returns:
        The terms and their sum, `log_p`.

    Raises:
        ValueError: rows that read several calls or draws, go upwards, or add no noise, for which the bound is infinite.
        NonFiniteError: a term is NaN.
    """
    model, last = as_model(model), _steps(plan)
    if not flag("grad", grad):
        warn_of_training(model)
    with torch.set_grad_enabled(grad):
        data = started(x0, grad).x
        source = as_source(noise, len(data))
        terms = []
        for i, row in enumerate(rows_of(plan, model, data)[:last]):
            x = float(plan.alpha[i]) * data + float(plan.sigma[i]) * drawn(source, i, data)
            m, second = called(plan, model, row, x, i, x0.dtype, True)
            mean = combined(row._replace(keep=None, draws=[]), x, m, {}, {}, i)
            variance = torch.tensor(
                sum(weight**2 for _, weight in row.draws), dtype=torch.float64, device=x.device
            )
            if row.variance is not None and second is not None:
                variance = deviation_of(row.variance, model.variance, x, m, second).double() ** 2
            of_data, of_x, least = _posterior(plan, i)
            terms.append(_kl(of_data * data.double() + of_x * x.double() - mean.double(), least, variance))
        alpha, sigma = float(plan.alpha[last]), float(plan.sigma[last])
        denoise = _denoising(plan, last)
        x = alpha * data + sigma * drawn(source, last, data)
        (row,) = rows_of(denoise, model, data)
        mean = combined(row, x, called(denoise, model, row, x, 0, x0.dtype, True)[0], {}, {}, 0)
        reconstruction = (decoder or Decoder()).log_p(data, mean, sigma / alpha if alpha > 0 else math.inf)
        prior = _prior(data, float(plan.alpha[0]), float(plan.sigma[0]), prior_variance)
    bound = Bound(prior, torch.stack(terms) if terms else prior.new_zeros(0, len(data)), reconstruction)
    return _answered(bound, plan.times, plan.half_logsnr)


def continuous_elbo(
    model: AnyModel,
    schedule: Schedule,
    x0: Tensor,
    noise: Noise,
    pieces: int = 1,
    decoder: Decoder | None = None,
    prior_variance: float | None = None,
    *,
    start: float | None = None,
    stop: float | None = None,
    grad: bool = False,
) -> Bound:
    """The variational bound of the reverse SDE, whose diffusion term is int E ||eps - eps^||^2 dlambda, lambda half log-SNR.

    The integral is estimated at one time in each of some equal pieces of log-SNR, uniform in the piece: importance sampling in log-SNR, under which every
    time counts alike.
    Source: Kingma et al. 2021 (arXiv 2107.00630), eq. 14; Song et al. 2021 (arXiv 2101.09258), theorem 3.

    Args:
        model: as for `run`.
        schedule: noise schedule.
        x0: data, [B, ...].
        noise: a noise source, a torch.Generator, or an int seed; draws 2k and 2k + 1 are the time and the noise of piece k, the last the noise at `stop`.
        pieces: number of pieces K, each a call of the model.
        decoder: p(x_0 | x_stop); by default a density of variance (sigma / alpha)^2.
        prior_variance: of the Gaussian at the start; None for sigma(start)^2.
        start: first time; the schedule's own if None.
        stop: last time; the schedule's own if None.
        grad: keep the gradient graph, for training by it.

    Returns:
        The terms, diffusion [K, B] of the pieces, and their sum, `log_p`.

    Raises:
        ValueError: half log-SNR is infinite at an end.
        NonFiniteError: a term is NaN.
    """
    whole("pieces", pieces, 1, 10**6, example=1)
    model = as_model(model)
    if not flag("grad", grad):
        warn_of_training(model)
    ends = logsnr(schedule, 1, start=start, stop=stop)
    if ends[0] < ends[1]:
        raise ValueError(
            f"schedule = {schedule!r:.100} leads from data to noise: the bound goes from noise to data, give the schedule itself"
        )
    low, high = schedule.half_logsnr(ends).tolist()
    with torch.set_grad_enabled(grad):
        data = started(x0, grad).x
        if len(data) == 0:
            nothing = data.new_zeros(0, dtype=torch.float64)
            return Bound(nothing, nothing.expand(pieces, 0), nothing)
        source = as_source(noise, len(data))
        to_noise, to_data = (predictor(model, schedule, want, dtype=x0.dtype) for want in ("noise", "data"))
        terms, times = [], []
        for k in range(pieces):
            clock = drawn(source, 2 * k, data.new_zeros(len(data), dtype=torch.float64))
            share = (k + torch.special.ndtr(clock).cpu()) / pieces
            t = within_logsnr(schedule, ends, share)
            times.append(t)
            eps = drawn(source, 2 * k + 1, data)
            error = eps - to_noise(noised(data, schedule, t, eps), t)
            terms.append((high - low) / pieces * elements(error.double().square()).sum(1))
        x = noised(data, schedule, ends[1], drawn(source, 2 * pieces, data))
        times.append(ends[1].expand(len(data)))
        mean = to_data(x, ends[1])
        alpha, sigma = (torch.stack([f(t) for t in ends]).tolist() for f in (schedule.alpha, schedule.sigma))
        reconstruction = (decoder or Decoder()).log_p(data, mean, sigma[1] / alpha[1])
        prior = _prior(data, alpha[0], sigma[0], prior_variance)
    every = torch.stack(times)
    return _answered(Bound(prior, torch.stack(terms), reconstruction), every, schedule.half_logsnr(every))


def _answered(bound: Bound, times: Tensor, half_logsnr: Tensor) -> Bound:
    """The bound, if none of its terms is NaN; times and half log-SNR are of the calls, [N + 1] or [N + 1, B]. An infinite divergence is an answer."""
    nan = torch.cat([bound.diffusion, bound.reconstruction[None]]).isnan().cpu()
    if not nan.any():
        return bound
    call = int(nan.any(1).nonzero()[0])
    samples = nan[call].nonzero().flatten().tolist()
    t, lam = (float(v[call].expand(nan.shape[1])[samples[0]]) for v in (times, half_logsnr))
    raise NonFiniteError(
        f"the model's output is not finite in call {call} of the bound (t = {t:g}, half log-SNR = {lam:g}) for samples {samples[:10]}",
        call,
        t,
        lam,
        samples,
    )


def _steps(plan: Plan) -> int:
    """How many rows lead to a sigma > 0, once all of them are known to be Gaussian steps of a Markov chain from noise to data."""
    last = plan.rows - int(plan.sigma[-1] == 0)
    if plan.turns or plan.times[0] < plan.times[-1] or not plan.is_called.all():
        upwards = plan.times[0] < plan.times[-1]
        kind = (
            "goes from data to noise" if upwards else "goes up and down in noise, or has rows without a call"
        )
        raise ValueError(f"the plan {kind}: the bound is of one step after the other from noise to data")
    if plan.variances.numel() and (plan.c != 0).any():
        raise ValueError(
            "the plan's rows have noise of their own besides that which the model's second output scales: expected one of the two"
        )
    if (plan.b[:last, 1:] != 0).any() or (plan.c[:last, 1:] != 0).any():
        raise ValueError(
            f"a row of the plan reads {plan.window} calls, {plan.c.shape[1]} draws: expected one of each, as of ddpm, ddim(eta=...), analytic_dpm, in "
            "which a state depends on the one before alone"
        )
    silent = (plan.c[:last, :1] == 0).all(1)
    if plan.variances.numel():
        silent &= plan.variances[:last, 1] == 0
    if silent.any():
        i = int(silent.nonzero()[0])
        raise ValueError(
            f"row {i} of the plan adds no noise, so its KL divergence is infinite: take a stochastic method, e.g. ddpm(schedule, times)"
        )
    return last


def _denoising(plan: Plan, call: int) -> Plan:
    """The row that gives the data prediction at one of the plan's times, whatever the network predicts."""

    def pair(first: Tensor, second: float) -> Tensor:
        return torch.stack([first, torch.full_like(first, second)])

    t = plan.times[call]
    one = torch.ones(1, dtype=torch.float64, device="cpu")
    return Plan(
        pair(t, float(t) - 1), pair(plan.alpha[call], 1.0), pair(plan.sigma[call], 0.0), 0 * one, one[:, None]
    )


def _posterior(plan: Plan, i: int) -> tuple[float, float, float]:
    """The weights of x_0 and x_i in the mean of q(x_{i+1} | x_i, x_0), and its variance.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 7, in half log-SNR.
    """
    h = float(plan.half_logsnr[i + 1] - plan.half_logsnr[i])
    share = -math.expm1(-2 * h)
    sigma, before = float(plan.sigma[i + 1]), float(plan.sigma[i])
    return float(plan.alpha[i + 1]) * share, sigma / before * math.exp(-h), sigma**2 * share


def _kl(difference: Tensor, of: float, to: Tensor) -> Tensor:
    """KL(N(m, of) || N(m', to)) over all elements of m - m' [B, ...], where `to` may be one for each element, [B, ...]: [B]."""
    excess = of / to - 1
    near = excess.abs() < 0.1  # where the two nearly cancel
    gap = excess - torch.where(near, torch.log1p(torch.where(near, excess, 0.0)), torch.log(of / to))
    return 0.5 * elements(torch.where(to > 0, gap + difference**2 / to, math.inf)).sum(1)


def _prior(x0: Tensor, alpha: float, sigma: float, variance: float | None) -> Tensor:
    """KL(N(alpha x0, sigma^2) || N(0, variance)), [B]."""
    if variance is not None:
        positive(prior_variance=variance)
    to = torch.tensor(
        sigma**2 if variance is None else float(variance), dtype=torch.float64, device=x0.device
    )
    return _kl(alpha * x0.double(), sigma**2, to)

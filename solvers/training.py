"""Losses: denoising score matching of order 1, 2 and 3, its weights and times; second outputs of Extended-Analytic-DPM."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.arguments import choice, positive, whole
from solvers.elements import elements, inner
from solvers.grids import logsnr, within_logsnr
from solvers.jacobian import Divergence, as_divergence, products
from solvers.noise import noised
from solvers.predictions import AnyModel, Model, conversion, mixture, outputs_at, predictor
from solvers.schedules import Schedule, host

WEIGHTS = ("noise", "data", "velocity", "likelihood", "min_snr")


def dsm_loss(model: AnyModel, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Denoising score matching: ||eps - eps^(x_t, t)||^2 / d, whose minimiser is E[eps | x_t].

    Source: Vincent 2011 (doi 10.1162/NECO_a_00142); Ho et al. 2020 (arXiv 2006.11239), eq. 14.

    Args:
        model: the network, asked as `run` asks it: a noise prediction (x, t) -> eps^, or a Model of any other prediction.
        schedule: noise schedule.
        x0: data, [B, ...].
        t: times, [] or [B], with sigma > 0; in float64 where the model's label needs their digits, as `Discrete.step` does.
        noise: eps, standard normals, [B, ...].

    Returns:
        The loss of each sample, [B]; `loss_weight` and `importance_times` say what to make of it.

    Raises:
        ValueError: shapes do not fit, or the prediction does not determine the noise at some t.
    """
    t = host(t)
    x = noised(x0, schedule, t, noise)
    return _mean_square(noise - predictor(model, schedule, "noise")(x, t))


class DSM(NamedTuple):
    """The losses of one batch, each [B]; see `dsm_losses`."""

    first: Tensor
    second: Tensor
    trace: Tensor
    third: Tensor | None


def dsm_losses(
    model: AnyModel,
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    order: int = 3,
    divergence: Divergence | None = None,
) -> DSM:
    """Denoising score matching of orders 1 to 3, which bound the KL divergence of the ODE's density where order 1 alone does not.

    With the score s = -eps^ / sigma of the network, its Jacobian S and e = eps - eps^, held constant like S where it is not the matched term::

        first:  ||e||^2 / d
        second: ||sigma^2 S + 1 - e e^T||_F^2 / d^2
        trace:  (sigma^2 tr S + d - ||e||^2)^2 / d^2
        third:  ||sigma^3 grad tr S + ||e||^2 e - (sigma^2 tr S + d) e - 2 (sigma^2 S^T + 1) e||^2 / d^3

    For the exact score their minimisers are its first, second and third derivatives; an error of eps^ enters the second by its square.
    With `hutchinson` second, trace and third are those of v^T S and v^T S v, in the mean over directions v. (The source has S v, and S in the
    third; of a score S is symmetric.) A sum of them trains a network, e.g.
    first + second + trace + third (the source's for images), first + 0.5 (second + trace) + 0.1 third.
    Source: Lu et al. 2022 (arXiv 2206.08265), theorems 3.1 to 3.3 and appendix; the scaling by powers of d is its code's.

    Args:
        model: as for `dsm_loss`; twice differentiable for order 2, three times for order 3 (no ReLU).
        schedule: noise schedule.
        x0: data, [B, ...].
        t: times, [] or [B], as for `dsm_loss`.
        noise: eps, standard normals, [B, ...].
        order: 2, without third, or 3.
        divergence: `exact()` for all unit vectors, which is the default, or `hutchinson(...)`, whose noise must change from step to step.

    Raises:
        ValueError: as `dsm_loss`, or no gradient flows through the model.
    """
    whole("order", order, 2, 3)
    with torch.enable_grad():
        t = host(t)
        x = noised(x0, schedule, t, noise)
        x = x if x.requires_grad else x.requires_grad_()
        v = as_divergence(divergence).directions(x)
        sigma = schedule.sigma(t.reshape(-1)).to(x).expand(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        eps = predictor(model, schedule, "noise")(x, t)
        e = (noise - eps).detach()
        groups = [_higher(eps, e, x, sigma, group, order) for group in v]
    d = math.prod(x.shape[1:])
    second, trace, third = (
        torch.stack(terms).mean(0) / d**power
        for terms, power in zip(zip(*groups, strict=True), (2, 2, 3), strict=True)
    )
    return DSM(_mean_square(noise - eps), second, trace, third if order == 3 else None)


def _higher(
    eps: Tensor, e: Tensor, x: Tensor, sigma: Tensor, v: Tensor, order: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The residuals of second, trace and third along directions v [D, B, ...], squared, each [B]."""
    row = -sigma * products(eps, x, v, grad=True)  # sigma^2 v^T S
    along = inner(v, e, x)  # [D, B]
    trace, length, ee = inner(row, v, x).sum(0), inner(v, v, x).sum(0), along.square().sum(0)
    wide = along.reshape(*along.shape, *sigma.shape[1:])
    difference = row + v - wide * e
    second = inner(difference, difference, x).sum(0)
    third = torch.zeros_like(second)
    if order == 3:
        total = trace.sum() + 0 * x.sum()  # of a linear network the trace is a constant
        (slope,) = torch.autograd.grad(total, x, create_graph=True)
        scalar = (ee - trace.detach() - length).reshape(sigma.shape)
        residual = sigma * slope + scalar * e - 2 * (wide * (row.detach() + v)).sum(0)
        third = inner(residual, residual, x)
    return second, (trace + length - ee).square(), third


def loss_weight(schedule: Schedule, t: Tensor, weight: str = "likelihood", gamma: float = 5.0) -> Tensor:
    """By what `dsm_loss` at times t is multiplied for one of the field's losses, [] or [B] like t.

    "noise" 1; "data" makes it the loss of x_0, rho^2; "velocity" that of alpha eps - sigma x_0, (alpha + sigma rho)^2; "likelihood" -dlambda/dt =
    g^2 / (2 sigma^2), which bounds the log-likelihood when t is uniform; "min_snr" min(SNR, gamma) / SNR.
    Source: likelihood: Song et al. 2021 (arXiv 2101.09258), theorem 1; min_snr: Hang et al. 2023 (arXiv 2303.09556), eq. 9.

    Args:
        schedule: noise schedule.
        t: times, [] or [B], on whose device the answer is.
        weight: "noise" | "data" | "velocity" | "likelihood" | "min_snr".
        gamma: of "min_snr".
    """
    choice("weight", weight, WEIGHTS, {"simple": "noise", "x0": "data", "snr": "data", "v": "velocity"})
    positive(gamma=gamma)
    device = t.device if isinstance(t, Tensor) else None
    t = host(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    match weight:
        case "noise":
            values = torch.ones_like(t)
        case "data":
            values = (sigma / alpha) ** 2
        case "velocity":
            values = ((alpha**2 + sigma**2) / alpha) ** 2
        case "min_snr":
            values = (gamma * (sigma / alpha) ** 2).clamp(max=1.0)
        case "likelihood":
            with torch.inference_mode(False), torch.enable_grad():
                here = t.detach().clone().requires_grad_()
                (slope,) = torch.autograd.grad(schedule.half_logsnr(here).sum(), here)
            values = -slope
    return values.to(device)


def importance_times(
    schedule: Schedule, uniforms: Tensor, start: float | None = None, stop: float | None = None
) -> tuple[Tensor, float]:
    """Times at which likelihood weighting is a constant, uniform in log-SNR, and that constant: the length of the half log-SNR.

    constant * d * `dsm_loss` at these times has the mean int E ||eps - eps^||^2 dlambda, the negative evidence bound up to what does not
    depend on the network. For VP they are the times of the source's importance sampling. On a Discrete schedule they fall between the levels: the
    network reads label=schedule.label.
    Source: Song et al. 2021 (arXiv 2101.09258), section 5.1; Kingma et al. 2021 (arXiv 2107.00630), section 5.

    Args:
        schedule: noise schedule.
        uniforms: numbers in [0, 1], [B], e.g. torch.rand(B), or evenly spread: (torch.arange(B) + torch.rand(1)) / B.
        start: first time, of the least log-SNR; the schedule's own if None.
        stop: last time; the schedule's own if None.

    Returns:
        (times [B] float64, constant).

    Raises:
        ValueError: numbers outside [0, 1], or half log-SNR infinite at an end.
    """
    u = host(uniforms)
    if not ((u >= 0) & (u <= 1)).all():
        raise ValueError(f"uniforms = {uniforms!s:.100}: expected numbers in [0, 1], e.g. torch.rand(64)")
    ends = logsnr(schedule, 1, start=start, stop=stop)
    length = schedule.half_logsnr(ends).diff().abs().item()
    return within_logsnr(schedule, ends, u), length


def sn_loss(model: Model, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """SN-DPM: ||eps^2 - h(x_t, t)||^2 / d, whose minimiser is E[eps^2 | x_t], element by element.

    h is the second output of the model, which is asked as `run` asks it, with its label and its scale of x. Its first output has no
    part in it: add the loss that it is trained by, or freeze it.
    Source: Bao et al. 2022 (arXiv 2206.07309), eq. 9.

    Args:
        model: Model(net, variance="square", ...).
        schedule: noise schedule.
        x0: data, [B, ...].
        t: times, [] or [B], in float64 where the model's label needs their digits, as `Discrete.step` does.
        noise: eps, standard normals, [B, ...].

    Returns:
        The loss of each sample, [B].

    Raises:
        ValueError: the model's second output is declared to be something else, or has another shape than x.
    """
    _, _, second = _asked(model, "square", schedule, x0, t, noise)
    return _mean_square(noise**2 - second)


def npr_loss(model: Model, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """NPR-DPM: ||(eps - eps^(x_t, t))^2 - h(x_t, t)||^2 / d, whose minimiser is the mean square error of eps^ at x_t.

    No gradient reaches the model's noise prediction eps^ through it.
    Source: Bao et al. 2022 (arXiv 2206.07309), eq. 12.
    See `sn_loss` for the arguments, the model being Model(net, variance="residual", ...).
    """
    x, m, second = _asked(model, "residual", schedule, x0, t, noise)
    times = host(t).reshape(-1)
    level = schedule.alpha(times), schedule.sigma(times)
    weights = conversion(model.mixture(times, *level), mixture("noise", *level), *level)
    from_x, from_m = (v.to(x).reshape(-1, *[1] * (x.ndim - 1)) for v in weights)
    eps = from_x * x + from_m * m.detach()
    return _mean_square((noise - eps) ** 2 - second)


def _asked(
    model: Model, variance: str, schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The states x_t and what the model gives there."""
    if not isinstance(model, Model) or model.variance != variance:
        came = f"variance={model.variance!r}" if isinstance(model, Model) else type(model).__name__
        raise ValueError(
            f"model has {came}: expected Model(net, variance={variance!r}), net giving (prediction, second output)"
        )
    x = noised(x0, schedule, t, noise)
    m, second = outputs_at(model, schedule, x, host(t).reshape(-1))
    assert second is not None
    return x, m, second


def _mean_square(x: Tensor) -> Tensor:
    return elements(x.square()).mean(1)

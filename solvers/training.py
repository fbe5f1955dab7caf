"""Losses for a network's second output: the second moments of Extended-Analytic-DPM."""

from collections.abc import Callable

import torch
from torch import Tensor

from solvers.noise import noised
from solvers.predictions import AnyModel, predictor
from solvers.schedules import Schedule, float64


def sn_loss(
    head: Callable[[Tensor, Tensor], Tensor], schedule: Schedule, x0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """SN-DPM: ||eps^2 - h(x_t, t)||^2 / d, whose minimiser is E[eps^2 | x_t], element by element.

    Source: Bao et al. 2022 (arXiv 2206.07309), eq. 9.

    Args:
        head: h, (x [B, ...], t [B]) -> [B, ...]; the second output of Model(net, variance="square").
        schedule: noise schedule.
        x0: data, [B, ...].
        t: times, [B].
        noise: eps, standard normals, [B, ...].

    Returns:
        The loss of each sample, [B].
    """
    x = noised(x0, schedule, t, noise)
    return _mean_square(noise**2 - _answer(head, x, t))


def npr_loss(
    head: Callable[[Tensor, Tensor], Tensor],
    model: AnyModel,
    schedule: Schedule,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """NPR-DPM: ||(eps - eps^(x_t, t))^2 - h(x_t, t)||^2 / d, whose minimiser is the mean square error of eps^ at x_t.

    No gradient reaches the noise prediction eps^.
    Source: Bao et al. 2022 (arXiv 2206.07309), eq. 12.

    Args:
        head: h, (x [B, ...], t [B]) -> [B, ...]; the second output of Model(net, variance="residual").
        model: as for `run`.
        schedule: noise schedule.
        x0: data, [B, ...].
        t: times, [B].
        noise: eps, standard normals, [B, ...].

    Returns:
        The loss of each sample, [B].
    """
    x = noised(x0, schedule, t, noise)
    with torch.no_grad():
        residual = noise - predictor(model, schedule, "noise")(x, float64(t))
    return _mean_square(residual**2 - _answer(head, x, t))


def _answer(head: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
    answer = head(x, t.to(x))
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        came = list(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"head gave {came}: expected {list(x.shape)}, the shape of x")
    return answer


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)

"""Losses for a network's second output: the second moments of Extended-Analytic-DPM."""

from torch import Tensor

from solvers.noise import noised
from solvers.predictions import Model, conversion, mixture, outputs_at
from solvers.schedules import Schedule, float64


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
    times = float64(t).reshape(-1)
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
    m, second = outputs_at(model, schedule, x, float64(t).reshape(-1))
    assert second is not None
    return x, m, second


def _mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)

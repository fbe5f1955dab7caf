"""Guidance, thresholds and hooks: functions from model to model, nested in the order in which they are to act.

The plan is untouched by them: `clipped(classifier_free(model, ...))` guides, then clips, in whatever sampler. What each needs to know of
a call's level is computed before the first call, so that nothing is read back from the device; their arithmetic is in the
state's precision, whatever the network's.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import increasing, number, positive
from solvers.grids import given
from solvers.predictions import (
    AnyModel,
    Model,
    as_model,
    checked_outputs,
    conversion,
    mixture,
    native_of,
)
from solvers.schedules import Schedule, float64

# a number, or t [N] float64 -> one for each time
Scale = float | Callable[[Tensor], Tensor]
Outputs = tuple[Tensor, Tensor | None]  # a prediction and the second output, if there is one


def guided(
    model: AnyModel,
    weaker: AnyModel,
    scale: Scale,
    *,
    low: float = 0.0,
    high: float = math.inf,
    rescale: float = 0.0,
) -> Model:
    """weaker + scale (model - weaker), by two calls: classifier-free guidance with a condition bound into `model` and none into `weaker`, or
    autoguidance by a network that is less trained.

    Outside [low, high] the weaker model is not called, nor `model` where the scale is 0.
    Source: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, with scale = 1 + w; Karras et al. 2024 (arXiv 2406.02507), eq. 3. Interval:
    Kynkäänniemi et al. 2024 (arXiv 2404.07724). Rescaling: Lin et al. 2023 (arXiv 2305.08891), eqs. 15 and 16.

    Args:
        model: the model to guide; its second output, if it has one, is kept.
        weaker: the model to lead away from; it predicts the same and reads the same label.
        scale: 1 is `model`, 0 is `weaker`; or a function of t, e.g. of `cfg_pp`.
        low: least time that is guided.
        high: greatest time that is guided.
        rescale: from 0 to 1, how far the guided prediction is scaled to the standard deviation, over each sample, of the model's.

    Raises:
        ValueError: the models differ in what they predict, or, once they are asked, in what they read; a scale that is not finite; low above high.
    """
    model, weaker = as_model(model), as_model(weaker)
    for name in ("predicts", "schedule", "sigma_data", "variance"):
        mine, theirs = getattr(model, name), getattr(weaker, name)
        if mine != theirs:
            raise ValueError(
                f"the models differ in {name}: {mine!r:.100} and {theirs!r:.100}; expected the same, e.g. both from one sv.Model by dataclasses.replace(model, net=...)"
            )
    weights_of_scale, combined = _guidance(scale, low, high, rescale)

    def weights(*at: Tensor) -> tuple:
        labels = model.labels(at[0]), weaker.labels(at[0])
        if labels[0] != labels[1]:
            raise ValueError(
                f"the models read different labels: {labels[0]!s:.100} and {labels[1]!s:.100}; expected the same, e.g. label=schedule.step for both"
            )
        return weights_of_scale(at[0]), _weights(model, *at), _weights(weaker, *at)

    def net(x: Tensor, label: Tensor, numbers: tuple, dtype: torch.dtype) -> Any:
        scale, *inner = numbers
        towards = None if _is(scale, 0) else _asked(model, x, label, inner[0], dtype)
        away = None if _is(scale, 1) else _asked(weaker, x, label, inner[1], dtype)
        if towards and away and _shares_memory(towards[0], away[0], x):
            raise ValueError("the network gives every output in the same memory: let it return a clone")
        return combined(scale, towards, away)

    return replace(model, net=net, at_levels=weights)


def classifier_free(
    model: AnyModel,
    condition: Any,
    null: Any,
    scale: Scale,
    *,
    low: float = 0.0,
    high: float = math.inf,
    rescale: float = 0.0,
) -> Model:
    """Classifier-free guidance in one call on twice the batch: null + scale (conditional - null).

    Where nothing is guided, outside [low, high] or at scales 1 and 0, the batch is not doubled. As `guided` with two calls, up to what
    the network makes of the size of its batch.
    Source: as of `guided`.

    Args:
        model: its net reads a condition too: net(x, label, condition).
        condition: a tensor [B, ...] or [1, ...], or a mapping, list or tuple of them (prompt embeddings and masks), or None in their place.
        null: the same for no condition.
        scale: 1 is the conditional model, 0 the unconditional; or a function of t, e.g. of `cfg_pp`.
        low: least time that is guided.
        high: greatest time that is guided.
        rescale: as of `guided`.

    Raises:
        TypeError: condition and null are not made alike.
        ValueError: a scale that is not finite; low above high; a condition for another number of samples than x has.
    """
    model = as_model(model)
    if model.at_levels is not None:
        raise ValueError(
            "the model is guided already, and its net reads no condition: wrap the network's own Model first, or take guided(model, weaker, scale)"
        )
    _joined(condition, null, None)
    weights_of_scale, combined = _guidance(scale, low, high, rescale)

    def weights(t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple:
        return (weights_of_scale(t),)

    def net(x: Tensor, label: Tensor, numbers: tuple, dtype: torch.dtype) -> Any:
        (scale,) = numbers

        def asked(x: Tensor, label: Tensor, condition: Any) -> Outputs:
            return checked_outputs(model, model.net(x.to(dtype), label, condition), x, "a guided model")

        if _is(scale, 0):
            return combined(scale, None, asked(x, label, _joined(null, None, len(x))))
        if _is(scale, 1):
            return combined(scale, asked(x, label, _joined(condition, None, len(x))), None)
        both = asked(torch.cat([x, x]), torch.cat([label, label]), _joined(condition, null, len(x)))
        halves = [(None, None) if v is None else v.chunk(2) for v in both]
        return combined(scale, *zip(*halves, strict=True))

    return replace(model, net=net, at_levels=weights)


def cfg_pp(schedule: Schedule, times: Tensor, scale: float) -> Callable[[Tensor], Tensor]:
    """The guidance scale of CFG++ as a function of t, for `guided` and `classifier_free`: scale / (1 - e^-h), h the step in half log-SNR.

    CFG++ leads the data prediction by a scale from 0 to 1 and adds the unconditional noise back; of a DDIM step that is classifier-free
    guidance with this scale, which is large where steps are small. In a method of higher order every call is led so.
    Source: Chung et al. 2024 (arXiv 2406.08070), algorithm 2.

    Args:
        schedule: noise schedule.
        times: the outer steps, [steps + 1].
        scale: lambda of the paper, from 0 to 1; more leads further.
    """
    times = given(schedule, times)
    if not math.isfinite(number("scale", scale)):
        raise ValueError(f"scale = {scale}: expected a finite number, e.g. scale=0.6")
    rises = bool(times[-1] > times[0])
    if rises:
        raise ValueError("times increase: CFG++ is for sampling, on times that decrease from noise to data")
    half_logsnr = schedule.half_logsnr(times)

    def scale_at(t: Tensor) -> Tensor:
        following = torch.searchsorted(-times, -t, right=True)
        step = half_logsnr[following.clamp(max=len(times) - 1)] - schedule.half_logsnr(t)
        # a stage at the very end is of the last step
        return scale / -torch.expm1(
            -torch.where(following < len(times), step, half_logsnr[-1] - half_logsnr[-2])
        )

    return scale_at


def classifier(model: AnyModel, log_p: Callable[[Tensor, Tensor], Tensor], scale: Scale = 1.0) -> Model:
    """Classifier guidance: the score plus scale times the gradient of log p(y | x).

    In noise form eps - scale sigma grad log p.
    Source: Dhariwal & Nichol 2021 (arXiv 2105.05233), algorithm 2.

    Args:
        model: the model to lead.
        log_p: (x [B, ...], label [B]) -> log p(y | x), [B], of a classifier of noisy data that reads what the network reads; called in x's own scale and
            dtype, with gradients.
        scale: 1 is Bayes' rule; or a function of t.

    Raises:
        ValueError: alpha = 0, where a score says nothing of the data that the model predicts; log_p gives no gradient to x, or another shape.
    """
    model = as_model(model)
    model = as_data(model) if model.predicts == "edm" else model
    scale_at = _scale(scale)

    def weights(t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple:
        p, q = model.mixture(t, alpha, sigma)
        per_score = torch.where(p == 0, 0.0, p * sigma**2 / alpha) - q * sigma
        _refuse_infinite(
            per_score,
            t,
            "a score does not determine the guidance of what the model predicts",
            "noise or score",
        )
        return scale_at(t) * per_score, _weights(model, t, alpha, sigma)

    def net(x: Tensor, label: Tensor, numbers: tuple, dtype: torch.dtype) -> Any:
        weight, inner = numbers
        m, second = _asked(model, x, label, inner, dtype)
        return _with_second(m + weight * _gradient(log_p, x, label), second)

    return replace(model, net=net, at_levels=weights)


def as_data(model: AnyModel) -> Model:
    """The same model as one that predicts data."""
    return on_data(model, lambda x0, x, t: x0)


def on_data(model: AnyModel, hook: Callable[[Tensor, Tensor, Any], Tensor]) -> Model:
    """The model, its data prediction changed by a function.

    Args:
        model: any model.
        hook: (x_0 [B, ...], x [B, ...], t) -> x_0; t is a number, or [B, 1, ...] where samples have times of their own.

    Returns:
        A model that predicts data.

    Raises:
        ValueError: the model's prediction does not determine data, as noise does not at alpha = 0; hook gives another shape.
    """
    return _data_model(model, lambda x, t: x, hook)


def on_state(model: AnyModel, hook: Callable[[Tensor, Any], Tensor]) -> Model:
    """The model, asked at x changed by a function, and that x taken for x in what it predicts of the data.

    Args:
        model: any model.
        hook: (x [B, ...], t) -> x; t is a number, or [B, 1, ...] where samples have times of their own. It must leave its input as it is.

    Returns:
        A model that predicts data.

    Raises:
        ValueError: as of `on_data`.
    """
    return _data_model(model, hook, lambda x0, x, t: x0)


def clipped(model: AnyModel, low: float = -1.0, high: float = 1.0) -> Model:
    """The model, its data prediction cut to [low, high]: static thresholding."""
    increasing(low=low, high=high)
    # a clamp would make numbers of infinities, and hide them
    return on_data(model, lambda x0, x, t: torch.where(x0.isfinite(), x0.clamp(low, high), x0))


def thresholded(
    model: AnyModel, quantile: float = 0.995, bound: float = 1.0, most: float = math.inf
) -> Model:
    """The model, its data prediction cut at a quantile of its absolute values and scaled back into [-bound, bound], sample by sample.

    With s that quantile of a sample, from `bound` to `most`: x_0 <- clamp(x_0, -s, s) bound / s. For pixels, not for latents.
    Source: Saharia et al. 2022 (arXiv 2205.11487), section 2.3. diffusers has bound = 1 and most = sample_max_value.

    Args:
        model: any model.
        quantile: above 0, up to 1, with linear interpolation.
        bound: of the data.
        most: the greatest s; at `bound` this is static thresholding.

    Raises:
        ValueError: an argument is out of range.
    """
    return on_data(model, threshold(quantile, bound, most))


def threshold(quantile: float, bound: float = 1.0, most: float = math.inf) -> Callable[..., Tensor]:
    """What `thresholded` does to a data prediction [B, ...], as a function of it."""
    if not 0 < number("quantile", quantile) <= 1:
        raise ValueError(f"quantile = {quantile}: expected a number above 0, up to 1, e.g. quantile=0.995")
    positive(bound=bound)
    if not number("most", most) >= bound:
        raise ValueError(f"most = {most}: expected at least bound = {bound}")

    def cut(x0: Tensor, *_: Any) -> Tensor:
        size = x0.abs().reshape(len(x0), -1)
        place = quantile * (size.shape[1] - 1)
        below, above = (size.kthvalue(1 + v, dim=1).values for v in (math.floor(place), math.ceil(place)))
        s = torch.lerp(below, above, place - math.floor(place)).clamp(bound, most)
        s = s.reshape(-1, *[1] * (x0.ndim - 1))
        return torch.where(x0.isfinite(), torch.clamp(x0, -s, s) * (bound / s), x0)

    return cut


def _data_model(model: AnyModel, on_x: Callable[..., Tensor], on_x0: Callable[..., Tensor]) -> Model:
    model = as_model(model)
    for hook in (on_x, on_x0):
        if not callable(hook):
            raise TypeError(
                f"hook = {hook!r:.100} is not callable: expected a function of (x_0, x, t), or of (x, t)"
            )

    def weights(t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple:
        have, want = model.mixture(t, alpha, sigma), mixture("data", alpha, sigma)
        from_x, from_m = conversion(have, want, alpha, sigma)
        _refuse_infinite(
            from_x + from_m,
            t,
            f"a {model.predicts} prediction does not determine data",
            "data, velocity or flow",
        )
        return t, model.input_scale(alpha, sigma), from_x, from_m, _weights(model, t, alpha, sigma)

    def net(x: Tensor, label: Tensor, numbers: tuple, dtype: torch.dtype) -> Any:
        t, scale, from_x, from_m, inner = numbers
        x = _same_shape(on_x(x, t), x)
        m, second = _asked(model, x if _is(scale, 1) else scale * x, label, inner, dtype)
        x0 = m if _is(from_x, 0) and _is(from_m, 1) else from_x * x + from_m * m
        return _with_second(_same_shape(on_x0(x0, x, t), x), second)

    return replace(model, net=net, predicts="data", native=native_of(model), schedule=None, at_levels=weights)


def _same_shape(answer: Any, x: Tensor) -> Tensor:
    if not isinstance(answer, Tensor) or answer.shape != x.shape:
        came = f"shape {list(answer.shape)}" if isinstance(answer, Tensor) else type(answer).__name__
        raise ValueError(f"the hook gave {came}: expected shape {list(x.shape)}, like what it was given")
    return answer


def _asked(model: Model, x: Tensor, label: Tensor, weights: tuple, dtype: torch.dtype) -> Outputs:
    """A model inside another: its outputs at x, in the dtype of x."""
    m = model.net(x.to(dtype), label) if model.at_levels is None else model.net(x, label, weights, dtype)
    return checked_outputs(model, m, x, "a guided model")


def _weights(model: Model, *at: Tensor) -> tuple:
    return () if model.at_levels is None else model.at_levels(*at)


def _shares_memory(one: Tensor, other: Tensor, x: Tensor) -> bool:
    """Whether one output overwrote the other; a network may well give back its input twice."""
    return one.data_ptr() == other.data_ptr() and one.numel() > 0 and one.data_ptr() != x.data_ptr()


def _is(weight: float | Tensor, value: float) -> bool:
    """Whether a weight is known to be this number; those of samples with levels of their own are not looked at."""
    return not isinstance(weight, Tensor) and weight == value


def _with_second(m: Tensor, second: Tensor | None) -> Any:
    return m if second is None else (m, second)


def _guidance(
    scale: Scale, low: float, high: float, rescale: float
) -> tuple[Callable[[Tensor], Tensor], Callable[..., Any]]:
    """The scale at each time, and what is made of the two sides' outputs, either of which may be None where its weight is 0."""
    scale_at = _scale(scale)
    if not 0 <= number("low", low) <= number("high", high):
        raise ValueError(f"low = {low}, high = {high}: expected times with 0 <= low <= high")
    if not 0 <= number("rescale", rescale) <= 1:
        raise ValueError(f"rescale = {rescale}: expected a number from 0 to 1, e.g. rescale=0.7")

    def within(t: Tensor) -> Tensor:
        inside = (t >= low) & (t <= high)
        scales = torch.ones_like(t)
        scales[inside] = scale_at(t[inside])
        return scales

    def combined(scale: Any, towards: Outputs | None, away: Outputs | None) -> Any:
        if towards is None or away is None:
            return _with_second(*(towards or away))  # type: ignore[misc]
        m = torch.lerp(away[0], towards[0], scale)
        if rescale:
            now = _deviation(m)
            ratio = torch.where(now > 0, _deviation(towards[0]) / now, 1.0)
            m = m * (rescale * ratio + (1 - rescale))
        return _with_second(m, towards[1])

    return within, combined


def _deviation(m: Tensor) -> Tensor:
    """The standard deviation over each sample, [B, 1, ...]."""
    return m.reshape(len(m), -1).std(dim=1, correction=0).reshape(-1, *[1] * (m.ndim - 1))


def _scale(scale: Scale) -> Callable[[Tensor], Tensor]:
    """A guidance scale as a function of t, its values checked."""
    if not callable(scale) and not math.isfinite(number("scale", scale)):
        raise ValueError(f"scale = {scale}: expected a finite number, e.g. scale=7.5")

    def at(t: Tensor) -> Tensor:
        values = scale(t) if callable(scale) else torch.full_like(t, scale)
        if not isinstance(values, Tensor) or values.shape != t.shape or not values.isfinite().all():
            raise ValueError(
                f"scale gave {values!s:.200}: expected a finite number for each of the {len(t)} times"
            )
        return float64(values)

    return at


def _refuse_infinite(weights: Tensor, t: Tensor, why: str, instead: str) -> None:
    bad = ~weights.isfinite()
    if bad.any():
        raise ValueError(
            f"{why} at t = {t[bad][0]:g}, where alpha = 0: start later, or use a network that predicts {instead}"
        )


def _gradient(log_p: Callable[[Tensor, Tensor], Tensor], x: Tensor, label: Tensor) -> Tensor:
    """The gradient of log p with respect to x, with a graph of its own where gradients are kept."""
    keep = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        here = x if keep and x.requires_grad else x.detach().clone().requires_grad_()
        value = log_p(here, label.clone() if label.is_inference() else label)
        if not isinstance(value, Tensor) or value.shape != x.shape[:1]:
            came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"log_p gave {came}: expected log p(y | x) of each sample, [{len(x)}]")
        if not value.requires_grad:
            raise ValueError(
                "no gradient flows through log_p: call the classifier without torch.no_grad() and without detach()"
            )
        (gradient,) = torch.autograd.grad(value.sum(), here, create_graph=keep)
    return gradient


def _joined(first: Any, second: Any, batch: int | None) -> Any:
    """Two conditions as one of twice the batch, or, with None for the second, the first alone; with no batch they are only compared."""
    alone = second is None and batch is not None
    if isinstance(first, Tensor) and (alone or isinstance(second, Tensor)):
        sides = [first] if alone else [first, second]
        if batch is None:
            return None
        for side in sides:
            if side.ndim == 0 or len(side) not in (1, batch):
                raise ValueError(
                    f"a condition has shape {list(side.shape)}: expected [{batch}, ...], one for each sample, or [1, ...]"
                )
        return torch.cat([side.expand(batch, *side.shape[1:]) for side in sides])
    if first is None and second is None:
        return None
    if isinstance(first, Mapping) and (
        alone or (isinstance(second, Mapping) and first.keys() == second.keys())
    ):
        return {key: _joined(first[key], None if alone else second[key], batch) for key in first}
    if isinstance(first, (list, tuple)) and (
        alone or (type(first) is type(second) and len(first) == len(second))
    ):
        made = getattr(first, "_make", type(first))  # of a named tuple
        return made(_joined(v, None if alone else second[i], batch) for i, v in enumerate(first))
    raise TypeError(
        f"condition = {first!r:.100}, null = {second!r:.100}: expected tensors [B, ...], or the same mapping, list or tuple of them"
    )

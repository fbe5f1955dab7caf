"""What a network predicts, and converting between predictions.

Every prediction is a fixed mixture of data and noise, m = p x_0 + q eps, and x = alpha x_0 + sigma eps, so any
prediction follows from any other and x by solving two equations.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from solvers.arguments import choice, number
from solvers.schedules import Schedule, float64, in_lanes

VARIANCES = ("range", "square", "residual")
NO_GRADIENT = "no gradient flows through the model: call it without torch.no_grad() and without detach()"
PREDICTIONS = ("noise", "data", "velocity", "score", "flow", "edm")
ALIASES = {  # what other code calls them, for the error alone
    "epsilon": "noise", "eps": "noise", "v": "velocity", "v_prediction": "velocity",
    "x0": "data", "sample": "data", "denoiser": "data", "F": "edm", "flow_prediction": "flow",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A network together with what it predicts and what it reads as time.

    A bare callable (x [B, ...], t [B]) -> [B, ...] needs no Model: it is a noise prediction that reads the schedule's t.
    t comes in float32, in float64 for float64 x, as int64 where label gives whole numbers as integers.
    Prompts and class labels are bound into the callable. x is the sampler's own buffer: a net that keeps it must clone it.

    Attributes:
        net: (x [B, ...], label [B]) -> prediction [B, ...], and with `variance` a second output beside it.
        predicts: "noise" eps | "data" x_0 | "velocity" alpha eps - sigma x_0 | "score" -eps / sigma |
            "flow" dx/dt | "edm" the raw F of EDM, which is given x / sqrt(sigma^2 + sigma_data^2 alpha^2). EDM's
            preconditioned denoiser D(x; sigma) is "data".
        label: t [N] float64 -> what the net was trained to read, e.g. schedule.step (whole steps), schedule.sigma (flow
            networks under a shift), lambda t: schedule.sigma(t).log() / 4 (EDM's F). None: t itself.
        schedule: for "flow" alone, the schedule whose t the flow is a derivative in. None: the straight path
            alpha + sigma = 1, where dx/dsigma = eps - x_0 is what flow-matching networks are trained on.
        sigma_data: for "edm" alone, the standard deviation of the data.
        variance: what the net's second output is, if it has one, returned as a pair or as twice the channels: "range" v in
            [-1, 1] between the logarithms of a row's least and most variance (Improved DDPM); "square" E[eps^2 | x], or
            "residual" E[(eps - prediction)^2 | x], element by element (SN-DPM, NPR-DPM). Plans whose noise does not depend on
            it leave it aside.
        native: what the network inside was trained to predict, where what is around it predicts something else; the defaults of `sample` go by it. None: as `predicts`.
        at_levels: what `solvers.guidance` makes of a model has it: (t, alpha, sigma), each [N] float64 -> tensors [N] in tuples, numbers
            of each call that are known before it. The net is then called as net(x, label, weights, dtype), with the numbers of its
            call, x in the state's dtype and the dtype in which networks are to be called.

    Raises:
        TypeError: net, label or at_levels is not callable.
        ValueError: predicts or variance is not one of those.
    """

    net: Callable[..., Any]
    predicts: str = "noise"
    label: Callable[[Tensor], Tensor] | None = None
    schedule: Schedule | None = None
    sigma_data: float = 0.5
    variance: str | None = None
    native: str | None = None
    at_levels: Callable[[Tensor, Tensor, Tensor], tuple] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.net, Model):
            raise TypeError("net is a Model already: pass the network itself, model.net")
        if not callable(self.net):
            raise TypeError(f"model = {self.net!r} is not callable: expected net(x, t) -> prediction")
        if self.label is not None and not callable(self.label):
            raise TypeError(
                f"label = {self.label!r} is not callable: expected a function of t, e.g. label=schedule.label"
            )
        if self.at_levels is not None and not callable(self.at_levels):
            raise TypeError(
                f"at_levels = {self.at_levels!r:.100} is not callable: leave it to solvers.guidance"
            )
        choice("predicts", self.predicts, PREDICTIONS, ALIASES)
        if self.native is not None:
            choice("native", self.native, PREDICTIONS, ALIASES)
        if self.variance is not None:
            choice("variance", self.variance, VARIANCES, {"learned_range": "range"})
        if not 0 < number("sigma_data", self.sigma_data) < math.inf:
            raise ValueError(
                f"sigma_data = {self.sigma_data}: expected the data's standard deviation, finite and above 0"
            )

    def mixture(self, times: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The weights (p, q), each [N], of data and noise in this prediction at N levels."""
        if self.predicts == "flow":
            return path_derivative(self.schedule, times, alpha, sigma)
        return mixture(self.predicts, alpha, sigma, self.sigma_data)

    def input_scale(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """What x is multiplied by before the net sees it, [N]: 1, except for "edm"."""
        if self.predicts == "edm":
            return (sigma**2 + (self.sigma_data * alpha) ** 2).rsqrt()
        return torch.ones_like(alpha)

    def labels(self, times: Tensor) -> list[float] | list[int]:
        """What the net reads at each of some times, computed on the host."""
        if self.label is None:
            return times.tolist()
        answer = self.label(times)
        try:
            labels = torch.as_tensor(answer, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"label gave {answer!s:.200}: expected a number for each of the {len(times)} calls"
            ) from error
        if labels.shape != times.shape or not labels.isfinite().all():
            raise ValueError(
                f"label gave {answer!s:.200}: expected a finite number for each of the {len(times)} calls"
            )
        return labels.tolist()


def picked(weights: tuple, pick: Callable[[Any], Any]) -> tuple:
    """The same tuples, with something made of each of the numbers of `Model.at_levels`."""
    return tuple(picked(w, pick) if isinstance(w, tuple) else pick(w) for w in weights)


AnyModel = Model | Callable[[Tensor, Tensor], Tensor]


def as_model(model: AnyModel) -> Model:
    """The model as it is, or a bare callable declared to be a noise prediction."""
    return model if isinstance(model, Model) else Model(model)


def native_of(model: Model) -> str:
    """What the network inside was trained to predict."""
    return model.native or model.predicts


def mixture(
    predicts: str, alpha: Tensor, sigma: Tensor, sigma_data: float = 0.5, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The weights (p, q) of m = p x_0 + q eps for every prediction but "flow", which needs the path's derivative.

    `scale` is that of a plan in velocity form, 1 for a network's velocity.

    Source: "edm" is eq. 7 of Karras et al. 2022 (arXiv 2206.00364) solved for F, with x = alpha y; "velocity" is
    appendix D of Salimans & Ho 2022 (arXiv 2202.00512).
    """
    if predicts == "velocity":
        return -sigma / scale, scale * alpha
    if predicts == "edm":
        norm = torch.sqrt(sigma**2 + (sigma_data * alpha) ** 2)
        return sigma / (sigma_data * norm), -sigma_data * alpha / norm
    if predicts == "data":
        return torch.ones_like(alpha), torch.zeros_like(alpha)
    return torch.zeros_like(alpha), torch.ones_like(alpha) if predicts == "noise" else -1 / sigma


def conversion(
    have: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """The weights (c_x, c_m) of wanted = c_x x + c_m m, from the mixtures (p, q) of both predictions.

    c_x = (p' q - q' p) / D, c_m = (alpha q' - sigma p') / D with D = alpha q - sigma p. Where the two predictions are
    multiples of each other c_x is 0 and D cancels, so that noise stays noise at alpha = 0. Infinite where the wanted
    prediction is not determined, as data is not by noise at alpha = 0.

    Args:
        have: (p, q), each [N], of the prediction m at hand.
        want: (p', q'), each [N], of the wanted prediction.
        alpha: [N], weight of the data in x.
        sigma: [N], weight of the noise in x.

    Returns:
        (c_x, c_m), each [N], float64.
    """
    (p, q), (p_want, q_want) = have, want
    cross = p_want * q - q_want * p
    determinant = alpha * q - sigma * p
    from_x, from_m = cross / determinant, (alpha * q_want - sigma * p_want) / determinant
    parallel = cross == 0
    if parallel.any():
        larger = p.abs() > q.abs()
        multiple = torch.where(larger, p_want, q_want) / torch.where(larger, p, q)
        from_x, from_m = torch.where(parallel, 0.0, from_x), torch.where(parallel, multiple, from_m)
    return from_x, from_m


def convert(
    m: Tensor, x: Tensor, alpha: float, sigma: float, *, have: str, want: str, sigma_data: float = 0.5
) -> Tensor:
    """One prediction turned into another at one level; "flow" on the straight path alpha + sigma = 1 alone.

    Args:
        m: the prediction at hand, [B, ...].
        x: the state it was made at, [B, ...].
        alpha: weight of the data in x.
        sigma: weight of the noise in x.
        have: what m is.
        want: what is wanted.
        sigma_data: for "edm".

    Returns:
        The wanted prediction, [B, ...].

    Raises:
        ValueError: an unknown name, or the level does not determine the wanted prediction.
    """
    if m.shape != x.shape:
        raise ValueError(f"m has shape {list(m.shape)}: expected that of x, {list(x.shape)}")
    for name, value in (("have", have), ("want", want)):
        choice(name, value, PREDICTIONS, ALIASES)
    level = (float64(alpha), float64(sigma))
    given, wanted = (
        path_derivative(None, level[0], *level) if name == "flow" else mixture(name, *level, sigma_data)
        for name in (have, want)
    )
    from_x, from_m = conversion(given, wanted, *level)
    if not (from_x.isfinite() and from_m.isfinite()):
        raise ValueError(
            f"a {have} prediction does not determine {want} at alpha = {alpha:g}, sigma = {sigma:g}"
        )
    return float(from_x) * x + float(from_m) * m


def centred(model: AnyModel, mean: Tensor) -> Model:
    """The model of x - mean, for a prior that is centred on `mean`: x_t = mean + alpha (x_0 - mean) + sigma eps.

    Whatever the sampler, x = run(plan, centred(model, mean), x - mean, ...) + mean; x at the start is mean + sigma times standard normals.
    Source: Popov et al. 2022 (arXiv 2109.13821), eq. 1, with X-bar for the mean.

    Args:
        model: a network that reads x and predicts noise or score, which the change of variables leaves alone, or data.
        mean: [*D] or [B, *D].

    Raises:
        ValueError: the model predicts something else.
    """
    model = as_model(model)
    if not isinstance(mean, Tensor):
        raise TypeError(f"mean is {type(mean).__name__}: expected a tensor [*D], e.g. torch.tensor(mean)")
    if model.predicts not in ("noise", "score", "data"):
        raise ValueError(
            f"predicts = {model.predicts!r}: expected noise, score or data; turn the others into one of these first, see `convert`"
        )
    if model.predicts == "data" != native_of(model):
        raise ValueError(
            "the data prediction was made on the path of x, which `centred` moves: centre the network first, and put guidance and hooks around that"
        )
    moved = 1.0 if model.predicts == "data" else 0.0

    def net(x: Tensor, label: Tensor, *level: Any) -> Tensor | tuple[Tensor, Tensor]:
        m = model.net(x + mean.to(x), label, *level)
        if model.variance is None:
            return m - moved * mean.to(x) if isinstance(m, Tensor) else m
        m, second = two_outputs(m, x, "the model of x - mean")
        return m - moved * mean.to(m), second

    return replace(model, net=net)


def checkpointed(model: AnyModel) -> Model:
    """The model, whose activations are made again on the way back: gradients through a run, `grad=True`, in the memory of one call.

    A run keeps x of every call then, and nothing of the network's inside; the network is called twice.
    Source: Chen et al. 2016 (arXiv 1604.06174), by torch.utils.checkpoint.
    """
    model = as_model(model)
    return replace(model, net=partial(checkpoint, model.net, use_reentrant=False))


def predictor(
    model: AnyModel, schedule: Schedule, want: str, scale: float = 1.0, dtype: torch.dtype | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model's prediction turned into another, as a function (x [B, ...], t float64 [] or [B]) -> [B, ...] that gradients flow through.

    `scale` is that of "velocity"; "flow" is the derivative in the schedule's t. The network is called in `dtype`, by default that of x.
    It raises ValueError where the level does not determine the wanted prediction.
    """
    model = as_model(model)

    def weights_at(times: Tensor) -> tuple[Tensor, Tensor]:
        level = schedule.alpha(times), schedule.sigma(times)
        wanted = (
            path_derivative(schedule, times, *level) if want == "flow" else mixture(want, *level, scale=scale)
        )
        return conversion(model.mixture(times, *level), wanted, *level)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        times = t.reshape(-1)
        weights = in_lanes(weights_at, times)
        undetermined = ~(weights[0].isfinite() & weights[1].isfinite())
        if undetermined.any():
            raise ValueError(
                f"a {model.predicts} prediction does not determine {want} at t = {times[undetermined][0]:g}; keep away from it (start=, stop=), where alpha "
                "or sigma is 0, or use a network that predicts velocity or flow"
            )
        from_x, from_m = (v.to(x).reshape(-1, *[1] * (x.ndim - 1)) for v in weights)
        m, _ = outputs_at(model, schedule, x, times, dtype)
        if x.requires_grad and torch.is_grad_enabled() and not m.requires_grad:
            raise ValueError(NO_GRADIENT)
        return from_x * x + from_m * m

    return predict


def outputs_at(
    model: Model, schedule: Schedule, x: Tensor, times: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """The network asked as `run` asks it: its prediction and, if it has one, its second output, each [B, ...].

    Args:
        model: the network.
        schedule: noise schedule.
        x: the states, [B, ...].
        times: float64, [1] for all or [B].
        dtype: in which the network is called; None for that of x.
    """
    scale = in_lanes(lambda t: model.input_scale(schedule.alpha(t), schedule.sigma(t)), times)
    read = model.labels(times)
    label_dtype = torch.long if isinstance(read[0], int) else x.dtype
    labels = torch.tensor(read, dtype=label_dtype, device=x.device).expand(len(x))
    column = [-1] + [1] * (x.ndim - 1)
    given = scale.to(x).reshape(column) * x
    level: tuple = ()
    if model.at_levels is None:
        given = given.to(dtype or x.dtype)
    else:
        weights = in_lanes(partial(_weights_at, model, schedule), times)
        level = (
            picked(weights, lambda w: w.item() if len(w) == 1 else w.to(x).reshape(column)),
            dtype or x.dtype,
        )
    where = f"t = {times[0]:g}"
    version = 0 if given.is_inference() else given._version
    try:
        m = model.net(given, labels, *level)
    except Exception as error:
        error.add_note(f"raised by the model at {where}; it was called with x in {dtype or x.dtype}")
        raise
    if level and version != (0 if given.is_inference() else given._version):  # what is guided reads it again
        raise ValueError(f"the model changed its input x in place at {where}: let it work on a clone")
    return checked_outputs(model, m, x, where)


def _weights_at(model: Model, schedule: Schedule, times: Tensor) -> tuple:
    assert model.at_levels is not None
    return model.at_levels(times, schedule.alpha(times), schedule.sigma(times))


def checked_outputs(model: Model, m: Any, x: Tensor, where: str) -> tuple[Tensor, Tensor | None]:
    """What a network gave for x, its contract checked: its prediction and, if it has one, its second output, in the dtype of x."""
    second = None
    if model.variance is not None:
        m, second = two_outputs(m, x, where)
    if not isinstance(m, Tensor) or m.shape != x.shape or m.device != x.device or not m.is_floating_point():
        came = f"{m.dtype} {list(m.shape)} on {m.device}" if isinstance(m, Tensor) else type(m).__name__
        raise ValueError(
            f"the model returned {came} at {where}: expected floating point {list(x.shape)} on {x.device}, like x"
        )
    return m.to(x.dtype), second


def two_outputs(outputs: object, x: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The prediction and the second output, from a pair of tensors or one with twice the channels."""
    if isinstance(outputs, Tensor) and outputs.ndim == x.ndim > 1 and outputs.shape[1] == 2 * x.shape[1]:
        outputs = outputs.chunk(2, 1)
    if not (isinstance(outputs, tuple) and len(outputs) == 2 and all(isinstance(v, Tensor) for v in outputs)):
        came = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(
            f"the model returned {came} in {where}: with variance declared, expected the pair (prediction, second output), or one "
            "tensor with both along dimension 1"
        )
    if outputs[1].shape != x.shape or outputs[1].device != x.device:
        raise ValueError(
            f"the model's second output has shape {list(outputs[1].shape)} on {outputs[1].device} in {where}: expected "
            f"{list(x.shape)} on {x.device}, like x"
        )
    return outputs[0], outputs[1].to(x.dtype)


def path_derivative(
    schedule: Schedule | None, times: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(d alpha / dt, d sigma / dt), exactly, by differentiating the schedule, which must be that of the levels."""
    if schedule is None:
        if not torch.allclose(alpha + sigma, torch.ones_like(alpha), rtol=0, atol=1e-9):
            raise ValueError(
                'predicts="flow" on a path that is not straight (alpha + sigma is not 1) needs the schedule whose t it is a '
                'derivative in: Model(net, predicts="flow", schedule=schedule)'
            )
        return -torch.ones_like(alpha), torch.ones_like(sigma)
    with torch.inference_mode(False), torch.enable_grad():
        t = times.detach().clone().requires_grad_()
        levels = [f(t) + 0 * t for f in (schedule.alpha, schedule.sigma)]  # + 0 t: alpha may be constant
        slopes = [torch.autograd.grad(level.sum(), t)[0] for level in levels]
    for name, level, expected in zip(("alpha", "sigma"), levels, (alpha, sigma), strict=True):
        off = ~torch.isclose(level.detach(), expected, rtol=1e-9, atol=1e-9)
        if off.any():
            i = int(off.nonzero()[0])
            raise ValueError(
                f"the model's schedule has {name} = {level[i]:g} at t = {times[i]:g}, but the plan has {expected[i]:g}: give the "
                f"schedule that the plan was built with instead of {schedule!r:.100}"
            )
    return slopes[0], slopes[1]

"""DPM-Solver-v3: a linear part fitted to the model, per element of x, and its statistics."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from solvers.arguments import numbers, positive, whole
from solvers.files import load_tensors, save_tensors
from solvers.grids import given
from solvers.methods.exponential import GAUSS, Form, Levels, interpolatory
from solvers.noise import Noise, as_source, noised
from solvers.plan import Plan
from solvers.predictions import AnyModel, predictor
from solvers.schedules import Schedule

Fit = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]  # half log-SNR [K] -> (l, s, b), each [K, *D]
NAMES = ("half_logsnr", "l", "s", "b")
MOST_AT_ONCE = 2**22  # numbers of a table over the Gauss points of some steps
STEEPEST = 20.0  # of the integral of s over a step; noise and data form have -h and 0


@dataclass(frozen=True, eq=False)
class Statistics:
    """Statistics of a model at some half log-SNR; called, they are interpolated by the cubic through the four nearest.

    Attributes:
        half_logsnr: [M], increasing, M >= 4.
        l: [M, *D]; the share of x in sigma eps(x) that is taken into the linear part.
        s: [M, *D]; with f = (sigma eps - l x) / alpha, the slope of df / dlambda against f along the ODE.
        b: [M, *D]; and its intercept.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or half_logsnr does not increase.
    """

    half_logsnr: Tensor
    l: Tensor
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        for name in NAMES:
            object.__setattr__(self, name, numbers(name, getattr(self, name)).detach())
        nodes = len(self.half_logsnr)
        for name in NAMES[1:]:
            value = getattr(self, name)
            if value.shape != self.l.shape or len(value) != nodes or not value.isfinite().all():
                raise ValueError(
                    f"{name} has shape {list(value.shape)}: expected finite [{nodes}, *D], of one shape for l, s and b"
                )
        lam = self.half_logsnr
        if lam.ndim != 1 or nodes < 4 or not (lam.isfinite().all() and (lam.diff() > 0).all()):
            raise ValueError(f"half_logsnr = {lam!s:.200}: expected at least 4 increasing finite numbers")

    def __call__(self, half_logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(l, s, b) at half log-SNR [K], each [K, *D].

        Raises:
            ValueError: outside the range of the statistics.
        """
        nodes = self.half_logsnr
        slack = 1e-6 * (nodes[-1] - nodes[0])
        outside = (half_logsnr < nodes[0] - slack) | (half_logsnr > nodes[-1] + slack)
        if outside.any():
            raise ValueError(
                f"half log-SNR {half_logsnr[outside][0]:g} is outside the statistics' range [{nodes[0]:g}, {nodes[-1]:g}]: estimate "
                "them on times that reach as far as the grid"
            )
        first = (torch.searchsorted(nodes, half_logsnr.contiguous()) - 2).clamp(0, len(nodes) - 4)
        at = first[:, None] + torch.arange(4, device="cpu")
        away = half_logsnr[:, None] - nodes[at]
        apart = nodes[at][:, :, None] - nodes[at][:, None, :]
        eye = torch.eye(4, dtype=torch.bool, device="cpu")
        weights = torch.where(eye, 1.0, away[:, None, :] / apart.masked_fill(eye, 1.0)).prod(2)
        l, s, b = (torch.einsum("kj,kj...->k...", weights, v[at]) for v in (self.l, self.s, self.b))
        return l, s, b

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which is whole or not there at all."""
        save_tensors(Path(path), {name: getattr(self, name) for name in NAMES})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Statistics":
        """Read a file that `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        return Statistics(**load_tensors(Path(path), NAMES))


def gaussian_statistics(mean: Tensor | float, variance: Tensor | float) -> Fit:
    """The exact statistics of Gaussian data with independent elements: l = rho^2 / (variance + rho^2), s = 0, b = -mean dl / dlambda.

    Also a fit for other data of known mean and variance, at no call of the model.
    """
    mu, v = numbers("mean", mean), numbers("variance", variance)
    try:
        mu, v = torch.broadcast_tensors(mu, v)
    except RuntimeError as error:
        raise ValueError(
            f"mean has shape {list(mu.shape)}, variance {list(v.shape)}: expected shapes that broadcast"
        ) from error
    if not ((v > 0) & v.isfinite() & mu.isfinite()).all():
        raise ValueError(
            f"mean = {mean!s:.60}, variance = {variance!s:.60}: expected finite numbers, the variance above 0"
        )

    def fit(half_logsnr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = -2 * half_logsnr.reshape(-1, *[1] * v.ndim) - torch.log(v)
        l = torch.sigmoid(z)
        return l, torch.zeros_like(l), 2 * mu * l * torch.sigmoid(-z)

    return fit


def dpm_solver_v3(
    schedule: Schedule, times: Tensor, statistics: Fit, order: int = 3, corrector: bool = True
) -> Plan:
    """DPM-Solver-v3: Adams and its corrector on what a fitted linear part and a fitted slope leave of the prediction.

    Order p + 1 but 3 for p = 3, without corrector p but 2 for p = 3; 1 call per step; ODE; mixture form, per element.
    With N = sigma eps - l x, f = N / alpha, L = int l, S = int s and B = int e^{-S} b over the step, g = e^{-S} f - B is
    constant where the fit is exact, and::

        x_t = alpha_t e^{-L_t} (x_s / alpha_s - int e^{L+S} (g + B) dlambda),

    with the polynomial of g through the calls' N. Exact on Gaussian data with independent elements and their exact statistics.
    Needs: statistics of the model; finite half log-SNR.
    Source: Zheng et al. 2023 (arXiv 2310.13268). Differs: integrals by Gauss points of each step,
    where the released code sums over the statistics' grid and moves the times onto it.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        statistics: (l, s, b) at half log-SNR [K], each [K, *D]: `estimate_statistics`, `gaussian_statistics`, or a function.
        order: p, 1 to 3.
        corrector: whether a step is corrected once the model is called at its end.
    """
    whole("order", order, 1, 3)
    levels = Levels.of(schedule, times)
    lam, alpha, sigma = levels.half_logsnr, levels.alpha, levels.sigma
    if lam.isinf().any():
        end = "start" if lam[0].isinf() else "stop"
        raise ValueError(
            f"the grid's {end} has infinite half log-SNR, where there are no statistics: give a {end} inside, e.g. sv.logsnr"
        )
    fitted = statistics(lam[:-1]) if callable(statistics) else None
    if not (
        isinstance(fitted, tuple) and all(isinstance(v, Tensor) and len(v) == len(lam) - 1 for v in fitted)
    ):
        raise TypeError(
            f"statistics = {statistics!r:.100}: expected a function of half log-SNR [K] that gives (l, s, b), each [K, *D] in float64"
        )
    every = _Integrals.over(statistics, lam, fitted[0], order + corrector)
    if not (steepest := every.slope.abs().max().item()) < STEEPEST:
        raise ValueError(
            f"the statistics' s has an integral of {steepest:.3g} over one step, a factor of e^{steepest:.3g}: they are not of a smooth "
            "model; estimate them at more times and of more samples, or take gaussian_statistics"
        )
    a = torch.exp(-every.linear)
    a = _column(alpha[1:] / alpha[:-1], a) * a
    past = range(-1, -order, -1)
    weights, shift = _rows(every, lam, alpha, [0, *past])
    b = torch.cat([weights, torch.zeros_like(weights[:, :corrector])], 1)
    if corrector:  # the next row begins with what the correction adds to x
        better, better_shift = _rows(every, lam, alpha, [0, 1, *past])
        better = better[:, [1, 0, *range(2, order + 1)]]  # newest first
        better[:, 1:] -= weights
        b[1:] += a[1:, None] * better[:-1]
        shift = torch.cat([shift[:1], shift[1:] + a[1:] * (better_shift - shift)[:-1]])
    l, _, _ = fitted
    mix = torch.stack([-_column(alpha[:-1], l) * l, _column(sigma[:-1], l) * (1 - l)], 1)
    return Plan(levels.times, alpha, sigma, a, b, predicts="mixture", mix=mix, shift=shift)


def estimate_statistics(
    model: AnyModel,
    schedule: Schedule,
    x0: Tensor,
    times: Tensor,
    noise: Noise,
    probes: int = 1,
    delta: float = 0.01,
    batch_size: int = 64,
    progress: bool = False,
) -> Statistics:
    """The statistics of DPM-Solver-v3, from any model that can be differentiated and a batch of data or of its samples.

    l = E diag(sigma d eps / dx), by Hutchinson's v (v^T d eps / dx) with random signs v; then s and b by least squares of
    df / dlambda on f, the derivative along the ODE being a central difference over half log-SNR +- delta between DDIM steps.
    Four calls and `probes` backward passes for every time and sample.
    Source: Zheng et al. 2023 (arXiv 2310.13268), section 3.1 and appendix C.

    Args:
        model: (x [B, ...], t [B]) -> prediction of the noise, or a Model; read between its levels too.
        schedule: noise schedule.
        x0: data, or samples of the model, [n, *D], float32 or float64.
        times: where to estimate, [M], M >= 4, strictly decreasing, with finite half log-SNR; the ends of the grids to be used and
            about a hundred between them.
        noise: an int seed, a torch.Generator or a noise source, for samples 0 .. n-1.
        probes: sign vectors for each time and sample.
        delta: half the span of the central difference.
        batch_size: samples in a call.
        progress: show a progress bar.

    Returns:
        Statistics on the host, float64.

    Raises:
        TypeError: x0 is not a tensor in float32 or float64.
        ValueError: x0 or the model's answer is not finite, or has another shape; or no gradient flows through the model.
    """
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64):
        kind = x0.dtype if isinstance(x0, Tensor) else type(x0).__name__
        raise TypeError(
            f"x0 is {kind}: expected data in float32 or float64, which statistics need the digits of"
        )
    if x0.ndim < 2 or not len(x0) or not x0.isfinite().all():
        raise ValueError(f"x0 has shape {list(x0.shape)}: expected finite data, [n, *D] with n >= 1")
    positive(delta=delta)
    whole("probes", probes, 1, 10**6)
    whole("batch_size", batch_size, 1, 10**9)
    levels = Levels.at(schedule, given(schedule, times))
    lam = levels.half_logsnr
    if len(lam) < 4 or lam.isinf().any():
        raise ValueError(
            f"times has {len(lam)} entries, half log-SNR from {lam[0]:g} to {lam[-1]:g}: expected at least 4, all finite"
        )
    source, noise_at = as_source(noise, len(x0)), predictor(model, schedule, "noise")
    shape = [len(lam), *x0.shape[1:]]

    # one draw for all times: statistics that are off by chance are still smooth, as the solver's polynomials need them
    drawn, signs = source(0, x0), [source(1 + k, x0).sign() for k in range(probes)]

    def batches(m: int) -> list[tuple[Tensor, slice]]:
        x = noised(x0, schedule, levels.times[m], drawn)
        return [(x[i : i + batch_size], slice(i, i + batch_size)) for i in range(0, len(x), batch_size)]

    l = torch.zeros(shape, dtype=torch.float64, device="cpu")
    for m in tqdm(range(len(lam)), disable=not progress, desc="l", unit="time"):
        for x, part in batches(m):
            with torch.enable_grad():
                x.requires_grad_()
                eps = noise_at(x, levels.times[m])
                if not eps.isfinite().all():
                    raise ValueError(f"the model's answer at t = {levels.times[m]:g} is not finite")
                for k, v in enumerate(signs):
                    (g,) = torch.autograd.grad(eps, x, v[part], retain_graph=k + 1 < probes)
                    l[m] += _host(v[part] * g).sum(0) * levels.sigma[m]
    l /= len(x0) * probes
    known = Statistics(lam, l, torch.zeros_like(l), torch.zeros_like(l))

    sums = torch.zeros(5, *shape, dtype=torch.float64, device="cpu")
    for m in tqdm(range(len(lam)), disable=not progress, desc="s, b", unit="time"):
        near = torch.stack([(lam[m] - delta).clamp(min=lam[0]), (lam[m] + delta).clamp(max=lam[-1])])
        ends, (shares, _, _) = Levels.at(schedule, schedule.time(near)), known(near)
        of_x, of_noise = Form("noise").exact_part(levels[m : m + 1], ends)
        for x, _ in batches(m):
            with torch.no_grad():
                eps = noise_at(x, levels.times[m])
                parts = [_host(v) / levels.alpha[m] for v in (float(levels.sigma[m]) * eps, l[m].to(x) * x)]
                f, size = parts[0] - parts[1], parts[0] ** 2 + parts[1] ** 2
                values = []
                for k in range(2):
                    moved = float(of_x[k]) * x + float(of_noise[k]) * eps
                    output = float(ends.sigma[k]) * noise_at(moved, ends.times[k])
                    values.append(_host(output - shares[k].to(x) * moved) / ends.alpha[k])
                slope = (values[1] - values[0]) / (near[1] - near[0])
            sums[:, m] += torch.stack([v.sum(0) for v in (f, slope, f * f, f * slope, size)])
    mean, mean_slope, square, product, size = sums / len(x0)
    variance = square - mean**2
    varies = variance > 1e-12 * square + (1e3 * torch.finfo(x0.dtype).eps) ** 2 * size  # more than rounding
    s = torch.where(varies, (product - mean * mean_slope) / torch.where(varies, variance, 1.0), 0.0)
    return Statistics(lam, l, s, mean_slope - s * mean)


@dataclass(frozen=True)
class _Integrals:
    """Over each step, from its start: L = int l, S = int s, B = int e^{-S} b at its end, and what weighs polynomials."""

    linear: Tensor  # L, [steps, *D]
    slope: Tensor  # S, [steps, *D]
    offset: Tensor  # B, [steps, *D]
    constant: Tensor  # int e^{L+S} B dlambda, [steps, *D]
    moments: Tensor  # int e^{L+S} ((lambda - lambda_s) / h)^k dlambda, [steps, degree + 1, *D]

    @staticmethod
    def over(statistics: Fit, lam: Tensor, like: Tensor, degree: int) -> "_Integrals":
        """Of the steps of a grid, as many of them at once as fit in the memory; l at each call is like."""
        some = max(1, MOST_AT_ONCE // (len(POINTS) * max(1, like[0].numel())))
        runs = [
            _Integrals._over(statistics, lam[i : i + some + 1], degree) for i in range(0, len(lam) - 1, some)
        ]
        return _Integrals(*(torch.cat(parts) for parts in zip(*runs, strict=True)))

    @staticmethod
    def _over(statistics: Fit, lam: Tensor, degree: int) -> tuple[Tensor, ...]:
        places = lam[:-1] + lam.diff() * POINTS[:, None]  # [G, steps]
        l, s, b = (v.unflatten(0, places.shape) for v in statistics(places.flatten()))
        h = _column(lam.diff(), l[0])
        linear, slope = (
            h * torch.tensordot(CUMULATIVE, v, 1) for v in (l, s)
        )  # to each point, and to the end
        offset = h * torch.tensordot(CUMULATIVE, torch.exp(-slope[:-1]) * b, 1)
        kernel = torch.exp(linear[:-1] + slope[:-1])
        constant = h * torch.tensordot(CUMULATIVE[-1], kernel * offset[:-1], 1)
        powers = POINTS ** torch.arange(degree + 1, device="cpu")[:, None]
        moments = h * torch.tensordot(CUMULATIVE[-1] * powers, kernel, 1)
        return linear[-1], slope[-1], offset[-1], constant, moments.transpose(0, 1)


def _rows(every: _Integrals, lam: Tensor, alpha: Tensor, nodes: list[int]) -> tuple[Tensor, Tensor]:
    """For each step i, with g's polynomial through the nodes i + n that there are: the weights of N, [steps, nodes, *D], and the constant."""
    step = torch.arange(len(every.slope), device="cpu")
    at = step[:, None] + torch.tensor(nodes, device="cpu")
    has, at = at >= 0, at.clamp(min=0)
    slopes = {0: torch.zeros_like(every.slope), 1: every.slope}  # S from the step's start to a node
    offsets = {0: torch.zeros_like(every.slope), 1: every.offset}  # and B
    for n in range(-1, min(nodes) - 1, -1):
        before = (step + n).clamp(min=0)
        slopes[n] = slopes[n + 1] - every.slope[before]
        offsets[n] = offsets[n + 1] - torch.exp(every.slope[before] - slopes[n + 1]) * every.offset[before]
    weights = every.moments[:, :1]
    if len(nodes) > 1:
        ratios = torch.where(has, (lam[at] - lam[:-1, None]) / lam.diff()[:, None], 0.0)[:, 1:]
        others = interpolatory(ratios, every.moments[:, 1 : len(nodes)])
        weights = torch.cat([weights - others.sum(1, keepdim=True), others], 1)
    end = -_column(alpha[1:], every.linear) * torch.exp(-every.linear)
    slope, offset = (torch.stack([table[n] for n in nodes], 1) for table in (slopes, offsets))
    here = alpha[at].reshape(*at.shape, *[1] * (weights.ndim - 2))
    return end[:, None] * weights * torch.exp(-slope) / here, end * (
        every.constant - (weights * offset).sum(1)
    )


def _cumulative() -> tuple[Tensor, Tensor]:
    """Gauss points on [0, 1], [G], and the weights that integrate a function of them from 0 to each and to 1, [G + 1, G]."""
    points, weights = GAUSS
    degrees = np.arange(len(points))
    values = np.polynomial.legendre.legvander(2 * np.append(points, 1.0) - 1, len(points))
    coefficients = (
        (2 * degrees[:, None] + 1) * values[:-1, :-1].T * weights
    )  # of the Legendre series, [degree, G]
    below = np.hstack([-np.ones((len(values), 1)), values[:, :-2]])  # P_{k-1}, with P_{-1} = -1
    integrals = (values[:, 1:] - below) / (2 * degrees + 1)
    return torch.from_numpy(points), torch.from_numpy(integrals @ coefficients / 2)


POINTS, CUMULATIVE = _cumulative()


def _column(level: Tensor, like: Tensor) -> Tensor:
    return level.reshape(-1, *[1] * (like.ndim - 1))


def _host(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)

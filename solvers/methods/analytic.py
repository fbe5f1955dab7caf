"""Analytic-DPM and its extensions: the optimal reverse variance, its estimate, the optimal trajectory; ML-SDE."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.arguments import choice, number, numbers, whole
from solvers.files import load_tensors, save_tensors
from solvers.grids import given
from solvers.methods.exponential import Levels, refuse_no_data_at_start, refuse_upwards
from solvers.methods.multistep import first_order_step
from solvers.methods.stochastic import ddpm
from solvers.noise import Noise, in_batches, noised
from solvers.plan import Plan
from solvers.predictions import AnyModel, predictor
from solvers.schedules import Schedule

NAMES = ("half_logsnr", "values", "standard_error")
LASTS, ESTIMATORS = ("mean", "noise"), ("error", "square")
NO_VARIANCE = "where the noise prediction says nothing of the variance of the data"
CERTAIN = 1e-12  # as near as an interpolated gamma comes to 0 and 1


@dataclass(frozen=True, eq=False, repr=False)
class Gamma:
    """The mean square of a noise prediction, E ||eps^||^2 / d, at some half log-SNR; called, it is interpolated.

    log(gamma / (1 - gamma)) is taken as linear between neighbours, which is exact for isotropic Gaussian data.

    Attributes:
        half_logsnr: [M], increasing, M >= 2.
        values: [M]; in (0, 1] for an exact model.
        standard_error: [M]; of the estimate, 0 where it is exact.

    Raises:
        ValueError: shapes do not fit, a value is not finite, or half_logsnr does not increase.
    """

    half_logsnr: Tensor
    values: Tensor
    standard_error: Tensor

    def __post_init__(self) -> None:
        for name in NAMES:
            object.__setattr__(self, name, numbers(name, getattr(self, name)).detach())
            value = getattr(self, name)
            if value.ndim != 1 or len(value) != len(self.half_logsnr) or not value.isfinite().all():
                raise ValueError(
                    f"{name} has shape {list(value.shape)}: expected [{self.half_logsnr.numel()}] finite numbers"
                )
        if len(self.values) < 2 or not (self.half_logsnr.diff() > 0).all():
            raise ValueError(
                f"half_logsnr = {self.half_logsnr!s:.200}: expected at least 2 increasing numbers"
            )

    def __call__(self, half_logsnr: Tensor) -> Tensor:
        """Gamma at half log-SNR [K].

        Raises:
            ValueError: outside the range of the estimate.
        """
        nodes = self.half_logsnr
        slack = 1e-6 * (nodes[-1] - nodes[0])
        outside = ~((half_logsnr >= nodes[0] - slack) & (half_logsnr <= nodes[-1] + slack))
        if outside.any():
            raise ValueError(
                f"half log-SNR {half_logsnr[outside][0]:g} is outside gamma's range [{nodes[0]:g}, {nodes[-1]:g}]: estimate it on "
                "times that reach as far as the grid"
            )
        right = torch.searchsorted(nodes, half_logsnr.contiguous()).clamp(1, len(nodes) - 1)
        share = (half_logsnr - nodes[right - 1]) / (nodes[right] - nodes[right - 1])
        height = torch.logit(self.values, eps=CERTAIN)
        return torch.sigmoid(torch.lerp(height[right - 1], height[right], share))

    def __repr__(self) -> str:
        ends = self.half_logsnr[[0, -1]].tolist()
        return f"Gamma({len(self.values)} values, half log-SNR {ends[0]:.4g} to {ends[1]:.4g})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, which is whole or not there at all."""
        save_tensors(Path(path), {name: getattr(self, name) for name in NAMES})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Gamma":
        """Read a file that `save` wrote.

        Raises:
            ValueError: not such a file.
        """
        return Gamma(**load_tensors(Path(path), NAMES))


def gaussian_gamma(variance: Tensor | float) -> Callable[[Tensor], Tensor]:
    """The exact gamma of Gaussian data, from half log-SNR: the mean of rho^2 / (v + rho^2) over the variances v, all eigenvalues.

    Also a guess for other data of known variance, at no call of the model.
    """
    v = numbers("variance", variance).flatten()
    if not (len(v) and ((v > 0) & v.isfinite()).all()):
        raise ValueError(f"variance = {variance!s:.100}: expected finite numbers above 0")
    return lambda half_logsnr: torch.sigmoid(-2 * half_logsnr[..., None] - torch.log(v)).mean(-1)


def analytic_dpm(
    schedule: Schedule,
    times: Tensor,
    gamma: Tensor | Callable[[Tensor], Tensor],
    eta: float = 1.0,
    limit: float = math.inf,
    pixels: float = 0.0,
    last: str = "mean",
) -> Plan:
    """Analytic-DPM: DDPM's (eta = 1) or DDIM's mean (eta = 0, or between) with the variance of maximum likelihood.

    Order 1; 1 call per step; SDE; data form. With L = sigma_t q of `ddim` and A the weight of x_0 in its step, the variance is
    L^2 + A^2 rho_s^2 (1 - gamma_s), for any schedule and any steps; on isotropic Gaussian data every step is exact.
    Source: Bao et al. 2022 (arXiv 2201.06503), theorem 1, whose gamma is this one over sigma_s^2; clipping: its section 3 and code.

    Args:
        schedule: noise schedule.
        times: [steps + 1], with alpha > 0.
        gamma: mean square of the noise prediction, E ||eps^||^2 / d: at each call, [steps], or a function of half log-SNR, as
            `estimate_gamma` and `gaussian_gamma` give. What lies outside [0, 1], where no exact model's can, is taken as its end.
        eta: share of the posterior's noise in the step itself, in [0, 1].
        limit: most that the variance of x_0 given x can be: 1 for data in [-1, 1].
        pixels: if not 0, the last noise added moves pixels (2 / 255 each, in [-1, 1]) by at most so many on average; the authors
            take 1 or 2.
        last: of a step to sigma = 0: "mean", the prediction itself, or "noise", the law.
    """
    levels, a, weight, deviation, cap = _bounded(schedule, times, eta, limit, pixels, last)
    square = _at_calls(gamma, levels).clamp(0, 1)
    most = (levels.sigma / levels.alpha)[:-1] ** 2 * (1 - square)
    variance = torch.minimum(deviation**2 + weight**2 * most.clamp(max=limit), cap)
    c = torch.sqrt(variance)[:, None]
    return Plan(levels.times, levels.alpha, levels.sigma, a, weight[:, None], c, "data")


def extended_analytic_dpm(
    schedule: Schedule,
    times: Tensor,
    eta: float = 1.0,
    limit: float = math.inf,
    pixels: float = 0.0,
    last: str = "mean",
) -> Plan:
    """Extended-Analytic-DPM: the same with a variance for each element of each sample, from the model's second output.

    Order 1; 1 call per step; SDE; data form. SN-DPM with Model(net, variance="square"), where the second output is E[eps^2 | x]; NPR-DPM
    with variance="residual", E[(eps - eps^)^2 | x], which is optimal for an imperfect mean too and small where the mean is good. Give the limit:
    at the noisy end a small error of a trained E[eps^2 | x] is a large variance of x_0. A second output of ones is the
    authors' heuristic that costs no training. `sn_loss` and `npr_loss` train such outputs.
    Source: Bao et al. 2022 (arXiv 2206.07309), theorems 1 and 2.
    See `analytic_dpm` for the arguments.
    """
    levels, a, weight, deviation, cap = _bounded(schedule, times, eta, limit, pixels, last)
    least = torch.minimum(deviation**2, cap)
    most = deviation**2 + (weight * levels.sigma[:-1] / levels.alpha[:-1]) ** 2
    cap = torch.minimum(cap, deviation**2 + weight**2 * limit)
    most = torch.where(cap > 0, most, 0.0)
    variances = torch.stack([least, most, cap], 1)
    start = levels.times, levels.alpha, levels.sigma, a, weight[:, None]
    return Plan(*start, predicts="data", variances=variances, second="moments")


def ml_sde(
    schedule: Schedule, times: Tensor, gamma: Tensor | Callable[[Tensor], Tensor] | None = None
) -> Plan:
    """The maximum-likelihood SDE solver: of all steps of its form the one under which forward paths are the most likely.

    Order 1; 1 call per step; SDE; data form. Its kappa, omega and sigma are those of the DDPM posterior step, whatever the schedule, so
    that is what it is; with the trace term that its optimum has, the mean variance of x_0 given x, it is `analytic_dpm`. A prior of
    another mean is a change of variables for any sampler: see `centred`.
    Source: Popov et al. 2022 (arXiv 2109.13821), section 3 and theorem 1. Differs: the released code leaves the trace term out.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
        gamma: as for `analytic_dpm`; None leaves the trace term out.
    """
    return ddpm(schedule, times) if gamma is None else analytic_dpm(schedule, times, gamma)


def optimal_trajectory(
    schedule: Schedule, times: Tensor, gamma: Tensor | Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    """The times, out of some, at which Analytic-DPM's path has the least KL divergence: [steps + 1], both ends included.

    By dynamic programming over sum log(1 - (1 - e^{-2h}) gamma_s), which is what of the path's divergence depends on the times. All
    ways are equal on isotropic Gaussian data. O(steps M^2).
    Source: Bao et al. 2022 (arXiv 2201.06503), theorem 3 and algorithm 2.

    Args:
        schedule: noise schedule.
        times: candidates, [M + 1], M >= steps, e.g. all levels of a Discrete schedule.
        gamma: below 1, at each candidate but the last, [M], or a function; see `analytic_dpm`.
        steps: of the trajectory.

    Raises:
        ValueError: gamma is not below 1, or alpha = 0 at the first time.
    """
    levels = Levels.of(schedule, times)
    refuse_no_data_at_start(NO_VARIANCE, levels)
    count = len(levels.times) - 1
    whole("steps", steps, 1, count)
    square, lam = _at_calls(gamma, levels).clamp(min=0), levels.half_logsnr
    if (square >= 1).any():
        m = int((square >= 1).nonzero()[0])
        raise ValueError(
            f"gamma = {square[m]:.6g} at times[{m}] = {levels.times[m]:g}: a step from there would cost nothing, so no trajectory is optimal; "
            "expected gamma < 1, as estimate_gamma(..., by='error') gives it"
        )
    h = (lam[None, :] - lam[:-1, None]).clamp(min=0)
    cost = torch.log1p(torch.expm1(-2 * h) * square[:, None])  # [s, t]
    cost[torch.tril(torch.ones_like(cost, dtype=torch.bool))] = math.inf
    least, came_from = cost[0], []
    for _ in range(steps - 1):
        least, best = (least[:-1, None] + cost).min(0)
        came_from.append(best)
    way = [count]
    for best in reversed(came_from):
        way.append(int(best[way[-1]]))
    return levels.times[torch.tensor([0, *reversed(way)], device="cpu")]


def estimate_gamma(
    model: AnyModel,
    schedule: Schedule,
    x0: Tensor,
    times: Tensor,
    noise: Noise,
    by: str = "error",
    batch_size: int = 64,
    progress: bool = False,
) -> Gamma:
    """Gamma of a model by Monte Carlo, one call for each time and sample.

    "square" averages ||eps^||^2 / d. "error" averages 1 - ||eps - eps^||^2 / d, which has the same mean for an exact model and the right one,
    the variance it leaves, for an imperfect model; what ||eps||^2 / d, of mean 1, explains of it is taken out (a control variate), so
    it is certain at both ends, where "square" is not.
    Source: Bao et al. 2022 (arXiv 2201.06503), eq. 8 ("square") and (arXiv 2206.07309), theorem 3 ("error").

    Args:
        model: (x [B, ...], t [B]) -> prediction of the noise, or a Model.
        schedule: noise schedule.
        x0: data, [n, ...], float32 or float64.
        times: where to estimate, [M], M >= 2, strictly decreasing, with finite half log-SNR.
        noise: an int seed, a torch.Generator or a noise source, for samples 0 .. n-1.
        by: "error" | "square".
        batch_size: samples in a call, and in memory beside x0.
        progress: show a progress bar.

    Returns:
        Gamma with its standard errors over the samples, on the host.

    Raises:
        ValueError: x0 or the model's answer is not finite, or has another shape.
    """
    if not isinstance(x0, Tensor) or x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"x0 is {x0.dtype if isinstance(x0, Tensor) else type(x0).__name__}: expected data in float32 or float64"
        )
    if x0.ndim < 2 or len(x0) < 3 or not x0.isfinite().all():
        raise ValueError(f"x0 has shape {list(x0.shape)}: expected finite data, [n, ...] with n >= 3")
    choice("by", by, ESTIMATORS)
    whole("batch_size", batch_size, 1, 10**9)
    levels = Levels.at(schedule, given(schedule, times))
    if levels.half_logsnr.isinf().any():
        raise ValueError(
            "times has an end of infinite half log-SNR: give ends with alpha > 0 and sigma > 0; of a network's levels down to clean "
            "data leave out the last, times[:-1]"
        )
    noise_at, batches = predictor(model, schedule, "noise"), x0.split(batch_size)
    sources = in_batches(noise, [len(batch) for batch in batches])
    mean, spread = torch.empty(2, len(levels.times), dtype=torch.float64, device="cpu")
    with torch.no_grad():
        for m in tqdm(range(len(levels.times)), disable=not progress, desc="gamma", unit="time"):
            rows = []  # of each sample: the square asked for, and that of the noise
            for batch, source in zip(batches, sources, strict=True):
                drawn = source(m, batch)
                eps = noise_at(noised(batch, schedule, levels.times[m], drawn), levels.times[m])
                rows.append(
                    torch.stack([_mean_square(drawn - eps if by == "error" else eps), _mean_square(drawn)])
                )
            values, known = torch.cat(rows, 1)
            if by == "error":
                apart = known - known.mean()
                values = 1 - values
                values = values - (values @ apart) / (apart @ apart) * (known - 1)
            if not values.isfinite().all():
                raise ValueError(f"the model's answer at t = {levels.times[m]:g} is not finite")
            mean[m], spread[m] = values.mean(), values.std() / math.sqrt(len(x0))
    return Gamma(levels.half_logsnr, mean, spread)


def _mean_square(x: Tensor) -> Tensor:
    """Of each sample, [B] float64 on the host."""
    return x.double().square().flatten(1).mean(1).cpu()


def _at_calls(gamma: Tensor | Callable[[Tensor], Tensor], levels: Levels) -> Tensor:
    """Gamma at each call, checked, [steps]."""
    calls = len(levels.times) - 1
    values = numbers("gamma", gamma(levels.half_logsnr[:-1]) if callable(gamma) else gamma)
    if values.shape != (calls,):
        raise ValueError(
            f"gamma has shape {list(values.shape)}: expected a number for each of the {calls} calls, or a function of half log-SNR, as "
            "a Gamma is"
        )
    if not values.isfinite().all():
        m = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"gamma[{m}] = {values[m]:g}: every value must be finite")
    return values


def _bounded(
    schedule: Schedule, times: Tensor, eta: float, limit: float, pixels: float, last: str
) -> tuple[Levels, Tensor, Tensor, Tensor, Tensor]:
    """The grid, the step's weights of x and x_0 and its own deviation L, and the most that each row's variance may be."""
    choice("last", last, LASTS)
    if not (number("limit", limit) > 0 and 0 <= number("pixels", pixels) < math.inf):
        raise ValueError(f"limit = {limit}, pixels = {pixels}: expected limit > 0 and pixels from 0, finite")
    levels = Levels.of(schedule, times)
    refuse_no_data_at_start(NO_VARIANCE, levels)
    a, weight, deviation = first_order_step(levels, eta)
    refuse_upwards(levels)
    cap = torch.full_like(a, math.inf)
    silent = (levels.sigma[1:] == 0) & (last == "mean")
    cap[silent] = 0.0
    if pixels and not silent.all():
        cap[int((~silent).nonzero().max())] = (pixels * 2 / 255) ** 2 * math.pi / 2
    return levels, a, weight, deviation, cap

"""Noise schedules: t -> (alpha, sigma), half log-SNR and its inverse, in float64 and stable at both ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from solvers.arguments import increasing, positive, within


class Schedule(Protocol):
    """x_t = alpha(t) x_0 + sigma(t) eps, with half log-SNR = log(alpha / sigma) strictly decreasing in t.

    Times and values are float64 tensors of equal shape. `start` and `stop` are the default ends of a grid: noise, data.
    """

    @property
    def start(self) -> float:
        """The default first time of a grid, at noise."""

    @property
    def stop(self) -> float:
        """The default last time of a grid, at data."""

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(alpha / sigma); +inf where sigma = 0, -inf where alpha = 0."""

    def time(self, half_logsnr: Tensor) -> Tensor:
        """The inverse of half_logsnr."""


def float64(value: Tensor | float) -> Tensor:
    """A time or a half log-SNR in float64: a tensor where it is, a number on the host."""
    return (
        value.double()
        if isinstance(value, Tensor)
        else torch.tensor(value, dtype=torch.float64, device="cpu")
    )


def host(t: Tensor | float) -> Tensor:
    """Times in float64 on the host, where schedules are computed."""
    return float64(t).cpu()


def inside(t: Tensor | float, last: float = 1.0) -> Tensor:
    """The time as float64, inside [0, last]."""
    t = float64(t)
    if not within(t, 0.0, last):
        outside = ~((t >= 0) & (t <= last))
        raise ValueError(
            f"t = {t[outside].flatten()[0].item():g} is outside the schedule's range [0, {last:g}]"
        )
    return t


LANES = 16  # a multiple of the numbers that a CPU's vector instructions take at once


def in_lanes(function: Callable[..., Any], *vectors: Any) -> Any:
    """A function of vectors [n] on the host, evaluated on copies filled up to whole lanes, so that no entry depends on n.

    In the last, shorter piece of a vector torch computes some functions (atan2, pow, logaddexp, ...) by other code, with other roundings.

    Args:
        function: of the vectors, elementwise, to tensors, levels or sequences of them.
        vectors: tensors or levels [n, ...], which can be indexed.

    Returns:
        What the function returns, cut to [n, ...].
    """
    count = len(vectors[0])
    last = max(count - 1, 0)
    index = torch.tensor([*range(count), *[last] * (-count % LANES)], dtype=torch.long, device="cpu")

    def cut(result: Any) -> Any:
        return type(result)(map(cut, result)) if isinstance(result, (tuple, list)) else result[:count]

    return cut(function(*(vector[index] for vector in vectors)))


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) to the last digit for every z (torch's own cuts off at z = 20)."""
    return torch.logaddexp(z, torch.zeros_like(z))


def _log_ratio(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.log(alpha) - torch.log(sigma)


@dataclass(frozen=True)
class _LinearBeta:
    """beta(t) = beta_min + (beta_max - beta_min) t on [0, 1], and B(t) = int_0^t beta."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    start: float = 1.0
    stop: float = 1e-3

    def __post_init__(self) -> None:
        positive(beta_min=self.beta_min, beta_max=self.beta_max)

    def _integral(self, t: Tensor) -> Tensor:
        t = inside(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def _time(self, integral: Tensor) -> Tensor:
        """Solve B(t) = integral by the root formula without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B/2)."""
        return torch.exp(-self._integral(t) / 2)


@dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving, linear beta: alpha = exp(-B/2), sigma^2 = 1 - exp(-B). Times in [0, 1].

    Source: Song et al. 2021 (arXiv 2011.13456), appendix B.
    """

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B))."""
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-B/2 - log(1 - exp(-B)) / 2."""
        integral = self._integral(t)
        return -integral / 2 - torch.log(-torch.expm1(-integral)) / 2

    def time(self, half_logsnr: Tensor) -> Tensor:
        """B = log(1 + exp(-2 half_logsnr)), then t."""
        return self._time(softplus(-2 * float64(half_logsnr)))


@dataclass(frozen=True)
class SubVP(_LinearBeta):
    """Sub-VP: alpha = exp(-B/2), sigma = 1 - exp(-B). Times in [0, 1].

    Source: Song et al. 2021 (arXiv 2011.13456), eq. 12 and appendix B.
    """

    def sigma(self, t: Tensor) -> Tensor:
        """1 - exp(-B), which is 1 - alpha^2 and not its root."""
        return -torch.expm1(-self._integral(t))

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-B/2 - log(1 - exp(-B))."""
        integral = self._integral(t)
        return -integral / 2 - torch.log(-torch.expm1(-integral))

    def time(self, half_logsnr: Tensor) -> Tensor:
        """With alpha the positive root of e^l alpha^2 + alpha - e^l, B = -log alpha^2 = -log(1 - alpha e^-l)."""
        half_logsnr = float64(half_logsnr)
        rho = torch.exp(-half_logsnr)
        alpha = 2 / (rho + torch.sqrt(rho**2 + 4))
        return self._time(torch.where(half_logsnr > 0, -torch.log1p(-alpha * rho), -2 * torch.log(alpha)))


@dataclass(frozen=True)
class Cosine:
    """Cosine: alpha = cos(a) / cos(a_0) with a = (pi/2) (t + shift) / (1 + shift), variance preserving. Times in [0, 1].

    alpha(1) = 0; the default start .9946 (half log-SNR -4.78) is that of DPM-Solver.
    Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17; continuous form of Lu et al. 2022 (arXiv 2206.00927).
    """

    shift: float = 0.008
    start: float = 0.9946
    stop: float = 1e-3

    def __post_init__(self) -> None:
        positive(shift=self.shift)

    def _first(self) -> float:
        return math.pi / 2 * self.shift / (1 + self.shift)

    def _turn(self, t: Tensor) -> Tensor:
        return math.pi / 2 * inside(t) / (1 + self.shift)

    def alpha(self, t: Tensor) -> Tensor:
        """The ratio cos(a) / cos(a_0), written as the sine of the complement so that it is exactly 0 at t = 1."""
        left = math.pi / 2 * (1 - inside(t)) / (1 + self.shift)
        return torch.sin(left) / math.cos(self._first())

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2), by cos^2 a_0 - cos^2 a = sin(a - a_0) sin(a + a_0)."""
        turn, first = self._turn(t), self._first()
        return torch.sqrt(torch.sin(turn) * torch.sin(turn + 2 * first)) / math.cos(first)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(alpha / sigma)."""
        return _log_ratio(self.alpha(t), self.sigma(t))

    def time(self, half_logsnr: Tensor) -> Tensor:
        """The time from a - a_0, whose sine is sigma^2 cos^2 a_0 / sin(a + a_0)."""
        first = self._first()
        sin0, cos0 = math.sin(first), math.cos(first)
        half_logsnr = float64(half_logsnr)
        alpha2, sigma2 = torch.sigmoid(2 * half_logsnr), torch.sigmoid(-2 * half_logsnr)
        cos, sin = cos0 * torch.sqrt(alpha2), torch.sqrt(sigma2 + sin0**2 * alpha2)
        turn = torch.atan2(sigma2 * cos0**2 / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0)
        return turn * (1 + self.shift) / (math.pi / 2)


@dataclass(frozen=True)
class VE:
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t. Times in [0, 1].

    Source: Song et al. 2021 (arXiv 2011.13456), appendix C.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    start: float = 1.0
    stop: float = 0.0

    def __post_init__(self) -> None:
        positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        increasing(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """1 at every time."""
        return torch.ones_like(inside(t))

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_min (sigma_max / sigma_min)^t."""
        return torch.exp(-self.half_logsnr(t))

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-log sigma, linear in t."""
        return -math.log(self.sigma_min) - inside(t) * math.log(self.sigma_max / self.sigma_min)

    def time(self, half_logsnr: Tensor) -> Tensor:
        """The inverse of that line."""
        return (-float64(half_logsnr) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM:
    """EDM: alpha = 1, sigma = t. Times in [0, inf); t = 0 is data without noise.

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        increasing(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def start(self) -> float:
        """sigma_max."""
        return self.sigma_max

    @property
    def stop(self) -> float:
        """sigma_min."""
        return self.sigma_min

    def alpha(self, t: Tensor) -> Tensor:
        """1 at every time."""
        return torch.ones_like(inside(t, math.inf))

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return inside(t, math.inf).clone()

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-log t."""
        return -torch.log(inside(t, math.inf))

    def time(self, half_logsnr: Tensor) -> Tensor:
        """exp(-half_logsnr)."""
        return torch.exp(-float64(half_logsnr))


@dataclass(frozen=True)
class Flow:
    """Flow matching: alpha = 1 - sigma, sigma = shift t / (1 + (shift - 1) t). Times in [0, 1], both ends exact.

    A shift moves half log-SNR by -log(shift). alpha(1) = 0 (pure noise) and sigma(0) = 0 (data).
    Source: Lipman et al. 2023 (arXiv 2210.02747); the shift is eq. 23 of Esser et al. 2024 (arXiv 2403.03206).
    """

    shift: float = 1.0
    start: float = 1.0
    stop: float = 0.0

    def __post_init__(self) -> None:
        positive(shift=self.shift)

    def alpha(self, t: Tensor) -> Tensor:
        """(1 - t) / (1 + (shift - 1) t)."""
        t = inside(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        """The time after the shift, shift t / (1 + (shift - 1) t)."""
        t = inside(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(1 - t) - log t - log shift."""
        t = inside(t)
        return torch.log1p(-t) - torch.log(t) - math.log(self.shift)

    def time(self, half_logsnr: Tensor) -> Tensor:
        """1 / (1 + shift e^half_logsnr)."""
        return torch.sigmoid(-float64(half_logsnr) - math.log(self.shift))


@dataclass(frozen=True)
class Inversion:
    """A schedule walked the other way, from data to noise: its grids increase, and deterministic plans on them encode data.

    A reversed grid is one of it: sv.ddim(sv.Inversion(schedule), times.flip(0)) is DDIM inversion.
    """

    schedule: Schedule

    @property
    def start(self) -> float:
        """Where the schedule stops, at data."""
        return self.schedule.stop

    @property
    def stop(self) -> float:
        """Where the schedule starts, at noise."""
        return self.schedule.start

    def alpha(self, t: Tensor) -> Tensor:
        """As of the schedule."""
        return self.schedule.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """As of the schedule."""
        return self.schedule.sigma(t)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """As of the schedule."""
        return self.schedule.half_logsnr(t)

    def time(self, half_logsnr: Tensor) -> Tensor:
        """As of the schedule."""
        return self.schedule.time(half_logsnr)


class BothWays(Inversion):
    """A schedule walked both ways: the steps of a grid may go from noise to data or back."""


BISECTIONS = 80  # halves [0, 1] below the spacing of float64 near any t > 1e-9


@dataclass(frozen=True)
class LogSNR:
    """Variance preserving with a given -log SNR gamma(t): alpha^2 = sigmoid(-gamma), sigma^2 = sigmoid(gamma). Times in [0, 1].

    By default gamma is the line from gamma_min to gamma_max, with the starting values of VDM. A given `gamma`
    (float64 tensor in and out, increasing on [0, 1]) replaces the line; its inverse is found by bisection.
    Source: Kingma et al. 2021 (arXiv 2107.00630), sections 3.1 and 3.2.
    """

    gamma_min: float = -13.3
    gamma_max: float = 5.0
    gamma: Callable[[Tensor], Tensor] | None = None
    start: float = 1.0
    stop: float = 0.0

    def __post_init__(self) -> None:
        increasing(gamma_min=self.gamma_min, gamma_max=self.gamma_max)
        if self.gamma is not None and not callable(self.gamma):
            raise TypeError(
                f"gamma = {self.gamma!r:.100}: expected a function of t, e.g. gamma=lambda t: 18.3 * t - 13.3"
            )
        probe = torch.linspace(0, 1, 1001, dtype=torch.float64, device="cpu")
        values = self._gamma(probe)
        if not isinstance(values, Tensor) or values.dtype != torch.float64 or values.shape != probe.shape:
            kind = (
                f"{values.dtype} {list(values.shape)}"
                if isinstance(values, Tensor)
                else type(values).__name__
            )
            raise TypeError(
                f"gamma gave {kind} for t float64 {list(probe.shape)}: expected float64 of the same shape"
            )
        steps = values.diff()
        if not (steps > 0).all():
            first = int((~(steps > 0)).nonzero()[0])
            raise ValueError(
                f"gamma must increase on [0, 1]: it does not between t = {probe[first]:g} and {probe[first + 1]:g}"
            )

    def _gamma(self, t: Tensor) -> Tensor:
        t = inside(t)
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t if self.gamma is None else self.gamma(t)

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(sigmoid(-gamma))."""
        return torch.exp(-softplus(self._gamma(t)) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(sigmoid(gamma))."""
        return torch.exp(-softplus(-self._gamma(t)) / 2)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-gamma / 2."""
        return -self._gamma(t) / 2

    def time(self, half_logsnr: Tensor) -> Tensor:
        """gamma^-1(-2 half_logsnr)."""
        target = -2 * float64(half_logsnr)
        if self.gamma is None:
            return (target - self.gamma_min) / (self.gamma_max - self.gamma_min)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        outside = (target < self._gamma(low)) | (target > self._gamma(high))
        if outside.any():
            raise ValueError(
                f"half_logsnr = {-target[outside].flatten()[0] / 2:g} is outside the range of -gamma / 2"
            )
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            below = self._gamma(middle) < target
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

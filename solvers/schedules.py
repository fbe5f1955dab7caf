"""Noise schedules: t -> (alpha, sigma), half log-SNR and its inverse, in float64 and stable at both ends."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

MAX_LEVELS = 10**6


class Schedule(Protocol):
    """x_t = alpha(t) x_0 + sigma(t) eps, with half log-SNR = log(alpha / sigma) strictly decreasing in t.

    Times and values are float64 tensors of equal shape. `start` and `stop` are the default ends of a grid: noise, data.
    """

    @property
    def start(self) -> float:
        """The default first time of a grid: noise."""

    @property
    def stop(self) -> float:
        """The default last time of a grid: data."""

    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data."""

    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise."""

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(alpha / sigma); +inf where sigma = 0, -inf where alpha = 0."""

    def time(self, half_logsnr: Tensor) -> Tensor:
        """The inverse of half_logsnr."""


def number(name: str, value: float) -> float:
    """A real number, and not text that reads like one."""
    if isinstance(value, (str, bytes, bool)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} = {value!r:.100}: expected a real number")
    return float(value)


def numbers(name: str, values: "Tensor | ArrayLike") -> Tensor:
    """Real numbers as a float64 tensor of their own on the host. Python's are never rounded to float32 on the way.

    Raises:
        TypeError: they are not real numbers, or in half precision and so rounded already.
    """
    if not isinstance(values, Tensor):
        try:
            array = np.array(values, order="C")
        except ValueError:  # ragged
            array = np.array(None)
        if array.dtype.kind not in "biufc":
            raise TypeError(
                f"{name} = {values!r:.100}: expected a tensor, an array or a list of real numbers"
            )
        values = torch.from_numpy(array)
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} has dtype {values.dtype}: expected real numbers, in float64")
    if values.is_floating_point() and values.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {values.dtype}: expected float64 or float32; {name} must not be rounded to half precision"
        )
    return values.to("cpu", torch.float64, copy=True)


def _float64(half_logsnr: Tensor | float) -> Tensor:
    return torch.as_tensor(half_logsnr, dtype=torch.float64)


def _checked(t: Tensor | float, last: float = 1.0) -> Tensor:
    """The time as float64, inside [0, last]."""
    t = torch.as_tensor(t, dtype=torch.float64)
    outside = ~((t >= 0) & (t <= last))
    if outside.any():
        raise ValueError(
            f"t = {t[outside].flatten()[0].item():g} is outside the schedule's range [0, {last:g}]"
        )
    return t


def _softplus(z: Tensor) -> Tensor:
    """log(1 + e^z) to the last digit for every z (torch's own cuts off at z = 20)."""
    return torch.logaddexp(z, torch.zeros_like(z))


def _log_ratio(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.log(alpha) - torch.log(sigma)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(number(name, value)) and value > 0):
            raise ValueError(f"{name} = {value}: expected a finite number above 0")


def _increasing(**values: float) -> None:
    (low_name, low), (high_name, high) = values.items()
    if not -math.inf < number(low_name, low) < number(high_name, high) < math.inf:
        raise ValueError(f"{low_name} = {low} must lie below {high_name} = {high}, both finite")


@dataclass(frozen=True)
class _LinearBeta:
    """beta(t) = beta_min + (beta_max - beta_min) t on [0, 1], and B(t) = int_0^t beta."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    start: float = 1.0
    stop: float = 1e-3

    def __post_init__(self) -> None:
        _positive(beta_min=self.beta_min, beta_max=self.beta_max)

    def _integral(self, t: Tensor) -> Tensor:
        t = _checked(t)
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
        return self._time(_softplus(-2 * _float64(half_logsnr)))


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
        half_logsnr = _float64(half_logsnr)
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
        _positive(shift=self.shift)

    def _first(self) -> float:
        return math.pi / 2 * self.shift / (1 + self.shift)

    def _turn(self, t: Tensor) -> Tensor:
        return math.pi / 2 * _checked(t) / (1 + self.shift)

    def alpha(self, t: Tensor) -> Tensor:
        """The ratio cos(a) / cos(a_0), written as the sine of the complement so that it is exactly 0 at t = 1."""
        left = math.pi / 2 * (1 - _checked(t)) / (1 + self.shift)
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
        half_logsnr = _float64(half_logsnr)
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
        _positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _increasing(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(_checked(t))

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_min (sigma_max / sigma_min)^t."""
        return torch.exp(-self.half_logsnr(t))

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-log sigma, linear in t."""
        return -math.log(self.sigma_min) - _checked(t) * math.log(self.sigma_max / self.sigma_min)

    def time(self, half_logsnr: Tensor) -> Tensor:
        """The inverse of that line."""
        return (-_float64(half_logsnr) - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True)
class EDM:
    """EDM: alpha = 1, sigma = t. Times in [0, inf); t = 0 is data without noise.

    Source: Karras et al. 2022 (arXiv 2206.00364), table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _positive(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _increasing(sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def start(self) -> float:
        """sigma_max."""
        return self.sigma_max

    @property
    def stop(self) -> float:
        """sigma_min."""
        return self.sigma_min

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(_checked(t, math.inf))

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return _checked(t, math.inf).clone()

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-log t."""
        return -torch.log(_checked(t, math.inf))

    def time(self, half_logsnr: Tensor) -> Tensor:
        """exp(-half_logsnr)."""
        return torch.exp(-_float64(half_logsnr))


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
        _positive(shift=self.shift)

    def alpha(self, t: Tensor) -> Tensor:
        """(1 - t) / (1 + (shift - 1) t)."""
        t = _checked(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        """The time after the shift, shift t / (1 + (shift - 1) t)."""
        t = _checked(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """log(1 - t) - log t - log shift."""
        t = _checked(t)
        return torch.log1p(-t) - torch.log(t) - math.log(self.shift)

    def time(self, half_logsnr: Tensor) -> Tensor:
        """1 / (1 + shift e^half_logsnr)."""
        return torch.sigmoid(-_float64(half_logsnr) - math.log(self.shift))


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
        _increasing(gamma_min=self.gamma_min, gamma_max=self.gamma_max)
        if self.gamma is not None and not callable(self.gamma):
            raise TypeError(
                f"gamma = {self.gamma!r:.100}: expected a function of t, e.g. gamma=lambda t: 18.3 * t - 13.3"
            )
        probe = torch.linspace(0, 1, 1001, dtype=torch.float64)
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
        t = _checked(t)
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t if self.gamma is None else self.gamma(t)

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(sigmoid(-gamma))."""
        return torch.exp(-_softplus(self._gamma(t)) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(sigmoid(gamma))."""
        return torch.exp(-_softplus(-self._gamma(t)) / 2)

    def half_logsnr(self, t: Tensor) -> Tensor:
        """-gamma / 2."""
        return -self._gamma(t) / 2

    def time(self, half_logsnr: Tensor) -> Tensor:
        """gamma^-1(-2 half_logsnr)."""
        target = -2 * _float64(half_logsnr)
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


class Discrete:
    """The N levels of a discrete-time DDPM, made continuous: level n = 0..N-1 stands at t = (n + 1) / N.

    Between levels log alpha is linear in t; from t = 1/N it runs on to alpha = 1, sigma = 0 at t = 0; into a last level
    of zero SNR alpha itself is linear. Times in [0, 1].
    Source: Lu et al. 2022 (arXiv 2206.00927), appendix D.1. That code extrapolates below t = 1/N, where sigma becomes
    NaN, and renumbers the levels after clipping; here neither can happen.

    Args:
        betas: beta_n in (0, 1], [N], N >= 2; only the last may be 1. float32 or float64.

    Raises:
        TypeError: betas are not real numbers, or in half precision.
        ValueError: betas are not finite, outside their range, or fewer than two.
    """

    start = 1.0

    def __init__(self, betas: Tensor | Sequence[float]):
        betas = _levels("betas", betas)
        bad = ~((betas > 0) & (betas <= 1))
        bad[:-1] |= betas[:-1] == 1
        if bad.any():
            n = int(bad.nonzero()[0])
            raise ValueError(f"betas[{n}] = {betas[n]:g}: expected 0 < beta < 1 (the last may be 1)")
        self._knots(torch.log1p(-betas).cumsum(0) / 2)

    def _knots(self, log_alpha: Tensor) -> None:
        """Store the levels behind the knot of clean data: log alpha(0) = 0."""
        self.levels = log_alpha.numel()
        self.stop = 1 / self.levels
        self._t = torch.arange(self.levels + 1, dtype=torch.float64) / self.levels
        self._log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64), log_alpha])

    def __repr__(self) -> str:
        last = self.half_logsnr(torch.tensor([1.0, self.stop], dtype=torch.float64)).tolist()
        return f"Discrete({self.levels} levels, half log-SNR {last[0]:.4g} to {last[1]:.4g})"

    @classmethod
    def linear(cls, levels: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> "Discrete":
        """Betas equally spaced. Source: Ho et al. 2020 (arXiv 2006.11239), section 4."""
        _positive(beta_min=beta_min, beta_max=beta_max)
        return cls(torch.linspace(beta_min, beta_max, _count(levels), dtype=torch.float64))

    @classmethod
    def scaled_linear(
        cls, levels: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012
    ) -> "Discrete":
        """Roots of betas equally spaced, the defaults of Stable Diffusion. Source: Rombach et al. 2022 (arXiv 2112.10752)."""
        _positive(beta_min=beta_min, beta_max=beta_max)
        return cls(torch.linspace(beta_min**0.5, beta_max**0.5, _count(levels), dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, levels: int = 1000, shift: float = 0.008, beta_cap: float = 0.999) -> "Discrete":
        """beta_n = min(1 - F((n+1)/N) / F(n/N), cap), F = cos^2. Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""
        _positive(shift=shift, beta_cap=beta_cap)
        t = torch.arange(_count(levels) + 1, dtype=torch.float64) / levels
        f = torch.cos(math.pi / 2 * (t + shift) / (1 + shift)) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=beta_cap))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> "Discrete":
        """From alpha_n^2, [N], strictly decreasing in (0, 1); the last may be 0 (zero terminal SNR)."""
        values = _levels("alphas_cumprod", alphas_cumprod)
        bad = ~((values >= 0) & (values < 1))
        bad[1:] |= values.diff() >= 0
        if bad.any():
            n = int(bad.nonzero()[0])
            raise ValueError(
                f"alphas_cumprod[{n}] = {values[n]:g}: expected strictly decreasing values in (0, 1)"
            )
        schedule = cls.__new__(cls)
        schedule._knots(torch.log(values) / 2)
        return schedule

    def zero_terminal_snr(self) -> "Discrete":
        """The same levels with alpha shifted and scaled so that the last is 0. Source: Lin et al. 2023 (arXiv 2305.08891), alg. 1."""
        alpha = torch.exp(self._log_alpha[1:])
        rescaled = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return type(self).from_alphas_cumprod(rescaled**2)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each t its fraction within a segment, and log alpha at both ends of the segment."""
        right = torch.searchsorted(self._t, t.contiguous()).clamp(1, self.levels)
        fraction = (t * self.levels - (right - 1)).clamp(0, 1)
        return fraction, self._log_alpha[right - 1], self._log_alpha[right]

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(line, rest) of alpha = exp(line) rest; rest is 1 but into a last level of zero SNR, where it is linear."""
        fraction, left, right = self._segment(_checked(t))
        zero_snr = torch.isneginf(right)
        line = left + fraction * (torch.where(zero_snr, left, right) - left)
        return line, torch.where(zero_snr, 1 - fraction, 1.0)

    def alpha(self, t: Tensor) -> Tensor:
        """The exponential of the interpolated log alpha."""
        line, rest = self._factors(t)
        return torch.exp(line) * rest

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2)."""
        return torch.sqrt(self._variance(*self._factors(t)))

    def half_logsnr(self, t: Tensor) -> Tensor:
        """From alpha alone: log alpha - log(1 - alpha^2) / 2."""
        line, rest = self._factors(t)
        return line + torch.log(rest) - torch.log(self._variance(line, rest)) / 2

    @staticmethod
    def _variance(line: Tensor, rest: Tensor) -> Tensor:
        """1 - exp(2 line) rest^2 as a sum of terms that are not negative."""
        return -torch.expm1(2 * line) + torch.exp(2 * line) * (1 - rest**2)

    def time(self, half_logsnr: Tensor) -> Tensor:
        """By log alpha = -log(1 + exp(-2 half_logsnr)) / 2, then back through the interpolation."""
        log_alpha = -_softplus(-2 * _float64(half_logsnr)) / 2
        right = torch.searchsorted(-self._log_alpha, -log_alpha.contiguous()).clamp(1, self.levels)
        left_value, right_value = self._log_alpha[right - 1], self._log_alpha[right]
        zero_snr = torch.isneginf(right_value)
        span = torch.where(zero_snr, -1.0, right_value - left_value)
        fraction = torch.where(
            zero_snr, -torch.expm1(log_alpha - left_value), (log_alpha - left_value) / span
        )
        return self._t[right - 1] + fraction / self.levels

    def label(self, t: Tensor) -> Tensor:
        """The step number n = N t - 1 that a network trained on these levels reads at t; fractional between levels.

        Raises:
            ValueError: t < 1/N, a level that the network has not seen.
        """
        n = _checked(t) * self.levels - 1
        if (n < -1e-9).any():
            raise ValueError(
                f"t = {float(t.min()):g} is below the first level 1/{self.levels} that the network knows"
            )
        return torch.where((n - n.round()).abs() < 1e-9, n.round(), n)


def _count(levels: int) -> int:
    if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= MAX_LEVELS:
        raise ValueError(
            f"levels = {levels!r:.100}: expected a whole number from 2 to {MAX_LEVELS}, e.g. levels=1000"
        )
    return levels


def _levels(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """The values of a discrete schedule as float64 [N], refused where they cannot be right."""
    values = numbers(name, values)
    if values.ndim != 1 or values.numel() < 2:
        raise ValueError(f"{name} has shape {list(values.shape)}: expected [N] with N >= 2")
    if not values.isfinite().all():
        n = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"{name}[{n}] = {values[n]:g}: every value must be finite")
    return values

"""The levels of a discrete-time network made continuous: any betas, or the published ones."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.arguments import numbers, positive, whole
from solvers.schedules import float64, inside, softplus

MAX_LEVELS = 10**6


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
        betas = _values("betas", betas)
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
        self._t = torch.arange(self.levels + 1, dtype=torch.float64, device="cpu") / self.levels
        self._log_alpha = torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), log_alpha])

    def __repr__(self) -> str:
        last = self.half_logsnr(torch.tensor([1.0, self.stop], dtype=torch.float64, device="cpu")).tolist()
        return f"Discrete({self.levels} levels, half log-SNR {last[0]:.4g} to {last[1]:.4g})"

    @classmethod
    def linear(cls, levels: int = 1000, beta_min: float = 1e-4, beta_max: float = 0.02) -> "Discrete":
        """Betas equally spaced. Source: Ho et al. 2020 (arXiv 2006.11239), section 4."""
        positive(beta_min=beta_min, beta_max=beta_max)
        return cls(
            torch.linspace(
                beta_min,
                beta_max,
                whole("levels", levels, 2, MAX_LEVELS, example=1000),
                dtype=torch.float64,
                device="cpu",
            )
        )

    @classmethod
    def scaled_linear(
        cls, levels: int = 1000, beta_min: float = 0.00085, beta_max: float = 0.012
    ) -> "Discrete":
        """Roots of betas equally spaced, the defaults of Stable Diffusion. Source: Rombach et al. 2022 (arXiv 2112.10752)."""
        positive(beta_min=beta_min, beta_max=beta_max)
        return cls(
            torch.linspace(
                beta_min**0.5,
                beta_max**0.5,
                whole("levels", levels, 2, MAX_LEVELS, example=1000),
                dtype=torch.float64,
                device="cpu",
            )
            ** 2
        )

    @classmethod
    def cosine(cls, levels: int = 1000, shift: float = 0.008, beta_cap: float = 0.999) -> "Discrete":
        """beta_n = min(1 - F((n+1)/N) / F(n/N), cap), F = cos^2. Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17."""
        positive(shift=shift, beta_cap=beta_cap)
        t = (
            torch.arange(
                whole("levels", levels, 2, MAX_LEVELS, example=1000) + 1, dtype=torch.float64, device="cpu"
            )
            / levels
        )
        f = torch.cos(math.pi / 2 * (t + shift) / (1 + shift)) ** 2
        return cls((1 - f[1:] / f[:-1]).clamp(max=beta_cap))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor | Sequence[float]) -> "Discrete":
        """From alpha_n^2, [N], strictly decreasing in (0, 1); the last may be 0 (zero terminal SNR)."""
        values = _values("alphas_cumprod", alphas_cumprod)
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

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha_n^2 at each level, [N], float64."""
        return torch.exp(2 * self._log_alpha[1:])

    def zero_terminal_snr(self) -> "Discrete":
        """The same levels with alpha shifted and scaled so that the last is 0. Source: Lin et al. 2023 (arXiv 2305.08891), alg. 1."""
        alpha = torch.exp(self._log_alpha[1:])
        rescaled = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        return type(self).from_alphas_cumprod(rescaled**2)

    def _segment(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For each t its fraction within a segment, and log alpha at both ends of the segment."""
        right = torch.searchsorted(self._t, t.contiguous()).clamp(1, self.levels)
        fraction = t * self.levels - (right - 1)
        rounding = (fraction.clamp(0, 1) - fraction).detach()  # which must not take the slope away
        return fraction + rounding, self._log_alpha[right - 1], self._log_alpha[right]

    def _factors(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(line, rest) of alpha = exp(line) rest; rest is 1 but into a last level of zero SNR, where it is linear."""
        fraction, left, right = self._segment(inside(t))
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
        log_alpha = -softplus(-2 * float64(half_logsnr)) / 2
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
        n = inside(t) * self.levels - 1
        if (n < -1e-9).any():
            raise ValueError(
                f"t = {float(t.min()):g} is below the first level 1/{self.levels} that the network knows"
            )
        return torch.where((n - n.round()).abs() < 1e-9, n.round(), n)

    def step(self, t: Tensor) -> Tensor:
        """The step number as int64, for a network that takes whole numbers only.

        Raises:
            ValueError: t < 1/N, or between two levels: a fraction cut off would tell the network another level than the table's.
        """
        n = self.label(t)
        between = n != n.round()
        if between.any():
            raise ValueError(
                f"step {n[between].flatten()[0]:g} lies between two levels: stand on levels only, by a one-call-per-step method on "
                "trailing, leading, linspace or snap(schedule, times), or interpolate the label with label=schedule.label"
            )
        return n.long()


def _values(name: str, values: Tensor | Sequence[float]) -> Tensor:
    """The values of a discrete schedule as float64 [N], refused where they cannot be right."""
    values = numbers(name, values)
    if values.ndim != 1 or values.numel() < 2:
        raise ValueError(f"{name} has shape {list(values.shape)}: expected [N] with N >= 2")
    if not values.isfinite().all():
        n = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"{name}[{n}] = {values[n]:g}: every value must be finite")
    return values

"""What every method starts from: a form of prediction, its linear part solved exactly, and the integrals of what is left."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.arguments import choice, positive
from solvers.grids import given
from solvers.phi import phis
from solvers.schedules import Schedule

FORMS = ("noise", "data", "velocity")
VARIABLES = ("half_logsnr", "t", "sigma", "angle", "asinh")
NATURAL = {"noise": "sigma", "velocity": "angle"}  # the variable that is the form's natural time
RATE = {"noise": 1.0, "data": -1.0}  # of the kernel exp(rate (lam_t - lam))
# half log-SNR -> T, the integral of tau^2 over half log-SNR, from anywhere
Clock = Callable[[Tensor], Tensor]
GAUSS_POINTS = 64  # exact to rounding over steps of half log-SNR up to 10, where the integrands are analytic


@dataclass(frozen=True)
class Levels:
    """Where a method stands: times with alpha, sigma and half log-SNR at each, all float64 of one shape.

    `clock` is T = int tau^2 dlambda of the SDE dx = [f x - (1 + tau^2) g^2 s / 2] dt + tau g dw, which has the ODE's marginals for
    every tau(lambda); None for the ODE.
    """

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    half_logsnr: Tensor
    clock: Tensor | None = None

    @staticmethod
    def at(schedule: Schedule, times: Tensor, clock: Clock | None = None) -> "Levels":
        """The levels of a schedule at some times."""
        lam = schedule.half_logsnr(times)
        return Levels(
            times, schedule.alpha(times), schedule.sigma(times), lam, None if clock is None else clock(lam)
        )

    @staticmethod
    def of(schedule: Schedule, times: Tensor, clock: Clock | None = None) -> "Levels":
        """The levels on a grid, once `given` has checked it. Half log-SNR is that of alpha and sigma, as of a plan's, to the last digit."""
        times = given(schedule, times)
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        lam = torch.log(alpha) - torch.log(sigma)
        return Levels(times, alpha, sigma, lam, None if clock is None else clock(lam))

    @staticmethod
    def at_time(schedule: Schedule, t: float) -> "Levels":
        """The level at one time, []."""
        return Levels.at(schedule, torch.tensor(float(t), dtype=torch.float64, device="cpu"))

    @staticmethod
    def stacked(levels: "list[Levels]") -> "Levels":
        """Levels of one shape along a new first dimension."""
        names = ("times", "alpha", "sigma", "half_logsnr")
        times, alpha, sigma, lam = (torch.stack([getattr(at, name) for at in levels]) for name in names)
        clocks = [at.clock for at in levels if at.clock is not None]
        return Levels(times, alpha, sigma, lam, torch.stack(clocks) if clocks else None)

    @property
    def size(self) -> Tensor:
        """sqrt(alpha^2 + sigma^2), by which the states of all schedules of one ODE are the same."""
        return torch.hypot(self.alpha, self.sigma)

    def __len__(self) -> int:
        return len(self.times)

    def __getitem__(self, where: Any) -> "Levels":
        clock = None if self.clock is None else self.clock[where]
        return Levels(self.times[where], self.alpha[where], self.sigma[where], self.half_logsnr[where], clock)


@dataclass(frozen=True)
class Form:
    """A form of prediction, in whose scaled state and natural time the ODE has no linear part: d(x / norm) / du = m / unit.

        noise:    x / alpha,  u = rho = sigma / alpha
        data:     x / sigma,  u = 1 / rho
        velocity: x / n,      u = theta = arctan(rho / scale),  n = unit = sqrt(scale^2 alpha^2 + sigma^2)

    Of an SDE with clock T, data form has x / (sigma e^-T) and u = e^T / rho; noise form weighs eps 1 + tau^2 times. A step is x_t = (norm_t / norm_s) x_s + norm_t int (m / unit) du, with m / unit replaced by its polynomial in `variable`:
    "half_logsnr" (lambda), "t", "sigma" (that is rho), "angle" (theta) or "asinh" (arsinh(rho / scale)).
    `clock` is that of the SDE; in half log-SNR it is taken as linear over each step.
    Source: Lu et al. 2022 (arXiv 2206.00927), prop. 3.1 and (arXiv 2211.01095), prop. 4.1; velocity form: Salimans & Ho 2022
    (arXiv 2202.00512), appendix D, at scale 1; the F of Karras et al. 2022 (arXiv 2206.00364), eq. 7, is -m / n; SDE: Xue et al. 2023 (arXiv
    2309.05019), proposition 4.2.
    """

    predicts: str = "data"
    variable: str = "half_logsnr"
    scale: float = 1.0
    clock: Clock | None = None

    def __post_init__(self) -> None:
        choice("predicts", self.predicts, FORMS)
        choice(
            "variable", self.variable, VARIABLES, {"lambda": "half_logsnr", "rho": "sigma", "theta": "angle"}
        )
        positive(scale=self.scale)
        if self.scale != 1 and self.predicts != "velocity":
            raise ValueError(
                f"scale = {self.scale:g} has no use with predicts = {self.predicts!r}: leave it out, or take predicts='velocity'"
            )

    def norm(self, at: Levels) -> Tensor:
        """What x is divided by in the scaled state."""
        if self.predicts == "velocity":
            return torch.hypot(self.scale * at.alpha, at.sigma)
        return at.alpha if self.predicts == "noise" else at.sigma

    def unit(self, at: Levels) -> Tensor:
        """What the prediction is divided by in the scaled equation."""
        return self.norm(at) if self.predicts == "velocity" else torch.ones_like(at.alpha)

    def natural(self, at: Levels) -> Tensor:
        """The natural time u."""
        if self.predicts == "data":
            return at.alpha / at.sigma
        return self._place(NATURAL[self.predicts], at)

    def place(self, at: Levels) -> Tensor:
        """The variable that polynomials are in."""
        return self._place(self.variable, at)

    def _place(self, variable: str, at: Levels) -> Tensor:
        if variable == "sigma":
            return at.sigma / at.alpha
        if variable == "angle":
            return torch.atan2(at.sigma, self.scale * at.alpha)
        if variable == "asinh":
            return torch.asinh(at.sigma / (self.scale * at.alpha))
        return at.times if variable == "t" else at.half_logsnr

    def half_logsnr(self, variable: str, place: Tensor) -> Tensor:
        """The half log-SNR where a variable other than t has some value."""
        if variable == "half_logsnr":
            return place
        return -torch.log(place if variable == "sigma" else self.scale * torch.tan(place))

    def exact_part(self, s: Levels, t: Levels) -> tuple[Tensor, Tensor]:
        """The weight of x over a step from s to t, and the sum of the weights of m / unit: norm_t (u_t - u_s).

        The sum is taken from consistency (of data form and noise form) or as the angle between two vectors (of velocity
        form), so that sigma_t = 0 and alpha_s = 0 are exact limits.

        Raises:
            ValueError: noise form from alpha = 0, or data form from sigma = 0.
        """
        if self.predicts == "velocity":
            cross = self.scale * (s.alpha * t.sigma - t.alpha * s.sigma)
            angle = torch.atan2(cross, self.scale**2 * s.alpha * t.alpha + s.sigma * t.sigma)
            end = self.norm(t)
            return end / self.norm(s), end * angle
        for name, silent, start in (("noise", "data", s.alpha), ("data", "noise", s.sigma)):
            if self.predicts == name and (start == 0).any():
                raise ValueError(
                    f"the {name} form cannot start at {'alpha' if name == 'noise' else 'sigma'} = 0 (t = {s.times[start == 0][0]:g}): "
                    f"{name} says nothing of the {silent} there; use a {silent}-form method such as "
                    f"{'dpm_solver_pp' if name == 'noise' else 'dpm_solver'}, with a network that predicts {silent}, velocity or flow"
                )
        if self.predicts == "data":
            a = t.sigma / s.sigma
            if t.clock is not None:
                a = a * torch.exp(-elapsed(s, t))
            return a, t.alpha - a * s.alpha
        a = t.alpha / s.alpha
        return a, (t.sigma - a * s.sigma) * stochastic_factor(s, t)

    def moments(self, schedule: Schedule | None, s: Levels, t: Levels, total: Tensor, degree: int) -> Tensor:
        """Integrals over a step of the powers of the variable, norm_t int ((v - v_s) / (v_t - v_s))^k du, k = 1..degree.

        In closed form where the variable is half log-SNR (noise and data form) or the natural time, else by Gauss-Legendre
        in half log-SNR, or in the natural time where half log-SNR is infinite. `total` is that of k = 0, by `exact_part`.

        Returns:
            [steps, degree].
        """
        powers = torch.arange(1, degree + 1, device="cpu")
        if self.variable == NATURAL.get(self.predicts):
            return total[:, None] / (powers + 1)
        h = t.half_logsnr - s.half_logsnr
        if self.variable == "half_logsnr" and self.predicts in RATE:
            factor = stochastic_factor(s, t)
            rate = RATE[self.predicts] * (factor if self.predicts == "data" else 1.0)
            return (
                (self.slope(t) * factor * h)[:, None] * powers.cumprod(0) * phis(degree + 1, rate * h)[:, 1:]
            )
        if t.clock is not None:
            return self._clocked_moments(s, t, degree)
        places, mass = self._quadrature(schedule, s, t, h, total)
        start, end = self.place(s)[:, None], self.place(t)[:, None]
        ratio = ((places - start) / (end - start))[:, None].expand(-1, degree, -1)
        return (mass[:, None] * ratio.cumprod(1)).sum(2)

    def _clocked_moments(self, s: Levels, t: Levels, degree: int) -> Tensor:
        """The same for data form under a clock and powers of rho: by parts, so that tau itself is not asked for.

        With r = (rho - rho_s) / (rho_t - rho_s) and w = norm_t u: int r^k dw = w_t - k int r^{k-1} w dr.
        """
        assert (self.predicts, self.variable) == ("data", "sigma")
        assert self.clock is not None
        assert t.clock is not None
        points, weights = GAUSS_TENSORS
        lam = s.half_logsnr[:, None] + points * (t.half_logsnr - s.half_logsnr)[:, None]
        start, end, rho = self.place(s)[:, None], self.place(t)[:, None], torch.exp(-lam)
        ratio = (rho - start) / (end - start)
        value = t.sigma[:, None] * torch.exp(self.clock(lam) - t.clock[:, None] + lam)
        mass = weights * value * rho / (start - end) * (t.half_logsnr - s.half_logsnr)[:, None]
        return torch.stack([t.alpha - k * (mass * ratio ** (k - 1)).sum(1) for k in range(1, degree + 1)], 1)

    def slope(self, t: Levels) -> Tensor:
        """norm_t du / dlambda at t: what weighs m dlambda at the end of a step; of an SDE without the factor 1 + tau^2."""
        if self.predicts == "velocity":
            return -t.alpha * t.sigma * self.scale / self.norm(t)
        return t.alpha if self.predicts == "data" else -t.sigma

    def _quadrature(
        self, schedule: Schedule | None, s: Levels, t: Levels, h: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The variable and norm_t du at the Gauss points of each step, [steps, points]."""
        points, weights = GAUSS_TENSORS
        start, length, end = (v[:, None] for v in (s.half_logsnr, h, t.half_logsnr))
        finite = length.isfinite()
        is_regular = bool(finite.all())
        if not is_regular:
            start, length, end = (torch.where(finite, v, 1.0) for v in (start, length, end))
        lam = start + points * length
        if not is_regular:
            first, last = self.natural(s)[:, None], self.natural(t)[:, None]
            u = first + points * (last - first)
            inside = torch.log(u) if self.predicts == "data" else self.half_logsnr(NATURAL[self.predicts], u)
            lam = torch.where(finite, lam, inside)
        if self.predicts == "velocity":
            kernel = -self.norm(t)[:, None] / 2 / torch.cosh(lam + math.log(self.scale))
        else:
            kernel = self.slope(t)[:, None] * torch.exp(RATE[self.predicts] * (end - lam))
        mass = weights * torch.where(finite, length * kernel, total[:, None])
        if self.variable == "half_logsnr":
            return lam, mass
        if self.variable == "t" and schedule is not None:
            return schedule.time(lam), mass
        rho = torch.exp(-lam)
        if self.variable == "sigma":
            return rho, mass
        return (torch.asinh if self.variable == "asinh" else torch.atan)(rho / self.scale), mass

    def is_infinite(self, levels: Levels) -> list[bool]:
        """Whether the natural time or the variable is infinite at each level; a step from or to there is taken with order 1."""
        no_data = self.predicts == "noise" or self.variable in ("half_logsnr", "sigma", "asinh")
        no_noise = self.predicts == "data" or self.variable == "half_logsnr"
        weights = zip(levels.alpha.tolist(), levels.sigma.tolist(), strict=True)
        return [(no_data and alpha == 0) or (no_noise and sigma == 0) for alpha, sigma in weights]


def elapsed(s: Levels, t: Levels) -> Tensor:
    """The integral of tau^2 over each step, T_t - T_s, [steps]; 0 for the ODE."""
    return torch.zeros_like(t.sigma) if s.clock is None or t.clock is None else t.clock - s.clock


def stochastic_factor(s: Levels, t: Levels) -> Tensor:
    """1 + tau^2 with the mean of tau^2 over each step, [steps]; 1 over a step of infinite length.

    There the weights of data form do not ask, and those of noise form take the ODE's step.
    """
    if t.clock is None:
        return torch.ones_like(t.sigma)
    h = t.half_logsnr - s.half_logsnr
    return 1 + torch.where(h.isfinite(), elapsed(s, t) / h, 0.0)


def noise_weight(form: Form, s: Levels, t: Levels) -> Tensor:
    """The standard deviation of the noise that an SDE has added over each step, [steps]; 0 for the ODE.

    Data form: sigma_t sqrt(1 - e^{-2 (T_t - T_s)}), with which data in one point keep their marginals. Noise form: tau sigma_t
    sqrt(e^{2h} - 1).
    """
    if form.predicts == "data":
        return t.sigma * torch.sqrt(-torch.expm1(-2 * elapsed(s, t).clamp(min=0)))
    h = t.half_logsnr - s.half_logsnr
    square = (stochastic_factor(s, t) - 1) * torch.expm1(2 * h)
    return t.sigma * torch.sqrt(torch.where(h.isfinite(), square, 0.0))


def refuse_upwards(levels: Levels) -> None:
    """Methods that add noise go from noise to data."""
    refuse_falling(levels.half_logsnr)


def refuse_falling(half_logsnr: Tensor) -> None:
    """The same, told by half log-SNR."""
    if (half_logsnr.diff() < 0).any():
        raise ValueError(
            "the times go from data to noise, where a stochastic method has no noise to add: encode with an ODE method, e.g. ddim"
        )


def refuse_no_data_at_start(why: str, levels: Levels) -> None:
    """Methods that ask at the first time for what alpha = 0 leaves open there."""
    if levels.alpha[0] == 0:
        t = levels.times[0]
        raise ValueError(f"times[0] = {t:g} has alpha = 0, {why}: start below it, e.g. start={t * 0.999:g}")


def refuse_no_data(name: str, levels: Levels) -> None:
    """Methods that divide by steps of sigma / alpha reach no alpha = 0, at either end."""
    if (levels.alpha == 0).any():
        t = levels.times[levels.alpha == 0][0]
        raise ValueError(
            f"{name}: the noise form cannot start at alpha = 0, or end there (t = {t:g}): sigma / alpha is infinite; give the grid "
            f"an end before it, e.g. start={t * 0.999:g}"
        )


def touched(points: Tensor) -> Tensor:
    """Whether either end of a step is one of some grid points, [steps]."""
    return points[:-1] | points[1:]


def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """Points and weights on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(GAUSS_POINTS)
    return (points + 1) / 2, weights / 2


GAUSS = _gauss_legendre()
GAUSS_TENSORS = tuple(torch.from_numpy(v) for v in GAUSS)


def interpolatory(ratios: Tensor, moments: Tensor) -> Tensor:
    """Weights W_j that integrate polynomials exactly: sum_j W_j r_j^k = M_k, k = 1..q; the current call takes what is left of k = 0.

    Args:
        ratios: r_j, places of the other nodes from the current one over the length of the step, [rows, q]; 0 behind the last of a
            row that has fewer nodes, whose polynomial then has a lower degree.
        moments: M_k, [rows, q, *D].

    Returns:
        [rows, q, *D].
    """
    has, q = ratios != 0, ratios.shape[1]
    powers = ratios[:, None, :].expand(-1, q, -1).cumprod(1)
    table = torch.where(has[:, :, None], powers, torch.eye(q, dtype=torch.float64, device="cpu"))
    wanted = torch.where(has[:, :, None], moments[..., None].flatten(2), 0.0)
    return torch.linalg.solve(table, wanted).reshape(moments.shape)

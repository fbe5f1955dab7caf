"""What every closed-form data distribution can do: posterior means, density, exact model, exact flow."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import atan, prod, tan
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from solvers.schedules import Schedule

    Level = float | Tensor  # alpha or sigma: a number, or float64 [] or [B]

PREDICTIONS = ("noise", "data", "velocity", "score", "flow", "edm")


class Distribution(ABC):
    """A distribution of x0 whose marginals x = alpha x0 + sigma eps are known in closed form.

    x is [B, *shape]. Everything is computed in float64 on the host and returned like x.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one x0."""

    @abstractmethod
    def _posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(E[eps|x], E[x0|x]), each [B, d] and neither formed from the other; x [B, d], levels [B or 1, 1]."""

    @abstractmethod
    def _log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The log-density log q(x), [B], in nats."""

    @abstractmethod
    def _jacobian(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """dE[x0|x]/dx, [B, d, d]."""

    @abstractmethod
    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Samples of x0, [n, *shape], float64."""

    @abstractmethod
    def flow(self, x: Tensor, schedule: Schedule, s: float, t: float) -> Tensor:
        """The exact probability-flow ODE map of x from time s to time t, [B, *shape]."""

    def noise(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[eps|x], [B, *shape]."""
        return self._posterior(*self._flat(x, alpha, sigma))[0].to(x).reshape(x.shape)

    def data(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x0|x], [B, *shape]."""
        return self._posterior(*self._flat(x, alpha, sigma))[1].to(x).reshape(x.shape)

    def score(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The score, grad log q(x) = -E[eps|x] / sigma, [B, *shape]."""
        u, alpha, sigma = self._flat(x, alpha, sigma)
        return (-self._posterior(u, alpha, sigma)[0] / sigma).to(x).reshape(x.shape)

    def log_density(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """The log-density log q(x) of the marginal at (alpha, sigma), [B], in nats."""
        density = self._log_density(*self._flat(x, alpha, sigma))
        if not (density < torch.inf).all():
            raise ValueError(
                f"no density at alpha = {alpha}, sigma = {sigma}: a variance is 0, or x is not finite"
            )
        return density.to(x)

    def noise_square(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[eps^2|x], element by element, [B, *shape]: the square of E[eps|x] and Cov(eps|x) = alpha dE[x0|x]/dx on the diagonal."""
        u, alpha, sigma = self._flat(x, alpha, sigma)
        noise, _ = self._posterior(u, alpha, sigma)
        square = noise**2 + alpha * self._jacobian(u, alpha, sigma).diagonal(dim1=1, dim2=2)
        return square.to(x).reshape(x.shape)

    def jacobian(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """dE[x0|x]/dx = alpha Cov(x0|x) / sigma^2, [B, d, d]."""
        return self._jacobian(*self._flat(x, alpha, sigma)).to(x)

    def model(
        self, schedule: Schedule, predicts: str = "noise", sigma_data: float = 0.5
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The exact network: (x [B, *shape], t [B]) -> prediction [B, *shape].

        "velocity" is alpha eps - sigma x0 and "flow" is dx/dt. "edm" is EDM's raw network F: it is called
        with the scaled input x / sqrt(sigma^2 + sigma_data^2 alpha^2), and x0 = cskip x / alpha + cout F.
        """
        if predicts not in PREDICTIONS:
            raise ValueError(f"predicts = {predicts!r} is not one of {', '.join(PREDICTIONS)}")

        def predict(x: Tensor, t: Tensor) -> Tensor:
            t = t.to("cpu", torch.float64)
            u, alpha, sigma = self._flat(x, schedule.alpha(t), schedule.sigma(t))
            if predicts == "edm":
                scale = (sigma**2 + sigma_data**2 * alpha**2).sqrt()
                noise, data = self._posterior(u * scale, alpha, sigma)
                out = (sigma / sigma_data * data - sigma_data * alpha * noise) / scale
                return out.to(x).reshape(x.shape)
            noise, data = self._posterior(u, alpha, sigma)
            match predicts:
                case "noise":
                    out = noise
                case "data":
                    out = data
                case "velocity":
                    out = alpha * noise - sigma * data
                case "score":
                    out = -noise / sigma
                case "flow":
                    out = derivative(schedule.alpha, t) * data + derivative(schedule.sigma, t) * noise
            return out.to(x).reshape(x.shape)

        return predict

    def _flat(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor]:
        """Flatten x to float64 [B, d] on the host, the levels to columns [B or 1, 1]."""
        if tuple(x.shape[1:]) != tuple(self.shape):
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, {', '.join(map(str, self.shape))}]")
        flat = x.to("cpu", torch.float64).reshape(len(x), prod(self.shape))
        return flat, column(alpha), column(sigma)


def column(level: Level) -> Tensor:
    """A level as a float64 column on the host, [B or 1, 1]."""
    return torch.as_tensor(level, dtype=torch.float64, device="cpu").reshape(-1, 1)


def derivative(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of a function of time at every t [B], as a column [B, 1]."""
    with torch.inference_mode(False), torch.enable_grad():
        t = t.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)  # + 0 t: alpha may be constant
    return column(slope)


def levels(schedule: Schedule, t: float) -> tuple[Tensor, Tensor]:
    """The pair alpha, sigma at one time, float64 []."""
    time = torch.as_tensor(t, dtype=torch.float64, device="cpu")
    return schedule.alpha(time), schedule.sigma(time)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient, and 0 where the denominator is 0 (a posterior gain without variance)."""
    safe = torch.where(denominator > 0, denominator, 1.0)
    return torch.where(denominator > 0, numerator / safe, 0.0)


def eigen(name: str, cov: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., d] >= 0 and eigenvectors [..., d, d] of covariances; an error if they are none."""
    size = cov.abs().amax().item()
    skew = (cov - cov.mT).abs().amax().item()
    if not skew <= 1e-10 * size:
        raise ValueError(f"{name} must be finite and symmetric: it differs from its transpose by {skew:.3g}")
    values, vectors = torch.linalg.eigh(cov)
    if values.amin() < -1e-10 * size:
        raise ValueError(f"{name} must be positive semidefinite: its least eigenvalue is {values.amin():.3g}")
    return values.clamp_min(0.0), vectors


def integrate(
    distribution: Distribution, x: Tensor, schedule: Schedule, s: float, t: float, tol: float = 1e-11
) -> Tensor:
    """The probability-flow map of x from time s to time t, certified to tol, [B, *shape].

    With w = x / sqrt(alpha^2 + sigma^2) and theta = arctan(sigma / alpha) the ODE is regular at both ends:

        dw/dtheta = cos(theta) eps - sin(theta) x0.

    It is solved twice (DOP853), in theta and in tan(theta/2), the second time with a tenth of the tolerance.
    RuntimeError when the two differ by more than tol (in w, maximum over all elements).
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError("a certified flow needs scipy: pip install 'diffusion-solvers[cli]'") from error
    (alpha_s, sigma_s), (alpha_t, sigma_t) = levels(schedule, s), levels(schedule, t)
    flat, *_ = distribution._flat(x.detach(), alpha_s, sigma_s)
    start = flat / torch.hypot(alpha_s, sigma_s)
    angles = [torch.atan2(sigma_s, alpha_s).item(), torch.atan2(sigma_t, alpha_t).item()]

    def slope(theta: float, w: object) -> Tensor:
        angle = column(theta)
        noise, data = distribution._posterior(
            torch.as_tensor(w).reshape(flat.shape), angle.cos(), angle.sin()
        )
        return (angle.cos() * noise - angle.sin() * data).flatten()

    def solve(function: Callable, span: list[float], rtol: float) -> Tensor:
        solution = solve_ivp(function, span, start.flatten().numpy(), "DOP853", rtol=rtol, atol=rtol)
        if not solution.success:
            raise RuntimeError(f"the flow from time {s} to {t} was not found: {solution.message}")
        return torch.as_tensor(solution.y[:, -1]).reshape(flat.shape)

    def half_angle(z: float, w: object) -> Tensor:
        return slope(2 * atan(z), w) * (2 / (1 + z**2))

    coarse = solve(slope, angles, 3e-13)
    fine = solve(half_angle, [tan(angle / 2) for angle in angles], 3e-14)
    discrepancy = (coarse - fine).abs().max().item()
    if not discrepancy <= tol:
        raise RuntimeError(
            f"the flow from time {s} to {t} is only certain to {discrepancy:.2g}, not tol = {tol:.2g}"
        )
    return (fine * torch.hypot(alpha_t, sigma_t)).to(x).reshape(x.shape)

"""What every exponential method starts from: the linear part solved exactly, and the kernel of what is left."""

from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.grids import given
from solvers.schedules import Schedule

FORMS = ("noise", "data")


@dataclass(frozen=True)
class Levels:
    """Where a method stands: times with alpha, sigma and half log-SNR at each, all float64 of one shape."""

    times: Tensor
    alpha: Tensor
    sigma: Tensor
    half_logsnr: Tensor

    @staticmethod
    def at(schedule: Schedule, times: Tensor) -> "Levels":
        """The levels of a schedule at some times."""
        return Levels(times, schedule.alpha(times), schedule.sigma(times), schedule.half_logsnr(times))

    @staticmethod
    def of(schedule: Schedule, times: Tensor) -> "Levels":
        """The levels on a grid, once `given` has checked it."""
        return Levels.at(schedule, given(schedule, times))

    def __getitem__(self, where: slice | Tensor) -> "Levels":
        return Levels(self.times[where], self.alpha[where], self.sigma[where], self.half_logsnr[where])


def exact_part(predicts: str, s: Levels, t: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """The step from s to t with the prediction held constant, and what scales its variation.

    data form:  x_t = (sigma_t / sigma_s) x_s + alpha_t int e^{-(lam_t - lam)} x_0 dlam
    noise form: x_t = (alpha_t / alpha_s) x_s - sigma_t int e^{+(lam_t - lam)} eps dlam

    Source: Lu et al. 2022 (arXiv 2206.00927), prop. 3.1 and (arXiv 2211.01095), prop. 4.1. The integral of a constant is
    taken from consistency, so sigma_t = 0 and alpha_s = 0 (data form) are exact limits.

    Returns:
        (a, total, scale): the weight of x, the sum of the prediction's weights, and the factor before the integral.

    Raises:
        ValueError: noise form from alpha = 0.
    """
    if predicts == "data":
        a = t.sigma / s.sigma
        return a, t.alpha - a * s.alpha, t.alpha
    if (s.alpha == 0).any():
        raise ValueError(
            f"the noise form cannot start at alpha = 0 (t = {s.times[s.alpha == 0][0]:g}): noise says nothing of the data "
            "there; use a data-form method such as dpm_solver_pp, with a network that predicts data, velocity or flow"
        )
    a = t.alpha / s.alpha
    return a, t.sigma - a * s.sigma, -t.sigma


RATE = {"noise": 1.0, "data": -1.0}  # of the kernel exp(rate (lam_t - lam))


def reaches_infinity(levels: Levels) -> Tensor:
    """Whether each step starts or ends at infinite half log-SNR, where only a first-order step has a limit, [steps]."""
    infinite = torch.isinf(levels.half_logsnr)
    return infinite[:-1] | infinite[1:]

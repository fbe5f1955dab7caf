"""O-BELM: a two-step method whose steps can be taken back exactly."""

import torch
from torch import Tensor

from solvers.methods.exponential import Form, Levels, refuse_no_data
from solvers.plan import Plan
from solvers.schedules import Schedule


def obelm(schedule: Schedule, times: Tensor) -> Plan:
    """O-BELM: the variable-step leapfrog rule in sigma / alpha, exactly invertible: from two neighbouring states back to the first.

    Order 2; 1 call per step; ODE; noise form. With y = x / alpha and h_n = rho_{n+1} - rho_n::

        y_{n+1} - y_n = -(h_n / h_{n-1})^2 (y_n - y_{n-1}) + (1 + h_n / h_{n-1}) h_n eps_n;

    the first step is DDIM's. One register holds x alone, so y_n - y_{n-1} is unfolded into the outputs it is made of: every
    row reads all calls before it, and a run keeps them. To take a run back: the same method on the reversed grid
    (`sv.Inversion`), from `State.between(plan, x_N, x_{N-1})`, calls the network where the run did, and undoes it to rounding:
    from data to noise and back on any grid. Where steps of sigma / alpha grow, towards noise, rounding and the first step's
    error grow with the square of their ratio: encode on `uniform`, `karras` or `logsnr` times, not on `angle`.
    Source: Wang et al. 2024 (arXiv 2410.07273), O-BELM.

    Args:
        schedule: noise schedule.
        times: [steps + 1].
    """
    levels = Levels.of(schedule, times)
    refuse_no_data("obelm", levels)
    a, total = Form("noise").exact_part(levels[:-1], levels[1:])
    step = (levels.sigma / levels.alpha).diff()
    slopes = torch.zeros(
        len(a), len(a), dtype=torch.float64, device="cpu"
    )  # (y_{n+1} - y_n) / h_n in the outputs
    slopes[0, 0] = 1
    for n, ratio in enumerate((step[1:] / step[:-1]).tolist(), start=1):
        slopes[n, 0] = 1 + ratio
        slopes[n, 1:] = -ratio * slopes[n - 1, :-1]
    return Plan(levels.times, levels.alpha, levels.sigma, a, total[:, None] * slopes, predicts="noise")

"""From the last noisy state to the data: the decoder p(x_0 | x_stop), and Gaussian log-densities."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.arguments import numbers, positive
from solvers.elements import elements

ON_LEVEL = 1e-2  # of the distance of two levels; of 2^16 levels single precision keeps a hundredth


@dataclass(frozen=True, eq=False)
class Decoder:
    """p(x_0 | x_stop): a Gaussian around the data prediction at x_stop, or what it says of data that take a few values only.

    Source: Ho et al. 2020 (arXiv 2006.11239), eq. 13, for levels; Lu et al. 2022 (arXiv 2206.08265), section 6, for the default variance.

    Attributes:
        variance: of the Gaussian, one number; None for (sigma / alpha)^2 at x_stop. (Ho et al. take sigma^2.)
        levels: the values that an element of the data can take, increasing, e.g. torch.linspace(-1, 1, 256): p is then the Gaussian's probability of
            the cell around x_0, whose bounds lie halfway to its neighbours and, of the outermost, at infinity. None for a density.

    Raises:
        ValueError: variance is not above 0, or levels do not increase.
    """

    variance: float | None = None
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.variance is not None:
            positive(variance=self.variance)
        if self.levels is None:
            return
        levels = numbers("levels", self.levels)
        object.__setattr__(self, "levels", levels)
        if (
            levels.ndim != 1
            or len(levels) < 2
            or not (levels.diff() > 0).all()
            or not levels.isfinite().all()
        ):
            raise ValueError(
                f"levels = {self.levels!s:.100}: expected at least 2 finite increasing numbers, e.g. torch.linspace(-1, 1, 256)"
            )

    def log_p(self, x0: Tensor, mean: Tensor, level: float) -> Tensor:
        """The log-density of x0 given the data prediction at x_stop, both [B, ...], or the log-probability of its cell: [B], float64, in nats.

        `level` is sigma / alpha at x_stop.
        """
        if self.variance is None and not 0 < level < math.inf:
            name, left = ("sigma", "is left to decode") if level == 0 else ("alpha", "is known of the data")
            raise ValueError(
                f"{name} = 0 at x_stop, where nothing {left}: take a stop with {name} > 0, or give Decoder(variance=...)"
            )
        deviation = level if self.variance is None else math.sqrt(self.variance)
        if self.levels is None:
            return gaussian((x0.double() - mean.double()) / deviation) - math.prod(x0.shape[1:]) * math.log(
                deviation
            )
        return self._of_cells(x0.double(), mean.double(), deviation)

    def _of_cells(self, x0: Tensor, mean: Tensor, deviation: float) -> Tensor:
        assert self.levels is not None
        levels = self.levels.to(x0.device)
        bounds = (levels[1:] + levels[:-1]) / 2
        cell = torch.bucketize(x0.detach().contiguous(), bounds)
        off = (x0 - levels[cell]).abs() > ON_LEVEL * levels.diff().min()
        if off.any():
            raise ValueError(
                f"x0 has a value {x0[off][0]:g} that is none of the {len(levels)} levels from {levels[0]:g} to {levels[-1]:g}: give the data as they are, "
                "without noise, or leave levels out for a density"
            )
        first, last = cell == 0, cell == len(bounds)
        low = (bounds[(cell - 1).clamp(min=0)] - mean) / deviation
        high = (bounds[cell.clamp(max=len(bounds) - 1)] - mean) / deviation
        mirrored = low + high > 0  # in the upper tail: differences keep digits in the lower
        below = torch.special.log_ndtr(torch.where(mirrored, -high, low))
        above = torch.special.log_ndtr(torch.where(mirrored, -low, high))
        inner = above + torch.log(-torch.expm1(torch.where(first | last, -1.0, below - above)))
        outer = torch.special.log_ndtr(torch.where(first, high, -low))
        return elements(torch.where(first | last, outer, inner)).sum(1)


def gaussian(z: Tensor) -> Tensor:
    """The log-density of standard normals, over all elements of each z [B, ...]: [B], float64, in nats."""
    squares = elements(z.double().square())
    return -0.5 * (squares.sum(1) + squares.shape[1] * math.log(2 * math.pi))

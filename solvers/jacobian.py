"""What densities and high-order losses need of a model's Jacobian: exactly, or along random directions (Hutchinson)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import choice, whole
from solvers.noise import PROBES, Noise, as_source, drawn
from solvers.predictions import NO_GRADIENT

DISTRIBUTIONS = ("rademacher", "gaussian")
LIMIT = 1024


@dataclass(frozen=True)
class Divergence:
    """How a divergence is found, as made by `exact` and `hutchinson`: along which directions the Jacobian is multiplied.

    Attributes:
        probes: number of random directions; 0 for all the unit vectors.
        distribution: of the random directions.
        noise: where they come from.
        limit: the most elements of one sample that unit vectors are taken for.
    """

    probes: int = 0
    distribution: str = "rademacher"
    noise: Noise = 0
    limit: int = LIMIT

    @property
    def is_exact(self) -> bool:
        """Whether nothing is random."""
        return self.probes == 0

    def standard_error(self, values: Tensor) -> Tensor:
        """Of the mean of values along each group of directions, [G, B] -> [B]: 0 if exact, NaN of a single probe."""
        if self.is_exact:
            return torch.zeros_like(values[0])
        return (
            values.std(0) / math.sqrt(len(values))
            if len(values) > 1
            else torch.full_like(values[0], math.nan)
        )

    def directions(self, x: Tensor) -> Tensor:
        """Directions v in G groups, [G, D, B, ...], such that in each group sum v v^T is the identity, or is so in the mean.

        One group of the d unit vectors if exact, with B = 1, as they are the same for all samples; else a group of one for each probe.
        """
        d = math.prod(x.shape[1:])
        if self.is_exact:
            if d > self.limit:
                raise ValueError(
                    f"exact() takes {d} passes through the network for each call, as a sample has {d} elements, more than limit = "
                    f"{self.limit}: take divergence=hutchinson(), or exact(limit={d})"
                )
            unit = torch.eye(d, dtype=x.dtype, device=x.device)
            return unit.reshape(1, d, 1, *x.shape[1:])
        source = as_source(self.noise, len(x), PROBES)
        normals = torch.stack([drawn(source, probe, x) for probe in range(self.probes)])[:, None]
        if self.distribution == "gaussian":
            return normals
        return torch.where(normals < 0, -1.0, 1.0).to(x)


def as_divergence(divergence: Divergence | None) -> Divergence:
    """A divergence as it is, or the exact one for None."""
    if not isinstance(divergence, Divergence | None):
        raise TypeError(f"divergence = {divergence!r:.100}: expected exact() or hutchinson(probes=1)")
    return divergence or exact()


def exact(limit: int = LIMIT) -> Divergence:
    """The divergence as the sum over all d unit vectors: d passes back through the network for each call.

    Args:
        limit: the most elements d of a sample for which this is done.
    """
    return Divergence(limit=whole("limit", limit, 1, 10**9, example=LIMIT))


def hutchinson(probes: int = 1, distribution: str = "rademacher", noise: Noise = 0) -> Divergence:
    """Hutchinson's estimate of the divergence, the mean of v^T J v over random v with E v v^T = 1, drawn once for a whole trajectory.

    With "rademacher" the diagonal of the Jacobian adds nothing to the variance.
    Source: Hutchinson 1989 (doi 10.1080/03610918908812806); Grathwohl et al. 2019 (arXiv 1810.01367).

    Args:
        probes: number of directions v, each a pass back through the network for each call.
        distribution: "rademacher", elements of +-1, or "gaussian", standard normals.
        noise: a noise source, a torch.Generator, or an int seed: the directions of a sample do not depend on its batch.

    Raises:
        ValueError: probes below 1, or an unknown distribution.
    """
    whole("probes", probes, 1, 10**6, example=1)
    choice("distribution", distribution, DISTRIBUTIONS, {"normal": "gaussian", "sign": "rademacher"})
    as_source(noise, 0)
    return Divergence(probes, distribution, noise)


def with_products(
    function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, grad: bool
) -> tuple[Tensor, Tensor]:
    """The function's value at x [B, ...] and its `products`; `grad` keeps the graph of both."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        try:
            y = function(x)
        except RuntimeError as error:
            if "nference tensor" not in str(error):
                raise
            raise ValueError(
                "the network's weights are inference tensors, of which no gradient is kept: make or load it outside torch.inference_mode()"
            ) from error
        rows = products(y, x, directions, grad)
    return (y, rows) if grad else (y.detach(), rows)


def attached(net: Callable[..., Any]) -> Callable[..., Any]:
    """The network, whose first answer is looked at for a gradient to x; a conversion would hide that it has none."""
    known = False

    def checked(x: Tensor, *given: Any) -> Any:
        nonlocal known
        answer = net(x, *given)
        m = answer[0] if isinstance(answer, tuple) else answer
        if not known and isinstance(m, Tensor):
            if (
                not m.requires_grad
                or torch.autograd.grad(m.sum(), x, retain_graph=True, allow_unused=True)[0] is None
            ):
                raise ValueError(NO_GRADIENT)
            known = True
        return answer

    return checked


def products(y: Tensor, x: Tensor, directions: Tensor, grad: bool) -> Tensor:
    """v^T dy/dx [D, B, ...] for directions v [D, B or 1, ...] of samples that do not mix; `grad` keeps their own graph.

    Raises:
        ValueError: the network was run where it leaves no gradient, or does not depend on x.
    """
    if not y.requires_grad:
        raise ValueError(NO_GRADIENT)
    rows = []
    for v in directions:
        (row,) = torch.autograd.grad(
            y, x, v.expand_as(y), retain_graph=True, create_graph=grad, allow_unused=True
        )
        if row is None:
            raise ValueError(NO_GRADIENT)
        rows.append(row)
    return torch.stack(rows)

"""Reading any linear sampler off as a table, by running it on one-hot vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

ROUNDING = 1e-13  # of a row's largest weight: what folding leaves where a weight is 0


def trace(sampler: Callable[[Callable, Tensor, Callable], Tensor], calls: int, draws: int = 0) -> Tensor:
    """The states of `sampler(model, x, noise)` as combinations of x_init, its calls and its draws.

    Returns [calls + 1, 1 + calls + draws]: row i is the state given to call i, the last row the final state;
    column 0 weighs x_init, column 1 + i the output of call i, column 1 + calls + k draw k. The basis is the batch
    axis: the sampler sees x [2 + calls + draws, 1] in float64 and must act on every element alike; the last element
    is a random combination of the others, and shows whether it does so linearly. `model` is called as model(x, t),
    `noise` as noise().

    Raises:
        ValueError: another number of calls or draws, or a sampler that is not linear.
    """
    size = 1 + calls + draws
    mixed = 10 * torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.cat([torch.eye(size, dtype=torch.float64), mixed[:, None]], 1)[..., None]
    states: list[Tensor] = []
    drawn = 0

    def model(x: Tensor, t: object) -> Tensor:
        states.append(x.detach().clone())
        if len(states) > calls:
            raise ValueError(f"the sampler makes more than calls = {calls} model calls")
        return basis[len(states)].clone()

    def noise() -> Tensor:
        nonlocal drawn
        drawn += 1
        if drawn > draws:
            raise ValueError(f"the sampler makes more than draws = {draws} draws")
        return basis[calls + drawn].clone()

    end = sampler(model, basis[0].clone(), noise)
    if (len(states), drawn) != (calls, draws):
        raise ValueError(
            f"the sampler made {len(states)} calls and {drawn} draws, expected calls = {calls}, draws = {draws}"
        )
    table = torch.stack([*states, end]).squeeze(-1).double()
    weights, combined = table[:, :-1], table[:, -1]
    gap = (weights @ mixed - combined).abs() / (weights.abs() @ mixed.abs()).clamp_min(1e-300)
    if not gap.max() < 1e-4:  # float32 samplers keep more
        raise ValueError(
            f"the sampler is not linear (clipping? thresholding?): state {int(gap.argmax())} is off by {gap.max():.2g}"
        )
    return weights


def rows(weights: Tensor, calls: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fold traced states into a plan's rows: (a [N], b [N, K], c [N, L]), N = calls; K and L no wider than needed.

    x_{i+1} = a_i x_i + sum_j b_ij m_{i-j} + sum_k c_ik z_{i-k}, where a_i is what x_init's weights say: w_{i+1,0} = a_i w_{i,0}.
    Draws, if there are any, must be one per call.

    Raises:
        ValueError: shapes do not fit, or a state given to a call does not depend on x_init.
    """
    draws = weights.shape[1] - 1 - calls
    if weights.shape[0] != calls + 1 or draws not in (0, calls):
        raise ValueError(
            f"weights has shape {list(weights.shape)}, expected [{calls + 1}, {calls + 1}], or {2 * calls + 1} columns with noise"
        )
    if (weights[:-1, 0] == 0).any():
        raise ValueError("a state given to a call does not depend on x_init, so its row cannot be folded")
    a = weights[1:, 0] / weights[:-1, 0]
    step = weights[1:] - a[:, None] * weights[:-1]
    step = torch.where(step.abs() > ROUNDING * step.abs().amax(1, keepdim=True), step, 0.0)
    return a, _newest_first(step[:, 1 : calls + 1], least=1), _newest_first(step[:, calls + 1 :], least=0)


def _newest_first(step: Tensor, least: int) -> Tensor:
    """Column j of the result is the weight of number i - j in row i; trailing columns of zeros are left out."""
    size = step.shape[1]
    table = torch.stack([pad(row[: i + 1].flip(0), (0, max(size - i - 1, 0))) for i, row in enumerate(step)])
    used = (table != 0).any(0).nonzero()
    return table[:, : max(least, int(used.max()) + 1 if len(used) else 0)]

"""Reading any linear sampler off as a table, by running it on one-hot vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def trace(sampler: Callable[[Callable, Tensor, Callable], Tensor], calls: int, draws: int = 0) -> Tensor:
    """The states of `sampler(model, x, noise)` as combinations of x_init, its calls and its draws.

    Returns [calls + 1, 1 + calls + draws]: row i is the state given to call i, the last row the final state;
    column 0 weighs x_init, column 1 + i the output of call i, column 1 + calls + k draw k. The basis is the batch
    axis: the sampler sees x [1 + calls + draws, 1] in float64 and must act on every element alike. `model` is
    called as model(x, t), `noise` as noise().
    """
    basis = torch.eye(1 + calls + draws, dtype=torch.float64)[..., None]
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
    return torch.stack([*states, end]).squeeze(-1)


def rows(weights: Tensor, calls: int) -> tuple[Tensor, Tensor]:
    """Fold traced states into a plan's rows: (a [N], b [N, N]), N = calls; column j of b weighs call i - j.

    x_{i+1} = a_i x_i + sum_j b_ij m_{i-j}, where a_i is what x_init's weights say: w_{i+1,0} = a_i w_{i,0}.
    """
    if weights.shape[0] != calls + 1 or weights.shape[1] < calls + 1:
        raise ValueError(f"weights has shape {list(weights.shape)}, expected [{calls + 1}, >= {calls + 1}]")
    if (weights[:-1, 0] == 0).any():
        raise ValueError("a state given to a call does not depend on x_init, so its row cannot be folded")
    a = weights[1:, 0] / weights[:-1, 0]
    step = (weights[1:] - a[:, None] * weights[:-1])[:, 1 : calls + 1]
    b = torch.stack(
        [torch.nn.functional.pad(step[i, : i + 1].flip(0), (0, calls - 1 - i)) for i in range(calls)]
    )
    return a, b

"""A plan's rows as the executor takes them: the model's prediction folded in, applied in as few passes as can be."""

import itertools
import math
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.plan import Plan, last_use, nonzero
from solvers.predictions import Model, conversion, picked

# (y, scale, u, weight), numbers: y <- scale y + weight u, in place
ScaledAdd = tuple[Tensor, Any, Tensor, Any]
PIECE = 2**18  # elements of a state that a CPU's cache holds several times over


Weight = float | Tensor  # a number, or one for each element of x, [*D]


class Variance(NamedTuple):
    """What bounds the variance that the model's second output chooses, and the model's noise prediction from x and m."""

    least: float
    most: float
    cap: float
    noise_of_x: float
    noise_of_m: float


class Row(NamedTuple):
    """One row with the conversion of the model's output folded in; every weight a host float, or a tensor of x's kind.

    x <- x_weight x + output_weight m + sum over past + shift + sum over draws, and, where a later row reads this call,
    kept = keep[0] x + keep[1] m. `swap` is the same x from kept and m, where that is as well conditioned.
    """

    label: float | int
    input_scale: float
    x_weight: Weight
    output_weight: Weight
    past: list[tuple[int, Weight]]
    draws: list[tuple[int, float]]
    keep: tuple[Weight, Weight] | None
    swap: tuple[float, float] | None
    done: list[int]
    shift: Weight = 0.0
    as_formula: bool = False  # weights per element, or a shift: no scaled additions
    is_called: bool = True
    variance: "Variance | None" = None
    at_level: tuple | None = None  # of a guided model; see `Model.at_levels`


def rows_of(plan: Plan, model: Model, like: Tensor | None = None) -> list[Row]:
    """Everything the loop needs, decided before the first call. `like` is the state, whose kind weights per element take."""
    formula = bool(plan.element_shape or plan.shift.numel())
    if like is not None and not _broadcasts(plan.element_shape, like.shape[1:]):
        raise ValueError(
            f"x has shape {list(like.shape)}: the plan's coefficients are for elements {list(plan.element_shape)}, expected "
            f"[B, {', '.join(map(str, plan.element_shape))}]"
        )

    def weights(table: Tensor) -> list:
        return list(table if like is None else table.to(like)) if formula else table.tolist()

    last = last_use(plan.b)
    called = [use >= i for i, use in enumerate(last)]
    alpha, sigma = (v[:-1].reshape(-1, *[1] * len(plan.element_shape)) for v in (plan.alpha, plan.sigma))
    p, q = (v.reshape(alpha.shape) for v in model.mixture(plan.times[:-1], plan.alpha[:-1], plan.sigma[:-1]))
    from_x, from_m = conversion((p, q), plan.mixture(), alpha, sigma)
    if not all(called):  # there nothing is converted
        here = torch.tensor(called, device="cpu").reshape(alpha.shape)
        from_x, from_m = torch.where(here, from_x, 0.0), torch.where(here, from_m, 1.0)
    _refuse_undetermined(plan, model, ~(from_x.isfinite() & from_m.isfinite()))
    a, b0 = plan.a, plan.b[:, 0]
    # x = (kept - from_m m) / from_x is as good as x itself unless its terms outgrow it
    growth = (from_m / from_x).abs() * torch.hypot(p, q) / torch.hypot(alpha, sigma)
    can_swap = [False] * plan.rows if formula else (growth < 4).tolist()
    labels = _labels(plan, model, called)
    scales = model.input_scale(plan.alpha[:-1], plan.sigma[:-1]).tolist()
    x_weights, output_weights = weights(a + b0 * from_x), weights(b0 * from_m)
    table, read, draws = weights(plan.b), nonzero(plan.b).tolist(), plan.c.tolist()
    keep = weights(torch.stack([from_x, from_m], 1))
    swap = weights(torch.stack([b0 + a / from_x, -a * from_m / from_x], 1))
    shift = weights(plan.shift) if plan.shift.numel() else [0.0] * plan.rows
    variances = _variances(plan, model, (p, q))
    at_levels = _at_levels(plan, model, called)
    return [
        Row(
            label=labels[i],
            input_scale=scales[i],
            x_weight=x_weights[i],
            output_weight=output_weights[i],
            past=[(i - j, table[i][j]) for j in range(1, plan.window) if read[i][j]],
            draws=[(i - k, weight) for k, weight in enumerate(draws[i]) if weight],
            keep=(keep[i][0], keep[i][1]) if last[i] > i else None,
            swap=(swap[i][0], swap[i][1]) if last[i] > i and can_swap[i] else None,
            done=[call for call in range(max(0, i - plan.window), i) if last[call] == i],
            shift=shift[i],
            as_formula=formula,
            is_called=called[i],
            variance=variances[i],
            at_level=at_levels[i],
        )
        for i in range(plan.rows)
    ]


def _labels(plan: Plan, model: Model, called: list[bool]) -> list[float] | list[int]:
    """What the net reads in each row; in rows that do not call it, whatever."""
    labels = iter(model.labels(plan.times[:-1][torch.tensor(called, device="cpu")]))
    return [next(labels) if is_called else 0 for is_called in called]


def _at_levels(plan: Plan, model: Model, called: list[bool]) -> list[tuple | None]:
    """What a guided model's net is given in each row that calls it."""
    if model.at_levels is None:
        return [None] * plan.rows
    here = torch.tensor(called, device="cpu")
    weights = model.at_levels(plan.times[:-1][here], plan.alpha[:-1][here], plan.sigma[:-1][here])
    columns, count = picked(weights, lambda w: w.tolist()), itertools.count()
    numbered = [next(count) if is_called else None for is_called in called]
    return [None if n is None else picked(columns, itemgetter(n)) for n in numbered]


def _variances(plan: Plan, model: Model, have: tuple[Tensor, Tensor]) -> list[Variance | None]:
    """For each row what its second output chooses between, if the plan leaves it to the model."""
    if not plan.variances.numel():
        return [None] * plan.rows
    if model.variance is None:
        raise ValueError(
            "the plan leaves the variance of its noise to the model's second output: say what that is, Model(net, variance='range' | "
            "'square' | 'residual')"
        )
    if (plan.second == "range") != (model.variance == "range"):
        wanted = "'range'" if plan.second == "range" else "'square' or 'residual'"
        raise ValueError(
            f"the plan takes the model's second output for {plan.second}, but it is {model.variance!r}: expected Model(net, variance={wanted}), or "
            f"a plan that reads it: {'extended_analytic_dpm' if plan.second == 'range' else 'ddpm with variance=' + repr('learned')}"
        )
    alpha, sigma = plan.alpha[:-1], plan.sigma[:-1]
    weights = conversion(have, (torch.zeros_like(alpha), torch.ones_like(alpha)), alpha, sigma)
    return [
        Variance(*row, *noise) if row[1] > 0 else None
        for row, noise in zip(plan.variances.tolist(), torch.stack(weights, 1).tolist(), strict=True)
    ]


def deviation_of(row: Variance, kind: str | None, x: Tensor, m: Tensor, second: Tensor) -> Tensor:
    """The standard deviation of the row's noise, element by element, as `Model.variance` says."""
    if kind == "range":
        share = (second + 1) / 2
        variance = torch.exp(math.log(row.most) * share + math.log(row.least) * (1 - share))
    else:
        if kind == "square":
            second = second - (row.noise_of_x * x + row.noise_of_m * m) ** 2
        variance = row.least + (row.most - row.least) * second.clamp(min=0)
    return variance.clamp(max=row.cap).sqrt()


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether coefficients of one shape fit elements of another without making them more."""
    missing = len(to) - len(shape)
    return missing >= 0 and all(size in (1, given) for size, given in zip(shape, to[missing:], strict=True))


def _refuse_undetermined(plan: Plan, model: Model, undetermined: Tensor) -> None:
    if undetermined.any():
        i = int(undetermined.nonzero()[0, 0])
        raise ValueError(
            f"a {model.predicts} prediction does not determine {plan.predicts} in call {i}, at t = {plan.times[i]:g} (alpha = "
            f"{plan.alpha[i]:g}, sigma = {plan.sigma[i]:g}); start the grid elsewhere, or use a network that predicts velocity or flow (or data, at alpha = 0)"
        )


def combined(
    row: Row, x: Tensor, m: Tensor, outputs: dict[int, Tensor], call: int, check: bool
) -> Tensor | None:
    """The row as a formula that gradients flow through; None if `check` finds m not finite."""
    if check and not is_finite(m.detach()):
        return None
    new = x * row.x_weight + m * row.output_weight  # x first: it is its layout that is kept
    if row.as_formula:
        new = new + row.shift
    for past, weight in row.past:
        new = new + outputs[past] * weight
    if row.keep:
        outputs[call] = x * row.keep[0] + m * row.keep[1]
    for past in row.done:
        outputs.pop(past, None)
    return new


def uncalled(row: Row, x: Tensor, outputs: dict[int, Tensor], reuse: bool) -> Tensor:
    """The row where the model is not called, as no row reads its output; `reuse` as in `combined_in_place`."""
    if reuse and not row.as_formula:
        new = x if row.x_weight == 1 else x.mul_(row.x_weight)
    else:
        new = x * row.x_weight + row.shift
    for past, weight in row.past:
        new = new + outputs[past] * weight
    for past in row.done:
        outputs.pop(past, None)
    return new


def combined_in_place(
    row: Row, x: Tensor, m: Tensor, outputs: dict[int, Tensor], call: int, reuse: bool, check: bool
) -> Tensor | None:
    """The row as scaled additions; None if `check` finds m not finite.

    `reuse` lets it overwrite x and outputs that are read for the last time.
    """
    past = dict(row.past)
    spent = row.done[0] if row.done else -1  # an output whose memory is free once its weight is in
    x = x if reuse else x.clone()
    new, first, last = x, [(x, row.x_weight, m, row.output_weight)], []
    if row.keep:
        keep_x, keep_m = row.keep
        spare = torch.empty_like(x) if spent < 0 else outputs[spent] if reuse else outputs[spent].clone()
        if row.swap:  # the kept output takes the place of x, and x that of the spent one
            outputs[call], new = x, spare
            first = [
                (x, keep_x, m, keep_m),
                (new, past.pop(spent, 0.0), x, row.swap[0]),
                (new, 1.0, m, row.swap[1]),
            ]
        elif keep_x == 0:  # the network predicts in the plan's form
            outputs[call] = spare
            last = [(spare, 0.0, m, keep_m)]
        else:
            outputs[call] = x.clone()
            first = [(outputs[call], keep_x, m, keep_m), *first]
    steps = [*first, *((new, 1.0, outputs[old], weight) for old, weight in past.items()), *last]
    if not _scaled_adds(steps, m, check):
        return None
    for old in row.done:
        outputs.pop(old, None)
    return new


def _scaled_adds(steps: list[ScaledAdd], m: Tensor, check: bool) -> bool:
    """Each y <- scale y + weight u in turn; False as soon as `check` finds m not finite.

    A large state on a CPU goes through all of them piece by piece, while the piece is in the cache.
    """
    large = m.device.type == "cpu" and m.numel() > PIECE
    if large and all(t.stride() == m.stride() for y, _, u, _ in steps for t in (y, u)):

        def pieces(t: Tensor) -> tuple[Tensor, ...]:
            return t.as_strided((t.numel(),), (1,)).split(PIECE)

        cut = [(pieces(y), scale, pieces(u), weight) for y, scale, u, weight in steps]
        for i, piece in enumerate(pieces(m)):
            for targets, scale, sources, weight in cut:
                _scaled_add(targets[i], scale, sources[i], weight)
            if check and not (math.isfinite(torch.dot(piece, piece).item()) or piece.isfinite().all()):
                return False
        return True
    if check and not is_finite(m):
        return False
    for step in steps:
        _scaled_add(*step)
    return True


def _scaled_add(y: Tensor, scale: Any, u: Tensor, weight: Any) -> None:
    if scale == 0:
        torch.mul(u, weight, out=y)
    else:
        (y if scale == 1 else y.mul_(scale)).add_(u, alpha=weight)


def is_finite(x: Tensor) -> bool:
    """Whether every entry is finite. A sum is read many times faster than `isfinite`; only where it overflows, look closer."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())

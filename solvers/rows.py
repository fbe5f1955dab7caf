"""A plan's rows as the executor takes them, the model's prediction folded in, and what applies them to a state."""

import itertools
import math
from collections.abc import Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from solvers.kernels import Kernel
from solvers.plan import Plan
from solvers.predictions import Model, conversion, picked

# (y, adds, u, weight): y <- weight u, or y + weight u if it adds
ScaledAdd = tuple[Tensor, bool, Tensor, float]
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
    kept = keep[0] x + keep[1] m.
    """

    label: Any  # what the net reads: a number, or for a given state a tensor [B] beside it
    input_scale: float
    x_weight: Weight
    output_weight: Weight
    past: list[tuple[int, Weight]]
    draws: list[tuple[int, float]]
    keep: tuple[Weight, Weight] | None
    done: list[int]  # the outputs that no later row reads
    shift: Weight = 0.0
    as_formula: bool = False  # weights per element, or a shift: no scaled additions
    is_called: bool = True
    variance: "Variance | None" = None
    at_level: tuple | None = None  # of a guided model; see `Model.at_levels`
    packed: Tensor | None = None  # the weights of all rows as a kernel reads them, beside the state


def rows_of(plan: Plan, model: Model, like: Tensor | None = None) -> list[Row]:
    """Everything the loop needs, decided before the first call and laid beside `like`, the state. Nothing waits for a device."""
    formula = not plan.is_scalar
    if like is not None and not _broadcasts(plan.element_shape, like.shape[1:]):
        raise ValueError(
            f"x has shape {list(like.shape)}: the plan's coefficients are for elements {list(plan.element_shape)}, expected "
            f"[B, {', '.join(map(str, plan.element_shape))}]"
        )

    def weights(table: Tensor) -> list:
        if not formula:
            return table.tolist()
        return list(table if like is None else table.to(like.device, like.dtype, non_blocking=True))

    pattern = plan.pattern
    called, last = pattern.called, pattern.last
    alpha, sigma = (v[:-1].reshape(-1, *[1] * len(plan.element_shape)) for v in (plan.alpha, plan.sigma))
    p, q = (v.reshape(alpha.shape) for v in model.mixture(plan.times[:-1], plan.alpha[:-1], plan.sigma[:-1]))
    from_x, from_m = conversion((p, q), plan.mixture(), alpha, sigma)
    if not all(called):  # there nothing is converted
        here = torch.tensor(called, device="cpu").reshape(alpha.shape)
        from_x, from_m = torch.where(here, from_x, 0.0), torch.where(here, from_m, 1.0)
    if not (is_finite(from_x) and is_finite(from_m)):
        _refuse_undetermined(plan, model, ~(from_x.isfinite() & from_m.isfinite()))
    labels, at_levels = _labels(plan, model, called, like), _at_levels(plan, model, called)
    scales = model.input_scale(plan.alpha[:-1], plan.sigma[:-1]).tolist()
    b0 = plan.b[:, 0]
    four = plan.a + b0 * from_x, b0 * from_m, from_x, from_m
    own = torch.stack(torch.broadcast_tensors(*four) if plan.element_shape else four, 1)
    table, c = weights(plan.b), plan.c.tolist()
    past = [[(call, table[i][i - call]) for call in calls] for i, calls in enumerate(pattern.past)]
    draws = [[(draw, c[i][i - draw]) for draw in drawn] for i, drawn in enumerate(pattern.draws)]
    shift = weights(plan.shift) if plan.shift.numel() else itertools.repeat(0.0)
    variances = _variances(plan, model, (p, q))
    packed = None if formula or like is None else _packed(plan, own, like)
    columns = {
        "label": labels,
        "input_scale": scales,
        "x_weight": weights(own[:, 0]),
        "output_weight": weights(own[:, 1]),
        "past": past,
        "draws": draws,
        "keep": [(w[0], w[1]) if last[i] > i else None for i, w in enumerate(weights(own[:, 2:]))],
        "done": pattern.done,
        "shift": shift,
        "as_formula": itertools.repeat(formula),
        "is_called": called,
        "variance": variances,
        "at_level": at_levels,
        "packed": itertools.repeat(packed),
    }
    return list(map(Row, *(columns[name] for name in Row._fields)))


def _packed(plan: Plan, own: Tensor, like: Tensor) -> Tensor:
    """The rows' weights as a kernel reads them, beside the state: of x and m in x, of them in what is kept, of the terms."""
    terms = torch.cat([plan.b, plan.c, plan.a.new_zeros(plan.rows, 1)], 1).gather(1, plan.pattern.columns)
    return torch.cat([own, terms], 1).to(like.device, like.dtype, non_blocking=True)


def _labels(plan: Plan, model: Model, called: list[bool], like: Tensor | None) -> Sequence:
    """What the net reads in each row, in rows that do not call it whatever: numbers, or [B] beside `like`, begun at multiples of 16 bytes."""
    times = plan.times[:-1]
    numbers: Any = times  # read as they are if the model does not say otherwise
    if model.label is not None or like is None:
        given = iter(model.labels(times if all(called) else times[torch.tensor(called, device="cpu")]))
        numbers = [next(given) if is_called else 0 for is_called in called]
    if like is None:
        return numbers
    whole_numbers = model.label is not None and all(isinstance(number, int) for number in numbers)
    dtype = torch.long if whole_numbers else like.dtype
    labels = torch.as_tensor(numbers, dtype=dtype, device="cpu").to(like.device, non_blocking=True)
    whole = 16 // labels.element_size()
    width = -(-len(like) // whole) * whole
    return labels[:, None].expand(-1, width).contiguous()[:, : len(like)].unbind()


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
    i = int(undetermined.nonzero()[0, 0])
    raise ValueError(
        f"a {model.predicts} prediction does not determine {plan.predicts} in call {i}, at t = {plan.times[i]:g} (alpha = "
        f"{plan.alpha[i]:g}, sigma = {plan.sigma[i]:g}); start the grid elsewhere, or use a network that predicts velocity or flow (or data, at alpha = 0)"
    )


def combined(
    row: Row, x: Tensor, m: Tensor | None, outputs: dict[int, Tensor], draws: dict[int, Tensor], call: int
) -> Tensor:
    """The row as a formula that gradients flow through; m is None where the model is not called."""
    new = x * row.x_weight
    if m is not None:
        new = new + m * row.output_weight  # x first: it is its layout that is kept
    if row.as_formula:
        new = new + row.shift
    for past, weight in row.past:
        new = new + outputs[past] * weight
    for draw, weight in row.draws:
        new = new + draws[draw] * weight
    if row.keep and m is not None:
        outputs[call] = x * row.keep[0] + m * row.keep[1]
    for past in row.done:
        outputs.pop(past, None)
    return new


class Stepper:
    """Applies rows of numbers to a state: in one pass of a kernel, or as scaled additions of torch with the same roundings."""

    def __init__(
        self, kernel: Kernel | None, reuse: bool, check: bool, history: torch.dtype | None = None
    ) -> None:
        """What applies rows.

        Args:
            kernel: what does it in one pass, if anything.
            reuse: whether x is overwritten, and outputs that no later row reads; else all that is made is new.
            check: whether to look if outputs are finite.
            history: the dtype in which outputs are kept, if not the state's.
        """
        self.kernel, self.reuse, self.check, self.history = kernel, reuse, check, history
        self.free: list[Tensor] = []  # memory of outputs that nobody reads any more

    def __call__(
        self,
        row: Row,
        x: Tensor,
        m: Tensor | None,
        outputs: dict[int, Tensor],
        draws: dict[int, Tensor],
        call: int,
        flags: Tensor | None = None,
    ) -> Tensor | None:
        """The state after the row; None if m is not finite, and then x is what it was where m is not.

        Args:
            row: the row.
            x: the state before it.
            m: the output; None where the model is not called.
            outputs: those that are kept, by call; brought up to date.
            draws: the noise, by draw.
            call: the row's number.
            flags: [B], where a kernel on a device marks the samples of m that are not finite.
        """
        terms = [outputs[past] for past, _ in row.past]
        if row.draws:
            terms += [draws[draw] for draw, _ in row.draws]
        spent = [outputs.pop(past) for past in row.done if past in outputs] if row.done else []
        if self.kernel and self.reuse:
            self.free += spent  # read before they are written
        kept = self._memory(x) if row.keep else None
        wide = kept if kept is None or self.kernel or kept.dtype == x.dtype else torch.empty_like(x)
        new = x if self.reuse else torch.empty_like(x)
        if self.kernel and row.packed is not None:
            finite = (
                self.kernel(row.packed, call, x, x if m is None else m, terms, new, wide, flags) or m is None
            )
        else:
            finite = _scaled_adds(_steps(row, x, m, terms, new, wide), m if self.check else None)
            if self.reuse:
                self.free += spent
        if kept is not None and wide is not None:
            outputs[call] = kept if kept is wide else kept.copy_(wide)
        return new if finite or not self.check else None

    def _memory(self, x: Tensor) -> Tensor:
        return self.free.pop() if self.free else torch.empty_like(x, dtype=self.history)


def _steps(
    row: Row, x: Tensor, m: Tensor | None, terms: list[Tensor], new: Tensor, kept: Tensor | None
) -> list[ScaledAdd]:
    """The row as scaled additions."""
    weights: list[Any] = [weight for _, weight in (*row.past, *row.draws)]
    steps = [] if kept is None or row.keep is None else _mixed(kept, x, row.keep[0], m, row.keep[1])
    steps += _mixed(new, x, row.x_weight, m, row.output_weight)
    return steps + [(new, True, term, weight) for term, weight in zip(terms, weights, strict=True)]


def _mixed(y: Tensor, x: Tensor, from_x: Any, m: Tensor | None, from_m: Any) -> list[ScaledAdd]:
    """y <- from_x x + from_m m; y may be x."""
    if m is not None and from_x == 0:
        return [(y, False, m, from_m)]
    scaled = [] if y is x and from_x == 1 else [(y, False, x, from_x)]
    return scaled if m is None else [*scaled, (y, True, m, from_m)]


def _scaled_adds(steps: list[ScaledAdd], m: Tensor | None) -> bool:
    """The additions in turn; False as soon as m, if there is one to look at, is found not finite.

    A large state on a CPU goes through all of them piece by piece, while the piece is in the cache.
    """
    tensors = [t for y, _, u, _ in steps for t in (y, u)]
    large = tensors and tensors[0].device.type == "cpu" and tensors[0].numel() > PIECE
    if large and all(t.stride() == tensors[0].stride() for t in tensors):

        def pieces(t: Tensor) -> tuple[Tensor, ...]:
            return t.as_strided((t.numel(),), (1,)).split(PIECE)

        cut = [(pieces(y), adds, pieces(u), weight) for y, adds, u, weight in steps]
        looked_at = () if m is None else pieces(m)
        for i in range(len(cut[0][0])):
            if looked_at and not is_finite(looked_at[i]):
                return False
            for targets, adds, sources, weight in cut:
                _scaled_add(targets[i], adds, sources[i], weight)
        return True
    if m is not None and not is_finite(m):
        return False
    for step in steps:
        _scaled_add(*step)
    return True


def _scaled_add(y: Tensor, adds: bool, u: Tensor, weight: float) -> None:
    if adds:
        y.add_(u, alpha=weight)
    else:
        torch.mul(u, weight, out=y)


def is_finite(x: Tensor) -> bool:
    """Whether every entry is finite. A sum is read many times faster than `isfinite`; only where it overflows, look closer."""
    return math.isfinite(x.sum().item()) or bool(x.isfinite().all())

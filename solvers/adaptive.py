"""Adaptive steps, sample by sample: exponential Adams of variable order; embedded exponential Runge-Kutta pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf

import torch
from torch import Tensor

from solvers.arguments import choice, flag, number, positive, whole
from solvers.control import (
    ON_LIMIT,
    REJECTED,
    ROUNDING,
    Control,
    Front,
    Method,
    Solution,
    Task,
    Trial,
    aim,
    column,
    ends_of,
    integrate,
)
from solvers.methods.exponential import FORMS, Form, Levels, noise_weight
from solvers.methods.multistep import MAX_ORDER, adams_rows, adams_weights
from solvers.methods.singlestep import (
    phi_of_steps,
    runge_kutta,
    scale_of_weights,
    singlestep_variable,
    textbook_stages,
)
from solvers.methods.tableaux import (
    Pair,
    Tableau,
    dpm_solver_12,
    dpm_solver_23,
    exponential_32,
    exponential_43,
)
from solvers.methods.unipc import with_corrector
from solvers.noise import Ahead
from solvers.plan import Plan
from solvers.predictions import AnyModel, as_model, predictor
from solvers.run import started, warn_of_training
from solvers.schedules import Schedule, in_lanes

PAIRS = {
    ("dpm_solver", 2): dpm_solver_12,
    ("dpm_solver", 3): dpm_solver_23,
    ("exponential_rk", 3): exponential_32,
    ("exponential_rk", 4): exponential_43,
}
METHODS = ("adams", "dpm_solver", "exponential_rk")
USUAL = {"adams": (6, "velocity"), "dpm_solver": (3, "noise"), "exponential_rk": (3, "velocity")}
SILENT = 0.1  # of the tolerance, by which predictors may disagree on a last step that ends unasked
ADAMS = Control(safety=0.5, integral=1.0, proportional=0.0, least=0.1, most=2.0)
# of the predictor's error that counts: the corrected state, with which the run goes on, has a smaller one
CORRECTED = 1 / 3
PAIR = Control(safety=0.9, integral=0.7, proportional=0.4, least=0.2, most=5.0)
PAPER = Control(0.9, 1.0, 0.0, least=0.0, most=inf, rejected=1.0, stretch=1.0)
FIRST_STEP = 0.05  # of a coupled pair, in half log-SNR: Lu et al. 2022
PREDICTOR_TRIALS = 8


def adaptive(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    order: int | None = None,
    rtol: float = 0.05,
    atol: float = 0.0078,
    *,
    method: str = "adams",
    predicts: str | None = None,
    scale: float = 1.0,
    start: float | None = None,
    stop: float | None = None,
    coupled: bool = False,
    first_step: float | None = None,
    max_nfe: int = 1000,
    on_limit: str = "raise",
    dense: bool = False,
) -> Solution:
    """Integrate the diffusion ODE with steps that keep a tolerance, each sample with steps of its own.

    A sample's steps, and so its result, do not depend on the batch it is in; one that has arrived leaves the batch, so that the network
    is called on fewer and fewer. A step is accepted where the root mean square of its estimated error over
    max(atol, rtol |x|) is at most 1; the error at the end is of the tolerance's size (docs/adaptive.md has how near). On an `Inversion` it encodes.

    The default, "adams", is the exponential Adams method of variable step and order: one call per step, where the others make as many as
    their order. "dpm_solver" is DPM-Solver-12 or -23; "exponential_rk" a Runge-Kutta pair 3(2) or 4(3) with smaller errors.
    Order of the tolerance, as steps follow it; 1 call per step ("adams") or as many as the order; ODE; noise, data or velocity form.
    Source: adams: this library, see `Adams`; Lu et al. 2022 (arXiv 2206.00927), appendix C; pairs: see `solvers.tableaux`.

    Args:
        model: as for `run`, asked at any time and for each sample at its own: a network of whole steps with label=schedule.label.
        schedule: noise schedule.
        x: the states at `start`, [B, ...].
        order: of "adams" the highest order of the predictor, 1 to 8 (6); of "dpm_solver" 2 or 3 (3); of "exponential_rk" 3 or 4 (3).
        rtol: tolerance relative to x; the defaults are the paper's, coarse. The larger of the two counts: change both.
        atol: tolerance where x is small, in units of the data: that of a state with alpha^2 + sigma^2 = 1; 2 / 256 by default.
        method: "adams" | "dpm_solver" | "exponential_rk".
        predicts: form of the prediction, "noise" | "data" | "velocity"; steps are in half log-SNR, in velocity form in the angle
            arctan(sigma / (scale alpha)), for which ends with alpha = 0 or sigma = 0 are like any other. By default "velocity", for "dpm_solver" "noise".
        scale: of the velocity form, the data's standard deviation.
        start: first time; the schedule's own if None.
        stop: last time; the schedule's own if None.
        coupled: whether all samples take the steps of the worst, as in the paper; pairs also control them as it does.
        first_step: length of the first step, in half log-SNR or radians; chosen if None.
        max_nfe: calls that no sample exceeds; a step that might is not tried.
        on_limit: "raise" `NonConvergence`, or "return" what there is, see `Solution.status`.
        dense: keep states and outputs at the accepted points, for `Solution.at`.

    Returns:
        The solution: x, nfe, rejected, times, status, each per sample.

    Raises:
        NonConvergence: a sample did not arrive within max_nfe calls, or no step keeps the tolerance, or the model's output is not
            finite; the others have arrived.
        ValueError: a tolerance that the state's dtype cannot keep, an order that the method does not have, or an end that the form does not
            reach.
    """
    choice("method", method, METHODS)
    usual_order, usual_form = USUAL[method]
    order = usual_order if order is None else order
    predicts = choice("predicts", usual_form if predicts is None else predicts, FORMS)
    if method == "adams":
        whole("order", order, 1, MAX_ORDER)
    elif isinstance(order, bool) or not isinstance(order, int) or (method, order) not in PAIRS:
        orders = [o for name, o in PAIRS if name == method]
        raise ValueError(f"order = {order!r:.100} with method = {method!r}: expected one of {orders}")
    form = Form(predicts, singlestep_variable(predicts), scale)
    state = started(x)
    to_the_ends = (method, predicts) == ("adams", "velocity")
    task = task_of(
        model, schedule, form, state.x, state.input_dtype, start, stop, rtol, atol, coupled, to_the_ends
    )
    limits(first_step, max_nfe, on_limit)
    flag("dense", dense)
    kind: Method = Adams(task, most=order) if method == "adams" else Embedded(task, pair=PAIRS[method, order])
    with torch.no_grad():
        return integrate(
            kind, state.x, 1 if method == "adams" else order, first_step, max_nfe, on_limit, dense
        )


def task_of(
    model: AnyModel,
    schedule: Schedule,
    form: Form,
    x: Tensor,
    input_dtype: torch.dtype | None,
    start: float | None,
    stop: float | None,
    rtol: float,
    atol: float,
    coupled: bool = False,
    to_the_ends: bool = False,
) -> Task:
    """The task, its tolerances and its ends checked, which may have alpha = 0 or sigma = 0 if it is `to_the_ends`."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not 0 <= number(name, value) < inf:
            raise ValueError(f"{name} = {value}: expected a finite number from 0, e.g. {name}=1e-3")
    least = ROUNDING * torch.finfo(x.dtype).eps
    if max(rtol, atol) < least:
        hint = "" if rtol == atol == 0 else f", as {x.dtype} cannot keep less (pass x.double() for that)"
        raise ValueError(
            f"rtol = {rtol}, atol = {atol}: expected one of them from {least:.2g} on{hint}, e.g. rtol=1e-3, atol=1e-3"
        )
    warn_of_training(as_model(model))
    flag("coupled", coupled)
    ends = ends_of(schedule, start, stop)
    levels = Levels.at(schedule, torch.tensor(ends, dtype=torch.float64, device="cpu"), form.clock)
    for k, end in enumerate(("start", "stop")):
        if not to_the_ends and (levels.alpha[k] == 0 or levels.sigma[k] == 0):
            raise ValueError(
                f"{end} = {ends[k]:g}: half log-SNR is infinite there; give {end}= a time with alpha > 0 and sigma > 0, or take `adaptive` "
                "with method='adams' and predicts='velocity'"
            )
    return Task(
        schedule,
        form,
        predictor(model, schedule, form.predicts, scale=form.scale, dtype=input_dtype),
        levels,
        rtol,
        atol,
        coupled,
    )


def limits(first_step: float | None, max_nfe: int, on_limit: str) -> None:
    """Check what bounds a run."""
    if first_step is not None:
        positive(first_step=first_step)
    whole("max_nfe", max_nfe, 1, 10**9)
    choice("on_limit", on_limit, ON_LIMIT)


@dataclass(frozen=True)
class Wiener:
    """The noise of the steps of an SDE, from one path for each sample.

    Attributes:
        path: the paths.
        clock: levels -> their time, [b].
    """

    path: Ahead
    clock: Callable[[Levels], Tensor]

    def normals(self, front: Front, end: Levels) -> Tensor:
        """The increments over the steps to `end`, as standard normals, [b, ...]."""
        normals = [
            self.path.increment(i, clock) / (clock - self.path.here[i]) ** 0.5
            for i, clock in zip(front.ids.tolist(), self.clock(end).tolist(), strict=True)
        ]
        return torch.stack(normals).to(front.x)

    def advance(self, front: Front, end: Levels, ok: Tensor) -> None:
        """Accepted steps."""
        for i, clock, accepted in zip(front.ids.tolist(), self.clock(end).tolist(), ok.tolist(), strict=True):
            if accepted:
                self.path.advance(i, clock)


@dataclass(frozen=True)
class Adams(Method):
    """Exponential Adams of variable step and order: predict, ask once, correct (PEC).

    The predictor of order q reads the last q outputs, the corrector of order q + 1 the new one too; their difference, in proportion
    to the q-th divided difference of the outputs, estimates the predictor's error, and the corrected state goes on. The same
    differences of orders q - 1 and q + 1 cost no call: the order whose next step would be the longest is taken next. Before the
    model is asked, the predictors of orders q and q + 1 are compared, and the step is shortened where they disagree by more than the
    tolerance. At a stop with sigma = 0 or alpha = 0 the model is not asked: the last step ends with the predictor of order q + 1, and is
    shortened until it agrees with that of order q to a tenth of the tolerance.
    Source: this library, after Shampine & Gordon 1975, Computer solution of ordinary differential equations, chapter 10.
    """

    most: int = 6  # order
    noise: Wiener | None = None  # of an SDE, whose form has a clock

    @property
    def window(self) -> int:  # type: ignore[override]
        """How many outputs a step reads."""
        return self.most + 1

    def attempt(self, front: Front) -> Trial:
        """Predict, shorten the step until the predictors agree, ask, correct, choose the next order and step."""
        task, order = self.task, front.order
        more = torch.where(front.known > order, order + 1, order)
        place, at_end = aim(self, front, ADAMS)
        here = task.place(front.here)
        for trial in range(PREDICTOR_TRIALS + 1):
            end = task.level(place, at_end)
            weights = self._weights(front, end, order)
            a = column(task.exact_part(front.here, end)[0], front.x)
            low = a * front.x + mixed(weights, front.outputs)
            if self.noise:  # which no predictor knows of
                break
            more_weights = self._weights(front, end, more)
            higher = mixed(more_weights - weights, front.outputs)
            tolerance = task.tolerance(low, end, front.before)
            doubt = self._ratio(higher, tolerance)
            silent = at_end & (not self.asks_at_stop)
            excess = torch.where(silent, task.ratio(higher, tolerance) / SILENT, doubt)
            shorter = torch.where(excess > 1, self._factor(excess, order).clamp(0.3, REJECTED), 1.0)
            shorter = torch.where(silent & (more == order), 0.5, shorter)
            if trial == PREDICTOR_TRIALS or (shorter == 1).all():
                break
            place = torch.where(shorter < 1, here + (place - here) * shorter, place)
            at_end = at_end & (shorter == 1)
        unasked = at_end & (not self.asks_at_stop)
        if self.noise:
            low = low + column(
                in_lanes(partial(noise_weight, task.form), front.here, end), low
            ) * self.noise.normals(front, end)
            tolerance = task.tolerance(low, end, front.before)

        output = torch.zeros_like(low)
        if not unasked.all():
            on = (~unasked).to(low.device)
            output[on] = task.ask(low[on], end.times[~unasked])

        def difference(orders: Tensor, predictor: Tensor) -> Tensor:
            """The corrector of one order more less the predictor of some orders, whose weights are at hand."""
            change = self._weights(front, end, orders, new=True)
            change[:, 1:] -= predictor
            return mixed(change, [output, *front.outputs])

        correction = difference(order, weights)
        error = self._ratio(correction, tolerance)
        factors = [torch.zeros_like(error), self._factor(error, order), torch.zeros_like(error)]
        lower, raisable = order > 1, (more > order) & (order < self.most) & (error <= 1)
        if lower.any() and not self.noise:
            less = torch.where(lower, order - 1, order)
            estimate = self._ratio(difference(less, self._weights(front, end, less)), tolerance)
            factors[0] = torch.where(lower, self._factor(estimate, less), 0.0)
        if raisable.any() and not self.noise:
            estimate = self._ratio(difference(more, more_weights), tolerance)
            factors[2] = torch.where(raisable, self._factor(estimate, more), 0.0)
        factor, best = torch.stack(factors).max(0)
        factor = torch.where(error <= 1, factor, factor.clamp(max=REJECTED))
        x = low + correction
        if unasked.any():
            error = torch.where(unasked, doubt, error)
            x = torch.where(column(unasked, low), low + higher, x)
        following = order + best - 1
        if self.noise:
            self.noise.advance(front, end, error <= 1)
            following = (order + (error <= 1)).clamp(max=self.most)
        taken = torch.where(unasked, more, order)
        calls = (~unasked).long()
        return Trial(end, at_end, x, low, error, factor, taken, order=following, calls=calls, output=output)

    @property
    def asks_at_stop(self) -> bool:
        """Whether the model is asked at the stop: there are noise and data in it."""
        stop = self.task.ends[1]
        return bool(stop.sigma > 0) and bool(stop.alpha > 0)

    def _ratio(self, error: Tensor, tolerance: Tensor) -> Tensor:
        """What of a predictor's error counts, over the tolerance, [b]; of an SDE all of it."""
        return self.task.ratio(error, tolerance) * (1.0 if self.noise else CORRECTED)

    def _factor(self, error: Tensor, order: Tensor) -> Tensor:
        """How much longer the next step may be, [b]; the error of a step of an SDE falls as its length^1.5."""
        return ADAMS.factor(error, error, torch.full_like(error, 1.5) if self.noise else order + 1.0)

    def _weights(self, front: Front, end: Levels, orders: Tensor, new: bool = False) -> Tensor:
        """Weights of the past outputs, the newest first, and with `new` of that at the end before them, for steps of some orders.

        Of the predictor with as many outputs as its order, or with `new` of the corrector with one more: [b, K] or [b, K + 1].
        """
        size = self.window + 1
        names = ("times", "alpha", "sigma", "half_logsnr") + (("clock",) if end.clock is not None else ())
        weights = torch.zeros(len(orders), size, dtype=torch.float64, device="cpu")
        for q in set(orders.tolist()):
            rows = (orders == q).nonzero().flatten()
            nodes = [0, 1, *range(-1, -q, -1)] if new else [*range(0, -q, -1)]

            def table(past: Levels, end: Levels, nodes: list[int] = nodes) -> Tensor:
                """[rows, nodes], of levels in a row: of each sample the past ones, the oldest first, and the end."""
                row = [
                    torch.cat([getattr(past, n).flip(1), getattr(end, n)[:, None]], 1).flatten()
                    for n in names
                ]
                steps = torch.arange(len(past), device="cpu") * size + size - 2
                return adams_weights(
                    self.task.schedule, self.task.form, Levels(*row), steps, nodes, "vary_coeff"
                )

            places = 1 - torch.tensor(nodes, device="cpu")
            weights[rows[:, None], places] = in_lanes(table, front.past[rows], end[rows])
        return weights if new else weights[:, 1:]


def mixed(weights: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """sum_j weights_j outputs_j of each sample: weights [b, K] on the host, outputs K of [b, ...]."""
    total = torch.zeros_like(outputs[0])
    for j in weights.any(0).nonzero().flatten().tolist():
        total += column(weights[:, j], total) * outputs[j]
    return total


@dataclass(frozen=True)
class Embedded(Method):
    """A Runge-Kutta pair: the difference of its two solutions estimates the error of the lower one; the higher one goes on."""

    pair: Pair = exponential_32

    @property
    def tableau(self) -> Tableau:
        """Of the higher solution."""
        return self.pair.tableau

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Of an attempt, at most."""
        return self.pair.tableau.stages - 1 + self.pair.asks_at_end

    def first_step(self, front: Front) -> Tensor:
        """Where the batch is coupled that of the paper."""
        return torch.full_like(front.step, FIRST_STEP) if self.task.coupled else super().first_step(front)

    def attempt(self, front: Front) -> Trial:
        """All stages; the first output is at hand."""
        task, s, tableau = self.task, front.here, self.pair.tableau
        control = PAPER if task.coupled else PAIR
        place, at_end = aim(self, front, control)
        end = task.level(place, at_end)
        calls, x_weights, table, a, low_weights = in_lanes(self._step, s, end)
        outputs = front.outputs[:1]
        for k in range(tableau.stages):
            x = column(x_weights[:, k], front.x) * front.x + mixed(table[:, k, : k + 1], outputs)
            if k + 1 < tableau.stages or self.pair.asks_at_end:
                at = calls[k + 1] if k + 1 < tableau.stages else end
                outputs = [*outputs, task.ask(x, at.times)]
        low = column(a, front.x) * front.x + mixed(low_weights, outputs)
        error = task.ratio(x - low, task.tolerance(low, end, front.before))
        factor = control.factor(error, front.error, float(self.pair.order))
        made = torch.full_like(front.order, self.calls)
        last, order = outputs[-1] if self.pair.asks_at_end else None, front.order
        return Trial(end, at_end, x, low, error, factor, taken=order, order=order, calls=made, output=last)

    def _step(self, s: Levels, end: Levels) -> tuple[list[Levels], Tensor, Tensor, Tensor, Tensor]:
        """The stages of steps from s to `end` as `textbook_stages` has them; the weights of x and the outputs in the lower solution."""
        form = self.task.form
        calls, x_weights, table = textbook_stages(self.task.schedule, s, end, self.pair.tableau, form)
        others = [scale_of_weights(form, s, end, end) * w for w in self.pair.low(phi_of_steps(form, s, end))]
        a, total = form.exact_part(s, end)
        weights = torch.stack([total - sum(others), *others], 1)
        units = [form.unit(at) for at in [*calls, end][: weights.shape[1]]]
        return calls, x_weights, table, a, weights / torch.stack(units, 1)


def replay(solution: Solution, sample: int = 0) -> Plan:
    """The steps that an adaptive run found for one of its samples, as a plan: run on that sample it gives the same result.

    Raises:
        ValueError: the run is stochastic or of another library, or the sample took no step.
    """
    if not isinstance(solution, Solution):
        raise TypeError(
            f"solution is {type(solution).__name__}: expected that of adaptive(model, schedule, x)"
        )
    whole("sample", sample, 0, len(solution.x) - 1)
    method, times = solution.method, solution.times[sample]
    if not isinstance(method, (Adams, Embedded)) or method.task.form.clock is not None:
        raise ValueError(
            "only the steps of `adaptive` are those of a plan: not of odeint, sdeint or adaptive_sde"
        )
    if len(times) < 2:
        raise ValueError(f"sample {sample} took no step: its status is {solution.status[sample]!r}")
    levels = Levels.of(method.task.schedule, times)
    if isinstance(method, Embedded):
        return runge_kutta(method.task.schedule, levels, method.tableau, method.task.form)
    orders, form, at_stop = solution.orders[sample], method.task.form, levels
    a, b = adams_rows(method.task.schedule, form, levels, orders, "vary_coeff")
    asked_at_last = method.asks_at_stop or solution.status[sample] != "done"
    if asked_at_last:  # a row without length corrects the last step
        at_stop = levels[[*range(len(times)), -1]]
        a, b = torch.cat([a, torch.ones_like(a[:1])]), torch.cat([b, torch.zeros_like(b[:1])])
    plan = Plan(at_stop.times, at_stop.alpha, at_stop.sigma, a, b, predicts=form.predicts, scale=form.scale)
    ends = torch.arange(plan.rows + 1, device="cpu")
    return with_corrector(plan, at_stop, form, ends, [*orders, 1], "vary_coeff")

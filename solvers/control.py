"""Adaptive runs: tolerances and the control of steps, sample by sample; the loop; the solution it ends in."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from solvers.arguments import number
from solvers.grids import given
from solvers.methods.exponential import Form, Levels
from solvers.methods.multistep import adams_weights
from solvers.methods.tableaux import Tableau
from solvers.schedules import Schedule, in_lanes

ON_LIMIT = ("raise", "return")
FIRST_SHARE = 0.5  # of the way, times (tolerance / change of one step to the end)^(1/2); at most half of it
STRETCH = 1.2
REJECTED = 0.8  # below 1 / STRETCH, so that no step is tried twice
MOST_NON_FINITE = 10  # trials in a row
AFTER_NON_FINITE = 0.2  # the length of the next trial
ROUNDING = 100  # times the state's: no tolerance below it can be kept
LEAST_STEP = 1e-9  # of the way


class Control(NamedTuple):
    """The length of the next step over that of the last: safety E_n^(-integral / k) E_{n-1}^(proportional / k), from least to most.

    E is the estimated error of a step over the tolerance, k one more than the order of the solution that is estimated. A step with
    E > 1 is rejected, and the next is at most `rejected` times as long. A step that would leave less than (stretch - 1) of its length to the end goes there.
    Source: Hairer & Wanner 1996 (doi 10.1007/978-3-642-05221-7), section IV.2, eq. 2.43.
    """

    safety: float
    integral: float
    proportional: float
    least: float
    most: float
    rejected: float = REJECTED
    stretch: float = STRETCH

    def factor(self, error: Tensor, before: Tensor, k: Tensor | float) -> Tensor:
        """[b]; `before` is E of the last accepted step."""

        def power(base: Tensor, k: Tensor) -> Tensor:
            return base.clamp(min=1e-10) ** (-self.integral / k)

        def trend(base: Tensor, k: Tensor) -> Tensor:
            return base.clamp(min=1e-4) ** (self.proportional / k)

        k = torch.as_tensor(k, dtype=torch.float64, device="cpu").expand_as(error)
        factor = self.safety * in_lanes(power, error, k) * in_lanes(trend, before, k)
        factor = factor.clamp(self.least, self.most)
        return torch.where(error <= 1, factor, factor.clamp(max=self.rejected))


@dataclass(frozen=True, eq=False, repr=False)
class Solution:
    """What an adaptive run found; entry i of each field is of sample i.

    Attributes:
        x: the states at the last of `times`, [B, ...], float32 or float64; at `stop` where status is "done".
        nfe: model calls made for each sample, [B].
        rejected: steps tried in vain, [B].
        times: where each sample stood after its accepted steps, B tensors [accepted + 1], float64.
        status: "done"; or why it ended before: "max_nfe"; "min_step", as no step of least length keeps the tolerance;
            "non_finite", as the model's output is NaN or infinite.
        error: the last estimate of the error of a step, over the tolerance, [B]; NaN where the library tells none.
        orders: the order of each accepted step, B lists [accepted]; empty of `odeint` and `sdeint`.
        method: what took the steps, for `replay` and `at`.
        points: with dense=True, the states and the model's outputs at `times`, B pairs.
    """

    x: Tensor
    nfe: Tensor
    rejected: Tensor
    times: list[Tensor]
    status: list[str]
    error: Tensor
    orders: list[list[int]]
    method: "Method | None" = None
    points: list[tuple[Tensor, Tensor]] | None = None

    def __repr__(self) -> str:
        def span(counts: Tensor) -> str:
            least, most = (int(counts.min()), int(counts.max())) if len(counts) else (0, 0)
            return f"{least}" if least == most else f"{least} to {most}"

        words = ", ".join(f"{self.status.count(word)} {word}" for word in dict.fromkeys(self.status))
        kind = f"{list(self.x.shape)} {str(self.x.dtype).removeprefix('torch.')}"
        return f"Solution(x: {kind}; nfe: {span(self.nfe)}; rejected: {span(self.rejected)}; status: {words or 'no samples'})"

    def at(self, t: float) -> Tensor:
        """The states at any time of the run, [B, ...], with the order of the method; the run needs dense=True.

        The polynomial of the outputs at the accepted points around t is integrated from the point before it.

        Raises:
            ValueError: t is outside a sample's `times`, or the run kept no points.
        """
        if self.points is None or self.method is None:
            raise ValueError(
                "the solution has no points to go by: a run of adaptive(..., dense=True) alone keeps them"
            )
        number("t", t)
        states = [self._sample_at(i, float(t)) for i in range(len(self.x))]
        return torch.stack(states) if states else self.x

    def _sample_at(self, i: int, t: float) -> Tensor:
        assert self.points is not None
        assert self.method is not None
        task, times, (states, outputs) = self.method.task, self.times[i], self.points[i]
        low, high = sorted((float(times[0]), float(times[-1])))
        if not low <= t <= high:
            raise ValueError(f"t = {t:g}: sample {i} has been from {times[0]:g} to {times[-1]:g}")
        on = (times == t).nonzero().flatten().tolist()
        if on:
            return states[on[0]]
        step = int(((times > t) if times[0] > times[-1] else (times < t)).sum()) - 1
        own, order = self.method.tableau is None, self.orders[i][step]
        if own:  # an Adams step has read its end, where it asked there, and what lay behind it
            around = [*range(step - 1, -1, -1)][: order - 1]
            others = [step + 1, *around] if step + 1 < len(outputs) else around
        else:
            others = sorted((n for n in range(len(outputs)) if n != step), key=lambda n: abs(n - step - 0.5))[
                :order
            ]

        def reached(end: Tensor) -> Tensor:
            schedule, form = task.schedule, task.form
            levels = Levels.at(schedule, torch.cat([times[[*reversed(others), step]], end.reshape(1)]))
            start = torch.tensor([len(others)], device="cpu")
            weights = adams_weights(
                schedule, form, levels, start, range(0, -1 - len(others), -1), "vary_coeff"
            )
            x = float(form.exact_part(levels[-2:-1], levels[-1:])[0]) * states[step]
            for node, weight in zip([step, *others], weights[0].tolist(), strict=True):
                x = x + weight * outputs[node]
            return x

        x = reached(times.new_tensor(t))
        if own:
            return x
        ends = Levels.at(task.schedule, torch.stack([times[step], times.new_tensor(t), times[step + 1]]))
        start, here, end = task.form.place(ends).tolist()
        return x + (here - start) / (end - start) * (states[step + 1] - reached(times[step + 1]))


class NonConvergence(ArithmeticError):
    """An adaptive run that did not bring every sample to the end within its limits.

    Attributes:
        solution: what there is: samples whose status is "done" are finished, the others stand where they came.
        samples: those that did not arrive.
    """

    def __init__(self, message: str, solution: Solution, samples: list[int]):
        super().__init__(message, solution, samples)
        self.solution, self.samples = solution, samples

    def __str__(self) -> str:
        return self.args[0]


def ends_of(schedule: Schedule, start: float | None, stop: float | None) -> list[float]:
    """The first and the last time, by default the schedule's own, checked like a grid; or twice the same."""
    ends = [
        schedule.start if start is None else number("start", start),
        schedule.stop if stop is None else number("stop", stop),
    ]
    if ends[0] != ends[1]:
        given(schedule, torch.tensor(ends, dtype=torch.float64, device="cpu"))
    return ends


@dataclass(frozen=True)
class Task:
    """What is integrated, how exactly, and how far.

    Attributes:
        schedule: noise schedule.
        form: of the prediction, whose variable steps are measured in.
        ask: (x [b, ...], times [b]) -> outputs in that form, [b, ...].
        ends: levels of the start and the stop, [2].
        rtol: of the larger of the state before and behind a step.
        atol: of the state where alpha^2 + sigma^2 = 1.
        coupled: whether all samples take the steps of the worst.
    """

    schedule: Schedule
    form: Form
    ask: Callable[[Tensor, Tensor], Tensor]
    ends: Levels
    rtol: float
    atol: float
    coupled: bool

    @property
    def places(self) -> tuple[float, float]:
        """The start and the stop in the variable of the steps."""
        start, stop = self.form.place(self.ends).tolist()
        return start, stop

    def level(self, place: Tensor, at_end: Tensor) -> Levels:
        """The levels at some places, [b]; exactly the stop where `at_end`."""
        low, high = sorted(self.ends.times.tolist())

        def at(place: Tensor, at_end: Tensor) -> Levels:
            times = place
            if self.form.variable != "t":
                times = self.schedule.time(self.form.half_logsnr(self.form.variable, place))
            times = torch.where(at_end, self.ends.times[1], times.clamp(low, high))
            return Levels.at(self.schedule, times, self.form.clock)

        return in_lanes(at, place, at_end)

    def place(self, at: Levels) -> Tensor:
        """Where levels are in the variable of the steps, [b]."""
        return in_lanes(self.form.place, at)

    def exact_part(self, s: Levels, t: Levels) -> tuple[Tensor, Tensor]:
        """As of the form, [b] each."""
        return in_lanes(self.form.exact_part, s, t)

    def tolerance(self, low: Tensor, end: Levels, before: Tensor) -> Tensor:
        """What an error at the end of a step is measured in, like x: of the lower solution, and of that of the step before.

        Source: Lu et al. 2022 (arXiv 2206.00927), appendix C. Differs: the states are compared where alpha^2 + sigma^2 = 1, so that all
        schedules of one ODE have the same steps.
        """
        unit = column(size(end), low)
        return unit * (self.rtol * torch.maximum(low.abs() / unit, before)).clamp(min=self.atol)

    def ratio(self, error: Tensor, tolerance: Tensor) -> Tensor:
        """The root mean square of error / tolerance of each sample, or the largest of them for all, [b] on the host.

        Sample by sample, as sums over a batch depend on its size.
        """
        rows = torch.where(error == 0, 0.0, error / tolerance)  # also where the tolerance is 0
        norms = torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]).cpu()
        ratio = norms / math.sqrt(max(rows[0].numel(), 1))
        return ratio.max().expand(len(ratio)) if self.coupled else ratio


@dataclass
class Front:
    """The samples still on their way, [b] of them.

    Attributes:
        ids: their positions in the batch.
        x: states.
        before: |lower solution| of the last step where alpha^2 + sigma^2 = 1.
        past: levels of the last accepted points, the newest first, [b, K].
        outputs: the model's outputs there, K of [b, ...].
        known: how many of them there are, [b].
        step: the length of the next step in the variable, [b].
        order: the order of the next step, [b].
        error: of the last accepted step over the tolerance, [b].
        non_finite: trials in a row that were not, [b].
    """

    ids: Tensor
    x: Tensor
    before: Tensor
    past: Levels
    outputs: list[Tensor]
    known: Tensor
    step: Tensor
    order: Tensor
    error: Tensor
    non_finite: Tensor

    @property
    def here(self) -> Levels:
        """Where the samples stand, [b]."""
        return self.past[:, 0]

    def select(self, which: Tensor) -> None:
        """Keep some of the samples, [b] bool."""
        if which.all():
            return
        on = which.to(self.x.device)
        self.x, self.before = self.x[on], self.before[on]
        self.outputs = [m[on] for m in self.outputs]
        self.past = self.past[which]
        for name in ("ids", "known", "step", "order", "error", "non_finite"):
            setattr(self, name, getattr(self, name)[which])

    def advance(self, ok: Tensor, trial: "Trial") -> None:
        """Move the samples whose trial was accepted to its end."""
        new = Levels(*(torch.cat([e[:, None], p[:, :-1]], 1) for e, p in _pairs(trial.end, self.past)))
        self.past = Levels(*(torch.where(ok[:, None], e, p) for e, p in _pairs(new, self.past)))
        self.x = chosen(ok, trial.x, self.x)
        self.before = chosen(
            ok,
            trial.low.abs() / column(size(trial.end), trial.low),
            self.before,
        )
        if trial.output is not None:
            self.outputs = [
                chosen(ok, m, before)
                for m, before in zip([trial.output, *self.outputs[:-1]], self.outputs, strict=True)
            ]
        asked = trial.calls > 0 if trial.output is not None else torch.zeros_like(ok)
        known = torch.where(asked, (self.known + 1).clamp(max=len(self.outputs)), 0)
        self.known = torch.where(ok, known, self.known)
        self.error = torch.where(ok, trial.error, self.error)


def _pairs(one: Levels, other: Levels) -> list[tuple[Tensor, Tensor]]:
    """The fields of two levels side by side; without a clock where there is none."""
    names = ("times", "alpha", "sigma", "half_logsnr", "clock")
    return [(getattr(one, n), getattr(other, n)) for n in names if getattr(one, n) is not None]


def size(at: Levels) -> Tensor:
    """sqrt(alpha^2 + sigma^2), by which the states of all schedules of one ODE are the same, [b]."""
    return in_lanes(torch.hypot, at.alpha, at.sigma)


def chosen(which: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The samples of one where `which` [b] holds, else of the other."""
    return one if which.all() else torch.where(column(which, one), one, other)


def column(values: Tensor, like: Tensor) -> Tensor:
    """A number for each sample, [b] on the host, to multiply `like` [b, ...] with."""
    dtype = values.dtype if values.dtype == torch.bool else like.dtype
    return values.to(like.device, dtype).reshape(-1, *[1] * (like.ndim - 1))


class Trial(NamedTuple):
    """A step tried from the front, of each sample."""

    end: Levels  # [b]
    at_end: Tensor  # [b] whether that is the stop
    x: Tensor  # [b, ...] the state there
    low: Tensor  # [b, ...] the lower-order solution there
    error: Tensor  # [b] their difference over the tolerance; NaN where the model was
    factor: Tensor  # [b] the length of the next step over that of this one
    taken: Tensor  # [b] the order
    order: Tensor  # [b] that of the next step
    calls: Tensor  # [b] made
    output: Tensor | None = None  # [b, ...] the model's at the end, where it was asked


@dataclass(frozen=True)
class Method:
    """What takes steps for all samples of a front at once, each with its own.

    Attributes:
        task: what is integrated.
        longest: step, in the variable.
    """

    task: Task
    longest: float = math.inf

    window = 1  # how many outputs a step reads
    calls = 1  # at most, of an attempt

    @property
    def tableau(self) -> Tableau | None:
        """Of a Runge-Kutta method."""
        return None

    def first_step(self, front: Front) -> Tensor:
        """A share of the way that falls with the root of the change that one step to the end would bring, [b]."""
        task = self.task
        here, stop = front.here, task.ends[torch.ones(len(front.ids), dtype=torch.long, device="cpu")]
        weight = task.exact_part(here, stop)[1] / task.form.unit(here)
        change = column(weight, front.x) * front.outputs[0]
        ratio = task.ratio(change, task.tolerance(torch.zeros_like(change), stop, front.before))
        share = FIRST_SHARE / ratio.clamp(min=1e-10).sqrt()
        way = abs(task.places[1] - task.places[0])
        return way * torch.where(ratio.isfinite(), share.clamp(max=FIRST_SHARE / 2), 0.01)

    def attempt(self, front: Front) -> "Trial":
        """Try a step for every sample of the front, whose first output is known."""
        raise NotImplementedError


def aim(method: "Method", front: Front, control: Control) -> tuple[Tensor, Tensor]:
    """Where the next step goes: its place, and whether that is the stop, each [b]."""
    task = method.task
    here, stop = task.place(front.here), task.places[1]
    left = (stop - here).abs()
    at_end = left <= (control.stretch * front.step).clamp(max=method.longest)
    length = torch.where(at_end, left, front.step)
    return here + length * math.copysign(1.0, stop - task.places[0]), at_end


def ask_at_front(task: Task, front: Front) -> Tensor:
    """Ask the model where the samples stand, unless it has been asked: the calls made for each, [b]."""
    need = front.known == 0
    if need.any():
        on = need.to(front.x.device)
        m = front.outputs[0].clone()
        m[on] = task.ask(front.x[on], front.here.times[need])
        front.outputs[0] = m
        front.known = torch.where(need, 1, front.known)
    return need.long()


def integrate(
    method: Method,
    x: Tensor,
    order: int,
    first_step: float | None,
    max_nfe: int,
    on_limit: str,
    dense: bool,
) -> Solution:
    """The loop: a step of its own tried for every sample on its way; samples that arrive leave the batch."""
    task, log = method.task, _Log(x, method.task)
    start, stop = task.places
    front = _first_front(method, x if start != stop else x[:0], order)
    least = LEAST_STEP * abs(stop - start)
    if len(front.ids) and max_nfe > 1:
        log.nfe += ask_at_front(task, front)
        lost = [not m.isfinite().all() for m in front.outputs[0]]
        log.leave(front, ["non_finite" if bad or (task.coupled and any(lost)) else "" for bad in lost], dense)
        if len(front.ids):
            first = (
                method.first_step(front) if first_step is None else torch.full_like(front.step, first_step)
            )
            front.step = first.clamp(least, method.longest)
    while len(front.ids):
        allowed = log.nfe[front.ids] + (front.known == 0) + method.calls <= max_nfe
        log.leave(front, ["" if able else "max_nfe" for able in allowed.tolist()], dense)
        if not len(front.ids):
            break
        log.nfe[front.ids] += ask_at_front(task, front)
        trial = method.attempt(front)
        ok, finite = trial.error <= 1, trial.error.isfinite()
        length = (task.place(trial.end) - task.place(front.here)).abs()
        log.record(front, trial, ok, dense)
        front.advance(ok, trial)
        front.non_finite = torch.where(finite, 0, front.non_finite + 1)
        front.step = (length * torch.where(finite, trial.factor, AFTER_NON_FINITE)).clamp(max=method.longest)
        front.order = torch.where(finite, trial.order, front.order)
        short, failed = front.step < least, front.non_finite > 0
        verdicts = torch.where(short & ~failed, 1, 0)
        verdicts[failed & (short | (front.non_finite > MOST_NON_FINITE))] = 2
        verdicts[ok & trial.at_end] = 3
        log.leave(front, [("", "min_step", "non_finite", "done")[v] for v in verdicts.tolist()], dense)
    solution = log.solution(method, dense)
    if on_limit == "raise":
        _refuse_unfinished(solution, max_nfe)
    return solution


def _first_front(method: Method, x: Tensor, order: int) -> Front:
    """All samples at the start, with nothing known."""
    ends, count = method.task.ends, len(x)
    ones = torch.ones(count, dtype=torch.float64, device="cpu")
    return Front(
        ids=torch.arange(count, device="cpu"),
        x=x.clone(),
        before=x.abs() / size(ends)[0].to(x),
        past=ends[torch.zeros(count, method.window, dtype=torch.long, device="cpu")],
        outputs=[torch.zeros_like(x)] * method.window,
        known=torch.zeros(count, dtype=torch.long, device="cpu"),
        step=ones,
        order=torch.full((count,), order, device="cpu"),
        error=ones,
        non_finite=torch.zeros(count, dtype=torch.long, device="cpu"),
    )


class _Log:
    """What has become of each of the batch's samples."""

    def __init__(self, x: Tensor, task: Task):
        batch = len(x)
        self.x = x.clone()
        self.nfe, self.rejected = (torch.zeros(batch, dtype=torch.long, device="cpu") for _ in range(2))
        self.error = torch.zeros(batch, dtype=torch.float64, device="cpu")
        self.times = [[float(task.ends.times[0])] for _ in range(batch)]
        self.orders: list[list[int]] = [[] for _ in range(batch)]
        self.states: list[list[Tensor]] = [[] for _ in range(batch)]
        self.outputs: list[list[Tensor]] = [[] for _ in range(batch)]
        self.status = ["done"] * batch

    def record(self, front: Front, trial: Trial, ok: Tensor, dense: bool) -> None:
        """A trial."""
        ids = front.ids
        self.nfe[ids] += trial.calls
        self.rejected[ids] += (~ok).long()
        self.error[ids] = trial.error
        rows = zip(ids.tolist(), ok.tolist(), trial.end.times.tolist(), trial.taken.tolist(), strict=True)
        for i, (sample, accepted, time, order) in enumerate(rows):
            if accepted:
                self.times[sample].append(time)
                self.orders[sample].append(order)
                if dense:
                    self.states[sample].append(front.x[i])
                    self.outputs[sample].append(front.outputs[0][i])

    def leave(self, front: Front, verdicts: list[str], dense: bool) -> None:
        """The samples with a verdict leave the front, with the last output if there is one."""
        if not any(verdicts):
            return
        leaving = torch.tensor([bool(verdict) for verdict in verdicts], device="cpu")
        self.x[front.ids[leaving].to(self.x.device)] = front.x[leaving.to(front.x.device)]
        rows = zip(front.ids.tolist(), verdicts, front.known.tolist(), strict=True)
        for i, (sample, verdict, known) in enumerate(rows):
            if verdict:
                self.status[sample] = verdict
                self.outputs[sample] += [front.outputs[0][i]] if dense and known else []
        front.select(~leaving)

    def solution(self, method: Method, dense: bool) -> Solution:
        """The end of it."""
        times = [torch.tensor(v, dtype=torch.float64, device="cpu") for v in self.times]
        points = None
        if dense:
            points = [
                (
                    torch.stack([*states, end]),
                    torch.stack(outputs) if outputs else end.new_zeros(0, *end.shape),
                )
                for states, outputs, end in zip(self.states, self.outputs, self.x, strict=True)
            ]
        return Solution(
            self.x, self.nfe, self.rejected, times, self.status, self.error, self.orders, method, points
        )


def _refuse_unfinished(solution: Solution, max_nfe: int) -> None:
    """Raise NonConvergence for the samples that have not arrived."""
    samples = [i for i, status in enumerate(solution.status) if status != "done"]
    if not samples:
        return
    i = samples[0]
    loosen = "loosen rtol and atol"
    why = {
        "max_nfe": f"a further step might have made more than max_nfe = {max_nfe} calls; {loosen}, or raise it",
        "min_step": f"no step that is longer than rounding keeps the tolerance; {loosen}",
        "non_finite": "the model's output, or the state, is not finite; look for the call that makes it so",
    }[solution.status[i]]
    raise NonConvergence(
        f"{len(samples)} of {len(solution.x)} samples did not arrive. Sample {i} came to t = {solution.times[i][-1]:g} with "
        f"{int(solution.nfe[i])} calls and {int(solution.rejected[i])} rejected steps, the last with an error of {solution.error[i]:.3g} times "
        f"the tolerance: {why}; or take what there is by on_limit='return'",
        solution,
        samples,
    )

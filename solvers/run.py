"""The executor: run, trajectory, sample; the resumable state."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from solvers.grids import logsnr, uniform
from solvers.methods.multistep import dpm_solver_pp
from solvers.noise import PerSample, Source, as_source
from solvers.plan import Plan
from solvers.predictions import Model, as_model, conversion, mixture
from solvers.schedules import Schedule

AnyModel = Model | Callable[[Tensor, Tensor], Tensor]
Noise = Source | torch.Generator | int
ScaledAdd = tuple[Tensor, float, Tensor, float]  # (y, scale, u, weight): y <- scale y + weight u, in place
PIECE = 2**18  # elements of a state that a CPU's cache holds several times over
ONE = {dtype: torch.ones(1, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


class NonFiniteError(ArithmeticError):
    """A model returned NaN or an infinity.

    Attributes:
        call: number of the call, from 0.
        time: its time t.
        half_logsnr: its half log-SNR.
        samples: the positions in the batch that were hit.
    """

    def __init__(self, call: int, plan: Plan, samples: list[int], state_was_finite: bool):
        self.call, self.samples = call, samples
        self.time, self.half_logsnr = float(plan.times[call]), float(plan.half_logsnr[call])
        blame = (
            "the x it was given is finite" if state_was_finite else "the x it was given is not finite either"
        )
        shown = ", ".join(map(str, samples[:10])) + (", ..." if len(samples) > 10 else "")
        super().__init__(
            f"the model's output is not finite in call {call} of {plan.nfe} (t = {self.time:g}, half log-SNR = "
            f"{self.half_logsnr:g}) for samples [{shown}]; {blame}"
        )


@dataclass(frozen=True)
class State:
    """A run after some of its rows: all that is needed to go on, with `run(plan, model, state)`.

    Attributes:
        x: [B, ...], float32 or float64; it stands at plan.times[call].
        call: the number of calls made.
        outputs: by call, the outputs in the plan's form that later rows read, each [B, ...].
        draws: by draw, the noise that later rows read, each [B, ...].
        input_dtype: the dtype in which the network is called.
    """

    x: Tensor
    call: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)
    draws: dict[int, Tensor] = field(default_factory=dict)
    input_dtype: torch.dtype = torch.float32

    def clone(self) -> "State":
        """A copy that shares no memory."""
        outputs, draws = ({n: v.clone() for n, v in held.items()} for held in (self.outputs, self.draws))
        return State(self.x.clone(), self.call, outputs, draws, self.input_dtype)


def run(
    plan: Plan,
    model: AnyModel,
    x: Tensor | State,
    noise: Noise | None = None,
    callback: Callable[[State], None] | None = None,
    progress: bool = False,
    grad: bool = False,
) -> Tensor:
    """Execute a plan.

    The state is float64 for float64 x, else float32, whatever the network's dtype; the network is called with x in the
    dtype in which it is passed here. x itself is never changed. In the loop nothing is read back from an accelerator;
    whether its outputs were finite is read once, at the end.

    Args:
        plan: the table.
        model: (x [B, ...], t [B]) -> prediction of the noise [B, ...], or a Model that declares another prediction.
        x: the state at plan.times[0], alpha x_0 + sigma eps, [B, ...]; or a State to go on from.
        noise: for a stochastic plan: a noise source, a torch.Generator, or an int seed (samples 0 .. B-1 of that seed).
        callback: called with the State after each row.
        progress: show a progress bar.
        grad: keep the gradient graph of the whole run.

    Returns:
        The state at plan.times[-1], [B, ...], float32 or float64.

    Raises:
        TypeError: x or a model output is not a floating-point tensor.
        ValueError: x is not finite or not a batch; the model's prediction does not determine the plan's form at a call;
            a stochastic plan has no noise; a model output has the wrong shape or device.
        NonFiniteError: a model output is not finite.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is {type(plan).__name__}: expected a Plan, e.g. dpm_solver_pp(schedule, times)"
        )
    model = as_model(model)
    state = _resumed(plan, x) if isinstance(x, State) else _start(x, grad)
    source = _source(plan, noise, len(state.x))
    rows = _rows(plan, model)
    if len(state.x) == 0:
        return state.x
    if isinstance(model.net, nn.Module) and model.net.training and not grad:
        warnings.warn(
            "the network is in training mode (dropout, batch statistics): call net.eval()", stacklevel=2
        )
    with torch.set_grad_enabled(grad):
        return _execute(plan, model, state, source, rows, callback, progress, grad)


def trajectory(
    plan: Plan, model: AnyModel, x: Tensor, noise: Noise | None = None, progress: bool = False
) -> Tensor:
    """Execute a plan and keep the state at every time: [N+1, B, ...]. Arguments and errors as for `run`."""
    states = [_start(x, grad=False).x]
    if len(x) == 0:
        return states[0].expand(plan.nfe + 1, *x.shape).clone()
    run(plan, model, x, noise, callback=lambda state: states.append(state.x), progress=progress)
    return torch.stack(states)


def sample(
    model: AnyModel,
    x: Tensor,
    schedule: Schedule,
    steps: int = 20,
    method: Callable[[Schedule, Tensor], Plan] = dpm_solver_pp,
    grid: Callable[[Schedule, int], Tensor] | None = None,
    noise: Noise | None = None,
    progress: bool = False,
) -> Tensor:
    """From noise to data in one call: DPM-Solver++(2M) on a log-SNR-uniform grid unless told otherwise.

    Args:
        model: as for `run`.
        x: the state at the schedule's start, [B, ...]: schedule.sigma(start) times standard normals.
        schedule: noise schedule.
        steps: grid steps; with the default method as many calls.
        method: (schedule, times) -> Plan.
        grid: (schedule, steps) -> times; by default `logsnr`, or `uniform` where an end has infinite log-SNR.
        noise: as for `run`.
        progress: show a progress bar.

    Returns:
        Samples, [B, ...], float32 or float64.
    """
    if not callable(method):
        raise TypeError(f"method = {method!r:.100}: expected (schedule, times) -> Plan, e.g. method=sv.ddim")
    if not (grid is None or callable(grid)):
        raise TypeError(f"grid = {grid!r:.100}: expected (schedule, steps) -> times, e.g. grid=sv.karras")
    if grid is None:
        ends = schedule.half_logsnr(
            torch.tensor([schedule.start, schedule.stop], dtype=torch.float64, device="cpu")
        )
        grid = logsnr if ends.isfinite().all() else uniform
    return run(method(schedule, grid(schedule, steps)), model, x, noise, progress=progress)


class _Row(NamedTuple):
    """One row with the conversion of the model's output folded in; every weight a host float.

    x <- x_weight x + output_weight m + sum over past + sum over draws, and, where a later row reads this call,
    kept = keep[0] x + keep[1] m. `swap` is the same x from kept and m, where that is as well conditioned.
    """

    label: float | int
    input_scale: float
    x_weight: float
    output_weight: float
    past: list[tuple[int, float]]
    draws: list[tuple[int, float]]
    keep: tuple[float, float] | None
    swap: tuple[float, float] | None
    done: list[int]


def _rows(plan: Plan, model: Model) -> list[_Row]:
    """Everything the loop needs, decided before the first call."""
    calls = (plan.times[:-1], plan.alpha[:-1], plan.sigma[:-1])
    have = model.mixture(*calls)
    from_x, from_m = conversion(have, mixture(plan.predicts, *calls[1:]), *calls[1:])
    undetermined = ~(from_x.isfinite() & from_m.isfinite())
    if undetermined.any():
        i = int(undetermined.nonzero()[0])
        raise ValueError(
            f"a {model.predicts} prediction does not determine {plan.predicts} in call {i}, at t = {plan.times[i]:g} (alpha = "
            f"{plan.alpha[i]:g}, sigma = {plan.sigma[i]:g}); start the grid elsewhere, or use a network that predicts velocity or flow"
        )
    b0 = plan.b[:, 0]
    last_use = _last_use(plan.b)
    # x = (kept - from_m m) / from_x is as good as x itself unless its terms outgrow it
    swap = torch.stack([b0 + plan.a / from_x, -plan.a * from_m / from_x], 1).tolist()
    growth = (from_m / from_x).abs() * torch.hypot(*have) / torch.hypot(*calls[1:])
    can_swap = (growth < 4).tolist()
    per_row = zip(
        _labels(model, calls[0]),
        model.input_scale(*calls[1:]).tolist(),
        (plan.a + b0 * from_x).tolist(),
        (b0 * from_m).tolist(),
        plan.b.tolist(),
        plan.c.tolist(),
        torch.stack([from_x, from_m], 1).tolist(),
        strict=True,
    )
    return [
        _Row(
            label,
            scale,
            x_weight,
            output_weight,
            [(i - j, w) for j, w in enumerate(b) if j and w],
            [(i - k, w) for k, w in enumerate(c) if w],
            (keep[0], keep[1]) if last_use[i] > i else None,
            (swap[i][0], swap[i][1]) if last_use[i] > i and can_swap[i] else None,
            [call for call in range(max(0, i - plan.window), i) if last_use[call] == i],
        )
        for i, (label, scale, x_weight, output_weight, b, c, keep) in enumerate(per_row)
    ]


def _execute(
    plan: Plan,
    model: Model,
    state: State,
    source: Source | None,
    rows: list[_Row],
    callback: Callable[[State], None] | None,
    progress: bool,
    grad: bool,
) -> Tensor:
    x, outputs, draws = state.x, dict(state.outputs), dict(state.draws)
    reuse = callback is None and not grad
    last_draw = _last_use(plan.c)
    norms = None if x.device.type == "cpu" else torch.zeros(plan.nfe, len(x), device=x.device)
    calls = range(state.call, plan.nfe)
    for i in tqdm(calls, disable=not progress, initial=state.call, total=plan.nfe, unit="call"):
        row = rows[i]
        m = _call(plan, model, row, x, i, state.input_dtype)
        if norms is not None:
            torch.linalg.vector_norm(
                m.detach().reshape(len(m), -1).float(), ord=math.inf, dim=1, out=norms[i]
            )
        new = _combined(row, x, m, outputs, i) if grad else _combined_in_place(row, x, m, outputs, i, reuse)
        if new is None:
            hit = ~m.detach().reshape(len(m), -1).isfinite().all(1)  # x is whole where m is not
            raise NonFiniteError(i, plan, hit.nonzero().flatten().tolist(), _is_finite(x))
        x = new
        if source is not None:
            if last_draw[i] >= i:
                draws[i] = _draw(source, i, x)
            for draw, weight in row.draws:
                x = x + weight * draws[draw] if grad else x.add_(draws[draw], alpha=weight)
            draws = {draw: z for draw, z in draws.items() if last_draw[draw] > i}
        if callback is not None:
            callback(State(x, i + 1, dict(outputs), dict(draws), state.input_dtype))
    if norms is not None and not norms.isfinite().all():  # the one read-back
        hit = ~norms.isfinite()
        first = int(hit.any(1).nonzero()[0])
        raise NonFiniteError(first, plan, hit[first].nonzero().flatten().tolist(), state_was_finite=True)
    return x


def _combined(row: _Row, x: Tensor, m: Tensor, outputs: dict[int, Tensor], call: int) -> Tensor | None:
    """The row as a formula that gradients flow through; None if m is not finite."""
    if m.device.type == "cpu" and not _is_finite(m.detach()):
        return None
    new = row.x_weight * x + row.output_weight * m
    for past, weight in row.past:
        new = new + weight * outputs[past]
    if row.keep:
        outputs[call] = row.keep[0] * x + row.keep[1] * m
    for past in row.done:
        outputs.pop(past, None)
    return new


def _combined_in_place(
    row: _Row, x: Tensor, m: Tensor, outputs: dict[int, Tensor], call: int, reuse: bool
) -> Tensor | None:
    """The row as scaled additions; None if m is not finite.

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
    if not _scaled_adds(
        [*first, *((new, 1.0, outputs[old], weight) for old, weight in past.items()), *last], m
    ):
        return None
    for old in row.done:
        outputs.pop(old, None)
    return new


def _scaled_adds(steps: list[ScaledAdd], m: Tensor) -> bool:
    """Each y <- scale y + weight u in turn; False, on a CPU, as soon as m turns out not to be finite.

    A large state on a CPU goes through all of them piece by piece, while the piece is in the cache.
    """
    on_host = m.device.type == "cpu"
    if (
        on_host
        and m.numel() > PIECE
        and all(m.stride() == t.stride() for y, _, u, _ in steps for t in (y, u))
    ):

        def pieces(t: Tensor, *column: int) -> tuple[Tensor, ...]:
            return t.as_strided((t.numel(), *column), (1, *column)).split(PIECE)

        cut = [(pieces(y), scale, pieces(u, 1), weight) for y, scale, u, weight in steps]
        for i, piece in enumerate(pieces(m)):
            if not (math.isfinite(torch.dot(piece, piece).item()) or piece.isfinite().all()):
                return False
            for targets, scale, columns, weight in cut:  # in one pass: a matrix of one column, times [1]
                y = targets[i]
                torch.addmv(y, columns[i], ONE[y.dtype], beta=scale, alpha=weight, out=y)
        return True
    if on_host and not _is_finite(m):
        return False
    for y, scale, u, weight in steps:
        if scale == 0:
            torch.mul(u, weight, out=y)
        else:
            (y if scale == 1 else y.mul_(scale)).add_(u, alpha=weight)
    return True


def _call(plan: Plan, model: Model, row: _Row, x: Tensor, call: int, dtype: torch.dtype) -> Tensor:
    """One network call, its contract checked."""
    given = x if row.input_scale == 1 else x * row.input_scale
    given = given if given.dtype == dtype else given.to(dtype)
    label_dtype = torch.long if isinstance(row.label, int) else x.dtype
    label = torch.full((len(x),), row.label, dtype=label_dtype, device=x.device)
    version = 0 if given.is_inference() else given._version
    try:
        m = model.net(given, label)
    except Exception as error:
        error.add_note(
            f"raised by the model in {_where(plan, call)}, half log-SNR = {plan.half_logsnr[call]:g}"
        )
        raise
    if not isinstance(m, Tensor):
        raise TypeError(
            f"the model returned {type(m).__name__} in {_where(plan, call)}: expected one tensor; unpack it in the callable"
        )
    if not m.is_floating_point():
        raise TypeError(
            f"the model returned {m.dtype} in {_where(plan, call)}: expected a floating-point tensor"
        )
    if m.shape != x.shape:
        doubled = m.ndim == x.ndim > 1 and m.shape[1] == 2 * x.shape[1]
        hint = (
            "; if the second half is a learned variance, split it: lambda x, t: net(x, t)[:, :C]"
            if doubled
            else ""
        )
        raise ValueError(
            f"the model returned shape {list(m.shape)} in {_where(plan, call)}: expected {list(x.shape)}, the shape of x{hint}"
        )
    if m.device != x.device:
        raise ValueError(
            f"the model returned a tensor on {m.device} in {_where(plan, call)}: expected {x.device}, like x"
        )
    if m.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        m = m.clone()  # the model gave back its input, which the row is about to overwrite
    if version != (0 if given.is_inference() else given._version):
        raise ValueError(
            f"the model changed its input x in place in {_where(plan, call)}: let it work on a clone"
        )
    return m if m.dtype == x.dtype else m.to(x.dtype)


def _where(plan: Plan, call: int) -> str:
    return f"call {call} of {plan.nfe}, t = {plan.times[call]:g}"


def _is_finite(x: Tensor) -> bool:
    """Whether every entry is finite. A sum is read many times faster than `isfinite`; only where it overflows, look closer."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return math.isfinite(x.sum(dtype=wide).item()) or bool(x.isfinite().all())


def _start(x: Tensor, grad: bool) -> State:
    """The first state: a copy of x in float32 or float64, once x is known to be one."""
    _check_state(x, grad)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return State(x.to(dtype, copy=True), input_dtype=x.dtype)


def _resumed(plan: Plan, state: State) -> State:
    """A copy of a state that belongs to the plan."""
    _check_state(state.x, grad=True)
    if state.x.dtype not in ONE:
        raise TypeError(f"the state's x has dtype {state.x.dtype}: expected float32 or float64")
    if not 0 <= state.call <= plan.nfe:
        raise ValueError(
            f"the state's call = {state.call}: expected 0 to {plan.nfe}, the plan's number of calls"
        )
    for held, weights, name in ((state.outputs, plan.b, "output of call"), (state.draws, plan.c, "draw")):
        for n, last in enumerate(_last_use(weights)[: state.call]):
            if last >= state.call and n not in held:
                raise ValueError(
                    f"the state lacks the {name} {n}, which row {last} reads: it is of another plan"
                )
    return state.clone()


def _check_state(x: Tensor, grad: bool) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}: expected a torch.Tensor, e.g. torch.from_numpy(x)")
    if x.layout != torch.strided or x.is_quantized or x.is_nested or x.device.type == "meta":
        kind = "nested" if x.is_nested else f"{x.dtype}, {x.layout}"
        raise TypeError(f"x is {kind} on {x.device}: expected a dense tensor with values")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}: expected a real floating-point tensor, e.g. x.float()")
    if x.ndim == 0:
        raise ValueError("x has no batch dimension: expected [B, ...], e.g. x[None]")
    if x.requires_grad and not grad:
        raise ValueError("x requires a gradient, but the run keeps no graph: pass grad=True, or x.detach()")
    if x.device.type == "cpu" and not _is_finite(x):
        where = [int(i) for i in (~x.isfinite()).nonzero()[0]]
        raise ValueError(f"x{where} = {x[tuple(where)]:g}: every entry of the starting state must be finite")


def _source(plan: Plan, noise: Noise | None, batch: int) -> Source | None:
    if not plan.is_stochastic:
        return None
    if noise is None:
        raise ValueError(
            "the plan is stochastic and needs noise: run(plan, model, x, noise=0) seeds one stream per sample"
        )
    source = as_source(noise, batch)
    if isinstance(source, PerSample) and len(source.ids) != batch:
        raise ValueError(
            f"noise is for {len(source.ids)} samples, but the batch has {batch}: give one id per sample"
        )
    return source


def _draw(source: Source, number: int, x: Tensor) -> Tensor:
    """One draw, its contract checked."""
    z = source(number, x)
    if not isinstance(z, Tensor) or z.shape != x.shape or z.device != x.device:
        came = f"shape {list(z.shape)} on {z.device}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"noise gave {came} in draw {number}: expected shape {list(x.shape)} on {x.device}, like x"
        )
    return z


def _labels(model: Model, times: Tensor) -> list[float] | list[int]:
    """What the net reads at each call, computed once on the host."""
    if model.label is None:
        return times.tolist()
    answer = model.label(times)
    try:
        labels = torch.as_tensor(answer, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"label gave {answer!s:.200}: expected a number for each of the {len(times)} calls"
        ) from error
    if labels.shape != times.shape or not labels.isfinite().all():
        raise ValueError(
            f"label gave {answer!s:.200}: expected a finite number for each of the {len(times)} calls"
        )
    return labels.tolist()


def _last_use(weights: Tensor) -> list[int]:
    """For each call (or draw) the last row that reads it; -1 for none."""
    rows = len(weights)
    last = [-1] * rows
    for row, column in (weights != 0).nonzero().tolist():
        last[row - column] = max(last[row - column], row)
    return last

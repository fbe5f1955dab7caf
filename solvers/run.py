"""The executor: run, trajectory, sample; the resumable state."""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from solvers.arguments import flag
from solvers.elements import laid_like
from solvers.grids import has_levels, usual
from solvers.kernels import kernel_for
from solvers.methods.unipc import recommended_for
from solvers.noise import Brownian, Noise, PerSample, Source, as_source, drawn, one_id_each
from solvers.plan import Plan
from solvers.predictions import AnyModel, Model, as_model, native_of, two_outputs
from solvers.rows import Row, Stepper, combined, deviation_of, is_finite, rows_of
from solvers.schedules import Schedule

PACKAGE = str(Path(__file__).parent)


class NonFiniteError(ArithmeticError):
    """A model returned NaN or an infinity.

    Attributes:
        call: number of the row that made the call, from 0.
        time: its time t.
        half_logsnr: its half log-SNR.
        samples: the positions in the batch that were hit.
    """

    def __init__(self, message: str, call: int, time: float, half_logsnr: float, samples: list[int]):
        super().__init__(message, call, time, half_logsnr, samples)
        self.call, self.time, self.half_logsnr, self.samples = call, time, half_logsnr, samples

    def __str__(self) -> str:
        return self.args[0]


@dataclass(frozen=True)
class State:
    """A run after some of its rows: all that is needed to go on, with `run(plan, model, state)`.

    Noise sources that number their draws (a seed, `per_sample`) go on where they were; a torch.Generator is where you left it.

    Attributes:
        x: [B, ...], float32 or float64; it stands at plan.times[call].
        call: the number of rows done, each of which is a call unless it only adds noise.
        outputs: by call, the outputs in the plan's form that later rows read, each [B, ...].
        draws: by draw, the noise that later rows read, each [B, ...].
        input_dtype: the dtype in which the network is called; None for that of x.
        origin: plan.place(call) of the plan it comes from, checked when the run goes on; None if made by hand.
    """

    x: Tensor
    call: int = 0
    outputs: dict[int, Tensor] = field(default_factory=dict)
    draws: dict[int, Tensor] = field(default_factory=dict)
    input_dtype: torch.dtype | None = None
    origin: tuple[str, float] | None = None

    @staticmethod
    def between(plan: Plan, x: Tensor, next_x: Tensor) -> "State":
        """The state behind the first row of a plan, from the states before and behind it: the output of call 0 is what lay between.

        A two-step method goes on from two states with it, and an exactly invertible one back from the last two of a run:
        run(back, model, State.between(back, path[-1], path[-2])) gives path[0].

        Args:
            plan: one that begins with a row of one call, in numbers.
            x: the state at plan.times[0], [B, ...], float32 or float64.
            next_x: the state at plan.times[1].
        """
        if plan.element_shape or plan.shift.numel() or plan.is_stochastic or plan.b[0, 0] == 0:
            raise ValueError(
                "the first row of the plan does not show the output of its call in x: expected a deterministic plan of numbers"
            )
        for name, state in (("x", x), ("next_x", next_x)):
            known = state.dtype in (torch.float32, torch.float64)
            if not known or (state.shape, state.dtype) != (x.shape, x.dtype):
                raise ValueError(
                    f"{name} is {state.dtype} {list(state.shape)}: expected two states of one shape, in float32 or float64"
                )
        output = (next_x - float(plan.a[0]) * x) / float(plan.b[0, 0])
        return State(next_x.clone(), 1, {0: output}, origin=plan.place(1))

    def clone(self) -> "State":
        """A copy that shares no memory."""
        outputs, draws = ({n: v.clone() for n, v in held.items()} for held in (self.outputs, self.draws))
        return replace(self, x=self.x.clone(), outputs=outputs, draws=draws)


def run(
    plan: Plan,
    model: AnyModel,
    x: Tensor | State,
    noise: Noise | None = None,
    callback: Callable[[State], None] | None = None,
    progress: bool = False,
    grad: bool = False,
    fused: bool | None = None,
    check: bool = True,
    history: torch.dtype | None = None,
) -> Tensor:
    """Execute a plan.

    The state is float64 for float64 x, else float32, whatever the network's dtype; the network is called with x in the
    dtype in which it is passed here. x itself is never changed. In the loop nothing is decided and nothing is read back from an accelerator;
    whether its outputs were finite is read once, at the end. A row goes over memory once where a kernel does it (see `fused`), and the state,
    the outputs that later rows read and the network's input and output are all the memory there is: `plan.window` + 2 states at most, and the noise.

    Args:
        plan: the table.
        model: (x [B, ...], t [B]) -> prediction of the noise [B, ...], or a Model that declares another prediction.
        x: the state at plan.times[0], alpha x_0 + sigma eps, [B, ...]; or a State to go on from.
        noise: for a stochastic plan: a noise source, a torch.Generator, or an int seed (samples 0 .. B-1 of that seed). A draw's
            number is that of the row that first reads it, and every run numbers them from 0: pieces of one plan run one after the other need different seeds.
        callback: called with the State after each row; it may change state.x in place.
        progress: show a progress bar.
        grad: keep the gradient graph of the whole run, with respect to x and what the model depends on.
        fused: whether a row is one pass of a kernel (True), or scaled additions of torch (False), which give the same to rounding. None: a kernel for x on a
            CPU where there is a C compiler (cc, or what CC names), which compiles it once in a process, in 0.2 s; else torch. On CUDA
            True takes a Triton kernel. Rows per element, and runs with a graph, are formulas of torch.
        check: whether to look if the outputs are finite: on a CPU at every call, elsewhere at the end, which waits for the device.
        history: the dtype in which outputs are kept for later rows, e.g. torch.bfloat16 to save memory; sums are of the state's dtype all the same.
            None: the state's.

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
    flag("check", check)
    check_speed(plan, grad, fused, history)
    model = as_model(model)
    with torch.inference_mode(False):
        state = _resumed(plan, x) if isinstance(x, State) else started(x, grad)
    source = source_of(plan, noise, len(state.x))
    if grad and (plan.a.requires_grad or plan.b.requires_grad or plan.c.requires_grad):
        raise ValueError(
            "the plan requires a gradient, but a run uses its numbers only: build it from times.detach()"
        )
    rows = rows_of(plan, model, state.x)
    if state.x.numel() == 0:
        return state.x
    if not grad:
        warn_of_training(model)
    if torch.is_inference_mode_enabled():
        model = replace(model, net=partial(_in_inference_mode, model.net))
    # the state is no inference tensor, which would know no version, by which an edit of x is seen
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        return execute(
            plan, model, state, source, rows, plan.rows, callback, progress, grad, check, fused, history
        )


def trajectory(
    plan: Plan, model: AnyModel, x: Tensor, noise: Noise | None = None, progress: bool = False
) -> Tensor:
    """Execute a plan and keep the state at every time: [N+1, B, ...]. Arguments and errors as for `run`."""
    states = [started(x).x]
    if len(x) == 0:
        return states[0].expand(plan.rows + 1, *x.shape).clone()
    run(plan, model, x, noise, callback=lambda state: states.append(state.x), progress=progress)
    return torch.stack(states)


def sample(
    model: AnyModel,
    x: Tensor,
    schedule: Schedule,
    steps: int = 20,
    method: Callable[[Schedule, Tensor], Plan] | None = None,
    grid: Callable[[Schedule, int], Tensor] | None = None,
    noise: Noise | None = None,
    progress: bool = False,
) -> Tensor:
    """From noise to data in one call, by the `recommended` method on its grid unless told otherwise.

    Args:
        model: as for `run`.
        x: the state at the schedule's start, [B, ...]: sigma(start) times standard normals, so 80 * randn for EDM().
        schedule: noise schedule.
        steps: grid steps; with the default method as many calls, six more from 40 steps on; a method of two stages makes two in each.
        method: (schedule, times) -> Plan; options are bound by functools.partial(sv.ddim, eta=1.0). By default `recommended`, with variable = "asinh" if
            the network predicts noise or score.
        grid: (schedule, steps) -> times; by default `angle`, or `logalpha` if the network predicts noise or score and no method is given; their levels for a
            Discrete schedule (upwards for its `Inversion`).
        noise: as for `run`.
        progress: show a progress bar.

    Returns:
        Samples, [B, ...], float32 or float64.
    """
    if not callable(getattr(schedule, "half_logsnr", None)) or isinstance(schedule, type):
        raise TypeError(
            f"schedule = {schedule!r:.100}: expected a schedule, e.g. sv.VP(), or sv.Discrete(betas)"
        )
    if not (method is None or callable(method)):
        raise TypeError(f"method = {method!r:.100}: expected (schedule, times) -> Plan, e.g. method=sv.ddim")
    if not (grid is None or callable(grid)):
        raise TypeError(f"grid = {grid!r:.100}: expected (schedule, steps) -> times, e.g. grid=sv.karras")
    if has_levels(schedule) and as_model(model).label is None:
        raise ValueError(
            "a Discrete schedule needs to know what the network reads: Model(net, label=schedule.step) for whole step numbers, "
            "schedule.label if it takes fractions, or lambda t: t"
        )
    native = native_of(as_model(model))
    times = (grid or usual(schedule, native if method is None else None))(schedule, steps)
    return run((method or recommended_for(native))(schedule, times), model, x, noise, progress=progress)


def execute(
    plan: Plan,
    model: Model,
    state: State,
    source: Source | None,
    rows: list[Row],
    stop: int,
    callback: Callable[[State], None] | None = None,
    progress: bool = False,
    grad: bool = False,
    check: bool = True,
    fused: bool | None = None,
    history: torch.dtype | None = None,
) -> Tensor:
    """The loop: the rows from the state's on and before `stop`, all of it checked already. It overwrites state.x, unless there is a callback.

    Without `check` nothing is read back from a device.
    """
    x, outputs, draws = state.x, dict(state.outputs), dict(state.draws)
    last_draw = plan.pattern.last_draw
    late = check and _is_read_late(x)
    at_once = check and not late
    kernel = None if grad else kernel_for(x, fused, history, at_once)
    if not grad:
        outputs = {n: laid_like(x, m, history or x.dtype) for n, m in outputs.items()}
        draws = {n: laid_like(x, z, x.dtype) for n, z in draws.items()}
    stepper = Stepper(kernel, callback is None, at_once, history)
    dtype = state.input_dtype or x.dtype
    given = None if grad else _memory_for_inputs(rows[state.call : stop], x, dtype)
    norms, made = [_norm(x)] if late else [], []
    marks = late and kernel is not None and kernel.marks
    flags: Sequence[Tensor | None] = x.new_zeros(stop, len(x)).unbind() if marks else [None] * stop
    numbers: Iterable[int] = range(state.call, stop)
    if progress:
        numbers = tqdm(numbers, initial=state.call, total=stop, unit=_unit(plan))
    for i in numbers:
        row, m, deviation = rows[i], None, None
        if source is not None and (last_draw[i] >= i or row.variance):
            draws[i] = laid_like(x, drawn(source, i, x), x.dtype)
        if row.is_called:
            m, second = called(plan, model, row, x, i, dtype, grad, given)
            if late:
                flag = flags[i]
                norms.append(_norm(m.detach()) if flag is None else flag)
                made.append(i)
            if row.variance and second is not None:
                if late:
                    norms.append(_norm(second.detach()))
                    made.append(i)
                elif at_once and not is_finite(second.detach()):
                    raise _non_finite(plan, i, _norm(second.detach()), state_was_finite=is_finite(x.detach()))
                deviation = deviation_of(row.variance, model.variance, x, m, second)
        if grad or row.as_formula:
            if at_once and m is not None and not is_finite(m.detach()):
                raise _non_finite(plan, i, _norm(m.detach()), state_was_finite=is_finite(x.detach()))
            x = combined(row, x, m, outputs, draws, i)
        else:
            new = stepper(row, x, m, outputs, draws, i, flags[i])
            if new is None:
                assert m is not None
                raise _non_finite(plan, i, _norm(m.detach()), state_was_finite=is_finite(x))
            x = new
        if deviation is not None:
            x = x + deviation * draws[i] if grad else x.addcmul_(deviation, draws[i])
        if draws:
            draws = {draw: z for draw, z in draws.items() if last_draw[draw] > i}
        if callback is not None:
            callback(State(x, i + 1, dict(outputs), dict(draws), state.input_dtype, plan.place(i + 1)))
    if norms and not torch.stack(norms).isfinite().all():  # the one read-back
        first = next(k for k, norm in enumerate(norms) if not norm.isfinite().all())
        call = made[max(first - 1, 0)] if made else state.call
        raise _non_finite(plan, call, norms[first], state_was_finite=first > 0)
    return x


def _in_inference_mode(net: Callable[..., Any], *given: Any) -> Any:
    with torch.inference_mode():
        return net(*given)


def _unit(plan: Plan) -> str:
    """What its rows are called: calls, unless some make none."""
    return "call" if plan.nfe == plan.rows else "row"


def _is_read_late(x: Tensor) -> bool:
    """Whether finiteness is looked at after the last row, as on an accelerator, and not at each call."""
    return x.device.type != "cpu"


def _norm(m: Tensor) -> Tensor:
    """The largest absolute value of each sample, [B]; NaN and infinity survive it."""
    return torch.linalg.vector_norm(m.reshape(len(m), -1), ord=math.inf, dim=1)


def _non_finite(plan: Plan, call: int, norms: Tensor, state_was_finite: bool) -> NonFiniteError:
    samples = (~norms.isfinite()).nonzero().flatten().tolist()
    time, half_logsnr = plan.times[call].item(), plan.half_logsnr[call].item()
    blame = "is finite" if state_was_finite else "is not finite either"
    shown = ", ".join(map(str, samples[:10])) + (", ..." if len(samples) > 10 else "")
    return NonFiniteError(
        f"the model's output is not finite in {_unit(plan)} {call} of {plan.rows} (t = {time:g}, half log-SNR = {half_logsnr:g}) for "
        f"samples [{shown}]; the x it was given {blame}",
        call,
        time,
        half_logsnr,
        samples,
    )


def _memory_for_inputs(rows: list[Row], x: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What the network is given in calls where it is not x itself; None if it always is."""
    if any(row.at_level is not None for row in rows):
        dtype = x.dtype  # a guided model's net turns to the dtype by itself
    other = dtype != x.dtype or any(row.input_scale != 1 for row in rows)
    return torch.empty_like(x, dtype=dtype) if other else None


def called(
    plan: Plan,
    model: Model,
    row: Row,
    x: Tensor,
    call: int,
    dtype: torch.dtype,
    grad: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One network call, its contract checked: the prediction, and the second output if the model has one. `into` is memory for its input."""
    guided = () if row.at_level is None else (row.at_level, dtype)
    wanted = x.dtype if guided else dtype
    if row.input_scale == 1 and wanted == x.dtype:
        given = x
    else:
        given = (x * row.input_scale).to(wanted) if into is None else torch.mul(x, row.input_scale, out=into)
    version = 0 if given.is_inference() else given._version
    try:
        m = model.net(given, row.label.clone() if grad else row.label, *guided)
    except Exception as error:
        error.add_note(
            f"raised by the model in {_where(plan, call)}, half log-SNR = {plan.half_logsnr[call]:g}; it was called with x in "
            f"{dtype}: run calls a network in the dtype of the x it is passed"
        )
        raise
    second = None
    if model.variance is not None:
        m, second = two_outputs(m, x, _where(plan, call))
    if not isinstance(m, Tensor) or not m.is_floating_point() or m.shape != x.shape or m.device != x.device:
        raise _unfit(m, x, _where(plan, call))
    if not grad and m.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
        m = m.clone()  # the model gave back its input, which the row is about to overwrite
    if version != (0 if given.is_inference() else given._version):
        raise ValueError(
            f"the model changed its input x in place in {_where(plan, call)}: let it work on a clone"
        )
    return (m if m.dtype == x.dtype else m.to(x.dtype)), second


def _unfit(m: Any, x: Tensor, where: str) -> Exception:
    """What is wrong with an output."""
    if not isinstance(m, Tensor):
        return TypeError(
            f"the model returned {type(m).__name__} in {where}: expected one tensor; unpack it in the callable"
        )
    if not m.is_floating_point():
        return TypeError(f"the model returned {m.dtype} in {where}: expected a floating-point tensor")
    if m.shape == x.shape:
        return ValueError(
            f"the model returned a tensor on {m.device} in {where}: expected {x.device}, like x"
        )
    doubled = m.ndim == x.ndim > 1 and m.shape[1] == 2 * x.shape[1]
    hint = (
        '; if the second half is a learned variance, say so: Model(net, variance="range")' if doubled else ""
    )
    return ValueError(
        f"the model returned shape {list(m.shape)} in {where}: expected {list(x.shape)}, the shape of x{hint}"
    )


def _where(plan: Plan, call: int) -> str:
    return f"{_unit(plan)} {call} of {plan.rows}, t = {plan.times[call]:g}"


def started(x: Tensor, grad: bool = False) -> State:
    """The first state: a copy of x in float32 or float64, once x is known to be one."""
    check_state(x, grad)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return State(x.to(dtype, copy=True), input_dtype=x.dtype)


def _resumed(plan: Plan, state: State) -> State:
    """A copy of a state that belongs to the plan."""
    check_state(state.x, grad=True)
    if state.x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the state's x has dtype {state.x.dtype}: expected float32 or float64")
    if not 0 <= state.call <= plan.rows:
        raise ValueError(
            f"the state's call = {state.call}: expected 0 to {plan.rows}, the plan's number of rows"
        )
    here = plan.place(state.call)
    if state.origin not in (None, here):
        raise ValueError(
            f"the state is of another plan: it stands at {state.origin}, this plan's row {state.call} at {here}"
        )
    pattern = plan.pattern
    for held, reads, name in (
        (state.outputs, pattern.last, "output of call"),
        (state.draws, pattern.last_draw, "draw"),
    ):
        for n, last in enumerate(reads[: state.call]):
            if last >= state.call and n not in held:
                raise ValueError(
                    f"the state lacks the {name} {n}, which row {last} reads: it is of another plan"
                )
    return state.clone()


def check_state(x: Tensor, grad: bool) -> None:
    """A dense, real, finite batch; finite as far as is known without waiting for a device."""
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
    if x.device.type == "cpu" and not is_finite(x):
        where = [int(i) for i in (~x.isfinite()).nonzero()[0]]
        raise ValueError(f"x{where} = {x[tuple(where)]:g}: every entry of the starting state must be finite")


def check_speed(plan: Plan, grad: bool, fused: bool | None, history: torch.dtype | None) -> None:
    """What only rows of numbers, executed in place, can have."""
    if not (fused is None or isinstance(fused, bool)):
        raise TypeError(f"fused = {fused!r:.100}: expected True, False or None")
    if not (history is None or (isinstance(history, torch.dtype) and history.is_floating_point)):
        raise TypeError(f"history = {history!r:.100}: expected a floating-point dtype, e.g. torch.bfloat16")
    formula = (
        "grad=True"
        if grad
        else "coefficients per element"
        if plan.element_shape or plan.shift.numel()
        else ""
    )
    if formula and (fused or history):
        name, value = ("fused", fused) if fused else ("history", history)
        raise ValueError(f"{name} = {value} with {formula}, whose rows are formulas of torch: leave it out")


def source_of(plan: Plan, noise: Noise | None, batch: int) -> Source | None:
    """Where the plan's draws come from; None if it makes none."""
    source = None if noise is None else as_source(noise, batch)
    if not plan.is_stochastic:
        return None
    if source is None:
        raise ValueError(
            "the plan is stochastic and needs noise: run(plan, model, x, noise=0) seeds one stream per sample"
        )
    if isinstance(source, PerSample | Brownian):
        one_id_each(source.ids, batch)
    if isinstance(source, Brownian) and len(source.clock) != plan.rows + 1:
        raise ValueError(
            f"the clock has {len(source.clock) - 1} steps, the plan {plan.rows} rows: give T at the plan's times, e.g. "
            "clock=plan.half_logsnr"
        )
    return source


def warn_of_training(model: Model) -> None:
    """Dropout and batch statistics have no place in sampling; the warning points at the line that called the library."""
    if any(_is_training(module) for module in _modules(model)):
        frame, level = sys._getframe(), 1
        while frame.f_back and frame.f_code.co_filename.startswith(PACKAGE):
            frame, level = frame.f_back, level + 1
        warnings.warn(
            "the network is in training mode (dropout, batch statistics): call net.eval()", stacklevel=level
        )


def _is_training(net: nn.Module) -> bool:
    """Not so a wrapper that nobody switched around a network that is not, or around a function."""
    children = list(net.children())
    if not children:
        return net.training and any(True for _ in net.parameters())
    return net.training and any(map(_is_training, children))


def _modules(net: Any) -> Iterator[nn.Module]:
    """The modules that a model calls: its network, or what a function of this library around it holds."""
    if isinstance(net, Model):
        yield from _modules(net.net)
    elif isinstance(net, nn.Module):
        yield net
    elif isinstance(net, partial):
        for inner in net.args:
            yield from _modules(inner)
    elif (getattr(net, "__module__", None) or "").startswith("solvers."):
        for cell in getattr(net, "__closure__", None) or ():
            if isinstance(cell.cell_contents, Model | nn.Module | partial):
                yield from _modules(cell.cell_contents)

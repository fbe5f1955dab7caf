"""The loop: one network call and one row after another; what a run is between two of them."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.elements import laid_like, largest
from solvers.kernels import kernel_for
from solvers.noise import Source, drawn
from solvers.plan import Plan
from solvers.predictions import Model, two_outputs
from solvers.rows import Row, Stepper, combined, deviation_of, is_finite


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
        if not plan.is_scalar or plan.is_stochastic or plan.b[0, 0] == 0:
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
    norms, made = [largest(x)] if late else [], []
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
                norms.append(largest(m.detach()) if flag is None else flag)
                made.append(i)
            if row.variance and second is not None:
                if late:
                    norms.append(largest(second.detach()))
                    made.append(i)
                elif at_once and not is_finite(second.detach()):
                    raise _non_finite(
                        plan, i, largest(second.detach()), state_was_finite=is_finite(x.detach())
                    )
                deviation = deviation_of(row.variance, model.variance, x, m, second)
        if grad or row.as_formula:
            if at_once and m is not None and not is_finite(m.detach()):
                raise _non_finite(plan, i, largest(m.detach()), state_was_finite=is_finite(x.detach()))
            x = combined(row, x, m, outputs, draws, i)
        else:
            new = stepper(row, x, m, outputs, draws, i, flags[i])
            if new is None:
                assert m is not None
                raise _non_finite(plan, i, largest(m.detach()), state_was_finite=is_finite(x))
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
        raise _non_finite(plan, call, norms[first], state_was_finite=None if first else False)
    return x


def _unit(plan: Plan) -> str:
    """What its rows are called: calls, unless some make none."""
    return "call" if plan.nfe == plan.rows else "row"


def _is_read_late(x: Tensor) -> bool:
    """Whether finiteness is looked at after the last row, as on an accelerator, and not at each call."""
    return x.device.type != "cpu"


def _non_finite(plan: Plan, call: int, norms: Tensor, state_was_finite: bool | None) -> NonFiniteError:
    samples = (~norms.isfinite()).nonzero().flatten().tolist()
    time, half_logsnr = plan.times[call].item(), plan.half_logsnr[call].item()
    blames: dict[bool | None, str] = {
        True: "the x it was given is finite",
        False: "the x it was given is not finite either",
    }
    blame = blames.get(state_was_finite, "all outputs before it are finite")
    shown = ", ".join(map(str, samples[:10])) + (", ..." if len(samples) > 10 else "")
    return NonFiniteError(
        f"the model's output is not finite in {_unit(plan)} {call} of {plan.rows} (t = {time:g}, half log-SNR = {half_logsnr:g}) for "
        f"samples [{shown}]; {blame}",
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
    versioned = not given.is_inference()
    version = given._version if versioned else 0
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
    if versioned and version != given._version:
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

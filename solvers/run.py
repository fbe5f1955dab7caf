"""The executor: run, trajectory, sample; what they are given, checked."""

import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solvers.arguments import flag
from solvers.grids import has_levels, usual
from solvers.loop import State, execute
from solvers.methods.unipc import recommended_for
from solvers.noise import Brownian, Noise, PerSample, Source, as_source, one_id_each
from solvers.plan import Plan
from solvers.predictions import AnyModel, Model, as_model, native_of
from solvers.rows import is_finite, rows_of
from solvers.schedules import Schedule

PACKAGE = str(Path(__file__).parent)


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
    if x.numel() == 0:
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


def _in_inference_mode(net: Callable[..., Any], *given: Any) -> Any:
    with torch.inference_mode():
        return net(*given)


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
        for n, v in held.items():
            if (v.shape, v.device) != (state.x.shape, state.x.device):
                raise ValueError(
                    f"the state's {name} {n} has shape {list(v.shape)} on {v.device}: expected {list(state.x.shape)} on {state.x.device}, like its x"
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
    formula = "grad=True" if grad else "" if plan.is_scalar else "coefficients per element"
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

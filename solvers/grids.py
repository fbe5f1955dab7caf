"""Grids: where a sampler stands. (schedule, steps, *, start, stop) -> times [steps + 1], from noise to data.

Times decrease, the ends are the schedule's own unless given (the discrete spacings end at clean data, t = 0) and are
hit exactly, and half log-SNR increases strictly: `given` checks it, for every grid here and for any list of your own.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from solvers.arguments import number, numbers, positive, whole
from solvers.discrete import Discrete
from solvers.schedules import BothWays, Inversion, Schedule

if TYPE_CHECKING:
    import numpy

MAX_STEPS = 10**6
PREDICTS_NOISE = ("noise", "score")  # which say little of the data where alpha is small
ULPS = 4  # a step of half log-SNR must exceed this many units in the last place


def uniform(
    schedule: Schedule, steps: int, *, start: float | None = None, stop: float | None = None
) -> Tensor:
    """Uniform in t: times [steps + 1], float64."""
    return power(schedule, steps, start=start, stop=stop, exponent=1)


def quadratic(
    schedule: Schedule, steps: int, *, start: float | None = None, stop: float | None = None
) -> Tensor:
    """Uniform in sqrt(t), denser near the data: times [steps + 1], float64."""
    return power(schedule, steps, start=start, stop=stop, exponent=2)


def power(
    schedule: Schedule,
    steps: int,
    *,
    start: float | None = None,
    stop: float | None = None,
    exponent: float = 3.0,
) -> Tensor:
    """Uniform in t^(1/exponent): 1 is `uniform`, 2 `quadratic`, more is denser near the data. Times [steps + 1], float64."""
    positive(exponent=exponent)
    ends = _ends(schedule, steps, start, stop)
    root = _line(ends[0] ** (1 / exponent), ends[1] ** (1 / exponent), steps)
    return _between(schedule, root**exponent, ends)


def logsnr(
    schedule: Schedule, steps: int, *, start: float | None = None, stop: float | None = None
) -> Tensor:
    """Uniform in log-SNR: times [steps + 1], float64. Both ends need alpha > 0 and sigma > 0."""
    ends = _ends(schedule, steps, start, stop)
    first, last = _finite_half_logsnr(schedule, ends)
    return _between(schedule, schedule.time(_line(first, last, steps)), ends)


def within_logsnr(schedule: Schedule, ends: Tensor, share: Tensor) -> Tensor:
    """The times at some shares of the way in log-SNR between two ends, [2]: from 0 at the noisier to 1, and never outside."""
    low, high = sorted(schedule.half_logsnr(ends).tolist())
    return schedule.time(low + (high - low) * share).clamp(ends.min().item(), ends.max().item())


def angle(
    schedule: Schedule,
    steps: int,
    *,
    start: float | None = None,
    stop: float | None = None,
    exponent: float = 1.75,
    scale: float = 1.0,
) -> Tensor:
    """Uniform in theta^(1/exponent), theta = arctan(sigma / (scale alpha)): times [steps + 1], float64; alpha = 0 and sigma = 0 are fine.

    The angle by which the ODE turns noise into data, whatever the schedule; the grid is denser where theta is small.
    scale is the data's standard deviation, or 1 for what networks are usually trained on.
    Source: this library; the exponent is the best of 1.25 to 3 with `recommended` on the problems of docs/which-solver.md.
    """
    positive(exponent=exponent, scale=scale)
    ends = _ends(schedule, steps, start, stop)
    at = torch.tensor(ends, dtype=torch.float64, device="cpu")
    first, last = (torch.atan2(schedule.sigma(at), scale * schedule.alpha(at)) ** (1 / exponent)).tolist()
    theta = _line(first, last, steps)[1:-1] ** exponent
    inner = schedule.time(-torch.log(scale * torch.tan(theta)))
    return _between(schedule, torch.cat([at[:1], inner, at[1:]]), ends)


def logalpha(
    schedule: Schedule,
    steps: int,
    *,
    start: float | None = None,
    stop: float | None = None,
    exponent: float = 4.0,
    scale: float = 1.0,
) -> Tensor:
    """Uniform in l^(1/exponent), l = log(1 + (sigma / (scale alpha))^2): times [steps + 1], float64. The start needs alpha > 0; sigma = 0 is fine.

    Of a variance-preserving schedule l is -2 log alpha; under VP, where that is nearly quadratic in t, this is nearly `quadratic`. It has its first steps
    shorter than `angle`: for networks that predict noise, of whose error the data prediction has 1 / alpha times as much. scale as of `angle`.
    Source: this library; the exponent is the best of some with `recommended` on the networks of docs/which-solver.md.
    """
    positive(exponent=exponent, scale=scale)
    ends = _ends(schedule, steps, start, stop)
    at = torch.tensor(ends, dtype=torch.float64, device="cpu")
    places = torch.log1p((schedule.sigma(at) / (scale * schedule.alpha(at))) ** 2) ** (1 / exponent)
    first, last = places.tolist()
    if not math.isfinite(first + last):
        name, end = ("start", ends[0]) if math.isinf(first) else ("stop", ends[1])
        raise ValueError(
            f"{name} = {end:g} has alpha = 0, where a noise prediction does not determine the data: give a {name} where alpha > 0, e.g. {name}={0.999 * end:g}, or "
            "take a network that predicts velocity, flow or data, on `angle`"
        )
    inner = _line(first, last, steps)[1:-1] ** exponent
    return _between(
        schedule,
        torch.cat([at[:1], schedule.time(-math.log(scale) - torch.log(torch.expm1(inner)) / 2), at[1:]]),
        ends,
    )


def karras(
    schedule: Schedule, steps: int, *, start: float | None = None, stop: float | None = None, rho: float = 7.0
) -> Tensor:
    """Uniform in (sigma / alpha)^(1/rho): times [steps + 1], float64. Both ends need alpha > 0 and sigma > 0.

    Source: Karras et al. 2022 (arXiv 2206.00364), eq. 5.
    """
    if not (math.isfinite(number("rho", rho)) and rho > 0):
        raise ValueError(f"rho = {rho}: expected a finite number above 0, e.g. rho=7.0")
    ends = _ends(schedule, steps, start, stop)
    first, last = _finite_half_logsnr(schedule, ends)
    root = _line(math.exp(-first / rho), math.exp(-last / rho), steps)
    return _between(schedule, schedule.time(-rho * torch.log(root)), ends)


def linspace(schedule: Discrete, steps: int, *, start: float | None = None, stop: float = 0.0) -> Tensor:
    """The calls evenly spaced over a discrete network's levels, the first and the last included, each snapped to a level.

    From the last call x goes to `stop`, by default to clean data (sigma = 0). Times [steps + 1], float64.
    """
    first, last = _ends(_discrete(schedule), steps, start, stop)
    lowest, gaps = (last * schedule.levels - 1, steps) if last else (0.0, max(steps - 1, 1))
    labels = _level_line(first * schedule.levels - 1, lowest, gaps)[:steps]
    return _on_levels(schedule, labels.round() + 1, (first, last))


def leading(schedule: Discrete, steps: int, *, start: float | None = None, stop: float = 0.0) -> Tensor:
    """The calls a constant stride apart, counted from the level next to `stop`, each snapped to a level.

    Published code lets the first call fall short of `start`, although x holds the noise of `start`; here the first call
    is moved to `start`. Times [steps + 1], float64.
    """
    first, last = _ends(_discrete(schedule), steps, start, stop)
    calls = _level_line(first * schedule.levels, last * schedule.levels, steps) + 1
    return _on_levels(schedule, torch.cat([calls[:1] - 1, calls[2:]]), (first, last))


def trailing(schedule: Discrete, steps: int, *, start: float | None = None, stop: float = 0.0) -> Tensor:
    """The calls a constant stride apart, counted from `start`, each snapped to a level. Times [steps + 1], float64.

    Source: Lin et al. 2023 (arXiv 2305.08891), table 2.
    """
    first, last = _ends(_discrete(schedule), steps, start, stop)
    return _on_levels(
        schedule, _level_line(first * schedule.levels, last * schedule.levels, steps)[:-1], (first, last)
    )


def angle_levels(schedule: Discrete, steps: int, *, start: float | None = None, stop: float = 0.0) -> Tensor:
    """The `angle` grid with each call on a level of its own, the nearest that is free: times [steps + 1], float64; the end is clean data.

    The last call is close to the data, where `trailing` and the like jump to sigma = 0 from far.
    """
    return _each_on_a_level(schedule, angle(_discrete(schedule), steps, start=start, stop=stop))


def logalpha_levels(
    schedule: Discrete, steps: int, *, start: float | None = None, stop: float = 0.0
) -> Tensor:
    """The `logalpha` grid with each call on a level of its own, the nearest that is free: times [steps + 1], float64; the end is clean data."""
    return _each_on_a_level(schedule, logalpha(_discrete(schedule), steps, start=start, stop=stop))


def _each_on_a_level(schedule: Discrete, times: Tensor) -> Tensor:
    steps = len(times) - 1
    calls = (times[:-1] * schedule.levels).round().clamp(min=1)
    if steps > (most := int(calls[0])):
        raise ValueError(
            f"steps = {steps}: expected at most {most}, the number of levels up to t = {times[0]:g}"
        )
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    calls = (calls + i).flip(0).cummax(0).values.flip(0)  # each at least a level above the next
    calls = calls.clamp(max=most).cummin(0).values - i  # and none above the first
    return given(schedule, torch.cat([calls / schedule.levels, times[-1:]]))


def usual(schedule: Schedule, predicts: str | None = None) -> Callable[..., Tensor]:
    """The grid to take if none is given: angle, for a network that predicts noise logalpha; on discrete levels theirs."""
    noise = predicts in PREDICTS_NOISE
    on_levels = logalpha_levels if noise else angle_levels
    if isinstance(schedule, Inversion) and has_levels(schedule):
        return partial(_levels_upwards, grid=on_levels)
    return on_levels if isinstance(schedule, Discrete) else logalpha if noise else angle


def has_levels(schedule: Schedule) -> bool:
    """Whether the network behind a schedule, or behind its inversion, knows certain levels alone."""
    return isinstance(schedule.schedule if isinstance(schedule, Inversion) else schedule, Discrete)


def _levels_upwards(schedule: Inversion, steps: int, grid: Callable[..., Tensor]) -> Tensor:
    """The levels from the lowest up: every call of the inversion is on one."""
    levels = schedule.schedule
    assert isinstance(levels, Discrete)
    return grid(levels, steps, stop=levels.stop).flip(0)


def snap(schedule: Discrete, times: Tensor) -> Tensor:
    """Move the calls times[:-1] to the nearest levels that a discrete network knows; the end, never called, stays.

    Snap *before* a method computes its coefficients: the level in the table is then the level the network is told. Stages of
    singlestep methods, and of start = "singlestep", still stand between levels.

    Raises:
        ValueError: two calls fall on one level.
    """
    times = given(_discrete(schedule), times)
    return _on_levels(schedule, times[:-1] * schedule.levels, (float(times[0]), float(times[-1])))


def given(schedule: Schedule, times: "Tensor | Sequence[float] | numpy.ndarray") -> Tensor:
    """Check any list of times and return a copy of it as float64 [steps + 1].

    Raises:
        TypeError: not a sequence of real numbers, or in half precision and so rounded already.
        ValueError: fewer than two, not finite, not strictly decreasing (increasing on an `Inversion`), outside the schedule, or
            half log-SNR not strictly changing the other way.
    """
    return on_grid(schedule, times)[0]


def on_grid(schedule: Schedule, times: "Tensor | Sequence[float] | numpy.ndarray") -> tuple[Tensor, Tensor]:
    """The times as `given` returns them, and the half log-SNR at each."""
    times = numbers("times", times)
    if times.ndim != 1 or times.numel() < 2:
        raise ValueError(
            f"times has shape {list(times.shape)}: expected [steps + 1] with at least one step (two times)"
        )
    if not times.isfinite().all():
        i = int((~times.isfinite()).nonzero()[0])
        raise ValueError(f"times[{i}] = {times[i]:g}: every time must be finite")
    rises = _rises(schedule)
    sign = -times.diff().sign() if isinstance(schedule, BothWays) else -1 if rises else 1
    steps = sign * times.diff()
    if not (steps < 0).all():
        if (steps > 0).all():
            way, other = (
                ("increase from data to noise", "schedule.schedule")
                if rises
                else ("decrease from noise to data", "sv.Inversion(schedule)")
            )
            raise ValueError(
                f"times must {way}: times[0] = {times[0]:g} is followed by {times[1]:g}; flip it: times.flip(0); or, to go the "
                f"other way, build on {other}"
            )
        i = int((steps >= 0).nonzero()[0])
        raise ValueError(
            f"times must strictly {'increase' if rises else 'decrease'}: times[{i}] = {times[i]:g} is followed by {times[i + 1]:g}"
        )
    lam = schedule.half_logsnr(times)
    resolution = ULPS * torch.finfo(torch.float64).eps * lam.abs().nan_to_num(posinf=0.0).clamp(min=1.0)
    apart = sign * lam.diff() > torch.maximum(resolution[:-1], resolution[1:])
    if not apart.all():
        if lam.isnan().any():
            i = int(lam.isnan().nonzero()[0])
            raise ValueError(
                f"times[{i}] = {times[i]:g} is outside the schedule: its half log-SNR is not a number"
            )
        i = int((~apart).nonzero()[0])
        raise ValueError(
            f"half log-SNR must {'decrease' if rises else 'increase'} by more than rounding at every step: times[{i}] = {times[i]:.17g} and times[{i + 1}] = "
            f"{times[i + 1]:.17g} have {lam[i]:.17g} and {lam[i + 1]:.17g}"
        )
    return times, lam


def _discrete(schedule: Discrete) -> Discrete:
    if isinstance(schedule, Inversion) and has_levels(schedule):
        raise TypeError(
            f"schedule = {schedule!r}: expected the Discrete itself; build its grid up to a level and flip it: "
            "angle_levels(schedule.schedule, steps, stop=schedule.start).flip(0)"
        )
    if not isinstance(schedule, Discrete):
        raise TypeError(
            f"schedule = {schedule!r} has no levels to stand on: expected a Discrete; use angle, uniform, logsnr or karras"
        )
    return schedule


def _ends(schedule: Schedule, steps: int, start: float | None, stop: float | None) -> tuple[float, float]:
    whole("steps", steps, 1, MAX_STEPS, example=20)
    first = schedule.start if start is None else number("start", start)
    last = schedule.stop if stop is None else number("stop", stop)
    low, high = (first, last) if _rises(schedule) else (last, first)
    if not (math.isfinite(first) and math.isfinite(last) and 0 <= low < high):
        expected = (
            "0 <= start < stop; start is data"
            if _rises(schedule)
            else "0 <= stop < start; start is noise, stop is data"
        )
        raise ValueError(f"start = {first:g}, stop = {last:g}: expected {expected}")
    return first, last


def _rises(schedule: Schedule) -> bool:
    """Whether the schedule is walked from data to noise."""
    return isinstance(schedule, Inversion)


def _line(first: float, last: float, steps: int) -> Tensor:
    return torch.linspace(first, last, steps + 1, dtype=torch.float64, device="cpu")


def _level_line(first: float, last: float, steps: int) -> Tensor:
    """As _line, but between whole numbers each point is rounded once, so that a half is a half on every machine."""
    i = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
    return (first * (steps - i) + last * i) / steps


def _between(schedule: Schedule, times: Tensor, ends: tuple[float, float]) -> Tensor:
    """The grid with its ends set exactly, checked."""
    times[0], times[-1] = ends
    return given(schedule, times)


def _finite_half_logsnr(schedule: Schedule, ends: tuple[float, float]) -> tuple[float, float]:
    first, last = schedule.half_logsnr(torch.tensor(ends, dtype=torch.float64, device="cpu")).tolist()
    if math.isinf(first):
        raise ValueError(_at_infinity("start", *ends, first))
    if math.isinf(last):
        raise ValueError(_at_infinity("stop", *ends[::-1], last))
    return first, last


def _at_infinity(name: str, end: float, other: float, half_logsnr: float) -> str:
    """What is wrong with an end of infinite log-SNR, of a schedule or of its inversion, and what to write."""
    zero = "alpha" if half_logsnr < 0 else "sigma"
    inside = 0.999 * end if end else 0.001
    return (
        f"{name} = {end:g} has {zero} = 0 (half log-SNR {half_logsnr:g}): give a {name} {'below' if other < end else 'above'} it, e.g. {name}={inside:g}, or "
        "take `angle`, on which it is a time like others"
    )


def _on_levels(schedule: Discrete, calls: Tensor, ends: tuple[float, float]) -> Tensor:
    """Snap the calls, in units of 1 / N, to whole ones and put the end behind them."""
    if ends[0] * schedule.levels < 1:
        raise ValueError(f"start = {ends[0]:g} is below the first level 1/{schedule.levels}")
    level = calls.round().clamp(min=1)
    if (level.diff() == 0).any():
        i = int((level.diff() == 0).nonzero()[0])
        raise ValueError(
            f"calls {i} and {i + 1} fall on one level (t = {level[i] / schedule.levels:g}) of the {schedule.levels} that the "
            f"network knows: take fewer than {len(calls)} steps, or interpolate its label"
        )
    times = torch.cat([level / schedule.levels, calls.new_tensor([ends[1]])])
    return given(schedule, times)

"""Where randomness comes from: one stream per sample; one Brownian path per sample, known ahead or drawn on the way."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from solvers.arguments import numbers, whole
from solvers.schedules import Schedule, host

# (number of the draw, a tensor like it) -> standard normals of that shape
Source = Callable[[int, Tensor], Tensor]
Noise = Source | torch.Generator | int  # what a user may give
STEPS, START, PATH, AHEAD, PROBES, BINS = (
    0,
    1,
    2,
    5,
    6,
    7,
)  # independent streams of one sample; PATH has three
RESOLUTION = 2.0**-24  # down to which a Brownian path is halved
FARTHEST = 300.0  # T whose e^{2T} is still a number
LEAST_STEP = 2.0**-22  # of its clock: below it the path's last halves would be seen


@dataclass(frozen=True)
class PerSample:
    """Noise of which sample i depends on (seed, ids[i], draw) alone: the same in any batch, chunk or order of batches.

    Drawn on the host by a counter-based generator (Philox) in float64, then cast and moved, so it is the same for every
    dtype and device.

    Attributes:
        seed: 0 <= seed < 2^63.
        ids: the samples' numbers, distinct and not negative, [B].
        stream: which of the independent streams of a sample its draws are from; 0 for those of steps.
    """

    seed: int
    ids: tuple[int, ...]
    stream: int = STEPS

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, 2**63 - 1)
        for sample in self.ids:
            whole("ids", sample, 0, 2**63 - 1)
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("ids has a sample twice: two samples would get the same noise")

    def __call__(self, draw: int, like: Tensor) -> Tensor:
        """Draw number `draw` for a step: standard normals with the shape, dtype and device of `like` [B, ...]."""
        one_id_each(self.ids, len(like))
        normals = self._normals(self.stream, draw, like.shape[1:]).to(like.dtype)
        if like.is_cuda:  # from pinned memory the copy does not wait for the device
            return normals.pin_memory().to(like.device, non_blocking=True)
        return normals.to(like.device)

    def initial(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals [B, *shape] to start from, independent of every draw for a step."""
        return self._normals(START, 0, shape).to(dtype)

    def _normals(self, stream: int, draw: int, shape: Sequence[int], level: int = 0) -> Tensor:
        values = np.empty((len(self.ids), *shape))
        for i, sample in enumerate(self.ids):
            bits = np.random.Philox(key=[self.seed, sample], counter=[0, draw, stream, level])
            values[i] = np.random.Generator(bits).standard_normal(tuple(shape))
        return torch.from_numpy(values)


def per_sample(seed: int, ids: Sequence[int]) -> PerSample:
    """One noise stream per sample: sample i's noise does not depend on the batch it is in.

    Args:
        seed: 0 <= seed < 2^63.
        ids: the samples' numbers, [B]; any distinct whole numbers.

    Raises:
        TypeError: ids are not a sequence.
        ValueError: a seed or id that is not a whole number in range, or an id twice.
    """
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    if not isinstance(ids, Iterable):
        raise TypeError(f"ids = {ids!r:.100}: expected the samples' numbers, e.g. range({ids!r:.20})")
    return PerSample(
        whole("seed", seed, 0, 2**63 - 1), tuple(whole("ids", sample, 0, 2**63 - 1) for sample in ids)
    )


def one_id_each(ids: Sequence[int], batch: int) -> None:
    """Noise of other samples is refused."""
    if len(ids) != batch:
        raise ValueError(
            f"noise is for {len(ids)} samples, but the batch has {batch}: give one id per sample"
        )


class Brownian:
    """The noise of a stochastic plan taken from one Brownian path W per sample, whatever the grid: runs with more steps refine it.

    Over an SDE with tau^2 = dT/dlambda the noise that a step adds is sigma_t e^{-T_t} (W(u_t) - W(u_s)) with the clock u = e^{2T}, exactly; a
    draw is that increment over its standard deviation. W is kept as the Brownian bridge (1 - v) W(v / (1 - v)) on v = u / (1 + u) in
    [0, 1], which is halved again and again, so that every clock from 0 to infinity has its place and no end is outside. What W is at
    a place depends on (seed, sample, place) alone.

    Attributes:
        seed: 0 <= seed < 2^63.
        ids: the samples' numbers, [B].
        clock: T at the plan's times, [N+1], not falling.
    """

    def __init__(self, seed: int, ids: Sequence[int], clock: Tensor):
        self.source = per_sample(seed, ids)
        self.seed, self.ids = self.source.seed, self.source.ids
        self._last: tuple[float, Sequence[int], Tensor] = (math.nan, (), torch.empty(0, device="cpu"))
        self.clock = numbers("clock", clock)
        far = self.clock.isfinite() & (self.clock.abs() > FARTHEST)
        if far.any():
            raise ValueError(
                f"clock has T = {self.clock[far][0]:g}: expected -{FARTHEST:g} to {FARTHEST:g}, or infinite ends"
            )
        if self.clock.ndim != 1 or len(self.clock) < 2 or not (self.clock.diff() >= 0).all():
            raise ValueError(
                f"clock = {self.clock!s:.200}: expected T at the times of the plan, [N+1], not falling, e.g. clock=plan.half_logsnr for the "
                "reverse SDE"
            )

    def __call__(self, draw: int, like: Tensor) -> Tensor:
        """The increment over row `draw`, as standard normals like `like` [B, ...]."""
        if not 0 <= draw < len(self.clock) - 1:
            raise ValueError(
                f"draw = {draw}: the clock has {len(self.clock) - 1} steps; give one time for each row"
            )
        return self.between(float(self.clock[draw]), float(self.clock[draw + 1]), like)

    def between(self, start: float, end: float, like: Tensor) -> Tensor:
        """(W(u_t) - W(u_s)) / sqrt(u_t - u_s) for T from start to end, the shape, dtype and device of `like` [B, ...]."""
        if not end - start > LEAST_STEP:
            raise ValueError(f"T from {start:g} to {end:g}: expected an increase by more than {LEAST_STEP:g}")
        shape = like.shape[1:]
        if math.isinf(end):  # W(u) / sqrt(u) as u grows is independent of all before
            return self._normals(0, 0, 0, shape).to(like)
        # with S = sqrt(1 + u) B, whose variance is v, nothing overflows
        log_ratio = _softplus(2 * start) - _softplus(2 * end)  # of (1 + u_s) / (1 + u_t)
        last = self._last
        at_start = last[2] if last[:2] == (start, shape) else self._scaled(start, shape)
        at_end = self._scaled(end, shape)
        self._last = end, shape, at_end  # where the next step most often starts
        change = at_end - math.exp(log_ratio / 2) * at_start
        return (change / math.sqrt(-math.expm1(log_ratio))).to(like)

    def _scaled(self, clock: float, shape: Sequence[int]) -> Tensor:
        """S = sqrt(1 + u) B at T: the bridge is halved, from its nearer end, down to 2^-24 of the distance from there."""
        half, place = int(clock > 0), 1 / (1 + math.exp(2 * abs(clock)))  # v or 1 - v
        if place == 0:
            return torch.zeros(len(self.ids), *shape, dtype=torch.float64, device="cpu")
        low, high, level, index = 0.0, 0.5, 0, 0
        at_low, at_high = torch.zeros((), device="cpu"), 0.5 * self._normals(0, 1, 0, shape)
        while low == 0 or high - low > low * RESOLUTION:
            middle = (low + high) / 2
            spread = math.sqrt(high - low) / 2
            at_middle = (at_low + at_high) / 2 + spread * self._normals(1 + half, level, index, shape)
            right = place >= middle
            low, high = (middle, high) if right else (low, middle)
            at_low, at_high = (at_middle, at_high) if right else (at_low, at_middle)
            level, index = level + 1, 2 * index + right
        share = (place - low) / (high - low)
        inside = math.sqrt((high - low) * share * (1 - share)) * self._normals(1 + half, level, index, shape)
        value = at_low + share * (at_high - at_low) + inside
        return value / math.sqrt(place if half else 1 - place)

    def _normals(self, part: int, level: int, index: int, shape: Sequence[int]) -> Tensor:
        return self.source._normals(PATH + part, index, shape, level)


class Ahead:
    """A Brownian path per sample on any clock, drawn as far as it is asked for and never drawn anew.

    Of each path the increments from where the sample stands are kept, one after the other. Where a shorter way is asked for than was
    drawn, an increment is split by the Brownian bridge: a step that is tried, rejected and tried again in pieces has the same noise.
    Draw k of a sample depends on (seed, id, k) alone.
    Source: Rackauckas & Nie 2017 (doi 10.3934/dcdsb.2017133), rejection sampling with memory.

    Attributes:
        source: seed and the samples' numbers, [B].
        here: the clock where each sample stands, [B].
    """

    def __init__(self, source: PerSample, start: float, shape: Sequence[int]):
        self.source, self.shape = source, tuple(shape)
        self.here = [start] * len(source.ids)
        self._drawn = [0] * len(source.ids)
        self._ahead: list[list[tuple[float, Tensor]]] = [[] for _ in source.ids]  # (end, increment)

    def increment(self, i: int, end: float) -> Tensor:
        """W(end) - W(here) of the sample at position i, float64 on the host."""
        start, total, ahead = (
            self.here[i],
            torch.zeros(self.shape, dtype=torch.float64, device="cpu"),
            self._ahead[i],
        )
        for k, (reached, piece) in enumerate(ahead):
            if end < reached:  # the bridge over (start, reached)
                share = (end - start) / (reached - start)
                first = share * piece + math.sqrt((end - start) * (1 - share)) * self._normals(i)
                ahead[k : k + 1] = [(end, first), (reached, piece - first)]
                return total + first
            start, total = reached, total + piece
            if end == reached:
                return total
        ahead.append((end, math.sqrt(end - start) * self._normals(i)))
        return total + ahead[-1][1]

    def advance(self, i: int, end: float) -> None:
        """The sample at position i has come to a place that `increment` was asked for."""
        self._ahead[i] = [(reached, piece) for reached, piece in self._ahead[i] if reached > end]
        self.here[i] = end

    def _normals(self, i: int) -> Tensor:
        self._drawn[i] += 1
        return PerSample(self.source.seed, self.source.ids[i : i + 1])._normals(
            AHEAD, self._drawn[i], self.shape
        )[0]


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def brownian(seed: int, ids: Sequence[int], clock: Tensor) -> Brownian:
    """One Brownian path per sample as the noise of an SDE plan: more steps refine the same path, so that runs converge to one answer.

    A draw costs some thirty of `per_sample`: it is for tests of convergence, and for steps that are subdivided.

    Args:
        seed: 0 <= seed < 2^63.
        ids: the samples' numbers, [B].
        clock: T = int tau^2 dlambda at the plan's times, [N+1], from anywhere: plan.half_logsnr for the reverse SDE (eta = 1), eta times it
            for tau^2 = eta, log(rho / phi(rho)) for `er_sde` with noise scale phi. Of one anchor for plans that are to share the path.

    Raises:
        ValueError: the clock falls, or a step over which noise is drawn is below 2^-22.
    """
    return Brownian(seed, ids, clock)


def noised(x0: Tensor, schedule: Schedule, t: Tensor | float, noise: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) noise.

    Args:
        x0: data, [B, ...].
        schedule: noise schedule.
        t: time, one for all or one per sample, [B].
        noise: standard normals, the shape of x0.

    Returns:
        The state at t, [B, ...].

    Raises:
        ValueError: the shapes differ.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {list(noise.shape)}: expected that of x0, {list(x0.shape)}")
    t = host(t)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x0)):
        raise ValueError(
            f"t has shape {list(t.shape)}: expected one time, or one for each of the {len(x0)} samples"
        )
    column = [-1] + [1] * (x0.ndim - 1)
    alpha, sigma = (level(t).to(x0).reshape(column) for level in (schedule.alpha, schedule.sigma))
    return alpha * x0 + sigma * noise


def in_batches(noise: Noise, sizes: Sequence[int]) -> list[Source]:
    """A source for each of some batches, which have one draw of a number each: of a seed the streams of their samples, else one after the other."""
    total = sum(sizes)
    source = as_source(noise, total)
    if isinstance(source, PerSample):
        if len(source.ids) != total:
            raise ValueError(
                f"noise is for {len(source.ids)} samples, but there are {total}: give one id per sample"
            )
        ends = np.cumsum(sizes).tolist()
        return [
            per_sample(source.seed, source.ids[end - n : end]) for n, end in zip(sizes, ends, strict=True)
        ]

    def part(k: int) -> Source:
        return lambda draw, like: source(len(sizes) * draw + k, like)

    return [part(k) for k in range(len(sizes))]


def drawn(source: Source, number: int, x: Tensor) -> Tensor:
    """One draw, its contract checked."""
    z = source(number, x)
    if not isinstance(z, Tensor) or z.shape != x.shape or z.device != x.device:
        came = f"shape {list(z.shape)} on {z.device}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(
            f"noise gave {came} in draw {number}: expected shape {list(x.shape)} on {x.device}, like x"
        )
    return z


def as_source(noise: Noise, batch: int, stream: int = STEPS) -> Source:
    """A noise source as it is, a torch.Generator, or a seed: samples 0 .. batch - 1 of that seed.

    Of noise per sample the draws are from one of its streams, so that one seed can serve for several purposes.
    """
    if isinstance(noise, torch.Generator):
        return lambda draw, like: torch.randn(
            like.shape, generator=noise, device=noise.device, dtype=like.dtype
        ).to(like.device)
    if isinstance(noise, PerSample):
        return replace(noise, stream=stream) if stream else noise
    if callable(noise):
        return noise
    if noise is None or isinstance(noise, Tensor):
        raise TypeError(
            f"noise is {type(noise).__name__}: expected an int seed, a torch.Generator, or a function (draw, like) -> normals"
        )
    return as_source(per_sample(noise, range(batch)), batch, stream)

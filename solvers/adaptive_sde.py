"""Adaptive steps for SDEs, sample by sample: an embedded SDE-DPM-Solver++ pair, and that of Gotta Go Fast."""

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from solvers.adaptive import Adams, Wiener, limits, task_of
from solvers.arguments import choice
from solvers.control import Control, Front, Method, Solution, Trial, aim, column, integrate
from solvers.methods.exponential import Form, Levels, refuse_upwards
from solvers.methods.stochastic import constant, drift_and_diffusion, stochasticity
from solvers.noise import Ahead, PerSample, as_source, one_id_each
from solvers.predictions import AnyModel
from solvers.run import started
from solvers.schedules import Schedule, in_lanes

METHODS = ("dpm_solver_pp_sde", "gotta_go_fast")
GOTTA_GO_FAST = Control(safety=0.9, integral=0.9, proportional=0.0, least=0.1, most=10.0)
FIRST_PART = 0.01  # of the way in t
LONGEST = 1.0  # step of (1 + eta) times half log-SNR: what noise does within a longer one, no difference of outputs shows


def adaptive_sde(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    noise: int | PerSample,
    rtol: float = 0.01,
    atol: float = 0.01,
    *,
    method: str = "dpm_solver_pp_sde",
    eta: float = 1.0,
    start: float | None = None,
    stop: float | None = None,
    first_step: float | None = None,
    max_nfe: int = 1000,
    on_limit: str = "raise",
) -> Solution:
    """Integrate the reverse SDE with steps that keep a tolerance, each sample with steps of its own along a Brownian path of its own.

    A rejected step is tried again in pieces with the same noise, subdivided, so the law is that of the path. A sample depends neither on the
    batch it is in nor on what the others do.
    "dpm_solver_pp_sde" predicts by SDE-DPM-Solver++(2M), adds the noise, asks and corrects by SA-Solver's corrector of order 3: one call per
    step, of at most 1 / (1 + eta) in half log-SNR; with eta = 0 it is `adaptive`'s Adams of order 2 in data form. "gotta_go_fast" is the
    stochastic Heun pair, two calls per step in t; its estimate is one draw per element, which by luck is small where the elements are few:
    it is for images.
    Order of the tolerance, as steps follow it; 1 or 2 calls per step; SDE; data form, or noise form of "gotta_go_fast".
    Source: Lu et al. 2022 (arXiv 2211.01095) and Xue et al. 2023 (arXiv 2309.05019), the pair is this library's; Jolicoeur-Martineau et al.
    2021 (arXiv 2105.14080).

    Args:
        model: as for `run`, asked at any time and for each sample at its own.
        schedule: noise schedule.
        x: the states at `start`, [B, ...].
        noise: int seed (samples 0 .. B-1 of that seed), or noise.per_sample(seed, ids).
        rtol: tolerance relative to x, along the path.
        atol: tolerance where x is small.
        method: "dpm_solver_pp_sde" | "gotta_go_fast".
        eta: tau^2 of the SDE, 1 for the reverse SDE.
        start: first time, with alpha > 0; the schedule's own if None.
        stop: last time, with sigma > 0; the schedule's own if None. What noise is left at the stop stays in x.
        first_step: length of the first step, in half log-SNR or in t; chosen if None.
        max_nfe: calls that no sample exceeds; a step that might is not tried.
        on_limit: "raise" `NonConvergence`, or "return" what there is, see `Solution.status`.

    Returns:
        The solution: x, nfe, rejected, times, status, each per sample.

    Raises:
        TypeError: noise is not a seed or a per-sample source.
        NonConvergence: as of `adaptive`.
        ValueError: as of `adaptive`, or the times go from data to noise.
    """
    choice("method", method, METHODS)
    stochasticity("eta", eta)
    state = started(x)
    batchwide = noise is None or isinstance(noise, torch.Generator) or callable(noise)
    source = None if batchwide and not isinstance(noise, PerSample) else as_source(noise, len(x))
    if not isinstance(source, PerSample):
        raise TypeError(
            f"noise is {type(noise).__name__}: expected an int seed or noise.per_sample(seed, ids), as each sample has steps of its own"
        )
    one_id_each(source.ids, len(x))
    heun = method == "gotta_go_fast"
    form = Form("noise", "t") if heun else Form("data", clock=constant(eta) if eta else None)
    task = task_of(model, schedule, form, state.x, state.input_dtype, start, stop, rtol, atol)
    origin = task.ends[:1]
    refuse_upwards(task.ends)
    limits(first_step, max_nfe, on_limit)

    def clock(at: Levels) -> Tensor:
        if at.clock is None or origin.clock is None:
            return origin.times - at.times
        return torch.expm1(2 * (at.clock - origin.clock))

    wiener = Wiener(Ahead(source, 0.0, x.shape[1:]), partial(in_lanes, clock))
    kind: Method = Adams(task, most=2)
    if heun:
        kind = StochasticHeun(task, noise=wiener, eta=eta)
    elif eta:
        kind = Adams(task, LONGEST / (1 + eta), 2, wiener)
    with torch.no_grad():
        return integrate(kind, state.x, 1, first_step, max_nfe, on_limit, dense=False)


@dataclass(frozen=True)
class StochasticHeun(Method):
    """The pair of Gotta Go Fast: Euler-Maruyama in t, and with the slope at its end Heun, both with the same noise.

    Source: Jolicoeur-Martineau et al. 2021 (arXiv 2105.14080), algorithm 1. Differs: a rejected step has its noise subdivided, where the
    paper draws anew, which favours small noise.
    """

    noise: Wiener = field(kw_only=True)
    eta: float = 1.0

    def first_step(self, front: Front) -> Tensor:
        """That of the paper."""
        return torch.full_like(front.step, FIRST_PART * abs(self.task.places[1] - self.task.places[0]))

    def attempt(self, front: Front) -> Trial:
        """Two slopes, of which the first is at hand."""
        task = self.task
        place, at_end = aim(self, front, GOTTA_GO_FAST)
        end = task.level(place, at_end)
        length = (end.times - front.here.times).abs()
        z = self.noise.normals(front, end)

        def change(at: Levels, x: Tensor, output: Tensor) -> Tensor:
            f, g2 = in_lanes(partial(drift_and_diffusion, task.schedule), at)
            drift = -length * f, -length * (1 + self.eta) / 2 * g2 / at.sigma
            weights = [column(v, x) for v in (*drift, torch.sqrt(self.eta * g2 * length))]
            return weights[0] * x + weights[1] * output + weights[2] * z

        first = change(front.here, front.x, front.outputs[0])
        low = front.x + first
        second = change(end, low, task.ask(low, end.times))
        error = task.ratio((second - first) / 2, task.tolerance(low, end, front.before))
        self.noise.advance(front, end, error <= 1)
        factor = GOTTA_GO_FAST.factor(error, front.error, 1.0)
        made = torch.ones_like(front.order)
        x, order = front.x + (first + second) / 2, front.order
        return Trial(end, at_end, x, low, error, factor, taken=order, order=order, calls=made)

"""Baselines: the probability-flow ODE given to torchdiffeq, and the reverse SDE given to torchsde."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import choice, flag, number, positive, whole
from solvers.control import NonConvergence, Solution, ends_of
from solvers.methods.exponential import Levels
from solvers.methods.stochastic import drift_and_diffusion, stochasticity
from solvers.predictions import AnyModel, as_model, path_derivative, predictor
from solvers.run import started, warn_of_training
from solvers.schedules import Schedule

VARIABLES = ("t", "half_logsnr", "sigma", "angle")
ALIASES = {"lambda": "half_logsnr", "time": "t", "rho": "sigma", "theta": "angle"}


ROUNDING = 1e-5  # of the time at a schedule's ends


class _GaveUp(Exception):
    """A run that leads nowhere; `status` as in `Solution`."""

    def __init__(self, status: str, why: str):
        super().__init__(why)
        self.status = status


class _Equation:
    """What the ODE and the SDE have in common: a variable, and a state in it: x / alpha in sigma, x / sqrt(alpha^2 + sigma^2) in angle, else x."""

    def __init__(
        self, model: AnyModel, schedule: Schedule, variable: str, want: str, dtype: torch.dtype | None
    ):
        self.schedule, self.variable = schedule, choice("variable", variable, VARIABLES, ALIASES)
        self.nfe, self.most, self.finite = 0, math.inf, torch.tensor(True)
        self.bounds = -math.inf, math.inf  # of t: libraries probe behind the stop, and round
        self._predict = predictor(model, schedule, want, dtype=dtype)

    def place(self, t: float) -> Tensor:
        """The variable at a time, float64 [].

        Raises:
            ValueError: it is infinite there.
        """
        at = Levels.at_time(self.schedule, number("t", t))
        place = {
            "t": at.times,
            "half_logsnr": at.half_logsnr,
            "sigma": at.sigma / at.alpha,
            "angle": torch.atan2(at.sigma, at.alpha),
        }[self.variable]
        if not place.isfinite():
            raise ValueError(
                f"t = {t:g}: {self.variable} is infinite there, so no step leads to it; give a time with alpha > 0 and sigma > 0, or "
                "variable='t'"
            )
        return place

    def level(self, place: Tensor) -> Levels:
        """The level where the variable has some value, float64 [1] on the host."""
        v = place.detach().to("cpu", torch.float64).reshape(1)
        if v.isnan():  # the length of a step after outputs that are not finite
            raise _GaveUp("non_finite", "the model's output is not finite")
        if self.variable != "t":
            low, high = sorted((self.schedule.start, self.schedule.stop))
            beyond = torch.tensor([False], device="cpu")
            if self.variable == "angle":
                beyond, v = (
                    v >= math.pi / 2,
                    torch.tan(v.clamp(min=0)),
                )  # alpha = 0 is there, or below the rounding
            v = self.schedule.time(v if self.variable == "half_logsnr" else -torch.log(v))
            inside = v.clamp(low, high)  # libraries round the variable, to float32 too
            v = torch.where((v - inside).abs() <= ROUNDING * high, inside, v)
            v = torch.where(beyond, high, v)
        return Levels.at(self.schedule, v.clamp(*self.bounds))

    def state(self, x: Tensor, t: float) -> Tensor:
        """The state of the equation that x is at a time."""
        return x / self._unit(t).to(x)

    def x(self, state: Tensor, t: float) -> Tensor:
        """The x that a state is at a time."""
        return state * self._unit(t).to(state)

    def _unit(self, t: float) -> Tensor:
        return self._norm(Levels.at_time(self.schedule, t))

    def _norm(self, at: Levels) -> Tensor:
        """What x is divided by in the state."""
        if self.variable == "angle":
            return at.size
        return at.alpha if self.variable == "sigma" else torch.ones_like(at.alpha)

    def _ask(self, x: Tensor, at: Levels) -> Tensor:
        if self.nfe >= self.most:
            raise _GaveUp("max_nfe", f"max_nfe = {self.most} calls did not suffice")
        self.nfe += 1
        output = self._predict(x, at.times)
        self.finite = output.isfinite().all()  # of the last
        return output


class ProbabilityFlow(_Equation):
    """The probability-flow ODE as ODE libraries take it: a function (v, y) -> dy/dv.

    In "t" and "half_logsnr" y is x; in "sigma" v is sigma / alpha and y is x / alpha, so that dy/dv is the noise prediction; in "angle" v is
    arctan(sigma / alpha) and y is x / n with n = sqrt(alpha^2 + sigma^2), so that dy/dv is the velocity over n, and alpha = 0 and sigma = 0
    are regular for a network whose prediction determines it there. torchdiffeq's adaptive methods step past the stop, where a schedule may end, unless they get options={"step_t": the stop's place}.
    Source: Song et al. 2021 (arXiv 2011.13456), eq. 13; in sigma: Karras et al. 2022 (arXiv 2206.00364), eq. 1.

    Args:
        model: as for `run`.
        schedule: noise schedule.
        variable: "t" | "half_logsnr" | "sigma" | "angle".
        dtype: in which the network is called; None for that of y.

    Attributes:
        nfe: model calls made so far.
    """

    def __init__(
        self, model: AnyModel, schedule: Schedule, variable: str = "t", dtype: torch.dtype | None = None
    ):
        want = {"sigma": "noise", "angle": "velocity"}.get(variable, "flow")
        super().__init__(model, schedule, variable, want, dtype)

    def __call__(self, v: Tensor, y: Tensor) -> Tensor:
        """dy/dv, the shape of y [B, ...]."""
        at = self.level(v)
        norm = self._norm(at).to(y)
        slope = self._ask(y * norm, at)
        if self.variable in ("t", "sigma"):
            return slope
        if self.variable == "angle":
            return slope / norm
        alpha_dot, sigma_dot = path_derivative(self.schedule, at.times, at.alpha, at.sigma)
        return slope / (alpha_dot / at.alpha - sigma_dot / at.sigma).to(slope)


class ReverseSDE(_Equation):
    """The reverse SDE as torchsde takes it: drift f and diffusion g on a flat state [B, D], in a variable s that grows towards the data.

    s is -t, half log-SNR, -sigma / alpha, where y is x / alpha, or -arctan(sigma / alpha), where y is x / sqrt(alpha^2 + sigma^2). With eta = tau^2 the marginals are the same for every eta:
    dx = [f x - (1 + eta) / 2 g^2 score] dt + sqrt(eta) g dw; in half log-SNR g^2 dt is 2 sigma^2 dlambda.
    Source: Song et al. 2021 (arXiv 2011.13456), eq. 6.

    Args:
        model: as for `run`.
        schedule: noise schedule.
        shape: of one sample, to which the flat state is brought for the network.
        variable: "t" | "half_logsnr" | "sigma" | "angle".
        eta: 1 for the reverse SDE, 0 for the ODE.
        dtype: in which the network is called; None for that of y.

    Attributes:
        nfe: model calls made so far.
    """

    noise_type, sde_type = "diagonal", "ito"

    def __init__(
        self,
        model: AnyModel,
        schedule: Schedule,
        shape: Sequence[int],
        variable: str = "t",
        eta: float = 1.0,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(model, schedule, variable, "noise", dtype)
        self.shape, self.eta = tuple(shape), stochasticity("eta", eta)

    @property
    def _sign(self) -> float:
        return 1.0 if self.variable == "half_logsnr" else -1.0

    def place(self, t: float) -> Tensor:
        """The variable s at a time, float64 [].

        Raises:
            ValueError: it is infinite there, or, in "angle", the drift is, as alpha = 0.
        """
        place = self._sign * super().place(t)
        if (
            self.variable == "angle"
            and self.schedule.alpha(torch.tensor(float(t), dtype=torch.float64, device="cpu")) == 0
        ):
            raise ValueError(
                f"t = {t:g}: the reverse SDE has an infinite drift there in angle; start where alpha > 0"
            )
        return place

    def f(self, s: Tensor, y: Tensor) -> Tensor:
        """The drift, [B, D]."""
        at = self.level(self._sign * s)
        x = y.reshape(-1, *self.shape) * self._norm(at).to(y)
        noise = self._ask(x, at).reshape(y.shape)
        linear, of_noise = torch.zeros_like(at.sigma), -torch.ones_like(at.sigma)
        if self.variable == "angle":
            linear, of_noise = at.sigma / at.alpha, -at.size / at.alpha
        elif self.variable != "sigma":
            f, square = drift_and_diffusion(self.schedule, at)
            speed = 2 * at.sigma**2 / square if self.variable == "half_logsnr" else 1.0  # -dt / dlambda
            linear, of_noise = -f * speed, -square / at.sigma / 2 * speed
        return linear.to(y) * y + ((1 + self.eta) * of_noise).to(y) * noise

    def g(self, s: Tensor, y: Tensor) -> Tensor:
        """The diffusion, [B, D], the same for all elements."""
        at = self.level(self._sign * s)
        if self.variable in ("sigma", "angle"):
            square = 2 * at.sigma / at.alpha
        elif self.variable == "half_logsnr":
            square = 2 * at.sigma**2
        else:
            square = drift_and_diffusion(self.schedule, at)[1]
        return torch.sqrt(self.eta * square).to(y).expand_as(y)


def odeint(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    method: str = "dopri5",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    *,
    variable: str = "t",
    start: float | None = None,
    stop: float | None = None,
    options: Mapping[str, Any] | None = None,
    max_nfe: int = 100_000,
    grad: bool = False,
) -> Solution:
    """The probability-flow ODE by torchdiffeq: one step for the whole batch, the error's root mean square over all of it.

    On an `Inversion` it encodes. The network is called in the dtype of x; the state is float32 or float64.

    Args:
        model: as for `run`.
        schedule: noise schedule.
        x: the states at `start`, [B, ...].
        method: of torchdiffeq: "dopri5", "bosh3", "dopri8", "adaptive_heun", "fehlberg2", "rk4", "midpoint", ...
        rtol: relative tolerance of adaptive methods.
        atol: absolute tolerance of adaptive methods.
        variable: what is integrated over, see `ProbabilityFlow`. A Discrete schedule has a kink in t at every level: take "half_logsnr" or "angle".
        start: first time; the schedule's own if None.
        stop: last time; the schedule's own if None.
        options: torchdiffeq's, by name, e.g. {"first_step": 0.01}; methods of fixed steps want {"step_size": ...} in the variable. Adaptive
            methods get step_t, without which they step past the stop.
        max_nfe: calls after which to give up.
        grad: keep the gradient graph of all steps, with respect to x and what the model depends on.

    Returns:
        The solution; nfe, rejected and times are the same for all samples.

    Raises:
        ValueError: an unknown method or option, or a variable that is infinite at an end.
        NonConvergence: torchdiffeq gave up (its error is the cause), or max_nfe calls did not suffice; with the state so far.
    """
    import torchdiffeq
    from torchdiffeq._impl.odeint import SOLVERS

    choice("method", method, tuple(SOLVERS))
    whole("max_nfe", max_nfe, 1, 10**9)
    positive(rtol=rtol, atol=atol)
    options = _by_name(options, {"first_step": 0.01})
    state = started(x, flag("grad", grad))
    if not grad:
        warn_of_training(as_model(model))
    flow = ProbabilityFlow(model, schedule, variable, state.input_dtype)
    ends = ends_of(schedule, start, stop)
    if x.numel() == 0 or ends[0] == ends[1]:
        return _same_for_all(state.x, 0, 0, ends[:1])
    places = torch.stack([flow.place(t) for t in ends])
    y, passed = flow.state(state.x, ends[0]), dict(options)
    if "step_size" in passed:
        positive(step_size=passed["step_size"])
    flow.most, flow.bounds = max_nfe, (min(ends), max(ends))
    if grad and method == "scipy_solver":
        raise ValueError(
            "method = 'scipy_solver' with grad=True: scipy keeps no graph; take another method, e.g. 'dopri5'"
        )
    adaptive = "callback_accept_step" in SOLVERS[method].valid_callbacks()
    fixed = "callback_step" in SOLVERS[method].valid_callbacks() and not adaptive
    if adaptive:
        asked_for = torch.as_tensor(passed.get("step_t", []), dtype=torch.float64, device="cpu")
        passed["step_t"] = torch.cat([asked_for, places[1:]]).unique().to(y.device)
    if fixed and not {"step_size", "grid_constructor"} & set(passed):
        length = float(abs(places[1] - places[0]))
        raise ValueError(
            f"method = {method!r} has fixed steps: give their length, e.g. options={{'step_size': {length / 100:.3g}}} for 100 of them"
        )
    if grad and adaptive:  # no gradient by the length of steps, which lead to the same end
        norm = passed.get("norm", lambda y: y.square().mean().sqrt())
        passed["norm"] = lambda y: norm(y.detach())
    accepted: list[tuple[Tensor, Tensor]] = []
    rejected = 0

    def accept(v: Tensor, y: Tensor, dv: Tensor) -> None:
        accepted.append((v, y))

    def reject(v: Tensor, y: Tensor, dv: Tensor) -> None:
        nonlocal rejected
        rejected += 1

    def passed_times() -> list[float]:
        return [ends[0], *(float(flow.level(v).times) for v, _ in accepted if v != places[0])]

    if adaptive:
        flow.callback_accept_step, flow.callback_reject_step = accept, reject  # type: ignore[attr-defined]
    elif fixed:
        flow.callback_step = accept  # type: ignore[attr-defined]
    try:
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.filterwarnings(
                "error", message=".*Unexpected arguments|The following arguments have no effect"
            )
            # torchdiffeq's own
            warnings.filterwarnings("ignore", message=".*have no effect for a chosen solver: `min_step`")
            states = torchdiffeq.odeint(
                flow, y, places.to(y.device), rtol=rtol, atol=atol, method=method, options=passed
            )
        if len(states) < len(places):  # of scipy's only the start came back
            raise _GaveUp("min_step", "scipy did not reach the stop")
        if not states[-1].isfinite().all():
            raise _GaveUp("non_finite", "the result is not finite")
    except UserWarning as error:
        raise ValueError(f"options = {options!r:.200}: {method} does not know them all; {error}") from error
    except (AssertionError, _GaveUp) as error:
        y, times = accepted[-1][1] if accepted else y, passed_times()
        t, status = times[-1], getattr(error, "status", "min_step" if flow.finite else "non_finite")
        status = "max_nfe" if "max_num_steps" in str(error) else status
        raise NonConvergence(
            f"torchdiffeq's {method} in {flow.variable} came to t = {t:g} with {flow.nfe} calls and {rejected} rejected steps: {error!s:.200}; "
            "is the model's output finite, and rtol, atol within reach?",
            _same_for_all(flow.x(y, t), flow.nfe, rejected, times, status),
            [*range(len(x))],
        ) from error
    return _same_for_all(flow.x(states[-1], ends[1]), flow.nfe, rejected, [*passed_times(), ends[1]])


def sdeint(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    noise: int | None = None,
    method: str = "euler",
    steps: int = 100,
    *,
    eta: float = 1.0,
    adaptive: bool = False,
    rtol: float = 1e-2,
    atol: float = 1e-2,
    variable: str = "t",
    start: float | None = None,
    stop: float | None = None,
    options: Mapping[str, Any] | None = None,
    max_nfe: int = 100_000,
) -> Solution:
    """The reverse SDE by torchsde, which takes one step for the whole batch; equal ones in the variable unless `adaptive`.

    Its Brownian path is drawn for the batch: unlike `run`'s noise, a sample's depends on the batch it is in.

    Args:
        model: as for `run`.
        schedule: noise schedule.
        x: the states at `start`, [B, ...].
        noise: int seed of the Brownian path.
        method: of torchsde for diagonal noise: "euler", "milstein", "srk".
        steps: number of equal steps; of the first step of an adaptive run, its part of the way.
        eta: tau^2, 1 for the reverse SDE.
        adaptive: choose steps by torchsde's comparison of one step with two halves.
        rtol: relative tolerance, if adaptive.
        atol: absolute tolerance, if adaptive.
        variable: what is integrated over, see `ReverseSDE`.
        start: first time; the schedule's own if None.
        stop: last time; the schedule's own if None.
        options: torchsde's, by name.
        max_nfe: calls after which to give up.

    Returns:
        The solution, with nfe; torchsde tells neither its steps nor its rejections.

    Raises:
        ValueError: an unknown method, no noise, a variable that is infinite at an end, or times from data to noise.
        NonConvergence: the result is not finite, steps became too short, or max_nfe calls did not suffice.
    """
    import torchsde

    choice("method", method, ("euler", "milstein", "srk"))
    whole("steps", steps, 1, 10**7)
    whole("max_nfe", max_nfe, 1, 10**9)
    positive(rtol=rtol, atol=atol)
    flag("adaptive", adaptive)
    options = _by_name(options, {"grad_free": True})
    if noise is None:
        raise ValueError("sdeint needs noise: sdeint(model, schedule, x, noise=0) seeds its Brownian path")
    whole("noise", noise, 0, 2**63 - 1, example=0)
    state = started(x)
    warn_of_training(as_model(model))
    sde = ReverseSDE(model, schedule, x.shape[1:], variable, eta, state.input_dtype)
    ends = ends_of(schedule, start, stop)
    if x.numel() == 0 or ends[0] == ends[1]:
        return _same_for_all(state.x, 0, 0, ends[:1])
    places = torch.stack([sde.place(t) for t in ends]).to(x.device)
    if places[1] < places[0]:
        raise ValueError(
            f"t from {ends[0]:g} to {ends[1]:g} is from data to noise, where the reverse SDE does not lead: encode with odeint"
        )
    y = sde.state(state.x, ends[0]).reshape(len(x), -1)
    known = {"grad_free"} if method == "milstein" else set()
    if set(options) - known:
        raise ValueError(f"options = {options!r:.200}: {method} knows {sorted(known)}")
    sde.most, sde.bounds = max_nfe, (min(ends), max(ends))
    path = torchsde.BrownianInterval(
        places[0], places[1], size=y.shape, dtype=y.dtype, device=y.device, entropy=noise,
        levy_area_approximation="space-time" if method == "srk" else "none",
        dt=float(places[1] - places[0]) / steps,
    )  # fmt: skip
    length = places[1] - places[0]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Hitting minimum")
            warnings.filterwarnings("ignore", message="Numerical solution is not guaranteed")
            end = torchsde.sdeint(
                sde, y, places, bm=path, method=method, dt=float(length) / steps * (1 + 1e-12), adaptive=adaptive, rtol=rtol, atol=atol,
                dt_min=1e-9 * float(length), options=options,
            )[-1]  # fmt: skip
    except (UserWarning, AssertionError, _GaveUp) as error:
        start_only = _same_for_all(
            state.x,
            sde.nfe,
            0,
            ends[:1],
            getattr(error, "status", "min_step" if sde.finite else "non_finite"),
        )
        raise _sde_gave_up(method, sde, str(error), start_only) from error
    result = _same_for_all(sde.x(end.reshape(x.shape), ends[1]), sde.nfe, 0, ends)
    if not end.isfinite().all():
        raise _sde_gave_up(
            method, sde, "the result is not finite", replace(result, status=["non_finite"] * len(x))
        )
    return result


def _sde_gave_up(method: str, sde: ReverseSDE, why: str, solution: Solution) -> NonConvergence:
    return NonConvergence(
        f"torchsde's {method} in {sde.variable} gave up after {sde.nfe} calls: {why}; is the model's output finite, and rtol, atol within reach?",
        solution,
        [*range(len(solution.x))],
    )


def _by_name(options: Mapping[str, Any] | None, example: Mapping[str, Any]) -> dict[str, Any]:
    """A library's own options."""
    if not isinstance(options, Mapping | None):
        raise TypeError(f"options = {options!r:.100}: expected a dict by name, e.g. {example}")
    return dict(options or {})


def _same_for_all(x: Tensor, nfe: int, rejected: int, times: list[float], status: str = "done") -> Solution:
    """A solution whose samples have all taken the same steps."""
    batch = len(x)
    calls, rejects = (torch.full((batch,), count, device="cpu") for count in (nfe, rejected))
    every = torch.tensor(times, dtype=torch.float64, device="cpu")
    error = torch.full((batch,), torch.nan, dtype=torch.float64, device="cpu")
    return Solution(x, calls, rejects, [every] * batch, [status] * batch, error, [[] for _ in range(batch)])

"""Log-densities by the probability-flow ODE, by any solver of the library."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import flag
from solvers.decoder import Decoder, gaussian
from solvers.elements import elements, inner
from solvers.jacobian import Divergence, as_divergence, attached, with_products
from solvers.latents import DOPRI5, Solver, ends_of_solver
from solvers.methods.exponential import Levels
from solvers.noise import Noise, as_source, drawn, noised
from solvers.plan import Plan
from solvers.predictions import AnyModel, Model, as_model, checked_outputs, predictor
from solvers.run import run, started, warn_of_training
from solvers.schedules import Inversion, Schedule


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """A log-density in its terms, in nats, float64; entry i of each is of sample i.

    Attributes:
        prior: log-density of the latent, [B].
        volume: log |det dz/dx| of the map from x to its latent z, [B].
        reconstruction: log p(x_0 | x_stop), [B]; 0 where x is at `stop` itself.
        entropy: -log q(x_stop | x_0), [B]; 0 where x is at `stop` itself.
        standard_error: of volume, over the probes of `hutchinson`, [B]; 0 if exact, NaN of a single probe.
        latent: z, [B, ...].
        nfe: model calls of each sample, [B].
    """

    prior: Tensor
    volume: Tensor
    reconstruction: Tensor
    entropy: Tensor
    standard_error: Tensor
    latent: Tensor
    nfe: Tensor

    @property
    def log_p(self) -> Tensor:
        """The sum of the four terms, [B]."""
        return self.prior + self.volume + self.reconstruction + self.entropy

    def __repr__(self) -> str:
        count, mean = len(self.prior), self.log_p.detach().mean()
        return f"LogLikelihood({count} samples, {mean:.6g} nats on average; nfe: {int(self.nfe.sum()) / max(count, 1):g})"


def log_likelihood(
    model: AnyModel,
    schedule: Schedule,
    x: Tensor,
    divergence: Divergence | None = None,
    solver: Solver = DOPRI5,
    *,
    noise: Noise | None = None,
    decoder: Decoder | None = None,
    prior: Callable[[Tensor], Tensor] | None = None,
    start: float | None = None,
    stop: float | None = None,
    grad: bool = False,
) -> LogLikelihood:
    """The log-density that the probability-flow ODE gives to x: log p(x) = log prior(z) + log |det dz/dx|, z the latent of x.

    Along the ODE d log |det dw/dx| / dtheta is the divergence of dw/dtheta, w = x / n, n = sqrt(alpha^2 + sigma^2), theta = arctan(sigma /
    alpha): there the linear part is in n, exactly. It is integrated as one more element of x for each probe, by any solver of this library.
    Of a plan with the `exact` divergence the answer is the plan's own: its Jacobian goes through its rows, 1 + d states for one, and exp(log_p) is
    the density of what the inverse of its map makes of the prior. Where the map is one to one it has integral 1, for any number of steps; where
    steps are so long that it folds, a latent has several x, and each counts.
    Source: Chen et al. 2018 (arXiv 1806.07366), theorem 1; Song et al. 2021 (arXiv 2011.13456), appendix D.2; bound: Lu et al. 2022 (arXiv
    2206.08265), section 6.

    Args:
        model: as for `run`; the network must let gradients through, and treat each sample by itself.
        schedule: noise schedule.
        x: states at `stop`, [B, ...]; with `noise` the data themselves. float32 or float64.
        divergence: `exact()`, which is the default, or `hutchinson(probes, distribution)`.
        solver: (model, schedule, x, start=, stop=) -> Solution, asked for the `Inversion` of the schedule: functools.partial(sv.odeint, rtol=1e-8,
            atol=1e-8, variable="angle"), sv.adaptive, ...; by default `odeint` in the angle with tolerance 1e-5. Or a plan for sv.Inversion(schedule).
        noise: None for the density of the states at `stop`. A noise source, a torch.Generator or an int seed draws x_stop = alpha x + sigma eps, and the
            terms reconstruction and entropy make log_p a bound: its mean over noise is at most the log-density that the decoder and the ODE together give to x,
            and its mean over the data too at most that of the data themselves.
        decoder: p(x_0 | x_stop), with `noise` alone.
        prior: log-density of latents, [B, ...] -> [B]; by default N(0, sigma(start)^2), which `sample` starts from.
        start: time of the latent; the schedule's own if None, or the plan's.
        stop: time of x; the schedule's own if None, or the plan's.
        grad: keep the gradient graph, with respect to x and the network's parameters; the solver must take grad=True, as `odeint` and plans do.

    Returns:
        The terms, their sum `log_p` in nats, and the standard error over the probes.

    Raises:
        TypeError: x is in half precision, where a density would lose its digits.
        ValueError: no gradient flows through the network; more elements than `exact` takes; a plan that is not for the `Inversion`.
    """
    divergence, model, inverse = as_divergence(divergence), as_model(model), Inversion(schedule)
    first, last = ends_of_solver(schedule, solver, start, stop)
    if isinstance(solver, Plan):
        _check_plan(solver, divergence)
    if decoder is not None and noise is None:
        raise ValueError(
            "decoder without noise: without it the density is that of states at stop, which nothing decodes; give noise=0, or leave decoder out"
        )
    if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"x has dtype {x.dtype}, in which a density has no digits: pass x.float(), and let the network cast it"
        )
    if not flag("grad", grad):
        warn_of_training(model)
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        state = started(x, grad).x
        nothing = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        reconstruction, entropy = nothing, nothing
        if len(x) == 0:
            return LogLikelihood(nothing, nothing, nothing, nothing, nothing, state, nothing.long())
        if noise is not None:
            eps = drawn(as_source(noise, len(x)), 0, state)
            state, data = noised(state, schedule, last, eps), state
            at = Levels.at_time(schedule, last)
            if at.sigma == 0:
                raise ValueError(
                    f"sigma = 0 at stop = {last:g}: the states there are the data, and need no noise; leave noise out"
                )
            mean = predictor(model, schedule, "data")(state, at.times)
            reconstruction = (decoder or Decoder()).log_p(data, mean, float(at.sigma / at.alpha))
            entropy = d_log(state, at.sigma) - gaussian(eps)
        directions = divergence.directions(state)
        if isinstance(solver, Plan) and divergence.is_exact:
            latent, volume, nfe = _of_plan(model, solver, state, directions[0], grad)
        else:
            latent, volume, nfe = _of_ode(model, inverse, solver, state, directions, (last, first), grad)
        deviation = Levels.at_time(schedule, first).sigma
        density = (
            _density(prior, latent)
            if prior
            else gaussian(latent / deviation.to(latent)) - d_log(latent, deviation)
        )
        return LogLikelihood(
            density.double(),
            volume.mean(0),
            reconstruction,
            entropy,
            divergence.standard_error(volume.detach()),
            latent,
            nfe if noise is None else nfe + 1,  # the decoder's
        )


def _of_plan(model: Model, plan: Plan, x: Tensor, unit: Tensor, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The latent, log |det| of a plan's map [1, B], and calls: its rows carry x and the d tangents of x, [B, 1 + d, ...], as they would x."""

    def prediction(x: Tensor, *given: Any) -> Tensor:
        return checked_outputs(model, model.net(x, *given), x, f"a plan from t = {plan.times[0]:g}")[0]

    def net(states: Tensor, *given: Any) -> Tensor:
        m, jacobian = with_products(lambda x: prediction(x, *given), states[:, 0], unit, grad)
        tangents = torch.einsum("kbi,bji->bjk", elements(jacobian, 2), elements(states[:, 1:], 2))
        return torch.cat([m[:, None], tangents.reshape(states[:, 1:].shape)], 1)

    start = torch.cat([x[:, None], unit.transpose(0, 1).expand(len(x), *unit.shape[:1], *x.shape[1:])], 1)
    end = run(plan, replace(model, net=net, variance=None), start, grad=grad)
    volume = torch.linalg.slogdet(elements(end[:, 1:], 2).double()).logabsdet
    return end[:, 0], volume[None], torch.full((len(x),), plan.nfe, device="cpu")


def _of_ode(
    model: Model,
    inverse: Schedule,
    solver: Solver,
    x: Tensor,
    directions: Tensor,
    ends: tuple[float, float],
    grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The latent, log |det| along each group of directions [G, B], and calls: each volume, times n, is one more element of x."""
    velocity = predictor(replace(model, net=attached(model.net)), inverse, "velocity")
    d, times = x[0].numel(), torch.zeros(0, device="cpu")

    def label(t: Tensor) -> Tensor:
        """The number of each time, by which the network finds it with all its digits."""
        nonlocal times
        times = t
        return torch.arange(len(t), device="cpu")

    def net(states: Tensor, number: Tensor) -> Tensor:
        t = times[number.cpu()]
        if directions.shape[2] not in (1, len(states)):
            raise ValueError(
                f"the solver asks for {len(states)} of {len(x)} samples, but every sample has directions of its own: let all take the same steps, e.g. "
                "functools.partial(sv.adaptive, coupled=True), or take exact()"
            )
        here, along = states[:, :d].reshape(-1, *x.shape[1:]), directions.flatten(0, 1)
        v, rows = with_products(lambda x: velocity(x, t), here, along, grad)
        traces = inner(rows, along, x).unflatten(0, directions.shape[:2]).sum(1)
        n = Levels.at(inverse, t).size.to(v)
        return torch.cat([elements(v), (n * traces).T], 1)

    start = torch.cat([elements(x), x.new_zeros(len(x), len(directions))], 1)
    augmented = Model(net, predicts="velocity", label=label)
    if isinstance(solver, Plan):
        end, nfe = run(solver, augmented, start, grad=grad), torch.full((len(x),), solver.nfe, device="cpu")
    else:
        solution = solver(
            augmented, inverse, start, start=ends[0], stop=ends[1], **({"grad": True} if grad else {})
        )
        end, nfe = solution.x, solution.nfe
    before, behind = (Levels.at_time(inverse, t).size for t in ends)
    volume = end[:, d:].double().T / behind.to(x.device) + d_log(x, behind / before)
    return end[:, :d].reshape(x.shape), volume, nfe


def _density(prior: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """What a prior says of latents [B, ...], its contract checked."""
    log_p = prior(z)
    if not isinstance(log_p, Tensor) or log_p.shape != z.shape[:1]:
        came = f"shape {list(log_p.shape)}" if isinstance(log_p, Tensor) else type(log_p).__name__
        raise ValueError(
            f"prior gave {came}: expected the log-density of each latent, [{len(z)}], summed over its elements"
        )
    return log_p


def d_log(x: Tensor, factor: Tensor) -> Tensor:
    """The logarithm of the volume by which a factor stretches samples like those of x: d log(factor)."""
    return math.prod(x.shape[1:]) * torch.log(factor).to(x.device)


def _check_plan(plan: Plan, divergence: Divergence) -> None:
    """Rows with a constant do not carry tangents as they carry x, nor those of single elements a volume."""
    if plan.shift.numel() or (plan.element_shape and not divergence.is_exact):
        raise ValueError(
            "the plan's coefficients are per element, or add a constant: expected one of numbers alone, which carries volumes as it carries x"
        )

"""k-diffusion and ComfyUI: our methods as functions like sample_dpmpp_2m, and their denoisers as (model, schedule)."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import numbers
from solvers.grids import given
from solvers.methods.unipc import calls_of_steps, first_calls
from solvers.noise import Noise
from solvers.plan import Plan
from solvers.predictions import Model
from solvers.run import run
from solvers.schedules import EDM, Schedule

VARIANCE_EXPLODING = EDM()  # x = x_0 + sigma eps


def sampler(method: Callable[..., Plan], schedule: Schedule = VARIANCE_EXPLODING) -> Callable[..., Tensor]:
    """A method as a function f(model, x, sigmas, extra_args=None, callback=None, disable=None, ...) to stand where sample_dpmpp_2m does.

    f takes besides: noise_sampler, (sigma, sigma_next) -> standard normals like x, as k-diffusion's; or noise, as of `run`; with neither a stochastic
    method takes the "seed" of extra_args, which ComfyUI gives, one stream a sample; all else are options of the method. callback is called at the first call of each step with
    x, i, sigma, sigma_hat and denoised. f returns x in its dtype; what is between is float32, or float64 for float64 x. sigmas are read from the
    device once.

    Args:
        method: (schedule, times, **options) -> Plan of one step for each sigma; the plan is built from sigmas in every call of f.
        schedule: EDM() for x = x_0 + sigma eps, as k-diffusion has it; Flow() for ComfyUI's flow models, where x = (1 - sigma) x_0 + sigma eps.

    Raises:
        TypeError: method is not callable.
        ValueError: t is not sigma on the schedule.
    """
    if not callable(method):
        raise TypeError(
            f"method = {method!r:.100}: expected (schedule, times, **options) -> Plan, e.g. sv.dpm_solver_pp"
        )
    probe = torch.tensor([0.25, 0.75], dtype=torch.float64, device="cpu")
    if not torch.equal(schedule.sigma(probe), probe):
        raise ValueError(f"schedule = {schedule!r:.100}: expected one whose t is sigma, EDM() or Flow()")

    @torch.no_grad()
    def sample(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        noise_sampler: Callable[[Tensor, Tensor], Tensor] | None = None,
        noise: Noise | None = None,
        **options: Any,
    ) -> Tensor:
        extra = dict(extra_args or {})
        try:
            times = given(schedule, numbers("sigmas", sigmas))
        except ValueError as error:
            raise ValueError(str(error).replace("times", "sigmas")) from None
        plan = method(schedule, times, **options)
        if noise is not None and noise_sampler is not None:
            raise ValueError("noise and noise_sampler are both given: expected one of them")
        if plan.is_stochastic and noise_sampler is not None:
            noise = _as_source(noise_sampler, plan, times)
        elif plan.is_stochastic and noise is None and isinstance(extra.get("seed"), int):
            noise = extra["seed"] % 2**63  # ComfyUI's are below 2^64
        steps = {call: i for i, call in enumerate(first_calls(plan, times).tolist())}
        done = 0

        def net(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal done
            x = x if callback is None else x.clone()  # for the callback to keep
            denoised = model(x, sigma, **extra)
            if callback is not None and done in steps:
                i = steps[done]
                callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigma[0], "denoised": denoised})
            done += 1
            return denoised

        if plan.is_stochastic and noise is None:
            raise ValueError(
                "the method is stochastic and needs noise: give noise=0, a noise_sampler, or extra_args={'seed': 0}"
            )
        progress = sys.stderr.isatty() if disable is None else not disable
        return run(plan, Model(net, predicts="data"), x, noise, progress=progress).to(x.dtype)

    return sample


def from_denoiser(
    model: Callable[..., Tensor],
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    extra_args: Mapping[str, Any] | None = None,
) -> tuple[Model, EDM]:
    """A denoiser of k-diffusion, model(x, sigma, **extra_args) -> denoised, to be run by this library.

    Args:
        model: its wrappers (CompVisDenoiser, VDenoiser, Denoiser, ...) or any other such function.
        sigma_min: of the schedule; by default the model's own attribute.
        sigma_max: as sigma_min. x at the start is sigma_max times standard normals.
        extra_args: what the model is given besides.

    Returns:
        (model, schedule).

    Raises:
        ValueError: the model does not say what its least and greatest sigma are, and neither do you.
    """
    ends = {}
    for name, value in (("sigma_min", sigma_min), ("sigma_max", sigma_max)):
        found = getattr(model, name, None) if value is None else value
        if found is None:
            raise ValueError(
                f"the model has no {name}: say what it was trained from and to, e.g. from_denoiser(model, sigma_min=0.03, sigma_max=14.6)"
            )
        ends[name] = float(found)
    extra = dict(extra_args or {})
    return Model(lambda x, sigma: model(x, sigma, **extra), predicts="data"), EDM(**ends)


def _as_source(
    noise_sampler: Callable[[Tensor, Tensor], Tensor], plan: Plan, times: Tensor
) -> Callable[[int, Tensor], Tensor]:
    """k-diffusion's noise over an interval as a draw: over the whole step if it has no other, else over the row that draws it."""
    rows = torch.tensor([i for i, last in enumerate(plan.pattern.last_draw) if last >= i], device="cpu")
    steps = torch.searchsorted(calls_of_steps(plan, times), rows, right=True) - 1
    alone = torch.bincount(steps, minlength=len(times))[steps] == 1
    begin = torch.where(alone, times[steps], plan.times[rows])
    end = torch.where(alone, times[steps + 1], plan.times[rows + 1])
    intervals = dict(zip(rows.tolist(), torch.stack([begin, end], 1), strict=True))
    if len({tuple(interval.tolist()) for interval in intervals.values()}) < len(intervals):
        raise ValueError(
            "the method draws twice over one interval of sigma, which a noise_sampler cannot tell apart: give noise=0 in its place"
        )

    def source(draw: int, like: Tensor) -> Tensor:
        return noise_sampler(*intervals[draw].to(like)).to(like)

    return source

"""Predictor-corrector sampling: Langevin steps at each time, of a length that the score of each sample sets."""

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.arguments import choice, positive, whole
from solvers.loop import State, execute
from solvers.noise import Brownian, Noise, as_source, drawn
from solvers.plan import Plan
from solvers.predictions import AnyModel, as_model
from solvers.rows import rows_of
from solvers.run import started, warn_of_training

NORMS = ("sample", "batch")


def predictor_corrector(
    plan: Plan,
    model: AnyModel,
    x: Tensor,
    noise: Noise,
    snr: float = 0.16,
    corrections: int = 1,
    norms: str = "sample",
    denoise: bool = True,
    progress: bool = False,
) -> Tensor:
    """Each row of a plan preceded by Langevin steps x <- x + e s + sqrt(2 e) z at its time, s the score of the model.

    e = 2 (alpha_s / alpha_t)^2 (snr ||z|| / ||s||)^2 with the norms of each sample, so that a sample does not depend on its batch;
    s and t are the row's times, and with steps as small as training's that factor is score SDE's alpha_i. A step depends on the
    state, so this is no table: it has a loop of its own. Calls: 1 + corrections for each row.
    A step that follows the sample's own draw and score changes its law, by about 4 / d of the variance for d elements: little for images,
    much for a few elements, which want norms = "batch", the means over the batch as in the source.
    Source: Song et al. 2021 (arXiv 2011.13456), algorithms 4 and 5. Differs: the norms of each sample are the default.

    Args:
        plan: the predictor; rows that read no earlier call or draw, e.g. reverse_diffusion, ddpm, euler_maruyama.
        model: as for `run`.
        x: the state at plan.times[0], [B, ...].
        noise: an int seed, a torch.Generator or a noise source.
        snr: signal-to-noise ratio r of the Langevin steps; 0.16 on images of VE, 0.01 or less is usual on VP.
        corrections: Langevin steps at each time.
        norms: "sample" | "batch", whose norms set the length of a step; "batch" makes samples depend on their batch.
        denoise: whether the last row leaves its noise out.
        progress: show a progress bar.

    Returns:
        The state at plan.times[-1], [B, ...], float32 or float64.

    Raises:
        ValueError: the plan's rows read earlier calls, or the model's prediction does not determine the score.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is {type(plan).__name__}: expected a Plan, e.g. reverse_diffusion(schedule, times)"
        )
    positive(snr=snr)
    whole("corrections", corrections, 0, 10**6)
    choice("norms", norms, NORMS)
    if plan.window > 1 or plan.c.shape[1] > 1 or not plan.is_called.all():
        raise ValueError(
            "the plan's rows read earlier calls, which a correction makes worthless, or make none: expected a one-call method, e.g. "
            "reverse_diffusion, ddpm, ddim"
        )
    if isinstance(noise, Brownian):
        raise ValueError(
            "noise is a Brownian path, which has no draws for corrections: expected an int seed, per_sample or a torch.Generator"
        )
    model, state, source, per_row = as_model(model), started(x), as_source(noise, len(x)), 1 + corrections
    warn_of_training(model)
    if len(state.x) == 0:
        return state.x
    if denoise:
        plan = _without_last_noise(plan)
    rows, probe = rows_of(plan, model, state.x), _noise_of(plan)
    probes = rows_of(probe, model, state.x)
    lengths = (2 * (snr * plan.alpha[:-1] / plan.alpha[1:]) ** 2).tolist()
    x, sigma = state.x, plan.sigma.tolist()

    def numbered(draw: int, like: Tensor) -> Tensor:
        return source(per_row * draw, like)

    with torch.no_grad():
        for i in tqdm(range(plan.rows), disable=not progress, unit="row"):
            for k in range(corrections):
                there = State(x.clone(), i, input_dtype=state.input_dtype)
                score = execute(probe, model, there, None, probes, i + 1) / -sigma[i]
                z = drawn(source, per_row * i + 1 + k, score)
                sizes = [_norm(z), _norm(score)]
                if norms == "batch":
                    sizes = [size.mean(0, keepdim=True) for size in sizes]
                step = lengths[i] * (sizes[0] / sizes[1]) ** 2
                step = torch.where(
                    step.isfinite(), step, 0.0
                )  # where the score is 0 there is no length to go by
                x = x + step * score + torch.sqrt(2 * step) * z
            here = State(x, i, input_dtype=state.input_dtype)
            x = execute(plan, model, here, numbered if plan.is_stochastic else None, rows, i + 1)
    return x


def _without_last_noise(plan: Plan) -> Plan:
    c, variances = plan.c.clone(), plan.variances.clone()
    c[-1:], variances[-1:] = 0.0, 0.0
    return replace(plan, c=c, variances=variances, consistent=False)


def _noise_of(plan: Plan) -> Plan:
    """A plan whose rows leave the noise prediction itself in the place of x."""
    nothing = plan.a[:0]
    a, b = torch.zeros_like(plan.a), torch.ones_like(plan.b)
    as_noise = replace(plan, predicts="noise", scale=1.0, consistent=False)
    return replace(as_noise, a=a, b=b, c=nothing, variances=nothing, second="")


def _norm(x: Tensor) -> Tensor:
    """Of each sample, [B, 1, ...]."""
    return torch.linalg.vector_norm(x.reshape(len(x), -1), dim=1).reshape(-1, *[1] * (x.ndim - 1))

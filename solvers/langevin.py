"""Predictor-corrector sampling: Langevin steps at each time, of a length that the score of each sample sets."""

from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from solvers.arguments import positive, whole
from solvers.noise import Noise, as_source
from solvers.plan import Plan
from solvers.predictions import AnyModel
from solvers.run import State, run


def predictor_corrector(
    plan: Plan,
    model: AnyModel,
    x: Tensor,
    noise: Noise,
    snr: float = 0.16,
    corrections: int = 1,
    denoise: bool = True,
    progress: bool = False,
) -> Tensor:
    """Each row of a plan preceded by Langevin steps x <- x + e s + sqrt(2 e) z at its time, s the score of the model.

    e = 2 (alpha_s / alpha_t)^2 (snr ||z|| / ||s||)^2 with the norms of each sample, so that a sample does not depend on its batch;
    s and t are the row's times, and with steps as small as training's that factor is score SDE's alpha_i. A step depends on the
    state, so this is no table: it has a loop of its own. Calls: 1 + corrections for each row.
    Source: Song et al. 2021 (arXiv 2011.13456), algorithms 4 and 5. Differs: there the norms are means over the batch.

    Args:
        plan: the predictor; rows that read no earlier call or draw, e.g. reverse_diffusion, ddpm, euler_maruyama.
        model: as for `run`.
        x: the state at plan.times[0], [B, ...].
        noise: an int seed, a torch.Generator or a noise source.
        snr: signal-to-noise ratio r of the Langevin steps; 0.16 on images of VE, 0.01 or less is usual on VP.
        corrections: Langevin steps at each time.
        denoise: whether the last row leaves its noise out.
        progress: show a progress bar.

    Returns:
        The state at plan.times[-1], [B, ...], float32 or float64.

    Raises:
        ValueError: the plan's rows read earlier calls, or the model's prediction does not determine the score.
    """
    positive(snr=snr)
    whole("corrections", corrections, 0, 10**6)
    if plan.window > 1 or plan.c.shape[1] > 1 or not plan.is_called.all():
        raise ValueError(
            "the plan's rows read earlier calls, which a correction makes worthless: expected a one-call method, e.g. "
            "reverse_diffusion, ddpm, ddim"
        )
    source, per_row = as_source(noise, len(x)), 1 + corrections
    x, dtype = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), x.dtype
    for i in tqdm(range(plan.rows), disable=not progress, unit="row"):
        row, sigma = plan[i : i + 1], float(plan.sigma[i])
        length = 2 * float(plan.alpha[i] / plan.alpha[i + 1]) ** 2 * snr**2
        for k in range(corrections):
            score = run(_noise_of(row), model, State(x, input_dtype=dtype)) / -sigma
            z = source(per_row * i + 1 + k, score)
            step = length * (_norm(z) / _norm(score)) ** 2
            step = torch.where(step.isfinite(), step, 0.0)  # where the score is 0 there is no length to go by
            x = x + step * score + torch.sqrt(2 * step) * z
        if denoise and i == plan.rows - 1:
            row = replace(row, c=row.c[:, :0], variances=row.a[:0], consistent=False)
        x = run(row, model, State(x, input_dtype=dtype), lambda draw, like, i=i: source(per_row * i, like))
    return x


def _noise_of(row: Plan) -> Plan:
    """A row that leaves the noise prediction itself in the place of x."""
    zero, one = torch.zeros_like(row.a), torch.ones_like(row.b)
    return replace(
        row, a=zero, b=one, c=row.c[:, :0], predicts="noise", scale=1.0, variances=zero[:0], consistent=False
    )


def _norm(x: Tensor) -> Tensor:
    """Of each sample, [B, 1, ...]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).reshape(-1, *[1] * (x.ndim - 1))

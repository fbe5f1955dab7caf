"""Networks of EDM, score_sde and flow matching as (model, schedule)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import whole
from solvers.grids import given, karras
from solvers.predictions import Model
from solvers.schedules import EDM, VE, VP, Flow, Schedule, SubVP, host

AGREEMENT = 1e-5  # of a schedule with what another library computes in float32


def from_edm(
    net: Any, class_labels: Tensor | None = None, sigma_min: float = 0.002, sigma_max: float = 80.0
) -> tuple[Model, EDM]:
    """A network of EDM, net(x, sigma, class_labels) -> denoised, whatever its preconditioning.

    Its samples on `edm_grid(net)` by `heun` are those of edm_sampler.
    Source: Karras et al. 2022 (arXiv 2206.00364) and its released code.

    Args:
        net: with sigma_min, sigma_max and round_sigma.
        class_labels: [B, label_dim], or None.
        sigma_min: of the schedule; raised to the network's own.
        sigma_max: of the schedule; lowered to the network's own. x at the start is that times standard normals; of a network that rounds,
            edm_grid(net)(schedule, steps)[0] times.

    Returns:
        (model, schedule): a model that predicts data, and reads sigma. Asking it at a sigma that it would round is an error.

    Raises:
        TypeError: net lacks one of those.
    """
    lacking = [name for name in ("sigma_min", "sigma_max", "round_sigma") if not hasattr(net, name)]
    if lacking or not callable(net):
        raise TypeError(
            f"net is {type(net).__name__}, without {', '.join(lacking) or 'a call'}: expected an EDM network net(x, sigma, class_labels) with sigma_min, "
            "sigma_max and round_sigma; of another denoiser D(x, sigma) make Model(net, predicts='data')"
        )
    schedule = EDM(max(sigma_min, float(net.sigma_min)), min(sigma_max, float(net.sigma_max)))

    def label(t: Tensor) -> Tensor:
        told = _rounded(net, t)
        off = (told - t).abs() > 1e-6 * t  # it knows its levels in float32
        if off.any():
            raise ValueError(
                f"the network would take sigma = {t[off][0]:g} for {told[off][0]:g}: stand on its levels, grid=edm_grid(net), by a method whose "
                "stages are on the grid"
            )
        return told

    def asked(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x, sigma) if class_labels is None else net(x, sigma, class_labels)

    return Model(asked, predicts="data", label=label), schedule


def edm_grid(net: Any, rho: float = 7.0) -> Callable[[Schedule, int], Tensor]:
    """EDM's grid as (schedule, steps) -> times [steps + 1]: `steps` calls in Karras spacing, rounded as the network rounds, and then sigma = 0."""

    def grid(schedule: Schedule, steps: int) -> Tensor:
        whole("steps", steps, 1, 10**6, example=18)
        first = host(schedule.start)[None]
        calls = karras(schedule, steps - 1, rho=rho) if steps > 1 else first
        return given(schedule, torch.cat([_rounded(net, calls), torch.zeros_like(first)]))

    return grid


def _rounded(net: Any, sigma: Tensor) -> Tensor:
    """What the network makes of each sigma, float64 on the host, where its buffers may not be."""
    weight = next(iter(net.parameters()), sigma) if hasattr(net, "parameters") else sigma
    # float64 is not on every device, and what is not rounded keeps its digits
    told = host(net.round_sigma(sigma.to(weight.device, torch.float32))).reshape(sigma.shape)
    return torch.where((told - sigma).abs() <= 1e-6 * sigma, sigma, told)


def from_score(score: Callable[[Tensor, Tensor], Tensor], sde: Any) -> tuple[Model, Schedule]:
    """A score network of score_sde, score(x, t), with the sde it was trained on: VPSDE, subVPSDE or VESDE.

    The schedule is the one whose alpha and sigma are those of sde.marginal_prob: the library's formulas are compared with it, not its name.
    Source: Song et al. 2021 (arXiv 2011.13456) and its released code, whose get_score_fn(sde, net, continuous=True) gives such a function.

    Args:
        score: (x [B, ...], t [B]) -> the score, [B, ...], t in (0, 1].
        sde: with marginal_prob(x, t) -> (mean, std) and beta_0, beta_1 or sigma_min, sigma_max (discrete_sigmas of a VESDE).

    Returns:
        (model, schedule). x at the start is schedule.sigma(1) times standard normals.

    Raises:
        ValueError: the sde is none of those.
    """
    candidates: list[Schedule] = []
    if hasattr(sde, "beta_0") and hasattr(sde, "beta_1"):
        betas = float(sde.beta_0), float(sde.beta_1)
        candidates = [VP(*betas), SubVP(*betas)]
    elif hasattr(sde, "sigma_min") and hasattr(sde, "sigma_max"):
        candidates = [VE(float(sde.sigma_min), float(sde.sigma_max), stop=1e-5)]
    t = torch.tensor([0.01, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64, device="cpu")
    marginal = getattr(sde, "marginal_prob", None)
    if marginal is not None:
        ones = torch.ones(len(t), 1, 1, 1, dtype=t.dtype, device="cpu")
        try:
            alpha, sigma = marginal(ones, t)
        except RuntimeError:  # of vectors, not images
            alpha, sigma = marginal(ones[:, :, 0, 0], t)
        for schedule in candidates:
            pairs = (schedule.alpha(t), host(alpha).flatten()), (schedule.sigma(t), host(sigma).flatten())
            if all(torch.allclose(mine, theirs, rtol=AGREEMENT, atol=0) for mine, theirs in pairs):
                return Model(score, predicts="score"), schedule
    raise ValueError(
        f"sde = {sde!r:.100}: expected a VPSDE, subVPSDE or VESDE of score_sde, with marginal_prob as VP, SubVP or VE have it; of another make "
        "Model(score, predicts='score') and its schedule"
    )


def from_flow(
    velocity: Callable[[Tensor, Tensor], Tensor], noise_at: float = 1.0, shift: float = 1.0
) -> tuple[Model, Flow]:
    """A flow-matching network of the straight path, in either direction of time.

    Source: Lipman et al. 2023 (arXiv 2210.02747), where noise is at 0; Liu et al. 2023 (arXiv 2209.03003); Stable Diffusion 3 has noise at 1.

    Args:
        velocity: (x [B, ...], t [B]) -> dx/dt, [B, ...]: eps - x_0 with noise at 1, x_0 - eps with noise at 0.
        noise_at: 1 or 0, the network's time of pure noise; the data are at the other end.
        shift: of the schedule, whose grids are then denser at noise; the network is told the time it was trained on.

    Returns:
        (model, schedule). x at the start is standard normals.

    Raises:
        ValueError: noise_at is neither 0 nor 1.
    """
    if noise_at not in (0, 1):
        raise ValueError(f"noise_at = {noise_at!r}: expected 1 or 0, the time at which x is pure noise")
    schedule = Flow(shift)
    if noise_at == 1:
        return Model(velocity, predicts="flow", label=schedule.sigma), schedule
    return Model(lambda x, t: -velocity(x, t), predicts="flow", label=schedule.alpha), schedule

"""Samplers of other libraries by name, and how to run one with a network and a grid.

    peer = PEERS["diffusers DPM++ 2"]
    end = peer.run(network, x, peer.grid(20))

Nothing is imported before it is used: `found` tells which of them are installed.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

import solvers as sv

Network = Callable[[Tensor, Tensor], Tensor]
MODULES = {"k-diffusion": "k_diffusion", "diffusers": "diffusers", "torchdiffeq": "torchdiffeq"}


@cache
def k_diffusion() -> ModuleType:
    """sampling.py of the installed k-diffusion, alone: its package imports CLIP, scikit-image and more, which no sampler uses."""
    package, utils = ModuleType("k_diffusion"), ModuleType("k_diffusion.utils")
    utils.append_dims = lambda x, ndim: x[(..., *[None] * (ndim - x.ndim))]  # type: ignore[attr-defined]
    where = find_spec("k_diffusion")
    if where is None or not where.submodule_search_locations:
        raise ImportError("k-diffusion is not installed: pip install --no-deps k-diffusion==0.1.1.post1")
    package.__path__ = list(where.submodule_search_locations)
    spec = spec_from_file_location("k_diffusion.sampling", f"{package.__path__[0]}/sampling.py")
    sampling = module_from_spec(spec)  # type: ignore[arg-type]
    stand_ins = {"k_diffusion": package, "k_diffusion.utils": utils}
    before = {name: sys.modules.get(name) for name in stand_ins}
    try:
        sys.modules.update(stand_ins)
        spec.loader.exec_module(sampling)  # type: ignore[union-attr]
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module:
                sys.modules[name] = module
    return sampling


@dataclass(frozen=True)
class KDiffusion:
    """A function of k-diffusion, in whose states x = x_0 + sigma eps.

    Its grid is sigmas [N+1], of which the last need not be 0; its network is (x, sigma [B]) -> x_0.

    Attributes:
        function: its name in k_diffusion.sampling.
        order: that it declares.
        calls_per_step: of steps that do not end at sigma = 0.
        noise: "" for a deterministic one; "normals", a draw a step of the generator that `run` is given, which is on x's device; "tree", its
            default, a Brownian tree.
        options: of the function.
    """

    function: str
    order: int
    calls_per_step: int = 1
    noise: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def grid(self, steps: int, device: torch.device | str = "cpu") -> Tensor:
        """For timing: the levels of VP, equally spaced in log-SNR, float32."""
        times = sv.logsnr(sv.VP(), steps)
        return torch.exp(-sv.VP().half_logsnr(times)).to(device, torch.float32)

    def run(self, net: Network, x: Tensor, grid: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """From x at grid[0], [B, ...], to grid[-1]."""
        options = dict(self.options)
        if self.noise == "normals":

            def normals(sigma: Tensor, sigma_next: Tensor) -> Tensor:
                return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)

            options["noise_sampler"] = normals
        return getattr(k_diffusion(), self.function)(net, x, grid, disable=True, **options)


@dataclass(frozen=True)
class Diffusers:
    """A scheduler of diffusers, in float32 as they all are, on linear betas.

    Its grid is a scheduler whose timesteps are set; its network is (x, timestep []) -> eps.

    Attributes:
        scheduler: its class, without the word.
        order: that it declares.
        calls_per_step: of steps that do not end at sigma = 0.
        noise: "normals" for a stochastic one, whose steps take a generator.
        levels: give it the levels one by one, the last one too; else it spaces its timesteps itself.
        options: of the class.
    """

    scheduler: str
    order: int
    calls_per_step: int = 1
    noise: str = ""
    levels: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def grid(self, steps: int, device: torch.device | str = "cpu") -> Any:
        """Equal steps in whole levels from the noisiest, 999, to the first, 0, and not on to sigma = 0."""
        import diffusers

        betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
        with warnings.catch_warnings(action="ignore"):  # it falls foul of NumPy 2
            made = getattr(diffusers, f"{self.scheduler}Scheduler")(**betas, **self.options)
            if self.levels:
                made.set_timesteps(
                    timesteps=np.linspace(0, len(made) - 1, steps + 1).round()[::-1], device=device
                )
                made.timesteps = made.timesteps[:-1]  # that of the step to sigma = 0
            else:
                made.set_timesteps(steps, device=device)
        return made

    @torch.no_grad()
    def run(self, net: Network, x: Tensor, grid: Any, generator: torch.Generator | None = None) -> Tensor:
        """From x at level 999, alpha x_0 + sigma eps [B, ...], over the timesteps. The grid can be used again."""
        scheduler = copy.copy(grid)
        vars(scheduler).update({k: list(v) for k, v in vars(grid).items() if isinstance(v, list)})
        options: dict[str, Any] = {"return_dict": False}
        if self.noise:
            options["generator"] = generator
        for t in scheduler.timesteps:
            output = net(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(output, t, x, **options)[0]
        return x

    def scale(self, grid: Any) -> tuple[float, float]:
        """Alpha at level 999 and at level 0 where its states are x / alpha, as those of k-diffusion; else 1 and 1."""
        if grid.init_noise_sigma == 1:
            return 1.0, 1.0
        first, last = grid.alphas_cumprod[[-1, 0]].double().sqrt().tolist()
        return first, last


@dataclass(frozen=True)
class Torchdiffeq:
    """A method of torchdiffeq by `sv.odeint`, from the schedule's start to its stop.

    Its grid is (variable, tolerance), or (variable, number of equal steps) of a method of fixed steps; its network is that of `sv.run`.

    Attributes:
        method: its name there.
        order: that it declares.
        calls_per_step: of a method of fixed steps; 0 of an adaptive one.
    """

    method: str
    order: int
    calls_per_step: int = 0

    def run(
        self, net: Network, x: Tensor, schedule: sv.Schedule, grid: tuple[str, float], max_nfe: int = 10**5
    ) -> sv.Solution:
        """One step for the whole batch.

        Raises:
            sv.NonConvergence: max_nfe calls did not suffice.
        """
        variable, value = grid
        options: dict[str, Any] = {"variable": variable, "max_nfe": max_nfe}
        if self.calls_per_step:
            ends = torch.tensor([schedule.start, schedule.stop], dtype=torch.float64)
            length = float(VARIABLES[variable](schedule, ends).diff().abs())
            options["options"] = {"step_size": length / value * (1 + 1e-9)}  # not one more by rounding
        else:
            options |= {"rtol": value, "atol": value}
        return sv.odeint(net, schedule, x, self.method, **options)


# variables that are finite at both ends of every schedule
VARIABLES: dict[str, Callable[[sv.Schedule, Tensor], Tensor]] = {
    "t": lambda schedule, t: t,
    "angle": lambda schedule, t: torch.atan2(schedule.sigma(t), schedule.alpha(t)),
}
NO_NOISE = {"eta": 0.0, "noise_sampler": lambda sigma, sigma_next: 0.0}
TO_LEVEL_0 = {"final_sigmas_type": "sigma_min"}
# the last step of first order, as in a run to sigma = 0: without it the large last step costs up to 15 times the error
DPM = TO_LEVEL_0 | {"euler_at_final": True}
ORDER_3 = {"solver_order": 3}

Peer = KDiffusion | Diffusers | Torchdiffeq
PEERS: dict[str, Peer] = {
    "k-diffusion euler": KDiffusion("sample_euler", 1),
    "k-diffusion heun": KDiffusion("sample_heun", 2, 2),
    "k-diffusion dpm_2": KDiffusion("sample_dpm_2", 2, 2),
    "k-diffusion lms": KDiffusion("sample_lms", 4),
    "k-diffusion dpmpp_2s": KDiffusion("sample_dpmpp_2s_ancestral", 2, 2, options=NO_NOISE),
    "k-diffusion dpmpp_2m": KDiffusion("sample_dpmpp_2m", 2),
    "k-diffusion dpmpp_2m_sde, eta 0": KDiffusion("sample_dpmpp_2m_sde", 2, options=NO_NOISE),
    "k-diffusion dpmpp_3m_sde, eta 0": KDiffusion("sample_dpmpp_3m_sde", 3, options=NO_NOISE),
    "k-diffusion euler_ancestral": KDiffusion("sample_euler_ancestral", 1, 1, "normals"),
    "k-diffusion dpmpp_2s_ancestral": KDiffusion("sample_dpmpp_2s_ancestral", 2, 2, "normals"),
    "k-diffusion dpmpp_2m_sde": KDiffusion("sample_dpmpp_2m_sde", 2, 1, "normals"),
    "k-diffusion dpmpp_3m_sde": KDiffusion("sample_dpmpp_3m_sde", 3, 1, "normals"),
    "k-diffusion dpmpp_2m_sde, tree": KDiffusion("sample_dpmpp_2m_sde", 2, 1, "tree"),
    "k-diffusion dpmpp_3m_sde, tree": KDiffusion("sample_dpmpp_3m_sde", 3, 1, "tree"),
    # its steps are of 1000 // steps levels: where that is no whole number they do not lead from one timestep to the next
    "diffusers DDIM": Diffusers(
        "DDIM",
        1,
        options={"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "trailing"},
    ),
    "diffusers Euler": Diffusers("EulerDiscrete", 1, levels=True),
    "diffusers Heun": Diffusers("HeunDiscrete", 2, 2, levels=True),
    "diffusers DPM++ 1": Diffusers("DPMSolverMultistep", 1, options={"solver_order": 1} | DPM),
    "diffusers DPM++ 2": Diffusers("DPMSolverMultistep", 2, options=DPM),
    "diffusers DPM++ 3": Diffusers("DPMSolverMultistep", 3, options=ORDER_3 | DPM),
    "diffusers UniPC 2": Diffusers("UniPCMultistep", 3, options=TO_LEVEL_0),
    "diffusers UniPC 3": Diffusers("UniPCMultistep", 4, options=ORDER_3 | TO_LEVEL_0),
    "diffusers DEIS 3": Diffusers("DEISMultistep", 3, options=ORDER_3),
    "diffusers DDPM": Diffusers("DDPM", 1, 1, "normals", options={"clip_sample": False}),
    "diffusers SASolver": Diffusers("SASolver", 2, 1, "normals"),
    "torchdiffeq dopri5": Torchdiffeq("dopri5", 5),
    "torchdiffeq bosh3": Torchdiffeq("bosh3", 3),
    "torchdiffeq rk4": Torchdiffeq("rk4", 4, 4),
}

DETERMINISTIC = [name for name, peer in PEERS.items() if not getattr(peer, "noise", "")]


def found(names: Iterable[str] = PEERS) -> dict[str, Peer]:
    """Those of the names whose library is installed."""
    return {name: PEERS[name] for name in names if find_spec(MODULES[name.split()[0]])}

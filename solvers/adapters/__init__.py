"""Other codebases' networks as (model, schedule), and our methods as their samplers."""

from solvers.adapters.configs import from_diffusers
from solvers.adapters.k_diffusion import from_denoiser, sampler
from solvers.adapters.networks import edm_grid, from_edm, from_flow, from_score

__all__ = ["edm_grid", "from_denoiser", "from_diffusers", "from_edm", "from_flow", "from_score", "sampler"]

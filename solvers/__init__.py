"""Diffusion samplers as tables of float64 coefficients, executed by one loop."""

from solvers import adapters, guidance, noise
from solvers.adaptive import adaptive, replay
from solvers.adaptive_sde import adaptive_sde
from solvers.bits import bits_per_dim, dequantized
from solvers.blackbox import ProbabilityFlow, ReverseSDE, odeint, sdeint
from solvers.bound import Bound, continuous_elbo, elbo
from solvers.control import NonConvergence, Solution
from solvers.decoder import Decoder
from solvers.discrete import Discrete
from solvers.graph import Sampler, compiled_sampler
from solvers.grids import (
    angle,
    angle_levels,
    given,
    karras,
    leading,
    linspace,
    logalpha,
    logalpha_levels,
    logsnr,
    power,
    quadratic,
    snap,
    trailing,
    uniform,
)
from solvers.jacobian import Divergence, exact, hutchinson
from solvers.langevin import predictor_corrector
from solvers.latents import decode, encode, round_trip_error
from solvers.likelihood import LogLikelihood, log_likelihood
from solvers.loop import NonFiniteError, State
from solvers.methods import tableaux
from solvers.methods.analytic import (
    Gamma,
    analytic_dpm,
    estimate_gamma,
    extended_analytic_dpm,
    gaussian_gamma,
    ml_sde,
    optimal_trajectory,
)
from solvers.methods.belm import obelm
from solvers.methods.multistep import (
    ddim,
    deis,
    dpm_solver_multistep,
    dpm_solver_pp,
    exponential_adams,
    ipndm,
    ipndm_v,
    lms,
    pndm,
)
from solvers.methods.renoise import ancestral, churn, restart
from solvers.methods.singlestep import dpm_solver, dpm_solver_fast, exponential_rk, heun
from solvers.methods.statistics import Statistics, dpm_solver_v3, estimate_statistics, gaussian_statistics
from solvers.methods.stochastic import (
    ddpm,
    dpm_solver_pp_sde,
    dpm_solver_sde,
    er_sde,
    euler_maruyama,
    reverse_diffusion,
    sa_solver,
    seeds,
)
from solvers.methods.unipc import corrected, recommended, unipc
from solvers.noise import noised
from solvers.plan import Plan, fold
from solvers.predictions import Model, centred, checkpointed, convert
from solvers.run import run, sample, trajectory
from solvers.schedules import EDM, VE, VP, Cosine, Flow, Inversion, LogSNR, Schedule, SubVP
from solvers.training import (
    DSM,
    dsm_loss,
    dsm_losses,
    importance_times,
    loss_weight,
    npr_loss,
    sn_loss,
)

__all__ = [
    "DSM",
    "EDM",
    "VE",
    "VP",
    "Bound",
    "Cosine",
    "Decoder",
    "Discrete",
    "Divergence",
    "Flow",
    "Gamma",
    "Inversion",
    "LogLikelihood",
    "LogSNR",
    "Model",
    "NonConvergence",
    "NonFiniteError",
    "Plan",
    "ProbabilityFlow",
    "ReverseSDE",
    "Sampler",
    "Schedule",
    "Solution",
    "State",
    "Statistics",
    "SubVP",
    "adapters",
    "adaptive",
    "adaptive_sde",
    "analytic_dpm",
    "ancestral",
    "angle",
    "angle_levels",
    "bits_per_dim",
    "centred",
    "checkpointed",
    "churn",
    "compiled_sampler",
    "continuous_elbo",
    "convert",
    "corrected",
    "ddim",
    "ddpm",
    "decode",
    "deis",
    "dequantized",
    "dpm_solver",
    "dpm_solver_fast",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "dpm_solver_pp_sde",
    "dpm_solver_sde",
    "dpm_solver_v3",
    "dsm_loss",
    "dsm_losses",
    "elbo",
    "encode",
    "er_sde",
    "estimate_gamma",
    "estimate_statistics",
    "euler_maruyama",
    "exact",
    "exponential_adams",
    "exponential_rk",
    "extended_analytic_dpm",
    "fold",
    "gaussian_gamma",
    "gaussian_statistics",
    "given",
    "guidance",
    "heun",
    "hutchinson",
    "importance_times",
    "ipndm",
    "ipndm_v",
    "karras",
    "leading",
    "linspace",
    "lms",
    "log_likelihood",
    "logalpha",
    "logalpha_levels",
    "logsnr",
    "loss_weight",
    "ml_sde",
    "noise",
    "noised",
    "npr_loss",
    "obelm",
    "odeint",
    "optimal_trajectory",
    "pndm",
    "power",
    "predictor_corrector",
    "quadratic",
    "recommended",
    "replay",
    "restart",
    "reverse_diffusion",
    "round_trip_error",
    "run",
    "sa_solver",
    "sample",
    "sdeint",
    "seeds",
    "sn_loss",
    "snap",
    "tableaux",
    "trailing",
    "trajectory",
    "uniform",
    "unipc",
]

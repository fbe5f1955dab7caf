"""Diffusion samplers as tables of float64 coefficients, executed by one loop."""

from solvers import noise
from solvers.discrete import Discrete
from solvers.grids import (
    angle,
    angle_levels,
    given,
    karras,
    leading,
    linspace,
    logsnr,
    power,
    quadratic,
    snap,
    trailing,
    uniform,
)
from solvers.methods import tableaux
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
from solvers.methods.singlestep import dpm_solver, dpm_solver_fast, exponential_rk, heun
from solvers.methods.statistics import Statistics, dpm_solver_v3, estimate_statistics, gaussian_statistics
from solvers.methods.unipc import corrected, recommended, unipc
from solvers.noise import noised
from solvers.plan import Plan, fold
from solvers.predictions import Model, convert
from solvers.run import NonFiniteError, State, run, sample, trajectory
from solvers.schedules import EDM, VE, VP, Cosine, Flow, Inversion, LogSNR, Schedule, SubVP

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "Flow",
    "Inversion",
    "LogSNR",
    "Model",
    "NonFiniteError",
    "Plan",
    "Schedule",
    "State",
    "Statistics",
    "SubVP",
    "angle",
    "angle_levels",
    "convert",
    "corrected",
    "ddim",
    "deis",
    "dpm_solver",
    "dpm_solver_fast",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "dpm_solver_v3",
    "estimate_statistics",
    "exponential_adams",
    "exponential_rk",
    "fold",
    "gaussian_statistics",
    "given",
    "heun",
    "ipndm",
    "ipndm_v",
    "karras",
    "leading",
    "linspace",
    "lms",
    "logsnr",
    "noise",
    "noised",
    "obelm",
    "pndm",
    "power",
    "quadratic",
    "recommended",
    "run",
    "sample",
    "snap",
    "tableaux",
    "trailing",
    "trajectory",
    "uniform",
    "unipc",
]

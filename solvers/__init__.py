"""Diffusion samplers as tables of float64 coefficients, executed by one loop."""

from solvers import noise
from solvers.discrete import Discrete
from solvers.grids import given, karras, leading, linspace, logsnr, quadratic, snap, trailing, uniform
from solvers.methods.multistep import ddim, dpm_solver_multistep, dpm_solver_pp, exponential_adams
from solvers.methods.singlestep import dpm_solver, dpm_solver_fast
from solvers.noise import noised
from solvers.plan import Plan, fold
from solvers.predictions import Model, convert
from solvers.run import NonFiniteError, State, run, sample, trajectory
from solvers.schedules import EDM, VE, VP, Cosine, Flow, LogSNR, Schedule, SubVP

__all__ = [
    "EDM",
    "VE",
    "VP",
    "Cosine",
    "Discrete",
    "Flow",
    "LogSNR",
    "Model",
    "NonFiniteError",
    "Plan",
    "Schedule",
    "State",
    "SubVP",
    "convert",
    "ddim",
    "dpm_solver",
    "dpm_solver_fast",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "exponential_adams",
    "fold",
    "given",
    "karras",
    "leading",
    "linspace",
    "logsnr",
    "noise",
    "noised",
    "quadratic",
    "run",
    "sample",
    "snap",
    "trailing",
    "trajectory",
    "uniform",
]

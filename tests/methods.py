"""Every method with its options, as (schedule, times) -> Plan: what a claim about all of them runs through."""

from dataclasses import replace
from functools import partial

import torch

import solvers as sv


def correlated(schedule, times):
    """DDIM with eta = 1 and a share of the draw before: no method of the literature, but a plan may read past draws."""
    plan = sv.ddim(schedule, times, eta=1.0)
    before = torch.cat([plan.c[:1] * 0, plan.c[1:]])
    return replace(plan, c=torch.cat([0.8 * plan.c, 0.6 * before], 1))


STARTS, FINALS = ("ramp", "singlestep"), ("full", "lower")

SINGLESTEP = {f"dpm_solver {p}": partial(sv.dpm_solver, order=p) for p in (1, 2, 3)} | {
    f"dpm_solver_pp {p}S": partial(sv.dpm_solver_pp, order=p, kind="singlestep") for p in (1, 2, 3)
}
MULTISTEP = (
    {
        f"dpm_solver_multistep {p} {start}": partial(sv.dpm_solver_multistep, order=p, start=start)
        for p in (2, 3)
        for start in STARTS
    }
    | {
        f"dpm_solver_pp {p}M {start} {final}": partial(sv.dpm_solver_pp, order=p, start=start, final=final)
        for p in (1, 2, 3)
        for start in STARTS
        for final in FINALS
    }
    | {
        f"exponential_adams {p} {form} {start}": partial(
            sv.exponential_adams, order=p, predicts=form, start=start
        )
        for p in (1, 2, 3, 4, 5)
        for form in ("noise", "data")
        for start in (STARTS if 2 < p < 5 else STARTS[:1])
    }
)
ODE = {"ddim": sv.ddim} | SINGLESTEP | MULTISTEP
SDE = {
    "ddim eta 0.6": partial(sv.ddim, eta=0.6),
    "ddim eta 1": partial(sv.ddim, eta=1.0),
    "correlated draws": correlated,
}
METHODS = ODE | SDE

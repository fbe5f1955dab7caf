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
PREDICTOR_CORRECTOR = {
    "unipc 1 bh1": partial(sv.unipc, order=1, variant="bh1"),
    "unipc 2": partial(sv.unipc, order=2),
    "unipc 3 noise lower": partial(sv.unipc, order=3, predicts="noise", final="lower"),
    "unipc 4 singlestep": partial(sv.unipc, order=4, start="singlestep"),
}
SIGMA = {  # noise form, polynomials or equal steps in sigma / alpha
    "lms 3": partial(sv.lms, order=3),
    "deis sigma singlestep": partial(sv.deis, order=3, variable="sigma", start="singlestep"),
    "ipndm": sv.ipndm,
    "heun": sv.heun,
    "rho rk4": partial(sv.exponential_rk, tableau=sv.tableaux.etdrk4, predicts="noise", variable="sigma"),
    "obelm": sv.obelm,
}
TABLEAUX = {
    "krogstad": partial(sv.exponential_rk, tableau=sv.tableaux.krogstad),
    "hochbruck_ostermann noise": partial(
        sv.exponential_rk, tableau=sv.tableaux.hochbruck_ostermann, predicts="noise"
    ),
}
ODE = {"ddim": sv.ddim} | SINGLESTEP | MULTISTEP | PREDICTOR_CORRECTOR | SIGMA | TABLEAUX
CLOCKED = {  # whose coefficients follow t itself
    "deis t": partial(sv.deis, order=3),
    "pndm": sv.pndm,
}
SCALED = {  # with a linear part other than that of noise and data form: exact on other data, and of a scale of their own
    "velocity 1": partial(sv.exponential_adams, order=1, predicts="velocity"),
    "velocity 3 scale 0.5": partial(sv.exponential_adams, order=3, predicts="velocity", scale=0.5),
    "velocity 3 angle singlestep": partial(
        sv.exponential_adams, order=3, predicts="velocity", variable="angle", start="singlestep"
    ),
    "unipc velocity": partial(sv.unipc, order=2, predicts="velocity"),
    "v3 2": partial(sv.dpm_solver_v3, statistics=sv.gaussian_statistics(0.2, 0.7), order=2),
}
SDE = {
    "ddim eta 0.6": partial(sv.ddim, eta=0.6),
    "ddim eta 1": partial(sv.ddim, eta=1.0),
    "ddpm large": partial(sv.ddpm, variance="large"),
    "2M SDE": partial(sv.dpm_solver_pp_sde, eta=0.4),
    "sa_solver": sv.sa_solver,
    "seeds 3": sv.seeds,
    "er_sde 2": partial(sv.er_sde, order=2),
    "ancestral 2S": partial(
        sv.ancestral, method=partial(sv.dpm_solver_pp, kind="singlestep"), eta=0.3
    ),  # with rows of noise
    "correlated draws": correlated,
}
METHODS = ODE | CLOCKED | SCALED | SDE

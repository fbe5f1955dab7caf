"""Methods: (schedule, times, **options) -> Plan, one file a family; METHODS and SDES are the tables of their orders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from solvers.methods.analytic import analytic_dpm, gaussian_gamma
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
from solvers.methods.renoise import ancestral, churn
from solvers.methods.singlestep import dpm_solver, exponential_rk, heun
from solvers.methods.statistics import dpm_solver_v3, gaussian_statistics
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
from solvers.methods.tableaux import (
    Tableau,
    etdrk3,
    etdrk4,
    hochbruck_ostermann,
    krogstad,
    lie3,
    second_order,
    strehmel_weiner,
    third_order,
    three_eighths,
)
from solvers.methods.unipc import recommended, unipc
from solvers.plan import Plan
from solvers.schedules import Schedule


@dataclass(frozen=True)
class Method:
    """A method with its options bound, and what it promises.

    Attributes:
        build: (schedule, times) -> plan; `times` are the outer steps, [steps + 1].
        order: of the error against the number of steps, as steps go to 0; of a stochastic method, of its law.
        calls_per_step: of the steps after the start; a start that keeps the order costs more.
        start: (steps, calls in each) of the start; a step that touches infinite half log-SNR makes one call.
        uneven_order: of the error on grids whose neighbouring steps never become equal, where it is another.
    """

    build: Callable[[Schedule, Tensor], Plan]
    order: int
    calls_per_step: int
    start: tuple[int, int] = (0, 0)
    uneven_order: int | None = None

    def nfe(self, steps: int) -> int:
        """The calls of so many steps, at finite half log-SNR."""
        started = min(steps, self.start[0])
        return started * self.start[1] + (steps - started) * self.calls_per_step


def _started(method: Callable[..., Plan], order: int, **options: object) -> Method:
    """An Adams method whose start keeps its order: order - 1 steps by a singlestep method of order - 1."""
    start = "singlestep" if order > 2 else "ramp"
    first = order - 1 if order > 2 else 0
    return Method(partial(method, order=order, start=start, **options), order, 1, (first, order - 1))


def _rk(tableau: Tableau, order: int, predicts: str, variable: str = "half_logsnr") -> Method:
    build = partial(exponential_rk, tableau=tableau, predicts=predicts, variable=variable)
    return Method(build, order, tableau.stages)


METHODS: dict[str, Method] = {
    "ddim": Method(ddim, 1, 1),
    "dpm_solver_1": Method(partial(dpm_solver, order=1), 1, 1),
    "dpm_solver_2": Method(partial(dpm_solver, order=2), 2, 2),
    "dpm_solver_3": Method(partial(dpm_solver, order=3), 3, 3),
    "dpm_solver_multistep_2": _started(dpm_solver_multistep, 2),
    "dpm_solver_multistep_3": _started(dpm_solver_multistep, 3),
    "dpm_solver_pp_2m": _started(dpm_solver_pp, 2),
    "dpm_solver_pp_3m": _started(dpm_solver_pp, 3),
    "dpm_solver_pp_3m_ramp": Method(partial(dpm_solver_pp, order=3, start="ramp"), 2, 1),
    "dpm_solver_pp_2s": Method(partial(dpm_solver_pp, order=2, kind="singlestep"), 2, 2),
    "dpm_solver_pp_3s": Method(partial(dpm_solver_pp, order=3, kind="singlestep"), 3, 3),
    "adams_noise_4": _started(exponential_adams, 4, predicts="noise"),
    "adams_data_2": _started(exponential_adams, 2, predicts="data"),
    "adams_data_4": _started(exponential_adams, 4, predicts="data"),
    "adams_velocity_1": _started(exponential_adams, 1, predicts="velocity"),
    "adams_velocity_2": _started(exponential_adams, 2, predicts="velocity"),
    "adams_velocity_3": _started(exponential_adams, 3, predicts="velocity"),
    "adams_velocity_3_ramp": Method(partial(exponential_adams, order=3, predicts="velocity"), 2, 1),
    "adams_velocity_4": _started(exponential_adams, 4, predicts="velocity"),
    "adams_velocity_4_ramp": Method(partial(exponential_adams, order=4, predicts="velocity"), 2, 1),
    "adams_velocity_t_3": _started(exponential_adams, 3, predicts="velocity", variable="t"),
    "adams_velocity_angle_3": _started(exponential_adams, 3, predicts="velocity", variable="angle"),
    "deis_t_2": _started(deis, 2, variable="t"),
    "deis_t_3": _started(deis, 3, variable="t"),
    "deis_t_3_ramp": Method(partial(deis, order=3, variable="t"), 2, 1),
    "deis_t_4": _started(deis, 4, variable="t"),
    "deis_logrho_3": _started(deis, 3, variable="half_logsnr"),
    "lms_2": _started(lms, 2),
    "lms_4": _started(lms, 4),
    "ipndm": Method(ipndm, 2, 1, uneven_order=1),
    "ipndm_v_3": _started(ipndm_v, 3),
    "pndm": Method(pndm, 2, 1, (3, 4), uneven_order=1),
    "unip_2": Method(partial(unipc, order=2, corrector=False), 2, 1),
    "unip_3": Method(partial(unipc, order=3, corrector=False, start="singlestep"), 3, 1, (2, 2)),
    "unipc_1": Method(partial(unipc, order=1), 2, 1),
    "unipc_2": Method(partial(unipc, order=2), 3, 1),
    "unipc_2_bh1": Method(partial(unipc, order=2, variant="bh1"), 3, 1),
    "unipc_2_vary": Method(partial(unipc, order=2, variant="vary_coeff"), 3, 1),
    "unipc_2_noise": Method(partial(unipc, order=2, predicts="noise"), 3, 1),
    "unipc_2_velocity": Method(partial(unipc, order=2, predicts="velocity"), 3, 1),
    "unipc_angle_2": Method(partial(unipc, order=2, predicts="velocity", variable="angle"), 3, 1),
    "unipc_angle_4": Method(
        partial(unipc, order=4, predicts="velocity", variable="angle", start="singlestep"), 5, 1, (2, 4)
    ),
    "unipc_asinh_4": Method(
        partial(unipc, order=4, predicts="velocity", variable="asinh", start="singlestep"), 5, 1, (2, 4)
    ),
    "unipc_3": Method(partial(unipc, order=3, start="singlestep"), 4, 1, (1, 3)),
    "unipc_3_ramp": Method(partial(unipc, order=3), 3, 1),
    "unipc_4": Method(partial(unipc, order=4, start="singlestep"), 5, 1, (2, 4)),
    "heun": Method(heun, 2, 2),
    "res_2": _rk(second_order(), 2, "data"),
    "res_3": _rk(third_order(1 / 2, 1.0), 3, "data"),
    "etdrk3": _rk(etdrk3, 3, "data"),
    "lie3": _rk(lie3, 3, "noise"),
    "etdrk4": _rk(etdrk4, 4, "data"),
    "krogstad": _rk(krogstad, 4, "data"),
    "strehmel_weiner": _rk(strehmel_weiner, 4, "noise"),
    "hochbruck_ostermann": _rk(hochbruck_ostermann, 4, "data"),
    "three_eighths": _rk(three_eighths, 4, "data"),
    "rho_midpoint": _rk(second_order(), 2, "noise", "sigma"),
    "rho_kutta3": _rk(etdrk3, 3, "noise", "sigma"),
    "rho_rk4": _rk(etdrk4, 4, "noise", "sigma"),
    "angle_rk4": _rk(etdrk4, 4, "velocity", "angle"),
    "dpm_solver_v3_1": Method(
        partial(dpm_solver_v3, statistics=gaussian_statistics(0.0, 0.5), order=1), 2, 1
    ),
    "dpm_solver_v3_2": Method(
        partial(dpm_solver_v3, statistics=gaussian_statistics(0.0, 0.5), order=2), 3, 1
    ),
    "obelm": Method(obelm, 2, 1),
}

SDES: dict[str, Method] = {
    "ddpm": Method(ddpm, 1, 1),
    "ddpm_large": Method(partial(ddpm, variance="large"), 1, 1),
    "ddim_half": Method(partial(ddim, eta=0.5), 1, 1),
    "analytic_ddpm": Method(partial(analytic_dpm, gamma=gaussian_gamma(0.5)), 1, 1),
    "analytic_ddim": Method(partial(analytic_dpm, gamma=gaussian_gamma(0.5), eta=0.0), 1, 1),
    "euler_maruyama": Method(euler_maruyama, 1, 1),
    "reverse_diffusion": Method(reverse_diffusion, 1, 1),
    "dpm_solver_pp_sde_1": Method(partial(dpm_solver_pp_sde, order=1, eta=0.5), 1, 1),
    "dpm_solver_pp_sde_2m": Method(dpm_solver_pp_sde, 2, 1),
    "dpm_solver_pp_sde_3m": Method(partial(dpm_solver_pp_sde, order=3), 2, 1),
    "dpm_solver_sde_1": Method(partial(dpm_solver_sde, order=1), 1, 1),
    "dpm_solver_sde_2": Method(dpm_solver_sde, 2, 1),
    "sa_predictor_2": Method(partial(sa_solver, order=2, corrector=0), 2, 1),
    "sa_predictor_3": Method(partial(sa_solver, corrector=0), 2, 1),
    "sa_solver_1": Method(partial(sa_solver, order=1, corrector=2), 2, 1),
    "sa_solver": Method(sa_solver, 2, 1),
    "seeds_1": Method(partial(seeds, order=1), 1, 1),
    "seeds_2": Method(partial(seeds, order=2), 2, 2),
    "seeds_3": Method(seeds, 2, 3),
    "er_sde_1": Method(partial(er_sde, order=1), 1, 1),
    "er_sde_2": Method(partial(er_sde, order=2), 2, 1),
    "er_sde_3": Method(er_sde, 2, 1),
    "ancestral_heun": Method(ancestral, 2, 2),
    "ancestral_2s": Method(
        partial(ancestral, method=partial(dpm_solver_pp, order=2, kind="singlestep")), 2, 2
    ),
    "ancestral_3s": Method(
        partial(ancestral, method=partial(dpm_solver_pp, order=3, kind="singlestep")), 3, 3
    ),
    "churn_heun": Method(partial(churn, amount=10.0, high=0.9), 2, 2),
}
"""The stochastic methods; `restart`, learned variances and Langevin steps ask for more than a grid."""

RECOMMENDED: dict[str, Callable[[Schedule, Tensor], Plan]] = {
    "recommended": recommended,
    "recommended_asinh": partial(recommended, variable="asinh"),
}
BUILDS = RECOMMENDED | {name: method.build for name, method in (METHODS | SDES).items()}
"""Every method by name; `recommended` has no entry above, as its order and calls follow the number of steps."""

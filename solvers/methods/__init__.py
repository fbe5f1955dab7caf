"""Methods: (schedule, times, **options) -> Plan, one file a family; METHODS is the table of their orders."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from solvers.methods.multistep import ddim, dpm_solver_multistep, dpm_solver_pp, exponential_adams
from solvers.methods.singlestep import dpm_solver
from solvers.plan import Plan
from solvers.schedules import Schedule


@dataclass(frozen=True)
class Method:
    """A method with its options bound, and what it promises.

    Attributes:
        build: (schedule, times) -> plan; `times` are the outer steps, [steps + 1].
        order: of the error against the number of steps, as steps go to 0.
        calls_per_step: of the steps after the start; a start that keeps the order costs more.
    """

    build: Callable[[Schedule, Tensor], Plan]
    order: int
    calls_per_step: int


METHODS: dict[str, Method] = {
    "ddim": Method(ddim, 1, 1),
    "dpm_solver_1": Method(partial(dpm_solver, order=1), 1, 1),
    "dpm_solver_2": Method(partial(dpm_solver, order=2), 2, 2),
    "dpm_solver_3": Method(partial(dpm_solver, order=3), 3, 3),
    "dpm_solver_multistep_2": Method(partial(dpm_solver_multistep, order=2), 2, 1),
    "dpm_solver_multistep_3": Method(partial(dpm_solver_multistep, order=3, start="singlestep"), 3, 1),
    "dpm_solver_pp_2m": Method(partial(dpm_solver_pp, order=2), 2, 1),
    "dpm_solver_pp_3m": Method(partial(dpm_solver_pp, order=3, start="singlestep"), 3, 1),
    "dpm_solver_pp_3m_ramp": Method(partial(dpm_solver_pp, order=3, start="ramp"), 2, 1),
    "dpm_solver_pp_2s": Method(partial(dpm_solver_pp, order=2, kind="singlestep"), 2, 2),
    "dpm_solver_pp_3s": Method(partial(dpm_solver_pp, order=3, kind="singlestep"), 3, 3),
    "adams_noise_4": Method(partial(exponential_adams, order=4, predicts="noise", start="singlestep"), 4, 1),
    "adams_data_4": Method(partial(exponential_adams, order=4, predicts="data", start="singlestep"), 4, 1),
}

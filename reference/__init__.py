"""Answers known in closed form: exact models, flows, laws and orders to hold a sampler against."""

from reference.distances import kl, sliced_wasserstein2, wasserstein2
from reference.distribution import Distribution
from reference.empirical import Empirical, digits
from reference.gaussian import Gaussian
from reference.law import law, path_kl
from reference.mixture import Mixture
from reference.orders import (
    even,
    grid,
    law_errors,
    local_errors,
    row_defects,
    row_order,
    slopes,
    trajectory_errors,
    uneven,
)
from reference.trace import rows, trace

__all__ = [
    "Distribution",
    "Empirical",
    "Gaussian",
    "Mixture",
    "digits",
    "even",
    "grid",
    "kl",
    "law",
    "law_errors",
    "local_errors",
    "path_kl",
    "row_defects",
    "row_order",
    "rows",
    "sliced_wasserstein2",
    "slopes",
    "trace",
    "trajectory_errors",
    "uneven",
    "wasserstein2",
]

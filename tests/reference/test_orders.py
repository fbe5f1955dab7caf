"""Measured orders of textbook tables are the known ones, and planted errors are seen."""

import math

import pytest
import torch
from torch.testing import assert_close

from reference import (
    Gaussian,
    law_errors,
    local_errors,
    row_defects,
    row_order,
    slopes,
    trajectory_errors,
    uneven,
)
from reference.orders import _moment, grid
from solvers.schedules import VP
from textbook import ancestral, ddim, heun, run, table, two_step

START, STOP = 0.8, 0.1
STEPS = (0.8, 1.3, 1.0)


def broken(schedule, times):
    plan = two_step(schedule, times)
    return table(schedule, times, plan.a, plan.b * 1.001, predicts="data")


def test_slopes_are_signed():
    assert_close(slopes([8.0, 2.0, 1.0, 4.0]), torch.tensor([2.0, 1.0, -2.0], dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_uneven_steps_are_uneven_within_a_factor_2(steps):
    fractions = uneven(steps)
    ratio = fractions.diff()[1:] / fractions.diff()[:-1]
    assert fractions[0] == 0
    assert fractions[-1] == 1
    assert len(fractions) == steps + 1
    assert ((ratio >= 0.5 - 1e-12) & (ratio <= 2 + 1e-12)).all()
    assert steps < 3 or (ratio - 1).abs().max() > 0.1


def test_grids_end_exactly(schedule):
    times = grid(schedule, START, STOP, uneven(5))
    assert times[0] == START
    assert times[-1] == STOP
    assert (times.diff() < 0).all()


@pytest.mark.parametrize("spacing", [uneven, None])
@pytest.mark.parametrize(("build", "order"), [(ddim, 1), (heun, 2)])
def test_trajectories_have_the_order_of_the_method(build, order, spacing, line, schedule):
    x = torch.tensor([[-1.3], [-0.3], [0.4], [1.7]], dtype=torch.float64)
    options = {} if spacing is None else {"spacing": spacing}
    errors = trajectory_errors(build, run, line, schedule, x, START, STOP, (40, 80, 160), **options)
    assert_close(slopes(errors), torch.full((2,), float(order)).double(), rtol=0, atol=0.15)


@pytest.mark.parametrize(
    ("build", "order"), [(ddim, 1), (lambda s, t: ddim(s, t, "data"), 1), (two_step, 2), (heun, 2)]
)
def test_rows_have_the_order_of_the_method(build, order, schedule):
    assert row_order(build, schedule, 0.3, STEPS, 0.02, 4) == pytest.approx(order, abs=0.1)


def test_row_defects_see_a_planted_error(schedule):
    assert row_defects(two_step, schedule, 0.3, STEPS, 0.02, 0).abs().max() < 1e-15
    assert row_order(broken, schedule, 0.3, STEPS, 0.02, 4) < 0.1


def test_exact_weights_have_no_order(schedule):
    assert row_order(ddim, schedule, 0.3, STEPS, 0.02, 0) == math.inf


@pytest.mark.parametrize(("build", "order"), [(ddim, 1), (two_step, 2), (heun, 2)])
@pytest.mark.parametrize("name", ["gaussian", "line"])
def test_one_step_errs_by_one_order_more(build, order, name, request, schedule):
    distribution = request.getfixturevalue(name)
    x = torch.randn(4, *distribution.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = local_errors(build, distribution, schedule, x, 0.3, STEPS, (0.1, 0.05, 0.025))
    assert_close(slopes(errors), torch.full((2,), order + 1.0).double(), rtol=0, atol=0.25)


def test_a_wrong_weight_costs_the_local_order(gaussian, schedule):
    x = torch.ones(1, 3, dtype=torch.float64)
    assert slopes(local_errors(broken, gaussian, schedule, x, 0.3, STEPS, (0.02, 0.01)))[0] < 1.5


@pytest.mark.parametrize(("build", "order"), [(ddim, 1), (ancestral, 1), (two_step, 2), (heun, 2)])
def test_laws_have_the_weak_order(build, order, gaussian):
    errors = law_errors(build, gaussian, VP(), START, STOP, (40, 80, 160))
    assert_close(slopes(errors), torch.full((2,), float(order)).double(), rtol=0, atol=0.15)


def test_laws_of_delta_data_are_exact():
    """With tau = 1 the data-form step is exact in law for a point mass; W2 resolves that to rounding."""
    delta = Gaussian([0.4, 1.0], torch.zeros(2, 2))
    assert law_errors(ancestral, delta, VP(), START, STOP, (3, 5)).max() < 1e-14


@pytest.mark.parametrize("c", [1, -1])
@pytest.mark.parametrize("k", [0, 1, 4])
def test_moments_are_the_integrals(c, k):
    for h in (1e-3, 0.3, 4.0):
        nodes, weights = gauss_legendre(h)
        expected = (weights * torch.exp(c * (h - nodes)) * nodes**k).sum()
        assert_close(_moment(k, h, c), expected.item(), rtol=1e-13, atol=0)


def gauss_legendre(h):
    from numpy.polynomial.legendre import leggauss

    nodes, weights = (torch.as_tensor(v) for v in leggauss(40))
    return (nodes + 1) * h / 2, weights * h / 2

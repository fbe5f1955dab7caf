"""Every method has the order it declares: in each row, in one step and along trajectories."""

import pytest
import torch

import solvers as sv
from problems import FULL, NARROW, PROBLEMS, VP, exact, starts
from reference import even, local_errors, row_defects, row_order, slopes, uneven
from reference.orders import grid
from solvers.methods import METHODS

COUNTS = {NARROW: (128, 256, 512), FULL: (256, 512, 1024)}
SHAPE = [1.0, 2.0, 1.5, 0.8, 1.6]  # of the outer steps before and with the one examined


def rms(plan, problem, span):
    end = sv.run(plan, PROBLEMS[problem].model(VP), starts(problem, span))
    return (end - exact(problem, span)).square().mean().sqrt()


def trajectory_slopes(build, problem, span, spacing):
    return slopes([rms(build(VP, grid(VP, *span, spacing(n))), problem, span) for n in COUNTS[span]])


@pytest.mark.parametrize("spacing", [even, uneven])
@pytest.mark.parametrize("span", [NARROW, FULL], ids=["narrow", "full"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", METHODS)
def test_trajectories_have_the_declared_order(name, problem, span, spacing):
    if name.endswith("_ramp") and span == FULL:
        pytest.skip(
            "the data prediction hardly varies at the noisy end, so the ramp's second order shows only later"
        )
    method = METHODS[name]
    tolerance = 0.15 if spacing is even else 0.3
    measured = trajectory_slopes(method.build, problem, span, spacing)
    assert (measured - method.order).abs().max() <= tolerance, measured


@pytest.mark.parametrize("predicts", ["noise", "data"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6, 7, 8])
def test_adams_rows_integrate_polynomials_below_their_order_exactly(order, predicts):
    def build(schedule, times):
        return sv.exponential_adams(schedule, times, order, predicts)

    shape = [*SHAPE, 0.9, 1.3, 1.0]
    assert row_defects(build, VP, 0.5, shape, 0.25, degree=order - 1).abs().max() < 1e-11
    next_power = [row_defects(build, VP, 0.5, shape, h, degree=order)[-1].abs() for h in (0.25, 0.125)]
    assert slopes(next_power).item() == pytest.approx(order + 1, abs=0.25)


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("_ramp")])
def test_each_row_has_the_declared_order(name):
    """As a quadrature: the defect of the last step falls as h^(order + 1) for prescribed powers of half log-SNR."""
    method = METHODS[name]
    assert row_order(method.build, VP, 0.5, SHAPE, 0.02, degree=method.order) == pytest.approx(
        method.order, abs=0.15
    )


@pytest.mark.parametrize("name", [name for name in METHODS if not name.endswith("_ramp")])
def test_one_step_from_exact_history_has_local_order_one_higher(name):
    method = METHODS[name]
    data = PROBLEMS["line"]
    x = torch.tensor([[-1.3], [-0.3], [0.4], [1.2]], dtype=torch.float64)
    errors = local_errors(method.build, data, VP, x, 0.5, SHAPE, [2.0**-k for k in (4, 5, 6)])
    assert slopes(errors)[-1] == pytest.approx(method.order + 1, abs=0.2)


@pytest.mark.parametrize(("r1", "r2"), [(0.2, 0.5), (0.4, 0.9), (0.5, 1.0), (1 / 3, 2 / 3)])
def test_third_order_singlestep_holds_for_every_r1_and_r2(r1, r2):
    measured = trajectory_slopes(lambda s, t: sv.dpm_solver(s, t, 3, r1=r1, r2=r2), "line", NARROW, uneven)
    assert measured[-1] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("r1", [0.2, 0.5, 1.0])
def test_second_order_singlestep_holds_for_every_r1(r1):
    measured = trajectory_slopes(lambda s, t: sv.dpm_solver(s, t, 2, r1=r1), "line", NARROW, uneven)
    assert measured[-1] == pytest.approx(2, abs=0.1)


def test_papers_third_order_weights_are_second_order_away_from_two_thirds():
    """Why `dpm_solver` does not use them at other r2: the stage's own error no longer cancels."""
    from solvers.methods.singlestep import explicit_exponential

    def papers(r2):
        return lambda schedule, times: explicit_exponential(
            schedule, times, "noise", (0, 1 / 3, r2), lambda p: [[], [3 * r2**2 * p(2, r2)], [0, p(2) / r2]]
        )

    away = trajectory_slopes(papers(0.9), "line", NARROW, even)
    there = trajectory_slopes(papers(2 / 3), "line", NARROW, even)
    assert away[-1] == pytest.approx(2, abs=0.1)
    assert there[-1] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("predicts", ["noise", "data"])
def test_a_ramp_costs_the_order_that_a_singlestep_start_keeps(order, predicts):
    def build(start):
        return lambda s, t: sv.exponential_adams(s, t, order, predicts, start=start)

    assert trajectory_slopes(build("ramp"), "line", NARROW, even)[-1] == pytest.approx(2, abs=0.15)
    assert trajectory_slopes(build("singlestep"), "line", NARROW, even)[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("span", [NARROW, FULL], ids=["narrow", "full"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("nfe_mod_3", [0, 1, 2])
def test_dpm_solver_fast_has_the_order_of_its_last_steps(nfe_mod_3, problem, span):
    """[3, .., 2, 1] and [3, .., 1] end in a first-order step, of local error h^2; [3, .., 2] in one of h^3."""
    errors = [
        rms(sv.dpm_solver_fast(VP, 3 * n + nfe_mod_3, start=span[0], stop=span[1]), problem, span)
        for n in COUNTS[span]
    ]
    assert slopes(errors)[-1] == pytest.approx(3 if nfe_mod_3 == 2 else 2, abs=0.15)


def test_lowered_final_steps_cost_a_third_order_method_its_order():
    def build(s, t):
        return sv.dpm_solver_pp(s, t, 3, start="singlestep", final="lower")

    assert trajectory_slopes(build, "line", NARROW, even)[-1] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", ["dpm_solver_3", "dpm_solver_pp_2m"])
def test_the_exact_flow_is_known_better_than_the_errors_measured_against_it(name):
    """The two references of the line, CDF matching and the certified ODE solution, agree far below every error used."""
    from reference.distribution import integrate

    flow = integrate(PROBLEMS["line"], starts("line", FULL)[:16], VP, *FULL)
    gap = (flow - exact("line", FULL)[:16]).abs().max()
    finest = rms(METHODS[name].build(VP, sv.logsnr(VP, 1024)), "line", FULL)
    assert gap < 1e-11 < finest / 30

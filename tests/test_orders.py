"""Every method has the order it declares: in each row, in one step and along trajectories."""

from functools import partial

import pytest
import torch

import solvers as sv
from problems import (
    BETTER_QUADRATURE,
    FULL,
    MODELS,
    NARROW,
    PROBLEMS,
    RAMPED,
    ROWS,
    SHAPE,
    VP,
    exact,
    line_model,
    row_order_of,
    starts,
)
from reference import even, local_errors, row_defects, row_order, slopes, uneven
from reference.orders import PATTERN, grid
from solvers.methods import METHODS, tableaux

COUNTS = {NARROW: (128, 256, 512), FULL: (256, 512, 1024)}


def rms(plan, problem, span):
    end = sv.run(plan, MODELS[problem], starts(problem, span))
    return (end - exact(problem, span)).square().mean().sqrt()


def trajectory_slopes(build, problem, span, spacing, halved=0):
    """With uneven steps the pattern always ends on the same step, which of a predictor-corrector is the one not corrected."""
    counts = [n >> halved for n in COUNTS[span]]
    if spacing is uneven:
        counts = [n - n % len(PATTERN) + 1 for n in counts]
    return slopes([rms(build(VP, grid(VP, *span, spacing(n))), problem, span) for n in counts])


@pytest.mark.parametrize(
    ("problem", "span", "spacing"),
    [
        ("line", NARROW, even),
        ("line", NARROW, uneven),
        pytest.param("line", FULL, even, marks=pytest.mark.slow),
        ("line", FULL, uneven),
        pytest.param("eight", NARROW, even, marks=pytest.mark.slow),
    ],
    ids=["line even", "line uneven", "line full even", "line full uneven", "eight even"],
)
@pytest.mark.parametrize("name", METHODS)
def test_trajectories_have_the_declared_order(name, problem, span, spacing):
    """In 1 and 8 dimensions, on half log-SNR -1 to 3 and on the whole range, with steps that are even and that never settle."""
    if name in RAMPED and span == FULL:
        pytest.skip("the prediction hardly varies at the noisy end, so the order of a ramp shows only later")
    method = METHODS[name]
    order = method.uneven_order or method.order if spacing is uneven else method.order
    measured = trajectory_slopes(
        method.build,
        problem,
        span,
        spacing,
        halved=(order > 2) + (method.calls_per_step > 2 and span == FULL),
    )
    # a ramp comes down to its order from that of its rows; errors of order 4 are soon at rounding
    tolerance = 0.3 if spacing is uneven or order > 3 or name in RAMPED else 0.15
    last = measured[-1:] if order > 2 else measured  # on half the steps the first pair is still coarse
    assert (last - order).abs().max() <= tolerance, measured


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6, 7, 8])
def test_adams_rows_integrate_polynomials_below_their_order_exactly(order, predicts):
    def build(schedule, times):
        scale = 0.6 if predicts == "velocity" else 1.0
        return sv.exponential_adams(schedule, times, order, predicts, scale=scale)

    shape = [*SHAPE, 0.9, 1.3, 1.0]
    assert row_defects(build, VP, 0.5, shape, 0.25, degree=order - 1).abs().max() < 1e-11
    next_power = [row_defects(build, VP, 0.5, shape, h, degree=order)[-1].abs() for h in (0.25, 0.125)]
    assert slopes(next_power).item() == pytest.approx(order + 1, abs=0.25)


@pytest.mark.parametrize("variable", ["half_logsnr", "t", "sigma", "angle"])
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
@pytest.mark.parametrize("order", [2, 3, 4, 5])
def test_adams_keeps_its_order_in_every_form_and_variable(order, predicts, variable):
    def build(schedule, times):
        scale = 0.7 if predicts == "velocity" else 1.0
        return sv.exponential_adams(schedule, times, order, predicts, variable, scale, start="singlestep")

    measured = trajectory_slopes(build, "line", NARROW, uneven, halved=1)
    assert measured[-1] == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("name", ROWS)
def test_each_row_has_the_declared_order(name):
    """As a quadrature: the defect of the last step falls as h^(order + 1) for prescribed powers of half log-SNR."""
    order = row_order_of(name)
    measured = row_order(METHODS[name].build, VP, 0.5, SHAPE, 0.02, degree=order)
    assert measured == pytest.approx(order, abs=0.15 if order < 4 else 0.3) or name in BETTER_QUADRATURE
    assert measured > order - 0.3


@pytest.mark.parametrize("name", ROWS)
def test_one_step_from_exact_history_has_local_order_one_higher(name):
    data = PROBLEMS["line"]
    x = torch.tensor([[-1.3], [-0.3], [0.4], [1.2]], dtype=torch.float64)
    errors = local_errors(METHODS[name].build, data, VP, x, 0.5, SHAPE, [2.0**-k for k in (4, 5, 6)])
    order = row_order_of(name)
    assert slopes(errors)[-1] == pytest.approx(order + 1, abs=0.2 if order < 4 else 0.35)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_a_corrector_of_order_p_raises_a_predictor_of_order_p_by_one(predicts, order):
    measured = []
    for corrector in (False, True):
        build = partial(sv.unipc, order=order, predicts=predicts, corrector=corrector, start="singlestep")
        measured.append(
            trajectory_slopes(build, "line", NARROW, even, halved=1 if order < 4 else 2)[-1].item()
        )
    assert measured == pytest.approx([order, order + 1], abs=0.25)


def test_a_ramp_costs_a_third_order_predictor_corrector_one_order():
    """Its first step, corrected with one call before, has local error h^3."""
    measured = trajectory_slopes(partial(sv.unipc, order=3), "line", NARROW, even)
    assert measured[-1] == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_equal_step_weights_have_their_order_where_steps_of_sigma_are_equal_alone(order):
    """iPNDM: order `order` in the rows of an even grid in sigma; 2 in the limit of a smooth grid; 1 where steps never settle."""
    edm = sv.EDM()
    x = torch.tensor([[-1.3], [-0.3], [0.4], [1.2]], dtype=torch.float64)
    shape = torch.ones(6, dtype=torch.float64)
    data, errors = PROBLEMS["line"], []
    for h in (0.02, 0.01):
        times = 1.0 - h * (shape.cumsum(0) - shape)
        plan = sv.ipndm(edm, times, order)
        model, state = data.model(edm), data.flow(x, edm, 1.0, float(times[-2]))
        past = [model(data.flow(x, edm, 1.0, float(t)), t.expand(4)) for t in times[:-1]]
        end = plan.a[-1] * state + sum(plan.b[-1, j] * past[-1 - j] for j in range(order))
        errors.append((end - data.flow(x, edm, 1.0, float(times[-1]))).abs().max())
    assert slopes(errors)[0] > order + 0.75


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2 / 3, 1.0])
def test_every_member_of_heuns_family_has_order_two(alpha):
    measured = trajectory_slopes(partial(sv.heun, alpha=alpha), "line", NARROW, uneven)
    assert measured[-1] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    "tableau", ["second_order", "third_order", "etdrk3", "etdrk4", "krogstad", "hochbruck_ostermann"]
)
@pytest.mark.parametrize(
    ("predicts", "variable"),
    [("noise", "half_logsnr"), ("data", "half_logsnr"), ("noise", "sigma"), ("velocity", "angle")],
)
def test_a_tableau_has_its_order_in_every_form(tableau, predicts, variable):
    made = getattr(tableaux, tableau)
    made = {"second_order": lambda: made(0.4), "third_order": lambda: made(0.4, 0.9)}.get(
        tableau, lambda: made
    )()
    order = {"second_order": 2, "third_order": 3, "etdrk3": 3}.get(tableau, 4)
    build = partial(sv.exponential_rk, tableau=made, predicts=predicts, variable=variable)
    assert trajectory_slopes(build, "line", NARROW, uneven, halved=1)[-1] == pytest.approx(order, abs=0.25)


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

    def papers(r2):
        tableau = tableaux.Tableau((0, 1 / 3, r2), lambda p: [[], [3 * r2**2 * p(2, r2)], [0, p(2) / r2]])
        return partial(sv.exponential_rk, tableau=tableau, predicts="noise")

    away = trajectory_slopes(papers(0.9), "line", NARROW, even)
    there = trajectory_slopes(papers(2 / 3), "line", NARROW, even)
    assert away[-1] == pytest.approx(2, abs=0.1)
    assert there[-1] == pytest.approx(3, abs=0.1)


@pytest.mark.parametrize("order", [3, 4])
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_a_ramp_costs_the_order_that_a_singlestep_start_keeps(order, predicts):
    def build(start):
        return lambda s, t: sv.exponential_adams(s, t, order, predicts, start=start)

    assert trajectory_slopes(build("ramp"), "line", NARROW, even)[-1] == pytest.approx(2, abs=0.15)
    assert trajectory_slopes(build("singlestep"), "line", NARROW, even)[-1] == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("span", [NARROW, pytest.param(FULL, marks=pytest.mark.slow)], ids=["narrow", "full"])
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


def test_the_model_of_the_line_is_that_of_the_reference_mixture():
    for schedule in (VP, sv.EDM(), sv.Flow()):
        x, t = torch.linspace(-3, 3, 11, dtype=torch.float64)[:, None], torch.full((11,), 0.3).double()
        expected = PROBLEMS["line"].model(schedule, "velocity")(x, t)
        torch.testing.assert_close(line_model(schedule).net(x, t), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["dpm_solver_3", "dpm_solver_pp_2m"])
def test_the_exact_flow_is_known_better_than_the_errors_measured_against_it(name):
    """The two references of the line, CDF matching and the certified ODE solution, agree far below every error used."""
    from reference.distribution import integrate

    flow = integrate(PROBLEMS["line"], starts("line", FULL)[:16], VP, *FULL)
    gap = (flow - exact("line", FULL)[:16]).abs().max()
    finest = rms(METHODS[name].build(VP, sv.logsnr(VP, 1024)), "line", FULL)
    assert gap < 1e-11 < finest / 30

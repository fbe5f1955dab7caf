"""The checks have power: every planted error in a table is caught by at least one of them."""

import dataclasses

import pytest
import torch

import solvers as sv
from problems import MODELS, NARROW, ROWS, SHAPE, VP, exact, row_order_of, starts
from reference import Gaussian, law, row_order, slopes, uneven
from reference.orders import grid
from solvers.methods import METHODS
from solvers.methods.exponential import interpolatory

SMALL = {
    1: 0.001,
    2: 0.001,
    3: 0.01,
    4: 0.02,
}  # step at which a defect of that order is small but not yet rounding
CHECKED = [
    name for name in ROWS if name not in ("ipndm", "pndm")
]  # whose weights are not those of their steps
MULTISTEP = [name for name in CHECKED if METHODS[name].calls_per_step == 1 and row_order_of(name) > 1]
SINGLESTEP = [name for name in ROWS if METHODS[name].calls_per_step > 1]


def order_along_trajectories(build):
    """The slope on an uneven grid, as in test_orders."""
    errors = [
        (sv.run(build(VP, grid(VP, *NARROW, uneven(n))), MODELS["line"], starts("line", NARROW))
         - exact("line", NARROW)).square().mean().sqrt()
        for n in (127, 253)
    ]  # fmt: skip
    return slopes(errors).item()


def caught(plant, name):
    """Whether the table is refused when it is made, or its order falls short in a row or along trajectories."""
    order, method = row_order_of(name), METHODS[name]
    slack = 0.15 if order < 4 else 0.3
    try:
        if row_order(plant, VP, 0.5, SHAPE, SMALL[order], degree=order) < order - slack:
            return True
        return order_along_trajectories(plant) < (method.uneven_order or method.order) - slack
    except ValueError as error:
        return "not consistent" in str(error)


def planted(name, damage):
    """The method with its table damaged after it was made."""

    def build(schedule, times):
        plan = METHODS[name].build(schedule, times)
        a, b = plan.a.clone(), plan.b.clone()
        damage(a, b)
        return dataclasses.replace(plan, a=a, b=b)

    return build


@pytest.mark.parametrize("name", CHECKED)
def test_the_checks_pass_an_undamaged_table(name):
    assert not caught(METHODS[name].build, name)


@pytest.mark.parametrize("name", [name for name in METHODS if "v3" not in name])
def test_any_coefficient_off_by_a_thousandth_is_refused(name):
    plan = METHODS[name].build(VP, sv.logsnr(VP, 5))
    weights = [("a", (i,)) for i in range(plan.nfe)] + [
        ("b", tuple(i)) for i in (plan.b.abs() > 1e-12).nonzero().tolist()
    ]
    for field, index in weights:
        damaged = getattr(plan, field).clone()
        damaged[index] *= 1.001
        with pytest.raises(ValueError, match=f"row {index[0]} is not consistent"):
            dataclasses.replace(plan, **{field: damaged})


@pytest.mark.parametrize("name", MULTISTEP)
def test_two_swapped_history_columns_are_caught(name):
    def swap(a, b):
        b[-1, [0, 1]] = b[-1, [1, 0]]

    assert caught(planted(name, swap), name)


@pytest.mark.parametrize("name", [name for name in MULTISTEP if row_order_of(name) > 2])
def test_swapped_older_columns_are_caught(name):
    def swap(a, b):
        b[-1, [1, 2]] = b[-1, [2, 1]]

    assert caught(planted(name, swap), name)


@pytest.mark.parametrize("name", MULTISTEP)
def test_history_off_by_a_thousandth_is_caught_even_where_the_row_stays_consistent(name):
    def shift(a, b):
        b[:, 0] -= 0.001 * b[:, 1]
        b[:, 1] *= 1.001

    assert caught(planted(name, shift), name)


@pytest.mark.parametrize("order", [2, 3])
def test_the_previous_step_in_place_of_the_present_one_is_caught(order, monkeypatch):
    """h_{-1} for h in the ratios of the history, as in k-diffusion issue 56."""
    import solvers.methods.multistep as multistep

    def previous_h(ratios, moments):
        return interpolatory(ratios / -ratios[:, :1], moments)

    name = {2: "dpm_solver_pp_2m", 3: "dpm_solver_pp_3m"}[order]  # whose order it has
    assert not caught(lambda s, t: sv.exponential_adams(s, t, order, "data", start="singlestep"), name)
    monkeypatch.setattr(multistep, "interpolatory", previous_h)
    assert caught(lambda s, t: sv.exponential_adams(s, t, order, "data", start="singlestep"), name)


@pytest.mark.parametrize("name", SINGLESTEP)
def test_a_stage_weight_off_by_a_hundredth_is_caught_even_where_the_row_stays_consistent(name):
    def shift(a, b):
        last = METHODS[name].calls_per_step - 1
        b[last :: last + 1, 1] += 0.01 * b[last :: last + 1, 0]
        b[last :: last + 1, 0] *= 0.99

    def build(schedule, times):
        plan = planted(name, lambda a, b: None)(schedule, times)
        b = plan.b.clone()
        shift(plan.a, b)
        return dataclasses.replace(plan, b=b)

    assert caught(build, name)


def test_noise_off_by_a_thousandth_is_caught():
    """On data in one point a stochastic row keeps the marginal: a^2 sigma_s^2 + |c|^2 = sigma_t^2 (as the law shows)."""
    plan = sv.ddim(VP, sv.logsnr(VP, 6), eta=0.8)
    point = Gaussian(torch.zeros(1), torch.zeros(1, 1))
    for factor, kept in ((1.0, True), (1.001, False)):
        damaged = dataclasses.replace(plan, c=plan.c * factor)
        variance = law(damaged, point).cov[0, 0].item()
        assert (abs(variance / plan.sigma[-1].item() ** 2 - 1) < 1e-10) == kept

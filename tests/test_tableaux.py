"""Exponential tableaux satisfy their order conditions as power series in z."""

import math
from fractions import Fraction

import numpy as np
import pytest

import solvers as sv
from solvers.methods import tableaux

TERMS = 6
TABLEAUX = {
    "euler": (tableaux.euler, 1),
    "second_order(1/2)": (tableaux.second_order(1 / 2), 2),
    "second_order(2/3)": (tableaux.second_order(2 / 3), 2),
    "second_order(1)": (tableaux.second_order(1.0), 2),
    "dpm_solver_2(1/2)": (tableaux.dpm_solver_2(1 / 2), 2),
    "dpm_solver_2(0.3)": (tableaux.dpm_solver_2(0.3), 2),
    "third_order(1/3, 2/3)": (tableaux.third_order(1 / 3, 2 / 3), 3),
    "third_order(0.4, 0.9)": (tableaux.third_order(0.4, 0.9), 3),
    "third_order(1/2, 1)": (tableaux.third_order(1 / 2, 1.0), 3),
    "etdrk3": (tableaux.etdrk3, 3),
    "lie3": (tableaux.lie3, 3),
    "etdrk4": (tableaux.etdrk4, 4),
    "krogstad": (tableaux.krogstad, 4),
    "strehmel_weiner": (tableaux.strehmel_weiner, 4),
    "hochbruck_ostermann": (tableaux.hochbruck_ostermann, 4),
}


def phi(k, c=1.0):
    """phi_k(c z) as a power series: the coefficients of z^0, z^1, ..."""
    return np.array([c**n / math.factorial(n + k) for n in range(TERMS)])


def times(*series):
    """The product of power series."""
    product = np.eye(TERMS)[0]
    for factor in series:
        product = np.convolve(product, factor)[:TERMS]
    return product


def expanded(tableau):
    """(c, a, b) with a and b as power series and the first column as consistency leaves it, a[i, j] and b[j]."""
    c, stages = tableau.positions, tableau.stages
    a = np.zeros((stages + 1, stages, TERMS))
    for i, row in enumerate(tableau.weights(phi), start=1):
        a[i, 1 : len(row) + 1] = row if row else a[i, 1:1]
        a[i, 0] = (c[i] * phi(1, c[i]) if i < stages else phi(1)) - a[i, 1:].sum(0)
    return c, a[:-1], a[-1]


def conditions(tableau):
    """The order conditions of Hochbruck & Ostermann 2005, table 1, as (name, order, defect, powers of z that must vanish from z^0).

    psi_k = phi_k - sum_j b_j c_j^(k-1) / (k-1)!, and psi_{k,i} the same of stage i. The linear part is a number here, so all
    series commute; a defect weighs h^(own order) z^n, so it must vanish up to z^(order - own order).
    """
    c, a, b = expanded(tableau)
    stages = range(tableau.stages)

    def psi(k, i=None):
        row, place = (b, 1.0) if i is None else (a[i], c[i])
        return place**k * phi(k, place) - sum(
            row[j] * c[j] ** (k - 1) / math.factorial(k - 1) for j in stages
        )

    yield from ((f"psi_{k}", k, psi(k)) for k in (1, 2, 3, 4))
    yield "sum b psi_2i", 3, sum(times(b[i], psi(2, i)) for i in stages)
    yield "sum b psi_3i", 4, sum(times(b[i], psi(3, i)) for i in stages)
    yield "sum b c psi_2i", 4, sum(times(b[i], psi(2, i)) * c[i] for i in stages)
    yield "sum b a psi_2j", 4, sum(times(b[i], a[i, j], psi(2, j)) for i in stages for j in stages)


def order_of(tableau):
    """The largest order all of whose conditions hold."""
    for order in (1, 2, 3, 4):
        for _, own, defect in conditions(tableau):
            if np.abs(defect[: max(order + 1 - own, 0)]).max(initial=0) > 1e-13:
                return order - 1
    return 4


@pytest.mark.parametrize("name", TABLEAUX)
def test_a_tableau_has_exactly_its_order(name):
    tableau, order = TABLEAUX[name]
    assert order_of(tableau) == order


@pytest.mark.parametrize("name", TABLEAUX)
def test_every_stage_is_exact_for_a_constant_prediction(name):
    """Row sums: sum_j a_ij = c_i phi_1(c_i z), sum_j b_j = phi_1(z), exactly and for every z."""
    tableau, _ = TABLEAUX[name]
    c, a, b = expanded(tableau)
    for i in range(1, tableau.stages):
        np.testing.assert_allclose(a[i].sum(0), c[i] * phi(1, c[i]), rtol=1e-14, atol=1e-16)
        assert not a[i, i:].any()  # explicit
    np.testing.assert_allclose(b.sum(0), phi(1), rtol=1e-14)


def test_hochbruck_ostermanns_is_of_stiff_order_four_and_the_others_are_not():
    """Stages whose defects vanish at every z, under weights that may be taken at z = 0 in the conditions of order 4."""

    def is_stiff(tableau):
        c, a, b = expanded(tableau)
        stages = range(tableau.stages)
        below = [defect for _, own, defect in conditions(tableau) if own < 4]
        second, third = (
            [
                c[i] ** k * phi(k, c[i])
                - sum(a[i, j] * c[j] ** (k - 1) for j in stages) / math.factorial(k - 1)
                for i in stages
            ]
            for k in (2, 3)
        )
        b0, a0 = b[:, 0], a[:, :, 0]
        fourth = [
            sum(b0[i] * third[i] for i in stages),
            sum(b0[i] * c[i] * second[i] for i in stages),
            sum(b0[i] * a0[i, j] * second[j] for i in stages for j in stages),
        ]
        return order_of(tableau) == 4 and max(np.abs(defect).max() for defect in below + fourth) < 1e-13

    fourth = {name: is_stiff(tableau) for name, (tableau, order) in TABLEAUX.items() if order == 4}
    assert fourth == {
        "etdrk4": False,
        "krogstad": False,
        "strehmel_weiner": False,
        "hochbruck_ostermann": True,
    }


@pytest.mark.parametrize(
    ("name", "a", "b"),
    [
        ("second_order(1)", [[1]], [Fraction(1, 2)] * 2),
        ("second_order(1/2)", [[Fraction(1, 2)]], [0, 1]),
        ("etdrk3", [[Fraction(1, 2)], [-1, 2]], [Fraction(1, 6), Fraction(2, 3), Fraction(1, 6)]),
        (
            "etdrk4",
            [[Fraction(1, 2)], [0, Fraction(1, 2)], [0, 0, 1]],
            [Fraction(1, 6), Fraction(1, 3), Fraction(1, 3), Fraction(1, 6)],
        ),
    ],
    ids=["Heun", "midpoint", "Kutta's third order", "the classical fourth order"],
)
def test_without_a_linear_part_they_are_the_classical_methods(name, a, b):
    _, series_a, series_b = expanded(TABLEAUX[name][0])
    for row, expected in zip(series_a[1:, :, 0], a, strict=True):
        np.testing.assert_allclose(row[: len(expected)], [float(v) for v in expected], atol=1e-15)
    np.testing.assert_allclose(series_b[:, 0], [float(v) for v in b], atol=1e-15)


@pytest.mark.parametrize("exponent", [2, 3])
def test_res_3_with_the_printed_cube_is_third_order_at_c3_equal_to_one_alone(exponent):
    """gamma = (3 c3^3 - 2 c3) / ..., as RES4LYF has it, against c3^2."""

    def ported(c2, c3):
        def weights(p):
            gamma = (3 * c3**exponent - 2 * c3) / (c2 * (2 - 3 * c2))
            b3 = p(2) / (gamma * c2 + c3)
            return [[], [gamma * c2 * p(2, c2) + c3**2 / c2 * p(2, c3)], [gamma * b3, b3]]

        return tableaux.Tableau((0.0, c2, c3), weights)

    assert order_of(ported(0.5, 1.0)) == 3
    assert order_of(ported(0.4, 0.9)) == (3 if exponent == 2 else 2)


@pytest.mark.parametrize("name", ["krogstad", "hochbruck_ostermann"])
def test_a_planted_error_lowers_the_order(name):
    tableau, _ = TABLEAUX[name]

    def damaged(p):
        rows = tableau.weights(p)
        rows[-1][-1] = rows[-1][-1] * 1.001
        return rows

    assert order_of(tableaux.Tableau(tableau.positions, damaged)) < 2


@pytest.mark.parametrize("positions", [(), (0.1, 0.5), (0.0, 1.5), (0.0, -0.1)])
def test_positions_outside_the_step_are_refused(positions):
    with pytest.raises(ValueError, match="expected c_1 = 0"):
        sv.tableaux.Tableau(positions, lambda p: [[]])

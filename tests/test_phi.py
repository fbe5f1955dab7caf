"""phi-functions against exact rational arithmetic."""

from fractions import Fraction
from math import factorial

import numpy as np
import pytest
import torch

from solvers.phi import moment, phi


def exact(k, z):
    """The series in rationals, to 60 digits."""
    z, term, total, n = Fraction(z), Fraction(1, factorial(k)), Fraction(0), 0
    while abs(term) > Fraction(1, 10**60) or n < 2 * abs(z):
        total += term
        n += 1
        term *= z / (n + k)
    return total


@pytest.mark.parametrize("k", range(10))
def test_phi_is_accurate_for_every_step(k):
    sizes = [1e-12, 1e-6, 1e-3, 0.03, 0.3, 0.99, 1.0001, 1.7, 2.3, 3.99, 4.01, 6.0, 9.5, 30.0]
    for z in [*sizes, *(-size for size in sizes)]:
        got = phi(k, torch.tensor(z, dtype=torch.float64)).item()
        assert abs(Fraction(got) / exact(k, z) - 1) < 2e-14, (k, z)


@pytest.mark.parametrize("k", range(1, 5))
def test_limits_are_exact(k):
    ends = phi(k, torch.tensor([0.0, -torch.inf], dtype=torch.float64))
    assert ends.tolist() == [1 / factorial(k), 0.0]


@pytest.mark.parametrize("rate", [1.0, -1.0])
def test_moments_are_the_integrals(rate):
    """Against Gauss-Legendre quadrature of exp(rate (h - u)) u^k."""
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(30))
    for h in (0.01, 0.7, 3.0):
        u = h * (nodes + 1) / 2
        for k in range(6):
            integral = (h / 2 * weights * torch.exp(rate * (h - u)) * u**k).sum().item()
            assert moment(k, torch.tensor(h, dtype=torch.float64), rate).item() == pytest.approx(
                integral, rel=1e-13
            )

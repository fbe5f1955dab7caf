"""phi-functions and exponential moments at full float64 precision for any step."""

import math

import torch
from torch import Tensor

TAYLOR_TERMS = 22  # 1/22! < 1e-21: below float64 rounding for |z| < 1


def phi(k: int, z: Tensor) -> Tensor:
    """phi_k(z) = sum_n z^n / (n + k)!, so phi_0 = exp and phi_{k+1}(z) = (phi_k(z) - 1/k!) / z.

    Source: Hochbruck & Ostermann 2005, eq. 2.3. The recursion loses eps/|z|^k to cancellation, so for |z| < 1
    the series is summed instead. z = -inf gives the limit: 0 for every k.

    Args:
        k: index, >= 0.
        z: any shape, float64.

    Returns:
        phi_k(z), the shape of z, float64.
    """
    small = z.abs() < 1
    inside, outside = torch.where(small, z, 0.0), torch.where(small, 1.0, z)
    series = torch.full_like(z, 1 / math.factorial(k + TAYLOR_TERMS))
    for n in reversed(range(TAYLOR_TERMS)):
        series = series * inside + 1 / math.factorial(n + k)
    if k == 0:
        return torch.exp(z)
    recursion = torch.expm1(outside) / outside
    for n in range(1, k):
        recursion = (recursion - 1 / math.factorial(n)) / outside
    return torch.where(small, series, recursion)


def moment(k: int, h: Tensor, rate: float) -> Tensor:
    """Integral over a step of u^k against the kernel: int_0^h exp(rate (h - u)) u^k du = k! h^{k+1} phi_{k+1}(rate h).

    Args:
        k: power, >= 0.
        h: step lengths, any shape, float64, finite.
        rate: exponent of the kernel; +1 in noise form, -1 in data form.

    Returns:
        The moments, the shape of h, float64.
    """
    return math.factorial(k) * h ** (k + 1) * phi(k + 1, rate * h)

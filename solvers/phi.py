"""phi-functions and exponential moments, accurate in float64 for any step."""

import math

import torch
from torch import Tensor

TAYLOR_TERMS = 28  # the last is below float64 rounding wherever the series is used

NUMBERS = torch.arange(1, 64, dtype=torch.float64, device="cpu")
INVERSE = 1 / NUMBERS.cumprod(0)  # 1/1!, 1/2!, ...


def phi(k: int, z: Tensor) -> Tensor:
    """phi_k(z) = sum_n z^n / (n + k)!, so phi_0 = exp and phi_{k+1}(z) = (phi_k(z) - 1/k!) / z.

    Each step of the recursion loses digits where |z| < k; the terms of the series fall from the first on where |z| < k + 1,
    so there the series is summed (up to |z| = 4, which the recursion from expm1 survives). Relative error below 2e-14 for
    k <= 9 and every z. z = -inf gives the limit 0.
    Source: Hochbruck & Ostermann 2005 (doi 10.1137/040611434), section 2.

    Args:
        k: index, >= 0.
        z: any shape, float64.

    Returns:
        The values, the shape of z, float64.
    """
    return phis(k, z)[..., -1] if k else torch.exp(z)


def phis(most: int, z: Tensor) -> Tensor:
    """phi_1(z), ..., phi_most(z), each as `phi` has it: [*shape of z, most], float64."""
    size, limits = z.abs(), NUMBERS[1 : most + 1].clamp(max=4)
    inside, outside = z.clamp(-4, 4), torch.where(size < 2, 1.0, z)
    powers = inside[..., None, None].expand(*z.shape, 1, TAYLOR_TERMS - 1).cumprod(-1)
    series = INVERSE[:most] + (powers * INVERSE.unfold(0, TAYLOR_TERMS, 1)[:most, 1:]).sum(-1)
    recursion = [torch.expm1(outside) / outside]
    for k in range(1, most):
        recursion.append((recursion[-1] - 1 / math.factorial(k)) / outside)
    return torch.where(size[..., None] < limits, series, torch.stack(recursion, -1))


def moment(k: int, h: Tensor, rate: float | Tensor) -> Tensor:
    """Integral over a step of u^k against the kernel: int_0^h exp(rate (h - u)) u^k du = k! h^{k+1} phi_{k+1}(rate h).

    Args:
        k: power, >= 0.
        h: step lengths, any shape, float64, finite.
        rate: exponent of the kernel; +1 in noise form, -1 in data form, -(1 + tau^2) in that of an SDE, a tensor like h.

    Returns:
        The moments, the shape of h, float64.
    """
    return math.factorial(k) * h ** (k + 1) * phi(k + 1, rate * h)

"""All elements of a sample: as one dimension, inner products over them, and how they lie in memory."""

import math

import torch
from torch import Tensor
from torch.nn import Parameter


def elements(x: Tensor, first: int = 1) -> Tensor:
    """All dimensions from `first` on as one, also where there are none."""
    return x.flatten(first) if x.ndim > first else x[..., None]


def inner(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """The inner products over all elements of samples like those of x [B, ...], whose dimensions are the last of u and v."""
    return (u * v).sum([*range(1 - x.ndim, 0)]) if x.ndim > 1 else u * v


def laid_like(x: Tensor, t: Tensor, dtype: torch.dtype) -> Tensor:
    """t, or a copy of it that lies in memory as x does, element by element, in that dtype."""
    if t.stride() == x.stride() and t.dtype == dtype and not t.is_neg() and type(t) in (Tensor, Parameter):
        return t
    return torch.empty_like(x, dtype=dtype).copy_(t)


def largest(m: Tensor) -> Tensor:
    """The largest absolute value of each sample, [B]; NaN and infinity survive it."""
    return torch.linalg.vector_norm(m, ord=math.inf, dim=tuple(range(1, m.ndim))) if m.ndim > 1 else m.abs()

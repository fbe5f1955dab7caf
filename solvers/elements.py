"""All elements of a sample as one dimension, and inner products over them."""

from torch import Tensor


def elements(x: Tensor, first: int = 1) -> Tensor:
    """All dimensions from `first` on as one, also where there are none."""
    return x.flatten(first) if x.ndim > first else x[..., None]


def inner(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """The inner products over all elements of samples like those of x [B, ...], whose dimensions are the last of u and v."""
    return (u * v).sum([*range(1 - x.ndim, 0)]) if x.ndim > 1 else u * v

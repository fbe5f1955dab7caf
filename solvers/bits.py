"""Bits per dimension, and whole numbers spread over their bins."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.arguments import increasing, whole
from solvers.noise import BINS, Noise, as_source, drawn

MOST_BINS = 2**16  # of which single precision has a hundred places in each


def bits_per_dim(
    log_p: Tensor, shape: Sequence[int], bins: int | None = None, low: float = -1.0, high: float = 1.0
) -> Tensor:
    """Bits per dimension of data of whole numbers 0 .. bins - 1 that were spread over [low, high] as by `dequantized`.

    -log_p / (d log 2) + log2(bins / (high - low)): the offset is 7 for 256 bins on [-1, 1], 8 on [0, 1]. Log-probabilities, as of `Decoder(levels=...)`,
    have none: bins=1, low=0, high=1.
    Source: Theis et al. 2016 (arXiv 1511.01844), section 3.1.

    Args:
        log_p: log-densities in nats, [B].
        shape: of one sample; d is its number of elements.
        bins: how many values an element has on [low, high].
        low: where the first bin begins.
        high: where the last bin ends.

    Raises:
        ValueError: no bins: there is no number of bits without them.
    """
    if bins is None:
        raise ValueError(
            "bins = None: a density has as many bits as its unit of volume says; give the number of bins on [low, high], e.g. bins=256 for pixels 0 .. "
            "255 spread over [-1, 1]; bins=1, low=0, high=1 for log-probabilities"
        )
    if not isinstance(log_p, Tensor):
        raise TypeError(f"log_p is {type(log_p).__name__}: expected log-densities [B], e.g. found.log_p")
    whole("bins", bins, 1, MOST_BINS, example=256)
    increasing(low=low, high=high)
    if not isinstance(shape, Sequence):
        raise TypeError(f"shape = {shape!r:.100}: expected that of one sample, e.g. x.shape[1:]")
    d = math.prod(shape)
    if d < 1:
        raise ValueError(f"shape = {tuple(shape)}: expected that of one sample, with at least one element")
    return -log_p / (d * math.log(2)) + math.log2(bins / (high - low))


def dequantized(values: Tensor, bins: int, noise: Noise, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Whole numbers spread evenly over their bins: low + (high - low) (values + U) / bins with U uniform in [0, 1), [B, ...], float32.

    The mean log-density of the result is at most the log-probability of the values less d log((high - low) / bins): `bits_per_dim` is a bound.
    Source: Theis et al. 2016 (arXiv 1511.01844), section 3.1.

    Args:
        values: whole numbers 0 .. bins - 1, [B, ...], of any dtype.
        bins: how many there are.
        noise: a noise source, a torch.Generator, or an int seed.
        low: where the first bin begins.
        high: where the last bin ends.

    Raises:
        ValueError: a value that is no whole number, or outside 0 .. bins - 1.
    """
    whole("bins", bins, 1, MOST_BINS, example=256)
    increasing(low=low, high=high)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"values is {type(values).__name__}: expected a tensor of whole numbers, e.g. torch.from_numpy(pixels)"
        )
    exactly = values.double()
    bad = ~((exactly >= 0) & (exactly < bins) & (exactly == exactly.round()))
    if bad.any():
        raise ValueError(
            f"values has {exactly[bad][0]:g}: expected whole numbers from 0 to bins - 1 = {bins - 1}"
        )
    uniform = torch.special.ndtr(drawn(as_source(noise, len(values), BINS), 0, exactly))
    x, end = ((low + (high - low) * (exactly + u) / bins).float() for u in (uniform, 1.0))
    return torch.where(x < end, x, torch.nextafter(end, torch.full_like(end, -math.inf)))

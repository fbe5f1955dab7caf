"""Where randomness comes from: one stream per sample."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from solvers.arguments import whole
from solvers.schedules import Schedule, float64

# (number of the draw, a tensor like it) -> standard normals of that shape
Source = Callable[[int, Tensor], Tensor]
Noise = Source | torch.Generator | int  # what a user may give
STEPS, START = 0, 1  # independent streams of one sample


@dataclass(frozen=True)
class PerSample:
    """Noise of which sample i depends on (seed, ids[i], draw) alone: the same in any batch, chunk or order of batches.

    Drawn on the host by a counter-based generator (Philox) in float64, then cast and moved, so it is the same for every
    dtype and device.

    Attributes:
        seed: 0 <= seed < 2^63.
        ids: the samples' numbers, distinct and not negative, [B].
    """

    seed: int
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        whole("seed", self.seed, 0, 2**63 - 1)
        for sample in self.ids:
            whole("ids", sample, 0, 2**63 - 1)
        if len(set(self.ids)) != len(self.ids):
            raise ValueError("ids has a sample twice: two samples would get the same noise")

    def __call__(self, draw: int, like: Tensor) -> Tensor:
        """Draw number `draw` for a step: standard normals with the shape, dtype and device of `like` [B, ...]."""
        if len(like) != len(self.ids):
            raise ValueError(
                f"noise is for {len(self.ids)} samples, but the batch has {len(like)}: give one id per sample"
            )
        return self._normals(STEPS, draw, like.shape[1:]).to(like)

    def initial(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normals [B, *shape] to start from, independent of every draw for a step."""
        return self._normals(START, 0, shape).to(dtype)

    def _normals(self, stream: int, draw: int, shape: Sequence[int]) -> Tensor:
        values = np.empty((len(self.ids), *shape))
        for i, sample in enumerate(self.ids):
            bits = np.random.Philox(key=[self.seed, sample], counter=[0, draw, stream, 0])
            values[i] = np.random.Generator(bits).standard_normal(tuple(shape))
        return torch.from_numpy(values)


def per_sample(seed: int, ids: Sequence[int]) -> PerSample:
    """One noise stream per sample: sample i's noise does not depend on the batch it is in.

    Args:
        seed: 0 <= seed < 2^63.
        ids: the samples' numbers, [B]; any distinct whole numbers.

    Raises:
        ValueError: a seed or id that is not a whole number in range, or an id twice.
    """
    return PerSample(
        whole("seed", seed, 0, 2**63 - 1), tuple(whole("ids", sample, 0, 2**63 - 1) for sample in ids)
    )


def noised(x0: Tensor, schedule: Schedule, t: Tensor | float, noise: Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) noise.

    Args:
        x0: data, [B, ...].
        schedule: noise schedule.
        t: time, one for all or one per sample, [B].
        noise: standard normals, the shape of x0.

    Returns:
        The state at t, [B, ...].

    Raises:
        ValueError: the shapes differ.
    """
    if noise.shape != x0.shape:
        raise ValueError(f"noise has shape {list(noise.shape)}: expected that of x0, {list(x0.shape)}")
    t = float64(t)
    if t.ndim > 1 or (t.ndim == 1 and len(t) != len(x0)):
        raise ValueError(
            f"t has shape {list(t.shape)}: expected one time, or one for each of the {len(x0)} samples"
        )
    column = [-1] + [1] * (x0.ndim - 1)
    alpha, sigma = (level(t).to(x0).reshape(column) for level in (schedule.alpha, schedule.sigma))
    return alpha * x0 + sigma * noise


def as_source(noise: Noise, batch: int) -> Source:
    """A noise source as it is, a torch.Generator, or a seed: samples 0 .. batch - 1 of that seed."""
    if isinstance(noise, torch.Generator):
        return lambda draw, like: torch.randn(
            like.shape, generator=noise, device=noise.device, dtype=like.dtype
        ).to(like.device)
    if callable(noise):
        return noise
    if isinstance(noise, Tensor):
        raise TypeError(
            "noise is a Tensor: expected an int seed, a torch.Generator, or a function (draw, like) -> normals"
        )
    return per_sample(noise, range(batch))

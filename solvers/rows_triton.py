"""A row in one pass over the memory of a CUDA device, in Triton; imported where it is asked for."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from solvers.elements import laid_like, largest

BLOCK = 1024  # elements of one program


@triton.jit(do_not_specialize=["start"])
def one_pass(
    table, start, x, m, out, kept, flags, terms, size, per_sample,
    COUNT: tl.constexpr, KEEPS: tl.constexpr, FLAGS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As rows.c, whose words these are; flags [B] <- inf where a sample of m is not finite."""
    weights = table + start
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x_at = tl.load(x + at, mask=inside)
    m_at = tl.load(m + at, mask=inside, other=0.0).to(x_at.dtype)
    following = tl.load(weights) * x_at + tl.load(weights + 1) * m_at
    for k in tl.static_range(COUNT):
        following += tl.load(weights + 4 + k) * tl.load(terms[k] + at, mask=inside).to(x_at.dtype)
    if KEEPS:
        keep = tl.load(weights + 2) * x_at + tl.load(weights + 3) * m_at
        tl.store(kept + at, keep.to(kept.dtype.element_ty), mask=inside)
    tl.store(out + at, following, mask=inside)
    if FLAGS:
        tl.store(flags + at // per_sample, float("inf"), mask=inside & (m_at - m_at != 0))


class InTriton:
    """The kernel for states like x; terms may be of half precision."""

    marks = True

    def __init__(self, x: Tensor):
        self.size = x.numel()
        self.per_sample = self.size // len(x)
        self.in_order = x.stride(0) == self.per_sample  # sample by sample in memory

    def __call__(
        self,
        table: Tensor,
        row: int,
        x: Tensor,
        m: Tensor,
        terms: Sequence[Tensor],
        out: Tensor,
        kept: Tensor | None,
        flags: Tensor | None,
    ) -> bool:
        """See `Kernel` of kernels.py."""
        if flags is not None and not self.in_order:
            flags = flags.copy_(largest(m))
        m = laid_like(x, m, m.dtype)
        programs = triton.cdiv(self.size, BLOCK)
        with torch.cuda.device_of(x):
            one_pass[(programs,)](
                table, row * table.stride(0), x, m, out, x if kept is None else kept, x if flags is None else flags,
                tuple(terms), self.size, self.per_sample, COUNT=len(terms), KEEPS=kept is not None,
                FLAGS=flags is not None and self.in_order, BLOCK=BLOCK, enable_fp_fusion=True,
            )  # fmt: skip
        return True

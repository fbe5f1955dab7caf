"""A row in one pass over memory: a function in C for a state on a CPU, a Triton kernel for one on CUDA."""

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.elements import laid_like

REALS = {torch.float32: ("float", "FLT_MAX"), torch.float64: ("double", "DBL_MAX")}
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TUNED = (
    ("-march=native", "-mprefer-vector-width=512"),
    ("-march=native",),
    (),
)  # the first that the compiler knows
NO_HISTORY = "rows.c keeps outputs in the state's dtype"
COMPILING = Lock()
SHARE = 2**17  # elements that keep a thread busy for longer than it takes to wake one


class Kernel(Protocol):
    """Applies a row to a state in one pass; made for states that lie in memory as one does.

    Attributes:
        marks: whether it says by flags, instead of by what it returns, that m is not finite: on a device, where nobody waits to know.
    """

    marks: bool

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
        """out <- w[0] x + w[1] m + sum_k w[4 + k] terms[k];  kept <- w[2] x + w[3] m, if there is one; with w = table[row].

        out may be x, and kept one of the terms; all but m lie in memory as x does. Returns whether m is finite, or makes flags [B] infinite or NaN where a sample of m is not.
        """


def kernel_for(
    x: Tensor, fused: bool | None, history: torch.dtype | None = None, check: bool = True
) -> Kernel | None:
    """The kernel for a dense state like x, float32 or float64; None for torch's own scaled additions.

    Args:
        x: the state, [B, ...].
        fused: True for a kernel, False for none; None for one on a CPU where a C compiler is found.
        history: the dtype of kept outputs, if not the state's: there is no kernel for that on a CPU.
        check: whether x is to be what it was where m is not finite, if anybody is told so.

    Raises:
        RuntimeError: fused is True, but there is no compiler, no Triton, or another device.
    """
    if fused is False:
        return None
    if type(x) is not Tensor or forward_ad._current_level >= 0:
        if fused:
            raise RuntimeError(
                "fused = True: expected x to be a plain tensor, and no forward-mode derivatives"
            )
        return None
    if x.device.type == "cpu":
        with COMPILING:
            function, reason = _compiled(x.dtype) if not history else (None, NO_HISTORY)
        if not reason:
            return InC(function, x, check)
        if fused:
            raise RuntimeError(f"fused = True, but {reason}: leave it out for torch's own operations")
        return None
    if not fused:
        return None
    if x.device.type == "cuda" and find_spec("triton"):
        from solvers.rows_triton import InTriton

        return InTriton(x)
    raise RuntimeError(
        f"fused = True with x on {x.device}: expected a CPU with a C compiler, or CUDA with Triton 3.2 or newer (pip install triton); leave it out for "
        "torch's own operations"
    )


class InC:
    """rows.c for states like x on a CPU; a large one is shared out among as many threads as torch has."""

    marks = False

    def __init__(self, function: Any, x: Tensor, check: bool):
        self.function, self.size, self.check = function, x.numel(), check
        self.strides, self.itemsize = x.stride(), x.itemsize
        self.table, self.first, self.row_bytes = x, 0, 0  # the table of weights that was last asked for
        shares = max(min(torch.get_num_threads(), self.size // SHARE), 1)
        self.spans = list(pairwise(self.size * k // shares for k in range(shares + 1)))
        self.pool = ThreadPoolExecutor(shares - 1) if shares > 1 else None

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
        """See `Kernel`."""
        if m.stride() != self.strides or m.is_neg() or type(m) is not Tensor:
            m = laid_like(x, m, x.dtype)
        if table is not self.table:
            self.table, self.first = table, table.data_ptr()
            self.row_bytes = table.stride(0) * self.itemsize
            self.addresses = (ctypes.c_void_p * max(table.shape[1] - 4, 1))()  # of the terms
        for k, term in enumerate(terms):
            self.addresses[k] = term.data_ptr()
        start = x.data_ptr()
        given: Any = (
            start,
            m.data_ptr(),
            start if out is x else out.data_ptr(),
            None if kept is None else kept.data_ptr(),
            len(terms),
            self.addresses,
            self.first + row * self.row_bytes,
            self.check,
        )
        if self.pool is None:
            return not self.function(0, self.size, *given)
        here, others, alive = self.spans[:1], [], (table, x, m, out, kept, *terms)
        for span in self.spans[1:]:
            try:
                others.append(self.pool.submit(self._share, span, given, alive))
            except RuntimeError:  # the interpreter is on its way out
                here.append(span)
        found = [self.function(*span, *given) for span in here]
        return not any([*found, *(other.result() for other in others)])

    def _share(self, span: tuple[int, int], given: Any, alive: tuple) -> int:
        """A part of the pass, which keeps its memory alive should the thread that asked for it be interrupted."""
        return self.function(*span, *given)


@cache
def _compiled(dtype: torch.dtype) -> tuple[Any, str]:
    """The function of rows.c for a dtype, compiled once in a process, in 0.2 s; or None, and why."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if not compiler or shutil.which(compiler[0]) is None:
        return None, f"no C compiler {' '.join(compiler)!r} is found"
    real, most = REALS[dtype]
    command = [*compiler, *FLAGS, f"-DREAL={real}", f"-DMAX={most}", str(Path(__file__).with_name("rows.c"))]
    try:
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder, "rows.so"))
            for tuned in TUNED:
                made = subprocess.run([*command, *tuned, "-o", library], capture_output=True, check=False)
                if made.returncode == 0:
                    break
            else:
                return (
                    None,
                    f"{compiler[0]} does not compile rows.c: {made.stderr.decode(errors='replace').strip()[:300]}",
                )
            function = ctypes.CDLL(library).row
    except (OSError, AttributeError) as error:  # no program, or a folder from which nothing may be executed
        return None, f"rows.c is not compiled or not loaded: {error}"
    pointer = ctypes.c_void_p
    size, number = ctypes.c_int64, ctypes.c_int
    function.argtypes = [size, size, *[pointer] * 4, number, pointer, pointer, number]
    return function, ""

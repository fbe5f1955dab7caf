"""A run made ready for one shape: captured once in a CUDA graph, and replayed for every start and noise."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from solvers.arguments import flag
from solvers.loop import State, execute
from solvers.noise import Noise, drawn
from solvers.plan import Plan
from solvers.predictions import AnyModel, as_model
from solvers.rows import rows_of
from solvers.run import check_speed, check_state, run, source_of, started, warn_of_training

WARM_UPS = (
    3  # runs before the capture, in which libraries choose their algorithms and allocate what they keep
)


class Sampler:
    """`run` of one plan and model for one shape; made by `compiled_sampler`. One thread and one stream at a time may call it.

    Attributes:
        captured: whether calls replay a CUDA graph; False where the plan runs call by call.
    """

    def __init__(
        self, plan: Plan, model: AnyModel, x: Tensor, fused: bool | None = None, check: bool = True
    ) -> None:
        """Capture, if it can be done. x is the memory from which the graph reads its start, [B, ...]."""
        self.plan, self.model, self.x, self.fused, self.check = plan, as_model(model), x, fused, check
        self.captured = False
        if not _has_graphs(x):
            self._warn(f"x is on {x.device}, and CUDA graphs need a CUDA device")
            return
        warn_of_training(self.model)
        state = started(x)
        self._rows = rows_of(plan, self.model, state.x)
        last = plan.pattern.last_draw
        self._draws = {
            i: torch.zeros_like(state.x)
            for i, row in enumerate(self._rows)
            if plan.is_stochastic and (last[i] >= i or row.variance)
        }
        caches = torch.is_autocast_cache_enabled()
        with torch.cuda.device(x.device), torch.inference_mode(False):
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            try:
                torch.set_autocast_cache_enabled(False)  # a graph would read its memory when that is gone
                with torch.cuda.stream(aside):
                    self._capture(aside)
            finally:
                torch.set_autocast_cache_enabled(caches)
            here.wait_stream(aside)

    def __call__(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """What `run` gives for this start and noise, to rounding.

        Args:
            x: the state at plan.times[0], of the shape, dtype and device that the sampler was made for.
            noise: as for `run`; all of it is drawn before the first call.

        Raises:
            ValueError: another shape, dtype or device; a stochastic plan has no noise.
            NonFiniteError: the samples are not finite, if `check`; it says in which call an output was not.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"x is {type(x).__name__}: expected a torch.Tensor")
        for name in ("shape", "dtype", "device"):
            came, wanted = getattr(x, name), getattr(self.x, name)
            if came != wanted:
                raise ValueError(
                    f"x has {name} {came}: expected {wanted}, for which the sampler was made; make another for this one"
                )
        check_state(x, grad=False)
        if not self.captured:
            return run(self.plan, self.model, x, noise, fused=self.fused, check=self.check)
        source = source_of(self.plan, noise, len(x))
        self.x.copy_(x)
        for number, held in self._draws.items():
            assert source is not None
            held.copy_(drawn(source, number, held))
        self._graph.replay()
        if self.check and not self._end.isfinite().all():
            self._loop(check=True)  # says in which call
            raise ArithmeticError(
                "the samples are not finite, though the outputs were when the network was called again"
            )
        return self._end.clone()

    @torch.no_grad()
    def _loop(self, check: bool = False) -> Tensor:
        """The plan from the start and the noise that are held."""
        state = State(started(self.x).x, input_dtype=self.x.dtype)
        rows = [row._replace(label=row.label.clone()) for row in self._rows]  # which the network may edit
        return execute(
            self.plan, self.model, state, lambda draw, like: self._draws[draw], rows, self.plan.rows,
            check=check, fused=self.fused,
        )  # fmt: skip

    def _capture(self, stream: torch.cuda.Stream) -> None:
        for _ in range(WARM_UPS):
            self._loop()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=stream):
                self._end = self._loop()
        except RuntimeError as error:  # of the driver, after what the network did
            del self._rows, self._draws
            self._warn(f"the network could not be captured ({error.__context__ or error!s:.300})", 5)
            return
        self._graph, self.captured = graph, True

    def _warn(self, reason: str, level: int = 4) -> None:
        warnings.warn(f"{reason}: the sampler runs the plan call by call", stacklevel=level)


def _has_graphs(x: Tensor) -> bool:
    return x.device.type == "cuda"


def compiled_sampler(
    plan: Plan,
    model: AnyModel,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    fused: bool | None = None,
    check: bool = True,
) -> Sampler:
    """The whole loop, network included, captured in a CUDA graph: `sampler(x, noise)` replays it with one launch.

    For small networks, whose kernels take less time than Python takes to launch them. The graph keeps the memory of one run, and of the noise of
    a stochastic plan one state a draw. The network is called some times while it is made, and never again by Python: what it reads must stay
    where it is, on the device too, and code that depends on values on the device cannot be captured. Where that is so, or off CUDA, a
    warning says why, and the sampler runs the plan call by call; torch itself may be the worse for a failed capture (before 2.13 its
    generators and its allocator were), so do not count on it. Autocast is what it was when the sampler was made.

    Args:
        plan: the table.
        model: as for `run`, on the device, in eval mode.
        shape: of x, [B, ...].
        dtype: of x.
        device: of x; None: the current CUDA device, or the CPU where there is none.
        fused: as for `run`.
        check: whether a call looks if its samples are finite, which waits for the device.

    Returns:
        The sampler.

    Raises:
        ValueError: as for `run`.
    """
    if not isinstance(plan, Plan):
        raise TypeError(
            f"plan is {type(plan).__name__}: expected a Plan, e.g. dpm_solver_pp(schedule, times)"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(shape, Sequence) or not all(type(size) is int for size in shape):
        raise TypeError(f"shape = {shape!r:.100}: expected the sizes of x, [B, ...], e.g. (4, 3, 64, 64)")
    if not shape or min(shape) < 1:
        raise ValueError(f"shape = {list(shape)}: expected [B, ...] of positive sizes")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype = {dtype!r:.100}: expected that of x, a floating-point dtype")
    check_speed(plan, False, fused, None)
    with torch.inference_mode(False):
        x = torch.zeros(*shape, dtype=dtype, device=device)
        return Sampler(plan, model, x, fused, flag("check", check))

"""The device: its clock, memory, graphs and executors, and how often the host waits for it. A CPU does without, or counts None."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from time import perf_counter

import torch

import solvers as sv

WAITED = "called a synchronizing CUDA operation"  # begins the warning of torch's sync debug mode


def default_device() -> torch.device:
    """The accelerator if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def executors(device: torch.device) -> dict[str, bool]:
    """What `run` takes as `fused` for each executor that there is: a kernel needs a C compiler, or Triton."""
    plan, x = sv.ddim(sv.VP(), sv.uniform(sv.VP(), 1)), torch.zeros(1, 1, device=device)
    try:
        sv.run(plan, lambda x, t: x.clone(), x, fused=True)
    except Exception as error:  # of a compiler, whatever it raises
        warnings.warn(f"no fused runs are measured: {error}", stacklevel=2)
        return {"eager": False}
    return {"eager": False, "fused": True}


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """The time of a call until the device is done with it."""
    synchronize(device)
    start = perf_counter()
    call()
    synchronize(device)
    return perf_counter() - start


def mark(device: torch.device) -> torch.cuda.Event | float:
    """This moment: of the device, in the order of what it is asked, or of the clock."""
    if device.type != "cuda":
        return perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first: torch.cuda.Event | float, second: torch.cuda.Event | float) -> float:
    """Seconds from one moment to the next; of a device only once it is synchronized."""
    if isinstance(first, float):
        return second - first
    return 1e-3 * first.elapsed_time(second)


def peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that torch allocated in a call at its most, beyond those before it; None on a CPU, where nobody counts."""
    if device.type != "cuda":
        call()
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Waits:
    """How often the host has waited for the device so far, and how often it had at each mark."""

    def __init__(self, caught: list[warnings.WarningMessage] | None):
        self.caught = caught
        self.marks: list[int] = []

    def mark(self) -> None:
        """Note the number so far."""
        self.marks.append(self.total or 0)

    @property
    def total(self) -> int | None:
        """None on a CPU."""
        if self.caught is None:
            return None
        return sum(str(warning.message).startswith(WAITED) for warning in self.caught)

    @property
    def between(self) -> int | None:
        """From the first mark to the last; None on a CPU, or without marks."""
        return self.marks[-1] - self.marks[0] if self.caught is not None and self.marks else None


@contextmanager
def waits(device: torch.device) -> Iterator[Waits]:
    """Count the warnings of torch's sync debug mode, which sees what torch waits for, but no copies from pageable memory asked not to block."""
    if device.type != "cuda":
        yield Waits(None)
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield Waits(caught)
        finally:
            torch.cuda.set_sync_debug_mode(before)


def graphed(
    call: Callable[[], object], warm_up: Callable[[], object], device: torch.device
) -> Callable[[], object]:
    """The replay of a CUDA graph of a call, which reads and writes the same memory every time; on a CPU the call itself."""
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(
        device
    )  # what runs for the first time makes handles and workspaces, which no graph may
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def release(device: torch.device) -> None:
    """Give back what torch keeps of freed memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()

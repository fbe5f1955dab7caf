"""The state of a plan that is executed from outside, a step at a time: which call it is, and what is kept for the next."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from solvers.arguments import number
from solvers.discrete import Discrete
from solvers.loop import State
from solvers.plan import Plan
from solvers.rows import Row
from solvers.schedules import Flow


@dataclass
class Run:
    """What one thread's sampling has come to: the plan, and the state between two steps."""

    schedule: Discrete | Flow
    times: Tensor  # the outer grid
    plan: Plan
    timesteps: Tensor  # one for each call, on the host
    on_device: Tensor  # the same where the pipeline wants them
    sigmas: Tensor  # at each call and at the end
    firsts: list[int]  # the call that begins each step
    begin: int | None = None
    index: int | None = None  # of the next call; None before the first
    rows: list[Row] | None = None
    state: State | None = None
    returned: tuple[Tensor, int] | None = None  # what the last step gave, and its version

    def order(self) -> int:
        """Calls in a step; 1 where steps differ in that, but for the last, which may make fewer."""
        counts = [b - a for a, b in pairwise([*self.firsts, len(self.timesteps)])]
        return counts[0] if set(counts[:-1]) <= {counts[0]} and counts[-1] <= counts[0] else 1

    def place(self, timestep: float | Tensor) -> int | None:
        """Which of the timesteps this is, by where it lies in memory, and no look at a device; None if it lies elsewhere."""
        ours = self.on_device
        if not isinstance(timestep, Tensor) or timestep.numel() != 1 or timestep.dtype != ours.dtype:
            return None
        if timestep.untyped_storage().data_ptr() != ours.untyped_storage().data_ptr():
            return None
        return int(timestep.storage_offset() - ours.storage_offset())

    def found(self, timestep: float | Tensor) -> int:
        """Which of the timesteps has this value. It is asked of a copy on a device at the first step alone, if nobody said where to begin."""
        here = (self.timesteps == _value(timestep)).nonzero().flatten().tolist()
        if len(here) != 1:
            raise ValueError(
                f"timestep = {timestep} is {'more than once in' if here else 'not among'} the timesteps of this run: pass an element of "
                "scheduler.timesteps, or say where to start by scheduler.set_begin_index(i)"
            )
        return here[0]

    def check_turn(self, timestep: float | Tensor) -> None:
        """The timestep is the one whose turn it is, as far as that can be seen without the device."""
        assert self.index is not None
        if self.index >= len(self.timesteps):
            raise ValueError(
                f"the run is over after {len(self.timesteps)} calls: call scheduler.set_timesteps for another"
            )
        place = self.place(timestep)
        if place is None and not (isinstance(timestep, Tensor) and timestep.device.type != "cpu"):
            place = self.index if _value(timestep) == self.timesteps[self.index].item() else -1
        if place not in (None, self.index):
            raise ValueError(
                f"timestep = {timestep} is out of turn: expected {self.timesteps[self.index]}, the one of call {self.index}"
            )

    def before(self, sample: Tensor) -> State:
        """The state before a step: the sample, or, if that is what the last step gave, what it gave before rounding."""
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        if self.state is None:
            return State(sample.to(dtype))
        if sample.shape != self.state.x.shape:
            raise ValueError(
                f"sample has shape {list(sample.shape)} in call {self.index}: expected that of the calls before, {list(self.state.x.shape)}"
            )
        unchanged = (
            self.returned is not None and sample is self.returned[0] and sample._version == self.returned[1]
        )
        return self.state if unchanged else replace(self.state, x=sample.to(dtype))

    def after(self, state: State, dtype: torch.dtype) -> Tensor:
        """What the pipeline is given, and what is kept for the next step, if there is one."""
        assert self.index is not None
        following = state.x.to(dtype)
        self.index += 1
        over = self.index == len(self.timesteps)
        self.state = None if over else state
        self.returned = None if over else (following, following._version)
        return following


def _value(timestep: float | Tensor) -> float:
    return number("timestep", timestep)  # type: ignore[arg-type]

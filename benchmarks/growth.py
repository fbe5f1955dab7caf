"""How the cost of a run grows with steps, batch, dimension and history, and that of building a plan with steps. Writes records.

python benchmarks/growth.py --out benchmarks/records/growth.jsonl
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path

import torch
from device import default_device, executors, seconds
from lines import USUAL_STEPS
from records import Build, Growth, threads, write
from torch import Tensor

import solvers as sv
from solvers.comparison import FAST
from solvers.methods import BUILDS

SHAPE = (16, 4, 64, 64)  # where they are not what grows
METHOD, ORDER = "exponential_adams", 2
VALUES = {
    "steps": (10, 20, 50, 100, 200, 500, 1000),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "dimension": (256, 1024, 4096, 16384, 65536, 262144),  # elements of a sample
    "history": (1, 2, 3, 4, 5, 6),  # outputs that a row weighs: the order of an Adams method
}
BUILD_STEPS = (10, 20, 50, 100, 1000)
GROWN = (
    "ddim",
    "dpm_solver_3",
    "dpm_solver_pp_2m",
    "adams_velocity_4",
    "unipc_3",
    "recommended",
    "sa_solver",
    FAST,
)
LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Case:
    """A run in which one quantity has a value."""

    quantity: str
    value: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of x. Runs of growing length or history have a batch of one, with which all of it stays in a cache."""
        if self.quantity == "dimension":
            return (SHAPE[0], self.value)
        batch = {"batch": self.value, "steps": 1, "history": 1}.get(self.quantity, SHAPE[0])
        return (batch, *SHAPE[1:])

    @property
    def plan(self) -> sv.Plan:
        """Of so many steps."""
        steps = self.value if self.quantity == "steps" else USUAL_STEPS
        order = self.value if self.quantity == "history" else ORDER
        return sv.exponential_adams(sv.VP(), sv.logsnr(sv.VP(), steps), order=order)


def least(
    calls: Sequence[Callable[[], object]], rounds: int, budget: float, device: torch.device
) -> tuple[int, list[float]]:
    """The number of rounds that fit into a budget of seconds, and the least time of each call, taken in turn."""
    for call in calls:
        call()  # warms up: kernels are compiled, memory is mapped
    first = sum(seconds(call, device) for call in calls)
    rounds = max(LEAST_ROUNDS, min(rounds, int(budget / first)))
    gc.collect()
    gc.disable()
    try:
        times = [[seconds(call, device) for call in calls] for _ in range(rounds)]
    finally:
        gc.enable()
    return rounds, [min(column) for column in zip(*times, strict=True)]


def loops(case: Case, plan: sv.Plan, seed: int, device: torch.device) -> list[Callable[[], object]]:
    """The bare network calls of a plan, and its run by each executor. The network returns a fixed tensor."""
    generator = torch.Generator().manual_seed(seed)
    x, output = (torch.randn(case.shape, generator=generator).to(device) for _ in range(2))
    t = torch.zeros(len(x), device=device)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return output

    def bare() -> None:
        for _ in range(plan.nfe):
            net(x, t)

    return [bare, *(partial(sv.run, plan, net, x, fused=fused) for fused in executors(device).values())]


@torch.no_grad()
def growth(
    values: dict[str, Sequence[int]], rounds: int, budget: float, seed: int, device: torch.device
) -> Iterator[Growth]:
    """What every case costs by each executor, less its bare network calls."""
    for quantity, found in values.items():
        for value in found:
            case = Case(quantity, value)
            plan = case.plan
            made, (bare, *whole) = least(loops(case, plan, seed, device), rounds, budget, device)
            for executor, cost in zip(executors(device), whole, strict=True):
                shape = list(case.shape)
                yield Growth(quantity, value, METHOD, executor, shape, plan.rows, cost - bare, made, seed)


def build(name: str, steps: int) -> Callable[[], sv.Plan]:
    """What makes a plan on VP, uniform in log-SNR; its times are made already, but for those of a method that makes its own."""
    if name == FAST:
        return partial(sv.dpm_solver_fast, sv.VP(), steps)
    return partial(BUILDS[name], sv.VP(), sv.logsnr(sv.VP(), steps))


def builds(
    methods: Sequence[str], steps: Sequence[int], rounds: int, budget: float, seed: int
) -> Iterator[Build]:
    """What every plan costs to build."""
    for name, count in product(methods, steps):
        make = build(name, count)
        made, [cost] = least([make], rounds, budget, torch.device("cpu"))
        yield Build(name, count, make().rows, cost, made, seed)


def all_builds(
    rounds: int,
    budget: float,
    seed: int,
    methods: Sequence[str] = (*BUILDS, FAST),
    largest: int = max(BUILD_STEPS),
) -> Iterator[Build]:
    """Every method at the usual steps, and some at other numbers up to the largest."""
    yield from builds(methods, [USUAL_STEPS], rounds, budget, seed)
    others = [n for n in BUILD_STEPS if n != USUAL_STEPS and n <= largest]
    yield from builds([name for name in GROWN if name in methods], others, rounds, budget, seed)


def main(argv: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/growth.jsonl"))
    parser.add_argument(
        "--quantities",
        nargs="*",
        choices=VALUES,
        default=list(VALUES),
        metavar="quantity",
        help="default: all",
    )
    known = [*BUILDS, FAST]
    parser.add_argument(
        "--methods", nargs="+", choices=known, default=known, metavar="method", help="to build"
    )
    parser.add_argument("--largest", type=int, default=10**6, help="leave out values beyond it")
    parser.add_argument("--rounds", type=int, default=100, help="at the most; default: 100")
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds for the rounds of a case; default: 2"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    limits = {"rounds": given.rounds, "budget": given.budget, "seed": given.seed}
    values = {quantity: [v for v in VALUES[quantity] if v <= given.largest] for quantity in given.quantities}
    with threads(given.threads):
        runs = growth(values, **limits, device=default_device())
        write(given.out, chain(runs, all_builds(**limits, methods=given.methods, largest=given.largest)))


if __name__ == "__main__":
    main()

"""Error against calls, for every method, grid and schedule, on problems with a known exact answer. Writes records.

python benchmarks/work_precision.py --out benchmarks/records/work_precision.jsonl.gz
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import cos, pi, sin
from time import perf_counter

import torch
from records import WorkPrecision, arguments, threads, write
from torch import Tensor
from tqdm import tqdm

import solvers as sv
from reference import Distribution, Mixture, digits
from solvers.comparison import errors, within
from solvers.methods import METHODS

CALLS = (5, 6, 8, 10, 12, 15, 20, 30, 50, 100)
SCHEDULES = {"VP": sv.VP(), "EDM": sv.EDM()}
GRIDS = {grid.__name__: grid for grid in (sv.uniform, sv.quadratic, sv.power, sv.logsnr, sv.karras, sv.angle)}
SAMPLERS = {"recommended": 5} | {name: method.order for name, method in METHODS.items()}  # with their orders


def ring() -> Mixture:
    """Five Gaussians of unequal weight on a circle in the plane."""
    angles = [2 * pi * k / 5 for k in range(5)]
    means = torch.tensor([[cos(v), sin(v)] for v in angles], dtype=torch.float64)
    return Mixture(
        torch.arange(1, 6) / 15, means, 0.15**2 * torch.eye(2, dtype=torch.float64).expand(5, 2, 2)
    )


def cloud() -> Mixture:
    """Four Gaussians with random means and covariances in eight dimensions."""
    generator = torch.Generator().manual_seed(8)
    means = torch.randn(4, 8, dtype=torch.float64, generator=generator)
    roots = torch.randn(4, 8, 8, dtype=torch.float64, generator=generator) / 6
    return Mixture(torch.ones(4) / 4, means, roots @ roots.mT + 0.01 * torch.eye(8, dtype=torch.float64))


# problem -> (distribution, starts)
PROBLEMS: dict[str, tuple[Callable[[], Distribution], int]] = {
    "2-D mixture": (ring, 256),
    "8-D mixture": (cloud, 128),
    "digits": (digits, 8),
}


def start(data: Distribution, schedule: sv.Schedule, starts: int, seed: int) -> Tensor:
    """States drawn from the exact marginal at the schedule's start, [starts, *shape], float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = data.draw(starts, generator)
    return sv.noised(x0, schedule, schedule.start, torch.randn(x0.shape, dtype=x0.dtype, generator=generator))


def records(
    problems: Sequence[str],
    schedules: Sequence[str],
    grids: Sequence[str],
    methods: Sequence[str],
    calls: Sequence[int],
    starts: int | None,
    seed: int,
) -> Iterator[WorkPrecision]:
    """All combinations; each exact flow is computed once."""
    total = len(problems) * len(schedules) * len(grids) * len(methods) * len(calls)
    with tqdm(total=total, unit="run") as bar:
        for problem, schedule_name in product(problems, schedules):
            bar.set_description(f"{problem}, {schedule_name}")
            make, default_starts = PROBLEMS[problem]
            data, schedule, n = make(), SCHEDULES[schedule_name], starts or default_starts
            x = start(data, schedule, n, seed)
            exact = data.flow(x, schedule, schedule.start, schedule.stop)
            model = data.model(schedule)
            for grid, name, asked in product(grids, methods, calls):
                bar.update()
                plan = within(name, schedule, GRIDS[grid], asked)
                if plan is None:
                    continue
                began = perf_counter()
                end = sv.run(plan, model, x)
                seconds = perf_counter() - began
                yield WorkPrecision(
                    name,
                    SAMPLERS[name],
                    grid,
                    schedule_name,
                    problem,
                    asked,
                    plan.nfe,
                    *errors(end, exact).values(),  # over all, of the median start
                    seconds,
                    n,
                    seed,
                )


def main(argv: list[str] | None = None) -> None:
    """Run the chosen combinations and write their records."""
    choices = {"problems": PROBLEMS, "schedules": SCHEDULES, "grids": GRIDS, "methods": SAMPLERS}
    parser = arguments(__doc__, "results/work_precision.jsonl.gz", choices, CALLS)
    parser.add_argument("--starts", type=int, help="trajectories per problem; default: 256, 128, 8")
    given = vars(parser.parse_args(argv))
    with threads(given.pop("threads")):
        write(given.pop("out"), records(**given))


if __name__ == "__main__":
    main()

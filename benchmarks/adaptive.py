"""What adaptive steps cost: calls for a true error, adaptive solvers, torchdiffeq's on three variables, and fixed plans. Writes records.

python benchmarks/adaptive.py --out benchmarks/records/adaptive.jsonl
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from records import Adaptive, threads, write
from torch import Tensor
from tqdm import tqdm
from work_precision import cloud, start

import solvers as sv
from reference import Distribution, Mixture, digits
from solvers.blackbox import VARIABLES
from solvers.comparison import errors, within

SCHEDULE = sv.VP()
TOLERANCES = tuple(10 ** (-k / 4) for k in range(2, 23))
ENOUGH = 5e-5  # an error below which no smaller tolerance is asked for
LONGEST = 2500  # calls
STEPS = (3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 42, 50, 70, 100)
FIXED = tuple(  # the best in benchmarks/records/work_precision.jsonl.gz on VP, from 5 to 100 calls
    (method, grid)
    for method in ("recommended", "unipc_angle_2", "unipc_angle_4")
    for grid in (sv.angle, sv.quadratic, sv.power)
)


def line() -> Mixture:
    """Three Gaussians on a line."""
    weights, means, deviations = (
        torch.tensor(v, dtype=torch.float64) for v in ([0.3, 0.45, 0.25], [-1.2, 0.3, 1.5], [0.25, 0.4, 0.3])
    )
    return Mixture(weights, means[:, None], deviations[:, None, None] ** 2)


PROBLEMS: dict[str, Callable[[], Distribution]] = {
    "1-D mixture": line,
    "8-D mixture": cloud,
    "digits": digits,
}
Solve = Callable[..., sv.Solution]  # (model, schedule, x, rtol=, atol=)
PAIR = partial(sv.adaptive, max_nfe=LONGEST)
SOLVERS: dict[str, Solve] = {
    "adams": sv.adaptive,
    "exponential RK 3(2)": partial(PAIR, method="exponential_rk", order=3),
    "exponential RK 4(3)": partial(PAIR, method="exponential_rk", order=4),
    "DPM-Solver-12": partial(PAIR, method="dpm_solver", order=2),
    "DPM-Solver-23": partial(PAIR, method="dpm_solver", order=3),
    "DPM-Solver-12, coupled": partial(PAIR, method="dpm_solver", order=2, coupled=True),
    "DPM-Solver-23, coupled": partial(PAIR, method="dpm_solver", order=3, coupled=True),
} | {
    f"{method}, {variable}": partial(sv.odeint, method=method, variable=variable, max_nfe=LONGEST)
    for method in ("bosh3", "dopri5")
    for variable in VARIABLES
}


def runs(model: sv.Model, x: Tensor, solve: Solve) -> Iterator[tuple[float, sv.Solution]]:
    """Ever smaller tolerances, and what is found, as long as it is found."""
    for tolerance in TOLERANCES:
        try:
            yield tolerance, solve(model, SCHEDULE, x, rtol=tolerance, atol=tolerance)
        except sv.NonConvergence:
            return


def records(
    problems: Sequence[str], solvers: Sequence[str], starts: int, seed: int, fixed: bool
) -> Iterator[Adaptive]:
    """Every solver at every tolerance, until its error is small enough, and fixed plans."""
    for problem in problems:
        data = PROBLEMS[problem]()
        x = start(data, SCHEDULE, starts, seed)
        exact = data.flow(x, SCHEDULE, SCHEDULE.start, SCHEDULE.stop, tol=1e-9)
        model = sv.Model(data.model(SCHEDULE, "velocity"), predicts="velocity", label=lambda t: t)
        for name in tqdm(solvers, desc=problem, unit="solver"):
            for tolerance, found in runs(model, x, SOLVERS[name]):
                nfe, rejected = found.nfe.double(), found.rejected.double().mean().item()
                rmse, median = errors(found.x, exact).values()
                yield Adaptive(
                    name,
                    problem,
                    tolerance,
                    nfe.mean().item(),
                    int(nfe.max()),
                    rejected,
                    rmse,
                    median,
                    starts,
                    seed,
                )
                if rmse < ENOUGH:
                    break
        for method, grid in tqdm(FIXED if fixed else (), desc=f"{problem}, fixed", unit="plan"):
            for calls in STEPS:
                if plan := within(method, SCHEDULE, grid, calls):
                    rmse, median = errors(sv.run(plan, model, x), exact).values()
                    name = f"{method}, {grid.__name__}"
                    yield Adaptive(
                        name, problem, None, float(plan.nfe), plan.nfe, 0.0, rmse, median, starts, seed
                    )
                    if rmse < ENOUGH:
                        break


def main(argv: list[str] | None = None) -> None:
    """Run the chosen solvers and write their records."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/adaptive.jsonl"))
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--starts", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-fixed", dest="fixed", action="store_false", help="leave out the fixed plans")
    parser.add_argument("--threads", type=int, default=1, help="default: 1; the problems are small")
    given = vars(parser.parse_args(argv))
    with threads(given.pop("threads")):
        write(given.pop("out"), records(**given))


if __name__ == "__main__":
    main()

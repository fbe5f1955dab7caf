"""Error against calls, for every method, grid and schedule and for peers, on problems with a known exact answer. Writes records.

python benchmarks/work_precision.py --out benchmarks/records/work_precision.jsonl.gz
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from math import cos, pi, sin
from time import perf_counter

import torch
from peers import DETERMINISTIC, VARIABLES, Diffusers, KDiffusion, Peer, Torchdiffeq, found
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
TOLERANCES = [10 ** (-k / 4) for k in range(41)]  # of adaptive peers, until they take too many calls
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


@dataclass(frozen=True)
class Case:
    """A problem on a schedule: starts, and where the exact flow takes them."""

    problem: str
    schedule_name: str
    data: Distribution
    schedule: sv.Schedule
    x: Tensor  # [B, *shape] at the schedule's start, in the dtype of the runs
    exact: Tensor  # [B, *shape] at its stop
    seed: int

    @classmethod
    def of(
        cls,
        problem: str,
        name: str,
        schedule: sv.Schedule,
        starts: int | None,
        seed: int,
        single: bool = False,
    ) -> "Case":
        """With `single` the runs are float32."""
        make, default_starts = PROBLEMS[problem]
        data = make()
        x = start(data, schedule, starts or default_starts, seed)
        x = x.float() if single else x
        exact = data.flow(x.double(), schedule, schedule.start, schedule.stop)
        return cls(problem, name, data, schedule, x, exact, seed)

    def record(
        self, method: str, order: int, grid: str, calls: int, nfe: int, end: Tensor, seconds: float
    ) -> WorkPrecision:
        """What a run has come to."""
        return WorkPrecision(
            method,
            order,
            grid,
            self.schedule_name,
            self.problem,
            calls,
            nfe,
            *errors(end, self.exact).values(),  # over all, of the median start
            seconds,
            len(self.x),
            self.seed,
        )


class Counted:
    """A network and the number of its calls."""

    def __init__(self, net: Callable[[Tensor, Tensor], Tensor]):
        self.net, self.calls = net, 0

    def __call__(self, x: Tensor, level: Tensor) -> Tensor:
        """One call."""
        self.calls += 1
        return self.net(x, level)


def ours(
    case: Case, methods: Sequence[str], grids: Sequence[str], calls: Sequence[int]
) -> Iterator[WorkPrecision]:
    """Every method on every grid."""
    model = case.data.model(case.schedule)
    for grid, name, asked in product(grids, methods, calls):
        plan = within(name, case.schedule, GRIDS[grid], asked)
        if plan is not None:
            began = perf_counter()
            end = sv.run(plan, model, case.x)
            yield case.record(name, SAMPLERS[name], grid, asked, plan.nfe, end, perf_counter() - began)


def k_diffusion(
    case: Case, peers: Mapping[str, Peer], grids: Sequence[str], calls: Sequence[int]
) -> Iterator[WorkPrecision]:
    """Its samplers on the same grids, in float64: of x / alpha, at levels sigma / alpha, to the same stop and not to 0."""

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return case.data.data(x, 1.0, sigma)

    chosen = {name: peer for name, peer in peers.items() if isinstance(peer, KDiffusion)}
    for grid, (name, peer), asked in product(grids, chosen.items(), calls):
        if steps := asked // peer.calls_per_step:
            times = GRIDS[grid](case.schedule, steps)
            alpha, sigma = case.schedule.alpha(times), case.schedule.sigma(times)
            net = Counted(denoiser)
            began = perf_counter()
            end = alpha[-1] * peer.run(net, case.x / alpha[0], sigma / alpha)
            yield case.record(name, peer.order, grid, asked, net.calls, end, perf_counter() - began)


def diffusers(
    problem: str, peers: Mapping[str, Peer], calls: Sequence[int], starts: int | None, seed: int
) -> Iterator[WorkPrecision]:
    """Its schedulers on VP as they know it, 1000 levels and float32: the exact answer is that from the noisiest level to the first."""
    chosen = {name: peer for name, peer in peers.items() if isinstance(peer, Diffusers)}
    if not chosen:
        return
    levels = next(iter(chosen.values())).grid(1).alphas_cumprod
    case = Case.of(problem, "VP", sv.Discrete.from_alphas_cumprod(levels), starts, seed, single=True)
    exact = case.data.model(case.schedule)

    def noise(x: Tensor, level: Tensor) -> Tensor:
        return exact(x, ((level.double() + 1) / len(levels)).expand(len(x)))

    for (name, peer), asked in product(chosen.items(), calls):
        if steps := asked // peer.calls_per_step:
            grid, net = peer.grid(steps), Counted(noise)
            first, last = peer.scale(grid)
            with warnings.catch_warnings(action="ignore"):
                began = perf_counter()
                end = last * peer.run(net, case.x / first, grid)
                seconds = perf_counter() - began
            yield case.record(name, peer.order, "own", asked, net.calls, end, seconds)


def torchdiffeq(case: Case, peers: Mapping[str, Peer], calls: Sequence[int]) -> Iterator[WorkPrecision]:
    """Its methods in two variables; of an adaptive one, for each number of calls, the least tolerance that it allows."""
    model = case.data.model(case.schedule)
    chosen = {name: peer for name, peer in peers.items() if isinstance(peer, Torchdiffeq)}
    for (name, peer), variable in product(chosen.items(), VARIABLES):
        if peer.calls_per_step:
            values = sorted({n // peer.calls_per_step for n in calls if n >= peer.calls_per_step})
        else:
            values = TOLERANCES
        runs: list[tuple[int, Tensor, float]] = []
        for value in values:
            began = perf_counter()
            try:
                solution = peer.run(model, case.x, case.schedule, (variable, value), max(calls))
            except sv.NonConvergence:  # it wants more calls, and will at all smaller tolerances
                break
            runs.append((int(solution.nfe[0]), solution.x, perf_counter() - began))
        for asked in calls:
            if within_budget := [run for run in runs if run[0] <= asked]:
                yield case.record(name, peer.order, f"in {variable}", asked, *within_budget[-1])


def records(
    problems: Sequence[str],
    schedules: Sequence[str],
    grids: Sequence[str],
    methods: Sequence[str],
    calls: Sequence[int],
    starts: int | None,
    seed: int,
    peers: Sequence[str] = (),
) -> Iterator[WorkPrecision]:
    """All combinations; each exact flow is computed once."""
    others = found(peers)
    for problem, name in product(problems, schedules):
        case = Case.of(problem, name, SCHEDULES[name], starts, seed)
        runs = [ours(case, methods, grids, calls), k_diffusion(case, others, grids, calls)]
        runs += [diffusers(problem, others, calls, starts, seed)] if name == "VP" else []
        runs += [torchdiffeq(case, others, calls)]
        yield from tqdm(chain(*runs), desc=f"{problem}, {name}", unit="run")


def main(argv: list[str] | None = None) -> None:
    """Run the chosen combinations and write their records."""
    choices = {"problems": PROBLEMS, "schedules": SCHEDULES, "grids": GRIDS, "methods": SAMPLERS}
    parser = arguments(__doc__, "results/work_precision.jsonl.gz", choices, CALLS)
    parser.add_argument("--starts", type=int, help="trajectories per problem; default: 256, 128, 8")
    parser.add_argument(
        "--peers", nargs="+", choices=[*DETERMINISTIC, "none"], default=DETERMINISTIC, metavar="peer"
    )
    given = vars(parser.parse_args(argv))
    given["peers"] = [name for name in given["peers"] if name != "none"]
    with threads(given.pop("threads")):
        write(given.pop("out"), records(**given))


if __name__ == "__main__":
    main()

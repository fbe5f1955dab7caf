"""How far the law of a stochastic sampler is from the data's, by number of calls: exactly on Gaussian data, by samples on the digits.

python benchmarks/stochastic.py --out benchmarks/records/stochastic.jsonl
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import product

import torch
from records import Law, arguments, threads, write
from torch import Tensor
from tqdm import tqdm

import solvers as sv
from reference import Gaussian, Mixture, digits, kl, law, sliced_wasserstein2, wasserstein2
from solvers.comparison import analytic, within
from solvers.methods import SDES

SCHEDULE = sv.VP()
GRIDS = {"uniform": sv.uniform, "logsnr": sv.logsnr}
CALLS = (5, 10, 25, 50, 100, 1000)
TRAJECTORY = "analytic_ddpm, optimal trajectory"
SECOND = {"sn_ddpm": 1.0, "sn_ddim": 0.0}  # with the exact second moments NPR-DPM is the same
HEURISTIC = "sn_ddpm, heuristic"
BASE = ("ddpm", "ddpm_large", "analytic_ddpm", TRAJECTORY, "analytic_ddim", *SECOND)
HIGHER = (
    "dpm_solver_pp_sde_2m",
    "sa_solver",
    "seeds_2",
    "er_sde_3",
    "ancestral_2s",
    "dpm_solver_pp_2m",
    "recommended",
)
SAMPLED = (
    "ddpm",
    "ddpm_large",
    "analytic_ddpm",
    "analytic_ddim",
    *SECOND,
    HEURISTIC,
    "dpm_solver_pp_sde_2m",
    "sa_solver",
    "er_sde_3",
    "recommended",
)
LONG = (
    "ddpm",
    "ddpm_large",
    "analytic_ddpm",
)  # of the digits, at more than LONGEST calls, where all are at the floor
LONGEST = 100
PART = 256  # samples that a CPU's cache holds the components of
CANDIDATES = 1000  # times that the optimal trajectory is chosen from


def independent(mean: Tensor, variances: Tensor) -> Gaussian:
    """Gaussian data with independent elements."""
    return Gaussian(mean, torch.diag(variances))


def three() -> Gaussian:
    """Three variances, one far below and one above 1, with a mean."""
    double = partial(torch.tensor, dtype=torch.float64)
    return independent(double([0.7, -0.4, 1.1]), double([0.05, 0.3, 2.0]))


def pixels() -> Gaussian:
    """The digits' mean and variances, pixel by pixel."""
    moments = digits().moments
    return independent(moments.mean.flatten(), moments.cov.diagonal())


GAUSSIANS: dict[str, Callable[[], Gaussian]] = {
    "three variances": cache(three),
    "digits' pixels": cache(pixels),
    "digits' covariance": cache(lambda: digits().moments),
}
SAMPLES = "digits"
PROBLEMS = [*GAUSSIANS, SAMPLES]


def plan_of(name: str, grid: str, calls: int, gamma: Callable[[Tensor], Tensor]) -> sv.Plan | None:
    """The plan of most steps that makes at most so many calls."""
    spacing = GRIDS[grid]
    if name == TRAJECTORY:
        times = sv.optimal_trajectory(SCHEDULE, spacing(SCHEDULE, CANDIDATES), gamma, calls)
        return sv.analytic_dpm(SCHEDULE, times, gamma)
    if name in SECOND or name == HEURISTIC:
        return sv.extended_analytic_dpm(SCHEDULE, spacing(SCHEDULE, calls), eta=SECOND.get(name, 1.0))
    return within(name, SCHEDULE, spacing, calls, analytic(gamma))


def laws(problem: str, grid: str, names: Sequence[str], calls: Sequence[int]) -> Iterator[Law]:
    """Exact laws on Gaussian data; SN and NPR where elements are independent."""
    data = GAUSSIANS[problem]()
    alone = not (data.cov - data.cov.diagonal().diag()).any()
    gamma = sv.gaussian_gamma(data.variances)
    for name, asked in product(names, calls):
        plan = plan_of(name, grid, asked, gamma) if alone or name not in SECOND else None
        if plan is not None:
            got, exact = law(plan, data), data.marginal(float(plan.alpha[-1]), float(plan.sigma[-1]))
            distance = wasserstein2(got, exact) / len(data.cov) ** 0.5
            yield Law(name, problem, grid, asked, plan.nfe, kl(exact, got), distance, 0.0, 0, 0)


@dataclass(frozen=True)
class Quick:
    """The exact E[eps | x] of a mixture, and E[eps^2 | x] if asked, in float32 and by large products: many times faster."""

    data: Mixture
    moments: bool = False

    @cached_property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Bases [d, K d], means in them [K, d], variances [K, d], log weights [K]."""
        bases, means = self.data.bases.float(), self.data.means.flatten(1).float()
        rotated = torch.einsum("ki,kij->kj", means, bases)
        return (
            bases.permute(1, 0, 2).flatten(1),
            rotated,
            self.data.variances.float(),
            self.data.weights.log().float(),
        )

    def __call__(self, x: Tensor, t: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """For x [B, ...] and one t for all."""
        level = [float(v(t[:1].double())) for v in (SCHEDULE.alpha, SCHEDULE.sigma)]
        parts = [self.part(part, *level) for part in x.flatten(1).split(PART)]
        eps, square = (torch.cat(v).reshape(x.shape) for v in zip(*parts, strict=True))
        return (eps, square) if self.moments else eps

    def part(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
        """The same for some samples, flat, [b, d]."""
        bases, means, variances, log_weights = self.tables
        p = alpha**2 * variances + sigma**2
        y = (x @ bases).reshape(len(x), *p.shape) - alpha * means
        u = y / p
        share = (log_weights - 0.5 * (p.log().sum(1) + (y * u).sum(2))).softmax(1)
        eps = sigma * (share[..., None] * u).flatten(1) @ bases.T
        if not self.moments:
            return eps, eps
        each = bases.reshape(len(bases), *p.shape).permute(1, 2, 0)  # [K, j, i]
        of_component = sigma * torch.bmm(u.transpose(0, 1), each).transpose(0, 1)
        own = 1 - sigma**2 * torch.einsum("kj,kji->ki", 1 / p, each**2)
        return eps, torch.einsum("bk,bki->bi", share, of_component**2 + own)


def sampled(grid: str, names: Sequence[str], calls: Sequence[int], samples: int, seed: int) -> Iterator[Law]:
    """Sliced distances of samples of the digits from fresh draws of them, gamma estimated; beside what fresh draws have of each other."""
    data = digits()
    draws = [data.draw(samples, torch.Generator().manual_seed(seed + k)) for k in range(5)]
    stop = (
        float(v(torch.tensor(SCHEDULE.stop, dtype=torch.float64))) for v in (SCHEDULE.alpha, SCHEDULE.sigma)
    )
    alpha, sigma = stop
    noise = sv.noise.per_sample(seed, range(samples))
    fresh = [alpha * x + sigma * noise.initial(*x.shape[1:], dtype=torch.float64) for x in draws]
    floors = [sliced_wasserstein2(fresh[0], other, seed=seed) for other in fresh[1:]]
    floor = sum(floors) / len(floors)
    gamma = sv.estimate_gamma(
        data.model(SCHEDULE), SCHEDULE, draws[0][:256], sv.logsnr(SCHEDULE, 50), noise=seed
    )
    start = torch.tensor(SCHEDULE.start, dtype=torch.float64)
    x = (SCHEDULE.sigma(start) * noise.initial(*data.shape, dtype=torch.float64)).float()
    plain = Quick(data)
    models = {HEURISTIC: sv.Model(lambda x, t: (plain(x, t), torch.ones_like(x)), variance="square")}
    models |= dict.fromkeys(SECOND, sv.Model(Quick(data, moments=True), variance="square"))
    for name, asked in product(names, calls):
        plan = plan_of(name, grid, asked, gamma)
        if plan is None or (asked > LONGEST and (name not in LONG or grid != "uniform")):
            continue
        end = sv.run(plan, models.get(name, plain), x, noise)
        distance = sum(sliced_wasserstein2(end, other, seed=seed) for other in fresh[1:]) / len(floors)
        yield Law(name, SAMPLES, grid, asked, plan.nfe, None, distance, floor, samples, seed)


def records(
    problems: Sequence[str],
    grids: Sequence[str],
    methods: Sequence[str],
    calls: Sequence[int],
    samples: int,
    seed: int,
) -> Iterator[Law]:
    """All combinations."""
    for problem, grid in tqdm(list(product(problems, grids)), unit="table"):
        if problem == SAMPLES:
            names = [name for name in SAMPLED if name in methods]
            yield from sampled(grid, names, calls, samples, seed)
        else:
            yield from laws(problem, grid, [name for name in (*BASE, *HIGHER) if name in methods], calls)


def main(argv: list[str] | None = None) -> None:
    """Run the chosen combinations and write their records."""
    everything = dict.fromkeys([*BASE, *HIGHER, *SAMPLED, *SDES])
    choices = {"problems": PROBLEMS, "grids": GRIDS, "methods": everything}
    parser = arguments(__doc__, "results/stochastic.jsonl", choices, CALLS)
    parser.add_argument("--samples", type=int, default=4096, help="of the digits")
    given = vars(parser.parse_args(argv))
    with threads(given.pop("threads")):
        write(given.pop("out"), records(**given))


if __name__ == "__main__":
    main()

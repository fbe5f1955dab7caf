"""Maximum-likelihood training of a diffusion ODE: denoising score matching of order 1 against orders 2 and 3, in one and two dimensions.

    python docs/examples/high_order_training.py --seeds 5

trains a small network on a mixture of three Gaussians and on a checkerboard for each order and seed, and measures how far the density of its ODE,
`sv.log_likelihood`, is from that of the data. It writes a record of each network and a picture of their densities. The method and the problems are
those of Lu et al. 2022 (arXiv 2206.08265), section 7.1.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import solvers as sv
from reference import Mixture

SCHEDULE = sv.VP()
STOP = float(SCHEDULE.time(torch.tensor(3.5, dtype=torch.float64)))  # sigma = 0.03
BATCH, RATE = 256, 5e-3
WEIGHTS = 1.0, 0.5, 0.1  # of the losses of order 1, 2 and 3
LONGER = 4  # times the steps, of a second network of order 1: about the time that one of order 3 takes
STEPS_OF_THE_ODE = 150


@dataclass(frozen=True)
class Problem:
    """Data with a density that is known after the little noise at STOP."""

    draw: Callable[[int, torch.Generator], Tensor]  # [n, d]
    log_density: Callable[[Tensor], Tensor]  # at STOP, [n]
    d: int
    reach: float  # data lie in [-reach, reach]^d
    width: int  # of the network
    steps: int  # of training


@dataclass(frozen=True)
class Record:
    """One trained network."""

    problem: str
    order: int
    seed: int
    steps: int
    kl: float  # KL(data || ODE) in nats, at STOP
    seconds: float


def level(t: float) -> tuple[float, float]:
    """The weights alpha and sigma at a time."""
    at = torch.tensor(t, dtype=torch.float64)
    return float(SCHEDULE.alpha(at)), float(SCHEDULE.sigma(at))


def mixture() -> Problem:
    """Three Gaussians on a line."""
    means, deviations = torch.tensor([-2 / 3, -2 / 9, 4 / 9]), torch.tensor([1 / 9, 1 / 9, 2 / 9])
    data = Mixture(torch.tensor([0.4, 0.4, 0.2]), means[:, None], deviations[:, None, None] ** 2)
    return Problem(data.draw, lambda x: data.log_density(x, *level(STOP)), 1, 1.5, 64, 3000)


def checkerboard() -> Problem:
    """Eight of the sixteen squares of side 1/2 of [-1, 1]^2, evenly filled."""
    corners = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0]) / 2 - 1.0

    def draw(n: int, generator: torch.Generator) -> Tensor:
        square = torch.randint(len(corners), (n,), generator=generator)
        return corners[square] + torch.rand(n, 2, generator=generator) / 2

    def log_density(x: Tensor) -> Tensor:
        alpha, sigma = level(STOP)
        low = (x[:, None].double() - alpha * corners) / sigma
        inside = torch.special.ndtr(low) - torch.special.ndtr(low - alpha / 2 / sigma)
        return torch.log((inside.prod(2) / (alpha / 2) ** 2).mean(1).clamp_min(1e-300))

    return Problem(draw, log_density, 2, 1.4, 128, 4000)


PROBLEMS = {"mixture": mixture(), "checkerboard": checkerboard()}


class Network(nn.Module):
    """A noise prediction from x and half log-SNR: a perceptron on random Fourier features."""

    def __init__(self, d: int, width: int):
        super().__init__()
        scale = torch.tensor([4.0] * d + [1.0])
        self.register_buffer("frequencies", torch.randn(d + 1, width // 2) * scale[:, None])
        inner = [nn.Linear(width + d + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*inner, nn.Linear(width, d))

    def forward(self, x: Tensor, half_logsnr: Tensor) -> Tensor:
        """The noise, [B, d]."""
        inputs = torch.cat([x, half_logsnr[:, None] / 4], 1)
        phase = inputs @ self.frequencies
        return self.layers(torch.cat([inputs, phase.sin(), phase.cos()], 1))


def trained(problem: Problem, order: int, seed: int, steps: int) -> sv.Model:
    """A network trained by the losses up to an order, at times uniform in log-SNR."""
    torch.manual_seed(seed)
    model = sv.Model(Network(problem.d, problem.width), label=SCHEDULE.half_logsnr)
    optimiser = torch.optim.Adam(model.net.parameters(), RATE)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x0, eps = problem.draw(BATCH, generator).float(), torch.randn(BATCH, problem.d, generator=generator)
        spread = (torch.randperm(BATCH, generator=generator) + torch.rand(1, generator=generator)) / BATCH
        t, _ = sv.importance_times(SCHEDULE, spread, stop=STOP)
        if order == 1:
            loss = sv.dsm_loss(model, SCHEDULE, x0, t, eps).mean()
        else:
            terms = sv.dsm_losses(model, SCHEDULE, x0, t, eps, order)
            loss = WEIGHTS[0] * terms.first.mean() + WEIGHTS[1] * (terms.second + terms.trace).mean()
            if terms.third is not None:
                loss = loss + WEIGHTS[2] * terms.third.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cooling.step()
    model.net.eval().requires_grad_(False)
    return model


def log_density(model: sv.Model, x: Tensor) -> Tensor:
    """That of the ODE at STOP, by a fixed plan and the determinant of its map, [n]."""
    back = sv.Inversion(SCHEDULE)
    times = sv.angle(back, STEPS_OF_THE_ODE, start=STOP, stop=SCHEDULE.start)
    plan = sv.exponential_adams(back, times, order=3, predicts="velocity", variable="angle")
    return torch.cat(
        [sv.log_likelihood(model, SCHEDULE, part, solver=plan).log_p for part in x.float().split(4096)]
    )


def points(problem: Problem) -> tuple[Tensor, float]:
    """A grid [n, d] over the data, and the volume of its cells."""
    count = 2001 if problem.d == 1 else 101
    line = torch.linspace(-problem.reach, problem.reach, count, dtype=torch.float64)
    axes = torch.meshgrid(*[line] * problem.d, indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], 1), float(line[1] - line[0]) ** problem.d


def kl(problem: Problem, model: sv.Model) -> float:
    """KL(data || ODE) in nats: the integral on a line, a mean over 4096 draws in the plane, the same for every network."""
    if problem.d == 1:
        x, cell = points(problem)
        log_q = problem.log_density(x)
        return float((log_q.exp() * (log_q - log_density(model, x))).sum() * cell)
    generator = torch.Generator().manual_seed(10**6)
    alpha, sigma = level(STOP)
    x = alpha * problem.draw(4096, generator) + sigma * torch.randn(4096, problem.d, generator=generator)
    return float((problem.log_density(x) - log_density(model, x)).mean())


def draw(models: dict[tuple[str, int], sv.Model], records: Sequence[Record], path: Path) -> None:
    """The densities of the data and of one network of each order, side by side."""
    orders = sorted({order for _, order in models})  # of the shorter training, see `measured`
    names = list(dict.fromkeys(name for name, _ in models))
    figure, panels = plt.subplots(
        len(names), 1 + len(orders), figsize=(3.2 * (1 + len(orders)), 3.1 * len(names)), squeeze=False
    )
    for name, row in zip(names, panels, strict=True):
        problem = PROBLEMS[name]
        x, _ = points(problem)
        truth = problem.log_density(x).exp()
        for order, panel in zip([0, *orders], row, strict=True):
            density = log_density(models[name, order], x).exp() if order else truth
            least = min(r.steps for r in records if r.problem == name)
            found = [r.kl for r in records if (r.problem, r.order, r.steps) == (name, order, least)]
            panel.set_title(f"order {order}: KL {mean(found):.4f}" if order else f"{name}: the data")
            if problem.d == 1:
                panel.fill_between(x[:, 0].numpy(), truth.numpy(), color="0.85", label="data")
                panel.plot(x[:, 0].numpy(), density.numpy(), color="C0" if order else "0.3")
                panel.set_ylim(0, 1.2 * float(truth.max()))
            else:
                side = round(len(x) ** 0.5)
                image = density.reshape(side, side).T.numpy()
                edge = problem.reach
                panel.imshow(
                    image,
                    origin="lower",
                    extent=(-edge, edge, -edge, edge),
                    vmin=0,
                    vmax=1.5 * float(truth.max()),
                )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(records: Sequence[Record]) -> str:
    """KL by problem and order: mean, standard deviation and range over the seeds, in Markdown."""
    lines = [
        "| problem | order | KL, nats: mean ± deviation | least to largest | seeds | steps |",
        "|---|---|---|---|---|---|",
    ]
    for name, order, steps in dict.fromkeys((r.problem, r.order, r.steps) for r in records):
        group = [r for r in records if (r.problem, r.order, r.steps) == (name, order, steps)]
        found = [r.kl for r in group]
        spread = stdev(found) if len(found) > 1 else float("nan")
        lines.append(
            f"| {name} | {order} | {mean(found):.4f} ± {spread:.4f} | {min(found):.4f} to {max(found):.4f} | {len(found)} | {steps} |"
        )
    return "\n".join(lines)


def measured(
    names: Sequence[str], orders: Sequence[int], seeds: int, share: float
) -> Iterator[tuple[sv.Model, Record]]:
    """Every network with its record: of each order, and once more of order 1, with the time that order 3 has."""
    for name in names:
        for order, factor in [*((order, 1) for order in orders), *[(1, LONGER)] * (1 in orders)]:
            for seed in range(seeds):
                problem, began = PROBLEMS[name], time.perf_counter()
                steps = factor * max(1, round(share * problem.steps))
                model = trained(problem, order, seed, steps)
                seconds = time.perf_counter() - began
                yield model, Record(name, order, seed, steps, kl(problem, model), seconds)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--orders", nargs="+", type=int, choices=(1, 2, 3), default=[1, 2, 3])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps of training, to try it out")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--into", type=Path, help="a page whose table between 'begin kl' and 'end kl' is replaced"
    )
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    given.out.mkdir(parents=True, exist_ok=True)
    records, first = [], {}
    with (given.out / "high_order_training.jsonl").open("w", encoding="utf-8") as file:
        for model, record in measured(given.problems, given.orders, given.seeds, given.share):
            records.append(record)
            first.setdefault((record.problem, record.order), model)
            print(json.dumps(asdict(record)), file=file, flush=True)
            print(record, flush=True)
    draw(first, records, given.out / "high_order_training.png")
    print(table(records))
    if given.into:
        page = given.into.read_text(encoding="utf-8")
        new = re.sub(
            r"(?s)(<!-- begin kl -->\n).*?(<!-- end kl -->)",
            lambda m: m[1] + table(records) + "\n" + m[2],
            page,
        )
        given.into.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Error against calls for trained networks, against each network's own ODE. Writes records, or prints tables of them.

python benchmarks/trained.py --train --weights results/trained      # the networks that are not in the repository, minutes each
python benchmarks/trained.py --weights results/trained --out benchmarks/records/trained.jsonl.gz
python benchmarks/trained.py --table benchmarks/records/trained.jsonl.gz --into docs/which-solver.md

The networks are the UNet of docs/examples/digits_unet.py: as it is committed there, and trained anew to predict noise or velocity at times
uniform in t, and eps - x_0 along the straight path. What a solver loses on them is measured, not whether their samples are good.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import exp, log
from pathlib import Path
from time import perf_counter
from types import ModuleType

import torch
from records import KINDS, arguments, read, threads, versions, write
from report import insert
from safetensors.torch import load_model, save_model
from torch import Tensor
from tqdm import tqdm
from work_precision import GRIDS as COMMON_GRIDS
from work_precision import SAMPLERS as COMMON_SAMPLERS

import solvers as sv
from solvers.comparison import errors, within
from solvers.methods import METHODS

CALLS = (5, 6, 8, 10, 12, 15, 20, 30, 50)
GRIDS = COMMON_GRIDS | {"logalpha": sv.logalpha}
SAMPLERS = COMMON_SAMPLERS | {"recommended_asinh": 5}
ALIASES = ("dpm_solver_1", "deis_logrho_3")  # of ddim and dpm_solver_multistep_3, row by row
METHOD_NAMES = [
    n for n in SAMPLERS if n not in ALIASES and (n not in METHODS or METHODS[n].calls_per_step == 1)
]
STARTS = {"full": None, "-3": -3.0}  # half log-SNR; None: the schedule's own
AGREED = 1e-5  # how well two integrators of the exact answer agree
ALWAYS = (
    ("recommended_asinh", "logalpha"),
    ("recommended", "angle"),
    ("dpm_solver_pp_2m", "logsnr"),
)  # the defaults and the usual, in every table
SCRATCH = Path("results/trained")


def _example() -> ModuleType:
    path = Path(__file__).parents[1] / "docs" / "examples" / "digits_unet.py"
    spec = importlib.util.spec_from_file_location("digits_unet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


UNET = _example()


@dataclass(frozen=True)
class Network:
    """What the UNet is trained to predict, along which schedule, reading what, at which times.

    Attributes:
        predicts: as of `sv.Model`; the loss is the mean square of just that.
        schedule: noise schedule.
        label: what the network reads; of about the range of VP's half log-SNR, for which its frequencies are chosen.
        committed: whether the weights are those beside docs/examples/digits_unet.py.
    """

    predicts: str
    schedule: sv.Schedule
    label: Callable[[Tensor], Tensor]
    committed: bool = False


FLOW = sv.Flow(start=0.999, stop=1e-3)
NETWORKS = {
    "noise, likelihood": Network("noise", UNET.SCHEDULE, UNET.SCHEDULE.half_logsnr, committed=True),
    "noise, uniform t": Network("noise", UNET.SCHEDULE, UNET.SCHEDULE.half_logsnr),
    "velocity, uniform t": Network("velocity", UNET.SCHEDULE, UNET.SCHEDULE.half_logsnr),
    "flow, uniform t": Network("flow", FLOW, lambda t: 10 * FLOW.sigma(t) - 5),
}


@dataclass(frozen=True)
class Trained:
    """The error that a number of calls buys on a trained network, against its own ODE from the same start."""

    network: str
    schedule: str
    start: float  # half log-SNR
    method: str
    order: int  # that the method declares
    grid: str
    calls: int  # asked for
    nfe: int  # made: the most that the method can use of them
    rmse: float | None  # over starts and pixels; None where the run left the finite numbers
    median: float | None  # over starts, of one start's root mean square
    seconds: float  # of the run
    starts: int
    seed: int  # of the starts; a network that is not committed was trained with seed 0
    versions: dict[str, str] = field(default_factory=versions)
    benchmark: str = "trained"


KINDS["trained"] = Trained  # report.py does not know it; --table does


def target(predicts: str, alpha: Tensor, sigma: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """What the network is trained on."""
    match predicts:
        case "noise":
            return eps
        case "velocity":
            return alpha * eps - sigma * x0
        case _:
            return eps - x0


def train(name: str, path: Path, steps: int = UNET.STEPS, seed: int = 0) -> None:
    """As docs/examples/digits_unet.py, but the plain mean square of the prediction at times uniform in t."""
    torch.manual_seed(seed)
    of, pixels, net = NETWORKS[name], UNET.images()[0], UNET.UNet().to(memory_format=torch.channels_last)
    averaged = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(UNET.AVERAGED)
    )
    optimiser = torch.optim.Adam(net.parameters(), UNET.RATE)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    schedule = of.schedule
    for _ in tqdm(range(steps), desc=name, unit="step", mininterval=5):
        chosen = pixels[torch.randint(len(pixels), (UNET.BATCH,))]
        x0 = sv.dequantized(chosen, UNET.VALUES, noise=torch.default_generator)
        uniforms = ((torch.randperm(UNET.BATCH) + torch.rand(1)) / UNET.BATCH).double()
        t = schedule.stop + (schedule.start - schedule.stop) * uniforms
        alpha, sigma = (v(t).to(x0)[:, None, None, None] for v in (schedule.alpha, schedule.sigma))
        eps = torch.randn_like(x0)
        wanted = target(of.predicts, alpha, sigma, x0, eps)
        loss = (net(alpha * x0 + sigma * eps, of.label(t).to(x0)) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cooling.step()
        averaged.update_parameters(net)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(averaged.module, path)


def weights(name: str, folder: Path) -> Path:
    """Where a network's weights are."""
    return (
        UNET.WEIGHTS
        if NETWORKS[name].committed
        else folder / f"{name.replace(', ', '_').replace(' ', '_')}.safetensors"
    )


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> sv.Model:
    """A network as the library takes it."""
    of, net = NETWORKS[name], UNET.UNet()
    load_model(net, weights(name, folder))
    net = net.to(dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    return sv.Model(net, predicts=of.predicts, label=of.label)


def begin(schedule: sv.Schedule, start: float | None) -> float:
    """The time of a half log-SNR."""
    if start is None:
        return schedule.start
    return float(schedule.time(torch.tensor(start, dtype=torch.float64)))


def states(schedule: sv.Schedule, first: float, starts: int, seed: int) -> Tensor:
    """Images that were held out, with the noise of time `first`, [starts, 1, 8, 8], float64."""
    generator = torch.Generator().manual_seed(seed)
    x0 = sv.dequantized(UNET.images()[1][:starts], UNET.VALUES, noise=generator).double()
    return sv.noised(x0, schedule, first, torch.randn(x0.shape, dtype=x0.dtype, generator=generator))


def exact(model: sv.Model, schedule: sv.Schedule, x: Tensor, first: float) -> Tensor:
    """The ODE's answer in float64, by two integrators that must agree."""
    ends = {"start": first}
    one = sv.adaptive(model, schedule, x, rtol=1e-6, atol=1e-6, max_nfe=5000, **ends).x
    other = sv.odeint(model, schedule, x, rtol=1e-7, atol=1e-7, variable="angle", **ends).x
    apart = float((one - other).square().mean().sqrt())
    if apart > AGREED:
        raise ValueError(f"adaptive and odeint are {apart:.1e} apart: expected at most {AGREED:g}")
    return one


def records(
    networks: Sequence[str],
    begins: Sequence[str],
    grids: Sequence[str],
    methods: Sequence[str],
    calls: Sequence[int],
    starts: int,
    seed: int,
    folder: Path,
) -> Iterator[Trained]:
    """All combinations, the later start for the committed network alone; each exact answer is computed once."""
    pairs = [(n, b) for n, b in product(networks, begins) if b == "full" or NETWORKS[n].committed]
    with tqdm(total=len(pairs) * len(grids) * len(methods) * len(calls), unit="run", mininterval=5) as bar:
        for name, begun in pairs:
            bar.set_description(f"{name}, {begun}")
            schedule = NETWORKS[name].schedule
            first = begin(schedule, STARTS[begun])
            half_logsnr = float(schedule.half_logsnr(torch.tensor(first, dtype=torch.float64)))
            x = states(schedule, first, starts, seed)
            answer = exact(load(name, folder, torch.float64), schedule, x, first)
            model, x = load(name, folder), x.float()
            for grid, method, asked in product(grids, methods, calls):
                bar.update()

                def on(schedule: sv.Schedule, steps: int, grid: str = grid, first: float = first) -> Tensor:
                    return GRIDS[grid](schedule, steps, start=first)

                plan = within(method, schedule, on, asked)
                if plan is None:
                    continue
                began = perf_counter()
                try:
                    found = errors(sv.run(plan, model, x), answer)
                except sv.NonFiniteError:
                    found = {"error": None, "median_error": None}
                seconds = perf_counter() - began
                yield Trained(
                    name,
                    type(schedule).__name__,
                    half_logsnr,
                    method,
                    SAMPLERS[method],
                    grid,
                    asked,
                    plan.nfe,
                    *found.values(),  # over all, of the median start
                    seconds,
                    starts,
                    seed,
                )


def ratios(records: Sequence[Trained], measure: str) -> dict[tuple[str, str], dict[int, float]]:
    """Of every (method, grid) the error over the least of all at as many calls, the geometric mean over networks and starts.

    Those alone that have a record wherever any has one.
    """
    cells: dict[tuple[str, float, int], dict[tuple[str, str], float]] = {}
    for r in (r for r in records if r.rmse is not None):
        cells.setdefault((r.network, r.start, r.calls), {})[r.method, r.grid] = getattr(r, measure)
    logs: dict[tuple[str, str], dict[int, list[float]]] = {}
    for (_, _, calls), found in cells.items():
        least = min(found.values())
        for pair, error in found.items():
            logs.setdefault(pair, {}).setdefault(calls, []).append(log(error / least))
    whole = len(cells)
    return {
        pair: {calls: exp(sum(v) / len(v)) for calls, v in sorted(by_calls.items())}
        for pair, by_calls in logs.items()
        if sum(map(len, by_calls.values())) == whole
    }


def table(records: Sequence[Trained], shown: int = 6) -> str:
    """The ratios in Markdown, each method on the grid where their mean over the numbers of calls is least, those `shown` that are best.

    Under them the default and the usual choice, and the least error itself.
    """
    columns = sorted({r.calls for r in records})
    parts = []
    for measure in ("median", "rmse"):
        means = ratios(records, measure)
        ranked = sorted(means, key=lambda pair: sum(map(log, means[pair].values())))
        firsts = [pair for pair in ranked if pair == next(p for p in ranked if p[0] == pair[0])][:shown]
        firsts += [pair for pair in ALWAYS if pair in means and pair not in firsts]
        rows = [[f"`{m}`", f"`{g}`", *(f"{means[m, g][n]:.3g}" for n in columns)] for m, g in firsts]
        cases = {(r.network, r.start) for r in records}
        if len(cases) == 1:
            least = [
                min(getattr(r, measure) for r in records if r.calls == n and r.rmse is not None)
                for n in columns
            ]
            rows.append(["*least error*", "", *(f"{e:.2g}" for e in least)])
        heads = [f"{measure}: method", "grid", *(f"{n} calls" for n in columns)]
        rule = ["---", *["---:"] * (len(heads) - 1)]
        parts.append("\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows)))
    return "\n\n".join(parts)


GROUPS: dict[str, Callable[[Trained], bool]] = {
    "trained to predict noise": lambda r: NETWORKS[r.network].predicts == "noise" and r.start < -4,
    "trained to predict noise, from half log-SNR -3": lambda r: r.start > -4,
    "trained to predict velocity or flow": lambda r: NETWORKS[r.network].predicts != "noise",
}


def tables(records: Sequence[Trained]) -> str:
    """What made the records, and a table for each kind of network."""
    made = {", ".join(f"{name} {value}" for name, value in r.versions.items()) for r in records}
    parts = [f"{len(records)} records; " + "; ".join(sorted(made)) + "."]
    for title, belongs in GROUPS.items():
        if chosen := [r for r in records if belongs(r)]:
            names = ", ".join(f"{n} ({s})" for n, s in dict.fromkeys((r.network, r.schedule) for r in chosen))
            parts.append(f"Networks {title}: {names}.\n\n{table(chosen)}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Train, run the chosen combinations and write their records, or print tables."""
    choices = {"networks": NETWORKS, "begins": STARTS, "grids": GRIDS, "methods": METHOD_NAMES}
    parser = arguments(__doc__, "results/trained.jsonl.gz", choices, CALLS)
    parser.add_argument("--starts", type=int, default=16, help="trajectories; default: 16")
    parser.add_argument(
        "--weights", dest="folder", type=Path, default=SCRATCH, help="of the networks trained here"
    )
    parser.add_argument("--train", action="store_true", help="train the networks that are not committed")
    parser.add_argument("--table", type=Path, help="print the tables of these records")
    parser.add_argument("--into", type=Path, help="a page that has a place for the tables")
    given = vars(parser.parse_args(argv))
    number, out, training, file, page = (given.pop(k) for k in ("threads", "out", "train", "table", "into"))
    if file:
        text = tables(read(file))
        if page:
            page.write_text(insert(page.read_text(encoding="utf-8"), "trained", text), encoding="utf-8")
        else:
            print(text)
        return
    with threads(number):
        if training:
            for name in given["networks"]:
                if not NETWORKS[name].committed:
                    train(name, weights(name, given["folder"]))
            return
        write(out, records(**given))


if __name__ == "__main__":
    main()

"""Three comparisons of solvers: errors at equal calls, laws of the stochastic ones, adaptive steps against fixed ones."""

import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

import solvers as sv
from solvers import figures
from solvers.blackbox import VARIABLES
from solvers.comparison import FAST, Build, Grid, Problem, analytic, answer, candidates, errors, versions
from solvers.grids import usual
from solvers.methods import BUILDS
from solvers.options import Files, chosen, load, named_grid, refuse, show, write

COMPARED = (
    "recommended,ddim,ipndm,dpm_solver_3,dpm_solver_pp_2s,dpm_solver_pp_2m,dpm_solver_pp_3m_ramp,deis_t_3_ramp,unipc_3_ramp,"
    "adams_velocity_3_ramp"
)
COMPARED_STOCHASTIC = "ddpm,ddpm_large,euler_maruyama,analytic_ddpm,analytic_ddim,dpm_solver_pp_sde_2m,sa_solver,seeds_2,er_sde_3,ancestral_2s,recommended"
MEASURES = {"median": "error of the median sample", "rms": "root-mean-square error over all samples"}
LAW = "Wasserstein-2 distance of the sampler's exact law, per element"
LAW_RESOLUTION = 1e-8  # the root of rounding
PICTURED_CALLS = 10  # the picture is drawn at the number of calls nearest to this
PICTURED_SAMPLES, PICTURED_SHEET = 16, 100
TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4)
TARGETS = (1e-1, 1e-2, 1e-3, 1e-4)  # errors whose price the table names
Solve = Callable[..., sv.Solution]  # (model, schedule, x, ...)
OURS: dict[str, Solve] = {
    "adams": sv.adaptive,
    "exponential_rk_32": partial(sv.adaptive, method="exponential_rk", order=3),
    "exponential_rk_43": partial(sv.adaptive, method="exponential_rk", order=4),
    "dpm_solver_12": partial(sv.adaptive, method="dpm_solver", order=2),
    "dpm_solver_23": partial(sv.adaptive, method="dpm_solver", order=3),
    "dpm_solver_23_coupled": partial(sv.adaptive, method="dpm_solver", order=3, coupled=True),
}
BLACK_BOXES: dict[str, Solve] = {
    f"{method}_{variable}": partial(sv.odeint, method=method, variable=variable)
    for method in ("bosh3", "dopri5")
    for variable in VARIABLES
}
ADAPTIVE = OURS | BLACK_BOXES
COMPARED_ADAPTIVE = "adams,exponential_rk_32,dpm_solver_23,dpm_solver_23_coupled,bosh3_t,dopri5_t,dopri5_sigma,dopri5_half_logsnr,recommended,dpm_solver_pp_2m"
KEYS = {"median": "median_error", "rms": "error"}


def compare_errors(
    names: list[str],
    budgets: list[int],
    problem: Problem,
    spacing: Grid,
    reference_calls: int,
    error: str,
    out: Path,
    quiet: bool,
) -> None:
    """By the error against the exact answer at equal numbers of calls; `error` is one of `KEYS`."""
    key, own = KEYS[error], not problem.flow
    plans = fitting(names, problem, spacing, budgets, BUILDS, quiet)
    out.mkdir(parents=True, exist_ok=True)
    bars = Console(stderr=True, quiet=quiet)
    exact, setting = answered(problem, spacing, reference_calls, bars)
    records: list[dict[str, Any]] = []
    ends: dict[tuple[str, int], Tensor] = {}
    for (name, budget), plan in track(plans.items(), "running the solvers", console=bars, transient=True):
        began = time.perf_counter()
        x = sv.run(plan, problem.model, problem.x)
        seconds = time.perf_counter() - began
        run: dict[str, Any] = {"solver": name, "calls": budget, "nfe": plan.nfe, "seconds": seconds}
        records.append(run | errors(x, exact) | setting)
        ends[name, budget] = x

    over = "median of" if error == "median" else "over all"
    label = f"Root-mean-square error, {over} {figures.counted(len(exact), 'sample')}"
    show(figures.error_table(records, names, budgets, key, label))
    files = recorded(records, key, MEASURES[error])
    if figures.is_image(exact):
        near = pictured(budgets)
        best = sorted(
            (record for record in records if record["calls"] == near), key=lambda record: record[key]
        )
        first = "exact" if problem.flow else f"{setting['reference']}\n(known to {setting['resolution']:.0e})"
        rows = {first: exact} | {record["solver"]: ends[record["solver"], near] for record in best}
        files["images.png" if own else "digits.png"] = figures.gallery(
            {name: x[:PICTURED_SAMPLES] for name, x in rows.items()},
            f"From the same noise by {near} network calls, best solver first",
            ["error", *(figures.seen(record, key) for record in best)],
            ink=not own,
        ).savefig
    write(out, files, quiet)


def compare_adaptive(
    names: list[str],
    budgets: list[int],
    problem: Problem,
    spacing: Grid,
    reference_calls: int,
    error: str,
    out: Path,
    quiet: bool,
) -> None:
    """By the calls that an error costs, adaptive solvers at several tolerances and fixed plans: `compare --adaptive`."""
    key, schedule = KEYS[error], problem.schedule
    fixed = [name for name in names if name not in ADAPTIVE]
    plans = fitting(fixed, problem, spacing, budgets, BUILDS, quiet) if fixed else {}
    out.mkdir(parents=True, exist_ok=True)
    bars = Console(stderr=True, quiet=quiet)
    exact, setting = answered(problem, spacing, reference_calls, bars)
    records: list[dict[str, Any]] = []
    for (name, budget), plan in plans.items():
        run: dict[str, Any] = {"solver": name, "calls": budget, "nfe": plan.nfe}
        records.append(run | errors(sv.run(plan, problem.model, problem.x), exact) | setting)
    start, stop = spacing(schedule, 1)[[0, -1]].tolist()
    pairs = [(name, tolerance) for name in names if name in ADAPTIVE for tolerance in TOLERANCES]
    lost: dict[str, list[str]] = {}
    for name, tolerance in track(pairs, "running the solvers", console=bars, transient=True):
        try:
            found = ADAPTIVE[name](
                problem.model, schedule, problem.x, rtol=tolerance, atol=tolerance, start=start, stop=stop
            )
        except (sv.NonConvergence, ValueError) as reason:
            lost.setdefault(name, []).append(f"at tolerance {tolerance:g}: {reason}")
            continue
        run = {"solver": name, "calls": None, "tolerance": tolerance, "nfe": found.nfe.double().mean().item()}
        run |= {"most": int(found.nfe.max()), "rejected": found.rejected.double().mean().item()}
        records.append(run | errors(found.x, exact) | setting)
    if pairs and all(len(lost.get(name, [])) == len(TOLERANCES) for name, _ in pairs):
        raise ValueError(f"no adaptive solver is left: {pairs[0][0]} {lost[pairs[0][0]][0]}")
    for name, reasons in () if quiet else lost.items():
        more = f" (and at {len(reasons) - 1} others)" if len(reasons) > 1 else ""
        typer.echo(f"solvers: {name} is left out {reasons[0]}{more}", err=True)
    order = [name for name in names if any(record["solver"] == name for record in records)]
    records.sort(key=lambda record: order.index(record["solver"]))
    over = "median of" if error == "median" else "over all"
    label = f"a root-mean-square error, {over} {figures.counted(len(exact), 'sample')}, of"
    show(figures.price_table(records, order, TARGETS, key, label))
    write(out, recorded(records, key, MEASURES[error]), quiet)


def compare_laws(
    solvers: str,
    budgets: list[int],
    schedule: str | None,
    grid: str | None,
    samples: int,
    seed: int | None,
    out: Path,
    quiet: bool,
) -> None:
    """By the distance of exact laws on Gaussian data: `compare --stochastic`."""
    from reference import digits, law, wasserstein2

    names = chosen("--solvers", solvers, BUILDS | {FAST: None})
    asked = named_grid(grid)
    problem = load(None, schedule, samples, seed)
    spacing = asked or (usual(problem.schedule) if isinstance(problem.schedule, sv.Discrete) else sv.logsnr)
    data = digits().moments
    builds = analytic(sv.gaussian_gamma(data.variances.clamp(min=1e-12)))
    plans = fitting(names, problem, spacing, budgets, builds, quiet)
    out.mkdir(parents=True, exist_ok=True)
    bars = Console(stderr=True, quiet=quiet)
    setting = {
        "samples": 0,
        "reference": "the exact marginal",
        "resolution": LAW_RESOLUTION,
        "grid": spacing.__name__,
    }
    setting |= problem.origin | {"model": "Gaussian data with the digits' mean and covariance"} | versions()
    records: list[dict[str, Any]] = []
    for (name, budget), plan in track(plans.items(), "computing the laws", console=bars, transient=True):
        marginal = data.marginal(float(plan.alpha[-1]), float(plan.sigma[-1]))
        distance = wasserstein2(law(plan, data), marginal) / len(data.cov) ** 0.5
        records.append({"solver": name, "calls": budget, "nfe": plan.nfe, "error": distance} | setting)
    show(figures.error_table(records, names, budgets, "error", LAW))

    near, shown = pictured(budgets), slice(PICTURED_SAMPLES)
    with bars.status("sampling the digits"):
        pictures, _ = candidates(names, problem, spacing, [near], analytic(digits_gamma(problem)))
        rows = {"digits": digits().draw(min(samples, PICTURED_SAMPLES), torch.Generator().manual_seed(1))}
        best = sorted(
            (record for record in records if record["calls"] == near), key=lambda record: record["error"]
        )
        ids = range(len(problem.x[shown]))
        for record in best:
            if drawn := pictures.get((record["solver"], near)):
                source = sv.noise.per_sample(seed or 0, ids)
                rows[record["solver"]] = sv.run(drawn, problem.model, problem.x[shown], source)
    files = recorded(records, "error", LAW)
    files["digits.png"] = figures.gallery(
        rows,
        f"Samples of the digits by {near} network calls, least distance on Gaussian data first",
        ["distance", *(figures.seen(record, "error") for record in best if record["solver"] in rows)],
        ink=True,
    ).savefig
    write(out, files, quiet)


def answered(
    problem: Problem, spacing: Grid, reference_calls: int, bars: Console
) -> tuple[Tensor, dict[str, Any]]:
    """What runs are held against, and what every record says of it and of the problem."""
    with bars.status("computing the exact answer"):
        exact, resolution, reference = answer(problem, spacing, reference_calls)
    setting = {"samples": len(exact), "reference": reference, "resolution": resolution}
    return exact, setting | {"grid": spacing.__name__, **problem.origin, **versions()}


def fitting(
    names: list[str],
    problem: Problem,
    spacing: Grid,
    budgets: list[int],
    builds: Mapping[str, Build],
    quiet: bool,
) -> dict[tuple[str, int], sv.Plan]:
    """The plans that fit, by (name, calls); says which solvers are left out, and refuses to leave out all."""
    plans, reasons = candidates(names, problem, spacing, budgets, builds)
    if not plans and reasons:
        raise ValueError(
            f"no solver is left on grid {spacing.__name__}: {'; '.join(dict.fromkeys(reasons.values()))}"
        )
    if not plans:
        refuse("--calls", f"not one step of {', '.join(names)} fits in {budgets[-1]} calls")
    for name in () if quiet else dict.fromkeys(name for name, _ in reasons):
        out_of = [budget for budget in budgets if (name, budget) in reasons]
        at = "" if out_of == budgets else f" at {', '.join(map(str, out_of))} calls"
        typer.echo(f"solvers: {name} is left out{at}: {reasons[name, out_of[0]]}", err=True)
    return plans


def recorded(records: list[dict[str, Any]], key: str, label: str) -> Files:
    """The records of a comparison and their figure."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    return {
        "records.jsonl": lambda path: path.write_text(lines, encoding="utf-8"),
        "errors.png": figures.work_precision(records, key, label).savefig,
    }


def digits_gamma(problem: Problem) -> sv.Gamma:
    """Gamma of the digits, estimated from 64 of them at 25 times of the schedule."""
    from reference import digits

    ends = torch.tensor([problem.schedule.start, problem.schedule.stop], dtype=torch.float64)
    first, last = problem.schedule.half_logsnr(ends).clamp(-12, 12).tolist()
    times = problem.schedule.time(torch.linspace(first, last, 25, dtype=torch.float64))
    x0 = digits().draw(64, torch.Generator().manual_seed(0))
    return sv.estimate_gamma(problem.model, problem.schedule, x0, times, noise=0)


def pictured(budgets: list[int]) -> int:
    """The number of calls at which samples are drawn as pictures."""
    return min(budgets, key=lambda budget: abs(budget - PICTURED_CALLS))

"""The `solvers` command: compare, sample, order, plan."""

import difflib
import importlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from typer.core import TyperGroup

import solvers as sv
from solvers import figures
from solvers.comparison import FAST, Build, Grid, Problem, analytic, answer, candidates, errors, versions
from solvers.files import write_whole
from solvers.grids import usual
from solvers.methods import BUILDS, METHODS, SDES

T = TypeVar("T")
Files = dict[str, Callable[[Path], object]]  # by name, what fills it

SCHEDULES: dict[str, sv.Schedule] = {
    "vp": sv.VP(),
    "cosine": sv.Cosine(),
    "subvp": sv.SubVP(),
    "ve": sv.VE(),
    "edm": sv.EDM(),
    "flow": sv.Flow(start=0.999, stop=0.001),  # at alpha = 0 a noise prediction says nothing of the data
    "vdm": sv.LogSNR(),
    "ddpm": sv.Discrete.linear(),
    "sd": sv.Discrete.scaled_linear(),
}
GRIDS: dict[str, Grid] = {
    grid.__name__: grid
    for grid in (
        sv.angle,
        sv.logsnr,
        sv.uniform,
        sv.quadratic,
        sv.power,
        sv.karras,
        sv.angle_levels,
        sv.trailing,
        sv.leading,
        sv.linspace,
    )
}
SOLVERS = [name for name in [*BUILDS, FAST] if name not in SDES]
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
COUNTS = (32, 64, 128, 256)
REFUSALS = (ValueError, TypeError, ArithmeticError, RuntimeError, OSError)  # whose words suffice
TOLERANCES = {"even": 0.15, "uneven": 0.3}  # by which a measured order may fall short


class OneLineErrors(TyperGroup):
    """Commands that refuse in one line on stderr, with exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.params["traceback"] or hasattr(error, "exit_code"):  # wrong usage, which typer shows
                raise
            lines = [str(error), *getattr(error, "__notes__", [])]
            ours = isinstance(error, REFUSALS) and not lines[1:]
            if not ours:  # raised by the user's function or network, or a bug
                lines[0] = f"{type(error).__name__}: {error}".removesuffix(": ")
                lines[-1] += " (solvers --traceback ... shows where)"
            typer.echo(f"solvers: {'; '.join(' '.join(line.split()) for line in lines)}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="solvers", cls=OneLineErrors, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown"
)

ScheduleName = Annotated[
    str | None,
    typer.Option("--schedule", help=f"Noise schedule: {', '.join(SCHEDULES)}.", show_default="vp"),
]
GridName = Annotated[
    str | None,
    typer.Option(
        "--grid",
        help=f"Where the calls stand: {', '.join(GRIDS)}. The last four need a Discrete schedule, as ddpm and sd are.",
        show_default="angle, or angle_levels for a Discrete schedule",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Your own model: a function without arguments that returns (model, x, schedule), as sv.sample takes them; "
        "x [B, ...] holds the starting states. Modules in the current folder are found.",
        show_default="the digits",
    ),
]
Samples = Annotated[
    int, typer.Option(min=1, help="Number of samples; of your own model's x, the first ones.")
]
Seed = Annotated[
    int | None, typer.Option(min=0, help="Seed of the digits' starting noise.", show_default="0")
]
Out = Annotated[Path, typer.Option(file_okay=False, help="Folder to write into, made if it is missing.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no notes.")]


@app.callback()
def root(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Diffusion samplers as tables of coefficients: compare them, sample with them, measure their orders, print them.

    Everything runs on the CPU within a minute, on handwritten digits whose exact noise prediction and exact answer
    are known. Your own network takes their place with --model.

    Start with:  `solvers compare`
    """


@app.command()
def compare(
    solvers: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, or all: {', '.join(SOLVERS)}; with --stochastic also {', '.join(SDES)}.",
            show_default=COMPARED,
        ),
    ] = None,
    calls: Annotated[
        str, typer.Option(help="Network calls, comma-separated; a solver takes as many steps as fit.")
    ] = "6,12,24,48,96",
    schedule: ScheduleName = None,
    grid: GridName = None,
    samples: Samples = 32,
    seed: Seed = None,
    model: ModelName = None,
    reference_calls: Annotated[
        int | None,
        typer.Option(
            min=6,
            help="With --model: calls of the fine run that stands for the exact answer.",
            show_default="600",
        ),
    ] = None,
    out: Out = Path("results"),
    error: Annotated[
        str | None,
        typer.Option(
            show_default="median",
            help="What the table and the figure show: the root-mean-square error of the median sample, or that over all "
            "samples (rms), which the few that start near the border of two digits dominate. Both are recorded.",
        ),
    ] = None,
    stochastic: Annotated[
        bool,
        typer.Option(
            "--stochastic",
            help="Compare the stochastic family by the distance of their exact law from the data's, on Gaussian data with the digits' "
            "mean and covariance; without Monte Carlo, on grid logsnr unless asked otherwise. digits.png shows their samples of the digits themselves.",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare solvers: their error against the exact answer, at equal numbers of network calls.

    All start from the same noise. Prints a table and writes errors.png (error against calls), digits.png (the samples
    at the number of calls nearest to 10, under the exact ones) and records.jsonl (one record per run). The digits'
    exact answer is certified to 1e-11; with --model a fine run stands for it, checked against one of half as many calls.

    Example:  `solvers compare --solvers ddim,dpm_solver_3,dpm_solver_pp_2m --calls 6,12,24 --schedule edm`
    """
    budgets = numbers("--calls", calls)
    if stochastic:
        for option, value in {
            "--model": model,
            "--error": error,
            "--reference-calls": reference_calls,
        }.items():
            if value is not None:
                refuse(
                    option,
                    "it has no use with --stochastic, which knows the laws of samplers on Gaussian data exactly; leave it out",
                )
        compare_laws(solvers or COMPARED_STOCHASTIC, budgets, schedule, grid, samples, seed, out, quiet)
        return
    listed = SOLVERS if solvers == "all" else BUILDS | {FAST: None}
    names = chosen("--solvers", solvers or COMPARED, listed)
    for name in names:
        if name in SDES:
            refuse(
                "--solvers",
                f"{name} is stochastic: no run of it has an exact answer; compare the laws with --stochastic",
            )
    error = error or "median"
    key = picked("--error", error, {"median": "median_error", "rms": "error"})
    asked = named_grid(grid)
    problem = load(model, schedule, samples, seed)
    spacing = asked or usual(problem.schedule)
    plans = fitting(names, problem, spacing, budgets, BUILDS, quiet)
    out.mkdir(parents=True, exist_ok=True)
    bars = Console(stderr=True, quiet=quiet)

    with bars.status("computing the exact answer"):
        exact, resolution, reference = answer(problem, spacing, reference_calls or 600)
    setting = {"samples": len(exact), "reference": reference, "resolution": resolution}
    setting |= {"grid": spacing.__name__, **problem.origin, **versions()}
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
        first = "exact" if problem.flow else f"{reference}\n(known to {resolution:.0e})"
        rows = {first: exact} | {record["solver"]: ends[record["solver"], near] for record in best}
        files["images.png" if model else "digits.png"] = figures.gallery(
            {name: x[:PICTURED_SAMPLES] for name, x in rows.items()},
            f"From the same noise by {near} network calls, best solver first",
            ["error", *(figures.seen(record, key) for record in best)],
            ink=model is None,
        ).savefig
    write(out, files, quiet)


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
    """What `compare --stochastic` does."""
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


@app.command()
def sample(
    solver: Annotated[
        str, typer.Option("--solver", "--method", help=f"One of {', '.join(BUILDS)}.")
    ] = "recommended",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the grid.")] = 20,
    schedule: ScheduleName = None,
    grid: GridName = None,
    samples: Samples = 64,
    seed: Seed = None,
    model: ModelName = None,
    out: Out = Path("results"),
    quiet: Quiet = False,
) -> None:
    """Draw samples with one solver, from noise to data; --seed also seeds the noise of a stochastic one.

    Writes samples.npy (the array [B, ...]) and, if the samples are grey or RGB images in [-1, 1], samples.png.

    Example:  `solvers sample --solver dpm_solver_3 --steps 8 --seed 1`
    """
    picked("--solver", solver, BUILDS)
    asked = named_grid(grid)
    if model and "analytic" in solver:
        refuse(
            "--solver", f"{solver} needs gamma of your data: see estimate_gamma and analytic_dpm in Python"
        )
    problem = load(model, schedule, samples, None if model and solver in SDES else seed)
    build = analytic(digits_gamma(problem))[solver] if "analytic" in solver else BUILDS[solver]
    spacing = asked or usual(problem.schedule)
    plan = build(problem.schedule, spacing(problem.schedule, steps))
    out.mkdir(parents=True, exist_ok=True)
    x = sv.run(plan, problem.model, problem.x, noise=seed or 0, progress=not quiet).cpu()
    files: Files = {"samples.npy": lambda path: np.save(path, x.numpy())}
    if figures.is_image(x):
        calls = figures.counted(plan.nfe, "network call")
        title = f"{solver}, {calls}, grid {spacing.__name__}"
        files["samples.png"] = figures.sheet(x[:PICTURED_SHEET], title, ink=model is None).savefig
    if not quiet:
        typer.echo(f"Grid: {spacing.__name__}", err=True)
    write(out, files, quiet)


@app.command()
def order(
    method: Annotated[
        str,
        typer.Option("--method", "--solver", help=f"Comma-separated, or all: {', '.join(METHODS | SDES)}."),
    ] = "all",
    quiet: Quiet = False,
) -> None:
    """Measure the order of every method, and hold it against the declared one.

    The error against the exact flow of a mixture of three Gaussians on a line, half log-SNR from -1 to 3, 256 points,
    is measured at 32, 64, 128 and 256 steps, equal ones and ones that repeat an uneven pattern; the order is the last
    slope. Of a stochastic method the error is the Wasserstein-2 distance of its exact law on Gaussian data of variances
    0.05, 0.3 and 2. Exit code 1 if one falls short by more than 0.15 (even steps) or 0.3 (uneven).

    Example:  `solvers order --method dpm_solver_pp_2m,dpm_solver_pp_3m`
    """
    from reference import Gaussian, Mixture, even, law_errors, slopes, trajectory_errors, uneven

    names = chosen("--method", method, METHODS | SDES)
    schedule = sv.VP()
    double = partial(torch.tensor, dtype=torch.float64)
    start, stop = schedule.time(double([-1.0, 3.0])).tolist()
    data = Mixture(
        double([0.3, 0.45, 0.25]), double([[-1.2], [0.3], [1.5]]), double([[[0.25]], [[0.4]], [[0.3]]]) ** 2
    )
    draws = torch.Generator().manual_seed(0)
    x0, noise = data.draw(256, draws), torch.randn(256, 1, dtype=torch.float64, generator=draws)
    x = sv.noised(x0, schedule, start, noise)
    gaussian = Gaussian(double([0.7, -0.4, 1.1]), torch.diag(double([0.05, 0.3, 2.0])))

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for head in ("calls/step", "declared", *TOLERANCES):
        table.add_column(head, justify="right")
    short = []
    for name in track(names, "measuring", console=Console(stderr=True, quiet=quiet), transient=True):
        promise, cells = (METHODS | SDES)[name], []
        for spacing in (even, uneven):
            if name in SDES:
                measured = law_errors(promise.build, gaussian, schedule, start, stop, COUNTS, spacing)
            else:
                measured = trajectory_errors(
                    promise.build, sv.run, data, schedule, x, start, stop, COUNTS, spacing
                )
            slope = slopes(measured)[-1].item()
            promised = (promise.uneven_order if spacing is uneven else None) or promise.order
            kept = slope >= promised - TOLERANCES[spacing.__name__]
            cells.append(f"{slope:.2f}" if kept else f"[bold red]{slope:.2f}[/]")
            short += [] if kept else [f"{name} ({spacing.__name__})"]
        table.add_row(name, str(promise.calls_per_step), str(promise.order), *cells)
    show(table)
    if short:
        raise ValueError(f"the measured order falls short of the declared one: {', '.join(short)}")


@app.command()
def plan(
    method: Annotated[
        str, typer.Option("--method", "--solver", help=f"One of {', '.join(BUILDS)}.")
    ] = "dpm_solver_pp_2m",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the grid.")] = 10,
    schedule: ScheduleName = None,
    grid: GridName = None,
    file: Annotated[
        Path | None,
        typer.Option("--save", dir_okay=False, help="Also write the plan, as JSON, to this file."),
    ] = None,
) -> None:
    """Print a sampler as what it is: a table, one row per network call.

    Each row gives the time and half log-SNR of the call, and the weights of x and of the calls' outputs (the newest
    first) in the x that follows, and of the noise z; a row with - makes no call. The analytic methods are shown for Gaussian data of
    variance 0.5. A saved plan is read back by Plan.load.

    Example:  `solvers plan --method dpm_solver_pp_3m --steps 5 --save plan.json`
    """
    build = picked("--method", method, BUILDS)
    noise = picked("--schedule", schedule or "vp", SCHEDULES)
    spacing = named_grid(grid) or usual(noise)
    table = build(noise, spacing(noise, steps))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        table.save(file)
    typer.echo(f"Grid: {spacing.__name__}", err=True)
    typer.echo(str(table))


def load(model: str | None, schedule: str | None, samples: int, seed: int | None) -> Problem:
    """The digits under a schedule, or what the user's module:function returns."""
    if model is None:
        from reference import digits

        torch.set_num_threads(1)  # the digits are so small that threads would only wait for one another
        noise = picked("--schedule", schedule or "vp", SCHEDULES)
        unit = sv.noise.per_sample(seed or 0, range(samples)).initial(*digits().shape, dtype=torch.float64)
        x = noise.sigma(torch.tensor(noise.start, dtype=torch.float64)) * unit
        origin = {"model": "digits", "schedule": schedule or "vp", "seed": seed or 0}
        return Problem(digits().model(noise), x, noise, digits().flow, origin)

    if schedule is not None or seed is not None:
        refuse("--model", "it brings its own schedule and noise; leave out --schedule and --seed")
    function = found(model)
    with blaming(model):
        made = function()
    if not (isinstance(made, tuple) and len(made) == 3 and isinstance(made[1], Tensor)):
        kinds = ", ".join(type(v).__name__ for v in made) if isinstance(made, tuple) else type(made).__name__
        raise ValueError(
            f"{model} returned ({kinds}): expected (model, x, schedule), as sv.sample takes them"
        )
    net, x, noise = made
    if not callable(getattr(noise, "half_logsnr", None)) or isinstance(noise, type):
        raise ValueError(f"{model} returned schedule = {noise!r:.100}: expected a schedule, e.g. sv.VP()")
    return Problem(net, x[:samples], noise, None, {"model": model, "schedule": repr(noise), "seed": None})


def found(model: str) -> Callable[[], Any]:
    """The function that module:function names."""
    module, _, name = model.partition(":")
    expected = "expected module:function, e.g. my_model:load"
    if not (module and name):
        refuse("--model", f"{model!r} names no function; {expected}")
    sys.path.insert(0, "")  # the current folder, as `python -m` does
    try:
        with blaming(f"the import of {module}"):
            imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if f"{module}.".startswith(f"{error.name}."):
            refuse("--model", f"{model!r} was not found, {error}; {expected}")
        raise
    if not callable(getattr(imported, name, None)):
        refuse("--model", f"{model!r} was not found, module {module!r} has no function {name!r}; {expected}")
    return getattr(imported, name)


@contextmanager
def blaming(culprit: str) -> Iterator[None]:
    """Errors say that they were raised by the user's code."""
    try:
        yield
    except Exception as error:
        error.add_note(f"raised by {culprit}")
        raise


def show(table: Table) -> None:
    """Print a table, into a file as wide as it needs."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def write(out: Path, files: Files, quiet: bool) -> None:
    """Write files into a folder; each is whole or not there at all."""
    for name, fill in files.items():
        write_whole(out / name, fill)
    if not quiet:
        typer.echo(f"Written to {out}: {', '.join(files)}", err=True)


def refuse(option: str, message: str) -> NoReturn:
    """Wrong usage of an option, exit code 2."""
    raise typer.BadParameter(message, param_hint=option)


def picked(option: str, name: str, known: Mapping[str, T]) -> T:
    """What a name stands for."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        refuse(option, f"{name!r} is unknown; {hint}expected one of {', '.join(known)}")
    return known[name]


def named_grid(name: str | None) -> Grid | None:
    """The grid of that name, if one was asked for."""
    return None if name is None else picked("--grid", name, GRIDS)


def chosen(option: str, names: str, known: Iterable[str]) -> list[str]:
    """The names of a comma-separated list, or all, each once."""
    table = {name: name for name in known}
    listed = table if names == "all" else [name.strip() for name in names.split(",")]
    return list(dict.fromkeys(picked(option, name, table) for name in listed))


def numbers(option: str, text: str) -> list[int]:
    """The whole numbers of a comma-separated list, ascending, each once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        refuse(option, f"{text!r}: expected whole numbers above 0, e.g. 6,12,24")
    return sorted({int(part) for part in parts})

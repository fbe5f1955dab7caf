"""The `solvers` command: compare, sample, order, plan."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typer.core import TyperGroup

import solvers as sv
from solvers import figures
from solvers.compare import (
    ADAPTIVE,
    COMPARED,
    COMPARED_ADAPTIVE,
    COMPARED_STOCHASTIC,
    KEYS,
    PICTURED_SHEET,
    compare_adaptive,
    compare_errors,
    compare_laws,
    digits_gamma,
)
from solvers.comparison import FAST, analytic
from solvers.grids import usual
from solvers.methods import BUILDS, METHODS, SDES
from solvers.options import (
    GRIDS,
    SCHEDULES,
    SOLVERS,
    Files,
    chosen,
    load,
    named_grid,
    numbers,
    picked,
    refuse,
    show,
    write,
)

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
            help=f"Comma-separated, or all: {', '.join(SOLVERS)}; with --stochastic also {', '.join(SDES)}; with --adaptive also "
            f"{', '.join(ADAPTIVE)}.",
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
    adaptive: Annotated[
        bool,
        typer.Option(
            "--adaptive",
            help="Compare adaptive steps at tolerances 0.1 to 1e-4, torchdiffeq's among them, with fixed plans at --calls, by the mean of the calls that a "
            "sample costs.",
        ),
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Compare solvers: their error against the exact answer, at equal numbers of network calls.

    All start from the same noise. Prints a table and writes errors.png (error against calls), digits.png (the samples
    at the number of calls nearest to 10, under the exact ones; not with --adaptive) and records.jsonl (one record per run). The digits'
    exact answer is certified to 1e-11; with --model a fine run stands for it, checked against one of half as many calls.

    Example:  `solvers compare --solvers ddim,dpm_solver_3,dpm_solver_pp_2m --calls 6,12,24 --schedule edm`
    """
    budgets = numbers("--calls", calls)
    if stochastic and adaptive:
        refuse("--adaptive", "it has no use with --stochastic, which compares laws; leave one of them out")
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
    more = ADAPTIVE if adaptive else {}
    listed = [*more, *SOLVERS] if solvers == "all" else BUILDS | {FAST: None} | more
    names = chosen("--solvers", solvers or (COMPARED_ADAPTIVE if adaptive else COMPARED), listed)
    for name in names:
        if name in SDES:
            refuse(
                "--solvers",
                f"{name} is stochastic: no run of it has an exact answer; compare the laws with --stochastic",
            )
    error = error or "median"
    picked("--error", error, KEYS)
    asked = named_grid(grid)
    problem = load(model, schedule, samples, seed)
    spacing = asked or usual(problem.schedule)
    body = compare_adaptive if adaptive else compare_errors
    body(names, budgets, problem, spacing, reference_calls or 600, error, out, quiet)


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

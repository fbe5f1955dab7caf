"""What the commands share: the names they know, problems, refusals, files."""

import difflib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import solvers as sv
from solvers.comparison import FAST, Grid, Problem
from solvers.files import write_whole
from solvers.methods import BUILDS, SDES

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
        sv.logalpha,
        sv.logsnr,
        sv.uniform,
        sv.quadratic,
        sv.power,
        sv.karras,
        sv.angle_levels,
        sv.logalpha_levels,
        sv.trailing,
        sv.leading,
        sv.linspace,
    )
}
SOLVERS = [name for name in [*BUILDS, FAST] if name not in SDES]


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

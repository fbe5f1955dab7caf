"""Writes the table of docs/methods.md from the methods' docstrings and plans: python docs/methods.py"""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import solvers as sv
from solvers.methods import BUILDS, METHODS

PAGE = Path(__file__).with_name("methods.md")
BEGIN, END = "<!-- methods.py: begin -->\n", "<!-- methods.py: end -->"
HEADS = ("name", "call", "order", "calls per step", "form", "needs", "source")
SCHEDULE, FLOW = sv.VP(), sv.Flow()


def parts(build: Callable[..., sv.Plan]) -> tuple[Callable[..., sv.Plan], dict[str, object]]:
    """The public function and the options bound to it."""
    return (build.func, build.keywords) if isinstance(build, partial) else (build, {})


def shown(value: object) -> str:
    """An option as a reader would write it."""
    if isinstance(value, sv.tableaux.Tableau):
        for name, known in vars(sv.tableaux).items():
            if known is value:
                return f"tableaux.{name}"
        places = ", ".join(f"{c:.3g}" for c in value.positions[1:])
        return f"tableaux.{('second', 'third')[value.stages - 2]}_order({places})"
    return "gaussian_statistics(...)" if callable(value) else repr(value)


def sentence(function: Callable[..., sv.Plan]) -> list[str]:
    """The docstring's answer to: order; calls; ODE or SDE; form."""
    text = " ".join(inspect.getdoc(function).split())
    return re.search(r"(Order .*?(?: form|mixture form, per element))\.", text)[1].split("; ")


def source(function: Callable[..., sv.Plan]) -> str:
    """The first source that the docstring names, as a link where it is on arXiv."""
    text = " ".join(inspect.getdoc(function).split("Source: ")[1].split())
    if found := re.match(r"([^(]*?) \(arXiv (\d+\.\d+)\)", text):
        return f"[{found[1].removesuffix(',')}](https://arxiv.org/abs/{found[2]})"
    return re.split(r"[,;(]", text)[0].strip()


def needs(build: Callable[..., sv.Plan], plan: sv.Plan, times: torch.Tensor) -> Iterator[str]:
    """What can be found out by building it elsewhere and looking at its calls."""
    try:
        at_ends = build(FLOW, sv.uniform(FLOW, 12))
        if plan.predicts == "velocity" or at_ends.predicts == "data":
            yield "at alpha = 0 no noise or score"
    except ValueError:
        yield "alpha > 0" if plan.predicts != "mixture" else "alpha > 0 and sigma > 0"
    if not set(plan.times.tolist()) <= set(times.tolist()):
        yield "calls between times"
    if plan.predicts == "mixture":
        yield "statistics"


def rows() -> Iterator[list[str]]:
    """A row for every name that the command knows."""
    times = sv.logsnr(SCHEDULE, 12)
    for name, build in BUILDS.items():
        function, options = parts(build)
        plans = [build(SCHEDULE, sv.logsnr(SCHEDULE, steps)) for steps in (11, 12)]
        per_step = plans[1].nfe - plans[0].nfe
        extra = plans[1].nfe - 12 * per_step
        defaults = {key: p.default for key, p in inspect.signature(function).parameters.items()}
        options = {key: value for key, value in options.items() if value != defaults[key]}
        bound = "".join(f", {key}={shown(value)}" for key, value in options.items())
        order = (
            sentence(function)[0].removeprefix("Order ") if name not in METHODS else str(METHODS[name].order)
        )
        form = plans[1].predicts
        yield [
            f"`{name}`",
            f"`{function.__name__}(schedule, times{bound})`",
            order,
            f"{per_step}" + (f" (+ {extra} in all)" if extra else ""),
            form,
            "; ".join(needs(build, plans[1], times)),
            source(function),
        ]


def table() -> str:
    """The Markdown table."""
    lines = [HEADS, tuple("---" for _ in HEADS), *rows()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page() -> str:
    """The page with the table as it should be."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

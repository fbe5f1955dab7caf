"""Writes the tables of docs/methods.md from the methods' docstrings and plans: python docs/methods.py"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

import solvers as sv
from solvers.methods import BUILDS, METHODS, SDES

PAGE = Path(__file__).with_name("methods.md")
END = "<!-- methods.py: end -->"
HEADS = ("name", "call", "order", "calls per step", "form", "needs", "source")
ORDERS = METHODS | SDES
TABLES = {"deterministic": [name for name in BUILDS if name not in SDES], "stochastic": list(SDES)}
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
    if isinstance(value, partial):
        options = "".join(f", {key}={shown(option)}" for key, option in value.keywords.items())
        return f"partial({value.func.__name__}{options})"
    kind = "statistics" if "statistics" in getattr(value, "__qualname__", "") else "gamma"
    return f"gaussian_{kind}(...)" if callable(value) else repr(value)


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
    if not set(plan.times[:-1][plan.is_called].tolist()) <= set(times.tolist()):
        yield "calls between times"
    if plan.predicts == "mixture":
        yield "statistics"


def rows(names: Iterable[str]) -> Iterator[list[str]]:
    """A row for every name."""
    times = sv.logsnr(SCHEDULE, 12)
    for name in names:
        build = BUILDS[name]
        function, options = parts(build)
        plans = [build(SCHEDULE, sv.logsnr(SCHEDULE, steps)) for steps in (11, 12)]
        per_step = plans[1].nfe - plans[0].nfe
        extra = plans[1].nfe - 12 * per_step
        defaults = {key: p.default for key, p in inspect.signature(function).parameters.items()}
        options = {key: value for key, value in options.items() if value != defaults[key]}
        bound = "".join(f", {key}={shown(value)}" for key, value in options.items())
        order = (
            sentence(function)[0].removeprefix("Order ") if name not in ORDERS else str(ORDERS[name].order)
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


def table(names: Iterable[str]) -> str:
    """The Markdown table of some methods."""
    lines = [HEADS, tuple("---" for _ in HEADS), *rows(names)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def page() -> str:
    """The page with its tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for kind, names in TABLES.items():
        begin = f"<!-- methods.py: {kind} -->\n"
        before, rest = text.split(begin)
        text = before + begin + table(names) + END + rest.split(END, 1)[1]
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

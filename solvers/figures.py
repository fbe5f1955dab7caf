"""What the `solvers` command shows: tables and figures of errors, rows of images. They read records; they measure nothing."""

from collections.abc import Mapping, Sequence
from math import ceil
from textwrap import fill
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from torch import Tensor

from solvers.comparison import price

COLORS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444", "#7a5195", "#c1121f", "#8c6d31", "#1f9eb5", "#6a994e",
)  # fmt: skip
MARKERS = "os^DvP<"
STYLES = "-", "--", ":"  # the colours begin again, dashed
GAP = 0.035  # between labels, as a share of the axis


def work_precision(records: Sequence[Mapping[str, Any]], key: str, label: str) -> Figure:
    """Error against calls, log-log, one line per solver, each named at its right end.

    Args:
        records: one per run, as `solvers compare` writes them; all of one setting.
        key: of the error in a record.
        label: what this error is.

    Returns:
        The figure, to be saved.
    """
    figure = Figure(figsize=(9, 6), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    ends = {}
    for i, solver in enumerate(dict.fromkeys(record["solver"] for record in records)):
        points = sorted((r["nfe"], r[key]) for r in records if r["solver"] == solver and r[key] > 0)
        if points:
            color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
            axes.plot(
                *zip(*points, strict=True),
                color=color,
                linestyle=style,
                marker=MARKERS[i % len(MARKERS)],
                markersize=4,
                linewidth=1.3,
            )
            ends[solver] = (*points[-1], color, style)
    some = records[0]
    if any(record[key] < some["resolution"] for record in records):
        axes.axhline(
            some["resolution"], color="0.5", linestyle=":", label=f"{some['reference']} is known to this"
        )
        axes.legend(frameon=False, loc="lower left")
    axes.set(xscale="log", yscale="log", xlabel="network calls", ylabel=label)
    asked = sorted({record["calls"] for record in records if record["calls"]})
    made = [record["nfe"] for record in records]
    if len(asked) == len({record["calls"] for record in records}):
        axes.set_xticks(asked, labels=map(str, asked))
        axes.minorticks_off()
    else:  # calls are what came of tolerances
        ticks = [n for n in (3, 5, 10, 20, 50, 100, 200, 500, 1000) if min(made) <= n <= max(made)]
        axes.set_xticks(ticks, labels=map(str, ticks))
        axes.minorticks_off()
    axes.set_xlim(min(made) / 1.15, max(*asked, *made) * 1.08)
    setting = f"{some['model']}, schedule {some['schedule']}, grid {some['grid']}"
    setting += f", {counted(some['samples'], 'sample')}" if some["samples"] else ""
    known = f"{some['reference']} (known to {some['resolution']:.0e})"
    axes.set_title(f"Error against {known}\n{fill(setting, 100)}", loc="left", fontsize=10)
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    _name_ends(axes, ends)
    return figure


def _name_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str, str]]) -> None:
    """Write each line's name to the right of the axes, at its end's height or as near as the other names allow."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = {name: tuple(to_axes.transform(end[:2])) for name, end in ends.items()}
    names = sorted(places, key=lambda name: places[name][1])
    heights = _spread([places[name][1] for name in names], GAP)
    for name, height in zip(names, heights, strict=True):
        color, style = ends[name][2:]
        axes.annotate(
            name, places[name], (1.05, height), "axes fraction", "axes fraction", color=color, fontsize=9, va="center",
            arrowprops={"arrowstyle": "-", "color": color, "linestyle": style, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)},
        )  # fmt: skip


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Increasing heights moved as little as makes neighbours `gap` apart: runs that touch share their mean place."""
    runs: list[list[float]] = []  # the heights of labels that touch, each less its rank's share of the gap
    for rank, height in enumerate(heights):
        runs.append([height - rank * gap])
        while len(runs) > 1 and _mean(runs[-2]) > _mean(runs[-1]):
            runs[-2:] = [runs[-2] + runs[-1]]
    places = [_mean(run) for run in runs for _ in run]
    return [place + rank * gap for rank, place in enumerate(places)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def counted(count: int, thing: str) -> str:
    """1 sample, 2 samples."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def is_image(x: Tensor) -> bool:
    """Whether x [B, C, H, W] can be drawn: grey or RGB."""
    return x.ndim == 4 and x.shape[1] in (1, 3)


def gallery(rows: Mapping[str, Tensor], title: str, notes: Sequence[str] = (), ink: bool = False) -> Figure:
    """Rows of images, each row named at its left, with a note at its right.

    Args:
        rows: images in [-1, 1] by name, [n, C, H, W]; C = 1 is grey, C = 3 is RGB.
        title: of the figure.
        notes: one per row, or none.
        ink: draw 1 as ink on paper, black, and not as light.

    Returns:
        The figure, to be saved.
    """
    images = torch.stack(list(rows.values())).double().cpu().clamp(-1, 1)
    count, columns, channels, height, width = images.shape
    images = (1 - images if ink else 1 + images) / 2
    gap = max(1, width // 12)
    tiles = torch.nn.functional.pad(images, (0, gap, 0, gap), value=0.82)
    picture = tiles.permute(0, 3, 1, 4, 2).reshape(count * (height + gap), columns * (width + gap), channels)
    tall = 0.62 * height / width
    margin = 3 if any(name.strip() for name in rows) else 0.3
    figure = Figure(
        figsize=(max(0.62 * columns, 0.08 * len(title)) + margin, tall * count + 0.5),
        layout="constrained",
        dpi=150,
    )
    axes = figure.add_subplot()
    axes.imshow(picture[:-gap, :-gap].expand(-1, -1, 3).numpy(), interpolation="nearest")
    middles = [row * (height + gap) + height / 2 - 0.5 for row in range(count)]
    axes.set_yticks(middles, labels=list(rows))
    axes.set_xticks([])
    axes.set_anchor("W")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    for middle, note in zip(middles, notes, strict=False):
        axes.annotate(note, (1.01, middle), xycoords=("axes fraction", "data"), va="center", color="0.35")
    return figure


def sheet(x: Tensor, title: str, ink: bool = False) -> Figure:
    """Images [B, C, H, W] in a square, as `gallery` draws them; the places left over stay empty."""
    columns = ceil(len(x) ** 0.5)
    empty = torch.full_like(x[:1], -1 if ink else 1)
    full = torch.cat([x, *[empty] * (-len(x) % columns)])
    return gallery({" " * i: row for i, row in enumerate(full.split(columns))}, title, ink=ink)


def seen(record: dict[str, Any], key: str) -> str:
    """An error, or that it is below what can be known."""
    known = record["resolution"]
    return f"{record[key]:.1e}" if record[key] > known else f"<{known:.0e}"


def error_table(
    records: list[dict[str, Any]], solvers: list[str], budgets: list[int], key: str, label: str
) -> Table:
    """Rows are solvers, columns numbers of calls; the best of each column is bold. `label` says what the error is."""
    runs = {(record["solver"], record["calls"]): record for record in records}
    best = {b: min((r[key] for r in records if r["calls"] == b), default=0.0) for b in budgets}

    def cell(record: dict[str, Any] | None) -> str:
        if record is None:
            return "-"
        known = record["resolution"]
        text = seen(record, key)
        text = f"[bold]{text}[/]" if record[key] <= max(best[record["calls"]], known) else text
        return text if record["nfe"] == record["calls"] else f"{text} [dim]({record['nfe']})[/]"

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("calls", no_wrap=True)
    for budget in budgets:
        table.add_column(str(budget), justify="right")
    for solver in solvers:
        table.add_row(solver, *(cell(runs.get((solver, budget))) for budget in budgets))
    some = records[0]
    table.caption = (
        f"{label}, against {some['reference']} (known to {some['resolution']:.0e}), on grid {some['grid']}. Bold: best of the "
        "column. (n): calls made, where not all fit."
    )
    return table


def price_table(
    records: list[dict[str, Any]], solvers: list[str], targets: Sequence[float], key: str, label: str
) -> Table:
    """Rows are solvers, columns errors: the calls that they cost, between the runs; the least of each column is bold. `label` says what the error is."""
    lines = {solver: [(r["nfe"], r[key]) for r in records if r["solver"] == solver] for solver in solvers}
    prices = {(solver, target): price(lines[solver], target) for solver in solvers for target in targets}
    least = {
        target: min((v for solver in solvers if (v := prices[solver, target])), default=0.0)
        for target in targets
    }

    def cell(value: float | None, best: float) -> str:
        if value is None:
            return "-"
        return f"[bold]{value:.0f}[/]" if value == best else f"{value:.0f}"

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("calls for error", no_wrap=True)
    for target in targets:
        table.add_column(f"{target:g}", justify="right")
    for solver in solvers:
        table.add_row(solver, *(cell(prices[solver, target], least[target]) for target in targets))
    some = records[0]
    table.caption = (
        f"Calls of a sample, in the mean, for {label} so much, against {some['reference']}; fixed plans on grid {some['grid']}. Bold: least of "
        "the column. -: not reached for good."
    )
    return table

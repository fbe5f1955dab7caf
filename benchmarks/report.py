"""Which records make which figure and table, and where they stand; nothing in a report is typed by hand.

python benchmarks/report.py results/*.jsonl --out results --into docs/benchmarks.md docs/which-solver.md
python benchmarks/report.py docs/benchmarks/cpu.jsonl --page docs/benchmarks/cpu.md
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from os.path import relpath
from pathlib import Path
from typing import TypeVar

import plots
import tables
from lines import is_ours, unique
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from records import Adaptive, Build, EndToEnd, Growth, Law, Record, Step, WorkPrecision, read

ROOT = Path(__file__).parents[1]
COLUMNS = (5, 10, 20, 50)  # calls, of a table of errors
Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Section:
    """A part of a page: what it says before its tables and figures, which are those whose names begin so."""

    title: str
    about: str
    names: tuple[str, ...]


PAGE = (
    Section("Targets", "The largest of what was measured, over methods, networks and batch sizes.", ("targets",)),
    Section(
        "What a call costs outside the network",
        "From one call to the next inside a run, less the same of the bare network, which costs nothing here: [how it is "
        "measured](../benchmarks.md#what-a-call-costs-outside-the-network).",
        ("headline", "step"),
    ),
    Section(
        "Building a plan",
        "From a schedule and its times to the table of coefficients, on the host: the minimum over rounds.",
        ("builds",),
    ),
    Section(
        "How costs grow",
        "A run less its bare network calls, and the building of a plan, against one quantity with the others fixed; minima "
        "over rounds. Fitted is cost = fixed + per unit * value, neither below 0, by least squares of relative errors; *off by* is "
        "the largest relative distance from that line. The exponent is that of a power through the upper half of the points on "
        f"logarithmic axes: up to {tables.LINEAR:g} it is called linear.",
        ("growth",),
    ),
    Section(
        "Sampling with networks of real size",
        "Random weights; a run over as many bare calls of the network, taken in turn, the median of ratios. A run in a graph is "
        "held against a graph of the bare calls. *Waits*: how often the host waits for the device in a run, as far as "
        "`torch.cuda.set_sync_debug_mode` sees it, and how often of that between the first call and the last. *Extra states*: "
        "the peak of allocated memory in a run beyond that of the network alone, over the size of a state. Empty: not measured.",
        ("end_to_end",),
    ),
    Section(
        "What a call buys",
        "Error against calls on problems with a known exact answer, on the best grid of those run: [what is "
        "measured](../benchmarks.md#what-a-call-buys).",
        ("work_precision", "grids"),
    ),
)  # fmt: skip


def of(records: Sequence[Record], *kinds: type[Kind]) -> list[Kind]:
    """Those of some kinds."""
    return [r for r in records if isinstance(r, kinds)]


def figures_of(records: Sequence[Record]) -> dict[str, Figure]:
    """Every figure that the records allow, by name."""
    made: dict[str, Figure] = {}
    if steps := of(records, Step):
        made["step"] = plots.draw_step(sorted(steps, key=lambda r: prod(r.shape)))
    if runs := of(records, WorkPrecision):
        for schedule in unique(runs, "schedule"):
            made[f"work_precision_{schedule.lower()}"] = plots.draw_methods(runs, schedule)
        made["grids"] = plots.draw_grids(runs)
    laws = of(records, Law)
    if exact := [r for r in laws if r.kl is not None]:
        for grid in unique(exact, "grid"):
            made[f"laws_{grid}"] = plots.draw_laws(exact, grid)
    if by_samples := [r for r in laws if r.kl is None]:
        made["samples"] = plots.draw_samples(by_samples)
    if adaptive := of(records, Adaptive):
        made["adaptive"] = plots.draw_adaptive(adaptive)
    if builds := of(records, Build):
        made["builds"] = plots.draw_builds(builds)
    if growth := of(records, Growth):
        made["growth"] = plots.draw_growth(growth)
    if runs := of(records, EndToEnd):
        made["end_to_end"] = plots.draw_end_to_end(runs)
    return made


def tables_of(records: Sequence[Record], columns: Sequence[int]) -> dict[str, tuple[Sequence[Record], str]]:
    """Every table that the records allow, by name, with the records that it is made of."""
    made: dict[str, tuple[Sequence[Record], str]] = {}
    if steps := sorted(of(records, Step), key=lambda r: prod(r.shape)):
        made["headline"] = steps, tables.headline_table(steps)
        made["step"] = steps, tables.step_table(steps)
    if runs := of(records, WorkPrecision):
        made["work_precision"] = runs, tables.error_table(runs, columns)
        ours = [r for r in runs if is_ours(r.method)]  # peers have grids of their own
        if ours:
            made["ratios"] = ours, tables.ratio_table(ours)
    laws = of(records, Law)
    if exact := [r for r in laws if r.kl is not None]:
        made["laws"] = exact, tables.law_table(exact)
    if by_samples := [r for r in laws if r.kl is None]:
        made["samples"] = by_samples, tables.sample_table(by_samples)
    if adaptive := of(records, Adaptive):
        made["prices"] = adaptive, tables.price_table(adaptive)
        made["kept"] = adaptive, tables.kept_table(adaptive)
    if builds := of(records, Build):
        made["builds"] = builds, tables.build_table(builds)
    if growth := of(records, Growth, Build):
        made["growth"] = growth, tables.growth_table(growth)
    if runs := of(records, EndToEnd):
        made["end_to_end"] = runs, tables.end_to_end_table(runs)
    if of(records, Step, Build, EndToEnd):
        made["targets"] = records, tables.target_table(records)
    return made


def save(records: Sequence[Record], folder: Path, prefix: str = "") -> list[str]:
    """Write every figure as an image, and say their names."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(plots.STYLE):
        made = figures_of(records)
        for name, figure in made.items():
            figure.savefig(folder / f"{prefix}{name}.png")
            plt.close(figure)
    return list(made)


def insert(text: str, name: str, table: str) -> str:
    """The text with what stands between the comments `begin name` and `end name` replaced."""
    begin, end = f"<!-- report.py: begin {name} -->", f"<!-- report.py: end {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the document has no place for the table: expected the lines {begin} and {end}")
    return re.sub(f"(?s){re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{table}\n{end}", text)


def write_page(path: Path, sources: Sequence[Path], columns: Sequence[int] = COLUMNS) -> None:
    """A page of its own, with its figures beside it: all that there is to say from the records in some files."""
    records = [record for source in sources for record in read(source)]
    figures = save(records, path.parent, f"{path.stem}_")
    found = {name: table for name, (_, table) in tables_of(records, columns).items()}
    links = ", ".join(f"[{source.name}]({relpath(source, path.parent)})" for source in sources)
    command = f"python benchmarks/report.py {' '.join(map(_shown, sources))} --page {_shown(path)}"
    devices = ", ".join(sorted({r.versions.get("device", "unknown") for r in records}))
    parts = [
        f"# Measured on {devices}",
        f"Made of the records in {links} alone, by `{command}`, as `benchmarks/gpu.py` does when it has measured them: no number here is "
        f"typed by hand. {tables.made_by(records)}",
    ]
    for section in PAGE:
        chosen = [table for name, table in found.items() if name.startswith(section.names)]
        images = [
            f"![{section.title}: {name}]({path.stem}_{name}.png)"
            for name in figures
            if name.startswith(section.names)
        ]
        if chosen:
            parts += [f"## {section.title}", section.about, *chosen, *images]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _shown(path: Path) -> str:
    """As it is typed at the root of the repository."""
    whole = path.resolve()
    return str(whole.relative_to(ROOT)) if whole.is_relative_to(ROOT) else path.name


def main(argv: list[str] | None = None) -> None:
    """Draw whatever the records allow."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("records", type=Path, nargs="+", help="JSONL files of the other scripts")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for figures and tables")
    parser.add_argument(
        "--into",
        type=Path,
        nargs="+",
        help="Markdown files, each with places for some of the tables; default: files of their own in the folder",
    )
    parser.add_argument(
        "--page", type=Path, help="a Markdown file to be written whole, its figures beside it"
    )
    parser.add_argument(
        "--columns", type=int, nargs="+", default=COLUMNS, help="calls shown in the table of errors"
    )
    given = parser.parse_args(argv)
    if given.page:
        write_page(given.page, given.records, given.columns)
        return
    records = [record for path in given.records for record in read(path)]
    save(records, given.out)
    found = {
        name: f"{tables.made_by(chosen)}\n\n{table}"
        for name, (chosen, table) in tables_of(records, given.columns).items()
    }
    if not given.into:
        for name, table in found.items():
            (given.out / f"{name}.md").write_text(table + "\n", encoding="utf-8")
        return
    pages = {path: path.read_text(encoding="utf-8") for path in given.into}
    for name, table in found.items():
        path = next((path for path, text in pages.items() if f"begin {name} -->" in text), given.into[0])
        pages[path] = insert(pages[path], name, table)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

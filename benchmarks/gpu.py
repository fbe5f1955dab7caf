"""Everything that is measured on one machine, as records and a report of them; meant for a GPU, and smaller on a CPU.

python benchmarks/gpu.py --out docs/benchmarks    # cuda.jsonl, cuda.md and its figures, or cpu.jsonl, cpu.md ...

A part that fails says so and leaves the others be; records are on disk as soon as they are made, and the report can be made of
them again: python benchmarks/report.py docs/benchmarks/cuda.jsonl --page docs/benchmarks/cuda.md
"""

import argparse
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import device_step
import end_to_end
import growth
import report
import step
import torch
import work_precision
from device import default_device, release
from lines import USUAL_STEPS
from records import Record, threads, write

from solvers.methods import BUILDS

PARTS = ("build", "step", "growth", "errors", "end_to_end")


class Job(NamedTuple):
    """Something to measure."""

    name: str
    measure: Callable[[], Iterable[Record]]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        step: shape -> calls in a run, rounds and loops, of the cost of a call.
        values: of each quantity that grows.
        builds: what plans are built: () -> records.
        errors: what work_precision.py runs.
        batches: of the networks of this size.
        rounds: of a case at the most.
        budget: seconds for them, of a plan or a run without a network.
        network_budget: seconds for them, of a run with one.
    """

    step: dict[tuple[int, ...], tuple[int, int, Sequence[str]]]
    values: dict[str, Sequence[int]]
    builds: Callable[..., Iterable[Record]]
    batches: tuple[int, ...]
    errors: dict[str, Any]
    rounds: int
    budget: float
    network_budget: float


ERRORS = {
    "problems": ["2-D mixture", "8-D mixture"],
    "schedules": ["VP"],
    "grids": ["logsnr", "angle"],
    "methods": ["recommended", "ddim", "dpm_solver_3", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "unipc_2", "heun"],
    "calls": [5, 10, 20, 50],
    "starts": 64,
    "peers": ["k-diffusion dpmpp_2m", "diffusers DPM++ 2"],
}  # fmt: skip
SIZES = {
    "cuda": Size(device_step.CASES, growth.VALUES, growth.all_builds, (1, 4, 16, 64), ERRORS, 30, 1.5, 3.0),
    "cpu": Size(step.CASES, growth.VALUES, growth.all_builds, (1, 4), ERRORS, 30, 1.5, 15.0),
    "test": Size(
        {(2, 3, 5): (4, 2, device_step.CHOSEN)},
        {"steps": (2, 4, 8), "history": (1, 2)},
        partial(growth.all_builds, methods=["ddim", growth.FAST], largest=10),
        (1, 2),
        ERRORS
        | {
            "problems": ["2-D mixture"],
            "methods": ["ddim", "unipc_2"],
            "peers": [],
            "calls": [5, 10],
            "starts": 4,
        },
        3,
        0.1,
        0.1,
    ),
}


def on_one_thread(measure: Callable[[], Iterable[Record]]) -> Iterator[Record]:
    """What is small, or is timed where several threads would wait for each other."""
    with threads(1):
        yield from measure()


def jobs(
    name: str, methods: Sequence[str], steps: int, seed: int, device: torch.device
) -> Iterator[tuple[str, Job]]:
    """(part, job) of a size, the cheap and the safe first."""
    size = SIZES[name]
    limits = {"rounds": size.rounds, "budget": size.budget, "seed": seed}
    longer = limits | {"budget": size.network_budget}
    yield "build", Job("building plans", partial(on_one_thread, partial(size.builds, **limits)))
    measure = step.measure if name == "cpu" else partial(device_step.measure, device=device)
    for shape, case in size.step.items():
        yield "step", Job(f"the cost of a call at {shape}", partial(measure, shape, *case, seed))
    for quantity, values in size.values.items():
        grown = partial(growth.growth, {quantity: values}, **limits, device=device)
        yield "growth", Job(f"growth with {quantity}", partial(on_one_thread, grown))
    errors = partial(work_precision.records, **size.errors, seed=seed)
    yield "errors", Job("errors against calls", partial(on_one_thread, errors))
    for run in end_to_end.cases(name, size.batches, methods, steps, seed, device):
        yield "end_to_end", Job(str(run), lambda run=run: [run.measure(**longer)])


def guarded(jobs: Iterable[Job], device: torch.device, failed: list[str]) -> Iterator[Record]:
    """What the jobs measure; the name of one that fails is noted, and the next goes on."""
    for name, measure in jobs:
        print(name, flush=True)
        try:
            yield from measure()
        except Exception:
            traceback.print_exc()
            failed.append(name)
        release(device)


def main(argv: list[str] | None = None) -> None:
    """Measure, write the records, then the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = default_device()
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for records, report and figures"
    )
    parser.add_argument("--size", choices=SIZES, default=device.type, help="default: that of the machine")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, metavar="part", help="default: all"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=BUILDS, default=end_to_end.METHODS, metavar="method",
        help=f"that sample from networks; default: {' '.join(end_to_end.METHODS)}",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=USUAL_STEPS, help="of a run of a network; default: 20")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    records, failed = given.out / f"{device.type}.jsonl", []
    chosen = (
        job
        for part, job in jobs(given.size, given.methods, given.steps, given.seed, device)
        if part in given.parts
    )
    with threads(given.threads):
        write(records, guarded(chosen, device, failed))
    report.write_page(records.with_suffix(".md"), [records])
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

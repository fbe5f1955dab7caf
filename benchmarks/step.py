"""What one call costs outside the network, against passes over memory and against diffusers. Writes records.

python benchmarks/step.py --out results/step.jsonl
"""

import argparse
import copy
import gc
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from records import Step, threads, write
from torch import Tensor

import solvers as sv

# calls: enough for the set-up of a run to weigh little; rounds: enough for a quiet moment on a shared machine
CASES = {(1, 4, 64, 64): (50, 100), (16, 4, 64, 64): (50, 40), (64, 3, 256, 256): (20, 8)}
METHODS = {
    "dpm_solver_pp 2": sv.dpm_solver_pp,
    "ddim": sv.ddim,
    "exponential_adams 3": partial(sv.exponential_adams, order=3),
    "exponential_adams 4, noise": partial(sv.exponential_adams, order=4, predicts="noise"),
}
BARE, ADD, IDEAL, DIFFUSERS = "bare model", "one torch.add_", "ideal single pass", "diffusers 2M"


class Net:
    """A network that costs nothing: the same output every time, and a note of when it was asked."""

    def __init__(self, output: Tensor):
        self.output = output
        self.asked: list[float] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The fixed output."""
        self.asked.append(perf_counter())
        return self.output


def loops(shape: tuple[int, ...], calls: int, seed: int) -> tuple[Net, dict[str, Callable[[], object]]]:
    """The network, and by name the loops that call it `calls` times; all on float32 of one shape."""
    generator = torch.Generator().manual_seed(seed)
    x, m, other = (torch.randn(shape, generator=generator) for _ in range(3))
    net, t, state = Net(m), torch.zeros(shape[0]), x.clone()

    def each_call(update: Callable[[Tensor], object]) -> None:
        for _ in range(calls):
            update(net(x, t))

    found: dict[str, Callable[[], object]] = {
        BARE: lambda: each_call(lambda m: None),
        ADD: lambda: each_call(lambda m: state.add_(m)),
        # reads x and two outputs, writes x: the traffic of a second-order data-form row, in one operation of torch
        IDEAL: lambda: each_call(lambda m: state.addcmul_(m, other, value=1e-3)),
    }
    times = sv.logsnr(sv.VP(), calls)
    for name, method in METHODS.items():
        found[name] = partial(sv.run, method(sv.VP(), times), net, x)
    if find_spec("diffusers"):
        found[DIFFUSERS] = _diffusers(net, x, calls)
    return net, found


def _diffusers(net: Net, x: Tensor, calls: int) -> Callable[[], Tensor]:
    with warnings.catch_warnings(action="ignore"):  # set_timesteps falls foul of NumPy 2
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++")
        scheduler.set_timesteps(calls)

    def loop() -> Tensor:
        fresh = copy.copy(
            scheduler
        )  # before its first step: set_timesteps is outside the clock, as plans are
        sample = x
        for t in fresh.timesteps:
            sample = fresh.step(net(sample, t), t, sample, return_dict=False)[0]
        return sample

    return loop


@torch.no_grad()
def measure(shape: tuple[int, ...], calls: int, rounds: int, seed: int) -> list[Step]:
    """All loops in turn, A B C A B C ..., so that they share the machine's moods; the first round only warms up.

    On a busy machine an operation on several threads waits whole scheduler ticks for the last of them: the least over
    rounds is what a quiet machine would show.
    """
    net, found = loops(shape, calls, seed)
    whole: dict[str, list[float]] = {name: [] for name in found}
    between: dict[str, list[float]] = {name: [] for name in found}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds + 1):
            for name, loop in found.items():
                net.asked.clear()
                start = perf_counter()
                loop()
                whole[name].append((perf_counter() - start) / calls)
                between[name].append(median(b - a for a, b in zip(net.asked, net.asked[1:], strict=False)))
    finally:
        gc.enable()
    cost = {name: (median(whole[name][1:]), min(whole[name][1:]), min(between[name][1:])) for name in found}
    bare = cost.pop(BARE)
    return [
        Step(name, list(shape), calls, *(c - b for c, b in zip(cost[name], bare, strict=True)), rounds, seed)
        for name in cost
    ]


def table(records: list[Step]) -> str:
    """Microseconds and ratios for one shape."""
    by_name = {record.method: record for record in records}
    add, ideal = by_name[ADD], by_name[IDEAL]
    lines = [f"{records[0].shape}, {records[0].nfe} calls a run, microseconds per call"]
    lines += [f"{'':28}{'median':>10}{'best':>10}{'between':>10}{'- add':>10}{'/ ideal':>10}"]
    for r in records:
        micro = [1e6 * value for value in (r.seconds, r.best, r.between, r.between - add.between)]
        lines += [
            f"{r.method:28}" + "".join(f"{v:10.1f}" for v in micro) + f"{r.between / ideal.between:10.2f}"
        ]
    return "\n".join(lines)


def _records(cases: dict[tuple[int, ...], tuple[int, int]], seed: int) -> Iterator[Step]:
    for shape, (calls, rounds) in cases.items():
        records = measure(shape, calls, rounds, seed)
        print(table(records) + "\n")
        yield from records


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/step.jsonl"))
    parser.add_argument(
        "--shape", action="append", help="e.g. 1x4x64x64; may be repeated; default: three sizes"
    )
    parser.add_argument("--calls", type=int, help="calls in a run; default: 50, or 20 for the largest")
    parser.add_argument("--rounds", type=int, help="runs of each; default: 100, 40, 12")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    shapes = [tuple(map(int, text.split("x"))) for text in given.shape] if given.shape else list(CASES)
    defaults = {shape: CASES.get(shape, (50, 100)) for shape in shapes}
    cases = {s: (given.calls or calls, given.rounds or rounds) for s, (calls, rounds) in defaults.items()}
    with threads(given.threads):
        write(given.out, _records(cases, given.seed))


if __name__ == "__main__":
    main()

"""What one call costs outside the network: every method, against passes over memory and against peers. Writes records.

python benchmarks/step.py --out results/step.jsonl

The ideal is a second-order row of data form, from a network that predicts noise, in place and in a single pass: it reads x,
the output and the history once and writes x and the new history once, 5 units of traffic. No operation of torch does
that; "torch.addcmul_" reads 3 and writes 1, and "ideal single pass" is 5/4 of its time.

Peers are at an advantage: k-diffusion's samplers are given what they would have to make of a prediction of noise, and none
checks what the network returns.
"""

import argparse
import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from peers import PEERS, Torchdiffeq, found
from records import Step, threads, write
from torch import Tensor

import solvers as sv
from solvers.comparison import within
from solvers.methods import BUILDS, METHODS, SDES

BARE, ADD, ADDCMUL, IDEAL = "bare model", "one torch.add_", "torch.addcmul_", "ideal single pass"
TRAFFIC = 5 / 4  # of the ideal and of addcmul_
EAGER = ", fused=False"
FUSED = {EAGER: False, ", fused=True": True}  # ends of names; else `run` decides by itself
USUAL = "dpm_solver_pp_2m"  # the row that the ideal is of
PEER_NAMES = [name for name, peer in PEERS.items() if not isinstance(peer, Torchdiffeq)]
CHOSEN = (  # at larger sizes
    "ddim", USUAL, "adams_velocity_3_ramp", "adams_noise_4", "unipc_3", "recommended", "heun", "dpm_solver_3", "ddpm",
    "dpm_solver_pp_sde_2m", "sa_solver", USUAL + EAGER, "adams_noise_4" + EAGER, "unipc_3" + EAGER,
    "k-diffusion dpmpp_2m", "k-diffusion dpmpp_2m_sde", "diffusers DPM++ 2",
)  # fmt: skip
ALL = (*BUILDS, *(name for name in CHOSEN if name.endswith(EAGER)), *PEER_NAMES)
# shape: calls, for the set-up of a run to weigh little; rounds, for a quiet moment on a shared machine; and loops
CASES = {
    (1, 4, 64, 64): (50, 60, ALL),
    (16, 4, 64, 64): (50, 30, CHOSEN),
    (64, 3, 256, 256): (10, 6, CHOSEN),
}
SLOW, FEWEST = (
    8,
    4,
)  # a loop of more than SLOW times addcmul_'s takes part in as many fewer rounds, but in FEWEST
# what is to be seen of the records: shape, loop, over which, at most
MOST_MICROSECONDS = 15.0  # a call of USUAL at the first of these shapes, beyond the bare loop
TARGETS = (
    ((1, 4, 64, 64), USUAL, "k-diffusion dpmpp_2m", 1 / 5),
    ((1, 4, 64, 64), USUAL, "diffusers DPM++ 2", 1 / 15),
    ((64, 3, 256, 256), USUAL, IDEAL, 1.3),
)


class Net:
    """A network that costs nothing: the same output every time, and a note of when it was asked, by some clock."""

    def __init__(self, output: Tensor, clock: Callable[[], Any]):
        self.output, self.clock = output, clock
        self.asked: list[Any] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The fixed output."""
        self.asked.append(self.clock())
        return self.output


@dataclass(frozen=True)
class Loop:
    """A run to be timed."""

    run: Callable[[], object]
    calls: int
    per_step: int = 1  # calls that differ, as the stages of a step do


def loops(
    shape: tuple[int, ...],
    calls: int,
    names: Iterable[str],
    seed: int,
    device: torch.device | str = "cpu",
    clock: Callable[[], Any] = perf_counter,
) -> tuple[Net, dict[str, Loop]]:
    """The network, and by name the loops that call it `calls` times, or as near as whole steps come; all on float32 of one shape.

    Of the names those whose library is installed; before them the bare model, add_ and addcmul_.
    """
    names = list(names)
    generator = torch.Generator(device).manual_seed(seed)
    x, m, other = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    net, t, state = Net(m, clock), torch.zeros(shape[0], device=device), x.clone()

    def each_call(update: Callable[[Tensor], object]) -> None:
        for _ in range(calls):
            update(net(x, t))

    passes: dict[str, Callable[[Tensor], object]] = {
        BARE: lambda m: None,
        ADD: state.add_,
        ADDCMUL: lambda m: state.addcmul_(m, other, value=1e-3),
    }
    made = {name: Loop(partial(each_call, update), calls) for name, update in passes.items()}
    peers = found(name for name in names if name in PEERS)
    for name in names:
        if name in peers:
            peer = peers[name]
            per_step = peer.calls_per_step
            grid = peer.grid(calls // per_step, device)
            run = partial(peer.run, net, x, grid, generator if peer.noise else None)
            made[name] = Loop(run, calls // per_step * per_step, per_step)
        elif name not in PEERS:
            made |= _ours(name, net, x, calls, generator)
    return net, made


def _ours(name: str, net: Net, x: Tensor, calls: int, generator: torch.Generator) -> dict[str, Loop]:
    """`sv.run` as it decides by itself, or as the end of the name says."""
    method, end = next(((name.removesuffix(end), end) for end in FUSED if name.endswith(end)), (name, ""))
    plan = within(method, sv.VP(), sv.logsnr, calls)
    if plan is None:  # not one step within the calls
        return {}
    per_step = (METHODS | SDES)[method].calls_per_step if method in METHODS | SDES else 1
    noise = generator if plan.is_stochastic else None
    return {name: Loop(partial(sv.run, plan, net, x, noise, fused=FUSED.get(end)), plan.nfe, per_step)}


@torch.no_grad()
def measure(shape: tuple[int, ...], calls: int, rounds: int, names: Iterable[str], seed: int) -> list[Step]:
    """All loops in turn, A B C A B C ..., so that they share the machine's moods; the first round only warms up.

    On a busy machine an operation on several threads waits whole scheduler ticks for the last of them: the least over
    rounds is what a quiet machine would show.
    """
    net, made = loops(shape, calls, names, seed)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in made}  # (whole, between)
    every: dict[str, int] = {}
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings(action="ignore"):  # of peers: NumPy 2, and trees at their ends
            for turn in range(rounds + 1):
                for name, loop in made.items():
                    if turn % every.get(name, 1) == 0:
                        times[name].append(_time(loop, net))
                if turn == 0:
                    limit = SLOW * times[ADDCMUL][0][0]
                    most = max(rounds // FEWEST, 1)
                    every = {name: min(1 + int(of[0][0] / limit), most) for name, of in times.items()}
    finally:
        gc.enable()
    return records_of(shape, made, {name: of[1:] for name, of in times.items()}, seed)


def records_of(
    shape: tuple[int, ...], made: dict[str, Loop], times: dict[str, list[tuple[float, float]]], seed: int
) -> list[Step]:
    """What the loops took in each round, (whole, between), without what the bare model did; and the ideal of addcmul_'s."""
    cost = {
        name: (median(w for w, _ in of), min(w for w, _ in of), min(b for _, b in of))
        for name, of in times.items()
    }
    bare = cost.pop(BARE)
    outside = {name: [c - b for c, b in zip(found, bare, strict=True)] for name, found in cost.items()}
    outside = {ADD: outside[ADD], IDEAL: [TRAFFIC * v for v in outside[ADDCMUL]]} | outside
    of = {name: ADDCMUL if name == IDEAL else name for name in outside}
    return [
        Step(name, list(shape), made[of[name]].calls, *seconds, len(times[of[name]]), seed)
        for name, seconds in outside.items()
    ]


def _time(loop: Loop, net: Net) -> tuple[float, float]:
    """Seconds per call: of the whole run, and from one call to the next inside it, of several calls a step over whole steps."""
    net.asked.clear()
    start = perf_counter()
    loop.run()
    whole = (perf_counter() - start) / loop.calls
    if len(net.asked) != loop.calls:
        raise RuntimeError(f"{len(net.asked)} calls were made: expected {loop.calls}")
    stride = min(loop.per_step, loop.calls - 1)
    gaps = [(b - a) / stride for a, b in zip(net.asked, net.asked[stride:], strict=False)]
    return whole, median(gaps)


def table(records: Sequence[Step]) -> str:
    """Microseconds and ratios for one shape."""
    by_name = {record.method: record for record in records}
    add, ideal = by_name[ADD], by_name[IDEAL]
    lines = [f"{records[0].shape}, {by_name[ADD].nfe} calls a run, microseconds per call"]
    lines += [f"{'':34}{'median':>10}{'best':>10}{'between':>10}{'- add':>10}{'/ ideal':>10}"]
    for r in records:
        micro = [1e6 * value for value in (r.seconds, r.best, r.between, r.between - add.between)]
        lines += [
            f"{r.method:34}" + "".join(f"{v:10.1f}" for v in micro) + f"{r.between / ideal.between:10.2f}"
        ]
    return "\n".join(lines)


def ratios(records: Iterable[Step]) -> list[dict[str, Any]]:
    """The targets that the records have both loops of: the ratio between calls, and that of whole runs, each the least over rounds."""
    at = {(tuple(r.shape), r.method): r for r in records}
    return [
        {
            "shape": shape,
            "method": method,
            "over": over,
            "between": at[shape, method].between / at[shape, over].between,
            "whole": at[shape, method].best / at[shape, over].best,
            "at most": most,
        }
        for shape, method, over, most in TARGETS
        if {(shape, method), (shape, over)} <= at.keys()
    ]


def _records(cases: dict[tuple[int, ...], tuple[int, int, Sequence[str]]], seed: int) -> Iterator[Step]:
    every: list[Step] = []
    for shape, (calls, rounds, names) in cases.items():
        records = measure(shape, calls, rounds, names, seed)
        print(table(records) + "\n")
        every += records
        yield from records
    for row in ratios(every):
        print(", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


def main(argv: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("results/step.jsonl"))
    parser.add_argument(
        "--shape", action="append", help="e.g. 1x4x64x64; may be repeated; default: three sizes"
    )
    parser.add_argument("--calls", type=int, help="calls in a run; default: 50, or 10 for the largest")
    parser.add_argument("--rounds", type=int, help="runs of each; default: 60, 30, 6")
    parser.add_argument(
        "--loops",
        nargs="+",
        choices=ALL,
        metavar="loop",
        help="default: all at the first size, some at others",
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    shapes = [tuple(map(int, text.split("x"))) for text in given.shape] if given.shape else list(CASES)
    defaults = {shape: CASES.get(shape, (50, 60, ALL)) for shape in shapes}
    cases = {
        shape: (given.calls or calls, given.rounds or rounds, given.loops or names)
        for shape, (calls, rounds, names) in defaults.items()
    }
    with threads(given.threads):
        write(given.out, _records(cases, given.seed))


if __name__ == "__main__":
    main()

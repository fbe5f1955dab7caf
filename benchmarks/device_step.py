"""What one call costs outside the network on a device: the loops of step.py on its tensors and by its clock."""

import gc
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from statistics import median

import torch
from device import between, mark, seconds
from peers import PEERS, found
from records import Step
from step import ADD, ADDCMUL, BARE, IDEAL, TRAFFIC, USUAL, Loop
from torch import Tensor

import solvers as sv
from solvers.comparison import within
from solvers.methods import METHODS, SDES

FUSED = {", fused=False": False, ", fused=True": True}  # ends of names; else `run` decides by itself
CHOSEN = (
    "ddim", USUAL, "adams_noise_4", "unipc_3", "recommended", "heun", "dpm_solver_pp_sde_2m",
    *(name + end for name in (USUAL, "adams_noise_4", "unipc_3") for end in FUSED),
    "k-diffusion dpmpp_2m", "k-diffusion dpmpp_2m_sde", "diffusers DPM++ 2",
)  # fmt: skip
CASES = {
    (1, 4, 64, 64): (50, 30, CHOSEN),
    (16, 4, 64, 64): (50, 30, CHOSEN),
    (64, 3, 256, 256): (12, 20, CHOSEN),
}


class Net:
    """A network that costs nothing: the same output every time, and a mark of when the device came to it."""

    def __init__(self, output: Tensor):
        self.output = output
        self.marks: list = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The fixed output."""
        self.marks.append(mark(self.output.device))
        return self.output


def loops(
    shape: tuple[int, ...], calls: int, names: Iterable[str], seed: int, device: torch.device
) -> tuple[Net, dict[str, Loop]]:
    """As those of step.py, with every tensor on the device; the noise is that of a generator there."""
    generator = torch.Generator(device).manual_seed(seed)
    x, m, other = (torch.randn(shape, generator=generator, device=device) for _ in range(3))
    net, t, state = Net(m), torch.zeros(shape[0], device=device), x.clone()

    def each_call(update: Callable[[Tensor], object]) -> None:
        for _ in range(calls):
            update(net(x, t))

    passes: dict[str, Callable[[Tensor], object]] = {
        BARE: lambda m: None,
        ADD: state.add_,
        ADDCMUL: lambda m: state.addcmul_(m, other, value=1e-3),
    }
    made = {name: Loop(partial(each_call, update), calls) for name, update in passes.items()}
    for name, peer in found(name for name in names if name in PEERS).items():
        steps = calls // peer.calls_per_step
        run = partial(peer.run, net, x, peer.grid(steps, device), generator if peer.noise else None)
        made[name] = Loop(run, steps * peer.calls_per_step, peer.calls_per_step)
    for name in (name for name in names if name not in PEERS):
        method, end = next(((name.removesuffix(end), end) for end in FUSED if name.endswith(end)), (name, ""))
        if plan := within(method, sv.VP(), sv.logsnr, calls):
            per_step = (METHODS | SDES)[method].calls_per_step if method in METHODS | SDES else 1
            noise = generator if plan.is_stochastic else None
            made[name] = Loop(partial(sv.run, plan, net, x, noise, fused=FUSED.get(end)), plan.nfe, per_step)
    return net, made


def timed(loop: Loop, net: Net) -> tuple[float, float]:
    """Seconds per call: of the whole run, and from one call to the next inside it, of several calls a step over whole steps."""
    net.marks.clear()
    whole = seconds(loop.run, net.output.device) / loop.calls
    stride = min(loop.per_step, loop.calls - 1)
    return whole, median(between(a, b) / stride for a, b in zip(net.marks, net.marks[stride:], strict=False))


@torch.no_grad()
def measure(
    shape: tuple[int, ...], calls: int, rounds: int, names: Iterable[str], seed: int, device: torch.device
) -> list[Step]:
    """All loops in turn, A B C A B C ...; the first round only warms up, and a loop that fails in it says so and is left out."""
    net, made = loops(shape, calls, names, seed, device)
    times: dict[str, list[tuple[float, float]]] = {}
    gc.collect()
    with warnings.catch_warnings(action="ignore"):  # of peers
        for name, loop in list(made.items()):
            try:
                timed(loop, net)
            except Exception as error:
                print(f"left out: {name}: {error}")
                del made[name]
        for _ in range(rounds):
            for name, loop in made.items():
                times.setdefault(name, []).append(timed(loop, net))
    cost = {
        name: (median(w for w, _ in of), min(w for w, _ in of), min(b for _, b in of))
        for name, of in times.items()
    }
    bare = cost.pop(BARE)
    outside = {name: [c - b for c, b in zip(found, bare, strict=True)] for name, found in cost.items()}
    outside = {ADD: outside[ADD], IDEAL: [TRAFFIC * v for v in outside[ADDCMUL]]} | outside
    loop_of = made | {IDEAL: made[ADDCMUL]}
    return [
        Step(name, list(shape), loop_of[name].calls, *found, rounds, seed) for name, found in outside.items()
    ]

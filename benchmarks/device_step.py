"""What one call costs outside the network on a device: the loops of step.py on its tensors and by its clock."""

import gc
import warnings
from collections.abc import Iterable
from functools import partial
from statistics import median

import torch
from device import between, mark, seconds
from records import Step
from step import FUSED, USUAL, Loop, Net, loops, records_of

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


def timed(loop: Loop, net: Net) -> tuple[float, float]:
    """Seconds per call: of the whole run, and from one call to the next inside it, of several calls a step over whole steps."""
    net.asked.clear()
    whole = seconds(loop.run, net.output.device) / loop.calls
    stride = min(loop.per_step, loop.calls - 1)
    return whole, median(between(a, b) / stride for a, b in zip(net.asked, net.asked[stride:], strict=False))


@torch.no_grad()
def measure(
    shape: tuple[int, ...], calls: int, rounds: int, names: Iterable[str], seed: int, device: torch.device
) -> list[Step]:
    """All loops in turn, A B C A B C ...; the first round only warms up, and a loop that fails in it says so and is left out."""
    net, made = loops(shape, calls, names, seed, device, partial(mark, device))
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
    return records_of(shape, made, times, seed)

"""Sampling with networks of real size and random weights, against their bare calls: by run, by its kernels, in a CUDA graph."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from statistics import median

import torch
from device import executors, graphed, peak, seconds, waits
from records import EndToEnd
from torch import Tensor, nn

import solvers as sv
from solvers.methods import BUILDS

Net = Callable[[Tensor, Tensor], Tensor]
LEAST_ROUNDS = 5
LEVELS = 1000  # of the time that the networks read
STATE_BYTES = 4  # of an element: the state is float32, whatever the network's dtype


@dataclass(frozen=True)
class Network:
    """What is built: one of diffusers' classes.

    Attributes:
        make: () -> module.
        sample: shape of a sample.
        classes: whether it wants a class label, which is held fixed.
    """

    make: Callable[[], nn.Module]
    sample: tuple[int, ...]
    classes: bool = False


def unet(channels: Sequence[int], layers: int, size: int, head: int = 64) -> Network:
    """ADM's shape: attention on all levels but the first."""

    def make() -> nn.Module:
        from diffusers import UNet2DModel

        deep = len(channels) - 1
        return UNet2DModel(
            sample_size=size,
            in_channels=4,
            out_channels=4,
            block_out_channels=tuple(channels),
            layers_per_block=layers,
            attention_head_dim=head,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * deep),
            up_block_types=(*["AttnUpBlock2D"] * deep, "UpBlock2D"),
        )

    return Network(make, (4, size, size))


def dit(layers: int, heads: int, head: int, size: int) -> Network:
    """DiT's shape, on patches of 2 x 2."""

    def make() -> nn.Module:
        from diffusers import DiTTransformer2DModel

        return DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=size,
            patch_size=2,
        )

    return Network(make, (4, size, size), classes=True)


# by size: those of a GPU, those that a CPU samples from in seconds, and those of a test
NETWORKS: dict[str, dict[str, Network]] = {
    "cuda": {
        "UNet, large": unet((256, 512, 768, 1024), 2, 64),
        "DiT-XL/2": dit(28, 16, 72, 32),
        "UNet, small": unet((64, 128, 192), 2, 32),
    },
    "cpu": {"UNet, small": unet((64, 128, 192), 2, 16), "DiT, small": dit(6, 6, 64, 16)},
    "test": {"UNet, tiny": unet((32, 64), 1, 8, 32), "DiT, tiny": dit(2, 2, 16, 8)},
}
METHODS = ("dpm_solver_pp_2m",)


def built(network: Network, seed: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module with random weights, on the device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with device:
            module = network.make()
    # nn.Module's own: that of diffusers warns of an empty list
    return nn.Module.to(module, device, dtype).eval().requires_grad_(False)


def net_of(module: nn.Module, classes: bool, batch: int, device: torch.device) -> Net:
    """net(x, t), the class label bound."""
    options = {"class_labels": torch.ones(batch, dtype=torch.long, device=device)} if classes else {}
    return lambda x, t: module(x, t, return_dict=False, **options)[0]


def label(t: Tensor) -> Tensor:
    """What the networks read of VP's t."""
    return LEVELS * t


@dataclass(frozen=True)
class Pair:
    """A way to sample, and as many bare calls of the network in the same way; made when it is asked for, as a graph takes a while."""

    run: Callable[[], Callable[[], object]]
    bare: Callable[[], Callable[[], object]]


def pairs(plan: sv.Plan, net: Net, x: Tensor, noise: int | None) -> dict[str, Pair]:
    """By executor. The graph has the loop and the network in it, and so has that of its bare calls."""
    model = sv.Model(net, label=label)
    t = torch.full((len(x),), LEVELS / 2, device=x.device)

    def bare(calls: int = plan.nfe) -> None:
        for _ in range(calls):
            net(x, t)

    def captured() -> Callable[[], object]:
        sampler = sv.compiled_sampler(plan, model, tuple(x.shape), dtype=x.dtype, device=x.device)
        if not sampler.captured:
            raise RuntimeError("the loop is not in a graph, so there is nothing to measure")
        return partial(sampler, x, noise)

    def run(fused: bool) -> Callable[[], object]:
        return partial(sv.run, plan, model, x, noise, fused=fused)

    found = {name: Pair(partial(run, fused), lambda: bare) for name, fused in executors(x.device).items()}
    return found | {"graph": Pair(captured, lambda: graphed(bare, partial(bare, 1), x.device))}


def made(
    make: Callable[[], Callable[[], object]], device: torch.device
) -> tuple[Callable[[], object], int | None]:
    """What is made, called once, and the most memory that took."""
    found: list[Callable[[], object]] = []

    def both() -> None:
        found.append(make())
        found[0]()

    most = peak(both, device)
    return found[0], most


def ratios(
    run: Callable[[], object], bare: Callable[[], object], rounds: int, budget: float, device: torch.device
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of runs, of bare calls, and each run over the mean of the bare calls before and after it; as many as fit into the budget."""
    one = seconds(run, device) + seconds(bare, device)
    before, whole = [seconds(bare, device)], []
    for _ in range(max(LEAST_ROUNDS, min(rounds, int(budget / one)))):
        whole.append(seconds(run, device))
        before.append(seconds(bare, device))
    return whole, before, [2 * r / (a + b) for r, a, b in zip(whole, before, before[1:], strict=False)]


@dataclass(frozen=True)
class Case:
    """One network sampled in one way."""

    name: str
    network: Network
    module: Callable[[], nn.Module]  # built when it is first asked for
    batch: int
    method: str
    executor: str
    steps: int
    dtype: torch.dtype
    device: torch.device

    def __str__(self) -> str:
        return f"{self.name}, batch {self.batch}, {self.method}, {self.executor}"

    @torch.no_grad()
    def measure(self, rounds: int, budget: float, seed: int) -> EndToEnd:
        """Memory first, then time, then how often the host waits."""
        device, module = self.device, self.module()
        net = net_of(module, self.network.classes, self.batch, device)
        plan = BUILDS[self.method](sv.VP(), sv.logsnr(sv.VP(), self.steps))
        x = torch.randn(self.batch, *self.network.sample, generator=torch.Generator().manual_seed(seed))
        x, noise = x.to(device, self.dtype), seed if plan.is_stochastic else None
        pair = pairs(plan, net, x, noise)[self.executor]
        made(pair.bare, device)  # warms up
        bare, own = made(pair.bare, device)
        run, most = made(pair.run, device)
        whole, before, over = ratios(run, bare, rounds, budget, device)
        with waits(device) as seen:
            if self.executor == "graph":
                run()
            else:

                def marked(x: Tensor, t: Tensor) -> Tensor:
                    seen.mark()
                    return net(x, t)

                pairs(plan, marked, x, noise)[self.executor].run()()
        return EndToEnd(
            network=self.name,
            parameters=sum(p.numel() for p in module.parameters()),
            method=self.method,
            executor=self.executor,
            dtype=str(self.dtype).removeprefix("torch."),
            shape=list(x.shape),
            nfe=plan.nfe,
            seconds=median(whole),
            bare=median(before),
            ratio=median(over),
            syncs=seen.total,
            loop_syncs=seen.between,
            extra_states=None if most is None or own is None else (most - own) / (x.numel() * STATE_BYTES),
            rounds=len(whole),
            seed=seed,
        )


def cases(
    size: str, batches: Sequence[int], methods: Sequence[str], steps: int, seed: int, device: torch.device
) -> Iterator[Case]:
    """Every network of a size at every batch size, by every method and executor; bfloat16 on a GPU. A graph needs a GPU."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    ways = [*executors(device), *(["graph"] if device.type == "cuda" else [])]
    for name, network in NETWORKS[size].items():
        module = cache(partial(built, network, seed, device, dtype))
        for batch, method, executor in product(batches, methods, ways):
            yield Case(name, network, module, batch, method, executor, steps, dtype, device)

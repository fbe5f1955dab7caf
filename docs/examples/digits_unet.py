"""A small UNet trained on handwritten digits for likelihood, saved, sampled with several solvers, and its bits per dimension.

    python docs/examples/digits_unet.py train      # minutes on two cores; writes digits_unet.safetensors beside this file
    python docs/examples/digits_unet.py report     # pictures, errors of the solvers and bits per dimension in results/

The data are scikit-learn's 1797 digits of 8 x 8 pixels with 17 values; the last 297 are not trained on.
"""

import argparse
import functools
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

import solvers as sv

WEIGHTS = Path(__file__).with_name("digits_unet.safetensors")
SCHEDULE = sv.VP(stop=1e-4)
VALUES, HELD_OUT = 17, 297  # values of a pixel, images not trained on
WIDTH, EMBEDDED = 24, 32
STEPS, BATCH, RATE, AVERAGED = 4000, 128, 2e-3, 0.998


class Block(nn.Module):
    """Two convolutions with the time added between them, around a skip connection."""

    def __init__(self, before: int, behind: int):
        super().__init__()
        self.first = nn.Sequential(
            nn.GroupNorm(4, before), nn.SiLU(), nn.Conv2d(before, behind, 3, padding=1)
        )
        self.time = nn.Linear(EMBEDDED, behind)
        self.second = nn.Sequential(
            nn.GroupNorm(4, behind), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(behind, behind, 3, padding=1)
        )
        self.skip = nn.Conv2d(before, behind, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """[B, before, h, w] -> [B, behind, h, w]."""
        return self.skip(x) + self.second(self.first(x) + self.time(time)[:, :, None, None])


class UNet(nn.Module):
    """A noise prediction (x [B, 1, 8, 8], half log-SNR [B]) -> [B, 1, 8, 8]; x has the scale of VP."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.2, 4.0, EMBEDDED // 2))
        self.time = nn.Sequential(nn.Linear(EMBEDDED, EMBEDDED), nn.SiLU())
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = Block(width, width)
        self.low = nn.ModuleList([Block(width, 2 * width), Block(2 * width, 2 * width)])
        self.up = Block(3 * width, width)
        self.leave = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, half_logsnr: Tensor) -> Tensor:
        """The noise, [B, 1, 8, 8]."""
        phase = half_logsnr[:, None] * self.frequencies
        time = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        high = self.down(self.enter(x), time)
        low = nn.functional.avg_pool2d(high, 2)
        for block in self.low:
            low = block(low, time)
        wide = nn.functional.interpolate(low, scale_factor=2)
        return self.leave(self.up(torch.cat([high, wide], 1), time))


def images() -> tuple[Tensor, Tensor]:
    """Whole numbers 0 .. 16, [1500, 1, 8, 8] to train on and [297, 1, 8, 8] held out."""
    pixels = torch.from_numpy(load_digits().images)[:, None]
    return pixels[:-HELD_OUT], pixels[-HELD_OUT:]


def load(path: Path = WEIGHTS) -> sv.Model:
    """The trained network as the library takes it."""
    net = UNet()
    load_model(net, path)
    return sv.Model(net.eval().requires_grad_(False), label=SCHEDULE.half_logsnr)


def train(steps: int = STEPS, path: Path = WEIGHTS, seed: int = 0) -> None:
    """Maximum-likelihood training: dequantised pixels, times uniform in log-SNR; the average of the weights is saved."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # a second has nothing to do on images this small
    pixels, net = images()[0], UNet().to(memory_format=torch.channels_last)
    averaged = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(AVERAGED)
    )
    optimiser = torch.optim.Adam(net.parameters(), RATE)
    cooling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model, began = sv.Model(net, label=SCHEDULE.half_logsnr), time.perf_counter()
    for step in range(steps):
        chosen = pixels[torch.randint(len(pixels), (BATCH,))]
        x0 = sv.dequantized(chosen, VALUES, noise=torch.default_generator)
        t, length = sv.importance_times(SCHEDULE, (torch.randperm(BATCH) + torch.rand(1)) / BATCH)
        loss = sv.dsm_loss(model, SCHEDULE, x0, t, torch.randn_like(x0)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        cooling.step()
        averaged.update_parameters(net)
        if step % 500 == 0 or step == steps - 1:
            print(
                f"step {step}: {length * 64 * loss:.1f} nats, {time.perf_counter() - began:.0f} s", flush=True
            )
    save_model(averaged.module, path)


ADAMS = functools.partial(sv.exponential_adams, order=2, predicts="velocity")
SOLVERS: dict[str, Callable[[sv.Model, Tensor], Tensor]] = {
    "DDIM, logsnr, 10": lambda model, x: sv.sample(model, x, SCHEDULE, 10, sv.ddim, sv.logsnr),
    "DPM-Solver++(2M), logsnr, 10": lambda model, x: sv.sample(
        model, x, SCHEDULE, 10, sv.dpm_solver_pp, sv.logsnr
    ),
    "Adams in velocity form, quadratic, 10": lambda model, x: sv.sample(
        model, x, SCHEDULE, 10, ADAMS, sv.quadratic
    ),
    "recommended, angle, 10": lambda model, x: sv.sample(model, x, SCHEDULE, 10, sv.recommended, sv.angle),
    "recommended for noise, 10": lambda model, x: sv.sample(model, x, SCHEDULE, 10),
    "recommended for noise, 20": lambda model, x: sv.sample(model, x, SCHEDULE, 20),
    "adaptive, 1e-2": lambda model, x: sv.adaptive(model, SCHEDULE, x, rtol=1e-2, atol=1e-2).x,
}


def errors(model: sv.Model, x: Tensor) -> dict[str, tuple[float, Tensor]]:
    """Of every solver the root mean square distance from the ODE's exact samples, and its samples."""
    exact = sv.odeint(model, SCHEDULE, x, rtol=1e-5, atol=1e-5, variable="angle").x
    found = {"dopri5, 1e-5": (0.0, exact)}
    for name, solver in SOLVERS.items():
        samples = solver(model, x)
        found[name] = (float((samples - exact).square().mean().sqrt()), samples)
    return found


def data_errors(model: sv.Model, pixels: Tensor) -> dict[int, float]:
    """The root mean square error of the data prediction made of the network's noise, by half log-SNR."""
    x0 = sv.dequantized(pixels, VALUES, noise=0)
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    found = {}
    for half_logsnr in (-5, -4, -3, -2, -1, 0, 1, 2):
        t = SCHEDULE.time(torch.tensor(half_logsnr, dtype=torch.float64))
        alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
        m = model.net(sv.noised(x0, SCHEDULE, t, eps), torch.full((len(x0),), float(half_logsnr)))
        found[half_logsnr] = sigma / alpha * float((m - eps).square().mean().sqrt())
    return found


def bits(model: sv.Model, pixels: Tensor) -> dict[str, tuple[float, float]]:
    """Bits per dimension of images by the ODE, with eight probes, and by bounds of the SDE: mean and standard error over the images."""
    x, shape = sv.dequantized(pixels, VALUES, noise=0), pixels.shape[1:]
    solver = functools.partial(sv.odeint, rtol=1e-4, atol=1e-4, variable="angle")
    of_bins = functools.partial(sv.bits_per_dim, shape=shape, bins=VALUES)
    of_values = functools.partial(sv.bits_per_dim, shape=shape, bins=1, low=0.0, high=1.0)
    middles = (2 * torch.arange(VALUES, dtype=torch.float64) + 1) / VALUES - 1  # of the bins
    half = float(
        SCHEDULE.time(torch.tensor(float(VALUES), dtype=torch.float64).log())
    )  # where the noise fills half a bin
    values = {"decoder": sv.Decoder(levels=middles), "stop": half}
    found = {
        "ODE, dequantised": of_bins(
            sv.log_likelihood(model, SCHEDULE, x, sv.hutchinson(8), solver, noise=0).log_p
        ),
        "SDE, dequantised": of_bins(sv.continuous_elbo(model, SCHEDULE, x, 0, pieces=100).log_p),
        "SDE, values": of_values(
            sv.continuous_elbo(model, SCHEDULE, middles[pixels.long()].float(), 0, pieces=100, **values).log_p
        ),
    }
    return {name: (float(v.mean()), float(v.std() / len(v) ** 0.5)) for name, v in found.items()}


def report(out: Path, path: Path = WEIGHTS, count: int = HELD_OUT) -> str:
    """Draw samples of every solver from the same noise; their errors, the network's and bits per dimension as tables in Markdown."""
    model, pixels = load(path), images()[1][:count]
    out.mkdir(parents=True, exist_ok=True)
    found = errors(model, torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    figure, panels = plt.subplots(len(found), 1, figsize=(8, 1.05 * len(found)))
    for panel, (name, (error, samples)) in zip(panels, found.items(), strict=True):
        panel.imshow(torch.cat([*samples[:, 0]], 1).numpy(), cmap="gray_r", vmin=-1, vmax=1)
        panel.set_title(f"{name}: error {error:.2g}" if error else name, fontsize=8, loc="left", pad=2)
        panel.axis("off")
    figure.tight_layout()
    figure.savefig(out / "digits_unet.png", dpi=120)
    plt.close(figure)
    solvers = {name: f"{error:.3f}" for name, (error, _) in found.items() if error}
    levels = {str(level): f"{error:.2f}" for level, error in data_errors(model, pixels).items()}
    costs = {name: f"{mean:.3f} ± {error:.3f}" for name, (mean, error) in bits(model, pixels).items()}
    tables = {
        ("solver", "error"): solvers,
        ("half log-SNR", "error of the data prediction"): levels,
        ("bits per dimension by", f"{len(pixels)} images held out"): costs,
    }
    return "\n\n".join(
        "\n".join(f"| {a} | {b} |" for a, b in [heads, ("---", "---"), *rows.items()])
        for heads, rows in tables.items()
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument(
        "--into", type=Path, help="a page whose tables between 'begin digits' and 'end digits' are replaced"
    )
    given = parser.parse_args(argv)
    if given.what == "train":
        train(given.steps, given.weights)
        return
    text = report(given.out, given.weights)
    print(text)
    if given.into:
        page = given.into.read_text(encoding="utf-8")
        marked = r"(?s)(<!-- begin digits -->\n).*?(<!-- end digits -->)"
        given.into.write_text(re.sub(marked, lambda m: m[1] + text + "\n" + m[2], page), encoding="utf-8")


if __name__ == "__main__":
    main()

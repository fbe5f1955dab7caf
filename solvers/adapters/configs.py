"""diffusers' networks as (model, schedule): what the config of a scheduler says of the network it was trained with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from solvers.arguments import choice, number, numbers, positive, whole
from solvers.discrete import Discrete
from solvers.guidance import clipped, thresholded
from solvers.predictions import Model
from solvers.schedules import Flow

PREDICTS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "data", "flow_prediction": "flow"}
READS_SIGMA = (  # transformers that are told the scheduler's timesteps over 1000
    "AuraFlow", "BriaFibo2", "Chroma", "Flux", "Krea2", "LongCatAudio", "LongCatImage", "OvisImage", "PRX", "QwenImage",
)  # fmt: skip
READS_ALPHA = ("Lumina", "NucleusMoE", "ZImage")  # told 1 - sigma, or negated: noise is at 0
LATENT_CHANNELS = (4, 8, 16, 32, 64, 128)


def from_diffusers(
    network: Callable[..., Any],
    scheduler_config: Mapping[str, Any],
    inputs: Mapping[str, Any] | None = None,
    guide: Callable[[Model], Model] | None = None,
    mu: float | None = None,
) -> tuple[Model, Discrete | Flow]:
    """A UNet or transformer of diffusers, with the config of the scheduler it was trained for.

    The schedule is that of the config's betas, zero terminal SNR or flow shift, in float64; how its scheduler samples (spacing, order, ...) is
    left to you. The network is called in its own dtype, so x may be float32 whatever that is. A config with clip_sample or
    thresholding bounds the data prediction as it says.

    Args:
        network: called as network(x, timestep=..., return_dict=False, **inputs). One that reads more channels than x has, as for inpainting, wants a function
            around it that puts them there.
        scheduler_config: e.g. pipe.scheduler.config, or the dict of a scheduler_config.json.
        inputs: what the network reads besides, e.g. {"encoder_hidden_states": prompts, "added_cond_kwargs": ...}, each of the batch's size.
        guide: model -> model, done before the data prediction is bounded. The net also reads a mapping of further inputs, as conditions of
            `guidance.classifier_free`: guide=lambda m: sv.guidance.classifier_free(m, {"encoder_hidden_states": c}, {"encoder_hidden_states": n}, 7.5).
        mu: for use_dynamic_shifting: what the pipeline's calculate_shift gives.

    Returns:
        (model, schedule); x at the start is standard normals. A network of twice as many channels out as in has a learned variance as its
        second output.

    Raises:
        ValueError: the config is of a scheduler that this library has no schedule for, or contradicts itself.
    """
    if not callable(network) or hasattr(network, "components"):  # as a pipeline has
        raise TypeError(
            f"network is {type(network).__name__}: expected a UNet or transformer of diffusers, e.g. pipe.unet or pipe.transformer, and then the config"
        )
    if not isinstance(scheduler_config, Mapping):
        raise TypeError(
            f"scheduler_config is {type(scheduler_config).__name__}: expected the config of a scheduler, e.g. pipe.scheduler.config"
        )
    for name, value in (("inputs", inputs), ("guide", guide)):
        if value is not None and not (isinstance(value, Mapping) if name == "inputs" else callable(value)):
            expected = (
                "a mapping of the network's keywords, e.g. {'class_labels': labels}"
                if name == "inputs"
                else "a function from model to model"
            )
            raise TypeError(f"{name} is {type(value).__name__}: expected {expected}")
    schedule = schedule_of(scheduler_config, mu)
    config, given = getattr(network, "config", {}), dict(inputs or {})
    dtype = _dtype_of(network)

    def net(x: Tensor, label: Tensor, condition: Mapping[str, Any] | None = None) -> Any:
        x = x if dtype is None else x.to(dtype)
        return network(x, timestep=label, return_dict=False, **given, **(condition or {}))[0]

    channels = entry(config, "in_channels", None)
    doubled = channels is not None and entry(config, "out_channels", None) == 2 * channels
    model = Model(
        net,
        predicts=predicts_of(scheduler_config),
        label=label_of(schedule, network, entry(scheduler_config, "num_train_timesteps", 1000)),
        variance="range" if doubled else None,
    )
    return bounded(guide(model) if guide else model, scheduler_config, channels), schedule


def schedule_of(config: Mapping[str, Any], mu: float | None = None) -> Discrete | Flow:
    """The noise schedule of a scheduler's config; `mu` is that of dynamic shifting.

    Raises:
        ValueError: no schedule of this library is its.
    """
    name = str(entry(config, "_class_name", "the config"))
    continuous = entry(config, "timestep_type", "") == "continuous"
    if "EDM" in name or continuous or entry(config, "sigma_data", None) is not None:
        raise ValueError(
            f"{name} reads log(sigma) / 4, as EDM's networks do: take sv.Model(net, predicts='edm', label=lambda t: s.sigma(t).log() / 4), or 'velocity' with "
            "x / sqrt(1 + sigma^2), on s = sv.EDM(sigma_min, sigma_max)"
        )
    if entry(config, "invert_sigmas", False):
        raise ValueError(
            "invert_sigmas = True: such a network runs from 0 at noise to 1; take sv.adapters.from_flow(net, noise_at=0)"
        )
    if is_flow(config):
        return Flow(_shift(config, mu))
    if mu is not None:
        raise ValueError(f"mu = {mu}: only a flow with use_dynamic_shifting has a use for it")
    schedule = _discrete(config)
    scale = entry(config, "snr_shift_scale", 1.0)
    if scale != 1:  # CogVideoX: the SNR divided by it
        positive(snr_shift_scale=scale)
        squares = schedule.alphas_cumprod
        schedule = Discrete.from_alphas_cumprod(squares / (scale + (1 - scale) * squares))
    return schedule.zero_terminal_snr() if entry(config, "rescale_betas_zero_snr", False) else schedule


def entry(config: Any, name: str, default: Any) -> Any:
    """An entry of a config, or its default where it is not there or None."""
    value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if value is None else value


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether the path is alpha = 1 - sigma."""
    return (
        _is_flow_matching(config)
        or bool(entry(config, "use_flow_sigmas", False))
        or entry(config, "prediction_type", "") == "flow_prediction"
    )


def predicts_of(config: Mapping[str, Any]) -> str:
    """Our word for the config's prediction_type."""
    usual = "flow_prediction" if _is_flow_matching(config) else "epsilon"
    return PREDICTS[choice("prediction_type", entry(config, "prediction_type", usual), tuple(PREDICTS))]


def _is_flow_matching(config: Mapping[str, Any]) -> bool:
    """Whether it is of a FlowMatch...Scheduler, whose config made in code does not say so: it has a shift and no betas."""
    has_betas = (
        entry(config, "beta_schedule", None) is not None or entry(config, "trained_betas", None) is not None
    )
    return "FlowMatch" in str(entry(config, "_class_name", "")) or ("shift" in config and not has_betas)


def _shift(config: Mapping[str, Any], mu: float | None) -> float:
    """shift t / (1 + (shift - 1) t) is all of diffusers' shifts: fixed under either name, or by mu."""
    if entry(config, "use_dynamic_shifting", False):
        if mu is None:
            raise ValueError(
                "use_dynamic_shifting = True: give mu, which depends on the image's size, e.g. mu=1.15"
            )
        kind = choice(
            "time_shift_type",
            entry(config, "time_shift_type", "exponential"),
            ("exponential", "linear"),
        )
        mu = number("mu", mu)
        return float(torch.tensor(mu, dtype=torch.float64).exp()) if kind == "exponential" else mu
    if mu is not None:
        raise ValueError(f"mu = {mu}: the config has use_dynamic_shifting = False, and a shift of its own")
    # a config keeps entries of the schedulers it has been through: the one that its own class reads counts
    shift, flow_shift = entry(config, "shift", 1.0), entry(config, "flow_shift", None)
    return float(shift if _is_flow_matching(config) or flow_shift is None else flow_shift)


def _discrete(config: Mapping[str, Any]) -> Discrete:
    """The levels of diffusers' betas, in float64."""
    trained = entry(config, "trained_betas", None)
    if trained is not None:
        return Discrete(numbers("trained_betas", trained))
    if entry(config, "beta_schedule", None) is None:
        name = entry(config, "_class_name", "the config")
        raise ValueError(
            f"{name} names no betas, and is not of a flow: expected beta_schedule or trained_betas, prediction_type='flow_prediction', or the config of a "
            "FlowMatch scheduler"
        )
    levels = whole("num_train_timesteps", entry(config, "num_train_timesteps", 1000), 2, 10**6)
    first, last = (
        float(entry(config, name, value)) for name, value in (("beta_start", 1e-4), ("beta_end", 0.02))
    )
    line = torch.linspace(-6, 6, levels, dtype=torch.float64, device="cpu")
    kinds: dict[str, Callable[[], Discrete]] = {
        "linear": lambda: Discrete.linear(levels, first, last),
        "scaled_linear": lambda: Discrete.scaled_linear(levels, first, last),
        "squaredcos_cap_v2": lambda: Discrete.cosine(levels),
        "sigmoid": lambda: Discrete(torch.sigmoid(line) * (last - first) + first),
        "laplace": lambda: _of_alpha_bar(_laplace, levels),
        "exp": lambda: _of_alpha_bar(lambda t: torch.exp(-12.0 * t), levels),
    }
    return kinds[choice("beta_schedule", config["beta_schedule"], tuple(kinds))]()


def _of_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], levels: int) -> Discrete:
    """Betas of a function alpha^2 of time, none above .999."""
    values = alpha_bar(torch.arange(levels + 1, dtype=torch.float64, device="cpu") / levels)
    return Discrete((1 - values[1:] / values[:-1]).clamp(max=0.999))


def _laplace(t: Tensor) -> Tensor:
    """What diffusers takes for alpha^2 of the Laplace schedule: the root of SNR / (1 + SNR), log SNR = -sign(1/2 - t) log(1 - 2 |1/2 - t| + 1e-6) / 2."""
    return torch.sigmoid(-0.5 * torch.sign(0.5 - t) * torch.log(1 - 2 * (0.5 - t).abs() + 1e-6)).sqrt()


def label_of(schedule: Discrete | Flow, network: Any, levels: int) -> Callable[[Tensor], Tensor]:
    """What the network reads at t: step numbers, fractional between levels, or sigma times their number."""
    if isinstance(schedule, Discrete):
        return schedule.label
    name = type(getattr(network, "_orig_mod", network)).__name__  # compiled or not
    if name.startswith(READS_ALPHA):
        raise ValueError(
            f"{name} runs from 0 at noise to 1 at data, or says so of its output: bind it as it is called in its pipeline, and take sv.adapters.from_flow(velocity, "
            "noise_at=0)"
        )
    if name.startswith(READS_SIGMA):
        return schedule.sigma
    return lambda t: levels * schedule.sigma(t)


def bounded(model: Model, config: Mapping[str, Any], channels: int | None = None) -> Model:
    """The data prediction bounded as diffusers' config says, where thresholding goes before clip_sample."""
    clips, thresholds = bool(entry(config, "clip_sample", False)), bool(entry(config, "thresholding", False))
    if thresholds and channels in LATENT_CHANNELS:
        raise ValueError(
            f"thresholding is for pixels, and a network of {channels} channels is of latents, which have no such bounds: dict(config, thresholding=False)"
        )
    if thresholds:
        quantile = entry(config, "dynamic_thresholding_ratio", 0.995)
        return thresholded(model, quantile, most=entry(config, "sample_max_value", 1.0))
    if clips:
        most = float(entry(config, "clip_sample_range", 1.0))
        return clipped(model, -most, most)
    return model


def _dtype_of(network: Any) -> torch.dtype | None:
    """In which a network is to be called: what it says, else its first weight's."""
    told = getattr(network, "dtype", None)
    if isinstance(told, torch.dtype):
        return told
    weights = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((weight.dtype for weight in weights if weight.is_floating_point()), None)

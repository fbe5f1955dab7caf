"""Our methods as a scheduler of diffusers."""

import difflib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from solvers import grids
from solvers.adapters.configs import (
    PREDICTS,
    bounded,
    from_diffusers,
    is_flow,
    label_of,
    predicts_of,
    schedule_of,
)
from solvers.adapters.steps import Run
from solvers.arguments import choice, number, numbers, whole
from solvers.discrete import Discrete
from solvers.loop import State, execute
from solvers.methods import BUILDS
from solvers.methods.unipc import first_calls, recommended_for
from solvers.noise import Source, noised, per_sample
from solvers.plan import Plan
from solvers.predictions import Model
from solvers.rows import rows_of
from solvers.schedules import Flow, Schedule

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError("this adapter needs diffusers: pip install 'diffusion-solvers[diffusers]'") from error

GRIDS = (
    "angle",
    "angle_levels",
    "logalpha",
    "logalpha_levels",
    "uniform",
    "quadratic",
    "power",
    "logsnr",
    "karras",
    "linspace",
    "leading",
    "trailing",
)
ON_LEVELS = ("angle_levels", "logalpha_levels", "linspace", "leading", "trailing")  # which end at clean data
ON_FLOWS = ("angle", "uniform", "quadratic", "power")  # for which alpha = 0 is a time like others
NAMES = {ours: theirs for theirs, ours in PREDICTS.items()}
ROUNDED = 1e-3  # by how much published sigmas may leave the network's levels

__all__ = ["SolversScheduler", "from_diffusers"]


class SolversScheduler(SchedulerMixin, ConfigMixin):
    """A method of this library as a scheduler of diffusers: pipe.scheduler = SolversScheduler.from_config(pipe.scheduler.config, method="dpm_solver_pp_2m").

    The table is built in set_timesteps, in float64; `step` is one row of it: it decides, looks up and reads back nothing. Between steps it
    keeps the state in float32 where the pipeline holds it in half precision. Each thread has a run of its own, so threads can share the object. Methods of several
    calls per step have as many timesteps, each at its own level. A stochastic method draws from the generator that the pipeline passes on,
    or from `seed`, one stream a sample.

    Args:
        num_train_timesteps: levels of the network.
        beta_start: of the betas, as diffusers has them.
        beta_end: of the betas.
        beta_schedule: "linear" | "scaled_linear" | "squaredcos_cap_v2" | "sigmoid" | "laplace" | "exp".
        trained_betas: the betas themselves, in place of those.
        prediction_type: "epsilon" | "v_prediction" | "sample" | "flow_prediction".
        rescale_betas_zero_snr: whether the last level has alpha = 0, here exactly.
        snr_shift_scale: what the SNR of the betas is divided by, as CogVideoX has it.
        use_flow_sigmas: whether the path is alpha = 1 - sigma, also for another prediction than the flow.
        shift: of that path, called flow_shift by some; from_config reads both.
        use_dynamic_shifting: whether set_timesteps is given mu.
        time_shift_type: "exponential", a shift e^mu, or "linear", a shift mu.
        shift_terminal: the least sigma, to which a pipeline's own sigmas of a flow are stretched; None to leave them.
        clip_sample: whether the data prediction is cut to clip_sample_range.
        clip_sample_range: half the width of that.
        thresholding: whether it is cut by `guidance.thresholded`.
        dynamic_thresholding_ratio: the quantile.
        sample_max_value: the greatest threshold.
        variance_type: "learned_range" if the network's second output is a variance between the least and the most.
        method: a name of docs/methods.md, of a method that has a table before the first call.
        options: of the method, e.g. {"eta": 0.5}; names as in its function.
        grid: "angle" | "angle_levels" | "logalpha" | "logalpha_levels" | "uniform" | "quadratic" | "power" | "logsnr" | "karras" | "linspace" | "leading" | "trailing"; None: the method's own, as `sample`.
        seed: of the noise, where the pipeline passes no generator on.

    Raises:
        ValueError: an unknown name, or settings that contradict each other.
    """

    _compatibles = [  # noqa: RUF012
        scheduler.name for scheduler in KarrasDiffusionSchedulers if "EDM" not in scheduler.name
    ]
    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        snr_shift_scale: float = 1.0,
        use_flow_sigmas: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        variance_type: str | None = None,
        method: str = "recommended",
        options: Mapping[str, Any] | None = None,
        grid: str | None = None,
        seed: int | None = None,
    ):
        # what is a default here is not one elsewhere, and must not get lost on the way through other schedulers
        if "_use_default_values" in self.config:
            self.register_to_config(_use_default_values=[])
        self._threads = threading.local()
        self._build = _method(method, options, predicts_of(self.config))
        flow = is_flow(self.config)
        if grid is not None:
            choice("grid", grid, ON_FLOWS if flow else GRIDS)
        if seed is not None:
            whole("seed", seed, 0, 2**63 - 1)
        if not flow and (shift != 1 or use_dynamic_shifting or shift_terminal is not None):
            raise ValueError(
                f"shift = {shift}, use_dynamic_shifting = {use_dynamic_shifting}, shift_terminal = {shift_terminal}: only a flow is shifted, expected "
                "prediction_type='flow_prediction' or use_flow_sigmas=True with them"
            )
        if not use_dynamic_shifting:
            self._schedule()
        bounded(Model(_no_network, predicts=predicts_of(self.config)), self.config)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """As of every scheduler; the config of a flow-matching scheduler, which does not name its prediction, is read as one.

        Raises:
            ValueError: the config is of a scheduler that this library has no schedule for.
        """
        config = {} if config is None else config
        if isinstance(config, SchedulerMixin):
            raise TypeError(f"config is a {type(config).__name__}: pass its config, scheduler.config")
        known = inspect.signature(cls.__init__).parameters
        unknown = [name for name in kwargs if name not in known and name != "flow_shift"]
        if unknown and not return_unused_kwargs:
            close = difflib.get_close_matches(unknown[0], known, 1)
            raise TypeError(
                f"{unknown[0]} = {kwargs[unknown[0]]!r:.100} is no argument of SolversScheduler"
                + (f"; did you mean {close[0]}?" if close else "")
                + "; options of the method go into options={...}, the spacing of the steps is grid=..."
            )
        if isinstance(config, Mapping) and config:
            # what a scheduler has by default it would not pass on, although the network was trained with it
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
            whole_config = {**config, **kwargs}
            schedule = schedule_of({**whole_config, "use_dynamic_shifting": False})
            # by the entries that the config's own class reads; it may hold others, of classes it has been through
            if isinstance(schedule, Flow):
                kwargs.setdefault("shift", kwargs.pop("flow_shift", schedule.shift))
                kwargs.setdefault("prediction_type", NAMES[predicts_of(whole_config)])
            else:
                kwargs |= {"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None}
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
    ) -> None:
        """Build this thread's plan.

        Args:
            num_inference_steps: steps of the config's grid.
            device: of the timesteps.
            timesteps: in place of it: the steps the network reads at each call of a one-call method, decreasing; clean data follow. Of a flow they
                are left aside, and sigmas count.
            sigmas: in place of it: for a flow the sigmas before the shift, from 1; else sigma / alpha; 0 follows.
            mu: of dynamic shifting.

        Raises:
            ValueError: not exactly one of the three; a time is not on the schedule; a plan whose first row adds noise.
        """
        # pipelines compute mu whether the config has a use for it or not
        schedule = self._schedule(mu if self.config["use_dynamic_shifting"] else None)
        if isinstance(schedule, Flow) and timesteps is not None:
            if sigmas is None:
                raise ValueError(
                    "timesteps of a flow would be shifted or not, as one understands them: give sigmas, before the shift"
                )
            timesteps = None
        asked = [v for v in (timesteps, sigmas) if v is not None]
        if len(asked) > 1 or (num_inference_steps is None and not asked):
            raise ValueError(
                "set_timesteps takes num_inference_steps, timesteps or sigmas, and one of the last two at most"
            )
        if asked and num_inference_steps not in (None, len(asked[0])):
            raise ValueError(
                f"num_inference_steps = {num_inference_steps}, but {len(asked[0])} times are given: leave it out"
            )
        if timesteps is not None:
            times = _behind((numbers("timesteps", timesteps) + 1) / len(self), schedule)
        elif sigmas is not None:
            times = self._times_of_sigmas(schedule, numbers("sigmas", sigmas))
        else:
            whole("num_inference_steps", num_inference_steps, 1, grids.MAX_STEPS, example=20)  # type: ignore[arg-type]
            times = self._grid(schedule, num_inference_steps)  # type: ignore[arg-type]
        plan = self._build(schedule, times)
        if not plan.is_called[0]:
            raise ValueError(
                f"method = {self.config['method']!r} adds noise before its first call, which a pipeline has no place for: use sv.run"
            )
        labels = self._labels(schedule, plan)
        stands = torch.cat([plan.is_called, torch.ones(1, dtype=torch.bool, device="cpu")])
        sigma, alpha = plan.sigma[stands], plan.alpha[stands]
        self._threads.run = Run(
            schedule,
            times,
            plan,
            labels,
            on_device=labels if device is None else labels.to(device),
            sigmas=(sigma if isinstance(schedule, Flow) else sigma / alpha).float(),
            firsts=first_calls(plan, times).tolist(),
        )

    @property
    def timesteps(self) -> Tensor:
        """What the network reads at each call, [nfe]: int64 where all are whole, else float32."""
        run = self._of_thread()
        return torch.arange(len(self) - 1, -1, -1) if run is None else run.on_device

    @property
    def sigmas(self) -> Tensor:
        """At each call and at the end, [nfe + 1], float32 on the host: of a flow sigma, else sigma / alpha."""
        return self._running().sigmas

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at every level of the network, [N], float32.

        Raises:
            ValueError: a flow has no levels.
        """
        schedule = self._schedule()
        if not isinstance(schedule, Discrete):
            raise ValueError("a flow has no levels, and so no alphas_cumprod")
        return schedule.alphas_cumprod.float()

    @property
    def num_inference_steps(self) -> int | None:
        """The number of steps, each of one call or more."""
        run = self._of_thread()
        return None if run is None else len(run.times) - 1

    @property
    def order(self) -> int:
        """Calls per step, as diffusers understands the word."""
        run = self._of_thread()
        return 1 if run is None else run.order()

    @property
    def plan(self) -> Plan:
        """This thread's table."""
        return self._running().plan

    @property
    def begin_index(self) -> int | None:
        """The call to start at, if it was set."""
        run = self._of_thread()
        return None if run is None else run.begin

    @property
    def step_index(self) -> int | None:
        """The number of the next call; None before the first."""
        run = self._of_thread()
        return None if run is None else run.index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start at a later call, as image-to-image does: the method is built anew on the grid from there."""
        run = self._running()
        if begin_index and run.order() == 1 and len(run.firsts) < len(run.timesteps):
            raise ValueError(
                f"method = {self.config['method']!r} makes more calls in some steps than in others, so that a pipeline cannot know where they begin: take one "
                "of as many in each, e.g. method='recommended'"
            )
        calls = len(run.timesteps)
        if begin_index == calls:
            raise ValueError(
                f"begin_index = {begin_index}: nothing is left of {calls} calls; in image-to-image raise strength or num_inference_steps"
            )
        run.begin = whole("begin_index", begin_index, 0, calls - 1)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is: what the network reads is x = alpha x_0 + sigma eps."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One row: from the state at a call to the next.

        Args:
            model_output: the network's output at sample, [B, ...]; of twice the channels with a variance_type.
            timestep: the one of `timesteps` whose turn it is. An element of that tensor, or one on the host, is checked to be it.
            sample: the state, [B, ...]; left as it is.
            eta: 0; the noise belongs to the method, options={"eta": ...}.
            use_clipped_model_output: without effect, as a clipped data prediction is always used throughout.
            generator: of the noise of a stochastic method.
            return_dict: whether to return SchedulerOutput(prev_sample=...) or (prev_sample,).

        Raises:
            ValueError: set_timesteps was not called in this thread, or the run is over; timestep is another's; no noise; a wrong shape.
            NonFiniteError: the output is not finite, on a CPU.
        """
        if number("eta", eta):
            raise ValueError(
                f"eta = {eta}: the noise belongs to the method, e.g. SolversScheduler(method='ddim', options={{'eta': {eta}}})"
            )
        for name, value in (("model_output", model_output), ("sample", sample)):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                came = f"of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(
                    f"{name} is {came}: expected a floating-point tensor [B, ...], e.g. unet(x, t).sample"
                )
        run = self._running()
        if run.index is None:
            self._start(run, timestep)
        run.check_turn(timestep)
        grad = torch.is_grad_enabled() and (model_output.requires_grad or sample.requires_grad)
        state = run.before(sample)
        model = self._model(lambda x, label: model_output, model_output.shape, sample.shape)
        run.rows = rows_of(run.plan, model, state.x) if run.rows is None else run.rows
        source = self._source(run.plan, generator, len(sample))
        stop = state.call + 1
        while stop < run.plan.rows and not run.rows[stop].is_called:
            stop += 1  # rows that only add noise
        reached: list[State] = []
        # what is kept from step to step is no inference tensor, which knows no version
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            execute(
                run.plan, model, state, source, run.rows, stop, reached.append, grad=grad,
                check=state.x.device.type == "cpu",
            )  # fmt: skip
            following = run.after(reached[-1], sample.dtype)
        return SchedulerOutput(prev_sample=following) if return_dict else (following,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at the levels that the network calls `timesteps`, [B] or [1], in the dtype of x_0."""
        run = self._of_thread()
        schedule = self._schedule() if run is None else run.schedule
        labels = torch.as_tensor(timesteps).reshape(-1).double().cpu()
        if isinstance(schedule, Discrete):
            t = (labels + 1) / schedule.levels
        else:
            t = _times_at(schedule, labels / self.config["num_train_timesteps"])
        wide = torch.promote_types(original_samples.dtype, torch.float32)
        t = t.expand(len(original_samples)) if len(t) == 1 else t
        return noised(original_samples.to(wide), schedule, t, noise.to(wide)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """`add_noise`, as pipelines of flow matching call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config["num_train_timesteps"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_threads", "_build")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._threads = threading.local()
        self._build = _method(self.config["method"], self.config["options"], predicts_of(self.config))

    def _of_thread(self) -> Run | None:
        return getattr(self._threads, "run", None)

    def _running(self) -> Run:
        run = self._of_thread()
        if run is None:
            raise ValueError(
                "no run in this thread yet: call scheduler.set_timesteps(num_inference_steps) first"
            )
        return run

    def _model(self, net: Callable[..., Any], of: Sequence[int] = (), x: Sequence[int] = ()) -> Model:
        """What the step is told is the model, its data prediction bounded as the config says."""
        doubled = len(of) == len(x) > 1 and of[1] == 2 * x[1]
        variance = "range" if doubled and self.config["variance_type"] == "learned_range" else None
        return bounded(Model(net, predicts=predicts_of(self.config), variance=variance), self.config)

    def _schedule(self, mu: float | None = None) -> Discrete | Flow:
        return schedule_of(
            {**self.config, "flow_shift": None}, mu
        )  # whatever it is called elsewhere, here it is shift

    def _times_of_sigmas(self, schedule: Discrete | Flow, sigmas: Tensor) -> Tensor:
        if isinstance(schedule, Flow):
            least = self.config["shift_terminal"]
            if least is None:
                return _behind(sigmas, schedule)
            away = schedule.alpha(sigmas)
            return _behind(_times_at(schedule, 1 - away * (1 - least) / away[-1]), schedule)
        levels = torch.tensor([1.0, schedule.stop], dtype=torch.float64, device="cpu")
        most, least = torch.exp(-schedule.half_logsnr(levels)).tolist()
        inner = sigmas[:-1] if len(sigmas) and sigmas[-1] == 0 else sigmas
        # published ones are rounded, or of betas in float32
        inner = torch.where((inner > most) & (inner < most * (1 + ROUNDED)), most, inner)
        inner = torch.where((inner < least) & (inner > least * (1 - ROUNDED)), least, inner)
        if not ((inner >= least) & (inner <= most)).all():
            raise ValueError(
                f"sigmas from {inner.max():g} to {inner.min():g}: expected sigma / alpha within the network's levels, {most:g} to {least:g}"
            )
        return _behind(schedule.time(-torch.log(inner)).clamp(schedule.stop, 1.0), schedule)

    def _grid(self, schedule: Discrete | Flow, steps: int) -> Tensor:
        """The config's grid. One that knows nothing of levels ends at the lowest of them, and then at clean data."""
        name = self.config["grid"]
        if name is None:
            predicts = predicts_of(self.config) if self.config["method"] == "recommended" else None
            return grids.usual(schedule, predicts)(schedule, steps)
        grid = getattr(grids, name)
        if not isinstance(schedule, Discrete) or name in ON_LEVELS:
            return grid(schedule, steps)
        start = torch.tensor([schedule.start], dtype=torch.float64, device="cpu")
        return _behind(grid(schedule, steps - 1) if steps > 1 else start, schedule)

    def _labels(self, schedule: Discrete | Flow, plan: Plan) -> Tensor:
        label = label_of(schedule, None, self.config["num_train_timesteps"])
        labels = label(plan.times[:-1][plan.is_called])
        return (
            labels.long()
            if isinstance(schedule, Discrete) and (labels == labels.round()).all()
            else labels.float()
        )

    def _start(self, run: Run, timestep: float | Tensor) -> None:
        """Before the first step: where it is, and from a later one the method anew on what is left of the grid."""
        first = run.place(timestep) if run.begin is None else run.begin
        first = run.found(timestep) if first is None else first
        if first:
            later = None
            if first in run.firsts:
                later = self._build(run.schedule, run.times[run.firsts.index(first) :])
            if later is None or not torch.equal(self._labels(run.schedule, later), run.timesteps[first:]):
                why = (
                    "it is in the middle of a step"
                    if later is None
                    else "begun there, it has other calls than it would have had there"
                )
                raise ValueError(
                    f"method = {self.config['method']!r} cannot start at call {first}: {why}; start at a step, by a method of as many calls in each"
                )
            run.plan = later
        run.index = first

    def _source(self, plan: Plan, generator: Any, batch: int) -> Source | None:
        if not plan.is_stochastic:
            return None
        if generator is not None:
            return lambda draw, like: randn_tensor(
                like.shape, generator=generator, device=like.device, dtype=like.dtype
            )
        if self.config["seed"] is None:
            raise ValueError(
                f"method = {self.config['method']!r} is stochastic and needs noise: pass the pipeline a generator, or, if it does not pass it on, make the "
                "scheduler with seed=0"
            )
        return per_sample(self.config["seed"], range(batch))


def _no_network(x: Tensor, label: Tensor) -> Tensor:
    raise NotImplementedError  # a scheduler's steps bring their outputs with them


def _method(name: str, options: Mapping[str, Any] | None, predicts: str) -> Callable[..., Plan]:
    """A method of the table by name, with options bound."""
    choice("method", name, tuple(BUILDS))
    build = partial(recommended_for(predicts), start="ramp") if name == "recommended" else BUILDS[name]
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(
            f"options = {options!r:.200} of method = {name!r}: expected a dict, e.g. {{'order': 2}}"
        )
    function = build
    while isinstance(function, partial):
        function = function.func
    takes = [name for name in inspect.signature(function).parameters if name not in ("schedule", "times")]
    for option in options or {}:
        if option not in takes:
            raise TypeError(
                f"options = {options!r:.200} of method = {name!r}: {option!r} is none of its options {', '.join(takes)}"
            )
    return partial(build, **(options or {}))


def _behind(times: Tensor, schedule: Schedule) -> Tensor:
    """The times of calls, with clean data behind them."""
    ended = len(times) > 0 and times[-1] == 0
    return grids.given(schedule, times if ended else torch.cat([times, torch.zeros_like(times[:1])]))


def _times_at(schedule: Flow, sigma: Tensor) -> Tensor:
    """The time at which a flow has some sigma."""
    return sigma / (schedule.shift + (1 - schedule.shift) * sigma)

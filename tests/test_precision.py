"""What surrounds a network: autocast, half precision, memory layout, torch.compile, gradients, threads, misbehaviour."""

import importlib
import json
import math
import random
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.exc import RecompileError
from torch._dynamo.testing import CompileCounter

import solvers as sv
from problems import PROBLEMS, VP, generator
from tests.methods import METHODS

G = sv.guidance
DDPM = sv.Discrete.linear(1000)
TIMES = sv.logsnr(VP, 4)
PLAN = sv.dpm_solver_pp(VP, TIMES)
DATA = Path(__file__).parents[2] / "shared" / "data"
SHAPE = (3, 4, 5)

CENTRE = torch.linspace(-0.2, 0.2, 60).reshape(SHAPE)
PER_ELEMENT = partial(
    sv.dpm_solver_v3, statistics=sv.gaussian_statistics(CENTRE, 0.5 + CENTRE), order=2, corrector=True
)
CLASSES = torch.ones(1, 1), torch.zeros(1, 1)


def randn(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


def apart(a, b):
    """The largest difference over the largest value."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def seeded(plan):
    return 7 if plan.is_stochastic else None


def wavy(x, t, *condition):
    """A nonlinear noise prediction, element by element."""
    return torch.tanh(x) + 0.3 * torch.sin(2 * x)


def log_p(x, t):
    return -(x**2).flatten(1).sum(1)


class Mlp(nn.Module):
    """A small network [B, *D] -> [B, *D] of any depth, which reads t and, if told, a class; its linear layers are what autocast acts on."""

    def __init__(self, elements, width=16, depth=1, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sizes = [elements, *[width] * depth, elements]
            self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(sizes, sizes[1:], strict=False))

    def forward(self, x, t, condition=None):
        h = x.flatten(1)
        told = torch.sin(t).to(h.dtype)[:, None] + (0.0 if condition is None else condition.to(h.dtype))
        for layer in self.layers[:-1]:
            h = torch.tanh(layer(h) + told)
        return self.layers[-1](h).reshape(x.shape)


def guided_ways(net):
    """The same network, led, clipped or hooked in every way of `solvers.guidance`."""
    return {
        "guided": G.guided(net, lambda x, t: 0.5 * net(x, t), 3.0, rescale=0.5),
        "classifier_free": G.classifier_free(net, *CLASSES, 3.0, rescale=0.5),
        "classifier": G.classifier(net, log_p, 0.5),
        "clipped": G.clipped(net, -30.0, 30.0),
        "thresholded": G.thresholded(net, 0.9),
        "on_state": G.on_state(net, lambda x, t: 0.9 * x),
        "centred": sv.centred(net, CENTRE),
        "checkpointed": sv.checkpointed(net),
    }


GUIDED = sorted(guided_ways(wavy))
KINDS = {name: METHODS[name] for name in ("dpm_solver_pp 2M ramp full", "ddim eta 1", "ancestral 2S")} | {
    "unipc": METHODS["unipc 3 noise lower"],
    "per element": PER_ELEMENT,
}


# Autocast


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_is_of_the_network_s_layers_alone(half):
    """The linear layers compute in half precision; what the executor makes of them is float32 to the last bit."""
    net, x, inside, states = Mlp(60).eval(), randn(0, 2, *SHAPE), [], []
    hooks = [layer.register_forward_hook(lambda _, __, out: inside.append(out.dtype)) for layer in net.layers]

    def cast(x, t, *condition):
        with torch.autocast("cpu", half):
            return net(x, t, *condition)

    for kind, method in KINDS.items():
        plan = method(VP, TIMES)
        single = sv.run(plan, net, x, seeded(plan))
        assert set(inside) == {torch.float32}, kind
        inside.clear()
        with torch.autocast("cpu", half):
            out = sv.run(plan, net, x, seeded(plan), callback=states.append)
        assert set(inside) == {half}, kind
        inside.clear()
        kept = [v for s in states for v in (s.x, *s.outputs.values(), *s.draws.values())]
        assert {v.dtype for v in [out, *kept]} == {torch.float32}, kind
        assert torch.equal(out, sv.run(plan, cast, x, seeded(plan))), kind
        assert 0 < apart(out, single) < (5e-3 if half == torch.bfloat16 else 5e-4), kind
        inside.clear()
    for name in GUIDED:
        with torch.autocast("cpu", half):
            out = sv.run(PLAN, guided_ways(net)[name], x)
        assert torch.equal(out, sv.run(PLAN, guided_ways(cast)[name], x)), name
    for go in (sv.adaptive, partial(sv.odeint, rtol=1e-2, atol=1e-2)):
        with torch.autocast("cpu", half):
            out = go(net, VP, x).x
        assert torch.equal(out, go(cast, VP, x).x)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", [*METHODS, "per element"])
def test_a_plan_is_the_same_under_autocast(name):
    """Which casts no float64: a coefficient in bfloat16 would be wrong by a thousandth."""
    method = (METHODS | KINDS)[name]
    with torch.autocast("cpu", torch.bfloat16):
        inside = method(VP, TIMES)
    assert inside == method(VP, TIMES)


def surroundings():
    name, keys, *place = np.random.get_state()  # noqa: NPY002
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        (name, keys.tolist(), place),
        warnings.filters[:],
    )


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_grad_mode_default_dtype_and_random_states_are_as_before(cached):
    """After every way to run, and after one that a network's exception ends."""
    for library in ("torchdiffeq", "torchsde"):  # what they import changes the filters of warnings
        importlib.import_module(library)
    x = randn(0, 2, 3)

    def broken(x, t, *condition):
        torch.set_grad_enabled(False)
        raise KeyError("inner")

    def ways(net):
        plan = sv.ddim(VP, TIMES, eta=1.0)
        yield lambda: sv.run(plan, net, x, noise=3)
        yield lambda: sv.run(plan, net, x, noise=3, grad=True)
        yield lambda: sv.run(PLAN, sv.checkpointed(net), x, grad=True)
        yield lambda: sv.trajectory(plan, net, x, noise=3)
        yield lambda: sv.sample(net, x, VP, 4)
        yield lambda: sv.adaptive(net, VP, x)
        yield lambda: sv.adaptive_sde(net, VP, x, noise=3, rtol=0.3, atol=0.3)
        yield lambda: sv.odeint(net, VP, x, rtol=0.1, atol=0.1)
        yield lambda: sv.sdeint(net, VP, x, noise=3, steps=4)
        yield lambda: sv.predictor_corrector(plan, net, x, noise=3)
        yield lambda: sv.adapters.sampler(sv.ddim)(net, x, torch.tensor([2.0, 1.0, 0.1]))
        for name in sorted(set(GUIDED) - {"centred"}):
            yield lambda name=name: sv.run(PLAN, guided_ways(net)[name], x)

    try:
        torch.set_default_dtype(torch.float64)
        with torch.autocast("cpu", torch.float16, cache_enabled=cached):
            before = surroundings()
            for go in ways(Mlp(3).float().eval()):
                go()
                assert surroundings() == before
            for go in ways(broken):
                with pytest.raises(KeyError):
                    go()
                assert surroundings() == before
    finally:
        torch.set_default_dtype(torch.float32)


# Half precision


FLOOR = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # measured 4.4e-3 and 7.8e-4 at 32 steps, less at more


@cache
def ladder_start():
    """Exact in bfloat16 and in float16."""
    return randn(0, 16, 8, dtype=torch.float64).bfloat16().double()


@cache
def in_double(name, steps):
    return sv.run(LADDER[name](VP, sv.logsnr(VP, steps)), PROBLEMS["eight"].model(VP), ladder_start())


LADDER = {
    "2M": sv.dpm_solver_pp,
    "2S": partial(sv.dpm_solver, order=2),
    "unipc": partial(sv.unipc, order=3),
    "ddim": sv.ddim,
}


@pytest.mark.parametrize("half", FLOOR)
@pytest.mark.parametrize(
    "name", [name if name == "2M" else pytest.param(name, marks=pytest.mark.slow) for name in LADDER]
)
def test_the_error_of_a_half_precision_network_does_not_grow_with_steps(name, half):
    """17: x, rounded as the network gets it, and its output are in half precision, the state is not; a state that is drifts away."""
    model, x, seen = PROBLEMS["eight"].model(VP), ladder_start(), set()

    def net(x, t):
        seen.add((x.dtype, t.dtype))
        return model(x.double(), t.double()).to(half)

    def rounds(state):
        state.x.copy_(state.x.to(half))

    errors, planted = {}, {}
    for steps in (32, 128, 512):
        plan = LADDER[name](VP, sv.logsnr(VP, steps))
        out = sv.run(plan, net, x.to(half))
        assert out.dtype == torch.float32
        errors[steps] = apart(out, in_double(name, steps))
        planted[steps] = apart(sv.run(plan, net, x.to(half), callback=rounds), in_double(name, steps))
    assert seen == {(half, torch.float32)}
    assert max(errors.values()) < FLOOR[half], errors
    assert errors[512] < 1.5 * errors[128], errors
    assert planted[32] > 1.5 * errors[32], (errors, planted)
    assert planted[512] > 20 * errors[512], (errors, planted)
    assert planted[512] > 2 * planted[128], planted


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_labels_are_not_rounded_to_the_network_s_precision(half):
    """B12: 999 is 1000 in bfloat16, and a fraction of a step is lost in float16."""
    seen = []

    def net(x, n, *condition):
        assert x.dtype == half
        seen.extend(n.tolist() if n.dtype in (torch.float32, torch.int64) else [n.dtype])
        return 0.1 * x

    x = randn(0, 1, 3).to(half)
    step, label = (sv.Model(net, label=f) for f in (DDPM.step, DDPM.label))
    weaker = sv.Model(lambda x, n: 0.2 * x, label=DDPM.label)
    levels, between = sv.trailing(DDPM, 6), sv.logsnr(DDPM, 6)
    wanted = {
        "whole": (lambda: sv.run(sv.ddim(DDPM, levels), step, x), DDPM.step(levels[:-1])),
        "between": (lambda: sv.run(sv.ddim(DDPM, between), label, x), DDPM.label(between[:-1])),
    }
    for name, model in {
        "guided": G.guided(label, weaker, 3.0),
        "classifier_free": G.classifier_free(label, None, None, 1.0),
        "classifier": G.classifier(label, log_p),
        "thresholded": G.thresholded(label, 0.9),
        "checkpointed": sv.checkpointed(label),
    }.items():
        wanted[name] = (
            lambda model=model: sv.run(sv.ddim(DDPM, between), model, x),
            DDPM.label(between[:-1]),
        )
    wanted["sampler"] = (
        lambda: sv.adapters.sampler(sv.ddim)(net, x, torch.tensor([80.1, 9.99, 0.123, 0.01])),
        torch.tensor([80.1, 9.99, 0.123]),
    )
    for name, (go, labels) in wanted.items():
        seen.clear()
        go()
        exact = [labels.tolist(), labels.float().tolist()]
        assert seen in exact, name
        rounded = labels.to(half)
        assert rounded.tolist() not in exact or (name, half) == ("whole", torch.float16)
    for go in (sv.adaptive, partial(sv.odeint, rtol=0.1, atol=0.1, variable="half_logsnr")):
        seen.clear()
        go(label, DDPM, x)
        labels = torch.tensor(seen)
        assert (labels != labels.to(half).float()).float().mean() > 0.7


# Memory layout


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def images(seed=0, batch=2):
    return randn(seed, batch, *SHAPE).to(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("predicts", "grad"), [("noise", False), ("noise", True), ("data", False), ("velocity", False)]
)
@pytest.mark.parametrize("name", [*METHODS, "per element"])
def test_channels_last_is_kept_by_rows_of_every_kind(name, predicts, grad):
    """By what the network gets, the state, the outputs kept for later rows, and the result; which is that of another layout, to the bit."""
    plan, x, states, given = (METHODS | KINDS)[name](VP, TIMES), images(), [], []

    def net(x, t):
        given.append(x)
        return wavy(x, t)

    model = sv.Model(net, predicts)
    out = sv.run(plan, model, x, seeded(plan), callback=states.append, grad=grad)
    plain = sv.run(plan, sv.Model(wavy, predicts), x.contiguous(), seeded(plan), grad=grad)
    assert torch.equal(out, plain)
    assert not is_channels_last(plain)
    again = sv.run(plan, model, x, seeded(plan), grad=grad)
    assert torch.equal(again, out)
    kept = [v for s in states for v in (s.x, *s.outputs.values())]
    assert all(is_channels_last(v) for v in [out, again, *given, *kept])


@pytest.mark.parametrize("name", ["learned", "pair"])
def test_channels_last_is_kept_where_the_network_chooses_the_variance(name):
    x, given = images(), []

    def net(x, t):
        given.append(is_channels_last(x))
        m, second = wavy(x, t), torch.sigmoid(x)
        return torch.cat([m, second], 1) if name == "learned" else (m, second)

    if name == "learned":
        plan, kind = sv.ddpm(VP, TIMES, variance="learned"), "range"
    else:
        plan, kind = sv.extended_analytic_dpm(VP, TIMES), "square"
    out = sv.run(plan, sv.Model(net, variance=kind), x, noise=3)
    assert is_channels_last(out)
    assert set(given) == {True}
    assert torch.equal(out, sv.run(plan, sv.Model(net, variance=kind), x.contiguous(), noise=3))


@pytest.mark.parametrize("name", GUIDED)
def test_channels_last_is_kept_by_guidance(name):
    x, given = images(), []

    def net(x, t, *condition):
        given.append(is_channels_last(x))
        return wavy(x, t)

    out = sv.run(PLAN, guided_ways(net)[name], x)
    assert is_channels_last(out)
    assert set(given) == {True}
    assert torch.equal(out, sv.run(PLAN, guided_ways(wavy)[name], x.contiguous()))


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("method", ["adams", "dpm_solver", "exponential_rk"])
def test_channels_last_is_kept_by_adaptive_steps(method, coupled):
    x, given = images(batch=3) * torch.tensor([0.5, 1.0, 3.0])[:, None, None, None], []

    def net(x, t):
        given.append(is_channels_last(x))
        return wavy(x, t)

    out = sv.adaptive(net, VP, x, method=method, coupled=coupled).x
    assert is_channels_last(out)
    assert set(given) == {True}


FORMS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
    "every other": lambda x: torch.stack([x, -x], -1).flatten(-2)[..., ::2],
    "a window": lambda x: nn.functional.pad(x, (1, 2, 3, 4))[..., 3:-4, 1:-2],
    "one sample repeated": lambda x: x[:1].expand(x.shape),
    "one pixel repeated": lambda x: x[:, :, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("large", [False, True], ids=["small", "piece by piece"])
@pytest.mark.parametrize("form", FORMS)
def test_states_and_outputs_of_any_strides_are_right(form, large):
    """Also beside each other, where the executor goes piece by piece through memory, which it may do only if all are laid out alike."""
    shape = (3, 210, 210) if large else SHAPE
    x = FORMS[form](randn(0, 2, *shape))
    dense = x.clone(memory_format=torch.contiguous_format)
    assert x.stride() != dense.stride()

    def strided(x, t):
        return FORMS[form](wavy(x, t))

    def plain(x, t):
        return strided(x, t).contiguous()

    kinds = {"2M": sv.dpm_solver_pp} if large else KINDS
    for kind, method in kinds.items():
        plan = method(VP, TIMES)
        wanted = sv.run(plan, plain, dense, seeded(plan))
        for net in (plain, strided):
            for start in (x, dense):
                assert torch.equal(sv.run(plan, net, start, seeded(plan)), wanted), kind


# torch.compile


@pytest.fixture
def counter():
    """A backend that counts its compilations, with dynamo as if nothing had been compiled yet."""
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def compiled(net, counter):
    return torch.compile(net, backend=counter, fullgraph=True)


def test_a_network_is_compiled_once_for_all_runs(counter):
    """33: of any length, any method and any wrapper; times and coefficients are no constants of the graph."""
    net = Mlp(60).eval()
    fast, x = compiled(net, counter), randn(0, 2, *SHAPE)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for method in (*METHODS.values(), PER_ELEMENT):
            for steps in (3, 7):
                plan = method(VP, sv.logsnr(VP, steps))
                assert torch.equal(sv.run(plan, fast, x, seeded(plan)), sv.run(plan, net, x, seeded(plan)))
        for predicts in ("noise", "data", "velocity", "edm"):
            sv.trajectory(PLAN, sv.Model(fast, predicts), x)
        for name in sorted(set(GUIDED) - {"classifier_free"}):
            sv.run(PLAN, guided_ways(fast)[name], x)
        sv.run(PLAN, fast, x, callback=lambda state: None)
        sv.adapters.sampler(sv.dpm_solver_pp)(fast, x, torch.tensor([9.0, 1.0, 0.1, 0.0]))
        sv.predictor_corrector(sv.ddim(VP, TIMES, eta=1.0), fast, x, noise=0)
    assert counter.frame_count == 1


def test_a_time_that_is_a_number_would_be_compiled_again_and_again(counter):
    """What the test above is there for is seen."""

    def net(x, t):
        return x * t

    fast = compiled(net, counter)
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(RecompileError):
        sv.run(PLAN, lambda x, t: fast(x, float(t[0])), randn(0, 2, 3))


def test_whole_and_fractional_labels_are_two_signatures_at_most(counter):
    fast, x = compiled(Mlp(3).eval(), counter), randn(0, 2, 3)
    for steps in (3, 7):
        sv.run(sv.ddim(DDPM, sv.trailing(DDPM, steps)), sv.Model(fast, label=DDPM.step), x)
        assert counter.frame_count == 1
    for steps in (3, 7):
        sv.run(sv.dpm_solver(DDPM, sv.logsnr(DDPM, steps)), sv.Model(fast, label=DDPM.label), x)
        sv.run(sv.ddim(DDPM, sv.trailing(DDPM, steps)), sv.Model(fast, label=DDPM.step), x)
    assert counter.frame_count == 2


def test_guidance_in_one_call_is_compiled_for_one_size_of_the_batch_and_with_an_interval_for_two(counter):
    fast, x = compiled(Mlp(3).eval(), counter), randn(0, 2, 3)
    for steps in (5, 9):
        sv.run(sv.ddim(VP, sv.logsnr(VP, steps)), G.classifier_free(fast, *CLASSES, 3.0), x)
    assert counter.frame_count == 1
    for steps in (5, 9):
        sv.run(
            sv.ddim(VP, sv.logsnr(VP, steps)), G.classifier_free(fast, *CLASSES, 3.0, low=0.1, high=0.6), x
        )
    assert counter.frame_count == 2


def test_libraries_of_one_step_for_the_batch_compile_once_and_steps_of_their_own_for_few_sizes(counter):
    fast, x = compiled(Mlp(3).eval(), counter), randn(0, 4, 3)
    for scale in (1.0, 3.0):
        sv.odeint(fast, VP, scale * x, rtol=1e-2, atol=1e-2)
        sv.adaptive(fast, VP, scale * x, coupled=True)
    assert counter.frame_count <= 2  # times that are one for all are a view of one number
    before = counter.frame_count
    spread = torch.tensor([0.3, 1.0, 3.0, 9.0])[:, None]
    sizes = {len(x)}

    def counted(x, t):
        sizes.add(len(x))
        return fast(x, t)

    sv.adaptive(counted, VP, spread * x)
    assert len(sizes) > 2
    assert (
        counter.frame_count - before <= 2
    )  # dynamo makes the size a variable, and a batch of one a constant


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_network_has_the_same_gradients_also_checkpointed(counter):
    net, x = Mlp(3).double().eval(), randn(0, 2, 3, dtype=torch.float64)
    fast = compiled(net, counter)
    plain = gradients(net, x, net)
    for model in (fast, sv.checkpointed(fast)):
        for _ in range(2):
            assert all(map(torch.equal, gradients(model, x, net), plain))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", METHODS)
def test_a_network_may_write_all_its_outputs_into_one_buffer(name):
    """As CUDA graphs and inference engines do: no output is read after the next call."""
    plan, x, buffer = METHODS[name](VP, TIMES), randn(0, 2, *SHAPE), torch.empty(2, *SHAPE)
    out = sv.run(plan, lambda x, t: buffer.copy_(wavy(x, t)), x, seeded(plan))
    assert torch.equal(out, sv.run(plan, wavy, x, seeded(plan)))


def test_guidance_by_two_calls_of_a_network_with_one_buffer_is_right_or_refused():
    x, buffer = randn(0, 2, *SHAPE), torch.empty(2, *SHAPE)

    def bound(condition, into):
        return lambda x, t: into(wavy(x + condition, t))

    def led(into):
        return sv.run(PLAN, G.guided(bound(1.0, into), bound(0.0, into), 3.0), x)

    wanted = led(torch.clone)
    try:
        out = led(buffer.copy_)
    except ValueError:
        return  # a refusal is as good
    assert torch.equal(out, wanted)


def test_a_scheduler_of_diffusers_compiles_the_network_once(counter):
    pytest.importorskip("diffusers")
    from solvers.adapters.diffusers import SolversScheduler

    net = Mlp(60).eval()
    fast = torch.compile(lambda x, t: net(x, t.expand(len(x))), backend=counter, fullgraph=True)

    @torch.no_grad()
    def loop(network, steps, dtype=torch.float32, **options):
        scheduler = SolversScheduler(seed=0, **options)
        scheduler.set_timesteps(steps)
        x = randn(0, 2, *SHAPE).to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return x

    for steps in (4, 9):
        for method in ("dpm_solver_pp_2m", "unipc_2", "ddim", "ddpm", "recommended"):
            out = loop(fast, steps, method=method)
            assert torch.equal(out, loop(lambda x, t: net(x, t.expand(len(x))), steps, method=method))
    assert counter.frame_count == 1
    for steps in (4, 9):
        loop(fast, steps, method="dpm_solver_2")  # stages between levels, which are fractions
        loop(fast, steps, method="dpm_solver_pp_2m", grid="logsnr")
    assert counter.frame_count == 2


# Gradients


def gradients(model, x, net, plan=PLAN, noise=None):
    """Of the mean square at the end with respect to x and the network's weights."""
    x = x.clone().requires_grad_()
    end = sv.run(plan, model, x, noise, grad=True).square().mean()
    return torch.autograd.grad(end, [x, *net.parameters()])


FAMILIES = {
    "dpm_solver 3": sv.dpm_solver,
    "dpm_solver_pp 2M": sv.dpm_solver_pp,
    "adams 4": partial(sv.exponential_adams, order=4),
    "velocity": partial(sv.exponential_adams, order=3, predicts="velocity"),
    "unipc": partial(sv.unipc, order=3),
    "deis": partial(sv.deis, order=3),
    "heun": sv.heun,
    "pndm": sv.pndm,
    "obelm": sv.obelm,
    "ddim eta": partial(sv.ddim, eta=1.0),
    "sa_solver": sv.sa_solver,
    "seeds": sv.seeds,
    "ancestral": METHODS["ancestral 2S"],
    "per element": partial(sv.dpm_solver_v3, statistics=sv.gaussian_statistics(0.2, 0.7), order=2),
    "learned variance": partial(sv.ddpm, variance="learned"),
    "square": sv.extended_analytic_dpm,
}


def modelled(name, net):
    if name == "learned variance":
        return sv.Model(lambda x, t: (net(x, t), torch.tanh(net(x, t))), variance="range")
    if name == "square":
        return sv.Model(lambda x, t: (net(x, t), 1 + net(x, t) ** 2), variance="square")
    return sv.Model(net)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_with_checkpoints_are_the_gradients(name):
    """With respect to x and to the weights, bit for bit."""
    net, x = Mlp(3).double().eval(), randn(0, 2, 3, dtype=torch.float64)
    plan, model = FAMILIES[name](VP, TIMES), modelled(name, net)
    plain = gradients(model, x, net, plan, seeded(plan))
    assert all(g.abs().max() > 0 for g in plain)
    assert all(map(torch.equal, gradients(sv.checkpointed(model), x, net, plan, seeded(plan)), plain))


@pytest.mark.parametrize(
    "name", ["dpm_solver 3", "adams 4", "unipc", "heun", "ddim eta", "ancestral", "per element", "square"]
)
def test_gradients_with_checkpoints_are_finite_differences(name):
    net, x = Mlp(3, width=2).double().eval(), randn(0, 1, 3, dtype=torch.float64)
    plan = FAMILIES[name](VP, sv.logsnr(VP, 3, start=0.8, stop=0.1))
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    names = [n for n, _ in net.named_parameters()]

    def end(x, *weights):
        def called(x, t):
            return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), (x, t))

        return sv.run(plan, sv.checkpointed(modelled(name, called)), x, seeded(plan), grad=True)

    assert torch.autograd.gradcheck(end, (x.requires_grad_(), *weights))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", sorted({*GUIDED} - {"checkpointed", "centred"}))
def test_gradients_of_guided_networks_with_checkpoints_within_or_around_are_the_gradients(name, inside):
    net, x = Mlp(3).double().eval(), randn(0, 2, 3, dtype=torch.float64)
    plain = gradients(guided_ways(net)[name], x, net)
    model = guided_ways(sv.checkpointed(net) if inside and name != "guided" else net)[name]
    if not inside:
        model = sv.checkpointed(model)
    elif name == "guided":
        model = G.guided(
            sv.checkpointed(net), sv.checkpointed(lambda x, t: 0.5 * net(x, t)), 3.0, rescale=0.5
        )
    for with_checkpoints, without in zip(gradients(model, x, net), plain, strict=True):
        assert apart(with_checkpoints, without) < 1e-12


def test_checkpoints_call_the_network_twice_a_call_and_only_on_the_way_back():
    net, calls = Mlp(3).eval(), []
    net.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    sv.run(PLAN, sv.checkpointed(net), randn(0, 2, 3))
    assert calls == [False] * PLAN.nfe
    calls.clear()
    end = sv.run(PLAN, sv.checkpointed(net), randn(0, 2, 3), grad=True).sum()
    assert len(calls) == PLAN.nfe
    end.backward()
    assert len(calls) == 2 * PLAN.nfe


class Deep(nn.Module):
    """A network that keeps books on its activations: which of them are still in memory."""

    def __init__(self, depth):
        super().__init__()
        self.scales = nn.Parameter(torch.linspace(0.5, 1.0, depth))
        self.made, self.most = [], 0

    @property
    def alive(self):
        return sum(ref() is not None for ref in self.made)

    def forward(self, x, t):
        for scale in self.scales:
            x = torch.tanh(scale * x)
            self.made.append(weakref.ref(x.untyped_storage()))
            self.most = max(self.most, self.alive)
        return x + 0.0


def kept(model, net, steps, grad=True):
    """How many tensors a run keeps for the way back, their bytes, and the activations still there: at its end, and at most on the way back."""
    sizes = []

    def pack(saved):
        sizes.append(saved.numel() * saved.element_size())
        return saved

    x = randn(0, 2, 300)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        end = sv.run(sv.dpm_solver_pp(VP, sv.logsnr(VP, steps)), model, x, grad=grad).sum()
    alive, net.most = net.alive, 0
    if grad:
        end.backward()
    return len(sizes), sum(sizes), alive, net.most


def test_what_a_run_with_checkpoints_keeps_does_not_grow_with_the_network_s_depth():
    """Nothing of the network's inside is kept on the way there; on the way back that of one call."""
    shallow, deep = (kept(sv.checkpointed(net), net, 6) for net in (Deep(2), Deep(20)))
    assert shallow[:3] == deep[:3]
    assert deep[2] == 0
    assert 15 < deep[3] <= 20 + 1
    few, many = (kept(net, net, 6) for net in (Deep(2), Deep(20)))
    assert many[1] > 5 * few[1]
    assert many[2] >= 6 * 20
    assert deep[1] < many[1] / 10


def test_without_grad_a_run_keeps_nothing():
    """H6: weights that require a gradient leave no graph, no saved tensor and no activation."""
    net = Deep(5).eval()
    with torch.enable_grad():
        assert kept(net, net, 6, grad=False) == (0, 0, 0, 0)
    assert len(net.made) == 30


ROWS_53 = {
    "run": lambda net, x: sv.run(PLAN, net, x),
    "run with noise": lambda net, x: sv.run(sv.ddim(VP, TIMES, eta=1.0), net, x, noise=0),
    "per element": lambda net, x: sv.run(FAMILIES["per element"](VP, TIMES), net, x),
    "trajectory": lambda net, x: sv.trajectory(PLAN, net, x),
    "sample": lambda net, x: sv.sample(net, x, VP, 4),
    "adaptive": lambda net, x: sv.adaptive(net, VP, x).x,
    "adaptive_sde": lambda net, x: sv.adaptive_sde(net, VP, x, noise=0, rtol=0.3, atol=0.3).x,
    "odeint": lambda net, x: sv.odeint(net, VP, x, rtol=0.1, atol=0.1).x,
    "sdeint": lambda net, x: sv.sdeint(net, VP, x, noise=0, steps=4).x,
    "predictor_corrector": lambda net, x: sv.predictor_corrector(sv.ddim(VP, TIMES), net, x, noise=0),
    "sampler": lambda net, x: sv.adapters.sampler(sv.ddim)(net, x, torch.tensor([2.0, 1.0, 0.1])),
    **{
        name: lambda net, x, name=name: sv.run(PLAN, guided_ways(net)[name], x)
        for name in sorted(set(GUIDED) - {"centred"})
    },
}


@pytest.mark.parametrize("go", ROWS_53)
def test_53_a_network_that_turns_gradients_on_leaves_no_graph(go):
    weight = nn.Parameter(torch.tensor(0.5))
    graphs = []

    def net(x, t, *condition):
        with torch.enable_grad():
            m = weight * torch.tanh(x)
            if m.grad_fn is not None:
                graphs.append(weakref.ref(m))
            return m

    x = randn(0, 2, 3)
    with torch.enable_grad():
        out = ROWS_53[go](net, x)
    assert not out.requires_grad
    assert out.grad_fn is None
    assert graphs
    assert not any(graph() is not None for graph in graphs)


# Threads


@pytest.fixture
def hurried():
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def shared():
    """Runs of (x [3, 4], number), all of whose parts but x are made once."""
    net = Mlp(4).eval()
    ids = sv.noise.per_sample(5, [4, 0, 7])
    multistep, noisy = sv.exponential_adams(VP, sv.logsnr(VP, 6), 3), sv.ddim(VP, TIMES, eta=1.0)
    rough = sv.ddim(VP, sv.logsnr(VP, 2), eta=1.0)
    path = sv.noise.brownian(5, [4, 0, 7], rough.half_logsnr)
    led = G.thresholded(G.classifier(G.classifier_free(net, *CLASSES, 2.0, low=0.1, high=0.7), log_p, 0.1))
    model = sv.Model(net, "velocity", label=VP.half_logsnr)
    k_sampler, sigmas = sv.adapters.sampler(sv.dpm_solver_pp_sde), torch.tensor([9.0, 3.0, 1.0, 0.1])
    return {
        "a plan and a Model": lambda x: sv.run(multistep, model, x),
        "a guided model": lambda x: sv.run(multistep, led, x),
        "noise per sample": lambda x: sv.run(noisy, model, x, ids),
        "a Brownian path": lambda x: sv.run(rough, model, x, path),
        "a k-diffusion sampler": lambda x: k_sampler(net, x, sigmas, noise=ids),
        "an adaptive run": lambda x: sv.adaptive(model, VP, x[:1], order=2, start=0.3, rtol=0.3).x,
        "checkpoints": lambda x: gradients(sv.checkpointed(model), x, net, noisy, ids)[1],
    }


@pytest.mark.parametrize("what", sorted(shared()))
def test_32_threads_share_what_a_run_is_made_of(what, hurried):
    """F12, H1: three runs each (of the slow kinds one), all begun at once, bit-equal to serial ones."""
    each = 1 if what in ("an adaptive run", "a Brownian path") else 3
    go, starts = shared()[what], [randn(i, 3, 4) for i in range(32 * each)]
    serial = [go(x) for x in starts]
    assert len({tuple(out.flatten().tolist()) for out in serial}) == len(starts)
    barrier = threading.Barrier(32)

    def several(k):
        barrier.wait()
        return [go(x) for x in starts[each * k : each * (k + 1)]]

    with ThreadPoolExecutor(32) as pool:
        parallel = [out for outs in pool.map(several, range(32)) for out in outs]
    assert all(map(torch.equal, parallel, serial))


def test_a_shared_generator_would_be_seen():
    """Its draws depend on who was there before; what the test above is there for."""
    plan, stream = sv.ddim(VP, TIMES, eta=1.0), torch.Generator().manual_seed(0)
    starts = [randn(i, 3, 4) for i in range(4)]
    alone = [sv.run(plan, wavy, x, torch.Generator().manual_seed(0)) for x in starts]
    together = [sv.run(plan, wavy, x, stream) for x in starts]
    assert list(map(torch.equal, together, alone)) == [True, False, False, False]


def test_threads_share_a_scheduler_of_diffusers(hurried):
    pytest.importorskip("diffusers")
    from solvers.adapters.diffusers import SolversScheduler

    net, scheduler = Mlp(4).eval(), SolversScheduler(method="dpm_solver_pp_2m")
    barrier = threading.Barrier(16)

    @torch.no_grad()
    def sampled(k):
        scheduler.set_timesteps(3 + k % 4)
        x = randn(k, 3, 4)
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, t.expand(3)), t, x).prev_sample
        return x

    def at_once(k):
        barrier.wait()
        return [sampled(k), sampled(k + 16)]

    serial = [[sampled(k), sampled(k + 16)] for k in range(16)]
    with ThreadPoolExecutor(16) as pool:
        for pair, alone in zip(pool.map(at_once, range(16)), serial, strict=True):
            assert all(map(torch.equal, pair, alone))


# Networks that misbehave, rows 43 to 53 of the catalogue of bad input: later than in the first call, and in whatever runs them


def edit(x, t):
    x += 1
    return 0.1 * x


def failing(x, t):
    raise KeyError("inner")


def broken_at(place, value):
    def answer(x, t):
        out = 0.1 * x
        out[place] = value
        return out

    return answer


REFUSED = (TypeError, ValueError)
WRONG = {  # name: what the network does, the error it ends in, what must be said of it
    "43 None": (lambda x, t: None, REFUSED, "NoneType"),
    "43 tuple": (lambda x, t: (x, x), REFUSED, "tuple"),
    "43 dict": (lambda x, t: {"sample": x}, REFUSED, "dict"),
    "43 array": (lambda x, t: x.detach().numpy(), REFUSED, "ndarray"),
    "44 fewer channels": (lambda x, t: x[:, :2], ValueError, ", 2, 2, 4]"),
    "44 one sample": (lambda x, t: x[:1], ValueError, "[1, 3, 2, 4]"),
    "44 one channel": (lambda x, t: x[:, :1], ValueError, ", 1, 2, 4]"),
    "44 one pixel": (lambda x, t: x[..., :1], ValueError, ", 3, 2, 1]"),
    "44 no batch": (lambda x, t: x[0], ValueError, "[3, 2, 4]"),
    "44 one more dimension": (lambda x, t: x[None], ValueError, ", 3, 2, 4]"),
    "44 a number": (lambda x, t: x.sum(), ValueError, "[]"),
    "45 learned variance": (lambda x, t: torch.cat([x, x], 1), ValueError, ", 6, 2, 4]"),
    "46 int": (lambda x, t: x.long(), REFUSED, "torch.int64"),
    "46 bool": (lambda x, t: x > 0, REFUSED, "torch.bool"),
    "46 complex": (lambda x, t: x.cdouble(), REFUSED, "torch.complex128"),
    "47 another device": (lambda x, t: x.to("meta"), ValueError, "on meta"),
    "48 x changed in place": (edit, ValueError, "changed its input x in place"),
    "49 nan": (broken_at((0, 1), math.nan), ArithmeticError, "finite"),
    "49 inf": (broken_at((0, 1, 1, 2), math.inf), ArithmeticError, "finite"),
    "49 all -inf": (broken_at(..., -math.inf), ArithmeticError, "finite"),
    "50 raises": (failing, KeyError, "inner"),
}
X = randn(1, 2, 3, 2, 4, dtype=torch.float64)
SIGMAS = torch.tensor([9.0, 3.0, 1.0, 0.3, 0.0])


def with_conditions(net):
    return lambda x, t, condition: net(x, t)


RUN_BY = {
    "run": lambda net: sv.run(PLAN, net, X),
    "run with its graph": lambda net: sv.run(PLAN, net, X, grad=True),
    "trajectory": lambda net: sv.trajectory(PLAN, net, X),
    "sample": lambda net: sv.sample(net, X, VP, 4),
    "predictor_corrector": lambda net: sv.predictor_corrector(sv.ddim(VP, TIMES), net, X, noise=0),
    "sampler": lambda net: sv.adapters.sampler(sv.ddim)(net, X, SIGMAS),
    "checkpointed": lambda net: sv.run(PLAN, sv.checkpointed(net), X),
    "guided": lambda net: sv.run(PLAN, G.guided(net, wavy, 2.0), X),
    "the weaker": lambda net: sv.run(PLAN, G.guided(wavy, net, 2.0), X),
    "classifier_free": lambda net: sv.run(PLAN, G.classifier_free(with_conditions(net), None, None, 2.0), X),
    "classifier": lambda net: sv.run(PLAN, G.classifier(net, log_p), X),
    "clipped": lambda net: sv.run(PLAN, G.clipped(net), X),
    "thresholded guided": lambda net: sv.trajectory(
        PLAN, G.thresholded(G.guided(net, wavy, 2.0), 0.9, most=1.0), X
    ),
}


def coarse(model):
    return sv.adaptive(model, VP, X, order=2, rtol=0.3, atol=0.3, coupled=True).x


BY_TIME = {  # which have no numbered calls
    "adaptive": lambda net: coarse(net),
    "adaptive guided": lambda net: coarse(G.guided(net, wavy, 2.0)),
    "odeint": lambda net: sv.odeint(net, VP, X, rtol=0.3, atol=0.3).x,
    "odeint clipped": lambda net: sv.odeint(G.clipped(net), VP, X, rtol=0.3, atol=0.3).x,
}
ON_A_COPY = {name: (RUN_BY | BY_TIME)[name] for name in ("adaptive", "odeint", "classifier_free")}


@cache
def well_behaved(by):
    return (RUN_BY | BY_TIME)[by](wavy)


@pytest.mark.parametrize(
    ("how", "by"),
    [
        pytest.param(how, by, id=f"{how}-{by}")
        for how in WRONG
        for by in RUN_BY | BY_TIME
        if not (how.startswith("48") and by in ON_A_COPY)
        if how[:2] > "47" or by not in ("adaptive", "odeint")  # of which test_adaptive_limits has these rows
    ],
)
def test_a_network_that_misbehaves_in_its_third_call_is_named_with_its_call_or_time(how, by):
    """And what ran it runs the next network, to the same bits."""
    wrong, errors, said = WRONG[how]
    again, go, times = well_behaved(by), (RUN_BY | BY_TIME)[by], []

    def net(x, t):
        times.append(float(t[0]))
        persists = how.startswith("49") and by in BY_TIME  # steps are tried again
        return wrong(x, t) if len(times) == 3 or (persists and len(times) > 3) else wavy(x, t)

    with pytest.raises(errors) as caught:
        go(net)
    if isinstance(caught.value, sv.NonConvergence):
        assert set(caught.value.solution.status) == {"non_finite"}
    text = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert said in text
    if by in RUN_BY:
        call = 1 if by == "predictor_corrector" else 2  # which asks once more in each row
        assert len(times) == 3
        assert f"call {call} of 4, t = {times[2]:g}" in text.replace(" (t = ", ", t = ")
    else:
        assert ("t = " if how.startswith("49") else f"t = {times[2]:g}") in text
    assert torch.equal(go(wavy), again)


@pytest.mark.parametrize("by", ON_A_COPY)
def test_48_an_edit_of_a_copy_does_no_harm(by):
    def net(x, t):
        m = wavy(x, t)
        x += 1
        return m

    assert torch.equal(ON_A_COPY[by](net), well_behaved(by))


def test_48_an_edit_is_seen_or_does_no_harm_in_inference_mode():
    def net(x, t):
        m = wavy(x, t)
        x += 1
        return m

    with torch.inference_mode():
        try:
            out = sv.run(PLAN, net, X)
        except ValueError:
            return
    assert torch.equal(out, well_behaved("run"))


@pytest.mark.parametrize("model", [None, 3, "net", torch.ones(2)], ids=repr)
@pytest.mark.parametrize("by", sorted(set(RUN_BY | BY_TIME) - {"classifier_free", "sampler", "the weaker"}))
def test_51_what_is_not_callable_is_refused_by_all(by, model):
    with pytest.raises(TypeError, match=r"is not callable: expected net\(x, t\)"):
        (RUN_BY | BY_TIME)[by](model)


@pytest.mark.parametrize("go", [name for name in ROWS_53 if name != "per element"])
def test_52_a_network_in_training_mode_is_warned_of_once_whatever_runs_it(go):
    net, x = Mlp(3), randn(0, 2, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ROWS_53[go](net.train(), x)
    assert ["training mode" in str(w.message) for w in caught] == [True]
    ROWS_53[go](net.eval(), x)  # a warning would be an error


@pytest.mark.parametrize(
    "go",
    ["run", "trajectory", "sample", "adaptive", "adaptive_sde", "odeint", "sdeint"],
)
def test_52_the_warning_points_at_the_line_that_was_written(go):
    with pytest.warns(UserWarning, match="training mode") as caught:
        ROWS_53[go](Mlp(3).train(), randn(0, 2, 3))
    assert caught[0].filename == __file__


# Trained networks, where there are any


def checkpoints():
    """Folders of diffusers' pipelines below ../shared/data."""
    found = [path for depth in ("", "*/", "*/*/") for path in DATA.glob(f"{depth}model_index.json")]
    return sorted(path.parent for path in found)


def network_of(folder):
    """A pipeline's network, the config of its scheduler, and what else the network reads, at random."""
    diffusers = pytest.importorskip("diffusers")
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = next((part for part in ("unet", "transformer") if part in index), None)
    if name is None or index[name][1] not in ("UNet2DModel", "UNet2DConditionModel"):
        pytest.skip(f"{folder}: no UNet")
    network = getattr(diffusers, index[name][1]).from_pretrained(folder / name).float().eval()
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    width = network.config.get("cross_attention_dim")
    if network.config.get("addition_embed_type") or network.config.get("class_embed_type"):
        pytest.skip(f"{folder}: reads more than prompts")
    inputs = {} if width is None else {"encoder_hidden_states": randn(1, 2, 7, width)}
    return network, config, inputs


@pytest.mark.slow
@pytest.mark.skipif(not checkpoints(), reason=f"no pipeline of diffusers below {DATA}")
@pytest.mark.parametrize("method", ["ddim", "dpm_solver_pp_2m", "unipc_2"])
@pytest.mark.parametrize("folder", checkpoints(), ids=lambda folder: folder.name)
def test_a_trained_network_in_diffusers_loop_and_in_ours_give_the_same_samples(folder, method):
    compared_on(folder, method)


@torch.no_grad()
def compared_on(folder, method, steps=10):
    from solvers.adapters.diffusers import SolversScheduler
    from solvers.methods import BUILDS

    network, config, inputs = network_of(folder)
    size = network.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    noise = randn(0, 2, network.config["in_channels"], height, width)

    scheduler = SolversScheduler.from_config(config, method=method)
    scheduler.set_timesteps(steps)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t, return_dict=False, **inputs)[0], t, x).prev_sample

    model, schedule = sv.adapters.from_diffusers(network, config, inputs)
    ours = sv.sample(model, noise, schedule, steps, method=BUILDS[method])
    assert ours.isfinite().all()
    assert apart(x, ours) < 1e-4
    few = sv.sample(model, noise, schedule, 2, method=BUILDS[method])
    assert apart(few, ours) > 1e-3  # and it is a network, of which steps make something


@pytest.mark.slow
def test_an_untrained_network_saved_by_diffusers_gives_the_same_samples_in_both_loops(tmp_path):
    """The comparison above, on a network that is always there."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8),
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    compared_on(tmp_path, "dpm_solver_pp_2m")

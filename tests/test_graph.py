"""compiled_sampler: what a run gives, from a graph that is captured once; here CUDA is pretended, and a replay is the loop again."""

import contextlib
import math
import re
import warnings

import pytest
import torch
from torch import nn

import solvers as sv
from problems import VP, generator
from solvers import graph
from solvers.methods import BUILDS

SHAPE = (3, 2, 5)
ODE = BUILDS["adams_data_4"](VP, sv.logsnr(VP, 4))
SDES = ("ddpm", "sa_solver", "ancestral_3s", "seeds_3")


def plan_of(name, steps=4):
    return BUILDS[name](VP, sv.logsnr(VP, steps))


def randn(seed=0, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def wavy(x, t):
    return torch.tanh(x) + 0.2 * torch.sin(3 * x + t[:, None, None])


def on_host(plan, model, shape=SHAPE, **options):
    """A sampler off CUDA, whose warning is expected."""
    with pytest.warns(UserWarning, match="CUDA graphs need a CUDA device"):
        return sv.compiled_sampler(plan, model, shape, device="cpu", **options)


# Off CUDA


@pytest.mark.parametrize("name", ["adams_data_4", "unipc_4", *SDES])
def test_off_cuda_a_warning_says_so_and_the_sampler_is_run(name):
    plan = plan_of(name)
    with pytest.warns(UserWarning, match="x is on cpu") as caught:
        sampler = sv.compiled_sampler(plan, wavy, SHAPE, device="cpu")
    assert str(caught[0].message) == (
        "x is on cpu, and CUDA graphs need a CUDA device: the sampler runs the plan call by call"
    )
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert sampler.captured is False
    for seed in (0, 1):
        assert torch.equal(sampler(randn(seed), seed), sv.run(plan, wavy, randn(seed), seed))


def test_off_cuda_options_are_those_of_the_run():
    sampler = on_host(ODE, lambda x, t: torch.full_like(x, math.nan))
    with pytest.raises(sv.NonFiniteError, match="call 0"):
        sampler(randn())
    unchecked = on_host(ODE, lambda x, t: torch.full_like(x, math.nan), check=False)
    assert unchecked(randn()).isnan().all()
    for fused in (True, False):
        assert torch.equal(on_host(ODE, wavy, fused=fused)(randn()), sv.run(ODE, wavy, randn()))


# What is refused

WRONG = {
    "plan": (
        lambda: sv.compiled_sampler(sv.ddim, wavy, SHAPE),
        TypeError,
        "plan is function: expected a Plan",
    ),
    "no plan": (
        lambda: sv.compiled_sampler(None, wavy, SHAPE),
        TypeError,
        "plan is NoneType: expected a Plan",
    ),
    "model": (lambda: sv.compiled_sampler(ODE, None, SHAPE), TypeError, "is not callable"),
    "no shape": (lambda: sv.compiled_sampler(ODE, wavy, ()), ValueError, "shape = []: expected [B, ...]"),
    "no batch": (lambda: sv.compiled_sampler(ODE, wavy, (0, 3)), ValueError, "shape = [0, 3]: expected"),
    "no element": (lambda: sv.compiled_sampler(ODE, wavy, [3, 0]), ValueError, "shape = [3, 0]: expected"),
    "below": (lambda: sv.compiled_sampler(ODE, wavy, (2, -3)), ValueError, "shape = [2, -3]: expected"),
    "check": (
        lambda: sv.compiled_sampler(ODE, wavy, SHAPE, check=1),
        TypeError,
        "check = 1: expected True or False",
    ),
}
UNNAMED = {
    "shape is a number": (lambda: sv.compiled_sampler(ODE, wavy, 3), "shape"),
    "shape of fractions": (lambda: sv.compiled_sampler(ODE, wavy, (2.5, 3)), "shape = "),
    "fused": (lambda: sv.compiled_sampler(ODE, wavy, SHAPE, fused="yes"), "fused = 'yes'"),
    "dtype": (lambda: sv.compiled_sampler(ODE, wavy, SHAPE, dtype=torch.long), "torch.int64"),
}


@pytest.fixture(params=["host", "pretended"])
def anywhere(request):
    """Off CUDA, and where it is pretended."""
    if request.param == "pretended":
        request.getfixturevalue("pretended")
    return request.param


@pytest.mark.parametrize("what", WRONG)
def test_what_a_sampler_is_made_of_is_refused_by_name_and_value(what, anywhere):
    make, error, said = WRONG[what]
    with pytest.raises(error) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.filterwarnings("ignore:x is on cpu")
@pytest.mark.parametrize("what", UNNAMED)
def test_what_else_is_wrong_is_refused_when_the_sampler_is_made(what):
    make, said = UNNAMED[what]
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(4, 2, 5), "x has shape torch.Size([4, 2, 5]): expected torch.Size([3, 2, 5])"),
        (torch.zeros(3, 2, 5, 1), "x has shape torch.Size([3, 2, 5, 1]): expected"),
        (torch.zeros(SHAPE, dtype=torch.float64), "x has dtype torch.float64: expected torch.float32"),
        (torch.zeros(SHAPE, dtype=torch.half), "x has dtype torch.float16: expected torch.float32"),
        (torch.zeros(SHAPE, device="meta"), "x has device meta: expected cpu"),
    ],
    ids=["batch", "dimensions", "float64", "float16", "device"],
)
def test_another_x_is_refused_by_name_and_value(x, said, anywhere):
    sampler = on_host(ODE, wavy) if anywhere == "host" else sv.compiled_sampler(ODE, wavy, SHAPE)
    with pytest.raises(ValueError, match=re.escape(said)):
        sampler(x)
    assert torch.equal(sampler(randn()), sv.run(ODE, wavy, randn()))


@pytest.mark.parametrize("x", [[[1.0]], None, 3], ids=str)
def test_what_is_no_tensor_is_refused_by_name(x, anywhere):
    sampler = on_host(ODE, wavy) if anywhere == "host" else sv.compiled_sampler(ODE, wavy, SHAPE)
    with pytest.raises(TypeError, match=f"x is {type(x).__name__}: expected"):
        sampler(x)


def test_a_stochastic_plan_needs_noise_for_its_batch(anywhere):
    plan = plan_of("ddpm")
    sampler = on_host(plan, wavy) if anywhere == "host" else sv.compiled_sampler(plan, wavy, SHAPE)
    with pytest.raises(ValueError, match="the plan is stochastic and needs noise"):
        sampler(randn())
    with pytest.raises(ValueError, match="noise is for 2 samples, but the batch has 3"):
        sampler(randn(), sv.noise.per_sample(0, range(2)))
    with pytest.raises(ValueError, match=r"noise gave shape \[1, 2, 5\] on cpu in draw 0"):
        sampler(randn(), lambda draw, like: like[:1])
    assert torch.equal(sampler(randn(), 7), sv.run(plan, wavy, randn(), 7))


# With CUDA pretended


class Graph:
    """In the place of torch.cuda.CUDAGraph: replaying runs the captured loop again, into the same memory."""

    capturing = None
    loop = staticmethod(graph.Sampler._loop)
    replays = 0

    def replay(self):
        self.replays += 1
        self.sampler._end.copy_(Graph.loop(self.sampler))


@contextlib.contextmanager
def capture(made, stream):
    Graph.capturing = made
    try:
        yield
    finally:
        Graph.capturing = None


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream)


@pytest.fixture
def pretended(monkeypatch):
    """CUDA's streams and graphs as far as a sampler uses them, for tensors on the CPU."""

    def noted(self, *given, **options):
        if Graph.capturing is not None:
            Graph.capturing.sampler = self
        return Graph.loop(self, *given, **options)

    monkeypatch.setattr(graph, "_has_graphs", lambda x: True)
    monkeypatch.setattr(graph.Sampler, "_loop", noted)
    for name, fake in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": capture,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)


SOURCES = {
    "seed": lambda plan: 11,
    "per_sample": lambda plan: sv.noise.per_sample(11, (4, 0, 9)),
    "generator": lambda plan: generator(11),
    "brownian": lambda plan: sv.noise.brownian(11, (4, 0, 9), plan.half_logsnr),
    "function": lambda plan: lambda draw, like: randn(draw, like.shape, like.dtype),
    "float64": lambda plan: lambda draw, like: randn(draw, like.shape, torch.float64).to(like).double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["ddim", "adams_data_4", "etdrk4", "unipc_angle_4"])
def test_a_replay_is_the_run_of_each_new_start(name, dtype, pretended):
    plan = plan_of(name)
    sampler = sv.compiled_sampler(plan, wavy, SHAPE, dtype)
    assert sampler.captured is True
    ends = [sampler(randn(seed, dtype=dtype)) for seed in range(4)]
    assert sampler._graph.replays == 4
    for seed, end in enumerate(ends):
        assert torch.equal(end, sv.run(plan, wavy, randn(seed, dtype=dtype)))
    assert torch.equal(sampler(randn(0, dtype=dtype)), ends[0])


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", SDES)
def test_a_replay_has_the_noise_of_the_run(name, source, pretended):
    """Of every source; one after the other from a generator, which is where the run would leave it."""
    plan = plan_of(name)
    if source == "brownian" and name in ("ancestral_3s", "seeds_3"):
        plan = plan_of("er_sde_3")  # the others' rows are no steps of one clock
    sampler = sv.compiled_sampler(plan, wavy, SHAPE)
    here, there = SOURCES[source](plan), SOURCES[source](plan)
    for seed in range(3):
        expected = sv.run(plan, wavy, randn(seed), there)
        assert torch.equal(sampler(randn(seed), here), expected)
    if isinstance(here, torch.Generator):
        assert torch.equal(here.get_state(), there.get_state())


@pytest.mark.parametrize("name", [*SDES, "ddim", "churn_heun"])
def test_only_the_draws_that_the_plan_reads_are_made(name, pretended):
    plan = plan_of(name)
    sampler, asked, run_asked = sv.compiled_sampler(plan, wavy, SHAPE), [], []

    def noted(log):
        return lambda draw, like: log.append(draw) or torch.zeros_like(like)

    sampler(randn(), noted(asked))
    sv.run(plan, wavy, randn(), noted(run_asked))
    assert asked == run_asked == plan.c.any(1).nonzero().flatten().tolist()
    assert len(sampler._draws) == len(asked)


def test_the_network_s_own_variance_is_replayed(pretended):
    plan = sv.ddpm(VP, sv.logsnr(VP, 4), variance="learned")
    model = sv.Model(lambda x, t: (wavy(x, t), torch.sin(x)), variance="range")
    sampler = sv.compiled_sampler(plan, model, SHAPE)
    for seed in range(3):
        assert torch.equal(sampler(randn(seed), seed), sv.run(plan, model, randn(seed), seed))


def test_results_share_no_memory_with_one_another_nor_with_x(pretended):
    sampler = sv.compiled_sampler(ODE, wavy, SHAPE)
    x = [randn(seed) for seed in range(3)]
    ends = [sampler(start) for start in x]
    kept = [end.clone() for end in ends]
    ends[1].zero_()
    assert torch.equal(sampler(x[2]), kept[2])
    assert torch.equal(ends[0], kept[0])
    assert torch.equal(x[0], randn(0))
    memory = [t.untyped_storage().data_ptr() for t in (*ends, *x, sampler.x, sampler._end)]
    assert len(set(memory)) == len(memory)


def test_the_network_is_called_when_the_sampler_is_made_alone(pretended):
    """In the warm-ups and the capture, each of them a whole run; what this replays calls it, what CUDA replays does not."""
    calls = []
    sampler = sv.compiled_sampler(ODE, lambda x, t: calls.append(float(t[0])) or wavy(x, t), SHAPE)
    assert calls == ODE.times[:-1].float().tolist() * (graph.WARM_UPS + 1)
    calls.clear()
    sampler(randn())
    assert len(calls) == ODE.nfe


def test_no_gradient_is_kept(pretended):
    weight = torch.ones((), requires_grad=True)
    sampler = sv.compiled_sampler(ODE, lambda x, t: weight * wavy(x, t), SHAPE)
    assert not sampler(randn()).requires_grad


def test_under_inference_mode(pretended):
    with torch.inference_mode():
        sampler = sv.compiled_sampler(ODE, wavy, SHAPE)
        inside = sampler(randn())
    assert torch.equal(inside, sampler(randn()))
    assert torch.equal(inside, sv.run(ODE, wavy, randn()))


def test_an_x_that_requires_a_gradient_is_refused(pretended):
    sampler = sv.compiled_sampler(ODE, wavy, SHAPE)
    with pytest.raises(ValueError, match="x requires a gradient"):
        sampler(randn().requires_grad_())
    assert not sampler.x.requires_grad


def test_a_network_may_edit_its_label(pretended):
    def edits(x, t):
        return wavy(x, t.mul_(10))

    sampler = sv.compiled_sampler(ODE, edits, SHAPE)
    assert torch.equal(sampler(randn()), sv.run(ODE, edits, randn()))


class Broken(nn.Module):
    """A network whose output in one call of each run becomes NaN once it is told to."""

    def __init__(self, call, nfe):
        super().__init__()
        self.call, self.nfe, self.calls, self.broken = call, nfe, 0, False

    def forward(self, x, t):
        out = wavy(x, t)
        if self.broken and self.calls % self.nfe == self.call:
            out[1, 0, 3] = math.nan
        self.calls += 1
        return out


@pytest.mark.parametrize("call", [0, 3, ODE.nfe - 1])
def test_what_is_not_finite_behind_a_replay_is_named_with_its_call(call, pretended):
    net = Broken(call, ODE.nfe)
    sampler = sv.compiled_sampler(ODE, net, SHAPE)
    good = sampler(randn())
    net.broken = True
    with pytest.raises(
        sv.NonFiniteError, match=rf"call {call} of {ODE.rows} .*samples \[1\]; the x it was given is finite"
    ) as caught:
        sampler(randn())
    assert (caught.value.call, caught.value.samples) == (call, [1])
    net.broken = False
    assert torch.equal(sampler(randn()), good)


def test_unchecked_what_is_not_finite_goes_through(pretended):
    net = Broken(2, ODE.nfe)
    sampler = sv.compiled_sampler(ODE, net, SHAPE, check=False)
    net.broken = True
    before = net.calls
    end = sampler(randn())
    assert end[1].isnan().any()
    assert end[[0, 2]].isfinite().all()
    assert net.calls - before == ODE.nfe  # the replay's; nothing is run again


def test_noise_that_is_not_finite_is_not_laid_on_the_network(pretended):
    """In the last row, behind which no output could show it."""
    plan = plan_of("reverse_diffusion")
    last = int(plan.c[:, 0].nonzero()[-1])
    sampler = sv.compiled_sampler(plan, wavy, SHAPE)
    assert last == plan.rows - 1
    with pytest.raises(
        ArithmeticError, match="the samples are not finite, though the outputs were"
    ) as caught:
        sampler(randn(), lambda draw, like: torch.full_like(like, math.nan if draw == last else 0.0))
    assert not isinstance(caught.value, sv.NonFiniteError)


@pytest.mark.parametrize("name", ["adams_data_4", "sa_solver"])
def test_a_network_that_cannot_be_captured_is_run_and_the_driver_is_quoted(name, pretended):
    def reads_back(x, t):
        if Graph.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return wavy(x, t)

    plan = plan_of(name)
    with pytest.warns(UserWarning, match="could not be captured") as caught:
        sampler = sv.compiled_sampler(plan, reads_back, SHAPE)
    assert str(caught[0].message) == (
        "the network could not be captured (CUDA error: operation not permitted when stream is capturing): "
        "the sampler runs the plan call by call"
    )
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert sampler.captured is False
    assert torch.equal(sampler(randn(), 5), sv.run(plan, wavy, randn(), 5))


def test_a_capture_that_the_driver_refuses_at_its_end(pretended, monkeypatch):
    @contextlib.contextmanager
    def refuse(made, stream):
        yield
        raise RuntimeError("CUDA error: capture was invalidated " + "x" * 1000)

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    with pytest.warns(UserWarning, match="capture was invalidated") as caught:
        sampler = sv.compiled_sampler(ODE, wavy, SHAPE)
    assert len(str(caught[0].message)) < 500
    assert sampler.captured is False
    assert torch.equal(sampler(randn()), sv.run(ODE, wavy, randn()))


@pytest.mark.parametrize(
    ("net", "error", "said"),
    [
        (lambda x, t: {}["prompt"], KeyError, "prompt"),
        (lambda x, t: x[:, :1], ValueError, "the model returned shape [3, 1, 5] in call 0 of"),
        (lambda x, t: x.add_(1), ValueError, "the model changed its input x in place in call 0"),
        (lambda x, t: x.new_zeros(3) @ x.new_zeros(4), RuntimeError, "inconsistent tensor size"),
    ],
    ids=["its own", "shape", "in place", "torch's"],
)
def test_errors_of_the_warm_up_come_through(net, error, said, pretended):
    with pytest.raises(error) as caught:
        sv.compiled_sampler(ODE, net, SHAPE)
    assert said in str(caught.value)
    notes = getattr(caught.value, "__notes__", [])
    assert "call 0 of" in " ".join([str(caught.value), *notes])


def test_a_network_in_training_mode_is_warned_of_once(pretended):
    net = nn.Sequential(nn.Linear(5, 5))
    with pytest.warns(UserWarning, match="training mode") as caught:
        sv.compiled_sampler(ODE, Net(net), SHAPE)
    assert (len(caught), caught[0].filename) == (1, __file__)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sv.compiled_sampler(ODE, Net(net).eval(), SHAPE)


class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x)


def test_plans_and_models_that_do_not_fit_are_refused_as_by_run(pretended):
    at_the_end = sv.uniform(sv.Flow(), 4)
    with pytest.raises(ValueError, match="a noise prediction does not determine"):
        sv.compiled_sampler(sv.dpm_solver_pp(sv.Flow(), at_the_end), wavy, SHAPE)
    each = sv.dpm_solver_v3(
        VP, sv.logsnr(VP, 4), statistics=sv.gaussian_statistics(torch.zeros(7), torch.ones(7))
    )
    with pytest.raises(ValueError, match="the plan's coefficients are for elements"):
        sv.compiled_sampler(each, wavy, SHAPE)

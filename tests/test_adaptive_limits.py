"""Limits of adaptive runs: any model ends them within max_nfe; bad input is refused before a call; a failure leaves what there is."""

import contextlib
import functools
import math
import signal

import numpy as np
import pytest
import torch

import solvers as sv
from problems import FULL, VP, Counted, generator, line_model, starts

nan, inf = math.nan, math.inf
X = torch.randn(3, 2, generator=generator(5))
FLOW = sv.Flow()  # alpha = 0 at its start, sigma = 0 at its stop
STATUS = {"done", "max_nfe", "min_step", "non_finite"}


def zero(x, t):
    return torch.zeros_like(x)


def nan_always(x, t):
    return nan * x


def constant(value):
    return lambda x, t: torch.full_like(x, value)


def gaussian(schedule, deviation=0.5):
    """The exact noise prediction of normal data, and where its flow leads; in the dtype of x."""

    def model(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        weight = sigma / (alpha**2 * deviation**2 + sigma**2)
        return weight.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) * x

    def total(t):
        t = torch.tensor(t, dtype=torch.float64)
        return schedule.alpha(t) ** 2 * deviation**2 + schedule.sigma(t) ** 2

    return model, float(torch.sqrt(total(schedule.stop) / total(schedule.start)))


def ode(method, order=None, coupled=False):
    return functools.partial(ode_run, method=method, order=order, coupled=coupled)


def ode_run(model, x, ids=None, **options):
    return sv.adaptive(model, VP, x, **options)


def sde(method):
    return functools.partial(sde_run, method=method)


def sde_run(model, x, ids=None, **options):
    return sv.adaptive_sde(
        model, VP, x, sv.noise.per_sample(0, range(len(x)) if ids is None else ids), **options
    )


PAIRS = [("dpm_solver", 2), ("dpm_solver", 3), ("exponential_rk", 3), ("exponential_rk", 4)]
SDE = {f"sde-{name}": sde(name) for name in ("dpm_solver_pp_sde", "gotta_go_fast")}
EACH = {"adams": ode("adams")} | {f"{name}-{order}": ode(name, order) for name, order in PAIRS}
COUPLED = {"adams-coupled": ode("adams", coupled=True)} | {
    f"{name}-{order}-coupled": ode(name, order, coupled=True) for name, order in PAIRS
}
ALL = EACH | COUPLED | SDE


# Any model


def random(x, t, ids, call):
    return torch.randn(x.shape, generator=generator(call))


ADVERSARIES = {
    "nan": lambda x, t, ids, call: nan * x,
    "nan-below-half": lambda x, t, ids, call: torch.where(t[:, None] < 0.5, nan, 0.1 * x),
    "nan-in-one-sample": lambda x, t, ids, call: torch.where(ids[:, None] == 1, nan, 0.1 * x),
    "inf": lambda x, t, ids, call: x + inf,
    "random": random,
    "zero": lambda x, t, ids, call: 0 * x,
    "1e30": lambda x, t, ids, call: 0 * x + 1e30,
    "sign-flips": lambda x, t, ids, call: 0 * x + (-1) ** call,
    "stiff": lambda x, t, ids, call: 1e6 * x,
    "stiff-outwards": lambda x, t, ids, call: -1e6 * x,
    "jump": lambda x, t, ids, call: 0 * x + (t[:, None] > 0.4),
}


ENDLESS = {"nan-below-half", "random", "sign-flips", "stiff", "stiff-outwards"}


class Adversary:
    """A model that recognises its samples: their first element carries a tag, x = alpha tag, as its noise prediction there is 0.

    Attributes:
        asked: how often for each sample. calls: how often at all. sizes: of the batches.
    """

    def __init__(self, answer, samples=3):
        self.answer, self.asked, self.sizes = answer, torch.zeros(samples, dtype=torch.long), []

    @property
    def calls(self):
        return len(self.sizes)

    @staticmethod
    def tagged(x, start=VP.start):
        alpha = VP.alpha(torch.tensor(start, dtype=torch.float64))
        return torch.cat([(alpha * 10 ** (4 + 3.0 * torch.arange(len(x)))).to(x)[:, None], x], 1)

    def __call__(self, x, t):
        place = (torch.log10(x[:, 0].double() / VP.alpha(t.double())) - 4) / 3
        ids = place.round().long()
        assert (place - ids).abs().max() < 0.35, place
        assert len(set(ids.tolist())) == len(ids)
        self.asked[ids] += 1
        self.sizes.append(len(x))
        noise = torch.zeros_like(x)
        noise[:, 1:] = self.answer(x[:, 1:], t, ids, self.calls)
        return noise


def check_solution(solution, x, most):
    """What holds however a run has ended."""
    assert set(solution.status) <= STATUS
    assert solution.nfe.max() <= most
    assert solution.x.shape == x.shape
    assert solution.x.isfinite().all()
    for i, (times, status) in enumerate(zip(solution.times, solution.status, strict=True)):
        assert times.isfinite().all()
        assert (times.diff() < 0).all()
        assert times[0] == VP.start
        assert len(times) == len(solution.orders[i]) + 1
        assert (times[-1] == VP.stop) == (status == "done")
        if len(times) == 1:
            assert torch.equal(solution.x[i], x[i])


def ended(go, x, most):
    """The solution of a run, or of its NonConvergence."""
    error = None
    try:
        solution = go(x=x, max_nfe=most)
    except sv.NonConvergence as caught:
        error, solution = caught, caught.solution
    late = [i for i, status in enumerate(solution.status) if status != "done"]
    assert late == (error.samples if error else [])
    for i in late[:1]:
        parts = (
            f"{len(late)} of {len(x)} samples did not arrive. Sample {i} came to t = {solution.times[i][-1]:g} with ",
            f" with {solution.nfe[i]} calls and {solution.rejected[i]} rejected steps",
            f"an error of {solution.error[i]:.3g} times the tolerance",
        )
        assert [part for part in parts if part not in str(error)] == [], str(error)
    check_solution(solution, x, most)
    return solution


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if "coupled" in name else name for name in ALL]
)
@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_any_model_ends_any_method_within_max_nfe(adversary, method):
    net, most = Adversary(ADVERSARIES[adversary]), 14 if adversary in ENDLESS else 60
    solution = ended(functools.partial(ALL[method], net), Adversary.tagged(X), most)
    assert torch.equal(net.asked, solution.nfe)  # as the model has counted them
    assert sum(net.sizes) == solution.nfe.sum()
    assert net.calls <= 2 * most
    if adversary in ("nan", "inf"):
        assert solution.status == ["non_finite"] * 3
        assert solution.nfe.max() < 50  # it gives up before
    if adversary.startswith(("nan-below", "stiff")):
        assert "done" not in solution.status
    if adversary in ("zero", "jump") and method not in SDE:
        assert solution.status == ["done"] * 3


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("adversary", ["nan", "nan-in-one-sample", "sign-flips"])
def test_on_limit_return_gives_the_solution_of_the_exception(adversary, method):
    x = Adversary.tagged(X)
    raised = ended(functools.partial(ALL[method], Adversary(ADVERSARIES[adversary])), x, 12)
    returned = ALL[method](Adversary(ADVERSARIES[adversary]), x, max_nfe=12, on_limit="return")
    assert torch.equal(raised.x, returned.x)
    assert raised.status == returned.status
    assert all(map(torch.equal, raised.times, returned.times))
    for name in ("nfe", "rejected"):
        assert torch.equal(getattr(raised, name), getattr(returned, name))


@pytest.mark.parametrize("method", EACH | SDE)
@pytest.mark.parametrize("bad", ["nan", "1e30", "random"])
def test_one_bad_sample_leaves_the_others_as_they_are_without_it(bad, method):
    def answer(x, t, ids, call):
        good = 0.5 * torch.sin(x) / (1 + t[:, None])
        return torch.where(ids[:, None] == 1, ADVERSARIES[bad](x, t, ids, call), good)

    go = functools.partial(ALL[method], start=0.4, rtol=0.2, max_nfe=50, on_limit="return")
    x, others = Adversary.tagged(X, 0.4), [0, 2]
    together, without = go(Adversary(answer), x), go(Adversary(answer), x[others], ids=others)
    assert [together.status[i] for i in others] == without.status == ["done", "done"]
    assert torch.equal(together.x[others], without.x)
    assert torch.equal(together.nfe[others], without.nfe)
    assert all(torch.equal(together.times[i], times) for i, times in zip(others, without.times, strict=True))
    if bad == "nan":
        assert together.status[1] == "non_finite"


@pytest.mark.parametrize("method", COUPLED)
def test_one_bad_sample_holds_up_the_others_it_is_coupled_with(method):
    solution = ended(
        functools.partial(ALL[method], Adversary(ADVERSARIES["nan-in-one-sample"])), Adversary.tagged(X), 60
    )
    assert solution.status == ["non_finite"] * 3
    assert len(set(solution.nfe.tolist())) == 1


@pytest.mark.parametrize("method", ALL)
def test_a_finite_model_is_not_said_to_be_non_finite(method):
    solution = ALL[method](constant(1e30), X.double(), max_nfe=30, on_limit="return")
    assert "non_finite" not in solution.status


@pytest.mark.parametrize("method", EACH)
def test_a_constant_prediction_of_any_size_is_integrated(method):
    for size in (1e-30, 1e12):
        assert ALL[method](constant(size), X.double()).status == ["done"] * 3


@pytest.mark.parametrize("method", EACH | SDE)
def test_a_first_step_below_rounding_is_no_step_of_no_length(method):
    solution = ALL[method](gaussian(VP)[0], X, first_step=1e-25, max_nfe=30, on_limit="return")
    assert "non_finite" not in solution.status
    assert all((times.diff() < 0).all() for times in solution.times)


@pytest.mark.parametrize("most", [1, 2, 3, 4, 6, 9])
@pytest.mark.parametrize("method", ALL)
def test_max_nfe_is_never_exceeded_by_a_stage(method, most):
    net = Counted(gaussian(VP)[0])
    solution = ALL[method](net, X[:1], max_nfe=most, on_limit="return")
    assert len(net.times) == solution.nfe <= most


# Bad input


def row(name, make, error, *parts):
    """`make(net)` must raise `error` with every one of `parts` in its message."""
    return pytest.param(make, error, parts, id=name)


def ask(error, *parts, x=X, schedule=VP, **options):
    """Rows of both `adaptive` and `adaptive_sde`."""
    name = " ".join(f"{k}={v!r:.20}" for k, v in options.items()).replace("\n", " ")
    return (
        row(f"adaptive {name}", lambda net: sv.adaptive(net, schedule, x, **options), error, *parts),
        row(f"sde {name}", lambda net: sv.adaptive_sde(net, schedule, x, 0, **options), error, *parts),
    )


def only(error, *parts, x=X, schedule=VP, **options):
    return ask(error, *parts, x=x, schedule=schedule, **options)[0]


def of_sde(error, *parts, noise=0, schedule=VP, **options):
    name = f"sde noise={type(noise).__name__} " + " ".join(f"{k}={v!r:.20}" for k, v in options.items())
    return row(name, lambda net: sv.adaptive_sde(net, schedule, X, noise, **options), error, *parts)


def of_ode(error, *parts, x=X, schedule=VP, **options):
    name = "odeint " + " ".join(f"{k}={v!r:.30}" for k, v in options.items())
    return row(name, lambda net: sv.odeint(net, schedule, x, **options), error, *parts)


def of_torchsde(error, *parts, x=X, schedule=VP, **options):
    name = "sdeint " + " ".join(f"{k}={v!r:.30}" for k, v in options.items())
    return row(name, lambda net: sv.sdeint(net, schedule, x, **({"noise": 0} | options)), error, *parts)


def of_x(name, x, error, *parts):
    return tuple(
        row(f"{go} x {name}", make, error, *parts)
        for go, make in (
            ("adaptive", lambda net: sv.adaptive(net, VP, x)),
            ("sde", lambda net: sv.adaptive_sde(net, VP, x, 0)),
            ("odeint", lambda net: sv.odeint(net, VP, x)),
            ("sdeint", lambda net: sv.sdeint(net, VP, x, 0)),
        )
    )


FROM_0 = "expected a finite number from 0"
ABOVE_0 = "expected a finite number above 0"
DOUBLE = "torch.float32 cannot keep less (pass x.double()"
ADVICE = "a time with alpha > 0 and sigma > 0", "with method='adams' and predicts='velocity'"
CAP = "expected a whole number from 1 to 1000000000"

# fmt: off
NOT_CALLED = [
    # tolerances: 61, 62, 63, 67
    *ask(ValueError, "rtol = 0.0, atol = 0.0", "1.2e-05", "from 1.2e-05 on, e.g. rtol=1e-3, atol=1e-3", rtol=0.0, atol=0.0),
    *ask(ValueError, "rtol = -0.1", FROM_0, rtol=-0.1),
    *ask(ValueError, "atol = -1e-09", FROM_0, atol=-1e-9),
    *ask(ValueError, "rtol = nan", FROM_0, rtol=nan),
    *ask(ValueError, "atol = nan", FROM_0, atol=nan),
    *ask(ValueError, "rtol = inf", FROM_0, rtol=inf),
    *ask(ValueError, "atol = -inf", FROM_0, atol=-inf),
    *ask(TypeError, "rtol = '0.1'", "expected a real number", rtol="0.1"),
    *ask(TypeError, "atol = b'1'", "expected a real number", atol=b"1"),
    *ask(TypeError, "rtol = True", "expected a real number", rtol=True),
    *ask(TypeError, "atol = None", "expected a real number", atol=None),
    *ask(TypeError, "atol = [0.1]", "expected a real number", atol=[0.1]),
    *ask((TypeError, ValueError), "rtol = tensor", "expected a real number", rtol=torch.full((3,), 0.1)),
    *ask((TypeError, ValueError), "atol = tensor", "expected a real number", atol=torch.full((3, 2), 0.1)),
    *ask(TypeError, "rtol = tensor(1.+1.j)", "expected a real number", rtol=torch.tensor(1 + 1j)),
    *ask(ValueError, "rtol = 1e-05, atol = 1e-06", "1.2e-05", DOUBLE, rtol=1e-5, atol=1e-6),
    *ask(ValueError, "rtol = 0, atol = 1.19e-05", "1.2e-05", DOUBLE, rtol=0, atol=1.19e-5),
    *ask(ValueError, "torch.float32 cannot keep less", x=X.bfloat16(), rtol=1e-6, atol=1e-6),
    *ask(ValueError, "rtol = 1e-14, atol = 0", "2.2e-14", x=X.double(), rtol=1e-14, atol=0),
    # orders: 7
    *(only(ValueError, f"order = {order}", "whole number from 1 to 8", order=order) for order in (0, -1, 9)),
    *(only(TypeError, f"order = {order!r}", "whole number from 1 to 8", order=order) for order in (2.0, True, "3", [3], nan)),
    *(only(ValueError, f"order = {order}", "method = 'dpm_solver'", "[2, 3]", method="dpm_solver", order=order) for order in (0, 1, 4)),
    *(only(ValueError, f"order = {order}", "method = 'exponential_rk'", "[3, 4]", method="exponential_rk", order=order) for order in (2, 5)),
    *(only((TypeError, ValueError), f"order = {order!r}", "expected", method="dpm_solver", order=order) for order in (2.0, "3", [3], True)),
    # names: 17
    *ask(ValueError, "method = 'euler'", "expected one of", method="euler"),
    *ask(ValueError, "method = None", "expected one of", method=None),
    *ask(ValueError, "method = ['adams']", "expected one of", method=["adams"]),
    *ask(ValueError, "on_limit = 'ignore'", "'raise', 'return'", on_limit="ignore"),
    *ask(ValueError, "on_limit = None", "'raise', 'return'", on_limit=None),
    *ask(TypeError, "toll", toll=0.1),
    only(ValueError, "predicts = 'eps'", "'noise', 'data', 'velocity'", predicts="eps"),
    only(ValueError, "predicts = ''", "'noise', 'data', 'velocity'", predicts=""),
    only(ValueError, "predicts = 0", "'noise', 'data', 'velocity'", predicts=0),
    # scale: 18
    only(ValueError, "scale = 2", "no use with predicts = 'data'", "predicts='velocity'", predicts="data", scale=2.0),
    only(ValueError, "scale = 2", "no use with predicts = 'noise'", method="dpm_solver", scale=2.0),
    *(only(ValueError, f"scale = {scale}", ABOVE_0, scale=scale) for scale in (0.0, -1.0, nan, inf)),
    only(TypeError, "scale = '2'", "expected a real number", scale="2"),
    # first_step, max_nfe, steps: 64, 65, 66
    *(r for step in (0, 0.0, -0.1, nan, inf) for r in ask(ValueError, f"first_step = {step}", ABOVE_0, first_step=step)),
    *(r for step in ("0.1", True) for r in ask(TypeError, f"first_step = {step!r}", "expected a real number", first_step=step)),
    *(r for most in (0, -5, 10**9 + 1) for r in ask(ValueError, f"max_nfe = {most}", CAP, max_nfe=most)),
    *(r for most in (2.5, 100.0, True, "100", None, inf) for r in ask(TypeError, f"max_nfe = {most!r}", CAP, max_nfe=most)),
    *ask(TypeError, "steps", steps=10),
    # ends: 13, 15, 21
    *ask(ValueError, "t = 1.5", "range [0, 1]", start=1.5),
    *ask(ValueError, "t = -0.1", "range [0, 1]", stop=-0.1),
    *ask(ValueError, "0.5", "0.7", "Inversion", start=0.5, stop=0.7),
    *ask(ValueError, "nan", "must be finite", start=nan),
    *ask(ValueError, "nan", "must be finite", start=nan, stop=nan),
    *ask(ValueError, "t = 7", "range [0, 1]", start=7.0, stop=7.0),
    *ask(ValueError, "0.49999999999999994", "more than rounding", start=0.5, stop=math.nextafter(0.5, 0)),
    *ask(TypeError, "start = '1'", "expected a real number", start="1"),
    *ask(TypeError, "stop = True", "expected a real number", stop=True),
    # ends with alpha = 0 or sigma = 0: 22, 23
    *(
        only(ValueError, *ADVICE, end, "half log-SNR is infinite there", schedule=FLOW, **options)
        for options in ({"method": "dpm_solver"}, {"method": "exponential_rk"}, {"predicts": "noise"}, {"predicts": "data"})
        for end, options in (("start = 1:", options), ("stop = 0:", options | {"start": 0.9}))
    ),
    only(ValueError, "a noise prediction does not determine velocity at t = 1", schedule=FLOW),
    *(
        of_sde(ValueError, end, "alpha > 0 and sigma > 0", schedule=FLOW, method=method, **options)
        for method in ("dpm_solver_pp_sde", "gotta_go_fast")
        for end, options in (("start = 1", {}), ("start = 1", {"stop": 0.1}), ("stop = 0", {"start": 0.9}))
    ),
    # x: 33 to 37, 39 to 41
    *of_x("int", X.long(), TypeError, "x has dtype torch.int64", "x.float()"),
    *of_x("bool", X > 0, TypeError, "x has dtype torch.bool", "x.float()"),
    *of_x("complex", X + 0j, TypeError, "x has dtype torch.complex64"),
    *of_x("nan", torch.tensor([[0.0, 0.0], [0.0, nan]]), ValueError, "x[1, 1] = nan", "must be finite"),
    *of_x("inf", torch.tensor([[-inf]]), ValueError, "x[0, 0] = -inf", "must be finite"),
    *of_x("0-dim", torch.tensor(1.0), ValueError, "x has no batch dimension", "x[None]"),
    *of_x("numpy", X.numpy(), TypeError, "x is ndarray", "torch.from_numpy(x)"),
    *of_x("list", [[1.0]], TypeError, "x is list"),
    *of_x("None", None, TypeError, "x is NoneType"),
    *of_x("sparse", X.to_sparse(), TypeError, "sparse", "expected a dense tensor"),
    *of_x("meta", X.to("meta"), TypeError, "on meta", "expected a dense tensor"),
    *of_x("grad", X.clone().requires_grad_(), ValueError, "x requires a gradient", "x.detach()"),
    # the model: 51
    *(
        row(f"{go.__name__} model None", lambda net, go=go, noise=noise: go(None, VP, X, *noise), TypeError, "model = None is not callable")
        for go, noise in ((sv.adaptive, ()), (sv.adaptive_sde, (0,)), (sv.odeint, ()), (sv.sdeint, (0,)))
    ),
    # noise: 55 to 59
    row("sde without noise", lambda net: sv.adaptive_sde(net, VP, X), TypeError, "missing 1 required positional argument: 'noise'"),
    of_sde(TypeError, "noise is Generator", "an int seed or noise.per_sample(seed, ids)", noise=generator()),
    of_sde(TypeError, "noise is function", "an int seed or noise.per_sample(seed, ids)", noise=lambda draw, like: like),
    of_sde(TypeError, "noise is Brownian", "noise.per_sample(seed, ids)", noise=sv.noise.brownian(0, range(3), torch.linspace(0, 1, 3).double())),
    of_sde(TypeError, "noise is NoneType", "expected an int seed", noise=None),
    of_sde(TypeError, "noise is Tensor", "expected an int seed", noise=X),
    of_sde(ValueError, "noise is for 2 samples, but the batch has 3", noise=sv.noise.per_sample(0, [4, 2])),
    of_sde(ValueError, "seed = -1", "from 0 to", noise=-1),
    of_sde(TypeError, "seed = 1.5", "whole number", noise=1.5),
    of_sde(TypeError, "seed = True", "whole number", noise=True),
    of_sde(TypeError, "seed = 'a'", "whole number", noise="a"),
    of_sde(ValueError, f"seed = {2**63}", "from 0 to", noise=2**63),
    *(of_sde(ValueError, f"eta = {eta}", FROM_0, eta=eta) for eta in (-1.0, -1e-9, nan, inf)),
    of_sde(TypeError, "eta = '1'", "expected a real number", eta="1"),
    of_sde(ValueError, "from data to noise", "encode with an ODE method", schedule=sv.Inversion(VP)),
    of_sde(ValueError, "from data to noise", "encode with an ODE method", schedule=sv.Inversion(VP), method="gotta_go_fast"),
    of_sde(TypeError, "coupled", coupled=True),
    of_sde(TypeError, "dense", dense=True),
    # odeint
    of_ode(ValueError, "method = 'dopri6'", "'dopri8', 'dopri5'", method="dopri6"),
    of_ode(ValueError, "frist_step", "dopri5 does not know them all", options={"frist_step": 0.1}),
    of_ode(ValueError, "frist_step", "rk4 does not know them all", method="rk4", options={"step_size": 0.1, "frist_step": 0.1}),
    *(of_ode(ValueError, f"method = '{method}' has fixed steps", "options={'step_size': 0.00999}", method=method) for method in ("rk4", "euler", "midpoint", "explicit_adams", "implicit_adams")),
    *(of_ode(ValueError, "t = 1", f"{variable} is infinite there", "alpha > 0 and sigma > 0", "variable='t'", schedule=FLOW, variable=variable) for variable in ("half_logsnr", "sigma")),
    of_ode(ValueError, "t = 0", "half_logsnr is infinite there", schedule=FLOW, variable="half_logsnr", start=0.9),
    of_ode(ValueError, "variable = 'lambda'", "did you mean 'half_logsnr'?", variable="lambda"),
    *(of_ode(ValueError, f"{name} = {value}", ABOVE_0, **{name: value}) for name in ("rtol", "atol") for value in (0.0, -1.0, nan, inf)),
    of_ode(TypeError, "rtol = '1'", "expected a real number", rtol="1"),
    of_ode(ValueError, "max_nfe = 0", CAP, max_nfe=0),
    of_ode(TypeError, "max_nfe = 2.5", CAP, max_nfe=2.5),
    of_ode(ValueError, "t = 1.5", "range [0, 1]", start=1.5),
    of_ode((TypeError, ValueError), "options", "[1]", options=[1]),
    of_ode(ValueError, "step_size", "-0.1", method="rk4", options={"step_size": -0.1}),
    of_ode(TypeError, "steps", steps=10),
    # sdeint
    of_torchsde(ValueError, "sdeint needs noise", "noise=0", noise=None),
    of_torchsde(ValueError, "noise = -1", "from 0 to", "noise=0", noise=-1),
    of_torchsde(TypeError, "noise = 1.5", "whole number", noise=1.5),
    of_torchsde(TypeError, "torch._C.Generator", "whole number", noise=generator()),
    of_torchsde(ValueError, "method = 'heun'", "'euler', 'milstein', 'srk'", method="heun"),
    *(of_torchsde(ValueError, "t from 0.001 to 1 is from data to noise", "encode with odeint", schedule=sv.Inversion(VP), variable=variable) for variable in ("t", "half_logsnr", "sigma")),
    of_torchsde(ValueError, "steps = 0", "whole number", steps=0),
    of_torchsde(TypeError, "steps = 2.5", "whole number", steps=2.5),
    of_torchsde(ValueError, "eta = -1", FROM_0, eta=-1),
    of_torchsde(ValueError, "t = 1", "half_logsnr is infinite there", schedule=FLOW, variable="half_logsnr"),
    of_torchsde(ValueError, "rtol = 0", ABOVE_0, rtol=0.0),
    of_torchsde(ValueError, "max_nfe = 0", CAP, max_nfe=0),
    of_torchsde(ValueError, "options", "grad_fre", method="milstein", options={"grad_fre": True}, steps=3),
]
# fmt: on


@pytest.mark.parametrize(("make", "error", "parts"), NOT_CALLED)
def test_refused_before_the_model_is_called(make, error, parts):
    net = Counted(zero)
    with pytest.raises(error) as caught:
        make(net)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert len(message) < 500
    assert not isinstance(caught.value, sv.NonConvergence)
    assert net.times == []


def runs_of(options):
    """Every way to solve, with options that all of them have."""
    return {
        "adaptive": lambda net, x: sv.adaptive(net, VP, x, **options),
        "pair": lambda net, x: sv.adaptive(net, VP, x, method="exponential_rk", **options),
        "sde": lambda net, x: sv.adaptive_sde(net, VP, x, 0, **options),
        "gotta_go_fast": lambda net, x: sv.adaptive_sde(net, VP, x, 0, method="gotta_go_fast", **options),
        "odeint": lambda net, x: sv.odeint(net, VP, x, **options),
        "sdeint": lambda net, x: sv.sdeint(net, VP, x, 0, steps=5, **options),
    }


RUNS = list(runs_of({}))


@pytest.mark.parametrize("go", RUNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_empty_batch_and_a_way_of_no_length_are_no_calls(go, dtype):
    net, x = Counted(zero), X.to(dtype)
    empty = runs_of({})[go](net, x[:0])
    still = runs_of({"start": 0.5, "stop": 0.5})[go](net, x)
    assert net.times == []
    expected = dtype if dtype == torch.float64 else torch.float32
    assert (empty.x.shape, empty.x.dtype, empty.status) == ((0, 2), expected, [])
    assert torch.equal(still.x, x.to(expected))
    assert still.x.data_ptr() != x.data_ptr()
    assert (still.status, still.nfe.tolist(), still.rejected.tolist()) == (["done"] * 3, [0] * 3, [0] * 3)
    assert [times.tolist() for times in still.times] == [[0.5]] * 3


@pytest.mark.parametrize("go", RUNS)
@pytest.mark.parametrize("shape", [(3,), (3, 0), (2, 3, 1, 2)])
def test_a_batch_of_any_shape_is_run(go, shape):
    x = torch.randn(*shape, generator=generator(1))
    solution = runs_of({"start": 0.1})[go](zero, x)
    assert solution.x.shape == x.shape
    assert solution.status == ["done"] * len(x)


def failing(x, t):
    raise KeyError("inner")


WRONG = {
    "None": (lambda x, t: None, "NoneType"),
    "tuple": (lambda x, t: (x, x), "tuple"),
    "dict": (lambda x, t: {"sample": x}, "dict"),
    "another shape": (lambda x, t: x[:, :1], "[3, 1]"),
    "one sample": (lambda x, t: x[:1], "[1, 2]"),
    "no batch": (lambda x, t: x[0], "[2]"),
    "a number": (lambda x, t: x.sum(), "[]"),
    "int": (lambda x, t: x.long(), "torch.int64"),
    "complex": (lambda x, t: x.cfloat(), "torch.complex64"),
    "another device": (lambda x, t: x.to("meta"), "on meta"),
}


@pytest.mark.parametrize("go", RUNS)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_output_is_refused_at_the_first_call(wrong, go):
    answer, came = WRONG[wrong]
    net = Counted(answer)
    with pytest.raises((TypeError, ValueError)) as caught:
        runs_of({})[go](net, X)
    message = str(caught.value)
    assert [
        part for part in (came, "at t = 1", "expected floating point [3, 2]") if part not in message
    ] == [], message
    assert len(net.times) == 1


@pytest.mark.parametrize("go", RUNS)
def test_a_model_s_own_error_gets_a_note_of_the_time(go):
    for x in (X, X.bfloat16()):
        with pytest.raises(KeyError, match="inner") as caught:
            runs_of({})[go](failing, x)
        assert caught.value.__notes__ == [f"raised by the model at t = 1; it was called with x in {x.dtype}"]
        assert caught.traceback[-1].name == "failing"


# What a run leaves as it was


@pytest.mark.parametrize("go", RUNS)
def test_x_is_not_changed_nor_shared_and_no_graph_is_kept(go):
    def editing(x, t):
        x += 1
        return torch.nn.Parameter(0 * x)

    for x in (X, X.double()):
        before, run = x.clone(), runs_of({"start": 0.2})[go]
        with torch.enable_grad():
            solution = run(editing, x)
        assert torch.equal(x, before)
        assert not solution.x.requires_grad
        assert solution.x.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert torch.equal(solution.x, run(zero, x).x)  # nor is it changed by the model


def surroundings():
    name, keys, *place = np.random.get_state()  # noqa: NPY002
    return (
        torch.get_rng_state().tolist(),
        name,
        keys.tolist(),
        place,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("go", RUNS)
def test_random_states_default_dtype_and_grad_mode_are_left_alone(go, grad):
    try:
        torch.set_default_dtype(torch.float64 if grad else torch.float32)
        with torch.set_grad_enabled(grad):
            before = surroundings()
            for net, options in (
                (zero, {"start": 0.1}),
                (failing, {}),
                (nan_always, {}),
                (zero, {"max_nfe": 3}),
                (zero, {"rtol": -1.0}),
            ):
                with contextlib.suppress(KeyError, ValueError, sv.NonConvergence):
                    runs_of(options)[go](net, X)
                assert surroundings() == before
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("go", EACH | SDE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_network_s_alone_and_arrives(dtype, go):
    model, factor = gaussian(VP)
    seen = set()

    def net(x, t):
        seen.add((x.dtype, t.dtype))
        return model(x, t)

    x = torch.randn(2, 1000, generator=generator(7)).to(dtype)
    solution = ALL[go](net, x)
    assert seen == {(dtype, torch.float32)}
    assert solution.x.dtype == torch.float32
    assert solution.status == ["done"] * 2
    if go in EACH:
        exact = ALL[go](model, x.double())
        assert exact.x.dtype == torch.float64
        error = (solution.x - exact.x).square().mean().sqrt()
        assert error < 3 * 0.05 * exact.x.square().mean().sqrt()  # three times the default rtol
    assert abs(solution.x.std() - factor) < 0.06


@pytest.mark.parametrize("go", EACH)
def test_float32_keeps_the_tolerance(go):
    model, factor = gaussian(VP)
    single = ALL[go](model, X, rtol=1e-3, atol=1e-3).x
    double = ALL[go](model, X.double(), rtol=1e-3, atol=1e-3).x
    assert single.dtype == torch.float32
    assert (single - double).abs().max() < 1e-3
    assert (single - factor * X).abs().max() < 3e-3


# The batch


@pytest.mark.parametrize("go", EACH | SDE)
def test_samples_that_have_arrived_leave_the_batch(go):
    x = starts("line", FULL, 16)
    sizes, model = [], line_model(VP)

    def net(x, t):
        sizes.append(len(x))
        return model.net(x, t) if (t == t[0]).all() else each(x, t)

    def each(x, t):
        return torch.cat([model.net(a[None], b[None]) for a, b in zip(x, t, strict=True)])

    tolerance = 1e-3 if go in EACH else 0.1
    solution = ALL[go](sv.Model(net, "velocity"), x, rtol=tolerance, atol=tolerance)
    assert solution.status == ["done"] * 16
    assert len(set(solution.nfe.tolist())) > 1
    assert sum(sizes) == solution.nfe.sum()
    assert sizes[0] == 16 > sizes[-1]
    assert max(sizes[-3:]) < 16
    if go in ("adams", "sde-dpm_solver_pp_sde"):  # which ask once for all in each step
        assert sizes == sorted(sizes, reverse=True)
        assert len(sizes) == solution.nfe.max()


# What a solution refuses


@pytest.fixture(scope="module")
def solution():
    return sv.adaptive(gaussian(VP)[0], VP, X, dense=True)


# fmt: off
REPLAYED = [
    *(row(type(wrong).__name__, lambda s, w=wrong: sv.replay(w), TypeError, f"solution is {type(wrong).__name__}", "adaptive(model, schedule, x)") for wrong in (X, None, sv.ddim(VP, [1.0, 0.5]))),
    *(row(f"sample {i}", lambda s, i=i: sv.replay(s, i), ValueError, f"sample = {i}", "from 0 to 2") for i in (3, -1)),
    *(row(f"sample {i!r}", lambda s, i=i: sv.replay(s, i), TypeError, f"sample = {i!r}", "from 0 to 2") for i in (1.0, True, "0", None)),
    *(row(f"of {go}", lambda s, go=go: sv.replay(runs_of({"start": 0.01})[go](zero, X)), ValueError, "only the steps of `adaptive` are those of a plan", "not of odeint, sdeint or adaptive_sde") for go in RUNS[2:]),
    row("no way", lambda s: sv.replay(sv.adaptive(zero, VP, X, start=0.5, stop=0.5), 1), ValueError, "sample 1 took no step", "'done'"),
    row("no call", lambda s: sv.replay(sv.adaptive(zero, VP, X, max_nfe=1, on_limit="return"), 2), ValueError, "sample 2 took no step", "'max_nfe'"),
    row("no finite output", lambda s: sv.replay(sv.adaptive(nan_always, VP, X, method="dpm_solver", on_limit="return")), ValueError, "sample 0 took no step", "'non_finite'"),
]
AT = [
    row("not dense", lambda s: sv.adaptive(zero, VP, X).at(0.5), ValueError, "no points", "adaptive(..., dense=True)"),
    *(row(f"of {go}", lambda s, go=go: runs_of({"start": 0.01})[go](zero, X).at(0.005), ValueError, "no points", "dense=True") for go in RUNS[2:]),
    *(row(f"t = {t}", lambda s, t=t: s.at(t), ValueError, f"t = {t:g}", "sample 0 has been from 1 to 0.001") for t in (1.5, 0.0, -1.0, nan, inf, -inf)),
    *(row(f"t = {t!r}", lambda s, t=t: s.at(t), TypeError, f"t = {t!r}", "expected a real number") for t in ("0.5", True, None)),
    row("two times", lambda s: s.at(torch.tensor([0.5, 0.4])), (TypeError, ValueError), "t = tensor", "expected a real number"),
    row("where it did not come", lambda s: sv.adaptive(zero, VP, X, max_nfe=3, on_limit="return", dense=True).at(0.001), ValueError, "t = 0.001", "sample 0 has been from 1 to"),
    row("no way", lambda s: sv.adaptive(zero, VP, X, start=0.5, stop=0.5, dense=True).at(0.4), ValueError, "t = 0.4", "from 0.5 to 0.5"),
]
# fmt: on


@pytest.mark.parametrize(("make", "error", "parts"), [*REPLAYED, *AT])
def test_refused_by_replay_and_at(make, error, parts, solution):
    with pytest.raises(error) as caught:
        make(solution)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


# torchdiffeq and torchsde


def late_nan(x, t):
    return torch.where(t[:, None] < 0.5, nan, 0 * x)


@pytest.mark.parametrize("variable", ["t", "half_logsnr", "sigma"])
@pytest.mark.parametrize(
    ("model", "most", "status"),
    [
        pytest.param(nan_always, 1000, {"non_finite"}, id="nan"),
        pytest.param(constant(inf), 1000, {"non_finite"}, id="inf"),
        pytest.param(late_nan, 1000, {"non_finite"}, id="nan below half"),
        pytest.param(constant(1e38), 1000, {"min_step", "non_finite"}, id="1e38"),
        pytest.param(lambda x, t: 1e6 * x, 100, {"max_nfe"}, id="stiff"),
        pytest.param(zero, 10, {"max_nfe"}, id="max_nfe 10"),
        pytest.param(zero, 1, {"max_nfe"}, id="max_nfe 1"),
    ],
)
def test_torchdiffeq_s_failures_are_non_convergence(model, most, status, variable):
    net = Counted(model)
    with pytest.raises(sv.NonConvergence, match=f"torchdiffeq's dopri5 in {variable} came to t = ") as caught:
        sv.odeint(net, VP, X, variable=variable, max_nfe=most)
    error, solution = caught.value, caught.value.solution
    assert error.__cause__ is not None
    assert error.samples == [0, 1, 2]
    assert len(set(solution.status)) == 1
    assert set(solution.status) <= status
    assert solution.nfe.tolist() == [len(net.times)] * 3
    assert len(net.times) <= most
    assert f"{len(net.times)} calls" in str(error)
    assert solution.x.isfinite().all()
    times = solution.times[0]
    assert times[0] == VP.start
    assert (times.diff() < 0).all()
    if len(times) == 1:
        torch.testing.assert_close(solution.x, X)


@pytest.mark.parametrize("method", ["rk4", "euler", "midpoint", "explicit_adams"])
@pytest.mark.parametrize(
    "model", [nan_always, late_nan, constant(1e38)], ids=["nan", "nan below half", "1e38"]
)
def test_a_result_of_fixed_steps_that_is_not_finite_is_not_done(model, method):
    with pytest.raises(sv.NonConvergence, match="torchdiffeq") as caught:
        sv.odeint(model, VP, X, method=method, options={"step_size": 0.1})
    assert caught.value.solution.status == ["non_finite"] * 3


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize(
    ("model", "most", "status"),
    [
        pytest.param(nan_always, 1000, {"non_finite"}, id="nan"),
        pytest.param(late_nan, 1000, {"non_finite", "min_step"}, id="nan below half"),
        pytest.param(constant(1e38), 1000, {"non_finite", "min_step", "max_nfe"}, id="1e38"),
        pytest.param(zero, 5, {"max_nfe"}, id="max_nfe 5"),
    ],
)
def test_torchsde_s_failures_are_non_convergence(model, most, status, adaptive):
    net = Counted(model)
    with pytest.raises(sv.NonConvergence, match="torchsde's euler in t gave up after") as caught:
        sv.sdeint(net, VP, X, 0, steps=10, adaptive=adaptive, max_nfe=most)
    error, solution = caught.value, caught.value.solution
    assert (error.__cause__ is not None) == (adaptive or most == 5)
    assert error.samples == [0, 1, 2]
    assert len(set(solution.status)) == 1
    assert set(solution.status) <= status
    assert solution.nfe.tolist() == [len(net.times)] * 3
    assert len(net.times) <= most
    if error.__cause__ is not None:
        assert torch.equal(solution.x, X)
        assert [times.tolist() for times in solution.times] == [[VP.start]] * 3


@contextlib.contextmanager
def seconds(limit):
    """At most."""

    def late(number, frame):
        raise TimeoutError(f"more than {limit} s")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("variable", ["t", "half_logsnr", "sigma"])
@pytest.mark.parametrize("steps", [7, 100])
def test_equal_steps_of_torchsde_are_as_many_as_asked_for(variable, steps):
    with seconds(3):
        solution = sv.sdeint(zero, VP, X, 0, steps=steps, variable=variable)
    assert solution.nfe.tolist() == [steps + 1] * 3  # one of them looks at the shapes


@pytest.mark.parametrize("cap", [6, 15])
def test_an_unfinished_run_is_replayed_as_far_as_it_came(cap):
    """Also where the stop has no noise, so that only the last step of a finished run is not asked at."""
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = sv.Model(lambda x, t: torch.tanh(x) * (1 - t)[:, None], predicts="velocity")
    reached = sv.adaptive(model, FLOW, x, rtol=1e-6, atol=1e-6, max_nfe=cap, on_limit="return")
    assert reached.status == ["max_nfe"] * 2
    for i in range(2):
        plan = sv.replay(reached, i)
        assert torch.allclose(sv.run(plan, model, x[i : i + 1])[0], reached.x[i], rtol=0, atol=1e-12)


def test_an_element_that_stays_zero_has_no_error_to_measure():
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert torch.equal(sv.adaptive(lambda x, t: 0.3 * x, VP, x, rtol=1e-3, atol=0).x, x)


def test_points_of_numbers_are_kept_where_there_is_nothing_else():
    x = torch.randn(2, dtype=torch.float64)
    kept = sv.adaptive(zero, VP, x, dense=True, max_nfe=1, on_limit="return")
    assert torch.equal(kept.at(VP.start), x)


@pytest.mark.parametrize("option", ["coupled", "dense"])
def test_a_word_is_not_a_switch(option):
    with pytest.raises(TypeError, match=f"{option} = 'no': expected True or False"):
        sv.adaptive(zero, VP, X, **{option: "no"})


def test_a_solution_prints_in_one_line():
    solution = sv.adaptive(zero, VP, X, rtol=1e-2, atol=1e-2)
    assert repr(solution) == (
        f"Solution(x: [3, 2] {str(X.dtype).removeprefix('torch.')}; nfe: {solution.nfe.min()}"
        + (f" to {solution.nfe.max()}" if solution.nfe.max() > solution.nfe.min() else "")
        + "; rejected: 0; status: 3 done)"
    )
    assert repr(sv.adaptive(zero, VP, X[:0])).endswith("status: no samples)")

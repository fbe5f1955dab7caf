"""Bad input: refused at once, by name, with what came and what was expected; the model not called, no file left behind.

The rows are those of the project's catalogue of bad input; the number stands first in a test's name.
"""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import solvers as sv

NOT_TESTED = {
    8: "strict=True is not an option: an order above the number of steps is lowered, and the rows show it",
    19: "a grid is an argument of a method and steps one of a grid: no function takes both",
    28: "no schedule is declared variance preserving by its user",
    31: "no schedule takes its inverse from the user",
    54: "the model is not called twice to see whether it is deterministic: no such option",
}
INSTEAD = {
    22: "a last step to sigma = 0 has order 1, which is the end policy; only grids in log-SNR cannot stand there",
    38: "not an error: an empty batch is returned empty",
    42: "not an error: half precision is the network's, the state is float32",
    52: "a warning",
    53: "not an error: the output is detached",
}

nan, inf = math.nan, math.inf
VP, DDPM = sv.VP(), sv.Discrete.linear(1000)
ZTSNR = DDPM.zero_terminal_snr()
TIMES = sv.logsnr(VP, 4)
PLAN = sv.dpm_solver_pp(VP, TIMES)
X = torch.linspace(-1, 1, 12).reshape(4, 3)


class Net:
    """A model that counts its calls."""

    def __init__(self, answer=lambda x, t: torch.zeros_like(x)):
        self.calls, self.answer = 0, answer

    def __call__(self, x, t):
        self.calls += 1
        return self.answer(x, t)


class Rising:
    """A schedule of a user's own, with half log-SNR that rises between 0.4 and 0.6."""

    start, stop = 1.0, 0.0

    def alpha(self, t):
        return torch.ones_like(t)

    def sigma(self, t):
        return torch.exp(-self.half_logsnr(t))

    def half_logsnr(self, t):
        return torch.where((t > 0.4) & (t < 0.6), 8 * t - 4, 1 - 2 * t)

    def time(self, half_logsnr):
        return (1 - half_logsnr) / 2


def edited(**fields):
    return dataclasses.replace(PLAN, **fields)


def put(values, where, value):
    values = values.clone()
    values[where] = value
    return values


def refusal(value):
    """A whole number may be out of range; anything else has the wrong type."""
    return ValueError if type(value) is int else TypeError


def row(number, name, make, error, *parts):
    """`make(net)` must raise `error` with every one of `parts` in its message."""
    return pytest.param(make, error, parts, id=f"{number}-{name}")


def grid_row(number, name, times, error, *parts, schedule=VP):
    return row(number, name, lambda net: sv.run(sv.ddim(schedule, times), net, X), error, *parts)


def x_row(number, name, x, error, *parts):
    return row(number, name, lambda net: sv.run(PLAN, net, x() if callable(x) else x), error, *parts)


def sampled(net, schedule=VP, **options):
    return sv.sample(net, X, schedule, **options)


def sampled_on(grid, schedule=VP):
    return lambda net: sv.run(sv.ddim(schedule, grid(schedule)), net, X)


def method(call):
    return lambda net: sv.run(call(), net, X)


def discrete(betas):
    return lambda net: sampled(net, sv.Discrete(betas))


def cumprod(values):
    return lambda net: sampled(net, sv.Discrete.from_alphas_cumprod(values))


def loaded(text):
    return lambda net: sv.run(sv.Plan.from_json(text), net, X)


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates what the row must refuse
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([X, X[:2]])


SAVED = json.loads(PLAN.to_json())


def saved(**fields):
    return json.dumps({k: v for k, v in (SAVED | fields).items() if v is not ...})


def replaced(name, value):
    return saved(**{name: [*SAVED[name][:-1], value]})


STEPS = "expected a whole number from 1 to 1000000, e.g. steps=20"
SIZE = "from 1 to 1000000"
FALLING = "expected strictly decreasing values in (0, 1)"
BETA = "expected 0 < beta < 1"
NUMBERS = "expected a tensor, an array or a list of real numbers"

# fmt: off
NOT_CALLED = [
    # grids
    row(1, "steps 0", lambda net: sampled(net, steps=0), ValueError, "steps = 0", SIZE),
    row(2, "steps below 0", lambda net: sampled(net, steps=-3), ValueError, "steps = -3", SIZE),
    row(3, "steps 2.5", lambda net: sampled(net, steps=2.5), TypeError, "steps = 2.5", STEPS),
    row(4, "steps True", lambda net: sampled(net, steps=True), TypeError, "steps = True", STEPS),
    row(5, "steps text", lambda net: sampled(net, steps="20"), TypeError, "steps = '20'", STEPS),
    row(6, "steps above the cap", lambda net: sampled(net, steps=10**6 + 1), ValueError, "steps = 1000001", SIZE),
    row(6, "steps astronomical", lambda net: sampled(net, steps=10**400), ValueError, "steps = 1000", SIZE),
    *(
        row(7, f"order {order!r}", method(lambda o=order: sv.dpm_solver_pp(VP, TIMES, o)), refusal(order), f"order = {order!r}", "whole number from 1 to 3")
        for order in (0, 4, 2.0, True, "2", None)
    ),
    row(7, "order 9", method(lambda: sv.exponential_adams(VP, TIMES, 9)), ValueError, "order = 9", "from 1 to 8"),
    row(7, "order 0 singlestep", method(lambda: sv.dpm_solver(VP, TIMES, 0)), ValueError, "order = 0", "from 1 to 3"),
    row(7, "order 6 singlestep start", method(lambda: sv.exponential_adams(VP, TIMES, 6, start="singlestep")), ValueError, "order = 6", "start", "from 1 to 5"),
    grid_row(9, "nan", [1.0, nan, 0.1], ValueError, "times[1] = nan", "must be finite"),
    grid_row(10, "inf", [inf, 1.0, 0.1], ValueError, "times[0] = inf", "must be finite", schedule=sv.EDM()),
    grid_row(11, "point twice", [1.0, 0.5, 0.5, 0.1], ValueError, "times[1] = 0.5 is followed by 0.5", "strictly decrease"),
    grid_row(12, "zigzag", [1.0, 0.5, 0.6, 0.1], ValueError, "times[1] = 0.5 is followed by 0.6", "strictly decrease"),
    grid_row(13, "upwards", [0.1, 0.5, 1.0], ValueError, "times[0] = 0.1 is followed by 0.5", "flip it: times.flip(0)"),
    grid_row(14, "one point", [0.5], ValueError, "shape [1]", "[steps + 1] with at least one step"),
    grid_row(14, "a number", 0.5, ValueError, "shape []", "[steps + 1]"),
    grid_row(14, "steps for times", 20, ValueError, "shape []", "[steps + 1]"),
    grid_row(14, "no point", [], ValueError, "shape [0]", "[steps + 1]"),
    grid_row(14, "a matrix", [[1.0, 0.5]], ValueError, "shape [1, 2]", "[steps + 1]"),
    grid_row(14, "text", "abc", TypeError, "times = 'abc'", NUMBERS),
    grid_row(14, "a list of text", ["1.0", "0.5"], TypeError, "times = ['1.0', '0.5']", NUMBERS),
    grid_row(14, "None", None, TypeError, "times = None", NUMBERS),
    grid_row(14, "a list with None", [1.0, None], TypeError, "times = [1.0, None]", NUMBERS),
    grid_row(14, "ragged", [[1.0, 0.5], [0.1]], TypeError, "times = [[1.0, 0.5], [0.1]]", NUMBERS),
    grid_row(14, "a dict", {1: 0.5}, TypeError, "times = {1: 0.5}", NUMBERS),
    grid_row(14, "bool", [True, False], TypeError, "times has dtype torch.bool", "expected real numbers"),
    grid_row(14, "complex", torch.tensor([1j, 0.5]), TypeError, "times has dtype torch.complex64", "expected real numbers"),
    row(14, "swapped", method(lambda: sv.ddim(TIMES, VP)), TypeError, "times = VP(", NUMBERS),
    grid_row(15, "above", [1.5, 0.1], ValueError, "t = 1.5", "outside the schedule's range [0, 1]"),
    grid_row(15, "below", [1.0, -0.1], ValueError, "t = -0.1", "outside the schedule's range [0, 1]"),
    grid_row(15, "below, any sigma", [80.0, -0.1], ValueError, "t = -0.1", "range [0, inf]", schedule=sv.EDM()),
    row(15, "start above", sampled_on(lambda s: sv.uniform(s, 4, start=1.5)), ValueError, "t = 1.5", "range [0, 1]"),
    grid_row(16, "a step of one ulp", [0.5, math.nextafter(0.5, 0)], ValueError, "times[0] = 0.5 and times[1] = 0.49999999999999994", "more than rounding"),
    # names and options
    row(17, "kind", method(lambda: sv.dpm_solver_pp(VP, TIMES, kind="multi")), ValueError, "kind = 'multi'", "'multistep', 'singlestep'"),
    row(17, "start", method(lambda: sv.dpm_solver_pp(VP, TIMES, start="warm")), ValueError, "start = 'warm'", "'ramp', 'singlestep'"),
    row(17, "final", method(lambda: sv.dpm_solver_multistep(VP, TIMES, final="lowr")), ValueError, "final = 'lowr'", "'full', 'lower'"),
    row(17, "form", method(lambda: sv.exponential_adams(VP, TIMES, 2, "x0")), ValueError, "predicts = 'x0'", "'noise', 'data'"),
    row(17, "option", method(lambda: sv.ddim(VP, TIMES, eeta=1.0)), TypeError, "eeta"),
    row(17, "grid option", sampled_on(lambda s: sv.logsnr(s, 4, rho=7.0)), TypeError, "rho"),
    row(17, "method by name", lambda net: sampled(net, method="ddim"), TypeError, "method = 'ddim'", "method=sv.ddim"),
    row(17, "grid by name", lambda net: sampled(net, grid="karras"), TypeError, "grid = 'karras'", "grid=sv.karras"),
    row(17, "grid as times", lambda net: sampled(net, grid=TIMES), TypeError, "grid = ", "(schedule, steps) -> times"),
    row(17, "prediction", lambda net: sv.run(PLAN, sv.Model(net, "eps"), X), ValueError, "predicts = 'eps'", "'noise', 'data', 'velocity', 'score', 'flow', 'edm'"),
    row(18, "start with singlestep", method(lambda: sv.dpm_solver_pp(VP, TIMES, kind="singlestep", start="singlestep")), ValueError, "start = 'singlestep'", "no use with kind = 'singlestep'"),
    row(18, "r1 at order 1", method(lambda: sv.dpm_solver(VP, TIMES, 1, r1=0.3)), ValueError, "r1 = 0.3", "order = 1"),
    row(18, "r2 at order 2", method(lambda: sv.dpm_solver(VP, TIMES, 2, r2=0.3)), ValueError, "r2 = 0.3", "order = 2"),
    row(18, "rows that read backwards", method(lambda: sv.dpm_solver(VP, TIMES, 3, r1=0.7, r2=0.5)), ValueError, "r1 = 0.7, r2 = 0.5", "r1 < r2"),
    *(
        row(18, f"r1 {r1}", method(lambda r1=r1: sv.dpm_solver(VP, TIMES, 2, r1=r1)), ValueError, f"r1 = {r1}", "0 < r1 <= 1")
        for r1 in (0.0, -1.0, 1.5, nan)
    ),
    row(18, "r1 text", method(lambda: sv.dpm_solver(VP, TIMES, 2, r1="a")), TypeError, "r1 = 'a'", "expected"),
    *(
        row(18, f"nfe {nfe!r}", method(lambda n=nfe: sv.dpm_solver_fast(VP, n)), refusal(nfe), f"nfe = {nfe!r}", "whole number from 1 to 1000000, e.g. nfe=10")
        for nfe in (0, -1, 2.5, True, "10")
    ),
    row(18, "eta text", method(lambda: sv.ddim(VP, TIMES, eta="a")), TypeError, "eta = 'a'", "expected"),
    *(
        row(20, f"rho {rho}", sampled_on(lambda s, r=rho: sv.karras(s, 4, rho=r)), ValueError, f"rho = {rho}", "finite number above 0")
        for rho in (0, -7.0, nan, inf)
    ),
    row(20, "rho text", sampled_on(lambda s: sv.karras(s, 4, rho="7")), TypeError, "rho = '7'", "expected a real number"),
    row(21, "stop below 0", sampled_on(lambda s: sv.uniform(s, 4, stop=-0.1)), ValueError, "stop = -0.1", "0 <= stop < start"),
    row(21, "stop above start", sampled_on(lambda s: sv.karras(s, 4, start=0.5, stop=0.7)), ValueError, "start = 0.5, stop = 0.7", "0 <= stop < start"),
    row(21, "stop at start", sampled_on(lambda s: sv.trailing(s, 4, stop=1.0), DDPM), ValueError, "start = 1, stop = 1", "0 <= stop < start"),
    row(21, "start nan", sampled_on(lambda s: sv.logsnr(s, 4, start=nan)), ValueError, "start = nan", "0 <= stop < start"),
    row(21, "start text", sampled_on(lambda s: sv.uniform(s, 4, start="1")), TypeError, "start = '1'", "expected a real number"),
    row(21, "stop a list", sampled_on(lambda s: sv.uniform(s, 4, stop=[0.1])), TypeError, "stop = [0.1]", "expected a real number"),
    row(21, "start below the levels", sampled_on(lambda s: sv.leading(s, 4, start=1e-4), DDPM), ValueError, "start = 0.0001", "first level 1/1000"),
    row(22, "logsnr to sigma 0", sampled_on(lambda s: sv.logsnr(s, 4, stop=0.0)), ValueError, "stop = 0 has sigma = 0", "e.g. stop=0.001"),
    row(22, "karras to sigma 0", sampled_on(lambda s: sv.karras(s, 4, stop=0.0), sv.EDM()), ValueError, "stop = 0 has sigma = 0", "e.g. stop=0.001"),
    row(22, "logsnr from alpha 0", sampled_on(lambda s: sv.logsnr(s, 4, stop=0.1), sv.Flow()), ValueError, "start = 1 has alpha = 0", "e.g. start=0.999"),
    row(23, "noise form", method(lambda: sv.dpm_solver(ZTSNR, sv.trailing(ZTSNR, 4))), ValueError, "alpha = 0 (t = 1)", "dpm_solver_pp", "predicts data, velocity or flow"),
    row(23, "noise prediction", lambda net: sv.run(sv.dpm_solver_pp(ZTSNR, sv.trailing(ZTSNR, 4)), net, X), ValueError, "noise prediction does not determine data in call 0", "t = 1", "velocity or flow"),
    row(23, "score prediction", lambda net: sv.run(sv.ddim(sv.Flow(), sv.uniform(sv.Flow(), 4)), sv.Model(net, "score"), X), ValueError, "score prediction does not determine data in call 0", "t = 1"),
    row(23, "the default sample", lambda net: sampled(net, sv.Flow()), ValueError, "noise prediction does not determine the data", "start = 1", "start=0.999", "velocity, flow or data"),
    # schedules
    row(24, "betas nan", discrete([0.1, nan]), ValueError, "betas[1] = nan", "finite"),
    row(24, "betas inf", discrete([inf, 0.1]), ValueError, "betas[0] = inf", "finite"),
    row(24, "alphas nan", cumprod([0.9, nan]), ValueError, "alphas_cumprod[1] = nan", "finite"),
    row(25, "beta below 0", discrete([0.1, -0.2]), ValueError, "betas[1] = -0.2", BETA),
    row(25, "beta 0", discrete([0.0, 0.2]), ValueError, "betas[0] = 0", BETA),
    row(25, "beta above 1", discrete([0.1, 1.2]), ValueError, "betas[1] = 1.2", BETA),
    row(25, "beta 1 before the last", discrete([0.1, 1.0, 0.2]), ValueError, "betas[1] = 1", BETA),
    row(25, "beta_max", lambda net: sampled(net, sv.Discrete.linear(3, 0.5, 1.7)), ValueError, "betas[1] = 1.1", BETA),
    row(25, "beta_min", lambda net: sampled(net, sv.Discrete.scaled_linear(10, -1.0)), ValueError, "beta_min = -1.0", "above 0"),
    row(26, "no betas", discrete([]), ValueError, "shape [0]", "[N] with N >= 2"),
    row(26, "one beta", discrete([0.1]), ValueError, "shape [1]", "[N] with N >= 2"),
    row(26, "a matrix", discrete([[0.1, 0.2]]), ValueError, "shape [1, 2]", "[N] with N >= 2"),
    row(26, "text", discrete("abc"), TypeError, "betas = 'abc'", NUMBERS),
    row(26, "a list of text", discrete(["a", "b"]), TypeError, "betas = ['a', 'b']", NUMBERS),
    row(26, "None", discrete(None), TypeError, "betas = None", NUMBERS),
    row(26, "ragged", discrete([[0.1], 0.2]), TypeError, "betas = [[0.1], 0.2]", NUMBERS),
    row(26, "bool", discrete([True, False]), TypeError, "betas has dtype torch.bool", "expected real numbers"),
    row(26, "complex", discrete([0.1j, 0.2]), TypeError, "betas has dtype torch.complex128", "expected real numbers"),
    *(
        row(26, f"levels {n!r}", lambda net, n=n: sampled(net, sv.Discrete.linear(n)), refusal(n), f"levels = {n!r:.100}", "whole number from 2 to 1000000")
        for n in (0, 1, -3, 2.5, True, "1000", 10**7)
    ),
    row(27, "alphas rise", cumprod([0.5, 0.6, 0.1]), ValueError, "alphas_cumprod[1] = 0.6", FALLING),
    row(27, "alphas equal", cumprod([0.5, 0.5]), ValueError, "alphas_cumprod[1] = 0.5", FALLING),
    row(27, "alphas above 1", cumprod([1.5, 0.3]), ValueError, "alphas_cumprod[0] = 1.5", FALLING),
    row(27, "alphas below 0", cumprod([0.5, -0.3]), ValueError, "alphas_cumprod[1] = -0.3", FALLING),
    row(29, "gamma falls", lambda net: sampled(net, sv.LogSNR(gamma=lambda t: -t)), ValueError, "t = 0 and 0.001", "gamma must increase"),
    row(29, "gamma nan", lambda net: sampled(net, sv.LogSNR(gamma=lambda t: nan * t)), ValueError, "t = 0 and 0.001", "gamma must increase"),
    row(29, "gamma flat", lambda net: sampled(net, sv.LogSNR(gamma=lambda t: (t - 0.5).clamp(min=0))), ValueError, "gamma must increase"),
    row(29, "gamma ends swapped", lambda net: sampled(net, sv.LogSNR(5.0, -13.0)), ValueError, "gamma_min = 5.0", "below gamma_max = -13.0"),
    row(29, "gamma infinite", lambda net: sampled(net, sv.LogSNR(-inf, 5.0)), ValueError, "gamma_min = -inf", "finite"),
    row(29, "gamma text", lambda net: sampled(net, sv.LogSNR("a", "b")), TypeError, "gamma_min = 'a'", "expected a real number"),
    row(29, "gamma a number", lambda net: sampled(net, sv.LogSNR(gamma=3.0)), TypeError, "gamma = 3.0", "expected a function of t"),
    row(29, "gamma gives None", lambda net: sampled(net, sv.LogSNR(gamma=lambda t: None)), TypeError, "gamma gave NoneType", "expected float64"),
    row(29, "gamma gives another shape", lambda net: sampled(net, sv.LogSNR(gamma=lambda t: t[:3])), TypeError, "gamma gave torch.float64 [3]", "the same shape"),
    grid_row(29, "a user's own rises", [1.0, 0.55, 0.45, 0.0], ValueError, "half log-SNR must increase", "times[1] = 0.55", schedule=Rising()),
    row(29, "sigma ends swapped", lambda net: sampled(net, sv.VE(50.0, 0.1)), ValueError, "sigma_min = 50.0", "below sigma_max = 0.1"),
    *(
        row(29, f"{name} {value}", lambda net, make=make, value=value: sampled(net, make(value)), error, f"{name} = {value!r}", expected)
        for make, name in ((sv.VP, "beta_min"), (sv.SubVP, "beta_min"), (sv.Cosine, "shift"), (sv.VE, "sigma_min"), (sv.EDM, "sigma_min"), (sv.Flow, "shift"))
        for value, error, expected in ((-1.0, ValueError, "finite number above 0"), (nan, ValueError, "finite number above 0"), ("1", TypeError, "expected a real number"))
    ),
    row(30, "label below the levels", lambda net: sv.run(sv.ddim(DDPM, [1.0, 0.5, 0.0005, 0.0]), sv.Model(net, label=DDPM.label), X), ValueError, "t = 0.0005", "first level 1/1000"),
    row(30, "label beyond the range", lambda net: sv.run(sv.ddim(sv.EDM(), [80.0, 1.0, 0.1]), sv.Model(net, label=DDPM.label), X), ValueError, "t = 80", "range [0, 1]"),
    row(30, "label of another length", lambda net: sv.run(PLAN, sv.Model(net, label=lambda t: t[:1]), X), ValueError, "label gave tensor([1.]", "each of the 4 calls"),
    row(30, "label nan", lambda net: sv.run(PLAN, sv.Model(net, label=lambda t: t * nan), X), ValueError, "label gave tensor([nan", "finite"),
    row(30, "label None", lambda net: sv.run(PLAN, sv.Model(net, label=lambda t: None), X), TypeError, "label gave None", "expected"),
    row(30, "label text", lambda net: sv.run(PLAN, sv.Model(net, label=lambda t: "abc"), X), TypeError, "label gave abc", "expected"),
    row(30, "no levels", sampled_on(lambda s: sv.linspace(s, 4)), TypeError, "schedule = VP(", "expected a Discrete"),
    row(30, "no levels to snap to", sampled_on(lambda s: sv.snap(s, [1.0, 0.5])), TypeError, "schedule = VP(", "expected a Discrete"),
    row(30, "two calls on a level", sampled_on(lambda s: sv.snap(s, [1.0, 0.5001, 0.4999, 0.1]), DDPM), ValueError, "calls 1 and 2 fall on one level (t = 0.5)", "fewer than 3 steps"),
    *(
        row(32, f"{name} {dtype}", make(torch.tensor([0.2, 0.1], dtype=dtype)), TypeError, f"{name} has dtype {dtype}", "expected float64 or float32")
        for dtype in (torch.float16, torch.bfloat16)
        for name, make in (("betas", discrete), ("alphas_cumprod", cumprod))
    ),
    row(32, "betas numpy float16", discrete(np.array([0.1, 0.2], np.float16)), TypeError, "betas has dtype torch.float16", "expected float64 or float32"),
    grid_row(32, "times bfloat16", TIMES.bfloat16(), TypeError, "times has dtype torch.bfloat16", "expected float64 or float32"),
    row(32, "gamma in float32", lambda net: sampled(net, sv.LogSNR(gamma=lambda t: t.float())), TypeError, "gamma gave torch.float32", "expected float64"),
    # state
    x_row(33, "int", torch.ones(2, 3, dtype=torch.int), TypeError, "x has dtype torch.int32", "x.float()"),
    x_row(34, "bool", torch.ones(2, 3, dtype=torch.bool), TypeError, "x has dtype torch.bool", "x.float()"),
    x_row(35, "complex", torch.ones(2, 3, dtype=torch.cfloat), TypeError, "x has dtype torch.complex64", "real floating-point"),
    x_row(36, "nan", put(X, (1, 2), nan), ValueError, "x[1, 2] = nan", "must be finite"),
    x_row(36, "inf", put(X, (3, 0), -inf), ValueError, "x[3, 0] = -inf", "must be finite"),
    x_row(37, "no dimension", torch.tensor(1.0), ValueError, "no batch dimension", "x[None]"),
    x_row(39, "sparse", lambda: X.to_sparse(), TypeError, "torch.sparse_coo", "expected a dense tensor"),
    x_row(39, "meta", lambda: X.to("meta"), TypeError, "on meta", "expected a dense tensor with values"),
    x_row(39, "quantised", quantized, TypeError, "torch.qint8", "expected a dense tensor"),
    x_row(39, "nested", nested, TypeError, "nested", "expected a dense tensor"),
    x_row(40, "numpy", X.numpy(), TypeError, "x is ndarray", "torch.from_numpy(x)"),
    x_row(40, "list", X.tolist(), TypeError, "x is list", "expected a torch.Tensor"),
    x_row(40, "None", None, TypeError, "x is NoneType", "expected a torch.Tensor"),
    x_row(41, "requires grad", X.clone().requires_grad_(), ValueError, "x requires a gradient", "grad=True, or x.detach()"),
    row(41, "requires grad, trajectory", lambda net: sv.trajectory(PLAN, net, X.clone().requires_grad_()), ValueError, "x requires a gradient", "x.detach()"),
    row("33s", "State int", lambda net: sv.run(PLAN, net, sv.State(X.int())), TypeError, "torch.int32", "expected"),
    row("36s", "State nan", lambda net: sv.run(PLAN, net, sv.State(put(X, 0, nan))), ValueError, "nan", "finite"),
    row("42s", "State bfloat16", lambda net: sv.run(PLAN, net, sv.State(X.bfloat16())), TypeError, "torch.bfloat16", "expected float32 or float64"),
    row("36s", "State beyond the plan", lambda net: sv.run(PLAN, net, sv.State(X, 9)), ValueError, "call = 9", "4"),
    row("36s", "State before the plan", lambda net: sv.run(PLAN, net, sv.State(X, -1)), ValueError, "call = -1"),
    row("36s", "State without its outputs", lambda net: sv.run(PLAN, net, sv.State(X, 2)), ValueError, "call 1"),
    # model
    *(
        row(51, f"{model!r}", lambda net, model=model: sv.run(PLAN, model, X), TypeError, f"model = {model!r}", "not callable", "net(x, t)")
        for model in (None, 3, "net")
    ),
    row(51, "a label", lambda net: sv.run(PLAN, sv.Model(net, label=3), X), TypeError, "label = 3", "function of t"),
    *(
        row(51, f"sigma_data {s}", lambda net, s=s: sv.run(PLAN, sv.Model(net, "edm", sigma_data=s), X), ValueError, f"sigma_data = {s}", "finite and above 0")
        for s in (0.0, -1.0, nan, inf)
    ),
    row(51, "sigma_data text", lambda net: sv.Model(net, "edm", sigma_data="a"), TypeError, "sigma_data = 'a'", "expected a real number"),
    row(51, "flow without its path", lambda net: sv.run(PLAN, sv.Model(net, "flow"), X), ValueError, "not straight", "schedule=schedule"),
    row(51, "flow on another path", lambda net: sv.run(PLAN, sv.Model(net, "flow", schedule=sv.Flow()), X), ValueError, "alpha = 0 at t = 1, but the plan has 0.00657159", "instead of Flow("),
    # plans
    *(
        row("P", f"{name} float32", lambda net, n=name: edited(**{n: getattr(PLAN, n).float()}), TypeError, f"{name} is torch.float32", "expected a float64 tensor on the CPU")
        for name in ("times", "alpha", "sigma", "a", "b")
    ),
    *(
        row("P", f"{name} a list", lambda net, n=name: edited(**{n: getattr(PLAN, n).tolist()}), TypeError, f"{name} is list", "expected a float64 tensor on the CPU")
        for name in ("times", "alpha", "sigma", "a", "b")
    ),
    *(
        row("P", f"{name} short", lambda net, n=name: edited(**{n: getattr(PLAN, n)[:-1]}), ValueError, f"{name} has shape", "as a has 4 rows")
        for name in ("times", "alpha", "sigma", "b")
    ),
    *(
        row("P", f"{name} nan", lambda net, n=name: edited(**{n: put(getattr(PLAN, n), 2, nan)}), ValueError, f"{name}[2", "= nan", "must be finite")
        for name in ("times", "alpha", "sigma", "a", "b")
    ),
    row("P", "c a list", lambda net: edited(c=[]), TypeError, "c is list", "expected a float64 tensor"),
    row("P", "a None", lambda net: edited(a=None), TypeError, "a is NoneType", "expected a float64 tensor"),
    row("P", "a a number", lambda net: edited(a=torch.tensor(1.0).double()), ValueError, "a has shape []", "[N]"),
    row("P", "no rows", lambda net: sv.Plan(*torch.ones(3, 1).double(), torch.zeros(0).double(), torch.zeros(0, 1).double()), ValueError, "at least one row"),
    row("P", "no columns", lambda net: edited(b=PLAN.b[:, :0]), ValueError, "b has shape [4, 0]", "[4, columns]"),
    row("P", "draws of other rows", lambda net: edited(c=torch.ones(3, 1).double()), ValueError, "c has shape [3, 1]", "[4, columns]"),
    row("P", "form", lambda net: edited(predicts="eps"), ValueError, "predicts = 'eps'", "'noise', 'data', 'velocity'"),
    row("P", "sigma below 0", lambda net: edited(sigma=-PLAN.sigma), ValueError, "sigma[0] = -0.99", "negative"),
    row("P", "times turn back", lambda net: edited(times=put(PLAN.times, 2, 0.9)), ValueError, "is followed by 0.9", "must not turn back"),
    row("P", "reads before the first row", lambda net: edited(b=put(PLAN.b, (0, 1), 0.5)), ValueError, "b[0, 1] reads 1 rows back", "before the first row"),
    row("P", "draw before the first row", lambda net: edited(c=put(torch.zeros(4, 2).double(), (0, 1), 0.5)), ValueError, "c[0, 1] reads 1 rows back", "before the first row"),
    row("P", "inconsistent b", lambda net: edited(b=PLAN.b * 1.001), ValueError, "row 0 is not consistent", "expected alpha[1] = 0.0719416723995"),
    row("P", "inconsistent a", lambda net: edited(a=put(PLAN.a, 2, 0.5)), ValueError, "row 2 is not consistent", "expected alpha[3]"),
    row("P", "one row", lambda net: PLAN[0], TypeError, "plan[0]", "e.g. plan[3:]"),
    row("P", "every other row", lambda net: PLAN[::2], TypeError, "slice(None, None, 2)", "slice with step 1"),
    row("P", "no slice", lambda net: PLAN[2:2], ValueError, "plan[2:2] has no rows", "0 <= first < last <= 4"),
    row("P", "slice without its history", lambda net: PLAN[1:], ValueError, "row 1 reads call 0", "times[1:]"),
    row("P", "joined where they do not meet", lambda net: PLAN + PLAN, ValueError, "do not meet", "0.001", "starts at [1.0"),
    row("P", "joined in two forms", lambda net: sv.ddim(VP, [1.0, 0.5]) + sv.dpm_solver(VP, [0.5, 0.1], 1), ValueError, "'data', scale 1 and 'noise', scale 1"),
    row("P", "joined to a number", lambda net: PLAN + 3, TypeError, "Plan", "int"),
    row("P", "not a plan", lambda net: sv.run(None, net, X), TypeError, "plan is NoneType", "expected a Plan"),
    # plan files
    row("F", "empty", loaded(""), ValueError, "not a plan", "line 1 column 1"),
    row("F", "cut", loaded(PLAN.to_json()[:50]), ValueError, "not a plan", "Unterminated string"),
    row("F", "another thing", loaded("[1]"), ValueError, "list", "expected exactly"),
    row("F", "null", loaded("null"), ValueError, "NoneType", "expected exactly"),
    row("F", "unknown field", loaded(saved(extra=1)), ValueError, "['extra']", "expected exactly"),
    row("F", "missing field", loaded(saved(a=...)), ValueError, "['a']", "expected exactly"),
    row("F", "field twice", loaded(PLAN.to_json().replace("{", '{"predicts":"noise",')), ValueError, "a field is repeated"),
    row("F", "NaN", loaded(replaced("a", nan)), ValueError, "NaN is not a finite number"),
    row("F", "Infinity", loaded(replaced("a", -inf)), ValueError, "-Infinity is not a finite number"),
    row("F", "too large", loaded(saved().replace(json.dumps(SAVED["a"][3]), "1e999")), ValueError, "a[3] = inf", "finite"),
    row("F", "an int too large", loaded(replaced("a", 10**400)), ValueError, "a[3] = inf", "finite"),
    row("F", "an int of 5000 digits", loaded(saved().replace(json.dumps(SAVED["a"][3]), "1" + "0" * 5000)), ValueError, "a[3] = inf", "finite"),
    row("F", "text for a number", loaded(replaced("sigma", "1")), ValueError, "sigma[4] = '1'", "finite number"),
    row("F", "true for a number", loaded(replaced("sigma", True)), ValueError, "sigma[4] = True", "finite number"),
    row("F", "null for a number", loaded(replaced("alpha", None)), ValueError, "alpha[4] = None", "finite number"),
    row("F", "a number for a list", loaded(saved(a=3)), ValueError, "a has 0 entries", "list of 1 to 100000"),
    row("F", "no rows", loaded(saved(a=[])), ValueError, "a has 0 entries", "list of 1 to 100000"),
    row("F", "too many rows", loaded(saved(a=[0.0] * 100001)), ValueError, "a has 100001 entries", "list of 1 to 100000"),
    row("F", "lengths differ", loaded(saved(times=SAVED["times"][1:])), ValueError, "times has 4 entries", "list of 5 numbers"),
    row("F", "ragged", loaded(saved(b=[[1.0], *SAVED["b"][1:]])), ValueError, "b[1] has 2 entries", "list of 1 numbers"),
    row("F", "flat", loaded(saved(b=SAVED["a"])), ValueError, "b: expected a list of 4 lists"),
    row("F", "wide", loaded(saved(b=[[0.0] * 1025] * 4)), ValueError, "b has 1025 columns", "at most 1024"),
    row("F", "deep", loaded("[" * 100000), ValueError, "not a plan", "recursion"),
    row("F", "another format", loaded(saved(format="diffusion-solvers plan 9")), ValueError, "'diffusion-solvers plan 9'", "expected 'diffusion-solvers plan 2'"),
    row("F", "another form", loaded(saved(predicts="eps")), ValueError, "predicts = 'eps'", "'noise', 'data', 'velocity'"),
    row("F", "a list for a name", loaded(saved(predicts=[1])), ValueError, "predicts = [1.0]", "'noise', 'data', 'velocity'"),
    row("F", "inconsistent", loaded(saved(a=[1.01 * v for v in SAVED["a"]])), ValueError, "row 0 is not consistent", "expected alpha[1]"),
    row("F", "byte order mark", loaded("\ufeff" + PLAN.to_json()), ValueError, "not a plan", "BOM"),
    row("F", "None", loaded(None), TypeError, "NoneType", "expected"),
    # helpers
    row("C", "noised", lambda net: sv.noised(X, VP, 0.5, X[:1]), ValueError, "noise has shape [1, 3]", "x0, [4, 3]"),
    row("C", "convert from an unknown", lambda net: sv.convert(X, X, 0.6, 0.8, have="eps", want="data"), ValueError, "have = 'eps'", "'noise', 'data'"),
    row("C", "convert from flow", lambda net: sv.convert(X, X, 0.6, 0.8, have="flow", want="data"), ValueError, "path that is not straight", "alpha + sigma"),
    row("C", "convert at alpha 0", lambda net: sv.convert(X, X, 0.0, 1.0, have="noise", want="data"), ValueError, "alpha = 0", "does not determine data"),
    row("C", "convert at sigma 0", lambda net: sv.convert(X, X, 1.0, 0.0, have="data", want="noise"), ValueError, "sigma = 0", "does not determine noise"),
    row("C", "convert a broadcastable", lambda net: sv.convert(X[:1], X, 0.6, 0.8, have="noise", want="data"), ValueError, "m has shape [1, 3]", "that of x, [4, 3]"),
]
# fmt: on


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("make", "error", "parts"), NOT_CALLED)
def test_refused_before_the_model_is_called(make, error, parts, empty_folder):
    net = Net()
    with pytest.raises(error) as caught:
        make(net)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert len(message) < 500
    assert net.calls == 0


def answer_row(number, name, answer, error, *parts, x=X):
    return pytest.param(answer, error, parts, x, id=f"{number}-{name}")


def edit(x):
    x += 1
    return x.clone()


def failing(x, t):
    raise KeyError("inner")


IMAGES = torch.zeros(2, 3, 4, 4)
WHERE = "call 0 of 4, t = 1"

# fmt: off
CALLED_ONCE = [
    answer_row(43, "None", lambda x, t: None, TypeError, "returned NoneType", WHERE, "expected one tensor"),
    answer_row(43, "tuple", lambda x, t: (x, x), TypeError, "returned tuple", WHERE, "expected one tensor"),
    answer_row(43, "dict", lambda x, t: {"sample": x}, TypeError, "returned dict", WHERE, "expected one tensor"),
    answer_row(44, "another shape", lambda x, t: x[:, :2], ValueError, "shape [4, 2]", WHERE, "expected [4, 3]"),
    answer_row(44, "one sample", lambda x, t: x[:1], ValueError, "shape [1, 3]", WHERE, "expected [4, 3]"),
    answer_row(44, "one channel", lambda x, t: x[:, :1], ValueError, "shape [4, 1]", WHERE, "expected [4, 3]"),
    answer_row(44, "no batch", lambda x, t: x[0], ValueError, "shape [3]", WHERE, "expected [4, 3]"),
    answer_row(44, "a number", lambda x, t: x.sum(), ValueError, "shape []", WHERE, "expected [4, 3]"),
    answer_row(44, "a larger batch", lambda x, t: x.expand(4, 3), ValueError, "shape [4, 3]", WHERE, "expected [1, 3]", x=X[:1]),
    answer_row(45, "learned variance", lambda x, t: torch.cat([x, x], 1), ValueError, "shape [2, 6, 4, 4]", WHERE, "learned variance", "Model(net, variance=\"range\")", x=IMAGES),
    answer_row(46, "int", lambda x, t: x.long(), TypeError, "torch.int64", WHERE, "floating-point"),
    answer_row(46, "complex", lambda x, t: x.cfloat(), TypeError, "torch.complex64", WHERE, "floating-point"),
    answer_row(47, "another device", lambda x, t: x.to("meta"), ValueError, "on meta", WHERE, "expected cpu"),
    answer_row(48, "x changed in place", lambda x, t: edit(x), ValueError, "changed its input x in place", WHERE, "clone"),
    answer_row(49, "nan", lambda x, t: put(x, 2, nan), sv.NonFiniteError, "call 0 of 4", "t = 1", "half log-SNR = -5.02", "samples [2]", "x it was given is finite"),
    answer_row(49, "inf", lambda x, t: put(x, (1, 2), -inf), sv.NonFiniteError, "call 0 of 4", "samples [1]"),
    answer_row(50, "raises", failing, KeyError, "inner"),
]
# fmt: on


@pytest.mark.parametrize(("answer", "error", "parts", "x"), CALLED_ONCE)
def test_refused_at_the_first_call(answer, error, parts, x, empty_folder):
    net = Net(answer)
    with pytest.raises(error) as caught:
        sv.run(PLAN, net, x)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)
    assert net.calls == 1
    assert torch.equal(sv.run(PLAN, Net(), x), sv.run(PLAN, Net(), x))  # and the plan is as good as before


@pytest.mark.parametrize("call", range(4))
def test_49_a_non_finite_output_is_named_in_the_call_it_happens(call):
    def answer(x, t):
        return put(x, [1, 3], nan) if float(t[0]) == PLAN.times[call].float() else x.clone()

    net = Net(answer)
    with pytest.raises(sv.NonFiniteError) as caught:
        sv.run(PLAN, net, X)
    error = caught.value
    assert net.calls == call + 1
    assert (error.call, error.time, error.samples) == (call, float(PLAN.times[call]), [1, 3])
    assert error.half_logsnr == float(PLAN.half_logsnr[call])


def test_50_a_model_s_own_error_keeps_its_traceback_and_gets_a_note():
    with pytest.raises(KeyError) as caught:
        sv.run(PLAN, Net(failing), X)
    (note,) = caught.value.__notes__
    assert note.startswith(
        f"raised by the model in {WHERE}, half log-SNR = -5.02498; it was called with x in torch.float"
    )
    assert caught.traceback[-1].name == "failing"


def test_38_an_empty_batch_is_returned_empty():
    for dtype, expected in (
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
    ):
        net = Net()
        out = sv.run(PLAN, net, torch.empty(0, 3, dtype=dtype))
        assert (out.shape, out.dtype, net.calls) == ((0, 3), expected, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_42_half_precision_is_the_network_s_alone(dtype):
    seen = []
    out = sv.run(
        PLAN, Net(lambda x, t: (seen.append((x.dtype, t.dtype)), torch.zeros_like(x))[1]), X.to(dtype)
    )
    assert out.dtype == torch.float32
    assert seen == [(dtype, torch.float32)] * PLAN.nfe


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t):
        return self.scale * x


@pytest.mark.parametrize("wrap", [lambda net: net, sv.Model], ids=["bare", "declared"])
@pytest.mark.parametrize("go", [sv.run, sv.trajectory], ids=["run", "trajectory"])
def test_52_a_network_in_training_mode_warns_once_a_run(go, wrap):
    net = Layer()
    with pytest.warns(UserWarning, match=r"training mode .*: call net.eval\(\)") as caught:
        go(PLAN, wrap(net), X)
    assert len(caught) == 1
    go(PLAN, wrap(net.eval()), X)  # a warning would be an error


def test_53_an_output_that_requires_grad_leaves_no_graph():
    with torch.enable_grad():
        for net in (Layer().eval(), lambda x, t: nn.Parameter(x.clone())):
            states = []
            out = sv.run(PLAN, net, X, callback=states.append)
            assert not out.requires_grad
            assert not any(v.requires_grad for s in states for v in (s.x, *s.outputs.values()))

    def guided(x, t):  # a model may turn gradients on for itself
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return x * x.sum()

    assert not sv.run(PLAN, guided, 1e-3 * X).requires_grad


@pytest.mark.parametrize("place", ["no/such/folder/plan.json", "."])
def test_a_failed_save_leaves_no_file(place, empty_folder):
    with pytest.raises(OSError, match=r"no/such/folder|Is a directory|directory"):
        PLAN.save(empty_folder / place)
    assert not list(empty_folder.parent.glob(f".{empty_folder.name}.*"))


def test_a_save_cut_short_leaves_the_old_file(tmp_path, monkeypatch):
    PLAN.save(tmp_path / "plan.json")
    monkeypatch.setattr(
        sv.Plan, "to_json", lambda plan: (_ for _ in ()).throw(OSError("No space left on device"))
    )
    with pytest.raises(OSError, match="No space left"):
        sv.ddim(VP, TIMES).save(tmp_path / "plan.json")
    assert [f.name for f in tmp_path.iterdir()] == ["plan.json"]
    assert sv.Plan.load(tmp_path / "plan.json") == PLAN


def test_a_file_that_is_no_plan_is_named(tmp_path):
    for name, content in (("binary", b"\xff\xfe\x00"), ("text", b"{}")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="not a plan"):
            sv.Plan.load(tmp_path / name)
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**28 + 1)
    with pytest.raises(ValueError, match=r"large has 268435457 bytes: expected at most 268435456"):
        sv.Plan.load(tmp_path / "large")
    with pytest.raises(FileNotFoundError, match="absent"):
        sv.Plan.load(tmp_path / "absent")


def test_every_row_of_the_catalogue_is_here():
    tested = {p.id.split("-")[0] for p in NOT_CALLED + CALLED_ONCE}
    assert {n for n in range(1, 55) if str(n) not in tested} == NOT_TESTED.keys() | INSTEAD.keys() - {22}

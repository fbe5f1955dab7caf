"""The equations given to torchdiffeq, torchsde and scipy: the same answers as the library's own, in every variable."""

import functools
import math
from functools import partial

import pytest
import torch
import torchdiffeq
import torchsde
from scipy.integrate import solve_ivp
from torch.testing import assert_close
from torchdiffeq._impl.odeint import SOLVERS

import solvers as sv
from problems import FULL, MODELS, NARROW, PROBLEMS, VP, Counted, exact, generator, starts
from reference import Gaussian, slopes
from solvers.blackbox import VARIABLES

ADAPTIVE = {  # and how many times the tolerance 1e-6 the error may be
    "dopri8": 2, "dopri5": 10, "bosh3": 10, "fehlberg2": 300, "adaptive_heun": 10, "scipy_solver": 20,
}  # fmt: skip
ORDERS = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}
ADAMS = ["explicit_adams", "implicit_adams", "fixed_adams"]


def crossed(names):
    """Each name with each variable; by default with one of them, in turn."""
    return [
        pytest.param(name, v, marks=[pytest.mark.slow] * (i % len(VARIABLES) != j))
        for i, name in enumerate(names)
        for j, v in enumerate(VARIABLES)
    ]


def ode(x, method="dopri5", tolerance=1e-9, problem="line", span=NARROW, schedule=VP, model=None, **options):
    model = MODELS[problem] if model is None else model
    return sv.odeint(model, schedule, x, method, tolerance, tolerance, start=span[0], stop=span[1], **options)


def worst(a, b):
    return (a - b).abs().max().item()


# The ODE


@pytest.mark.parametrize(("problem", "variable"), crossed(["line", "eight"]))
def test_dopri5_finds_the_exact_flow_and_what_fixed_plans_find(problem, variable):
    x = starts(problem, NARROW)[:5]
    end = ode(x, problem=problem, variable=variable).x
    assert worst(end, exact(problem, NARROW)[:5]) < 1e-7
    plan = sv.exponential_rk(VP, sv.logsnr(VP, 100, start=NARROW[0], stop=NARROW[1]), sv.tableaux.krogstad)
    assert worst(end, sv.run(plan, MODELS[problem], x)) < 1e-7


@pytest.mark.parametrize(
    "variable", [VARIABLES[0], *(pytest.param(v, marks=pytest.mark.slow) for v in VARIABLES[1:])]
)
def test_dopri5_finds_the_exact_flow_over_the_whole_range(variable):
    x = starts("line", FULL)[:5]
    assert worst(ode(x, span=FULL, variable=variable).x, exact("line", FULL)[:5]) < 1e-7


def test_every_method_of_torchdiffeq_is_tested_here():
    assert sorted([*ADAPTIVE, *ORDERS, *ADAMS]) == sorted(SOLVERS)


@pytest.mark.parametrize(("method", "variable"), crossed(ADAPTIVE))
def test_adaptive_methods_are_as_exact_as_asked(method, variable):
    x = starts("line", NARROW)[:4]
    tolerance = 1e-4 if method == "adaptive_heun" else 1e-6
    found = ode(x, method, tolerance, variable=variable)
    assert worst(found.x, exact("line", NARROW)[:4]) < ADAPTIVE[method] * tolerance
    assert found.status == ["done"] * 4
    assert found.times[0][[0, -1]].tolist() == list(NARROW)


@pytest.mark.parametrize("method", ORDERS)
def test_methods_of_fixed_steps_have_their_order(method):
    x, way = starts("line", NARROW)[:4], 4.0

    def error(steps):
        found = ode(x, method, variable="half_logsnr", options={"step_size": way / steps})
        return worst(found.x, exact("line", NARROW)[:4])

    counts = (40, 80, 160) if method == "euler" else (10, 20, 40)
    assert slopes([error(n) for n in counts]).mean() == pytest.approx(ORDERS[method], abs=0.35)


@pytest.mark.parametrize("method", ADAMS)
@pytest.mark.parametrize("variable", ["t", "half_logsnr"])
def test_adams_methods_of_torchdiffeq_run(method, variable):
    flow = sv.ProbabilityFlow(MODELS["line"], VP, variable)
    way = abs(float(flow.place(NARROW[0]) - flow.place(NARROW[1])))
    found = ode(starts("line", NARROW)[:4], method, variable=variable, options={"step_size": way / 60})
    assert worst(found.x, exact("line", NARROW)[:4]) < 1e-3


# Options


def test_options_of_torchdiffeq_take_effect():
    x = starts("line", NARROW)[:3]
    flow = exact("line", NARROW)[:3]
    plain = ode(x, tolerance=1e-5)
    for options in (
        {"first_step": 0.001},
        {"max_step": 0.05},
        {"jump_t": torch.tensor([0.2], dtype=torch.float64)},
        {"safety": 0.5},
    ):
        found = ode(x, tolerance=1e-5, options=options)
        assert worst(found.x, flow) < 2e-4, options
        assert not torch.equal(found.x, plain.x), options
    assert (ode(x, tolerance=1e-5, options={"first_step": 0.001}).times[0][1] - NARROW[0]).abs() < 0.0011
    jumped = ode(x, tolerance=1e-5, options={"jump_t": torch.tensor([0.2], dtype=torch.float64)}).times[0]
    assert (jumped - 0.2).abs().min() < 1e-12
    steps = ode(x, tolerance=1e-5, options={"max_step": 0.05}).times[0].diff()
    assert steps.abs().max() < 0.05 + 1e-12
    coarse, fine = (
        ode(x.float(), tolerance=1e-4, options={"dtype": v}).times[0] for v in (torch.float32, torch.float64)
    )
    assert torch.equal(coarse[1:-1], coarse[1:-1].float().double())
    assert not torch.equal(fine[1:-1], fine[1:-1].float().double())
    assert (
        ode(x, "scipy_solver", 1e-5, options={"solver": "DOP853"}).nfe[0]
        != ode(x, "scipy_solver", 1e-5).nfe[0]
    )


def test_a_step_size_sets_the_number_of_calls():
    x = starts("line", NARROW)[:3]
    counts = [ode(x, "rk4", variable="half_logsnr", options={"step_size": h}).nfe[0] for h in (0.4, 0.1)]
    assert counts == [40, 160]
    with pytest.raises(ValueError, match="has fixed steps: give their length"):
        ode(x, "rk4")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dopri5", {}),
        ("rk4", {"step_size": 0.1}),
        ("scipy_solver", {}),
        ("implicit_adams", {"step_size": 0.1}),
    ],
)
def test_options_that_a_method_does_not_know_are_refused(method, options):
    with pytest.raises(ValueError, match=r"does not know them all.*tpyo"):
        ode(starts("line", NARROW)[:2], method, options={**options, "tpyo": 1})


def test_methods_variables_and_tolerances_that_do_not_exist_are_refused():
    x = starts("line", NARROW)[:2]
    for options, words in (
        ({"method": "dopri6"}, "dopri5"),
        ({"variable": "snr"}, "variable"),
        ({"tolerance": 0.0}, "rtol"),
        ({"max_nfe": 0}, "max_nfe"),
    ):
        with pytest.raises(ValueError, match=words):
            ode(x, **options)
    flow = sv.Flow()
    for variable in ("half_logsnr", "sigma"):
        with pytest.raises(ValueError, match="is infinite there"):
            sv.odeint(MODELS["line"], flow, x, variable=variable)


def test_runs_that_do_not_arrive_say_why():
    x = starts("line", NARROW)[:2]
    with pytest.raises(sv.NonConvergence, match="max_num_steps") as caught:
        ode(x, options={"max_num_steps": 3})
    solution = caught.value.solution
    assert NARROW[1] < solution.times[0][-1] < NARROW[0]
    for method, options in (("dopri5", {}), ("rk4", {"step_size": 0.001}), ("scipy_solver", {})):
        with pytest.raises(sv.NonConvergence, match="max_nfe = 20") as caught:
            ode(x, method, options=options, max_nfe=20)
        assert caught.value.solution.status == ["max_nfe"] * 2
        assert caught.value.solution.nfe.tolist() == [20, 20]
    with pytest.raises(sv.NonConvergence, match="not finite") as caught:
        ode(x, model=lambda x, t: x * math.nan)
    assert caught.value.solution.status == ["non_finite"] * 2


@pytest.mark.parametrize(("method", "options"), [("rk4", {"step_size": 0.1}), ("scipy_solver", {})])
def test_outputs_that_are_not_finite_are_not_done(method, options):
    with pytest.raises(sv.NonConvergence):
        ode(starts("line", NARROW)[:2], method, options=options, model=lambda x, t: x * math.nan)


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
def test_where_scipy_gives_up_the_start_is_not_the_answer():
    def model(x, t):
        return torch.full_like(x, math.inf) if float(t[0]) < 0.3 else x

    with pytest.raises(sv.NonConvergence):
        ode(starts("line", NARROW)[:2], "scipy_solver", 1e-4, options={"solver": "RK45"}, model=model)


# The equation on its own


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("problem", ["line", "eight"])
def test_the_slope_is_the_derivative_of_the_exact_flow(problem, variable):
    flow, x, t, h = sv.ProbabilityFlow(MODELS[problem], VP, variable), starts(problem, NARROW)[:3], 0.3, 1e-4
    x = PROBLEMS[problem].flow(x, VP, NARROW[0], t)
    ahead, behind = (
        flow.state(PROBLEMS[problem].flow(x, VP, t, t + s), t + s) for s in (h, -h)
    )  # fmt: skip
    derivative = (ahead - behind) / (flow.place(t + h) - flow.place(t - h))
    assert_close(flow(flow.place(t), flow.state(x, t)), derivative, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variable", VARIABLES)
def test_the_flow_can_be_given_to_torchdiffeq_and_scipy_by_hand(variable):
    x = starts("line", NARROW)[:3]
    flow = sv.ProbabilityFlow(MODELS["line"], VP, variable)
    places, state = torch.stack([flow.place(t) for t in NARROW]), flow.state(x, NARROW[0])
    end = torchdiffeq.odeint(flow, state, places, rtol=1e-7, atol=1e-7, options={"step_t": places[1:]})[-1]
    assert worst(flow.x(end, NARROW[1]), exact("line", NARROW)[:3]) < 1e-5
    assert flow.nfe > 50

    def slope(v, y):
        return flow(torch.tensor(v), torch.as_tensor(y).reshape(3, 1)).flatten().numpy()

    found = solve_ivp(slope, places.tolist(), state.flatten().numpy(), rtol=1e-7, atol=1e-7)
    end = torch.as_tensor(found.y[:, -1:])
    assert worst(flow.x(end, NARROW[1]), exact("line", NARROW)[:3]) < 1e-5


def test_a_flow_may_be_asked_where_float32_has_the_schedule_s_ends():
    for variable in VARIABLES:
        flow, x = sv.ProbabilityFlow(MODELS["line"], VP, variable), starts("line", FULL)[:3].float()
        for t in FULL:
            assert flow(flow.place(t).float(), flow.state(x, t)).isfinite().all()


def test_a_flow_on_its_own_needs_step_t_where_the_schedule_ends():
    """torchdiffeq steps past the stop and interpolates, unless it is given step_t."""
    flow, x = sv.ProbabilityFlow(MODELS["line"], VP), starts("line", FULL)[:3]
    places = torch.stack([flow.place(t) for t in FULL])
    solve = functools.partial(torchdiffeq.odeint, flow, x, places, rtol=1e-7, atol=1e-7, method="dopri5")
    with pytest.raises(ValueError, match="outside the schedule's range"):
        solve()
    assert worst(solve(options={"step_t": places[1:]})[-1], exact("line", FULL)[:3]) < 1e-4


@pytest.mark.parametrize(("method", "variable"), crossed(["dopri5", "scipy_solver", "rk4", "bosh3"]))
@pytest.mark.parametrize("schedule", [VP, sv.Inversion(VP)], ids=["sampling", "encoding"])
def test_the_model_is_asked_between_start_and_stop_alone_and_calls_are_counted(schedule, method, variable):
    model, span = Counted(MODELS["line"].net), NARROW if schedule is VP else NARROW[::-1]
    flow = sv.ProbabilityFlow(MODELS["line"], VP, variable)
    way = abs(float(flow.place(NARROW[0]) - flow.place(NARROW[1])))
    found = ode(
        starts("line", NARROW)[:3], method, 1e-5, span=span, schedule=schedule, variable=variable,
        model=sv.Model(model, predicts="velocity"), options={"step_size": way / 7} if method == "rk4" else None,
    )  # fmt: skip
    assert len(model.times) == found.nfe[0] == found.nfe[2]
    assert min(model.times) >= NARROW[1]
    assert max(model.times) <= NARROW[0]
    assert found.times[0][[0, -1]].tolist() == list(span)
    steps = found.times[0].diff()
    assert (steps * (span[1] - span[0]) > 0).all()


@pytest.mark.parametrize("variable", VARIABLES)
def test_decoding_brings_back_what_was_encoded(variable):
    x = exact("line", NARROW)[:4]
    code = ode(x, tolerance=1e-8, span=NARROW[::-1], schedule=sv.Inversion(VP), variable=variable).x
    assert worst(code, starts("line", NARROW)[:4]) < 1e-6
    assert worst(ode(code, tolerance=1e-8, variable=variable).x, x) < 1e-6


def test_no_way_to_go_and_no_samples_are_no_error():
    x = starts("line", NARROW)[:3]
    still = ode(x, span=(0.5, 0.5))
    assert torch.equal(still.x, x)
    assert still.nfe.tolist() == [0, 0, 0]
    assert ode(x[:0]).x.shape == (0, 1)


# Models and schedules


DATA = Gaussian(torch.tensor([0.7, -0.4]), torch.diag(torch.tensor([0.05, 0.6])))


def begin(schedule, start, n=4):
    alpha, sigma = (
        float(level(torch.tensor(start, dtype=torch.float64))) for level in (schedule.alpha, schedule.sigma)
    )
    return DATA.marginal(alpha, sigma).draw(n, generator(6))


@pytest.mark.parametrize(("predicts", "variable"), crossed(["noise", "data", "velocity", "score", "flow"]))
def test_what_the_model_predicts_does_not_matter(predicts, variable):
    model = sv.Model(DATA.model(VP, predicts), predicts, schedule=VP if predicts == "flow" else None)
    x = begin(VP, NARROW[0])
    assert worst(ode(x, tolerance=1e-6, model=model, variable=variable).x, DATA.flow(x, VP, *NARROW)) < 1e-5


SCHEDULES = {
    "edm": (sv.EDM(), 5.0, 0.05),
    "ve": (sv.VE(), 0.8, 0.2),
    "flow": (sv.Flow(), 0.9, 0.1),
    "cosine": (sv.Cosine(), 0.9, 0.1),
    "subvp": (sv.SubVP(), 0.9, 0.1),
    "discrete": (sv.Discrete.linear(1000), 0.9, 0.1),
}


@pytest.mark.parametrize(("name", "variable"), crossed(SCHEDULES))
def test_every_schedule_has_its_flow(name, variable):
    schedule, *span = SCHEDULES[name]
    x, model, tolerance = begin(schedule, span[0]), DATA.model(schedule, "velocity"), 1e-6
    if name == "discrete":  # whose slope in t jumps at every knot
        velocity, tolerance = model, 1e-4

        def model(x, step):
            return velocity(x, (step + 1) / 1000)

    wrapped = sv.Model(model, "velocity", label=schedule.label if name == "discrete" else None)
    found = ode(
        x,
        "bosh3" if name == "discrete" else "dopri5",
        tolerance,
        span=span,
        schedule=schedule,
        model=wrapped,
        variable=variable,
    )
    assert worst(found.x, DATA.flow(x, schedule, *span)) < 30 * tolerance


@pytest.mark.parametrize("variable", VARIABLES)
def test_images_are_like_their_elements(variable):
    x = starts("line", NARROW)[:32]

    def model(image, t):
        return MODELS["line"].net(image.reshape(-1, 1), t).reshape(image.shape)

    images = ode(x.reshape(2, 1, 4, 4), model=sv.Model(model, "velocity"), variable=variable).x
    assert images.shape == (2, 1, 4, 4)
    assert worst(images.reshape(-1, 1), exact("line", NARROW)[:32]) < 1e-7


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_network_is_called_in_the_dtype_of_x_and_the_state_is_no_coarser_than_float32(dtype, variable):
    seen = set()

    def model(x, t):
        seen.add(x.dtype)
        return MODELS["line"].net(x.double(), t.double()).to(x.dtype)

    x = starts("line", NARROW)[:4].to(dtype)
    for run in (
        lambda: ode(x, tolerance=1e-3, model=sv.Model(model, "velocity"), variable=variable).x,
        lambda: sde(x, steps=20, model=sv.Model(model, "velocity"), variable=variable).x,
    ):
        seen.clear()
        end = run()
        assert seen == {dtype}
        assert end.dtype == torch.float32
    end = ode(x, "rk4", options={"step_size": 0.1}, model=sv.Model(model, "velocity")).x
    assert worst(end, PROBLEMS["line"].flow(x.double(), VP, *NARROW)) < (
        0.1 if dtype == torch.bfloat16 else 1e-3
    )


# One step for the whole batch


def test_torchdiffeq_s_steps_depend_on_the_batch_and_adaptive_s_do_not():
    easy, hard = starts("line", NARROW)[:1], torch.full((6, 1), 8.0, dtype=torch.float64)
    both = torch.cat([easy, hard])
    assert worst(ode(easy, tolerance=1e-4).x, ode(both, tolerance=1e-4).x[:1]) > 1e-8

    def run(x):
        return sv.adaptive(gaussian_model, VP, x, rtol=1e-4, atol=1e-4, start=NARROW[0], stop=NARROW[1]).x

    assert torch.equal(run(easy), run(both)[:1])


# The SDE


def sde(x, method="euler", steps=64, noise=0, model=None, span=NARROW, **options):
    model = MODELS["line"] if model is None else model
    return sv.sdeint(model, VP, x, noise, method, steps, start=span[0], stop=span[1], **options)


def level_of(t):
    """alpha, sigma, beta of VP."""
    integral = 0.1 * t + 19.9 * t**2 / 2
    return math.exp(-integral / 2), math.sqrt(-math.expm1(-integral)), 0.1 + 19.9 * t


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_drift_and_diffusion_are_the_closed_forms(eta):
    t, x = 0.3, begin(VP, 0.3)
    alpha, sigma, beta = level_of(t)
    noise = sigma * (x - alpha * DATA.mean) / (alpha**2 * torch.tensor([0.05, 0.6]) + sigma**2)
    drift = beta / 2 * x - (1 + eta) / 2 * beta * noise / sigma  # of -t
    speed = 2 * sigma**2 / beta  # -dt / dlambda
    expected = {
        "t": (drift, eta * beta),
        "half_logsnr": (sigma**2 * x - (1 + eta) * sigma * noise, eta * 2 * sigma**2),
        "sigma": (-(1 + eta) * noise, eta * 2 * sigma / alpha),
        "angle": (sigma / alpha * x - (1 + eta) / alpha * noise, eta * 2 * sigma / alpha),
    }
    assert_close(expected["half_logsnr"][0], drift * speed, rtol=1e-10, atol=1e-12)
    for variable in VARIABLES:
        equation = sv.ReverseSDE(sv.Model(DATA.model(VP)), VP, [2], variable, eta)
        s, y = equation.place(t), equation.state(x, t)
        f, square = expected[variable]
        assert_close(equation.f(s, y), f, rtol=1e-6, atol=1e-7)
        assert_close(equation.g(s, y), torch.full_like(y, square**0.5), rtol=1e-10, atol=1e-12)
        assert equation.nfe == 1


def test_without_noise_the_sde_is_the_flow():
    x = starts("line", NARROW)[:3]
    for variable in VARIABLES:
        flow, equation = (
            sv.ProbabilityFlow(MODELS["line"], VP, variable),
            sv.ReverseSDE(MODELS["line"], VP, [1], variable, 0.0),
        )
        sign = 1 if variable == "half_logsnr" else -1
        y = flow.state(x, 0.3)
        assert equation.place(0.3) == sign * flow.place(0.3)
        assert_close(
            equation.f(equation.place(0.3), y), sign * flow(flow.place(0.3), y), rtol=1e-10, atol=1e-12
        )


@pytest.fixture
def given(monkeypatch):
    """With what arguments sdeint has made its path and called torchsde."""
    seen, make, integrate = {}, torchsde.BrownianInterval, torchsde.sdeint

    def path(*args, **options):
        seen["path"] = partial(make, *args, **options)
        return make(*args, **options)

    def run(sde, y, places, **options):
        seen["dt"] = options["dt"]
        return integrate(sde, y, places, **options)

    monkeypatch.setattr(torchsde, "BrownianInterval", path)
    monkeypatch.setattr(torchsde, "sdeint", run)
    return seen


@pytest.mark.parametrize("shape", [[1], [1, 4, 4]])
@pytest.mark.parametrize("variable", VARIABLES)
def test_the_sde_can_be_given_to_torchsde_by_hand_and_is_what_sdeint_gives(shape, variable, given):
    def model(x, t):
        return MODELS["line"].net(x.reshape(-1, 1), t).reshape(x.shape)

    x = starts("line", NARROW, 64)[: 2 * math.prod(shape)].reshape(2, *shape)
    found = sde(x, steps=16, noise=5, model=sv.Model(model, "velocity"), variable=variable)
    equation = sv.ReverseSDE(sv.Model(model, "velocity"), VP, shape, variable)
    places = torch.stack([equation.place(t) for t in NARROW])
    y = equation.state(x, NARROW[0]).flatten(1)
    assert given["path"].keywords["entropy"] == 5
    assert given["path"].keywords["size"] == y.shape
    assert given["dt"] == pytest.approx(float(places[1] - places[0]) / 16, rel=1e-10)
    end = torchsde.sdeint(equation, y, places, bm=given["path"](), method="euler", dt=given["dt"])[-1]
    assert torch.equal(found.x, equation.x(end.reshape(x.shape), NARROW[1]))
    assert found.nfe.tolist() == [equation.nfe] * 2


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_euler_in_t_is_the_euler_maruyama_plan_on_the_same_path(eta, given):
    x = starts("line", NARROW)[:5]
    found = sde(x, steps=16, noise=9, eta=eta).x
    s, stop = (torch.tensor(-t, dtype=torch.float64) for t in NARROW)
    path, places, increments = given["path"](), [s], []
    while s < stop:  # as torchsde walks, with a last step of a rounding where the others fall short
        end = torch.minimum(s + given["dt"], stop)
        increments.append(path(s, end))
        places.append(end)
        s = end
    times = -torch.stack(places)
    scale = (-times.diff()).sqrt()
    plan = sv.euler_maruyama(VP, times, eta)
    expected = sv.run(plan, MODELS["line"], x, noise=lambda draw, like: increments[draw] / scale[draw])
    assert_close(found, expected, rtol=0, atol=1e-10)


def test_as_many_equal_steps_are_taken_as_asked_for():
    for variable in VARIABLES:  # torchsde asks once to see the shapes
        for steps in (10, 64):
            assert sde(starts("line", NARROW)[:2], steps=steps, variable=variable).nfe[0] == steps + 1


def gaussian_model(x, t):
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    return sigma * (x - 0.4 * alpha) / (0.3 * alpha**2 + sigma**2)


ENOUGH = {"t": 120, "half_logsnr": 120, "sigma": 240, "angle": 240}
KINDS = {
    "euler": {},
    "milstein": {},
    "srk": {},
    "adaptive": {"method": "euler", "adaptive": True, "rtol": 1e-3, "atol": 1e-3},
}


@pytest.mark.parametrize(("kind", "variable"), crossed(KINDS))
def test_the_marginal_at_the_stop_is_the_data_s(kind, variable):
    """Mean and variance of 2000 samples of N(0.4, 0.3) within 4 standard errors; the bias of the steps is below one."""
    n, options = 2000, KINDS[kind] or {"method": kind}
    (alpha, sigma), (a, b) = (level_of(t)[:2] for t in NARROW)
    x = 0.4 * alpha + (0.3 * alpha**2 + sigma**2) ** 0.5 * torch.randn(
        n, 1, dtype=torch.float64, generator=generator(7)
    )
    steps = ENOUGH[variable] // (8 if kind == "srk" else 1)
    end = sde(x, steps=steps, model=gaussian_model, variable=variable, noise=1, **options).x
    z = (end - 0.4 * a) / (0.3 * a**2 + b**2) ** 0.5
    assert abs(z.mean()) < 4 / n**0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_half_the_noise_has_the_same_marginal_and_wrong_noise_has_not():
    n = 3000
    x = starts("line", NARROW, n)
    a, b, _ = level_of(NARROW[1])
    moments = PROBLEMS["line"].moments
    variance = a**2 * float(moments.cov) + b**2

    def off(x):
        return abs((x.var() / variance - 1).item()) / (2 / n) ** 0.5

    assert off(sde(x, steps=100, eta=0.5, variable="half_logsnr").x) < 4
    equation = sv.ReverseSDE(MODELS["line"], VP, [1], "half_logsnr")
    places = torch.stack([equation.place(t) for t in NARROW])
    path = torchsde.BrownianInterval(places[0], places[1], size=x.shape, dtype=x.dtype, entropy=0)

    class Loud:
        noise_type, sde_type, f = "diagonal", "ito", equation.f

        def g(self, s, y):
            return 1.4 * equation.g(s, y)

    assert off(torchsde.sdeint(Loud(), x, places, bm=path, method="euler", dt=0.05)[-1]) > 6


@pytest.mark.parametrize("method", ["euler", "milstein", "srk"])
def test_a_seed_gives_the_same_samples_and_no_global_generator_is_touched(method):
    x, before = starts("line", NARROW)[:4], torch.get_rng_state()
    one, again, other = (sde(x, method, 4, noise).x for noise in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)
    ode(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_of_sdeint_depends_on_its_batch():
    x = starts("line", NARROW)[:4]
    assert not torch.equal(sde(x, steps=10).x[1:2], sde(x[1:2], steps=10).x)


def test_what_sdeint_cannot_do_is_refused():
    x = starts("line", NARROW)[:2]
    for options, words in (
        ({"method": "heun"}, "method"),
        ({"noise": None}, r"sdeint needs noise: sdeint\(model, schedule, x, noise=0\)"),
        ({"noise": -1}, "noise = -1"),
        ({"steps": 0}, "steps"),
        ({"eta": -0.5}, "eta"),
    ):
        with pytest.raises(ValueError, match=words):
            sde(x, **options)
    with pytest.raises(ValueError, match="from data to noise"):
        sv.sdeint(MODELS["line"], sv.Inversion(VP), x, 0)
    with pytest.raises(ValueError, match="is infinite there"):
        sv.sdeint(MODELS["line"], sv.Flow(), x, 0, variable="half_logsnr")


def test_runs_of_sdeint_that_do_not_arrive_say_why():
    x = starts("line", NARROW)[:2]
    with pytest.raises(sv.NonConvergence, match="not finite") as caught:
        sde(x, model=lambda x, t: x * math.nan)
    assert caught.value.solution.status == ["non_finite"] * 2
    with pytest.raises(sv.NonConvergence, match="max_nfe = 7") as caught:
        sde(x, max_nfe=7)
    assert caught.value.solution.status == ["max_nfe"] * 2
    assert caught.value.samples == [0, 1]

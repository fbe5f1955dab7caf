"""Log-densities: the exact one, a plan's own, by probes; bounds, bits and gradients; latents and back."""

import functools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import solvers as sv
from problems import FULL, MODELS, NARROW, PROBLEMS, VP, Counted, exact, generator
from reference import Gaussian, Mixture, slopes
from reference.orders import grid
from solvers.blackbox import VARIABLES

INVERSE = sv.Inversion(VP)
WAYS = {v: partial(sv.odeint, rtol=1e-8, atol=1e-8, variable=v) for v in VARIABLES}
WAYS["adaptive"] = partial(sv.adaptive, rtol=1e-8, atol=1e-8)
FEW = partial(sv.odeint, method="rk4", options={"step_size": 0.4}, variable="angle")
SHORT = {"start": NARROW[0], "stop": NARROW[1]}
PREDICTIONS = ("noise", "data", "velocity", "score", "flow", "edm")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def correlated(d, seed):
    root = randn(d, d, seed=seed)
    return 0.3 * root @ root.mT / d + 0.1 * torch.eye(d, dtype=torch.float64)


DATA = PROBLEMS | {
    "1": Gaussian(torch.tensor([0.4]), torch.tensor([[0.3]])),
    "3": Gaussian(torch.tensor([0.7, -0.4, 0.2]), correlated(3, 1)),
    "2x3": Gaussian(randn(2, 3, seed=2) / 2, correlated(6, 3)),
}
SCHEDULES = {
    "vp": VP,
    "ve": sv.VE(),
    "flow": sv.Flow(),
    "edm": sv.EDM(),
    "cosine": sv.Cosine(),
    "t": sv.Discrete.linear(1000),
    "label": sv.Discrete.linear(1000),
}


def level(schedule, t):
    return tuple(float(f(torch.tensor(t, dtype=torch.float64))) for f in (schedule.alpha, schedule.sigma))


def marginal(data, schedule, t):
    """The exact log-density of the states at a time."""
    return lambda x: data.log_density(x, *level(schedule, t))


def states(data, schedule, t, n):
    noise = torch.randn(n, *data.shape, dtype=torch.float64, generator=generator(6))
    return sv.noised(data.draw(n, generator(5)), schedule, t, noise)


def network(data, schedule, predicts="velocity", label=None):
    """The exact network, which of a discrete schedule reads its steps, or times."""
    net = data.model(schedule, predicts)
    if label == "label":
        return sv.Model(lambda x, n: net(x, (n + 1) / 1000), predicts, label=schedule.label)
    return sv.Model(
        net,
        predicts,
        label=(lambda t: t) if label == "t" else None,
        schedule=schedule if predicts == "flow" else None,
    )


EIGHT = states(PROBLEMS["eight"], VP, NARROW[1], 6)


def accuracy(data, schedule, predicts, way, n=3, model=None, ends=(-0.5, 1.0)):
    """The largest relative error of log p over a span of half log-SNR."""
    name, data, schedule = schedule, DATA[data], SCHEDULES[schedule]
    start, stop = schedule.time(torch.tensor(ends, dtype=torch.float64)).tolist()
    model, x = model or network(data, schedule, predicts, name), states(data, schedule, stop, n)
    found = sv.log_likelihood(
        model,
        schedule,
        x,
        solver=WAYS[way],
        prior=marginal(data, schedule, start),
        start=start,
        stop=stop,
    )
    expected = marginal(data, schedule, stop)(x)
    return ((found.log_p - expected) / expected).abs().max().item()


def plan_of(method=sv.unipc, steps=6, ends=NARROW, schedule=VP, **options):
    """A plan from data to noise."""
    times = grid(schedule, *ends, torch.linspace(0, 1, steps + 1, dtype=torch.float64)).flip(0)
    return method(sv.Inversion(schedule), times, **options)


def cubic(x, t):
    """A network of which no element knows another, in operations that round alike in any batch."""
    return x / (1 + x * x)


# The exact density


@pytest.mark.parametrize(
    ("data", "schedule", "predicts", "way"),
    [
        ("line", "vp", "velocity", "t"),
        ("eight", "vp", "noise", "angle"),
        ("3", "ve", "score", "sigma"),
        ("2x3", "flow", "flow", "half_logsnr"),
        ("1", "label", "data", "angle"),
    ],
)
def test_log_p_is_the_exact_log_density(data, schedule, predicts, way):
    assert accuracy(data, schedule, predicts, way) < 1e-6


def test_adaptive_steps_find_it_too():
    assert accuracy("1", "edm", "edm", "adaptive", n=1, ends=(0.0, 0.5)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("data", DATA)
def test_log_p_is_exact_on_every_data_and_schedule(data, schedule):
    assert accuracy(data, schedule, "velocity", "angle", ends=(-1.5, 3.0)) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_log_p_is_exact_for_every_network_and_way(predicts, way):
    assert accuracy("3", "vp", predicts, way, n=1) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA)
def test_log_p_is_exact_over_the_whole_range_and_not_of_a_network_off_by_a_thousandth(data):
    whole = VP.half_logsnr(torch.tensor(FULL, dtype=torch.float64)).tolist()
    net = network(DATA[data], VP).net
    off = sv.Model(lambda x, t: 1.001 * net(x, t), "velocity")
    assert accuracy(data, "vp", "velocity", "angle", ends=whole) < 1e-6
    assert accuracy(data, "vp", "velocity", "angle", ends=whole, model=off) > 1e-5


@pytest.mark.parametrize(
    "schedule",
    [sv.Flow(), pytest.param(sv.Cosine(start=1.0), marks=pytest.mark.slow)],
    ids=["flow", "cosine"],
)
def test_latents_of_pure_noise_have_exactly_the_default_prior(schedule):
    """From alpha = 0, and on the flow to sigma = 0, which the angle and the velocity bear."""
    data = Gaussian(torch.zeros(2), torch.diag(torch.tensor([0.2, 1.5])))
    x = states(data, schedule, schedule.stop, 3)
    found = sv.log_likelihood(network(data, schedule), schedule, x, solver=WAYS["angle"])
    assert_close(found.log_p, marginal(data, schedule, schedule.stop)(x), rtol=1e-6, atol=0)


def test_the_default_run_is_good_to_three_digits():
    x = exact("line", FULL)[:5]
    found = sv.log_likelihood(MODELS["line"], VP, x)
    assert_close(found.log_p, marginal(DATA["line"], VP, VP.stop)(x), rtol=0, atol=2e-3)
    assert_close(found.latent, DATA["line"].flow(x, VP, *FULL[::-1]), rtol=0, atol=1e-3)


def test_the_terms_are_those_of_the_sum():
    x, deviation = exact("line", NARROW)[:3], level(VP, NARROW[0])[1]
    found = sv.log_likelihood(MODELS["line"], VP, x, solver=plan_of())
    assert torch.equal(found.log_p, found.prior + found.volume)
    assert torch.equal(found.entropy + found.reconstruction, torch.zeros(3, dtype=torch.float64))
    prior = torch.from_numpy(stats.norm.logpdf(found.latent, scale=deviation)).sum(1)
    assert_close(found.prior, prior, rtol=1e-12, atol=1e-12)
    assert repr(found).startswith(
        f"LogLikelihood(3 samples, {found.log_p.mean():.6g} nats on average; nfe: 6"
    )


def test_a_solver_is_any_function_that_carries_states_from_data_to_noise():
    asked = []

    def solver(model, schedule, x, start, stop):
        asked.append((schedule, start, stop))
        return FEW(model, schedule, x, start=start, stop=stop)

    x = exact("line", NARROW)[:3]
    found = sv.log_likelihood(MODELS["line"], VP, x, solver=solver, **SHORT)
    assert asked == [(INVERSE, NARROW[1], NARROW[0])]
    assert torch.equal(found.log_p, sv.log_likelihood(MODELS["line"], VP, x, solver=FEW, **SHORT).log_p)


def test_samples_that_adaptive_steps_bring_to_the_end_at_different_times_have_their_densities():
    data, x = DATA["line"], torch.tensor([[0.1], [-1.3]], dtype=torch.float64)
    solver = partial(sv.adaptive, rtol=1e-3, atol=1e-3)
    run = partial(sv.log_likelihood, network(data, VP), VP, prior=marginal(data, VP, NARROW[0]), **SHORT)
    found = run(x, solver=solver)
    assert len(set(found.nfe.tolist())) > 1
    assert_close(found.log_p, marginal(data, VP, NARROW[1])(x), rtol=0, atol=0.005)
    alone = run(x[1:2], solver=solver)  # whose network rounds as its batch does
    assert_close(alone.log_p, found.log_p[1:2], rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"functools.partial\(sv.adaptive, coupled=True\), or take exact\(\)"
    ):
        run(x, sv.hutchinson(), solver)
    coupled = run(x, sv.hutchinson(), partial(solver, coupled=True))
    assert_close(coupled.log_p, found.log_p, rtol=0, atol=0.005)


@pytest.mark.parametrize("noise", [None, 0])
@pytest.mark.parametrize("solver", [FEW, plan_of()], ids=["odeint", "plan"])
def test_nfe_are_the_calls_of_the_network(solver, noise):
    times = {} if isinstance(solver, sv.Plan) else SHORT
    for divergence in (sv.exact(), sv.hutchinson(2)):
        counted = Counted(cubic)
        found = sv.log_likelihood(counted, VP, randn(3, 2), divergence, solver, noise=noise, **times)
        assert found.nfe.tolist() == [len(counted.times)] * 3


@pytest.mark.parametrize("divergence", [sv.exact(), sv.hutchinson(2)], ids=["exact", "hutchinson"])
@pytest.mark.parametrize("solver", [FEW, plan_of()], ids=["odeint", "plan"])
def test_networks_may_be_of_float32_and_have_second_outputs(solver, divergence):
    times = {} if isinstance(solver, sv.Plan) else SHORT
    x, seen = randn(3, 2, 2, 2), set()

    def two(x, t):
        seen.add(x.dtype)
        return torch.cat([cubic(x, t), x.exp()], 1)

    run = partial(sv.log_likelihood, schedule=VP, divergence=divergence, solver=solver, **times)
    one = run(cubic, x=x)
    assert torch.equal(run(sv.Model(two, variance="range"), x=x).log_p, one.log_p)
    single = run(sv.Model(two, variance="range"), x=x.float())
    assert seen == {torch.float64, torch.float32}
    assert (single.log_p.dtype, single.latent.dtype) == (torch.float64, torch.float32)
    assert_close(single.log_p, one.log_p, rtol=0, atol=1e-4)


def test_a_network_of_whole_steps_is_asked_on_its_levels():
    schedule = sv.Discrete.linear(1000)
    inverse, seen = sv.Inversion(schedule), set()

    def net(x, n):
        seen.add(n.dtype)
        return cubic(x, n) * (1 + n[:, None].double() / 1000)

    plan = sv.unipc(inverse, sv.trailing(schedule, 5)[:-1].flip(0))
    for divergence in (sv.exact(), sv.hutchinson(2)):
        found = [
            sv.log_likelihood(sv.Model(net, label=label), schedule, randn(3, 2), divergence, plan).log_p
            for label in (schedule.step, schedule.label)
        ]
        assert torch.equal(*found)
    assert seen == {torch.int64, torch.float64}


# Plans

ANGLE = {"predicts": "velocity", "variable": "angle"}
METHODS = {  # and their orders
    "ddim": (1, sv.ddim),
    "heun": (2, sv.heun),
    "adams noise": (3, partial(sv.exponential_adams, order=3, predicts="noise", start="singlestep")),
    "adams data": (4, partial(sv.exponential_adams, order=4, start="singlestep")),
    "krogstad": (4, partial(sv.exponential_rk, tableau=sv.tableaux.krogstad)),
    "krogstad noise": (4, partial(sv.exponential_rk, tableau=sv.tableaux.krogstad, predicts="noise")),
    "rk velocity 0.6": (4, partial(sv.exponential_rk, tableau=sv.tableaux.krogstad, scale=0.6, **ANGLE)),
    "unipc": (4, partial(sv.unipc, order=3, start="singlestep")),
    "unipc velocity 0.6": (3, partial(sv.unipc, order=2, predicts="velocity", scale=0.6)),
    "unipc velocity": (4, partial(sv.unipc, order=3, start="singlestep", **ANGLE)),
}
DIVERGENCES = {"exact": sv.exact(), "hutchinson": sv.hutchinson(noise=1)}
QUICK = [("heun", "exact"), ("adams noise", "hutchinson"), ("unipc velocity 0.6", "exact")]


@pytest.mark.parametrize(
    ("name", "divergence", "steps"),
    [pytest.param(*q, 30) for q in QUICK]
    + [pytest.param(n, d, 90, marks=pytest.mark.slow) for n in METHODS for d in DIVERGENCES],
)
def test_log_p_of_a_plan_converges_to_the_exact_one_with_the_method_s_order(name, divergence, steps):
    order, method = METHODS[name]
    x = exact("line", NARROW)[:16]
    expected, errors = marginal(DATA["line"], VP, NARROW[1])(x), []
    for count in (steps, 2 * steps):
        found = sv.log_likelihood(
            MODELS["line"],
            VP,
            x,
            DIVERGENCES[divergence],
            plan_of(method, count),
            prior=marginal(DATA["line"], VP, NARROW[0]),
        )
        errors.append((found.log_p - expected).square().mean().sqrt())
    assert slopes(errors).item() == pytest.approx(order, abs=0.3), errors
    assert errors[-1] < (0.02, 1e-3, 2e-4, 2e-5)[order - 1]


FORMS = [name for name in METHODS if name != "krogstad noise"]


@pytest.mark.parametrize("name", FORMS)
def test_the_volume_of_a_plan_is_that_of_the_map_that_run_makes(name):
    data = PROBLEMS["eight"]
    x = states(data, VP, NARROW[1], 2).reshape(2, 2, 4)
    velocity = data.model(VP, "velocity")
    model = sv.Model(lambda x, t: velocity(x.reshape(-1, 8), t).reshape(x.shape), "velocity")
    plan = plan_of(METHODS[name][1], 3)
    found = sv.log_likelihood(model, VP, x, solver=plan)
    assert torch.equal(found.latent, sv.run(plan, model, x))
    jacobian = torch.autograd.functional.jacobian(lambda x: sv.run(plan, model, x[None], grad=True)[0], x[1])
    volume = torch.linalg.slogdet(jacobian.reshape(8, 8)).logabsdet
    assert_close(found.volume[1], volume, rtol=1e-10, atol=1e-10)
    assert found.standard_error.tolist() == [0, 0]


@pytest.mark.parametrize(
    "options", [{"predicts": "noise"}, {}, {"predicts": "velocity", "scale": 0.5}], ids=str
)
@pytest.mark.parametrize("divergence", [sv.exact(), sv.hutchinson(2)], ids=["exact", "hutchinson"])
def test_what_the_network_predicts_does_not_matter_to_a_plan(divergence, options):
    x, plan = states(DATA["3"], VP, NARROW[1], 2), plan_of(steps=3, **options)
    expected, *others = (
        sv.log_likelihood(network(DATA["3"], VP, p), VP, x, divergence, plan).log_p for p in PREDICTIONS
    )
    for log_p in others:
        assert_close(log_p, expected, rtol=1e-9, atol=1e-9)


def line_integral(divergence, plan):
    """Of the density that a plan gives to the states of `line`, by the trapezoidal rule."""
    x = torch.linspace(-8, 8, 2401, dtype=torch.float64)
    found = sv.log_likelihood(MODELS["line"], VP, x[:, None], divergence, plan)
    return torch.trapezoid(found.log_p.exp(), x).item()


@pytest.mark.parametrize(("name", "steps"), [("ddim", 6), ("heun", 4), ("unipc velocity 0.6", 5)])
def test_the_density_of_a_few_steps_has_integral_1_and_that_of_their_traces_has_not(name, steps):
    plan = plan_of(METHODS[name][1], steps, ends=VP.time(torch.tensor([-3.0, 1.0]).double()).tolist())
    assert line_integral(sv.exact(), plan) == pytest.approx(1, abs=1e-6)
    assert line_integral(sv.hutchinson(), plan) != pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("data", ["1", "3", "2x3"])
def test_on_gaussian_data_a_plan_has_the_gaussian_density_that_its_linear_map_makes_of_the_prior(data):
    data = DATA[data]
    model, x = network(data, VP, "noise"), states(data, VP, NARROW[1], 4)
    plan = plan_of(sv.ddim, 3)
    d = x[0].numel()
    axes = torch.eye(d, dtype=torch.float64).reshape(d, *data.shape)
    offset = sv.run(plan, model, torch.zeros_like(axes[:1])).reshape(d)
    gain = sv.run(plan, model, axes).reshape(d, d).T - offset[:, None]
    back = torch.linalg.inv(gain)
    _, sigma = level(VP, NARROW[0])
    law = torch.distributions.MultivariateNormal(-back @ offset, sigma**2 * back @ back.T)
    found = sv.log_likelihood(model, VP, x, solver=plan)
    assert_close(found.log_p, law.log_prob(x.reshape(-1, d)), rtol=1e-10, atol=1e-10)


def test_coefficients_per_element_carry_the_tangents_too():
    plan, x = plan_of(steps=3), EIGHT[:2]
    weights = 1 + torch.arange(8, dtype=torch.float64) / 10
    wide = replace(plan, a=plan.a[:, None] * weights, b=plan.b[..., None].expand(-1, -1, 8).clone())
    found = sv.log_likelihood(MODELS["eight"], VP, x, solver=wide)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: sv.run(wide, MODELS["eight"], x[None], grad=True)[0], x[1]
    )
    assert_close(found.volume[1], torch.linalg.slogdet(jacobian).logabsdet, rtol=1e-10, atol=1e-10)


# Probes


@functools.cache
def volumes(distribution, probes, copies=64):
    """Volumes of copies of some states of `eight`, each along probes of its own, with their standard errors; the exact ones."""
    step = partial(sv.odeint, method="rk4", options={"step_size": 2.0}, variable="angle")
    run = partial(sv.log_likelihood, MODELS["eight"], VP, solver=step, **SHORT)
    found = run(EIGHT.repeat_interleave(copies, 0), sv.hutchinson(probes, distribution))
    shape = (6, copies)
    return found.volume.reshape(shape), found.standard_error.reshape(shape), run(EIGHT).volume[:, None]


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_volume_along_probes_is_unbiased_and_its_standard_error_is_its_spread(distribution):
    found, error, expected = volumes(distribution, 4)
    spread = error.square().mean(1).sqrt()
    off = (found - expected).mean(1)
    assert (off.abs() < 4 * spread / 64**0.5).all()
    whole = spread.square().sum().sqrt() / (6 * 64**0.5)
    assert off.mean().abs() < 4 * whole < 0.1 * expected.mean().abs()
    assert_close(found.std(1), spread, rtol=4 / 128**0.5, atol=0)


def test_the_standard_error_falls_with_the_root_of_the_number_of_probes():
    errors = [volumes("rademacher", probes, copies=16)[1].square().mean().sqrt() for probes in (2, 4, 8, 16)]
    assert slopes(errors).mean() == pytest.approx(0.5, abs=0.1)


def test_the_standard_error_of_a_single_probe_is_not_known():
    _, error, _ = volumes("rademacher", 1, copies=1)
    assert error.isnan().all()


def unit(draw, like):
    """Any source may give probes: here the root of d times a unit vector in each draw."""
    d = like[0].numel()
    return d**0.5 * torch.eye(d, dtype=like.dtype)[draw % d].reshape(like.shape[1:]).expand_as(like)


def test_probes_that_span_the_space_give_the_trace():
    run = partial(sv.log_likelihood, MODELS["eight"], VP, EIGHT[:2], solver=FEW, **SHORT)
    trace, along = run(sv.exact()), run(sv.hutchinson(8, "gaussian", unit))
    assert_close(along.volume, trace.volume, rtol=1e-10, atol=1e-10)


def test_probes_that_span_the_space_give_the_exact_log_p_through_a_plan():
    data, plan = DATA["2x3"], plan_of(METHODS["rk velocity 0.6"][1], 12)
    x, prior = states(data, VP, NARROW[1], 2), marginal(data, VP, NARROW[0])
    found = sv.log_likelihood(network(data, VP), VP, x, sv.hutchinson(6, "gaussian", unit), plan, prior=prior)
    assert_close(found.log_p, marginal(data, VP, NARROW[1])(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_outer_product_of_a_probe_with_itself_is_the_identity_in_the_mean(distribution):
    """Within 4 standard errors, those of the sign of an element among them; and the same in every run."""
    x, divergence = torch.zeros(1000, 2, 2, dtype=torch.float64), sv.hutchinson(4, distribution)
    probes = divergence.directions(x)
    assert torch.equal(probes, divergence.directions(x))
    v = probes.reshape(4000, 4)
    assert (v.mean(0).abs() < 4 / 4000**0.5).all()
    assert_close(v.T @ v / 4000, torch.eye(4, dtype=torch.float64), rtol=0, atol=4 * (2 / 4000) ** 0.5)
    assert (distribution == "rademacher") == bool((v.abs() == 1).all())


def test_signs_have_no_variance_where_the_jacobian_is_diagonal():
    x = randn(3, 5)
    run = partial(sv.log_likelihood, cubic, VP, x, solver=FEW, **SHORT)
    exact, signs, normals = (run(d) for d in (sv.exact(), sv.hutchinson(4), sv.hutchinson(4, "gaussian")))
    assert_close(signs.volume, exact.volume, rtol=1e-12, atol=1e-12)
    assert (signs.standard_error < 1e-12).all()
    assert (normals.standard_error > 0.01).all()


def after_noise(run):
    """What a function of a solver and a seed returns, and the state that it carried from x_stop."""
    seen = []

    def solver(model, schedule, x, start, stop):
        seen.append(x)
        return FEW(model, schedule, x, start=start, stop=stop)

    return run(solver=solver, noise=0, **SHORT), seen[0]


def test_probes_are_independent_of_the_noise_of_the_same_seed():
    """Of a linear network the volume along v is the trace and a multiple of v_1 v_2; x_stop of 0 is the noise."""
    coupling = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    x0 = torch.zeros(64, 2, dtype=torch.float64)
    run = partial(sv.log_likelihood, lambda x, t: x @ coupling, VP, x0, sv.hutchinson(noise=0))
    found, x = after_noise(run)
    signs = (found.volume - found.volume.mean()).sign() * (x[:, 0] * x[:, 1]).sign()
    assert signs.mean().abs() < 4 / 64**0.5


def test_places_in_the_bins_are_independent_of_the_noise_of_the_same_seed():
    u = sv.dequantized(torch.zeros(64, 1), 1, 0, 0.0, 1.0).double()
    _, x = after_noise(partial(sv.log_likelihood, cubic, VP, u))
    alpha, sigma = level(VP, NARROW[1])
    places = torch.cat([torch.special.ndtri(u), (x[:, :1] - alpha * u) / sigma], 1)
    assert torch.corrcoef(places.T)[0, 1].abs() < 4 / 64**0.5


# Batches, the caller's modes and generators


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("solver", ["plan", "odeint"])
def test_a_sample_s_result_does_not_depend_on_its_batch(solver, divergence):
    x, times = randn(4, 3), {} if solver == "plan" else SHORT
    solver = plan_of() if solver == "plan" else partial(WAYS["angle"], rtol=1e-4, atol=1e-4)

    def run(ids):
        noise, probes = (sv.noise.per_sample(seed, ids) for seed in (3, 4))
        along = sv.hutchinson(2, noise=probes) if divergence == "hutchinson" else sv.exact()
        return sv.log_likelihood(cubic, VP, x[ids], along, solver, noise=noise, **times)

    whole, alone = run([0, 1, 2, 3]), run([2])
    for name in ("prior", "volume", "reconstruction", "entropy", "standard_error", "latent", "log_p"):
        tolerance = {"rtol": 0, "atol": 1e-3 if times else 0}
        assert_close(getattr(alone, name)[0], getattr(whole, name)[2], **tolerance, msg=name)


class Small(torch.nn.Module):
    """tanh(x W + t)."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(randn(2, 2, seed=8) / 2)
        self.eval()

    def forward(self, x, t):
        return torch.tanh(x @ self.weight + t[:, None])


ENDS = {
    (solver, divergence): {
        "solver": FEW if solver == "odeint" else plan_of(steps=4),
        "divergence": sv.exact() if divergence == "exact" else sv.hutchinson(3),
        **(SHORT if solver == "odeint" else {}),
    }
    for solver in ("odeint", "plan")
    for divergence in ("exact", "hutchinson")
}


@pytest.mark.parametrize(("solver", "divergence"), ENDS)
def test_gradients_are_the_finite_differences(solver, divergence):
    model, x, way, step = Small(), randn(3, 2), randn(2, 2, seed=9), 1e-5
    run = partial(sv.log_likelihood, schedule=VP, grad=True, noise=1, **ENDS[solver, divergence])
    asking = x.clone().requires_grad_()
    found = run(model, x=asking).log_p.sum()
    of_x, of_weight = torch.autograd.grad(found, [asking, model.weight])

    def shifted(amount, of_model):
        with torch.no_grad():
            moved = Small()
            moved.weight += of_model * amount * way
            return run(moved, x=x + (not of_model) * amount * way[0]).log_p.sum().item()

    for gradient, direction, of_model in ((of_weight, way, True), (of_x, way[0], False)):
        difference = (shifted(step, of_model) - shifted(-step, of_model)) / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(("solver", "divergence"), ENDS)
def test_without_grad_nothing_requires_it_and_modes_and_generators_stay(solver, divergence):
    model, x = Small(), randn(3, 2)
    run = partial(sv.log_likelihood, model, VP, x, noise=1, **ENDS[solver, divergence])
    before = torch.get_rng_state()
    plain = run()
    fields = ("prior", "volume", "reconstruction", "entropy", "standard_error", "latent", "log_p")
    assert not any(getattr(plain, name).requires_grad for name in fields)
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(run().log_p, plain.log_p)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inner = sv.log_likelihood(model, VP, x.clone(), noise=1, **ENDS[solver, divergence])
        assert torch.equal(inner.log_p, plain.log_p)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.weight.grad is None


@pytest.mark.parametrize(("solver", "divergence"), ENDS)
def test_grad_is_kept_whatever_the_mode_of_the_caller(solver, divergence):
    model, x = Small(), randn(3, 2)
    with torch.no_grad():
        found = sv.log_likelihood(model, VP, x, grad=True, noise=1, **ENDS[solver, divergence])
    assert found.prior.requires_grad
    assert found.reconstruction.requires_grad
    assert found.volume.requires_grad


def score_error(solver, **times):
    """How far the gradient of log p is from the exact score of `line` at the stop."""
    x = exact("line", NARROW)[:4].clone().requires_grad_()
    found = sv.log_likelihood(
        MODELS["line"],
        VP,
        x,
        solver=solver,
        prior=marginal(DATA["line"], VP, NARROW[0]),
        grad=True,
        **times,
    )
    (gradient,) = torch.autograd.grad(found.log_p.sum(), x)
    return (gradient - DATA["line"].score(x.detach(), *level(VP, NARROW[1]))).abs().max().item()


def test_the_gradient_of_log_p_is_the_exact_score_to_the_order_of_the_plan():
    errors = [score_error(plan_of(METHODS["adams data"][1], n)) for n in (30, 60)]
    assert slopes(errors).item() > 3.5, errors
    assert errors[1] < 1e-4


def test_the_gradient_through_adaptive_steps_is_the_exact_score():
    assert score_error(partial(WAYS["angle"], rtol=1e-6, atol=1e-6), **SHORT) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("variable", VARIABLES)
def test_the_gradient_is_the_exact_score_in_every_variable(variable):
    assert score_error(WAYS[variable], **SHORT) < 1e-6


# With noise: a bound

VARIANCE = 0.3
CENTRED = Gaussian(torch.zeros(1), VARIANCE * torch.eye(1, dtype=torch.float64))


def exact_plan(stop):
    """One step of velocity form of the data's own scale is the exact flow of `CENTRED`."""
    return plan_of(sv.exponential_adams, 1, (NARROW[0], stop), order=1, scale=VARIANCE**0.5, **ANGLE)


def hermite(n):
    """Nodes and weights of the mean over a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def mean_bound(data, x0, plan, model, count=40):
    """log_p at each of some data [n], its mean over the noise."""
    nodes, weights = hermite(count)
    start = plan.times[-1].item()
    found = sv.log_likelihood(
        model,
        VP,
        x0.repeat_interleave(count)[:, None],
        solver=plan,
        noise=lambda draw, like: nodes.repeat(len(x0))[:, None],
        prior=marginal(data, VP, start),
    )
    return found.log_p.reshape(-1, count) @ weights


@pytest.mark.parametrize("half_logsnr", [0.0, 2.0])
def test_on_gaussian_data_the_bound_is_its_closed_form_and_below_the_data_in_the_mean(half_logsnr):
    """With e = sigma^2 / (alpha^2 v): log q(x_0) - (log(1 + e) - e / (1 + e)^2 (1 + e x_0^2 / v)) / 2."""
    stop = VP.time(torch.tensor(half_logsnr).double()).item()
    nodes, weights = hermite(20)
    x0, e = VARIANCE**0.5 * nodes, math.exp(-2 * half_logsnr) / VARIANCE
    found = mean_bound(CENTRED, x0, exact_plan(stop), network(CENTRED, VP))
    density = CENTRED.log_density(x0[:, None])
    gap = (math.log1p(e) - e / (1 + e) ** 2 * (1 + e * x0**2 / VARIANCE)) / 2
    assert_close(found, density - gap, rtol=1e-9, atol=1e-9)
    assert found @ weights < density @ weights - 0.1 * e**2 / (1 + e) ** 2


def test_the_bound_of_a_mixture_is_below_the_density_that_it_bounds_at_every_point():
    """That of alpha x + sigma eps decoded again, and so in the mean below the data's; tighter where less noise is added."""
    data, x0, gaps = DATA["line"], torch.linspace(-3.5, 3.5, 141, dtype=torch.float64), []
    weight = data.log_density(x0[:, None]).exp() * (x0[1] - x0[0])
    for half_logsnr in (1.0, 2.0):
        stop = VP.time(torch.tensor(half_logsnr).double()).item()
        alpha, sigma = level(VP, stop)
        plan = plan_of(METHODS["rk velocity 0.6"][1], 8, (NARROW[0], stop))
        found = mean_bound(data, x0, plan, MODELS["line"])
        x = torch.linspace(-4, 4, 1601, dtype=torch.float64)
        decoder = torch.distributions.Normal(data.data(x[:, None], alpha, sigma)[:, 0], sigma / alpha)
        joint = marginal(data, VP, stop)(x[:, None]) + decoder.log_prob(x0[:, None])
        decoded = torch.trapezoid(joint.exp(), x).log()
        assert (found < decoded + 1e-3).all()
        gaps.append(((data.log_density(x0[:, None]) - found) @ weight).item())
    assert gaps[0] > 5 * gaps[1] > 0


@pytest.mark.parametrize("variance", [None, 0.02])
def test_the_terms_of_the_bound_are_those_of_gaussian_data(variance):
    data, stop = DATA["2x3"], NARROW[1]
    alpha, sigma = level(VP, stop)
    x0, eps = data.draw(4, generator(5)), randn(4, 2, 3, seed=6)
    found = sv.log_likelihood(
        network(data, VP),
        VP,
        x0,
        solver=plan_of(steps=2),
        noise=lambda draw, like: eps,
        decoder=None if variance is None else sv.Decoder(variance),
    )
    x = alpha * x0 + sigma * eps
    gain = alpha * data.cov @ torch.linalg.inv(data.marginal(alpha, sigma).cov)
    mean = data.mean + ((x - alpha * data.mean).reshape(4, 6) @ gain).reshape(4, 2, 3)
    spread = sigma / alpha if variance is None else variance**0.5
    terms = {
        "reconstruction": torch.distributions.Normal(mean, spread).log_prob(x0),
        "entropy": -torch.distributions.Normal(alpha * x0, sigma).log_prob(x),
    }
    for name, expected in terms.items():
        assert_close(getattr(found, name), expected.sum((1, 2)), rtol=1e-10, atol=1e-10)
    at_stop = sv.log_likelihood(network(data, VP), VP, x, solver=plan_of(steps=2))
    assert_close(found.log_p, at_stop.log_p + found.entropy + found.reconstruction, rtol=1e-12, atol=1e-12)


def test_with_noise_a_seed_is_the_streams_of_its_samples():
    run = partial(sv.log_likelihood, MODELS["line"], VP, exact("line", NARROW)[:3], solver=plan_of(steps=2))
    seeded, streams, other = (run(noise=n).log_p for n in (7, sv.noise.per_sample(7, range(3)), 8))
    assert torch.equal(seeded, streams)
    assert not torch.equal(seeded, other)
    assert run(noise=generator(1)).log_p.isfinite().all()


# The decoder

LEVELS = torch.tensor([-1.0, -0.6, 0.1, 0.5, 2.0], dtype=torch.float64)
BOUNDS = torch.tensor([-math.inf, -0.8, -0.25, 0.3, 1.25, math.inf], dtype=torch.float64)


@pytest.mark.parametrize("deviation", [0.01, 0.3, 5.0])
@pytest.mark.parametrize("given", ["variance", "level"])
def test_the_probabilities_of_the_levels_are_differences_of_the_normal_cdf_and_sum_to_1(deviation, given):
    mean = torch.linspace(-1.5, 2.5, 41, dtype=torch.float64)
    decoder = sv.Decoder(deviation**2 if given == "variance" else None, LEVELS)
    shape = (len(LEVELS), len(mean))
    x0, around = LEVELS[:, None].expand(shape).reshape(-1, 1), mean.expand(shape).reshape(-1, 1)
    p = decoder.log_p(x0, around, deviation).exp().reshape(shape)
    cdf = torch.from_numpy(stats.norm.cdf(BOUNDS[:, None], mean, deviation))
    assert_close(p, cdf.diff(dim=0), rtol=1e-9, atol=1e-15)
    assert_close(p.sum(0), torch.ones_like(mean), rtol=1e-13, atol=0)


@pytest.mark.parametrize("deviation", [1e-3, 0.05, 1.0, 1e3])
def test_log_probabilities_keep_their_digits_and_gradients_far_in_both_tails(deviation):
    """The cell from a to b, of z: -a^2 / 2 - log(2 pi) / 2 + log int_0^{b - a} exp(-a s - s^2 / 2) ds, by Gauss-Legendre."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    points, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(40))
    away = torch.tensor([0.1, 1.0, 30.0, 200.0], dtype=torch.float64) * max(deviation, 1 / 255)
    width = 2 / 255 / deviation
    a = (away - 1 / 255) / deviation
    s = (points + 1) / 2 * (span := (20 / a.clamp(min=1)).clamp(max=width))[:, None]
    inside = (weights * torch.exp(-a[:, None] * s - s**2 / 2)).sum(1) * span / 2
    expected = -(a**2) / 2 - math.log(2 * math.pi) / 2 + inside.log()
    for side in (1, -1):
        mean = (levels[128] + side * away[:, None]).requires_grad_()
        log_p = sv.Decoder(levels=levels).log_p(levels[128].repeat(4, 1), mean, deviation)
        assert_close(log_p.detach(), expected, rtol=1e-9, atol=0)
        (slope,) = torch.autograd.grad(log_p.sum(), mean)
        assert slope.isfinite().all()
        assert (slope * side < 0).all()


def test_data_may_lie_in_memory_in_any_order():
    """torch warns of what is not contiguous, once a program."""
    x0 = LEVELS[torch.randint(5, (3, 2, 4), generator=generator(1))]
    decoder, always = sv.Decoder(levels=LEVELS), torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        found = decoder.log_p(x0.permute(0, 2, 1), x0.permute(0, 2, 1), 0.1)
    finally:
        torch.set_warn_always(always)
    assert_close(found, decoder.log_p(x0, x0, 0.1), rtol=1e-12, atol=0)


def test_an_outermost_cell_takes_all_that_lies_beyond():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for sign in (1, -1):
        for away in (0.0, 1.0, 100.0):
            mean = sign * torch.full((1, 1), 1 + away, dtype=torch.float64)
            log_p = sv.Decoder(levels=levels).log_p(sign * levels[-1:, None], mean, 0.1)
            assert_close(log_p.exp().item(), stats.norm.cdf((1 / 255 + away) / 0.1), rtol=1e-12, atol=0)


def test_levels_are_found_in_float32_and_summed_over_the_elements():
    levels = torch.linspace(-1, 1, 256)
    x0 = levels[torch.randint(256, (3, 2, 4), generator=generator(1))]
    mean = x0 + 0.01 * randn(3, 2, 4).float()
    decoder = sv.Decoder(0.02**2, levels)
    single = decoder.log_p(x0.reshape(-1, 1), mean.reshape(-1, 1), 0.0).reshape(3, 8)
    found = decoder.log_p(x0, mean, 0.0)
    assert found.dtype == torch.float64
    assert_close(found, single.sum(1), rtol=1e-12, atol=0)


# Bits


@pytest.mark.parametrize(
    ("offset", "options"),
    [
        (7, {"bins": 256}),
        (8, {"bins": 256, "low": 0.0}),
        (0, {"bins": 1, "low": 0, "high": 1}),
        (math.log2(5 / 3), {"bins": 5, "low": -1.0, "high": 2.0}),
    ],
)
def test_the_offset_of_bits_is_that_of_the_width_of_a_bin(offset, options):
    log_p = torch.tensor([0.0, -6 * math.log(2), 12 * math.log(2)], dtype=torch.float64)
    bits = sv.bits_per_dim(log_p, (2, 3), **options)
    assert_close(
        bits, torch.tensor([offset, offset + 1, offset - 2], dtype=torch.float64), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize(("bins", "low", "high"), [(256, -1.0, 1.0), (256, 0.0, 1.0), (5, -3.0, 0.5)])
def test_uniform_data_have_as_many_bits_as_it_takes_to_number_the_bins(bins, low, high):
    uniform = torch.full((2,), -6 * math.log(high - low), dtype=torch.float64)
    assert_close(
        sv.bits_per_dim(uniform, (6,), bins, low, high),
        torch.full_like(uniform, math.log2(bins)),
        rtol=1e-14,
        atol=0,
    )


@pytest.mark.parametrize(("bins", "low", "high"), [(7, -1.0, 1.0), (256, 0.0, 1.0), (3, -2.0, 5.0)])
def test_dequantized_values_are_uniform_in_their_bins_and_of_their_own_streams(bins, low, high):
    values = torch.randint(bins, (40, 5, 5), generator=generator(1))
    found = sv.dequantized(values, bins, 3, low, high)
    assert found.dtype == torch.float32
    place = (found.double() - low) / (high - low) * bins
    assert torch.equal(place.floor().long(), values)
    assert stats.kstest((place - values).flatten(), "uniform").pvalue > 0.01
    alone = sv.dequantized(values[7:8].double(), bins, sv.noise.per_sample(3, [7]), low, high)
    assert torch.equal(alone, found[7:8])
    assert not torch.equal(sv.dequantized(values, bins, 4, low, high), found)


@pytest.mark.parametrize("side", [-6.0, 6.0])
def test_dequantized_values_stay_in_their_bins_where_the_noise_is_far_out(side):
    values = torch.arange(256)[:, None]
    found = sv.dequantized(values, 256, lambda draw, like: torch.full_like(like, side))
    assert torch.equal(((found.double() + 1) * 128).floor().long(), values)


# There and back


def test_there_and_back_again_and_the_latents_are_the_exact_flow():
    x, solver = exact("line", FULL)[:5], partial(sv.odeint, rtol=1e-7, atol=1e-7, variable="angle")
    latent = sv.encode(MODELS["line"], VP, x, solver)
    assert_close(latent, DATA["line"].flow(x, VP, *FULL[::-1]), rtol=0, atol=1e-5)
    by_hand = (sv.decode(MODELS["line"], VP, latent, solver) - x).square().mean(1).sqrt()
    found = sv.round_trip_error(MODELS["line"], VP, x, solver)
    assert torch.equal(found, by_hand)
    assert (found <= 1e-5).all()


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_there_and_back_again_by_every_way(way):
    data = DATA["2x3"]
    x = states(data, VP, NARROW[1], 4)
    options = {"solver": WAYS[way], **SHORT}
    assert_close(
        sv.encode(network(data, VP), VP, x, **options),
        data.flow(x, VP, *NARROW[::-1]),
        rtol=0,
        atol=1e-6,
    )
    error = sv.round_trip_error(network(data, VP), VP, x, **options)
    assert error.shape == (4,)
    assert (error < 1e-6).all()


def test_round_trip_error_is_the_root_mean_square_over_elements_and_sees_coarse_steps():
    x = EIGHT[:3].reshape(3, 2, 4)
    model = sv.Model(lambda x, t: MODELS["eight"](x.reshape(-1, 8), t).reshape(x.shape))
    coarse = partial(sv.odeint, method="euler", options={"step_size": 0.2}, variable="angle")
    back = sv.decode(model, VP, sv.encode(model, VP, x, coarse, **SHORT), coarse, **SHORT)
    error = sv.round_trip_error(model, VP, x, coarse, **SHORT)
    assert_close(error, ((back - x) ** 2).sum((1, 2)).div(8).sqrt(), rtol=1e-12, atol=0)
    assert (error > 0.01).all()


def test_plans_encode_and_decode():
    x, up = exact("line", NARROW)[:5], plan_of(sv.heun, 40)
    down = sv.heun(VP, grid(VP, *NARROW, torch.linspace(0, 1, 41, dtype=torch.float64)))
    latent = sv.encode(MODELS["line"], VP, x, up)
    assert torch.equal(latent, sv.run(up, MODELS["line"], x))
    back = sv.decode(MODELS["line"], VP, latent, down)
    assert torch.equal(back, sv.run(down, MODELS["line"], latent))
    assert_close(back, x, rtol=0, atol=1e-3)


# What cannot be done

X = exact("line", NARROW)[:2]
DOWN = sv.unipc(VP, sv.logsnr(VP, 3))
UP = plan_of(steps=3)


def ll(x=X, divergence=None, solver=UP, model=MODELS["line"], schedule=VP, **options):
    return sv.log_likelihood(model, schedule, x, divergence, solver, **options)


def without_gradient(x, t):
    with torch.no_grad():
        return cubic(x, t)


def shifted():
    return sv.dpm_solver_v3(INVERSE, UP.times, sv.gaussian_statistics(0.2, 0.7))


def per_element():
    return replace(UP, a=UP.a[:, None], b=UP.b[..., None])


BAD = {
    "no probes": (lambda: sv.hutchinson(0), ValueError, "probes = 0: expected a whole number from 1"),
    "half a probe": (lambda: sv.hutchinson(1.5), TypeError, "probes = 1.5: expected a whole number"),
    "unknown probes": (
        lambda: sv.hutchinson(1, "normal"),
        ValueError,
        "distribution = 'normal': expected one of 'rademacher', 'gaussian'; did you mean 'gaussian'?",
    ),
    "no limit": (lambda: sv.exact(0), ValueError, "limit = 0: expected a whole number from 1"),
    "above the limit": (
        lambda: ll(torch.zeros(1, 1025), model=cubic),
        ValueError,
        r"a sample has 1025 elements, more than limit = 1024: take divergence=hutchinson\(\), or exact\(limit=1025\)",
    ),
    "above a limit": (lambda: ll(torch.zeros(1, 2, 2), sv.exact(3), model=cubic), ValueError, "limit = 3: take"),
    "no_grad": (lambda: ll(model=without_gradient), ValueError, "no gradient flows through the model"),
    "no_grad by odeint": (
        lambda: ll(model=without_gradient, solver=FEW, **SHORT),
        ValueError,
        r"no gradient flows through the model: call it without torch.no_grad\(\)",
    ),
    "detach": (lambda: ll(model=lambda x, t: cubic(x.detach(), t)), ValueError, "and without detach"),
    "half precision": (lambda: ll(X.half()), TypeError, r"torch.float16, in which a density has no digits: pass x.float\(\)"),
    "bfloat16": (lambda: ll(X.bfloat16(), solver=FEW), TypeError, "torch.bfloat16, in which a density has no digits"),
    "a list": (lambda: ll([[1.0]]), TypeError, "x is list: expected a torch.Tensor"),
    "whole numbers": (lambda: ll(X.long()), TypeError, "x has dtype torch.int64: expected a real floating-point tensor"),
    "no batch": (lambda: ll(torch.tensor(1.0)), ValueError, "x has no batch dimension"),
    "not finite": (lambda: ll(X * math.nan), ValueError, "every entry of the starting state must be finite"),
    "gradient not asked for": (
        lambda: ll(X.clone().requires_grad_()),
        ValueError,
        r"x requires a gradient, but the run keeps no graph: pass grad=True, or x.detach\(\)",
    ),
    "the name of a divergence": (lambda: ll(divergence="exact"), TypeError, r"divergence = 'exact': expected exact\(\) or hutchinson"),
    "a divergence not called": (lambda: ll(divergence=sv.exact), TypeError, r"divergence = .*: expected exact\(\) or hutchinson"),
    "a prior of every element": (
        lambda: ll(prior=lambda z: -(z**2)),
        ValueError,
        r"prior gave shape \[.*\]: expected the log-density of each latent, \[\d+\], summed over its elements",
    ),
    "a prior that is a number": (lambda: ll(prior=lambda z: 0.0), ValueError, "prior gave float: expected the log-density"),
    "a decoder of nothing": (lambda: ll(decoder=sv.Decoder()), ValueError, "decoder without noise"),
    "values in a list": (lambda: sv.dequantized([1, 2], 256, 0), TypeError, "values is list: expected a tensor of whole numbers"),
    "too many bins": (lambda: sv.dequantized(torch.zeros(1, 1), 2**31, 0), ValueError, "bins = 2147483648: expected a whole number from 1 to 65536"),
    "a size for a shape": (lambda: sv.bits_per_dim(torch.zeros(1), 8, 256), TypeError, "shape = 8: expected that of one sample"),
    "grad is no flag": (lambda: ll(grad=1), TypeError, "grad = 1: expected True or False"),
    "stochastic": (
        lambda: ll(solver=sv.ddpm(VP, sv.logsnr(VP, 3))),
        ValueError,
        r"the plan is stochastic: expected a deterministic one for the inversion: method\(sv.Inversion\(schedule\)",
    ),
    "downwards": (lambda: ll(solver=DOWN), ValueError, "the plan is from t = 1 to 0.001: expected a deterministic one for the inversion"),
    "encode downwards": (lambda: sv.encode(cubic, VP, X, DOWN), ValueError, "for the inversion"),
    "decode upwards": (
        lambda: sv.decode(cubic, VP, X, UP),
        ValueError,
        "the plan is from t = .* expected a deterministic one for the schedule, from noise to data",
    ),
    "round trip": (lambda: sv.round_trip_error(cubic, VP, X, UP), TypeError, "solver is a Plan, which leads one way"),
    "another schedule": (
        lambda: ll(schedule=sv.Cosine()),
        ValueError,
        r"the plan's alpha is not that of Cosine\(.*\) at its times: give the schedule that it was built with",
    ),
    "another sigma": (
        lambda: ll(schedule=sv.EDM(), solver=plan_of(ends=(0.9, 0.1), schedule=sv.VE())),
        ValueError,
        r"the plan's sigma is not that of EDM\(",
    ),
    "encode by another schedule's": (lambda: sv.encode(cubic, sv.Cosine(), X, UP), ValueError, "the plan's alpha is not"),
    "start and stop exchanged": (
        lambda: ll(solver=FEW, start=NARROW[1], stop=NARROW[0]),
        ValueError,
        "times must increase from data to noise",
    ),
    "start": (lambda: ll(start=0.9), ValueError, "start and stop are the plan's own: leave them out"),
    "stop": (lambda: sv.encode(cubic, VP, X, UP, stop=0.1), ValueError, "start and stop are the plan's own"),
    "shift": (lambda: ll(solver=shifted()), ValueError, "per element, or add a constant: expected one of numbers alone"),
    "shift of probes": (lambda: ll(X, sv.hutchinson(), shifted()), ValueError, "or add a constant"),
    "per element": (lambda: ll(X, sv.hutchinson(), per_element()), ValueError, "coefficients are per element"),
    "no solver": (lambda: ll(solver="dopri5"), TypeError, r"solver = 'dopri5': expected \(model, schedule, x, start=, stop=\) -> Solution"),
    "encode by no solver": (lambda: sv.encode(cubic, VP, X, None), TypeError, "solver = None: expected"),
    "variance": (lambda: sv.Decoder(0.0), ValueError, "variance = 0.0: expected a finite number above 0"),
    "levels fall": (lambda: sv.Decoder(levels=-LEVELS), ValueError, "expected at least 2 finite increasing numbers"),
    "one level": (lambda: sv.Decoder(levels=LEVELS[:1]), ValueError, "expected at least 2 finite increasing numbers"),
    "between levels": (
        lambda: sv.Decoder(levels=LEVELS).log_p(LEVELS[:2, None] + 0.01, LEVELS[:2, None], 0.1),
        ValueError,
        "x0 has a value -0.99 that is none of the 5 levels from -1 to 2: give the data as they are",
    ),
    "bins": (lambda: sv.bits_per_dim(torch.zeros(1), (2,)), ValueError, r"bins = None: .* e.g. bins=256"),
    "no bins": (lambda: sv.bits_per_dim(torch.zeros(1), (2,), 0), ValueError, "bins = 0: expected a whole number from 1"),
    "no elements": (lambda: sv.bits_per_dim(torch.zeros(1), (2, 0), 256), ValueError, r"shape = \(2, 0\): expected"),
    "low above high": (lambda: sv.bits_per_dim(torch.zeros(1), (2,), 256, 1, 0), ValueError, "low = 1 must lie below high = 0"),
    "fraction": (lambda: sv.dequantized(torch.tensor([[0.5]]), 4, 0), ValueError, "values has 0.5: expected whole numbers from 0 to bins - 1 = 3"),
    "too large": (lambda: sv.dequantized(torch.tensor([[4]]), 4, 0), ValueError, "values has 4: expected whole numbers"),
    "negative": (lambda: sv.dequantized(torch.tensor([[-1]]), 4, 0), ValueError, "values has -1: expected whole numbers"),
    "NaN": (lambda: sv.dequantized(torch.tensor([[math.nan]]), 4, 0), ValueError, "values has nan: expected whole numbers"),
    "bins of values": (lambda: sv.dequantized(torch.tensor([[0]]), 0, 0), ValueError, "bins = 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused_with_the_line_to_write(name):
    attempt, error, words = BAD[name]
    with pytest.raises(error, match=words):
        attempt()


@pytest.mark.parametrize("options", [{}, {"solver": FEW, **SHORT}], ids=["plan", "odeint"])
def test_weights_of_inference_mode_are_refused(options):
    with torch.inference_mode():
        layer = torch.nn.Linear(1, 1).double().eval()
    with pytest.raises(ValueError, match=r"weights are inference tensors.* outside torch.inference_mode\(\)"):
        ll(model=lambda x, t: layer(x), **options)


@pytest.mark.parametrize("options", [{}, {"solver": FEW, **SHORT}], ids=["plan", "odeint"])
def test_a_detached_input_is_refused_even_if_the_weights_take_gradients(options):
    layer = torch.nn.Linear(1, 1).double().eval()
    with pytest.raises(ValueError, match="no gradient flows through"):
        ll(model=lambda x, t: layer(x.detach()), **options)


@pytest.mark.parametrize("decoder", [None, sv.Decoder(0.1)], ids=["default", "variance"])
def test_at_no_noise_there_is_nothing_to_bound(decoder):
    schedule = sv.Flow(start=0.9)
    with pytest.raises(ValueError, match="sigma = 0 at stop"):
        sv.log_likelihood(network(CENTRED, schedule), schedule, X, noise=0, decoder=decoder, solver=FEW)


def test_a_network_in_training_mode_is_told_of():
    model = Small().train()
    with pytest.warns(UserWarning, match="training mode") as caught:
        ll(randn(2, 2), model=model)
    assert [warning.filename for warning in caught] == [__file__]
    ll(randn(2, 2), model=model, grad=True)


def test_no_samples_are_no_error():
    for divergence in (sv.exact(), sv.hutchinson(3)):
        for options in ({}, {"solver": WAYS["angle"]}, {"noise": 0}):
            found = ll(X[:0], divergence, **options)
            assert found.log_p.shape == found.nfe.shape == found.standard_error.shape == (0,)
            assert found.latent.shape == (0, 1)
            assert "0 samples" in repr(found)
    assert sv.encode(MODELS["line"], VP, X[:0]).shape == (0, 1)
    assert sv.decode(MODELS["line"], VP, X[:0], DOWN).shape == (0, 1)
    assert sv.bits_per_dim(torch.zeros(0), (1,), 256).shape == (0,)


def test_no_samples_make_no_round_trip_error():
    assert sv.round_trip_error(MODELS["line"], VP, X[:0]).shape == (0,)


@pytest.mark.parametrize("divergence", [sv.exact(), sv.hutchinson(2)], ids=["exact", "hutchinson"])
def test_samples_may_be_numbers(divergence):
    for options in ({}, {"solver": FEW, **SHORT}):
        column = ll(randn(3, 1), divergence, model=cubic, noise=1, **options)
        numbers = ll(randn(3, 1)[:, 0], divergence, model=cubic, noise=1, **options)
        assert numbers.latent.shape == (3,)
        assert_close(numbers.log_p, column.log_p, rtol=1e-12, atol=1e-12)
    assert sv.round_trip_error(cubic, VP, randn(3), FEW, **SHORT).shape == (3,)


def test_a_plan_of_long_steps_that_folds_counts_every_x_of_a_latent():
    """Two narrow peaks, two steps: the map turns back, and the integral of the density is above 1; of smooth data it is 1."""
    line = torch.linspace(-8, 8, 20001, dtype=torch.float64)[:, None]
    found = []
    for deviation in (0.05, 0.7):
        data = Mixture(
            torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), deviation**2)
        )
        back = sv.Inversion(VP)
        plan = sv.exponential_adams(back, sv.angle(back, 2), order=1, predicts="velocity")
        density = sv.log_likelihood(data.model(VP), VP, line, solver=plan)
        turns = (density.latent.diff(dim=0) < 0).any()
        found.append((bool(turns), float(density.log_p.exp().sum()) * 16 / 20000))
    assert found[0][0]
    assert found[0][1] > 1.5
    assert not found[1][0]
    assert abs(found[1][1] - 1) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_does_not_determine_the_ode_at_alpha_0_and_odeint_says_so(dtype):
    x = torch.zeros(2, 3, dtype=dtype)
    for schedule in (sv.Flow(), sv.Discrete.linear(10).zero_terminal_snr()):
        with pytest.raises(ValueError, match="noise prediction does not determine velocity at t = 1"):
            sv.odeint(sv.Model(lambda x, t: 0.9 * x, label=lambda t: t), schedule, x, variable="angle")


def test_a_norm_of_the_user_s_leaves_gradients_alone_and_scipy_is_refused():
    x = X[:2, :1].clone().requires_grad_()
    options = {"norm": lambda y: y.abs().max()}
    solver = partial(sv.odeint, rtol=1e-6, atol=1e-6, variable="angle", options=options)
    found = sv.log_likelihood(cubic, VP, x, solver=solver, grad=True)
    (slope,) = torch.autograd.grad(found.log_p[0], x)
    assert slope[1] == 0
    with pytest.raises(ValueError, match="scipy keeps no graph"):
        sv.odeint(cubic, VP, x, "scipy_solver", grad=True)


@pytest.mark.parametrize(
    "answer", [lambda x: torch.cat([x, x], 1), lambda x: (x, x)], ids=["channels", "pair"]
)
def test_an_answer_of_the_wrong_shape_is_refused_by_plans_as_by_odeint(answer):
    for solver in (UP, FEW):
        with pytest.raises(ValueError, match=r"the model returned .* expected floating point"):
            ll(model=lambda x, t: answer(x), solver=solver, **({} if solver is UP else SHORT))


def test_a_probe_for_each_sample_is_asked_of_a_source():
    with pytest.raises(ValueError, match=r"noise gave shape \[1, 3\]"):
        ll(divergence=sv.hutchinson(noise=lambda k, x: torch.randn(1, 3)))
    with pytest.raises(TypeError, match="noise is NoneType"):
        sv.hutchinson(noise=None)

"""Networks with a second output: what it chooses, the law that follows, the losses that train it."""

import math

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import VP, generator
from reference import Gaussian, law

TIMES = sv.logsnr(VP, 4, start=0.9)
MEAN = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
VARIANCE = torch.tensor([0.05, 2.0, 1e-8], dtype=torch.float64)
DATA = Gaussian(MEAN, torch.diag(VARIANCE))
DDPM = sv.Discrete.linear(1000)
PLANS = {  # each with what its second output may be
    "learned": (lambda times=TIMES: sv.ddpm(VP, times, variance="learned"), "range"),
    "square": (lambda times=TIMES: sv.extended_analytic_dpm(VP, times), "square"),
    "square eta 0.6": (lambda times=TIMES: sv.extended_analytic_dpm(VP, times, eta=0.6), "square"),
    "residual eta 0": (lambda times=TIMES: sv.extended_analytic_dpm(VP, times, eta=0.0), "residual"),
}
NAMES = pytest.mark.parametrize("name", PLANS)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def net(x, t):
    """Element by element: a prediction, and a second output that takes values of all kinds."""
    column = t.reshape(-1, *[1] * (x.ndim - 1))
    return (0.9 * x).sin() * (0.5 + column), (3 * x + column).cos()


def doubled(x, t):
    return torch.cat(net(x, t), 1)


def made(name):
    build, kind = PLANS[name]
    return build(), sv.Model(net, variance=kind)


def exact(kind, schedule=VP):
    """The exact noise prediction and second moment on DATA, element by element."""

    def outputs(x, t):
        alpha, sigma = schedule.alpha(t[:1].double()), schedule.sigma(t[:1].double())
        total = alpha**2 * VARIANCE + sigma**2
        eps = sigma * (x - alpha * MEAN) / total
        spread = alpha**2 * VARIANCE / total
        second = spread + eps**2 if kind == "square" else spread.expand_as(eps)
        return eps.to(x), second.to(x)

    return sv.Model(outputs, variance=kind)


# Two ways to return it, and who reads it


@NAMES
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4, 5)])
def test_a_pair_and_doubled_channels_are_the_same(name, shape):
    plan, model = made(name)
    x = normals(*shape)
    pair = sv.run(plan, model, x, noise=0)
    assert torch.equal(pair, sv.run(plan, sv.Model(doubled, variance=model.variance), x, noise=0))
    other = sv.Model(lambda x, t: (net(x, t)[0], 0.5 * net(x, t)[1]), variance=model.variance)
    assert not torch.equal(pair, sv.run(plan, other, x, noise=0))


@pytest.mark.parametrize("method", [sv.dpm_solver_pp, sv.heun, sv.recommended, sv.ddpm])
@pytest.mark.parametrize("kind", ["range", "square", "residual"])
@pytest.mark.parametrize("two", [net, doubled])
def test_plans_that_do_not_ask_leave_the_second_output_aside(method, kind, two):
    plan, x = method(VP, TIMES), normals(5, 3)
    noise = 0 if plan.is_stochastic else None
    plain = sv.run(plan, lambda x, t: net(x, t)[0], x, noise=noise)
    assert torch.equal(plain, sv.run(plan, sv.Model(two, variance=kind), x, noise=noise))


def test_sample_and_other_predictions_know_it_too():
    x = normals(5, 3)
    plain = sv.sample(lambda x, t: net(x, t)[0], x, VP, steps=5)
    assert torch.equal(plain, sv.sample(sv.Model(net, variance="square"), x, VP, steps=5))
    plan, kind = PLANS["square"][0](), "square"
    expected = sv.run(plan, exact(kind), x, noise=0)

    def velocity(x, t):
        eps, second = exact(kind).net(x, t)
        alpha, sigma = float(VP.alpha(t[:1].double())), float(VP.sigma(t[:1].double()))
        return sv.convert(eps, x, alpha, sigma, have="noise", want="velocity"), second

    assert_close(sv.run(plan, sv.Model(velocity, "velocity", variance=kind), x, noise=0), expected)


# What it chooses: the textbook loops


def textbook(times, variance_of, x, eta=1.0, schedule=VP):
    """DDIM's step with variance_of(own, weight of x_0, rho_s, large, eps, second, row) in place of its own."""
    plan = sv.ddim(schedule, times, eta=eta)
    own = plan.c[:, 0] if eta else 0 * plan.a
    source = sv.noise.per_sample(0, range(len(x)))
    for i, (a, b, c) in enumerate(zip(plan.a, plan.b[:, 0], own, strict=True)):
        (alpha, sigma), sigma_t = (plan.alpha[i], plan.sigma[i]), plan.sigma[i + 1]
        eps, second = net(x, times[i : i + 1])
        large = sigma**2 * (1 - (alpha * sigma_t / plan.alpha[i + 1] / sigma) ** 2)
        variance = variance_of(c**2, b, sigma / alpha, large, eps, second, i)
        x = a * x + b * (x - sigma * eps) / alpha + variance.sqrt() * source(i, x)
    return x


def test_the_learned_range_is_improved_ddpm_s():
    """Eq. 15: exp(v log large + (1 - v) log small), v in [0, 1] from an output in [-1, 1]; none to sigma = 0."""

    def between(small, b, rho, large, eps, second, i):
        v = (second + 1) / 2
        return torch.exp(v * large.log() + (1 - v) * small.log()) if small else 0 * second

    x, times = normals(5, 3), torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
    got = sv.run(sv.ddpm(VP, times, variance="learned"), sv.Model(net, variance="range"), x, noise=0)
    assert_close(got, textbook(times, between, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_the_ends_of_the_range_are_the_fixed_variances(v, variance):
    times = sv.trailing(DDPM, 5)

    def ends(x, t):
        return net(x, t)[0], torch.full_like(x, v)

    x = normals(5, 3)
    learned = sv.run(sv.ddpm(DDPM, times, variance="learned"), sv.Model(ends, variance="range"), x, noise=0)
    fixed = sv.run(sv.ddpm(DDPM, times, variance=variance), lambda x, t: net(x, t)[0], x, noise=0)
    assert_close(learned, fixed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("kind", ["square", "residual"])
@pytest.mark.parametrize("bounds", [{}, {"limit": 0.2}, {"pixels": 2.0}, {"limit": 0.5, "pixels": 1.0}])
def test_the_variance_is_that_of_the_theorems_and_its_clamps_act(kind, bounds, eta):
    """L^2 + A^2 min(Var(x_0 | x), limit), and at most `pixels` in the last step."""
    last = (2 / 255 * bounds.get("pixels", math.inf)) ** 2 * math.pi / 2

    def variance(own, b, rho, large, eps, second, i):
        noise = (second - eps**2 if kind == "square" else second).clamp(min=0)
        whole = own + b**2 * (rho**2 * noise).clamp(max=bounds.get("limit", math.inf))
        return whole.clamp(max=last) if i == 3 else whole

    x = normals(5, 3)
    plan = sv.extended_analytic_dpm(VP, TIMES, eta=eta, **bounds)
    got = sv.run(plan, sv.Model(net, variance=kind), x, noise=0)
    assert_close(got, textbook(TIMES, variance, x, eta), rtol=1e-11, atol=1e-11)
    if bounds:
        free = sv.run(sv.extended_analytic_dpm(VP, TIMES, eta=eta), sv.Model(net, variance=kind), x, noise=0)
        assert (got - free).abs().max() > 1e-3


def test_ones_are_the_heuristic_that_costs_no_training():
    """1 - eps^2, where it is not negative."""

    def variance(own, b, rho, large, eps, second, i):
        return own + b**2 * rho**2 * (1 - eps**2).clamp(min=0)

    x = 2 * normals(5, 3)
    model = sv.Model(lambda x, t: (net(x, t)[0], torch.ones_like(x)), variance="square")
    got = sv.run(sv.extended_analytic_dpm(VP, TIMES), model, x, noise=0)
    assert_close(got, textbook(TIMES, variance, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("last", "count"), [("mean", 1), ("noise", 2)])
def test_the_last_step_is_the_prediction_or_the_law(last, count):
    """To sigma = 0: `last` decides, and `pixels` bounds the last noise that is added."""
    times = torch.tensor([0.9, 0.3, 0.0], dtype=torch.float64)
    drawn = []

    def source(draw, like):
        drawn.append(draw)
        return torch.zeros_like(like)

    plan = sv.extended_analytic_dpm(VP, times, last=last, pixels=2.0)
    sv.run(plan, sv.Model(net, variance="square"), normals(2, 3), noise=source)
    assert drawn == list(range(count))
    assert plan.variances[:, 2].isinf().tolist() == [last == "noise", False]


# The law


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("schedule", [VP, sv.EDM(), sv.SubVP()], ids=["vp", "edm", "sub-vp"])
def test_the_law_is_the_marginal_in_any_number_of_steps(schedule, eta, steps):
    plan = sv.extended_analytic_dpm(schedule, sv.logsnr(schedule, steps), eta=eta)
    got, marginal = law(plan, DATA), DATA.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
    assert_close(got.mean, marginal.mean, rtol=1e-10, atol=1e-10)
    assert_close(got.cov, marginal.cov, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_law_is_the_data_s_where_the_last_step_to_sigma_0_has_its_noise(eta):
    times = torch.tensor([0.9, 0.4, 0.0], dtype=torch.float64)
    got = law(sv.extended_analytic_dpm(VP, times, eta=eta, last="noise"), DATA)
    assert_close(got.cov, DATA.cov, rtol=1e-10, atol=1e-10)
    mean = law(sv.extended_analytic_dpm(VP, times, eta=eta), DATA)
    assert (mean.cov.diagonal() < DATA.cov.diagonal()).all()


@pytest.mark.parametrize("kind", ["square", "residual"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bounds", [{}, {"limit": 0.3, "pixels": 2.0}])
def test_runs_with_exact_second_moments_have_that_law(kind, eta, bounds):
    plan, n = sv.extended_analytic_dpm(VP, TIMES, eta=eta, **bounds), 100_000
    x = DATA.marginal(plan.alpha[0].item(), plan.sigma[0].item()).draw(n, generator())
    out, expected = sv.run(plan, exact(kind), x, noise=generator(1)), law(plan, DATA)
    variance = expected.cov.diagonal()
    assert ((out.mean(0) - expected.mean) / variance.sqrt() * n**0.5).abs().max() < 4.5
    assert ((out.var(0) / variance - 1) * (n / 2) ** 0.5).abs().max() < 4.5
    correlation = torch.corrcoef(out.T) - torch.eye(3)
    assert correlation.abs().max() * n**0.5 < 4.5


def test_the_law_asks_for_independent_elements():
    full = Gaussian(MEAN, torch.diag(VARIANCE) + 0.01)
    with pytest.raises(ValueError, match="expected a diagonal cov"):
        law(PLANS["square"][0](), full)


# Runs


def test_the_learned_range_reaches_from_zero_snr_to_clean_data():
    schedule = DDPM.zero_terminal_snr()
    plan = sv.ddpm(schedule, sv.trailing(schedule, 5), variance="learned")
    model = sv.Model(net, "velocity", label=schedule.label, variance="range")
    assert sv.run(plan, model, normals(2, 3), noise=0).isfinite().all()


@NAMES
def test_a_sample_does_not_know_its_batch(name):
    plan, model = made(name)
    x = 1.5 * normals(64, 5)
    together = sv.run(plan, model, x, noise=3)
    for size in (1, 2, 7):
        ids = range(10, 10 + size)
        part = sv.run(plan, model, x[10 : 10 + size], noise=sv.noise.per_sample(3, ids))
        assert torch.equal(part, together[10 : 10 + size])


@NAMES
def test_a_run_with_its_graph_is_the_same_run(name):
    plan, model = made(name)
    x = normals(5, 3)
    kept = sv.run(plan, model, x.clone().requires_grad_(), noise=0, grad=True)
    assert_close(kept.detach(), sv.run(plan, model, x, noise=0), rtol=1e-14, atol=1e-14)
    assert kept.requires_grad


def test_gradients_flow_through_the_chosen_variance():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    x = normals(5, 3)

    def end(scale, grad):
        model = sv.Model(lambda x, t: (0.3 * x, scale * torch.ones_like(x)), variance="residual")
        return sv.run(PLANS["square"][0](), model, x, noise=0, grad=grad).square().mean()

    (slope,) = torch.autograd.grad(end(scale, True), scale)
    step = 1e-5
    with torch.no_grad():
        numeric = (end(scale + step, False) - end(scale - step, False)) / (2 * step)
    assert slope.item() == pytest.approx(numeric.item(), rel=1e-6)


def test_gradients_are_finite_where_the_variance_is_clamped_to_zero():
    """The heuristic with eta = 0: where eps^2 > 1 a row adds no noise."""
    model = sv.Model(lambda x, t: (x, torch.ones_like(x)), variance="square")
    x = torch.linspace(-3, 3, 15, dtype=torch.float64).reshape(5, 3).requires_grad_()
    out = sv.run(sv.extended_analytic_dpm(VP, TIMES, eta=0.0), model, x, noise=0, grad=True)
    (slope,) = torch.autograd.grad(out.sum(), x)
    assert slope.isfinite().all()


@NAMES
def test_half_and_single_precision_networks_follow_double(name):
    plan, model = made(name)
    x, seen = normals(5, 3).bfloat16().double(), []
    double = sv.run(plan, model, x, noise=0)
    single = sv.run(plan, model, x.float(), noise=0)
    assert single.dtype == torch.float32
    assert (single - double).norm() / double.norm() < 1e-5

    def half(x, t):
        seen.append(x.dtype)
        return tuple(v.bfloat16() for v in net(x.float(), t))

    rough = sv.run(plan, sv.Model(half, variance=model.variance), x.bfloat16(), noise=0)
    assert rough.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    assert (rough - double).norm() / double.norm() < 0.1


@NAMES
def test_a_run_goes_on_from_any_row_to_the_same_bits(name):
    plan, model = made(name)
    x, states = normals(5, 3), []
    whole = sv.run(plan, model, x, noise=4, callback=lambda state: states.append(state.clone()))
    assert torch.equal(whole, sv.run(plan, model, x, noise=4))
    for state in states:
        assert torch.equal(whole, sv.run(plan, model, state, noise=4))
    assert torch.equal(sv.trajectory(plan, model, x, noise=4)[1:], torch.stack([s.x for s in states]))


@NAMES
def test_such_plans_are_printed_sliced_and_joined_but_not_saved_as_text(name):
    plan, model = made(name)
    assert "stochastic" in str(plan).splitlines()[0]
    assert str(plan).splitlines()[1].split()[-5:] == ["least", "var", "most", "var", "cap"]
    assert plan[:2] + plan[2:] == plan
    x = normals(5, 3)
    half = sv.run(plan[:2], model, x, noise=0)
    source = sv.noise.per_sample(0, range(5))
    rest = sv.run(plan[2:], model, half, noise=lambda draw, like: source(draw + 2, like))
    assert torch.equal(rest, sv.run(plan, model, x, noise=0))
    with pytest.raises(ValueError, match="whose noise the model scales, is not saved as text"):
        plan.to_json()
    with pytest.raises(ValueError, match="cannot be joined"):
        plan[:2] + sv.ddim(VP, TIMES, eta=1.0)[2:]


def test_the_second_output_survives_a_change_of_variables():
    """x - mean for data, and nothing of it for the second output, whichever way it is returned."""
    mean, x = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), normals(5, 3)
    plan = PLANS["square"][0]()

    def data(x, t):
        eps, second = exact("square").net(x, t)
        return (x - VP.sigma(t[:1]) * eps) / VP.alpha(t[:1]), second

    def noise(x, t):
        return exact("square").net(x, t)

    for predicts, two in (("noise", noise), ("data", data)):
        first = sv.Model(lambda x, t, two=two: two(x, t)[0], predicts)
        one = sv.run(sv.ddpm(VP, TIMES), sv.centred(first, mean), x, noise=0)
        for net in (two, lambda x, t, two=two: torch.cat(two(x, t), 1)):
            model = sv.centred(sv.Model(net, predicts, variance="square"), mean)
            assert_close(sv.run(sv.ddpm(VP, TIMES), model, x, noise=0), one, rtol=1e-13, atol=1e-13)
            assert sv.run(plan, model, x, noise=0).isfinite().all()


# Errors


class Counted:
    def __init__(self, answer=net):
        self.calls, self.answer = 0, answer

    def __call__(self, x, t):
        self.calls += 1
        return self.answer(x, t)


@NAMES
def test_a_model_without_a_second_output_is_refused_before_the_first_call(name):
    plan, _ = made(name)
    model = Counted()
    with pytest.raises(ValueError, match=r"leaves the variance of its noise to the model's second output"):
        sv.run(plan, model, normals(2, 3), noise=0)
    with pytest.raises(ValueError, match="the plan is stochastic and needs noise"):
        sv.run(plan, sv.Model(model, variance=PLANS[name][1]), normals(2, 3))
    assert model.calls == 0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda x, t: x,
            r"returned \[2, 3\] in call 0 of 4, t = 0.9: with variance declared, expected the pair",
        ),
        (lambda x, t: [x, x], "returned list .* expected the pair"),
        (lambda x, t: (x, x, x), "returned tuple .* expected the pair"),
        (lambda x, t: (x, None), "returned tuple .* expected the pair"),
        (
            lambda x, t: (x, x[:1]),
            r"second output has shape \[1, 3\] on cpu in call 0 of 4, .*: expected \[2, 3\]",
        ),
        (lambda x, t: (x, x[:, :1]), r"second output has shape \[2, 1\]"),
        (lambda x, t: (x[:1], x), r"returned shape \[1, 3\] in call 0 of 4, t = 0.9: expected \[2, 3\]"),
        (lambda x, t: torch.cat([x, x, x], 1), r"returned \[2, 9\] .* expected the pair"),
    ],
)
@pytest.mark.parametrize("name", ["learned", "square"])
def test_what_is_not_two_outputs_like_x_is_refused(name, answer, message):
    with pytest.raises(ValueError, match=message):
        sv.run(PLANS[name][0](), sv.Model(answer, variance=PLANS[name][1]), normals(2, 3), noise=0)


def test_an_undeclared_second_output_is_pointed_to():
    with pytest.raises(ValueError, match=r'say so: Model\(net, variance="range"\)'):
        sv.run(sv.ddpm(VP, TIMES), doubled, normals(2, 3), noise=0)
    with pytest.raises(TypeError, match="returned tuple in call 0 of 4"):
        sv.run(sv.ddpm(VP, TIMES), net, normals(2, 3), noise=0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"variance = 'learned_range'.*did you mean 'range'"):
        sv.Model(net, variance="learned_range")
    with pytest.raises(ValueError, match="variance = 'cubic': expected one of 'range', 'square', 'residual'"):
        sv.Model(net, variance="cubic")
    with pytest.raises(ValueError, match="variance = 'medium': expected one of 'small', 'large', 'learned'"):
        sv.ddpm(VP, TIMES, variance="medium")
    with pytest.raises(ValueError, match="last = 'none': expected one of 'mean', 'noise'"):
        sv.extended_analytic_dpm(VP, TIMES, last="none")
    for bounds in ({"limit": 0.0}, {"pixels": -1.0}, {"pixels": math.inf}, {"limit": math.nan}):
        with pytest.raises(ValueError, match="expected limit > 0 and pixels from 0, finite"):
            sv.extended_analytic_dpm(VP, TIMES, **bounds)


def test_a_range_where_there_is_none_is_refused_before_the_first_call():
    """With eta = 0 the least variance is 0, whose logarithm no range has."""
    model = Counted()
    plan = sv.extended_analytic_dpm(VP, TIMES, eta=0.0)
    with pytest.raises(ValueError, match="range"):
        sv.run(plan, sv.Model(model, variance="range"), normals(2, 3), noise=0)
    assert model.calls == 0


@pytest.mark.parametrize("call", [0, 3])
def test_a_second_output_that_is_not_finite_is_reported(call):
    calls = []

    def broken(x, t):
        calls.append(t)
        prediction, second = net(x, t)
        if len(calls) == call + 1:
            second[1, 0] = math.nan
        return prediction, second

    with pytest.raises(sv.NonFiniteError, match=rf"call {call} of 4 .*samples \[1\]"):
        sv.run(PLANS["square"][0](), sv.Model(broken, variance="square"), normals(3, 2), noise=0)


def test_a_centred_model_that_returns_no_tensor_is_told_so():
    for answer, name in ((lambda x, t: (x, x), "tuple"), (lambda x, t: None, "NoneType")):
        model = sv.centred(answer, torch.ones(3))
        with pytest.raises(
            TypeError, match=f"returned {name}"
        ):  # BUG: "to() received", "unsupported operand"
            sv.run(sv.ddim(VP, TIMES), model, normals(2, 3))


# Losses


def square(head, model=lambda x, t: torch.zeros_like(x)):
    """The model with a second output."""
    return sv.Model(lambda x, t: (model(x, t), head(x, t)), variance="square")


def residual(head, model, **options):
    return sv.Model(lambda x, t: (model(x, t), head(x, t)), variance="residual", **options)


def per_sample_slopes(loss_of, features, coefficients):
    """The gradient of each sample's loss in coefficients of its own, where h = features @ coefficients."""
    own = coefficients.expand(len(features), *coefficients.shape).clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(lambda x, t: (features * own).sum(-1)).sum(), own)
    return slope.flatten(1)


def at_truth(loss_of, features, truth):
    """The mean gradient over its standard error, the largest of all coefficients."""
    slope = per_sample_slopes(loss_of, features, truth)
    return float((slope.mean(0) / slope.std(0)).abs().max() * len(features) ** 0.5)


def samples(n=100_000):
    x0, noise = DATA.draw(n, generator(5)), normals(n, 3, seed=6)
    t = torch.rand(n, dtype=torch.float64, generator=generator(7)) * 0.8 + 0.1
    return x0, t, noise


def test_sn_loss_is_least_at_the_mean_square_of_the_noise():
    """On N(mean, v): E[eps^2 | x] = alpha^2 v / P + sigma^2 (x - alpha mean)^2 / P^2."""
    x0, t, noise = samples()
    x = sv.noised(x0, VP, t, noise)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    total = alpha**2 * VARIANCE + sigma**2
    parts = torch.stack([alpha**2 * VARIANCE / total, (sigma * (x - alpha * MEAN) / total) ** 2], -1)

    def loss_of(head):
        return sv.sn_loss(square(head), VP, x0, t, noise)

    truth = torch.ones(3, 2, dtype=torch.float64)  # for each element, of both parts
    assert at_truth(loss_of, parts, truth) < 4.5
    for wrong in (torch.tensor([1.2, 1.0]), torch.tensor([1.0, 1.1])):
        assert at_truth(loss_of, parts, truth * wrong) > 4.5


def test_npr_loss_is_least_at_the_mean_square_error_of_an_imperfect_prediction():
    """For eps^ = 1.3 E[eps | x]: alpha^2 v / P + (0.3 E[eps | x])^2."""
    x0, t, noise = samples()
    x = sv.noised(x0, VP, t, noise)
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    total = alpha**2 * VARIANCE + sigma**2
    eps = sigma * (x - alpha * MEAN) / total
    parts = torch.stack([alpha**2 * VARIANCE / total, (0.3 * eps) ** 2], -1)

    def loss_of(head):
        return sv.npr_loss(residual(head, lambda x, t: 1.3 * eps), VP, x0, t, noise)

    truth = torch.ones(3, 2, dtype=torch.float64)
    assert at_truth(loss_of, parts, truth) < 4.5
    for wrong in (torch.tensor([1.1, 1.0]), torch.tensor([1.0, 1.2])):
        assert at_truth(loss_of, parts, truth * wrong) > 4.5


@pytest.mark.parametrize("kind", ["square", "residual"])
def test_a_head_fitted_by_least_squares_gives_the_exact_marginal(kind):
    """The whole way: losses quadratic in h are minimised in closed form, per element, at one time."""
    data, n = Gaussian(MEAN[:2], torch.diag(VARIANCE[:2])), 200_000
    x0, noise, t = data.draw(n, generator(8)), normals(n, 2, seed=9), torch.full((n,), 0.4).double()
    alpha, sigma = VP.alpha(t[:1]), VP.sigma(t[:1])
    total = alpha**2 * VARIANCE[:2] + sigma**2

    def model(x, t):
        return sigma * (x - alpha * MEAN[:2]) / total

    def mean_loss(scale):
        def head(x, t):
            return scale * (1.0 if kind == "residual" else model(x, t) ** 2) + torch.zeros_like(x)

        loss = (
            sv.sn_loss(square(head), VP, x0, t, noise)
            if kind == "square"
            else sv.npr_loss(residual(head, model), VP, x0, t, noise)
        )
        return loss.mean()

    scale = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.functional.jacobian(mean_loss, scale)
    best = -slope / torch.autograd.functional.hessian(mean_loss, scale).diagonal()
    spread = alpha**2 * VARIANCE[:2] / total
    if kind == "residual":
        assert_close(best, spread, rtol=0.02, atol=0)
    else:  # spread + eps^^2 projected on eps^^2, whose mean square is 3 (1 - spread)^2
        assert_close(best, 1 + spread / (3 * (1 - spread)), rtol=0.02, atol=0)


def test_no_gradient_of_npr_loss_reaches_the_prediction():
    weight, height = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = sv.npr_loss(
        residual(lambda x, t: height * x**2, lambda x, t: weight * x),
        VP,
        normals(4, 3),
        torch.full((4,), 0.5),
        normals(4, 3),
    )
    loss.sum().backward()
    assert weight.grad is None
    assert height.grad.abs() > 0
    kept = sv.npr_loss(
        residual(lambda x, t: weight * x, lambda x, t: weight * x),
        VP,
        normals(4, 3),
        torch.full((4,), 0.5),
        normals(4, 3),
    )
    assert torch.autograd.grad(kept.sum(), weight)[0].isfinite()


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3, 3)])
def test_each_sample_has_a_time_and_a_loss_of_its_own(shape):
    x0, noise = normals(*shape), normals(*shape, seed=1)
    t, seen = torch.tensor([0.2, 0.9, 0.5, 0.03], dtype=torch.float64), []

    def head(x, t):
        seen.append(t)
        return net(x, t)[1]

    losses = {
        "sn": lambda *part: sv.sn_loss(square(head), VP, *part),
        "npr": lambda *part: sv.npr_loss(residual(head, lambda x, t: net(x, t)[0]), VP, *part),
    }
    for loss in losses.values():
        together = loss(x0, t, noise)
        assert together.shape == (4,)
        assert torch.equal(seen[-1], t)
        alone = torch.cat([loss(x0[i : i + 1], t[i : i + 1], noise[i : i + 1]) for i in range(4)])
        assert_close(together, alone, rtol=1e-13, atol=1e-13)
        single = loss(x0.float(), t.float(), noise.float())
        assert single.dtype == torch.float32
        assert_close(single.double(), together, rtol=1e-4, atol=1e-5)


def test_losses_are_the_papers_formulas_for_any_prediction():
    """Eq. 9 and 12: ||eps^2 - h||^2 / d, ||(eps - eps^)^2 - h||^2 / d, eps^ from what the model predicts."""
    x0, noise, t = normals(4, 3), normals(4, 3, seed=1), torch.tensor([0.2, 0.9, 0.5, 0.1])
    schedule = sv.EDM()
    x = x0 + t[:, None].double() * noise
    head = (2 * x).cos()
    assert_close(
        sv.sn_loss(square(lambda x, t: (2 * x).cos()), schedule, x0, t, noise),
        ((noise**2 - head) ** 2).mean(1),
    )
    predicted = (x - x.tanh()) / t[:, None].double()
    second = lambda x, t: (2 * x).cos()  # noqa: E731
    for model in (
        residual(second, lambda x, t: x.tanh(), predicts="data"),
        residual(second, lambda x, t: (x - x.tanh()) / t[:, None]),
    ):
        got = sv.npr_loss(model, schedule, x0, t, noise)
        assert_close(got, (((noise - predicted) ** 2 - head) ** 2).mean(1), rtol=1e-6, atol=1e-6)


def test_heads_and_batches_that_do_not_fit_are_refused():
    x0, t, noise = normals(4, 3), torch.full((4,), 0.5), normals(4, 3)

    def same(x, t):
        return x

    with pytest.raises(ValueError, match=r"second output has shape \[4, 1\] .* expected \[4, 3\]"):
        sv.sn_loss(square(lambda x, t: x[:, :1]), VP, x0, t, noise)
    with pytest.raises(ValueError, match=r"t has shape \[3\]: expected one time, or one for each of the 4"):
        sv.sn_loss(square(same), VP, x0, t[:3], noise)
    with pytest.raises(ValueError, match=r"noise has shape \[3, 3\]: expected that of x0"):
        sv.sn_loss(square(same), VP, x0, t, noise[:3])
    with pytest.raises(ValueError, match=r"the model returned .*\[4, 1\]"):
        sv.npr_loss(residual(same, lambda x, t: x[:, :1]), VP, x0, t, noise)
    for model in (same, sv.Model(same), square(same)):
        with pytest.raises(ValueError, match="expected Model\\(net, variance='residual'\\)"):
            sv.npr_loss(model, VP, x0, t, noise)


def test_training_and_sampling_show_the_network_the_same():
    """Label and scale of x: of a network of whole steps, and of EDM's raw F, at each level of a run."""
    schedule, seen = sv.Discrete.linear(100), []

    def watched(x, n):
        seen.append((x.clone(), n.clone()))
        return torch.zeros_like(x), torch.ones_like(x)

    for predicts, noise_schedule, label in (("noise", schedule, schedule.step), ("edm", sv.EDM(), None)):
        model = sv.Model(watched, predicts, label=label, variance="square")
        times = sv.trailing(schedule, 4) if label else sv.karras(noise_schedule, 4)
        plan = sv.extended_analytic_dpm(noise_schedule, times)
        seen.clear()
        path = sv.trajectory(plan, model, float(plan.sigma[0]) * normals(2, 3), noise=0)
        asked = list(seen)
        for i, (x, n) in enumerate(asked):
            seen.clear()
            zero = torch.zeros(2, 3, dtype=torch.float64)
            sv.sn_loss(model, noise_schedule, zero, times[i].expand(2), path[i] / plan.sigma[i])
            assert_close(seen[0][0], x, rtol=1e-12, atol=1e-12)
            assert torch.equal(seen[0][1], n)


def test_one_time_may_stand_for_all_samples():
    x0, noise, model = normals(4, 3), normals(4, 3), square(lambda x, t: x * t[:, None])
    each = sv.sn_loss(model, VP, x0, torch.full((4,), 0.5), noise)
    for t in (0.5, torch.tensor(0.5)):
        assert torch.equal(sv.sn_loss(model, VP, x0, t, noise), each)

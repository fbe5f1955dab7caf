"""Predictor-corrector: score SDE's loop, of each sample's own step length."""

import math
import random
import sys

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import VP, Counted, generator
from reference import Gaussian

SNR = 0.16
PLAN = sv.reverse_diffusion(VP, sv.logsnr(VP, 5, start=0.9))
X = torch.randn(7, 3, dtype=torch.float64, generator=generator())


def net(x, t):
    """Element by element, and nowhere near a multiple of x."""
    return (0.9 * x).sin() * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1))) + 0.2


def score_sde(x, steps, corrections, snr, draw, denoise=True):
    """Algorithms 4 and 5 as released, for one sample: batch means are its own norms.

    steps: (score, alpha_i of the corrector, x -> x_mean of the predictor, deviation of its noise) at each time.
    """
    mean = x
    for score, alpha, predictor, deviation in steps:
        for _ in range(corrections):
            grad, noise = score(x), draw(x)
            length = (snr * noise.flatten(1).norm(dim=-1).mean() / grad.flatten(1).norm(dim=-1).mean()) ** 2
            x = x + 2 * alpha * length * grad + torch.sqrt(4 * alpha * length) * noise
        mean = predictor(x)
        x = mean + deviation * draw(x)
    return mean if denoise else x


def drawing(seed=3):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


@pytest.mark.parametrize("corrections", [1, 2])
@pytest.mark.parametrize("last", ["to sigma 0", "to sigma_min"])
def test_on_ve_it_is_score_sdes_loop(corrections, last):
    """alpha_i = 1; x + (sigma_i^2 - sigma_{i-1}^2) s + sqrt(...) z, sigma_0 the least or, as there, 0."""
    schedule = sv.EDM()
    sigmas = torch.logspace(1, -1, 6, dtype=torch.float64)
    if last == "to sigma 0":
        sigmas = torch.cat([sigmas, torch.zeros(1)])

    def step(sigma, after):
        def score(x):
            return -net(x, sigma[None]) / sigma

        g2 = sigma**2 - after**2
        return score, 1.0, lambda x: x + g2 * score(x), g2.sqrt()

    steps = [step(*pair) for pair in zip(sigmas[:-1], sigmas[1:], strict=True)]
    x = 10 * X[:1].reshape(1, 3, 1)
    expected = score_sde(x, steps, corrections, SNR, drawing())
    plan = sv.reverse_diffusion(schedule, sigmas)
    got = sv.predictor_corrector(plan, net, x, generator(3), corrections=corrections)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("snr", [0.01, 0.16])
def test_on_vp_it_is_score_sdes_loop(snr):
    """The levels of a DDPM: alpha_i = 1 - beta_i, and x_mean = (2 - sqrt(1 - beta_i)) x + beta_i s."""
    betas = torch.linspace(0.01, 0.3, 6, dtype=torch.float64)
    schedule = sv.Discrete(betas)
    sigmas = (1 - (1 - betas).cumprod(0)).sqrt()

    def step(beta, sigma, label):
        def score(x):
            return -net(x, label[None]) / sigma

        def predictor(x):
            return (2 - (1 - beta).sqrt()) * x + beta * score(x)

        return score, 1 - beta, predictor, beta.sqrt()

    steps = [step(betas[n], sigmas[n], torch.tensor(float(n))) for n in reversed(range(6))]
    expected = score_sde(X[:1], steps, 1, snr, drawing())
    plan = sv.reverse_diffusion(schedule, torch.linspace(1, 0, 7, dtype=torch.float64))
    model = sv.Model(net, label=schedule.step)
    assert_close(
        sv.predictor_corrector(plan, model, X[:1], generator(3), snr=snr), expected, rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", [sv.ddpm, sv.euler_maruyama, sv.ddim])
def test_any_one_call_method_is_a_predictor(method):
    """Rows as the plan has them, on the whole way but for the last noise."""
    plan = method(VP, sv.logsnr(VP, 4, start=0.9))

    def step(i):
        row = plan[i : i + 1]
        sigma, quiet = plan.sigma[i], lambda draw, like: torch.zeros_like(like)
        weight = row.c[0, 0] if row.is_stochastic else 0.0
        factor = (plan.alpha[i] / plan.alpha[i + 1]) ** 2
        return (
            lambda x: -net(x, plan.times[i : i + 1]) / sigma,
            factor,
            lambda x: sv.run(row, net, x, quiet),
            weight,
        )

    class Draws:
        """Of a method without noise of its own, every draw is the corrector's."""

        def __init__(self):
            self.draw, self.asked = drawing(), 0

        def __call__(self, like):
            self.asked += 1
            own = self.asked % 2 == 0
            return torch.zeros_like(like) if own and not plan.is_stochastic else self.draw(like)

    expected = score_sde(X[:1], [step(i) for i in range(4)], 1, SNR, Draws())
    got = sv.predictor_corrector(plan, net, X[:1], generator(3))
    assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predicts", ["data", "velocity", "score"])
def test_every_prediction_gives_the_same_samples(predicts):
    def other(x, t):
        alpha, sigma = float(VP.alpha(t[0].double())), float(VP.sigma(t[0].double()))
        return sv.convert(net(x, t), x, alpha, sigma, have="noise", want=predicts)

    expected = sv.predictor_corrector(PLAN, net, X, 0)
    got = sv.predictor_corrector(PLAN, sv.Model(other, predicts), X, 0)
    assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("corrections", [1, 3])
def test_each_row_costs_one_call_and_one_for_each_correction(corrections):
    model = Counted(net)
    sv.predictor_corrector(PLAN, model, X, 0, corrections=corrections)
    assert model.times == [t for t in PLAN.times[:-1].tolist() for _ in range(1 + corrections)]


@pytest.mark.parametrize("method", [sv.reverse_diffusion, sv.ddpm, sv.ddim])
def test_without_corrections_it_is_run(method):
    plan = method(VP, sv.logsnr(VP, 5))
    got = sv.predictor_corrector(plan, net, X, 4, corrections=0, denoise=False)
    assert torch.equal(got, sv.run(plan, net, X, noise=4))


@pytest.mark.parametrize("shape", [(3,), (33,), (2, 5, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_does_not_know_its_batch(shape, dtype):
    x = torch.randn(7, *shape, dtype=dtype, generator=generator(1))
    together = sv.predictor_corrector(PLAN, net, x, sv.noise.per_sample(2, range(7)))
    assert torch.equal(together, sv.predictor_corrector(PLAN, net, x, 2))
    for first, size in ((0, 1), (4, 1), (2, 2), (6, 1)):
        ids = range(first, first + size)
        part = sv.predictor_corrector(PLAN, net, x[first : first + size], sv.noise.per_sample(2, ids))
        assert torch.equal(part, together[first : first + size])


def test_noise_is_a_seed_a_generator_or_a_source():
    by_seed = sv.predictor_corrector(PLAN, net, X, 5)
    assert torch.equal(by_seed, sv.predictor_corrector(PLAN, net, X, 5))
    assert not torch.equal(by_seed, sv.predictor_corrector(PLAN, net, X, 6))
    by_generator = [sv.predictor_corrector(PLAN, net, X, generator(5)) for _ in range(2)]
    assert torch.equal(*by_generator)
    asked = []

    def source(draw, like):
        asked.append(draw)
        return sv.noise.per_sample(5, range(7))(draw, like)

    assert torch.equal(by_seed, sv.predictor_corrector(PLAN, net, X, source))
    assert (
        len(set(asked)) == len(asked) == 2 * PLAN.rows - 1
    )  # every draw its own number; the last row has none
    sv.predictor_corrector(PLAN, net, X, source, denoise=False)
    assert len(asked) == 4 * PLAN.rows - 1


def test_denoise_leaves_the_last_noise_out_alone():
    kept = sv.predictor_corrector(PLAN, net, X, 5, denoise=False)
    out = sv.predictor_corrector(PLAN, net, X, 5)
    last = 2 * (PLAN.rows - 1)
    z = sv.noise.per_sample(5, range(7))(last, X)
    assert_close(kept - out, PLAN.c[-1, 0] * z, rtol=1e-12, atol=1e-12)
    assert (kept - out).abs().max() > 1e-2


def test_the_noise_that_a_second_output_scales_is_left_out_too():
    plan = sv.extended_analytic_dpm(VP, sv.logsnr(VP, 3, start=0.9))
    model = sv.Model(lambda x, t: (net(x, t), torch.ones_like(x)), variance="residual")
    plain = sv.predictor_corrector(sv.ddim(VP, plan.times, eta=1.0)[:1], net, X, 5, corrections=0)
    assert torch.equal(sv.predictor_corrector(plan[:1], model, X, 5, corrections=0), plain)
    kept, out = (sv.predictor_corrector(plan, model, X, 5, denoise=denoise) for denoise in (False, True))
    assert (kept - out).abs().max() > 1e-2


def test_corrections_bring_the_law_nearer():
    """On Gaussian data, whose variance the predictor alone misses in few steps."""
    data = Gaussian(torch.zeros(8), 0.25 * torch.eye(8))
    plan = sv.reverse_diffusion(VP, sv.logsnr(VP, 8, start=0.9, stop=0.05))
    n, exact = 20_000, data.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
    x = data.marginal(plan.alpha[0].item(), plan.sigma[0].item()).draw(n, generator())

    def error(corrections):
        out = sv.predictor_corrector(
            plan, data.model(VP), x, generator(1), snr=0.3, corrections=corrections, denoise=False
        )
        return abs(float(out.var(0).mean() / exact.cov.diagonal().mean()) - 1)

    standard = (2 / n / 8) ** 0.5
    alone, one, three = (error(corrections) for corrections in (0, 1, 3))
    assert alone > one + 10 * standard > three + 20 * standard


def test_where_the_score_is_zero_nothing_is_corrected():
    """There is no length to go by: the step is 0 and not NaN."""
    plan = sv.ddim(VP, PLAN.times)

    def some(x, t):
        return torch.where(torch.arange(len(x))[:, None] == 1, 0.0, net(x, t))

    out = sv.predictor_corrector(plan, some, X, 0)
    assert out.isfinite().all()
    assert_close(out[1], plan.alpha[-1] / plan.alpha[0] * X[1], rtol=1e-12, atol=1e-12)


def test_from_alpha_0_the_length_is_0():
    flow = sv.Flow()
    plan = sv.ddim(flow, sv.uniform(flow, 4), eta=1.0)
    model = sv.Model(lambda x, t: -x, "flow")
    got = sv.predictor_corrector(plan[:1], model, X, 0)
    assert_close(got, sv.predictor_corrector(plan[:1], model, X, 0, corrections=0))
    assert sv.predictor_corrector(plan, model, X, 0).isfinite().all()


def test_the_state_is_float32_when_the_network_is_not():
    seen = []

    def half(x, t):
        seen.append(x.dtype)
        return net(x.float(), t).bfloat16()

    out = sv.predictor_corrector(PLAN, half, X.bfloat16(), 0)
    assert out.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    double = sv.predictor_corrector(PLAN, net, X, 0)
    single = sv.predictor_corrector(PLAN, net, X.float(), 0)
    assert (single - double).norm() / double.norm() < 1e-5


def legacy_state():
    return np.random.get_state()[1].copy()  # noqa: NPY002


def test_x_and_the_global_generators_are_left_alone(capsys):
    x, states = X.clone(), (torch.get_rng_state(), random.getstate(), legacy_state())
    sv.predictor_corrector(PLAN, net, x, 0)
    assert torch.equal(x, X)
    assert torch.equal(states[0], torch.get_rng_state())
    assert random.getstate() == states[1]
    assert np.array_equal(legacy_state(), states[2])
    assert capsys.readouterr().err == ""
    sv.predictor_corrector(PLAN, net, x, 0, progress=True)
    assert "5/5" in capsys.readouterr().err


def test_an_empty_batch_is_returned_empty():
    assert sv.predictor_corrector(PLAN, net, X[:0], 0).shape == (0, 3)


# What is refused


@pytest.mark.parametrize(
    "method", [sv.dpm_solver_pp, sv.sa_solver, sv.heun, sv.ancestral, sv.seeds], ids=lambda m: m.__name__
)
def test_plans_that_read_earlier_calls_are_refused(method):
    model = Counted(net)
    with pytest.raises(ValueError, match="rows read earlier calls, which a correction makes worthless"):
        sv.predictor_corrector(method(VP, sv.logsnr(VP, 4)), model, X, 0)
    assert model.times == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"snr": 0.0}, ValueError, "snr = 0.0: expected a finite number above 0"),
        ({"snr": math.nan}, ValueError, "snr = nan"),
        ({"snr": "a"}, TypeError, "snr = 'a'"),
        ({"corrections": -1}, ValueError, "corrections = -1: expected a whole number from 0"),
        ({"corrections": 1.5}, TypeError, "corrections = 1.5"),
        (
            {"noise": sv.noise.per_sample(0, range(3))},
            ValueError,
            "noise is for 3 samples, but the batch has 7",
        ),
        ({"noise": lambda draw, like: like[:1]}, ValueError, r"noise gave shape \[1, 3\]"),
        ({"noise": None}, TypeError, "noise"),
        (
            {"x": X * math.nan},
            ValueError,
            r"x\[0, 0\] = nan: every entry of the starting state must be finite",
        ),
        ({"x": X.long()}, TypeError, r"x has dtype torch.int64"),
        ({"x": X.tolist()}, TypeError, "x is list"),
        ({"x": X[0, 0]}, ValueError, "x has no batch dimension"),
        ({"x": X.clone().requires_grad_()}, ValueError, "x requires a gradient"),
        ({"plan": None}, TypeError, "plan is NoneType: expected a Plan"),
    ],
)
def test_bad_input_is_refused_before_the_first_call(options, error, message):
    model = Counted(net)
    arguments = {"plan": PLAN, "x": X, "noise": 0} | options
    with pytest.raises(error, match=message):
        sv.predictor_corrector(model=model, **arguments)
    assert len(model.times) <= ("noise" in options)


def test_noise_of_another_shape_is_refused_for_a_correction():
    """A correction would broadcast it."""

    def source(draw, like):
        return torch.ones_like(like)[:1] if draw % 2 else torch.ones_like(like)

    with pytest.raises(ValueError, match=r"noise gave shape \[1, 3\] .* expected shape \[7, 3\]"):
        sv.predictor_corrector(PLAN, net, X, source)


def test_a_prediction_that_does_not_determine_the_score_is_refused():
    flow = sv.Flow()
    plan = sv.ddim(flow, sv.uniform(flow, 4), eta=1.0)
    with pytest.raises(ValueError, match="a noise prediction does not determine data in call 0, at t = 1"):
        sv.predictor_corrector(plan, net, X, 0)


def test_one_path_over_the_rows_is_refused_as_corrections_draw_too():
    model = Counted(net)
    source = sv.noise.brownian(0, range(7), PLAN.half_logsnr)
    with pytest.raises(ValueError, match=r"clock|Brownian|path"):  # BUG: "draw = 5", after 5 calls
        sv.predictor_corrector(PLAN, model, X, source)
    assert model.times == []


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("bad", [0, 5, 9])
def test_an_output_that_is_not_finite_is_reported_with_its_row(bad, late, monkeypatch):
    if late:
        monkeypatch.setattr(sys.modules["solvers.loop"], "_is_read_late", lambda x: True)
    model = Counted(net)
    model.answer = lambda x, t: net(x, t) * (math.nan if len(model.times) == bad + 1 else 1.0)
    row = bad // 2
    with pytest.raises(sv.NonFiniteError, match="the model's output is not finite") as caught:
        sv.predictor_corrector(PLAN, model, X, 0)
    assert caught.value.time == PLAN.times[row].item()
    assert caught.value.samples == list(range(7))
    assert caught.value.call == row


def test_norms_of_the_batch_are_score_sdes_and_leave_the_law_of_few_elements_alone():
    """Steps that follow a sample's own draw and score widen the law of 2 elements; those of the batch do not."""
    data = Gaussian(torch.zeros(2), 0.25 * torch.eye(2))
    ve = sv.VE()
    plan = sv.reverse_diffusion(ve, sv.uniform(ve, 60))
    x = data.marginal(1.0, plan.sigma[0].item()).draw(3000, generator())
    exact = data.marginal(1.0, plan.sigma[-1].item()).cov[0, 0].item() ** 0.5
    ends = {
        norms: sv.predictor_corrector(plan, data.model(ve), x, generator(), norms=norms).std().item()
        for norms in ("sample", "batch")
    }
    assert ends["batch"] == pytest.approx(exact, rel=0.1)
    assert ends["sample"] > 1.5 * exact
    with pytest.raises(ValueError, match="norms = 'batches': expected one of 'sample', 'batch'"):
        sv.predictor_corrector(plan, data.model(ve), x, 0, norms="batches")

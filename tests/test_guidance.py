"""Guidance, thresholds and hooks: closed forms and hand-written loops, how often the network is asked, what is refused."""

import dataclasses
import math
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import PROBLEMS, VP, generator
from reference import Gaussian
from solvers.guidance import (
    as_data,
    cfg_pp,
    classifier,
    classifier_free,
    clipped,
    guided,
    on_data,
    on_state,
    threshold,
    thresholded,
)
from solvers.predictions import as_model, outputs_at

DATA, DDPM = PROBLEMS["eight"], sv.Discrete.linear(1000)
PATH = sv.Flow(start=0.98, stop=0.02)  # on which all predictions are determined
TIMES = sv.uniform(PATH, 6)
PLAN, DDIM = sv.dpm_solver_pp(PATH, TIMES, 3), sv.ddim(PATH, TIMES)
TO_DATA = sv.ddim(sv.Flow(), sv.uniform(sv.Flow(), 3))  # from alpha = 0
EACH = pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "score", "flow", "edm"])


close = partial(assert_close, rtol=1e-11, atol=1e-11)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


X, CONDITION, NULL = normals(4, 8), normals(4, 8, seed=5), torch.zeros(1, 8).double()
OWN = f64(0.9, 0.5, 0.3, 0.1)  # a time for each sample


def level(t, x):
    """alpha and sigma at times of samples, as columns."""
    return (f(t.double()).reshape(-1, *[1] * (x.ndim - 1)).to(x) for f in (PATH.alpha, PATH.sigma))


def network(predicts="noise", asked=None):
    """The exact network of DATA + c that reads the condition c; the batch sizes and times it was asked at go into `asked`."""
    exact = DATA.model(PATH, predicts)

    def net(x, t, c):
        if asked is not None:
            asked.append((len(x), float(t[0])))
        alpha, sigma = level(t, x)
        norm = torch.hypot(sigma, alpha / 2) if predicts == "edm" else 1.0
        p = {"data": 1, "velocity": -sigma, "flow": -1, "edm": 2 * sigma / norm}.get(predicts, 0)
        return exact(x - alpha * c / norm, t) + p * c

    return sv.Model(net, predicts)


def bound(model, c):
    return dataclasses.replace(model, net=lambda x, t: model.net(x, t, c))


def led(scale, c=CONDITION):
    """The noise prediction that is to be, whatever the network predicts: eps_null + scale (eps_c - eps_null)."""

    def noise(x, t):
        alpha, sigma = level(t, x)
        away, towards = (DATA.noise(x - alpha * v, alpha, sigma) for v in (NULL, c))
        return away + (scale(t)[:, None] if callable(scale) else scale) * (towards - away)

    return noise


def said(model, x, times, schedule=PATH):
    """What a model predicts at a time for all, or one for each sample."""
    return outputs_at(as_model(model), schedule, x, times)[0]


# Classifier-free guidance

TOLERANCE = {"rtol": 1e-2, "atol": 1e-2}
WAYS = {
    "multistep": partial(sv.run, PLAN),
    "stages": partial(sv.run, sv.exponential_rk(PATH, TIMES, sv.tableaux.krogstad)),
    "odeint": lambda model, x: sv.odeint(model, PATH, x, variable="angle", **TOLERANCE).x,
    "adaptive": lambda model, x: sv.adaptive(model, PATH, x, **TOLERANCE).x,
    "coupled": lambda model, x: sv.adaptive(model, PATH, x, coupled=True, **TOLERANCE).x,
}


@EACH
@pytest.mark.parametrize("way", WAYS)
def test_one_call_on_twice_the_batch_is_two_calls_is_the_formula(way, predicts):
    c = CONDITION[:1] if way == "adaptive" else CONDITION  # whose samples leave the batch, those of c do not
    model, solve = network(predicts), WAYS[way]
    expected = solve(led(2.5, c), X)
    for got in (
        classifier_free(model, c, NULL, 2.5),
        guided(bound(model, c), bound(model, NULL), 2.5),
    ):
        assert_close(solve(got, X), expected, rtol=1e-8, atol=1e-8)


@EACH
@pytest.mark.parametrize(("scale", "c"), [(1.0, CONDITION), (0.0, NULL)])
def test_scale_1_is_the_conditional_model_bit_by_bit_0_the_other_and_nothing_is_doubled(scale, c, predicts):
    asked, towards, away = [], [], []
    once = classifier_free(network(predicts, asked), CONDITION, NULL, scale)
    twice = guided(bound(network(predicts, towards), CONDITION), bound(network(predicts, away), NULL), scale)
    expected = sv.run(PLAN, bound(network(predicts), c), X)
    assert torch.equal(sv.run(PLAN, once, X), expected)
    assert torch.equal(sv.run(PLAN, twice, X), expected)
    every = [(4, t) for t in TIMES[:-1].tolist()]
    assert (asked, towards, away) == ((every, every, []) if scale else (every, [], every))


def test_two_models_may_answer_with_two_halves_of_one_answer():
    answers = {}

    def half(i, x, t):
        both = answers.setdefault(float(t[0]), torch.cat([led(0.0)(x, t), led(1.0)(x, t)]))
        return both.chunk(2)[i]

    close(sv.run(PLAN, guided(partial(half, 1), partial(half, 0), 2.5), X), sv.run(PLAN, led(2.5), X))


def test_outside_the_interval_only_the_conditional_model_is_asked_and_its_ends_are_inside():
    ends = {"low": TIMES[4].item(), "high": TIMES[2].item()}
    asked, towards, away = [], [], []
    once = classifier_free(network(asked=asked), CONDITION, NULL, 3.0, **ends)
    twice = guided(bound(network(asked=towards), CONDITION), bound(network(asked=away), NULL), 3.0, **ends)
    scale = dict(zip(TIMES.tolist(), [1, 1, 3, 3, 3, 1], strict=False))
    expected = sv.run(PLAN, led(lambda t: f64(*[scale[v] for v in t.tolist()])), X)
    close(sv.run(PLAN, once, X), expected)
    close(sv.run(PLAN, twice, X), expected)
    assert [size for size, _ in asked] == [4, 4, 8, 8, 8, 4]
    assert (len(towards), [t for _, t in away]) == (6, TIMES[2:5].tolist())


def test_the_scale_may_be_a_function_of_t_and_is_asked_once_in_float64():
    asked = []
    model = classifier_free(network(), CONDITION, NULL, lambda t: asked.append(t) or 1 + 4 * t.square())
    close(sv.run(PLAN, model, X), sv.run(PLAN, led(lambda t: 1 + 4 * t.square()), X))
    assert [(t.dtype, t.tolist()) for t in asked] == [(torch.float64, TIMES[:-1].tolist())]


def test_samples_with_times_of_their_own_have_scales_and_intervals_of_their_own():
    model = classifier_free(network(), CONDITION, NULL, lambda t: 7 * t, low=0.3, high=0.8)
    close(said(model, X, OWN), led(lambda t: f64(1, 3.5, 2.1, 1))(X, OWN))


@pytest.mark.parametrize("shape", [(3, 2, 5), (3, 7)])
@pytest.mark.parametrize("rescale", [0.7, 1.0])
def test_rescaling_brings_each_sample_by_itself_to_the_deviation_of_its_conditional_one(rescale, shape):
    x, weight = normals(*shape), f64(0.1, 1.0, 30.0).reshape(3, *[1] * len(shape[1:]))
    nets = (lambda x, t: weight[: len(x)] * x.sin(), lambda x, t: x.square() - t[0])
    for time, scale in ((0.6, 4.0), (0.3, -2.0)):
        towards, away = (net(x, f64(time)) for net in nets)
        led = away + scale * (towards - away)
        ratio = [np.std(c.numpy()) / np.std(g.numpy()) for c, g in zip(towards, led, strict=True)]
        model = guided(*nets, scale, rescale=rescale)
        got = said(model, x, f64(time))
        close(got, led * (rescale * f64(*ratio).reshape_as(weight) + 1 - rescale))
        close(said(model, x[:1], f64(time)), got[:1])


@pytest.mark.parametrize("answer", [torch.sin, torch.zeros_like])
def test_rescaling_leaves_a_sample_without_deviation_as_it_is(answer):
    nets, x = (lambda x, t: answer(x), lambda x, t: x[:1, :1].expand_as(x) / 3), X[:, :1]
    close(sv.run(PLAN, guided(*nets, 3.0, rescale=0.7), x), sv.run(PLAN, guided(*nets, 3.0), x))


Named = namedtuple("Named", ["half", "rest"])
FORMS = {  # (condition, null, how a network reads its c if they have kept their form)
    "one each": (CONDITION, NULL.expand(4, 8), lambda v: v),
    "mapping": (
        {"c": CONDITION, "mask": None, "one": NULL + 1},
        {"c": NULL, "mask": None, "one": NULL + 1},
        lambda v: v["c"] * v["one"] if v.keys() == {"c", "mask", "one"} and v["mask"] is None else None,
    ),
    "list": ([CONDITION, None], [NULL, None], lambda v: v[0] if type(v) is list and v[1] is None else None),
    "named tuple": (
        Named(CONDITION / 2, {"c": (CONDITION / 2,)}),
        Named(NULL, {"c": (NULL,)}),
        lambda v: v.half + v.rest["c"][0] if type(v.rest["c"]) is tuple else None,
    ),
}


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("form", FORMS)
def test_conditions_keep_their_form_and_are_spread_over_the_batch(form, scale):
    condition, null, read = FORMS[form]
    seen = []

    def net(x, t, given):
        seen.append(len(read(given)) == len(x))
        return network().net(x, t, read(given))

    close(
        sv.run(PLAN, classifier_free(sv.Model(net), condition, null, scale), X), sv.run(PLAN, led(scale), X)
    )
    assert all(seen)


# CFG++

ZTSNR = DDPM.zero_terminal_snr()
SPACES = {  # schedule, its times, what predicts there, what it reads
    "VP": (VP, sv.logsnr(VP, 7), "noise", None),
    "to sigma = 0": (DDPM, sv.trailing(DDPM, 7), "noise", DDPM.step),
    "from alpha = 0": (sv.Flow(), sv.uniform(sv.Flow(), 7), "velocity", None),
    "from alpha = 0, shifted": (sv.Flow(3.0), sv.uniform(sv.Flow(3.0), 7), "flow", sv.Flow(3.0).sigma),
    "zero terminal SNR": (ZTSNR, sv.trailing(ZTSNR, 7), "data", ZTSNR.step),
}


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("space", SPACES)
def test_ddim_with_the_scale_of_cfg_pp_is_algorithm_2_of_the_paper(space, lam):
    schedule, times, predicts, label = SPACES[space]
    to_t = (lambda n: (n + 1) / 1000) if isinstance(schedule, sv.Discrete) else lambda t: t
    own = sv.Flow() if predicts == "flow" else schedule  # networks of flow matching read sigma
    other, x = dataclasses.replace(DATA, means=DATA.means + 1.0), normals(5, 8)
    models = (
        sv.Model(lambda x, t, d=d: d.model(own, predicts)(x, to_t(t.double())), predicts, label)
        for d in (other, DATA)
    )
    got = sv.run(sv.ddim(schedule, times), guided(*models, cfg_pp(schedule, times, lam)), x)
    for s, t in zip(times[:-1], times[1:], strict=True):
        at = schedule.alpha(s), schedule.sigma(s)
        x0 = DATA.data(x, *at) + lam * (other.data(x, *at) - DATA.data(x, *at))
        x = schedule.alpha(t) * x0 + schedule.sigma(t) * DATA.noise(x, *at)  # renoised without guidance
    assert_close(got, x, rtol=1e-12, atol=1e-12)


# Classifier guidance

PRIOR = Gaussian(f64(0.5, -1.0, 0.2), torch.diag(f64(0.3, 1.5, 0.8)) + 0.1)
LOOKED, SPREAD = f64([1.0, 0.5, -0.3], [0.0, 1.0, 2.0]), 0.4 * torch.eye(2).double()
Y = f64(1.3, -0.7)  # = LOOKED x_0 + noise of covariance SPREAD
GAIN = PRIOR.cov @ LOOKED.T @ torch.linalg.inv(LOOKED @ PRIOR.cov @ LOOKED.T + SPREAD)
GIVEN_Y = Gaussian(PRIOR.mean + GAIN @ (Y - LOOKED @ PRIOR.mean), PRIOR.cov - GAIN @ LOOKED @ PRIOR.cov)
STATES = normals(4, 3)


def log_p_of_y(x, t):
    """log p(y | x_t) of the linear observation but for a constant, exactly."""
    alpha, sigma = level(t, x)
    covariance = sigma[..., None] ** 2 / alpha[..., None] * PRIOR.jacobian(x.detach(), alpha, sigma)
    off = Y - PRIOR.data(x, alpha, sigma) @ LOOKED.T
    return -0.5 * (off * torch.linalg.solve(LOOKED @ covariance @ LOOKED.T + SPREAD, off)).sum(1)


def rough(x, t):
    """Some log p that is not quadratic, and is different at every t."""
    return (x.sin() * (1 + t.reshape(-1, 1))).sum(1)


def rough_slope(x, t):
    return x.cos() * (1 + t.reshape(-1, 1))


@EACH
def test_a_gaussian_classifier_makes_the_exact_conditional_model_of_every_prediction(predicts):
    model = classifier(sv.Model(PRIOR.model(PATH, predicts), predicts), log_p_of_y)
    assert model.predicts == ("data" if predicts == "edm" else predicts)
    close(said(model, STATES, OWN), GIVEN_Y.model(PATH, model.predicts)(STATES, OWN))
    close(sv.run(PLAN, model, STATES), sv.run(PLAN, GIVEN_Y.model(PATH), STATES))
    got, exact = (WAYS["adaptive"](m, STATES) for m in (model, GIVEN_Y.model(PATH)))
    assert_close(got, exact, rtol=1e-8, atol=1e-8)


def test_a_classifier_s_weight_is_a_number_or_a_function_of_t_and_counts_at_alpha_0_in_noise():
    times = f64(1.0, 0.6, 0.3, 0.05)  # alpha = 0 at the first; sigma is t
    for scale in (-2.5, 0.0, lambda t: 3 * t):
        weight = scale(times)[:, None] if callable(scale) else scale
        got = said(classifier(lambda x, t: x / 3, rough, scale), STATES, times, sv.Flow())
        close(got, STATES / 3 - weight * times[:, None] * rough_slope(STATES, times))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_classifier_has_its_gradient_in_whatever_mode_and_the_mode_stays(mode):
    modes = []

    def now():
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    expected = sv.run(PLAN, GIVEN_Y.model(PATH), STATES)
    with mode():
        before = now()
        model = classifier(lambda x, t: modes.append(now()) or PRIOR.model(PATH)(x, t), log_p_of_y)
        got = sv.run(PLAN, model, STATES)
        assert now() == before
    close(got.clone(), expected)
    assert not got.requires_grad
    assert modes == [(False, before[1])] * PLAN.nfe


def embedded(x, t):
    """Reads t with a graph, as a classifier's embedding of it does."""
    return (x * t[:, None]).square().sum(1)


@pytest.mark.parametrize("way", ["multistep", "adaptive", "odeint"])
def test_a_classifier_may_read_its_label_with_gradients_under_inference_mode(way):
    expected = WAYS[way](classifier(lambda x, t: x.sin(), embedded), STATES)
    with torch.inference_mode():
        got = WAYS[way](classifier(lambda x, t: x.sin(), embedded), STATES)
    assert torch.equal(got.clone(), expected)


@pytest.mark.parametrize("way", ["run", "checkpointed", "odeint"])
def test_with_grad_the_gradient_goes_through_guidance_of_all_kinds(way):
    def end(x, weight):
        model = sv.Model(lambda x, t: (1.3 * x).sin(), "data")
        model = classifier(model, lambda x, t: weight * rough(x, t), 0.3)  # where alone the weight stands
        model = guided(model, as_data(lambda x, t: x / 3), 1.5, rescale=0.5)
        model = on_state(thresholded(model, 0.9), lambda x, t: x + 0.1 * x.sin())
        if way == "odeint":
            return sv.odeint(model, PATH, x, method="rk4", options={"step_size": 0.3}, grad=True).x
        model = sv.checkpointed(model) if way == "checkpointed" else model
        return sv.run(sv.ddim(PATH, sv.uniform(PATH, 3)), model, x, grad=True)

    weight, x = torch.tensor(0.7).double().requires_grad_(), STATES[:2].clone()
    assert torch.autograd.gradcheck(partial(end, x), (weight,), atol=1e-7)
    assert torch.autograd.gradcheck(end, (x.requires_grad_(), weight), atol=1e-6)


# Thresholds and hooks


def loop(eps, on_x0=lambda x0, x, t: x0, on_x=lambda x, t: x, x=X):
    """DDIM by hand, with functions of x and of the data prediction."""
    for s, t in zip(TIMES[:-1], TIMES[1:], strict=True):
        alpha, sigma, here = PATH.alpha(s), PATH.sigma(s), on_x(x, float(s))
        x0 = on_x0((here - sigma * eps(here, s.expand(len(x)).to(x))) / alpha, here, float(s))
        x = PATH.alpha(t) * x0 + PATH.sigma(t) * (x - alpha * x0) / sigma
    return x


def cut(x0, quantile=0.9, bound=1.0, most=math.inf):
    """Dynamic thresholding, sample by sample in numpy."""
    sizes = [np.clip(np.quantile(np.abs(v), quantile), bound, most) for v in x0.numpy()]
    return torch.from_numpy(
        np.stack([np.clip(v, -s, s) * bound / s for v, s in zip(x0.numpy(), sizes, strict=True)])
    )


@EACH
def test_clipping_and_hooks_act_on_the_data_prediction_of_every_network(predicts):
    model, eps = sv.Model(DATA.model(PATH, predicts), predicts), DATA.model(PATH)
    hook, moved = (lambda x0, x, t: x0 - t * x.sin()), (lambda x, t: 0.9 * x + t)
    close(said(as_data(model), X, OWN), DATA.data(X, *level(OWN, X)))
    for wrapped, expected in (
        (clipped(model, -0.4, 0.7), loop(eps, lambda x0, x, t: x0.clamp(-0.4, 0.7))),
        (thresholded(model, 0.8, 0.5), loop(eps, lambda x0, x, t: cut(x0, 0.8, 0.5))),
        (on_data(model, hook), loop(eps, hook)),
        (on_state(model, moved), loop(eps, on_x=moved)),
        (on_state(on_data(model, hook), moved), loop(eps, hook, moved)),
    ):
        close(sv.run(DDIM, wrapped, X), expected)


@pytest.mark.parametrize("predicts", ["data", "velocity", "flow", "edm"])
def test_data_can_be_clipped_at_alpha_0_by_every_prediction_that_determines_them_there(predicts):
    model, data = (sv.Model(DATA.model(sv.Flow(), name), name) for name in (predicts, "data"))
    close(sv.run(TO_DATA, clipped(model), X), sv.run(TO_DATA, clipped(data), X))


@pytest.mark.parametrize("most", [math.inf, 2.5, 0.5])
@pytest.mark.parametrize("quantile", [0.001, 0.5, 0.9, 0.995, 1.0])
def test_the_threshold_is_numpy_s_quantile_of_each_sample_by_itself(quantile, most):
    x0 = normals(5, 2, 3, 7) * f64(0.01, 0.5, 1.0, 3.0, 40.0).reshape(-1, 1, 1, 1)
    act = threshold(quantile, 0.5, most)
    got = act(x0)
    close(got, cut(x0, quantile, 0.5, most))
    assert got.abs().max() <= 0.5
    assert all(torch.equal(act(x0[i : i + 1]), got[i : i + 1]) for i in range(5))
    assert torch.equal(got[0], x0[0])  # below the bound nothing is cut or scaled


def test_a_sample_may_have_more_than_2_to_the_24_elements():
    x0 = torch.randn(1, 2**24 + 3, generator=generator())
    s = np.quantile(x0.abs().numpy(), 0.995)
    assert_close(threshold(0.995)(x0), x0.clamp(-s, s) / s, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrap", [clipped, partial(thresholded, quantile=0.5), as_data])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_not_clipped_away(wrap, bad):
    spot = torch.zeros(4, 8).double()
    spot[2, 5] = bad
    with pytest.raises(sv.NonFiniteError, match=r"call 0 of 6 .*samples \[2\]"):
        sv.run(PLAN, wrap(lambda x, t: x.sin() + spot), X)


def test_hooks_get_t_as_a_number_or_one_for_each_sample():
    seen = []
    model = on_data(lambda x, t: x.sin(), lambda x0, x, t: seen.append((t, len(x))) or x0)
    sv.run(DDIM, model, X)
    assert [t for t, _ in seen] == TIMES[:-1].tolist()
    assert all(type(t) is float for t, _ in seen)
    seen.clear()
    model = on_state(model, lambda x, t: seen.append((t, len(x))) or x)
    sv.adaptive(model, PATH, X.reshape(4, 2, 4) * f64(0.1, 1, 3, 9).reshape(4, 1, 1), rtol=1e-3, atol=1e-3)
    assert {n for _, n in seen} >= {4, 1}
    assert all(t.shape == (n, 1, 1) if n > 1 else type(t) is float for t, n in seen)


# Compositions


def test_wrappers_act_in_the_order_in_which_they_are_written():
    model = network("data")

    def data(scale, x, t):
        alpha, sigma = level(t, x)
        return (x - sigma * led(scale)(x, t)) / alpha

    def within(x, t):
        away, towards = (data(scale, x, t).clamp(-1, 1) for scale in (0, 1))
        return away + 4 * (towards - away)

    first = sv.run(PLAN, clipped(classifier_free(model, CONDITION, NULL, 4.0)), X)
    last = sv.run(PLAN, guided(clipped(bound(model, CONDITION)), clipped(bound(model, NULL)), 4.0), X)
    close(first, sv.run(PLAN, sv.Model(lambda x, t: data(4, x, t).clamp(-1, 1), "data"), X))
    close(last, sv.run(PLAN, sv.Model(within, "data"), X))
    assert (first - last).abs().max() > 0.1


@pytest.mark.parametrize("times", [OWN, f64(0.4)])
def test_each_of_six_nested_wrappers_has_weights_of_its_own(times):
    strong, weak = (lambda x, t: (x * 1.3).sin(), lambda x, t: x / 3)
    sides = classifier(strong, rough, lambda t: 1 + t), classifier(weak, rough, lambda t: 2 - 3 * t)
    model = on_state(thresholded(guided(*sides, lambda t: 2 + 5 * t), 0.7), lambda x, t: x + t)
    model = on_data(clipped(model, -0.9, 0.9), lambda x0, x, t: x0 + t * x)
    alpha, sigma = level(times, X)
    t, y, label = sigma, X + sigma, times.expand(4)
    a = strong(y, label) - (1 + t) * sigma * rough_slope(y, label)
    b = weak(y, label) - (2 - 3 * t) * sigma * rough_slope(y, label)
    x0 = cut((y - sigma * (b + (2 + 5 * t) * (a - b))) / alpha, 0.7)
    close(said(model, X, times), x0.clamp(-0.9, 0.9) + t * X)


def test_data_from_any_two_networks_may_guide():
    flow = sv.Model(DATA.model(VP, "flow"), "flow", schedule=VP)
    model = guided(as_data(flow), as_data(lambda x, t: x / 3), 2.0)
    by_hand = guided(DATA.model(VP), lambda x, t: x / 3, 2.0)
    plan = sv.ddim(VP, sv.logsnr(VP, 5))
    assert_close(sv.run(plan, model, X), sv.run(plan, by_hand, X), rtol=1e-8, atol=1e-8)


# Second outputs


def pair(x, t, c=0.5):
    return (0.9 * x + c).sin() * (0.5 + t[:, None]), (3 * x + t[:, None] * c).cos()


def joined(x, t, c=0.5):
    return torch.cat(pair(x, t, c), 1)


def clipped_noise(x, t):
    alpha, sigma = level(t, x)
    return (x - alpha * ((x - sigma * pair(x, t)[0]) / alpha).clamp(-1, 1)) / sigma


WRAPPED = {  # what is made of a network, and its noise prediction by hand
    "guided": (lambda m: guided(m, dataclasses.replace(m, net=partial(m.net, c=0.1)), 2.0, rescale=0.0),
               lambda x, t: 2 * pair(x, t)[0] - pair(x, t, 0.1)[0]),
    "classifier_free": (lambda m: classifier_free(m, f64([0.5]), f64([0.1]), 2.0),
                        lambda x, t: 2 * pair(x, t)[0] - pair(x, t, 0.1)[0]),
    "classifier": (lambda m: classifier(m, rough, 0.5),
                   lambda x, t: pair(x, t)[0] - 0.5 * PATH.sigma(t)[:, None] * rough_slope(x, t)),
    "as_data": (as_data, lambda x, t: pair(x, t)[0]),
    "clipped": (clipped, clipped_noise),
}  # fmt: skip


@pytest.mark.parametrize("net", [pair, joined])
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_second_output_goes_through_every_wrapper_and_is_the_conditional_model_s(wrapper, net):
    wrap, eps = WRAPPED[wrapper]
    for build, kind in (
        (partial(sv.ddpm, variance="learned"), "range"),
        (sv.extended_analytic_dpm, "square"),
        (sv.extended_analytic_dpm, "residual"),
    ):
        plan, (right, wrong) = build(PATH, TIMES), (
            sv.Model(lambda x, t, c=c: (eps(x, t), pair(x, t, c)[1]), variance=kind) for c in (0.5, 0.1)
        )  # fmt: skip
        got = sv.run(plan, wrap(sv.Model(net, variance=kind)), X, noise=0)
        close(got, sv.run(plan, right, X, noise=0))
        assert (got - sv.run(plan, wrong, X, noise=0)).abs().max() > 1e-3


# Precision


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_network_alone_is_in_half_precision_and_neither_labels_nor_weights_are(dtype, calls):
    labels, seen, hooked = [], [], []

    def net(x, t, c):
        labels.append(t)
        seen.append((x.dtype, t.dtype))
        return (1.3 * x + c.to(x)).sin()

    def hook(x0, x, t):
        hooked.append((x0.dtype, x.dtype))
        return x0.clamp(-2, 2)

    def eps(x, t, way):
        away, towards = (net(x.to(dtype), t, c).to(way) for c in (NULL, CONDITION))
        return torch.lerp(away, towards, 6.0).float()

    x, net_of = X.to(dtype), partial(bound, sv.Model(net))
    before = x.clone()
    model = guided(net_of(CONDITION), net_of(NULL), 6.0)
    model = model if calls == 2 else classifier_free(sv.Model(net), CONDITION, NULL, 6.0)
    got = sv.run(DDIM, on_data(model, hook), x)
    assert (set(seen), set(hooked)) == ({(dtype, torch.float32)}, {(torch.float32, torch.float32)})
    assert [t[0].item() for t in labels[::calls]] == TIMES[:-1].float().tolist()
    assert torch.equal(x, before)
    off = [(got - loop(partial(eps, way=w), hook, x=x.float())).abs().max() for w in (torch.float32, dtype)]
    assert off[0] < 2e-5 < 1e-3 < off[1]


# With the rest of the library


def test_log_likelihood_of_a_guided_model_is_the_exact_conditional_density():
    model = classifier(sv.Model(PRIOR.model(PATH, "velocity"), "velocity"), log_p_of_y)
    x = GIVEN_Y.marginal(0.98, 0.02).draw(3, generator(1))
    got = sv.log_likelihood(model, PATH, x, prior=GIVEN_Y.marginal(0.02, 0.98).log_density)
    assert_close(got.log_p, GIVEN_Y.log_density(x, 0.98, 0.02), rtol=1e-3, atol=1e-3)


def test_the_density_of_a_plan_goes_through_conditions_classifiers_thresholds_and_hooks():
    model = classifier(classifier_free(network(), CONDITION, NULL, 2.0), rough)
    model = on_state(thresholded(model, 0.8, 5.0), lambda x, t: x + 0.1 * x.sin())
    plan = sv.ddim(sv.Inversion(PATH), TIMES.flip(0))
    got = sv.log_likelihood(model, PATH, X, sv.exact(), plan)
    jacobian = torch.autograd.functional.jacobian(lambda x: sv.run(plan, model, x, grad=True), X)
    close(got.volume, torch.stack([torch.linalg.slogdet(jacobian[i, :, i]).logabsdet for i in range(4)]))


@pytest.mark.parametrize("predicts", ["noise", "data", "score"])
def test_guidance_of_a_centred_model_is_the_centred_guided_model(predicts):
    model, mean = network(predicts), normals(8, seed=7)
    outside = sv.run(PLAN, sv.centred(classifier_free(model, CONDITION, NULL, 2.0), mean), X)
    close(outside, sv.run(PLAN, classifier_free(sv.centred(model, mean), CONDITION, NULL, 2.0), X))
    assert (outside - sv.run(PLAN, led(2.0), X)).abs().max() > 1e-2


def test_hooks_on_data_go_around_centred_and_not_into_it_where_the_path_of_x_is_another():
    seen, mean, data = [], normals(8, seed=7), Gaussian(torch.zeros(8), torch.eye(8).double())

    def hooked(model):
        return on_data(model, lambda x0, x, t: seen.append((x0, x.clone(), t)) or x0)

    def model(x, t):  # of data + mean
        return data.model(PATH)(x - mean, t)

    close(sv.run(PLAN, hooked(sv.centred(model, mean)), X), sv.run(PLAN, data.model(PATH), X))
    for x0, x, t in seen:
        close(x0, data.data(x, PATH.alpha(f64(t)), PATH.sigma(f64(t))))
    with pytest.raises(ValueError, match="centre the network first, and put guidance and hooks around"):
        sv.centred(hooked(model), mean)


def test_sample_knows_the_label_of_a_guided_network_of_whole_steps():
    labels = []

    def net(x, n, c):
        labels.append(n)
        return (x + c).sin()

    model = sv.Model(net, label=DDPM.step)
    got = sv.sample(clipped(classifier_free(model, CONDITION, NULL, 2.0)), X, DDPM, steps=5)
    assert {(n.dtype, n.shape) for n in labels} == {(torch.long, (8,))}
    by_hand = sv.Model(lambda x, n: 2 * net(x, n, CONDITION) - net(x, n, NULL), label=DDPM.step)
    close(got, sv.sample(clipped(by_hand), X, DDPM, steps=5))


# What is refused, and how soon


def runs(wrap, plan=PLAN):
    return lambda net: sv.run(plan, wrap(net), X)


def answers(answer):
    return runs(lambda net: guided(net(answer), net(), 2.0))


def pairs(c, null):
    return lambda net: classifier_free(net(), c, null, 2.0)


def scaled(scale):
    return runs(lambda net: guided(net(), net(), scale))


def of_p(log_p):
    return runs(lambda net: classifier(net(), log_p))


nan, inf = math.nan, math.inf
REFUSED = {  # what is done with a maker of networks: the error's words; how often a network is asked until then, if it is
    "quantile 0": (lambda net: thresholded(net(), 0.0), r"quantile = 0.0: .* above 0.*quantile=0.995"),
    "quantile 1.5": (lambda net: thresholded(net(), 1.5), r"quantile = 1.5: expected .* up to 1"),
    "quantile NaN": (lambda net: thresholded(net(), nan), r"quantile = nan: expected"),
    "bound 0": (lambda net: thresholded(net(), 0.9, 0.0), r"bound = 0.0: expected"),
    "most": (lambda net: thresholded(net(), 0.9, 1.0, 0.5), r"most = 0.5: .* bound = 1.0"),
    "clip": (lambda net: clipped(net(), 1, -1), r"low = 1 must lie below high = -1"),
    "scale NaN": (scaled(nan), r"scale = nan: .*scale=7.5"),
    "scale inf": (scaled(-inf), r"scale = -inf: .*scale=7.5"),
    "scale True": (scaled(True), r"scale = True: expected a real number"),
    "scale of one call": (lambda net: classifier_free(net(), X, X, inf), r"scale = inf: "),
    "scale gives NaN": (scaled(lambda t: t * nan), r"scale gave .*nan.* for each of the 6 times"),
    "scale gives float": (scaled(lambda t: 7.5), r"scale gave 7.5: expected"),
    "scale of p gives inf": (runs(lambda net: classifier(net(), rough, lambda t: t / 0)), r"scale gave .*inf"),
    "low above high": (lambda net: guided(net(), net(), 2.0, low=0.5, high=0.4), r"low = 0.5, high = 0.4: expected"),
    "rescale": (lambda net: guided(net(), net(), 2.0, rescale=1.5), r"rescale = 1.5: .*rescale=0.7"),
    "rescale NaN": (lambda net: guided(net(), net(), 2.0, rescale=nan), r"rescale = nan: "),
    "other prediction": (lambda net: guided(net(), sv.Model(net(), "data"), 2.0), r"differ in predicts: 'noise' and 'data'; expected the same"),
    "other label": (runs(lambda net: guided(net(), sv.Model(net(), label=lambda t: 9 * t), 2.0)), r"label.*expected the same"),
    "other variance": (lambda net: guided(net(), sv.Model(net(), variance="range"), 2.0), r"differ in variance: None and 'range'"),
    "guided twice": (lambda net: classifier_free(clipped(net()), X, X, 2.0), r"guided already.*guided\(model, weaker, scale\)"),
    "mapping and tensor": (pairs({"c": X}, X), r"condition = \{'c'.*null = tensor.*expected tensors"),
    "other keys": (pairs({"c": X}, {"d": X}), r"condition = \{'c'.*null = \{'d'"),
    "other length": (pairs([X, X], [X]), r"condition = .* expected tensors"),
    "nothing and tensor": (pairs(None, X), r"condition = None, null = tensor"),
    "tensor and nothing": (pairs({"c": X}, {"c": None}), r"null = None: expected tensors"),
    "numbers": (pairs(3, 1000), r"condition = 3, null = 1000: expected tensors"),
    "other batch": (runs(pairs(X[:3], NULL)), r"shape \[3, 8\]: expected \[4, ...\].*or \[1, ...\]"),
    "no batch": (runs(pairs(X, torch.tensor(0))), r"shape \[\]: expected \[4"),
    "CFG++ scale": (lambda net: cfg_pp(PATH, TIMES, inf), r"scale = inf: .*scale=0.6"),
    "CFG++ upwards": (lambda net: cfg_pp(sv.Inversion(PATH), TIMES.flip(0), 0.6), r"times increase: CFG"),
    "noise at alpha = 0": (runs(lambda net: clipped(net()), TO_DATA), r"noise prediction does not determine data at t = 1, where alpha = 0: start later, or .* predicts data"),
    "p of data at alpha = 0": (runs(lambda net: classifier(sv.Model(net(), "data"), rough), TO_DATA), r"at t = 1, where alpha = 0: start later(?!.*predicts data)"),
    "on_state shape": (runs(lambda net: on_state(net(), lambda x, t: x[:1])), r"hook gave shape \[1, 8\]: expected shape \[4, 8\]"),
    "on_data nothing": (runs(lambda net: on_data(net(), lambda x0, x, t: None)), r"hook gave NoneType: expected", 1),
    "on_state in place": (runs(lambda net: on_state(net(), lambda x, t: x.mul_(2))), r"changed its input x in place", 1),
    "p of all": (of_p(lambda x, t: x.sum()), r"log_p gave shape \[\]: expected .*\[4\]", 1),
    "p detached": (of_p(lambda x, t: x.detach().sum(1)), r"no gradient flows through log_p: .*without", 1),
    "nothing": (answers(lambda x, t: None), r"returned NoneType .*expected floating point \[4, 8\]", 1),
    "tuple": (answers(lambda x, t: (x, x)), r"returned tuple .*expected", 1),
    "shape": (answers(lambda x, t: x[:1]), r"returned torch.float64 \[1, 8\] .*expected floating point \[4, 8\]", 1),
    "whole numbers": (answers(lambda x, t: x.long()), r"returned torch.int64 .*expected floating", 1),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_refused_by_name_and_value_and_the_network_is_not_asked_in_vain(what):
    act, words, *calls = REFUSED[what]
    count = []

    def net(answer=lambda x, t: 0.1 * x):
        return lambda x, t, c=None: count.append(t) or answer(x, t)

    with pytest.raises((ValueError, TypeError), match="(?s)" + words):
        act(net)
    assert [len(count)] == (calls or [0])


def test_the_neighbours_of_what_is_refused_are_taken():
    fine = guided(lambda x, t: x.sin(), lambda x, t: x / 3, -3.0, low=0.4, high=0.4, rescale=1.0)
    for model in (
        fine,
        thresholded(fine, 1.0, 1.0, 1.0),
        clipped(fine, -1e-3, 1e-3),
        guided(fine, fine, 2.0),
    ):
        assert sv.run(PLAN, model, X).isfinite().all()


def test_rescaling_leaves_a_prediction_that_is_constant_over_a_sample_alone():
    """Its standard deviation is 0, and there is nothing to scale."""
    flat = (lambda x, t: torch.ones_like(x), lambda x, t: torch.zeros_like(x))
    close(sv.run(PLAN, guided(*flat, 3.0, rescale=0.7), X), sv.run(PLAN, guided(*flat, 3.0), X))


def test_a_scale_is_asked_inside_its_interval_alone():
    once = sv.run(PLAN, guided(led(1.0), led(0.0), 2.0, high=0.4), X)
    asked = guided(led(1.0), led(0.0), lambda t: 2 / (t < 0.5), high=0.4)  # infinite outside
    close(sv.run(PLAN, asked, X), once)


def test_cfg_pp_leads_a_stage_at_the_end_as_the_last_step():
    scale = cfg_pp(PATH, TIMES, 0.6)
    h = PATH.half_logsnr(TIMES).diff()
    assert_close(scale(TIMES[-2:]), (0.6 / -torch.expm1(-h[-1])).expand(2))
    assert sv.run(sv.heun(PATH, TIMES), guided(led(1.0), led(0.0), scale), X).isfinite().all()


def test_what_a_network_natively_predicts_is_not_carried_into_another_model():
    noise = sv.Model(lambda x, t: x)
    made, own = dataclasses.replace(noise, predicts="velocity"), sv.Model(lambda x, t: x, "velocity")
    assert torch.equal(sv.sample(made, X, PATH, 7), sv.sample(own, X, PATH, 7))
    sv.centred(dataclasses.replace(noise, predicts="data"), torch.zeros(8))

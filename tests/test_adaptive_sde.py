"""Adaptive steps for SDEs: the noise is one path however often a step is tried, the law is exact, a sample is alone."""

import math

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import DEVIATIONS, FULL, MEANS, MODELS, NARROW, PROBLEMS, VP, WEIGHTS, exact, generator, starts
from solvers.adaptive_sde import GOTTA_GO_FAST, METHODS
from solvers.control import REJECTED, STRETCH
from solvers.noise import Ahead, per_sample

TRIED = Ahead.increment


def redrawn(self, i, end):
    """The planted error: what was drawn before is forgotten."""
    self._ahead[i] = []
    return TRIED(self, i, end)


class Redrawing(Ahead):
    increment = redrawn


# The path


def cells(kind, reject, count=125, batch=12):
    """Increments over [k, k + 1] of paths walked with tries of random length, [batch, count, 3]."""
    path, chance = kind(per_sample(3, range(batch)), 0.0, [3]), torch.Generator().manual_seed(1)
    found = torch.empty(batch, count, 3, dtype=torch.float64)
    for i in range(batch):
        for k in range(count):
            total = torch.zeros(3, dtype=torch.float64)
            while (here := path.here[i]) < k + 1:
                length = 0.3 + 1.5 * torch.rand((), generator=chance).item()
                increment = path.increment(i, here + length)
                while here + length > k + 1 or reject(increment[0].item() / length**0.5, chance):
                    length = 0.5 * min(length, 2 * (k + 1 - here))
                    increment = path.increment(i, here + length)
                    if length < 0.1:
                        break
                total += increment
                path.advance(i, here + length)
            found[i, k] = total
    return found


def moments_agree(z, limit=4.0):
    """Mean, variance, third and fourth moment of standard normals [n] within some standard errors."""
    n = len(z)
    return (
        abs(z.mean()) < limit / n**0.5
        and abs((z**2).mean() - 1) < limit * (2 / n) ** 0.5
        and abs((z**3).mean()) < limit * (15 / n) ** 0.5
        and abs((z**4).mean() - 3) < limit * (96 / n) ** 0.5
    )


def assert_uncorrelated(a, b):
    assert abs((a * b).mean()) < 4 / a.numel() ** 0.5


def large(z, chance):
    return abs(z) > 0.8


def by_chance(z, chance):
    return torch.rand((), generator=chance).item() < 0.5


@pytest.mark.parametrize("reject", [large, by_chance])
def test_increments_over_fixed_cells_are_independent_standard_normals_however_the_way_is_tried(reject):
    z = cells(Ahead, reject)
    for element in range(3):  # of which the first has decided
        assert moments_agree(z[..., element].flatten())
    assert_uncorrelated(z[:, 1:], z[:, :-1])
    assert_uncorrelated(z[..., 0], z[..., 1])
    assert_uncorrelated(z[1:], z[:-1])


def test_noise_drawn_anew_after_a_rejection_is_found_out():
    z = cells(Redrawing, large)
    assert not moments_agree(z[..., 0].flatten(), 8.0)
    assert moments_agree(z[..., 1].flatten())  # which has decided nothing


def test_increments_of_the_accepted_steps_are_standard_normals_where_rejections_do_not_look_at_them():
    path, chance = Ahead(per_sample(8, [5]), 0.0, [2]), generator(2)
    z = []
    for _ in range(2000):
        here, length = path.here[0], 0.1 + torch.rand((), generator=chance).item()
        while torch.rand((), generator=chance) < 0.5:
            path.increment(0, here + length)
            length *= 0.3 + torch.rand((), generator=chance).item()  # a nearer end, or one farther
        z.append(path.increment(0, here + length) / length**0.5)
        path.advance(0, here + length)
    z = torch.stack(z)
    assert moments_agree(z[:, 0])
    assert moments_agree(z[:, 1])
    assert_uncorrelated(z[1:], z[:-1])
    assert_uncorrelated(z[:, 0], z[:, 1])


def test_the_pieces_of_a_subdivided_increment_add_up_to_the_whole():
    path, chance = Ahead(per_sample(0, [3, 9]), 2.0, [2, 3]), generator(4)
    whole = [path.increment(i, 7.0) for i in (0, 1)]
    assert all(torch.equal(path.increment(i, 7.0), whole[i]) for i in (0, 1))
    sums = [torch.zeros(2, 3, dtype=torch.float64) for _ in whole]
    for i in (0, 1):
        for end in [*sorted((2 + 5 * torch.rand(20, generator=chance)).tolist()), 7.0]:
            tried = path.increment(i, (path.here[i] + end) / 2)  # half of it, before all of it
            sums[i] += path.increment(i, end)
            assert torch.equal(path.increment(i, (path.here[i] + end) / 2), tried)
            path.advance(i, end)
    assert_close(sums, whole, rtol=0, atol=1e-13)
    assert path.here == [7.0, 7.0]


def test_a_farther_end_goes_on_from_what_was_drawn():
    path = Ahead(per_sample(0, [3]), 0.0, [4])
    near, far = path.increment(0, 1.0), path.increment(0, 5.0)
    path.advance(0, 1.0)
    assert_close(near + path.increment(0, 5.0), far, rtol=0, atol=1e-14)


def test_a_path_depends_on_seed_and_sample_alone():
    def walked(path, i, scale=1.0):
        ends = [scale * end for end in (2.0, 0.7, 3.0, 0.2)]
        return torch.stack([path.increment(i, end) for end in ends])

    together = Ahead(per_sample(7, [4, 9, 2]), 0.0, [5])
    walked(together, 0, 0.3)
    first = walked(together, 1)
    walked(together, 2, 2.0)
    assert torch.equal(first, walked(Ahead(per_sample(7, [9]), 0.0, [5]), 0))
    for other in (per_sample(8, [9]), per_sample(7, [4])):
        assert (first - walked(Ahead(other, 0.0, [5]), 0)).abs().min() > 1e-3


def test_paths_steps_and_starts_have_streams_of_their_own():
    size, source = 4000, per_sample(0, [0])
    like = torch.zeros(1, size, dtype=torch.float64)
    path = Ahead(source, 0.0, [size])
    draws = [path.increment(0, 1.0)]
    for end in (2.0, 3.0):
        path.advance(0, end - 1)
        draws.append(path.increment(0, end))
    brownian = sv.noise.brownian(0, [0], torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    others = [source(k, like)[0] for k in range(5)] + [source.initial(size, dtype=torch.float64)[0]]
    others += [brownian(k, like)[0] for k in range(3)]
    others += [Ahead(per_sample(*key), 0.0, [size]).increment(0, 1.0) for key in ((1, [0]), (0, [1]))]
    for z in draws:
        for other in others:
            assert_uncorrelated(z, other)
    assert_uncorrelated(draws[0], draws[1])


# The law

MEAN, VARIANCE = 0.4, 0.3


def gaussian_model(x, t):
    """The exact noise prediction of N(0.4, 0.3)."""
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    return sigma * (x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)


def mixture_model(x, t):
    """The exact noise prediction of `line`, each sample at its own time."""
    alpha, sigma = VP.alpha(t)[:, None], VP.sigma(t)[:, None]
    total = alpha**2 * DEVIATIONS**2 + sigma**2
    away = x - alpha * MEANS
    share = torch.softmax(WEIGHTS.log() - total.log() / 2 - away**2 / total / 2, 1)
    return (share * away / total).sum(1, keepdim=True) * sigma


def scores(problem, x, t):
    """What would be standard normals if x [n, 1] had the exact law at t: the normal quantiles of its distribution function."""
    alpha, sigma = (level(torch.tensor(t, dtype=torch.float64)) for level in (VP.alpha, VP.sigma))
    if problem == "gaussian":
        return ((x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2).sqrt()).flatten()
    total = (alpha**2 * DEVIATIONS**2 + sigma**2).sqrt()
    return torch.special.ndtri((WEIGHTS * torch.special.ndtr((x - alpha * MEANS) / total)).sum(1))


def drawn(problem, n):
    """Exact states at the start of NARROW, [n, 1]."""
    if problem == "line":
        return starts("line", NARROW, n)
    alpha, sigma = (level(torch.tensor(NARROW[0], dtype=torch.float64)) for level in (VP.alpha, VP.sigma))
    z = torch.randn(n, 1, dtype=torch.float64, generator=generator(5))
    return alpha * MEAN + (alpha**2 * VARIANCE + sigma**2).sqrt() * z


def ended(problem, method, eta, tolerance, n):
    """The scores of the ends of a run whose first step in t is a quarter of the way, and how often a sample was rejected."""
    model = gaussian_model if problem == "gaussian" else mixture_model
    solution = sv.adaptive_sde(
        model, VP, drawn(problem, n), 0, tolerance, tolerance, method=method, eta=eta, start=NARROW[0], stop=NARROW[1],
        first_step=0.1,
    )  # fmt: skip
    return scores(problem, solution.x, NARROW[1]), solution.rejected.double().mean()


def assert_exact_on_a_path_alone(problem, method, eta, n, monkeypatch):
    """With a tolerance that makes for rejections enough."""
    tolerances = (0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
    tolerance = next(v for v in tolerances if ended(problem, method, eta, v, 40)[1] > 5)
    assert moments_agree(ended(problem, method, eta, tolerance, n)[0])
    monkeypatch.setattr(Ahead, "increment", redrawn)
    assert not moments_agree(ended(problem, method, eta, tolerance, n)[0])


@pytest.mark.parametrize(
    ("method", "n"), [("gotta_go_fast", 500), pytest.param("dpm_solver_pp_sde", 1300, marks=pytest.mark.slow)]
)
def test_the_law_is_exact_with_many_rejections_and_not_with_noise_drawn_anew(method, n, monkeypatch):
    assert_exact_on_a_path_alone("gaussian", method, 1.0, n, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("problem", ["gaussian", "line"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("method", METHODS)
def test_the_law_is_exact_for_every_eta_and_problem(problem, method, eta, monkeypatch):
    assert_exact_on_a_path_alone(problem, method, eta, 4000, monkeypatch)


@pytest.mark.parametrize(("method", "tolerance"), [("gotta_go_fast", 0.05), ("dpm_solver_pp_sde", 0.02)])
def test_half_the_noise_has_the_same_marginals(method, tolerance):
    assert moments_agree(ended("line", method, 0.5, tolerance, 300)[0])


# Runs


def ran(x=None, noise=7, tolerance=0.05, model=MODELS["line"], span=NARROW, **options):
    x = starts("line", NARROW, 7) if x is None else x
    return sv.adaptive_sde(model, VP, x, noise, tolerance, tolerance, start=span[0], stop=span[1], **options)


def each(x, t):
    """`line` for samples at times of their own."""
    return mixture_model(x, t)


@pytest.mark.parametrize("method", METHODS)
def test_without_noise_it_is_the_ode(method):
    x = starts("line", NARROW, 3)
    flow = PROBLEMS["line"].flow(x, VP, *NARROW)
    for tolerance in (1e-2, 1e-3):
        end = ran(x, tolerance=tolerance, model=each, eta=0.0, method=method).x
        assert (end - flow).abs().max() < 10 * tolerance
    assert torch.equal(ran(x, 8, tolerance, each, eta=0.0, method=method).x, end)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_sample_is_the_same_alone_in_a_batch_and_in_any_order(method, eta):
    ids, order, x = [4, 9, 2, 0, 11, 3, 8], torch.tensor([3, 1, 6, 0, 5, 2, 4]), starts("line", NARROW, 7)

    def end(x, ids):
        solution = ran(x, per_sample(7, ids), model=each, method=method, eta=eta)
        return solution.x, solution.nfe

    (x_all, nfe_all), before = end(x, ids), torch.get_rng_state()
    for i in (0, 3, 6):
        assert torch.equal(end(x[i : i + 1], ids[i : i + 1])[0], x_all[i : i + 1])
    moved, nfe = end(x[order], [ids[i] for i in order])
    assert torch.equal(moved, x_all[order])
    assert torch.equal(nfe, nfe_all[order])
    assert torch.equal(end(x, ids)[0], x_all)
    assert torch.equal(torch.get_rng_state(), before)
    if eta:
        assert len(set(nfe_all.tolist())) > 1
        assert not torch.equal(
            ran(x, 8, model=each, method=method, eta=eta).x, ran(x, 7, model=each, method=method, eta=eta).x
        )


@pytest.mark.parametrize("method", METHODS)
def test_images_in_single_precision_run_like_their_elements(method):
    x = starts("line", NARROW, 32).reshape(2, 1, 4, 4)

    def model(x, t):
        alpha, sigma = (level(t.double()).reshape(-1, 1, 1, 1) for level in (VP.alpha, VP.sigma))
        return (sigma * (x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)).to(x.dtype)

    double, single = (ran(v, model=model, method=method) for v in (x, x.float()))
    assert single.x.dtype == torch.float32
    assert single.x.shape == x.shape
    assert_close(single.x.double(), double.x, rtol=0, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_calls_are_counted_and_are_what_the_method_says(method, eta):
    rows = 0

    def model(x, t):
        nonlocal rows
        rows += len(x)
        return each(x, t)

    solution = ran(model=model, method=method, eta=eta, first_step=1.0 if method != "gotta_go_fast" else 0.1)
    accepted = torch.tensor([len(times) - 1 for times in solution.times])
    assert rows == solution.nfe.sum()
    if method == "gotta_go_fast":
        assert torch.equal(solution.nfe, 2 * accepted + solution.rejected)
    elif eta:
        assert torch.equal(solution.nfe, 1 + accepted + solution.rejected)
    else:  # the stop need not be asked at, and then a rejected step to it costs no call
        assert (solution.nfe >= accepted).all()
        assert (solution.nfe <= 1 + accepted + solution.rejected).all()
    if method == "gotta_go_fast" and eta:
        assert solution.rejected.sum() > 0
    for times in solution.times:
        assert times[[0, -1]].tolist() == list(NARROW)
        assert (times.diff() < 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_tighter_tolerance_costs_more_calls(method):
    calls = [
        ran(tolerance=tolerance, model=each, method=method).nfe.sum() for tolerance in (0.2, 0.05, 0.0125)
    ]
    assert calls[0] < calls[1] < calls[2]


def literal_gotta_go_fast(model, x, increment, eta, tolerance, first_step, start, stop):
    """Section 8 of the notes, with the noise subdivided; how long steps are as `Control` and `aim` say.

    increment(t, s) is W between two times. Returns the end, the accepted times, the number of rejections.
    """

    def levels(t):
        integral = 0.1 * t + 19.9 * t**2 / 2
        return 0.1 + 19.9 * t, math.sqrt(-math.expm1(-integral))

    def reverse(x, t):
        beta, sigma = levels(t)
        score = -model(x, torch.tensor([t], dtype=torch.float64)) / sigma
        return -beta / 2 * x - (1 + eta) / 2 * beta * score, math.sqrt(eta * beta)

    t, step, low_before, times, rejected = start, first_step, x, [start], 0
    while t > stop:
        end = stop if t - stop <= STRETCH * step else t - step
        h, w = t - end, increment(t, end)
        drift, g = reverse(x, t)
        k1 = -h * drift + g * w
        drift, g = reverse(x + k1, end)
        k2 = -h * drift + g * w
        low, high = x + k1, x + (k1 + k2) / 2
        delta = (tolerance * torch.maximum(low.abs(), low_before.abs())).clamp(min=tolerance)
        e = (((k2 - k1) / 2 / delta) ** 2).mean().sqrt().item()
        factor = min(max(GOTTA_GO_FAST.safety * max(e, 1e-10) ** -0.9, 0.1), 10.0)
        if e <= 1:
            t, x, low_before = end, high, low
            times.append(t)
        else:
            factor, rejected = min(factor, REJECTED), rejected + 1
        step = h * factor
    return x, times, rejected


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("sample", [0, 5])
def test_gotta_go_fast_is_the_paper_s_loop_along_a_path(eta, sample):
    x = starts("line", NARROW, 7)[sample : sample + 1]
    path = Ahead(per_sample(7, [sample]), 0.0, [1])

    def increment(t, end):
        if path.here[0] < NARROW[0] - t:
            path.advance(0, NARROW[0] - t)
        return path.increment(0, NARROW[0] - end)

    expected, times, rejected = literal_gotta_go_fast(each, x, increment, eta, 0.05, 0.1, *NARROW)
    found = ran(x, per_sample(7, [sample]), 0.05, each, method="gotta_go_fast", eta=eta, first_step=0.1)
    assert rejected == found.rejected[0] > 0
    assert_close(found.times[0], torch.tensor(times, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(found.x, expected, rtol=0, atol=1e-10)


def test_gotta_go_fast_starts_with_a_hundredth_of_the_way():
    way = NARROW[0] - NARROW[1]
    times = ran(tolerance=10.0, model=each, method="gotta_go_fast").times
    assert all(abs(float(v[0] - v[1]) / way - 0.01) < 1e-12 for v in times)


@pytest.mark.parametrize("eta", [0.5, 1.0, 3.0])
def test_the_longest_step_of_dpm_solver_pp_sde_is_1_over_1_plus_eta(eta):
    """Noise is seen by no difference of outputs, so no tolerance makes steps longer."""
    solution = ran(tolerance=1e6, model=each, eta=eta, span=FULL, first_step=9.0)
    assert solution.rejected.sum() == 0
    for times in solution.times:
        steps = VP.half_logsnr(times).diff()
        assert_close(steps[:-1], torch.full_like(steps[:-1], 1 / (1 + eta)), rtol=1e-9, atol=0)


def test_the_last_step_of_dpm_solver_pp_sde_is_no_longer_than_the_longest():
    for times in ran(tolerance=1e6, model=each, span=FULL, first_step=9.0).times:
        assert VP.half_logsnr(times).diff().max() < 0.5 + 1e-9


# What is refused


@pytest.mark.parametrize("noise", [torch.Generator(), lambda draw, like: like])
def test_noise_without_samples_of_its_own_is_refused(noise):
    with pytest.raises(TypeError, match=r"expected an int seed or noise\.per_sample"):
        ran(noise=noise)


def test_noise_for_another_batch_is_refused():
    with pytest.raises(ValueError, match="noise is for 3 samples, but the batch has 7"):
        ran(noise=per_sample(0, range(3)))


def test_options_that_make_no_sense_are_refused():
    for options, words in (
        ({"method": "euler"}, "method"),
        ({"eta": -1.0}, "eta = -1"),
        ({"first_step": 0.0}, "first_step"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"span": NARROW[::-1]}, "times"),
    ):
        with pytest.raises(ValueError, match=words):
            ran(**options)
    back = sv.Inversion(VP)
    with pytest.raises(ValueError, match="from data to noise"):
        sv.adaptive_sde(each, back, starts("line", NARROW, 2), 0)


@pytest.mark.parametrize("method", METHODS)
def test_too_few_calls_are_said_to_be_too_few(method):
    with pytest.raises(sv.NonConvergence, match="max_nfe = 6") as caught:
        ran(model=each, method=method, max_nfe=6, tolerance=0.01)
    assert caught.value.samples == [*range(7)]
    found = ran(model=each, method=method, max_nfe=6, tolerance=0.01, on_limit="return")
    assert found.status == ["max_nfe"] * 7
    assert (found.nfe <= 6).all()
    for i, times in enumerate(found.times):
        assert NARROW[1] < times[-1] <= NARROW[0], i


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_are_not_finite_are_named(method):
    found = ran(model=lambda x, t: x * math.nan, method=method, on_limit="return")
    assert found.status == ["non_finite"] * 7


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_and_no_way_to_go_are_no_error(method):
    empty = ran(torch.zeros(0, 3), noise=0, method=method)
    assert empty.x.shape == (0, 3)
    still = ran(model=each, method=method, span=(0.5, 0.5))
    assert torch.equal(still.x, starts("line", NARROW, 7))
    assert still.nfe.sum() == 0


def test_the_problems_are_what_they_are_taken_for():
    """The scores of exact flows are those of their starts."""
    x = starts("line", NARROW)
    assert_close(
        scores("line", x, NARROW[0]), scores("line", exact("line", NARROW), NARROW[1]), rtol=0, atol=1e-6
    )

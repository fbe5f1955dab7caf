"""Adaptive runs keep their tolerance, at the cost of their order, and find steps that a plan repeats."""

import functools
import math
from functools import partial

import pytest
import torch

import solvers as sv
from problems import FULL, NARROW, PROBLEMS, SHAPE, VP, exact, generator, starts
from reference import even, row_defects, slopes, uneven
from reference.orders import PATTERN, grid
from solvers.methods import tableaux

METHODS = {  # name -> (arguments, the order of the local error that the controller sees)
    "adams 2": ({"method": "adams", "order": 2}, 3),
    "adams 3": ({"method": "adams", "order": 3}, 4),
    "adams": ({"method": "adams"}, None),
    "dpm_solver 2": ({"method": "dpm_solver", "order": 2}, 2),
    "dpm_solver 3": ({"method": "dpm_solver", "order": 3}, 3),
    "exponential_rk 3 data": ({"method": "exponential_rk", "order": 3, "predicts": "data"}, 3),
    "exponential_rk 3": ({"method": "exponential_rk", "order": 3}, 3),
    "exponential_rk 4": ({"method": "exponential_rk", "order": 4}, 4),
}
SMALL = ["adams", "dpm_solver 2", "dpm_solver 3", "exponential_rk 3", "exponential_rk 4"]


def network(problem, schedule=VP, predicts="velocity"):
    """The exact model, asked for each sample at its own time."""
    return sv.Model(PROBLEMS[problem].model(schedule, predicts), predicts=predicts, label=lambda t: t)


def noisy(problem, schedule, t, n):
    """Exact states at time t of any schedule, [n, d]."""
    data = PROBLEMS[problem]
    noise = torch.randn(n, *data.shape, dtype=torch.float64, generator=generator(3))
    return sv.noised(data.draw(n, generator(4)), schedule, t, noise)


def elementwise(x, t):
    """A noise prediction of each element by itself."""
    return (
        0.3 * x + x / (1 + x * x) * t[:, None]
    )  # and nothing that torch computes otherwise in short vectors


def adaptive(model, x, tol, name="adams", schedule=VP, **options):
    """With rtol = atol = tol."""
    options = {"max_nfe": 20000, **METHODS[name][0], **options}
    return sv.adaptive(model, schedule, x, rtol=tol, atol=tol, **options)


@functools.cache
def solved(problem, name, digits):
    """64 samples from half log-SNR -5.0 to 4.6 at tolerance 10^-digits."""
    return adaptive(network(problem), starts(problem, FULL), 10.0**-digits, name)


def rms(a, b):
    return (a - b).square().mean().sqrt().item()


# The true error ------------------------------------------------------------------------------------------


def tolerances():
    for problem in PROBLEMS:
        for name in METHODS:
            for digits in (1, 2, 3, 4, 5, 6):
                slow = digits > (3 if problem == "line" else 2)
                yield pytest.param(problem, name, digits, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("problem", "name", "digits"), list(tolerances()))
def test_the_true_error_is_of_the_tolerances_size(problem, name, digits):
    ratio = rms(solved(problem, name, digits).x, exact(problem, FULL)) * 10**digits
    assert ratio <= 5
    if name not in ("adams", "exponential_rk 4"):  # of order 2 and 3
        assert ratio >= 0.05


# The cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "last"),
    [("line", 4), *(pytest.param(problem, 5, marks=pytest.mark.slow) for problem in PROBLEMS)],
)
@pytest.mark.parametrize("name", [name for name, (_, k) in METHODS.items() if k])
def test_calls_per_decade_grow_as_the_order_says(name, problem, last):
    """10^(1 / k) times for a tenth of the tolerance, with k the order of the local error that the controller sees."""
    first = 3 if (problem, name) == ("line", "adams 3") else 2  # before that it is 2.2 times
    calls = [solved(problem, name, digits).nfe.double().mean() for digits in range(first, last + 1)]
    calls = torch.stack(calls)
    growth = calls[1:] / calls[:-1]
    assert (growth > 1).all()
    assert growth.max() <= 1.15 * 10 ** (1 / METHODS[name][1])


def test_tight_tolerances_take_high_orders_and_repay_them():
    start, stop = VP.time(torch.tensor([0.0, 1.5], dtype=torch.float64)).tolist()
    x = noisy("eight", VP, start, 6)
    high, low = (
        adaptive(network("eight"), x, 1e-8, name, start=start, stop=stop) for name in ("adams", "adams 2")
    )
    reached = [max(orders) for orders in high.orders]
    assert sum(order >= 5 for order in reached) > len(x) / 2
    assert all(max(orders) <= 3 for orders in low.orders)  # the last step has the order of the corrector
    assert low.nfe.double().mean() > 3 * high.nfe.double().mean()


# Each sample by itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_a_samples_steps_are_its_own_to_the_last_bit(name):
    """Alone, among 2, 7 and 64, and among 64 in another order."""
    x = starts("line", FULL)
    whole = adaptive(elementwise, x, 1e-2, name)
    assert len(set(whole.nfe.tolist())) > 1
    shuffled = torch.randperm(len(x), generator=generator(5))
    for samples in (torch.tensor([9]), torch.tensor([9, 40]), torch.arange(5, 12), shuffled):
        part = adaptive(elementwise, x[samples], 1e-2, name)
        for j, i in enumerate(samples.tolist()):
            assert (part.nfe[j], part.rejected[j]) == (whole.nfe[i], whole.rejected[i])
            assert torch.equal(part.times[j], whole.times[i])
            assert torch.equal(part.x[j], whole.x[i])


@pytest.mark.parametrize("name", SMALL)
def test_coupled_samples_take_the_steps_of_the_worst(name):
    x = starts("line", FULL)[:9]
    together = adaptive(network("line"), x, 1e-2, name, coupled=True)
    assert all(torch.equal(times, together.times[0]) for times in together.times)
    assert len(set(together.nfe.tolist())) == len(set(together.rejected.tolist())) == 1
    fewer = adaptive(network("line"), x[:1], 1e-2, name, coupled=True)
    assert (fewer.x[0] - together.x[0]).abs().max() > 1e-6
    assert not torch.equal(fewer.times[0], together.times[0])


# What a run found, as a plan -----------------------------------------------------------------------------

SPANS = [(VP, *FULL), (sv.EDM(), 20.0, 0.02), (sv.Flow(), 0.999, 0.001)]


def replayed(schedule, start, stop, tol, n=2, **options):
    """The largest difference that the plans of an adaptive run's samples leave, and the run."""
    model, x = network("line", schedule), noisy("line", schedule, start, n)
    solution = sv.adaptive(
        model, schedule, x, rtol=tol, atol=tol, start=start, stop=stop, max_nfe=20000, **options
    )
    plans = [sv.replay(solution, i) for i in range(n)]
    for plan, nfe, rejected in zip(plans, solution.nfe.tolist(), solution.rejected.tolist(), strict=True):
        assert plan.nfe <= nfe
        assert plan.nfe >= nfe - 1 or rejected  # a pair may ask at the stop too
    ends = [sv.run(plan, model, x[i : i + 1])[0] for i, plan in enumerate(plans)]
    return (torch.stack(ends) - solution.x).abs().max(), solution


@pytest.mark.parametrize(("schedule", "start", "stop"), SPANS, ids=["VP", "EDM", "Flow"])
@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "scaled"])
@pytest.mark.parametrize(
    "name",
    ["adams", "exponential_rk 4", *(pytest.param(n, marks=pytest.mark.slow) for n in SMALL[1:4])],
)
def test_replay_repeats_the_run(name, predicts, schedule, start, stop):
    options = {"predicts": predicts, "scale": 1.0}
    if predicts == "scaled":
        options = {"predicts": "velocity", "scale": 0.5}
    gap, _ = replayed(schedule, start, stop, 3e-2, **{**METHODS[name][0], **options})
    assert gap < 1e-12


@pytest.mark.parametrize(
    ("predicts", "order"),
    [
        pytest.param(p, q, marks=[] if q in (2, 5) or (p, q) == ("velocity", 8) else [pytest.mark.slow])
        for p in ("noise", "data", "velocity", "scaled")
        for q in (1, 2, 3, 4, 5, 6, 7, 8)
    ],
)
def test_replay_repeats_every_order_of_adams(predicts, order):
    options = {"predicts": predicts, "scale": 1.0}
    if predicts == "scaled":
        options = {"predicts": "velocity", "scale": 0.5}
    span = VP.time(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    gap, solution = replayed(VP, *span, 10.0 ** -min(2 + order, 7), n=1, order=order, **options)
    assert gap < 1e-12
    assert max(map(max, solution.orders)) >= min(order, 6)


def test_replay_notices_another_order_of_a_step():
    model, x = network("line"), starts("line", FULL)[:1]
    solution = adaptive(model, x, 1e-3)
    solution.orders[0][5] -= 1
    assert (sv.run(sv.replay(solution), model, x) - solution.x).abs().max() > 1e-6


# Between the steps ---------------------------------------------------------------------------------------

BETWEEN = {
    "adams 2": 2,
    "dpm_solver 2": 2,
    "dpm_solver 3": 3,
    "exponential_rk 3": 3,
    "exponential_rk 4": 4,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_between_the_steps_the_error_falls_with_the_methods_order(name):
    x, errors, steps = starts("line", FULL)[:4], [], []
    for tol in (1e-2, 1e-4) if name == "dpm_solver 2" else (1e-3, 1e-5):
        solution = adaptive(network("line"), x, tol, name, dense=True)
        gaps = []
        for t in (0.83, 0.37, 0.071):
            gaps.append(solution.at(t) - PROBLEMS["line"].flow(x, VP, FULL[0], t))
        errors.append(torch.stack(gaps).square().mean().sqrt().item())
        steps.append(sum(map(len, solution.orders)))
    slope = math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])
    assert slope >= BETWEEN[name] - 0.6


@pytest.mark.parametrize("name", BETWEEN)
def test_dense_output_passes_through_the_accepted_states(name):
    x = starts("line", FULL)[1:2]
    solution = adaptive(network("line"), x, 1e-2, name, dense=True)
    (times,), ((states, _),) = solution.times, solution.points
    assert torch.equal(solution.at(FULL[0]), x)
    assert torch.equal(solution.at(FULL[1]), solution.x)
    for t, state in list(zip(times.tolist(), states, strict=True))[1:-1]:
        assert torch.equal(solution.at(t)[0], state)
        for near in (t - 1e-9, t + 1e-9):
            assert (solution.at(near)[0] - state).abs().max() < 1e-6
    middle = (times[2] + times[3]) / 2  # where a step is far from its ends, they would be noticed
    assert (solution.at(float(middle))[0] - states[4]).abs().max() > 1e-4


# The paper's rule ----------------------------------------------------------------------------------------


def papers_loop(problem, x, order, rtol, atol, h=0.05, theta=0.9):
    """The released loop of DPM-Solver-12 and -23: Lu et al. 2022 (arXiv 2206.00927), appendix C.

    Returns:
        x, times, the number of rejected steps.
    """
    ask = PROBLEMS[problem].model(VP, "noise")
    lam, end = VP.half_logsnr(torch.tensor(FULL, dtype=torch.float64))
    times, rejected, previous = [FULL[0]], 0, x

    def level(lam):
        t = VP.time(lam)
        return t, VP.alpha(t), VP.sigma(t)

    def noise(x, lam):
        return ask(x, level(lam)[0].expand(len(x)))

    def e2(h):
        return torch.expm1(h) / h - 1

    while (level(lam)[0] - FULL[1]).abs() > 1e-5:
        m0 = noise(x, lam)

        def base(h, bracket, lam=lam, x=x):
            (_, alpha_s, _), (_, alpha_t, sigma_t) = level(lam), level(lam + h)
            return alpha_t / alpha_s * x - sigma_t * bracket

        r1 = 1 / 2 if order == 2 else 1 / 3
        m1 = noise(base(r1 * h, torch.expm1(r1 * h) * m0), lam + r1 * h)
        second = base(h, torch.expm1(h) * (m0 + (m1 - m0) / (2 * r1)))
        if order == 2:
            low, high = base(h, torch.expm1(h) * m0), second
        else:
            r2 = 2 / 3
            stage = torch.expm1(r2 * h) * m0 + r2 / r1 * e2(r2 * h) * (m1 - m0)
            m2 = noise(base(r2 * h, stage), lam + r2 * h)
            low, high = second, base(h, torch.expm1(h) * m0 + e2(h) / r2 * (m2 - m0))
        delta = (rtol * torch.maximum(low.abs(), previous.abs())).clamp(min=atol)
        error = ((high - low) / delta).square().flatten(1).mean(1).sqrt().max()
        if error <= 1:
            x, previous, lam = high, low, lam + h
            times.append(level(lam)[0].item())
        else:
            rejected += 1
        h = torch.minimum(theta * h * error ** (-1 / order), end - lam)
    return x, torch.tensor(times, dtype=torch.float64), rejected


def compare_to_the_paper(order, problem, rtol, atol):
    x = starts(problem, FULL)[:16]
    end, times, rejected = papers_loop(problem, x, order, rtol, atol, torch.tensor(0.05).double())
    ours = sv.adaptive(
        network(problem), VP, x, order, rtol, atol, method="dpm_solver", coupled=True, max_nfe=20000
    )
    assert len(ours.times[0]) == len(times)
    torch.testing.assert_close(ours.times[0], times, rtol=1e-7, atol=0)  # half log-SNR goes through the time
    torch.testing.assert_close(ours.x, end, rtol=1e-9, atol=1e-9)
    assert (ours.rejected == rejected).all()
    # the paper counts `order` calls for a rejected step too, whose first is known here
    assert (ours.nfe == order * (len(times) - 1 + rejected) - rejected).all()


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("problem", ["line", "eight"])
@pytest.mark.parametrize(("rtol", "atol"), [(0.05, 0.0078), (3e-3, 1e-3)])
def test_coupled_dpm_solver_is_the_papers(order, problem, rtol, atol):
    compare_to_the_paper(order, problem, rtol, atol)


# Ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("predicts", ["data", "velocity", "flow"])
def test_adams_starts_from_pure_noise_and_ends_in_data(predicts):
    flow, asked = sv.Flow(), []
    model = network("line", flow, predicts)

    def net(x, t):
        asked.extend(t.tolist())
        return model.net(x, t)

    x = torch.randn(16, 1, dtype=torch.float64, generator=generator(3))
    recorded = sv.Model(net, predicts=predicts, label=lambda t: t)
    solution = adaptive(recorded, x, 1e-4, schedule=flow)
    ratio = rms(solution.x, PROBLEMS["line"].flow(x, flow, 1.0, 0.0)) * 1e4
    assert ratio < 5
    assert max(asked) == 1.0
    assert min(asked) > 0.0
    assert len(asked) == solution.nfe.sum()


@pytest.mark.parametrize("schedule", [VP, sv.Inversion(VP)], ids=["sampling", "encoding"])
@pytest.mark.parametrize("name", SMALL)
def test_times_go_from_the_start_to_the_stop_exactly(name, schedule):
    start, stop = (0.93, 0.0123) if schedule is VP else (0.0123, 0.93)
    x = noisy("line", VP, start, 8)
    solution = adaptive(network("line"), x, 1e-2, name, schedule, start=start, stop=stop)
    assert solution.status == ["done"] * 8
    for times, orders in zip(solution.times, solution.orders, strict=True):
        assert (float(times[0]), float(times[-1])) == (start, stop)
        assert (times.diff() * (stop - start) > 0).all()
        assert len(orders) == len(times) - 1


@pytest.mark.parametrize("name", ["adams", pytest.param("exponential_rk 4", marks=pytest.mark.slow)])
def test_decoding_undoes_encoding(name):
    data = PROBLEMS["eight"].draw(4, generator(4))
    code = adaptive(network("eight"), data, 1e-8, name, sv.Inversion(VP)).x
    back = adaptive(network("eight"), code, 1e-8, name).x
    assert rms(code, data) > 0.1
    assert rms(back, data) < 1e-6


@pytest.mark.parametrize("name", [*SMALL, "exponential_rk 3 data"])
def test_schedules_of_one_ode_have_the_same_steps(name):
    ends = torch.tensor([-1.0, 3.0], dtype=torch.float64)
    solutions, levels, states = [], [], []
    for schedule in (VP, sv.VE(), sv.Flow(), sv.Flow(shift=3.0)):
        start, stop = schedule.time(ends).tolist()
        unit = torch.hypot(*(f(ends.new_tensor(start)) for f in (schedule.alpha, schedule.sigma)))
        model = network("line", schedule)
        x = starts("line", NARROW)[:3] * unit
        solution = adaptive(model, x, 1e-2, name, schedule, start=start, stop=stop)
        t = ends.new_tensor(stop)
        solutions.append(solution)
        levels.append([schedule.half_logsnr(times) for times in solution.times])
        states.append(solution.x / torch.hypot(schedule.alpha(t), schedule.sigma(t)))
    for solution, lams, x in zip(solutions[1:], levels[1:], states[1:], strict=True):
        assert torch.equal(solution.nfe, solutions[0].nfe)
        for mine, first in zip(lams, levels[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=0, atol=1e-8)
        torch.testing.assert_close(x, states[0], rtol=0, atol=1e-8)


# The pair of order four ----------------------------------------------------------------------------------

FORMS = {"noise": "half_logsnr", "data": "half_logsnr", "velocity": "angle"}


def low_of(pair, factor=1.0):
    """The lower solution of a pair that reads the output at the end, as a method of five stages."""
    high = pair.tableau
    return tableaux.Tableau(
        (*high.positions, 1.0), lambda p: [*high.weights(p), [factor * w for w in pair.low(p)]]
    )


def order_of(tableau, predicts, spacing):
    """The slope of trajectories, of the line."""
    errors = []
    for n in (42, 84):
        n = n - n % len(PATTERN) + 1 if spacing is uneven else n
        plan = sv.exponential_rk(VP, grid(VP, *NARROW, spacing(n)), tableau, predicts, FORMS[predicts])
        errors.append(rms(sv.run(plan, network("line"), starts("line", NARROW)), exact("line", NARROW)))
    return slopes(errors).item()


@pytest.mark.parametrize("spacing", [even, uneven])
@pytest.mark.parametrize("predicts", FORMS)
def test_three_eighths_has_order_four(predicts, spacing):
    assert order_of(tableaux.three_eighths, predicts, spacing) == pytest.approx(4, abs=0.25)


@pytest.mark.parametrize("predicts", ["noise", "data"])
def test_three_eighths_integrates_cubics_in_half_logsnr_exactly(predicts):
    build = partial(sv.exponential_rk, tableau=tableaux.three_eighths, predicts=predicts)
    defects = row_defects(build, VP, 0.5, SHAPE, 0.5, degree=4).abs()
    assert defects[:4].max() < 1e-13
    assert defects[4] > 1e-7


def test_three_eighths_integrates_cubics_in_the_angle_exactly():
    times = grid(VP, *NARROW, uneven(5))
    plan = sv.exponential_rk(VP, times, tableaux.three_eighths, "velocity", "angle")

    def angle(t):
        return torch.atan2(VP.sigma(t), VP.alpha(t))

    defects = []
    for k in range(5):
        model = sv.Model(lambda x, t, k=k: angle(t)[:, None] ** k, predicts="velocity", label=lambda t: t)
        end = sv.run(plan, model, torch.ones(1, 1, dtype=torch.float64))
        ends = angle(times[[0, -1]]) ** (k + 1) / (k + 1)
        defects.append((end - 1 - ends.diff()).abs().item())
    assert max(defects[:4]) < 1e-13
    assert defects[4] > 1e-7


@pytest.mark.parametrize("spacing", [pytest.param(even, marks=pytest.mark.slow), uneven])
@pytest.mark.parametrize("predicts", FORMS)
def test_the_lower_weights_of_exponential_43_have_order_three(predicts, spacing):
    low, wrong = (low_of(tableaux.exponential_43, factor) for factor in (1.0, 1.01))
    assert order_of(low, predicts, spacing) == pytest.approx(3, abs=0.25)
    assert order_of(wrong, predicts, spacing) < 2.5

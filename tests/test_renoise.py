"""Noise between the steps of ODE methods: rows that make no call, and the orders and laws that they keep."""

import dataclasses
import math
import sys
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import NARROW, VP, Counted, generator
from reference import Gaussian, law, law_errors, slopes

TIMES = sv.logsnr(VP, 5, start=0.8)
LOW, HIGH = VP.time(torch.tensor([1.0, -0.5], dtype=torch.float64)).tolist()
DATA = Gaussian(torch.tensor([0.5, -1.0]), torch.tensor([[0.3, 0.1], [0.1, 1.5]]))
TWO_S, THREE_S = (partial(sv.dpm_solver_pp, order=order, kind="singlestep") for order in (2, 3))
KROGSTAD = partial(sv.exponential_rk, tableau=sv.tableaux.krogstad)
INTERVALS = [(LOW, HIGH, 3, 2), (0.02, 0.3, 2, 1)]
BUILDS = {
    "ancestral": sv.ancestral,
    "ancestral 2S half": partial(sv.ancestral, method=TWO_S, eta=0.5),
    "churn": partial(sv.churn, amount=3.0),
    "churn some": partial(sv.churn, method=THREE_S, low=0.1, high=0.5, noise_scale=1.003),
    "restart": partial(sv.restart, intervals=INTERVALS),
    "restart 3M": partial(
        sv.restart, intervals=INTERVALS, method=partial(sv.dpm_solver_pp, order=3, start="singlestep")
    ),
}
NAMES = pytest.mark.parametrize("name", BUILDS)
ONE_STEP = {"ddim": sv.ddim, "heun": sv.heun, "2S": TWO_S, "3S": THREE_S, "krogstad": KROGSTAD}
MULTISTEP = {
    "2M": sv.dpm_solver_pp,
    "unipc 1": partial(sv.unipc, order=1),
    "lms": sv.lms,
    "pndm": sv.pndm,
    "obelm": sv.obelm,
    "recommended": sv.recommended,
}


def made(name):
    return BUILDS[name](VP, TIMES)


def normals(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def net(x, t):
    return (0.9 * x).sin() * (0.5 + t.reshape(-1, *[1] * (x.ndim - 1)))


# Rows that make no call


@NAMES
def test_rows_that_add_noise_make_no_call(name):
    plan, model, asked = made(name), Counted(net), []
    noisy = (plan.c != 0).any(1)
    assert torch.equal(noisy, ~plan.is_called)
    assert noisy.any()

    def source(draw, like):
        asked.append(draw)
        return torch.ones_like(like)

    sv.run(plan, model, normals(2, 3), noise=source)
    assert model.times == plan.times[:-1][plan.is_called].tolist()
    assert len(model.times) == plan.nfe == plan.rows - int(noisy.sum())
    assert asked == noisy.nonzero().flatten().tolist()


@NAMES
def test_noise_rows_stand_where_time_turns_back_and_keep_the_marginal(name):
    plan = made(name)
    extra = 1.003 if name == "churn some" else 1.0
    for i in (~plan.is_called).nonzero().flatten().tolist():
        row = plan[i : i + 1]
        assert plan.times[i + 1] > plan.times[i]
        row = dataclasses.replace(row, c=row.c / extra)
        got, marginal = law(row, DATA), DATA.marginal(plan.alpha[i + 1].item(), plan.sigma[i + 1].item())
        assert_close(got.mean, marginal.mean, rtol=1e-12, atol=1e-12)
        assert_close(got.cov, marginal.cov, rtol=1e-12, atol=1e-12)
    assert plan.turns == (plan.times.diff() > 0).sum()
    with pytest.raises(ValueError, match="times must not turn back"):
        dataclasses.replace(plan, turns=plan.turns - 1)


@pytest.mark.parametrize("grad", [False, True])
def test_a_row_that_reads_earlier_calls_alone_makes_no_call_either(grad):
    """x_2 = x_1 + m_0 where nothing reads m_1."""
    one = torch.ones(3, dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
    times = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    plan = sv.Plan(times, one, times, one[:2], b, predicts="noise", consistent=False)
    model = Counted(lambda x, t: torch.full_like(x, 2.0))
    out = sv.run(plan, model, torch.zeros(1, 2, dtype=torch.float64), grad=grad)
    assert len(model.times) == plan.nfe == 1
    assert out.tolist() == [[3.0, 3.0]]


@NAMES
def test_a_network_that_reads_labels_is_asked_for_those_of_calls_alone(name):
    """A label that would refuse the times of noise rows."""
    plan, seen = made(name), []

    def label(t):
        seen.append(t)
        return 1000 * t

    x = normals(2, 3)
    got = sv.run(plan, sv.Model(lambda x, n: net(x, n / 1000), label=label), x, noise=0)
    assert_close(got, sv.run(plan, net, x, noise=0), rtol=1e-12, atol=1e-12)
    assert torch.equal(seen[0], plan.times[:-1][plan.is_called])


# Equalities


@pytest.mark.parametrize("name", ONE_STEP)
def test_without_noise_it_is_the_method_bit_for_bit(name):
    method, x = ONE_STEP[name], normals(2, 3)
    plain = method(VP, TIMES)
    for plan in (
        sv.ancestral(VP, TIMES, method=method, eta=0.0),
        sv.churn(VP, TIMES, method=method, amount=0.0),
        sv.churn(VP, TIMES, method=method, low=0.81, high=0.9),
        sv.restart(VP, TIMES, [], method=method),
    ):
        assert plan == plain
        assert not plan.is_stochastic
        assert torch.equal(sv.run(plan, net, x), sv.run(plain, net, x))


@pytest.mark.parametrize("method", MULTISTEP.values(), ids=MULTISTEP)
def test_no_interval_leaves_a_multistep_method_alone(method):
    assert sv.restart(VP, TIMES, [], method=method) == method(VP, TIMES)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ancestral_ddim_is_ddim_of_that_eta(eta):
    """A step down and the noise up to t are one step of ddim: the last step, to sigma = 0, has no noise."""
    times = torch.cat([TIMES, torch.zeros(1)])
    two, one = sv.ancestral(VP, times, method=sv.ddim, eta=eta), sv.ddim(VP, times, eta=eta)
    assert two.rows == 2 * one.rows - 1
    source = sv.noise.per_sample(0, range(2))
    x = normals(2, 3)
    got = sv.run(two, net, x, noise=lambda draw, like: source(draw // 2, like))
    assert_close(got, sv.run(one, net, x, noise=source), rtol=1e-10, atol=1e-10)


def test_churned_heun_is_algorithm_2_of_edm():
    schedule, sigmas = sv.EDM(), torch.tensor([20.0, 6.0, 1.5, 0.3, 0.04, 0.0], dtype=torch.float64)
    churn, low, high, scale = 1.7, 0.05, 10.0, 1.003
    x = expected = 20 * normals(2, 3)
    source, draw, row = sv.noise.per_sample(0, range(2)), {}, 0
    plan = sv.churn(schedule, sigmas, amount=churn, low=low, high=high, noise_scale=scale)
    for i, t in enumerate(sigmas[:-1]):
        after, gamma = sigmas[i + 1], min(churn / 5, 2**0.5 - 1) if low <= t <= high else 0.0
        hat = t * (1 + gamma)
        if gamma:
            expected = expected + (hat**2 - t**2).sqrt() * scale * source(row, x)
            draw[row], row = hat, row + 1
        slope = net(expected, hat[None])
        euler = expected + (after - hat) * slope
        expected, row = euler, row + 1
        if after:
            expected = euler + (after - hat) * (net(euler, after[None]) - slope) / 2
            row += 1
    assert len(draw) == 3
    assert plan.rows == row
    assert_close(sv.run(plan, net, x, noise=0), expected, rtol=1e-11, atol=1e-11)


def test_restart_is_the_authors_loop_with_euler_steps():
    """From `low` noise up to `high`, and down again: x + sqrt(high^2 - low^2) z, `repeats` times."""
    schedule, sigmas = sv.EDM(), torch.tensor([20.0, 6.0, 1.5, 0.3, 0.04], dtype=torch.float64)
    x = expected = 20 * normals(2, 3)
    source, row = sv.noise.per_sample(0, range(2)), 0

    def down(x, way):
        for s, t in zip(way[:-1], way[1:], strict=True):
            x = x + (t - s) * net(x, s[None])
        return x

    for i in range(4):
        expected, row = down(expected, sigmas[i : i + 2]), row + 1
        if i == 1:  # at 1.5
            way = sv.karras(schedule, 3, start=4.0, stop=1.5)
            for _ in range(2):
                expected = expected + math.sqrt(4.0**2 - 1.5**2) * 1.01 * source(row, x)
                expected, row = down(expected, way), row + 4
    plan = sv.restart(schedule, sigmas, [(1.4, 4.0, 3, 2)], method=sv.ddim, noise_scale=1.01)
    assert (plan.rows, plan.nfe) == (row, row - 2)
    assert_close(sv.run(plan, net, x, noise=0), expected, rtol=1e-11, atol=1e-11)


# Laws


def restarted(method):
    """With as many steps in the interval as the main way has within it."""

    def build(schedule, times):
        return sv.restart(schedule, times, [(LOW, HIGH, 3 * (len(times) - 1) // 8, 2)], method=method)

    return build


ORDERS = (
    [(f"ancestral {name}", partial(sv.ancestral, method=ONE_STEP[name]), ONE_STEP[name]) for name in ONE_STEP]
    + [("ancestral half heun", partial(sv.ancestral, eta=0.5), sv.heun)]
    + [
        (f"churn {name}", partial(sv.churn, method=ONE_STEP[name], amount=2.0), ONE_STEP[name])
        for name in ("ddim", "heun", "3S")
    ]
    + [(f"restart {name}", restarted(ONE_STEP[name]), ONE_STEP[name]) for name in ONE_STEP]
    + [
        (f"restart {p}M", restarted(method), method)
        for p in (2, 3)
        for method in [partial(sv.dpm_solver_pp, order=p, start="singlestep")]
    ]
)
DECLARED = {"ddim": 1, "heun": 2, "2S": 2, "3S": 3, "krogstad": 4, "2M": 2, "3M": 3}
COUNTS = {"3S": (48, 96), "krogstad": (48, 96), "2M": (128, 256), "3M": (128, 256)}


@pytest.mark.parametrize(("build", "method"), [o[1:] for o in ORDERS], ids=[o[0] for o in ORDERS])
def test_the_weak_order_is_the_method_s(build, method, request):
    name = request.node.callspec.id.split()[-1]
    for plan in (build, method):
        counts = COUNTS.get(name, (32, 64))
        errors = law_errors(plan, DATA, VP, *NARROW, counts)
        assert slopes(errors).item() == pytest.approx(DECLARED[name], abs=0.1)


@pytest.mark.parametrize("variance", [0.2, 1.7])
@pytest.mark.parametrize("name", ["ancestral", "ancestral half", "churn", "restart"])
def test_where_the_ode_s_step_is_exact_so_is_the_law(name, variance):
    """On isotropic Gaussian data the velocity form of its scale is, however few steps."""
    exact = partial(sv.exponential_adams, order=1, predicts="velocity", scale=variance**0.5)
    build = {
        "ancestral": partial(sv.ancestral, method=exact),
        "ancestral half": partial(sv.ancestral, method=exact, eta=0.5),
        "churn": partial(sv.churn, method=exact, amount=2.0),
        "restart": partial(sv.restart, intervals=INTERVALS, method=exact),
    }[name]
    data = Gaussian(torch.zeros(2), variance * torch.eye(2, dtype=torch.float64))
    for steps in (2, 5):
        plan = build(VP, sv.logsnr(VP, steps, start=0.8))
        assert plan.is_stochastic
        got, marginal = law(plan, data), data.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
        assert_close(got.cov, marginal.cov, rtol=1e-11, atol=1e-13)


@NAMES
def test_runs_have_the_law_of_their_table(name):
    plan, n = made(name), 20_000
    x = DATA.marginal(plan.alpha[0].item(), plan.sigma[0].item()).draw(n, generator())
    out, expected = sv.run(plan, DATA.model(VP), x, noise=generator(1)), law(plan, DATA)
    variance = expected.cov.diagonal()
    assert ((out.mean(0) - expected.mean) / variance.sqrt() * n**0.5).abs().max() < 4.5
    assert ((out.var(0) / variance - 1) * (n / 2) ** 0.5).abs().max() < 4.5


def test_noise_scale_multiplies_the_added_noise_alone():
    for build in (partial(sv.churn, amount=3.0), partial(sv.restart, intervals=INTERVALS)):
        plain, scaled = build(VP, TIMES), build(VP, TIMES, noise_scale=1.5)
        assert_close(scaled.c, 1.5 * plain.c, rtol=1e-14, atol=0)
        assert dataclasses.replace(scaled, c=plain.c) == plain


# Which methods


@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_methods_are_refused_between_steps_and_begin_anew_after_a_restart(name):
    method = MULTISTEP[name]
    for build in (sv.ancestral, sv.churn):
        with pytest.raises(ValueError, match=f"{build.__name__}: the method reads calls of earlier steps"):
            build(VP, TIMES, method=method)
    plan = sv.restart(VP, TIMES, [(LOW, HIGH, 3, 2)], method=method)
    silent = (~plan.is_called).nonzero().flatten().tolist()
    assert len(silent) == 2
    for i in silent:
        assert plan[: i + 1] + plan[i + 1 :] == plan  # no row reads across the noise
    model = Counted(net)
    assert sv.run(plan, model, normals(2, 3), noise=0).isfinite().all()
    assert len(model.times) == plan.nfe


@pytest.mark.parametrize("name", ONE_STEP)
def test_calls_are_those_of_the_method(name):
    method = ONE_STEP[name]
    each = method(VP, TIMES).nfe
    assert sv.ancestral(VP, TIMES, method=method).nfe == each
    assert sv.churn(VP, TIMES, method=method, amount=1.0).nfe == each
    again = method(VP, sv.karras(VP, 3, start=HIGH, stop=0.2)).nfe
    assert sv.restart(VP, TIMES, [(LOW, HIGH, 3, 2)], method=method).nfe == each + 2 * again


# Places


def test_churn_may_come_before_the_first_call():
    plan = sv.churn(VP, TIMES, amount=2.0)
    assert plan.is_called.tolist()[:2] == [False, True]
    assert plan.times[0] == TIMES[0] < plan.times[1]
    gamma = float((plan.sigma[1] / plan.alpha[1]) / (plan.sigma[0] / plan.alpha[0]) - 1)
    assert gamma == pytest.approx(2 / 5)
    x, z = normals(2, 3), sv.noise.per_sample(0, range(2))(0, normals(2, 3))
    states = sv.trajectory(plan, net, x, noise=0)
    assert_close(states[1], plan.a[0] * x + plan.c[0, 0] * z, rtol=1e-14, atol=1e-14)


def test_churn_asks_for_no_more_than_the_root_of_2():
    plan = sv.churn(VP, TIMES, amount=1e6)
    rho = plan.sigma / plan.alpha
    for i in (~plan.is_called).nonzero().flatten().tolist():
        assert float(rho[i + 1] / rho[i]) == pytest.approx(2**0.5)


def test_churn_leaves_steps_outside_its_range_alone():
    plan = sv.churn(VP, TIMES, low=float(TIMES[3]), high=float(TIMES[1]))
    noisy = plan.times[:-1][~plan.is_called].tolist()
    assert noisy == TIMES[1:4].tolist()


@pytest.mark.parametrize("method", [sv.heun, sv.ddim])
@pytest.mark.parametrize("amount", [0.5, 3.0, 40.0])
def test_churn_on_discrete_levels_stays_on_them(method, amount):
    schedule = sv.Discrete.linear(100)
    plan = sv.churn(schedule, sv.trailing(schedule, 7), method=method, amount=amount)
    levels = plan.times * 100
    assert_close(levels, levels.round(), rtol=0, atol=1e-9)
    assert plan.is_stochastic
    seen = []

    def read(x, n):
        seen.append(n)
        return 0.1 * x

    sv.run(plan, sv.Model(read, label=schedule.step), normals(2, 3), noise=0)
    assert len(seen) == plan.nfe
    assert all(n.dtype == torch.int64 for n in seen)


def test_churn_too_small_for_the_next_level_is_none():
    schedule = sv.Discrete.linear(10)
    times = sv.trailing(schedule, 5)
    assert sv.churn(schedule, times, amount=0.01) == sv.heun(schedule, times)


def test_ancestral_ddim_on_discrete_levels_calls_on_them():
    schedule = sv.Discrete.linear(100)
    plan, seen = sv.ancestral(schedule, sv.trailing(schedule, 5), method=sv.ddim), []
    model = sv.Model(lambda x, n: seen.append(int(n[0])) or 0.1 * x, label=schedule.step)
    sv.run(plan, model, normals(2, 3), noise=0)
    assert seen == [99, 79, 59, 39, 19]


def test_restart_on_discrete_levels_stays_on_them_with_their_grid():
    schedule = sv.Discrete.linear(100)
    build = partial(sv.restart, method=sv.ddim, grid=sv.trailing)
    plan, seen = build(schedule, sv.trailing(schedule, 5), [(0.2, 0.6, 4, 2)]), []
    model = sv.Model(lambda x, n: seen.append(int(n[0])) or 0.1 * x, label=schedule.step)
    sv.run(plan, model, normals(2, 3), noise=0)
    assert seen == [99, 79, 59, 39, *2 * [59, 49, 39, 29], 19]


def test_the_end_may_be_clean_data_and_the_start_pure_noise():
    flow = sv.Flow()
    times = sv.uniform(flow, 4)
    velocity = sv.Model(lambda x, t: 0.3 * x, "flow")
    rk4 = partial(sv.exponential_rk, tableau=sv.tableaux.etdrk4, predicts="velocity", variable="angle")
    for plan in (
        sv.ancestral(flow, times, method=rk4),
        sv.ancestral(flow, times, method=sv.ddim),
        sv.churn(flow, times, method=sv.ddim),
        sv.restart(flow, times, [(0.25, 0.6, 2, 2)], method=sv.ddim),
    ):
        assert (plan.alpha[0], plan.sigma[-1]) == (0, 0)
        assert plan.is_called[-1]
        assert sv.run(plan, velocity, normals(2, 3), noise=0).isfinite().all()


def test_intervals_take_the_nearest_grid_point_and_may_share_it():
    plan = sv.restart(VP, TIMES, [(float(TIMES[3]) * 1.05, 0.3, 2, 1), (float(TIMES[3]), 0.2, 3, 2)], sv.ddim)
    starts = (~plan.is_called).nonzero().flatten()
    assert plan.times[starts].tolist() == TIMES[[3, 3, 3]].tolist()
    assert plan.times[starts + 1].tolist() == pytest.approx([0.3, 0.2, 0.2], rel=1e-12)
    last = sv.restart(VP, TIMES, [(1e-6, 0.3, 2, 1)], sv.ddim)
    assert last.times[-1] == TIMES[-1]
    assert last.times[5:8].tolist()[:2] == [TIMES[-1].item(), 0.3]


# Plans


@NAMES
def test_plans_print_slice_join_save_and_load(name, tmp_path):
    plan = made(name)
    title, heads, *rows = str(plan).splitlines()
    assert title.startswith(f"{plan.nfe} calls, ")
    assert title.endswith("stochastic")
    assert heads.split()[-1] == "z"
    first = [row.split()[0] for row in rows]
    expected = [str(i) if called else "-" for i, called in enumerate(plan.is_called.tolist())]
    assert first == [*expected, "end"]
    for i in (~plan.is_called).nonzero().flatten().tolist():
        for cut in {i, i + 1} - {0, plan.rows}:
            assert plan[:cut] + plan[cut:] == plan
    plan.save(tmp_path / "plan.json")
    loaded = sv.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert (loaded.turns, loaded.nfe) == (plan.turns, plan.nfe)
    x = normals(2, 3)
    assert torch.equal(sv.run(loaded, net, x, noise=0), sv.run(plan, net, x, noise=0))


# Runs


@NAMES
def test_a_trajectory_has_one_state_for_each_row(name):
    plan, x, states = made(name), normals(2, 3), []
    path = sv.trajectory(plan, net, x, noise=3)
    assert path.shape == (plan.rows + 1, 2, 3)
    end = sv.run(plan, net, x, noise=3, callback=lambda state: states.append(state.clone()))
    assert torch.equal(path[1:], torch.stack([state.x for state in states]))
    assert [state.call for state in states] == list(range(1, plan.rows + 1))
    assert torch.equal(end, sv.run(plan, net, x, noise=3))
    source = sv.noise.per_sample(3, range(2))
    for i in (~plan.is_called).nonzero().flatten().tolist():
        expected = plan.a[i] * path[i] + plan.c[i, 0] * source(i, x)
        assert_close(path[i + 1], expected, rtol=1e-14, atol=1e-14)


@NAMES
def test_a_run_goes_on_before_and_after_noise_to_the_same_bits(name):
    plan, x, states = made(name), normals(2, 3), []
    whole = sv.run(plan, net, x, noise=3, callback=lambda state: states.append(state.clone()))
    for state in states:
        assert torch.equal(whole, sv.run(plan, net, state, noise=3))
    begun = sv.State(x)
    assert torch.equal(whole, sv.run(plan, net, begun, noise=3))
    assert torch.equal(begun.x, x)


@NAMES
def test_a_callback_may_change_x_behind_a_row_of_noise(name):
    plan, x = made(name), normals(2, 3)
    noisy = int((~plan.is_called).nonzero()[0])

    def zero(state):
        if state.call == noisy + 1:
            state.x.zero_()

    path = []
    sv.run(plan, net, x, noise=3, callback=lambda state: zero(state) or path.append(state.x.clone()))
    assert x.abs().min() > 0
    assert (path[noisy] == 0).all()
    assert (path[noisy + 1] == 0).all()  # where net(0) = 0, and nothing from before the noise is read


@NAMES
def test_a_sample_does_not_know_its_batch(name):
    plan, x = made(name), normals(7, 3)
    together = sv.run(plan, net, x, noise=3)
    for first, size in ((0, 1), (4, 1), (5, 2)):
        part = x[first : first + size]
        source = sv.noise.per_sample(3, range(first, first + size))
        assert torch.equal(sv.run(plan, net, part, noise=source), together[first : first + size])


@NAMES
def test_a_run_with_its_graph_is_the_same_run(name):
    plan, x = made(name), normals(2, 3)
    y = x.clone().requires_grad_()
    kept = sv.run(plan, net, y, noise=3, grad=True)
    assert_close(kept.detach(), sv.run(plan, net, x, noise=3), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(kept.sum(), y)
    assert slope.abs().min() > 0
    assert torch.equal(y.detach(), x)


def test_a_stochastic_run_shows_its_progress(capsys):
    plan = made("churn")
    sv.run(plan, net, normals(2, 3), noise=0, progress=True)
    assert f"{plan.rows}/{plan.rows}" in capsys.readouterr().err


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["churn", "ancestral", "restart"])
@pytest.mark.parametrize("bad", [0, 2, -1])
def test_an_output_that_is_not_finite_is_reported_in_its_row(bad, name, late, monkeypatch):
    if late:
        monkeypatch.setattr(sys.modules["solvers.loop"], "_is_read_late", lambda x: True)
    plan = made(name)
    bad = bad % plan.nfe
    row = int(plan.is_called.nonzero()[bad])
    model = Counted(net)

    def broken(x, t):
        answer = net(x, t)
        answer[1, 2] = math.nan if len(model.times) == bad + 1 else 0.0
        return answer

    model.answer = broken
    blame = "all outputs before it are finite" if late else "the x it was given is finite"
    message = rf"row {row} of {plan.rows} .*samples \[1\]; {blame}"
    with pytest.raises(sv.NonFiniteError, match=message) as caught:
        sv.run(plan, model, normals(3, 4), noise=0)
    assert (caught.value.call, caught.value.samples) == (row, [1])
    assert caught.value.time == plan.times[row].item()
    assert str(plan).splitlines()[2 + row].split()[0] == str(row)


# What is refused

INVERSION = (sv.Inversion(VP), TIMES.flip(0))
FLOW = (sv.Flow(), sv.uniform(sv.Flow(), 4))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sv.ancestral(VP, TIMES, eta=1.5), ValueError, "eta = 1.5: expected a number from 0"),
        (lambda: sv.ancestral(VP, TIMES, eta=-0.1), ValueError, "eta = -0.1"),
        (lambda: sv.ancestral(VP, TIMES, eta="a"), TypeError, "eta = 'a'"),
        (lambda: sv.ancestral(VP, TIMES, "heun"), TypeError, r"method = 'heun': expected \(schedule, times\) -> Plan"),
        (lambda: sv.churn(VP, TIMES, "heun"), TypeError, r"method = 'heun': expected \(schedule, times\) -> Plan"),
        (lambda: sv.restart(VP, TIMES, INTERVALS, "heun"), TypeError, "method = 'heun'"),
        (lambda: sv.restart(VP, TIMES, INTERVALS, grid="karras"), TypeError, "grid = 'karras'"),
        (lambda: sv.ancestral(VP, TIMES, lambda s, t: 3), TypeError, "int"),
        (lambda: sv.restart(VP, TIMES, INTERVALS, lambda s, t: 3), TypeError, "int"),
        (lambda: sv.ancestral(VP, TIMES, sv.ddpm), ValueError, "the method adds noise itself"),
        (lambda: sv.churn(VP, TIMES, sv.ddpm), ValueError, "the method adds noise itself"),
        (lambda: sv.ancestral(*INVERSION), ValueError, "from data to noise"),
        (lambda: sv.churn(*INVERSION), ValueError, "from data to noise"),
        (lambda: sv.restart(*INVERSION, INTERVALS), ValueError, "from data to noise"),
        (lambda: sv.churn(VP, TIMES, low=0.5, high=0.2), ValueError, "low = 0.5, high = 0.2: expected times with 0 <= low"),
        (lambda: sv.churn(VP, TIMES, low=-1.0), ValueError, "low = -1.0"),
        (lambda: sv.churn(VP, TIMES, high=math.nan), ValueError, "high = nan"),
        (lambda: sv.churn(VP, TIMES, amount=-1.0), ValueError, "amount = -1.0: expected a finite number from 0"),
        (lambda: sv.churn(VP, TIMES, amount=math.inf), ValueError, "amount = inf"),
        (lambda: sv.churn(VP, TIMES, noise_scale=-1.0), ValueError, "noise_scale = -1.0: expected a finite number"),
        (lambda: sv.restart(VP, TIMES, INTERVALS, noise_scale=math.nan), ValueError, "noise_scale = nan"),
        (lambda: sv.restart(VP, TIMES, [(0.1, 0.01, 3, 2)]), ValueError, "its high must be noisier than t = 0.06"),
        (lambda: sv.restart(VP, TIMES, [(float(TIMES[2]), float(TIMES[2]), 3, 2)]), ValueError, "must be noisier"),
        (lambda: sv.restart(VP, TIMES, [(0.01, 1.5, 3, 2)]), ValueError, "t = 1.5 is outside the schedule's range"),
        (lambda: sv.restart(VP, TIMES, [(-0.1, 0.5, 3, 2)]), ValueError, "t = -0.1 is outside the schedule's range"),
        (lambda: sv.restart(VP, TIMES, [("a", 0.5, 3, 2)]), TypeError, "low = 'a'"),
        (lambda: sv.restart(VP, TIMES, [(0.01, "a", 3, 2)]), TypeError, "high = 'a'"),
        (lambda: sv.restart(VP, TIMES, [[0.01, 0.1, 3, 2]]), TypeError, r"interval = \[0.01, 0.1, 3, 2\]: expected \(low"),
        (lambda: sv.restart(VP, TIMES, (0.01, 0.1, 3, 2)), TypeError, "interval = 0.01"),
        (lambda: sv.restart(VP, TIMES, None), TypeError, "intervals = None"),
        (lambda: sv.restart(VP, TIMES, [(0.01, 0.1, 0, 2)]), ValueError, "steps = 0: expected a whole number from 1"),
        (lambda: sv.restart(VP, TIMES, [(0.01, 0.1, 3, 2.5)]), TypeError, "repeats = 2.5"),
        (lambda: sv.restart(*FLOW, [(0.0, 0.5, 3, 2)], sv.ddim), ValueError, "nearest to its low has sigma = 0"),
        (lambda: sv.ancestral(*FLOW), ValueError, "the noise form cannot start at alpha = 0"),
        (lambda: sv.ancestral(VP, TIMES.flip(0)), ValueError, "flip it"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@NAMES
def test_a_run_without_noise_is_refused_before_the_first_call(name):
    model = Counted(net)
    with pytest.raises(ValueError, match="the plan is stochastic and needs noise"):
        sv.run(made(name), model, normals(2, 3))
    assert model.times == []

"""The executor: what it gives the network, what it keeps, what it reports."""

import dataclasses
import math
import pickle
import sys

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import PROBLEMS, VP, generator
from reference import Gaussian, law, trace
from solvers.rows import PIECE

PLAN = sv.dpm_solver_pp(VP, sv.logsnr(VP, 6), 3)
MODEL = PROBLEMS["eight"].model(VP)


def noise(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=generator())


def test_the_network_is_called_at_the_plan_s_own_times():
    times = []

    def model(x, t):
        assert t.shape == (2,)
        times.append(t[0].item())
        return torch.zeros_like(x)

    sv.run(PLAN, model, noise(2, 3, 5))
    assert times == PLAN.times[:-1].tolist()
    assert len(times) == PLAN.nfe


def test_integer_labels_reach_the_network_as_integers():
    schedule = sv.Discrete.linear(1000)
    seen = []

    def net(x, n):
        seen.append(n)
        return torch.zeros_like(x)

    times = sv.trailing(schedule, 4)
    model = sv.Model(net, label=lambda t: schedule.label(t).long())
    sv.run(sv.ddim(schedule, times), model, noise(2, 3))
    assert [n.tolist() for n in seen] == [[999, 999], [749, 749], [499, 499], [249, 249]]
    assert all(n.dtype == torch.long for n in seen)


def test_the_label_is_computed_in_float64_once_for_all_calls():
    asked, read = [], []

    def label(t):
        asked.append(t)
        return 1000 * t

    sv.run(PLAN, sv.Model(lambda x, n: read.append(n) or torch.zeros_like(x), label=label), noise(2, 3))
    assert len(asked) == 1
    assert asked[0].dtype == torch.float64
    assert torch.stack(read)[:, 0].tolist() == (1000 * PLAN.times[:-1]).tolist()


def test_a_plan_keeps_only_the_outputs_it_still_needs():
    kept = []
    sv.run(PLAN, MODEL, noise(2, 8), callback=lambda state: kept.append(sorted(state.outputs)))
    assert kept == [[0], [0, 1], [1, 2], [2, 3], [3, 4], []]


def test_the_callback_sees_every_state_and_its_output_in_the_plan_s_form():
    states = []
    x = noise(2, 8)
    sv.run(PLAN, MODEL, x, callback=states.append)
    assert [state.call for state in states] == [1, 2, 3, 4, 5, 6]
    data = PROBLEMS["eight"].data(x, PLAN.alpha[0], PLAN.sigma[0])
    assert_close(states[0].outputs[0], data, rtol=1e-10, atol=1e-10)


def test_a_progress_bar_is_shown_when_asked(capsys):
    sv.run(PLAN, MODEL, noise(2, 8))
    assert capsys.readouterr().err == ""
    sv.run(PLAN, MODEL, noise(2, 8), progress=True)
    assert "6/6" in capsys.readouterr().err


def test_no_graph_unless_asked():
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    plain = sv.run(PLAN, lambda x, t: weight * MODEL(x, t), noise(2, 8))
    assert not plain.requires_grad
    asked = sv.run(PLAN, lambda x, t: weight * x, noise(2, 8), grad=True)
    (slope,) = torch.autograd.grad(asked.sum(), weight)
    assert slope.isfinite()


@pytest.fixture
def read_late(monkeypatch):
    """The executor as on an accelerator, where nothing is read back before the last row."""
    monkeypatch.setattr(sys.modules["solvers.loop"], "_is_read_late", lambda x: True)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("bad", "call"), [(math.nan, 0), (math.inf, 2), (-math.inf, 5)])
def test_a_non_finite_output_is_reported_where_it_happens(bad, call, late, request):
    if late:
        request.getfixturevalue("read_late")
    calls = []

    def model(x, t):
        calls.append(t)
        out = torch.zeros_like(x)
        if len(calls) == call + 1:
            out[2, 1] = bad
            out[3, 0] = bad
        return out

    blame = "all outputs before it are finite" if late else "the x it was given is finite"
    with pytest.raises(sv.NonFiniteError, match=rf"call {call} of 6 .*samples \[2, 3\]; {blame}") as caught:
        sv.run(PLAN, model, noise(4, 3))
    error = caught.value
    assert (error.call, error.samples) == (call, [2, 3])
    assert error.time == PLAN.times[call].item()
    assert error.half_logsnr == pytest.approx(VP.half_logsnr(PLAN.times[call]).item())
    assert len(calls) == (PLAN.nfe if late else call + 1)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.samples) == (str(error), error.samples)


def test_a_run_read_late_is_the_same_run(read_late):
    x = noise(2, 8)
    late = sv.run(PLAN, MODEL, x)
    assert torch.equal(late, sv.trajectory(PLAN, MODEL, x)[-1])
    huge = sv.run(PLAN, lambda x, t: torch.full_like(x, 1e60), x)  # finite in float64
    assert huge.isfinite().all()


def test_opposite_infinities_and_huge_finite_values_are_told_apart():
    def opposite(x, t):
        return torch.tensor([[math.inf, -math.inf, 0.0]]).expand(2, 3)

    with pytest.raises(sv.NonFiniteError):
        sv.run(PLAN, opposite, noise(2, 3, dtype=torch.float32))
    huge = sv.run(
        sv.ddim(VP, sv.logsnr(VP, 1)),
        lambda x, t: torch.full_like(x, 1e36),
        noise(2, 300, dtype=torch.float32),
    )
    assert huge.isfinite().all()


def test_an_error_of_the_model_keeps_its_type_and_says_where():
    def model(x, t):
        raise KeyError("prompt")

    with pytest.raises(KeyError) as caught:
        sv.run(PLAN, model, noise(2, 3))
    assert "call 0 of 6, t = 1" in caught.value.__notes__[0]


def test_float32_follows_float64_to_rounding():
    data = PROBLEMS["eight"]
    x = noise(64, 8)
    for steps in (16, 256):
        plan = sv.dpm_solver_pp(VP, sv.logsnr(VP, steps))
        double = sv.run(plan, data.model(VP), x)
        single = sv.run(plan, data.model(VP), x.float())
        assert single.dtype == torch.float32
        assert ((single - double).norm() / double.norm()) < 2e-5


def test_the_network_gets_the_dtype_that_was_passed_and_the_state_stays_float32():
    seen = []

    def net(x, t):
        seen.append((x.dtype, t.dtype))
        return x * 0.1

    out = sv.run(PLAN, net, noise(2, 3).bfloat16())
    assert out.dtype == torch.float32
    assert set(seen) == {(torch.bfloat16, torch.float32)}


def test_channels_last_and_strided_states_give_the_same_samples():
    x = noise(2, 4, 6, 6)
    plain = sv.run(PLAN, lambda x, t: x.sin(), x)
    last = sv.run(PLAN, lambda x, t: x.sin(), x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)
    strided = torch.cat([x, x], 3)[..., ::2]
    assert torch.equal(
        sv.run(PLAN, lambda x, t: x.sin(), strided), sv.run(PLAN, lambda x, t: x.sin(), strided.clone())
    )
    broadcast = sv.run(PLAN, lambda x, t: torch.zeros(1, 1, 1, 1, dtype=x.dtype).expand_as(x), x)
    assert torch.equal(broadcast, sv.run(PLAN, lambda x, t: torch.zeros_like(x), x))


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity", "edm"])
def test_the_rows_agree_with_the_textbook_sum_for_every_conversion(predicts):
    """Also where the executor goes through its shortcuts: a network in the plan's own form, or one that hardly sees x."""
    data = PROBLEMS["eight"]
    schedule = sv.EDM()
    plan = sv.exponential_adams(schedule, sv.logsnr(schedule, 7), 3, "data")
    x = 80 * noise(5, 8)
    y, outputs = x, []
    for i in range(plan.nfe):
        outputs.append(data.data(y, plan.alpha[i], plan.sigma[i]))
        y = plan.a[i] * y + sum(plan.b[i, j] * outputs[i - j] for j in range(min(i + 1, plan.window)))
    got = sv.run(plan, sv.Model(data.model(schedule, predicts), predicts=predicts), x)
    assert_close(got, y, rtol=1e-10, atol=1e-10)


def test_stochastic_runs_have_the_law_of_their_table_and_repeat():
    data = Gaussian(torch.tensor([0.5, -1.0]), torch.diag(torch.tensor([0.05, 2.0])))
    plan = sv.ddim(VP, sv.logsnr(VP, 6), eta=1.0)
    n = 20_000
    x = data.marginal(plan.alpha[0].item(), plan.sigma[0].item()).draw(n, generator())
    out = sv.run(plan, data.model(VP), x, noise=3)
    predicted = law(plan, data)
    deviation = predicted.cov.diagonal().sqrt()
    assert ((out.mean(0) - predicted.mean) / deviation * n**0.5).abs().max() < 4.5
    assert ((out.var(0) / deviation**2 - 1) * (n / 2) ** 0.5).abs().max() < 4.5
    few = slice(0, 7)
    again = sv.run(plan, data.model(VP), x[few], noise=sv.noise.per_sample(3, range(7)))
    assert_close(again, out[few], rtol=1e-13, atol=1e-13)
    by_generator = [
        sv.run(plan, data.model(VP), x[few], noise=torch.Generator().manual_seed(1)) for _ in range(2)
    ]
    assert torch.equal(*by_generator)


def test_noise_per_sample_does_not_know_its_batch():
    like = torch.zeros(3, 2, 5)
    together = sv.noise.per_sample(0, [4, 9, 2])(1, like)
    alone = sv.noise.per_sample(0, [9])(1, like[:1])
    assert torch.equal(together[1:2], alone)
    source = sv.noise.per_sample(0, range(200))
    first, second, start = (
        source(0, torch.zeros(200, 50)),
        source(1, torch.zeros(200, 50)),
        source.initial(50),
    )
    for a, b in ((first, second), (first, start), (first[:-1], first[1:])):
        assert (a * b).mean().abs() < 4.5 / a.numel() ** 0.5
    assert abs(first.var() - 1) < 4.5 * (2 / first.numel()) ** 0.5


def test_sample_is_run_on_a_good_default():
    x = noise(2, 8)
    assert torch.equal(
        sv.sample(MODEL, x, VP, steps=9),
        sv.run(sv.recommended(VP, sv.logalpha(VP, 9), variable="asinh"), MODEL, x),
    )
    assert torch.equal(
        sv.sample(MODEL, x, VP, 9, sv.recommended), sv.run(sv.recommended(VP, sv.angle(VP, 9)), MODEL, x)
    )
    flow = sv.Flow()
    velocity = sv.Model(PROBLEMS["eight"].model(flow, "flow"), predicts="flow")
    ended = sv.sample(velocity, x, flow, steps=9)
    assert torch.equal(ended, sv.run(sv.recommended(flow, sv.angle(flow, 9)), velocity, x))
    assert_close(ended, PROBLEMS["eight"].flow(x, flow, 1.0, 0.0), atol=0.02, rtol=0)


def test_noised_is_the_forward_marginal():
    x0, eps = noise(2, 3), noise(2, 3).flip(0)
    t = torch.tensor(0.3, dtype=torch.float64)
    assert_close(sv.noised(x0, VP, 0.3, eps), VP.alpha(t) * x0 + VP.sigma(t) * eps)
    each = torch.tensor([0.3, 0.8])
    assert_close(sv.noised(x0, VP, each, eps)[1:], sv.noised(x0[1:], VP, each[1], eps[1:]))
    with pytest.raises(
        ValueError, match=r"t has shape \[3\]: expected one time, or one for each of the 2 samples"
    ):
        sv.noised(x0, VP, torch.zeros(3), eps)


@pytest.mark.parametrize("have", ["noise", "data", "velocity", "score", "edm", "flow"])
@pytest.mark.parametrize("want", ["noise", "data", "velocity", "score", "edm", "flow"])
def test_convert_turns_any_prediction_into_any_other(have, want):
    alpha, sigma = 0.6, 0.9  # not variance preserving: velocity needs its denominator alpha^2 + sigma^2
    if "flow" in (have, want):
        sigma = 0.4  # the straight path
    x0, eps = noise(2, 3), noise(2, 3).flip(0)
    x = alpha * x0 + sigma * eps
    norm = math.hypot(sigma, 0.5 * alpha)
    values = {
        "noise": eps,
        "data": x0,
        "velocity": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "flow": eps - x0,
        "edm": (x0 - 0.25 * alpha / norm**2 * x) * norm / (0.5 * sigma),
    }
    got = sv.convert(values[have], x, alpha, sigma, have=have, want=want)
    assert_close(got, values[want], rtol=1e-12, atol=1e-12)


def test_convert_refuses_what_the_level_does_not_determine():
    with pytest.raises(ValueError, match="a noise prediction does not determine data at alpha = 0"):
        sv.convert(noise(2), noise(2), 0.0, 1.0, have="noise", want="data")
    same = noise(2)
    assert torch.equal(sv.convert(same, noise(2), 0.0, 1.0, have="noise", want="noise"), same)


def test_a_default_device_changes_no_plan():
    """Users write torch.set_default_device("cuda"); coefficients stay on the host all the same."""
    schedules = [VP, sv.Discrete.linear(), sv.Flow(), sv.LogSNR(gamma=lambda t: 5 * t)]
    for schedule in schedules:
        grid = sv.trailing if isinstance(schedule, sv.Discrete) else sv.uniform
        plan = sv.exponential_adams(schedule, grid(schedule, 9), 3, start="singlestep")
        with torch.device("meta"):
            elsewhere = sv.exponential_adams(schedule, grid(schedule, 9), 3, start="singlestep")
            assert sv.Plan.from_json(elsewhere.to_json()) == plan


def test_noise_that_would_broadcast_is_refused():
    plan = sv.ddim(VP, sv.logsnr(VP, 4), eta=1.0)
    x = noise(4, 3)
    with pytest.raises(
        ValueError, match=r"noise gave shape \[1, 3\] on cpu in draw 0: expected shape \[4, 3\]"
    ):
        sv.run(plan, lambda x, t: x, x, noise=lambda draw, like: torch.zeros_like(like[:1]))
    with pytest.raises(ValueError, match="noise gave NoneType"):
        sv.run(plan, lambda x, t: x, x, noise=lambda draw, like: None)
    calls = []
    with pytest.raises(ValueError, match="noise is for 3 samples, but the batch has 4"):
        sv.run(plan, lambda x, t: calls.append(t) or x, x, noise=sv.noise.per_sample(0, range(3)))
    assert calls == []


@pytest.mark.parametrize("predicts", ["noise", "data", "velocity"])
def test_a_large_state_goes_piece_by_piece_to_the_same_bits(predicts):
    x = noise(5, 70_000, dtype=torch.float32)
    assert len(x[0]) < PIECE < x.numel()
    model = sv.Model(lambda x, t: (x * (1 + t[:, None])).sin(), predicts=predicts)
    plan = sv.exponential_adams(VP, sv.logsnr(VP, 5), 3)
    together = sv.run(plan, model, x)
    assert torch.equal(together, torch.cat([sv.run(plan, model, row[None]) for row in x]))
    assert torch.equal(together, sv.run(plan, model, x, callback=lambda state: None))

    def broken(x, t):
        out = torch.zeros_like(x)
        out[4, -1] = math.nan
        return out

    with pytest.raises(sv.NonFiniteError, match=r"call 0 .*samples \[4\]; the x it was given is finite"):
        sv.run(plan, sv.Model(broken, predicts=predicts), x)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_is_equation_16(eta):
    times = sv.logsnr(VP, 6)
    plan = sv.ddim(VP, times, eta)
    alpha, sigma = VP.alpha(times), VP.sigma(times)
    s, t = slice(None, -1), slice(1, None)
    paper = eta**2 * (sigma[t] / sigma[s]) ** 2 * (1 - (alpha[s] / alpha[t]) ** 2)  # sigma_tau^2 of eq. 16
    assert_close(plan.c[:, 0] ** 2, paper, rtol=1e-11, atol=0)
    assert_close(plan.a**2 * sigma[s] ** 2 + plan.c[:, 0] ** 2, sigma[t] ** 2, rtol=1e-12, atol=0)
    assert plan[:3] + plan[3:] == plan


def test_ddim_eta_1_is_the_ddpm_posterior_step():
    """Mean and variance of q(x_t | x_s, x_0) of Ho et al. 2020, eq. 6 and 7, for one step of any length."""
    times = sv.logsnr(VP, 6)
    plan = sv.ddim(VP, times, eta=1.0)
    for i in range(plan.nfe):
        (alpha_s, alpha_t), (sigma_s, sigma_t) = VP.alpha(times[i : i + 2]), VP.sigma(times[i : i + 2])
        ratio = alpha_s / alpha_t
        beta = sigma_s**2 - ratio**2 * sigma_t**2
        assert_close(plan.a[i], ratio * sigma_t**2 / sigma_s**2, rtol=1e-11, atol=0)
        assert_close(plan.b[i, 0], alpha_t * beta / sigma_s**2, rtol=1e-11, atol=0)
        assert_close(plan.c[i, 0] ** 2, beta * sigma_t**2 / sigma_s**2, rtol=1e-11, atol=0)


def test_every_draw_enters_the_rows_that_read_it():
    """Read off draw by draw, a plan whose rows reuse older draws is the textbook recursion."""
    base = sv.ddim(VP, sv.logsnr(VP, 5), eta=1.0)
    c = torch.zeros(5, 3, dtype=torch.float64)
    c[:, :1] = base.c
    c[2, 1], c[3, 2], c[4, 1] = 0.1, 0.2, 0.3
    plan = dataclasses.replace(base, c=c)
    numbered = {}

    def sampler(model, x, draw):
        def source(number, like):
            assert number not in numbered
            return numbered.setdefault(number, draw())

        return sv.run(plan, sv.Model(model, predicts="data"), x, noise=source)

    weights = trace(sampler, 5, draws=5)
    state = torch.eye(11, dtype=torch.float64)[0]
    for i in range(5):
        assert_close(weights[i], state, rtol=1e-12, atol=1e-12)
        state = plan.a[i] * state
        state[1 + i] += plan.b[i, 0]
        for k in range(min(i + 1, 3)):
            state[6 + i - k] += c[i, k]
    assert_close(weights[5], state, rtol=1e-12, atol=1e-12)
    one_step = sv.ddim(VP, sv.logsnr(VP, 1), eta=1.0)
    zeros = torch.zeros(40_000, 1, dtype=torch.float64)
    out = sv.run(
        one_step, sv.Model(lambda x, t: x * 0, predicts="data"), zeros, noise=torch.Generator().manual_seed(0)
    )
    assert abs(out.var() / one_step.c[0, 0] ** 2 - 1) < 4.5 * (2 / 40_000) ** 0.5


def test_a_state_of_another_plan_is_refused():
    states = []
    sv.run(PLAN, MODEL, noise(2, 8), callback=states.append)
    with pytest.raises(ValueError, match="the state is of another plan: it stands at"):
        sv.run(sv.dpm_solver_pp(VP, sv.logsnr(VP, 12), 3), MODEL, states[2])
    with pytest.raises(ValueError, match="of another plan"):
        sv.run(sv.dpm_solver_multistep(VP, sv.logsnr(VP, 6), 3), MODEL, states[2])
    by_hand = sv.State(noise(2, 8))
    assert torch.equal(sv.run(PLAN, MODEL, by_hand), sv.run(PLAN, MODEL, noise(2, 8)))


def test_float32_keeps_its_digits_where_a_raw_edm_network_hardly_sees_x():
    """At sigma 1000 data are 1e-7 of x in F's conversion: undoing it would lose every digit."""
    data = PROBLEMS["eight"]
    schedule = sv.EDM(sigma_max=1000.0)
    plan = sv.exponential_adams(schedule, sv.logsnr(schedule, 12), 3, "data")
    model = sv.Model(data.model(schedule, "edm"), predicts="edm")
    x = 1000 * noise(32, 8)
    double, single = sv.run(plan, model, x), sv.run(plan, model, x.float())
    assert (single - double).norm() / double.norm() < 5e-6  # 5e-5 without the guard


def test_sample_on_discrete_levels_says_what_the_network_reads():
    schedule = sv.Discrete.linear()
    x = noise(2, 3, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"Model\(net, label=schedule.step\)"):
        sv.sample(lambda x, t: x, x, schedule)
    seen = []

    def net(x, n):
        seen.append(n[0].item())
        return torch.zeros_like(x)

    sv.sample(sv.Model(net, label=schedule.step), x, schedule, steps=4)
    assert seen == (sv.logalpha_levels(schedule, 4)[:-1] * 1000 - 1).round().tolist()
    with pytest.raises(ValueError, match="lies between two levels"):
        sv.sample(sv.Model(net, label=schedule.step), x, schedule, steps=4, method=sv.dpm_solver)
    with pytest.raises(TypeError, match=r"sv.VP\(\)"):
        sv.sample(net, x, "vp")

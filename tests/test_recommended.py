"""The default of `sample`: what it is, that it beats the usual choices where it was not chosen, and what scale it needs."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import PROBLEMS, VP, generator
from reference import Gaussian, Mixture

SCHEDULES = {"vp": VP, "edm": sv.EDM(), "flow": sv.Flow(start=0.999, stop=0.001)}
USUAL = {
    "2M": sv.dpm_solver_pp,
    "UniPC-3": partial(sv.unipc, order=3, final="lower"),
    "DEIS": sv.deis,
    "DDIM": sv.ddim,
}


def states(data, schedule, n=64):
    """From the exact marginal at the schedule's start."""
    x0 = data.draw(n, generator(5))
    return sv.noised(
        x0, schedule, schedule.start, torch.randn(x0.shape, dtype=x0.dtype, generator=generator(6))
    )


def median_error(end, exact):
    return (end - exact).square().mean(1).sqrt().median().item()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_default_is_several_times_better_than_the_usual_choices_on_problems_it_was_not_chosen_on(
    problem, schedule
):
    """Each of the usual four on its best of four grids; the margin grows with the calls, and is less for a model in the form of noise."""
    data = PROBLEMS[problem]
    x = states(data, schedule)
    exact, model = data.flow(x, schedule, schedule.start, schedule.stop), data.model(schedule)
    velocity = sv.Model(data.model(schedule, "velocity"), "velocity")
    for steps, margin, noise_margin in ((6, 2, 1.3), (10, 3, 2.5), (20, 4, 3), (40, 30, 5)):
        usual = min(
            median_error(sv.run(method(schedule, grid(schedule, steps)), model, x), exact)
            for method in USUAL.values()
            for grid in (sv.logsnr, sv.quadratic, sv.karras, sv.uniform)
        )
        assert median_error(sv.sample(velocity, x, schedule, steps), exact) < usual / margin
        assert median_error(sv.sample(model, x, schedule, steps), exact) < usual / noise_margin


def test_data_of_another_scale_want_it_said():
    """Blown up five times: as accurate as before with scale=5, which is the same problem in other units, and far off without."""
    data, edm = PROBLEMS["eight"], sv.EDM()
    large = Mixture(data.weights, 5 * data.means, 25 * data.covs)
    x = states(data, edm)
    exact = data.flow(x, edm, edm.start, edm.stop)
    wide = sv.EDM(sigma_min=5 * edm.sigma_min, sigma_max=5 * edm.sigma_max)
    variants = (
        (sv.recommended, sv.angle),
        (partial(sv.recommended, variable="asinh"), sv.logalpha),
    )
    for method, grid in variants:
        for steps in (6, 12, 40):
            told = sv.sample(
                large.model(wide), 5 * x, wide, steps, partial(method, scale=5.0), partial(grid, scale=5.0)
            )
            one = sv.sample(data.model(edm), x, edm, steps, method, grid)
            assert_close(told / 5, one, rtol=1e-9, atol=1e-9)
    method, grid = variants[0]
    untold = sv.sample(large.model(wide), 5 * x, wide, 12, method, grid)
    one = sv.sample(data.model(edm), x, edm, 12, method, grid)
    assert median_error(untold / 5, exact) > 20 * median_error(one, exact)


def test_one_step_is_exact_on_gaussian_data_of_its_scale():
    """The velocity is 0 there."""
    for scale in (1.0, 0.5):
        data = Gaussian(torch.zeros(3), scale**2 * torch.eye(3))
        x = states(data, VP)
        plan = sv.recommended(VP, sv.angle(VP, 1), scale)
        exact = data.flow(x, VP, VP.start, VP.stop)
        assert_close(sv.run(plan, data.model(VP), x), exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("steps", "order", "start", "final"),
    [(1, 2, "ramp", "lower"), (8, 2, "ramp", "lower"), (9, 4, "ramp", "lower"), (13, 4, "ramp", "lower"),
     (14, 4, "ramp", "full"), (39, 4, "ramp", "full"), (40, 4, "singlestep", "full")],
)  # fmt: skip
def test_it_is_unipc_in_the_angle(steps, order, start, final):
    times = sv.angle(VP, steps)
    unipc = sv.unipc(
        VP,
        times,
        order,
        predicts="velocity",
        variable="angle",
        start=start,
        final=final,
        variant="vary_coeff",
    )
    assert sv.recommended(VP, times).allclose(unipc)
    assert unipc.nfe == steps + (6 if start == "singlestep" else 0)


def test_in_its_natural_time_bh2_is_the_exact_corrector():
    times = sv.angle(VP, 9)
    options = {"predicts": "velocity", "variable": "angle"}
    for order in (1, 2, 3, 4):
        plans = [sv.unipc(VP, times, order, variant, **options) for variant in ("bh2", "vary_coeff")]
        assert plans[0].allclose(plans[1])


def test_it_stands_on_both_ends_of_flow_matching_at_full_order():
    """alpha = 0 and sigma = 0: no step is of first order there, and errors fall as they do inside."""
    flow, data = sv.Flow(), PROBLEMS["eight"]
    x = torch.randn(32, 8, dtype=torch.float64, generator=generator(7))
    exact = data.flow(x, flow, 1.0, 0.0)
    model = sv.Model(data.model(flow, "flow"), predicts="flow")
    errors = [median_error(sv.sample(model, x, flow, steps), exact) for steps in (10, 20, 38)]
    assert errors[0] < 3e-3
    assert errors[1] < errors[0] / 5
    assert errors[2] < errors[1] / 5


def test_on_discrete_levels_it_calls_the_levels_alone():
    schedule = sv.Discrete.linear(1000)
    for steps in (5, 20, 60):
        plan = sv.recommended(schedule, sv.trailing(schedule, steps))
        assert torch.equal(plan.times, sv.trailing(schedule, steps))
        schedule.step(plan.times[:-1])  # would refuse a time between levels


def test_its_grid_is_even_in_a_power_of_the_angle_whatever_the_schedule():
    for schedule in (VP, sv.EDM(), sv.Flow(), sv.Cosine(), sv.SubVP(), sv.LogSNR(), sv.Discrete.linear()):
        for exponent, scale in ((1.75, 1.0), (1.0, 0.5)):
            times = sv.angle(schedule, 7, exponent=exponent, scale=scale)
            theta = torch.atan2(schedule.sigma(times), scale * schedule.alpha(times))
            steps = (theta ** (1 / exponent)).diff()
            assert_close(steps, steps[:1].expand(7), rtol=1e-7, atol=1e-12)
            assert (times[0], times[-1]) == (schedule.start, schedule.stop)


def test_it_keeps_its_order_from_pure_noise_to_clean_data():
    """On flow matching, where alpha = 0 and then sigma = 0, from 40 steps on: order 5, but for the last step's part."""
    flow, data = sv.Flow(), PROBLEMS["eight"]
    x = torch.randn(16, 8, dtype=torch.float64, generator=generator(7))
    exact = data.flow(x, flow, 1.0, 0.0)
    model = sv.Model(data.model(flow, "flow"), predicts="flow")
    errors = [median_error(sv.sample(model, x, flow, steps), exact) for steps in (40, 80, 160)]
    assert errors[0] / errors[1] > 2**4.5
    assert errors[1] / errors[2] > 2**4.5
    rk4 = partial(sv.exponential_rk, tableau=sv.tableaux.etdrk4, predicts="velocity", variable="angle")
    stop = partial(sv.uniform, stop=0.01)
    exact = data.flow(x, flow, 1.0, 0.01)
    errors = [median_error(sv.sample(model, x, flow, steps, rk4, stop), exact) for steps in (40, 80)]
    assert errors[0] / errors[1] > 2**3.6


@pytest.mark.parametrize("levels", [10, 40, 1000])
def test_its_discrete_grid_gives_every_call_a_level_of_its_own(levels):
    schedule = sv.Discrete.linear(levels, 0.1 / levels, min(20 / levels, 0.9))
    for steps in (1, 2, 5, 9, 10, levels // 2, levels - 1, levels):
        if steps > levels:
            continue
        times = sv.angle_levels(schedule, steps)
        assert len(times) == steps + 1
        assert (times[0], times[-1]) == (1, 0)
        assert len(schedule.step(times[:-1]).unique()) == steps
        near = sv.angle(schedule, steps, stop=0.0)[:-1]
        if steps <= 5:
            assert ((times[:-1] - near) * levels).abs().max() <= 1.5
    with pytest.raises(ValueError, match=f"expected at most {levels}"):
        sv.angle_levels(schedule, levels + 1)


def test_a_network_of_whole_steps_is_sampled_many_times_better_than_on_trailing_levels():
    schedule, data = sv.Discrete.linear(1000), PROBLEMS["eight"]
    net = data.model(schedule, "velocity")
    model = sv.Model(lambda x, n: net(x, (n + 1) / 1000), "velocity", label=schedule.step)
    x = states(data, schedule)
    exact = data.flow(x, schedule, 1.0, 0.0)
    for steps, times_better in ((10, 10), (20, 30)):
        usual = sv.sample(model, x, schedule, steps, sv.dpm_solver_pp, sv.trailing)
        error = median_error(sv.sample(model, x, schedule, steps), exact)
        assert error < median_error(usual, exact) / times_better


def test_an_inversion_of_discrete_levels_keeps_to_them():
    schedule, data = sv.Discrete.linear(1000), PROBLEMS["line"]
    net = data.model(schedule, "velocity")
    model = sv.Model(lambda x, n: net(x, (n + 1) / 1000), "velocity", label=schedule.step)
    x = states(data, schedule)
    clean = data.flow(x, schedule, 1.0, 1 / 1000)
    latent = sv.sample(model, clean, sv.Inversion(schedule), 60)
    assert median_error(latent, x) < 1e-4
    with pytest.raises(ValueError, match="needs to know what the network reads"):
        sv.sample(lambda x, t: x, x, sv.Inversion(schedule), 5)
    with pytest.raises(
        TypeError, match=r"flip it: angle_levels\(schedule.schedule, steps, stop=schedule.start\)"
    ):
        sv.trailing(sv.Inversion(schedule), 5)


def test_a_network_of_noise_stands_on_logalpha_and_any_other_on_the_angle():
    data, x = PROBLEMS["eight"], states(PROBLEMS["eight"], VP)
    for predicts in ("noise", "score", "data", "velocity", "flow"):
        schedule = VP if predicts == "flow" else None
        model = sv.Model(data.model(VP, predicts), predicts, schedule=schedule)
        noise = predicts in ("noise", "score")
        grid, variable = (sv.logalpha, "asinh") if noise else (sv.angle, "angle")
        for steps in (3, 9, 13, 40):
            plan = sv.recommended(VP, grid(VP, steps), variable=variable)
            assert torch.equal(sv.sample(model, x, VP, steps), sv.run(plan, model, x)), (predicts, steps)


def test_logalpha_is_quadratic_where_log_alpha_is_quadratic_in_t():
    straight = sv.VP(beta_min=1e-12, beta_max=20.0)
    for steps in (1, 2, 7, 50):
        assert_close(sv.logalpha(straight, steps), sv.quadratic(straight, steps), rtol=1e-9, atol=0)
    edm = sv.logalpha(sv.EDM(), 9)  # the same levels wherever it stands
    assert_close(edm[1:], (-2 * torch.log(1 / torch.hypot(edm, torch.ones(1)))).expm1().sqrt()[1:])
    flow = sv.Flow(start=0.99)
    roots = (
        -2 * torch.log(torch.cos(torch.atan2(flow.sigma(t := sv.logalpha(flow, 8)), flow.alpha(t))))
    ) ** 0.25
    assert_close(roots.diff(), roots.diff().mean().expand(8), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("levels", [10, 100, 1000])
def test_logalpha_levels_has_each_call_on_a_level_of_its_own(levels):
    schedule = sv.Discrete.linear(levels, 1e-4, min(20 / levels, 0.5))
    for steps in (1, 2, levels // 2, levels):
        times = sv.logalpha_levels(schedule, steps)
        calls = times[:-1] * levels
        assert_close(calls, calls.round(), rtol=0, atol=1e-9)
        assert len(set(calls.round().tolist())) == steps
        assert (times[0], times[-1]) == (1, 0)
    with pytest.raises(ValueError, match=f"expected at most {levels}"):
        sv.logalpha_levels(schedule, levels + 1)


def test_the_order_in_arsinh_is_that_in_the_angle():
    """Order 5 from 40 steps on, with the singlestep start; the polynomial's variable does not change it."""
    data, narrow = PROBLEMS["line"], sv.VP(start=0.6, stop=0.02)
    x, model = states(data, narrow), data.model(narrow)
    exact = data.flow(x, narrow, narrow.start, narrow.stop)
    errors = [
        median_error(
            sv.run(sv.recommended(narrow, sv.logalpha(narrow, n), variable="asinh"), model, x), exact
        )
        for n in (40, 80, 160)
    ]
    slopes = torch.tensor(errors).log2().diff().neg()
    assert ((slopes > 4.3) & (slopes < 5.7)).all(), slopes


def test_what_stands_around_a_network_of_noise_does_not_hide_that_it_predicts_noise():
    """Its data prediction has 1 / alpha times its error however it is called, so `sample` stands where it would without."""
    data, x = PROBLEMS["eight"], states(PROBLEMS["eight"], VP)
    off = sv.Model(lambda x, t: data.model(VP)(x, t) + 0.01 * torch.tanh(3 * x))
    for around in (sv.guidance.as_data, partial(sv.guidance.clipped, low=-9.0, high=9.0)):
        wrapped = around(off)
        assert (wrapped.predicts, wrapped.native) == ("data", "noise")
        assert_close(sv.sample(wrapped, x, VP, 10), sv.sample(off, x, VP, 10), rtol=1e-9, atol=1e-9)
        exact = sv.sample(off, x, VP, 300)
        angle = sv.sample(wrapped, x, VP, 10, sv.recommended, sv.angle)
        assert median_error(sv.sample(wrapped, x, VP, 10), exact) < median_error(angle, exact) / 5
    assert sv.guidance.as_data(sv.Model(lambda x, t: x, "velocity")).native == "velocity"

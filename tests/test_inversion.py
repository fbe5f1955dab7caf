"""From data to noise and back: reversed grids, exact inversion, starting in the middle."""

import pytest
import torch
from torch.testing import assert_close

import solvers as sv
from problems import MODELS, NARROW, PROBLEMS, VP, exact, generator, starts
from reference import Gaussian, law, slopes
from reference.orders import even, grid, uneven
from solvers.methods import METHODS

BACK = sv.Inversion(VP)
ONE_WAY = ("ipndm", "pndm")  # of order 2 on smooth grids alone


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


@pytest.mark.parametrize("name", METHODS)
def test_every_deterministic_method_encodes_data_on_a_reversed_grid_with_its_order(name):
    """From the exact end of the flow back to its exact start."""
    method, errors = METHODS[name], []
    order = method.order
    counts = (63, 127, 253) if order < 4 else (36, 64, 127)
    for n in counts:
        times = grid(VP, *NARROW, uneven(n) if name not in ONE_WAY else even(n)).flip(0)
        plan = method.build(BACK, times)
        assert plan.times[0] == times[0]
        assert plan.times[-1] == times[-1]
        x = sv.run(plan, MODELS["line"], exact("line", NARROW))
        errors.append((x - starts("line", NARROW)).square().mean().sqrt())
    assert slopes(errors)[-1] > order - 0.4, errors


def test_inversion_grids_and_the_one_call_form_run_from_data_to_noise():
    for name in ("uniform", "quadratic", "logsnr", "karras", "angle"):
        there, back = getattr(sv, name)(VP, 7), getattr(sv, name)(BACK, 7)
        assert_close(back, there.flip(0), rtol=1e-13, atol=1e-15)
    x = exact("line", NARROW)
    model = PROBLEMS["line"].model(VP)
    latent = sv.sample(model, x, sv.Inversion(sv.VP(start=NARROW[0], stop=NARROW[1])), 60)
    assert (latent - starts("line", NARROW)).abs().max() < 1e-3


def test_ddim_inversion_is_the_loop_everybody_writes():
    times = sv.logsnr(VP, 6).flip(0)
    plan, model = sv.ddim(BACK, times), PROBLEMS["eight"].model(VP)
    x = y = randn(3, 8)
    alpha, sigma = VP.alpha(times), VP.sigma(times)
    for i in range(6):
        eps = model(x, times[i].expand(3))
        x = alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
    assert_close(sv.run(plan, model, y), x, rtol=1e-11, atol=1e-12)


def test_times_the_wrong_way_are_refused_on_either_schedule():
    times = sv.logsnr(VP, 5)
    with pytest.raises(
        ValueError,
        match=r"must decrease from noise to data.*flip it: times.flip\(0\).*sv.Inversion\(schedule\)",
    ):
        sv.ddim(VP, times.flip(0))
    with pytest.raises(ValueError, match=r"must increase from data to noise.*build on schedule.schedule"):
        sv.ddim(BACK, times)
    with pytest.raises(ValueError, match="from data to noise there is eta = 0 alone"):
        sv.ddim(BACK, times.flip(0), eta=1.0)


def test_data_without_noise_is_encoded_by_what_says_something_of_the_noise():
    """At sigma = 0 data form has no noise to start from; noise form has, with a network that predicts it."""
    schedule = sv.Inversion(sv.Flow(start=0.9))
    times = sv.uniform(schedule, 8)
    with pytest.raises(ValueError, match="the data form cannot start at sigma = 0"):
        sv.ddim(schedule, times)
    data = Gaussian(torch.zeros(3), torch.diag(torch.tensor([0.2, 1.0, 2.0])))
    x = data.draw(4, generator())
    for plan in (sv.dpm_solver(schedule, times, 1), sv.lms(schedule, times, 2)):
        latent = sv.run(plan, data.model(sv.Flow()), x)
        assert_close(latent, data.flow(x, sv.Flow(), 0.0, 0.9), rtol=0.2, atol=0.1)


# O-BELM


def encoded(plan, model, x):
    """The last two states of a run."""
    path = sv.trajectory(plan, model, x)
    return path[-2], path[-1]


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-12), (torch.float32, 5e-4)], ids=["double", "single"]
)
@pytest.mark.parametrize("spacing", [sv.uniform, sv.quadratic, sv.logsnr, sv.karras, sv.angle])
@pytest.mark.parametrize("steps", [2, 5, 20, 100])
def test_belm_takes_encoded_data_back_to_rounding(steps, spacing, dtype, rounding):
    """From data to noise and back; naive DDIM inversion is off by what its steps are wrong."""
    times, model = spacing(VP, steps), PROBLEMS["eight"].model(VP)
    decoder, encoder = sv.obelm(VP, times), sv.obelm(BACK, times.flip(0))
    x = PROBLEMS["eight"].draw(4, generator(3)).to(dtype)
    before_last, last = encoded(encoder, model, x)
    assert (sv.run(decoder, model, sv.State.between(decoder, last, before_last)) - x).abs().max() < rounding
    naive = sv.run(sv.ddim(VP, times), model, sv.run(sv.ddim(BACK, times.flip(0)), model, x))
    assert (naive - x).abs().max() > 0.05


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_belm_takes_noise_back_too_where_its_steps_do_not_grow_much(steps):
    """Back to noise the steps in sigma grow, and rounding with the square of their ratio, which uniform times keep low."""
    times, model = sv.uniform(VP, steps), PROBLEMS["eight"].model(VP)
    decoder, encoder = sv.obelm(VP, times), sv.obelm(BACK, times.flip(0))
    noise = randn(4, 8)
    before_last, last = encoded(decoder, model, noise)
    assert_close(
        sv.run(encoder, model, sv.State.between(encoder, last, before_last)), noise, rtol=0, atol=1e-12
    )


def test_belm_encodes_an_image_and_gives_it_back_through_the_library_s_front_door():
    """Encode from clean data, edit nothing, decode: the round trip a user makes."""
    data = PROBLEMS["eight"]
    image, model = data.draw(4, generator(3)), data.model(VP)
    times = sv.quadratic(BACK, 25)
    encoder, decoder = sv.obelm(BACK, times), sv.obelm(VP, times.flip(0))
    pair = encoded(encoder, model, image)
    calls = []

    def counted(x, t):
        calls.append(float(t[0]))
        return model(x, t)

    again = sv.run(decoder, counted, sv.State.between(decoder, pair[1], pair[0]))
    assert_close(again, image, rtol=0, atol=1e-11)
    assert calls == times.flip(0)[1:-1].tolist()  # the calls of the encoder, but for its first


def test_a_state_between_two_states_needs_a_row_that_shows_its_output():
    plan = sv.dpm_solver_v3(VP, sv.logsnr(VP, 3), sv.gaussian_statistics(torch.zeros(3), 1.0))
    with pytest.raises(ValueError, match="does not show the output"):
        sv.State.between(plan, randn(2, 3), randn(2, 3))
    ddim = sv.ddim(VP, sv.logsnr(VP, 3))
    x = randn(2, 3)
    state = sv.State.between(ddim, x, sv.run(ddim[:1], lambda x, t: x, x))
    assert_close(sv.run(ddim, lambda x, t: x, state), sv.run(ddim, lambda x, t: x, x), rtol=1e-13, atol=1e-14)


# Image to image


@pytest.mark.parametrize("schedule", [VP, sv.EDM(), sv.Flow(), sv.Discrete.linear(1000)], ids=str)
def test_a_noised_image_has_exactly_the_marginal_of_the_row_it_starts_at(schedule):
    """By the law of x_t = alpha x_0 + sigma eps: its variance on Gaussian data, from unit vectors and not from samples."""
    times = sv.angle(schedule, 9) if not isinstance(schedule, sv.Discrete) else sv.trailing(schedule, 9)
    data = Gaussian(torch.tensor([0.3, -1.0]), torch.diag(torch.tensor([0.2, 1.5])))
    plan = sv.ddim(schedule, times)
    for i in (2, 5, 8):
        late = plan[i:]
        t = late.times[0]
        gain = sv.noised(
            torch.eye(2, dtype=torch.float64), schedule, t, torch.zeros(2, 2, dtype=torch.float64)
        )
        spread = sv.noised(
            torch.zeros(2, 2, dtype=torch.float64), schedule, t, torch.eye(2, dtype=torch.float64)
        )
        exact_cov = data.marginal(late.alpha[0].item(), late.sigma[0].item()).cov
        assert_close(gain @ data.cov @ gain.T + spread @ spread.T, exact_cov, rtol=1e-14, atol=0)


def test_starting_in_the_middle_is_the_rest_of_the_run():
    """One-step methods are sliced; a multistep method is built on the rest of the grid, and says so."""
    times = sv.angle(VP, 9)
    model, x = PROBLEMS["eight"].model(VP), randn(4, 8)
    for build in (sv.ddim, sv.heun, lambda s, t: sv.exponential_rk(s, t, sv.tableaux.krogstad)):
        plan = build(VP, times)
        calls = plan.nfe // 9
        path = sv.trajectory(plan, model, x)
        assert torch.equal(sv.run(plan[4 * calls :], model, path[4 * calls]), path[-1])
        assert plan[4 * calls :] == build(VP, times[4:])
    with pytest.raises(ValueError, match=r"build the method on the shorter grid instead, times\[4:\]"):
        sv.unipc(VP, times)[4:]
    data = Gaussian(torch.zeros(2), torch.diag(torch.tensor([0.2, 1.5])))
    late = sv.unipc(VP, sv.angle(VP, 24)[10:], 3)
    exact_end = data.marginal(late.alpha[-1].item(), late.sigma[-1].item())
    assert (law(late, data).cov.diagonal() / exact_end.cov.diagonal() - 1).abs().max() < 0.05


def test_only_an_inversion_goes_from_data_to_noise():
    """A schedule with its ends exchanged is a slip, as flow matching of the other direction is written."""
    for schedule in (sv.VP(start=0.001, stop=1.0), sv.Flow(start=0.0, stop=1.0)):
        with pytest.raises(ValueError, match="expected 0 <= stop < start; start is noise"):
            sv.sample(lambda x, t: x, randn(2, 3), schedule, 4)


def test_states_between_are_checked():
    plan, x = sv.obelm(VP, sv.logsnr(VP, 4)), randn(4, 3)
    for bad in (x[:1], x.float(), x.bfloat16()):
        with pytest.raises(ValueError, match="expected two states of one shape, in float32 or float64"):
            sv.State.between(plan, x, bad)
    with pytest.raises(ValueError, match="expected a deterministic plan"):
        sv.State.between(sv.ddim(VP, sv.logsnr(VP, 4), eta=1.0), x, x)


@pytest.mark.parametrize("method", [sv.obelm, sv.pndm])
def test_methods_that_divide_by_steps_of_sigma_say_so_at_alpha_0(method):
    for schedule in (sv.Flow(), sv.Inversion(sv.Flow())):
        with pytest.raises(
            ValueError, match=r"sigma / alpha is infinite; give the grid an end before it, e.g. start=0.999"
        ):
            method(schedule, sv.uniform(schedule, 3))

"""Stochastic methods: their order in law, exactly and without Monte Carlo; their limits; what wrong noise does to them."""

import dataclasses
from functools import partial

import pytest
import torch

import solvers as sv
from problems import FULL, NARROW, VP
from reference import Gaussian, even, grid, law, slopes, uneven, wasserstein2
from reference.orders import PATTERN
from solvers.methods import SDES

VARIANCES = torch.tensor([0.05, 0.3, 2.0], dtype=torch.float64)
DATA = Gaussian(torch.tensor([0.7, -0.4, 1.1]), torch.diag(VARIANCES))
POINT = Gaussian(torch.tensor([0.7]), torch.zeros(1, 1))
PIECEWISE = [name for name in SDES if "ancestral" in name or "churn" in name]  # slow to build
OVER_NOISY = {
    "ddpm_large", "analytic_ddpm", "analytic_ddim", "euler_maruyama", "reverse_diffusion", "dpm_solver_sde_1", "dpm_solver_sde_2",
}  # for data in one point  # fmt: skip


def off(plan):
    """How far the law is from the marginal: Wasserstein-2, and of each variance the standard deviation alone."""
    got, exact = law(plan, DATA), DATA.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
    deviations = [torch.diagonal(v.cov).sqrt() for v in (got, exact)]
    return wasserstein2(got, exact), (deviations[0] - deviations[1]).abs()


def order_in_law(build, spacing, counts, span=NARROW):
    if spacing is uneven:
        counts = [n - n % len(PATTERN) + 1 for n in counts]
    errors = [off(build(VP, grid(VP, *span, spacing(n)))) for n in counts]
    whole, each = (torch.stack([torch.as_tensor(v) for v in part]) for part in zip(*errors, strict=True))
    return slopes(whole)[-1].item(), (each[:-1] / each[1:]).log2()[-1]


@pytest.mark.parametrize("name", SDES)
def test_the_law_has_the_declared_order(name):
    """Of variances .05, .3 and 2 with a mean, together and, where errors do not happen to cancel, of each."""
    measured, each = order_in_law(SDES[name].build, even, (160, 320) if name in PIECEWISE else (320, 640))
    assert measured == pytest.approx(SDES[name].order, abs=0.1)
    assert (each > SDES[name].order - 0.1).all(), each


@pytest.mark.parametrize("name", SDES)
def test_the_order_in_law_survives_an_uneven_grid(name):
    measured, _ = order_in_law(SDES[name].build, uneven, (80, 160))
    assert SDES[name].order - 0.2 < measured < SDES[name].order + 0.5


@pytest.mark.parametrize("name", ["ddpm", "dpm_solver_pp_sde_2m", "sa_predictor_2", "seeds_2", "er_sde_2"])
def test_the_order_in_law_holds_on_the_whole_range(name):
    measured, _ = order_in_law(SDES[name].build, even, (160, 320), FULL)
    assert measured == pytest.approx(SDES[name].order, abs=0.1)


@pytest.mark.parametrize("eta", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_corrector_with_the_predictor_s_noise_has_at_least_second_order_in_law_for_any_tau(order, eta):
    """In the limit no more: some pass through 3 on their way. Without noise it is order + 1."""
    build = partial(sv.sa_solver, order=order, corrector=order + 1, tau=lambda t: eta + 0.3 * t)
    measured, _ = order_in_law(build, even, (160, 320))
    assert measured > 1.85


@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_noise_a_corrector_raises_the_order_by_one(order):
    build = partial(sv.sa_solver, order=order, corrector=order + 1, tau=0.0)
    measured, _ = order_in_law(build, even, (160, 320))
    assert measured == pytest.approx(min(order + 1, 3), abs=0.2)  # begun by orders 1, 2


# Noise


def marginal_of_a_point(plan):
    return law(plan, POINT).cov[0, 0].item() / plan.sigma[-1].item() ** 2 - 1


@pytest.mark.parametrize("name", [name for name in SDES if name not in OVER_NOISY])
def test_data_in_one_point_keep_their_marginals_and_noise_off_by_a_thousandth_shows(name):
    plan = SDES[name].build(VP, sv.uniform(VP, 7))
    assert abs(marginal_of_a_point(plan)) < 1e-11
    assert abs(marginal_of_a_point(dataclasses.replace(plan, c=plan.c * 1.001))) > 1e-4


@pytest.mark.parametrize("name", sorted(OVER_NOISY - {"analytic_ddim"}))
def test_noise_off_by_a_thousandth_takes_the_order_away_where_a_point_does_not_show_it(name):
    """Of analytic_ddim it is the square of the step; there test_analytic holds the variance itself to 1e-10."""

    def damaged(schedule, times):
        plan = SDES[name].build(schedule, times)
        return dataclasses.replace(plan, c=plan.c * 1.001)

    order = SDES[name].order
    assert order_in_law(SDES[name].build, even, (600, 1200))[0] == pytest.approx(order, abs=0.1)
    assert abs(order_in_law(damaged, even, (600, 1200))[0] - order) > 0.1


# Limits


ETA_ZERO = {
    "ddim": (partial(sv.ddim, eta=0.0), sv.ddim),
    **{
        f"dpm_solver_pp_sde {p}": (
            partial(sv.dpm_solver_pp_sde, order=p, eta=0.0),
            partial(sv.dpm_solver_pp, order=p),
        )
        for p in (1, 2, 3)
    },
    **{
        f"dpm_solver_sde {p}": (
            partial(sv.dpm_solver_sde, order=p, eta=0.0),
            partial(sv.dpm_solver_multistep, order=p),
        )
        for p in (1, 2, 3)
    },
    **{
        f"seeds {p}": (
            partial(sv.seeds, order=p, eta=0.0),
            partial(sv.dpm_solver_pp, order=p, kind="singlestep"),
        )
        for p in (1, 2, 3)
    },
    **{
        f"sa_solver {p}": (
            partial(sv.sa_solver, order=p, corrector=0, tau=0.0),
            partial(sv.exponential_adams, order=p, predicts="data"),
        )
        for p in (1, 2, 3, 4)
    },
    "sa_solver corrected": (
        partial(sv.sa_solver, order=3, corrector=4, tau=0.0),
        partial(sv.unipc, order=3, variant="vary_coeff"),
    ),
    **{
        f"er_sde {p}": (
            partial(sv.er_sde, order=p, noise_scale=lambda rho: rho),
            partial(sv.exponential_adams, order=p, predicts="data", variable="sigma"),
        )
        for p in (1, 2, 3)
    },
    "ancestral": (partial(sv.ancestral, eta=0.0), sv.heun),
    "churn": (partial(sv.churn, amount=0.0), sv.heun),
    "restart": (partial(sv.restart, intervals=[]), sv.heun),
}


@pytest.mark.parametrize("name", ETA_ZERO)
@pytest.mark.parametrize("grid_of", [sv.logsnr, sv.uniform], ids=["logsnr", "uniform"])
def test_without_noise_it_is_the_ode_method_bit_for_bit(name, grid_of):
    stochastic, ode = (build(VP, grid_of(VP, 9)) for build in ETA_ZERO[name])
    assert stochastic == ode
    assert not stochastic.is_stochastic


NEARLY = {
    "dpm_solver_pp_sde": lambda e: partial(sv.dpm_solver_pp_sde, order=2, eta=e),
    "dpm_solver_sde": lambda e: partial(sv.dpm_solver_sde, order=2, eta=e),
    "sa_solver": lambda e: partial(sv.sa_solver, tau=e**0.5),
    "seeds": lambda e: partial(sv.seeds, eta=e),
    "er_sde": lambda e: partial(sv.er_sde, noise_scale=lambda rho: rho ** (1 + e)),
    "ancestral": lambda e: partial(sv.ancestral, eta=e**0.5),
    "ddim": lambda e: partial(sv.ddim, eta=e**0.5),
}


@pytest.mark.parametrize("name", NEARLY)
def test_little_noise_is_nearly_the_ode_method(name):
    """The deterministic weights depend on tau^2 smoothly, the noise's on tau."""
    times = sv.logsnr(VP, 6)
    bare, little = (NEARLY[name](e)(VP, times) for e in (0.0, 1e-8))
    assert 0 < little.c.max() < 1e-3
    if name == "ancestral":  # with rows of noise between the steps
        outer = law(bare, DATA), law(little, DATA)
        assert wasserstein2(*outer) < 1e-7
        return
    assert (little.a - bare.a).abs().max() < 1e-7
    assert (little.b - bare.b).abs().max() < 1e-7


def test_constant_tau_is_eta_and_every_first_order_method_is_ddpm():
    times = sv.logsnr(VP, 8)
    ddpm = sv.ddpm(VP, times)
    for plan in (
        sv.ddim(VP, times, eta=1.0),
        sv.dpm_solver_pp_sde(VP, times, order=1),
        sv.seeds(VP, times, order=1),
        sv.sa_solver(VP, times, order=1, corrector=0),
        sv.er_sde(VP, times, order=1, noise_scale=lambda rho: rho**2),
        sv.ml_sde(VP, times),
    ):
        assert plan.allclose(ddpm, rtol=1e-11)
    rows = [
        plan.b[2:]
        for plan in (sv.sa_solver(VP, times, 3, 0, tau=0.5**0.5), sv.dpm_solver_pp_sde(VP, times, 3, eta=0.5))
    ]
    assert torch.allclose(*rows, rtol=1e-11)  # they differ in the start, where the one is "bh2"
    by_step = sv.sa_solver(VP, times, tau=lambda t: torch.full_like(t, 0.7))
    assert by_step == sv.sa_solver(VP, times, tau=0.7)


def test_each_step_has_the_tau_of_its_end():
    times = sv.logsnr(VP, 6)
    plan = sv.sa_solver(VP, times, order=2, corrector=0, tau=lambda t: (t < 0.4).double())
    assert ((plan.c[:, 0] > 0) == (times[1:] < 0.4)).all()
    assert 0 < (plan.c > 0).sum() < 6


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("steps", [1, 2, 3, 11])
def test_calls_are_what_the_method_says(name, steps):
    assert SDES[name].build(VP, sv.logsnr(VP, steps)).nfe == SDES[name].nfe(steps)


def test_churn_and_ancestral_calls_do_not_count_rows_of_noise():
    plan = sv.ancestral(VP, sv.logsnr(VP, 4), sv.ddim, eta=0.5)
    assert (plan.nfe, plan.rows) == (4, 8)
    assert plan.is_called.tolist() == [True, False] * 4


PLACES = {
    "flow from alpha = 0 to sigma = 0": (sv.Flow(), sv.uniform),
    "discrete to sigma = 0": (sv.Discrete.linear(1000), sv.trailing),
    "zero terminal snr": (sv.Discrete.linear(1000).zero_terminal_snr(), sv.trailing),
    "edm": (sv.EDM(), sv.karras),
    "ve": (sv.VE(), lambda schedule, steps: sv.logsnr(schedule, steps, stop=0.3)),
    "subvp": (sv.SubVP(), sv.quadratic),
}
NEEDS_DATA = {
    "euler_maruyama", "reverse_diffusion", "analytic_ddpm", "analytic_ddim", "dpm_solver_sde_1", "dpm_solver_sde_2", "ancestral_heun", "churn_heun",
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", SDES)
def test_few_steps_are_finite_on_every_schedule(name, place):
    schedule, spacing = PLACES[place]
    for steps in (1, 2, 3, 7):
        times = spacing(schedule, steps)
        if schedule.alpha(times[:1]) == 0 and name in NEEDS_DATA:
            with pytest.raises(ValueError, match="alpha = 0"):
                SDES[name].build(schedule, times)
            continue
        plan = SDES[name].build(schedule, times)
        net = DATA.model(schedule, "velocity")
        x = plan.alpha[0] * DATA.mean + plan.sigma[0] * torch.linspace(-2, 2, 15).double().reshape(5, 3)
        end = sv.run(plan, sv.Model(net, predicts="velocity"), x, noise=0)
        assert end.isfinite().all(), (name, steps)
        if plan.sigma[-1] == 0:
            assert (plan.c[-1] == 0).all()  # no noise is left on a sample


def test_where_the_schedule_ends_ancestral_steps_end_too():
    """k-diffusion's eta = 1 asks for rho_t^2 / rho_s, below VE's least noise in the last step; the law stays the ODE's."""
    ve = sv.VE()
    plan = sv.ancestral(ve, sv.logsnr(ve, 12), sv.ddim)
    whole = sv.ddim(ve, sv.logsnr(ve, 12), eta=1.0)
    last = int((~plan.is_called).nonzero().max())
    assert plan.nfe == 12
    assert plan.times.min() == ve.stop
    for i in range(last // 2):
        pair = plan[2 * i : 2 * i + 2]
        weights = pair.a.prod(), (pair.a[1] * pair.b[0, 0] + pair.b[1, 0]), (pair.c**2).sum().sqrt()
        expected = whole.a[i], whole.b[i, 0], whole.c[i, 0]
        for got, wanted in zip(weights, expected, strict=True):
            assert got.item() == pytest.approx(wanted.item(), rel=1e-10)


# Runs


@pytest.mark.parametrize("name", SDES)
def test_runs_have_the_law_of_the_table(name):
    """Mean and variance of each element over 1e5 samples, within 4.5 standard errors; noise 5 % off shows."""
    plan = SDES[name].build(VP, sv.logsnr(VP, 4))
    start = DATA.marginal(plan.alpha[0].item(), plan.sigma[0].item())
    draws = torch.Generator().manual_seed(3)
    x = sv.run(plan, DATA.model(VP), start.draw(100_000, draws), noise=draws)

    def agrees(exact):
        variance = exact.cov.diagonal()
        near = (x.mean(0) - exact.mean).abs() < 4.5 * (variance / len(x)).sqrt()
        return (near & ((x.var(0) / variance - 1).abs() < 4.5 * (2 / len(x)) ** 0.5)).all()

    assert agrees(law(plan, DATA))
    assert not agrees(law(dataclasses.replace(plan, c=1.05 * plan.c), DATA))


@pytest.mark.parametrize("name", SDES)
def test_a_sample_is_the_same_in_any_batch_and_no_global_generator_is_touched(name):
    plan = SDES[name].build(VP, sv.logsnr(VP, 5))
    x = torch.randn(64, 3, 2, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()

    def model(x, t):
        return torch.tanh(x)

    whole = sv.run(plan, model, x, noise=5)
    for size in (1, 2, 7):
        parts = [
            sv.run(plan, model, x[i : i + size], sv.noise.per_sample(5, range(i, min(i + size, 64))))
            for i in range(0, 64, size)
        ]
        assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(whole, sv.run(plan, model, x, noise=6))


@pytest.mark.parametrize("name", SDES)
def test_a_stochastic_plan_without_noise_says_what_to_write(name):
    with pytest.raises(ValueError, match=r"needs noise: run\(plan, model, x, noise=0\)"):
        sv.run(SDES[name].build(VP, sv.logsnr(VP, 3)), lambda x, t: x, torch.zeros(2, 3))


BAD = {
    "eta below 0": (lambda t: sv.dpm_solver_pp_sde(VP, t, eta=-0.1), "eta = -0.1"),
    "eta infinite": (lambda t: sv.seeds(VP, t, eta=float("inf")), "eta = inf"),
    "eta not a number": (lambda t: sv.dpm_solver_sde(VP, t, eta=float("nan")), "eta = nan"),
    "eta above 1": (lambda t: sv.ancestral(VP, t, eta=1.1), "eta = 1.1"),
    "order": (lambda t: sv.dpm_solver_pp_sde(VP, t, order=4), "order = 4"),
    "order of seeds": (lambda t: sv.seeds(VP, t, order=0), "order = 0"),
    "corrector of one": (lambda t: sv.sa_solver(VP, t, corrector=1), "corrector = 1"),
    "tau below 0": (lambda t: sv.sa_solver(VP, t, tau=-1.0), "tau = "),
    "tau of a wrong shape": (lambda t: sv.sa_solver(VP, t, tau=lambda t: t[:2]), "for each of the 5 steps"),
    "variance": (lambda t: sv.ddpm(VP, t, variance="fixed_small"), "did you mean 'small'"),
    "final": (lambda t: sv.er_sde(VP, t, final="none"), "final = 'none'"),
    "noise scale that falls": (
        lambda t: sv.er_sde(VP, t, noise_scale=lambda rho: rho**0.5),
        "more slowly than rho",
    ),
    "noise scale that is no number": (
        lambda t: sv.er_sde(VP, t, noise_scale=lambda rho: rho * float("nan")),
        "noise_scale",
    ),
    "tau too few": (lambda t: sv.sa_solver(VP, t, tau=lambda t: t[:1]), "for each of the 5 steps"),
    "noise scale of another shape": (
        lambda t: sv.er_sde(VP, t, noise_scale=lambda rho: rho[:1]),
        "noise_scale gave",
    ),
    "noise scale in float32": (
        lambda t: sv.er_sde(VP, t, noise_scale=lambda rho: rho.float()),
        "torch.float32",
    ),
    "noise scale that is a number": (
        lambda t: sv.er_sde(VP, t, noise_scale=lambda rho: 2.0),
        "noise_scale gave float",
    ),
    "no alpha for reverse_diffusion": (
        lambda t: sv.reverse_diffusion(sv.Flow(), sv.uniform(sv.Flow(), 3)),
        "alpha = 0",
    ),
    "no alpha": (lambda t: sv.euler_maruyama(sv.Flow(), sv.uniform(sv.Flow(), 3)), "alpha = 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_refused_by_name_and_value(name):
    act, words = BAD[name]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        act(sv.logsnr(VP, 5))
    assert words in str(refusal.value)


def test_a_tau_function_may_give_one_number_and_a_noise_scale_must_be_a_function():
    times = sv.logsnr(VP, 5)
    assert sv.sa_solver(VP, times, tau=lambda t: 0.5) == sv.sa_solver(VP, times, tau=0.5)
    with pytest.raises(TypeError, match=r"noise_scale = 1\.0: expected a function of rho"):
        sv.er_sde(VP, times, noise_scale=1.0)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_memory_lost_within_a_step_is_no_error(order):
    """tau so great that e^{-T} is 0: every row lands on the prediction and fresh noise."""
    plan = sv.seeds(VP, sv.logsnr(VP, 3), order, eta=1e4)
    assert (plan.a == 0).all()
    assert torch.allclose(plan.c[:, 0], plan.sigma[1:], rtol=1e-12)


@pytest.mark.parametrize("name", SDES)
def test_there_is_no_noise_to_add_from_data_to_noise(name):
    back = sv.Inversion(VP)
    with pytest.raises(ValueError, match="from data to noise"):
        SDES[name].build(back, sv.logsnr(back, 4))

"""Samplers that are one sampler under two names, and models that any consistent sampler solves exactly."""

import math
from functools import partial

import pytest
import torch
from scipy.integrate import quad
from torch.testing import assert_close

import solvers as sv
from problems import PROBLEMS, VP, generator
from reference import Gaussian, kl, law, wasserstein2
from solvers.methods import METHODS
from solvers.methods.exponential import Form
from solvers.methods.multistep import adams

TIMES = sv.logsnr(VP, 7)
FORMS = {name: method.build(VP, TIMES).predicts for name, method in METHODS.items()}
UNSCALED = [
    name for name in METHODS if FORMS[name] in ("noise", "data")
]  # exact where x_0 and eps are constant, in any units
UNCLOCKED = [
    name for name in METHODS if name not in ("pndm",) and "_t_" not in name
]  # their coefficients do not follow t
UNEVEN = torch.tensor([1.0, 0.9, 0.55, 0.3, 0.21, 0.05, 0.001], dtype=torch.float64)
DATA = Gaussian(torch.tensor([0.5, -1.0, 0.2]), torch.diag(torch.tensor([0.05, 0.3, 2.0])))


def end(plan, predicts="noise", data=PROBLEMS["eight"]):
    """The plan run with the exact model of the mixture, declared as one prediction or another."""
    model = sv.Model(data.model(VP, predicts), predicts=predicts, schedule=VP)
    return sv.run(plan, model, torch.randn(5, 8, dtype=torch.float64, generator=generator()))


@pytest.mark.parametrize("times", [TIMES, UNEVEN], ids=["logsnr", "uneven"])
def test_ddim_is_dpm_solver_1_and_first_order_dpm_solver_pp(times):
    ddim = sv.ddim(VP, times)
    assert ddim.allclose(sv.dpm_solver_pp(VP, times, 1))
    assert ddim.allclose(sv.dpm_solver_pp(VP, times, 1, kind="singlestep"))
    assert ddim.allclose(sv.exponential_adams(VP, times, 1, "data"))
    noise_form = [sv.dpm_solver(VP, times, 1), sv.dpm_solver_multistep(VP, times, 1)]
    for plan in noise_form:
        assert_close(end(plan), end(ddim), rtol=1e-12, atol=1e-12)
        assert kl(law(plan, DATA), law(ddim, DATA)) < 1e-20
        assert wasserstein2(law(plan, DATA), law(ddim, DATA)) < 1e-12
    assert noise_form[0] == noise_form[1]


@pytest.mark.parametrize("times", [TIMES, UNEVEN], ids=["logsnr", "uneven"])
def test_ddim_as_printed_in_its_paper_is_the_table(times):
    """x_t = alpha_t x_0 + sigma_t eps, with x_0 = (x_s - sigma_s eps) / alpha_s."""
    alpha, sigma = VP.alpha(times), VP.sigma(times)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator())
    model = PROBLEMS["eight"].model(VP)
    for i in range(len(times) - 1):
        eps = model(x, times[i].expand(5))
        x = alpha[i + 1] * (x - sigma[i] * eps) / alpha[i] + sigma[i + 1] * eps
    assert_close(end(sv.ddim(VP, times)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("times", [TIMES, UNEVEN], ids=["logsnr", "uneven"])
def test_unip_2_bh2_is_dpm_solver_pp_2m(times):
    """UniP-2 of Zhao et al. 2023 (arXiv 2302.04867), with B(h) = e^h - 1 and rho_1 = 1/2, as a loop."""
    alpha, sigma, lam = VP.alpha(times), VP.sigma(times), VP.half_logsnr(times)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator())
    model = PROBLEMS["eight"].model(VP, "data")
    outputs = []
    for i in range(len(times) - 1):
        outputs.append(model(x, times[i].expand(5)))
        h = lam[i + 1] - lam[i]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * outputs[i]
        if i:
            r = (lam[i - 1] - lam[i]) / h
            x = x - alpha[i + 1] * torch.expm1(-h) * 0.5 * (outputs[i - 1] - outputs[i]) / r
    assert_close(end(sv.dpm_solver_pp(VP, times, 2)), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_multistep_and_adams_agree_but_for_the_second_order_weight(order):
    papers = sv.dpm_solver_multistep(VP, TIMES, order)
    exact = sv.exponential_adams(VP, TIMES, order, "noise")
    first_third_order_row = 2
    assert papers.allclose(exact) == (order == 1)
    if order == 3:
        assert_close(
            papers.b[first_third_order_row:], exact.b[first_third_order_row:], rtol=1e-12, atol=1e-12
        )


def test_third_order_multistep_is_the_released_formula_with_its_second_difference_doubled():
    """Noise form, nodes lam_0, lam_-1, lam_-2; D2 = 2 (d0 - d1) / (r0 + r1), where released code leaves out the 2."""
    lam, sigma = VP.half_logsnr(UNEVEN), VP.sigma(UNEVEN)
    plan = sv.dpm_solver_multistep(VP, UNEVEN, 3)
    for i in range(2, plan.nfe):
        h = lam[i + 1] - lam[i]
        r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
        e1 = torch.expm1(h)
        e2 = e1 / h - 1
        e3 = e2 / h - 0.5
        d0, d1 = torch.tensor([1, -1, 0]) / r0, torch.tensor([0, 1, -1]) / r1
        slope = d0 + r0 / (r0 + r1) * (d0 - d1)
        curvature = (d0 - d1) / (r0 + r1)
        right = -sigma[i + 1] * (e1 * torch.tensor([1, 0, 0]) + e2 * slope + e3 * 2 * curvature)
        released = -sigma[i + 1] * (e1 * torch.tensor([1, 0, 0]) + e2 * slope + e3 * curvature)
        assert_close(plan.b[i], right, rtol=1e-11, atol=1e-13)
        assert not torch.allclose(plan.b[i], released, rtol=1e-3)


# Samplers that are one under two names: sections 5.1 and 5.2 of the theory, as equalities of tables


@pytest.mark.parametrize("times", [TIMES, UNEVEN], ids=["logsnr", "uneven"])
@pytest.mark.parametrize("predicts", ["noise", "data"])
def test_unip_is_exponential_adams(predicts, times):
    """For p >= 3 in every row that solves the whole system; with varying coefficients in every row of every order."""
    for order in (1, 2, 3, 4):
        adams = sv.exponential_adams(VP, times, order, predicts)
        exact = sv.unipc(VP, times, order, "vary_coeff", predicts, corrector=False)
        assert exact.allclose(adams)
        for variant in ("bh1", "bh2"):
            plan = sv.unipc(VP, times, order, variant, predicts, corrector=False)
            assert_close(
                plan.b[order - 1 :], adams.b[order - 1 :], rtol=1e-12, atol=1e-13
            ) if order > 2 else None


@pytest.mark.parametrize("order", [2, 3, 4])
def test_bh1_and_bh2_differ_in_the_rows_of_one_other_call_alone(order):
    """B(h) cancels where the system is solved: past the warm-up their tables are the same, in it they are not."""
    first, second = (sv.unipc(VP, TIMES, order, variant) for variant in ("bh1", "bh2"))
    settled = max(order, 3)  # one row after the first corrector and predictor that solve theirs
    if order > 2:
        assert_close(first.b[settled:], second.b[settled:], rtol=1e-12, atol=1e-13)
    assert not first.allclose(second, rtol=1e-4, atol=1e-4)


def test_unip_2_is_2m_in_one_variant_and_the_few_step_rule_of_sa_solver_in_the_other():
    assert sv.unipc(VP, TIMES, 2, "bh2", corrector=False).allclose(sv.dpm_solver_pp(VP, TIMES, 2))
    plan, lam = sv.unipc(VP, TIMES, 2, "bh1", corrector=False), VP.half_logsnr(TIMES)
    h, before = lam.diff()[1:], lam.diff()[:-1]
    assert_close(plan.b[1:, 1], -plan.alpha[2:] * h / 2 * (h / before), rtol=1e-12, atol=0)


@pytest.mark.parametrize("predicts", ["noise", "data"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_unic_is_exponential_adams_moulton(order, predicts):
    """Both weights of a corrected step by adaptive quadrature of Lagrange polynomials, the new call included."""
    plan = sv.unipc(VP, TIMES, order, "vary_coeff", predicts)
    lam, rate = VP.half_logsnr(TIMES).tolist(), {"noise": 1, "data": -1}[predicts]
    size = {"noise": -plan.sigma, "data": plan.alpha}[predicts].tolist()

    def weights(step, nodes):
        """Of the predictions at the nodes over one step."""

        def lagrange(v, j):
            return math.prod((v - lam[k]) / (lam[j] - lam[k]) for k in nodes if k != j)

        s, t = lam[step], lam[step + 1]
        return {
            j: size[step + 1]
            * quad(lambda v, j=j: math.exp(rate * (t - v)) * lagrange(v, j), s, t, epsrel=1e-13)[0]
            for j in nodes
        }

    for i in range(1, plan.nfe):
        past = range(max(0, i - order + 1), i + 1)
        before = range(max(0, i - order), i)
        row = dict.fromkeys(range(i + 1), 0.0) | weights(i, past)
        for sign, nodes in ((1, [*before, i]), (-1, before)):
            for j, weight in weights(i - 1, nodes).items():
                row[j] += sign * float(plan.a[i]) * weight
        expected = torch.tensor([row.get(i - j, 0.0) for j in range(plan.window)], dtype=torch.float64)
        assert_close(plan.b[i], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_is_adams_in_noise_form_and_lms_is_deis_in_sigma(order):
    assert sv.deis(VP, UNEVEN, order, "half_logsnr") == sv.exponential_adams(VP, UNEVEN, order, "noise")
    assert sv.deis(VP, UNEVEN, order, "sigma") == sv.lms(VP, UNEVEN, order) == sv.ipndm_v(VP, UNEVEN, order)


def test_ipndm_is_lms_where_steps_of_sigma_are_equal():
    times = torch.linspace(2.0, 0.2, 10, dtype=torch.float64)
    assert sv.ipndm(sv.EDM(), times, 4).allclose(sv.lms(sv.EDM(), times, 4))
    assert not sv.ipndm(sv.EDM(), sv.karras(sv.EDM(), 9), 4).allclose(
        sv.lms(sv.EDM(), sv.karras(sv.EDM(), 9), 4)
    )


def test_single_steps_that_are_tableaux():
    rk, tableaux = partial(sv.exponential_rk, VP, UNEVEN), sv.tableaux
    assert sv.dpm_solver(VP, UNEVEN, 2) == rk(tableaux.dpm_solver_2(), "noise")
    assert sv.dpm_solver_pp(VP, UNEVEN, 2, kind="singlestep") == rk(tableaux.dpm_solver_2())
    assert sv.dpm_solver(VP, UNEVEN, 3) == rk(tableaux.third_order(), "noise")
    assert sv.heun(VP, UNEVEN) == rk(tableaux.second_order(1.0), "noise", "sigma")
    assert sv.heun(VP, UNEVEN, 0.5) == rk(tableaux.second_order(0.5), "noise", "sigma")
    assert rk(tableaux.euler, "data").allclose(sv.ddim(VP, UNEVEN))


@pytest.mark.parametrize("start", ["ramp", "singlestep"])
@pytest.mark.parametrize("order", [2, 3, 4])
def test_unipc_is_a_multistep_plan_corrected(order, start):
    starting = {3: (1, 3), 4: (2, 4)}.get(order)
    plan = adams(VP, TIMES, order, Form("data"), start, "full", "bh2", starting)
    assert sv.corrected(plan, order, times=TIMES) == sv.unipc(VP, TIMES, order, start=start)
    if start == "ramp" and order < 4:
        assert sv.corrected(sv.dpm_solver_pp(VP, TIMES, order), order) == sv.unipc(VP, TIMES, order)


@pytest.mark.parametrize(
    "build",
    [
        sv.ddim,
        sv.dpm_solver_pp,
        partial(sv.lms, order=2),
        partial(sv.ipndm, order=2),
        partial(sv.deis, order=2),
    ],
    ids=["ddim", "2M", "lms", "ipndm", "deis"],
)
def test_a_corrector_makes_any_multistep_plan_more_accurate(build):
    """At equal calls, on a problem and a grid of no merit of theirs."""
    times, data = sv.logsnr(VP, 24), PROBLEMS["line"]
    x = torch.linspace(-2, 2, 16, dtype=torch.float64)[:, None]
    exact = data.flow(x, VP, VP.start, VP.stop)
    plan = build(VP, times)
    better = sv.corrected(plan, 2)
    assert torch.equal(better.times, plan.times)
    errors = [(sv.run(p, data.model(VP), x) - exact).square().mean() for p in (plan, better)]
    assert errors[1] < errors[0] / 2


def test_correctors_are_refused_where_they_have_no_meaning():
    with pytest.raises(ValueError, match="deterministic one in noise, data or velocity form"):
        sv.corrected(sv.ddim(VP, TIMES, eta=1.0), 1)
    with pytest.raises(ValueError, match="mixture form"):
        sv.corrected(sv.dpm_solver_v3(VP, TIMES, sv.gaussian_statistics(0.0, 1.0)), 1)
    with pytest.raises(ValueError, match=r"times\[1\] is not among the times of the plan's calls"):
        sv.corrected(sv.ddim(VP, TIMES), 1, times=UNEVEN)
    with pytest.raises(ValueError, match="expected the plan's ends"):
        sv.corrected(sv.ddim(VP, TIMES), 1, times=TIMES[:-1])
    for staged in (
        sv.heun(VP, TIMES),
        sv.pndm(VP, TIMES),
        sv.exponential_rk(VP, TIMES, sv.tableaux.krogstad),
    ):
        with pytest.raises(ValueError, match="some calls are stages: give the outer steps"):
            sv.corrected(staged, 2)
        assert sv.corrected(staged, 2, times=TIMES).nfe == staged.nfe
    with pytest.raises(ValueError, match="variant = 'bh1' with variable = 'angle'"):
        sv.unipc(VP, TIMES, 2, "bh1", "velocity", "angle")


@pytest.mark.parametrize("name", UNSCALED)
@pytest.mark.parametrize("constant", ["noise", "data"])
def test_constant_predictions_are_solved_exactly(name, constant):
    """x_t = alpha x_0 + sigma eps with x_0 and eps that do not change is the exact solution of both constant models."""
    plan = METHODS[name].build(VP, TIMES)
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator())
    output = {"noise": eps, "data": x0}[constant]
    x = plan.alpha[0] * x0 + plan.sigma[0] * eps
    got = sv.run(plan, sv.Model(lambda x, t: output, predicts=constant), x)
    tolerance = 1e-12 if name.startswith("unipc") else 1e-13  # a correction is a difference of weights
    assert_close(got, plan.alpha[-1] * x0 + plan.sigma[-1] * eps, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("predicts", ["data", "velocity", "score", "flow", "edm"])
def test_every_parameterisation_of_a_model_gives_the_same_samples(name, predicts):
    plan = METHODS[name].build(VP, TIMES)
    assert_close(end(plan, predicts), end(plan), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", UNCLOCKED)
@pytest.mark.parametrize(
    "other", [sv.EDM(), sv.Flow(), sv.Flow(shift=3.0), sv.Cosine(), sv.SubVP(), sv.LogSNR()], ids=str
)
def test_schedules_agree_at_equal_log_snr(name, other):
    """x / alpha at given half log-SNR does not depend on the schedule that carries it there."""
    lam = torch.tensor([-2.4, -1.8, -0.9, 0.1, 0.7, 1.9, 2.4], dtype=torch.float64)
    data = PROBLEMS["eight"]
    y = torch.randn(5, 8, dtype=torch.float64, generator=generator()) * 11
    ends = []
    for schedule in (VP, other):
        plan = METHODS[name].build(schedule, schedule.time(lam))
        ends.append(sv.run(plan, data.model(schedule), plan.alpha[0] * y) / plan.alpha[-1])
    assert_close(ends[1], ends[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", METHODS)
def test_rotated_data_give_rotated_samples(name):
    plan = METHODS[name].build(VP, TIMES)
    data = PROBLEMS["eight"]
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64, generator=generator(5))).Q
    rotated = type(data)(data.weights, data.means @ rotation.T, rotation @ data.covs @ rotation.T)
    x = torch.randn(5, 8, dtype=torch.float64, generator=generator())
    turned_after = sv.run(plan, data.model(VP), x) @ rotation.T
    tolerance = 1e-11 if name.startswith("unipc") else 1e-12  # a correction is a difference of weights
    assert_close(
        sv.run(plan, rotated.model(VP), x @ rotation.T), turned_after, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("scale", [1e-3, 7.0, 1e3])
@pytest.mark.parametrize("name", UNSCALED)
def test_scaled_data_and_noise_give_scaled_samples(name, scale):
    lam = torch.linspace(-2.0, 2.0, 8, dtype=torch.float64)
    data = PROBLEMS["eight"]
    large = type(data)(data.weights, data.means * scale, data.covs * scale**2)
    x = 8 * torch.randn(5, 8, dtype=torch.float64, generator=generator())
    schedule = sv.EDM()
    build = METHODS[name].build
    plain = sv.run(build(schedule, schedule.time(lam)), data.model(schedule), x)
    scaled = sv.run(build(schedule, scale * schedule.time(lam)), large.model(schedule), scale * x)
    assert_close(scaled / scale, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_law_is_what_a_hundred_thousand_runs_show(name):
    """Mean and covariance within 4.5 standard errors; three percent of variance would show."""
    plan = METHODS[name].build(VP, TIMES)
    n = 100_000
    start = DATA.marginal(plan.alpha[0].item(), plan.sigma[0].item())
    x = start.draw(n, generator(6))
    x = sv.run(plan, DATA.model(VP), x)
    predicted = law(plan, DATA)
    z_mean = (x.mean(0) - predicted.mean) / (predicted.cov.diagonal() / n).sqrt()
    variance = predicted.cov.diagonal()
    spread = (variance[:, None] * variance + predicted.cov**2).sqrt() / n**0.5
    z_cov = (x.T.cov() - predicted.cov) / spread
    assert z_mean.abs().max() < 4.5
    assert z_cov.abs().max() < 4.5
    assert (0.03 * variance / spread.diagonal() > 4.5).all()  # power: three percent of variance is seen


@pytest.mark.parametrize("name", METHODS)
def test_law_tends_to_the_exact_marginal(name):
    order = METHODS[name].order
    distances = []
    for steps in (64, 128, 256):
        plan = METHODS[name].build(VP, sv.logsnr(VP, steps))
        exact = DATA.marginal(plan.alpha[-1].item(), plan.sigma[-1].item())
        distances.append(wasserstein2(law(plan, DATA), exact))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1.3 * distances[1] / 2**order

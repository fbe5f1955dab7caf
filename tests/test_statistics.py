"""DPM-Solver-v3: exact on Gaussian data, its statistics estimated by the library, saved and refused where they are wrong."""

import builtins
import math

import pytest
import torch
from scipy.integrate import quad
from torch.testing import assert_close

import solvers as sv
from problems import PROBLEMS, VP, generator
from reference import Gaussian, trace

MEAN = torch.tensor([[0.4, -1.3, 0.2], [1.1, 0.0, -0.6]], dtype=torch.float64)  # elements [2, 3]
VARIANCE = torch.tensor([[0.04, 0.6, 1.7], [0.3, 2.5, 0.9]], dtype=torch.float64)
EXACT = sv.gaussian_statistics(MEAN, VARIANCE)
DATA = Gaussian(MEAN, torch.diag(VARIANCE.flatten()))
WIDE = VP.time(torch.tensor([-3.0, 3.0], dtype=torch.float64))  # one step
GRID = VP.time(torch.tensor([-3.0, -1.8, -1.1, 0.3, 0.9, 2.2, 3.0], dtype=torch.float64))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=dtype)


@pytest.mark.parametrize("times", [WIDE, GRID], ids=["one step", "six steps"])
@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_is_exact_on_gaussian_data_with_independent_elements(order, corrector, times):
    plan = sv.dpm_solver_v3(VP, times, EXACT, order, corrector)
    assert plan.element_shape == (2, 3)
    x = randn(5, 2, 3)
    got = sv.run(plan, DATA.model(VP), x)
    exact = DATA.flow(x, VP, float(times[0]), float(times[-1]))
    assert_close(got, exact, rtol=0, atol=1e-10)
    damaged = sv.dpm_solver_v3(VP, times, sv.gaussian_statistics(MEAN, 1.001 * VARIANCE), order, corrector)
    assert (sv.run(damaged, DATA.model(VP), x) - exact).abs().max() > 1e-7


def papers_v3(model, x, times, schedule, fit, order, corrector):
    """Algorithms 1 and 2 for one element, with all integrals by adaptive quadrature; model predicts the noise."""
    lam = [float(v) for v in schedule.half_logsnr(times)]
    alpha, sigma = (level(times) for level in (schedule.alpha, schedule.sigma))

    def at(v):
        return [float(value) for value in fit(torch.tensor([v], dtype=torch.float64))]

    def integral(f, a, b):
        return quad(f, a, b, epsabs=1e-13, epsrel=1e-12)[0]

    outputs = []
    for i in range(len(lam) - 1):
        s = lam[i]
        if i == 0:
            outputs.append(sigma[i] * model(x, times[i]) - at(s)[0] * x)

        def linear(v, s=s):
            return integral(lambda u: at(u)[0], s, v)

        def slope(v, s=s):
            return integral(lambda u: at(u)[1], s, v)

        def offset(v, s=s, slope=slope):
            return integral(lambda u: math.exp(-slope(u)) * at(u)[2], s, v)

        def step(nodes, x=x, s=s, i=i, linear=linear, slope=slope, offset=offset):
            total = 0
            for j in nodes:
                g = math.exp(-slope(lam[j])) * outputs[j] / alpha[j] - offset(lam[j])

                def weighted(v, j=j):
                    basis = math.prod((v - lam[k]) / (lam[j] - lam[k]) for k in nodes if k != j)
                    return math.exp(linear(v) + slope(v)) * basis

                total = total + integral(weighted, s, lam[i + 1]) * g
            return alpha[i + 1] * math.exp(-linear(lam[i + 1])) * (x / alpha[i] - total)

        nodes = list(range(max(0, i - order + 1), i + 1))
        predicted = step(nodes)
        if i + 1 < len(lam) - 1:
            outputs.append(sigma[i + 1] * model(predicted, times[i + 1]) - at(lam[i + 1])[0] * predicted)
        x = step([*nodes, i + 1]) if corrector and i + 1 < len(lam) - 1 else predicted
    return x


def wavy_fit(lam):
    """Statistics of no data, smooth and none of them 0; b = 0, as a constant is no part of a trace."""
    return 0.3 + 0.2 * torch.sin(lam), 0.1 * torch.cos(2 * lam), 0 * lam


@pytest.mark.parametrize(("order", "corrector"), [(1, True), (2, False), (2, True)])
def test_v3_of_the_paper_is_our_table(order, corrector):
    times = VP.time(torch.tensor([-1.0, -0.2, 0.9, 1.6], dtype=torch.float64))
    plan = sv.dpm_solver_v3(VP, times, wavy_fit, order, corrector)
    theirs = trace(
        lambda model, x, noise: papers_v3(model, x, times, VP, wavy_fit, order, corrector), plan.nfe
    )
    table = trace(lambda model, x, noise: sv.run(plan, model, x), plan.nfe)
    assert_close(table, theirs, rtol=1e-9, atol=1e-10)


def test_constants_are_carried_exactly():
    """Where N is a constant in time, f = e^{-S} (..) is not: b alone makes x move, by the integrals of its definition."""

    def fit(lam):
        return 0 * lam, 0 * lam, torch.exp(-lam)

    times = VP.time(torch.tensor([0.0, 0.7], dtype=torch.float64))
    plan = sv.dpm_solver_v3(VP, times, fit, 1, corrector=False)
    x = torch.zeros(1, 1, dtype=torch.float64)
    got = sv.run(plan, lambda x, t: torch.zeros_like(x), x).item()
    # f_s = 0, so f = int_0^v e^-u du = 1 - e^-v, and y_t = -int_0^h f = -(h - 1 + e^-h)
    assert got == pytest.approx(-plan.alpha[-1].item() * (0.7 - 1 + math.exp(-0.7)), rel=1e-13)


def test_statistics_of_nothing_are_the_noise_form_and_of_all_are_the_data_form():
    """l = 0, s = -1 is DPM-Solver, l = 1, s = 0 is DPM-Solver++: in order 1 both are DDIM."""
    x = randn(4, 8)
    model = PROBLEMS["eight"].model(VP)
    ddim = sv.run(sv.ddim(VP, GRID), model, x)
    for l, s in ((0.0, 1.0), (1.0, 0.0)):  # noqa: E741

        def fit(lam, l=l, s=s):  # noqa: E741
            return l + 0 * lam, -s + 0 * lam, 0 * lam

        plan = sv.dpm_solver_v3(VP, GRID, fit, 1, corrector=False)
        assert_close(sv.run(plan, model, x), ddim, rtol=1e-11, atol=1e-11)


def test_its_linear_part_is_that_of_the_velocity_form_with_the_data_s_deviation_as_scale():
    plan = sv.dpm_solver_v3(VP, GRID, sv.gaussian_statistics(0.0, 0.49))
    assert_close(plan.a, sv.exponential_adams(VP, GRID, 1, "velocity", scale=0.7).a, rtol=1e-12, atol=0)


def test_estimated_statistics_of_gaussian_data_are_the_exact_ones():
    """The Jacobian is diagonal, so one sign vector gives l without error; f does not vary, so s is 0."""
    times = sv.logsnr(VP, 60, start=float(GRID[0]), stop=float(GRID[-1]))
    x0 = DATA.draw(40, generator(1))
    found = sv.estimate_statistics(DATA.model(VP), VP, x0, times, noise=0, batch_size=16)
    l, _, b = EXACT(found.half_logsnr)  # noqa: E741
    assert_close(found.l, l, rtol=1e-10, atol=1e-12)
    assert not found.s.any()
    assert_close(found.b[1:-1], b[1:-1], rtol=0, atol=1e-3)  # a central difference over 0.02
    plan = sv.dpm_solver_v3(VP, WIDE, found, 1, corrector=False)
    x = randn(5, 2, 3)
    assert_close(sv.run(plan, DATA.model(VP), x), DATA.flow(x, VP, *WIDE.tolist()), rtol=0, atol=5e-3)


def test_the_slope_of_an_uncentred_model_is_found():
    """A model whose f = e^{s lambda} c along every path: N = alpha f with l = 0, that is noise = f / rho, no function of x."""
    s = -0.4

    def model(x, t):
        lam = VP.half_logsnr(t.double())[:, None]
        return torch.exp((1 + s) * lam).to(x) * (scale * torch.ones_like(x)) + 0 * x

    scale = torch.tensor([[0.5], [1.0], [2.0], [-1.0]], dtype=torch.float64)
    times = sv.logsnr(VP, 20, start=float(GRID[0]), stop=float(GRID[-1]))
    found = sv.estimate_statistics(model, VP, randn(4, 3), times, noise=0)
    assert found.l.abs().max() == 0
    assert_close(found.s[1:-1], torch.full_like(found.s[1:-1], s), rtol=1e-4, atol=0)
    assert_close(found.b[1:-1], torch.zeros_like(found.b[1:-1]), rtol=0, atol=1e-6 * math.exp(1))


@pytest.mark.parametrize("steps", [8, 20])
def test_estimated_statistics_of_a_mixture_make_the_solver_several_times_more_accurate(steps):
    """On elements of scales from 0.05 to 2, against DPM-Solver++(2M); another draw of noise and signs does as well."""
    data, scales = PROBLEMS["eight"], torch.logspace(-1.3, 0.3, 8, dtype=torch.float64)
    scaled = type(data)(data.weights, scales * data.means, scales[:, None] * data.covs * scales)
    x, grid = randn(32, 8), sv.logsnr(VP, steps)
    exact = scaled.flow(x, VP, VP.start, VP.stop)

    def error(plan):
        return (sv.run(plan, scaled.model(VP), x) - exact).square().mean().sqrt().item()

    for seed in (0, 1):
        found = sv.estimate_statistics(
            scaled.model(VP), VP, scaled.draw(64, generator(2)), sv.logsnr(VP, 80), noise=seed
        )
        assert error(sv.dpm_solver_v3(VP, grid, found, 2)) < error(sv.dpm_solver_pp(VP, grid)) / 4


def test_a_network_that_reads_labels_and_predicts_velocity_gives_the_same_statistics():
    schedule = sv.Discrete.linear(1000)
    x0, times = DATA.draw(5, generator(1)), sv.logsnr(schedule, 12, start=0.9, stop=0.1)
    plain = sv.estimate_statistics(DATA.model(schedule), schedule, x0, times, noise=3)
    net = DATA.model(schedule, "velocity")
    labelled = sv.Model(lambda x, n: net(x, (n + 1) / 1000), "velocity", label=schedule.label)
    again = sv.estimate_statistics(labelled, schedule, x0, times, noise=3, batch_size=2)
    for name in ("l", "s", "b"):
        assert_close(getattr(again, name), getattr(plain, name), rtol=1e-8, atol=1e-8)


def test_statistics_are_saved_and_loaded_without_loss(tmp_path):
    lam = torch.linspace(-2, 3, 7, dtype=torch.float64)
    kept = sv.Statistics(lam, *(randn(7, 2, 3, seed=k) for k in range(3)))
    kept.save(tmp_path / "statistics.safetensors")
    again = sv.Statistics.load(tmp_path / "statistics.safetensors")
    for name in ("half_logsnr", "l", "s", "b"):
        assert torch.equal(getattr(again, name), getattr(kept, name))
    assert [path.name for path in tmp_path.iterdir()] == ["statistics.safetensors"]
    (tmp_path / "other").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        sv.Statistics.load(tmp_path / "other")


def test_saving_without_safetensors_names_the_extra(monkeypatch, tmp_path):
    lam = torch.linspace(-2, 3, 7, dtype=torch.float64)
    kept, real = sv.Statistics(lam, *(randn(7, 2) for _ in range(3))), builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"diffusion-solvers\[files\]"):
        kept.save(tmp_path / "statistics.safetensors")


def test_interpolation_is_a_cubic_through_the_four_nearest():
    lam = torch.tensor([-2.0, -1.1, -0.3, 0.2, 1.4, 2.0], dtype=torch.float64)
    cubic = 0.3 - lam + 0.2 * lam**2 - 0.05 * lam**3
    found = sv.Statistics(lam, cubic[:, None], cubic[:, None], cubic[:, None])
    at = torch.linspace(-2, 2, 41, dtype=torch.float64)
    assert_close(found(at)[0][:, 0], 0.3 - at + 0.2 * at**2 - 0.05 * at**3, rtol=0, atol=1e-13)


def test_bad_statistics_are_refused():
    lam = torch.linspace(-2, 3, 7, dtype=torch.float64)
    good = randn(7, 2)
    with pytest.raises(ValueError, match=r"s has shape \[7, 3\]: expected finite \[7, \*D\]"):
        sv.Statistics(lam, good, randn(7, 3), good)
    with pytest.raises(ValueError, match="b has shape"):
        sv.Statistics(lam, good, good, good * math.nan)
    with pytest.raises(ValueError, match="at least 4 increasing"):
        sv.Statistics(lam.flip(0), good, good, good)
    narrow = sv.Statistics(lam, good, good, good)
    with pytest.raises(ValueError, match=r"outside the statistics' range \[-2, 3\]"):
        sv.dpm_solver_v3(VP, sv.logsnr(VP, 5), narrow)
    with pytest.raises(ValueError, match="variance above 0"):
        sv.gaussian_statistics(0.0, -1.0)
    with pytest.raises(ValueError, match=r"grid's start has infinite half log-SNR"):
        sv.dpm_solver_v3(sv.Flow(), sv.uniform(sv.Flow(), 5), EXACT)
    with pytest.raises(ValueError, match="expected at least 4, all finite"):
        sv.estimate_statistics(DATA.model(VP), VP, randn(3, 2, 3), GRID[:3], noise=0)


def test_a_plan_per_element_says_what_it_is_and_refuses_other_elements():
    plan = sv.dpm_solver_v3(VP, GRID, EXACT, 2)
    assert str(plan).splitlines()[0] == (
        "6 calls, mixture form, window 3, deterministic, per element [2, 3]: their means"
    )
    with pytest.raises(
        ValueError, match=r"x has shape \[5, 3, 2\]: the plan's coefficients are for elements \[2, 3\]"
    ):
        sv.run(plan, DATA.model(VP), randn(5, 3, 2))
    with pytest.raises(ValueError, match="not saved as text"):
        plan.to_json()
    assert plan == sv.dpm_solver_v3(VP, GRID, EXACT, 2)
    assert plan != sv.dpm_solver_v3(VP, GRID, EXACT, 3)
    one_step = sv.dpm_solver_v3(VP, GRID, EXACT, 1, corrector=False)
    assert one_step[:3] + one_step[3:] == one_step
    x = randn(5, 2, 3, dtype=torch.float32)
    assert sv.run(plan, DATA.model(VP), x).dtype == torch.float32


def test_gradients_flow_through_a_run_with_coefficients_per_element():
    plan = sv.dpm_solver_v3(VP, GRID[2:5], EXACT, 2)
    x = randn(1, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sv.run(plan, lambda x, t: x.tanh(), x, grad=True), (x,))


def test_statistics_that_cannot_be_right_are_refused():
    times, x0 = sv.logsnr(VP, 8), randn(5, 3)

    @torch.no_grad()
    def blind(x, t):
        return torch.tanh(x)

    estimate = sv.estimate_statistics
    with pytest.raises(
        ValueError, match=r"no gradient flows through the model: call it without torch.no_grad\(\)"
    ):
        estimate(blind, VP, x0, times, noise=0)
    with pytest.raises(TypeError, match=r"x0 is torch.bfloat16: expected data in float32 or float64"):
        estimate(torch.tanh, VP, x0.bfloat16(), times, noise=0)
    with pytest.raises(ValueError, match=r"expected finite data, \[n, \*D\]"):
        estimate(torch.tanh, VP, x0 * math.nan, times, noise=0)
    with pytest.raises(ValueError, match=r"the model returned .*\[1, 3\].* expected .*\[5, 3\]"):
        estimate(lambda x, t: x[:1], VP, x0, times, noise=0)
    with pytest.raises(ValueError, match="model's answer at t = 1 is not finite"):
        estimate(lambda x, t: x / 0, VP, x0, times, noise=0)


def test_fits_that_cannot_be_right_are_refused():
    times = sv.logsnr(VP, 5)
    with pytest.raises(ValueError, match=r"a factor of e\^.*estimate them at more times and of more samples"):
        sv.dpm_solver_v3(VP, times, lambda lam: (0 * lam, 40 + 0 * lam, 0 * lam))
    for wrong in (5, None, lambda lam: lam, lambda lam: (lam[:1], lam, lam)):
        with pytest.raises(TypeError, match="expected a function of half log-SNR"):
            sv.dpm_solver_v3(VP, times, wrong)
    with pytest.raises(ValueError, match="expected shapes that broadcast"):
        sv.gaussian_statistics(torch.zeros(3), torch.ones(4))


def test_one_tensor_may_stand_for_two_statistics(tmp_path):
    lam, zero = torch.linspace(-2, 3, 7, dtype=torch.float64), torch.zeros(7, 2)
    kept = sv.Statistics(lam, zero, zero, zero)
    kept.save(tmp_path / "zero.safetensors")
    zero += 1
    assert not sv.Statistics.load(tmp_path / "zero.safetensors").l.any()
    assert not kept.l.any()

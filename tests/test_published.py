"""Published samplers, read off as tables by `trace`, equal ours where they are right, and named where they are not."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from scipy.integrate import quad
from torch.testing import assert_close

import solvers as sv
from problems import VP
from reference import row_order, rows, trace

PEERS_WARN = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
EDM = sv.EDM()
SIGMAS = EDM.time(torch.tensor([-3.0, -2.2, -1.8, -0.7, 0.1, 0.9, 1.7, 3.0], dtype=torch.float64))
TO_ZERO = torch.cat([SIGMAS, SIGMAS.new_zeros(1)])


def ours(plan, predicts="noise"):
    """Our executor read off like any other sampler: the states of each call in terms of x and the network's outputs."""

    def sampler(model, x, noise):
        return sv.run(plan, sv.Model(model, predicts=predicts), x)

    return trace(sampler, plan.nfe)


# --- k-diffusion (crowsonkb/k-diffusion, sampling.py), as loops: model(x, sigma) -> denoised, alpha = 1 -------------


def kdiffusion_2m(model, x, sigmas):
    previous = None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i])
        h = sigmas[i].log() - sigmas[i + 1].log()
        target = denoised
        if previous is not None and sigmas[i + 1] > 0:
            r = (sigmas[i - 1].log() - sigmas[i].log()) / h
            target = (1 + 1 / (2 * r)) * denoised - previous / (2 * r)
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * target
        previous = denoised
    return x


def kdiffusion_dpm_2(model, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        middle = (s.log() + t.log()).div(2).exp()
        stage = x + (x - model(x, s)) / s * (middle - s)
        x = x + (stage - model(stage, middle)) / middle * (t - s)
    return x


def kdiffusion_dpmpp_2s(model, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = s.log() - t.log()
        middle = (s.log() + t.log()).div(2).exp()
        stage = middle / s * x - torch.expm1(-h / 2) * model(x, s)
        x = t / s * x - torch.expm1(-h) * model(stage, middle)
    return x


def kdiffusion_3m(model, x, sigmas, doubled=False):
    """sample_dpmpp_3m_sde with eta = 0; `doubled` repairs its second difference."""
    outputs, steps = [], []
    for i in range(len(sigmas) - 1):
        outputs.append(model(x, sigmas[i]))
        h = sigmas[i].log() - sigmas[i + 1].log()
        x = sigmas[i + 1] / sigmas[i] * x - torch.expm1(-h) * outputs[-1]
        phi_2 = torch.expm1(-h) / h + 1
        if i >= 2:
            r0, r1 = steps[-1] / h, steps[-2] / h
            d0, d1 = (outputs[-1] - outputs[-2]) / r0, (outputs[-2] - outputs[-3]) / r1
            slope, curvature = d0 + (d0 - d1) * r0 / (r0 + r1), (d0 - d1) / (r0 + r1)
            phi_3 = phi_2 / h - 0.5
            x = x + phi_2 * slope - phi_3 * curvature * (2 if doubled else 1)
        elif i == 1:
            x = x + phi_2 * (outputs[-1] - outputs[-2]) / (steps[-1] / h)
        steps.append(h)
    return x


@pytest.mark.parametrize(
    ("loop", "method", "sigmas"),
    [
        (kdiffusion_2m, partial(sv.dpm_solver_pp, order=2), SIGMAS),
        (kdiffusion_2m, partial(sv.dpm_solver_pp, order=2), TO_ZERO),
        (kdiffusion_dpm_2, partial(sv.dpm_solver, order=2), SIGMAS),
        (kdiffusion_dpmpp_2s, partial(sv.dpm_solver_pp, order=2, kind="singlestep"), SIGMAS),
        (
            partial(kdiffusion_3m, doubled=True),
            partial(sv.exponential_adams, order=3, predicts="data"),
            SIGMAS,
        ),
    ],
    ids=["2m", "2m to sigma 0", "dpm_2", "2s", "3m repaired"],
)
def test_kdiffusion_is_our_table(loop, method, sigmas):
    plan = method(EDM, sigmas)
    theirs = trace(lambda model, x, noise: loop(model, x, sigmas), plan.nfe)
    assert_close(ours(plan, "data"), theirs, rtol=1e-12, atol=1e-12)


def as_method(loop):
    """A published loop as one of our methods: traced on the times it is given, and folded to rows."""

    def build(schedule, times):
        steps = len(times) - 1
        weights = trace(lambda model, x, noise: loop(model, x, schedule.sigma(times)), steps)
        a, b, _ = rows(weights, steps)
        return sv.Plan(
            times, schedule.alpha(times), schedule.sigma(times), a, b.round(decimals=14), predicts="data"
        )

    return build


def test_kdiffusion_3m_is_of_second_order_and_of_third_with_its_second_difference_doubled():
    """It is h^2 m'' / 2, and is multiplied by the weight of h^2 m''. History is exact, so the start is not to blame."""
    shape = [1.0, 2.0, 1.5, 0.8]
    released = row_order(as_method(kdiffusion_3m), EDM, 0.5, shape, 0.02, degree=3)
    repaired = row_order(as_method(partial(kdiffusion_3m, doubled=True)), EDM, 0.5, shape, 0.02, degree=3)
    assert released == pytest.approx(2, abs=0.1)
    assert repaired == pytest.approx(3, abs=0.1)


# --- the DPM-Solver authors (LuChengTHU/dpm-solver), in noise form as printed ----------------------------------------


def authors_singlestep_3(model, x, times, schedule, r1=1 / 3, r2=2 / 3):
    """Algorithm 5 of arXiv 2206.00927 (solver_type "dpmsolver")."""
    for s, t in zip(times[:-1], times[1:], strict=True):
        lam_s, lam_t = schedule.half_logsnr(s), schedule.half_logsnr(t)
        h = lam_t - lam_s
        s1, s2 = schedule.time(lam_s + r1 * h), schedule.time(lam_s + r2 * h)
        alpha, sigma = schedule.alpha, schedule.sigma
        m0 = model(x, s)
        u1 = alpha(s1) / alpha(s) * x - sigma(s1) * torch.expm1(r1 * h) * m0
        d1 = model(u1, s1) - m0
        phi = torch.expm1(r2 * h) / (r2 * h) - 1
        u2 = alpha(s2) / alpha(s) * x - sigma(s2) * (torch.expm1(r2 * h) * m0 + r2 / r1 * phi * d1)
        d2 = model(u2, s2) - m0
        x = alpha(t) / alpha(s) * x - sigma(t) * (torch.expm1(h) * m0 + (torch.expm1(h) / h - 1) * d2 / r2)
    return x


def test_authors_dpm_solver_3_is_our_table():
    times = sv.logsnr(VP, 3)
    theirs = trace(lambda model, x, noise: authors_singlestep_3(model, x, times, VP), 9)
    assert_close(ours(sv.dpm_solver(VP, times, 3)), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("nfe", range(1, 40))
def test_dpm_solver_fast_allocates_as_its_authors_do(nfe):
    """Section 3.4: K = nfe // 3 + 1 outer steps, orders [3] * (K - 2) + [2, 1], [3] * (K - 1) + [1] or + [2]."""
    outer = nfe // 3 + 1
    orders = {0: [3] * (outer - 2) + [2, 1], 1: [3] * (outer - 1) + [1], 2: [3] * (outer - 1) + [2]}[nfe % 3]
    plan = sv.dpm_solver_fast(VP, nfe)
    assert plan.nfe == sum(orders) == nfe
    first_calls = torch.tensor([0, *orders]).cumsum(0)
    assert_close(plan.times[first_calls], sv.logsnr(VP, outer), rtol=0, atol=0)


# --- samplers in sigma, as k-diffusion has them ---------------------------------------------------------------------


def kdiffusion_euler(model, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (x - model(x, s)) / s * (t - s)
    return x


def kdiffusion_heun(model, x, sigmas):
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - model(x, s)) / s
        stage = x + slope * (t - s)
        if t > 0:
            slope = (slope + (stage - model(stage, t)) / t) / 2
        x = x + slope * (t - s)
    return x


def kdiffusion_lms(model, x, sigmas, order=4):
    """Its coefficients are integrals of Lagrange polynomials, found by quadrature."""
    slopes, grid = [], sigmas.tolist()
    for i in range(len(sigmas) - 1):
        slopes.append((x - model(x, sigmas[i])) / sigmas[i])
        q = min(i + 1, order)
        for j in range(q):

            def lagrange(tau, i=i, j=j, q=q):
                return math.prod(
                    (tau - grid[i - k]) / (grid[i - j] - grid[i - k]) for k in range(q) if k != j
                )

            x = x + quad(lagrange, grid[i], grid[i + 1], epsabs=0, epsrel=1e-13)[0] * slopes[i - j]
    return x


def authors_ipndm(model, x, sigmas, order=4):
    """th_deis and diff-sampler: the Adams-Bashforth weights of equal steps."""
    weights = {
        1: [1],
        2: [3 / 2, -1 / 2],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }
    slopes = []
    for i in range(len(sigmas) - 1):
        slopes.insert(0, (x - model(x, sigmas[i])) / sigmas[i])
        row = weights[min(i + 1, order)]
        x = x + (sigmas[i + 1] - sigmas[i]) * sum(w * m for w, m in zip(row, slopes, strict=False))
    return x


def leapfrog(model, x, sigmas):
    """O-BELM of its paper with alpha = 1: x_{n+1} from x_{n-1}, x_n and the noise predicted at x_n."""
    slope = (x - model(x, sigmas[0])) / sigmas[0]
    before, x = x, x + (sigmas[1] - sigmas[0]) * slope
    for i in range(1, len(sigmas) - 1):
        h, last = sigmas[i + 1] - sigmas[i], sigmas[i] - sigmas[i - 1]
        slope = (x - model(x, sigmas[i])) / sigmas[i]
        new = h**2 / last**2 * before + (last**2 - h**2) / last**2 * x + h * (h + last) / last * slope
        before, x = x, new
    return x


@pytest.mark.parametrize(
    ("loop", "method", "sigmas"),
    [
        (kdiffusion_euler, sv.ddim, SIGMAS),
        (kdiffusion_euler, sv.ddim, TO_ZERO),
        (kdiffusion_heun, sv.heun, SIGMAS),
        (kdiffusion_heun, sv.heun, TO_ZERO),
        (kdiffusion_lms, sv.lms, SIGMAS),
        (kdiffusion_lms, sv.lms, TO_ZERO),
        (partial(kdiffusion_lms, order=3), partial(sv.ipndm_v, order=3), SIGMAS),
        (authors_ipndm, sv.ipndm, SIGMAS),
        (partial(authors_ipndm, order=2), partial(sv.ipndm, order=2), TO_ZERO),
        (leapfrog, sv.obelm, SIGMAS),
        (leapfrog, sv.obelm, TO_ZERO),
    ],
    ids=[
        "euler",
        "euler to 0",
        "heun",
        "heun to 0",
        "lms",
        "lms to 0",
        "ipndm_v",
        "ipndm",
        "ipndm to 0",
        "belm",
        "belm to 0",
    ],
)
def test_samplers_in_sigma_are_our_tables(loop, method, sigmas):
    plan = method(EDM, sigmas)
    theirs = trace(lambda model, x, noise: loop(model, x, sigmas), plan.nfe)
    assert_close(ours(plan, "data"), theirs, rtol=1e-12, atol=1e-12)


def diff_sampler_ipndm_v_3(model, x, sigmas):
    """Third order of diff-sampler's ipndm_v: `share` is (1 - A) B / 2 where Adams-Bashforth has (1 - A) B / 2 of other A, B."""
    slopes = []
    for i in range(len(sigmas) - 1):
        slopes.insert(0, (x - model(x, sigmas[i])) / sigmas[i])
        h = sigmas[i + 1] - sigmas[i]
        h1 = sigmas[i] - sigmas[i - 1]
        h2 = sigmas[i - 1] - sigmas[i - 2]
        if i == 0:
            row = [1.0]
        elif i == 1:
            row = [(2 + h / h1) / 2, -h / h1 / 2]
        else:
            share = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
            row = [(2 + h / h1) / 2 + share, -h / h1 / 2 - (1 + h1 / h2) * share, share * h1 / h2]
        x = x + h * sum(w * m for w, m in zip(row, slopes, strict=False))
    return x


def test_diff_samplers_ipndm_v_has_third_order_weights_on_equal_steps_alone():
    equal, unequal = torch.arange(9, 1, -1).double(), SIGMAS
    for sigmas, same in ((equal, True), (unequal, False)):
        theirs = trace(lambda model, x, noise, s=sigmas: diff_sampler_ipndm_v_3(model, x, s), len(sigmas) - 1)
        gap = (ours(sv.ipndm_v(EDM, sigmas, 3), "data") - theirs).abs().max()
        assert (gap < 1e-12) == same


# --- UniPC (wl-zhao/UniPC), data form --------------------------------------------------------------------------------


def authors_unipc(model, x, times, schedule, order, variant, corrector=True):
    """multistep_uni_pc_bh_update of the released code: both systems solved, but for the shortcuts rho = 1/2."""
    lam, alpha, sigma = schedule.half_logsnr(times), schedule.alpha(times), schedule.sigma(times)
    outputs = [model(x, times[0])]
    steps = len(times) - 1
    for i in range(steps):
        q, h, t = min(i + 1, order), lam[i + 1] - lam[i], i + 1
        b_h = {"bh1": -h, "bh2": torch.expm1(-h)}[variant]
        r = torch.tensor([*((lam[i - m] - lam[i]) / h for m in range(1, q)), 1.0]).double()
        rows, right, phi, factorial = [], [], torch.expm1(-h) / -h - 1, 1
        for k in range(1, q + 1):
            rows.append(r ** (k - 1))
            right.append(phi * factorial / b_h)
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rows, right = torch.stack(rows), torch.stack(right)
        slopes = [(outputs[i - m] - outputs[i]) / r[m - 1] for m in range(1, q)]
        predict = [0.5] if q == 2 else torch.linalg.solve(rows[:-1, :-1], right[:-1]) if q > 2 else []
        correct = [0.5] if q == 1 else torch.linalg.solve(rows, right)
        base = sigma[t] / sigma[i] * x - alpha[t] * torch.expm1(-h) * outputs[i]
        x = base - alpha[t] * b_h * sum(w * d for w, d in zip(predict, slopes, strict=True))
        if t < steps:
            outputs.append(model(x, times[t]))
            if corrector:
                slopes.append(outputs[t] - outputs[i])
                x = base - alpha[t] * b_h * sum(w * d for w, d in zip(correct, slopes, strict=True))
    return x


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_authors_unipc_is_our_table(order, variant, corrector):
    times = torch.tensor([1.0, 0.9, 0.55, 0.3, 0.21, 0.05, 0.001], dtype=torch.float64)
    plan = sv.unipc(VP, times, order, variant, corrector=corrector)
    theirs = trace(
        lambda model, x, noise: authors_unipc(model, x, times, VP, order, variant, corrector), plan.nfe
    )
    assert_close(ours(plan, "data"), theirs, rtol=1e-12, atol=1e-12)
    assert plan.window == min(order + corrector, 6)


# --- DEIS and PNDM, as their papers print them -----------------------------------------------------------------------


@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize("variable", ["t", "sigma", "half_logsnr"])
def test_deis_integrates_its_polynomials_as_adaptive_quadrature_does(variable, order):
    """DEIS: C_ij = int l_j drho over the step, l_j the Lagrange basis in t, rho or log rho."""
    times = sv.logsnr(VP, 6)
    plan = sv.deis(VP, times, order, variable)
    lam = VP.half_logsnr(times)
    place = {"t": lambda v: VP.time(v), "sigma": lambda v: torch.exp(-v), "half_logsnr": lambda v: v}[
        variable
    ]
    nodes = place(lam).tolist()
    for i in range(plan.nfe):
        q = min(i + 1, order)
        for j in range(q):

            def integrand(v, i=i, j=j, q=q):
                at = place(torch.tensor(v, dtype=torch.float64)).item()
                basis = [(at - nodes[i - k]) / (nodes[i - j] - nodes[i - k]) for k in range(q) if k != j]
                return -math.exp(-v) * math.prod(basis)

            exact = quad(integrand, lam[i].item(), lam[i + 1].item(), epsabs=0, epsrel=1e-12)[0]
            assert plan.b[i, j].item() == pytest.approx(plan.alpha[i + 1].item() * exact, rel=1e-12)


def authors_pndm(model, x, times, schedule):
    """Algorithm 2: three pseudo Runge-Kutta steps, then pseudo linear multistep; phi is a DDIM step from s to t."""

    def phi(x, eps, s, t):
        (a_s, s_s), (a_t, s_t) = ((schedule.alpha(v), schedule.sigma(v)) for v in (s, t))
        return a_t / a_s * x + (s_t - a_t / a_s * s_s) * eps

    past = []
    for i, (s, t) in enumerate(zip(times[:-1], times[1:], strict=True)):
        e1 = model(x, s)
        past.insert(0, e1)
        if i < 3:
            middle = (s + t) / 2
            e2 = model(phi(x, e1, s, middle), middle)
            e3 = model(phi(x, e2, s, middle), middle)
            e4 = model(phi(x, e3, s, t), t)
            eps = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        else:
            eps = (55 * past[0] - 59 * past[1] + 37 * past[2] - 9 * past[3]) / 24
        x = phi(x, eps, s, t)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_pndm_of_the_paper_is_our_table(steps):
    times = sv.uniform(VP, steps)
    plan = sv.pndm(VP, times)
    theirs = trace(lambda model, x, noise: authors_pndm(model, x, times, VP), plan.nfe)
    assert_close(ours(plan), theirs, rtol=1e-12, atol=1e-12)


# --- exponential integrators, as their papers print them: du/dtau = L u + N(u, tau), here L = -1, tau = lambda ---------


def cox_matthews_4(model, x, sigmas):
    """ETDRK4, eq. 26 to 29."""
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = s.log() - t.log()
        z, middle = -h, (s * t).sqrt()
        half, whole = torch.exp(z / 2), torch.exp(z)
        n_u = model(x, s)
        a = half * x + (half - 1) / -1 * n_u
        n_a = model(a, middle)
        b = half * x + (half - 1) / -1 * n_a
        n_b = model(b, middle)
        c = half * a + (half - 1) / -1 * (2 * n_b - n_u)
        n_c = model(c, t)
        weights = (
            (-4 - z + whole * (4 - 3 * z + z**2)) * n_u
            + 2 * (2 + z + whole * (z - 2)) * (n_a + n_b)
            + (-4 - 3 * z - z**2 + whole * (4 - z)) * n_c
        )
        x = whole * x + h * weights / z**3
    return x


def cox_matthews_3(model, x, sigmas):
    """ETDRK3, eq. 23 to 25."""
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = s.log() - t.log()
        z, middle = -h, (s * t).sqrt()
        half, whole = torch.exp(z / 2), torch.exp(z)
        n_u = model(x, s)
        a = half * x + (half - 1) / -1 * n_u
        n_a = model(a, middle)
        b = whole * x + (whole - 1) / -1 * (2 * n_a - n_u)
        n_b = model(b, t)
        weights = (
            (-4 - z + whole * (4 - 3 * z + z**2)) * n_u
            + 4 * (2 + z + whole * (z - 2)) * n_a
            + (-4 - 3 * z - z**2 + whole * (4 - z)) * n_b
        )
        x = whole * x + h * weights / z**3
    return x


def krogstad_4(model, x, sigmas):
    """ETDRK4-B, with phi-functions by their recursion."""
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        h = s.log() - t.log()
        middle = (s * t).sqrt()

        def phis(z):
            one = torch.expm1(z) / z
            two = (one - 1) / z
            return one, two, (two - 0.5) / z

        (p1, p2, p3), (q1, q2, _) = phis(-h), phis(-h / 2)
        n1 = model(x, s)
        u2 = torch.exp(-h / 2) * x + h / 2 * q1 * n1
        n2 = model(u2, middle)
        u3 = torch.exp(-h / 2) * x + h * ((q1 / 2 - q2) * n1 + q2 * n2)
        n3 = model(u3, middle)
        u4 = torch.exp(-h) * x + h * ((p1 - 2 * p2) * n1 + 2 * p2 * n3)
        n4 = model(u4, t)
        x = torch.exp(-h) * x + h * (
            (p1 - 3 * p2 + 4 * p3) * n1 + (2 * p2 - 4 * p3) * (n2 + n3) + (4 * p3 - p2) * n4
        )
    return x


@pytest.mark.parametrize(
    ("loop", "tableau"),
    [(cox_matthews_3, "etdrk3"), (cox_matthews_4, "etdrk4"), (krogstad_4, "krogstad")],
    ids=["etdrk3", "etdrk4", "krogstad"],
)
def test_exponential_integrators_of_the_papers_are_our_tables(loop, tableau):
    plan = sv.exponential_rk(EDM, SIGMAS, getattr(sv.tableaux, tableau))
    theirs = trace(lambda model, x, noise: loop(model, x, SIGMAS), plan.nfe)
    assert_close(ours(plan, "data"), theirs, rtol=1e-12, atol=1e-12)


def classical_rk4(model, x, sigmas):
    """The rule of 1901 for dx/dsigma = (x - D) / sigma."""
    for s, t in zip(sigmas[:-1], sigmas[1:], strict=True):
        h, middle = t - s, (s + t) / 2
        k1 = (x - model(x, s)) / s
        k2 = ((u := x + h / 2 * k1) - model(u, middle)) / middle
        k3 = ((u := x + h / 2 * k2) - model(u, middle)) / middle
        k4 = ((u := x + h * k3) - model(u, t)) / t
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def test_etdrk4_in_sigma_is_the_classical_fourth_order_method():
    """As rhoRK of DEIS: in the natural time z = 0."""
    plan = sv.exponential_rk(EDM, SIGMAS, sv.tableaux.etdrk4, "noise", "sigma")
    theirs = trace(lambda model, x, noise: classical_rk4(model, x, SIGMAS), plan.nfe)
    assert_close(ours(plan, "data"), theirs, rtol=1e-12, atol=1e-12)


def velocity_adams_2(model, x, angles):
    """dw/dtheta = v on the circle alpha = cos, sigma = sin: the textbook's variable-step Adams-Bashforth of order 2 in theta."""
    past = None
    for i in range(len(angles) - 1):
        v = model(x, angles[i])
        h = angles[i + 1] - angles[i]
        slope = v if past is None else v + h / (angles[i] - angles[i - 1]) / 2 * (v - past)
        past, x = v, x + h * slope
    return x


def test_velocity_adams_in_the_angle_is_the_textbooks_adams_on_the_circle():
    times = sv.angle(VP, 7)
    angles = torch.atan2(VP.sigma(times), VP.alpha(times))
    plan = sv.exponential_adams(VP, times, 2, "velocity", "angle")
    theirs = trace(lambda model, x, noise: velocity_adams_2(model, x, angles), plan.nfe)
    assert_close(ours(plan, "velocity"), theirs, rtol=1e-12, atol=1e-12)


def test_velocity_form_of_scale_sigma_data_is_edms_network():
    """At scale s its output is -sqrt(sigma^2 + s^2 alpha^2) F, so of x the table has the scaling alone, as F is given it."""
    plan = sv.exponential_adams(EDM, SIGMAS, 3, "velocity", scale=0.5)
    table = ours(plan, "edm")
    norm = torch.hypot(0.5 * plan.alpha, plan.sigma)
    assert_close(table[:-1, 0], (1 / norm[0]).expand(7), rtol=1e-12, atol=0)
    assert_close(table[-1, 0], norm[-1] / norm[0], rtol=1e-12, atol=0)


# --- diffusers -------------------------------------------------------------------------------------------------------


def diffusers_states(scheduler, steps):
    """The scheduler's own loop read off as a table, and the grid it stood on, as our times."""
    scheduler.set_timesteps(steps)
    levels = scheduler.config.num_train_timesteps

    def sampler(model, x, noise):
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).float(), t, x.float()).prev_sample
        return x.double()

    times = torch.cat([(scheduler.timesteps.double() + 1) / levels, torch.zeros(1, dtype=torch.float64)])
    return trace(sampler, len(scheduler.timesteps)), times


def peer(name, **config):
    diffusers = pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = getattr(diffusers, name)(**betas, **config)
    return scheduler, sv.Discrete.from_alphas_cumprod(scheduler.alphas_cumprod)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@PEERS_WARN
def test_diffusers_multistep_is_our_table(algorithm, order, spacing):
    zero = "zero" if algorithm == "dpmsolver++" else "sigma_min"
    scheduler, schedule = peer(
        "DPMSolverMultistepScheduler",
        algorithm_type=algorithm,
        solver_order=order,
        timestep_spacing=spacing,
        final_sigmas_type=zero,
        lower_order_final=False,
        steps_offset=1,
    )
    theirs, times = diffusers_states(scheduler, 8)
    if zero == "sigma_min":
        if times[-2] == 1 / 1000:
            pytest.skip("diffusers repeats its last level here: a step of no length")
        times[-1] = 1 / 1000
    method = sv.dpm_solver_pp if algorithm == "dpmsolver++" else sv.dpm_solver_multistep
    assert_close(ours(method(schedule, times, order)), theirs, rtol=2e-4, atol=2e-5)


@PEERS_WARN
def test_diffusers_third_order_multistep_has_the_rows_of_second_order():
    """Ours but for its third-order rows, and those of k-diffusion's 3M: the halved second difference shown above."""
    scheduler, schedule = peer(
        "DPMSolverMultistepScheduler", solver_order=3, timestep_spacing="trailing", lower_order_final=False
    )
    theirs, times = diffusers_states(scheduler, 8)
    plan = sv.dpm_solver_pp(schedule, times, 3)
    gap = (ours(plan) - theirs).abs().amax(1)
    assert gap[:3].max() < 1e-4  # x, and the steps of order 1 and 2
    assert gap[3:].min() > 1e-2

    rho = (plan.sigma / plan.alpha)[:-1]  # its last step, to sigma 0, is of first order
    weights = trace(lambda model, x, noise: kdiffusion_3m(model, x, rho), plan.nfe - 1)  # of x / alpha
    released = plan.b.clone()
    for i in range(2, plan.nfe - 1):
        step = weights[i + 1] - rho[i + 1] / rho[i] * weights[i]
        released[i] = plan.alpha[i + 1] * step[[i + 1, i, i - 1]]
    assert_close(ours(dataclasses.replace(plan, b=released)), theirs, rtol=2e-4, atol=2e-5)


def test_diffusers_ddim_is_our_table():
    scheduler, schedule = peer(
        "DDIMScheduler", clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True
    )
    theirs, times = diffusers_states(scheduler, 8)
    assert_close(ours(sv.ddim(schedule, times)), theirs, rtol=1e-4, atol=1e-5)


def test_diffusers_ddim_leaves_its_own_grid_where_the_stride_does_not_divide_the_levels():
    """It steps to t - 1000 // n whatever the next time is (failures.md B5)."""
    scheduler, schedule = peer(
        "DDIMScheduler", clip_sample=False, timestep_spacing="linspace", set_alpha_to_one=True
    )
    theirs, times = diffusers_states(scheduler, 7)
    assert (ours(sv.ddim(schedule, times)) - theirs).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@PEERS_WARN
def test_diffusers_unipc_is_our_table(order, variant):
    """With bh1 it is NaN at sigma = 0, where B(h) = h is infinite, so there it stops at its last level."""
    final = {"bh1": "sigma_min", "bh2": "zero"}[variant]
    scheduler, schedule = peer(
        "UniPCMultistepScheduler", solver_order=order, solver_type=variant, final_sigmas_type=final
    )
    theirs, times = diffusers_states(scheduler, 8)
    times[-1] = 1 / 1000 if variant == "bh1" else 0.0
    plan = sv.unipc(schedule, times, order, variant, final="lower")
    assert_close(ours(plan), theirs, rtol=5e-4, atol=5e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
@PEERS_WARN
def test_diffusers_deis_is_log_rho_deis(order):
    """Its step to the last level alone has lower order; its difference of antiderivatives keeps few digits in float32."""
    scheduler, schedule = peer("DEISMultistepScheduler", solver_order=order, lower_order_final=True)
    theirs, times = diffusers_states(scheduler, 8)
    times[-1] = 1 / 1000
    plan = sv.deis(schedule, times, order, "half_logsnr", final="lower")
    assert_close(ours(plan), theirs, rtol=2e-3, atol=5e-4)


@PEERS_WARN
def test_diffusers_heun_is_our_table():
    """In sigma, x / alpha being its state."""
    scheduler, _ = peer("HeunDiscreteScheduler")
    theirs, _ = diffusers_states(scheduler, 8)
    plan = sv.heun(EDM, scheduler.sigmas.double().unique().flip(0))
    assert_close(ours(plan), theirs, rtol=1e-5, atol=1e-5)


@PEERS_WARN
def test_diffusers_pndm_is_our_table():
    scheduler, schedule = peer("PNDMScheduler", set_alpha_to_one=True)
    theirs, _ = diffusers_states(scheduler, 10)
    times = torch.tensor([*((n + 1) / 1000 for n in range(900, -1, -100)), 0.0], dtype=torch.float64)
    assert_close(ours(sv.pndm(schedule, times)), theirs, rtol=1e-4, atol=1e-5)

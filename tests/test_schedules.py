"""Schedules: exact at both ends, invertible everywhere, and the level a network is told is the level in the table."""

import math
from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch

import solvers as sv

getcontext().prec = 60
EPS = torch.finfo(torch.float64).eps
TINY = 1e-12
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def tensor(values):
    return torch.as_tensor(values, dtype=torch.float64)


def gamma(t):
    """A given -log SNR that is not a line."""
    return -12 + 15 * t + 2 * t**3


CONTINUOUS = {
    "vp": sv.VP(),
    "vp falling beta": sv.VP(beta_min=9.0, beta_max=0.5),
    "vp constant beta": sv.VP(beta_min=3.0, beta_max=3.0),
    "cosine": sv.Cosine(),
    "ve": sv.VE(),
    "sub-vp": sv.SubVP(),
    "edm": sv.EDM(),
    "flow": sv.Flow(),
    "flow shifted": sv.Flow(shift=3.0),
    "log-snr line": sv.LogSNR(),
    "log-snr given": sv.LogSNR(gamma=gamma),
}
DISCRETE = {
    "linear": sv.Discrete.linear(1000),
    "scaled linear": sv.Discrete.scaled_linear(1000),
    "iddpm cosine": sv.Discrete.cosine(1000),
    "zero terminal snr": sv.Discrete.linear(1000).zero_terminal_snr(),
    "two levels": sv.Discrete([0.3, 0.6]),
}
SCHEDULES = CONTINUOUS | DISCRETE
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def whole_range(schedule):
    """Times that crowd towards both ends, without the ends where half log-SNR is infinite."""
    if isinstance(schedule, sv.EDM):
        return torch.logspace(-12, 4, 800, dtype=torch.float64)
    near = torch.logspace(-12, -0.4, 200, dtype=torch.float64)
    times = torch.cat(
        [near, 1 - near, torch.linspace(0.01, 0.99, 399, dtype=torch.float64), tensor([0.0, 1.0])]
    )
    times = times.unique(sorted=True)
    return times[schedule.half_logsnr(times).isfinite()]


def slope(function, times):
    """The derivative at every time, exactly."""
    t = times.clone().requires_grad_()
    (derivative,) = torch.autograd.grad((function(t) + 0 * t).sum(), t)
    return derivative


def grain(schedule, times):
    """(in t, in half log-SNR): how far one rounding of either moves each."""
    lam = schedule.half_logsnr(times)
    steep = slope(schedule.half_logsnr, times).abs()
    return EPS * (times + lam.abs().clamp(min=1) / steep), EPS * (lam.abs().clamp(min=1) + times * steep)


@every
def test_time_inverts_half_logsnr_to_rounding(schedule):
    times = whole_range(schedule)
    allowed = 8 * grain(schedule, times)[0]
    gap = (schedule.time(schedule.half_logsnr(times)) - times).abs()
    assert (gap <= allowed).all(), (
        f"t = {times[(gap / allowed).argmax()]:g}: {(gap / allowed).max():g} of what is allowed"
    )


@every
def test_half_logsnr_inverts_time_to_rounding(schedule):
    ends = schedule.half_logsnr(whole_range(schedule))
    lam = torch.linspace(float(ends.max()), float(ends.min()), 777, dtype=torch.float64)[1:-1]
    times = schedule.time(lam)
    gap = (schedule.half_logsnr(times) - lam).abs()
    allowed = 8 * grain(schedule, times)[1]
    assert (gap <= allowed).all(), (
        f"half log-SNR {lam[(gap / allowed).argmax()]:g}: {(gap / allowed).max():g} of what is allowed"
    )


@every
def test_the_inverse_of_an_end_is_inside_the_schedule(schedule):
    """So that alpha, which refuses times outside, can be asked about it."""
    times = whole_range(schedule)[[0, -1]]
    schedule.alpha(schedule.time(schedule.half_logsnr(times)))


@every
def test_half_logsnr_is_log_alpha_minus_log_sigma(schedule):
    times = whole_range(schedule)
    gap = (schedule.alpha(times).log() - schedule.sigma(times).log() - schedule.half_logsnr(times)).abs()
    rounding = 8 * EPS * schedule.half_logsnr(times).abs().clamp(min=1)
    assert (gap <= rounding + 2 * grain(schedule, times)[1]).all()


@every
def test_half_logsnr_strictly_decreases(schedule):
    times = whole_range(schedule)
    apart = times.diff() > 8 * grain(schedule, times)[0][1:]
    assert apart.sum() > 0.9 * len(times)
    assert (schedule.half_logsnr(times).diff()[apart] < 0).all()
    g2 = -2 * schedule.sigma(times) ** 2 * slope(schedule.half_logsnr, times)
    assert (g2 >= 0).all()


@every
def test_float64_whatever_comes_in(schedule):
    for t in (torch.tensor(0.5), torch.tensor([0.25, 0.5], dtype=torch.float64), 0.5):
        lam = schedule.half_logsnr(t)
        values = (schedule.alpha(t), schedule.sigma(t), lam, schedule.time(lam), schedule.time(lam.float()))
        assert {v.dtype for v in values} == {torch.float64}
        assert {v.shape for v in values} == {torch.as_tensor(t).shape}
    for t in (tensor([0.5]).expand(3), tensor([[0.2, 0.3], [0.4, 0.5]]).T):  # a warning would be an error
        assert torch.equal(
            schedule.time(schedule.half_logsnr(t)), schedule.time(schedule.half_logsnr(t.clone()))
        )
    given = torch.tensor([0.25, 0.5], dtype=torch.float64)
    for function in (schedule.alpha, schedule.sigma, schedule.half_logsnr, schedule.time):
        assert function(given).data_ptr() != given.data_ptr()
    assert given.tolist() == [0.25, 0.5]


@every
@pytest.mark.parametrize("t", [-1e-9, 1 + 1e-9, math.nan, -math.inf])
def test_a_time_outside_is_refused(schedule, t):
    if isinstance(schedule, sv.EDM) and t > 1:
        t = -t
    for function in (schedule.alpha, schedule.sigma, schedule.half_logsnr):
        with pytest.raises(ValueError, match=r"t = .* is outside the schedule's range \[0, (1|inf)\]"):
            function(tensor([0.5, t]))


@pytest.mark.parametrize(
    "name", ["vp", "vp falling beta", "cosine", "log-snr line", "log-snr given", *DISCRETE]
)
def test_variance_is_preserved(name):
    times = whole_range(SCHEDULES[name])
    total = SCHEDULES[name].alpha(times) ** 2 + SCHEDULES[name].sigma(times) ** 2
    assert (total - 1).abs().max() <= 4 * EPS


# High precision: the definitions in 60 decimal digits, at times that are exact in float64.


def series(first, ratio):
    """The sum of terms whose quotient is ratio(n)."""
    total = term = first
    n = 0
    while abs(term) > Decimal(10) ** -70:
        n += 1
        term *= ratio(n)
        total += term
    return total


def sin(x):
    return series(x, lambda n: -x * x / (2 * n * (2 * n + 1)))


def cos(x):
    return series(Decimal(1), lambda n: -x * x / (2 * n * (2 * n - 1)))


def linear_beta(schedule, t):
    return (
        Decimal(schedule.beta_min) * t + (Decimal(schedule.beta_max) - Decimal(schedule.beta_min)) * t * t / 2
    )


def exact_vp(s, t):
    alpha2 = (-linear_beta(s, t)).exp()
    return alpha2.sqrt(), (1 - alpha2).sqrt()


def exact_sub_vp(s, t):
    alpha2 = (-linear_beta(s, t)).exp()
    return alpha2.sqrt(), 1 - alpha2


def exact_cosine(s, t):
    shift = Decimal(s.shift)

    def c(t):
        return cos(PI / 2 * (t + shift) / (1 + shift))

    alpha = c(t) / c(Decimal(0))
    return alpha, (1 - alpha * alpha).sqrt()


def exact_ve(s, t):
    low, high = Decimal(s.sigma_min), Decimal(s.sigma_max)
    return Decimal(1), low * (t * (high / low).ln()).exp()


def exact_flow(s, t):
    sigma = Decimal(s.shift) * t / (1 + (Decimal(s.shift) - 1) * t)
    return 1 - sigma, sigma


def exact_log_snr(s, t):
    g = (
        gamma(t) if s.gamma else Decimal(s.gamma_min) + (Decimal(s.gamma_max) - Decimal(s.gamma_min)) * t
    ).exp()
    return 1 / (1 + g).sqrt(), (g / (1 + g)).sqrt()


EXACT = {
    "vp": exact_vp,
    "vp falling beta": exact_vp,
    "vp constant beta": exact_vp,
    "sub-vp": exact_sub_vp,
    "cosine": exact_cosine,
    "ve": exact_ve,
    "edm": lambda s, t: (Decimal(1), t),
    "flow": exact_flow,
    "flow shifted": exact_flow,
    "log-snr line": exact_log_snr,
    "log-snr given": exact_log_snr,
}
SIXTEENTHS = [2.0**-n for n in (40, 30, 20, 10, 4, 2, 1)]
EXACT_TIMES = [TINY, 1e-6, 1e-3, *SIXTEENTHS, 0.75, 1 - 2.0**-10, 1 - 2.0**-30, 1 - 2.0**-40, 1.0]


@pytest.mark.parametrize("name", EXACT)
def test_values_agree_with_sixty_digits_at_both_ends(name):
    schedule = CONTINUOUS[name]
    for t in EXACT_TIMES:
        alpha, sigma = EXACT[name](schedule, Decimal(t))
        at = tensor(t)
        if alpha > Decimal(10) ** -50:
            # e^-B loses B ulps to the rounding of its exponent
            assert float(schedule.alpha(at)) == pytest.approx(float(alpha), rel=16 * EPS, abs=0), t
            lam = float((alpha / sigma).ln())
            allowed = 8 * EPS * max(1, abs(lam)) + 2 * float(grain(schedule, at)[1])
            assert abs(float(schedule.half_logsnr(at)) - lam) <= allowed, t
        assert float(schedule.sigma(at)) == pytest.approx(float(sigma), rel=16 * EPS, abs=0), t


def test_one_minus_exp_in_float32_would_be_seen():
    """E2: the test above has the power to see it, and float32 times do not bring it back."""
    t = torch.tensor(1e-6)
    schedule = sv.VP()
    careless = torch.sqrt(1 - torch.exp(-(0.1 * t + 19.9 * t**2 / 2)))
    exact = float(exact_vp(schedule, Decimal(float(t)))[1])
    assert abs(float(careless) / exact - 1) > 1e-3
    assert float(schedule.sigma(t)) == pytest.approx(exact, rel=16 * EPS)


def exact_ends(betas):
    """Half log-SNR of the first and the last of some betas, by products in 60 digits."""
    bars = []
    bar = Decimal(1)
    for beta in betas.tolist():
        bar *= 1 - Decimal(beta)
        bars.append(bar)
    return [float((bar / (1 - bar)).ln() / 2) for bar in (bars[0], bars[-1])]


def test_ddpm_linear_has_the_published_range():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    schedule = sv.Discrete.linear(1000)
    first, last = schedule.half_logsnr(tensor([1e-3, 1.0])).tolist()
    assert (round(last, 4), round(first, 4)) == (-5.0588, 4.6051)
    assert [first, last] == pytest.approx(exact_ends(betas), abs=1e-13)
    # the interpolant is not the continuous VP (math.md 1.1)
    gap = schedule.half_logsnr(tensor([1e-3, 1.0])) - sv.VP().half_logsnr(tensor([1e-3, 1.0]))
    assert gap.tolist() == pytest.approx([0.047, -0.034], abs=5e-4)


def test_improved_ddpm_cosine_has_the_published_range_and_one_clipped_beta():
    schedule = sv.Discrete.cosine(1000)
    lam = schedule.half_logsnr(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    assert (round(float(lam[-1]), 3), round(float(lam[0]), 3)) == (-9.918, 5.047)
    assert int((lam < -5.1).sum()) == 4
    alpha2 = schedule.alpha(torch.arange(1001, dtype=torch.float64) / 1000) ** 2
    betas = 1 - alpha2[1:] / alpha2[:-1]
    assert int((betas > 0.999 - 1e-9).sum()) == 1


@pytest.mark.parametrize("levels", [10, 100, 1000, 4000])
@pytest.mark.parametrize("build", [sv.Discrete.linear, sv.Discrete.cosine], ids=["linear", "cosine"])
def test_the_label_of_level_n_is_n(build, levels):
    """E1 and B16: no hard-coded 1000, no renumbering after clipping; and the level carries the alpha of that beta."""
    schedule = (
        build(levels)
        if build == sv.Discrete.cosine
        else build(levels, beta_min=1 / levels / 100, beta_max=0.02)
    )
    n = torch.arange(levels, dtype=torch.float64)
    times = (n + 1) / levels
    assert torch.equal(schedule.label(times), n)
    between = times[:-1] + 0.25 / levels
    assert torch.allclose(schedule.label(between), n[:-1] + 0.25, rtol=0, atol=1e-9)
    assert torch.equal(schedule.label(sv.given(schedule, times.flip(0))), n.flip(0))


def test_a_level_carries_the_alpha_of_its_beta():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bars = (1 - betas).numpy().astype(np.longdouble).cumprod()
    schedule = sv.Discrete(betas)
    alpha2 = schedule.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000) ** 2
    assert np.allclose(alpha2.numpy(), bars.astype(float), rtol=1e-13, atol=0)
    # the same schedule from alphas_cumprod, but for their rounding
    again = sv.Discrete.from_alphas_cumprod(torch.from_numpy(bars.astype(float)))
    times = torch.linspace(0.01, 1, 777, dtype=torch.float64)
    assert torch.allclose(again.half_logsnr(times), schedule.half_logsnr(times), rtol=1e-12, atol=1e-12)


def test_below_the_first_level_nothing_is_nan():
    """The released code's extrapolation gives log alpha > 0 there (math.md 1.1)."""
    times = torch.logspace(-14, -3, 100, dtype=torch.float64)
    for schedule in DISCRETE.values():
        assert schedule.sigma(times).isfinite().all()
        assert (schedule.sigma(times) > 0).all()
        assert (schedule.alpha(times) <= 1).all()
        zero = tensor(0.0)
        assert (float(schedule.alpha(zero)), float(schedule.sigma(zero))) == (1.0, 0.0)


def test_zero_terminal_snr_is_exact():
    plain, schedule = sv.Discrete.linear(1000), sv.Discrete.linear(1000).zero_terminal_snr()
    ends = tensor([1.0, 1e-3])
    assert float(schedule.alpha(ends)[0]) == 0.0
    assert float(schedule.sigma(ends)[0]) == 1.0
    assert float(schedule.half_logsnr(ends)[0]) == -math.inf
    # the first level keeps its alpha, the others are shifted and scaled
    assert float(schedule.alpha(ends)[1]) == pytest.approx(float(plain.alpha(ends)[1]), rel=4 * EPS)
    levels = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha = plain.alpha(levels)
    expected = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    assert torch.allclose(schedule.alpha(levels), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["cosine", "flow", "flow shifted"])
def test_pure_noise_at_one_is_exact(name):
    schedule, end = CONTINUOUS[name], tensor(1.0)
    assert float(schedule.alpha(end)) == 0.0
    assert float(schedule.sigma(end)) == 1.0
    assert float(schedule.half_logsnr(end)) == -math.inf
    assert float(schedule.time(tensor(-math.inf))) == 1.0


@pytest.mark.parametrize("name", ["vp", "sub-vp", "cosine", "flow", "flow shifted", "edm", *DISCRETE])
def test_pure_data_at_zero_is_exact(name):
    schedule, end = SCHEDULES[name], tensor(0.0)
    assert float(schedule.alpha(end)) == 1.0
    assert float(schedule.sigma(end)) == 0.0
    assert float(schedule.half_logsnr(end)) == math.inf
    assert float(schedule.time(tensor(math.inf))) == 0.0


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 7.5])
def test_a_flow_shift_translates_half_logsnr(shift):
    times = torch.linspace(0.001, 0.999, 301, dtype=torch.float64)
    moved, plain = sv.Flow(shift).half_logsnr(times), sv.Flow().half_logsnr(times)
    assert (moved - plain + math.log(shift)).abs().max() <= 8 * EPS * 10
    # and is the published change of time
    warped = shift * times / (1 + (shift - 1) * times)
    assert torch.allclose(sv.Flow().sigma(warped), sv.Flow(shift).sigma(times), rtol=4 * EPS, atol=0)


def beta(s, t):
    return s.beta_min + (s.beta_max - s.beta_min) * t


def cosine_turn(s, t):
    return torch.tan(math.pi / 2 * (t + s.shift) / (1 + s.shift)) * math.pi / 2 / (1 + s.shift)


# math.md 1: f = d log alpha / dt, and g^2
DRIFT = {
    "vp": (lambda s, t: -beta(s, t) / 2, lambda s, t: beta(s, t)),
    "sub-vp": (
        lambda s, t: -beta(s, t) / 2,
        lambda s, t: beta(s, t) * -torch.expm1(-2 * (s.beta_min * t + (s.beta_max - s.beta_min) * t**2 / 2)),
    ),
    "cosine": (lambda s, t: -cosine_turn(s, t), lambda s, t: 2 * cosine_turn(s, t)),
    "ve": (lambda s, t: 0 * t, lambda s, t: 2 * s.sigma(t) ** 2 * math.log(s.sigma_max / s.sigma_min)),
    "edm": (lambda s, t: 0 * t, lambda s, t: 2 * t),
    "flow": (lambda s, t: -1 / (1 - t), lambda s, t: 2 * t / (1 - t)),
    "log-snr line": (
        lambda s, t: -(s.gamma_max - s.gamma_min) * s.sigma(t) ** 2 / 2,
        lambda s, t: (s.gamma_max - s.gamma_min) * s.sigma(t) ** 2,
    ),
}


@pytest.mark.parametrize("name", DRIFT)
def test_drift_and_diffusion_are_the_published_ones(name):
    schedule = CONTINUOUS[name]
    times = torch.linspace(0.01, 0.97, 97, dtype=torch.float64)
    f, g2 = DRIFT[name]
    assert torch.allclose(
        slope(lambda t: schedule.alpha(t).log(), times), f(schedule, times), rtol=1e-12, atol=1e-13
    )
    measured = -2 * schedule.sigma(times) ** 2 * slope(schedule.half_logsnr, times)
    assert torch.allclose(measured, g2(schedule, times), rtol=1e-12, atol=1e-13)


def test_cosine_starts_where_dpm_solver_does():
    assert round(float(sv.Cosine().half_logsnr(tensor(sv.Cosine().start))), 3) == -4.778

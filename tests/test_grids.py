"""Grids: both ends exact for every number of steps, and every point where its definition puts it."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import solvers as sv

EPS = torch.finfo(torch.float64).eps
STEPS = [*range(1, 61), 100, 999, 1000, 1001]
DDPM = sv.Discrete.linear(1000)
SCHEDULES = {
    "vp": sv.VP(),
    "cosine": sv.Cosine(),
    "ve": sv.VE(),
    "sub-vp": sv.SubVP(),
    "edm": sv.EDM(),
    "flow": sv.Flow(),
    "flow shifted": sv.Flow(shift=3.0),
    "log-snr": sv.LogSNR(),
    "log-snr given": sv.LogSNR(gamma=lambda t: -12 + 15 * t + 2 * t**3),
    "ddpm": DDPM,
    "iddpm": sv.Discrete.cosine(1000),
    "zero terminal snr": DDPM.zero_terminal_snr(),
}
ANYWHERE = {"uniform": sv.uniform, "quadratic": sv.quadratic}
BY_LOGSNR = {"logsnr": sv.logsnr, "karras": sv.karras}
SPACINGS = {"linspace": sv.linspace, "leading": sv.leading, "trailing": sv.trailing}


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def sound(schedule, times, steps, start, stop):
    """The promises of every grid."""
    assert times.dtype == torch.float64
    assert list(times.shape) == [steps + 1]
    assert (float(times[0]), float(times[-1])) == (start, stop)
    assert (times.diff() < 0).all()
    assert (schedule.half_logsnr(times).diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("grid", [*ANYWHERE.values(), *BY_LOGSNR.values()], ids=[*ANYWHERE, *BY_LOGSNR])
def test_a_grid_hits_its_ends_exactly_for_every_number_of_steps(grid, schedule):
    start, stop = schedule.start, schedule.stop
    if grid in BY_LOGSNR.values():  # which cannot stand at infinite half log-SNR
        start = 0.999 if math.isinf(schedule.half_logsnr(tensor(start))[0]) else start
        stop = 0.001 if math.isinf(schedule.half_logsnr(tensor(stop))[0]) else stop
    for steps in STEPS:
        sound(schedule, grid(schedule, steps, start=start, stop=stop), steps, start, stop)
    if (start, stop) == (schedule.start, schedule.stop):
        assert torch.equal(grid(schedule, 7), grid(schedule, 7, start=start, stop=stop))


@pytest.mark.parametrize("name", ["ddpm", "iddpm", "zero terminal snr"])
@pytest.mark.parametrize("grid", SPACINGS.values(), ids=SPACINGS.keys())
def test_a_discrete_spacing_calls_on_levels_exactly(grid, name):
    schedule = SCHEDULES[name]
    for steps in STEPS[:-1]:
        times = grid(schedule, steps)
        sound(schedule, times, steps, 1.0, 0.0)
        labels = schedule.label(times[:-1])
        assert torch.equal(labels, labels.round())
        assert torch.equal((labels + 1) / 1000, times[:-1])


@pytest.mark.parametrize("grid", SPACINGS.values(), ids=SPACINGS.keys())
def test_more_calls_than_levels_are_refused(grid):
    with pytest.raises(
        ValueError,
        match=r"fall on one level .* of the 1000 that the network knows: take fewer than 1001 steps",
    ):
        grid(DDPM, 1001)


@pytest.mark.parametrize(("start", "stop"), [(0.7, 0.2), (1.0, 0.05), (0.9, 0.001)])
@pytest.mark.parametrize(
    "grid",
    [*ANYWHERE.values(), *BY_LOGSNR.values(), *SPACINGS.values()],
    ids=[*ANYWHERE, *BY_LOGSNR, *SPACINGS],
)
def test_given_ends_are_hit_exactly(grid, start, stop):
    for steps in (1, 2, 3, 10, 33):
        sound(DDPM, grid(DDPM, steps, start=start, stop=stop), steps, start, stop)


@pytest.mark.parametrize("name", ["vp", "cosine", "ve", "sub-vp", "edm", "flow shifted", "ddpm"])
def test_logsnr_is_uniform_in_half_logsnr(name):
    schedule = SCHEDULES[name]
    start, stop = (0.999, 0.001) if name == "flow shifted" else (None, None)
    for steps in (1, 2, 7, 100):
        lam = schedule.half_logsnr(sv.logsnr(schedule, steps, start=start, stop=stop))
        even = torch.linspace(float(lam[0]), float(lam[-1]), steps + 1, dtype=torch.float64)
        assert (lam - even).abs().max() < 1e-12


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
def test_karras_is_equation_5(rho):
    i = torch.arange(19, dtype=torch.float64)
    high, low = 80.0 ** (1 / rho), 0.002 ** (1 / rho)
    expected = (high + i / 18 * (low - high)) ** rho
    assert torch.allclose(sv.karras(sv.EDM(), 18, rho=rho), expected, rtol=1e-12, atol=1e-13)
    # and on any schedule, in sigma / alpha
    vp = sv.VP()
    times = sv.karras(vp, 18, rho=rho)
    root = (vp.sigma(times) / vp.alpha(times)) ** (1 / rho)
    assert (root.diff() / root.diff().mean() - 1).abs().max() < 1e-10


def test_uniform_and_quadratic_are_even_in_t_and_its_root():
    for steps in (1, 2, 7, 100):
        times = sv.uniform(sv.VP(), steps)
        assert (times - torch.linspace(1.0, 1e-3, steps + 1, dtype=torch.float64)).abs().max() <= EPS
        root = sv.quadratic(sv.VP(), steps).sqrt()
        assert (root - torch.linspace(1.0, 1e-3**0.5, steps + 1, dtype=torch.float64)).abs().max() <= 2 * EPS


def test_linspace_and_trailing_are_the_published_spacings():
    """In fractions, halves to the even level; numpy's linspace, which is the published code, misses the half of 27 calls."""
    for steps in (*range(2, 130), 487, 999, 1000):
        labels = DDPM.label(sv.linspace(DDPM, steps)[:-1])
        assert labels.tolist() == [round(Fraction(999 * i, steps - 1)) for i in reversed(range(steps))], steps
        if steps < 27:
            assert labels.tolist() == np.linspace(0, 999, steps).round()[::-1].tolist(), steps
    for steps in (*range(1, 130), 496, 999, 1000):
        labels = DDPM.label(sv.trailing(DDPM, steps)[:-1])
        assert labels.tolist() == [round(1000 - Fraction(1000 * i, steps)) - 1 for i in range(steps)], steps
        if steps < 48:
            assert labels.tolist() == (np.arange(1000, 0, -1000 / steps).round() - 1).tolist(), steps


def test_leading_has_a_constant_stride_but_for_its_first_call():
    """Published: labels 0, c, 2c, ... with c = N // steps; the first call is moved to the start, where x stands."""
    for steps in (4, 5, 8, 10, 20, 50, 100, 500):
        labels = DDPM.label(sv.leading(DDPM, steps)[:-1])
        stride = 1000 // steps
        assert labels[0] == 999
        assert torch.equal(labels[1:], torch.arange(steps - 2, -1, -1, dtype=torch.float64) * stride)


def test_snap_moves_calls_to_levels_and_leaves_the_end():
    times = sv.snap(DDPM, [1.0, 0.70041, 0.3996, 0.01234])
    assert times.tolist() == [1.0, 0.7, 0.4, 0.01234]


def test_snap_changes_nothing_the_second_time():
    for steps in (1, 2, 5, 10, 17, 33):
        for grid in (sv.uniform, sv.quadratic, sv.logsnr, sv.karras):
            try:
                once = sv.snap(DDPM, grid(DDPM, steps))
            except ValueError as error:
                assert "fall on one level" in str(error)  # noqa: PT017
                continue
            assert torch.equal(sv.snap(DDPM, once), once)
            assert torch.equal(once[:-1], (once[:-1] * 1000).round() / 1000)


def test_snap_needs_a_level_for_every_call():
    with pytest.raises(ValueError, match=r"calls 1 and 2 fall on one level \(t = 0.5\) of the 1000"):
        sv.snap(DDPM, [1.0, 0.5001, 0.4999, 0.2])


def test_a_python_list_keeps_its_float64():
    """B12: 0.3 is not 0.30000001192092896, its float32, and 0.75 is not 0.752, its bfloat16."""
    assert sv.given(sv.VP(), [1.0, 0.3, 0.1]).tolist() == [1.0, 0.3, 0.1]
    assert sv.given(sv.VP(), (1.0, 0.3)).tolist() == [1.0, 0.3]
    assert sv.given(sv.VP(), np.array([1.0, 0.3, 0.1])[:]).tolist() == [1.0, 0.3, 0.1]
    assert sv.given(sv.VP(), np.array([0.1, 0.3, 1.0])[::-1]).tolist() == [1.0, 0.3, 0.1]
    assert sv.given(sv.EDM(), [80, 3, 0]).tolist() == [80.0, 3.0, 0.0]


def test_a_grid_does_not_follow_the_default_dtype():
    assert torch.get_default_dtype() == torch.float32
    try:
        torch.set_default_dtype(torch.bfloat16)
        for grid in (*ANYWHERE.values(), *BY_LOGSNR.values(), *SPACINGS.values()):
            assert grid(DDPM, 7).dtype == torch.float64
        inner = sv.linspace(DDPM, 4)
        assert sv.given(sv.VP(), [1.0, 0.3]).tolist() == [1.0, 0.3]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(inner, sv.linspace(DDPM, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_times_never_enter(dtype):
    """B12: they are rounded before anyone looks; two in 495 pairs of bfloat16 steps are the same step."""
    with pytest.raises(TypeError, match=f"times has dtype {dtype}: .* must not be rounded to half precision"):
        sv.given(DDPM, sv.uniform(DDPM, 5).to(dtype))


def test_a_grid_is_a_copy():
    times = tensor(1.0, 0.5, 0.1)
    array = np.array([1.0, 0.5, 0.1])
    grids = sv.given(sv.VP(), times), sv.given(sv.VP(), array), sv.ddim(sv.VP(), times).times
    times[1] = array[1] = 0.7
    assert all(grid.tolist() == [1.0, 0.5, 0.1] for grid in grids)


@pytest.mark.parametrize(
    ("schedule", "start", "stop"),
    [(sv.Flow(), "start=0.999", "stop=0.001"), (sv.Inversion(sv.Flow()), "start=0.001", "stop=0.999")],
)
def test_an_end_of_infinite_log_snr_is_named_with_what_is_0_there_and_what_to_write(schedule, start, stop):
    zeros = ("alpha", "sigma") if schedule.start > schedule.stop else ("sigma", "alpha")
    with pytest.raises(ValueError, match=f"start = .* has {zeros[0]} = 0 .* {start}, or take `angle`"):
        sv.logsnr(schedule, 5)
    with pytest.raises(ValueError, match=f"stop = .* has {zeros[1]} = 0 .* {stop}, or take `angle`"):
        sv.karras(schedule, 5, start=0.5)

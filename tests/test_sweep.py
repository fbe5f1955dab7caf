"""Every method, on every grid, at every number of steps: finite, with the declared calls, never far from the answer."""

import pytest
import torch

import solvers as sv
from problems import line_model
from solvers.methods import METHODS
from solvers.methods.unipc import recommended

BUILDS = {"recommended": recommended} | {name: method.build for name, method in METHODS.items()}
FEW = (*range(1, 13), 20)
MANY = (50, 100, 999, 1000, 1001)
EDM = sv.EDM()
GRIDS = (sv.uniform, sv.quadratic, sv.power, sv.logsnr, sv.karras, sv.angle)


def places(schedules, grids):
    """By name, a schedule and a grid."""
    return {
        f"{name} {grid.__name__}": (schedule, grid) for name, schedule in schedules.items() for grid in grids
    }


LEVELS = places({"ddpm": sv.Discrete.linear(1000)}, (sv.angle_levels, sv.trailing, sv.leading, sv.linspace))
PLACES = places({"vp": sv.VP()}, GRIDS) | places({"flow": sv.Flow()}, (sv.uniform, sv.angle)) | LEVELS
OTHER_PLACES = places({"edm": EDM, "cosine": sv.Cosine(), "subvp": sv.SubVP()}, GRIDS)
ALIKE = {
    "vp power",
    "vp karras",
    "vp quadratic",
    "flow uniform",
    "ddpm linspace",
    "ddpm leading",
}  # to others
EVERYWHERE = PLACES | OTHER_PLACES
FORMS = {name: build(sv.VP(), sv.logsnr(sv.VP(), 2)).predicts for name, build in BUILDS.items()}


def nfe(name, steps, times, schedule):
    """The calls declared, but one where a step of several touches infinite half log-SNR; from alpha = 0 not so in velocity form."""
    if name == "recommended":
        singlestep = steps >= 40 and not isinstance(schedule, sv.Discrete)
        method = METHODS["unipc_angle_4" if singlestep else "unipc_angle_2"]
    else:
        method = METHODS[name]
    lam = schedule.half_logsnr(times)
    lowered = lam[0].isinf() and FORMS[name] != "velocity"
    started = min(
        steps, method.start[0] + int(lowered and method.start[0] > 0)
    )  # then the start has one step more
    calls = [method.start[1]] * started + [method.calls_per_step] * (steps - started)
    if lowered:
        calls[0] = 1
    if lam[-1].isinf() and name != "pndm":
        calls[-1] = 1
    return sum(calls)


def check(name, schedule, grid, steps):
    times = grid(schedule, steps)
    lam = schedule.half_logsnr(times)
    if (lam[0].isinf() and FORMS[name] == "noise") or (lam.isinf().any() and FORMS[name] == "mixture"):
        with pytest.raises(ValueError, match=r"cannot start at alpha = 0|infinite half log-SNR"):
            BUILDS[name](schedule, times)
        return
    plan = BUILDS[name](schedule, times)
    assert plan.nfe == nfe(name, steps, times, schedule)
    x = schedule.sigma(times[0]) * torch.tensor([[-1.5], [-0.2], [0.1], [1.0]], dtype=torch.float64)
    x = x + schedule.alpha(times[0]) * torch.tensor([[-1.2], [0.3], [0.3], [1.5]], dtype=torch.float64)
    end = sv.run(plan, line_model(schedule), x)
    assert end.isfinite().all()
    if steps >= 50 and grid in (sv.logsnr, sv.angle):
        assert end.abs().max() < 3, end  # the data lies within (-2.2, 2.4)


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[pytest.mark.slow] * (place in ALIKE)) for place in PLACES]
)
@pytest.mark.parametrize("name", BUILDS)
def test_few_steps(name, place):
    for steps in FEW:
        check(name, *PLACES[place], steps)


@pytest.mark.slow
@pytest.mark.parametrize("place", OTHER_PLACES)
@pytest.mark.parametrize("name", BUILDS)
def test_few_steps_on_other_schedules(name, place):
    for steps in FEW:
        check(name, *OTHER_PLACES[place], steps)


@pytest.mark.slow
@pytest.mark.parametrize("steps", MANY)
@pytest.mark.parametrize("place", EVERYWHERE)
@pytest.mark.parametrize("name", BUILDS)
def test_many_steps(name, place, steps):
    schedule, grid = EVERYWHERE[place]
    if place in LEVELS and steps > schedule.levels:
        with pytest.raises(ValueError, match=r"fall on one level|expected at most 1000"):
            grid(schedule, steps)
        return
    check(name, schedule, grid, steps)
